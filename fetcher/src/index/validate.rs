//! The rules of a layer index, checked in one pass over each table.
//!
//! Invariant: [`tables`] and [`spans`] accept exactly what the fields of [`LayerIndex`](super::LayerIndex)
//! and its parts document. Linear in the number of entries; the only things it allocates
//! are a map of the targets of hard links and, where one is missing, a set of symbolic links.
//! Never repairs anything.

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};

use super::details::{DETAILS_LEN_MAX, DETAILS_TOTAL_MAX};
use super::limits::{
    CHUNK_LEN_MAX, DATA_LEN_MAX, ENTRIES_MAX, SKIP_MAX, XATTR_LIST_LEN_MAX, XATTR_NAME_LEN_MAX,
    XATTR_VALUE_LEN_MAX, XATTRS_MAX,
};
use super::{
    Chunk, ChunkId, Encoding, FileEntry, FileKind, LayerBlob, LayerFormat, Span, align_up, path,
    relink,
};
use crate::{Error, Result};

/// Hard links from one name over others to the file itself; archives have one.
const LINK_DEPTH_MAX: usize = 40;

/// Checks both tables; returns the length of the data file.
pub(super) fn tables(blob: &LayerBlob, files: &[FileEntry], chunks: &[Chunk]) -> Result<u64> {
    let what = || format!("index of layer {}", blob.digest);
    if files.len() as u64 > ENTRIES_MAX {
        return Err(Error::limit(
            what(),
            format!("it has {} entries of at most {ENTRIES_MAX}", files.len()),
        ));
    }
    if ChunkId::try_from(chunks.len()).is_err() {
        return Err(Error::limit(
            what(),
            "it has more chunks than a u32 can number",
        ));
    }
    let mut place = Place {
        blob,
        chunks: chunks.iter(),
        end: 0,
    };
    for file in files {
        entry(file)
            .and_then(|()| place.file(file))
            .map_err(|rule| refuse(what(), &file.path, &rule))?;
    }
    if place.chunks.next().is_some() {
        return Err(Error::malformed(
            what(),
            "it has chunks that belong to no file",
        ));
    }
    links(files).map_err(|(path, rule)| refuse(what(), path, &rule))?;
    Ok(place.end)
}

/// Checks that spans ascend, that chunks go through them in order, and that their details
/// follow one another and have room for the digests; tells every span its chunks.
pub(super) fn spans(blob: &LayerBlob, chunks: &[Chunk], spans: &mut [Span]) -> Result<()> {
    let refuse = |number: usize, rule: &str| {
        Err(Error::malformed(
            format!("index of layer {}", blob.digest),
            format!("span {number}: {rule}"),
        ))
    };
    let (mut next_start, mut details_end) = (0, 0);
    for (number, span) in spans.iter_mut().enumerate() {
        if span.start < next_start || span.start >= blob.size || span.bits > 7 {
            return refuse(number, "it does not ascend, or is not in the blob");
        }
        next_start = span.start.saturating_add(1);
        if span.details.start() != details_end
            || span.details.len() > DETAILS_LEN_MAX
            || span.details.end() > DETAILS_TOTAL_MAX
        {
            return refuse(number, "its details are out of order or too long");
        }
        details_end = span.details.end();
        (span.first_chunk, span.chunk_count) = (0, 0);
    }
    let (mut last, mut before) = (0, None);
    for (id, chunk) in chunks.iter().enumerate() {
        let (Encoding::GzipSpan { blob, span, .. }
        | Encoding::WholeSpan { blob, span, .. }
        | Encoding::WholeMember { blob, span, .. }) = chunk.encoding
        else {
            continue;
        };
        let whole = !matches!(chunk.encoding, Encoding::GzipSpan { .. });
        let id = ChunkId::try_from(id).unwrap_or(ChunkId::MAX);
        let number = usize::try_from(span).unwrap_or(usize::MAX);
        let Some(span) = spans.get_mut(number).filter(|span| {
            number >= last && span.start == blob.start() && chunk.chunk_digest.is_none()
        }) else {
            return refuse(
                number,
                "a chunk is not where it says, or has a digest of its own",
            );
        };
        last = number;
        let previous = before.replace((whole, blob.end()));
        if matches!(chunk.encoding, Encoding::WholeMember { .. })
            && !is_next_piece(chunks, id, span.chunk_count)
        {
            return refuse(number, "its pieces do not make a member");
        }
        if span.chunk_count == 0 {
            span.first_chunk = id;
        } else if span.first_chunk.checked_add(span.chunk_count) != Some(id)
            || previous.is_none_or(|(kind, end)| {
                kind != whole || blob.end() < end || whole && blob.end() != end
            })
        {
            return refuse(number, "its chunks do not follow one another");
        }
        span.chunk_count += 1;
        let digests = if whole {
            1
        } else {
            u64::from(span.chunk_count)
        };
        if digests * 32 > span.details.len() {
            return refuse(number, "its details are too short for its digests");
        }
    }
    Ok(())
}

