//! Replacing a layer's index by one whose spans begin where starts read.
//!
//! What is decided is in [`crate::index::shape`]; here windows are put together from the
//! data file and the gaps, and the index file is replaced. Of eStargz it is the members that
//! get spans ([`members`]), by what was learned when they were decoded. Invariant:
//!
//! - A window is made of payload that was compared with its SHA-256 right then, and of gaps
//!   that have their checksum. Where some of it is not here, that span is not split.
//! - The index as it was made stays beside the new one, as `index.plain`, and every later
//!   shape is made from it. Should a span that was made here not decode after all, the
//!   plain index comes back ([`LayerFile::doubt`]) and the layer is not shaped again.
//! - Index files are made elsewhere and renamed, under the layer's lock, each synced first,
//!   the plain one first. Whoever has the layer open goes on with the file it has open;
//!   ids, places and digests of chunks are the same in both, so bitmaps and hints stay right.

mod members;
mod tar;

use std::path::PathBuf;

use bytes::Bytes;

use self::tar::Tar;
use super::{INDEX, LayerFile, PLAIN, SEAMS, write_new};
use crate::codec::Packer;
use crate::index::seams::{SEAMS_LEN_MAX, Seam, Seams};
use crate::index::shape::{OldDetails, Shaper, Split};
use crate::index::wire::{self, Header};
use crate::index::{ChunkId, Encoding, LayerFormat, LayerIndex};
use crate::store::entries::ENTRIES;
use crate::store::ingest::Draft;
use crate::store::{details, read_bounded};
use crate::{Error, Result};

/// An index takes at most this part of the blob, or what it took as it was made.
const INDEX_PART: u64 = 50;
/// Encoded bytes that all splits together must save.
const SAVED_BYTES_MIN: u64 = 64 << 10;
/// Longest index file that is shaped: that of a layer of 25 GB. It is held in memory.
const INDEX_LEN_MAX: u64 = 512 << 20;
/// How often fewer splits are tried when the tables took more than they were thought to.
const ROUNDS_MAX: u32 = 4;
/// Room left for tables that pack less well, in each round.
const SPARE_BYTES: u64 = 256;

/// What shaping a layer did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shaped {
    /// Encoded bytes that reading the hot chunks took, and takes.
    pub before_bytes: u64,
    /// See `before_bytes`.
    pub after_bytes: u64,
    /// Length of the index file.
    pub index_bytes: u64,
}

/// An index file, its details compared.
struct Whole {
    index: LayerIndex,
    details: OldDetails,
    bytes: Bytes,
}

impl Whole {
    fn parse(bytes: Vec<u8>) -> Result<Self> {
        let bytes = Bytes::from(bytes);
        let index = wire::decode(&bytes)?;
        let core_end = usize::try_from(Header::parse(&bytes)?.core_end()).unwrap_or(usize::MAX);
        let details = OldDetails::new(&index, &bytes.slice(core_end.min(bytes.len())..))?;
        Ok(Self {
            index,
            details,
            bytes,
        })
    }

    /// The window, packed, of the span that begins at this seam.
    fn window(&self, seam: Seam) -> Option<&[u8]> {
        let spans = &self.index.spans;
        let at = spans
            .binary_search_by_key(&seam.start, |span| span.start)
            .ok()?;
        let is_same = spans.get(at).is_some_and(|span| span.bits == seam.bits);
        is_same.then(|| self.details.window(u32::try_from(at).ok()?))?
    }
}

/// The index files of a layer.
struct Indexes {
    /// As it was made.
    plain: Whole,
    /// As it is, where it was shaped.
    shaped: Option<Whole>,
}

impl LayerFile {
    /// Makes the index one with which starts that read `hot` (any order) fetch less, if the
    /// layer has what that takes and it is worth it; `None` where nothing was changed. Who
    /// opens the layer from now on has it. Blocks on the device.
    pub fn shape(&self, hot: &[ChunkId]) -> Result<Option<Shaped>> {
        if hot.is_empty() || self.is_removed() {
            return Ok(None);
        }
        match self.index.format {
            LayerFormat::Gzip => self.shape_stream(hot),
            LayerFormat::Estargz => self.shape_members(hot),
            LayerFormat::Tar | LayerFormat::Zstd | LayerFormat::ZstdChunked => Ok(None),
        }
    }

