//! Where the bytes of a layer's tar are on this node.
//!
//! Invariant: a place of the tar is in exactly one gap or payload; lengths that do not add
//! up are an error. Pure.

use crate::Result;
use crate::index::seams::Seams;
use crate::index::{FileKind, LayerIndex};
use crate::types::ByteRange;

use super::foreign;

/// A run of the tar's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stretch {
    /// Bytes of the gaps, one after another.
    Gap(ByteRange),
    /// Bytes of the data file.
    Data(ByteRange),
}

/// A payload and the gap before it.
#[derive(Debug, Clone, Copy)]
struct Payload {
    /// Where it begins in the tar.
    tar: u64,
    /// Where it begins in the data file.
    data: u64,
    size: u64,
    /// Where its gap ends among the gaps.
    gap_end: u64,
}

/// The payloads of a layer in the order of its tar.
#[derive(Debug)]
pub struct Layout(Vec<Payload>);

impl Layout {
    /// Of the layer of `index`, by its gaps.
    pub fn new(index: &LayerIndex, seams: &Seams) -> Result<Self> {
        if seams.blob_digest != index.blob_digest {
            return Err(foreign("they name another layer"));
        }
        let payloads = index.files.iter().filter_map(|file| match file.kind {
            FileKind::Regular { size, data_offset } if size > 0 => Some((size, data_offset)),
            _ => None,
        });
        let payloads: Vec<(u64, u64)> = payloads.collect();
        if payloads.len().checked_add(1) != Some(seams.gaps.len()) {
            return Err(foreign("they do not have its number of files"));
        }
        let (mut tar, mut gap_end) = (0_u64, 0_u64);
        let place = |((size, data), gap): ((u64, u64), &u64)| {
            tar = tar.checked_add(*gap)?;
            gap_end = gap_end.checked_add(*gap)?;
            let payload = Payload {
                tar,
                data,
                size,
                gap_end,
            };
            tar = tar.checked_add(size)?;
            Some(payload)
        };
        let places = payloads.into_iter().zip(&seams.gaps).map(place);
        let places = places.collect::<Option<Vec<_>>>();
        places
            .map(Self)
            .ok_or_else(|| foreign("their lengths are too long"))
    }

    /// Where each chunk begins in the tar.
    pub(super) fn starts(&self, index: &LayerIndex) -> Result<Vec<u64>> {
        let mut payloads = self.0.iter().peekable();
        let start = |chunk: &crate::index::Chunk| loop {
            let payload = payloads.peek()?;
            let into = chunk.data_offset.checked_sub(payload.data)?;
            if into < payload.size {
                return payload.tar.checked_add(into);
            }
            payloads.next();
        };
        let starts = index.chunks.iter().map(start);
        let starts = starts.collect::<Option<_>>();
        starts.ok_or_else(|| foreign("a chunk is in no file"))
    }

    /// Where the bytes `range` of the tar are, in order; `None` where it goes on after the
    /// last payload.
    pub fn stretches(&self, range: ByteRange) -> Option<Vec<Stretch>> {
        let mut found = Vec::new();
        let mut at = range.start();
        let end_of = |payload: &Payload| payload.tar.saturating_add(payload.size);
        let first = self.0.partition_point(|payload| end_of(payload) <= at);
        for payload in self.0.get(first..)? {
            let gap_to = payload.tar.min(range.end());
            if at < gap_to {
                let end = payload.gap_end.checked_sub(payload.tar - gap_to)?;
                found.push(Stretch::Gap(ByteRange::new(
                    end.checked_sub(gap_to - at)?,
                    end,
                )?));
                at = gap_to;
            }
            let to = end_of(payload).min(range.end());
            if at < to {
                let data = payload.data.checked_add(at - payload.tar)?;
                found.push(Stretch::Data(ByteRange::at(data, to - at)?));
                at = to;
            }
            if at == range.end() {
                return Some(found);
            }
        }
        None
    }
}
