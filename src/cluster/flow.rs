//! One exchange of rows among all workers of a job, as a dataflow: chunks go to the worker that they are for, and it
//! tells the sender of each that it was taken. A worker has a bounded number of chunks on their way, which bounds the
//! memory of all who receive.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use timely::communication::Push;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::InputHandle;
use timely::dataflow::channels::Message;
use timely::dataflow::channels::pact::{DistributorPact, Exchange, Pipeline};
use timely::dataflow::channels::pushers::exchange::Distributor;
use timely::dataflow::operators::generic::Operator;
use timely::dataflow::operators::{Input, Probe};
use timely::progress::Stamp;
use timely::worker::Worker;

use crate::cluster::health::Health;
use crate::cluster::record::Chunk;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, CHUNKS_IN_FLIGHT};

/// A worker that waits looks after the health of the job that often; what arrives wakes it up at once.
const PARK: Duration = Duration::from_millis(100);

/// Passes each chunk on at once: timely's own exchange would collect hundreds of them first.
struct AtOnce;

impl Distributor<Vec<Chunk>> for AtOnce {
    fn partition<T: Clone, P: Push<Message<T, Vec<Chunk>>>>(
        &mut self,
        container: &mut Vec<Chunk>,
        stamp: &Stamp<T>,
        pushers: &mut [P],
    ) {
        for chunk in container.drain(..) {
            let to = chunk.to as usize;
            if let Some(pusher) = pushers.get_mut(to) {
                Message::push_at(&mut vec![chunk], stamp.clone(), pusher);
            }
        }
    }

    fn flush<T: Clone, P: Push<Message<T, Vec<Chunk>>>>(&mut self, _: &Stamp<T>, _: &mut [P]) {}
}

/// Where a worker puts what is for others.
pub struct Outbox<'a> {
    worker: &'a mut Worker,
    health: Arc<Health>,
    input: InputHandle<u64, CapacityContainerBuilder<Vec<Chunk>>>,
    taken: Rc<Cell<u64>>,
    sent: u64,
    chunk_bytes: usize,
    filling: Vec<Vec<u8>>,
    rows_since_step: u32,
}

impl Outbox<'_> {
    /// Puts a row on its way to a worker.
    ///
    /// # Errors
    /// The error that ended the job.
    pub fn put(&mut self, to: usize, row: &[u8]) -> Result<()> {
        let Some(filling) = self.filling.get_mut(to) else {
            return Err(Error::new(ErrorKind::Invalid, format!("row for a worker that is not there, worker={to}")));
        };
        filling.extend_from_slice(row);
        if filling.len() + row.len() > self.chunk_bytes {
            return self.send(to);
        }
        self.rows_since_step += 1;
        if self.rows_since_step >= 4096 { self.tick() } else { Ok(()) }
    }

    /// Lets the worker do what others want of it. To be called at least some times a second.
    ///
    /// # Errors
    /// The error that ended the job.
    pub fn tick(&mut self) -> Result<()> {
        self.rows_since_step = 0;
        self.worker.step();
        self.health.check()
    }

    fn send(&mut self, to: usize) -> Result<()> {
        while self.sent - self.taken.get() >= CHUNKS_IN_FLIGHT {
            self.health.check()?;
            self.worker.step_or_park(Some(PARK));
        }
        let Some(filling) = self.filling.get_mut(to) else { return Ok(()) };
        let bytes = std::mem::replace(filling, Vec::with_capacity(self.chunk_bytes));
        self.sent += 1;
        let from = self.worker.index() as u32;
        self.input.send_batch(&mut vec![Chunk { from, to: to as u32, bytes }]);
        self.tick()
    }

    fn finish(&mut self) -> Result<()> {
        for to in 0..self.filling.len() {
            if self.filling.get(to).is_some_and(|filling| !filling.is_empty()) {
                self.send(to)?;
            }
        }
        Ok(())
    }
}

/// Exchanges rows: `feed` puts what this worker has, `take` gets the rows (some at a time, whole) that are for it. All
/// workers of the job call this at the same point, and all return when the last row was taken.
///
/// # Errors
/// The first error of `feed`, `take` or any other part of the job, on any host.
pub fn exchange(
    worker: &mut Worker,
    health: &Arc<Health>,
    memory_bytes: usize,
    feed: impl FnOnce(&mut Outbox<'_>) -> Result<()>,
    take: impl FnMut(&[u8]) -> Result<()> + 'static,
) -> Result<()> {
    let outcome = exchange_all(worker, health, memory_bytes, feed, take);
    if let Err(e) = &outcome {
        health.fail(e.duplicate());
        // All workers do the same: what is on its way is for nobody.
        for dataflow in worker.installed_dataflows() {
            worker.drop_dataflow(dataflow);
        }
    }
    outcome
}

fn exchange_all(
    worker: &mut Worker,
    health: &Arc<Health>,
    memory_bytes: usize,
    feed: impl FnOnce(&mut Outbox<'_>) -> Result<()>,
    mut take: impl FnMut(&[u8]) -> Result<()> + 'static,
) -> Result<()> {
    health.check()?;
    let peers = worker.peers();
    let mut input = InputHandle::<u64, CapacityContainerBuilder<Vec<Chunk>>>::new_with_builder();
    let taken = Rc::new(Cell::new(0));
    let (counter, watched) = (taken.clone(), health.clone());
    let probe = worker.dataflow(|scope| {
        let told = scope.input_from(&mut input).unary::<CapacityContainerBuilder<Vec<u32>>, _, _, _>(
            DistributorPact(|_| AtOnce),
            "take",
            move |_, _| {
                move |input, output| {
                    input.for_each_stamp(|stamp, chunks| {
                        let mut session = output.session(&stamp);
                        for chunk in chunks.flat_map(|chunks| chunks.drain(..)) {
                            if !watched.is_failed()
                                && let Err(e) = take(&chunk.bytes)
                            {
                                watched.fail(e);
                            }
                            session.give(chunk.from);
                        }
                    });
                }
            },
        );
        let counted = told.unary::<CapacityContainerBuilder<Vec<u32>>, _, _, _>(
            Exchange::new(|from: &u32| u64::from(*from)),
            "taken",
            move |_, _| {
                move |input, _| {
                    input.for_each(|_, senders| counter.set(counter.get() + senders.len() as u64));
                }
            },
        );
        counted.unary::<CapacityContainerBuilder<Vec<u32>>, _, _, _>(Pipeline, "end", |_, _| |_, _| {}).probe().0
    });
    let chunk_bytes = (memory_bytes / peers.max(1)).clamp(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX);
    let mut outbox = Outbox {
        worker,
        health: health.clone(),
        input,
        taken,
        sent: 0,
        chunk_bytes,
        filling: vec![Vec::new(); peers],
        rows_since_step: 0,
    };
    feed(&mut outbox)?;
    outbox.finish()?;
    let Outbox { worker, input, .. } = outbox;
    input.close();
    while !probe.done() {
        health.check()?;
        worker.step_or_park(Some(PARK));
    }
    health.check()
}
