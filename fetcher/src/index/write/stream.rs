//! The tar being written, cut into members.
//!
//! Invariant: bytes reach the digest of the decompressed stream in the order in which
//! their members reach the blob.

use std::io::{Read, Write};

use super::members::{ChunkTag, Member, Members, Placed};
use super::{Fault, Options};
use crate::types::{Algorithm, Digest, Hasher};

/// A tar on its way into a blob.
pub(super) struct Stream<'a, W: Write> {
    pub(super) members: Members<'a, W>,
    /// The member being collected.
    pending: Member,
    /// Chunks whose place is known and that nobody has taken yet.
    placed: Vec<Placed>,
    diff: Hasher,
    uncompressed_size: u64,
}

/// What a finished stream is.
pub(super) struct Totals {
    pub(super) blob: (Digest, u64),
    pub(super) diff_id: Digest,
    pub(super) uncompressed_size: u64,
}

impl<'a, W: Write> Stream<'a, W> {
    pub(super) fn new(output: &'a mut W, options: &Options) -> Result<Self, Fault> {
        Ok(Self {
            members: Members::new(output, options)?,
            pending: Member::default(),
            placed: Vec::new(),
            diff: Hasher::new(Algorithm::Sha256),
            uncompressed_size: 0,
        })
    }

    /// Appends bytes to the member being collected.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.pending.plain.extend_from_slice(bytes);
    }

    /// Appends the next `len` bytes of `input` and yields them.
    pub(super) fn copy(&mut self, len: usize, input: &mut impl Read) -> Result<&[u8], Fault> {
        let start = self.pending.plain.len();
        self.pending.plain.resize(start + len, 0);
        let room = self.pending.plain.get_mut(start..).unwrap_or_default();
        input.read_exact(room).map_err(Fault::read)?;
        Ok(room)
    }

    /// Starts a member with a chunk, and yields the chunk's bytes.
    pub(super) fn chunk(&mut self, tag: ChunkTag, input: &mut impl Read) -> Result<&[u8], Fault> {
        self.flush()?;
        self.pending.chunk = Some(tag);
        self.copy(tag.len, input)
    }

    /// Bytes of the member being collected, without its chunk.
    pub(super) fn extra_len(&self) -> usize {
        let chunk = self.pending.chunk.map_or(0, |tag| tag.len);
        self.pending.plain.len() - chunk
    }

    /// Ends the member being collected.
    pub(super) fn flush(&mut self) -> Result<(), Fault> {
        if self.pending.plain.is_empty() {
            return Ok(());
        }
        let member = std::mem::take(&mut self.pending);
        self.diff.update(&member.plain);
        self.uncompressed_size += member.plain.len() as u64;
        while self.members.is_full() {
            let placed = self.members.collect()?;
            self.placed.extend(placed);
        }
        self.members.submit(member)
    }

    /// Ends the member being collected and writes all members.
    pub(super) fn drain(&mut self) -> Result<(), Fault> {
        self.flush()?;
        while !self.members.is_idle() {
            let placed = self.members.collect()?;
            self.placed.extend(placed);
        }
        Ok(())
    }

    /// The chunks whose place has become known since the last call.
    pub(super) fn take_placed(&mut self) -> Vec<Placed> {
        std::mem::take(&mut self.placed)
    }

    /// Ends the blob.
    pub(super) fn finish(mut self) -> Result<Totals, Fault> {
        self.drain()?;
        Ok(Totals {
            blob: self.members.finish()?,
            diff_id: self.diff.finish(),
            uncompressed_size: self.uncompressed_size,
        })
    }
}
