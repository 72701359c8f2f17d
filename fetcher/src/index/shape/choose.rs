//! Which splits fit, and which windows are given up to make room for them.
//!
//! Invariant: what is chosen costs at most what it may; a window is given up only where no
//! hot chunk is read from it, or all before it is fetched anyway; a span that was made longer has at most
//! [`MERGED_LEN_MAX`] decoded bytes. Pure, and of `n log n` time.

use super::{Shaper, Split, chunks_of};
use crate::index::seams::Seam;

/// Decoded bytes of a span that was made of several: what a read may have to decode that no
/// start was seen to do. Two spans as they are made, with the blocks they end in.
const MERGED_LEN_MAX: u64 = 1280 << 10;
/// Encoded bytes between two hot chunks that are decoded together rather than apart.
const JOINED_BYTES_MAX: u64 = 4 << 10;
/// Bytes that a span takes in the tables of an index: its digest, which does not pack, and
/// its place.
const SPAN_COST: u64 = 40;

/// A place at which a span is to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Where.
    pub seam: Seam,
    /// What its window is.
    pub window: Window,
}

/// Where a window comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// That of the span of this number as it was.
    OfSpan(u32),
    /// That of this split, by its position.
    OfSplit(usize),
}

struct Candidate {
    entry: Entry,
    cost: u64,
    /// No start would fetch more without it, and nobody made it on purpose.
    may_go: bool,
    gone: bool,
}

impl Shaper {
    /// What windows and places of the spans take as they are, bytes.
    pub fn cost_now(&self) -> u64 {
        (0..self.spans.len()).map(|at| self.cost(at)).sum()
    }

    /// The spans to have: with as many of `splits` (ascending), each with the length of its
    /// window, as fit when windows and places of all spans take `budget` bytes at most; and
    /// what they take. `None` if no split fits.
    pub fn choose(&self, splits: &[(Split, u64)], budget: u64) -> Option<(Vec<Entry>, u64)> {
        let mut order: Vec<usize> = (0..splits.len()).collect();
        // Bytes saved for a byte of window.
        let worth = |at: &usize| {
            let (split, len) = splits.get(*at).copied()?;
            Some(split.saved.saturating_mul(1024) / len.max(1))
        };
        order.sort_by_key(|at| std::cmp::Reverse(worth(at)));
        let (mut fits, mut too_many) = (0, order.len() + 1);
        while fits + 1 < too_many {
            let middle = fits.midpoint(too_many);
            let chosen = order.get(..middle).unwrap_or_default();
            match self.with(splits, chosen, budget) {
                Some(_) => fits = middle,
                None => too_many = middle,
            }
        }
        let chosen = order.get(..fits).filter(|chosen| !chosen.is_empty())?;
        self.with(splits, chosen, budget)
    }

    /// What span number `at` takes beside its digests.
    fn cost(&self, at: usize) -> u64 {
        let span = self.index.spans.get(at);
        let window = span.map_or(0, |span| {
            let digests = u64::from(span.chunk_count) * 32;
            span.details.len().saturating_sub(digests)
        });
        window + SPAN_COST
    }

    /// The spans with the `chosen` splits, if they can be had for `budget`.
    fn with(
        &self,
        splits: &[(Split, u64)],
        chosen: &[usize],
        budget: u64,
    ) -> Option<(Vec<Entry>, u64)> {
        let mut all = self.candidates(splits, chosen);
        let mut cost: u64 = all.iter().map(|candidate| candidate.cost).sum();
        let mut order: Vec<usize> = (0..all.len()).collect();
        order.retain(|at| all.get(*at).is_some_and(|candidate| candidate.may_go));
        order.sort_by_key(|at| {
            all.get(*at)
                .map(|candidate| std::cmp::Reverse(candidate.cost))
        });
        for at in order {
            if cost <= budget {
                break;
            }
            if self.len_without(&all, at) <= MERGED_LEN_MAX
                && let Some(candidate) = all.get_mut(at)
            {
                candidate.gone = true;
                cost = cost.saturating_sub(candidate.cost);
            }
        }
        all.retain(|candidate| !candidate.gone);
        let entries = all.iter().map(|candidate| candidate.entry);
        (cost <= budget).then(|| (entries.collect(), cost))
    }

