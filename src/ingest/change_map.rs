//! What changed since the last snapshot, as `qemu-img map --output=json` lists it: an array of ranges.

use crate::error::{Result, invalid};
use serde::Deserializer as _;
use serde::de::{self, Deserialize, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;

/// The end of the last range may be rounded up to this: tools count sectors.
const SECTOR_BYTES: u64 = 512;

/// The changed ranges of an image: bytes, sorted, apart from each other, none empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChangeMap {
    ranges: Vec<Range>,
}

/// Bytes from `start` to before `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Range {
    start: u64,
    end: u64,
}

impl ChangeMap {
    /// Parses the map of an image of `image_bytes` bytes.
    ///
    /// `text` is a JSON array of objects with `start`, `length` and `data`; other keys are ignored. Where `data` is
    /// true, the image changed; everything else, listed or not, did not. Ranges may overlap and have any order.
    /// Cost: 16 bytes of memory for each changed range that does not continue the one before; sorts them if needed.
    ///
    /// # Errors
    /// `Invalid` if the text is anything else or a range ends past the image; one line, with the number of the entry.
    pub fn parse(text: &[u8], image_bytes: u64) -> Result<Self> {
        let failed = |cause| invalid("change map").because(cause);
        let mut json = serde_json::Deserializer::from_slice(text);
        let mut ranges = json.deserialize_any(EntriesVisitor { image_bytes }).map_err(failed)?;
        json.end().map_err(failed)?;
        ranges.sort_unstable();
        ranges.dedup_by(|next, last| last.absorb(*next));
        Ok(Self { ranges })
    }

    /// Whether anything changed from `start` to before `end`. Nothing did where there are no bytes.
    ///
    /// Cost: a binary search.
    pub fn touches(&self, start: u64, end: u64) -> bool {
        let next = self.ranges.partition_point(|range| range.end <= start);
        start < end && self.ranges.get(next).is_some_and(|range| range.start < end)
    }

    /// Bytes that changed, each counted once.
    pub fn changed_bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }
}

impl Range {
    /// Grows to cover `next` as well if that begins not before this and not after its end.
    fn absorb(&mut self, next: Range) -> bool {
        let reaches = (self.start..=self.end).contains(&next.start);
        if reaches {
            self.end = self.end.max(next.end);
        }
        reaches
    }
}

/// Reads the array entry by entry, so that memory is needed for what changed only.
struct EntriesVisitor {
    image_bytes: u64,
}

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Vec<Range>;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("an array of ranges")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> std::result::Result<Vec<Range>, A::Error> {
        let mut ranges: Vec<Range> = Vec::new();
        let end_max = self.image_bytes.checked_next_multiple_of(SECTOR_BYTES).unwrap_or(u64::MAX);
        for index in 0_u64.. {
            let within = |cause: &dyn fmt::Display| de::Error::custom(format_args!("entry {index}: {cause}"));
            let Some(entry) = entries.next_element::<Entry>().map_err(|error| within(&error))? else {
                break;
            };
            let Entry { start, length, changed } = entry;
            let Some(end) = start.checked_add(length).filter(|end| *end <= end_max) else {
                let size = self.image_bytes;
                return Err(within(&format_args!("past the image, start={start} length={length} image={size}")));
            };
            let range = Range { start, end: end.min(self.image_bytes) };
            let continues = |last: &mut Range| last.absorb(range);
            if changed && range.start < range.end && !ranges.last_mut().is_some_and(continues) {
                ranges.push(range);
            }
        }
        Ok(ranges)
    }
}

/// One object of the array.
struct Entry {
    start: u64,
    length: u64,
    changed: bool,
}

// By hand, because the derived code takes an array of three values for an entry, too.
impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: de::Deserializer<'de>>(json: D) -> std::result::Result<Self, D::Error> {
        json.deserialize_any(EntryVisitor)
    }
}

struct EntryVisitor;

impl<'de> Visitor<'de> for EntryVisitor {
    type Value = Entry;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("an object with start, length and data")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut keys: A) -> std::result::Result<Entry, A::Error> {
        let mut start = None;
        let mut length = None;
        let mut changed = None;
        while let Some(key) = keys.next_key::<Key>()? {
            match key {
                Key::Start => set_once(&mut start, "start", &mut keys)?,
                Key::Length => set_once(&mut length, "length", &mut keys)?,
                Key::Data => set_once(&mut changed, "data", &mut keys)?,
                Key::Other => drop(keys.next_value::<IgnoredAny>()?),
            }
        }
        Ok(Entry {
            start: start.ok_or_else(|| de::Error::missing_field("start"))?,
            length: length.ok_or_else(|| de::Error::missing_field("length"))?,
            changed: changed.ok_or_else(|| de::Error::missing_field("data"))?,
        })
    }
}

