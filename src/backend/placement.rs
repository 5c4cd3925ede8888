//! Which targets hold an object: by rendezvous hashing of its VM, so that a VM's objects lie together and a target
//! that comes or goes moves only what it must.

use crate::fingerprint::short;

/// The identity of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TargetId(pub [u8; 16]);

impl std::fmt::Display for TargetId {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(out, "{byte:02x}"))
    }
}

/// How many targets hold an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copies {
    /// Of a VM's objects.
    pub vm: usize,
    /// Of common packs.
    pub common: usize,
    /// How many must have an object before it counts; 0 for more than half.
    pub quorum: usize,
}

impl Copies {
    /// How many of `copies` copies must be there before an object counts.
    pub fn quorum_of(&self, copies: usize) -> usize {
        let majority = copies / 2 + 1;
        if self.quorum == 0 { majority } else { self.quorum.clamp(1, copies.max(1)) }
    }
}

/// What decides where an object lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope<'a> {
    /// Its VM.
    Vm(&'a str),
    /// Its own key: common packs are spread.
    Object(&'a str),
    /// Nothing: it is on all targets.
    Everywhere,
}

impl<'a> Scope<'a> {
    /// The scope of a key, or of all keys below a prefix.
    pub fn of(key: &'a str) -> Self {
        if let Some(rest) = key.strip_prefix("vms/") {
            return Self::Vm(rest.split_once('/').map_or(rest, |(vm, _)| vm));
        }
        match key.strip_prefix("common/packs/") {
            Some(_) => Self::Object(key),
            None => Self::Everywhere,
        }
    }

    /// The places in `targets` that hold what is of this scope, the arbiter first.
    pub fn places(self, targets: &[TargetId], copies: Copies) -> Vec<usize> {
        let (what, count) = match self {
            Self::Vm(vm) => (vm, copies.vm),
            Self::Object(key) => (key, copies.common),
            Self::Everywhere => return (0..targets.len()).collect(),
        };
        let mut ranked: Vec<usize> = (0..targets.len()).collect();
        ranked.sort_by_key(|at| targets.get(*at).map(|id| (std::cmp::Reverse(weight(*id, what)), *id)));
        ranked.truncate(count.max(1));
        ranked
    }
}

/// The weight of a target for what is named so; the highest win.
fn weight(target: TargetId, what: &str) -> u64 {
    let hash = short(b"snapfs place", &[&target.0, what.as_bytes()]);
    hash.first_chunk::<8>().map_or(0, |head| u64::from_le_bytes(*head))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn targets(count: u8) -> Vec<TargetId> {
        (0..count).map(|n| TargetId([n + 1; 16])).collect()
    }

    const TWO: Copies = Copies { vm: 2, common: 3, quorum: 0 };

    #[test]
    fn all_of_a_vm_lies_together_and_common_packs_are_spread() {
        let targets = targets(7);
        let places = |key: &str| Scope::of(key).places(&targets, TWO);
        let vm = places("vms/web01");
        assert_eq!(vm.len(), 2);
        for key in ["vms/web01/log", "vms/web01/log/0000000001", "vms/web01/packs/1.0.pack", "vms/web01/write.lock"] {
            assert_eq!(places(key), vm);
        }
        assert_eq!(places("config/0000000001"), (0..7).collect::<Vec<_>>());
        assert_eq!(places("common/log/0000000001").len(), 7);
        let spread: std::collections::BTreeSet<_> = (0..50).map(|n| places(&format!("common/packs/{n}"))).collect();
        assert!(spread.len() > 20 && spread.iter().all(|p| p.len() == 3));
    }

    #[test]
    fn a_target_that_comes_takes_its_share_and_moves_nothing_else() {
        let (seven, eight) = (targets(7), targets(8));
        let mut moved = 0;
        for vm in 0..2000 {
            let name = format!("vm{vm}");
            let (old, new) = (Scope::Vm(&name).places(&seven, TWO), Scope::Vm(&name).places(&eight, TWO));
            if old != new {
                assert!(new.contains(&7), "{old:?} {new:?}");
                assert!(new.iter().filter(|at| **at != 7).all(|at| old.contains(at)));
                moved += 1;
            }
        }
        // Two of eight.
        assert!((400..600).contains(&moved), "{moved}");
    }

    #[test]
    fn a_quorum_is_more_than_half_unless_it_is_set() {
        let of = |quorum, copies| Copies { vm: copies, common: copies, quorum }.quorum_of(copies);
        assert_eq!([1, 2, 3, 4, 5].map(|copies| of(0, copies)), [1, 2, 2, 3, 3]);
        assert_eq!([of(1, 2), of(1, 5), of(9, 3)], [1, 1, 3]);
    }
}
