//! Reads the headers of a tar, skipping the payloads.
//!
//! Invariant: every span that is returned lies within the input. Entries that an earlier
//! conversion added (TOC, landmarks) and comments between entries are left out.

use std::io::{Read, Seek, SeekFrom};

use super::entry::{BLOCK, Block, Meta, check_global, entry_meta, peek};
use super::{Fault, NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_NAME};
use crate::Result as LayerResult;

/// Most entries of a layer. A TOC with more would be hundreds of megabytes.
const ENTRIES_MAX: usize = 1_000_000;
/// Longest header of one entry in bytes, all extension headers included.
const HEAD_BYTES_MAX: u64 = 2 << 20;

/// One entry of the input.
#[derive(Debug)]
pub(super) struct Scanned {
    pub(super) meta: Meta,
    /// Where its first header block is.
    pub(super) head_offset: u64,
    /// Length of its header blocks in bytes, extension headers included.
    pub(super) head_len: usize,
}

impl Scanned {
    /// Where its payload is.
    pub(super) fn payload_offset(&self) -> u64 {
        self.head_offset + self.head_len as u64
    }
}

/// What the headers of a layer's tar say.
#[derive(Debug)]
pub struct Survey {
    pub(super) entries: Vec<Scanned>,
}

impl Survey {
    /// Reads the headers of `input` from its start. `what` names it in errors. Blocks.
    pub fn take(what: &str, input: &mut (impl Read + Seek)) -> LayerResult<Self> {
        let entries = scan(input).map_err(|fault| fault.into_error(what))?;
        Ok(Self { entries })
    }
}

/// The entries of the tar `input`, in order.
fn scan(input: &mut (impl Read + Seek)) -> Result<Vec<Scanned>, Fault> {
    let end = input.seek(SeekFrom::End(0)).map_err(Fault::read)?;
    let mut entries = Vec::new();
    let mut at = 0;
    while let Some(entry) = next(input, at, end)? {
        let padded = entry.meta.size.checked_next_multiple_of(BLOCK as u64);
        let payload_end = entry.payload_offset().checked_add(entry.meta.size);
        let after = padded.and_then(|len| entry.payload_offset().checked_add(len));
        match (after, payload_end) {
            // The last padding may be missing; the last payload may not.
            (Some(after), Some(payload_end)) if payload_end <= end => at = after,
            _ => return Err(Fault::malformed("its tar ends early").about(&entry.meta.name)),
        }
        if matches!(
            entry.meta.name.as_str(),
            TOC_NAME | PREFETCH_LANDMARK | NO_PREFETCH_LANDMARK
        ) {
            continue;
        }
        if entries.len() == ENTRIES_MAX {
            return Err(Fault::Limit(format!("more than {ENTRIES_MAX} entries")));
        }
        entries.push(entry);
    }
    Ok(entries)
}

/// The entry whose first header block is at `at`; none at the end of the archive.
fn next(input: &mut (impl Read + Seek), at: u64, end: u64) -> Result<Option<Scanned>, Fault> {
    if at >= end {
        return Ok(None);
    }
    input.seek(SeekFrom::Start(at)).map_err(Fault::read)?;
    let mut head = Vec::new();
    let mut head_offset = at;
    loop {
        let mut block: Block = [0; BLOCK];
        read(input, &mut block)?;
        if head.is_empty() && block == [0; BLOCK] {
            // One zero block ends an archive for every reader that matters.
            return Ok(None);
        }
        let peek = peek(&block)?;
        head.extend_from_slice(&block);
        if !peek.extension {
            break;
        }
        let len = peek
            .size
            .checked_next_multiple_of(BLOCK as u64)
            .filter(|len| head.len() as u64 + len <= HEAD_BYTES_MAX)
            .and_then(|len| usize::try_from(len).ok())
            .ok_or_else(|| {
                Fault::Limit(format!("an extended header beyond {HEAD_BYTES_MAX} bytes"))
            })?;
        let start = head.len();
        head.resize(start + len, 0);
        let payload = head.get_mut(start..).unwrap_or_default();
        read(input, payload)?;
        // A header about all entries stands before an entry's own headers, and what may
        // be in it means nothing to files.
        if peek.global && start == BLOCK {
            let len = usize::try_from(peek.size).unwrap_or(payload.len());
            check_global(payload.get(..len).unwrap_or_default())?;
            head_offset += head.len() as u64;
            head.clear();
        }
    }
    Ok(Some(Scanned {
        meta: entry_meta(&head)?,
        head_offset,
        head_len: head.len(),
    }))
}

fn read(input: &mut impl Read, buffer: &mut [u8]) -> Result<(), Fault> {
    input
        .read_exact(buffer)
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => Fault::malformed("its tar ends inside a header"),
            _ => Fault::read(error),
        })
}
