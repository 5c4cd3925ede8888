//! G2-G5: collects one VM.
//!
//! Every step leaves a store that is whole: new objects are durable before the record that refers to them, objects
//! are deleted only after the record that says so (G4), and a run that was cut off is taken up by the next one: the
//! log remembers which objects may have been left.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use roaring::RoaringBitmap;
use serde::Serialize;

use crate::backend::Key;
use crate::backend::replicate::Replicated;
use crate::catalog::record::{Dead, Op, PackEntry};
use crate::catalog::roots::{parse_root_name, root_key};
use crate::catalog::state::VmState;
use crate::catalog::vm::{Vm, home_folder, pack_key, title};
use crate::collect::compact::{Failure, Source, rewrite};
use crate::collect::grace::Grace;
use crate::collect::pace::Pace;
use crate::collect::plan::{Plan, Sharing, Survey, Surveyed, bins, live_of};
use crate::error::{Error, ErrorKind, Result, busy};
use crate::name::VmName;
use crate::pack::Content;
use crate::pack::index::parse_object_name;
use crate::pack::reader::Locate;
use crate::store::Store;
use crate::store::common::group_of;
use crate::store::session::{PopularView, Session};
use crate::units::{ObjectId, PackNumber, RootId, SlotId};

/// Bytes of new objects after which the log is told, so that the old ones go and a full disk does not get fuller.
const MOVE_BYTES: u64 = 256 << 20;

/// How often the plan is made again when others change the VM while it is being made.
const PLAN_TRIES: usize = 8;

/// How to collect.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GcOptions {
    /// Recompute from the recipes what is live, and delete objects that the log does not know (G5).
    pub exact: bool,
    /// Only tell what would be done.
    pub dry_run: bool,
}

/// How far a collection goes that others must not notice.
#[derive(Debug, Clone, Copy)]
pub struct Bounds<'a> {
    /// Bytes of new objects after which compaction ends; the object in which they are reached is finished.
    pub bytes: u64,
    /// When this is set, it ends after the object that is being written.
    pub stop: &'a AtomicBool,
}

/// What a collection did; of a dry run, what it would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// The VM.
    pub vm: String,
    /// Whether nothing was done because nothing was to be done.
    pub idle: bool,
    /// Whether nothing was done because another writer has the VM.
    pub busy: bool,
    /// Whether compaction stopped because the medium is full.
    pub no_space: bool,
    /// Whether compaction stopped at its bounds: there is more to do.
    pub partial: bool,
    /// Bytes of objects before, less those after. An estimate in a dry run.
    pub bytes_reclaimed: u64,
    /// Dead bytes that stay: in objects of which too little is dead, or because of one of the reasons above.
    pub bytes_reclaimable_left: u64,
    /// Objects deleted, root pages included.
    pub objects_deleted: u64,
    /// Packs in which nothing was live.
    pub packs_dropped: u64,
    /// Objects whose live slots moved.
    pub packs_compacted: u64,
    /// Objects that came of it.
    pub packs_written: u64,
    /// Root pages of forgotten snapshots and of earlier states of drafts that went.
    pub roots_dropped: u64,
    /// Root pages that stay because a reader has them open (I6).
    pub roots_pinned: u64,
    /// Root pages of forgotten snapshots that stay because a hold names them (I6).
    pub roots_held: u64,
    /// Root pages of forgotten snapshots and of earlier states of drafts that stay for the store's `gc_grace` (I6).
    pub roots_young: u64,
    /// Seconds until the first of these may go.
    pub young_for_seconds: u64,
    /// Objects that the log did not know, deleted by an exact collection.
    pub leaked_objects: u64,
    /// Their bytes.
    pub leaked_bytes: u64,
    /// Bytes of unfinished files of writers that died, removed by an exact collection.
    pub litter_bytes: u64,
    /// Group pages whose bitmap was not what their recipes use (exact only).
    pub bitmaps_wrong: u64,
    /// Recipes that could not be read (exact only).
    pub recipes_damaged: u64,
    /// Objects that were left alone because they cannot be read.
    pub damaged: Vec<String>,
    /// Of common packs: slots that nobody refers to and that go with a later collection.
    pub slots_condemned: u64,
    /// VMs whose writers must end before more of the common packs can go.
    pub waiting_for: Vec<String>,
}

