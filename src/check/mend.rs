//! Heals packs of which some part is whole in no copy, from live images that still have the blocks.
//!
//! The slot table of a pack has the fingerprint of each block, so a block is known wherever it is found. Of an object
//! whose index is lost nothing can be told, and nothing healed. Where this version of zstd gives other bytes than the one
//! that wrote a frame, the object cannot become what it was: then its next generation has what was healed, as after a
//! compaction, and needs the VM's write lock for the record that says so. Collection deletes the old one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::catalog::record::{Op, PackEntry};
use crate::catalog::roots::read_root;
use crate::catalog::vm::{COMMON_HOME, Vm, object_place, pack_key, title};
use crate::check::faults::Severity;
use crate::check::live::{LiveImage, Search};
use crate::check::store::CheckReport;
use crate::error::{Error, ErrorKind, Result, busy, corrupt};
use crate::limits::{HEAL_BLOCKS_MAX, HEAL_GRIDS_MAX};
use crate::pack::copies::{Depth, find};
use crate::pack::mend::{Mended, Wounds, examine, mend, renew};
use crate::pack::reader::ObjectPlace;
use crate::store::Store;
use crate::store::session::{Session, pack_entry};
use crate::units::{Generation, Grid, PackNumber};

struct Wounded {
    vm: Arc<Vm>,
    place: ObjectPlace,
    wounds: Wounds,
}

/// Finds all packs of which some part is whole in no copy, and heals what these images have.
///
/// Memory: about 120 bytes for each lost block, of at most [`HEAL_BLOCKS_MAX`] at a time, and what [`mend`] needs. Cost:
/// reads all packs, and each image once for each grid that the VMs concerned have and for the one without a lead, again
/// for every [`HEAL_BLOCKS_MAX`] lost blocks; nothing of the images when nothing is lost.
///
/// # Errors
/// When the VMs cannot be listed, or an image cannot tell where its data is. What cannot be healed is in the report.
pub fn mend_store(store: &Store, images: &[&dyn LiveImage], report: &mut CheckReport) -> Result<()> {
    let mut homes = vec![store.common_home().clone()];
    homes.extend(store.vm_names()?.iter().map(|name| store.vm_handle(name)));
    let mut found: Vec<Wounded> = Vec::new();
    let mut blocks = 0;
    for vm in &homes {
        // What is wrong with a log, the check tells.
        let Ok(state) = vm.refresh() else { continue };
        let mut seen = BTreeSet::new();
        for entry in state.packs.values().filter(|entry| seen.insert(entry.object)) {
            let place = object_place(vm.name(), state.incarnation, entry);
            let wounds = match examine(&**store.backend(), &place) {
                Ok(wounds) if wounds.is_none() => continue,
                Ok(wounds) => wounds,
                Err(e) if e.kind() == ErrorKind::Unavailable => continue,
                Err(_) => {
                    if is_needed(vm, &place) {
                        let what = "cannot be healed from an image: without its index nobody knows which blocks it had";
                        report.add_one(label(vm), place.key.to_string(), what.into(), Severity::Should);
                    }
                    continue;
                }
            };
            blocks += wounds.frames().map(|frame| frame.wanted.len()).sum::<usize>();
            found.push(Wounded { vm: vm.clone(), place, wounds });
            if blocks >= HEAL_BLOCKS_MAX {
                mend_found(store, &homes, std::mem::take(&mut found), images, report)?;
                blocks = 0;
            }
        }
    }
    mend_found(store, &homes, found, images, report)
}

fn mend_found(
    store: &Store,
    homes: &[Arc<Vm>],
    found: Vec<Wounded>,
    images: &[&dyn LiveImage],
    report: &mut CheckReport,
) -> Result<()> {
    let mut search = Search::new(images);
    let wanted = found.iter().flat_map(|one| one.wounds.frames()).flat_map(|frame| frame.wanted.iter().flatten());
    wanted.for_each(|print| search.want(*print));
    if !search.is_empty() {
        let is_common = found.iter().any(|one| one.vm.name() == COMMON_HOME);
        let names: BTreeSet<&str> = found.iter().map(|one| one.vm.name()).collect();
        let concerned = homes.iter().filter(|vm| is_common || names.contains(vm.name()));
        search.run(&grids_of(concerned))?;
    }
    for one in &found {
        if is_needed(&one.vm, &one.place) {
            let outcome = mend_one(store, one, &search);
            let otherwise = outcome.as_ref().map_or(0, |mended| mended.frames_otherwise);
            tell(one, outcome, report);
            if otherwise > 0 {
                let renewed = renew_one(store, one, &search);
                tell_renewed(one, renewed, otherwise, report);
            }
        }
    }
    Ok(())
}

/// How the snapshots of these VMs lie on the grid: the one without a lead, and those that most have.
fn grids_of<'a>(vms: impl Iterator<Item = &'a Arc<Vm>>) -> Vec<Grid> {
    let mut counts: BTreeMap<u32, (Grid, u64)> = BTreeMap::new();
    for vm in vms {
        let Ok(state) = vm.refresh() else { continue };
        for file in state.files.values() {
            if let Ok(root) = read_root(&**vm.backend(), vm.name(), state.incarnation, file.root) {
                counts.entry(root.grid().lead()).or_insert((root.grid(), 0)).1 += 1;
            }
        }
    }
    let plain = Grid::default();
    let mut grids: Vec<(Grid, u64)> = counts.into_values().filter(|(grid, _)| *grid != plain).collect();
    grids.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let others = grids.into_iter().map(|(grid, _)| grid).take(HEAL_GRIDS_MAX - 1);
    std::iter::once(plain).chain(others).collect()
}

