//! Tier 6: docs/FORMAT.md is what the program does. Its hex blocks are encoded from the values that the page gives,
//! decoded again, put together to a store that is opened and read; its tables are compared with the code; and what
//! the page says is refused, is.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use snapfs::backend::placement::{Copies, Scope, TargetId};
use snapfs::backend::testing::Memory;
use snapfs::backend::{Backend, Key};
use snapfs::catalog::hold::{Hold, HoldId, hold_key};
use snapfs::catalog::record::{
    Attributes, Changes, Commit, Op, PackEntry, Record, Target, checkpoint_object, open_checkpoint,
};
use snapfs::catalog::roots::{open_root, root_key, root_object};
use snapfs::catalog::state::VmState;
use snapfs::catalog::vm::{checkpoint_key, pack_key, record_key};
use snapfs::clock::{ManualClock, Timestamp};
use snapfs::clones::blocks::Blocks;
use snapfs::clones::description::Description;
use snapfs::clones::file::OsFile;
use snapfs::clones::map::{CloneId, End, Entry, Header, Mask, load};
use snapfs::cluster::job::{Job, ResultWriter};
use snapfs::error::{Error, ErrorKind};
use snapfs::fingerprint::{Fingerprint, digest, fingerprint, short};
use snapfs::format::{ENVELOPE_BYTES, ObjectKind, VERSION, envelop, open_envelope};
use snapfs::limits;
use snapfs::name::VmName;
use snapfs::pack::Content;
use snapfs::pack::frame::{CODEC_RAW, CODEC_ZSTD, FRAME_ROW_BYTES, FrameRow, RECIPE_PREFIX_BYTES, join_slots};
use snapfs::pack::index::{FORWARD_ROW_BYTES, HEADER_BYTES, Identity, PackIndex, TRAILER_BYTES, parse_object_name};
use snapfs::pack::reader::check_of;
use snapfs::pack::writer::{PackWriter, PackedFrame};
use snapfs::popular::index::{
    IndexBuilder, IndexIdentity, POPULAR_ENTRY_BYTES, POPULAR_HEADER_BYTES, POPULAR_PACK_BYTES, PopularIndex, index_key,
};
use snapfs::recipe::{Extent, GroupPage, GroupRef, Place, Recipe, RootPage, SlotSet, Tally};
use snapfs::store::config::{self, ConfigRecord, Replicas, Settings, StoreConfig, TargetRow};
use snapfs::store::targets::TargetFile;
use snapfs::store::{MemoryShares, Store};
use snapfs::units::{Epoch, Generation, Incarnation, ObjectId, RecordNumber, Serial, SlotId, VmGroup};
use snapfs::wire::{decode, encode};

const PAGE: &str = include_str!("../../docs/FORMAT.md");

const INCARNATION: Incarnation = Incarnation([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
const BEGAN: Timestamp = Timestamp(1_700_000_000_000_000_000);
const FILE: Serial = Serial(0x2_0000);
const DATA_PACK: Serial = Serial(0x2_0001);
const RECIPE_PACK: Serial = Serial(0x2_0002);
const ROOT: Serial = Serial(0x2_0003);
const COMMON_PACK: Serial = Serial(0x8000_0002_0000);
const STORE: &str = "00112233445566778899aabbccddeeff";

/// The hex blocks of the page, by name. A `#` begins a comment.
pub fn blocks() -> BTreeMap<String, Vec<u8>> {
    let mut blocks = BTreeMap::new();
    for (name, text) in fenced("hex name=") {
        let digits: String = text
            .lines()
            .map(|line| line.split('#').next().unwrap_or(""))
            .collect::<String>()
            .split_whitespace()
            .collect();
        let bytes = digits.as_bytes().chunks(2).map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16));
        let bytes: Result<Vec<u8>, _> = bytes.collect();
        let bytes = bytes.unwrap_or_else(|e| panic!("docs/FORMAT.md, block {name}: {e}"));
        assert!(blocks.insert(name.clone(), bytes).is_none(), "two blocks are called {name}");
    }
    blocks
}

/// The text of the page's example of `snapfs.toml`.
pub fn snapfs_toml() -> String {
    fenced("toml name=").into_iter().find(|(name, _)| name == "snapfs.toml").expect("no example").1
}

/// The text of the page's example of `clone.json`.
pub fn clone_json() -> String {
    fenced("json name=").into_iter().find(|(name, _)| name == "clone.json").expect("no example").1
}