/// How far a collection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Finding out what is live.
    Planning,
    /// Objects are being deleted: so many so far.
    Deleting(u64),
    /// Objects are being rewritten: so many of so many.
    Compacting(u64, u64),
}

/// Collects one VM, one that was deleted too.
///
/// Cost: the VM's root and group pages (if exact, its recipes), twice when there is something to do; the live part of
/// each object that is rewritten. Nothing is written when there is nothing to do.
///
/// # Errors
/// `NotFound` when the VM has no log; `Corrupt`, naming the object, when the log or anything that says what is live
/// cannot be read: then nothing was deleted. `NoSpace` when nothing could be freed. `Busy` when another writer takes
/// over meanwhile (one that has the VM from the start is in the report). `ReadOnly`, `Unavailable`.
pub fn collect_vm(
    store: &Store,
    name: &VmName,
    options: GcOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<GcReport> {
    collect(store, name, options, None, progress)
}

/// Collects some of one VM: all that is whole and dead, and by compaction as much as `bounds` allow, so that the write
/// lock is given back soon. The next call goes on.
///
/// # Errors
/// As [`collect_vm`].
pub fn collect_some(store: &Store, name: &VmName, bounds: Bounds<'_>) -> Result<GcReport> {
    collect(store, name, GcOptions::default(), Some(bounds), &mut |_| {})
}

fn collect(
    store: &Store,
    name: &VmName,
    options: GcOptions,
    bounds: Option<Bounds<'_>>,
    progress: &mut dyn FnMut(Progress),
) -> Result<GcReport> {
    let vm = store.vm_handle(name);
    let mut report = GcReport { vm: name.as_str().to_owned(), ..GcReport::default() };
    progress(Progress::Planning);
    let grace = Grace::of(store)?;
    let (state, plan) = plan_without_lock(store, &vm, options, &grace)?;
    let left = Left::find(&vm, &state, options.exact)?;
    report.tell(&vm, &plan);
    let has_work = plan.has_work() || !left.undeleted.is_empty() || !left.leaked.is_empty();
    if options.dry_run {
        report.foresee(&plan, &left);
        report.idle = !has_work;
        return Ok(report);
    }
    if !has_work {
        report.idle = true;
    } else {
        drop((state, plan, left));
        match Session::begin_without_index(store, &vm) {
            Ok(session) => {
                let pace = if bounds.is_some() { Pace::bounded() } else { Pace::beside(store, name.as_str())? };
                Collector::new(&session, options, bounds, pace, report.clone(), progress).run(&grace, &mut report)?;
            }
            Err(e) if e.kind() == ErrorKind::Busy => {
                log::info!("{e}");
                report.busy = true;
            }
            Err(e) => return Err(e),
        }
    }
    if options.exact {
        report.litter_bytes = store.backend().remove_litter()?;
    }
    if !report.idle && !report.busy {
        store.backend().keep_reserve();
    }
    Ok(report)
}

/// Plans on the newest state. What cannot be read because others changed the VM meanwhile is looked at again.
fn plan_without_lock(store: &Store, vm: &Arc<Vm>, options: GcOptions, grace: &Grace) -> Result<(Arc<VmState>, Plan)> {
    let mut tries = 0;
    loop {
        let state = vm.refresh()?;
        must_be_whole(vm)?;
        tries += 1;
        match Plan::make(vm, &store.packs(vm), &state, options.exact, &PopularView::now(store), grace) {
            Err(e) if e.kind() == ErrorKind::Corrupt && tries < PLAN_TRIES => {
                if vm.refresh()?.number == state.number {
                    return Err(e);
                }
            }
            Err(e) => return Err(e),
            // An object that is not there may only have moved.
            Ok(plan) if !plan.damaged.is_empty() && tries < PLAN_TRIES && vm.refresh()?.number != state.number => {}
            Ok(plan) => return Ok((state, plan)),
        }
    }
}

/// What a log that cannot be read to its end would have kept alive is not known.
fn must_be_whole(vm: &Vm) -> Result<()> {
    match vm.damage() {
        Some(damage) => Err(damage.duplicate()),
        None => Ok(()),
    }
}

impl GcReport {
    fn tell(&mut self, vm: &Vm, plan: &Plan) {
        self.roots_pinned = plan.roots.pinned;
        self.roots_held = plan.roots.held.len() as u64;
        self.roots_young = plan.roots.young.len() as u64;
        let left = plan.roots.young.values().min().copied().unwrap_or_default();
        self.young_for_seconds = left.as_secs() + u64::from(left.subsec_nanos() > 0);
        self.bitmaps_wrong = plan.exactness.bitmaps_wrong;
        self.recipes_damaged = plan.exactness.recipes_damaged;
        self.bytes_reclaimable_left = plan.left_bytes + plan.dead_bytes + plan.rewritten_bytes;
        self.damaged.clear();
        for (object, why) in &plan.damaged {
            self.leave(vm, *object, why);
        }
    }

    fn leave(&mut self, vm: &Vm, object: ObjectId, why: &str) {
        let key = pack_key(vm.name(), object);
        log::warn!("{key}: is left as it is: {why}; run snapfs check");
        self.damaged.push(key.to_string());
    }

    fn foresee(&mut self, plan: &Plan, left: &Left) {
        let unfinished: u64 = left.undeleted.iter().map(|(_, bytes)| bytes).sum();
        self.leaked_bytes = left.leaked.iter().map(|(_, bytes)| bytes).sum();
        self.leaked_objects = left.leaked.len() as u64;
        self.bytes_reclaimed = plan.dead_bytes + plan.rewritten_bytes + unfinished + self.leaked_bytes;
        self.bytes_reclaimable_left = plan.left_bytes;
        self.packs_dropped = plan.dead_packs.len() as u64;
        self.packs_compacted = plan.rewritten;
        self.roots_dropped = plan.roots.dead.len() as u64;
        self.objects_deleted =
            plan.dead_objects + plan.rewritten + self.roots_dropped + (left.undeleted.len() + left.leaked.len()) as u64;
    }
}

fn key_of(vm: &Vm, dead: &Dead) -> Key {
    match dead {
        Dead::Root { id } => root_key(vm.name(), *id),
        Dead::Pack { object } => pack_key(vm.name(), *object),
    }
}

/// What the snapshots and drafts of a state stand on.
fn needed(state: &VmState) -> BTreeSet<Dead> {
    let roots = state.files.values().map(|f| Dead::Root { id: f.root });
    roots.chain(state.packs.values().map(|p| Dead::Pack { object: p.object })).collect()
}

/// Every object of a VM that is there, by what its name says, with its bytes. Cost: two listings.
pub(super) fn objects_there(vm: &Vm) -> Result<BTreeMap<Dead, u64>> {
    let folder = |name: &str| vm.backend().list(&Key::new(format!("{}/{name}", home_folder(vm.name()))));
    let packs = folder("packs")?;
    let roots = folder("snapshots")?;
    let packs = packs.iter().filter_map(|r| Some((Dead::Pack { object: parse_object_name(&r.name)? }, r.bytes)));
    let roots = roots.iter().filter_map(|r| Some((Dead::Root { id: parse_root_name(&r.name)? }, r.bytes)));
    Ok(packs.chain(roots).collect())
}

/// Objects that should not be there any more.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// The log says that they may be deleted.
    pub(super) undeleted: Vec<(Dead, u64)>,
    /// The log does not know them: of writers that died, or of one at work.
    pub(super) leaked: Vec<(Dead, u64)>,
}

