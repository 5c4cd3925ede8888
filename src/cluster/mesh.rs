//! Connects the hosts of a job with each other, and makes sure of each that it works on the same job of the same store.
//!
//! Who can read the store knows the job's key; nobody else can take part. Each pair of hosts proves it to each other
//! with fresh numbers before a byte goes to timely dataflow, and the frames of a [`Link`] are keyed with what they
//! agreed on. Nothing is encrypted: docs/OPERATIONS.md.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Clock;
use crate::cluster::health::Health;
use crate::cluster::hosts::Hosts;
use crate::cluster::link::{Link, LinkKeys};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{HOST_RETRY_MS, HOSTS_MAX};
use crate::random::fill_random;

const MAGIC: [u8; 8] = *b"snapfsJ1";

/// Magic, index, nonce, three digests.
const HELLO_BYTES: usize = 8 + 4 + 32 + 3 * 32;

const PROOF_BYTES: usize = 32;

/// How long one handshake may take: whoever connects and says nothing must not keep the others out.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// What hosts must agree on to work together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreement {
    /// The job, its store included.
    pub job: [u8; 32],
    /// Hosts file and threads.
    pub layout: [u8; 32],
    /// Which partitions are finished.
    pub finished: [u8; 32],
    /// The job's key, which is never sent.
    pub key: [u8; 32],
}

/// How long to wait for others.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For a host to come up.
    pub start: Duration,
    /// For a sign of life of a host that takes part.
    pub silence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            start: Duration::from_secs(crate::limits::HOST_START_SECONDS),
            silence: Duration::from_secs(crate::limits::HOST_SILENCE_SECONDS),
        }
    }
}

struct Hello {
    index: usize,
    nonce: [u8; 32],
    bytes: [u8; HELLO_BYTES],
}

/// The connections to all other hosts, `None` at the own place.
///
/// Waits until all have come up; `waiting` is told of each that is missing, now and then.
///
/// # Errors
/// `Unavailable` naming the hosts that did not come up, `Invalid` naming one that works on something else; as the system
/// has it when the own address cannot be listened on.
pub fn connect(
    hosts: &Hosts,
    agreement: &Agreement,
    patience: Patience,
    health: &Arc<Health>,
    clock: &dyn Clock,
    waiting: &dyn Fn(&str),
) -> Result<Vec<Option<Link>>> {
    let own = hosts.index();
    let listener = if own + 1 < hosts.count() { Some(listen(hosts)?) } else { None };
    let mut links: Vec<Option<Link>> = (0..hosts.count()).map(|_| None).collect();
    let until = clock.elapsed() + patience.start;
    // Hosts of a pass come one after another; only who is missing for longer is worth a word.
    let mut told = clock.elapsed() + Duration::from_secs(1);
    loop {
        let missing: Vec<usize> =
            links.iter().enumerate().filter(|(at, link)| *at != own && link.is_none()).map(|(at, _)| at).collect();
        if missing.is_empty() {
            return Ok(links);
        }
        health.check()?;
        for at in missing.iter().copied().filter(|at| *at < own) {
            let Some(mut socket) = call(hosts, at) else { continue };
            match introduce(&mut socket, hosts, agreement, at) {
                Ok(keys) => keep(&mut links, at, Link::new(socket, hosts.name(at), &keys, health, patience.silence)?),
                Err(e) if e.kind() == ErrorKind::Invalid => return Err(e),
                // It is starting, or ending: it is called again.
                Err(e) => log::debug!("{}: {e}", hosts.name(at)),
            }
        }
        while let Some((mut socket, from)) = listener.as_ref().and_then(|l| l.accept().ok()) {
            match welcome(&mut socket, hosts, agreement) {
                Ok((at, keys)) if links.get(at).is_some_and(Option::is_none) => {
                    keep(&mut links, at, Link::new(socket, hosts.name(at), &keys, health, patience.silence)?);
                }
                Ok((at, _)) => log::warn!("{} connected a second time, from {from}", hosts.name(at)),
                Err(e) if e.kind() == ErrorKind::Invalid => return Err(e),
                // Whoever knocks at the port and is none of us does not end the job.
                Err(e) => log::warn!("a connection from {from} was refused: {e}"),
            }
        }
        let now = clock.elapsed();
        let names = || missing.iter().map(|at| hosts.name(*at)).collect::<Vec<_>>().join(", ");
        if now > until {
            let seconds = patience.start.as_secs();
            return Err(Error::new(ErrorKind::Unavailable, format!("did not come up within {seconds} s: {}", names())));
        }
        if now > told {
            waiting(&names());
            told = now + Duration::from_secs(5);
        }
        clock.sleep(Duration::from_millis(HOST_RETRY_MS));
    }
}

fn keep(links: &mut [Option<Link>], at: usize, link: Link) {
    if let Some(place) = links.get_mut(at) {
        *place = Some(link);
    }
}