fn fenced(kind: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut lines = PAGE.lines();
    while let Some(line) = lines.next() {
        if let Some(name) = line.strip_prefix("```").and_then(|l| l.strip_prefix(kind)) {
            let text = lines.by_ref().take_while(|l| *l != "```").map(|l| format!("{l}\n")).collect();
            found.push((name.to_owned(), text));
        }
    }
    found
}

fn block(name: &str) -> Vec<u8> {
    blocks().remove(name).unwrap_or_else(|| panic!("docs/FORMAT.md has no block {name}"))
}

/// The bytes of a block are those of a value, and only those.
fn same(name: &str, bytes: &[u8]) {
    assert_eq!(hex(bytes), hex(&block(name)), "{name}: left the library, right docs/FORMAT.md");
}

fn hex(bytes: &[u8]) -> String {
    bytes.chunks(16).map(|line| line.iter().map(|b| format!("{b:02x} ")).collect::<String>() + "\n").collect()
}

fn after(seconds: u64) -> Timestamp {
    Timestamp(BEGAN.0 + seconds * 1_000_000_000)
}

fn folder() -> Attributes {
    Attributes { mode: 0o700, uid: 0, gid: 0, mtime: BEGAN }
}

fn first(number: Serial) -> ObjectId {
    ObjectId { number, generation: Generation(0) }
}

fn image_block() -> Vec<u8> {
    vec![b'B'; 4096]
}

fn recipe() -> Recipe {
    let mut segment = image_block();
    segment.resize(2 << 20, 0);
    let extent = Extent { first_block: 0, blocks: 1, first_slot: SlotId::new(DATA_PACK, 0) };
    Recipe { digest: digest(&segment), extents: vec![extent] }
}

fn place(slot: u16, frame_offset: u32, frame_bytes: u32, bytes: &[u8]) -> Place {
    let slot = SlotId::new(RECIPE_PACK, slot);
    Place { slot, generation: Generation(0), frame_offset, frame_bytes, check: check_of(bytes) }
}

fn group_page() -> GroupPage {
    let recipe = recipe().encode();
    let frame_bytes = (RECIPE_PREFIX_BYTES + 4 + recipe.len()) as u32;
    let mut page = GroupPage {
        recipes: vec![Some(place(0, HEADER_BYTES as u32, frame_bytes, &recipe))],
        data_blocks: 1,
        ..GroupPage::default()
    };
    page.slots.insert(SlotId::new(DATA_PACK, 0).0);
    page
}

fn root_page() -> RootPage {
    let (recipe, group) = (recipe().encode(), group_page().encode());
    let offset = HEADER_BYTES + RECIPE_PREFIX_BYTES + 4 + recipe.len();
    let page = place(1, offset as u32, (RECIPE_PREFIX_BYTES + 4 + group.len()) as u32, &group);
    RootPage {
        incarnation: INCARNATION,
        id: ROOT,
        file: FILE,
        image_bytes: 8192,
        lead: 0,
        created: after(2),
        parent: None,
        data_blocks: 1,
        tally: Tally { blocks_data: 1, blocks_new: 1, bytes_stored: 11, ..Tally::default() },
        groups: vec![GroupRef { group: 0, data_blocks: 1, page }],
    }
}

/// Both packs, written by the library into a backend.
fn write_packs(backend: &Memory) -> Vec<PackEntry> {
    let mut entries = Vec::new();
    let slots = [recipe().encode(), group_page().encode()];
    for (number, content) in [(DATA_PACK, Content::Data), (RECIPE_PACK, Content::Recipes)] {
        let identity = Identity { incarnation: INCARNATION, object: first(number), content };
        let mut writer = PackWriter::create(backend, &pack_key("web01", first(number)), identity).unwrap();
        let mut frame = |first_slot, codec, raw_bytes: usize, payload, print| {
            let frame = PackedFrame { first_slot, span: 1, present: 1, raw_bytes: raw_bytes as u32, codec, payload };
            writer.append(frame, &[print]).unwrap();
        };
        match content {
            Content::Data => {
                // One zstd block that repeats a byte, by hand: what a compressor writes depends on its version.
                let payload = vec![0x28, 0xb5, 0x2f, 0xfd, 0x60, 0x00, 0x0f, 0x03, 0x80, 0x00, b'B'];
                frame(0, CODEC_ZSTD, 4096, payload, fingerprint(&image_block()));
            }
            Content::Recipes => {
                for (slot, bytes) in (0..).zip(&slots) {
                    let raw = join_slots(std::slice::from_ref(bytes));
                    frame(slot, CODEC_RAW, raw.len(), raw, fingerprint(bytes));
                }
            }
        }
        let done = writer.finish().unwrap();
        entries.push(PackEntry {
            number,
            object: first(number),
            content,
            slots: done.slots[0].1,
            object_bytes: done.bytes,
            tail_bytes: done.tail_bytes,
        });
    }
    entries
}

