//! Holds: objects that keep a snapshot's bytes after it is forgotten. A clone puts one, and deletes it when it goes.
//!
//! Whose hold is put before the log still shows the snapshot is safe: collection reads the log first and lists holds
//! after it, so whoever forgets comes later than the hold, and collection sees it (I6). The root page stands in the
//! key: a listing tells all that collection must know, and a damaged hold keeps what it kept.

use std::collections::BTreeSet;
use std::fmt;

use crate::backend::Key;
use crate::catalog::vm::{Vm, home_folder};
use crate::clock::Timestamp;
use crate::error::{Error, ErrorKind, Result, corrupt, invalid};
use crate::format::{ObjectKind, envelop, open_envelope};
use crate::limits::{HOLD_BYTES_MAX, HOLD_OWNER_BYTES_MAX};
use crate::random::fill_random;
use crate::units::{FileId, Incarnation, RecordNumber, RootId, Serial};
use crate::wire::{decode, encode, wire_struct};

wire_struct! {
    /// The name of a hold: the root page that it keeps, and a mark that tells several holds of it apart.
    #[derive(Copy, Hash, PartialOrd, Ord)]
    pub struct HoldId {
        /// The root page.
        pub root: RootId,
        /// Drawn at random.
        pub mark: u64,
    }
}

impl fmt::Display for HoldId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}.{:016x}", self.root, self.mark)
    }
}

impl HoldId {
    /// The hold of this name, if it is spelled as [`HoldId`] is displayed.
    pub fn parse(name: &str) -> Option<Self> {
        let (root, mark) = name.split_once('.')?;
        let root = Serial(u64::from_str_radix(root, 16).ok()?);
        let id = Self { root, mark: u64::from_str_radix(mark, 16).ok()? };
        (root.is_valid() && id.to_string() == name).then_some(id)
    }
}

wire_struct! {
    /// A hold.
    pub struct Hold {
        /// The VM's incarnation.
        pub incarnation: Incarnation,
        /// Its name, with the root page that it keeps.
        pub id: HoldId,
        /// The snapshot's file, which may be forgotten.
        pub file: FileId,
        /// When it was put, by the clock of who put it.
        pub created: Timestamp,
        /// Whose it is, for people: one line.
        pub owner: String,
    }
}

impl Hold {
    /// The stored object.
    pub fn to_object(&self) -> Vec<u8> {
        envelop(ObjectKind::Hold, &encode(self))
    }

    /// Reads a stored object.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`.
    pub fn from_object(bytes: &[u8]) -> Result<Self> {
        let within = |e: Error| e.within("hold");
        let hold: Self = decode(open_envelope(ObjectKind::Hold, bytes).map_err(within)?).map_err(within)?;
        check_owner(&hold.owner).map_err(|e| e.as_kind(ErrorKind::Corrupt))?;
        Ok(hold)
    }
}

/// It is shown in terminals.
fn check_owner(owner: &str) -> Result<()> {
    if owner.len() > HOLD_OWNER_BYTES_MAX {
        return Err(invalid(format!("hold: owner of {} bytes, at most {HOLD_OWNER_BYTES_MAX}", owner.len())));
    }
    if owner.chars().any(char::is_control) { Err(invalid("hold: owner with control characters")) } else { Ok(()) }
}

/// The folder of a VM's holds.
pub fn holds_prefix(vm: &str) -> Key {
    Key::new(format!("{}/holds", home_folder(vm)))
}

/// The key of a hold.
pub fn hold_key(vm: &str, id: HoldId) -> Key {
    Key::new(format!("{}/holds/{id}", home_folder(vm)))
}

impl Vm {
    /// Keeps the bytes of a snapshot (or of a draft's last commit) until [`Vm::release_hold`], whoever forgets it and
    /// however often the host starts anew. `owner` says whose the hold is, for people: one line of at most
    /// [`HOLD_OWNER_BYTES_MAX`] bytes.
    ///
    /// Several holds of one snapshot are independent. After a crash here a hold may be left that nobody knows; it
    /// costs the room of its snapshot until it is released.
    ///
    /// Cost: two listings of the log, one put.
    ///
    /// # Errors
    /// `Stale` when the file is not there, or not with this root page (any more): then no hold is left. `Invalid`
    /// owner, `Corrupt` when the log is damaged, `NoSpace`, `ReadOnly`, `Unavailable`: one may be left.
    pub fn put_hold(&self, file: FileId, root: RootId, owner: &str) -> Result<HoldId> {
        check_owner(owner)?;
        // What is gone already needs no put.
        let incarnation = self.still_has(file, root)?;
        let mut mark = [0; 8];
        fill_random(&mut mark)?;
        let id = HoldId { root, mark: u64::from_le_bytes(mark) };
        let hold = Hold { incarnation, id, file, created: self.clock().now(), owner: owner.to_owned() };
        let key = hold_key(self.name(), id);
        let put = self.backend().put_new(&key, &hold.to_object());
        if let Err(e) = &put
            && e.kind() == ErrorKind::Exists
        {
            // Somebody else's, by an incredible chance: not ours to delete.
            return Err(Error::new(ErrorKind::Unavailable, format!("{key}: the mark is taken, try again")));
        }
        // Only a snapshot that the log shows after the put is safe: collection reads the log before it lists holds.
        put.and_then(|()| self.still_has(file, root)).map(|_| id).inspect_err(|_| {
            if let Err(e) = self.backend().delete(&key) {
                log::warn!("{key}: is of no use, and stays: {e}");
            }
        })
    }