impl Left {
    /// Cost: two listings, if any can be there.
    pub(super) fn find(vm: &Vm, state: &VmState, exact: bool) -> Result<Self> {
        if state.dropping.is_empty() && !exact {
            return Ok(Self::default());
        }
        let mut there = objects_there(vm)?;
        let needed = needed(state);
        let mut left = Self::default();
        for dead in state.dropping.iter().collect::<BTreeSet<_>>() {
            if let Some(bytes) = there.remove(dead)
                && !needed.contains(dead)
            {
                left.undeleted.push((*dead, bytes));
            }
        }
        if exact {
            let known = |dead: &Dead| match dead {
                Dead::Root { id } => needed.contains(dead) || state.condemned.contains_key(id),
                Dead::Pack { .. } => needed.contains(dead),
            };
            left.leaked = there.into_iter().filter(|(dead, _)| !known(dead)).collect();
        }
        Ok(left)
    }
}

/// New objects that the log does not know yet.
#[derive(Debug, Default)]
struct Moving {
    packs: Vec<PackEntry>,
    // The object that each pack is believed to be in.
    from: BTreeMap<PackNumber, ObjectId>,
    dead_objects: Vec<ObjectId>,
    dead_packs: Vec<PackNumber>,
    bytes: u64,
}

/// One run under the write lock.
pub(super) struct Collector<'a> {
    session: &'a Session,
    vm: Arc<Vm>,
    options: GcOptions,
    bounds: Option<Bounds<'a>>,
    pace: Pace,
    report: GcReport,
    progress: &'a mut dyn FnMut(Progress),
    // What was there when the run began, on any target.
    there: BTreeMap<Dead, u64>,
    // What `dropping` named and is proven gone.
    deleted: BTreeSet<Dead>,
    // Roots that the plan holds for live: one that is not among them must not turn up in the log.
    live_roots: BTreeSet<RootId>,
    moving: Moving,
    compacted: u64,
    // Bytes of new objects.
    written_bytes: u64,
}