fn listen(hosts: &Hosts) -> Result<TcpListener> {
    let name = hosts.name(hosts.index());
    let address = hosts.addresses().get(hosts.index()).map_or("", String::as_str);
    let failed = |e| Error::io(format!("{name}: cannot be listened on, which this host should"), e);
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

fn call(hosts: &Hosts, at: usize) -> Option<TcpStream> {
    let address = hosts.addresses().get(at)?;
    for address in address.to_socket_addrs().ok()? {
        match TcpStream::connect_timeout(&address, HANDSHAKE) {
            Ok(socket) => return Some(socket),
            Err(e) => log::debug!("{}: {e}", hosts.name(at)),
        }
    }
    None
}

impl Hello {
    fn new(agreement: &Agreement, index: usize) -> Result<Self> {
        let mut nonce = [0; 32];
        fill_random(&mut nonce)?;
        let parts: [&[u8]; 6] =
            [&MAGIC, &(index as u32).to_le_bytes(), &nonce, &agreement.job, &agreement.layout, &agreement.finished];
        let mut bytes = [0; HELLO_BYTES];
        bytes.copy_from_slice(&parts.concat());
        Ok(Self { index, nonce, bytes })
    }

    fn read(socket: &mut TcpStream) -> Result<Self> {
        let mut bytes = [0; HELLO_BYTES];
        read_exact(socket, &mut bytes)?;
        let part = |from: usize| bytes.get(from..).unwrap_or_default();
        if !bytes.starts_with(&MAGIC) {
            return Err(Error::new(ErrorKind::Denied, "it is no host of a job"));
        }
        let index = part(8).first_chunk().map_or(0, |b| u32::from_le_bytes(*b)) as usize;
        if index >= HOSTS_MAX {
            return Err(Error::new(ErrorKind::Denied, "it is no host of a job"));
        }
        Ok(Self { index, nonce: part(12).first_chunk().copied().unwrap_or_default(), bytes })
    }

    /// # Errors
    /// `Invalid`: it is a host of this job's store, as it has proved, and was started otherwise.
    fn agrees(&self, agreement: &Agreement, name: &str) -> Result<()> {
        let told = self.bytes.get(44..).unwrap_or_default().as_chunks::<32>().0;
        let wanted = [
            (agreement.job, "works on another job: the job file must be the same on all hosts"),
            (agreement.layout, "has another hosts file or another number of threads"),
            (agreement.finished, "sees other partitions finished; start the job again on all hosts"),
        ];
        for ((want, what), found) in wanted.iter().zip(told) {
            if want != found {
                return Err(Error::new(ErrorKind::Invalid, format!("{name} {what}")));
            }
        }
        Ok(())
    }
}

fn keyed(key: &[u8; 32], what: &[u8], called: &Hello, calls: &Hello) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(&[what.len() as u8]).update(what).update(&called.bytes).update(&calls.bytes);
    *hasher.finalize().as_bytes()
}

/// The side that calls: proves itself after the other has.
fn introduce(socket: &mut TcpStream, hosts: &Hosts, agreement: &Agreement, at: usize) -> Result<LinkKeys> {
    prepare(socket)?;
    let calls = Hello::new(agreement, hosts.index())?;
    write_all(socket, &calls.bytes)?;
    let called = Hello::read(socket)?;
    let mut proof = [0; PROOF_BYTES];
    read_exact(socket, &mut proof)?;
    let key = &agreement.key;
    if called.index != at || called.nonce == calls.nonce || proof != keyed(key, b"called", &called, &calls) {
        return Err(Error::new(ErrorKind::Denied, "does not know the job's key: another store, or another job"));
    }
    write_all(socket, &keyed(key, b"calls", &called, &calls))?;
    called.agrees(agreement, &hosts.name(at))?;
    Ok(LinkKeys {
        sends: keyed(key, b"from caller", &called, &calls),
        receives: keyed(key, b"to caller", &called, &calls),
    })
}

/// The side that is called. Who it is, and the keys.
fn welcome(socket: &mut TcpStream, hosts: &Hosts, agreement: &Agreement) -> Result<(usize, LinkKeys)> {
    prepare(socket)?;
    let calls = Hello::read(socket)?;
    if calls.index <= hosts.index() || calls.index >= hosts.count() {
        return Err(Error::new(ErrorKind::Denied, "it is no host that calls this one"));
    }
    let called = Hello::new(agreement, hosts.index())?;
    let key = &agreement.key;
    write_all(socket, &[&called.bytes[..], &keyed(key, b"called", &called, &calls)].concat())?;
    let mut proof = [0; PROOF_BYTES];
    read_exact(socket, &mut proof)?;
    if proof != keyed(key, b"calls", &called, &calls) {
        return Err(Error::new(ErrorKind::Denied, "does not know the job's key: another store, or another job"));
    }
    calls.agrees(agreement, &hosts.name(calls.index))?;
    let keys = LinkKeys {
        sends: keyed(key, b"to caller", &called, &calls),
        receives: keyed(key, b"from caller", &called, &calls),
    };
    Ok((calls.index, keys))
}

fn prepare(socket: &TcpStream) -> Result<()> {
    let set = socket.set_nonblocking(false);
    let set = set.and_then(|()| socket.set_read_timeout(Some(HANDSHAKE)));
    set.and_then(|()| socket.set_write_timeout(Some(HANDSHAKE))).map_err(|e| Error::io("handshake", e))
}

fn read_exact(socket: &mut TcpStream, out: &mut [u8]) -> Result<()> {
    socket.read_exact(out).map_err(unfinished)
}

fn write_all(socket: &mut TcpStream, bytes: &[u8]) -> Result<()> {
    socket.write_all(bytes).map_err(unfinished)
}

fn unfinished(cause: io::Error) -> Error {
    Error::new(ErrorKind::Unavailable, "handshake was not finished").because(cause)
}
