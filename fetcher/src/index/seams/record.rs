//! Taking note of seams and gaps while a layer streams.
//!
//! Invariant: what it keeps is bounded by [`super::SEAMS_LEN_MAX`] and one frame; a layer
//! that needs more gets no seams, and nothing else changes for it.

use super::{BODY_LEN_MAX, FRAME_LEN, HEADER_LEN, MAGIC, SEAMS_LEN_MAX, Seam, VERSION};
use crate::Result;
use crate::codec::Packer;
use crate::index::wire::Writer;
use crate::types::Digest;

/// Decoded bytes between two seams at least. Encoders end a block about every 30 to 60 KiB.
const SEAM_LEN: u64 = 24 << 10;

/// What was noted so far.
pub(in crate::index) struct Recorder {
    packer: Packer,
    seams: Table,
    last: Option<Seam>,
    gaps: Table,
    /// Bytes of the gap that is passing.
    gap: u64,
    /// Bytes of gaps that fill no frame yet.
    raw: Vec<u8>,
    frames: Table,
    packed: Vec<u8>,
    /// Whether there was more than may be kept.
    too_much: bool,
}

/// Entries as the body has them.
struct Table {
    count: u64,
    entries: Writer,
}

impl Table {
    fn new() -> Self {
        let entries = Writer(Vec::new());
        Self { count: 0, entries }
    }

    fn entry(&mut self) -> &mut Writer {
        self.count += 1;
        &mut self.entries
    }

    fn len(&self) -> u64 {
        self.entries.0.len() as u64
    }
}

impl Recorder {
    /// With nothing noted.
    pub(in crate::index) fn new() -> Result<Self> {
        Ok(Self {
            packer: Packer::fast()?,
            seams: Table::new(),
            last: None,
            gaps: Table::new(),
            gap: 0,
            raw: Vec::new(),
            frames: Table::new(),
            packed: Vec::new(),
            too_much: false,
        })
    }

    /// Notes a place between two blocks, unless the last one is near and this is no place
    /// that `must` be known.
    pub(in crate::index) fn seam(&mut self, seam: Seam, must: bool) {
        let last = self.last;
        let far = |last: Seam| seam.decoded.saturating_sub(last.decoded) >= SEAM_LEN;
        if self.too_much || !(must || last.is_none_or(far)) {
            return;
        }
        let (start, decoded) = last.map_or((0, 0), |last| (last.start, last.decoded));
        if last.is_some() && (seam.start <= start || seam.decoded <= decoded) {
            return;
        }
        let entry = self.seams.entry();
        entry.varint(seam.start.saturating_sub(start));
        entry.byte(seam.bits);
        entry.varint(seam.decoded.saturating_sub(decoded));
        self.last = Some(seam);
    }

    /// Notes bytes of the tar that are in no data file.
    pub(in crate::index) fn gap(&mut self, bytes: &[u8]) -> Result<()> {
        self.gap = self.gap.saturating_add(bytes.len() as u64);
        let mut rest = bytes;
        while !self.too_much && !rest.is_empty() {
            let room = FRAME_LEN.saturating_sub(self.raw.len());
            let (now, later) = rest.split_at_checked(room).unwrap_or((rest, &[]));
            self.raw.extend_from_slice(now);
            rest = later;
            if self.raw.len() >= FRAME_LEN {
                self.end_frame()?;
            }
        }
        Ok(())
    }

    /// Notes that payload passes.
    pub(in crate::index) fn payload(&mut self) {
        if self.gap > 0 && !self.too_much {
            self.gaps.entry().varint(self.gap);
        }
        self.gap = 0;
    }

    fn end_frame(&mut self) -> Result<()> {
        let frame = self.packer.pack(&self.raw)?;
        self.raw.clear();
        let entry = self.frames.entry();
        entry.varint(frame.len() as u64);
        entry.0.extend(crc32fast::hash(&frame).to_le_bytes());
        self.packed.extend_from_slice(&frame);
        let body = self.seams.len() + self.gaps.len() + self.frames.len();
        // Half, as the tables are not packed yet and what packs badly grows.
        if self.packed.len() as u64 + body > SEAMS_LEN_MAX / 2 || body > BODY_LEN_MAX / 2 {
            self.too_much = true;
            (self.raw, self.packed) = (Vec::new(), Vec::new());
        }
        Ok(())
    }

    /// The file of the layer; `None` where there is nothing to choose from, or too much.
    pub(in crate::index) fn finish(mut self, blob_digest: &Digest) -> Result<Option<Vec<u8>>> {
        if !self.raw.is_empty() {
            self.end_frame()?;
        }
        if self.too_much || self.seams.count < 2 {
            return Ok(None);
        }
        self.gaps.entry().varint(self.gap);
        let mut body = Writer(Vec::new());
        body.byte(match blob_digest {
            Digest::Sha256(_) => 1,
            Digest::Sha512(_) => 2,
        });
        body.0.extend_from_slice(blob_digest.as_bytes());
        for table in [&self.seams, &self.gaps, &self.frames] {
            body.varint(table.count);
            body.0.extend_from_slice(&table.entries.0);
        }
        let tables = self.packer.pack(&body.0)?;
        let mut out = Vec::with_capacity(HEADER_LEN + tables.len() + self.packed.len());
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&crc32fast::hash(&tables).to_le_bytes());
        for part in [&tables, &body.0, &self.packed] {
            out.extend_from_slice(&(part.len() as u64).to_le_bytes());
        }
        out.extend_from_slice(&tables);
        out.extend_from_slice(&self.packed);
        Ok(Some(out))
    }
}
