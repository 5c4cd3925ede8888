//! Several targets as one backend: every object lies on some of them, as [`placement`](crate::backend::placement) says.
//!
//! ```text
//!   put     the arbiter, create-only: it decides ──> the other copies ──> enough of them? else `Unavailable`
//!   read    the arbiter ──> not there, not right ──> the next copy; the bad one is replaced by who can prove the bytes
//!   list    what any copy has           lock  the arbiter           pin  all copies
//! ```
//!
//! What a target missed while it was away is put back by `check --repair`. Nothing that was deleted meanwhile comes to
//! life with it: the log of a VM says what is there, and the log can only be written with the arbiter.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use crate::backend::placement::{Copies, Scope, TargetId};
use crate::backend::target::Target;
use crate::backend::{Backend, Guard, Key, Listed, Upload};
use crate::error::{Error, ErrorKind, Result, corrupt, not_found};
use crate::limits::{BAD_COPIES_MAX, LOG_RECORD_BYTES_MAX};

/// How often a record follows the targets when they change while it is written.
const FOLLOW_TRIES: usize = 8;

/// The targets of a store as one record of its configuration has them.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The number of that record.
    pub generation: u32,
    /// Where the configuration begins. It holds nothing else, unless it is a target too.
    pub home: Target,
    /// All targets, with whether each is being given up: then nothing new is put there.
    pub targets: Vec<(Target, bool)>,
    /// How many hold an object.
    pub copies: Copies,
    /// Whether objects may lie where an earlier record had them.
    pub is_moving: bool,
}

/// Finds the newest layout, if it is newer than this one.
pub type Reload = Box<dyn Fn(&Layout) -> Result<Option<Layout>> + Send + Sync>;

/// Several targets as one backend.
pub struct Replicated {
    layout: RwLock<Arc<Layout>>,
    reload: Option<Reload>,
    heals: AtomicBool,
    bad: Mutex<Bad>,
    has_bad: AtomicBool,
}

/// What is known to be not as it should be.
#[derive(Default)]
struct Bad {
    copies: HashSet<(Key, TargetId)>,
    /// Objects that nobody has tried to heal.
    unhealed: HashSet<Key>,
    /// Records that may be on too few targets.
    unsettled: HashSet<Key>,
    /// Away targets that were told of.
    told: HashSet<TargetId>,
}

/// Where the copies of an object are.
#[derive(Debug, Clone)]
pub struct Places {
    /// Where they should be, the arbiter first.
    pub homes: Vec<Target>,
    /// Where they may be, too, while objects move.
    pub others: Vec<Target>,
    /// How many there must be.
    pub quorum: usize,
}

impl Places {
    /// All targets that may have a copy, the arbiter first.
    pub fn all(&self) -> impl Iterator<Item = &Target> {
        self.homes.iter().chain(&self.others)
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Replicated {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{:?}", self.layout())
    }
}

fn is_config(key: &str) -> bool {
    key == "snapfs.toml" || key == "config" || key.starts_with("config/")
}

/// Whether a key is of a record or a checkpoint of a log.
pub fn is_log(key: &str) -> bool {
    (key.starts_with("vms/") || key.starts_with("common/")) && key.contains("/log/")
}

impl Layout {
    /// Where the copies of an object are, or of all below a prefix.
    pub fn places(&self, key: &str) -> Places {
        if is_config(key) {
            let mut homes = vec![self.home.clone()];
            let more = self.targets.iter().map(|(target, _)| target.clone());
            homes.extend(more.filter(|target| target.id() != self.home.id()));
            // The place where the configuration begins decides alone.
            return Places { homes, others: Vec::new(), quorum: 1 };
        }
        let staying: Vec<&Target> = self.targets.iter().filter(|(_, leaving)| !leaving).map(|(t, _)| t).collect();
        let ids: Vec<TargetId> = staying.iter().map(|target| target.id()).collect();
        let places = Scope::of(key).places(&ids, self.copies);
        let homes: Vec<Target> = places.iter().filter_map(|at| staying.get(*at)).map(|t| (*t).clone()).collect();
        let mut others = Vec::new();
        if self.is_moving {
            let is_other = |target: &&Target| homes.iter().all(|home| home.id() != target.id());
            others.extend(self.targets.iter().map(|(target, _)| target).filter(is_other).cloned());
        }
        let quorum = self.copies.quorum_of(homes.len());
        Places { homes, others, quorum }
    }

