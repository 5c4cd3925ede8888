//! G6: collects the common packs, which belong to no VM.
//!
//! What is live is what any VM refers to, by the common bitmaps of its group pages and by forwards, and what the popular
//! index leads to. Slots that nobody refers to are *condemned* first, with a new epoch: from then on no writer refers to
//! them anew. A later run makes sure that every writer that began before has ended, counts again, and only then takes
//! the bytes away. A VM that cannot be read stops all of it.

use std::collections::BTreeMap;

use roaring::RoaringTreemap;

use crate::backend::Key;
use crate::backend::replicate::Replicated;
use crate::catalog::record::{Dead, Op};
use crate::catalog::state::VmState;
use crate::catalog::vm::{COMMON_HOME, Vm, home_folder, pack_key, title};
use crate::collect::gc::{Collector, GcOptions, GcReport, Left, Progress, objects_there};
use crate::collect::live::{common_slots, slot_range};
use crate::collect::pace::Pace;
use crate::collect::plan::Plan;
use crate::error::{Error, ErrorKind, Result, corrupt};
use crate::limits::CONDEMNED_SLOTS_MAX;
use crate::pack::Content;
use crate::pack::frame::FrameRow;
use crate::pack::reader::Packs;
use crate::popular::index::{IndexIdentity, PopularIndex};
use crate::recipe::SlotSet;
use crate::store::Store;
use crate::store::common::common_state;
use crate::store::session::Session;
use crate::units::{Epoch, RecordNumber, SlotId};

/// How often what a VM refers to is counted again when others change it meanwhile.
const COUNT_TRIES: usize = 8;