impl<'a> Collector<'a> {
    pub(super) fn new(
        session: &'a Session,
        options: GcOptions,
        bounds: Option<Bounds<'a>>,
        pace: Pace,
        report: GcReport,
        progress: &'a mut dyn FnMut(Progress),
    ) -> Self {
        Self {
            session,
            vm: session.vm().clone(),
            options,
            bounds,
            pace,
            report,
            progress,
            there: BTreeMap::new(),
            deleted: BTreeSet::new(),
            live_roots: BTreeSet::new(),
            moving: Moving::default(),
            compacted: 0,
            written_bytes: 0,
        }
    }

    fn run(mut self, grace: &Grace, report: &mut GcReport) -> Result<()> {
        self.there = objects_there(&self.vm)?;
        let before: u64 = self.there.values().sum();
        let outcome = self.collect(grace);
        let after: u64 = objects_there(&self.vm)?.values().sum();
        self.report.bytes_reclaimed = before.saturating_sub(after);
        *report = self.report;
        match outcome {
            // What was freed was freed; the next run goes on from there.
            Err(e) if e.kind() == ErrorKind::NoSpace && report.objects_deleted > 0 => {
                log::warn!("{}: {e}", title(&report.vm));
                report.no_space = true;
                Ok(())
            }
            done => done,
        }
    }

    /// Does what was planned for a home whose leaks and forgotten snapshots are not for us to judge.
    /// `there` is what [`objects_there`] told before.
    pub(super) fn run_planned(
        mut self,
        state: &VmState,
        mut plan: Plan,
        there: BTreeMap<Dead, u64>,
        report: &mut GcReport,
    ) -> Result<()> {
        self.there = there;
        let outcome = self.delete_dropped().and_then(|()| {
            self.report.tell(&self.vm, &plan);
            self.drop_dead(state, &plan)?;
            self.compact(state, &mut plan)
        });
        *report = self.report;
        match outcome {
            Err(e) if e.kind() == ErrorKind::NoSpace && report.objects_deleted > 0 => {
                log::warn!("{}: {e}", report.vm);
                report.no_space = true;
                Ok(())
            }
            done => done,
        }
    }

