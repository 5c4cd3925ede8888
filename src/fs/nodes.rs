//! Inode numbers: derived from what a thing is, so that they are the same after every restart.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

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

/// The inode numbers that were given out.
#[derive(Debug, Default)]
pub struct Nodes(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    by_ino: HashMap<Ino, Node>,
    by_node: HashMap<Node, Ino>,
}

impl Nodes {
    /// The number of a node. Two nodes of one hash (which 2^32 files make likely) get neighbouring numbers.
    pub fn ino(&self, node: &Node) -> Ino {
        if *node == Node::Root {
            return ROOT;
        }
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ino) = table.by_node.get(node) {
            return *ino;
        }
        let mut ino = Ino(node.hash().max(2));
        while table.by_ino.contains_key(&ino) {
            ino = Ino((ino.0 + 1).max(2));
        }
        table.by_ino.insert(ino, node.clone());
        table.by_node.insert(node.clone(), ino);
        ino
    }

    /// The node of a number.
    ///
    /// # Errors
    /// `Stale` for one that was never given out.
    pub fn node(&self, ino: Ino) -> Result<Node> {
        if ino == ROOT {
            return Ok(Node::Root);
        }
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.by_ino.get(&ino).cloned().ok_or_else(|| Error::new(ErrorKind::Stale, format!("inode {}", ino.0)))
    }
}
