//! `snapfs.toml`, written once, and the numbered records under `config/`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::backend::{Backend, Key};
use crate::clock::{Clock, Timestamp};
use crate::error::{Error, ErrorKind, Result, busy, corrupt, not_found, unsupported};
use crate::fingerprint::short;
use crate::format::{ObjectKind, VERSION, envelop, open_envelope};
use crate::limits::{BLOCK_BYTES, SEGMENT_BYTES, TARGETS_MAX};
use crate::random::fill_random;
use crate::wire::{Reader, Wire, decode, encode, wire_struct};

/// Name of the file that makes a folder a store.
pub const FILE_NAME: &str = "snapfs.toml";

/// The file is a page of text.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// A record of the configuration is small.
const RECORD_BYTES_MAX: u64 = 1 << 20;

/// How often a change is tried again when others change the configuration at the same time.
const CHANGE_TRIES: usize = 100;

/// What `snapfs.toml` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// Version of the format.
    pub format: u16,
    /// Incompatible features in use; an unknown one is refused by name.
    pub features: Vec<String>,
    /// The store's identity: 32 hexadecimal digits.
    pub store: String,
    /// When it was made: seconds since the epoch.
    pub created: u64,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Bytes of a segment.
    pub segment_bytes: u64,
    /// BLAKE3 of the fields above, 32 hexadecimal digits.
    pub checksum: String,
}

/// What can be set in a store, for all who use it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Settings {
    /// A sealed snapshot is not forgotten before the store has had it for so many seconds.
    pub min_age_seconds: u64,
    /// What was forgotten is not collected before so many seconds have passed.
    pub gc_grace_seconds: u64,
}

wire_struct! {
    /// One of several places of objects.
    pub struct TargetRow {
        /// Its identity, which its `target.toml` says too.
        pub id: [u8; 16],
        /// Where it is: an absolute path.
        pub path: String,
        /// A number of the file system that it was made on; 0 when it has none.
        pub medium: u64,
        /// Whether it is being given up: nothing new is put there.
        pub leaving: bool,
    }
}

wire_struct! {
    /// How many targets hold an object.
    #[derive(Copy, Default)]
    pub struct Replicas {
        /// Of a VM's objects.
        pub vm: u16,
        /// Of common packs.
        pub common: u16,
        /// How many must have an object before it counts; 0 for more than half.
        pub quorum: u16,
    }
}

/// A numbered record of the configuration. The highest number wins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigRecord {
    /// The store's identity.
    pub store: String,
    /// When it was written.
    pub time: Timestamp,
    /// What was set last.
    pub settings: Settings,
    /// The targets; none when the store's own folder holds all.
    pub targets: Vec<TargetRow>,
    /// How many of them hold an object.
    pub replicas: Replicas,
    /// Whether objects may lie where an earlier record had them.
    pub moving: bool,
}

impl Wire for ConfigRecord {
    fn put(&self, out: &mut Vec<u8>) {
        self.store.put(out);
        self.time.put(out);
        self.settings.min_age_seconds.put(out);
        self.targets.put(out);
        self.replicas.put(out);
        self.moving.put(out);
        // Came later than the fields above: a record that has none reads the same for a program that knows none.
        if self.settings.gc_grace_seconds != 0 {
            self.settings.gc_grace_seconds.put(out);
        }
    }

    fn take(reader: &mut Reader<'_>) -> Result<Self> {
        let (store, time, min_age_seconds) = (Wire::take(reader)?, Wire::take(reader)?, Wire::take(reader)?);
        let (targets, replicas, moving) = (Wire::take(reader)?, Wire::take(reader)?, Wire::take(reader)?);
        let gc_grace_seconds = match reader.remaining() {
            0 => 0,
            _ => u64::take(reader).and_then(|s| if s == 0 { Err(corrupt("a gc_grace of 0")) } else { Ok(s) })?,
        };
        let settings = Settings { min_age_seconds, gc_grace_seconds };
        Ok(Self { store, time, settings, targets, replicas, moving })
    }
}

impl StoreConfig {
    /// The text of `snapfs.toml`.
    ///
    /// # Errors
    /// `Corrupt` for a time that the text cannot hold.
    pub fn to_text(&self) -> Result<String> {
        let text = toml::to_string(self).map_err(|e| corrupt(FILE_NAME).because(e))?;
        Ok(format!("# A snapfs store. Written once by `snapfs init`; do not edit.\n{text}"))
    }