/// Collects the common packs; `None` when there is no common home.
///
/// Memory: bitmaps of all common slots. Cost: root pages and group pages of all VMs, indexes of compacted packs and of
/// all common packs, the popular index; once more when something is to go. Writes nothing when there is nothing to do.
///
/// # Errors
/// `Corrupt`, naming the object, when anything that says what is live cannot be read: then nothing was deleted.
/// `NoSpace`, `ReadOnly`, `Unavailable`. Busy writers and another collection are in the report.
pub fn collect_common(
    store: &Store,
    options: GcOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Option<GcReport>> {
    let home = store.common_home();
    progress(Progress::Planning);
    let Some(state) = common_state(home)? else { return Ok(None) };
    let mut report = GcReport { vm: title(COMMON_HOME), ..GcReport::default() };
    let work = Work::find(store, &state, options)?;
    report.slots_condemned = state.popular.condemned.0.len();
    if options.dry_run {
        report.slots_condemned = work.condemned.len();
        report.leaked_objects = work.left.leaked.len() as u64;
        report.leaked_bytes = work.left.leaked.iter().map(|(_, bytes)| bytes).sum();
    }
    if options.dry_run || !work.is_any(&state) {
        report.idle = !work.is_any(&state);
        return Ok(Some(report));
    }
    drop(work);
    match Session::begin_without_index(store, home) {
        Ok(session) => Run { store, session: &session, options }.collect(&mut report, progress)?,
        Err(e) if e.kind() == ErrorKind::Busy => {
            log::info!("{e}");
            report.busy = true;
        }
        Err(e) => return Err(e),
    }
    Ok(Some(report))
}

/// What is to be done, as a look without the lock finds it.
struct Work {
    /// What should be condemned now.
    condemned: RoaringTreemap,
    /// Whether any of what was condemned before can go now.
    can_go: bool,
    left: Left,
}

impl Work {
    fn find(store: &Store, state: &VmState, options: GcOptions) -> Result<Self> {
        let packs = store.packs(store.common_home());
        let there = present(&packs, state)?;
        let condemned = &there - live(store)? - elected(store, state)?;
        let gone = &condemned & &state.popular.condemned.0;
        let can_go = !gone.is_empty() && Plan::of_known(&packs, state, whole(state, there) - gone).has_work();
        Ok(Self { condemned: cut(condemned), can_go, left: Left::find(store.common_home(), state, options.exact)? })
    }

    fn is_any(&self, state: &VmState) -> bool {
        let old = &state.popular.condemned.0;
        self.can_go || self.condemned != *old || !self.left.undeleted.is_empty() || !self.left.leaked.is_empty()
    }
}

/// No more than a record may hold: the rest is for the next collection.
fn cut(mut slots: RoaringTreemap) -> RoaringTreemap {
    if let Some(first_over) = slots.select(CONDEMNED_SLOTS_MAX) {
        slots.remove_range(first_over..);
    }
    slots
}

/// The slots with those of packs that cannot be read, which have all that they could have: so they stay as they are.
fn whole(state: &VmState, mut there: RoaringTreemap) -> RoaringTreemap {
    for entry in state.packs.values() {
        if there.range_cardinality(slot_range(entry.number)) == 0 {
            there.insert_range(slot_range(entry.number));
        }
    }
    there
}

/// All slots of the common packs, but for those that cannot be read.
fn present(packs: &Packs, state: &VmState) -> Result<RoaringTreemap> {
    let mut slots = RoaringTreemap::new();
    for entry in state.packs.values() {
        let index = packs.locate(entry.number).and_then(|place| packs.index(&place));
        match index.as_ref().map(|index| index.member(entry.number)) {
            Ok(Ok(member)) => {
                for slot in member.frames.iter().flat_map(FrameRow::slots) {
                    slots.insert(SlotId::new(entry.number, slot).0);
                }
            }
            Err(e) if e.kind() == ErrorKind::Unavailable => return Err(e.duplicate()),
            _ => {
                log::warn!("{}: is left as it is; run snapfs check", pack_key(COMMON_HOME, entry.object));
            }
        }
    }
    Ok(slots)
}

/// What the newest popular index leads to.
fn elected(store: &Store, state: &VmState) -> Result<RoaringTreemap> {
    let mut slots = RoaringTreemap::new();
    if state.popular.index > 0 {
        let identity = IndexIdentity { incarnation: state.incarnation, epoch: Epoch(state.popular.index) };
        let mut visit = |slot: SlotId| {
            slots.insert(slot.0);
        };
        let read = PopularIndex::read_visiting(&**store.backend(), identity, 0, &mut visit);
        read.map_err(|e| {
            let kind = if e.kind() == ErrorKind::NotFound { ErrorKind::Corrupt } else { e.kind() };
            e.as_kind(kind).within("common packs: nothing is collected before the next election")
        })?;
    }
    Ok(slots)
}

/// What any VM refers to.
fn live(store: &Store) -> Result<RoaringTreemap> {
    let mut live = RoaringTreemap::new();
    let names = store.vm_names()?;
    must_see_all(store)?;
    for name in names {
        let vm = store.vm_handle(&name);
        let mut tries = 0;
        loop {
            tries += 1;
            match of_vm(store, &vm) {
                Ok(slots) => {
                    live |= slots;
                    break;
                }
                // Others may have moved what it was reading.
                Err(e) if e.kind() == ErrorKind::Corrupt && tries < COUNT_TRIES => {
                    let before = vm.state().number;
                    if vm.refresh().is_ok_and(|now| now.number == before) {
                        return Err(e);
                    }
                }
                Err(e) => return Err(e),
            }
        }
    }
    // Nor may one have gone meanwhile, of which an older copy was read.
    must_see_all(store)?;
    Ok(live)
}

/// A VM, or what it committed last, may be known to targets alone that are away: then nobody knows what is live.
fn must_see_all(store: &Store) -> Result<()> {
    let away = store.backend().replicated().map(Replicated::away_with_what_counts).unwrap_or_default();
    if away.is_empty() {
        return Ok(());
    }
    let what = format!("common packs: nothing is collected, what VMs need may be known only to {}", away.join(", "));
    Err(Error::new(ErrorKind::Unavailable, format!("{what}, which are away")))
}

fn of_vm(store: &Store, vm: &std::sync::Arc<Vm>) -> Result<RoaringTreemap> {
    let state = match vm.refresh() {
        Ok(state) => state,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            // Somebody is making it; but one that has packs has lost its log.
            let packs = vm.backend().list(&Key::new(format!("{}/packs", home_folder(vm.name()))))?;
            let lost = || corrupt(format!("{}: has no log: what it needs is not known", title(vm.name())));
            return if packs.is_empty() { Ok(RoaringTreemap::new()) } else { Err(lost().because(e)) };
        }
        Err(e) => return Err(e),
    };
    let packs = store.packs(vm);
    let mut live = common_slots(vm, &packs, &state)?;
    // Only what a collection wrote can have forwards.
    for entry in state.packs.values().filter(|p| p.content == Content::Data && p.object.generation.0 > 0) {
        let index = packs.locate(entry.number).and_then(|place| packs.index(&place));
        let index = index.map_err(|e| {
            let kind = if e.kind() == ErrorKind::NotFound { ErrorKind::Corrupt } else { e.kind() };
            e.as_kind(kind).within(format!("{}: which common blocks it needs is not known", title(vm.name())))
        })?;
        for row in &index.member(entry.number)?.forwards {
            live.insert_range(row.target.0..row.target.0 + u64::from(row.count()));
        }
    }
    Ok(live)
}

