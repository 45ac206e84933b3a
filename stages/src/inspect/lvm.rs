//! LVM2: which logical volumes a physical volume holds, and where their bytes are, as far as they are linear.
//!
//! Source: lvm2, `lib/format_text/layout.h` and `lib/label/label.h`. The metadata is text in a ring buffer; of it only names, extents and linear segments are
//! read. What is striped, mirrored, thin, cached, or partly on another disk is named and not looked into.

use std::collections::BTreeMap;

use super::looking::{Part, le};
use crate::{text::printable, units::to_usize};

/// Longest metadata text that is read: LVM's own default area is 1 MiB.
const TEXT_BYTES_MAX: u64 = 1 << 20;
/// Deepest nesting, most values: what LVM writes has 4 levels.
const DEPTH_MAX: usize = 8;
const VALUES_MAX: usize = 50_000;
/// Logical volumes that are looked at.
const VOLUMES_MAX: usize = 64;
const SEGMENTS_MAX: usize = 4096;

/// A volume group, as one of its physical volumes tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// Its volumes.
    pub volumes: Vec<Volume>,
}

/// A logical volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Its length, bytes.
    pub bytes: u64,
    /// Where its bytes are in the physical volume: from, how many; `None` where they are not simply there.
    pub segments: Option<Vec<(u64, u64)>>,
}

/// Reads the group that a physical volume belongs to.
///
/// # Errors
/// Why it cannot be told.
pub fn read(part: &Part<'_>) -> Result<Group, String> {
    let head = part.get(0, 2048).ok_or("the first sectors cannot be read")?;
    let is_label = |sector: &&[u8]| &sector[..8] == b"LABELONE" && &sector[24..32] == b"LVM2 001";
    let sector = head.chunks_exact(512).find(is_label).ok_or("there is no label")?;
    let header = to_usize(le(sector, 20, 4));
    let header = sector.get(header..).filter(|header| header.len() >= 40).ok_or("the label points out of its sector")?;
    let own_id = String::from_utf8_lossy(&header[..32]).into_owned();
    // two lists of places, each ended by a zero: data areas, metadata areas
    let mut places = header[40..].chunks_exact(16).map(|place| (le(place, 0, 8), le(place, 8, 8)));
    places.by_ref().find(|place| place.0 == 0).ok_or("the list of data areas has no end")?;
    let (area, area_bytes) = places.next().filter(|place| place.0 != 0).ok_or("this physical volume holds no metadata")?;
    let text = metadata(part, area, area_bytes)?;
    group(&text, &own_id)
}

fn metadata(part: &Part<'_>, area: u64, area_bytes: u64) -> Result<String, String> {
    let header = part.get(area, 512).ok_or("the metadata area cannot be read")?;
    if &header[4..20] != b"\x20LVM2\x20x[5A%r0N*>" {
        return Err("the metadata area has no header".to_owned());
    }
    let (offset, bytes, flags) = (le(&header, 40, 8), le(&header, 48, 8), le(&header, 60, 4));
    if offset == 0 || bytes == 0 || flags & 1 != 0 {
        return Err("there is no metadata in its area".to_owned());
    }
    if bytes > TEXT_BYTES_MAX || bytes > area_bytes || offset >= area_bytes {
        return Err("the metadata is larger than its area".to_owned());
    }
    // a ring behind the header
    let first = bytes.min(area_bytes - offset);
    let text_at = area.checked_add(offset).ok_or("the metadata lies beyond all disks")?;
    let mut text = part.get(text_at, to_usize(first)).ok_or("the metadata cannot be read")?;
    if first < bytes {
        text.extend(part.get(area.saturating_add(512), to_usize(bytes - first)).ok_or("the metadata cannot be read")?);
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// A value of LVM's configuration language.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Number(u64),
    Text(String),
    List(Vec<Value>),
    Section(BTreeMap<String, Value>),
}

impl Value {
    fn get(&self, key: &str) -> Option<&Self> {
        match self {
            Self::Section(entries) => entries.get(key),
            _ => None,
        }
    }

    fn number(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Self::Number(number) => Some(*number),
            _ => None,
        }
    }

    fn text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    fn sections(&self, key: &str) -> impl Iterator<Item = (&String, &Self)> {
        let entries = match self.get(key) {
            Some(Self::Section(entries)) => Some(entries),
            _ => None,
        };
        entries.into_iter().flatten().filter(|(_, value)| matches!(value, Self::Section(_)))
    }
}

struct Parser<'a> {
    rest: &'a str,
    values: usize,
}

impl<'a> Parser<'a> {
    fn space(&mut self) {
        loop {
            self.rest = self.rest.trim_start_matches(|c: char| c.is_whitespace() || c == '\0');
            match self.rest.strip_prefix('#') {
                Some(comment) => self.rest = comment.split_once('\n').map_or("", |(_, rest)| rest),
                None => return,
            }
        }
    }

    fn take(&mut self, c: char) -> bool {
        self.space();
        match self.rest.strip_prefix(c) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn word(&mut self) -> Option<&'a str> {
        self.space();
        let end = self.rest.find(|c: char| !(c.is_alphanumeric() || "_.-+/".contains(c))).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        (!word.is_empty()).then_some(word)
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        self.values += 1;
        if self.values > VALUES_MAX || depth > DEPTH_MAX {
            return None;
        }
        if self.take('"') {
            let mut text = String::new();
            let mut chars = self.rest.char_indices();
            while let Some((at, c)) = chars.next() {
                match c {
                    '"' => {
                        self.rest = &self.rest[at + 1..];
                        return Some(Value::Text(text));
                    }
                    '\\' => text.push(chars.next()?.1),
                    c => text.push(c),
                }
            }
            return None;
        }
        if self.take('[') {
            let mut list = Vec::new();
            while !self.take(']') {
                list.push(self.value(depth + 1)?);
                self.take(',');
            }
            return Some(Value::List(list));
        }
        let word = self.word()?;
        Some(word.parse().map_or_else(|_| Value::Text(word.to_owned()), Value::Number))
    }

