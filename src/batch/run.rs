//! Runs a batch on this host: round by round, stage by stage.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use roaring::RoaringTreemap;

use crate::batch::image::{BatchImage, LINE_SHIFT, Scanned, SlotJournal, Taken, line_of, position};
use crate::batch::job_file::{JobLine, in_line, parse};
use crate::batch::rounds::deal;
use crate::batch::task::{Description, Detect, Kind, Link, MemberRow, NOTE_BYTES, Note, Round, WANT_BYTES, each_row};
use crate::catalog::record::Op;
use crate::catalog::state::VmState;
use crate::cluster::detect::{Feed, Holder, Progress, Report, Setup, Task, run};
use crate::cluster::hosts::Hosts;
use crate::cluster::job::{Job, partitions_for};
use crate::cluster::mesh::Patience;
use crate::cluster::record::Member;
use crate::cluster::spill::{Sorted, Spill};
use crate::error::{Error, ErrorKind, Result, invalid};
use crate::fingerprint::{Fingerprint, digest};
use crate::image::tree::Tree;
use crate::ingest::backup::{grid_of, read_segment, refuse_taken_name};
use crate::ingest::change_map::ChangeMap;
use crate::ingest::common::CommonWriter;
use crate::ingest::draft_tree::DraftTree;
use crate::ingest::source::Source;
use crate::ingest::writer::{CommitRequest, Prepared, Writer, commit_together};
use crate::limits::{BATCH_ROUNDS_MAX, BATCH_SEGMENTS, BLOCK_BYTES, IMAGE_BYTES_MAX, SEGMENT_BLOCKS, SEGMENT_BYTES};
use crate::name::{SnapshotName, VmName};
use crate::pack::Content;
use crate::pack::reader::read_slot_page;
use crate::recipe::Tally;
use crate::store::common::{common_state, group_of};
use crate::store::session::Session;
use crate::store::{Store, disk_and_file};
use crate::units::{PackNumber, SegmentIndex, SlotId, VmGroup};
use crate::wire::{decode, encode};

/// How a batch is run.
#[derive(Debug, Clone)]
pub struct BatchOptions {
    /// All hosts; `None` for this process alone.
    pub hosts: Option<Hosts>,
    /// Worker threads, the same on all hosts.
    pub threads: usize,
    /// Rounds, the same on all hosts.
    pub rounds: usize,
    /// Memory for the buffers of a stage.
    pub memory_bytes: usize,
    /// Where scratch files are made.
    pub scratch: PathBuf,
    /// How long to wait for other hosts.
    pub patience: Patience,
}

/// What a batch is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BatchProgress {
    /// The stage of a round that goes through the dataflow.
    Job(&'static str, Progress),
    /// Writes what is shared, of this image.
    Share(String),
    /// Writes this VM.
    Write(String),
}

/// What became of a VM.
#[derive(Debug, Clone, serde::Serialize)]
pub struct VmReport {
    /// The VM.
    pub vm: String,
    /// Its new snapshots.
    pub snapshots: Vec<String>,
    /// Bytes of the images.
    pub image_bytes: u64,
    /// What the levels did.
    pub tally: Tally,
    /// How long its sources had to stay as they were.
    pub frozen_seconds: f64,
    /// The round that it was in, from 1.
    pub round: usize,
}

/// What a batch did on this host.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct BatchReport {
    /// VMs written.
    pub vms: Vec<VmReport>,
    /// Snapshots that an earlier run of the same job had committed.
    pub done_before: Vec<String>,
    /// Blocks written to common packs.
    pub blocks_shared: u64,
    /// Records that went through the dataflow.
    pub records: u64,
    /// Bytes of spill files of the largest pass.
    pub spilled_bytes: u64,
    /// Bytes sent to other hosts.
    pub bytes_sent: u64,
    /// Bytes received from other hosts.
    pub bytes_received: u64,
}

impl BatchReport {
    fn add(&mut self, report: &Report) {
        self.records += report.records;
        self.spilled_bytes = self.spilled_bytes.max(report.spilled_bytes);
        self.bytes_sent += report.bytes_sent;
        self.bytes_received += report.bytes_received;
    }
}

