//! A layer's index file, of which only the tables are held in memory.
//!
//! Invariant: details leave here verified, and those of one span are held at a time.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::index::details::SpanDetails;
use crate::index::wire::{self, HEADER_LEN, Header};
use crate::index::{LayerIndex, Span};
use crate::{Error, Result};

/// What is behind the tables of an index file.
pub(super) struct Details {
    file: File,
    path: PathBuf,
    /// Where they begin in the file.
    start: u64,
    /// Number of the span that was read last, and what it has. Neighbours are read together.
    last: Mutex<Option<(u32, Arc<SpanDetails>)>>,
}

/// Reads the tables of the index file at `path`.
pub(super) fn open(path: &Path) -> Result<(LayerIndex, Details)> {
    let io = |error| Error::io("read", path, error);
    let file = File::open(path).map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    let cut_off = || Error::malformed(path.display().to_string(), "it is cut off");
    let mut head = [0; HEADER_LEN];
    if len < HEADER_LEN as u64 {
        return Err(cut_off());
    }
    file.read_exact_at(&mut head, 0).map_err(io)?;
    let header = Header::parse(&head)?;
    if header.total_len() != len {
        return Err(cut_off());
    }
    let core_len = header.core_end() - HEADER_LEN as u64;
    let mut core = vec![0; usize::try_from(core_len).map_err(|_| cut_off())?];
    file.read_exact_at(&mut core, HEADER_LEN as u64)
        .map_err(io)?;
    let index = wire::decode_core(&header, &core)?;
    let details = Details {
        file,
        path: path.to_path_buf(),
        start: header.core_end(),
        last: Mutex::new(None),
    };
    Ok((index, details))
}

impl Details {
    /// The details of span `number`, which begin with so many digests.
    pub(super) fn read(&self, number: u32, span: &Span, digests: u32) -> Result<Arc<SpanDetails>> {
        if let Some((last, details)) = &*self.last.lock()
            && *last == number
        {
            return Ok(Arc::clone(details));
        }
        // The index was checked: no details are longer than some MiB.
        let mut bytes = vec![0; usize::try_from(span.details.len()).unwrap_or(0)];
        let at = self.start.saturating_add(span.details.start());
        self.file
            .read_exact_at(&mut bytes, at)
            .map_err(|e| Error::io("read", &self.path, e))?;
        let details = Arc::new(SpanDetails::parse(span, digests, Bytes::from(bytes))?);
        *self.last.lock() = Some((number, Arc::clone(&details)));
        Ok(details)
    }
}
