//! A connection between two hosts of a job, as timely dataflow uses it: in frames that carry a keyed checksum, with
//! beats, so that a peer that is lost or stuck is found and named.
//!
//! Timely dataflow takes any error of a connection for the end of the program and panics. So it never sees one: the
//! job's [`Health`] gets the error, timely sees an orderly end of its stream, and the workers, which ask after the
//! health between any two steps, end the job.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use timely::communication::allocator::zero_copy::stream::Stream;

use crate::cluster::health::Health;
use crate::error::{Error, ErrorKind, Result, corrupt};
use crate::limits::{LINK_FRAME_BYTES_MAX, LINK_MESSAGE_BYTES_MAX};

const CHECKSUM_BYTES: usize = 16;

/// Length and kind.
const HEAD_BYTES: usize = 4 + 1;

/// Bytes of the header of a message of timely dataflow: six numbers, the fifth being the length of what follows.
const MESSAGE_HEAD_BYTES: usize = 48;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Data = 1,
    Beat = 2,
    Done = 3,
    Abort = 4,
}

/// The keys of a connection, one for each direction.
#[derive(Clone, Copy)]
pub struct LinkKeys {
    /// What this side sends.
    pub sends: [u8; 32],
    /// What it receives.
    pub receives: [u8; 32],
}

/// One connection; clones are handles of the same.
#[derive(Clone)]
pub struct Link(Arc<Inner>);

struct Inner {
    peer: String,
    socket: TcpStream,
    health: Weak<Health>,
    writer: Mutex<WriteSide>,
    reader: Mutex<ReadSide>,
}

struct WriteSide {
    key: [u8; 32],
    sequence: u64,
    is_done: bool,
}

struct ReadSide {
    key: [u8; 32],
    sequence: u64,
    // Bytes of timely's stream: up to `whole` they are whole messages, up to `given` timely has them.
    pending: Vec<u8>,
    whole: usize,
    given: usize,
    // The last message, an empty one, was seen; nothing may follow.
    is_last_seen: bool,
    is_over: bool,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "Link({})", self.0.peer)
    }
}