/// Whether the newest log still needs the object: collection may have moved what is in it meanwhile.
fn is_needed(vm: &Vm, place: &ObjectPlace) -> bool {
    vm.refresh().is_ok_and(|state| state.objects().contains_key(&place.object))
}

fn mend_one(store: &Store, one: &Wounded, search: &Search<'_>) -> Result<Mended> {
    let backend = &**store.backend();
    let mut block = |print: &_| search.find(print);
    let Some(replicated) = backend.replicated() else {
        return mend(backend, backend, &one.place, &one.wounds, &mut block);
    };
    let mut best: Option<Result<Mended>> = None;
    for (target, _) in find(replicated, &one.place, Depth::All).bad {
        let outcome = mend(backend, &target, &one.place, &one.wounds, &mut block);
        if outcome.as_ref().is_ok_and(Mended::is_whole) {
            replicated.is_healed(&one.place.key, target.id());
        }
        let rank = |outcome: &Result<Mended>| outcome.as_ref().map_or(0, |mended| 1 + mended.frames + mended.parts);
        if best.as_ref().is_none_or(|best| rank(&outcome) > rank(best)) {
            best = Some(outcome);
        }
    }
    best.unwrap_or_else(|| Ok(Mended::default()))
}

/// Puts what can be healed into the next generation of an object; the frames that were, none if the object is not needed.
fn renew_one(store: &Store, one: &Wounded, search: &Search<'_>) -> Result<u64> {
    let backend = &**store.backend();
    if let Some(replicated) = backend.replicated() {
        // It may have whole what stays damaged, and its copy would go as well.
        if let Some(away) = replicated.places(&one.place.key).all().find(|target| !target.is_well()) {
            return Err(Error::new(ErrorKind::Unavailable, format!("target {} is away", away.name())));
        }
    }
    let session = Session::begin_without_index(store, &one.vm)?;
    let state = one.vm.state();
    let packs = state.packs.values().filter(|entry| entry.object == one.place.object).map(|entry| entry.number);
    let packs: BTreeSet<PackNumber> = packs.collect();
    // Mending may have healed some of it.
    let wounds = examine(backend, &one.place)?;
    let generation = Generation(session.begin_record().0);
    let key_of = |object| pack_key(one.vm.name(), object);
    let mut block = |print: &_| search.find(print);
    let renewed = renew(backend, &one.place, &wounds, &packs, generation, &key_of, &mut block)?;
    let Some((mended, object, finished)) = renewed else { return Ok(0) };
    let (bytes, tail_bytes) = (finished.bytes, finished.tail_bytes);
    let place = ObjectPlace { key: key_of(object), object, bytes, tail_bytes, ..one.place.clone() };
    // The old one goes: what replaces it must be what was meant, but for what is as damaged as before.
    let after = examine(backend, &place)?;
    if after.frames().count() as u64 != mended.frames_without_blocks || after.has_bad_parts() {
        return Err(corrupt(format!("{}: is not what was written", place.key)));
    }
    let entries = packs.iter().map(|number| pack_entry(*number, place.content, &finished, object));
    let entries: Vec<PackEntry> = entries.collect::<Result<_>>()?;
    session.append(|state| {
        let there = state.packs.values().filter(|entry| entry.object == one.place.object);
        if there.map(|entry| entry.number).collect::<BTreeSet<_>>() != packs {
            return Err(busy(format!("{} was changed meanwhile", title(one.vm.name()))));
        }
        Ok((vec![Op::Move { packs: entries.clone(), dead: vec![one.place.object] }], ()))
    })?;
    Ok(mended.frames_anew)
}

fn tell_renewed(one: &Wounded, renewed: Result<u64>, frames: u64, report: &mut CheckReport) {
    let key = one.place.key.to_string();
    let mut add = |what: String, severity| report.add_one(label(&one.vm), key.clone(), what, severity);
    match renewed {
        Ok(healed) => {
            if healed > 0 {
                let what = "frames from live images, in a new generation since another version of zstd compressed them";
                add(format!("healed: {healed} {what}"), Severity::Copy);
            }
            report.frames_mended += healed;
            report.frames_unmended -= healed.min(frames);
        }
        Err(e) => add(
            format!(
                "{frames} frames are not healed: their blocks are there, but were compressed by another version of \
                 zstd, and the next generation cannot be written: {e}"
            ),
            Severity::Should,
        ),
    }
}

fn tell(one: &Wounded, outcome: Result<Mended>, report: &mut CheckReport) {
    let key = one.place.key.to_string();
    let mended = match outcome {
        Ok(mended) => mended,
        Err(e) => {
            report.frames_unmended += one.wounds.frames().count() as u64;
            report.add_one(label(&one.vm), key, format!("cannot be healed: {e}"), Severity::Should);
            return;
        }
    };
    report.frames_mended += mended.frames;
    report.frames_unmended += mended.frames_without_blocks + mended.frames_otherwise;
    let mut add = |what: String, severity| report.add_one(label(&one.vm), key.clone(), what, severity);
    if mended.frames + mended.parts > 0 {
        let (frames, parts) = (mended.frames, mended.parts);
        add(format!("healed: {frames} frames from live images, {parts} other parts"), Severity::Copy);
    }
    if mended.frames_without_blocks > 0 {
        let frames = mended.frames_without_blocks;
        add(format!("{frames} frames cannot be healed: no image has all of their blocks"), Severity::Should);
    }
    if mended.parts_left > 0 {
        let parts = mended.parts_left;
        add(format!("{parts} pages of its slot table cannot be healed"), Severity::Should);
    }
}

fn label(vm: &Vm) -> &str {
    if vm.name() == COMMON_HOME { "" } else { vm.name() }
}
