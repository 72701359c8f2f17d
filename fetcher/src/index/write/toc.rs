//! The TOC as JSON.
//!
//! Invariant: field names, units and omissions are those that readers of the format expect.
//! A file's first chunk is its `reg` entry, further ones are `chunk` entries right after it.
//!
//! eStargz's readers (and stargz's of zstd:chunked) take clean names, names of users and a
//! digest of every chunk. containers/storage compares each entry with what Go's tar reader
//! makes of its header, so its entries are spelt as the header spells them; they say where
//! a file ends, and have chunk digests only where there are several chunks.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Serialize, Serializer};

use super::entry::{Kind, Meta};
use super::members::Placed;
use super::pieces::Piece;
use super::{Fault, Flavour, Format};
use crate::index::Timestamp;
use crate::types::Digest;

/// Longest TOC in bytes. Readers keep all of it in memory and have limits like this.
pub(super) const TOC_BYTES_MAX: usize = 128 << 20;

/// One entry, with names as in the JSON.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct TocEntry {
    name: String,
    r#type: &'static str,
    #[serde(skip_serializing_if = "is_default")]
    size: u64,
    #[serde(skip_serializing_if = "is_default")]
    modtime: String,
    #[serde(skip_serializing_if = "is_default", rename = "accesstime")]
    access_time: String,
    #[serde(skip_serializing_if = "is_default", rename = "changetime")]
    change_time: String,
    #[serde(skip_serializing_if = "is_default")]
    link_name: String,
    #[serde(skip_serializing_if = "is_default")]
    mode: i64,
    #[serde(skip_serializing_if = "is_default")]
    uid: u32,
    #[serde(skip_serializing_if = "is_default")]
    gid: u32,
    #[serde(skip_serializing_if = "is_default")]
    user_name: String,
    #[serde(skip_serializing_if = "is_default")]
    group_name: String,
    /// Where the member with the chunk starts in the blob.
    #[serde(skip_serializing_if = "is_default")]
    offset: u64,
    /// Where the member with the file's last chunk ends in the blob.
    #[serde(skip_serializing_if = "is_default")]
    end_offset: u64,
    #[serde(skip_serializing_if = "is_default")]
    dev_major: u32,
    #[serde(skip_serializing_if = "is_default")]
    dev_minor: u32,
    #[serde(skip_serializing_if = "is_default", serialize_with = "base64_values")]
    xattrs: BTreeMap<String, Vec<u8>>,
    /// Of the whole file.
    #[serde(skip_serializing_if = "is_default")]
    digest: Option<Digest>,
    #[serde(skip_serializing_if = "is_default")]
    chunk_offset: u64,
    /// 0 means to the end of the file.
    #[serde(skip_serializing_if = "is_default")]
    chunk_size: u64,
    #[serde(skip_serializing_if = "is_default")]
    chunk_digest: Option<Digest>,
}

impl TocEntry {
    /// Whether its one chunk is the whole of a regular file.
    fn is_whole_file(&self) -> bool {
        self.r#type == "reg" && self.chunk_size == 0
    }
}

/// A TOC being collected.
#[derive(Debug)]
pub(super) struct Toc {
    entries: Vec<TocEntry>,
    style: Style,
    /// Position of the file whose chunks are being placed.
    placing: usize,
    users: BTreeMap<u32, String>,
    groups: BTreeMap<u32, String>,
}

/// Whose entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Stargz,
    ContainersStorage,
}

impl Toc {
    /// Without entries, for a format that has a TOC.
    pub(super) fn new(format: Format) -> Self {
        Self {
            entries: Vec::new(),
            style: match format {
                Format::ZstdChunked(Flavour::ContainersStorage) => Style::ContainersStorage,
                Format::Estargz | Format::Gzip | Format::ZstdChunked(Flavour::Stargz) => {
                    Style::Stargz
                }
            },
            placing: 0,
            users: BTreeMap::new(),
            groups: BTreeMap::new(),
        }
    }

    /// Adds an entry and yields its position.
    pub(super) fn push(&mut self, meta: &Meta) -> usize {
        let entry = match self.style {
            Style::Stargz => self.stargz(meta),
            Style::ContainersStorage => containers_storage(meta),
        };
        self.entries.push(entry);
        self.entries.len() - 1
    }

    fn stargz(&mut self, meta: &Meta) -> TocEntry {
        let name = match meta.kind {
            Kind::Directory if meta.name.is_empty() => "./".to_owned(),
            Kind::Directory => format!("{}/", meta.name),
            _ => meta.name.clone(),
        };
        TocEntry {
            name,
            size: meta.size,
            link_name: meta.link.clone(),
            mode: meta.raw.mode & 0o7777,
            user_name: if_changed(&mut self.users, meta.uid, &meta.user),
            group_name: if_changed(&mut self.groups, meta.gid, &meta.group),
            dev_major: meta.major,
            dev_minor: meta.minor,
            // No file has no bytes; the digest says so.
            digest: (meta.kind == Kind::Regular && meta.size == 0).then(|| Digest::sha256(b"")),
            ..common(meta)
        }
    }

    /// Adds one chunk of the file whose entry is at `regular`, and yields the position of
    /// the entry that describes the chunk.
    pub(super) fn push_chunk(&mut self, regular: usize, piece: Piece) -> usize {
        let Some(entry) = self.entries.get_mut(regular) else {
            return regular;
        };
        if piece.file_offset == 0 {
            if piece.len < entry.size {
                entry.chunk_size = piece.len;
            }
            return regular;
        }
        let chunk = TocEntry {
            name: entry.name.clone(),
            r#type: "chunk",
            chunk_offset: piece.file_offset,
            chunk_size: piece.len,
            ..TocEntry::default()
        };
        self.entries.push(chunk);
        self.entries.len() - 1
    }