    /// While objects move, the targets of which one decided over a log before: the first of those that stay, or the second
    /// when the first was added; or one that is removed and comes before them.
    fn former_arbiters(&self, key: &str) -> Vec<Target> {
        let ids: Vec<TargetId> = self.targets.iter().map(|(target, _)| target.id()).collect();
        let all = Copies { vm: ids.len(), common: ids.len(), ..self.copies };
        let mut staying = 0;
        let ranked = Scope::of(key).places(&ids, all).into_iter().filter_map(|at| self.targets.get(at));
        let former = ranked.take_while(|(_, leaving)| {
            let is_wanted = staying < 2;
            staying += usize::from(!leaving);
            is_wanted
        });
        former.map(|(target, _)| target.clone()).collect()
    }
}

impl Replicated {
    /// The targets of `layout`; `reload` finds a newer one.
    pub fn new(layout: Layout, reload: Option<Reload>) -> Self {
        Self {
            layout: RwLock::new(Arc::new(layout)),
            reload,
            heals: AtomicBool::new(true),
            bad: Mutex::default(),
            has_bad: AtomicBool::new(false),
        }
    }

    /// The targets as they are known.
    pub fn layout(&self) -> Arc<Layout> {
        self.layout.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Goes on with another layout.
    pub fn set_layout(&self, layout: Layout) {
        *self.layout.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(layout);
    }

    /// Where the copies of an object are.
    pub fn places(&self, key: &Key) -> Places {
        self.layout().places(key.as_str())
    }

    /// Whether bad copies that are met on the way are replaced.
    pub fn set_healing(&self, on: bool) {
        self.heals.store(on, Ordering::SeqCst);
    }

    /// Whether a bad copy of the object was met and nobody was told so yet. Free while all copies are good.
    pub fn wants_healing(&self, key: &Key) -> bool {
        if !self.has_bad.load(Ordering::Relaxed) || !self.heals.load(Ordering::Relaxed) {
            return false;
        }
        held(&self.bad).unhealed.remove(key)
    }

    /// The copy on this target is good now.
    pub fn is_healed(&self, key: &Key, target: TargetId) {
        held(&self.bad).copies.remove(&(key.clone(), target));
    }

    /// Whether all targets are there.
    pub fn is_whole(&self) -> bool {
        self.layout().targets.iter().all(|(target, _)| target.is_well())
    }

    /// The targets that are away, if they are so many that something that counts may be known to them alone; else none.
    pub fn away_with_what_counts(&self) -> Vec<String> {
        let layout = self.layout();
        let away = layout.targets.iter().map(|(target, _)| target).filter(|target| !target.is_well());
        let away: Vec<String> = away.map(|target| target.name().to_owned()).collect();
        let staying = layout.targets.iter().filter(|(_, leaving)| !leaving).count();
        // While objects move, they are on as many as an earlier record says.
        let is_much = layout.is_moving || away.len() >= layout.copies.quorum_of(layout.copies.vm.min(staying));
        if is_much { away } else { Vec::new() }
    }

    /// Goes on with the newest layout, if there is a newer one. `at`: where to look, one of its targets.
    ///
    /// Cost: one look.
    fn follow(&self, at: &Target) -> Result<bool> {
        let Some(reload) = &self.reload else { return Ok(false) };
        let layout = self.layout();
        let next = Key::new(format!("config/{:010}", layout.generation.saturating_add(1)));
        match at.len(&next) {
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            // The target is away: it tells nothing.
            Err(_) => return Ok(false),
        }
        match reload(&layout)? {
            Some(newer) => {
                log::info!("the targets of the store have changed, record {}", newer.generation);
                self.set_layout(newer);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Goes on with the newest layout.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable` when the configuration cannot be read.
    pub fn reload_now(&self) -> Result<()> {
        if let Some(reload) = &self.reload
            && let Some(newer) = reload(&self.layout())?
        {
            self.set_layout(newer);
        }
        Ok(())
    }

    /// Follows changes of the targets, as seen by the first of these that is there.
    fn follow_any(&self, key: &Key) -> Result<Places> {
        let places = self.places(key);
        if self.reload.is_some()
            && let Some(first) = places.homes.iter().find(|target| target.is_there())
            && self.follow(first)?
        {
            return Ok(self.places(key));
        }
        Ok(places)
    }

    fn note_bad(&self, key: &Key, failed: &[(Target, Error)]) {
        for (target, error) in failed {
            // While objects move, one that is not at its home yet is nothing bad.
            let is_bad = match error.kind() {
                ErrorKind::Corrupt => true,
                ErrorKind::NotFound => !self.layout().is_moving,
                _ => false,
            };
            if !is_bad {
                continue;
            }
            let mut bad = held(&self.bad);
            if bad.copies.len() >= BAD_COPIES_MAX {
                bad.copies.clear();
                bad.unhealed.clear();
            }
            if bad.copies.insert((key.clone(), target.id())) {
                let what = if error.kind() == ErrorKind::NotFound { "is missing".into() } else { error.to_string() };
                log::warn!("{key}: the copy on {} is bad, another one is read: {what}", target.name());
                bad.unhealed.insert(key.clone());
                self.has_bad.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Reads from one copy after the other until one is right. With it those that were not.
    fn first_good<T>(
        &self,
        key: &Key,
        places: &Places,
        mut read: impl FnMut(&Target) -> Result<T>,
    ) -> Result<(T, Vec<(Target, Error)>)> {
        let mut order: Vec<&Target> = places.all().collect();
        if self.has_bad.load(Ordering::Relaxed) {
            // Known bad ones last.
            let bad = held(&self.bad);
            order.sort_by_key(|target| bad.copies.contains(&(key.clone(), target.id())));
        }
        let mut failed: Vec<(Target, Error)> = Vec::new();
        for target in order {
            match read(target) {
                Ok(value) => {
                    let homes = |(target, _): &&(Target, Error)| places.homes.iter().any(|h| h.id() == target.id());
                    let of_homes: Vec<_> =
                        failed.iter().filter(homes).map(|(t, e)| (t.clone(), e.duplicate())).collect();
                    self.note_bad(key, &of_homes);
                    return Ok((value, of_homes));
                }
                // The same on every target.
                Err(e) if matches!(e.kind(), ErrorKind::Unsupported | ErrorKind::Invalid) => return Err(e),
                Err(e) => failed.push((target.clone(), e)),
            }
        }
        Err(verdict(key, failed))
    }

    /// Puts these bytes, which were proven, in the place of a bad copy.
    ///
    /// # Errors
    /// As [`Backend::create_over`] of the target.
    pub fn replace(&self, target: &Target, key: &Key, bytes: &[u8]) -> Result<()> {
        let mut upload = target.create_over(key)?;
        upload.append(bytes)?;
        upload.finish()?;
        self.is_healed(key, target.id());
        Ok(())
    }

    fn heal(&self, key: &Key, bytes: &[u8], failed: &[(Target, Error)]) {
        if !self.heals.load(Ordering::Relaxed) {
            return;
        }
        for (target, error) in failed {
            // A record that is missing may have been deleted just now.
            let is_bad = match error.kind() {
                ErrorKind::Corrupt => true,
                ErrorKind::NotFound => {
                    !is_log(key.as_str()) && !key.as_str().contains("/holds/") && !self.layout().is_moving
                }
                _ => false,
            };
            if !is_bad {
                continue;
            }
            match self.replace(target, key, bytes) {
                Ok(()) => log::warn!("{key}: the bad copy on {} is replaced", target.name()),
                Err(e) => log::debug!("{key}: the bad copy on {} stays: {e}", target.name()),
            }
        }
    }

    /// Refuses what cannot reach enough targets before anything is written.
    fn must_reach(&self, key: &Key, places: &Places) -> Result<()> {
        let layout = self.layout();
        if layout.is_moving
            && is_log(key.as_str())
            && let Some(former) = layout.former_arbiters(key.as_str()).iter().find(|target| !target.is_there())
        {
            // Without its records another one would be put where one of them is.
            let why = format!("objects are moving, and {}, which may have more of it, is not there", former.name());
            return Err(Error::new(ErrorKind::Unavailable, format!("{key}: nothing was written: {why}")));
        }
        let away: Vec<&Target> = places.homes.iter().filter(|target| !target.is_there()).collect();
        let there = places.homes.len() - away.len();
        let arbiter_away = places.homes.first().is_none_or(|arbiter| !arbiter.is_there());
        if there >= places.quorum && !arbiter_away {
            return Ok(());
        }
        let away = away.iter().map(|target| target.name()).collect::<Vec<_>>().join(", ");
        let why = if there >= places.quorum {
            let arbiter = places.homes.first().map_or("?", Target::name);
            format!("{arbiter}, which decides over it, is not there")
        } else {
            format!(
                "{there} of its {} targets are there, {} are needed; away: {away}",
                places.homes.len(),
                places.quorum
            )
        };
        Err(Error::new(ErrorKind::Unavailable, format!("{key}: nothing was written: {why}")))
    }

    fn put_at(&self, key: &Key, bytes: &[u8], again: bool) -> Result<()> {
        let places = self.places(key);
        self.must_reach(key, &places)?;
        let Some((arbiter, others)) = places.homes.split_first() else { return Err(no_targets()) };
        match arbiter.put_new(key, bytes) {
            Ok(()) => {}
            Err(e) if again && e.kind() == ErrorKind::Exists && is_there(arbiter, key, bytes) => {}
            Err(e) => {
                if e.kind() == ErrorKind::Unavailable {
                    held(&self.bad).unsettled.insert(key.clone());
                }
                return Err(e);
            }
        }
        let mut copies = 1;
        let mut failed = Vec::new();
        for target in others {
            match copy_to(target, key, bytes) {
                Ok(()) => copies += 1,
                Err(e) => failed.push((target.clone(), e)),
            }
        }
        self.tell_degraded(key, &failed);
        if copies < places.quorum {
            held(&self.bad).unsettled.insert(key.clone());
            return Err(too_few(key, copies, &places, &failed));
        }
        Ok(())
    }

    /// Tells once for each target that it misses what is written.
    fn tell_degraded(&self, key: &Key, failed: &[(Target, Error)]) {
        for (target, error) in failed {
            if held(&self.bad).told.insert(target.id()) {
                log::warn!("{key}: has one copy less, target {}: {error}", target.name());
            }
        }
    }
}

fn no_targets() -> Error {
    corrupt("config: the store has no target that takes objects")
}

fn is_there(target: &Target, key: &Key, bytes: &[u8]) -> bool {
    target.read_all(key, bytes.len() as u64).is_ok_and(|there| there == bytes)
}

/// Puts one more copy. What is there already must be the same; what is not was left by a target that was away, or is
/// damaged, and the arbiter has decided: only records of a log are left as they are, which `check` then tells of.
fn copy_to(target: &Target, key: &Key, bytes: &[u8]) -> Result<()> {
    match target.put_new(key, bytes) {
        Err(e) if e.kind() == ErrorKind::Exists => {}
        // Records make room, so they may use what is kept aside for it.
        Err(e) if e.kind() == ErrorKind::NoSpace && is_log(key.as_str()) && target.release_reserve() => {
            return target.put_new(key, bytes);
        }
        done => return done,
    }
    if is_there(target, key, bytes) {
        return Ok(());
    }
    if is_log(key.as_str()) || is_config(key.as_str()) {
        let what = format!("{key}: target {} has another record, run snapfs check --repair", target.name());
        return Err(corrupt(what));
    }
    let mut upload = target.create_over(key)?;
    upload.append(bytes)?;
    upload.finish()
}

fn too_few(key: &Key, copies: usize, places: &Places, failed: &[(Target, Error)]) -> Error {
    let why: Vec<String> = failed.iter().map(|(target, e)| format!("{}: {e}", target.name())).collect();
    let (all, quorum) = (places.homes.len(), places.quorum);
    let what = format!("{key}: on {copies} of {all} targets, {quorum} are needed, so it may count or not");
    Error::new(ErrorKind::Unavailable, format!("{what}; {}", why.join("; ")))
}

/// What it means that no copy could be read.
fn verdict(key: &Key, failed: Vec<(Target, Error)>) -> Error {
    let arbiter_says_no = failed.first().is_some_and(|(_, e)| e.kind() == ErrorKind::NotFound);
    let none_away = failed.iter().all(|(_, e)| e.kind() != ErrorKind::Unavailable);
    let corrupt_at = failed.iter().position(|(_, e)| e.kind() == ErrorKind::Corrupt);
    let mut failed = failed.into_iter();
    if let Some(at) = corrupt_at
        && let Some((_, error)) = failed.nth(at)
    {
        return error;
    }
    let all: Vec<(Target, Error)> = failed.collect();
    let is_gone = (arbiter_says_no || none_away) && all.iter().any(|(_, e)| e.kind() == ErrorKind::NotFound);
    if is_gone {
        return not_found(key.to_string());
    }
    let other = all.iter().find(|(_, e)| e.kind() != ErrorKind::NotFound);
    match other {
        Some((target, error)) => error.duplicate().within(format!("{key}: on {}", target.name())),
        None => no_targets(),
    }
}

impl Backend for Replicated {
    fn create(&self, key: &Key) -> Result<Box<dyn Upload>> {
        let places = self.places(key);
        self.must_reach(key, &places)?;
        let Some((arbiter, others)) = places.homes.split_first() else { return Err(no_targets()) };
        let mut parts = vec![(arbiter.clone(), arbiter.create(key)?)];
        let mut failed = Vec::new();
        for target in others {
            match target.create(key) {
                Ok(upload) => parts.push((target.clone(), upload)),
                Err(e) => failed.push((target.clone(), e)),
            }
        }
        self.tell_degraded(key, &failed);
        let upload = ReplicatedUpload { key: key.clone(), places, parts, failed };
        upload.must_be_enough()?;
        Ok(Box::new(upload))
    }

    fn put_new(&self, key: &Key, bytes: &[u8]) -> Result<()> {
        for turn in 0..FOLLOW_TRIES {
            self.put_at(key, bytes, turn > 0)?;
            if self.reload.is_none() || is_config(key.as_str()) || !is_log(key.as_str()) {
                return Ok(());
            }
            // Whoever changes the targets puts the record of it on all of them first, and then reads the logs. Who
            // sees none after the put was early enough; the other puts the record where it belongs now.
            let mut changed = false;
            for target in &self.places(key).homes {
                changed = changed || self.follow(target)?;
            }
            if !changed {
                return Ok(());
            }
        }
        Err(Error::new(ErrorKind::Unavailable, format!("{key}: the targets change all the time")))
    }

    fn read(&self, key: &Key, offset: u64, out: &mut [u8]) -> Result<()> {
        self.read_checked(key, offset, out, &mut |_| Ok(()))
    }

    fn read_all(&self, key: &Key, bytes_max: u64) -> Result<Vec<u8>> {
        let (bytes, _) = self.first_good(key, &self.places(key), |target| target.read_all(key, bytes_max))?;
        Ok(bytes)
    }

    fn read_checked(
        &self,
        key: &Key,
        offset: u64,
        out: &mut [u8],
        verify: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let read = |target: &Target| {
            target.read(key, offset, out)?;
            verify(out)
        };
        self.first_good(key, &self.places(key), read).map(drop)
    }

    fn read_all_checked(
        &self,
        key: &Key,
        bytes_max: u64,
        verify: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<Vec<u8>> {
        let read = |target: &Target| {
            let bytes = target.read_all(key, bytes_max)?;
            verify(&bytes)?;
            Ok(bytes)
        };
        let (bytes, failed) = self.first_good(key, &self.places(key), read)?;
        self.heal(key, &bytes, &failed);
        Ok(bytes)
    }

    /// A record that is on too few targets is put on the others: what the arbiter took counts, once enough have it.
    fn settle(&self, key: &Key, verify: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        if !held(&self.bad).unsettled.contains(key) {
            return Ok(());
        }
        let places = self.places(key);
        self.must_reach(key, &places)?;
        let bytes = self.read_all_checked(key, LOG_RECORD_BYTES_MAX, verify)?;
        let mut copies = 0;
        let mut failed = Vec::new();
        for (turn, target) in places.homes.iter().enumerate() {
            match copy_to(target, key, &bytes) {
                Ok(()) => copies += 1,
                Err(e) if turn == 0 => return Err(e.within(key)),
                Err(e) => failed.push((target.clone(), e)),
            }
        }
        if copies < places.quorum {
            return Err(too_few(key, copies, &places, &failed));
        }
        held(&self.bad).unsettled.remove(key);
        Ok(())
    }

    fn replicated(&self) -> Option<&Replicated> {
        Some(self)
    }

    fn len(&self, key: &Key) -> Result<u64> {
        let (bytes, _) = self.first_good(key, &self.places(key), |target| target.len(key))?;
        Ok(bytes)
    }

    /// A copy that was put back is younger than the object is: the oldest tells.
    fn ages(&self, keys: &[Key]) -> Result<Vec<Option<Duration>>> {
        let Some(first) = keys.first() else { return Ok(Vec::new()) };
        let layout = self.layout();
        let together = keys.iter().all(|key| Scope::of(key.as_str()) == Scope::of(first.as_str()));
        let targets: Vec<Target> = match together {
            true => layout.places(first.as_str()).all().cloned().collect(),
            false => layout.targets.iter().map(|(target, _)| target.clone()).collect(),
        };
        let mut ages: Option<Vec<Option<Duration>>> = None;
        let mut failed = Vec::new();
        for target in targets {
            match target.ages(keys) {
                Ok(told) => match &mut ages {
                    Some(ages) => ages.iter_mut().zip(told).for_each(|(age, told)| *age = (*age).max(told)),
                    None => ages = Some(told),
                },
                Err(e) => failed.push((target, e)),
            }
        }
        ages.ok_or_else(|| verdict(first, failed))
    }

    fn list(&self, prefix: &Key) -> Result<Vec<Listed>> {
        let text = prefix.as_str();
        let is_log = (text.starts_with("vms/") || text.starts_with("common")) && text.ends_with("/log");
        let places = if is_log || text == "vms" { self.follow_any(prefix)? } else { self.places(prefix) };
        // A prefix of common packs has no place of its own.
        let everywhere = Scope::of(text) == Scope::Everywhere && !is_config(text);
        let targets: Vec<Target> = match everywhere {
            true => self.layout().targets.iter().map(|(target, _)| target.clone()).collect(),
            false => places.all().cloned().collect(),
        };
        let mut rows: BTreeMap<String, (Listed, usize)> = BTreeMap::new();
        let mut failed = Vec::new();
        let mut answered = 0;
        for target in targets {
            let found = match target.list(prefix) {
                Ok(found) => found,
                Err(e) => {
                    failed.push((target, e));
                    continue;
                }
            };
            let is_home = places.homes.iter().any(|home| home.id() == target.id());
            answered += usize::from(is_home);
            for row in found {
                let (known, copies) = rows.entry(row.name.clone()).or_insert_with(|| (row.clone(), 0));
                // Cut copies are shorter than whole ones.
                known.bytes = known.bytes.max(row.bytes);
                known.is_folder |= row.is_folder;
                *copies += usize::from(is_home);
            }
        }
        if rows.is_empty() && answered == 0 && !failed.is_empty() {
            return Err(verdict(prefix, failed));
        }
        if is_log {
            let lacking = rows.values().rev().take(2).filter(|(_, copies)| *copies < answered);
            let keys: Vec<Key> = lacking.map(|(row, _)| Key::new(format!("{prefix}/{}", row.name))).collect();
            held(&self.bad).unsettled.extend(keys);
        }
        Ok(rows.into_values().map(|(row, _)| row).collect())
    }

    /// A target that is away keeps its copy until it is back and the object is deleted again; only a hold, which would
    /// then keep what nobody wants kept, is not let go of before all can.
    fn delete(&self, key: &Key) -> Result<()> {
        let places = self.places(key);
        let mut gone = 0;
        let mut failed = Vec::new();
        for (turn, target) in places.all().enumerate() {
            match target.delete(key) {
                Ok(()) => gone += 1,
                Err(e) if turn == 0 || key.as_str().contains("/holds/") => return Err(e.within(key)),
                Err(e) => failed.push((target.clone(), e)),
            }
        }
        for (target, error) in &failed {
            log::debug!("{key}: stays on {}: {error}", target.name());
        }
        if gone == 0 { Err(verdict(key, failed)) } else { Ok(()) }
    }

    fn will_need(&self, key: &Key, offset: u64, bytes: u64) {
        if let Some(first) = self.places(key).homes.first() {
            first.will_need(key, offset, bytes);
        }
    }

    /// All copies are pinned, so that collection sees it at whichever it asks.
    fn pin(&self, key: &Key) -> Result<Box<dyn Guard>> {
        let mut pins = Vec::new();
        let mut failed = Vec::new();
        for target in self.places(key).all() {
            match target.pin(key) {
                Ok(pin) => pins.push(pin),
                Err(e) => failed.push((target.clone(), e)),
            }
        }
        if pins.is_empty() { Err(verdict(key, failed)) } else { Ok(Box::new(Pins { _pins: pins })) }
    }

    fn is_pinned(&self, key: &Key) -> Result<bool> {
        for (turn, target) in self.places(key).all().enumerate() {
            match target.is_pinned(key) {
                Ok(true) => return Ok(true),
                Err(e) if turn == 0 => return Err(e),
                Ok(false) | Err(_) => {}
            }
        }
        Ok(false)
    }

    fn try_lock(&self, key: &Key) -> Result<Option<Box<dyn Guard>>> {
        for _ in 0..FOLLOW_TRIES {
            let places = self.places(key);
            let Some(arbiter) = places.homes.first() else { return Err(no_targets()) };
            let lock = arbiter.try_lock(key).map_err(|e| e.within(format!("{key}: on the target that decides")))?;
            // Whoever changes the targets has all locks meanwhile: with this one, nothing changes any more.
            if !self.follow(arbiter)? {
                return Ok(lock);
            }
        }
        Err(Error::new(ErrorKind::Unavailable, format!("{key}: the targets change all the time")))
    }

    fn release_reserve(&self) -> bool {
        self.layout().targets.iter().fold(false, |any, (target, _)| target.release_reserve() || any)
    }

    fn keep_reserve(&self) {
        self.layout().targets.iter().for_each(|(target, _)| target.keep_reserve());
    }

    fn remove_litter(&self) -> Result<u64> {
        let mut bytes: u64 = 0;
        for (target, _) in &self.layout().targets {
            match target.remove_litter() {
                Ok(freed) => bytes = bytes.saturating_add(freed),
                Err(e) => log::debug!("target {}: its litter stays: {e}", target.name()),
            }
        }
        Ok(bytes)
    }

    fn tidy(&self) {
        self.layout().targets.iter().for_each(|(target, _)| target.tidy());
    }

    /// What the targets together have, less the further copies.
    fn space(&self) -> Option<(u64, u64)> {
        let layout = self.layout();
        let spaces = layout.targets.iter().filter(|(_, leaving)| !leaving).filter_map(|(target, _)| target.space());
        let (total, free) = spaces.reduce(|a, b| (a.0.saturating_add(b.0), a.1.saturating_add(b.1)))?;
        let copies = layout.copies.vm.max(1) as u64;
        Some((total / copies, free / copies))
    }
}

struct Pins {
    _pins: Vec<Box<dyn Guard>>,
}

impl Guard for Pins {}

/// An object that is being written to several targets. The first part is the arbiter's.
struct ReplicatedUpload {
    key: Key,
    places: Places,
    parts: Vec<(Target, Box<dyn Upload>)>,
    failed: Vec<(Target, Error)>,
}

impl ReplicatedUpload {
    fn must_be_enough(&self) -> Result<()> {
        if self.parts.len() >= self.places.quorum {
            return Ok(());
        }
        let error = too_few(&self.key, self.parts.len(), &self.places, &self.failed);
        // Nothing is visible yet: it is known what went wrong.
        Err(match self.failed.first() {
            Some((_, e)) if matches!(e.kind(), ErrorKind::NoSpace | ErrorKind::ReadOnly) => error.as_kind(e.kind()),
            _ => error,
        })
    }
}

impl Upload for ReplicatedUpload {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let mut parts = std::mem::take(&mut self.parts).into_iter();
        let Some((arbiter, mut first)) = parts.next() else { return Err(no_targets()) };
        // When the arbiter has no room, the others have got nothing: the same bytes can be appended again.
        let outcome = first.append(bytes);
        let is_taken = outcome.is_ok();
        self.parts.push((arbiter, first));
        for (target, mut upload) in parts {
            match if is_taken { upload.append(bytes) } else { Ok(()) } {
                Ok(()) => self.parts.push((target, upload)),
                Err(e) => {
                    log::warn!("{}: has one copy less, target {}: {e}", self.key, target.name());
                    self.failed.push((target, e));
                }
            }
        }
        outcome?;
        self.must_be_enough()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let mut outcome = Err(no_targets());
        for (_, upload) in &self.parts {
            outcome = upload.read(offset, out);
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }

    fn finish(self: Box<Self>) -> Result<()> {
        let Self { key, places, parts, mut failed } = *self;
        let mut parts = parts.into_iter();
        let Some((_, first)) = parts.next() else { return Err(no_targets()) };
        first.finish()?;
        let mut copies = 1;
        for (target, upload) in parts {
            match upload.finish() {
                Ok(()) => copies += 1,
                // Somebody who repairs was faster, or a target that was away has an old one.
                Err(e) if e.kind() == ErrorKind::Exists => match places.homes.first().map(|a| (a, a.len(&key))) {
                    Some((_, Ok(bytes))) if target.len(&key).is_ok_and(|there| there == bytes) => copies += 1,
                    _ => failed.push((target, e)),
                },
                Err(e) => failed.push((target, e)),
            }
        }
        for (target, error) in &failed {
            log::warn!("{key}: has one copy less, target {}: {error}", target.name());
        }
        if copies < places.quorum { Err(too_few(&key, copies, &places, &failed)) } else { Ok(()) }
    }
}
