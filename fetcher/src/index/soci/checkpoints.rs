//! Where the blob can be entered, and the spans between those places.
//!
//! ```text
//! gzip: number of checkpoints i32 | span size i64 | checkpoint ...
//! checkpoint: offset in the blob u64 | in the tar u64 | bits u8 | window 32768
//! tar:  a FlatBuffer of version, span size, size
//! ```
//!
//! `bits` highest bits of the byte before the offset belong to the span, which begins with
//! that byte then. The first releases left the first checkpoint out (and counted it): it is
//! at 10, behind the shortest gzip header, and at 0 of the tar. Where a header is longer the
//! digest of that span does not match, and nothing of it is read.

use bytes::Bytes;

use super::Head;
use super::flatbuffer::{Found, Table};
use crate::codec::Packer;
use crate::codec::gzip::EXPANSION_MAX;
use crate::codec::zran::REACH;
use crate::index::Span;
use crate::index::details::Spans;
use crate::types::ByteRange;
use crate::{Error, Result};

/// Bytes before the first checkpoint.
const HEAD_LEN: usize = 12;
/// Bytes of a checkpoint without its window.
const FIXED_LEN: usize = 17;
/// Length of the shortest gzip header.
const GZIP_HEADER_LEN: u64 = 10;
/// Encoded bytes of a span that are worth fetching for one file of it; they are held in
/// memory while they are verified. Tools make them of 4 MiB, decoded.
pub(super) const SPAN_LEN_MAX: u64 = 64 << 20;
/// Field numbers of a tar's checkpoints.
const TAR_SPAN_SIZE: u16 = 1;
const TAR_SIZE: u16 = 2;

/// A place where decoding can begin, and the span from there to the next.
pub(super) struct Checkpoint<'a> {
    /// The encoded bytes of the span. The first may be shared with the span before.
    pub(super) blob: ByteRange,
    /// How many bits of the first byte belong to it; 0 for the whole byte.
    pub(super) bits: u8,
    /// The decoded bytes of the span, in the tar.
    pub(super) tar: ByteRange,
    /// What was decoded before; empty where nothing was, or nothing is needed.
    window: &'a [u8],
}

/// Checkpoints of a gzip blob.
pub(super) fn of_gzip<'a>(head: &Head<'a>, blob_size: u64) -> Found<Vec<Checkpoint<'a>>> {
    let places = places(head.checkpoints)?;
    if places.len() != head.span_digests.len() {
        return Err(format!(
            "it has {} checkpoints, but {} spans",
            places.len(),
            head.span_digests.len()
        ));
    }
    let mut found = Vec::with_capacity(places.len());
    let mut places = places.into_iter().enumerate().peekable();
    while let Some((number, place)) = places.next() {
        let (end, tar_end) = match places.peek() {
            Some((_, next)) => (next.offset, next.tar_offset),
            None => (blob_size, head.tar_len.max(place.tar_offset)),
        };
        let start = place.offset.checked_sub(u64::from(place.bits > 0));
        let blob = start.and_then(|start| ByteRange::new(start, end));
        let blob = blob.filter(|blob| place.offset < end && blob.end() <= blob_size);
        let tar = ByteRange::new(place.tar_offset, tar_end);
        let (Some(blob), Some(tar), 0..=7) = (blob, tar, place.bits) else {
            return Err(format!(
                "its checkpoint {number} does not ascend, or is damaged"
            ));
        };
        let is_last = places.peek().is_none();
        if !is_last && (tar.is_empty() || tar.len() > blob.len().saturating_mul(EXPANSION_MAX)) {
            return Err(format!(
                "its span {number} of {} bytes decodes to {}",
                blob.len(),
                tar.len()
            ));
        }
        found.push(Checkpoint {
            blob,
            bits: place.bits,
            tar,
            window: place.window,
        });
    }
    match found.first() {
        Some(first) if first.tar.start() == 0 => Ok(found),
        _ => Err("its first checkpoint is not at the start of the tar".to_owned()),
    }
}

