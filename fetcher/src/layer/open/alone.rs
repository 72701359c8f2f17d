//! Whether a layer may be lazy on this node: each of its chunks must be had alone.
//!
//! Invariant: pure. What passes is never refused when it is read, neither by the plan of its
//! requests nor by the memory they may take; so no container meets a file that cannot be
//! read, and a layer that does not pass is known before it is mounted.

use crate::index::{Chunk, LayerIndex};
use crate::layer::fetch::memory_of_one;
use crate::plan::MEMBER_SPAN_MAX;
use crate::{Error, Result};

/// [`Error::Unsupported`] if some chunk cannot be had within `memory_bytes_max`.
pub(super) fn check(index: &LayerIndex, memory_bytes_max: u64) -> Result<()> {
    let refused = (0_u32..).zip(&index.chunks);
    let mut refused =
        refused.filter_map(|(id, chunk)| Some((id, reason(chunk, memory_bytes_max)?)));
    match refused.next() {
        None => Ok(()),
        Some((id, why)) => Err(Error::Unsupported {
            what: format!("reading layer {} lazily", index.blob_digest),
            detail: format!("chunk {id} {why}"),
        }),
    }
}

/// What is in the way of having the chunk alone.
fn reason(chunk: &Chunk, memory_bytes_max: u64) -> Option<String> {
    if !chunk.is_refetchable() {
        return Some("can only be read by streaming the layer".to_owned());
    }
    let end = chunk.encoding.skip().saturating_add(chunk.len.into());
    if end > MEMBER_SPAN_MAX {
        return Some(format!(
            "ends {end} bytes into what is decoded with it, at most {MEMBER_SPAN_MAX} are"
        ));
    }
    let need = memory_of_one(chunk);
    (need > memory_bytes_max)
        .then(|| format!("takes {need} bytes of memory to decode, {memory_bytes_max} are allowed"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Encoding;
    use crate::types::ByteRange;

    #[test]
    fn each_reason_begins_at_its_limit() {
        const MAX: u64 = 64 << 20;
        let fixed = memory_of_one(&chunk(Encoding::Stream, 0));
        let member = |skip, blob| Encoding::GzipMember {
            blob: ByteRange::at(9, blob).unwrap(),
            skip,
        };
        let room = MAX - fixed - 1000;
        let len = 1 << 20;
        let skip = MEMBER_SPAN_MAX - u64::from(len);
        let table = [
            (Encoding::Stream, 1, Some("streaming")),
            (member(0, room), 1000, None),
            (member(0, room + 1), 1000, Some("67108865 bytes of memory")),
            (member(0, room), 1001, Some("67108865 bytes of memory")),
            (member(skip, 10), len, None),
            (member(skip + 1, 10), len, Some("134217729 bytes into")),
            (member(u64::MAX, u64::MAX - 9), u32::MAX, Some("bytes into")),
        ];
        for (encoding, len, expected) in table {
            let why = reason(&chunk(encoding, len), MAX);
            match expected {
                Some(words) => assert!(why.unwrap().contains(words), "{encoding:?}"),
                None => assert_eq!(why, None, "{encoding:?}"),
            }
        }
    }

    fn chunk(encoding: Encoding, len: u32) -> Chunk {
        Chunk {
            encoding,
            data_offset: 0,
            len,
            chunk_digest: None,
        }
    }
}
