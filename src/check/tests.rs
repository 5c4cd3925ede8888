//! Check on a store in memory: clean is clean, and every object that is missing, cut or changed is found and named.

use std::sync::Arc;

use crate::backend::Key;
use crate::check::testing::{Bench, Model, open, vm};
use crate::check::{CheckOptions, CheckReport, Severity, check_store};
use crate::error::ErrorKind;

const FULL: CheckOptions = CheckOptions { read_data: true, sample_percent: None, repair: false };

fn check(bench: &Bench, options: CheckOptions) -> CheckReport {
    check_store(&open(Arc::new(bench.memory.clone())), options, &mut |_| {}).unwrap()
}

fn bench() -> Bench {
    let mut bench = Bench::new();
    let first: Model = (1..=1200).chain([0, 0, 5]).collect();
    let mut second = first.clone();
    second.splice(100..130, 7000..7030);
    bench.backup("web01/1.img", first.clone());
    bench.backup("web01/2.img", second);
    bench.backup("web01/other.img", (90_000..90_100).collect());
    bench.backup("db02/1.img", first);
    bench
}

#[test]
fn a_clean_store_has_no_findings() {
    let bench = bench();
    for percent in [None, Some(0.0), Some(1.0), Some(50.0), Some(100.0)] {
        for read_data in [false, true] {
            let report = check(&bench, CheckOptions { read_data, sample_percent: percent, repair: false });
            assert_eq!(report.findings, []);
            assert_eq!((report.vms, report.snapshots, report.objects, report.leaked_objects), (2, 4, 8, 0));
            assert_eq!(report.frames_read > 0, read_data || percent > Some(0.0));
        }
    }
    let error = check_store(&bench.store, CheckOptions { sample_percent: Some(101.0), ..FULL }, &mut |_| {});
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn every_damaged_object_is_found_and_named() {
    let bench = bench();
    let whole = bench.memory.objects();
    for key in bench.keys("vms/web01/packs").into_iter().chain(bench.keys("vms/web01/snapshots")) {
        let bytes = whole[key.as_str()].to_vec();
        let mut cases = vec![None, Some(bytes[..bytes.len() / 2].to_vec()), Some(Vec::new())];
        // Every part of the object is covered: a flip every few bytes, and at both ends.
        let step = (bytes.len() / 60).max(1);
        for at in (0..bytes.len()).step_by(step).chain([1, bytes.len() - 2, bytes.len() - 1]) {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x10;
            cases.push(Some(flipped));
        }
        for (case, damaged) in cases.into_iter().enumerate() {
            match damaged {
                Some(bytes) => bench.memory.replace(&key, bytes),
                None => drop(bench.memory.remove(&key)),
            }
            for options in [FULL, CheckOptions { read_data: false, sample_percent: Some(100.0), repair: false }] {
                let report = check(&bench, options);
                assert!(report.is_damaged(), "{key}: case {case}");
                assert!(report.findings.iter().all(|f| f.vm == "web01"), "{:?}", report.findings);
                assert!(report.findings.iter().any(|f| f.object == key.as_str()), "{key}: {:?}", report.findings);
            }
            bench.memory.restore(&whole);
        }
    }
    // Swapped with the same object of another VM.
    for kind in ["packs", "snapshots"] {
        let pair = [bench.keys(&format!("vms/web01/{kind}")), bench.keys(&format!("vms/db02/{kind}"))];
        let (one, other) = (&pair[0][0], &pair[1][0]);
        bench.memory.replace(one, whole[other.as_str()].to_vec());
        bench.memory.replace(other, whole[one.as_str()].to_vec());
        let report = check(&bench, FULL);
        for key in [one, other] {
            assert!(report.findings.iter().any(|f| f.object == key.as_str()), "{key}: {:?}", report.findings);
        }
        bench.memory.restore(&whole);
    }
    assert_eq!(check(&bench, FULL).findings, []);
}

#[test]
fn damage_names_the_snapshots_that_stand_on_it() {
    let bench = bench();
    let (_, state) = bench.store.vm(&vm("web01")).unwrap();
    let data: Vec<_> = state.packs.values().filter(|p| p.content == crate::pack::Content::Data).collect();
    let key = |object| crate::catalog::vm::pack_key("web01", object);
    let both = ["web01/1.img", "web01/2.img"].map(String::from).to_vec();
    for (at, wanted) in [(0, &both[..]), (1, &both[1..])] {
        let whole = bench.memory.objects();
        bench.memory.remove(&key(data[at].object));
        let report = check(&bench, CheckOptions::default());
        assert_eq!(report.findings.len(), 1, "{:?}", report.findings);
        assert_eq!((&report.findings[0].snapshots[..], report.findings[0].severity), (wanted, Severity::Must));
        bench.memory.restore(&whole);
    }
    // A frame of blocks that only the first has: those from 100 to 130.
    let key = key(data[0].object);
    let mut bytes = bench.memory.objects()[key.as_str()].to_vec();
    let frame = (bytes.len() - 40_000) / 75;
    bytes[61 + frame * 7] ^= 1;
    bench.memory.replace(&key, bytes);
    assert_eq!(check(&bench, CheckOptions::default()).findings, [], "only with data");
    let report = check(&bench, FULL);
    assert_eq!(report.findings.len(), 1, "{:?}", report.findings);
    assert!(report.findings[0].snapshots.contains(&both[0]), "{:?}", report.findings);
}

#[test]
fn leaks_are_counted_and_are_no_damage() {
    let mut bench = bench();
    bench.write("web01/killed.img", &(50_000..50_100).collect(), false).unwrap();
    let report = check(&bench, FULL);
    assert_eq!((report.findings.len(), report.leaked_objects, report.is_damaged()), (0, 3, false));
    assert!(report.leaked_bytes > 100 * 2048);
    bench.memory.replace(&Key::new("vms/web01/packs/stray.txt"), *b"x");
    bench.memory.replace(&Key::new("vms/latest/x"), *b"x");
    bench.memory.replace(&Key::new("vms/empty/write.lock"), *b"");
    let report = check(&bench, FULL);
    assert_eq!((report.findings.len(), report.is_damaged()), (3, false), "{:?}", report.findings);
}

#[test]
fn a_wrong_bitmap_and_a_damaged_log_are_found() {
    let mut bench = bench();
    bench.bitmap_lacks = 3;
    bench.backup("web01/3.img", (1..=700).collect());
    let report = check(&bench, CheckOptions::default());
    assert!(report.is_damaged() && report.findings[0].what.contains("lacks 3 slots"), "{:?}", report.findings);
    let whole = bench.memory.objects();
    for key in bench.keys("vms/db02/log") {
        for cut in [true, false] {
            if cut {
                bench.memory.replace(&key, whole[key.as_str()][..20].to_vec());
            } else if *bench.keys("vms/db02/log").last().unwrap() != key {
                bench.memory.remove(&key);
            } else {
                continue;
            }
            let report = check(&bench, CheckOptions::default());
            assert!(report.findings.iter().any(|f| f.vm == "db02" && f.severity == Severity::Must), "{key}");
            bench.memory.restore(&whole);
        }
    }
    for key in bench.keys("vms/db02/log") {
        bench.memory.remove(&key);
    }
    let report = check(&bench, CheckOptions::default());
    assert!(report.findings.iter().any(|f| f.object == "vms/db02/log"), "{:?}", report.findings);
}

#[test]
fn derived_data_is_made_anew_unless_its_vm_is_being_written() {
    use crate::backend::Backend;
    use crate::clock::ManualClock;
    use crate::store::{MemoryShares, Store, lock_key};
    let bench = bench();
    let folder = tempfile::tempdir().unwrap();
    let backend = Arc::new(bench.memory.clone());
    let clock = Arc::new(ManualClock::default());
    let derived = folder.path().join("derived");
    let store = Store::with_backend(backend, Some(derived.clone()), clock, MemoryShares::default()).unwrap();
    for vm in ["web01", "gone"] {
        std::fs::create_dir_all(derived.join("vms").join(vm)).unwrap();
        std::fs::write(derived.join("vms").join(vm).join("junk"), "junk").unwrap();
    }
    let report = crate::check::rebuild(&store).unwrap();
    assert_eq!(report.rebuilt, ["db02", "web01"]);
    assert!(report.busy.is_empty() && report.failed.is_empty(), "{report:?}");
    assert!(!derived.join("vms/gone").exists() && !derived.join("vms/web01/junk").exists());
    assert!(derived.join("vms/web01/similarity").exists());
    let _held = bench.memory.try_lock(&lock_key("web01")).unwrap().unwrap();
    let report = crate::check::rebuild(&store).unwrap();
    assert_eq!((report.rebuilt, report.busy), (vec!["db02".to_owned()], vec!["web01".to_owned()]));
    bench.verify(&bench.memory);
}
