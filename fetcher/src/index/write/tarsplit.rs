//! tar-split: what of a tar is not payload, so that the tar can be put together again
//! from the files.
//!
//! One JSON object a line, in the tar's order: for each entry a segment (padding of the
//! payload before, then all header blocks of the entry) and a file (its size, and the
//! CRC-64 of its payload); one segment with the end of the archive.
//!
//! Invariant: segments and payloads one after another are the tar. The lines are
//! compressed as they come, so what is held is the compressed form.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

use super::Fault;
use crate::codec::zstd_write::FrameWriter;

/// Longest form, compressed, in bytes; readers hold all of it in memory.
const ENCODED_BYTES_MAX: usize = 128 << 20;

const FILE: u8 = 1;
const SEGMENT: u8 = 2;

#[derive(Serialize)]
struct Line<'a> {
    r#type: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "is_zero")]
    size: u64,
    payload: Option<String>,
    position: u64,
}

/// The lines of one tar, being collected.
pub(super) struct TarSplit {
    lines: FrameWriter,
    segment: Vec<u8>,
    position: u64,
}

impl TarSplit {
    /// Of no entries yet, compressed at `level`.
    pub(super) fn new(level: u32) -> Result<Self, Fault> {
        Ok(Self {
            lines: FrameWriter::new(level).map_err(Fault::compress)?,
            segment: Vec::new(),
            position: 0,
        })
    }

    /// Adds the next bytes of the tar that are not payload.
    pub(super) fn segment(&mut self, bytes: &[u8]) {
        self.segment.extend_from_slice(bytes);
    }

    /// Adds the payload after the segment; `checksum` only of one that has bytes.
    pub(super) fn file(
        &mut self,
        name: &str,
        size: u64,
        checksum: Option<[u8; 8]>,
    ) -> Result<(), Fault> {
        self.end_segment()?;
        self.line(Line {
            r#type: FILE,
            name: Some(name),
            size,
            payload: checksum.map(|sum| STANDARD.encode(sum)),
            position: 0,
        })
    }

    /// The frame of all lines, and the lines' length in bytes.
    pub(super) fn finish(mut self) -> Result<(Vec<u8>, u64), Fault> {
        self.end_segment()?;
        let (frame, len) = self.lines.finish().map_err(Fault::compress)?;
        within_limit(frame.len())?;
        Ok((frame, len))
    }

    fn end_segment(&mut self) -> Result<(), Fault> {
        let payload = STANDARD.encode(&self.segment);
        self.segment.clear();
        self.line(Line {
            r#type: SEGMENT,
            name: None,
            size: 0,
            payload: Some(payload),
            position: 0,
        })
    }

    fn line(&mut self, line: Line<'_>) -> Result<(), Fault> {
        let position = self.position;
        let line = Line { position, ..line };
        let mut text = serde_json::to_vec(&line)
            .map_err(|error| Fault::Io("write the tar-split of", error.into()))?;
        text.push(b'\n');
        self.position += 1;
        self.lines.write(&text).map_err(Fault::compress)?;
        within_limit(self.lines.encoded_len())
    }
}

fn within_limit(len: usize) -> Result<(), Fault> {
    if len > ENCODED_BYTES_MAX {
        return Err(Fault::Limit(format!(
            "its tar-split would be {len} bytes, at most {ENCODED_BYTES_MAX}"
        )));
    }
    Ok(())
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(size: &u64) -> bool {
    *size == 0
}

#[cfg(test)]
mod tests;