/// Whether chunk `id` goes on where the piece before it ends, `before` of which precede it in
/// a member that is verified whole; and the member so far is no longer than a chunk may be.
fn is_next_piece(chunks: &[Chunk], id: ChunkId, before: u32) -> bool {
    let at = |id: Option<ChunkId>| chunks.get(usize::try_from(id?).ok()?);
    let Some(piece) = at(Some(id)) else {
        return false;
    };
    let skip = piece.encoding.skip();
    let end = skip.saturating_add(piece.len.into());
    let follows = match (before, at(id.checked_sub(1))) {
        (0, _) => skip == 0,
        (_, Some(last)) => {
            let len = u64::from(last.len);
            skip == last.encoding.skip().saturating_add(len)
                && piece.data_offset == last.data_offset.saturating_add(len)
        }
        (_, None) => false,
    };
    follows && end <= u64::from(CHUNK_LEN_MAX)
}

/// Why an entry is refused.
type Rule = String;

fn refuse(what: String, path: &[u8], rule: &str) -> Error {
    Error::malformed(what, format!("{}: {rule}", path::show(path)))
}

fn entry(file: &FileEntry) -> Result<(), Rule> {
    path::check(&file.path)?;
    if file.path.is_empty() && file.kind != FileKind::Directory {
        return Err("the root of a layer can only be a directory".to_owned());
    }
    if file.mode > 0o7777 {
        return Err(format!(
            "its mode {:o} has more than permission bits",
            file.mode
        ));
    }
    if file.mtime.nanos >= 1_000_000_000 {
        return Err("its modification time has more nanoseconds than a second".to_owned());
    }
    match &file.kind {
        FileKind::Symlink { target } => path::check_symlink(target)?,
        FileKind::Hardlink { target } => path::check(target)?,
        FileKind::Directory
        | FileKind::Regular { .. }
        | FileKind::CharDevice { .. }
        | FileKind::BlockDevice { .. }
        | FileKind::Fifo => {}
    }
    xattrs(&file.xattrs)
}

fn xattrs(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<(), Rule> {
    if xattrs.len() > XATTRS_MAX {
        return Err(format!("it has more than {XATTRS_MAX} xattrs"));
    }
    let mut list_len = 0;
    for (name, value) in xattrs {
        if name.is_empty() || name.len() > XATTR_NAME_LEN_MAX || name.contains(&0) {
            return Err(format!(
                "the name of its xattr {} is not 1 to 255 bytes without NUL",
                path::show(name)
            ));
        }
        if value.len() > XATTR_VALUE_LEN_MAX {
            return Err(format!(
                "its xattr {} is longer than 65536 bytes",
                path::show(name)
            ));
        }
        list_len += name.len() + 1;
        if list_len > XATTR_LIST_LEN_MAX {
            return Err("the names of its xattrs exceed 65536 bytes".to_owned());
        }
    }
    let mut names: Vec<&[u8]> = xattrs.iter().map(|(name, _)| name.as_slice()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair.first() == pair.last()) {
        Some(twice) => Err(format!(
            "its xattr {} appears twice",
            path::show(twice.first().copied().unwrap_or_default())
        )),
        None => Ok(()),
    }
}

/// Walks the chunk table along the files.
struct Place<'a> {
    blob: &'a LayerBlob,
    chunks: std::slice::Iter<'a, Chunk>,
    /// End of the last payload.
    end: u64,
}

