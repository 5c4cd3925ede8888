//! The configuration of this host, `/etc/snapfs/snapfs.toml`: what commands take where they are told nothing.
//!
//! All keys are optional, and so is the file. A store's own configuration lies in the store.

use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Result, invalid};

/// The variable that names another file.
pub const CONFIG_VARIABLE: &str = "SNAPFS_CONFIG";

const PATH: &str = "/etc/snapfs/snapfs.toml";

/// The file is a page of text.
const BYTES_MAX: u64 = 64 << 10;

/// What the file says. `None`: nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// The store that `snapfs mount` mounts.
    pub store: Option<PathBuf>,
    /// Where it is mounted, and where names of snapshots without a path are looked for.
    pub mountpoint: Option<PathBuf>,
    /// The folder of writable clones.
    pub clones: Option<PathBuf>,
}

impl HostConfig {
    /// Reads the configuration of this host; it is empty when there is no such file.
    ///
    /// # Errors
    /// `Invalid`, naming the file and the key; `Denied`, `Unavailable`.
    pub fn read() -> Result<Self> {
        Self::read_from(&file())
    }

    /// Reads a file; a missing one is empty.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_from(path: &Path) -> Result<Self> {
        let about = path.display().to_string();
        let file = match std::fs::File::open(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            opened => opened.map_err(|e| Error::io(&about, e))?,
        };
        let mut bytes = Vec::new();
        file.take(BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|e| Error::io(&about, e))?;
        if bytes.len() as u64 > BYTES_MAX {
            return Err(invalid(format!("{about}: has more than {BYTES_MAX} bytes")));
        }
        let text = std::str::from_utf8(&bytes).map_err(|e| invalid(&about).because(e))?;
        Self::parse(text).map_err(|e| e.within(about))
    }

    /// Reads the text of the file.
    ///
    /// # Errors
    /// `Invalid`, naming the line or the key.
    pub fn parse(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text).map_err(|e| invalid(one_line(&e, text)))?;
        let paths = [("store", &config.store), ("mountpoint", &config.mountpoint), ("clones", &config.clones)];
        for (key, path) in paths {
            // Relative to what? A service and a shell would not agree.
            if path.as_ref().is_some_and(|path| !path.is_absolute()) {
                return Err(invalid(format!("{key}: must be an absolute path")));
            }
        }
        Ok(config)
    }
}

/// The file that [`HostConfig::read`] reads.
pub fn file() -> PathBuf {
    file_of(std::env::var_os(CONFIG_VARIABLE))
}

fn file_of(variable: Option<OsString>) -> PathBuf {
    variable.filter(|path| !path.is_empty()).map_or_else(|| PathBuf::from(PATH), PathBuf::from)
}

fn one_line(error: &toml::de::Error, text: &str) -> String {
    let message = error.message().replace('\n', ", ");
    match error.span().and_then(|span| text.get(..span.start)) {
        Some(before) => format!("line {}: {message}", before.matches('\n').count() + 1),
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn all_keys_are_optional() {
        let text = "# of this host\nstore = \"/srv/snapfs\"\nmountpoint = '/mnt/my snapfs'\nclones = \"/var/clones\"\n";
        let expected = HostConfig {
            store: Some(PathBuf::from("/srv/snapfs")),
            mountpoint: Some(PathBuf::from("/mnt/my snapfs")),
            clones: Some(PathBuf::from("/var/clones")),
        };
        assert_eq!(HostConfig::parse(text).unwrap(), expected);
        assert_eq!(HostConfig::parse("").unwrap(), HostConfig::default());
        let one = HostConfig::parse("mountpoint = '/mnt/s'").unwrap();
        assert_eq!(one, HostConfig { mountpoint: Some(PathBuf::from("/mnt/s")), ..HostConfig::default() });
    }

    #[test]
    fn what_is_unknown_or_wrong_is_named_in_one_line() {
        let table = [
            ("store = '/s'\ncolour = 'red'", "colour"),
            ("[mount]\nstore = '/s'", "mount"),
            ("store = 7", "line 1"),
            ("store = '/s'\nstore = '/t'", "line 2"),
            ("# x\n\nmountpoint", "line 3"),
            ("clones = 'relative/path'", "clones"),
            ("store = ''", "store"),
        ];
        for (text, word) in table {
            let refused = HostConfig::parse(text).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Invalid, "{text}");
            let said = refused.to_string();
            assert!(said.contains(word) && !said.contains('\n'), "{text:?}: {said:?}");
        }
    }

    #[test]
    fn a_missing_file_is_empty_and_a_wrong_one_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("host.toml");
        assert_eq!(HostConfig::read_from(&path).unwrap(), HostConfig::default());
        for bytes in [&b"\xff"[..], b"x = 1", &[b'#'; BYTES_MAX as usize + 1]] {
            std::fs::write(&path, bytes).unwrap();
            let refused = HostConfig::read_from(&path).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Invalid);
            assert!(refused.to_string().contains("host.toml"), "{refused}");
        }
        assert!(HostConfig::read_from(folder.path()).is_err());
    }

    #[test]
    fn the_variable_names_another_file() {
        assert_eq!(file_of(Some("/tmp/x".into())), Path::new("/tmp/x"));
        for none in [None, Some(OsString::new())] {
            assert_eq!(file_of(none), Path::new("/etc/snapfs/snapfs.toml"));
        }
    }
}