/// Takes up all images of a job file, together with the other hosts.
///
/// A run that was cut off is taken up by starting it again on all hosts, with the same job file: what was committed stays,
/// what was found out is not found out again.
///
/// # Errors
/// `Invalid` for a bad job file, `NotFound` for a source, `Exists` for a name that is taken (before anything is written);
/// `Busy` for a VM that is being written, as [`run`] and the write path have it otherwise. A VM has all its snapshots of
/// the batch or none.
pub fn batch(
    store: &Arc<Store>,
    text: &[u8],
    options: &BatchOptions,
    progress: Arc<dyn Fn(BatchProgress) + Send + Sync>,
) -> Result<BatchReport> {
    if options.rounds == 0 || options.rounds > BATCH_ROUNDS_MAX {
        return Err(invalid(format!("a batch has 1 to {BATCH_ROUNDS_MAX} rounds, rounds={}", options.rounds)));
    }
    let hosts = options.hosts.as_ref().map_or(1, Hosts::count);
    let host = options.hosts.as_ref().map_or(0, Hosts::index);
    let lines = parse(text, hosts)?;
    let own = |line: &&(u32, JobLine)| line.1.host == host;
    let lines: Vec<(u32, JobLine)> = (0..).zip(lines).collect();
    let mut bytes = BTreeMap::new();
    for (number, line) in lines.iter().filter(own) {
        let source = Source::open(&line.source).map_err(|e| in_line(line, e))?;
        let size = source.bytes().unwrap_or(0);
        if size > IMAGE_BYTES_MAX {
            let what = format!("the source has over {IMAGE_BYTES_MAX} bytes");
            return Err(in_line(line, Error::new(ErrorKind::TooLarge, what)));
        }
        bytes.insert(*number, size);
    }
    let rounds = options.rounds.to_le_bytes();
    let store_id = store.config().store.as_bytes();
    let id = Job::id_of(&[b"snapfs batch", store_id, text, &rounds]);
    let all_bytes: u64 = bytes.values().sum();
    let job = Job::open_or_create(&**store.backend(), id, || {
        // Who comes first looks at all names. Later, a name that is there was committed by this job.
        for (_, line) in &lines {
            match store.vm(&line.name.vm) {
                Ok((_, state)) => refuse_taken_name(&state, &line.name).map_err(|e| in_line(line, e))?,
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(in_line(line, e)),
            }
        }
        let (description, slots) = describe(store, &lines)?;
        let wanted = (all_bytes / BLOCK_BYTES as u64).saturating_mul(hosts as u64);
        Ok((partitions_for(slots + wanted), encode(&description)))
    })?;
    let description: Description = decode(&job.body).map_err(|e| e.within(Job::key_of(id)))?;
    let mut work = Work {
        store: store.clone(),
        options,
        progress,
        job,
        description: Arc::new(description),
        report: BatchReport::default(),
        jobs: Vec::new(),
    };
    let mut todo = Vec::new();
    for (number, line) in lines.iter().filter(own) {
        match store.vm(&line.name.vm) {
            Ok((_, state)) if is_there(&state, &line.name) => work.report.done_before.push(line.name.to_string()),
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(in_line(line, e)),
            _ => todo.push((*number, line.clone())),
        }
    }
    // Rounds are dealt from all lines, so that a job that is taken up has the same ones.
    let mut sizes: BTreeMap<&str, u64> = BTreeMap::new();
    for (number, line) in lines.iter().filter(own) {
        *sizes.entry(line.name.vm.as_str()).or_default() += bytes.get(number).copied().unwrap_or(0);
    }
    let dealt = deal(&sizes.values().copied().collect::<Vec<_>>(), options.rounds);
    let round_of: BTreeMap<&str, usize> = sizes.keys().copied().zip(dealt).collect();
    for round in 0..options.rounds {
        let here =
            todo.iter().filter(|(_, line)| round_of.get(line.name.vm.as_str()) == Some(&round)).cloned().collect();
        work.round(round, here)?;
    }
    work.finish(host)
}

