//! The options of `mount -o`, ours and those that mount(8) and fstab pass along.

use std::path::PathBuf;
use std::time::Duration;

use crate::cli::store_arg::parse_size;
use crate::error::{Result, invalid};

/// A grace time over a year is a mistake.
const SEAL_AFTER_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// More threads than this only take memory: each has a buffer of the largest request, twice.
const THREADS_MAX: usize = 256;

/// Words for the kernel or for mount(8) that say nothing about this filesystem: there are no devices, no set-user-id
/// files and no access times in it, and a commit is always synchronous.
const IGNORED: [&str; 36] = [
    "defaults",
    "dev",
    "nodev",
    "suid",
    "nosuid",
    "exec",
    "sync",
    "async",
    "dirsync",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "lazytime",
    "nolazytime",
    "symfollow",
    "nosymfollow",
    "iversion",
    "noiversion",
    "mand",
    "nomand",
    "silent",
    "loud",
    "_netdev",
    "nofail",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
];

/// Beginnings of words that are for others.
const IGNORED_BEGINNINGS: [&str; 8] = ["x-", "X-", "comment=", "fsname=", "subtype=", "uhelper=", "helper=", "user="];

/// What the options say. `None`: nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// `ro`.
    pub read_only: bool,
    /// `allow_other` or `noallow_other`.
    pub allow_other: Option<bool>,
    /// `default_permissions`: always on where we mount, but a mount that was made for us may lack it.
    pub default_permissions: bool,
    /// `noexec`.
    pub no_exec: bool,
    /// `seal_after=TIME`.
    pub seal_after: Option<Duration>,
    /// `max_memory=SIZE`, in bytes.
    pub max_memory: Option<u64>,
    /// `threads=N`.
    pub threads: Option<usize>,
    /// `log=FILE`.
    pub log: Option<PathBuf>,
    /// `clones=DIR`.
    pub clones: Option<PathBuf>,
    /// `nodelete`.
    pub no_delete: bool,
    /// `gc=on` or `gc=off`.
    pub collect: bool,
    /// `promote=on` or `promote=off`; what the variable says without it.
    pub promote: Option<bool>,
}

impl MountOptions {
    /// Reads lists of options, separated by commas. The last one of a kind wins.
    ///
    /// # Errors
    /// `Invalid`, naming the first option that is unknown or wrong.
    pub fn parse(lists: &[String]) -> Result<Self> {
        let mut options = Self::default();
        for word in lists.iter().flat_map(|list| words(list)) {
            if !options.take(&word)? {
                return Err(invalid(format!("mount option {word:?}: unknown")));
            }
        }
        Ok(options)
    }

    /// Takes one option; `false` when it is unknown.
    ///
    /// # Errors
    /// `Invalid` for a value that is wrong, naming the option.
    pub fn take(&mut self, word: &str) -> Result<bool> {
        self.take_value(word).map_err(|e| e.within(format!("mount option {word:?}")))
    }

    fn take_value(&mut self, word: &str) -> Result<bool> {
        match word.split_once('=') {
            None => match word {
                "ro" => self.read_only = true,
                "rw" => self.read_only = false,
                "allow_other" => self.allow_other = Some(true),
                "noallow_other" => self.allow_other = Some(false),
                "default_permissions" => self.default_permissions = true,
                "noexec" => self.no_exec = true,
                "nodelete" => self.no_delete = true,
                _ => return Ok(self.ignore(word)),
            },
            Some(("seal_after", value)) => self.seal_after = Some(parse_time(value)?),
            Some(("max_memory", value)) => self.max_memory = Some(parse_size(value)?),
            Some(("threads", value)) => self.threads = Some(parse_threads(value)?),
            Some(("log", "")) => return Err(invalid("no file")),
            Some(("log", value)) => self.log = Some(PathBuf::from(value)),
            Some(("clones", "")) => return Err(invalid("no folder")),
            Some(("clones", value)) => self.clones = Some(PathBuf::from(value)),
            Some(("gc", "on")) => self.collect = true,
            Some(("gc", "off")) => self.collect = false,
            Some(("promote", "on")) => self.promote = Some(true),
            Some(("promote", "off")) => self.promote = Some(false),
            Some(("gc" | "promote", _)) => return Err(invalid("neither on nor off")),
            Some(_) => return Ok(self.ignore(word)),
        }
        Ok(true)
    }

    fn ignore(&mut self, word: &str) -> bool {
        if word == "exec" {
            self.no_exec = false;
        }
        IGNORED.contains(&word) || IGNORED_BEGINNINGS.iter().any(|beginning| word.starts_with(beginning))
    }
}

/// The options of a list. A comma ends one, unless a backslash stands before it (FUSE's way to write a comma) or it
/// stands in double quotes, which are taken off (mount(8)'s way).
pub fn words(list: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), String::new(), false);
    let mut rest = list.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '\\' if rest.peek() == Some(&',') => word.extend(rest.next()),
            '"' => quoted = !quoted,
            ',' if !quoted => words.push(std::mem::take(&mut word)),
            _ => word.push(c),
        }
    }
    words.push(word);
    words.iter().map(|word| word.trim().to_owned()).filter(|word| !word.is_empty()).collect()
}

