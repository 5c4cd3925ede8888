//! Root pages as objects.

use crate::backend::{Backend, Key};
use crate::catalog::vm::home_folder;
use crate::error::{Result, corrupt};
use crate::format::{ObjectKind, envelop, open_envelope};
use crate::limits::ROOT_PAGE_BYTES_MAX;
use crate::recipe::RootPage;
use crate::units::{Incarnation, RootId, Serial};

/// The key of a root page.
pub fn root_key(vm: &str, id: RootId) -> Key {
    Key::new(format!("{}/snapshots/{id}.snap", home_folder(vm)))
}

/// The root that a file name stands for.
pub fn parse_root_name(name: &str) -> Option<RootId> {
    let id = Serial(u64::from_str_radix(name.strip_suffix(".snap")?, 16).ok()?);
    (id.is_valid() && format!("{id}.snap") == name).then_some(id)
}

/// The stored object of a root page.
pub fn root_object(root: &RootPage) -> Vec<u8> {
    envelop(ObjectKind::Root, &root.encode_body())
}

/// Decodes a root page and checks that it is the one that was asked for.
///
/// # Errors
/// `Corrupt`, `Unsupported`.
pub fn open_root(bytes: &[u8], incarnation: Incarnation, id: RootId) -> Result<RootPage> {
    let root = RootPage::decode_body(open_envelope(ObjectKind::Root, bytes)?)?;
    if (root.incarnation, root.id) == (incarnation, id) {
        Ok(root)
    } else {
        Err(corrupt(format!("root page of another snapshot, id={}", root.id)))
    }
}

/// Reads a root page. Cost: one backend read.
///
/// # Errors
/// `NotFound`, `Corrupt`, `Unsupported`, `Unavailable`; all name the object.
pub fn read_root(backend: &dyn Backend, vm: &str, incarnation: Incarnation, id: RootId) -> Result<RootPage> {
    let key = root_key(vm, id);
    let mut root = None;
    let mut verify = |bytes: &[u8]| {
        root = Some(open_root(bytes, incarnation, id).map_err(|e| e.within(&key))?);
        Ok(())
    };
    backend.read_all_checked(&key, ROOT_PAGE_BYTES_MAX, &mut verify)?;
    root.ok_or_else(|| corrupt(format!("{key}: was not read")))
}