fn is_there(state: &VmState, name: &SnapshotName) -> bool {
    let (disk, file) = disk_and_file(name);
    state.find(disk.as_deref(), &file).is_some()
}

/// All members by group, and how many slots the store has.
fn describe(store: &Store, lines: &[(u32, JobLine)]) -> Result<(Description, u64)> {
    let hosts: BTreeMap<&str, u32> = lines.iter().map(|(_, line)| (line.name.vm.as_str(), line.host as u32)).collect();
    let mut names: BTreeSet<String> = store.vm_names()?.iter().map(|name| name.as_str().to_owned()).collect();
    names.extend(hosts.keys().map(|name| (*name).to_owned()));
    let mut slots = 0;
    let mut members = Vec::new();
    let mut groups = BTreeSet::from([VmGroup::default().0]);
    for vm in names {
        let group = match store.vm(&VmName::new(&vm)?) {
            Ok((_, state)) => {
                slots += data_slots(&state);
                group_of(&state.group)
            }
            // Deleted ones have no blocks; new ones none yet.
            Err(e) if e.kind() == ErrorKind::NotFound && hosts.contains_key(vm.as_str()) => VmGroup::default(),
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        groups.insert(group.0);
        let host = hosts.get(vm.as_str()).copied();
        members.push(MemberRow { vm, group, host });
    }
    let common = common_state(store.common_home())?;
    slots += common.as_ref().map_or(0, |state| data_slots(state));
    members.extend(groups.into_iter().map(|group| MemberRow { vm: String::new(), group: VmGroup(group), host: None }));
    members.sort_by(|a, b| (a.group.0, &a.vm).cmp(&(b.group.0, &b.vm)));
    let mut common_packs: Vec<PackNumber> = common.iter().flat_map(|state| state.packs.keys().copied()).collect();
    common_packs.sort_unstable();
    Ok((Description { members, common_packs }, slots))
}

fn data_slots(state: &VmState) -> u64 {
    state.packs.values().filter(|pack| pack.content == Content::Data).map(|pack| u64::from(pack.slots)).sum()
}

struct Work<'a> {
    store: Arc<Store>,
    options: &'a BatchOptions,
    progress: Arc<dyn Fn(BatchProgress) + Send + Sync>,
    job: Job,
    description: Arc<Description>,
    report: BatchReport,
    jobs: Vec<Job>,
}

/// A VM of this host that is being written.
struct Target {
    session: Arc<Session>,
    lines: Vec<u32>,
}