fn records() -> Vec<(&'static str, Record)> {
    let record = |number: u32, session: Option<u32>, op: Op| Record {
        incarnation: INCARNATION,
        number: RecordNumber(number),
        time: after(u64::from(number) - 1),
        session: session.map(RecordNumber),
        ops: vec![op],
    };
    let mut holder = [0; 16];
    holder.iter_mut().zip(0xf0..=0xff).for_each(|(byte, value)| *byte = value);
    let commit = Commit {
        file: FILE,
        disk: None,
        name: "monday.img".into(),
        root: ROOT,
        image_bytes: 8192,
        data_blocks: 1,
        uid: 0,
        gid: 0,
        mtime: after(2),
        closed: true,
        sealed: true,
        packs: write_packs(&Memory::new()),
    };
    vec![
        ("record-create", record(1, None, Op::Create { attributes: folder() })),
        ("record-begin", record(2, None, Op::Begin { holder, host: "host1".into(), process: 4242, common_epoch: 0 })),
        ("record-commit", record(3, Some(2), Op::Commit { commit: Box::new(commit) })),
    ]
}

fn hold() -> Hold {
    Hold {
        incarnation: INCARNATION,
        id: HoldId { root: ROOT, mark: 0xfedc_ba98_7654_3210 },
        file: FILE,
        created: after(5),
        owner: "host1: clone web01-monday".into(),
    }
}

#[test]
fn a_hold_is_as_written() {
    same("hold", &hold().to_object());
    assert_eq!(Hold::from_object(&block("hold")).unwrap(), hold());
}

const CLONE: CloneId = CloneId([15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]);

fn clone_description() -> Description {
    Description {
        clone: CLONE,
        store: STORE.to_owned(),
        snapshot: "web01/monday.img".to_owned(),
        vm: "web01".to_owned(),
        incarnation: INCARNATION,
        file: FILE,
        root: ROOT,
        image_bytes: 8192,
        data_blocks: 1,
        created: Timestamp(after(6).0 + 7),
        hold: Some(hold().id.to_string()),
    }
}

#[test]
fn a_clone_is_as_written() {
    assert_eq!(clone_description().to_text().unwrap(), clone_json());
    assert_eq!(Description::parse(clone_json().as_bytes()).unwrap(), clone_description());
    let header = Header::new(CLONE, 8192, &Blocks::default());
    same("clone-map-header", &header.to_bytes());
    assert_eq!(Header::parse(&block("clone-map-header")).unwrap(), header);
    let entry = Entry { round: 1, index: 0, count: 1, first: 1, run: 1, mask: Mask::default() };
    same("clone-map-entry", &entry.to_bytes(CLONE, 1));
    assert_eq!(Entry::parse(CLONE, 2, 1, &block("clone-map-entry")).unwrap(), entry);
    assert!(Entry::parse(CLONE, 2, 2, &block("clone-map-entry")).is_err(), "another place");
    // Together they are the map of a clone whose second block was written.
    let mut blocks = Blocks::default();
    blocks.insert(1..2);
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[block("clone-map-header"), block("clone-map-entry")].concat(), 0).unwrap();
    let loaded = load(&OsFile::new("map", file), CLONE, 8192).unwrap();
    assert_eq!((loaded.blocks, loaded.is_torn, loaded.end), (blocks, false, End { entries: 2, round: 1 }));
}

fn state() -> VmState {
    let mut state = VmState::default();
    records().iter().for_each(|(_, record)| state.apply(record).unwrap());
    state
}

#[test]
fn a_checkpoint_is_the_state_as_written() {
    same("checkpoint", &checkpoint_object(&state()));
    assert_eq!(open_checkpoint(&block("checkpoint")).unwrap(), state());
}

fn store_config() -> StoreConfig {
    StoreConfig {
        format: 1,
        features: Vec::new(),
        store: STORE.into(),
        created: 1_700_000_000,
        block_bytes: 4096,
        segment_bytes: 2 << 20,
        checksum: plain_hex(&toml_checksum("")),
    }
}

fn toml_checksum(features: &str) -> [u8; 16] {
    short(b"snapfs.toml", &[b"1", features.as_bytes(), STORE.as_bytes(), b"1700000000", b"4096", b"2097152"])
}

