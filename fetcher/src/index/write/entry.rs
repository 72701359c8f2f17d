//! Tar headers to what a TOC says of an entry.
//!
//! Numbers, times, checksums and records are read as the layer parser in `index/tar` reads
//! them. What is ours is that all header blocks are seen at once, and that what they say
//! is kept as it is spelt.
//!
//! Invariant: pure. [`entry_meta`] sees the header blocks of one entry exactly as they
//! are in the tar and decides everything the TOC needs from them: PAX over GNU over
//! ustar. What a TOC cannot express (sparse files, names that are not UTF-8, `..`) is
//! refused, never approximated.

mod raw;

use std::collections::BTreeMap;

pub(super) use self::raw::Raw;
use self::raw::raw;
use super::Fault;
use crate::index::{Timestamp, tar};

/// Size of a tar block in bytes.
pub(super) const BLOCK: usize = 512;

/// One tar block.
pub(super) type Block = [u8; BLOCK];

/// Longest path or link target in bytes: the kernel's PATH_MAX without its NUL.
const PATH_BYTES_MAX: usize = 4095;

/// PAX prefix of extended attributes.
const XATTR_PREFIX: &str = "SCHILY.xattr.";

/// Kind of a tar entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    Regular,
    Symlink,
    Hardlink,
    Char,
    Block,
    Fifo,
}

/// What a TOC says of an entry, apart from where its bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Meta {
    /// Path: relative, no empty, `.` or `..` part; empty for the root.
    pub(super) name: String,
    pub(super) kind: Kind,
    /// Payload in bytes; 0 unless regular.
    pub(super) size: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) user: String,
    pub(super) group: String,
    pub(super) mtime: Timestamp,
    /// Symlink: as written. Hard link: in the form of `name`.
    pub(super) link: String,
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) xattrs: BTreeMap<String, Vec<u8>>,
    pub(super) raw: Raw,
}

impl Meta {
    /// A file of our own, with the header that [`plain_header`] makes.
    pub(super) fn of_our_own(name: &str, size: u64) -> Self {
        Self {
            name: name.to_owned(),
            kind: Kind::Regular,
            size,
            uid: 0,
            gid: 0,
            user: String::new(),
            group: String::new(),
            mtime: Timestamp::default(),
            link: String::new(),
            major: 0,
            minor: 0,
            xattrs: BTreeMap::new(),
            raw: Raw {
                name: name.to_owned(),
                mode: 0o444,
                size,
                ..Raw::default()
            },
        }
    }
}

/// What the walker must know of a header block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Peek {
    /// Bytes that follow the block, without padding.
    pub(super) size: u64,
    /// Whether the block describes the entry after it (PAX, GNU long names).
    pub(super) extension: bool,
    /// Whether it describes all entries after it.
    pub(super) global: bool,
}

/// Checks a header block's sum and reads its size and role.
pub(super) fn peek(block: &Block) -> Result<Peek, Fault> {
    tar::check_sum(block).map_err(Fault::Malformed)?;
    let size = number(&block[124..136], "size")?;
    Ok(Peek {
        size,
        extension: matches!(block[156], b'x' | b'g' | b'L' | b'K' | b'X'),
        global: block[156] == b'g',
    })
}

/// Refuses global records that would change the entries after them. What is left is
/// comments.
pub(super) fn check_global(payload: &[u8]) -> Result<(), Fault> {
    let records = pax_records(payload)?;
    match records.keys().find(|key| *key != "comment") {
        Some(key) => Err(Fault::unsupported(format!(
            "a global extended header sets {key:?}; write the tar without --pax-option"
        ))),
        None => Ok(()),
    }
}

/// Decodes `blocks`: the header block of one entry with all extension headers and their
/// payloads before it, padded as in the tar.
pub(super) fn entry_meta(blocks: &[u8]) -> Result<Meta, Fault> {
    let mut overrides = Overrides::default();
    let mut rest = blocks;
    loop {
        let (block, after) = rest
            .split_first_chunk::<BLOCK>()
            .ok_or_else(|| Fault::malformed("a header is cut short"))?;
        let peek = peek(block)?;
        if !peek.extension {
            return decode(block, overrides);
        }
        let len = usize::try_from(peek.size).unwrap_or(usize::MAX);
        let payload = after
            .get(..len)
            .ok_or_else(|| Fault::malformed("an extended header is cut short"))?;
        overrides.add(block[156], payload)?;
        rest = after.get(len.next_multiple_of(BLOCK)..).unwrap_or_default();
    }
}

