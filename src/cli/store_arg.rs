//! The store that a command works on: its first argument, `--store`, or `SNAPFS_STORE`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::Arc;

use crate::cli::Stop;
use crate::clock::SystemClock;
use crate::error::{Error, Result, invalid};
use crate::name::{Reference, SnapshotName, VmName};
use crate::store::{MemoryShares, Store};

/// The variable that stands in for the argument.
pub const STORE_VARIABLE: &str = "SNAPFS_STORE";

/// The option that stands in for the argument.
const STORE_OPTION: &str = "--store";

/// The variable that turns second sighting off.
pub const PROMOTE_VARIABLE: &str = "SNAPFS_PROMOTE";

/// Whether blocks that another VM has go to common packs at once, by the value of [`PROMOTE_VARIABLE`].
///
/// # Errors
/// `Invalid` for anything but `on` and `off`.
pub fn promotes(value: Option<OsString>) -> Result<bool> {
    match value.as_deref().map(OsStr::to_str) {
        None | Some(Some("on" | "")) => Ok(true),
        Some(Some("off")) => Ok(false),
        Some(_) => Err(invalid(format!("{PROMOTE_VARIABLE}: neither on nor off"))),
    }
}

/// Commands that have no store.
const WITHOUT_STORE: [&str; 7] = ["umount", "attach", "detach", "reap", "files-inside", "demo", "help"];

/// The arguments that every command on a store has.
#[derive(Debug, clap::Args)]
pub struct StoreArg {
    /// The store: a folder; left out when --store or SNAPFS_STORE tells it
    #[arg(value_name = "STORE")]
    pub store: PathBuf,

    /// The store, in place of the first argument
    #[arg(long = "store", value_name = "STORE", id = "store_option")]
    store_option: Option<PathBuf>,

    /// Memory to use at the most, for example 512M [default: 256M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_memory: Option<u64>,
}

impl StoreArg {
    /// Opens the store.
    ///
    /// # Errors
    /// A usage error for a memory cap that is too small; else as [`Store::open`].
    pub fn open(&self) -> std::result::Result<Store, Stop> {
        let shares = match self.max_memory {
            Some(bytes) => MemoryShares::of(bytes).map_err(Stop::usage)?,
            None => MemoryShares::default(),
        };
        let promotes = promotes(std::env::var_os(PROMOTE_VARIABLE)).map_err(Stop::usage)?;
        Ok(Store::open(&self.store, Arc::new(SystemClock::new()), shares)?.promoting(promotes))
    }
}

/// Puts the store of `--store` or of the variable (`env`) where commands expect it: right after the command's name.
///
/// `--store X` and `--store=X` are taken out wherever they stand before `--`. With either of the two given, the
/// argument itself must be left out.
pub fn with_store(args: Vec<OsString>, env: Option<OsString>) -> Vec<OsString> {
    let mut given = None;
    let mut kept = Vec::with_capacity(args.len() + 1);
    let mut rest = args.iter().cloned();
    kept.extend(rest.next());
    while let Some(arg) = rest.next() {
        if arg == "--" {
            kept.push(arg);
            break;
        }
        if arg == STORE_OPTION {
            match rest.next() {
                Some(value) => given = Some(value),
                // Without a value: the parser says what is wrong.
                None => kept.push(arg),
            }
        } else if let Some(value) = value_of_option(&arg) {
            given = Some(value);
        } else {
            kept.push(arg);
        }
    }
    kept.extend(rest);
    let Some(store) = given.or(env).filter(|store| !store.is_empty()) else { return args };
    let command = kept.iter().enumerate().skip(1).find(|(_, arg)| !arg.as_bytes().starts_with(b"-"));
    match command {
        Some((at, name)) if !WITHOUT_STORE.iter().any(|w| name == w) => {
            kept.insert(at + 1, as_argument(store));
            kept
        }
        _ => args,
    }
}

fn value_of_option(arg: &OsStr) -> Option<OsString> {
    let value = arg.as_bytes().strip_prefix(STORE_OPTION.as_bytes())?.strip_prefix(b"=")?;
    Some(OsString::from_vec(value.to_vec()))
}

/// A path that begins with a dash is no option.
fn as_argument(store: OsString) -> OsString {
    if !store.as_bytes().starts_with(b"-") {
        return store;
    }
    let mut path = OsString::from("./");
    path.push(store);
    path
}