fn is_timeout(cause: &io::Error) -> bool {
    matches!(cause.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn checksum(key: &[u8; 32], sequence: u64, head: &[u8], body: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(&sequence.to_le_bytes()).update(head).update(body);
    hasher.finalize().as_bytes().first_chunk().copied().unwrap_or_default()
}

impl Link {
    /// A link over a connected socket on which the handshake was made. Whoever is silent for `silence` is lost.
    ///
    /// # Errors
    /// `Unavailable`.
    pub fn new(
        socket: TcpStream,
        peer: String,
        keys: &LinkKeys,
        health: &Arc<Health>,
        silence: Duration,
    ) -> Result<Self> {
        let failed = |e| Error::io(peer.clone(), e);
        socket.set_nonblocking(false).map_err(failed)?;
        socket.set_nodelay(true).map_err(failed)?;
        socket.set_read_timeout(Some(silence)).map_err(failed)?;
        socket.set_write_timeout(Some(silence)).map_err(failed)?;
        let link = Self(Arc::new(Inner {
            peer,
            socket,
            health: Arc::downgrade(health),
            writer: Mutex::new(WriteSide { key: keys.sends, sequence: 0, is_done: false }),
            reader: Mutex::new(ReadSide {
                key: keys.receives,
                sequence: 0,
                pending: Vec::new(),
                whole: 0,
                given: 0,
                is_last_seen: false,
                is_over: false,
            }),
        }));
        health.watch(link.clone());
        Ok(link)
    }

    /// Tells the peer that this side lives. Waits while data is being sent, which tells the same.
    pub fn beat(&self) {
        if let Err(e) = self.send(Kind::Beat, &[]) {
            self.fail_send(e);
        }
    }

    /// Tells the peer why the job ends. `false`: data is being sent to it, which must end first.
    pub(super) fn abort(&self, why: &str) -> bool {
        let Ok(mut writer) = self.0.writer.try_lock() else { return false };
        let text: String = why.chars().take(1000).collect();
        if let Err(e) = self.send_locked(&mut writer, Kind::Abort, text.as_bytes()) {
            log::debug!("{}: was not told: {e}", self.0.peer);
        }
        true
    }

    /// Ends one or both directions; who waits for the peer wakes up.
    pub(super) fn shut(&self, how: Shutdown) {
        // One that is closed already needs no closing.
        let _ = self.0.socket.shutdown(how);
    }

    fn fail(&self, error: Error) {
        if let Some(health) = self.0.health.upgrade() {
            health.fail(error);
        }
    }

    /// After data could not be sent. A peer that ends the job tells why before it goes, so its last words come first:
    /// "host 1 was lost" is the reason, and not that the host which said so is gone too.
    fn fail_send(&self, cause: io::Error) {
        if is_timeout(&cause) {
            return self.fail(self.lost(cause));
        }
        let mut reader = self.0.reader.lock().unwrap_or_else(PoisonError::into_inner);
        while !reader.is_over {
            match self.receive(&mut reader) {
                Ok((Kind::Abort, body)) => {
                    reader.end();
                    return self.fail(self.gave_up(&body));
                }
                Ok(_) => {}
                Err(e) => {
                    log::debug!("after a failure to send: {e}");
                    reader.end();
                }
            }
        }
        drop(reader);
        self.fail(self.lost(cause));
    }

    fn gave_up(&self, body: &[u8]) -> Error {
        let why = String::from_utf8_lossy(body).replace(|c: char| c.is_control(), " ");
        Error::new(ErrorKind::Unavailable, format!("{} gave up: {why}", self.0.peer))
    }

    fn count(&self, sent: usize, received: usize) {
        if let Some(health) = self.0.health.upgrade() {
            health.count(sent as u64, received as u64);
        }
    }

    fn lost(&self, cause: io::Error) -> Error {
        let what = if is_timeout(&cause) { "is stuck: it was silent for too long" } else { "was lost" };
        let what = format!("{} {what}; when all hosts are well, start the job again on all of them", self.0.peer);
        Error::new(ErrorKind::Unavailable, what).because(cause)
    }

    fn send(&self, kind: Kind, body: &[u8]) -> io::Result<()> {
        let mut writer = self.0.writer.lock().unwrap_or_else(PoisonError::into_inner);
        self.send_locked(&mut writer, kind, body)
    }

    fn send_locked(&self, writer: &mut WriteSide, kind: Kind, body: &[u8]) -> io::Result<()> {
        // After the end nothing is sent: a beat that comes late is no error.
        if writer.is_done {
            return Ok(());
        }
        let mut head = [0; HEAD_BYTES];
        let (length, code) = head.split_at_mut(4);
        length.copy_from_slice(&(body.len() as u32).to_le_bytes());
        code.fill(kind as u8);
        let sum = checksum(&writer.key, writer.sequence, &head, body);
        writer.sequence += 1;
        writer.is_done = kind == Kind::Done;
        let frame = [&head[..], body, &sum].concat();
        (&self.0.socket).write_all(&frame)?;
        self.count(frame.len(), 0);
        Ok(())
    }

    /// The next frame, which `reader` expects.
    fn receive(&self, reader: &mut ReadSide) -> Result<(Kind, Vec<u8>)> {
        let mut socket = &self.0.socket;
        let mut head = [0; HEAD_BYTES];
        socket.read_exact(&mut head).map_err(|e| self.lost(e))?;
        let [a, b, c, d, code] = head;
        let length = u32::from_le_bytes([a, b, c, d]) as usize;
        let garbled = |what: &str| corrupt(format!("{}: sent what is no frame: {what}", self.0.peer));
        if length > LINK_FRAME_BYTES_MAX {
            return Err(garbled("length"));
        }
        let mut body = vec![0; length];
        let mut sum = [0; CHECKSUM_BYTES];
        socket.read_exact(&mut body).map_err(|e| self.lost(e))?;
        socket.read_exact(&mut sum).map_err(|e| self.lost(e))?;
        if sum != checksum(&reader.key, reader.sequence, &head, &body) {
            return Err(garbled("checksum"));
        }
        reader.sequence += 1;
        self.count(0, HEAD_BYTES + length + CHECKSUM_BYTES);
        let kinds = [Kind::Data, Kind::Beat, Kind::Done, Kind::Abort];
        let kind = kinds.into_iter().find(|kind| *kind as u8 == code).ok_or_else(|| garbled("kind"))?;
        Ok((kind, body))
    }

    /// Waits until timely can have bytes; `false` at the end.
    fn fill(&self, reader: &mut ReadSide) -> Result<bool> {
        while reader.given == reader.whole {
            let (kind, body) = self.receive(reader)?;
            match kind {
                Kind::Beat => {}
                Kind::Data => reader.take(&body).map_err(|e| e.within(&self.0.peer))?,
                Kind::Abort => return Err(self.gave_up(&body)),
                Kind::Done if reader.is_last_seen => return Ok(false),
                Kind::Done => return Err(corrupt(format!("{}: ended within a message", self.0.peer))),
            }
        }
        Ok(true)
    }
}

impl ReadSide {
    /// Takes bytes of timely's stream. Only whole messages are passed on, so that the end can come after any of them.
    fn take(&mut self, bytes: &[u8]) -> Result<()> {
        if self.is_last_seen {
            return Err(corrupt("sent data after its last message"));
        }
        self.pending.drain(..self.given);
        self.whole -= self.given;
        self.given = 0;
        self.pending.extend_from_slice(bytes);
        while let Some(head) = self.pending.get(self.whole..).and_then(|rest| rest.first_chunk::<MESSAGE_HEAD_BYTES>())
        {
            let length = head.as_chunks::<8>().0.get(4).map_or(0, |bytes| u64::from_be_bytes(*bytes));
            if length > LINK_MESSAGE_BYTES_MAX {
                return Err(corrupt(format!("sent a message that is too long, bytes={length}")));
            }
            let end = self.whole + MESSAGE_HEAD_BYTES + length as usize;
            if end > self.pending.len() {
                break;
            }
            self.whole = end;
            if length == 0 {
                self.is_last_seen = true;
                if end < self.pending.len() {
                    return Err(corrupt("sent data after its last message"));
                }
            }
        }
        Ok(())
    }

    /// After a failure: an orderly end, at once.
    fn end(&mut self) {
        self.pending = if self.is_last_seen { Vec::new() } else { vec![0; MESSAGE_HEAD_BYTES] };
        self.whole = self.pending.len();
        self.given = 0;
        self.is_last_seen = true;
        self.is_over = true;
    }
}

impl Read for Link {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let mut reader = self.0.reader.lock().unwrap_or_else(PoisonError::into_inner);
        if !reader.is_over {
            match self.fill(&mut reader) {
                Ok(true) => {}
                Ok(false) => reader.is_over = true,
                Err(e) => {
                    self.fail(e);
                    reader.end();
                }
            }
        }
        let ready = reader.pending.get(reader.given..reader.whole).unwrap_or_default();
        let count = ready.len().min(out.len());
        let (into, from) = (out.get_mut(..count).unwrap_or_default(), ready.get(..count).unwrap_or_default());
        into.copy_from_slice(from);
        reader.given += count;
        Ok(count)
    }
}

impl Write for Link {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for part in bytes.chunks(LINK_FRAME_BYTES_MAX) {
            if let Err(e) = self.send(Kind::Data, part) {
                self.fail_send(e);
                break;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Link {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(self.clone())
    }

    fn set_nonblocking(&self, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn shutdown(&self, _: Shutdown) -> io::Result<()> {
        let is_failed = self.0.health.upgrade().is_none_or(|health| health.is_failed());
        if !is_failed && let Err(e) = self.send(Kind::Done, &[]) {
            self.fail_send(e);
        }
        Ok(())
    }
}
