//! temporary
use std::sync::Arc;
use snapfs::store::*; use snapfs::clock::*; use snapfs::name::*; use snapfs::ingest::{backup::*, source::Source};
fn main() {
    env_logger::init();
    let a: Vec<String> = std::env::args().collect();
    let root = std::path::Path::new(&a[2]);
    match a[1].as_str() {
        "init" => Store::init(root, &SystemClock::new()).unwrap(),
        "backup" => { let s = Store::open(root, Arc::new(SystemClock::new()), MemoryShares::default()).unwrap();
            let r = backup(&s, &SnapshotName::parse(&a[3]).unwrap(), Source::open(std::path::Path::new(&a[4])).unwrap(), BackupOptions::default(), &|_| {}).unwrap();
            println!("{r:?}"); }
        "restore" => { let s = Store::open(root, Arc::new(SystemClock::new()), MemoryShares::default()).unwrap();
            let (_, _, i) = s.open_reference(&SnapshotName::parse_reference(&a[3]).unwrap()).unwrap();
            let mut b = vec![0; 1 << 20]; let mut at = 0; let n = i.bytes();
            use std::io::Write; let mut o = std::fs::File::create(&a[4]).unwrap();
            while at < n { let c = (n - at).min(1 << 20) as usize; i.read_at(at, &mut b[..c]).unwrap(); o.write_all(&b[..c]).unwrap(); at += c as u64; } }
        _ => {}
    }
}
