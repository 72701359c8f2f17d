//! A layer's index file, of which only the tables are held in memory.
//!
//! Invariant: details leave here verified, and those of one span are held at a time.
//!
//! An index may have come without its details (see [`super::origin`]); the file then has
//! its full length, and zeros where they go. No record is kept of which are here: what
//! does not have its digest is not, whether it never came or a crash took it. So nothing of
//! it needs to be synced but before chunks are recorded that were verified with it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

use super::bitmap::Bitmap;
use super::disk::Disk;
use super::file::INDEX;
use super::origin;
use crate::codec::{self, VerifiedBytes};
use crate::index::details::SpanDetails;
use crate::index::wire::{self, HEADER_LEN, Header};
use crate::index::{LayerIndex, Span};
use crate::source::BlobRef;
use crate::types::Digest;
use crate::{Error, Result};

/// What a new layer's index has behind its tables.
#[derive(Debug, Clone, Copy)]
pub(super) enum Provided<'a> {
    /// The details of all its spans.
    All(&'a [u8]),
    /// Nothing yet.
    Later(&'a PartialIndex),
}

/// An index without its details, and where those are.
#[derive(Debug, Clone)]
pub struct PartialIndex {
    /// Its tables.
    pub index: LayerIndex,
    /// Header and core as they came, of which `index` was made.
    pub head: Bytes,
    /// All of it.
    pub origin: BlobRef,
}

/// What is behind the tables of an index file.
pub(super) struct Details {
    file: File,
    path: PathBuf,
    /// Where they begin in the file.
    start: u64,
    /// Number of the span that was read last, and what it has. Neighbours are read together.
    last: Mutex<Option<(u32, Arc<SpanDetails>)>>,
    /// Of an index that came without them.
    partial: Option<Partial>,
}

struct Partial {
    origin: BlobRef,
    /// Spans whose details this process wrote, or read and found right.
    here: Bitmap,
    /// Whether some of them may not be on the device.
    is_dirty: AtomicBool,
}

/// Writes the index file of a new layer into `dir`, synced.
pub(super) fn create(
    disk: &dyn Disk,
    dir: &Path,
    index: &LayerIndex,
    provided: Provided<'_>,
) -> Result<()> {
    let path = dir.join(INDEX);
    let write = |head: &[u8], details: &[u8], len: u64| {
        let write = || {
            let file = disk.create(&path)?;
            disk.write_at(&file, 0, head)?;
            match details {
                [] => disk.set_len(&file, len)?,
                details => disk.write_at(&file, head.len() as u64, details)?,
            }
            disk.sync_data(&file)
        };
        write().map_err(|error| Error::io("write", &path, error))
    };
    match provided {
        Provided::All(details) => {
            let head = wire::encode_head(index, details.len() as u64)?;
            write(&head, details, head.len() as u64)
        }
        Provided::Later(partial) => {
            origin::create(disk, dir, &partial.origin)?;
            let len = Header::parse(&partial.head)?.total_len();
            write(&partial.head, &[], len)
        }
    }
}

/// What it means that the index of layer `digest` cannot be opened. One that another release
/// made, in a form that this one does not read, is as good as damaged: a layer can be made again.
pub(super) fn unusable(digest: &Digest, error: Error) -> Error {
    match error {
        Error::Unsupported { detail, .. } => Error::malformed(
            format!("index of layer {digest}"),
            format!("{detail}; remove the layer and pull again"),
        ),
        error => error,
    }
}

/// Reads the tables of the index file at `path`. `Unsupported` where another release made it;
/// see [`unusable`].
pub(super) fn open(path: &Path) -> Result<(LayerIndex, Details)> {
    let io = |error| Error::io("read", path, error);
    let origin = origin::read(path.parent().unwrap_or(path))?;
    let mut options = File::options();
    options.read(true).write(origin.is_some());
    let file = options.open(path).map_err(io)?;
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
    let spans = u32::try_from(index.spans.len()).unwrap_or(u32::MAX);
    let partial = origin.map(|origin| Partial {
        origin,
        here: Bitmap::empty(spans),
        is_dirty: AtomicBool::new(false),
    });
    let details = Details {
        file,
        path: path.to_path_buf(),
        start: header.core_end(),
        last: Mutex::new(None),
        partial,
    };
    Ok((index, details))
}

impl Details {
    /// The details of span `number`, which begin with so many digests.
    /// [`Error::NotFound`] where they have not come yet.
    pub(super) fn read(&self, number: u32, span: &Span, digests: u32) -> Result<Arc<SpanDetails>> {
        if let Some((last, details)) = &*self.last.lock()
            && *last == number
        {
            return Ok(Arc::clone(details));
        }
        let details = match SpanDetails::parse(span, digests, self.bytes(span)?) {
            Ok(details) => Arc::new(details),
            Err(error @ Error::Corrupt { .. }) => return Err(self.wrong(number, error)),
            Err(error) => return Err(error),
        };
        if !self.is_here(number) {
            self.note(number);
        }
        *self.last.lock() = Some((number, Arc::clone(&details)));
        Ok(details)
    }

    /// Where details that are not here can be had, and where they begin there; `None` where
    /// all are here.
    pub(super) fn origin(&self) -> Option<(&BlobRef, u64)> {
        let partial = self.partial.as_ref()?;
        Some((&partial.origin, self.start))
    }

    /// Whether those of the span are known to be here. Looks only at memory.
    pub(super) fn is_here(&self, number: u32) -> bool {
        let partial = self.partial.as_ref();
        partial.is_none_or(|partial| partial.here.get(number))
    }

    /// Whether those of the span are here. Blocks on the device.
    pub(super) fn look(&self, number: u32, span: &Span) -> Result<bool> {
        if self.is_here(number) {
            return Ok(true);
        }
        let is_right = verify(span, self.bytes(span)?).is_ok();
        if is_right {
            self.note(number);
        }
        Ok(is_right)
    }

    /// Keeps details that came. Blocks on the device.
    pub(super) fn put(&self, disk: &dyn Disk, number: u32, place: &Place<'_>) -> Result<()> {
        let at = self.start.saturating_add(place.span.details.start());
        disk.write_at(&self.file, at, place.bytes)
            .map_err(|error| Error::io("write to", &self.path, error))?;
        self.note(number);
        Ok(())
    }

    /// Returns once what was put is on the device.
    pub(super) fn sync(&self, disk: &dyn Disk) -> io::Result<()> {
        let Some(partial) = &self.partial else {
            return Ok(());
        };
        if !partial.is_dirty.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let synced = disk.sync_data(&self.file);
        if synced.is_err() {
            partial.is_dirty.store(true, Ordering::Release);
        }
        synced
    }

    fn bytes(&self, span: &Span) -> Result<Bytes> {
        // The index was checked: no details are longer than some MiB.
        let mut bytes = vec![0; usize::try_from(span.details.len()).unwrap_or(0)];
        let at = self.start.saturating_add(span.details.start());
        self.file
            .read_exact_at(&mut bytes, at)
            .map_err(|e| Error::io("read", &self.path, e))?;
        Ok(bytes.into())
    }

    fn note(&self, number: u32) {
        if let Some(partial) = &self.partial {
            // Found right says nothing of the device: another process may have put them.
            partial.is_dirty.store(true, Ordering::Release);
            partial.here.set(number);
        }
    }

    /// What it means that details do not have their digest.
    fn wrong(&self, number: u32, error: Error) -> Error {
        let Some(partial) = &self.partial else {
            return error;
        };
        partial.here.clear(number);
        Error::NotFound {
            what: format!("details of span {number} in {}", self.path.display()),
            host: String::new(),
        }
    }
}

/// An index file all of which was compared.
pub(super) struct Compared {
    pub(super) index: LayerIndex,
    details: Details,
    /// How many spans have no details yet, of an index that came without.
    absent: u32,
    /// Spans whose details are neither right nor absent, of the same.
    pub(super) wrong: Vec<u32>,
}

impl Compared {
    /// Whether every span has its details.
    pub(super) fn is_whole(&self) -> bool {
        self.absent == 0 && self.wrong.is_empty()
    }

    /// Makes the details of these spans as if they had never come.
    pub(super) fn erase(&self, disk: &dyn Disk, numbers: &[u32]) -> Result<()> {
        for number in numbers {
            let at = usize::try_from(*number).unwrap_or(usize::MAX);
            let Some(span) = self.index.spans.get(at) else {
                continue;
            };
            let zeros = vec![0; usize::try_from(span.details.len()).unwrap_or(0)];
            let at = self.details.start.saturating_add(span.details.start());
            disk.write_at(&self.details.file, at, &zeros)
                .map_err(|error| Error::io("write to", &self.details.path, error))?;
        }
        Ok(())
    }
}

/// Reads all of the index file at `path`: [`Error::Corrupt`] where details are wrong that must
/// be there.
pub(super) fn compare(path: &Path) -> Result<Compared> {
    let (index, details) = open(path)?;
    let (mut absent, mut wrong) = (0, Vec::new());
    for (number, span) in (0..).zip(&index.spans) {
        let bytes = details.bytes(span)?;
        let is_nothing = bytes.iter().all(|byte| *byte == 0);
        match verify(span, bytes) {
            Ok(_) => {}
            Err(error) if details.partial.is_none() => return Err(error),
            Err(_) if is_nothing => absent += 1,
            Err(_) => wrong.push(number),
        }
    }
    Ok(Compared {
        index,
        details,
        absent,
        wrong,
    })
}

/// Verified details, and whose they are.
pub(super) struct Place<'a> {
    pub(super) span: &'a Span,
    pub(super) bytes: &'a VerifiedBytes,
}

/// Compares details with the digest that the index has for them.
pub(super) fn verify(span: &Span, bytes: Bytes) -> Result<VerifiedBytes> {
    let what = || format!("details of the span at {} of a layer", span.start);
    codec::verify_chunk(what, &span.details_digest, bytes)
}