/// Takes the value of the key `name` into `slot`; a second one is refused, because readers differ on which counts.
fn set_once<'de, T: Deserialize<'de>, A: MapAccess<'de>>(
    slot: &mut Option<T>,
    name: &'static str,
    keys: &mut A,
) -> std::result::Result<(), A::Error> {
    if slot.is_some() {
        return Err(de::Error::duplicate_field(name));
    }
    let value = keys.next_value().map_err(|error| de::Error::custom(format_args!("{name}: {error}")))?;
    *slot = Some(value);
    Ok(())
}

/// The keys that count.
#[derive(serde::Deserialize)]
#[serde(rename_all = "lowercase")]
enum Key {
    Start,
    Length,
    Data,
    #[serde(other)]
    Other,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn map_of(ranges: &[(u64, u64, bool)]) -> String {
        let entry = |(start, length, data): &(u64, u64, bool)| {
            format!(r#"{{ "start": {start}, "length": {length}, "depth": 0, "zero": false, "data": {data}}}"#)
        };
        format!("[{}]\n", ranges.iter().map(entry).collect::<Vec<_>>().join(",\n"))
    }

    fn parsed(ranges: &[(u64, u64, bool)], image_bytes: u64) -> Vec<(u64, u64)> {
        let map = ChangeMap::parse(map_of(ranges).as_bytes(), image_bytes).unwrap();
        map.ranges.iter().map(|range| (range.start, range.end)).collect()
    }

    #[test]
    fn the_output_of_qemu_img_is_read() {
        let text = br#"[{ "start": 0, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true, "compressed": false, "offset": 327680},
{ "start": 65536, "length": 983040, "depth": 0, "present": false, "zero": true, "data": false, "compressed": false}]
"#;
        let map = ChangeMap::parse(text, MIB).unwrap();
        assert_eq!(map.changed_bytes(), 65536);
        assert!(map.touches(0, 4096) && map.touches(65535, 65536) && map.touches(0, MIB));
        assert!(!map.touches(65536, MIB));
    }

    #[test]
    fn nothing_listed_means_nothing_changed() {
        for text in ["[]", " [ ]\n", r#"[{"start": 0, "length": 1048576, "data": false}]"#] {
            let map = ChangeMap::parse(text.as_bytes(), MIB).unwrap();
            assert_eq!((map.changed_bytes(), map.touches(0, u64::MAX)), (0, false), "{text}");
        }
        assert_eq!(ChangeMap::parse(b"[]", 0).unwrap(), ChangeMap::default());
    }

    #[test]
    fn ranges_are_merged_whatever_their_order() {
        assert_eq!(parsed(&[(0, 10, true), (10, 10, true), (20, 5, true)], 100), [(0, 25)]);
        assert_eq!(parsed(&[(20, 5, true), (0, 10, true), (10, 9, true)], 100), [(0, 19), (20, 25)]);
        assert_eq!(parsed(&[(50, 10, true), (0, 100, true), (70, 1, true)], 100), [(0, 100)]);
        assert_eq!(parsed(&[(5, 10, true), (0, 6, true), (5, 10, true)], 100), [(0, 15)]);
        // Changed wins over unchanged, whichever comes first.
        assert_eq!(parsed(&[(0, 50, true), (0, 100, false)], 100), [(0, 50)]);
        assert_eq!(parsed(&[(0, 100, false), (10, 20, true)], 100), [(10, 30)]);
        // Empty ranges are no ranges, wherever they are.
        assert_eq!(parsed(&[(0, 0, true), (50, 0, true), (100, 0, true), (3, 1, true)], 100), [(3, 4)]);
    }

    #[test]
    fn a_search_hits_exactly_the_changed_bytes() {
        let map = ChangeMap::parse(map_of(&[(10, 10, true), (30, 1, true)]).as_bytes(), 100).unwrap();
        assert_eq!(map.changed_bytes(), 11);
        let changed = |at: u64| (10..20).contains(&at) || at == 30;
        for start in 0..50 {
            for end in 0..50 {
                assert_eq!(map.touches(start, end), (start..end).any(changed), "{start}..{end}");
            }
        }
    }

    #[test]
    fn a_range_ends_with_the_last_sector_of_the_image() {
        assert_eq!(parsed(&[(0, 1024, true)], 1000), [(0, 1000)]);
        assert_eq!(parsed(&[(1000, 24, true)], 1000), []);
        assert_eq!(parsed(&[(0, u64::MAX, true)], u64::MAX), [(0, u64::MAX)]);
        for (start, length) in [(0, 1025), (1024, 1), (1025, 0), (u64::MAX, 1), (u64::MAX, u64::MAX)] {
            for data in [true, false] {
                let error = ChangeMap::parse(map_of(&[(0, 1, true), (start, length, data)]).as_bytes(), 1000);
                let message = error.unwrap_err().to_string();
                let expected = format!("entry 1: past the image, start={start} length={length} image=1000");
                assert!(message.contains(&expected), "{message}");
            }
        }
    }

