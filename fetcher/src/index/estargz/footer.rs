//! The last bytes of an eStargz blob: an empty gzip member whose header names the offset
//! of the TOC.
//!
//! Three are known; all numbers in bytes from the start of the footer:
//!
//! ```text
//! eStargz (51)      10 gzip header | 2 XLEN=26 | "SG" | 2 LEN=22 | 16 hex offset | "STARGZ"            | 13 rest
//! legacy  (47)      10 gzip header | 2 XLEN=22                   | 16 hex offset | "STARGZ"            | 13 rest
//! external (46)     10 gzip header | 2 XLEN=21 | "SG" | 2 LEN=17                 | "STARGZEXTERNALTOC" | 13 rest
//! ```
//!
//! Invariant: the TOC of a [`Footer`] lies inside the blob, before the footer.
#![warn(clippy::indexing_slicing)]

use crate::types::Digest;
use crate::{Error, Result};

const ESTARGZ_LEN: usize = 51;
const LEGACY_LEN: usize = 47;
const EXTERNAL_LEN: usize = 46;

/// Gzip magic, deflate, only FEXTRA set.
const GZIP_START: &[u8] = &[0x1f, 0x8b, 8, 4];
const SUBFIELD: &[u8] = b"SG";
const MAGIC: &[u8] = b"STARGZ";
const EXTERNAL_MAGIC: &[u8] = b"STARGZEXTERNALTOC";

/// Most compressed bytes of a TOC that are fetched. Real ones of 150 MiB of JSON take a
/// fifth of it.
const TOC_LEN_MAX: u64 = 64 << 20;

const TAIL_LEN_MIN: u64 = 64 << 10;
const TAIL_LEN_MAX: u64 = 2 << 20;
/// A TOC takes about this fraction of its blob: 0.5 % for large files, 2 % for layers of
/// many small ones.
const TAIL_FRACTION: u64 = 64;

/// Which of the footers a blob has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FooterKind {
    /// 51 bytes; the TOC can be verified by the manifest's annotation.
    Estargz,
    /// 47 bytes, of the format's first draft: it has no digests and must be pulled whole.
    Legacy,
    /// 46 bytes: the TOC is in another image; the manifest's annotation verifies it.
    External,
}

/// A footer that makes sense for its blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    kind: FooterKind,
    toc_offset: u64,
    toc_end: u64,
}

impl Footer {
    /// Which it is.
    pub fn kind(&self) -> FooterKind {
        self.kind
    }

    /// Where the TOC's gzip member starts in the blob. Where the TOC is external: where
    /// the footer does.
    pub fn toc_offset(&self) -> u64 {
        self.toc_offset
    }

    /// Compressed bytes between the TOC's start and the footer.
    pub fn toc_len(&self) -> u64 {
        self.toc_end - self.toc_offset
    }

    /// Refuses the kinds that have no verifiable TOC in the blob itself.
    pub(super) fn check_inside(&self, blob_digest: &Digest) -> Result<()> {
        let why = match self.kind {
            FooterKind::Estargz => return Ok(()),
            FooterKind::Legacy => "it is legacy stargz, which has no digests",
            FooterKind::External => "its TOC is in another image",
        };
        Err(Error::Unsupported {
            what: format!("reading layer {blob_digest} lazily"),
            detail: format!("{why}; pull it whole, or convert the image to eStargz"),
        })
    }
}

/// How many bytes to fetch from the end of a blob of `blob_size` bytes first, so that
/// footer and TOC usually come with one request: a 64th of the blob, between 64 KiB and
/// 2 MiB. Never more than the blob.
pub fn tail_len(blob_size: u64) -> u64 {
    (blob_size / TAIL_FRACTION)
        .clamp(TAIL_LEN_MIN, TAIL_LEN_MAX)
        .min(blob_size)
}

/// Refuses to fetch a TOC of `len` compressed bytes where that is more than any real one.
pub fn check_toc_len(len: u64) -> Result<()> {
    if len <= TOC_LEN_MAX {
        return Ok(());
    }
    Err(Error::limit(
        "eStargz TOC",
        format!("it has {len} compressed bytes of at most {TOC_LEN_MAX}"),
    ))
}

/// Finds a footer at the end of `tail`, the last bytes of a blob of `blob_size` bytes (51
/// are enough). `None` where there is none: the layer is a plain one.
pub fn read_footer(tail: &[u8], blob_size: u64) -> Result<Option<Footer>> {
    type Read = fn(&[u8]) -> Option<Result<u64, String>>;
    let kinds: [(FooterKind, usize, Read); 3] = [
        (FooterKind::Estargz, ESTARGZ_LEN, estargz),
        (FooterKind::Legacy, LEGACY_LEN, legacy),
        (FooterKind::External, EXTERNAL_LEN, external),
    ];
    for (kind, len, read) in kinds {
        let Some(bytes) = tail.len().checked_sub(len).and_then(|at| tail.get(at..)) else {
            continue;
        };
        let (Some(offset), Some(toc_end)) = (read(bytes), blob_size.checked_sub(len as u64)) else {
            continue;
        };
        let malformed = |detail| Error::malformed("eStargz footer", detail);
        let toc_offset = match kind {
            FooterKind::External => toc_end,
            FooterKind::Estargz | FooterKind::Legacy => offset.map_err(malformed)?,
        };
        if toc_offset > toc_end {
            return Err(malformed(format!(
                "it puts the TOC at {toc_offset} of a blob of {blob_size} bytes"
            )));
        }
        return Ok(Some(Footer {
            kind,
            toc_offset,
            toc_end,
        }));
    }
    Ok(None)
}

