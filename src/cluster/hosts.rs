//! The hosts file of a job: one `ADDRESS:PORT` a line, line N (from 0) being host N.

use crate::error::{Result, invalid};
use crate::limits::HOSTS_MAX;

/// The hosts of a job, and which of them this is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hosts {
    addresses: Vec<String>,
    index: usize,
}

impl Hosts {
    /// Reads a hosts file. Empty lines at its end do not count.
    ///
    /// # Errors
    /// `Invalid` for a line that is no `ADDRESS:PORT`, an address twice, no host, more than [`HOSTS_MAX`], or an index
    /// without a line.
    pub fn parse(text: &str, index: usize) -> Result<Self> {
        let mut addresses: Vec<String> = Vec::new();
        for (at, line) in text.trim_end().lines().enumerate() {
            let line = line.trim_end();
            let port =
                line.rsplit_once(':').filter(|(host, _)| !host.is_empty() && !host.contains(char::is_whitespace));
            if port.is_none_or(|(_, port)| port.parse::<u16>().map_or(true, |port| port == 0)) {
                return Err(invalid(format!("hosts file: line {} is no ADDRESS:PORT, found={line:?}", at + 1)));
            }
            if addresses.iter().any(|known| known == line) {
                return Err(invalid(format!(
                    "hosts file: line {} has an address a second time, found={line:?}",
                    at + 1
                )));
            }
            if addresses.len() >= HOSTS_MAX {
                return Err(invalid(format!("hosts file: has more than {HOSTS_MAX} hosts")));
            }
            addresses.push(line.to_owned());
        }
        if index >= addresses.len() {
            let lines = addresses.len();
            return Err(invalid(format!("hosts file: has no line for index {index}, hosts={lines}, counted from 0")));
        }
        Ok(Self { addresses, index })
    }

    /// The addresses, in order.
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// Which of them this is.
    pub fn index(&self) -> usize {
        self.index
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.addresses.len()
    }

    /// A host for messages.
    pub fn name(&self, index: usize) -> String {
        format!("host {index} ({})", self.addresses.get(index).map_or("?", String::as_str))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_line_is_a_host() {
        let hosts = Hosts::parse("10.0.0.1:7000\nb.example:7001\n[::1]:7002\n\n", 1).unwrap();
        assert_eq!((hosts.count(), hosts.index()), (3, 1));
        assert_eq!(hosts.name(2), "host 2 ([::1]:7002)");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let refused = |text: &str, index, want: &str| {
            let error = Hosts::parse(text, index).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(want), "{error}");
        };
        refused("", 0, "no line for index 0");
        refused("a:1\n", 1, "no line for index 1");
        refused("a:1\na:1\n", 0, "a second time");
        for line in ["a", ":7", "a:", "a:0", "a:70000", "a b:7", "a:7 b:8"] {
            refused(&format!("ok:1\n{line}\n"), 0, "line 2 is no ADDRESS:PORT");
        }
        let many: String = (0..=HOSTS_MAX).map(|n| format!("a{n}:1\n")).collect();
        refused(&many, 0, "more than");
    }
}