impl Work<'_> {
    fn pass(&mut self, stage: &'static str, round: usize, task: Arc<dyn Task>) -> Result<()> {
        let number = round.to_le_bytes();
        let id = Job::id_of(&[b"snapfs batch pass", &self.job.id.0, stage.as_bytes(), &number]);
        let partitions = self.job.partitions;
        let job = Job::open_or_create(&**self.store.backend(), id, || Ok((partitions, Vec::new())))?;
        let progress = self.progress.clone();
        let setup = Setup {
            backend: Some(self.store.backend().clone()),
            clock: self.store.clock().clone(),
            hosts: self.options.hosts.clone(),
            threads: self.options.threads,
            memory_bytes: self.options.memory_bytes,
            scratch: self.options.scratch.clone(),
            patience: self.options.patience,
            progress: Arc::new(move |now| progress(BatchProgress::Job(stage, now))),
        };
        let report = run(&setup, &job, task)?;
        self.report.add(&report);
        self.jobs.push(job);
        Ok(())
    }

    /// When all hosts have committed everything, the job's objects go.
    fn finish(mut self, host: usize) -> Result<BatchReport> {
        self.pass("end", 0, Arc::new(Nothing))?;
        if host == 0 {
            self.jobs.push(self.job);
            for job in &self.jobs {
                job.remove(&**self.store.backend())?;
            }
        }
        Ok(self.report)
    }

    fn round(&mut self, number: usize, lines: Vec<(u32, JobLine)>) -> Result<()> {
        let scratch = self.options.scratch.clone();
        let mut images = Vec::new();
        for (number, line) in &lines {
            images.push(self.open(*number, line).map_err(|e| in_line(line, e))?);
        }
        let memory = self.options.memory_bytes / 8;
        let round = Round::new(self.store.clone(), self.description.clone(), images, &scratch, memory)?;
        let round = Arc::new(round);
        self.pass("detect", number, Arc::new(Detect(round.clone())))?;
        // From here to the commits the VMs are ours: what they will refer to is not collected (G6).
        let targets = self.targets(&lines)?;
        let wants = self.share(&round, &targets)?;
        self.pass("link", number, Arc::new(Link { round: round.clone(), wants }))?;
        for target in targets {
            self.write(number, &round, &target)?;
        }
        Ok(())
    }

    fn open(&self, number: u32, line: &JobLine) -> Result<(Taken, Option<ChangeMap>)> {
        let source = Source::open(&line.source)?;
        let bytes = source.bytes().unwrap_or(0);
        let (disk, _) = disk_and_file(&line.name);
        let parent = match self.store.vm(&line.name.vm) {
            Ok((vm, state)) => match state.latest(disk.as_deref()) {
                Some(file) => match self.store.open_image(&vm, file) {
                    Ok(image) => Some(image),
                    Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Stale | ErrorKind::NotFound) => {
                        log::warn!("{}: not compared with its parent: {e}", vm.name());
                        None
                    }
                    Err(e) => return Err(e),
                },
                None => None,
            },
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(e),
        };
        let grid = match &parent {
            Some(parent) => parent.tree().root().grid(),
            None => grid_of(&source, bytes)?,
        };
        let map = match (&line.map, &parent) {
            (None, _) => None,
            (Some(_), None) => return Err(invalid("a change map needs a snapshot that it was taken against")),
            (Some(_), Some(parent)) if parent.tree().root().image_bytes != bytes => {
                let then = parent.tree().root().image_bytes;
                return Err(invalid(format!("change map: the parent has {then} bytes, the source {bytes}")));
            }
            (Some(path), Some(_)) => {
                let text = std::fs::read(path).map_err(|e| Error::io(format!("change map {}", path.display()), e))?;
                Some(ChangeMap::parse(&text, bytes)?)
            }
        };
        let image = BatchImage { line: number, name: line.name.clone(), source, bytes, grid, parent };
        Ok((Taken { image, scan: None, began: Duration::ZERO }, map))
    }

    /// The sessions of the VMs of this round, and their disks' folders.
    fn targets(&self, lines: &[(u32, JobLine)]) -> Result<Vec<Target>> {
        let mut targets: Vec<Target> = Vec::new();
        for (number, line) in lines {
            let at = match targets.iter().position(|target| target.session.vm().name() == line.name.vm.as_str()) {
                Some(at) => at,
                None => {
                    let vm = self.store.vm_or_create(&line.name.vm)?;
                    let session = Arc::new(Session::begin_without_index(&self.store, &vm)?);
                    targets.push(Target { session, lines: Vec::new() });
                    targets.len() - 1
                }
            };
            let Some(target) = targets.get_mut(at) else { continue };
            let state = target.session.vm().state();
            refuse_taken_name(&state, &line.name)?;
            if let Some(disk) = disk_and_file(&line.name).0 {
                let attributes = self.store.new_folder();
                target.session.append(|state| {
                    let op = Op::MakeDisk { name: disk.clone(), attributes };
                    Ok((if state.disks.contains_key(&disk) { Vec::new() } else { vec![op] }, ()))
                })?;
            }
            target.lines.push(*number);
        }
        Ok(targets)
    }

    /// Writes what this host's VMs give to all; returns what each line waits for.
    fn share(&mut self, round: &Round, targets: &[Target]) -> Result<HashMap<u32, File>> {
        let scratch = &self.options.scratch;
        let memory = self.options.memory_bytes;
        let mut kept = Spill::new(scratch, round.places.len(), memory / 8)?;
        let mut wants = HashMap::new();
        let mut gifts: HashMap<u32, File> = HashMap::new();
        for line in targets.iter().flat_map(|target| &target.lines) {
            let (want, gift) = sort_out(round, *line, &mut kept, scratch, memory)?;
            wants.insert(*line, want);
            gifts.insert(*line, gift);
        }
        *lock(&round.notes) = kept;
        let known = self.known_gifts(&gifts)?;
        let mut writers: BTreeMap<[u8; 16], CommonWriter> = BTreeMap::new();
        let mut outcome = Ok(());
        for target in targets {
            let group = target.session.group();
            for line in &target.lines {
                let writer = writers
                    .entry(group.0)
                    .or_insert_with(|| CommonWriter::new(&self.store, target.session.packs().clone(), group));
                outcome = outcome.and_then(|()| self.give(round, *line, gifts.get(line), &known, writer));
            }
        }
        for (_, mut writer) in writers {
            outcome = outcome.and_then(|()| writer.commit());
            if outcome.as_ref().is_err_and(|e| e.kind() != ErrorKind::Unavailable) {
                writer.abandon();
            }
        }
        outcome.map(|()| wants)
    }

    /// Which gifts, by position, are in common packs that an earlier run of this job wrote.
    fn known_gifts(&self, gifts: &HashMap<u32, File>) -> Result<RoaringTreemap> {
        let mut known = RoaringTreemap::new();
        let home = self.store.common_home();
        let Some(state) = common_state(home)? else { return Ok(known) };
        let old = &self.description.common_packs;
        let new: Vec<_> = state.packs.values().filter(|pack| old.binary_search(&pack.number).is_err()).collect();
        if new.is_empty() {
            return Ok(known);
        }
        const ROW: usize = 32 + 1 + 8;
        let (scratch, memory) = (&self.options.scratch, self.options.memory_bytes);
        let mut rows: Spill<ROW> = Spill::new(scratch, 1, memory / 8)?;
        let packs = self.store.packs(home);
        for pack in new.into_iter().filter(|pack| pack.content == Content::Data) {
            let place = packs.locate(pack.number)?;
            let index = packs.index(&place)?;
            let member = index.member(pack.number)?;
            for page in 0..member.pages() {
                for print in read_slot_page(&**packs.backend(), &place, member, page)?.fingerprints {
                    rows.add(0, &[&print.0[..], &[0; 9]].concat())?;
                }
            }
        }
        for file in gifts.values() {
            each_row::<WANT_BYTES>(file, &mut |row| {
                let (print, position) = row.split_at(32);
                rows.add(0, &[print, &[1], position].concat())
            })?;
        }
        let mut sorted = rows.sorted(0, memory / 2, scratch)?;
        let mut there: Option<Fingerprint> = None;
        while let Some(row) = sorted.read_next()? {
            let (print, rest) = row.split_at(32);
            let print = Fingerprint(print.first_chunk().copied().unwrap_or_default());
            match rest.split_first() {
                Some((0, _)) => there = Some(print),
                Some((_, position)) if there == Some(print) => {
                    known.insert(position.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes)));
                }
                _ => {}
            }
        }
        Ok(known)
    }

    /// Reads the blocks that an image gives to all, and stores them, in image order.
    fn give(
        &mut self,
        round: &Round,
        line: u32,
        gifts: Option<&File>,
        known: &RoaringTreemap,
        writer: &mut CommonWriter,
    ) -> Result<()> {
        let (Some(gifts), Some(taken)) = (gifts, round.images.get(&line)) else { return Ok(()) };
        let taken = lock(taken);
        let image = &taken.image;
        (self.progress)(BatchProgress::Share(image.name.to_string()));
        let mut buffer = vec![0; SEGMENT_BYTES];
        let mut current = None;
        let mut segments = 0;
        let mut shared = 0;
        each_row::<WANT_BYTES>(gifts, &mut |row| {
            let (print, at) = row.split_at(32);
            let at = at.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
            if known.contains(at) {
                return Ok(());
            }
            let in_image = at & ((1 << LINE_SHIFT) - 1);
            let segment = SegmentIndex((in_image / SEGMENT_BLOCKS as u64) as u32);
            if current != Some(segment) {
                read_segment(&image.source, image.grid, image.bytes, segment, &mut buffer)?;
                current = Some(segment);
                segments += 1;
                if segments % BATCH_SEGMENTS == 0 {
                    writer.flush_full_frames()?;
                }
            }
            let block = (in_image % SEGMENT_BLOCKS as u64) as usize;
            let bytes = buffer.get(block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES).unwrap_or_default();
            let found = crate::fingerprint::fingerprint(bytes);
            // A block that changed since the scan is not given; who waits for it stores it.
            if found.0[..] == *print {
                writer.store(bytes, found)?;
                shared += 1;
            }
            Ok(())
        })
        .map_err(|e| e.within(&image.name))?;
        self.report.blocks_shared += shared;
        writer.flush_full_frames()
    }

    /// Writes a VM's images, and the one record that makes them exist.
    fn write(&mut self, number: usize, round: &Round, target: &Target) -> Result<()> {
        let vm = target.session.vm().name().to_owned();
        (self.progress)(BatchProgress::Write(vm.clone()));
        let mut journals = HashMap::new();
        let mut written: Vec<(Writer, Prepared)> = Vec::new();
        let mut began = None;
        for line in &target.lines {
            let Some(taken) = round.images.get(line) else { continue };
            let taken = lock(taken);
            began = began.into_iter().chain([taken.began]).min();
            let notes = lock(&round.notes).sorted(
                round.places.get(line).copied().unwrap_or(usize::MAX),
                self.options.memory_bytes / 4,
                &self.options.scratch,
            )?;
            match self.write_image(&taken, &target.session, notes, &mut journals) {
                Ok(image) => written.push(image),
                Err(e) => {
                    if e.kind() != ErrorKind::Unavailable {
                        written.into_iter().for_each(|(writer, _)| writer.abandon());
                    }
                    return Err(e.within(&taken.image.name));
                }
            }
        }
        let (mut writers, prepared): (Vec<Writer>, Vec<Prepared>) = written.into_iter().unzip();
        let roots: Vec<_> = prepared.iter().map(|prepared| prepared.root.clone()).collect();
        let mut images: Vec<(&mut Writer, Prepared)> = writers.iter_mut().zip(prepared).collect();
        if let Err(e) = commit_together(&target.session, &mut images) {
            if e.kind() != ErrorKind::Unavailable {
                writers.into_iter().for_each(Writer::abandon);
            }
            return Err(e.within(format!("VM {vm:?}")));
        }
        let mut tally = Tally::default();
        roots.iter().for_each(|root| tally.add(&root.tally));
        let frozen = began.map_or(Duration::ZERO, |began| self.store.clock().elapsed().saturating_sub(began));
        let name = |line: &u32| round.images.get(line).map(|taken| lock(taken).image.name.to_string());
        self.report.vms.push(VmReport {
            vm,
            snapshots: target.lines.iter().filter_map(name).collect(),
            image_bytes: roots.iter().map(|root| root.image_bytes).sum(),
            tally,
            frozen_seconds: frozen.as_secs_f64(),
            round: number + 1,
        });
        Ok(())
    }

    fn write_image(
        &self,
        taken: &Taken,
        session: &Arc<Session>,
        notes: Sorted<NOTE_BYTES>,
        journals: &mut HashMap<u32, SlotJournal>,
    ) -> Result<(Writer, Prepared)> {
        let image = &taken.image;
        let (disk, file_name) = disk_and_file(&image.name);
        // Another may have written the disk since the scan: then what the scan calls unchanged is so no more.
        let newest = session.vm().state().latest(disk.as_deref()).map(|file| file.root);
        let is_parent = newest == image.parent.as_ref().map(|parent| parent.tree().root().id);
        let root = image.parent.as_ref().map(|parent| parent.tree().root().clone());
        let parent = root.map(|root| Arc::new(Tree::new(root, session.packs().clone())));
        let mut writing = Writing {
            writer: Writer::new(session.clone(), parent.clone()),
            tree: DraftTree::empty(session.packs().clone(), parent.clone()),
            journal: SlotJournal::new(&self.options.scratch)?,
        };
        let outcome = match is_parent && writing.known(taken, notes, journals)? {
            true => Ok(()),
            false => {
                log::warn!("{}: changed since it was scanned; it is read again as a whole", image.name);
                writing.tree = DraftTree::empty(session.packs().clone(), parent);
                writing.anew(image)
            }
        };
        let prepared = outcome.and_then(|()| {
            let now = self.store.clock().now();
            let request = CommitRequest {
                file: session.next_serial()?,
                disk,
                name: file_name,
                is_known: false,
                image_bytes: image.bytes,
                grid: image.grid,
                uid: rustix::process::geteuid().as_raw(),
                gid: rustix::process::getegid().as_raw(),
                mtime: now,
                closed: true,
                sealed: true,
            };
            writing.writer.prepare(&mut writing.tree, &request)
        });
        match prepared {
            Ok(prepared) => {
                journals.insert(image.line, writing.journal);
                Ok((writing.writer, prepared))
            }
            Err(e) => {
                if e.kind() != ErrorKind::Unavailable {
                    writing.writer.abandon();
                }
                Err(e)
            }
        }
    }
}