/// What extension headers say of the entry that follows.
#[derive(Default)]
struct Overrides {
    pax: BTreeMap<String, Vec<u8>>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl Overrides {
    fn add(&mut self, kind: u8, payload: &[u8]) -> Result<(), Fault> {
        match kind {
            b'L' => self.long_name = Some(until_nul(payload).to_vec()),
            b'K' => self.long_link = Some(until_nul(payload).to_vec()),
            b'g' => check_global(payload)?,
            _ => self.pax = pax_records(payload)?,
        }
        Ok(())
    }

    /// A text field: PAX, else GNU, else the header's own.
    fn text(&self, key: &str, gnu: Option<&Vec<u8>>, own: Vec<u8>) -> Result<String, Fault> {
        let bytes = match (self.pax.get(key).filter(|value| !value.is_empty()), gnu) {
            (Some(value), _) => value.clone(),
            (None, Some(value)) => value.clone(),
            (None, None) => own,
        };
        if bytes.len() > PATH_BYTES_MAX {
            return Err(Fault::malformed(format!(
                "its {key} is longer than {PATH_BYTES_MAX} bytes"
            )));
        }
        if bytes.contains(&0) {
            return Err(Fault::malformed(format!("its {key} contains a NUL byte")));
        }
        String::from_utf8(bytes).map_err(|bad| {
            Fault::unsupported(format!(
                "its {key} {:?} is not UTF-8, which a TOC in JSON cannot express",
                String::from_utf8_lossy(bad.as_bytes())
            ))
        })
    }

    fn number(&self, key: &str, field: &[u8]) -> Result<u64, Fault> {
        match self.pax.get(key).filter(|value| !value.is_empty()) {
            Some(value) => std::str::from_utf8(value)
                .ok()
                .and_then(|text| text.parse().ok())
                .ok_or_else(|| Fault::malformed(format!("its PAX {key} is not a number"))),
            None => number(field, key),
        }
    }
}

fn decode(block: &Block, overrides: Overrides) -> Result<Meta, Fault> {
    let raw_name = overrides.text("path", overrides.long_name.as_ref(), tar::name(block))?;
    let about = |fault: Fault| fault.about(&raw_name);
    if let Some(key) = overrides.pax.keys().find(|k| k.starts_with("GNU.sparse")) {
        return Err(about(sparse(key)));
    }
    let kind = kind_of(block[156], &raw_name).map_err(about)?;
    let own_link = until_nul(&block[157..257]).to_vec();
    let link = overrides
        .text("linkpath", overrides.long_link.as_ref(), own_link)
        .map_err(about)?;
    let size = overrides.number("size", &block[124..136])?;
    let raw = raw(block, &overrides.pax, (&raw_name, &link, size)).map_err(about)?;
    let id = |key: &'static str, field: &[u8]| {
        let value = overrides.number(key, field)?;
        u32::try_from(value).map_err(|_| {
            Fault::unsupported(format!("its {key} {value} is beyond 32 bits")).about(&raw_name)
        })
    };
    let device = |field: &[u8], what| match kind {
        Kind::Char | Kind::Block => u32::try_from(number(field, what)?)
            .map_err(|_| Fault::malformed("its device number is beyond 32 bits").about(&raw_name)),
        Kind::Directory | Kind::Regular | Kind::Symlink | Kind::Hardlink | Kind::Fifo => Ok(0),
    };
    Ok(Meta {
        name: clean(&raw_name)?,
        kind,
        size: match kind {
            Kind::Regular => size,
            _ => 0,
        },
        uid: id("uid", &block[108..116])?,
        gid: id("gid", &block[116..124])?,
        user: overrides.text("uname", None, until_nul(&block[265..297]).to_vec())?,
        group: overrides.text("gname", None, until_nul(&block[297..329]).to_vec())?,
        mtime: mtime(&overrides, block).map_err(about)?,
        link: match kind {
            Kind::Hardlink => clean(&link)?,
            Kind::Symlink => link,
            _ => String::new(),
        },
        major: device(&block[329..337], "device major")?,
        minor: device(&block[337..345], "device minor")?,
        xattrs: xattrs(overrides.pax),
        raw,
    })
}