/// Reads a size: a number with K, M, G or T (or KiB, MB, ...), all powers of 1024.
///
/// # Errors
/// `Invalid`.
pub fn parse_size(text: &str) -> Result<u64> {
    let wrong = || invalid(format!("{text:?} is not a size like 512M"));
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

fn text_of(argument: &OsStr) -> std::result::Result<&str, Stop> {
    argument.to_str().ok_or_else(|| Stop::usage(invalid(format!("{argument:?} is not UTF-8"))))
}

fn as_usage<T>(parsed: Result<T>) -> std::result::Result<T, Stop> {
    parsed.map_err(|e: Error| Stop::usage(e))
}

/// The name of a snapshot to be.
///
/// # Errors
/// A usage error.
pub fn snapshot_name(argument: &OsStr) -> std::result::Result<SnapshotName, Stop> {
    as_usage(SnapshotName::parse(text_of(argument)?))
}

/// The name of a snapshot to read; `latest` stands for the newest.
///
/// # Errors
/// A usage error.
pub fn reference(argument: &OsStr) -> std::result::Result<Reference, Stop> {
    as_usage(SnapshotName::parse_reference(text_of(argument)?))
}

/// The name of a VM.
///
/// # Errors
/// A usage error.
pub fn vm_name(argument: &OsStr) -> std::result::Result<VmName, Stop> {
    as_usage(VmName::new(text_of(argument)?).map_err(|e| e.within("VM name")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(words: &str, env: Option<&str>) -> String {
        let args = words.split(' ').map(OsString::from).collect();
        let args = with_store(args, env.map(OsString::from));
        args.iter().map(|a| a.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn without_a_stand_in_nothing_changes() {
        for words in
            ["snapfs", "snapfs list /s", "snapfs list --json /s web01", "snapfs backup -- /s -x/a -", "snapfs -V"]
        {
            assert_eq!(rewritten(words, None), words);
            assert_eq!(rewritten(words, Some("")), words);
        }
    }

    #[test]
    fn the_variable_becomes_the_first_argument() {
        let cases = [
            ("snapfs list", "snapfs list /s"),
            ("snapfs list --json web01", "snapfs list /s --json web01"),
            ("snapfs backup -- -x/a -", "snapfs backup /s -- -x/a -"),
            ("snapfs -- list", "snapfs -- list /s"),
            ("snapfs frobnicate", "snapfs frobnicate /s"),
            ("snapfs umount /mnt", "snapfs umount /mnt"),
            ("snapfs demo", "snapfs demo"),
            ("snapfs help list", "snapfs help list"),
            ("snapfs --help", "snapfs --help"),
            ("snapfs", "snapfs"),
        ];
        for (words, expected) in cases {
            assert_eq!(rewritten(words, Some("/s")), expected);
        }
    }

    #[test]
    fn the_option_counts_anywhere_and_wins() {
        let cases = [
            ("snapfs --store /o list web01", "snapfs list /o web01"),
            ("snapfs --store=/o list web01", "snapfs list /o web01"),
            ("snapfs list --store /o web01", "snapfs list /o web01"),
            ("snapfs list web01 --json --store=/o", "snapfs list /o web01 --json"),
            ("snapfs list --store /a --store /b", "snapfs list /b"),
            ("snapfs list --store -odd", "snapfs list ./-odd"),
            // After `--` it is a name like any other.
            ("snapfs forget -- --store x/y", "snapfs forget /env -- --store x/y"),
            // The parser is left to complain about these.
            ("snapfs umount --store /o /mnt", "snapfs umount --store /o /mnt"),
            ("snapfs demo --store /o", "snapfs demo --store /o"),
        ];
        for (words, expected) in cases {
            assert_eq!(rewritten(words, Some("/env")), expected);
        }
        assert_eq!(rewritten("snapfs list --store", None), "snapfs list --store");
        assert_eq!(rewritten("snapfs list --store=", None), "snapfs list --store=");
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("0", 0), ("7", 7), ("1k", 1024), ("256M", 256 << 20), ("2GiB", 2 << 30), ("1t", 1 << 40)]
        {
            assert_eq!(parse_size(text).unwrap(), bytes);
        }
        for text in ["", "M", "-1", "1.5G", "1x", "99999999999999999999", "99999999T", "1 M", "\u{b2}"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
