//! Jobs on several hosts: each host is a process of this very test program, which is told what to do by its environment.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::{Signal, getpid, kill_process};
use snapfs::cluster::hosts::Hosts;
use snapfs::error::Result;

const ORDER: &str = "SNAPFS_TEST_PEER";

/// Addresses that nobody else has: a loopback address for each process and call, so that no port is taken.
pub fn addresses(count: usize) -> Vec<String> {
    static CALLS: AtomicU32 = AtomicU32::new(1);
    let (process, call) = (std::process::id(), CALLS.fetch_add(1, Ordering::SeqCst));
    let ip = format!("127.{}.{}.{}", 1 + process / 256 % 250, process % 256, call);
    (0..count).map(|index| format!("{ip}:{}", 7001 + index)).collect()
}

/// What a process is told.
pub struct Order {
    pub folder: PathBuf,
    pub hosts: Hosts,
    pub index: usize,
    /// Where it is to end, in the words of whoever started it.
    pub end: String,
}

impl Order {
    /// The order of this process; none when it is no peer, but runs its tests.
    pub fn of_this_process() -> Option<Self> {
        let order = std::env::var(ORDER).ok()?;
        let words: Vec<&str> = order.split('\n').collect();
        let [folder, index, end, hosts @ ..] = words.as_slice() else { panic!("{order:?}") };
        let index = index.parse().unwrap();
        let hosts = Hosts::parse(&hosts.join("\n"), index).unwrap();
        Some(Self { folder: PathBuf::from(folder), hosts, index, end: (*end).to_owned() })
    }

    /// Says how it ended, for [`outcome`].
    pub fn tell<T: Debug>(&self, outcome: Result<T>) {
        let text = match outcome {
            Ok(report) => format!("ok {report:?}"),
            Err(e) => format!("{:?} {e}", e.kind()),
        };
        std::fs::write(self.folder.join(format!("outcome.{}", self.index)), text).unwrap();
    }
}

/// Starts host `index` of the job in `folder`. `test` is the test that acts on an [`Order`].
pub fn start(test: &str, folder: &Path, index: usize, end: &str, hosts: &[String]) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(ORDER, format!("{}\n{index}\n{end}\n{}", folder.display(), hosts.join("\n")))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for an orderly end, at which no thread has panicked.
pub fn ended(child: Child) {
    let output = child.wait_with_output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && complaint.is_empty(), "{}: {complaint}", output.status);
}

/// Waits for the end of one that is to be killed.
pub fn killed(child: Child, what: &str) {
    assert!(!child.wait_with_output().unwrap().status.success(), "{what}: it did not die");
}

/// What host `index` said at its end; nothing when it came to none.
pub fn outcome(folder: &Path, index: usize) -> String {
    std::fs::read_to_string(folder.join(format!("outcome.{index}"))).unwrap_or_default()
}

pub fn signal_myself(signal: Signal) {
    kill_process(getpid(), signal).unwrap();
}