impl Place<'_> {
    fn file(&mut self, file: &FileEntry) -> Result<(), Rule> {
        let FileKind::Regular { size, data_offset } = file.kind else {
            return Ok(());
        };
        if size == 0 {
            return match data_offset {
                0 => Ok(()),
                _ => Err("it is empty but has a place in the data file".to_owned()),
            };
        }
        let (start, end) = align_up(self.end)
            .and_then(|start| Some((start, start.checked_add(size)?)))
            .filter(|(_, end)| *end <= DATA_LEN_MAX)
            .ok_or_else(|| {
                format!("with its {size} bytes the layer exceeds {DATA_LEN_MAX} bytes")
            })?;
        if data_offset != start {
            return Err(format!(
                "it is at {data_offset} of the data file, not at {start}"
            ));
        }
        let mut at = start;
        while at < end {
            let chunk = self
                .chunks
                .next()
                .ok_or_else(|| format!("its chunks end at byte {} of {size}", at - start))?;
            at = self.chunk(chunk, at, end)?;
        }
        self.end = end;
        Ok(())
    }

    /// Checks the chunk that belongs at `at`; returns where it ends.
    fn chunk(&self, chunk: &Chunk, at: u64, file_end: u64) -> Result<u64, Rule> {
        let end = at.saturating_add(u64::from(chunk.len));
        if chunk.data_offset != at || chunk.len == 0 || end > file_end {
            return Err(format!(
                "a chunk of {} bytes at {} of the data file, where {} are due at {at}",
                chunk.len,
                chunk.data_offset,
                file_end - at
            ));
        }
        if chunk.len > CHUNK_LEN_MAX {
            return Err(format!(
                "a chunk of {} bytes, of at most {CHUNK_LEN_MAX}",
                chunk.len
            ));
        }
        self.encoding(chunk)?;
        Ok(end)
    }

    /// Checks that the layer's format has such an encoding and that it lies in the blob.
    fn encoding(&self, chunk: &Chunk) -> Result<(), Rule> {
        let (encoding, format) = (&chunk.encoding, self.blob.format);
        let fits = match encoding {
            Encoding::Stream => matches!(
                format,
                LayerFormat::Tar | LayerFormat::Gzip | LayerFormat::Zstd
            ),
            Encoding::Stored { .. } => format == LayerFormat::Tar,
            Encoding::GzipMember { .. } => format == LayerFormat::Estargz,
            Encoding::GzipSpan { .. } => {
                matches!(format, LayerFormat::Gzip | LayerFormat::Estargz)
            }
            Encoding::WholeMember { .. } => format == LayerFormat::Estargz,
            Encoding::WholeSpan { .. } => {
                matches!(format, LayerFormat::Gzip | LayerFormat::Tar)
            }
            Encoding::ZstdFrame { .. } => {
                matches!(format, LayerFormat::Zstd | LayerFormat::ZstdChunked)
            }
        };
        if !fits {
            return Err(format!(
                "a chunk encoded as {encoding:?} in a layer of format {format:?}"
            ));
        }
        let Some(blob) = encoding.blob() else {
            return match chunk.chunk_digest {
                Some(_) => Ok(()),
                None => Err("a chunk without a digest".to_owned()),
            };
        };
        if blob.is_empty() || blob.end() > self.blob.size {
            return Err(format!(
                "a chunk at {blob} of a blob of {} bytes",
                self.blob.size
            ));
        }
        if encoding.skip() > SKIP_MAX {
            return Err(format!(
                "a chunk {} bytes into its member, of at most {SKIP_MAX}",
                encoding.skip()
            ));
        }
        let in_span = matches!(
            encoding,
            Encoding::GzipSpan { .. } | Encoding::WholeSpan { .. } | Encoding::WholeMember { .. }
        );
        if chunk.chunk_digest.is_none() && !in_span {
            return Err("a chunk without a digest".to_owned());
        }
        if matches!(encoding, Encoding::Stored { .. }) && blob.len() != u64::from(chunk.len) {
            return Err(format!("a stored chunk of {} bytes in {blob}", chunk.len));
        }
        Ok(())
    }
}

/// Checks that every hard link leads to something that can have another name.
fn links(files: &[FileEntry]) -> Result<(), (&[u8], Rule)> {
    let mut named: HashMap<&[u8], Option<&FileKind>> = files
        .iter()
        .filter_map(|file| match &file.kind {
            FileKind::Hardlink { target } => Some((target.as_slice(), None)),
            _ => None,
        })
        .collect();
    if named.is_empty() {
        return Ok(());
    }
    for file in files {
        if let Some(kind) = named.get_mut(file.path.as_slice()) {
            *kind = Some(&file.kind);
        }
    }
    let symlinks = Symlinks {
        files,
        found: OnceCell::new(),
    };
    for file in files {
        if let FileKind::Hardlink { target } = &file.kind {
            link(&named, &symlinks, target).map_err(|rule| (file.path.as_slice(), rule))?;
        }
    }
    Ok(())
}

/// The symbolic links of a layer, looked for once they count.
struct Symlinks<'a> {
    files: &'a [FileEntry],
    /// Their paths, and whether an entry has one of them above it.
    found: OnceCell<(HashSet<&'a [u8]>, bool)>,
}

impl Symlinks<'_> {
    /// Whether `path`, which no entry has, may be another way to say what one has.
    fn may_lead(&self, path: &[u8]) -> bool {
        let (links, is_above) = self.found.get_or_init(|| {
            let is_link = |file: &&FileEntry| matches!(file.kind, FileKind::Symlink { .. });
            let links = self.files.iter().filter(is_link);
            let links: HashSet<&[u8]> = links.map(|file| file.path.as_slice()).collect();
            let is_below =
                |file: &FileEntry| relink::parents(&file.path).any(|dir| links.contains(dir));
            let is_above = !links.is_empty() && self.files.iter().any(is_below);
            (links, is_above)
        });
        *is_above || relink::parents(path).any(|dir| links.contains(dir))
    }
}

/// Where symbolic links are in the way, the tree that is made of the table has the verdict.
fn link(
    named: &HashMap<&[u8], Option<&FileKind>>,
    symlinks: &Symlinks<'_>,
    target: &[u8],
) -> Result<(), Rule> {
    let mut at = target;
    for _ in 0..LINK_DEPTH_MAX {
        match named.get(at).copied().flatten() {
            None if symlinks.may_lead(at) => return Ok(()),
            None => {
                return Err(format!(
                    "it is a hard link to {}, which is not in this layer",
                    path::show(at)
                ));
            }
            Some(FileKind::Directory) => {
                return Err(format!(
                    "it is a hard link to the directory {}",
                    path::show(at)
                ));
            }
            Some(FileKind::Hardlink { target }) => at = target,
            Some(_) => return Ok(()),
        }
    }
    Err(format!(
        "it is a hard link to {}, which leads through more than {LINK_DEPTH_MAX} links or in a circle",
        path::show(target)
    ))
}

#[cfg(test)]
mod tests;