/// Makes sure that no writer is at work that began before this epoch; who is, is named.
fn end_writers(store: &Store, epoch: u64) -> Result<Vec<String>> {
    let mut busy = Vec::new();
    let names = store.vm_names()?;
    must_see_all(store)?;
    for name in names {
        let vm = store.vm_handle(&name);
        let state = match vm.refresh() {
            Ok(state) => state,
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        if state.session.as_ref().is_none_or(|session| session.common_epoch >= epoch) {
            continue;
        }
        // The begin record fences it, whether it still runs or not.
        match Session::begin_without_index(store, &vm) {
            Ok(session) if session.vm().state().session.as_ref().is_some_and(|s| s.common_epoch >= epoch) => {}
            Ok(_) => busy.push(vm.name().to_owned()),
            Err(e) if e.kind() == ErrorKind::Busy => busy.push(vm.name().to_owned()),
            Err(e) => return Err(e),
        }
    }
    Ok(busy)
}

/// One run under the lock of the common home.
struct Run<'a> {
    store: &'a Store,
    session: &'a Session,
    options: GcOptions,
}

impl Run<'_> {
    fn collect(&self, report: &mut GcReport, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        let home = self.session.vm();
        let there = objects_there(home)?;
        let before: u64 = there.values().sum();
        let outcome = self.work(there, report, progress);
        let after: u64 = objects_there(home)?.values().sum();
        report.bytes_reclaimed = before.saturating_sub(after);
        outcome
    }

    fn work(
        &self,
        there: BTreeMap<Dead, u64>,
        report: &mut GcReport,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<()> {
        let home = self.session.vm().clone();
        let packs = self.store.packs(&home);
        let state = home.refresh()?;
        let old = state.popular.condemned.0.clone();
        let leaks = self.leaks(&state, state.popular.published)?;
        if !old.is_empty() || !leaks.is_empty() || !state.dropping.is_empty() {
            report.waiting_for = end_writers(self.store, state.popular.epoch)?;
            if report.waiting_for.is_empty() {
                // Whatever refers to the condemned slots is in a log now.
                let gone = &old - live(self.store)? - elected(self.store, &state)?;
                self.delete(&state, &packs, &gone, there, report, progress)?;
                self.delete_leaks(&state, leaks, report)?;
            }
        }
        let state = home.refresh()?;
        let mut condemned = present(&packs, &state)?;
        condemned -= live(self.store)?;
        condemned -= elected(self.store, &state)?;
        // What was condemned before goes first, should there be too much.
        let older = &condemned & &old;
        let mut condemned = cut(condemned);
        if condemned.len() >= CONDEMNED_SLOTS_MAX {
            condemned = older;
        }
        report.slots_condemned = condemned.len();
        let has_new_leaks = self.options.exact && !self.leaks(&state, RecordNumber(u32::MAX))?.is_empty();
        if condemned == old && !(has_new_leaks && report.waiting_for.is_empty()) {
            return Ok(());
        }
        self.session.append(|state| {
            let epoch = state.popular.epoch + 1;
            let condemned = SlotSet(condemned.clone());
            Ok((vec![Op::Publish { epoch, index: state.popular.index, condemned }], ()))
        })
    }

    /// Takes slots away: packs in which nothing else is, and by compaction where enough is.
    fn delete(
        &self,
        state: &VmState,
        packs: &Packs,
        gone: &RoaringTreemap,
        there: BTreeMap<Dead, u64>,
        report: &mut GcReport,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<()> {
        let present = whole(state, present(packs, state)?);
        let plan = Plan::of_known(packs, state, present - gone);
        let pace = Pace::beside(self.store, COMMON_HOME)?;
        Collector::new(self.session, self.options, None, pace, report.clone(), progress)
            .run_planned(state, plan, there, report)
    }

    /// Objects that the log does not know, of writers that joined before a record.
    fn leaks(&self, state: &VmState, before: RecordNumber) -> Result<Vec<(Key, u64)>> {
        let mut leaks = Vec::new();
        if !self.options.exact {
            return Ok(leaks);
        }
        let own = self.session.begin_record();
        for (dead, bytes) in Left::find(self.session.vm(), state, true)?.leaked {
            let Dead::Pack { object } = dead else { continue };
            let is_old = match object.generation.0 {
                0 => object.number.begin() < before,
                // Of a collection that died: there is only one at a time.
                generation => generation < own.0,
            };
            if is_old {
                leaks.push((pack_key(COMMON_HOME, object), bytes));
            }
        }
        Ok(leaks)
    }

    fn delete_leaks(&self, state: &VmState, leaks: Vec<(Key, u64)>, report: &mut GcReport) -> Result<()> {
        if leaks.is_empty() {
            return Ok(());
        }
        // Who is only paused must not bring what goes now.
        let before = state.popular.published;
        self.session.append(|state| {
            let op = Op::Fence { before };
            Ok((if state.popular.fence < before { vec![op] } else { Vec::new() }, ()))
        })?;
        let now = self.session.vm().refresh()?;
        let known: Vec<Key> = now.objects().keys().map(|object| pack_key(COMMON_HOME, *object)).collect();
        for (key, bytes) in leaks.into_iter().filter(|(key, _)| !known.contains(key)) {
            self.store.backend().delete(&key)?;
            report.leaked_objects += 1;
            report.leaked_bytes += bytes;
            report.objects_deleted += 1;
        }
        Ok(())
    }
}