    /// The incarnation, if the newest state has the file with this root page.
    fn still_has(&self, file: FileId, root: RootId) -> Result<Incarnation> {
        let state = self.refresh()?;
        if let Some(damage) = self.damage() {
            return Err(damage.duplicate());
        }
        match state.files.get(&file) {
            Some(entry) if entry.root == root => Ok(state.incarnation),
            _ => Err(Error::new(
                ErrorKind::Stale,
                format!("VM {:?}: file {file} with root page {root} is not there any more", self.name()),
            )),
        }
    }

    /// Lets go of a hold; one that is not there is no error. The next collection frees what only it kept.
    ///
    /// A power loss may bring it back; releasing it again is right.
    ///
    /// # Errors
    /// `ReadOnly`, `Unavailable`.
    pub fn release_hold(&self, id: HoldId) -> Result<()> {
        self.backend().delete(&hold_key(self.name(), id))
    }

    /// The names of all holds of the VM, damaged ones too. Cost: one listing.
    ///
    /// # Errors
    /// `Unavailable`, `Denied`.
    pub fn hold_ids(&self) -> Result<Vec<HoldId>> {
        let rows = self.backend().list(&holds_prefix(self.name()))?;
        Ok(rows.iter().filter(|row| !row.is_folder).filter_map(|row| HoldId::parse(&row.name)).collect())
    }

    /// The root pages that holds keep. Cost: one listing.
    ///
    /// # Errors
    /// `Unavailable`, `Denied`.
    pub fn held_roots(&self) -> Result<BTreeSet<RootId>> {
        Ok(self.hold_ids()?.into_iter().map(|id| id.root).collect())
    }

    /// Reads one hold. Cost: one read.
    ///
    /// # Errors
    /// `NotFound` when it was released, `Corrupt` (it keeps what it keeps all the same), `Unsupported`, `Unavailable`;
    /// all name the object.
    pub fn read_hold(&self, id: HoldId) -> Result<Hold> {
        let key = hold_key(self.name(), id);
        let state = match self.state() {
            unread if unread.number == RecordNumber(0) => self.refresh()?,
            known => known,
        };
        let mut hold = None;
        let mut verify = |bytes: &[u8]| {
            let read = Hold::from_object(bytes).map_err(|e| e.within(&key))?;
            if (read.incarnation, read.id) != (state.incarnation, id) {
                return Err(corrupt(format!("{key}: is another hold, {}, or of another VM", read.id)));
            }
            hold = Some(read);
            Ok(())
        };
        self.backend().read_all_checked(&key, HOLD_BYTES_MAX, &mut verify)?;
        hold.ok_or_else(|| corrupt(format!("{key}: was not read")))
    }

    /// All holds of the VM, by root page. Cost: one listing, one read each.
    ///
    /// # Errors
    /// As [`Vm::read_hold`], for the first that cannot be read; [`Vm::hold_ids`] goes past damaged ones.
    pub fn holds(&self) -> Result<Vec<Hold>> {
        let mut holds = Vec::new();
        for id in self.hold_ids()? {
            match self.read_hold(id) {
                // Released since it was listed.
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                read => holds.push(read?),
            }
        }
        Ok(holds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_only_as_it_is_written() {
        let id = HoldId { root: Serial(0x2_0003), mark: 0xfe };
        assert_eq!(id.to_string(), "000000020003.00000000000000fe");
        assert_eq!(HoldId::parse(&id.to_string()), Some(id));
        for other in [
            "000000020003",
            "000000020003.",
            "000000020003.fe",
            "000000020003.00000000000000FE",
            "20003.00000000000000fe",
            "+00000020003.00000000000000fe",
            "000000020003.00000000000000fe.x",
            "0001000000000000.00000000000000fe",
        ] {
            assert_eq!(HoldId::parse(other), None, "{other}");
        }
    }

    #[test]
    fn an_owner_is_one_short_line() {
        let hold = |owner: &str| Hold {
            incarnation: Incarnation([7; 16]),
            id: HoldId { root: Serial(1), mark: 2 },
            file: Serial(3),
            created: Timestamp(4),
            owner: owner.to_owned(),
        };
        assert_eq!(Hold::from_object(&hold("ä b").to_object()).unwrap(), hold("ä b"));
        for owner in ["a\nb".to_owned(), "x".repeat(HOLD_OWNER_BYTES_MAX + 1)] {
            let error = Hold::from_object(&hold(&owner).to_object()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
    }
}