struct Writing {
    writer: Writer,
    tree: DraftTree,
    journal: SlotJournal,
}

impl Writing {
    /// Writes the image as it was scanned, reading only what is new. `false` when the source has changed since.
    fn known(
        &mut self,
        taken: &Taken,
        mut notes: Sorted<NOTE_BYTES>,
        journals: &HashMap<u32, SlotJournal>,
    ) -> Result<bool> {
        let (image, Some(scan)) = (&taken.image, &taken.scan) else { return Ok(false) };
        let mut next = next_note(&mut notes)?;
        let mut is_same = true;
        let mut count = 0;
        scan.read(&mut |scanned| {
            if !is_same {
                return Ok(());
            }
            let (segment, found, prints) = match scanned {
                Scanned::Unchanged(segment) => {
                    match self.writer.reuse(segment)? {
                        Some(place) => self.tree.set(segment, place)?,
                        // A pack that it needs is gone.
                        None => is_same = self.reread(image, segment)?,
                    }
                    return Ok(());
                }
                Scanned::Changed(segment, found, prints) => (segment, found, prints),
            };
            let first = position(image.line, segment);
            let mut hints: Vec<Option<SlotId>> = vec![None; SEGMENT_BLOCKS];
            let mut within = Vec::new();
            while let Some(note) = next.filter(|note| note.position < first + SEGMENT_BLOCKS as u64) {
                if let Some(block) = note.position.checked_sub(first).map(|block| block as usize) {
                    let hint = match note.kind {
                        Kind::Held => Some(SlotId(note.value)),
                        Kind::Repeats if note.value >= first => {
                            within.push(block);
                            None
                        }
                        Kind::Repeats if line_of(note.value) == image.line => self.journal.slot(note.value)?,
                        Kind::Repeats => match journals.get(&line_of(note.value)) {
                            Some(journal) => journal.slot(note.value)?,
                            None => None,
                        },
                        Kind::Shared | Kind::Donated => None,
                    };
                    if let Some(place) = hints.get_mut(block) {
                        *place = hint;
                    }
                }
                next = next_note(&mut notes)?;
            }
            let mut read = || -> Result<Option<Vec<u8>>> {
                let mut buffer = vec![0; SEGMENT_BYTES];
                read_segment(&image.source, image.grid, image.bytes, segment, &mut buffer)?;
                Ok((digest(&buffer) == found).then_some(buffer))
            };
            match self.writer.take_known(found, &prints, &hints, &mut read)? {
                Some((place, slots)) => {
                    self.tree.set(segment, Some(place))?;
                    self.journal.note(segment, &slots)?;
                }
                None => is_same = false,
            }
            count += 1;
            if count % BATCH_SEGMENTS == 0 {
                self.writer.flush_full_frames()?;
                self.writer.shrink(&mut self.tree)?;
            }
            Ok(())
        })?;
        Ok(is_same)
    }

