//! Inode numbers: derived from what a thing is, so that they are the same after every restart.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::clones::map::CloneId;
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::short;
use crate::fs::types::{Ino, ROOT};
use crate::units::{FileId, Incarnation};

/// What an inode number stands for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Node {
    /// The root: one folder per VM.
    Root,
    /// `.snapfs`.
    Control,
    /// `.snapfs/status`.
    Status,
    /// `.snapfs/clones`.
    Clones,
    /// A writable clone: its name, and which one of that name.
    Clone(String, CloneId),
    /// A VM's folder.
    Vm(String),
    /// A disk's folder.
    Disk(String, String),
    /// A snapshot or draft: VM, its incarnation, file.
    File(String, Incarnation, FileId),
    /// `latest` of a VM or of one of its disks.
    Latest(String, Option<String>),
}

impl Node {
    fn hash(&self) -> u64 {
        let file;
        let parts: Vec<&[u8]> = match self {
            Self::Root => vec![b"root"],
            Self::Control => vec![b"control"],
            Self::Status => vec![b"status"],
            Self::Clones => vec![b"clones"],
            Self::Clone(name, id) => vec![b"clone", name.as_bytes(), &id.0],
            Self::Vm(vm) => vec![b"vm", vm.as_bytes()],
            Self::Disk(vm, disk) => vec![b"disk", vm.as_bytes(), disk.as_bytes()],
            Self::File(vm, incarnation, id) => {
                file = id.0.to_le_bytes();
                vec![b"file", vm.as_bytes(), &incarnation.0, &file]
            }
            Self::Latest(vm, Some(disk)) => vec![b"latest", vm.as_bytes(), disk.as_bytes()],
            Self::Latest(vm, None) => vec![b"latest", vm.as_bytes()],
        };
        let print = short(b"snapfs inode", &parts);
        print.first_chunk::<8>().map_or(0, |head| u64::from_le_bytes(*head)) >> 1
    }
}

/// The inode numbers that the kernel knows, each with how often it was told: as many forgets take it away again, so
/// the table is as large as the kernel's cache and not as the store (I8).
#[derive(Debug, Default)]
pub struct Nodes(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    by_ino: HashMap<Ino, Known>,
    by_node: HashMap<Node, Ino>,
}

#[derive(Debug)]
struct Known {
    node: Node,
    lookups: u64,
}

impl Table {
    /// Two nodes of one hash (which 2^32 files make likely) get neighbouring numbers.
    fn number_of(&self, node: &Node) -> Ino {
        if let Some(ino) = self.by_node.get(node) {
            return *ino;
        }
        let mut ino = Ino(node.hash().max(2));
        while self.by_ino.contains_key(&ino) {
            ino = Ino((ino.0 + 1).max(2));
        }
        ino
    }
}

impl Nodes {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of a node, for a listing.
    pub fn ino(&self, node: &Node) -> Ino {
        if *node == Node::Root { ROOT } else { self.table().number_of(node) }
    }

    /// The number of a node that the kernel is told of, and will forget.
    pub fn remember(&self, node: &Node) -> Ino {
        if *node == Node::Root {
            return ROOT;
        }
        let mut table = self.table();
        let ino = table.number_of(node);
        if let Some(known) = table.by_ino.get_mut(&ino) {
            known.lookups = known.lookups.saturating_add(1);
        } else {
            table.by_ino.insert(ino, Known { node: node.clone(), lookups: 1 });
            table.by_node.insert(node.clone(), ino);
        }
        ino
    }

    /// Takes back so many of the times that a number was told.
    pub fn forget(&self, ino: Ino, lookups: u64) {
        let mut table = self.table();
        let Some(known) = table.by_ino.get_mut(&ino) else { return };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups == 0
            && let Some(known) = table.by_ino.remove(&ino)
        {
            table.by_node.remove(&known.node);
        }
    }

    /// The node of a number.
    ///
    /// # Errors
    /// `Stale` for one that the kernel was not told, or has forgotten.
    pub fn node(&self, ino: Ino) -> Result<Node> {
        if ino == ROOT {
            return Ok(Node::Root);
        }
        let known = self.table().by_ino.get(&ino).map(|known| known.node.clone());
        known.ok_or_else(|| Error::new(ErrorKind::Stale, format!("inode {}", ino.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_kept_as_long_as_the_kernel_knows_it_and_is_the_same_again_later() {
        let nodes = Nodes::default();
        let node = |name: &str| Node::Vm(name.to_owned());
        let listed = nodes.ino(&node("a"));
        assert!(nodes.node(listed).is_err(), "a listing tells no numbers that come back");
        assert_eq!(nodes.remember(&node("a")), listed);
        assert_eq!(nodes.remember(&node("a")), listed);
        nodes.forget(listed, 1);
        assert_eq!(nodes.node(listed).unwrap(), node("a"));
        nodes.forget(listed, 1);
        nodes.forget(listed, 1);
        assert_eq!(nodes.node(listed).unwrap_err().kind(), ErrorKind::Stale);
        assert_eq!(nodes.remember(&node("a")), listed);
        nodes.forget(listed, u64::MAX);
        for name in 0..1000 {
            let ino = nodes.remember(&node(&name.to_string()));
            nodes.forget(ino, 1);
        }
        assert!(nodes.table().by_ino.is_empty() && nodes.table().by_node.is_empty());
        nodes.forget(ROOT, 1);
        assert_eq!(nodes.node(ROOT).unwrap(), Node::Root);
    }

    #[test]
    fn nodes_of_one_hash_are_told_apart() {
        let nodes = Nodes::default();
        let (a, b) = (Node::Vm("a".to_owned()), Node::Vm("b".to_owned()));
        let taken = nodes.ino(&a);
        nodes.table().by_ino.insert(taken, Known { node: b.clone(), lookups: 1 });
        nodes.table().by_node.insert(b.clone(), taken);
        assert_eq!(nodes.remember(&a), Ino(taken.0 + 1));
        nodes.forget(taken, 1);
        assert_eq!(nodes.remember(&a), Ino(taken.0 + 1), "while it is known it stays");
        assert_eq!(nodes.node(Ino(taken.0 + 1)).unwrap(), a);
    }
}