fn plain_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn the_construction_of_checksums_is_as_written() {
    same("short-example", &short(b"a", &[b"bc"]));
}

#[test]
fn the_configuration_is_as_written() {
    assert_eq!(store_config().to_text().unwrap(), snapfs_toml());
    assert_eq!(StoreConfig::parse(snapfs_toml().as_bytes()).unwrap(), store_config());
    let settings = Settings { min_age_seconds: 7 * 86400, gc_grace_seconds: 0 };
    let record = ConfigRecord {
        store: STORE.into(),
        time: BEGAN,
        settings,
        targets: Vec::new(),
        replicas: Replicas::default(),
        moving: false,
    };
    same("config-record", &envelop(ObjectKind::Config, &encode(&record)));
    let object = block("config-record");
    assert_eq!(decode::<ConfigRecord>(open_envelope(ObjectKind::Config, &object).unwrap()).unwrap(), record);
    let row = TargetRow { id: [0x11; 16], path: "/mnt/a".into(), medium: 0x0102_0304, leaving: true };
    let replicas = Replicas { vm: 2, common: 3, quorum: 0 };
    let settings = Settings { gc_grace_seconds: 3600, ..settings };
    let record = ConfigRecord { settings, targets: vec![row], replicas, moving: true, ..record };
    same("config-targets", &envelop(ObjectKind::Config, &encode(&record)));
    let file = TargetFile::new(STORE, TargetId([0x11; 16]));
    let text = file.to_text().unwrap();
    assert!(PAGE.contains(&text), "{text}");
}

#[test]
fn the_places_of_a_vm_are_as_written() {
    let targets: Vec<TargetId> = [0x11, 0x22, 0x33].map(|byte| TargetId([byte; 16])).to_vec();
    let copies = Copies { vm: 2, common: 3, quorum: 0 };
    let told = |key: &str| {
        let places = Scope::of(key).places(&targets, copies);
        places.iter().map(|at| format!("{:02x}", targets[*at].0[0])).collect::<Vec<_>>().join(", ")
    };
    for (key, what) in [("vms/web01/log", "`web01`"), ("vms/db02/log", "`db02`")] {
        let row = format!("| {what} | {} |", told(key));
        assert!(PAGE.contains(&row), "{row}");
    }
}

#[test]
fn log_records_are_as_written() {
    for (name, record) in records() {
        same(name, &record.to_object());
        assert_eq!(Record::from_object(&block(name)).unwrap(), record, "{name}");
    }
}

#[test]
fn every_op_is_as_written() {
    let moved = PackEntry {
        number: DATA_PACK,
        object: ObjectId { number: Serial(0x2_0000), generation: Generation(7) },
        content: Content::Data,
        slots: 1,
        object_bytes: 700,
        tail_bytes: 200,
    };
    let brought =
        PackEntry { number: COMMON_PACK, object: first(COMMON_PACK), object_bytes: 301, tail_bytes: 189, ..moved };
    let changes = Changes { mode: Some(0o750), mtime: Some(BEGAN), ..Changes::default() };
    let disk = || "xvda".to_owned();
    let rename =
        Op::Rename { file: FILE, disk: Some(disk()), name: "tuesday.img".into(), replaced: Some(Serial(0x2_0009)) };
    let ops = [
        ("op-delete", Op::Delete {}),
        ("op-make-disk", Op::MakeDisk { name: disk(), attributes: folder() }),
        ("op-remove-disk", Op::RemoveDisk { name: disk() }),
        ("op-change", Op::Change { target: Target::Disk { name: disk() }, changes }),
        ("op-seal", Op::Seal { file: FILE }),
        ("op-rename", rename),
        ("op-forget", Op::Forget { file: FILE }),
        ("op-protect", Op::Protect { file: FILE, on: true }),
        ("op-move", Op::Move { packs: vec![moved], dead: vec![first(DATA_PACK)] }),
        ("op-drop", Op::Drop { packs: vec![DATA_PACK], roots: vec![ROOT] }),
        ("op-deleted", Op::Deleted {}),
        ("op-join", Op::Join { host: "host1".into(), process: 4242 }),
        ("op-bring", Op::Bring { group: VmGroup::default(), packs: vec![brought] }),
        ("op-publish", Op::Publish { epoch: 1, index: 1, condemned: SlotSet([SlotId::new(COMMON_PACK, 0).0].into()) }),
        ("op-fence", Op::Fence { before: RecordNumber(2) }),
        ("op-group", Op::Group { name: "tenant".into() }),
        ("op-mark", Op::Mark { file: FILE, lost_bytes: 8192 }),
    ];
    let mut tags: Vec<u8> = records().iter().map(|(_, r)| encode(&r.ops[0])[0]).collect();
    for (name, op) in ops {
        same(name, &encode(&op));
        assert_eq!(decode::<Op>(&block(name)).unwrap(), op, "{name}");
        tags.push(encode(&op)[0]);
    }
    tags.sort_unstable();
    // A new op needs an example, too: the first tag without one is not known.
    assert_eq!(tags, (1..=20).collect::<Vec<u8>>());
    assert!(decode::<Op>(&[21]).unwrap_err().to_string().contains("unknown tag"));
}

