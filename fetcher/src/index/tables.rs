//! Building the two tables entry by entry.
//!
//! Invariant: payloads and chunks get their places in the data file here and nowhere
//! else, so every format lays it out alike; hard links mean what they meant in the tar. What is
//! kept is within the [`Budget`].

use std::collections::HashSet;

use super::limits::{Budget, DATA_LEN_MAX, ENTRIES_MAX};
use super::{
    Chunk, Encoding, FileEntry, FileKind, LayerBlob, LayerIndex, Span, align_up, path, relink,
};
use crate::{Error, Result};

/// Tables under construction.
pub(super) struct Tables {
    /// The layer, for messages.
    what: String,
    files: Vec<FileEntry>,
    chunks: Vec<Chunk>,
    /// End of the last payload.
    file_end: u64,
    /// End of the last chunk.
    chunk_end: u64,
    budget: Budget,
    /// Hard links to themselves: how GNU tar writes a file that it was told twice.
    again: Vec<Vec<u8>>,
}

impl Tables {
    /// Empty tables of the layer `what`.
    pub(super) fn new(what: String) -> Self {
        Self {
            what,
            files: Vec::new(),
            chunks: Vec::new(),
            file_end: 0,
            chunk_end: 0,
            budget: Budget::default(),
            again: Vec::new(),
        }
    }

    /// Makes room for `files` entries, as far as a layer may have them.
    pub(super) fn reserve(&mut self, files: usize) {
        let files = files.min(usize::try_from(ENTRIES_MAX).unwrap_or(usize::MAX));
        self.files.reserve(files);
        self.chunks.reserve(files);
    }

    /// The layer, for messages.
    pub(super) fn what(&self) -> &str {
        &self.what
    }

    /// An error about one file of the layer.
    pub(super) fn malformed(&self, path: &[u8], rule: impl AsRef<str>) -> Error {
        Error::malformed(
            &*self.what,
            format!("{}: {}", path::show(path), rule.as_ref()),
        )
    }

    /// Adds an entry. A regular file gets its place (whatever place it came with); the
    /// chunks that cover it must follow.
    pub(super) fn file(&mut self, mut entry: FileEntry) -> Result<()> {
        self.budget.entry(&self.what)?;
        self.budget.metadata(&self.what, metadata_len(&entry))?;
        match &mut entry.kind {
            FileKind::Regular {
                size: 0,
                data_offset,
            } => *data_offset = 0,
            FileKind::Regular { size, data_offset } => {
                let (start, end) = place(self.file_end, *size).ok_or_else(|| {
                    Error::limit(
                        format!("{}, file {}", self.what, path::show(&entry.path)),
                        format!("its {size} bytes take the layer over {DATA_LEN_MAX}"),
                    )
                })?;
                *data_offset = start;
                (self.file_end, self.chunk_end) = (end, start);
            }
            FileKind::Hardlink { target } if *target == entry.path => {
                self.again.push(entry.path);
                return Ok(());
            }
            FileKind::Directory
            | FileKind::Symlink { .. }
            | FileKind::Hardlink { .. }
            | FileKind::CharDevice { .. }
            | FileKind::BlockDevice { .. }
            | FileKind::Fifo => {}
        }
        self.files.push(entry);
        Ok(())
    }

    /// Where the next chunk goes in the data file.
    pub(super) fn chunk_offset(&self) -> u64 {
        self.chunk_end
    }

    /// Adds the next chunk of the last regular file.
    pub(super) fn chunk(&mut self, encoding: Encoding, len: u32, digest: [u8; 32]) {
        self.chunk_of_span(encoding, len, Some(digest));
    }

    /// [`Self::chunk`] whose digest may be among its span's details.
    pub(super) fn chunk_of_span(
        &mut self,
        encoding: Encoding,
        len: u32,
        chunk_digest: Option<[u8; 32]>,
    ) {
        self.chunks.push(Chunk {
            encoding,
            data_offset: self.chunk_end,
            len,
            chunk_digest,
        });
        self.chunk_end = self.chunk_end.saturating_add(u64::from(len));
    }

    /// The chunks so far, for whoever learns only at the end how long their members are.
    pub(super) fn chunks_mut(&mut self) -> &mut [Chunk] {
        &mut self.chunks
    }

    /// Checks everything and makes the index.
    pub(super) fn finish(self, blob: LayerBlob) -> Result<LayerIndex> {
        self.finish_with(blob, Vec::new())
    }

    /// [`Self::finish`] with the places where a gzip blob can be entered.
    pub(super) fn finish_with(mut self, blob: LayerBlob, spans: Vec<Span>) -> Result<LayerIndex> {
        if !self.again.is_empty() {
            let names: HashSet<&[u8]> = self.files.iter().map(|f| f.path.as_slice()).collect();
            if let Some(path) = self
                .again
                .iter()
                .find(|path| !names.contains(path.as_slice()))
            {
                return Err(self.malformed(path, "it is a hard link to itself"));
            }
        }
        relink::to_earlier_files(&mut self.files).map_err(|(path, rule)| Error::Unsupported {
            what: format!("file {} of {}", path::show(&path), self.what),
            detail: rule.to_owned(),
        })?;
        self.files.shrink_to_fit();
        self.chunks.shrink_to_fit();
        LayerIndex::with_spans(blob, self.files, self.chunks, spans)
    }
}

fn place(file_end: u64, size: u64) -> Option<(u64, u64)> {
    let start = align_up(file_end)?;
    let end = start.checked_add(size)?;
    (end <= DATA_LEN_MAX).then_some((start, end))
}

fn metadata_len(entry: &FileEntry) -> usize {
    let target = match &entry.kind {
        FileKind::Symlink { target } | FileKind::Hardlink { target } => target.len(),
        FileKind::Directory
        | FileKind::Regular { .. }
        | FileKind::CharDevice { .. }
        | FileKind::BlockDevice { .. }
        | FileKind::Fifo => 0,
    };
    // A pair of vectors takes 48 bytes even when both are empty.
    let xattrs: usize = entry
        .xattrs
        .iter()
        .map(|(n, v)| n.len() + v.len() + 48)
        .sum();
    entry.path.len() + target + xattrs
}
