//! A header as Go's tar reader takes it.
//!
//! Invariant: pure. containers/storage compares its TOC with what that reader says of the
//! header and refuses a layer where they differ, so its oddities are kept: device numbers
//! of files, sizes of links, times where GNU and star keep them.

use std::collections::BTreeMap;

use super::{Block, Fault};
use crate::index::{Timestamp, tar};

/// What Go's tar reader makes of the header.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in super::super) struct Raw {
    /// Path as written.
    pub(in super::super) name: String,
    /// Link target as written, whatever the kind.
    pub(in super::super) link: String,
    /// All bits that are there; some writers put the file type in.
    pub(in super::super) mode: i64,
    /// Of other kinds than files too.
    pub(in super::super) size: u64,
    /// Device number, whatever the kind.
    pub(in super::super) major: u32,
    pub(in super::super) minor: u32,
    pub(in super::super) access_time: Option<Timestamp>,
    pub(in super::super) change_time: Option<Timestamp>,
}

/// Dialects keep different things in the same bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dialect {
    V7,
    Ustar,
    Star,
    Gnu,
}

fn dialect(block: &Block) -> Dialect {
    match (&block[257..263], &block[263..265], &block[508..512]) {
        (b"ustar\0", _, b"tar\0") => Dialect::Star,
        (b"ustar\0", _, _) => Dialect::Ustar,
        (b"ustar ", b" \0", _) => Dialect::Gnu,
        _ => Dialect::V7,
    }
}

pub(super) fn raw(
    block: &Block,
    pax: &BTreeMap<String, Vec<u8>>,
    (name, link, size): (&str, &str, u64),
) -> Result<Raw, Fault> {
    let dialect = dialect(block);
    let device = |field: &[u8]| match dialect {
        Dialect::V7 => 0,
        Dialect::Ustar | Dialect::Star | Dialect::Gnu => {
            let number = tar::number(field).and_then(|number| u32::try_from(number).ok());
            number.unwrap_or(0)
        }
    };
    let own_time = |gnu: &[u8], star: &[u8]| {
        let secs = match dialect {
            Dialect::V7 | Dialect::Ustar => None,
            Dialect::Star => tar::number(star),
            Dialect::Gnu if gnu.first() == Some(&0) => None,
            Dialect::Gnu => tar::number(gnu),
        };
        secs.map(|secs| Timestamp { secs, nanos: 0 })
    };
    let time = |key: &str, own| match pax.get(key).filter(|value| !value.is_empty()) {
        Some(value) => tar::pax_time(value)
            .map(Some)
            .ok_or_else(|| Fault::malformed(format!("its PAX {key} is not a time"))),
        None => Ok(own),
    };
    Ok(Raw {
        name: name.to_owned(),
        link: link.to_owned(),
        mode: tar::number(&block[100..108])
            .ok_or_else(|| Fault::malformed("its mode field is not a number"))?,
        size,
        major: device(&block[329..337]),
        minor: device(&block[337..345]),
        access_time: time("atime", own_time(&block[345..357], &block[476..488]))?,
        change_time: time("ctime", own_time(&block[357..369], &block[488..500]))?,
    })
}
