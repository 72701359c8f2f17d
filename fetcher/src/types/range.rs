//! Half-open ranges of bytes.
//!
//! Invariant: `start <= end`. Arithmetic never wraps; what would is `None`.

use std::fmt;

/// Bytes `start..end` of a blob or of a layer's data file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteRange {
    /// `start..end`, or `None` when `end < start`.
    pub fn new(start: u64, end: u64) -> Option<Self> {
        (start <= end).then_some(Self { start, end })
    }

    /// `len` bytes from `start`, or `None` when the end would pass `u64::MAX`.
    pub fn at(start: u64, len: u64) -> Option<Self> {
        Some(Self {
            start,
            end: start.checked_add(len)?,
        })
    }

    /// First byte.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Number of bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether `other` lies inside.
    pub fn contains(&self, other: &Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The smallest range that covers both.
    pub fn cover(&self, other: &Self) -> Self {
        Self {
            start: self.start.min(other.start),
            end: self.end.max(other.end),
        }
    }

    /// What lies in both, if there is any.
    pub fn common(&self, other: &Self) -> Option<Self> {
        let range = Self::new(self.start.max(other.start), self.end.min(other.end))?;
        (!range.is_empty()).then_some(range)
    }

    /// The same bytes in ranges that ascend and do not touch.
    pub fn joined(mut ranges: Vec<Self>) -> Vec<Self> {
        ranges.retain(|range| !range.is_empty());
        ranges.sort_unstable();
        let mut all: Vec<Self> = Vec::new();
        for range in ranges {
            match all.last_mut() {
                Some(last) if range.start <= last.end => *last = last.cover(&range),
                Some(_) | None => all.push(range),
            }
        }
        all
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_wraps_and_never_inverts() {
        assert_eq!(ByteRange::at(u64::MAX, 1), None);
        assert_eq!(ByteRange::new(2, 1), None);
        let range = ByteRange::at(3, 4).unwrap();
        assert_eq!((range.start(), range.end(), range.len()), (3, 7, 4));
        assert!(range.contains(&ByteRange::new(4, 7).unwrap()));
        assert!(!range.contains(&ByteRange::new(4, 8).unwrap()));
    }
}