#[test]
fn pages_and_recipes_are_as_written() {
    same("recipe", &recipe().encode());
    assert_eq!(Recipe::decode(&block("recipe")).unwrap(), recipe());
    same("group-page", &group_page().encode());
    assert_eq!(GroupPage::decode(&block("group-page")).unwrap(), group_page());
    same("root-page", &root_object(&root_page()));
    assert_eq!(open_root(&block("root-page"), INCARNATION, ROOT).unwrap(), root_page());
}

#[test]
fn a_bitmap_has_one_form_however_it_came_about() {
    let slot = |at: u16| SlotId::new(DATA_PACK, at).0;
    let mut pages = [GroupPage::default(), GroupPage::default(), GroupPage::default()];
    pages[0].slots.insert_range(slot(10)..slot(9000));
    pages[1].slots.extend((10..9000).rev().map(slot));
    pages[2].slots.insert_range(slot(0)..slot(65535));
    pages[2].slots.remove_range(slot(0)..slot(10));
    pages[2].slots.remove_range(slot(9000)..=slot(65535));
    pages[2].slots.insert(7);
    pages[2].slots.remove(7);
    let bytes = pages.each_ref().map(GroupPage::encode);
    assert_eq!((hex(&bytes[1]), hex(&bytes[2])), (hex(&bytes[0]), hex(&bytes[0])));
    assert_eq!(GroupPage::decode(&bytes[0]).unwrap().slots.len(), 8990);
}

#[test]
fn packs_are_as_written() {
    let memory = Memory::new();
    let entries = write_packs(&memory);
    for (name, entry) in ["pack-data", "pack-recipes"].into_iter().zip(entries) {
        let object = memory.objects().remove(pack_key("web01", entry.object).as_str()).unwrap();
        same(name, &object);
        let tail = block(&format!("{name}-tail"));
        assert_eq!(tail.len(), entry.tail_bytes as usize);
        assert!(object.ends_with(&tail), "{name}: the tail is not its end");
        let identity = Identity { incarnation: INCARNATION, object: entry.object, content: entry.content };
        assert_eq!(Identity::from_header(&object[..HEADER_BYTES]).unwrap(), identity);
        let index = PackIndex::decode_tail(&tail, object.len() as u64).unwrap();
        assert_eq!((index.identity, index.members.len()), (identity, 1));
        let member = index.member(entry.number).unwrap();
        assert_eq!((member.slots, member.frames.len()), (entry.slots, entry.slots as usize));
        for (row, offset) in member.frames.iter().zip(&member.offsets) {
            let stored = &object[*offset as usize..][..row.stored_bytes as usize];
            let raw = row.open(entry.content, INCARNATION, entry.number, stored).unwrap();
            let expected = match (entry.content, row.first_slot) {
                (Content::Data, _) => image_block(),
                (_, 0) => join_slots(&[recipe().encode()]),
                _ => join_slots(&[group_page().encode()]),
            };
            assert_eq!(raw, expected);
        }
    }
    let frame = block("frame-recipes");
    let (row, payload) = FrameRow::split_prefix(&frame).unwrap();
    assert_eq!((row.first_slot, row.span(), row.codec, payload.len()), (0, 1, CODEC_RAW, row.raw_bytes as usize));
}