    fn collect(&mut self, grace: &Grace) -> Result<()> {
        // What an earlier run could not delete any more goes first: it makes room.
        self.delete_dropped()?;
        let state = self.vm.state();
        must_be_whole(&self.vm)?;
        let (packs, popular) = (self.session.packs(), self.session.popular());
        let mut plan = Plan::make(&self.vm, packs, &state, self.options.exact, popular, grace)?;
        self.report.tell(&self.vm, &plan);
        self.live_roots.clone_from(&plan.roots.live);
        // Dead packs go before compaction begins, which needs room.
        self.drop_dead(&state, &plan)?;
        if self.options.exact {
            self.delete_leaked()?;
        }
        self.compact(&state, &mut plan)
    }

    fn drop_dead(&mut self, planned: &VmState, plan: &Plan) -> Result<()> {
        if plan.dead_packs.is_empty() && plan.roots.dead.is_empty() {
            return Ok(());
        }
        self.append(|state| {
            for number in &plan.dead_packs {
                if state.packs.get(number) != planned.packs.get(number) {
                    return Err(changed(&self.vm));
                }
            }
            let roots: Vec<RootId> =
                plan.roots.dead.iter().copied().filter(|id| state.condemned.contains_key(id)).collect();
            Ok(vec![Op::Drop { packs: plan.dead_packs.clone(), roots }])
        })?;
        self.report.packs_dropped = plan.dead_packs.len() as u64;
        self.report.roots_dropped = plan.roots.dead.len() as u64;
        self.delete_dropped()?;
        self.report.bytes_reclaimable_left = self.report.bytes_reclaimable_left.saturating_sub(plan.dead_bytes);
        Ok(())
    }

    /// Appends what `change` makes of the newest state, if that state still is what the plan was made for.
    fn append(&self, change: impl Fn(&VmState) -> Result<Vec<Op>>) -> Result<()> {
        self.session.append(|state| {
            // Only the holder of the session commits; should another have, what is live is not known any more.
            if state.files.values().any(|f| !self.live_roots.contains(&f.root)) {
                return Err(changed(&self.vm));
            }
            let mut ops = change(state)?;
            // A target that is away keeps its copies: they are deleted when it is back.
            let is_whole = self.vm.backend().replicated().is_none_or(Replicated::is_whole);
            let all_gone = is_whole && state.dropping.iter().all(|dead| self.deleted.contains(dead));
            if !ops.is_empty() && !state.dropping.is_empty() && all_gone {
                ops.insert(0, Op::Deleted {});
            }
            Ok((ops, ()))
        })
    }

    /// Deletes what the log says may be deleted. May be repeated.
    fn delete_dropped(&mut self) -> Result<()> {
        let state = self.vm.state();
        let needed = needed(&state);
        for dead in &state.dropping {
            if self.deleted.contains(dead) {
                continue;
            }
            let key = key_of(&self.vm, dead);
            if needed.contains(dead) {
                // Cannot be; but what is needed is never deleted, whatever the log says.
                log::warn!("{key}: the log lets it go although it is needed");
                continue;
            }
            self.vm.backend().delete(&key)?;
            self.deleted.insert(*dead);
            // Only what an earlier run had not deleted yet counts. The listing of all targets tells; a copy that is
            // left on a target that was away would count for a bad one if each object were asked for.
            if self.there.contains_key(dead) {
                self.report.objects_deleted += 1;
                (self.progress)(Progress::Deleting(self.report.objects_deleted));
            }
        }
        Ok(())
    }

    /// G5: with the lock held and our begin record in the log, nobody can commit anything that the log does not know
    /// now: a writer that is only paused fails at the fence.
    fn delete_leaked(&mut self) -> Result<()> {
        let state = self.vm.state();
        let begin = self.session.begin_record();
        let held = self.vm.held_roots()?;
        for (dead, bytes) in Left::find(&self.vm, &state, true)?.leaked {
            let key = key_of(&self.vm, &dead);
            let keep = match dead {
                Dead::Root { id } => id.begin() >= begin || held.contains(&id) || self.vm.backend().is_pinned(&key)?,
                Dead::Pack { object } => object.number.begin() >= begin || object.generation.0 >= begin.0,
            };
            if keep {
                continue;
            }
            log::info!("{key}: the log does not know it, {bytes} bytes");
            self.vm.backend().delete(&key)?;
            self.report.leaked_objects += 1;
            self.report.leaked_bytes += bytes;
            self.report.objects_deleted += 1;
            (self.progress)(Progress::Deleting(self.report.objects_deleted));
        }
        Ok(())
    }