    /// All places that have chunks, ascending.
    fn candidates(&self, splits: &[(Split, u64)], chosen: &[usize]) -> Vec<Candidate> {
        let old = self.spans.iter().enumerate().map(|(at, seam)| {
            let window = Window::OfSpan(u32::try_from(at).unwrap_or(u32::MAX));
            (*seam, window, self.cost(at))
        });
        let new = chosen.iter().filter_map(|at| {
            let (split, len) = splits.get(*at)?;
            Some((split.seam, Window::OfSplit(*at), len + SPAN_COST))
        });
        let mut all: Vec<(Seam, Window, u64)> = old.chain(new).collect();
        all.sort_by_key(|(seam, _, _)| seam.decoded);
        all.dedup_by_key(|(seam, _, _)| seam.decoded);
        let ends = all.iter().skip(1).map(|(seam, _, _)| seam.decoded);
        let ends: Vec<u64> = ends.chain([u64::MAX]).collect();
        let mut before = 0;
        let candidate = |((seam, window, cost), end): (&(Seam, Window, u64), u64)| {
            let (chunks, hot) = self.between(seam.decoded, end);
            let is_free = hot == 0 || self.is_fetched_up_to(seam, before);
            let candidate = (chunks > 0).then_some(Candidate {
                entry: Entry {
                    seam: *seam,
                    window: *window,
                },
                cost: *cost,
                may_go: is_free && matches!(window, Window::OfSpan(_)),
                gone: false,
            })?;
            before = seam.decoded;
            Some(candidate)
        };
        all.iter().zip(ends).filter_map(candidate).collect()
    }

    /// Whether starts fetch all before `seam` from the place `before` of the tar on, or so
    /// nearly all that what is between costs nothing.
    fn is_fetched_up_to(&self, seam: &Seam, before: u64) -> bool {
        let behind = self.starts.partition_point(|at| *at < seam.decoded);
        let hot = self
            .hot
            .partition_point(|id| usize::try_from(*id).is_ok_and(|id| id < behind));
        let last = hot.checked_sub(1).and_then(|at| self.hot.get(at));
        let last = last.and_then(|id| self.in_span(*id));
        last.is_some_and(|(_, blob, start)| {
            start >= before && blob.end().saturating_add(JOINED_BYTES_MAX) >= seam.start
        })
    }

    /// How many chunks begin in these bytes of the tar, and how many of those are hot.
    fn between(&self, start: u64, end: u64) -> (usize, usize) {
        let first = self.starts.partition_point(|at| *at < start);
        let last = self.starts.partition_point(|at| *at < end);
        let hot = |at: usize| {
            self.hot
                .partition_point(|id| usize::try_from(*id).is_ok_and(|id| id < at))
        };
        (last - first, hot(last) - hot(first))
    }

    /// Decoded bytes of the span that candidate `at` would go into.
    fn len_without(&self, all: &[Candidate], at: usize) -> u64 {
        let mut before = all.iter().take(at).rev().filter(|other| !other.gone);
        let Some(before) = before.next() else {
            return u64::MAX;
        };
        let mut behind = all.iter().skip(at + 1).filter(|other| !other.gone);
        let end = match behind.next() {
            Some(next) => next.entry.seam.decoded,
            None => self.end(),
        };
        end.saturating_sub(before.entry.seam.decoded)
    }

    /// Where the last chunk of the last span ends in the tar.
    fn end(&self) -> u64 {
        let last = self.index.spans.last().map(|span| chunks_of(span).end);
        let last = last.and_then(|end| end.checked_sub(1));
        let start = last.and_then(|at| self.starts.get(at));
        let len = last.and_then(|at| self.index.chunks.get(at));
        start.zip(len).map_or(u64::MAX, |(start, chunk)| {
            start.saturating_add(u64::from(chunk.len))
        })
    }
}