#[test]
fn a_pack_of_forwards_is_as_written() {
    let memory = Memory::new();
    let object = ObjectId { number: DATA_PACK, generation: Generation(7) };
    let identity = Identity { incarnation: INCARNATION, object, content: Content::Data };
    let mut writer = PackWriter::create(&memory, &pack_key("web01", object), identity).unwrap();
    let target = SlotId::new(COMMON_PACK, 0);
    writer.forward(0, target, fingerprint(&image_block())).unwrap();
    let done = writer.finish().unwrap();
    let bytes = memory.objects().remove(pack_key("web01", object).as_str()).unwrap();
    same("pack-forwards", &bytes);
    let tail = &bytes[bytes.len() - done.tail_bytes as usize..];
    let index = PackIndex::decode_tail(tail, bytes.len() as u64).unwrap();
    let member = index.member(DATA_PACK).unwrap();
    assert_eq!((member.slots, member.all_slots(), member.forward_of(0)), (0, 1, Some((target, 1))));
    assert_eq!((member.forward_of(1), member.page_of(0), member.pages()), (None, Some(0), 1));
}

/// The strongest proof: the page's objects, as they stand there, are a store.
#[test]
fn the_examples_are_a_store() {
    let memory = Memory::new();
    let put = |key: &Key, bytes: &[u8]| memory.put_new(key, bytes).unwrap();
    put(&Key::new(config::FILE_NAME), snapfs_toml().as_bytes());
    put(&Key::new("config/0000000001"), &block("config-record"));
    put(&pack_key("web01", first(DATA_PACK)), &block("pack-data"));
    put(&pack_key("web01", first(RECIPE_PACK)), &block("pack-recipes"));
    put(&root_key("web01", ROOT), &block("root-page"));
    let names = ["record-create", "record-begin", "record-commit"];
    for (number, name) in (1..).zip(names) {
        put(&record_key("web01", RecordNumber(number)), &block(name));
    }
    put(&checkpoint_key("web01", RecordNumber(3)), &block("checkpoint"));
    put(&hold_key("web01", hold().id), &block("hold"));
    for key in memory.objects().keys() {
        assert!(PAGE.contains(&format!("`{key}`")), "docs/FORMAT.md does not name {key}");
    }
    let clock = Arc::new(ManualClock::at(after(10)));
    let store = Store::with_backend(Arc::new(memory), None, clock, MemoryShares::default()).unwrap();
    let (vm, _) = store.vm(&VmName::new("web01").unwrap()).unwrap();
    assert_eq!(vm.holds().unwrap(), [hold()]);
    let bytes = crate::world::get(&store, "web01/monday.img").unwrap();
    assert_eq!(bytes, [image_block(), vec![0; 4096]].concat());
}

#[test]
fn a_popular_index_is_as_written() {
    let identity = IndexIdentity { incarnation: INCARNATION, epoch: Epoch(1) };
    let pack = Serial((1 << 47) | (1 << 16));
    let mut builder = IndexBuilder::default();
    for (slot, byte) in [(0, b'B'), (1, b'C')] {
        builder.add(VmGroup::default(), &fingerprint(&[byte; 4096]), SlotId::new(pack, slot)).unwrap();
    }
    let bytes = builder.encode(identity).unwrap();
    same("popular-index", &bytes);
    assert_eq!(PopularIndex::decode(&bytes).unwrap().encode(), bytes);
    assert_eq!(index_key(Epoch(1)).as_str(), "common/popular/0000000001.popular");
}

#[test]
fn job_objects_are_as_written() {
    let id = Job::id_of(&[b"example", b"1"]);
    let job = Job { id, key: Fingerprint([7; 32]), partitions: 2, body: b"body".to_vec() };
    same("job", &job.to_object());
    assert_eq!(Job::from_object(&block("job")).unwrap(), job);
    assert_eq!(Job::key_of(id).as_str(), "derived/jobs/f1165823df3aa10847fcce05d101eeb9/job");
    let memory = Memory::default();
    let mut writer = ResultWriter::create(&memory, &job, 1, 5).unwrap();
    writer.add(b"hello").unwrap();
    writer.finish().unwrap();
    same("partition-result", &memory.read_all(&job.partition_key(1), 1 << 20).unwrap());
    assert_eq!(job.partition_key(1).as_str(), "derived/jobs/f1165823df3aa10847fcce05d101eeb9/00001.partition");
}

/// Rows of the tables whose first cell is a name in backquotes and whose second is a number.
fn table(heading: &str) -> BTreeMap<String, u64> {
    let section = PAGE.split("\n## ").find(|s| s.starts_with(heading)).unwrap_or_else(|| panic!("no {heading}"));
    let rows = section.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| `")?.split('|').map(str::trim);
        let name = cells.next()?.trim_end_matches('`').to_owned();
        Some((name, cells.next()?.replace(' ', "").parse().ok()?))
    });
    rows.collect()
}