    fn shape_stream(&self, hot: &[ChunkId]) -> Result<Option<Shaped>> {
        let Some(seams) = self.seams()? else {
            return Ok(None);
        };
        let Indexes { plain, shaped } = self.indexes()?;
        let len = plain.bytes.len() as u64;
        let limit = len.max(plain.index.blob_size / INDEX_PART);
        let (shaper, layout) = Shaper::new(plain.index.clone(), &seams, hot)?;
        let splits = shaper.splits();
        let saved: u64 = splits.iter().map(|split| split.saved).sum();
        let before_bytes = shaper.fetched(shaped.as_ref().map(|shaped| &shaped.index));
        let is_worth = |after: u64| before_bytes.saturating_sub(after) >= SAVED_BYTES_MIN;
        if !is_worth(shaper.fetched(None).saturating_sub(saved)) {
            return Ok(None);
        }
        let mut tar = Tar::new(self, &layout, &seams);
        let (splits, windows) = windows(&splits, &mut tar, shaped.as_ref(), limit)?;
        let made = fitting(&shaper, &splits, (&plain.details, &windows), (len, limit))?;
        let Some((index, bytes)) = made else {
            return Ok(None);
        };
        let made = Shaped {
            before_bytes,
            after_bytes: shaper.fetched(Some(&index)),
            index_bytes: bytes.len() as u64,
        };
        // Less than what is best may be here, and less than last time.
        if !is_worth(made.after_bytes) {
            return Ok(None);
        }
        let unkept = shaped.is_none().then_some(&plain.bytes[..]);
        let replaced = self.replace_index(&bytes, unkept)?;
        Ok(replaced.then_some(made))
    }

    /// A chunk could not be decoded twice. If its span was made by shaping, the plain index
    /// comes back, for whoever opens the layer next. Blocks on the device.
    pub fn doubt(&self, id: ChunkId) -> Result<()> {
        let Encoding::GzipSpan { blob, .. } = self.chunk(id)?.encoding else {
            return Ok(());
        };
        let path = self.dir.join(PLAIN);
        if !path.exists() {
            return Ok(());
        }
        let (plain, _) = details::open(&path)?;
        let known = plain.spans.iter().any(|span| span.start == blob.start());
        if known || self.is_removed() {
            return Ok(());
        }
        let Some(_lock) = self.lock_own()? else {
            return Ok(());
        };
        tracing::warn!(digest = %self.index.blob_digest, chunk = id, "a span that was made for starts is not right, going back to the index as it was");
        let back = || {
            // First of all: without them nobody shapes it so again.
            self.disk.remove_file(&self.dir.join(self.help()))?;
            self.disk.sync_dir(&self.dir)?;
            self.disk.rename(&path, &self.dir.join(INDEX))?;
            self.disk.sync_dir(&self.dir)
        };
        back().map_err(|e| Error::io("replace", self.dir.join(INDEX), e))?;
        if let Some(store) = self.store() {
            store.forget_layer(&self.index.blob_digest);
        }
        Ok(())
    }