    /// Takes a segment that is said to be unchanged from the source; `false` when it is not.
    fn reread(&mut self, image: &BatchImage, segment: SegmentIndex) -> Result<bool> {
        let mut buffer = vec![0; SEGMENT_BYTES];
        read_segment(&image.source, image.grid, image.bytes, segment, &mut buffer)?;
        if self.writer.parent_digest(segment)? != Some(digest(&buffer)) {
            return Ok(false);
        }
        for (segment, place) in self.writer.take(&[(segment, &buffer)])? {
            self.tree.set(segment, place)?;
        }
        Ok(true)
    }

    /// Reads all of the source, as a backup does: what it is now counts, and nothing of the scan.
    fn anew(&mut self, image: &BatchImage) -> Result<()> {
        let mut buffer = vec![0; SEGMENT_BYTES];
        for segment in (0..image.grid.segments(image.bytes)).map(SegmentIndex) {
            read_segment(&image.source, image.grid, image.bytes, segment, &mut buffer)?;
            for (segment, place) in self.writer.take(&[(segment, &buffer)])? {
                self.tree.set(segment, place)?;
            }
            self.writer.shrink(&mut self.tree)?;
        }
        image.source.verify_unchanged()
    }
}

fn next_note(notes: &mut Sorted<NOTE_BYTES>) -> Result<Option<Note>> {
    Ok(notes.read_next()?.and_then(|row| Note::from_bytes(&row)))
}