#[test]
fn limits_and_sizes_are_as_written() {
    let code: BTreeMap<String, u64> = [
        ("BLOCK_BYTES", limits::BLOCK_BYTES as u64),
        ("SEGMENT_BLOCKS", limits::SEGMENT_BLOCKS as u64),
        ("SEGMENT_BYTES", limits::SEGMENT_BYTES as u64),
        ("GROUP_SEGMENTS", limits::GROUP_SEGMENTS as u64),
        ("IMAGE_BYTES_MAX", limits::IMAGE_BYTES_MAX),
        ("PACK_BYTES_MAX", limits::PACK_BYTES_MAX),
        ("PACK_SLOTS_MAX", u64::from(limits::PACK_SLOTS_MAX)),
        ("PACK_MEMBERS_MAX", limits::PACK_MEMBERS_MAX as u64),
        ("FRAME_SLOTS_MAX", u64::from(limits::FRAME_SLOTS_MAX)),
        ("RECIPE_SLOT_BYTES_MAX", limits::RECIPE_SLOT_BYTES_MAX as u64),
        ("RECIPE_FRAME_BYTES_MAX", limits::RECIPE_FRAME_BYTES_MAX as u64),
        ("SLOT_PAGE_FINGERPRINTS", limits::SLOT_PAGE_FINGERPRINTS as u64),
        ("NAME_BYTES_MAX", limits::NAME_BYTES_MAX as u64),
        ("LOG_RECORD_BYTES_MAX", limits::LOG_RECORD_BYTES_MAX),
        ("ROOT_PAGE_BYTES_MAX", limits::ROOT_PAGE_BYTES_MAX),
        ("FILES_PER_VM_MAX", limits::FILES_PER_VM_MAX as u64),
        ("HOLD_BYTES_MAX", limits::HOLD_BYTES_MAX),
        ("HOLD_OWNER_BYTES_MAX", limits::HOLD_OWNER_BYTES_MAX as u64),
        ("SERIALS_PER_BEGIN", u64::from(limits::SERIALS_PER_BEGIN)),
        ("FRAME_BLOCKS", u64::from(limits::FRAME_BLOCKS)),
        ("RECIPE_FRAME_BYTES", limits::RECIPE_FRAME_BYTES as u64),
        ("LOG_CHECKPOINT_INTERVAL", limits::LOG_CHECKPOINT_INTERVAL),
        ("ENVELOPE_BYTES", ENVELOPE_BYTES as u64),
        ("HEADER_BYTES", HEADER_BYTES as u64),
        ("TRAILER_BYTES", TRAILER_BYTES as u64),
        ("FRAME_ROW_BYTES", FRAME_ROW_BYTES as u64),
        ("FORWARD_ROW_BYTES", FORWARD_ROW_BYTES as u64),
        ("CONDEMNED_SLOTS_MAX", limits::CONDEMNED_SLOTS_MAX),
        ("RECIPE_PREFIX_BYTES", RECIPE_PREFIX_BYTES as u64),
        ("VERSION", u64::from(VERSION)),
        ("POPULAR_ENTRIES_MAX", limits::POPULAR_ENTRIES_MAX),
        ("POPULAR_PACKS_MAX", u64::from(limits::POPULAR_PACKS_MAX)),
        ("POPULAR_BUCKET_ENTRIES", limits::POPULAR_BUCKET_ENTRIES),
        ("POPULAR_BUCKET_ENTRIES_MAX", limits::POPULAR_BUCKET_ENTRIES_MAX as u64),
        ("POPULAR_CHUNK_BUCKETS", limits::POPULAR_CHUNK_BUCKETS as u64),
        ("POPULAR_HEADER_BYTES", POPULAR_HEADER_BYTES as u64),
        ("POPULAR_PACK_BYTES", POPULAR_PACK_BYTES as u64),
        ("POPULAR_ENTRY_BYTES", POPULAR_ENTRY_BYTES as u64),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect();
    assert_eq!(table("14. Limits"), code);
}

#[test]
fn kinds_are_as_written() {
    let code = ObjectKind::ALL.map(|kind| (format!("{kind:?}").to_lowercase(), kind as u64));
    assert_eq!(table("5. Envelope"), BTreeMap::from(code));
}

#[test]
fn names_of_objects_are_as_written() {
    assert_eq!(record_key("web01", RecordNumber(3)).as_str(), "vms/web01/log/0000000003");
    assert_eq!(pack_key("web01", first(DATA_PACK)).as_str(), "vms/web01/packs/000000020001.0.pack");
    assert_eq!(root_key("web01", ROOT).as_str(), "vms/web01/snapshots/000000020003.snap");
    assert_eq!(hold_key("web01", hold().id).as_str(), "vms/web01/holds/000000020003.fedcba9876543210");
    for other in
        ["20001.0.pack", "000000020001.00.pack", "00000002000A.0.pack", "000000020001.pack", "+00000020001.0.pack"]
    {
        assert_eq!(parse_object_name(other), None, "{other}");
    }
}

fn refused<T: Debug>(outcome: Result<T, Error>, words: &str) {
    let error = outcome.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains(words), "{error}");
}