    /// Reads the text of `snapfs.toml` and checks all that can be checked without other objects.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(bytes).map_err(|e| corrupt("is no text").because(e))?;
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| corrupt(one_line(&e)))?;
        // The version is looked at first: a newer one may have other fields.
        match table.get("format").and_then(toml::Value::as_integer) {
            Some(version) if version == i64::from(VERSION) => {}
            Some(version) => {
                let newer = format!("format {version} is not known here, this program reads {VERSION}");
                return Err(unsupported(newer));
            }
            None => return Err(corrupt("has no format version")),
        }
        let config: Self = table.try_into().map_err(|e: toml::de::Error| corrupt(one_line(&e)))?;
        if config.checksum != config.checksum_of() {
            return Err(corrupt("checksum does not match: the file was changed"));
        }
        if let Some(feature) = config.features.first() {
            return Err(unsupported(format!("unknown incompatible feature {feature:?}")));
        }
        if (config.block_bytes, config.segment_bytes) != (BLOCK_BYTES as u64, SEGMENT_BYTES as u64) {
            return Err(unsupported(format!("blocks of {} bytes", config.block_bytes)));
        }
        Ok(config)
    }

    fn checksum_of(&self) -> String {
        let parts = [
            self.format.to_string(),
            self.features.join(","),
            self.store.clone(),
            self.created.to_string(),
            self.block_bytes.to_string(),
            self.segment_bytes.to_string(),
        ];
        let parts: Vec<&[u8]> = parts.iter().map(String::as_bytes).collect();
        hex(&short(b"snapfs.toml", &parts))
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The key of a record.
pub fn record_key(number: u32) -> Key {
    Key::new(format!("config/{number:010}"))
}

/// The number that a file name in `config/` stands for, in the one spelling that the writer uses.
fn record_number(name: &str) -> Option<u32> {
    let number = name.parse().ok()?;
    (format!("{number:010}") == name).then_some(number)
}

/// Makes the folder of a new store, 0700; one that is there must be empty.
///
/// # Errors
/// `Exists`, `NotFolder`, `Denied`, `ReadOnly`, `NoSpace`.
pub fn make_folder(root: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let about = |e| Error::io(format!("store {}", root.display()), e);
    match std::fs::DirBuilder::new().mode(0o700).create(root) {
        Ok(()) => return Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(about(e)),
    }
    let refuse = |what| Err(Error::new(ErrorKind::Exists, format!("{}: {what}", root.display())));
    if root.join(FILE_NAME).exists() {
        return refuse("is a store already");
    }
    for entry in std::fs::read_dir(root).map_err(about)? {
        // A fresh file system has this one.
        if entry.map_err(about)?.file_name() != "lost+found" {
            return refuse("is not empty");
        }
    }
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(root, mode).map_err(about)
}

/// Writes the configuration of a new store. The file comes last: its presence makes the store.
///
/// # Errors
/// `Exists`, `NoSpace`, `ReadOnly`, `Unavailable`.
pub fn write_new(backend: &dyn Backend, clock: &dyn Clock) -> Result<()> {
    let config = new_config(clock)?;
    let record = new_record(&config, clock);
    write_first(backend, &config, &record)
}

/// The first record of a store: one folder, nothing set.
pub fn new_record(config: &StoreConfig, clock: &dyn Clock) -> ConfigRecord {
    ConfigRecord {
        store: config.store.clone(),
        time: clock.now(),
        settings: Settings::default(),
        targets: Vec::new(),
        replicas: Replicas::default(),
        moving: false,
    }
}

/// Writes the configuration of a new store at one place of it. The file comes last.
///
/// # Errors
/// As [`write_new`].
pub fn write_first(backend: &dyn Backend, config: &StoreConfig, record: &ConfigRecord) -> Result<()> {
    backend.put_new(&record_key(1), &envelop(ObjectKind::Config, &encode(record)))?;
    backend.put_new(&Key::new(FILE_NAME), config.to_text()?.as_bytes())
}

/// The configuration of a store to be, with a new identity.
///
/// # Errors
/// `Unavailable`.
pub fn new_config(clock: &dyn Clock) -> Result<StoreConfig> {
    let mut id = [0; 16];
    fill_random(&mut id)?;
    let mut config = StoreConfig {
        format: VERSION,
        features: Vec::new(),
        store: hex(&id),
        created: clock.now().seconds(),
        block_bytes: BLOCK_BYTES as u64,
        segment_bytes: SEGMENT_BYTES as u64,
        checksum: String::new(),
    };
    config.checksum = config.checksum_of();
    Ok(config)
}

/// Reads and checks the configuration.
///
/// # Errors
/// `NotFound`, `Corrupt`, `Unsupported`; all name `snapfs.toml` (or the record).
pub fn read(backend: &dyn Backend) -> Result<StoreConfig> {
    let config = read_file(backend)?;
    newest_record(backend, &config)?;
    Ok(config)
}

/// Reads and checks `snapfs.toml` alone.
///
/// # Errors
/// As [`read`].
pub fn read_file(backend: &dyn Backend) -> Result<StoreConfig> {
    let about = |e: Error| e.within(FILE_NAME);
    let key = Key::new(FILE_NAME);
    let mut verify = |bytes: &[u8]| StoreConfig::parse(bytes).map(drop);
    let bytes = backend.read_all_checked(&key, FILE_BYTES_MAX, &mut verify).map_err(|e| match e.kind() {
        ErrorKind::NotFound => not_found(format!("no snapfs store: {FILE_NAME} is missing")),
        _ => about(e),
    })?;
    StoreConfig::parse(&bytes).map_err(about)
}

/// The record that counts, and its number. Cost: a listing and a read.
///
/// # Errors
/// `Corrupt`, naming the record, also when it belongs to another store than `snapfs.toml`: then one of the two comes
/// from elsewhere. `Unsupported`, `Unavailable`.
pub fn newest_record(backend: &dyn Backend, config: &StoreConfig) -> Result<(u32, ConfigRecord)> {
    let Some(newest) = record_numbers(backend)?.pop() else {
        return Err(corrupt(format!("{FILE_NAME}: config/ has no record")));
    };
    Ok((newest, read_record(backend, config, newest)?))
}

/// The numbers of all records, ascending. Cost: one listing.
///
/// # Errors
/// As [`Backend::list`].
pub fn record_numbers(backend: &dyn Backend) -> Result<Vec<u32>> {
    let rows = backend.list(&Key::new("config"))?;
    let mut numbers: Vec<u32> = rows.iter().filter_map(|r| record_number(&r.name)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// Reads one record. Cost: one read.
///
/// # Errors
/// As [`newest_record`]; `NotFound`.
pub fn read_record(backend: &dyn Backend, config: &StoreConfig, number: u32) -> Result<ConfigRecord> {
    let key = record_key(number);
    let mut record = None;
    let mut verify = |bytes: &[u8]| {
        record = Some(open_record(&key, config, bytes)?);
        Ok(())
    };
    backend.read_all_checked(&key, RECORD_BYTES_MAX, &mut verify)?;
    record.ok_or_else(|| corrupt(format!("{key}: was not read")))
}

/// Decodes a record.
///
/// # Errors
/// `Corrupt`, `Unsupported`.
pub fn open_record(key: &Key, config: &StoreConfig, bytes: &[u8]) -> Result<ConfigRecord> {
    let body = open_envelope(ObjectKind::Config, bytes).map_err(|e| e.within(key))?;
    let record: ConfigRecord = decode(body).map_err(|e| e.within(key))?;
    if record.store != config.store {
        return Err(corrupt(format!("{FILE_NAME}: belongs to another store than {key}")));
    }
    let mut ids: Vec<&[u8; 16]> = record.targets.iter().map(|row| &row.id).collect();
    ids.sort_unstable();
    ids.dedup();
    let replicas = record.replicas;
    let bounded = record.targets.len() <= TARGETS_MAX && ids.len() == record.targets.len();
    if !bounded || (!record.targets.is_empty() && (replicas.vm == 0 || replicas.common == 0)) {
        return Err(corrupt(format!("{key}: {} targets, replicas {replicas:?}", record.targets.len())));
    }
    Ok(record)
}

/// Puts a record that differs from the newest one by what `change` does; nothing when that is nothing. `change` is
/// called again on a newer record when others change the configuration at the same time.
///
/// Cost: a listing, a read and a put.
///
/// # Errors
/// What `change` returns; as [`newest_record`]; `Busy`, `NoSpace`, `ReadOnly`. After `Unavailable` it may or may not
/// be changed.
pub fn change_record(
    backend: &dyn Backend,
    config: &StoreConfig,
    clock: &dyn Clock,
    change: impl Fn(&mut ConfigRecord) -> Result<()>,
) -> Result<ConfigRecord> {
    for _ in 0..CHANGE_TRIES {
        let (newest, old) = newest_record(backend, config)?;
        let mut record = old.clone();
        change(&mut record)?;
        if record == old {
            return Ok(old);
        }
        record.time = clock.now();
        let next = newest.checked_add(1).ok_or_else(|| corrupt("config/: has its last record"))?;
        match backend.put_new(&record_key(next), &envelop(ObjectKind::Config, &encode(&record))) {
            // Another changed it at the same moment.
            Err(e) if e.kind() == ErrorKind::Exists => {}
            Err(e) => return Err(e),
            Ok(()) => return Ok(record),
        }
    }
    Err(busy("config/: others change it all the time"))
}

fn one_line(error: &toml::de::Error) -> String {
    error.message().replace('\n', " ")
}
