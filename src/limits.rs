//! Every limit of the format and of the engine, with its reason. Loops over outside data are bounded by these.

/// Bytes of a block, the unit of matching. Fixed by the science: 4 KiB is what guests' file systems allocate.
pub const BLOCK_BYTES: usize = 4096;

/// Blocks of a segment, the unit of change detection (2 MiB).
pub const SEGMENT_BLOCKS: usize = 512;

/// Bytes of a segment.
pub const SEGMENT_BYTES: usize = BLOCK_BYTES * SEGMENT_BLOCKS;

/// Segments that one group page describes (1 GiB): a page is a few KiB, and a touched one is cheap to write anew.
pub const GROUP_SEGMENTS: usize = 512;

/// Bytes of image that one group page describes.
pub const GROUP_BYTES: u64 = (SEGMENT_BYTES * GROUP_SEGMENTS) as u64;

/// An image has at most 64 TiB: its root page then holds 65 536 group references, which is 3 MiB.
pub const IMAGE_BYTES_MAX: u64 = 64 << 40;

/// A pack's frames take at most 64 MiB: what one VM loses with one object, and what compaction moves at a time.
pub const PACK_BYTES_MAX: u64 = 64 << 20;

/// A pack has at most 65 536 slots, so that a slot number is two bytes.
pub const PACK_SLOTS_MAX: u32 = 1 << 16;

/// A frame spans at most 64 slots, so that the slots present in it are one 64-bit mask.
pub const FRAME_SLOTS_MAX: u32 = 64;

/// Blocks of a frame of a data pack: 64 KiB raw. Chosen by measurement (docs/BENCHMARKS.md).
pub const FRAME_BLOCKS: u32 = 16;

/// A slot of a recipe pack has at most 4 MiB: the largest group page has one extent and one bitmap bit per block.
pub const RECIPE_SLOT_BYTES_MAX: usize = 4 << 20;

/// A frame of a recipe pack is closed at this many raw bytes: small enough for one cheap read.
pub const RECIPE_FRAME_BYTES: usize = 32 << 10;

/// The raw bytes of a recipe frame never exceed this (a slot of the largest size, and lengths).
pub const RECIPE_FRAME_BYTES_MAX: usize = RECIPE_SLOT_BYTES_MAX + (64 << 10);

/// Fingerprints of one page of a slot table (4 KiB): what one hit of the similarity index brings along.
pub const SLOT_PAGE_FINGERPRINTS: usize = 128;

/// Members (pack numbers) that one merged pack object may hold.
pub const PACK_MEMBERS_MAX: usize = 1024;

/// Index and trailer of a pack object have at most 64 MiB: four times those of the largest that compaction writes, 2^18
/// slots each in a frame of its own.
pub const PACK_TAIL_BYTES_MAX: u32 = 64 << 20;

/// zstd level of data frames. Chosen by measurement (docs/BENCHMARKS.md).
pub const ZSTD_LEVEL: i32 = 1;

/// zstd level of recipe frames: small, written once a segment, worth more effort.
pub const RECIPE_ZSTD_LEVEL: i32 = 3;

/// One block in this many is a hook of the similarity index. A power of two. Chosen by measurement.
pub const HOOK_SAMPLING: u64 = 8;

/// A name of a VM, a disk or a snapshot has at most 255 bytes: the limit of Linux file systems.
pub const NAME_BYTES_MAX: usize = 255;

/// A log record has at most 64 MiB: a checkpoint of 400 000 packs.
pub const LOG_RECORD_BYTES_MAX: u64 = 64 << 20;

/// A root page has at most 8 MiB: 65 536 group references and what goes with them.
pub const ROOT_PAGE_BYTES_MAX: u64 = 8 << 20;

/// The owner of a hold has at most 1 KiB: one line for people, with a path in it.
pub const HOLD_OWNER_BYTES_MAX: usize = 1 << 10;

/// A hold has at most 4 KiB: its owner, and some numbers.
pub const HOLD_BYTES_MAX: u64 = 4 << 10;

/// Records between two checkpoints of a log: what opening a VM reads at the most, but for the checkpoint.
pub const LOG_CHECKPOINT_INTERVAL: u64 = 64;

/// Serials (pack, root and file numbers) of one begin record. A writer that needs more begins again.
pub const SERIALS_PER_BEGIN: u32 = 1 << 16;

/// Snapshots and drafts of one VM.
pub const FILES_PER_VM_MAX: usize = 1 << 20;

/// Entries of a popular index: 1 TiB of popular blocks, 2 GiB of memory. Elections choose far less.
pub const POPULAR_ENTRIES_MAX: u64 = 1 << 28;

/// Entries of a bucket of a popular index, on average, at the most: two cache lines to look through.
pub const POPULAR_BUCKET_ENTRIES: u64 = 16;

/// Entries of one bucket: their count is a byte. Far more than chance gives; who forges fingerprints gets no further.
pub const POPULAR_BUCKET_ENTRIES_MAX: usize = 255;

/// Buckets of a chunk of a popular index, which is read and checked as a whole: 70 to 120 KiB.
pub const POPULAR_CHUNK_BUCKETS: usize = 1024;

/// Packs that a popular index refers to: their number within it has three bytes.
pub const POPULAR_PACKS_MAX: u32 = 1 << 24;

/// Common slots that are condemned at a time (32 GiB of blocks): at the most 16 MiB of a log record. A collection that
/// finds more leaves the rest to the next one.
pub const CONDEMNED_SLOTS_MAX: u64 = 1 << 23;