    fn compact(&mut self, state: &VmState, plan: &mut Plan) -> Result<()> {
        // The recipes need to be read again only where they and the bitmaps differ.
        let exact = self.options.exact && plan.exactness.bitmaps_wrong > 0;
        for (part, has_work) in &plan.parts {
            if !has_work {
                continue;
            }
            let surveyed = match (plan.only.take(), &plan.known) {
                (Some(surveyed), _) => surveyed,
                (None, Some(live)) => Surveyed::of_known(self.session.packs(), part, live),
                (None, None) => {
                    let packs = self.session.packs();
                    Surveyed::of(&self.vm, packs, state, part, &plan.roots, exact, &mut plan.exactness)?
                        .with_forwardable(packs, self.sharing(state))
                }
            };
            for bin in bins(&surveyed.surveys) {
                if self.is_over() {
                    self.report.partial = true;
                    return self.publish();
                }
                let bin: Vec<&Survey> = bin.iter().filter_map(|at| surveyed.surveys.get(*at)).collect();
                if let Err(e) = self.compact_bin(&bin, &surveyed) {
                    let was_empty = self.moving.packs.is_empty();
                    // What is done so far is not thrown away, and gives room for more.
                    self.publish()?;
                    if was_empty || e.kind() != ErrorKind::NoSpace {
                        return Err(e);
                    }
                    self.compact_bin(&bin, &surveyed)?;
                }
                (self.progress)(Progress::Compacting(self.compacted, plan.rewritten));
                self.pace.step();
                if self.moving.bytes >= MOVE_BYTES {
                    self.publish()?;
                }
            }
        }
        self.publish()?;
        self.report.bytes_reclaimable_left = plan.left_bytes;
        Ok(())
    }

    /// Whether the bounds are reached. What is dead as a whole is gone by then: that takes no time.
    fn is_over(&self) -> bool {
        self.bounds.is_some_and(|b| self.written_bytes >= b.bytes || b.stop.load(Ordering::Relaxed))
    }

    /// Writes one object for all in `bin`. Those that cannot be read stay as they are.
    fn compact_bin(&mut self, bin: &[&Survey], surveyed: &Surveyed) -> Result<()> {
        let mut bin = bin.to_vec();
        while bin.len() > 1 || bin.first().is_some_and(|s| s.is_worth_rewriting()) {
            let mut sources = Vec::with_capacity(bin.len());
            for survey in &bin {
                let live = survey.held.packs.iter().map(|p| (p.number, live_of(&surveyed.live, p.number)));
                let live: Vec<_> = live.filter(|(_, slots)| !slots.is_empty()).collect();
                let Some((number, _)) = live.first() else { continue };
                let place = self.vm.locate(*number)?;
                if place.object != survey.held.object {
                    return Err(changed(&self.vm));
                }
                let forwards = self.forwards(survey, &live)?;
                sources.push(Source { place, live, forwards });
            }
            if sources.len() != bin.len() {
                return Err(changed(&self.vm));
            }
            if let ([survey], [source]) = (bin.as_slice(), sources.as_slice())
                && !survey.with_forwards(source.forwards.len() as u64).is_worth_rewriting()
            {
                // The sample had promised more, or the common blocks are damaged.
                return Ok(());
            }
            match rewrite(self.session, &sources) {
                Ok(entries) => {
                    self.note_moved(&bin, entries);
                    return Ok(());
                }
                Err(Failure::Source(at, e)) => {
                    let survey = bin.remove(at);
                    self.report.leave(&self.vm, survey.held.object, &e.to_string());
                }
                Err(Failure::Target(e)) => return Err(e),
            }
        }
        Ok(())
    }

