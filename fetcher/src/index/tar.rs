//! Tar, as container layers use it: a stream of headers and payloads.
//!
//! Understands V7, ustar, star, GNU (long names, base-256 numbers) and PAX (`x` and `g`
//! headers, `SCHILY.xattr.*`, `LIBARCHIVE.xattr.*`). Refuses what would change meaning if
//! it were ignored: sparse files and vendor types.
//!
//! Invariant: [`Parser`] holds one header or one extended header at a time, each bounded,
//! never a payload. Entries come out with the names of the file table; whiteouts are
//! entries like others. Never writes anything.

mod header;
mod numeric;
mod parser;
mod pax;

pub use parser::{Parser, Step};

/// Length of a header, and the unit that payloads are padded to.
pub(super) const BLOCK_LEN: usize = 512;

/// Name and payload length of a plain header without extensions; `Err` says what is wrong.
pub(super) fn simple_header(block: &[u8; BLOCK_LEN]) -> Result<(Vec<u8>, u64), String> {
    let header = header::Header::read(block)?;
    Ok((header.name, header.size))
}

/// A numeric header field: octal, or GNU's base 256.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    numeric::field(field)
}

/// A time of a PAX record.
pub(super) fn pax_time(text: &[u8]) -> Option<super::Timestamp> {
    numeric::time(text)
}

/// Key and value of the first PAX record, and what follows it.
pub(super) fn pax_record(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    pax::record(records)
}

/// Names and values of xattrs.
pub(super) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// The xattrs among PAX records that came one by one; `None` where they say that the file is
/// sparse. `Err` says what is wrong. Records that say neither are passed over.
pub(super) fn pax_xattrs<'a>(
    records: impl Iterator<Item = (&'a [u8], &'a [u8])>,
) -> Result<Option<Xattrs>, String> {
    pax::xattrs(records)
}

/// Name and prefix fields of a header, joined.
pub(super) fn name(block: &[u8; BLOCK_LEN]) -> Vec<u8> {
    header::name(block)
}

/// Checks the checksum of a header; `Err` says what is wrong.
pub(super) fn check_sum(block: &[u8; BLOCK_LEN]) -> Result<(), String> {
    header::check_sum(block)
}

#[cfg(test)]
mod tests;