    /// Notes the digest of the whole file whose entry is at `regular`.
    pub(super) fn set_digest(&mut self, regular: usize, digest: Digest) {
        if let Some(entry) = self.entries.get_mut(regular) {
            entry.digest = Some(digest);
        }
    }

    /// Notes where a chunk is. Chunks come in the order in which they were added.
    pub(super) fn place(&mut self, placed: Placed) {
        let Some(entry) = self.entries.get_mut(placed.entry) else {
            return;
        };
        entry.offset = placed.blob_offset;
        entry.chunk_digest = Some(placed.chunk_digest);
        // A file of one chunk was hashed with it.
        if entry.is_whole_file() {
            entry.digest = Some(placed.chunk_digest);
        }
        if self.style == Style::ContainersStorage {
            if entry.is_whole_file() {
                entry.chunk_digest = None;
            }
            if entry.r#type == "reg" {
                self.placing = placed.entry;
            }
            if let Some(regular) = self.entries.get_mut(self.placing) {
                regular.end_offset = placed.blob_end;
            }
        }
    }

    /// The JSON; `split` is the digest of the tar-split, if there is one.
    pub(super) fn to_json(&self, split: Option<Digest>) -> Result<Vec<u8>, Fault> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Document<'a> {
            version: u32,
            entries: &'a [TocEntry],
            #[serde(skip_serializing_if = "Option::is_none")]
            tar_split_digest: Option<Digest>,
        }
        let document = Document {
            version: 1,
            entries: &self.entries,
            tar_split_digest: split,
        };
        let mut json = Vec::new();
        match self.style {
            Style::ContainersStorage => serde_json::to_writer(&mut json, &document),
            Style::Stargz => {
                let indent = serde_json::ser::PrettyFormatter::with_indent(b"\t");
                let mut serializer = serde_json::Serializer::with_formatter(&mut json, indent);
                document.serialize(&mut serializer)
            }
        }
        .map_err(|error| Fault::Io("write the TOC of", error.into()))?;
        if json.len() > TOC_BYTES_MAX {
            return Err(Fault::Limit(format!(
                "its TOC would be {} bytes and readers take {TOC_BYTES_MAX}; use larger chunks",
                json.len()
            )));
        }
        Ok(json)
    }
}

fn containers_storage(meta: &Meta) -> TocEntry {
    let raw = &meta.raw;
    let time = |time: Option<Timestamp>| time.and_then(rfc3339).unwrap_or_default();
    TocEntry {
        name: raw.name.clone(),
        access_time: time(raw.access_time),
        change_time: time(raw.change_time),
        link_name: raw.link.clone(),
        mode: raw.mode,
        size: raw.size,
        dev_major: raw.major,
        dev_minor: raw.minor,
        ..common(meta)
    }
}

/// What all styles say alike.
fn common(meta: &Meta) -> TocEntry {
    TocEntry {
        r#type: type_name(meta.kind),
        modtime: rfc3339(meta.mtime).unwrap_or_default(),
        uid: meta.uid,
        gid: meta.gid,
        xattrs: meta.xattrs.clone(),
        ..TocEntry::default()
    }
}

fn type_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Directory => "dir",
        Kind::Regular => "reg",
        Kind::Symlink => "symlink",
        Kind::Hardlink => "hardlink",
        Kind::Char => "char",
        Kind::Block => "block",
        Kind::Fifo => "fifo",
    }
}

/// Readers remember the name of an id, so it is written only when it is new.
fn if_changed(known: &mut BTreeMap<u32, String>, id: u32, name: &str) -> String {
    if known.get(&id).is_some_and(|old| old == name) || name.is_empty() {
        return String::new();
    }
    known.insert(id, name.to_owned());
    name.to_owned()
}

/// UTC, with a fraction only where there is one. None for years that RFC 3339 lacks.
fn rfc3339(time: Timestamp) -> Option<String> {
    let days = time.secs.div_euclid(86_400);
    let second = time.secs.rem_euclid(86_400);
    let (year, month, day) = civil(days);
    if !(0..=9999).contains(&year) {
        return None;
    }
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let fraction = match time.nanos {
        0 => String::new(),
        nanos => format!(".{nanos:09}").trim_end_matches('0').to_owned(),
    };
    Some(format!(
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z"
    ))
}

/// Days since 1970-01-01 to year, month, day. Years start in March here, so that the leap
/// day is the last of its year and every 400 years have the same 146,097 days.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days.saturating_add(719_468);
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let leaps = day_of_era / 1_460 - day_of_era / 36_524 + day_of_era / 146_096;
    let year_of_era = (day_of_era - leaps) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    (year, month, day)
}

fn base64_values<S: Serializer>(
    xattrs: &BTreeMap<String, Vec<u8>>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(
        xattrs
            .iter()
            .map(|(name, value)| (name, STANDARD.encode(value))),
    )
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc3339() {
        let table = [
            (0, 0, Some("1970-01-01T00:00:00Z")),
            (-1, 0, Some("1969-12-31T23:59:59Z")),
            (951_782_400, 0, Some("2000-02-29T00:00:00Z")),
            (1_704_067_199, 500_000_000, Some("2023-12-31T23:59:59.5Z")),
            (4_107_542_400, 1, Some("2100-03-01T00:00:00.000000001Z")),
            (253_402_300_800, 0, None),
            (i64::MAX, 0, None),
            (i64::MIN, 0, None),
        ];
        for (secs, nanos, text) in table {
            let got = rfc3339(Timestamp { secs, nanos });
            assert_eq!(got.as_deref(), text, "{secs}");
        }
    }
}
