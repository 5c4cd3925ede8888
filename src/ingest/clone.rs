//! A clone becomes a new snapshot: what was written to it is read, all else is taken over from the snapshot it stands on.

use std::sync::Arc;

use crate::clones::Base;
use crate::clones::folder::OpenClone;
use crate::error::Result;
use crate::image::reader::Image;
use crate::ingest::backup::{BackupOptions, BackupProgress, BackupReport, Changed, Parent, backup};
use crate::ingest::source::{Source, View};
use crate::name::SnapshotName;
use crate::store::Store;

/// A clone as it is seen: what was written over what it stands on.
struct Merged<B> {
    clone: Arc<OpenClone>,
    base: B,
}

impl<B: Base> View for Merged<B> {
    fn bytes(&self) -> u64 {
        self.clone.overlay().bytes()
    }

    fn next_data(&self, from: u64) -> Result<Option<(u64, u64)>> {
        let overlay = self.clone.overlay();
        let Some(start) = overlay.seek_data(&self.base, from)? else { return Ok(None) };
        Ok(Some((start, overlay.seek_hole(&self.base, start)?)))
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.clone.overlay().read_at(&self.base, offset, out)
    }
}

/// Makes a sealed snapshot of a clone that nobody writes. Its parent is the snapshot that the clone stands on, forgotten or
/// not; only segments that were written to are read. In another VM there is no parent, and all is read.
///
/// `image` is the clone's snapshot; `base` reads the same bytes, and may count them.
///
/// # Errors
/// As [`backup`]; what reading the clone meets.
pub fn commit_clone(
    store: &Store,
    clone: OpenClone,
    image: &Image,
    base: impl Base + 'static,
    name: &SnapshotName,
    progress: &dyn Fn(BackupProgress),
) -> Result<BackupReport> {
    let clone = Arc::new(clone);
    let source = Source::view(format!("clone {:?}", clone.name()), Merged { clone: clone.clone(), base });
    let options = if clone.description().vm == name.vm.as_str() {
        let touched = move |start: u64, end: u64| clone.overlay().has_any(start..end);
        let changed = Some(Changed::Known(Box::new(touched)));
        BackupOptions { parent: Some(Parent::Root(image.tree().root().clone())), changed }
    } else {
        BackupOptions::default()
    };
    backup(store, name, source, options, progress)
}