    fn section(&mut self, depth: usize) -> Option<BTreeMap<String, Value>> {
        let mut entries = BTreeMap::new();
        loop {
            self.space();
            if self.rest.is_empty() || (depth > 0 && self.take('}')) {
                return Some(entries);
            }
            self.values += 1;
            let key = self.word()?.to_owned();
            let value = if self.take('=') {
                self.value(depth)?
            } else if self.take('{') && depth < DEPTH_MAX && self.values < VALUES_MAX {
                Value::Section(self.section(depth + 1)?)
            } else {
                return None;
            };
            entries.insert(key, value);
        }
    }
}

/// Reads a group's metadata text; `own_id`: the physical volume's, without hyphens.
///
/// # Errors
/// Why it cannot be told.
pub fn group(text: &str, own_id: &str) -> Result<Group, String> {
    let root =
        Parser { rest: text, values: 0 }.section(0).map(Value::Section).ok_or("the metadata is no text that LVM writes")?;
    let Value::Section(entries) = &root else { return Err("the metadata is empty".to_owned()) };
    let (name, group) =
        entries.iter().find(|(_, value)| value.get("physical_volumes").is_some()).ok_or("the metadata names no volume group")?;
    let extent = group.number("extent_size").and_then(|sectors| sectors.checked_mul(512)).filter(|bytes| *bytes > 0);
    let extent = extent.ok_or("the group has no extent size")?;
    let own =
        group.sections("physical_volumes").find(|(_, volume)| volume.text("id").is_some_and(|id| id.replace('-', "") == own_id));
    let (own, own_volume) = own.ok_or("the group does not know this physical volume")?;
    let start = own_volume
        .number("pe_start")
        .and_then(|sectors| sectors.checked_mul(512))
        .ok_or("where its extents begin is not said")?;
    let volumes = group.sections("logical_volumes").take(VOLUMES_MAX).map(|(name, volume)| {
        let (bytes, segments) = segments(volume, own, start, extent);
        Volume { name: printable(name), bytes, segments }
    });
    Ok(Group { name: printable(name), volumes: volumes.collect() })
}

/// A volume's length, and its places if all of it is linear and here.
fn segments(volume: &Value, own: &str, start: u64, extent: u64) -> (u64, Option<Vec<(u64, u64)>>) {
    let Value::Section(entries) = volume else { return (0, None) };
    let mut found: Vec<&Value> =
        entries.iter().filter(|(key, _)| key.starts_with("segment") && *key != "segment_count").map(|(_, value)| value).collect();
    found.truncate(SEGMENTS_MAX);
    found.sort_by_key(|segment| segment.number("start_extent"));
    let mut bytes = 0_u64;
    let mut places = Some(Vec::new());
    for segment in found {
        let length = segment.number("extent_count").unwrap_or(0).saturating_mul(extent);
        let in_order = segment.number("start_extent").map(|first| first.saturating_mul(extent)) == Some(bytes);
        bytes = bytes.saturating_add(length);
        let linear = segment.text("type") == Some("striped") && segment.number("stripe_count") == Some(1);
        let place = match segment.get("stripes") {
            Some(Value::List(list)) => match list.as_slice() {
                [Value::Text(on), Value::Number(first)] if on == own => {
                    first.checked_mul(extent).and_then(|at| at.checked_add(start))
                }
                _ => None,
            },
            _ => None,
        };
        match (place.filter(|_| linear && in_order), &mut places) {
            (Some(place), Some(places)) => places.push((place, length)),
            _ => places = None,
        }
    }
    (bytes, places)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"vg0 {
id = "x"
extent_size = 8192 # 4 MiB
physical_volumes {
pv0 {
id = "aaaaaa-bbbb-cccc-dddd-eeee-ffff-gggggg"
pe_start = 2048
pe_count = 100
}
}
logical_volumes {
root {
status = ["READ", "WRITE"]
segment_count = 2
segment1 {
start_extent = 0
extent_count = 2
type = "striped"
stripe_count = 1
stripes = [
"pv0", 10
]
}
segment2 {
start_extent = 2
extent_count = 1
type = "striped"
stripe_count = 1
stripes = ["pv0", 5]
}
}
pool {
segment_count = 1
segment1 {
start_extent = 0
extent_count = 7
type = "thin-pool"
}
}
}
}
contents = "Text Format Volume Group"
"#;

    #[test]
    fn linear_volumes_are_found_and_others_are_only_named() {
        let group = group(TEXT, "aaaaaabbbbccccddddeeeeffffgggggg").unwrap();
        let mib = 1 << 20;
        assert_eq!(group.name, "vg0");
        let root = group.volumes.iter().find(|volume| volume.name == "root").unwrap();
        assert_eq!(root.segments, Some(vec![(mib + 40 * mib, 8 * mib), (mib + 20 * mib, 4 * mib)]));
        let pool = group.volumes.iter().find(|volume| volume.name == "pool").unwrap();
        assert_eq!((pool.bytes, &pool.segments), (28 * mib, &None));
        assert!(super::group(TEXT, "another").unwrap_err().contains("does not know"));
        for broken in ["vg0 {", "{", "a = [", "a = \"", "vg0 { physical_volumes { } }"] {
            assert!(super::group(broken, "x").is_err(), "{broken}");
        }
        assert!(super::group(&"a {".repeat(10_000), "x").is_err());
        assert!(super::group(&format!("a = {}", "[".repeat(45_000)), "x").is_err(), "and the stack is not full");
    }
}