/// The extra field of a footer member, without the two bytes of its length.
fn extra(bytes: &[u8], len: u8) -> Option<&[u8]> {
    bytes.strip_prefix(GZIP_START)?;
    let rest = bytes.get(10..)?;
    rest.strip_prefix(&[len, 0])?.get(..usize::from(len))
}

fn estargz(bytes: &[u8]) -> Option<Result<u64, String>> {
    let field = extra(bytes, 26)?
        .strip_prefix(SUBFIELD)?
        .strip_prefix(&[22, 0])?;
    offset(field)
}

fn legacy(bytes: &[u8]) -> Option<Result<u64, String>> {
    offset(extra(bytes, 22)?)
}

fn external(bytes: &[u8]) -> Option<Result<u64, String>> {
    let field = extra(bytes, 21)?
        .strip_prefix(SUBFIELD)?
        .strip_prefix(&[17, 0])?;
    (field == EXTERNAL_MAGIC).then_some(Ok(0))
}

/// `None` where the magic is missing, an error where it is there but the number is not.
fn offset(field: &[u8]) -> Option<Result<u64, String>> {
    let digits = field.strip_suffix(MAGIC)?;
    let value = std::str::from_utf8(digits)
        .ok()
        .filter(|text| text.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .and_then(|text| u64::from_str_radix(text, 16).ok());
    Some(value.ok_or_else(|| "the TOC offset is not a hexadecimal number".to_owned()))
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a test that indexes wrongly fails")]
mod tests {
    use super::*;

    pub(super) fn member(extra: &[u8]) -> Vec<u8> {
        let len = u8::try_from(extra.len()).unwrap();
        let mut out = vec![0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, len, 0];
        out.extend_from_slice(extra);
        out.extend_from_slice(&[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
        out
    }

    fn kinds(offset: &str) -> [(FooterKind, Vec<u8>); 3] {
        [
            (
                FooterKind::Estargz,
                member(format!("SG\x16\0{offset}STARGZ").as_bytes()),
            ),
            (
                FooterKind::Legacy,
                member(format!("{offset}STARGZ").as_bytes()),
            ),
            (FooterKind::External, member(b"SG\x11\0STARGZEXTERNALTOC")),
        ]
    }

    #[test]
    fn tells_the_three_kinds() {
        for ((kind, footer), len) in kinds("00000000000003e8").into_iter().zip([51, 47, 46]) {
            assert_eq!(footer.len(), len);
            let tail = [&[7; 300][..], &footer].concat();
            let found = read_footer(&tail, 5000).unwrap().unwrap();
            let toc_offset = if kind == FooterKind::External {
                5000 - 46
            } else {
                1000
            };
            assert_eq!((found.kind(), found.toc_offset()), (kind, toc_offset));
            assert_eq!(found.toc_len(), 5000 - len as u64 - toc_offset);
            let lazy = found.check_inside(&Digest::sha256(b""));
            assert_eq!(lazy.is_ok(), kind == FooterKind::Estargz);
        }
    }

    #[test]
    fn a_plain_layer_has_none() {
        for tail in [&b""[..], b"short", &[0; 51], &[0xff; 300]] {
            assert_eq!(read_footer(tail, 1 << 20).unwrap(), None);
        }
        let (_, mut footer) = kinds("00000000000003e8").into_iter().next().unwrap();
        footer[20] = b'g';
        assert!(read_footer(&footer, 1 << 20).is_err(), "the magic stands");
        footer[33] ^= 1;
        assert_eq!(read_footer(&footer, 1 << 20).unwrap(), None);
    }

    #[test]
    fn refuses_offsets_that_make_no_sense() {
        for (offset, text) in [
            (
                "00000000000fffff",
                "puts the TOC at 1048575 of a blob of 5000 bytes",
            ),
            ("ffffffffffffffff", "puts the TOC at 18446744073709551615"),
            ("+000000000000001", "not a hexadecimal number"),
            ("000000000000 1ff", "not a hexadecimal number"),
        ] {
            let (_, footer) = kinds(offset).into_iter().next().unwrap();
            let error = read_footer(&footer, 5000).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        // The same footer in a blob that is shorter than the footer.
        let (_, footer) = kinds("0000000000000000").into_iter().next().unwrap();
        assert_eq!(read_footer(&footer, 20).unwrap(), None);
    }

    #[test]
    fn one_request_is_usually_enough_and_never_too_much() {
        for (blob, tail) in [
            (0, 0),
            (51, 51),
            (1 << 20, 64 << 10),
            (64 << 20, 1 << 20),
            (1 << 40, 2 << 20),
        ] {
            assert_eq!(tail_len(blob), tail);
        }
        assert!(check_toc_len(TOC_LEN_MAX).is_ok());
        assert!(check_toc_len(TOC_LEN_MAX + 1).is_err());
    }
}