    fn sharing(&self, state: &VmState) -> Sharing<'_> {
        Sharing { popular: self.session.popular(), group: group_of(&state.group) }
    }

    /// Which live slots of an object become forwards.
    fn forwards(&self, survey: &Survey, live: &[(PackNumber, RoaringBitmap)]) -> Result<BTreeMap<SlotId, SlotId>> {
        let mut forwards = BTreeMap::new();
        let is_common = survey.held.object.number.is_common();
        if survey.content != Content::Data || is_common || !self.session.popular().has_blocks() {
            return Ok(forwards);
        }
        let sharing = self.sharing(&self.vm.state());
        for (number, slots) in live {
            match sharing.proven_forwards(self.session.packs(), *number, slots) {
                Ok(found) => forwards.extend(found),
                // Whoever copies its blocks will say what is wrong.
                Err(e) if e.kind() == ErrorKind::Corrupt => log::debug!("pack {number}: nothing is forwarded: {e}"),
                Err(e) => return Err(e),
            }
        }
        Ok(forwards)
    }

    fn note_moved(&mut self, bin: &[&Survey], entries: Vec<PackEntry>) {
        let moved: BTreeSet<PackNumber> = entries.iter().map(|e| e.number).collect();
        let bytes = entries.first().map_or(0, |e| e.object_bytes);
        self.moving.bytes += bytes;
        self.written_bytes += bytes;
        self.moving.packs.extend(entries);
        for survey in bin {
            self.moving.dead_objects.push(survey.held.object);
            for entry in &survey.held.packs {
                self.moving.from.insert(entry.number, entry.object);
                if !moved.contains(&entry.number) {
                    self.moving.dead_packs.push(entry.number);
                }
            }
        }
        self.compacted += bin.len() as u64;
    }

    /// Tells the log where packs are now, and deletes the objects where they were.
    fn publish(&mut self) -> Result<()> {
        let moving = std::mem::take(&mut self.moving);
        if moving.packs.is_empty() {
            return Ok(());
        }
        let done = self.append(|state| {
            let is_there = |number: &PackNumber, object: &ObjectId| {
                state.packs.get(number).is_some_and(|entry| entry.object == *object)
            };
            // Nothing but what moves or is dead may be in an object that goes.
            let dead: BTreeSet<ObjectId> = moving.dead_objects.iter().copied().collect();
            let others = state.packs.values().any(|p| dead.contains(&p.object) && !moving.from.contains_key(&p.number));
            if others || !moving.from.iter().all(|(number, object)| is_there(number, object)) {
                return Err(changed(&self.vm));
            }
            let mut ops = Vec::new();
            if !moving.dead_packs.is_empty() {
                ops.push(Op::Drop { packs: moving.dead_packs.clone(), roots: Vec::new() });
            }
            ops.push(Op::Move { packs: moving.packs.clone(), dead: moving.dead_objects.clone() });
            Ok(ops)
        });
        if let Err(e) = done {
            if e.kind() == ErrorKind::NoSpace {
                self.give_up(&moving);
            }
            return Err(e);
        }
        let written: BTreeSet<ObjectId> = moving.packs.iter().map(|p| p.object).collect();
        self.report.packs_written += written.len() as u64;
        self.report.packs_compacted += moving.dead_objects.len() as u64;
        self.report.packs_dropped += moving.dead_packs.len() as u64;
        self.delete_dropped()
    }

    /// There was no room for the record: without it the new objects are only in the way.
    fn give_up(&self, moving: &Moving) {
        let Ok(state) = self.vm.refresh() else { return };
        let needed = needed(&state);
        let written: BTreeSet<ObjectId> = moving.packs.iter().map(|p| p.object).collect();
        for object in written {
            let key = pack_key(self.vm.name(), object);
            if self.vm.damage().is_none()
                && !needed.contains(&Dead::Pack { object })
                && let Err(e) = self.vm.backend().delete(&key)
            {
                log::debug!("{key}: stays, unused: {e}");
            }
        }
    }
}

fn changed(vm: &Vm) -> Error {
    busy(format!("{}: another writer changed it during collection", title(vm.name())))
}
