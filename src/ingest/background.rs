//! Threads that hash and compress step back behind those that answer requests: a copy waits for each answer, and a
//! core that is busy hashing would make it wait for its turn a thousand times an image.

use rustix::process::setpriority_process;
use rustix::thread::gettid;

/// How much nicer than the rest of the process.
const NICER: i32 = 5;

/// The lowest priority.
const LOWEST: i32 = 19;

/// Lowers the priority of the calling thread. Linux counts it for each thread. Without the right to, nothing happens.
pub fn step_back() {
    let _ = setpriority_process(Some(gettid()), NICER);
}

/// Lowers the priority of the process to the lowest there is: on a busy host its work is done in the time that nobody
/// else wants. To be called before there are other threads, which inherit it.
pub fn step_back_for_all() {
    let _ = setpriority_process(None, LOWEST);
}

/// Makes the threads that work in parallel, on all cores, step back. To be called once, before any work; later calls
/// do nothing.
pub fn prepare() {
    let pool =
        rayon::ThreadPoolBuilder::new().thread_name(|at| format!("snapfs-work-{at}")).start_handler(|_| step_back());
    if pool.build_global().is_err() {
        log::debug!("the working threads were made before");
    }
}