/// A checkpoint as it stands there.
struct Place<'a> {
    offset: u64,
    tar_offset: u64,
    bits: u8,
    window: &'a [u8],
}

fn places(bytes: &[u8]) -> Found<Vec<Place<'_>>> {
    let (head, rest) = bytes
        .split_first_chunk::<HEAD_LEN>()
        .ok_or("its checkpoints are cut off")?;
    let [a, b, c, d, ..] = *head;
    let count = usize::try_from(i32::from_le_bytes([a, b, c, d])).unwrap_or(0);
    let each = FIXED_LEN + REACH;
    let mut found = Vec::new();
    // The division comes first: the count is anything.
    if rest.len() % each != 0 || count == 0 {
        return Err("its checkpoints do not have the length they say".to_owned());
    }
    match count.checked_sub(rest.len() / each) {
        Some(0) => {}
        Some(1) => found.push(Place {
            offset: GZIP_HEADER_LEN,
            tar_offset: 0,
            bits: 0,
            window: &[],
        }),
        _ => return Err("its checkpoints do not have the length they say".to_owned()),
    }
    for place in rest.chunks_exact(each) {
        let damaged = || "a checkpoint is damaged".to_owned();
        let (offset, place) = place.split_first_chunk().ok_or_else(damaged)?;
        let (tar_offset, place) = place.split_first_chunk().ok_or_else(damaged)?;
        let (bits, window) = place.split_first().ok_or_else(damaged)?;
        let tar_offset = u64::from_le_bytes(*tar_offset);
        found.push(Place {
            offset: u64::from_le_bytes(*offset),
            tar_offset,
            bits: *bits,
            // Before the first byte there is nothing to refer to.
            window: if tar_offset == 0 { &[] } else { window },
        });
    }
    Ok(found)
}

/// Spans of a blob that is the tar.
pub(super) fn of_tar<'a>(head: &Head<'a>, blob_size: u64) -> Found<Vec<Checkpoint<'a>>> {
    let root = Table::root(head.checkpoints)?;
    let (each, size) = (root.i64(TAR_SPAN_SIZE)?, root.i64(TAR_SIZE)?);
    let sizes = u64::try_from(each).ok().zip(u64::try_from(size).ok());
    let (each, _) = sizes
        .filter(|(each, size)| *each > 0 && *size == blob_size)
        .ok_or_else(|| format!("its spans are of {each} bytes, in {size} of {blob_size}"))?;
    let count = head.span_digests.len();
    if blob_size.div_ceil(each) != count as u64 {
        return Err(format!(
            "it has {count} spans of {each} bytes in a blob of {blob_size}"
        ));
    }
    let span = |number: u64| {
        let start = number.saturating_mul(each).min(blob_size);
        let blob = ByteRange::new(start, start.saturating_add(each).min(blob_size))?;
        Some(Checkpoint {
            blob,
            bits: 0,
            tar: blob,
            window: &[],
        })
    };
    let spans = (0..count as u64).map(span).collect::<Option<_>>();
    spans.ok_or_else(|| "its spans do not ascend".to_owned())
}

/// Those of `checkpoints` that are `used`, as spans, and the details of all of them.
pub(super) fn spans(
    head: &Head<'_>,
    checkpoints: &[Checkpoint<'_>],
    used: &[usize],
) -> Result<(Vec<Span>, Bytes)> {
    let mut packer = Packer::new()?;
    let mut spans = Spans::default();
    for number in used {
        let Some(checkpoint) = checkpoints.get(*number) else {
            continue;
        };
        let digest = head.span_digest(*number);
        let digest = digest.map_err(|rule| Error::malformed("zTOC", rule))?;
        let window = if checkpoint.window.is_empty() {
            Vec::new()
        } else {
            packer.pack(checkpoint.window)?
        };
        let begin = (checkpoint.blob.start(), checkpoint.bits);
        spans.push(begin, &[digest], &window)?;
    }
    let (spans, details) = spans.finish();
    Ok((spans, details.into()))
}
