//! Records of a VM's log: what each says, and how it is stored.

use crate::catalog::state::VmState;
use crate::clock::Timestamp;
use crate::error::{Error, Result};
use crate::format::{ObjectKind, envelop, open_envelope};
use crate::pack::Content;
use crate::recipe::SlotSet;
use crate::units::{FileId, Incarnation, ObjectId, PackNumber, RecordNumber, RootId, VmGroup};
use crate::wire::{decode, encode, wire_enum, wire_struct};

wire_struct! {
    /// Owner, mode and time of a folder.
    #[derive(Copy)]
    pub struct Attributes {
        /// Permission bits.
        pub mode: u32,
        /// Owner.
        pub uid: u32,
        /// Group.
        pub gid: u32,
        /// Last change.
        pub mtime: Timestamp,
    }
}

wire_struct! {
    /// Attributes to change; `None` stays.
    #[derive(Copy, Default)]
    pub struct Changes {
        /// Permission bits.
        pub mode: Option<u32>,
        /// Owner.
        pub uid: Option<u32>,
        /// Group.
        pub gid: Option<u32>,
        /// Last change.
        pub mtime: Option<Timestamp>,
    }
}

wire_struct! {
    /// A pack and the object that holds it.
    #[derive(Copy)]
    pub struct PackEntry {
        /// The pack.
        pub number: PackNumber,
        /// The object.
        pub object: ObjectId,
        /// What its slots hold.
        pub content: Content,
        /// Slots present.
        pub slots: u32,
        /// Bytes of the object, other members included.
        pub object_bytes: u64,
        /// Bytes of the object's index and trailer.
        pub tail_bytes: u32,
    }
}

wire_struct! {
    /// A state of a file that was made durable.
    pub struct Commit {
        /// The file; a new one when the log does not know it.
        pub file: FileId,
        /// Disk folder, if any.
        pub disk: Option<String>,
        /// Name.
        pub name: String,
        /// Its root page.
        pub root: RootId,
        /// Bytes of the image.
        pub image_bytes: u64,
        /// Blocks with data.
        pub data_blocks: u64,
        /// Owner.
        pub uid: u32,
        /// Group.
        pub gid: u32,
        /// Last change of the content.
        pub mtime: Timestamp,
        /// Whether the last writer had closed it: after a crash its grace time begins anew.
        pub closed: bool,
        /// Whether it is sealed by this record.
        pub sealed: bool,
        /// Packs that it brings.
        pub packs: Vec<PackEntry>,
    }
}

wire_enum! {
    /// A folder or a file of a VM.
    pub enum Target {
        /// The VM's own folder.
        1 => Vm {},
        /// A disk's folder.
        2 => Disk { name: String },
        /// A file.
        3 => File { id: FileId },
    }
}

wire_enum! {
    /// An object that is out of use.
    #[derive(PartialOrd, Ord, Copy)]
    pub enum Dead {
        /// A root page.
        1 => Root { id: RootId },
        /// A pack object.
        2 => Pack { object: ObjectId },
    }
}

wire_enum! {
    /// One change of a VM. What is not in the log has not happened.
    pub enum Op {
        /// The VM begins (or begins again after it was deleted).
        1 => Create { attributes: Attributes },
        /// The VM is deleted with all that it has.
        2 => Delete {},
        /// A writer begins. Whoever began before is fenced by this record.
        3 => Begin { holder: [u8; 16], host: String, process: u32, common_epoch: u64 },
        /// A disk folder is made.
        4 => MakeDisk { name: String, attributes: Attributes },
        /// An empty disk folder is removed.
        5 => RemoveDisk { name: String },
        /// Owner, mode or time changes.
        6 => Change { target: Target, changes: Changes },
        /// A file's content is durable.
        7 => Commit { commit: Box<Commit> },
        /// A file becomes immutable.
        8 => Seal { file: FileId },
        /// A file gets another name; `replaced` is forgotten.
        9 => Rename { file: FileId, disk: Option<String>, name: String, replaced: Option<FileId> },
        /// A file is forgotten.
        10 => Forget { file: FileId },
        /// A file is protected against forgetting, or no longer.
        11 => Protect { file: FileId, on: bool },
        /// Packs have moved to new objects (compaction); the old objects may be deleted.
        12 => Move { packs: Vec<PackEntry>, dead: Vec<ObjectId> },
        /// Packs without live slots and roots that nobody needs: their objects may be deleted.
        13 => Drop { packs: Vec<PackNumber>, roots: Vec<RootId> },
        /// Everything that might have been deleted before this record has been.
        14 => Deleted {},
        /// A writer adds common packs, beside others who do: its serials derive from this record. Fences nobody.
        15 => Join { host: String, process: u32 },
        /// Common packs of one VM group that a writer added.
        16 => Bring { group: VmGroup, packs: Vec<PackEntry> },
        /// A new epoch of the popular set: that of the index, and common slots that nothing new may refer to.
        17 => Publish { epoch: u64, index: u64, condemned: SlotSet },
        /// Packs of writers that joined before this record are not brought any more.
        18 => Fence { before: RecordNumber },
        /// The VM belongs to this VM group from now on; an empty name: to that of all VMs without one.
        19 => Group { name: String },
        /// So many bytes of a snapshot cannot be read any more, as a repair found that could not heal them; 0: all can.
        20 => Mark { file: FileId, lost_bytes: u64 },
    }
}

impl<T: crate::wire::Wire> crate::wire::Wire for Box<T> {
    fn put(&self, out: &mut Vec<u8>) {
        (**self).put(out);
    }
    fn take(reader: &mut crate::wire::Reader<'_>) -> Result<Self> {
        Ok(Self::new(T::take(reader)?))
    }
}

wire_struct! {
    /// One record: changes that happen together or not at all.
    pub struct Record {
        /// The VM's incarnation.
        pub incarnation: Incarnation,
        /// Its place in the log.
        pub number: RecordNumber,
        /// When it was written, by the writer's clock.
        pub time: Timestamp,
        /// The begin record of the writer, `None` for changes that need no writer.
        pub session: Option<RecordNumber>,
        /// What changes, in order.
        pub ops: Vec<Op>,
    }
}

impl Record {
    /// The stored object.
    pub fn to_object(&self) -> Vec<u8> {
        envelop(ObjectKind::Record, &encode(self))
    }

    /// Reads a stored object.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`.
    pub fn from_object(bytes: &[u8]) -> Result<Self> {
        let within = |e: Error| e.within("log record");
        decode(open_envelope(ObjectKind::Record, bytes).map_err(within)?).map_err(within)
    }
}

/// The stored object of a checkpoint: the whole state after some record. It takes no number of the log, so that
/// losing it loses nothing while the records that it stands for are kept.
pub fn checkpoint_object(state: &VmState) -> Vec<u8> {
    envelop(ObjectKind::Checkpoint, &encode(state))
}

/// Reads a checkpoint.
///
/// # Errors
/// `Corrupt`, `Unsupported`.
pub fn open_checkpoint(bytes: &[u8]) -> Result<VmState> {
    let within = |e: Error| e.within("checkpoint");
    decode(open_envelope(ObjectKind::Checkpoint, bytes).map_err(within)?).map_err(within)
}