    #[test]
    fn anything_else_is_refused_in_one_line() {
        let cases: [(&str, &str); 26] = [
            ("", "EOF"),
            ("no json", "expected"),
            ("{}", "expected an array of ranges"),
            ("null", "expected an array of ranges"),
            ("3", "expected an array of ranges"),
            ("[", "entry 0: EOF"),
            ("[]]", "trailing"),
            ("[] []", "trailing"),
            ("[3]", "entry 0: invalid type: integer `3`, expected an object"),
            ("[[0, 5, true]]", "entry 0: invalid type: sequence, expected an object"),
            ("[{}]", "entry 0: missing field `start`"),
            (r#"[{"data": true}]"#, "entry 0: missing field `start`"),
            (r#"[{"start": 0, "data": true}]"#, "entry 0: missing field `length`"),
            (r#"[{"start": 0, "length": 5}]"#, "entry 0: missing field `data`"),
            (r#"[{"start": -1, "length": 5, "data": true}]"#, "entry 0: start: invalid value: integer `-1`"),
            (r#"[{"start": 0, "length": -5, "data": true}]"#, "entry 0: length: invalid value: integer `-5`"),
            (r#"[{"start": 0, "length": 99999999999999999999, "data": true}]"#, "entry 0: length: "),
            (r#"[{"start": 0.5, "length": 5, "data": true}]"#, "entry 0: start: "),
            (r#"[{"start": 1e3, "length": 5, "data": true}]"#, "entry 0: start: "),
            (r#"[{"start": "0", "length": 5, "data": true}]"#, "entry 0: start: "),
            (r#"[{"start": null, "length": 5, "data": true}]"#, "entry 0: start: "),
            (r#"[{"start": 0, "length": 5, "data": 1}]"#, "entry 0: data: "),
            (r#"[{"start": 0, "length": 5, "data": "true"}]"#, "entry 0: data: "),
            (r#"[{"start": 0, "start": 0, "length": 5, "data": true}]"#, "entry 0: duplicate field `start`"),
            (r#"[{"start": 0, "length": 5, "data": true},]"#, "entry 1: trailing comma"),
            (r#"[{"start": 0, "length": 5, "data": true} {"start"#, "entry 1: expected `,` or `]`"),
        ];
        for (text, expected) in cases {
            let error = ChangeMap::parse(text.as_bytes(), MIB).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{text}");
            let message = error.to_string();
            assert!(message.starts_with("change map: "), "{text}: {message}");
            assert!(message.contains(expected), "{text}: {message}");
            assert!(!message.contains(char::is_control), "{text}: {message}");
        }
        assert!(ChangeMap::parse(b"[{\"\xff\": 1}]", MIB).is_err());
        assert!(ChangeMap::parse("[".repeat(1 << 20).as_bytes(), MIB).is_err());
    }

    #[test]
    fn other_keys_may_hold_anything() {
        let text =
            r#"[{"x": {"start": -1, "y": [[], {}]}, "start": 1, "z": "a\n", "length": 2, "": null, "data": true}]"#;
        assert_eq!(ChangeMap::parse(text.as_bytes(), MIB).unwrap().changed_bytes(), 2);
    }

    #[test]
    fn every_truncation_is_refused() {
        let text = map_of(&[(0, 4096, true), (4096, 4096, false), (8192, 512, true)]);
        let text = text.trim_end();
        for len in 0..text.len() {
            assert!(ChangeMap::parse(&text.as_bytes()[..len], MIB).is_err(), "{len} bytes");
        }
        assert_eq!(ChangeMap::parse(text.as_bytes(), MIB).unwrap().changed_bytes(), 4608);
    }

    proptest! {
        #[test]
        fn the_map_equals_a_bitmap(
            ranges in prop::collection::vec((0..64_u64, 0..20_u64, any::<bool>()), 0..12),
            start in 0..70_u64,
            end in 0..70_u64,
        ) {
            let ranges: Vec<_> = ranges.into_iter().map(|(s, l, d)| (s, l.min(64 - s), d)).collect();
            let map = ChangeMap::parse(map_of(&ranges).as_bytes(), 64).unwrap();
            let changed = |at: u64| ranges.iter().any(|(s, l, d)| *d && (*s..s + l).contains(&at));
            prop_assert_eq!(map.changed_bytes(), (0..64).filter(|at| changed(*at)).count() as u64);
            prop_assert_eq!(map.touches(start, end), (start..end).any(changed));
            prop_assert!(map.ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        }

        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..200), image_bytes: u64) {
            let _ = ChangeMap::parse(&bytes, image_bytes);
        }
    }
}
