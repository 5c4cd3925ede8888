//! The store's `min_age`: a sealed snapshot that is younger is not forgotten, whoever asks and whatever clock they have.
//!
//! Its age is what the medium says it is, which knows when the root page came and what time it is now.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::backend::Key;
use crate::catalog::roots::root_key;
use crate::catalog::state::FileEntry;
use crate::clock::in_words;
use crate::error::{Error, ErrorKind, Result};
use crate::store::Store;
use crate::units::FileId;

/// Snapshots that are too young to be forgotten.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Young {
    /// What is set in the store.
    pub min_age: Duration,
    /// The young ones, and how old they are.
    pub ages: BTreeMap<FileId, Duration>,
}

impl Young {
    /// The young ones among files of a VM. Drafts never are; nor is a snapshot whose root page is lost, in which there
    /// is nothing left to protect.
    ///
    /// Cost: a listing and a read; when an age is set, the ages of all root pages.
    ///
    /// # Errors
    /// As [`Store::settings`] and [`crate::backend::Backend::ages`].
    pub fn among<'a>(store: &Store, vm: &str, files: impl IntoIterator<Item = &'a FileEntry>) -> Result<Self> {
        let sealed: Vec<&FileEntry> = files.into_iter().filter(|f| f.sealed.is_some()).collect();
        if sealed.is_empty() {
            return Ok(Self::default());
        }
        let min_age = Duration::from_secs(store.settings()?.min_age_seconds);
        if min_age.is_zero() {
            return Ok(Self::default());
        }
        let keys: Vec<Key> = sealed.iter().map(|f| root_key(vm, f.root)).collect();
        let ages = store.backend().ages(&keys)?;
        let young =
            sealed.iter().zip(ages).filter_map(|(file, age)| Some((file.id, age.filter(|age| *age < min_age)?)));
        Ok(Self { min_age, ages: young.collect() })
    }

    /// How old a file is, and how old it must be, if it is too young.
    pub fn why(&self, file: FileId) -> Option<String> {
        let age = self.ages.get(&file)?;
        Some(format!("is {} old, the store's min_age is {}", in_words(*age), in_words(self.min_age)))
    }

    /// Refuses a file that is too young.
    ///
    /// # Errors
    /// `Denied`.
    pub fn refuse(&self, vm: &str, file: &FileEntry) -> Result<()> {
        match self.why(file.id) {
            Some(why) => Err(Error::new(ErrorKind::Denied, format!("snapshot {vm}/{} {why}", file.path()))),
            None => Ok(()),
        }
    }
}