fn kind_of(flag: u8, raw_name: &str) -> Result<Kind, Fault> {
    Ok(match flag {
        b'0' | 0 | b'7' if flag == 0 && raw_name.ends_with('/') => Kind::Directory,
        b'0' | 0 | b'7' => Kind::Regular,
        b'1' => Kind::Hardlink,
        b'2' => Kind::Symlink,
        b'3' => Kind::Char,
        b'4' => Kind::Block,
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        b'S' => return Err(sparse("type 'S'")),
        other => {
            return Err(Fault::unsupported(format!(
                "its tar entry type {:?} is not one that layers have",
                char::from(other)
            )));
        }
    })
}

fn sparse(how: &str) -> Fault {
    Fault::unsupported(format!(
        "it is stored as a sparse file ({how}); build the layer without tar's --sparse"
    ))
}

/// Path without leading `/`, `./` and doubled or trailing slashes; `..` is refused.
pub(super) fn clean(raw: &str) -> Result<String, Fault> {
    let parts = raw.split('/').filter(|part| !matches!(*part, "" | "."));
    if parts.clone().any(|part| part == "..") {
        return Err(Fault::malformed("its path leads through '..'").about(raw));
    }
    Ok(parts.collect::<Vec<_>>().join("/"))
}

fn mtime(overrides: &Overrides, block: &Block) -> Result<Timestamp, Fault> {
    let time = match overrides.pax.get("mtime").filter(|value| !value.is_empty()) {
        Some(value) => tar::pax_time(value),
        None => tar::number(&block[136..148]).map(|secs| Timestamp { secs, nanos: 0 }),
    };
    time.ok_or_else(|| Fault::malformed("its modification time is not a number"))
}

fn xattrs(pax: BTreeMap<String, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    pax.into_iter()
        .filter_map(|(key, value)| Some((key.strip_prefix(XATTR_PREFIX)?.to_owned(), value)))
        .collect()
}

/// Records of an extended header. Values may hold any byte, newlines too.
fn pax_records(mut payload: &[u8]) -> Result<BTreeMap<String, Vec<u8>>, Fault> {
    let bad = || Fault::malformed("a PAX header has a broken record");
    let mut records = BTreeMap::new();
    // Some writers pad the last block into the header.
    while payload.iter().any(|byte| *byte != 0) {
        let (key, value, rest) = tar::pax_record(payload).ok_or_else(bad)?;
        let key = std::str::from_utf8(key).map_err(|_| bad())?;
        records.insert(key.to_owned(), value.to_vec());
        payload = rest;
    }
    Ok(records)
}

/// A numeric field that may not be negative: octal text, or base-256 by GNU's convention.
fn number(field: &[u8], what: &str) -> Result<u64, Fault> {
    tar::number(field)
        .and_then(|value| u64::try_from(value).ok())
        .ok_or_else(|| Fault::malformed(format!("its {what} field is not a number")))
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|b| *b == 0).next().unwrap_or_default()
}

/// A ustar header for a regular file of our own, with everything but name and size fixed.
pub(super) fn plain_header(name: &str, size: u64) -> Block {
    let mut block = [0; BLOCK];
    let mut put = |at: usize, text: &str| {
        for (to, from) in block.iter_mut().skip(at).zip(text.bytes()) {
            *to = from;
        }
    };
    put(0, name);
    put(100, "0000444");
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{size:011o}"));
    put(136, "00000000000");
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\x0000");
    let sum: u64 = block.iter().map(|b| u64::from(*b)).sum();
    for (to, from) in block
        .iter_mut()
        .skip(148)
        .zip(format!("{sum:06o}\0 ").bytes())
    {
        *to = from;
    }
    block
}

#[cfg(test)]
mod tests;