/// Walks through the verdicts of an image with its fingerprints: what it waits for, what it gives, and the rest, which is
/// kept for the write.
fn sort_out(
    round: &Round,
    line: u32,
    kept: &mut Spill<NOTE_BYTES>,
    scratch: &Path,
    memory_bytes: usize,
) -> Result<(File, File)> {
    let failed = |e| Error::io("scratch file", e);
    let new_file =
        || tempfile::tempfile_in(scratch).map(|file| BufWriter::with_capacity(64 << 10, file)).map_err(failed);
    let (mut wants, mut gifts) = (new_file()?, new_file()?);
    let place = round.places.get(&line).copied().unwrap_or(usize::MAX);
    let scan = round.images.get(&line).and_then(|taken| lock(taken).scan.clone());
    let mut notes = lock(&round.notes).sorted(place, memory_bytes / 4, scratch)?;
    let mut next = next_note(&mut notes)?;
    if let Some(scan) = scan {
        scan.read(&mut |scanned| {
            let Scanned::Changed(segment, _, prints) = scanned else { return Ok(()) };
            let first = position(line, segment);
            while let Some(note) = next.filter(|note| note.position < first + SEGMENT_BLOCKS as u64) {
                let block = note.position.checked_sub(first).map(|block| block as usize);
                let print = block.and_then(|block| prints.get(block).copied().flatten());
                match (note.kind, print) {
                    (Kind::Held | Kind::Repeats, _) => kept.add(place, &note.to_bytes())?,
                    (kind, Some(print)) => {
                        let row = [&print.0[..], &note.position.to_be_bytes()].concat();
                        wants.write_all(&row).map_err(failed)?;
                        if kind == Kind::Donated {
                            gifts.write_all(&row).map_err(failed)?;
                        }
                    }
                    // A verdict of an earlier run on what the source is no more.
                    (_, None) => {}
                }
                next = next_note(&mut notes)?;
            }
            Ok(())
        })?;
    }
    let finish = |file: BufWriter<File>| file.into_inner().map_err(|e| failed(e.into_error()));
    Ok((finish(wants)?, finish(gifts)?))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A pass without records: it ends when all hosts have come to it.
struct Nothing;

impl Task for Nothing {
    fn members(&self) -> u32 {
        0
    }
    fn host_of(&self, _: Member, _: usize) -> usize {
        0
    }
    fn group_of(&self, _: Member) -> u32 {
        0
    }
    fn feed(&self, _: Member, _: &mut Feed<'_, '_>) -> Result<()> {
        Ok(())
    }
    fn row_bytes(&self) -> usize {
        1
    }
    fn judge(&self, _: &Fingerprint, _: &[Holder], _: &mut Vec<u8>) {}
    fn repeats(&self, _: Member, _: u64, _: u64, _: &mut Vec<u8>) {}
    fn member_of(&self, _: &[u8]) -> Option<Member> {
        None
    }
    fn verdict(&self, _: Member, _: &[u8]) -> Result<()> {
        Ok(())
    }
}
