//! What commands print: text and tables and JSON on standard output, messages and progress bars on standard error.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use jiff::tz::TimeZone;
use serde::Serialize;

use crate::cli::Stop;
use crate::clock::Timestamp;
use crate::error::{Error, corrupt};
use crate::limits::BLOCK_BYTES;
use crate::recipe::Tally;

/// Prints text as it is.
///
/// # Errors
/// An end without a message when nobody reads any more (EPIPE); else what writing met.
pub fn print(text: &str) -> Result<(), Stop> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Err(Stop::quiet()),
        Err(e) => Err(Error::io("standard output", e).into()),
    }
}

/// Prints a line.
///
/// # Errors
/// As [`print()`].
pub fn line(text: impl AsRef<str>) -> Result<(), Stop> {
    print(&format!("{}\n", text.as_ref()))
}

/// Prints one JSON document.
///
/// # Errors
/// As [`print()`].
pub fn json(value: &impl Serialize) -> Result<(), Stop> {
    let text = serde_json::to_string_pretty(value).map_err(|e| corrupt("JSON").because(e))?;
    line(text)
}

/// A message on standard error. Where that is closed, there is nobody to tell.
pub fn message(text: impl std::fmt::Display) {
    let text = text.to_string();
    let plain: String = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let _ = writeln!(io::stderr(), "snapfs: {plain}");
}

/// A size for people: `12.3 MiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [(&str, u32); 5] = [("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in UNITS {
        if bytes >= 1 << shift {
            return format!("{:.1} {unit}", bytes as f64 / (1u64 << shift) as f64);
        }
    }
    format!("{bytes} B")
}

/// What a file is, in words.
pub fn state(is_sealed: bool, is_protected: bool, is_damaged: bool) -> String {
    let flags = [(is_sealed, "sealed"), (!is_sealed, "draft"), (is_protected, "protected"), (is_damaged, "damaged")];
    flags.into_iter().filter(|(on, _)| *on).map(|(_, name)| name).collect::<Vec<_>>().join(", ")
}

/// Seconds of a point in time as ISO 8601, UTC.
pub fn time(at: Timestamp) -> String {
    let seconds = i64::try_from(at.seconds()).unwrap_or(i64::MAX);
    match jiff::Timestamp::from_second(seconds) {
        Ok(time) => time.to_string(),
        Err(_) => format!("@{seconds}"),
    }
}

/// Minutes of a point in time in a time zone, with its offset: `2026-11-22 19:14 +01:00`.
pub fn local_time(at: Timestamp, zone: &TimeZone) -> String {
    let seconds = i64::try_from(at.seconds()).unwrap_or(i64::MAX);
    match jiff::Timestamp::from_second(seconds) {
        Ok(time) => time.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M %:z").to_string(),
        Err(_) => format!("@{seconds}"),
    }
}

/// A table: the first column to the left, as are those named in `left`; the others to the right.
pub fn table(header: &[&str], left: &[usize], rows: &[Vec<String>]) -> String {
    let width_of = |text: &str| text.chars().count();
    let mut widths: Vec<usize> = header.iter().map(|h| width_of(h)).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(width_of(cell));
        }
    }
    let mut text = String::new();
    let mut add = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for (column, (cell, width)) in cells.zip(&widths).enumerate() {
            let pad = " ".repeat(width - width_of(cell).min(*width));
            let gap = if column == 0 { "" } else { "  " };
            if column == 0 || left.contains(&column) {
                line.push_str(&format!("{gap}{cell}{pad}"));
            } else {
                line.push_str(&format!("{gap}{pad}{cell}"));
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    };
    add(&mut header.iter().copied());
    for row in rows {
        add(&mut row.iter().map(String::as_str));
    }
    text
}

/// What each level of deduplication took, in bytes of the image.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Levels {
    /// Level 0: zeros and holes.
    pub zero_bytes: u64,
    /// Level 1: segments that are unchanged since the parent.
    pub unchanged_bytes: u64,
    /// Level 2: same content at the same place.
    pub same_place_bytes: u64,
    /// Level 2: found elsewhere in the VM's history.
    pub similar_bytes: u64,
    /// Level 2: found in the snapshot itself.
    pub repeated_bytes: u64,
    /// Level 3: popular data.
    pub popular_bytes: u64,
    /// What was left.
    pub new_bytes: u64,
    /// The same after compression: what the store grew by, but for metadata.
    pub stored_bytes: u64,
}

impl Levels {
    /// The levels of an image.
    pub fn of(image_bytes: u64, tally: &Tally) -> Self {
        let bytes = |blocks: u64| blocks.saturating_mul(BLOCK_BYTES as u64);
        Self {
            zero_bytes: image_bytes.saturating_sub(bytes(tally.blocks_data)),
            unchanged_bytes: bytes(tally.blocks_unchanged),
            same_place_bytes: bytes(tally.blocks_same_place),
            similar_bytes: bytes(tally.blocks_similar),
            repeated_bytes: bytes(tally.blocks_repeated),
            popular_bytes: bytes(tally.blocks_popular),
            new_bytes: bytes(tally.blocks_new),
            stored_bytes: tally.bytes_stored,
        }
    }

    /// One row a level: what it is, and its bytes.
    pub fn rows(&self) -> [(&'static str, u64); 8] {
        [
            ("zeros and holes (level 0)", self.zero_bytes),
            ("unchanged segments (level 1)", self.unchanged_bytes),
            ("same place (level 2)", self.same_place_bytes),
            ("elsewhere in the VM (level 2)", self.similar_bytes),
            ("repeated in the image (level 2)", self.repeated_bytes),
            ("popular (level 3)", self.popular_bytes),
            ("new", self.new_bytes),
            ("stored after compression", self.stored_bytes),
        ]
    }
}

/// A progress bar, where standard error is a terminal and a person reads along.
pub struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    /// A bar of `total` bytes, or one that only says that something is done. With `is_quiet` there is none.
    pub fn new(what: &'static str, total: Option<u64>, is_quiet: bool) -> Self {
        if is_quiet || !io::stderr().is_terminal() {
            return Self { bar: None };
        }
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
        let template = match total {
            Some(_) => "{msg} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
            None => "{msg} {spinner} {elapsed}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what);
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar: Some(bar) }
    }

    /// So many bytes more are done.
    pub fn add(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
    }

    /// So many bytes are done in all.
    pub fn set(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(bytes);
        }
    }

    /// There are so many bytes in all.
    pub fn set_total(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(bytes);
        }
    }

    /// What is being done.
    pub fn note(&self, text: impl FnOnce() -> String) {
        if let Some(bar) = &self.bar {
            bar.set_message(text());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        let shown: Vec<_> = [0, 1023, 1024, 1536, 5 << 20, 3 << 40].map(size).into();
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "3.0 TiB"]);
    }

    #[test]
    fn times_are_iso_8601() {
        assert_eq!(time(Timestamp(0)), "1970-01-01T00:00:00Z");
        assert_eq!(time(Timestamp(1_795_371_243_999_999_999)), "2026-11-22T18:14:03Z");
        assert!(!time(Timestamp(u64::MAX)).is_empty());
        let zone = TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap();
        assert_eq!(local_time(Timestamp(1_795_371_243_999_999_999), &zone), "2026-11-22 19:14 +01:00");
    }

    #[test]
    fn a_table_is_aligned() {
        let rows = [
            vec!["a".to_owned(), "1".to_owned(), "x".to_owned()],
            vec!["bb".to_owned(), "22".to_owned(), String::new()],
        ];
        assert_eq!(table(&["name", "n", "to"], &[2], &rows), "name   n  to\na      1  x\nbb    22\n");
    }
}
