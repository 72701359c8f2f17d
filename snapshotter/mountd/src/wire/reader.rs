//! Fields of a body, one after another.
//!
//! Invariant: never reads beyond its bytes, and never takes memory that they do not fill.

use crate::ranges::Span;

pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(bytes)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn span(&mut self) -> Option<Span> {
        Span::new(self.u64()?, self.u64()?)
    }

    /// A text of one byte to `max`.
    pub(super) fn text(&mut self, max: usize) -> Option<Vec<u8>> {
        let len = usize::from(self.u16()?);
        if len == 0 || len > max {
            return None;
        }
        self.bytes(len).map(<[u8]>::to_vec)
    }
}