/// One block in this many tells other VMs what a VM has. A power of two, not below [`HOOK_SAMPLING`].
pub const SIGHTING_SAMPLING: u64 = 16;

/// Sampled blocks of one VM (4 MiB of derived data): of a VM with more than 16 GiB of blocks every second one is kept.
pub const SIGHTINGS_PER_VM_MAX: usize = 1 << 18;

/// Common slots that no popular index has and that are looked for all the same, the newest (4 GiB of blocks): their slot
/// tables, 32 MiB, are read by every writer. Those beyond wait for an election.
pub const PROMOTED_SLOTS_MAX: u64 = 1 << 20;

/// Default cap of resident memory: `--max-memory`.
pub const MEMORY_BYTES_DEFAULT: u64 = 256 << 20;

/// The least memory that can be asked for: below, buffers and caches are too small to work.
pub const MEMORY_BYTES_MIN: u64 = 128 << 20;

/// Segments that one ingest works on at a time (8 MiB): enough to keep two cores busy, twice in memory.
pub const BATCH_SEGMENTS: usize = 4;

/// Hosts of a job: each has a connection to each, with about 3 MiB of buffers at both ends.
pub const HOSTS_MAX: usize = 256;

/// Threads of a host that work on a job: each adds a worker to the dataflow of all hosts.
pub const JOB_THREADS_MAX: usize = 16;

/// How long a job waits for a host to come up: people start them one after another.
pub const HOST_START_SECONDS: u64 = 120;

/// A host that gave no sign of life for so long is stuck. It gives one each second, whatever it works on.
pub const HOST_SILENCE_SECONDS: u64 = 30;

/// Pause between two tries to reach a host that is not up yet.
pub const HOST_RETRY_MS: u64 = 50;

/// Memory of a job on one host: sort buffer, pages of the spill file, chunks on their way.
pub const JOB_MEMORY_BYTES: u64 = 32 << 20;

/// The least memory for a job: below, its buffers are too small to work.
pub const JOB_MEMORY_BYTES_MIN: u64 = 1 << 20;

/// Images of a batch: each has some files open on its host.
pub const BATCH_LINES_MAX: usize = 1 << 16;

/// Rounds of a batch: more would only be overhead.
pub const BATCH_ROUNDS_MAX: usize = 256;

/// Rows of one partition that a job aims at (5.5 MiB): they are sorted in memory with room to spare.
pub const PARTITION_ROWS: u64 = 1 << 17;

/// Partitions of a job: their pages in memory are 4 KiB at the least, divided among all workers.
pub const PARTITIONS_MAX: u32 = 1 << 14;

/// Bytes of rows that are sent at a time, at the most: large enough that a message costs little.
pub const CHUNK_BYTES_MAX: usize = 64 << 10;

/// The least bytes of rows that are sent at a time.
pub const CHUNK_BYTES_MIN: usize = 4 << 10;

/// Chunks of one worker that are on their way at a time: what bounds the memory of those that receive them.
pub const CHUNKS_IN_FLIGHT: u64 = 4;

/// A page of a spill file, at the most: a partition that is read back costs so few seeks.
pub const SPILL_PAGE_BYTES_MAX: usize = 256 << 10;

/// The least bytes of a page of a spill file.
pub const SPILL_PAGE_BYTES_MIN: usize = 4 << 10;

/// A frame between two hosts has at most 1 MiB: it is checked as a whole before anything of it is used.
pub const LINK_FRAME_BYTES_MAX: usize = 1 << 20;

/// A message of the dataflow has at most 16 MiB; a chunk has 64 KiB, messages of progress far less.
pub const LINK_MESSAGE_BYTES_MAX: u64 = 16 << 20;

/// The description of a job has at most 64 MiB: it is read whole by every host.
pub const JOB_BYTES_MAX: u64 = 64 << 20;

/// Bytes of a row of a partition's result, at the most.
pub const RESULT_ROW_BYTES_MAX: usize = 1 << 10;

/// Bytes kept aside so that forget and collect work on a full disk.
pub const RESERVE_BYTES: u64 = 4 << 20;

/// The least rate that collection can be held to: at 64 KiB a second a pack takes half an hour, under its VM's lock.
pub const GC_RATE_BYTES_MIN: u64 = 64 << 10;

/// Targets of a store: what one machine mounts, and few enough to ask all of them.
pub const TARGETS_MAX: usize = 256;

/// How long a call to a target may take before another copy is asked: longer than a sync of a pack on a slow disk, and
/// what a person waits before looking what is wrong.
pub const TARGET_PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

/// Calls to one target at a time; more wait. As many as a mount has threads for requests, and some for writing.
pub const TARGET_CALLS_MAX: usize = 32;

/// Copies remembered as bad: those that are noticed before anybody repairs them.
pub const BAD_COPIES_MAX: usize = 4096;

/// Lost blocks that are looked for in one pass over live images (1 GiB of them): about 30 MiB of memory.
pub const HEAL_BLOCKS_MAX: usize = 1 << 18;

/// Grids by which live images are looked through, each a pass over them: a VM has one, seldom two.
pub const HEAL_GRIDS_MAX: usize = 8;

const _: () = assert!(SEGMENT_BYTES == 2 << 20, "docs/FORMAT.md: a segment is 2 MiB");
const _: () = assert!(GROUP_BYTES == 1 << 30, "docs/FORMAT.md: a group is 1 GiB");
