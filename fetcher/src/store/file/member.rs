//! Members that are verified whole: what is learned of one when it is here.
//!
//! Invariant: only pieces that were verified together are put, each with its digest. Where
//! decoding them can begin is noted beside them; that is a help, and its loss no error.

use super::LayerFile;
use crate::Result;
use crate::codec::member::{self, Piece};
use crate::index::{ChunkId, Encoding};
use crate::store::entries::Record;

impl LayerFile {
    /// Decodes and verifies `encoded` (untrusted), the member that chunk `id` is a piece of, and
    /// puts all its pieces that are not present: who wants them later would have to bring all
    /// of it once more. Says each to `done`, and whether it was put. `false` where that member
    /// is not verified whole, and nothing was done. Blocks on the device.
    pub fn put_member(
        &self,
        id: ChunkId,
        encoded: &[u8],
        mut done: impl FnMut(ChunkId, bool),
    ) -> Result<bool> {
        let Some(digest) = self.member_digest(id)? else {
            return Ok(false);
        };
        let ids = self.index.verified_with(id);
        let what = || format!("chunks {ids:?} of layer {}", self.digest());
        let pieces = member::pieces(what, &digest, encoded, self.lens(ids.clone()))?;
        for (id, piece) in ids.clone().zip(&pieces) {
            let is_new = !self.is_present(id);
            if is_new {
                self.put_known(id, &piece.bytes, Some(piece.digest))?;
            }
            done(id, is_new);
        }
        self.note_entries(ids.start, &pieces);
        self.note_whole(ids.start);
        Ok(true)
    }

    /// Lengths of chunks.
    pub(in crate::store) fn lens(
        &self,
        ids: std::ops::Range<ChunkId>,
    ) -> impl Iterator<Item = u32> {
        ids.map_while(|id| self.chunk(id).ok().map(|chunk| chunk.len))
    }

    /// Notes where decoding pieces from chunk `first` on can begin. A failure costs bytes some
    /// day.
    fn note_entries(&self, first: ChunkId, pieces: &[Piece]) {
        let record = |(id, piece): (ChunkId, &Piece)| {
            let record = Record::of(piece, self.chunk(id).ok()?.encoding.skip())?;
            Some((record, piece.digest))
        };
        let records: Option<Vec<_>> = (first..).zip(pieces).map(record).collect();
        if let (Some(entries), Some(records)) = (&self.entries, records)
            && let Err(error) = entries.note(&*self.disk, first, &records)
        {
            tracing::debug!(digest = %self.digest(), %error, "cannot note where decoding can begin");
        }
    }

    /// Notes for other layers where the member that begins with chunk `first` is.
    pub(in crate::store) fn note_whole(&self, first: ChunkId) {
        if let (Some(store), Ok(Some(digest)), Ok(chunk)) =
            (self.store(), self.member_digest(first), self.chunk(first))
        {
            store.note_at(&digest, self.digest(), chunk.data_offset);
        }
    }

    /// Whether chunk `id` is a piece of a member that is verified whole and was not decoded
    /// yet, so that nothing is known of the piece alone.
    pub(in crate::store) fn is_unlearned(&self, id: ChunkId) -> Result<bool> {
        let is_piece = matches!(self.chunk(id)?.encoding, Encoding::WholeMember { .. });
        Ok(is_piece && self.chunk_digest(id)? == [0; 32])
    }
}
