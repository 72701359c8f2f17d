//! The decoded bytes of a layer that is here, without its blob.
//!
//! Invariant: payload leaves only after it was compared with its SHA-256, from the very
//! bytes that were read; gaps only with their checksum. Never fetches.

use std::os::unix::fs::FileExt as _;

use bytes::Bytes;

use crate::codec::{self, zran};
use crate::index::ChunkId;
use crate::index::seams::Seams;
use crate::index::shape::{Layout, Stretch};
use crate::store::file::read::touching;
use crate::store::file::{DATA, LayerFile};
use crate::types::ByteRange;
use crate::{Error, Result};

/// The decoded layer, as far as it is here.
pub(super) struct Tar<'a> {
    file: &'a LayerFile,
    layout: &'a Layout,
    seams: &'a Seams,
    /// What was read last: neighbours share it.
    chunk: Option<(ChunkId, Bytes)>,
    frame: Option<(u64, Vec<u8>)>,
}

impl<'a> Tar<'a> {
    pub(super) fn new(file: &'a LayerFile, layout: &'a Layout, seams: &'a Seams) -> Self {
        Self {
            file,
            layout,
            seams,
            chunk: None,
            frame: None,
        }
    }

    /// What decoding from the place `at` on may need of what is before it.
    pub(super) fn window(&mut self, at: u64) -> Result<Option<Vec<u8>>> {
        let reach = zran::REACH as u64;
        let Some(window) = self.read(at.saturating_sub(reach), at)? else {
            return Ok(None);
        };
        let telling = zran::TELLING as u64;
        Ok(Some(match self.read(at, at.saturating_add(telling))? {
            Some(next) => zran::likely_window(&window, &next),
            None => window,
        }))
    }

    /// The bytes from `start` to `end`, verified; `None` where some are not here.
    fn read(&mut self, start: u64, end: u64) -> Result<Option<Vec<u8>>> {
        let range = ByteRange::new(start, end);
        let Some((range, stretches)) =
            range.and_then(|range| Some((range, self.layout.stretches(range)?)))
        else {
            return Ok(None);
        };
        let mut out = Vec::new();
        for stretch in stretches {
            let whole = match stretch {
                Stretch::Gap(range) => self.gap(range, &mut out)?,
                Stretch::Data(range) => self.data(range, &mut out)?,
            };
            if !whole {
                return Ok(None);
            }
        }
        Ok((out.len() as u64 == range.len()).then_some(out))
    }

    fn gap(&mut self, range: ByteRange, out: &mut Vec<u8>) -> Result<bool> {
        let len = Seams::frame_len();
        let mut at = range.start();
        while at < range.end() {
            let number = at / len;
            let frame = match self.frame.take().filter(|(last, _)| *last == number) {
                Some((_, frame)) => frame,
                None => self.seams.frame(number)?,
            };
            let begin = number.saturating_mul(len);
            let end = range.end().min(begin.saturating_add(len));
            let found = part(&frame, at - begin, end - begin);
            let is_there = found.map(|found| out.extend_from_slice(found)).is_some();
            self.frame = Some((number, frame));
            if !is_there {
                return Ok(false);
            }
            at = end;
        }
        Ok(true)
    }

    fn data(&mut self, range: ByteRange, out: &mut Vec<u8>) -> Result<bool> {
        for id in touching(&self.file.index.chunks, range) {
            let bytes = match self.chunk.take().filter(|(last, _)| *last == id) {
                Some((_, bytes)) => Some(bytes),
                None => self.file.verified(id)?,
            };
            let Some(bytes) = bytes else {
                return Ok(false);
            };
            let begin = self.file.chunk(id)?.data_offset;
            let from = range.start().max(begin) - begin;
            let to = range.end().saturating_sub(begin).min(bytes.len() as u64);
            let Some(found) = part(&bytes, from, to) else {
                return Ok(false);
            };
            out.extend_from_slice(found);
            self.chunk = Some((id, bytes));
        }
        Ok(true)
    }
}

fn part(bytes: &[u8], from: u64, to: u64) -> Option<&[u8]> {
    bytes.get(usize::try_from(from).ok()?..usize::try_from(to).ok()?)
}

impl LayerFile {
    /// The bytes of a chunk that is here and has its digest.
    pub(super) fn verified(&self, id: ChunkId) -> Result<Option<Bytes>> {
        let chunk = self.chunk(id)?;
        if !self.is_present(id) {
            return Ok(None);
        }
        let mut bytes = vec![0; usize::try_from(chunk.len).unwrap_or(0)];
        self.data
            .read_exact_at(&mut bytes, chunk.data_offset)
            .map_err(|e| Error::io("read from", self.dir.join(DATA), e))?;
        let what = || format!("chunk {id} of layer {}", self.index.blob_digest);
        match codec::verify_chunk(what, &self.chunk_digest(id)?, bytes) {
            Ok(bytes) => Ok(Some(bytes.into_bytes())),
            // Evicted this moment, or rotten: its next reader finds out.
            Err(Error::Corrupt { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
