//! Parts of a data file, and sets of them.
//!
//! Invariant: a [`Span`] is never empty and never inverted. The spans of [`Ranges`] are
//! sorted, do not touch, and are at most [`SPANS_MAX`]: who inserts one too many makes it
//! forget others, never remember what was not inserted.

/// Spans a set remembers. A layer that is filled from everywhere has some hundreds; what
/// is forgotten is asked for again. A hundred layers at the limit take 6 MiB.
pub const SPANS_MAX: usize = 4096;

/// Bytes `start..end` of a data file, at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    start: u64,
    end: u64,
}

impl Span {
    /// `start..end`; `None` where that is empty or inverted.
    pub fn new(start: u64, end: u64) -> Option<Self> {
        (start < end).then_some(Self { start, end })
    }

    /// First byte.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Number of bytes, at least 1.
    #[expect(clippy::len_without_is_empty, reason = "none is ever empty")]
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether `other` lies inside.
    pub fn contains(&self, other: &Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

/// A set of bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges {
    spans: Vec<Span>,
}

impl Ranges {
    /// Adds every byte of `span`.
    pub fn insert(&mut self, span: Span) {
        let from = self.spans.partition_point(|old| old.end < span.start);
        let to = self.spans.partition_point(|old| old.start <= span.end);
        let joined = self.spans.get(from..to).unwrap_or_default();
        let start = joined.first().map_or(span.start, |old| old.start);
        let end = joined.last().map_or(span.end, |old| old.end);
        let whole = Span {
            start: start.min(span.start),
            end: end.max(span.end),
        };
        if from == to && self.spans.len() >= SPANS_MAX {
            // Anything may be forgotten; half of it makes room for a while.
            self.spans.truncate(SPANS_MAX / 2);
            return self.insert(span);
        }
        self.spans.splice(from..to, [whole]);
    }

    /// Whether every byte of `span` was inserted.
    pub fn covers(&self, span: &Span) -> bool {
        let at = self.spans.partition_point(|old| old.end < span.end);
        self.spans.get(at).is_some_and(|old| old.contains(span))
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.spans = Vec::new();
    }

    /// The spans, ascending, none touching the next.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }
}

impl FromIterator<Span> for Ranges {
    fn from_iter<I: IntoIterator<Item = Span>>(spans: I) -> Self {
        let mut ranges = Self::default();
        for span in spans {
            ranges.insert(span);
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set_of_bytes(inserts in proptest::collection::vec((0..100_u64, 1..20_u64), 0..40)) {
            let (mut ranges, mut model) = (Ranges::default(), BTreeSet::new());
            for (start, len) in inserts {
                ranges.insert(Span::new(start, start + len).unwrap());
                model.extend(start..start + len);
            }
            for pair in ranges.spans().windows(2) {
                prop_assert!(pair[0].end < pair[1].start);
            }
            for start in 0..120 {
                for end in start + 1..=120 {
                    let all = (start..end).all(|byte| model.contains(&byte));
                    prop_assert_eq!(ranges.covers(&Span::new(start, end).unwrap()), all);
                }
            }
        }
    }

    #[test]
    fn a_full_set_forgets_and_never_invents() {
        let mut ranges = Ranges::default();
        let odd = |number: u64| Span::new(2 * number, 2 * number + 1).unwrap();
        for number in 0..3 * SPANS_MAX as u64 {
            ranges.insert(odd(number));
            assert!(ranges.covers(&odd(number)), "the last one is there");
            assert!(ranges.spans().len() <= SPANS_MAX);
        }
        assert!(ranges.spans().iter().all(|span| span.len() == 1));
    }
}