/// The list that [`words`] reads as these options.
pub fn list<W: AsRef<str>>(words: &[W]) -> String {
    words.iter().map(|word| word.as_ref().replace(',', "\\,")).collect::<Vec<_>>().join(",")
}

/// Reads a time: a number, with a fraction if need be, and `ms`, `s`, `m` or `h`; without one, seconds.
fn parse_time(text: &str) -> Result<Duration> {
    let wrong = || invalid("not a time like 5s, 500ms or 2m");
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit_seconds = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(wrong()),
    };
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let time = Duration::try_from_secs_f64(number * unit_seconds).map_err(|_| wrong())?;
    if time > SEAL_AFTER_MAX {
        return Err(invalid("more than a year"));
    }
    Ok(time)
}

fn parse_threads(text: &str) -> Result<usize> {
    match text.parse() {
        Ok(count) if (1..=THREADS_MAX).contains(&count) => Ok(count),
        _ => Err(invalid(format!("not a number from 1 to {THREADS_MAX}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn parsed(list: &str) -> MountOptions {
        MountOptions::parse(&[list.to_owned()]).unwrap()
    }

    #[test]
    fn our_options_are_read() {
        let options = parsed(
            "ro,allow_other,default_permissions,noexec,seal_after=1.5s,max_memory=512M,threads=8,log=/var/log/snapfs.log,\
             clones=/var/clones,nodelete,gc=on,promote=off",
        );
        let expected = MountOptions {
            read_only: true,
            allow_other: Some(true),
            default_permissions: true,
            no_exec: true,
            seal_after: Some(Duration::from_millis(1500)),
            max_memory: Some(512 << 20),
            threads: Some(8),
            log: Some(PathBuf::from("/var/log/snapfs.log")),
            clones: Some(PathBuf::from("/var/clones")),
            no_delete: true,
            collect: true,
            promote: Some(false),
        };
        assert_eq!(options, expected);
        assert_eq!(parsed(""), MountOptions::default());
        assert_eq!(MountOptions::parse(&[]).unwrap(), MountOptions::default());
    }

    #[test]
    fn the_last_one_of_a_kind_wins() {
        let lists =
            ["ro,allow_other,noexec,gc=on,threads=2".to_owned(), "rw,noallow_other,exec,gc=off,threads=3".to_owned()];
        let options = MountOptions::parse(&lists).unwrap();
        let expected = MountOptions { allow_other: Some(false), threads: Some(3), ..MountOptions::default() };
        assert_eq!(options, expected);
    }

    #[test]
    fn what_fstab_passes_along_is_accepted() {
        let list = "defaults,rw,nosuid,nodev,relatime,_netdev,nofail,noauto,user,x-systemd.automount,x-initrd.mount,\
                    comment=a b,fsname=store, async ,,";
        assert_eq!(parsed(list), MountOptions::default());
    }

    #[test]
    fn values_may_hold_commas() {
        let table: [(&str, &[&str]); 6] = [
            (r"log=/a\,b,ro", &["log=/a,b", "ro"]),
            (r#"log="/a,b",ro"#, &["log=/a,b", "ro"]),
            (r"log=/a\b\,c", &[r"log=/a\b,c"]),
            (r"comment=x\y #z,ro", &[r"comment=x\y #z", "ro"]),
            (r#"log="/a,b"#, &["log=/a,b"]),
            (" , ro,,", &["ro"]),
        ];
        for (text, expected) in table {
            assert_eq!(words(text), expected, "{text}");
            assert_eq!(words(&list(expected)), expected, "{text}");
        }
    }

    #[test]
    fn times_have_units() {
        let table =
            [("0", 0), ("5", 5000), ("5s", 5000), ("500ms", 500), ("2m", 120_000), ("0.5h", 1_800_000), ("1.5", 1500)];
        for (text, millis) in table {
            assert_eq!(parse_time(text).unwrap(), Duration::from_millis(millis), "{text}");
        }
        for text in ["", "s", "-1s", "5d", "1e9", "5 s", "1.2.3s", "inf", "NaN", "99999999h"] {
            assert_eq!(parse_time(text).unwrap_err().kind(), ErrorKind::Invalid, "{text}");
        }
    }

    #[test]
    fn what_is_unknown_or_wrong_is_named() {
        let lists = [
            "frobnicate",
            "seal_after",
            "seal_after=soon",
            "max_memory=lots",
            "threads=0",
            "threads=257",
            "log=",
            "clones=",
            "gc",
            "gc=yes",
            "promote",
            "promote=yes",
            "nodelete=1",
            "ro=1",
            "allow_root",
            "x",
            "cache=on",
        ];
        for word in lists {
            let refused = MountOptions::parse(&["rw".to_owned(), format!("ro,{word}")]).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Invalid);
            assert!(refused.to_string().contains(&format!("{word:?}")), "{refused}");
        }
    }
}
