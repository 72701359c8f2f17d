//! The files of a zTOC, into the tables.
//!
//! Invariant: payloads are where a tar could have them: ascending, apart by a header at
//! least, inside the tar. Each is cut where spans end, so every chunk is in one span. What
//! is looked at is bounded by the length of the zTOC, whatever its parts share.

use super::checkpoints::{Checkpoint, SPAN_LEN_MAX};
use super::flatbuffer::{Found, Refs, Table};
use crate::index::attributes::Attributes;
use crate::index::limits::{SKIP_MAX, XATTR_NAME_LEN_MAX, XATTR_VALUE_LEN_MAX};
use crate::index::tables::Tables;
use crate::index::{Encoding, FileEntry, FileKind, path, tar};
use crate::types::ByteRange;
use crate::{Error, Result};

/// Unit of a tar: the length of a header, and what payloads are padded to.
const BLOCK_LEN: u64 = 512;
/// Longest chunk: a span that decodes to more is several of them.
const PIECE_LEN: u64 = 4 << 20;
/// Longest kind or time that is looked at.
const WORD_LEN_MAX: usize = 64;
/// Longest key of a record that can name an xattr, whose name may be URL-encoded.
const KEY_LEN_MAX: usize = XATTR_NAME_LEN_MAX * 3 + 32;
/// Longest value of one, which may be in base64.
const VALUE_LEN_MAX: usize = XATTR_VALUE_LEN_MAX * 4 / 3 + 8;

/// Field numbers of a file.
mod field {
    pub(super) const NAME: u16 = 0;
    pub(super) const TYPE: u16 = 1;
    pub(super) const OFFSET: u16 = 2;
    pub(super) const SIZE: u16 = 3;
    pub(super) const LINK: u16 = 4;
    pub(super) const MODE: u16 = 5;
    pub(super) const UID: u16 = 6;
    pub(super) const GID: u16 = 7;
    pub(super) const MTIME: u16 = 10;
    pub(super) const DEV_MAJOR: u16 = 11;
    pub(super) const DEV_MINOR: u16 = 12;
    /// All PAX records of the file, whatever its name says.
    pub(super) const RECORDS: u16 = 13;
    /// Of a record.
    pub(super) const KEY: u16 = 0;
    pub(super) const VALUE: u16 = 1;
}

/// Puts one file after another into the tables.
pub(super) struct Placer<'a> {
    tables: Tables,
    checkpoints: &'a [Checkpoint<'a>],
    tar_len: u64,
    /// Where the next header can be in the tar.
    at: u64,
    /// Checkpoint of the last chunk.
    current: usize,
    /// Checkpoints with chunks, ascending.
    used: Vec<usize>,
    /// PAX records that may still come: a zTOC has four bytes for each.
    records_left: usize,
}