    /// The layer's seams; `None` where there are none or they are damaged.
    fn seams(&self) -> Result<Option<Seams>> {
        let path = self.dir.join(SEAMS);
        if !path.exists() {
            return Ok(None);
        }
        match read_bounded(&path, SEAMS_LEN_MAX).and_then(|bytes| Seams::parse(bytes.into())) {
            Ok(seams) => Ok(Some(seams)),
            Err(error @ (Error::Malformed { .. } | Error::Limit { .. })) => {
                tracing::debug!(path = %path.display(), %error, "not shaping the layer's index");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The file without which the layer is not shaped.
    fn help(&self) -> &'static str {
        match self.index.format {
            LayerFormat::Estargz => ENTRIES,
            LayerFormat::Tar | LayerFormat::Gzip | LayerFormat::Zstd | LayerFormat::ZstdChunked => {
                SEAMS
            }
        }
    }

    /// Reads the index files.
    fn indexes(&self) -> Result<Indexes> {
        // In this order: an index that is read before there is a plain one is plain itself.
        let current = Whole::parse(read_bounded(&self.dir.join(INDEX), INDEX_LEN_MAX)?)?;
        let path = self.dir.join(PLAIN);
        let indexes = match path.exists() {
            true => Indexes {
                plain: Whole::parse(read_bounded(&path, INDEX_LEN_MAX)?)?,
                shaped: Some(current),
            },
            false => Indexes {
                plain: current,
                shaped: None,
            },
        };
        let plain = &indexes.plain.index;
        let is_of_it = plain.blob_digest == self.index.blob_digest;
        if !is_of_it || plain.chunks.len() != self.index.chunks.len() {
            let what = path.display().to_string();
            return Err(Error::malformed(what, "it is of another layer"));
        }
        Ok(indexes)
    }

    /// Makes `bytes` the index file, and `plain` the plain one where there is none; `false`
    /// where the layer is gone, or not to be shaped any more.
    fn replace_index(&self, bytes: &[u8], plain: Option<&[u8]>) -> Result<bool> {
        let Some(store) = self.store() else {
            return Ok(false);
        };
        let draft = Draft::new(&store)?;
        write_new(&*self.disk, &draft.path(INDEX), bytes)?;
        if let Some(plain) = plain {
            write_new(&*self.disk, &draft.path(PLAIN), plain)?;
        }
        let Some(_lock) = self.lock_own()? else {
            return Ok(false);
        };
        if !self.dir.join(self.help()).exists() {
            return Ok(false);
        }
        let rename = |name| {
            let to: PathBuf = self.dir.join(name);
            let rename = self.disk.rename(&draft.path(name), &to);
            let done = rename.and_then(|()| self.disk.sync_dir(&self.dir));
            done.map_err(|e| Error::io("replace", to, e))
        };
        if plain.is_some() && !self.dir.join(PLAIN).exists() {
            rename(PLAIN)?;
        }
        rename(INDEX)?;
        Ok(true)
    }
}

/// The index with as many of `splits` as fit, and its file; `None` if none does.
fn fitting(
    shaper: &Shaper,
    splits: &[(Split, u64)],
    (old, windows): (&OldDetails, &[Vec<u8>]),
    (len, len_max): (u64, u64),
) -> Result<Option<(LayerIndex, Vec<u8>)>> {
    let more = len_max.saturating_sub(len);
    let mut budget = shaper.cost_now().saturating_add(more);
    for _ in 0..ROUNDS_MAX {
        let Some((entries, cost)) = shaper.choose(splits, budget) else {
            return Ok(None);
        };
        let (index, details) = shaper.build(&entries, old, windows)?;
        let bytes = wire::encode(&index, &details)?;
        let excess = (bytes.len() as u64).saturating_sub(len_max);
        if excess == 0 {
            // What a reader will do with it; the details were made here.
            wire::decode(&bytes)?;
            return Ok(Some((index, bytes)));
        }
        budget = cost.saturating_sub(excess.saturating_add(SPARE_BYTES));
    }
    Ok(None)
}

/// Windows of splits, and what they are of.
type Windows = (Vec<(Split, u64)>, Vec<Vec<u8>>);

/// The windows of those of `splits` for which all is here, or for which `shaped` has them,
/// packed; at most about `bytes_max` of them.
fn windows(
    splits: &[Split],
    tar: &mut Tar<'_>,
    shaped: Option<&Whole>,
    bytes_max: u64,
) -> Result<Windows> {
    let mut packer = Packer::new()?;
    let (mut found, mut windows, mut all) = (Vec::new(), Vec::new(), 0_u64);
    for split in splits {
        let packed = match shaped.and_then(|shaped| shaped.window(split.seam)) {
            Some(window) => Some(window.to_vec()),
            None => {
                let window = tar.window(split.seam.decoded)?;
                window.map(|window| packer.pack(&window)).transpose()?
            }
        };
        let Some(packed) = packed else {
            continue;
        };
        all = all.saturating_add(packed.len() as u64);
        if all > bytes_max {
            break;
        }
        found.push((*split, packed.len() as u64));
        windows.push(packed);
    }
    Ok((found, windows))
}
