//! `snapfs settings`: what is set in a store, for all who use it.

use std::time::Duration;

use crate::cli::store_arg::StoreArg;
use crate::cli::{DONE, Outcome, output};
use crate::clock::in_words;
use crate::error::{Result, invalid};
use crate::store::config::Settings as Values;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Settings:
  min_age=TIME   a sealed snapshot is not forgotten before the store has had it for so long; 0 for no such limit
  gc_grace=TIME  what was forgotten is not collected for so long: for readers on other hosts, where the file system
                 keeps locks to each host; 0 where locks are seen by all

Examples:
  snapfs settings /srv/snapfs
  snapfs settings /srv/snapfs min_age=7d gc_grace=1h";

/// A time over a century is a mistake.
const SECONDS_MAX: u64 = 100 * 366 * 86400;

/// Arguments of `settings`.
#[derive(Debug, clap::Args)]
pub struct Settings {
    #[command(flatten)]
    store: StoreArg,

    /// What to change: NAME=VALUE; without any, what is set is told
    #[arg(value_name = "SETTING", value_parser = parse_change)]
    changes: Vec<Change>,

    /// Report in JSON
    #[arg(long)]
    json: bool,
}

/// One setting to be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    MinAge(u64),
    GcGrace(u64),
}

impl Settings {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`crate::store::Store::change_settings`].
    pub fn run(&self) -> Outcome {
        let store = self.store.open()?;
        let values = if self.changes.is_empty() {
            store.settings()?
        } else {
            store.change_settings(|values| {
                self.changes.iter().for_each(|change| change.apply(values));
                Ok(())
            })?
        };
        if self.json {
            output::json(&values)?;
        } else {
            for (name, seconds) in [("min_age", values.min_age_seconds), ("gc_grace", values.gc_grace_seconds)] {
                let words = in_words(Duration::from_secs(seconds));
                output::line(format!("{name}={}", words.replace(' ', "")))?;
            }
        }
        Ok(DONE)
    }
}

impl Change {
    fn apply(self, values: &mut Values) {
        match self {
            Self::MinAge(seconds) => values.min_age_seconds = seconds,
            Self::GcGrace(seconds) => values.gc_grace_seconds = seconds,
        }
    }
}

fn parse_change(text: &str) -> Result<Change> {
    match text.split_once('=') {
        Some(("min_age", value)) => Ok(Change::MinAge(parse_length(value)?)),
        Some(("gc_grace", value)) => Ok(Change::GcGrace(parse_length(value)?)),
        Some((name, _)) => Err(invalid(format!("there is no setting {name:?}"))),
        None => Err(invalid("not of the form NAME=VALUE")),
    }
}

/// Reads a length of time in seconds: numbers with `s`, `m`, `h`, `d` or `w` one after the other, as in `1d12h`; or 0.
fn parse_length(text: &str) -> Result<u64> {
    let wrong = || invalid(format!("{text:?} is not a time like 7d, 36h or 1d12h"));
    if text == "0" {
        return Ok(0);
    }
    let mut rest = text;
    let mut seconds: u64 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (number, tail) = rest.split_at(digits);
        let (unit, tail) = tail.split_at_checked(1).ok_or_else(wrong)?;
        let unit_seconds = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86400,
            "w" => 7 * 86400,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        seconds = number.checked_mul(unit_seconds).and_then(|more| seconds.checked_add(more)).ok_or_else(wrong)?;
        rest = tail;
    }
    match seconds {
        _ if text.is_empty() => Err(wrong()),
        0..=SECONDS_MAX => Ok(seconds),
        _ => Err(invalid("more than a century")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_have_units_and_come_back() {
        let table = [("0", 0), ("0d", 0), ("7d", 604_800), ("36h", 129_600), ("1d12h", 129_600), ("2w", 1_209_600)];
        for (text, seconds) in table {
            assert_eq!(parse_length(text).unwrap(), seconds, "{text}");
            let words = in_words(Duration::from_secs(seconds)).replace(' ', "");
            assert_eq!(parse_length(&words).unwrap(), seconds, "{words}");
        }
        for text in ["", "7", "d", "7x", "-1d", "1.5d", "7d ", "7é", "99999999999999999999d", "101w52", "9999999h"] {
            assert!(parse_length(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_setting_that_is_unknown_is_named() {
        assert_eq!(parse_change("min_age=7d").unwrap(), Change::MinAge(604_800));
        assert_eq!(parse_change("gc_grace=1h").unwrap(), Change::GcGrace(3600));
        for text in ["min_age", "min-age=7d", "=7d", "colour=blue"] {
            assert!(parse_change(text).is_err(), "{text}");
        }
    }
}