impl<'a> Placer<'a> {
    /// Of the zTOC `what`, which has so many bytes.
    pub(super) fn new(
        what: String,
        checkpoints: &'a [Checkpoint<'a>],
        tar_len: u64,
        ztoc_len: usize,
    ) -> Self {
        Self {
            tables: Tables::new(what),
            checkpoints,
            tar_len,
            at: 0,
            current: 0,
            used: Vec::new(),
            records_left: ztoc_len / 4,
        }
    }

    /// The tables, and which checkpoints they need: the number of a chunk's span is a place
    /// among those.
    pub(super) fn finish(self) -> (Tables, Vec<usize>) {
        (self.tables, self.used)
    }

    /// Takes file `number` of `files`.
    pub(super) fn file(&mut self, files: &Refs<'_>, number: usize) -> Result<()> {
        let in_file = |rule: String| {
            Error::malformed(self.tables.what(), format!("its file {number}: {rule}"))
        };
        let table = files.table(number).map_err(in_file)?;
        let name = table.bytes(field::NAME).map_err(in_file)?;
        let records = table.refs(field::RECORDS).map_err(in_file)?;
        let path = path::normalize(name).map_err(|rule| self.tables.malformed(name, rule))?;
        self.records_left = self
            .records_left
            .checked_sub(records.len())
            .ok_or_else(|| self.tables.malformed(&path, "its records overlap others"))?;
        let entry = self.entry(&table, &records, path)?;
        let payload = self.payload(&table, &entry)?;
        if path::is_format_file(&entry.path) {
            return Ok(());
        }
        let path = entry.path.clone();
        self.tables.file(entry)?;
        self.chunks(payload, &path)
    }

    fn entry(&self, table: &Table<'_>, records: &Refs<'_>, path: Vec<u8>) -> Result<FileEntry> {
        let mut entry = facts(table).map_err(|rule| self.tables.malformed(&path, rule))?;
        let found = xattrs(records);
        let found = found.map_err(|rule| self.tables.malformed(&path, rule))?;
        let Some(xattrs) = found else {
            return Err(self.unsupported(&path, "it is a sparse file"));
        };
        (entry.path, entry.xattrs) = (path, xattrs);
        Ok(entry)
    }

    /// Where the file's payload is in the tar; empty where it has none.
    fn payload(&mut self, table: &Table<'_>, entry: &FileEntry) -> Result<ByteRange> {
        let offset = table.i64(field::OFFSET);
        let offset = offset.map_err(|rule| self.tables.malformed(&entry.path, rule))?;
        let size = match entry.kind {
            FileKind::Regular { size, .. } => size,
            _ => 0,
        };
        let payload = u64::try_from(offset)
            .ok()
            .filter(|offset| {
                offset % BLOCK_LEN == 0 && *offset >= self.at.saturating_add(BLOCK_LEN)
            })
            .and_then(|offset| ByteRange::at(offset, size))
            .filter(|payload| payload.end() <= self.tar_len);
        let Some(payload) = payload else {
            let rule = format!(
                "its {size} bytes at {offset} of the tar overlap what is before byte {}, \
                 or pass its end at {}",
                self.at, self.tar_len
            );
            return Err(self.tables.malformed(&entry.path, rule));
        };
        self.at = payload.end().next_multiple_of(BLOCK_LEN);
        Ok(payload)
    }

    /// Cuts a payload into chunks.
    fn chunks(&mut self, payload: ByteRange, path: &[u8]) -> Result<()> {
        let mut at = payload.start();
        while at < payload.end() {
            let checkpoint = self.span_at(at);
            let Some(checkpoint) = checkpoint else {
                return Err(self.tables.malformed(path, "no span has its bytes"));
            };
            let end = payload.end().min(checkpoint.tar.end());
            let len = (end - at).min(PIECE_LEN);
            let skip = at - checkpoint.tar.start();
            if skip.saturating_add(len) > SKIP_MAX || checkpoint.blob.len() > SPAN_LEN_MAX {
                return Err(self.unsupported(path, "its span is too long to be decoded for it"));
            }
            let blob = checkpoint.blob;
            let span = self.number()?;
            let encoding = Encoding::WholeSpan { blob, skip, span };
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            self.tables.chunk_of_span(encoding, len, None);
            at += u64::from(len);
        }
        Ok(())
    }

    /// The checkpoint whose span has byte `at` of the tar; they are asked for in order.
    fn span_at(&mut self, at: u64) -> Option<&'a Checkpoint<'a>> {
        loop {
            let checkpoint = self.checkpoints.get(self.current)?;
            if at < checkpoint.tar.end() {
                return Some(checkpoint);
            }
            self.current += 1;
        }
    }

    /// The number of the current span among the used ones.
    fn number(&mut self) -> Result<u32> {
        if self.used.last() != Some(&self.current) {
            self.used.push(self.current);
        }
        u32::try_from(self.used.len() - 1)
            .map_err(|_| Error::limit(self.tables.what(), "it has too many spans"))
    }

    fn unsupported(&self, path: &[u8], detail: &str) -> Error {
        Error::Unsupported {
            what: format!("{}, file {}", self.tables.what(), path::show(path)),
            detail: format!("{detail}; the layer must be pulled whole"),
        }
    }
}

fn facts(table: &Table<'_>) -> Found<FileEntry> {
    let word = |number, name: &str| {
        let bytes = table.bytes(number)?;
        let word = (bytes.len() <= WORD_LEN_MAX).then(|| std::str::from_utf8(bytes).ok());
        word.flatten()
            .ok_or_else(|| format!("its {name} makes no sense"))
    };
    Attributes {
        kind: word(field::TYPE, "type")?,
        size: table.i64(field::SIZE)?,
        mode: table.i64(field::MODE)?,
        uid: i64::from(table.u32(field::UID)?),
        gid: i64::from(table.u32(field::GID)?),
        mtime: word(field::MTIME, "modtime")?,
        link: table.bytes(field::LINK)?,
        dev_major: table.i64(field::DEV_MAJOR)?,
        dev_minor: table.i64(field::DEV_MINOR)?,
    }
    .entry()
}

/// The xattrs among PAX records; `None` where they say that the file is sparse.
fn xattrs(records: &Refs<'_>) -> Found<Option<tar::Xattrs>> {
    let mut broken = None;
    let pairs = (0..records.len()).map_while(|number| match record(records, number) {
        Ok(pair) => Some(pair),
        Err(rule) => {
            broken = Some(rule);
            None
        }
    });
    let found = tar::pax_xattrs(pairs);
    match broken {
        Some(rule) => Err(rule),
        None => found,
    }
}

fn record<'a>(records: &Refs<'a>, number: usize) -> Found<(&'a [u8], &'a [u8])> {
    let record = records.table(number)?;
    let (key, value) = (record.bytes(field::KEY)?, record.bytes(field::VALUE)?);
    if key.len() > KEY_LEN_MAX || value.len() > VALUE_LEN_MAX {
        return Err(format!("its PAX record {number} is too long"));
    }
    Ok((key, value))
}