/// Changes of a preamble that a reader must refuse by name.
const NEWER: [(usize, u8, &str); 4] = [
    (8, 77, "unknown kind of object, kind=77"),
    (10, 2, "format version 2 is not known here"),
    (12, 4, "unknown incompatible feature, bits=0x4"),
    (15, 0x80, "unknown incompatible feature, bits=0x80000000"),
];

#[test]
fn newer_objects_are_refused_by_name() {
    for (at, value, words) in NEWER {
        let newer = |name: &str| {
            let mut object = block(name);
            object[at] = value;
            let checksum = short(b"snapfs object", &[&object[..16], &object[16..24], &object[40..]]);
            object[24..40].copy_from_slice(&checksum);
            object
        };
        for name in ["record-create", "record-begin", "record-commit"] {
            refused(Record::from_object(&newer(name)), words);
        }
        refused(open_checkpoint(&newer("checkpoint")), words);
        refused(Hold::from_object(&newer("hold")), words);
        refused(open_root(&newer("root-page"), INCARNATION, ROOT), words);
        refused(open_envelope(ObjectKind::Config, &newer("config-record")), words);
        for name in ["pack-data", "pack-recipes"] {
            let header = |bytes: &[u8]| {
                let mut header = bytes[..HEADER_BYTES].to_vec();
                header[at] = value;
                let checksum = short(b"snapfs pack header", &[&header[..HEADER_BYTES - 16]]);
                header[HEADER_BYTES - 16..].copy_from_slice(&checksum);
                header
            };
            let object = block(name);
            refused(Identity::from_header(&header(&object)), words);
            let mut tail = block(&format!("{name}-tail"));
            let trailer_at = tail.len() - TRAILER_BYTES;
            let trailer = &mut tail[trailer_at..];
            let newer = header(trailer);
            trailer[..HEADER_BYTES].copy_from_slice(&newer);
            let checksum = short(b"snapfs pack trailer", &[&trailer[..TRAILER_BYTES - 16]]);
            trailer[TRAILER_BYTES - 16..].copy_from_slice(&checksum);
            refused(PackIndex::tail_bytes_from_trailer(trailer), words);
            refused(PackIndex::decode_tail(&tail, object.len() as u64), words);
        }
    }
}

#[test]
fn a_newer_store_is_refused_by_name() {
    let text = snapfs_toml();
    refused(StoreConfig::parse(text.replace("format = 1", "format = 2").as_bytes()), "format 2 is not known here");
    let other = text.replace("features = []", "features = [\"forward-slots\"]");
    let other = other.replace(&store_config().checksum, &plain_hex(&toml_checksum("forward-slots")));
    refused(StoreConfig::parse(other.as_bytes()), "unknown incompatible feature \"forward-slots\"");
    let damaged = text.replace("features = []", "features = [\"forward-slots\"]");
    assert_eq!(StoreConfig::parse(damaged.as_bytes()).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn another_of_our_kinds_and_a_flipped_bit_are_damage() {
    let root = block("root-page");
    assert_eq!(open_envelope(ObjectKind::Record, &root).unwrap_err().kind(), ErrorKind::Corrupt);
    for (at, value, _) in NEWER {
        let mut flipped = root.clone();
        flipped[at] ^= value;
        assert_eq!(open_envelope(ObjectKind::Root, &flipped).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

#[test]
fn an_image_over_the_limit_is_refused() {
    for image_bytes in [limits::IMAGE_BYTES_MAX + 1, u64::MAX] {
        let root = RootPage { image_bytes, lead: 1, ..root_page() };
        assert_eq!(RootPage::decode_body(&root.encode_body()).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

#[test]
fn every_example_is_used() {
    let source = include_str!("format.rs");
    for name in blocks().keys() {
        let whole = name.strip_suffix("-tail").unwrap_or(name);
        assert!(source.contains(&format!("\"{whole}\"")), "block {name} proves nothing");
    }
}
