//! How a file is cut into chunks (pure).
//!
//! Invariant: the pieces of a file follow one another from 0 to its size without gaps,
//! and depend on its size, what is known of its use, and the chunk size alone.
//!
//! Small chunks save bytes where a start reads a little of a large file, and cost TOC
//! bytes and compression everywhere else. So what a start touched is cut small, along the
//! bounds of what it touched; what no start touched is cut large; and with nothing known
//! everything is cut small, until a file has more chunks than are worth telling apart.

use crate::types::ByteRange;

/// Hot ranges grow to multiples of this: profiles record what was fetched, and neighbours
/// of what one run read are what the next one reads.
const HOT_ALIGN: u64 = 64 << 10;
/// Chunks of what no start touched: costs a reader that comes all the same 4 times the
/// bytes, and the TOC a quarter.
const COLD_BYTES: u64 = 1 << 20;
/// From this size on a cold file is cut into [`LARGE_COLD_BYTES`].
const LARGE_FILE_BYTES: u64 = 256 << 20;
/// Other writers' usual chunk.
const LARGE_COLD_BYTES: u64 = 4 << 20;
/// With nothing known: chunks double once a file has more of them than this.
const PIECES_AIM: u64 = 4096;

/// Where a chunk is in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) file_offset: u64,
    pub(super) len: u64,
}

/// What is known of a file's use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heat<'a> {
    /// Nothing: there is no profile.
    Unknown,
    /// Starts need all of it.
    Hot,
    /// Starts need these ranges; any order, any overlap.
    Ranges(&'a [ByteRange]),
    /// Starts do not need it.
    Cold,
}

/// The pieces of a file of `size` bytes; none of an empty one.
pub(super) fn pieces(size: u64, heat: Heat<'_>, chunk_bytes: u32) -> Vec<Piece> {
    let small = u64::from(chunk_bytes.max(1));
    let mut out = Vec::new();
    match heat {
        Heat::Unknown => cut(&mut out, 0, size, unknown_len(size, small)),
        Heat::Hot => cut(&mut out, 0, size, small),
        Heat::Cold => cut(&mut out, 0, size, cold_len(size, small)),
        Heat::Ranges(ranges) => {
            let mut at = 0;
            for hot in merged(ranges, size) {
                cut(&mut out, at, hot.start(), cold_len(size, small));
                cut(&mut out, hot.start(), hot.end(), small);
                at = hot.end();
            }
            cut(&mut out, at, size, cold_len(size, small));
        }
    }
    out
}

fn unknown_len(size: u64, small: u64) -> u64 {
    let mut len = small;
    while len < LARGE_COLD_BYTES && size.div_ceil(len) > PIECES_AIM {
        len *= 2;
    }
    len
}

fn cold_len(size: u64, small: u64) -> u64 {
    let cold = match size {
        LARGE_FILE_BYTES.. => LARGE_COLD_BYTES,
        _ => COLD_BYTES,
    };
    cold.max(small)
}

fn cut(out: &mut Vec<Piece>, start: u64, end: u64, len: u64) {
    let mut at = start;
    while at < end {
        let len = len.min(end - at);
        out.push(Piece {
            file_offset: at,
            len,
        });
        at += len;
    }
}

/// The ranges, aligned outwards, within the file, in order and apart.
fn merged(ranges: &[ByteRange], size: u64) -> Vec<ByteRange> {
    let aligned = |range: &ByteRange| {
        let start = range.start() / HOT_ALIGN * HOT_ALIGN;
        let end = range.end().checked_next_multiple_of(HOT_ALIGN);
        let inside = ByteRange::new(start, end.unwrap_or(size).min(size))?;
        (!inside.is_empty() && !range.is_empty()).then_some(inside)
    };
    ByteRange::joined(ranges.iter().filter_map(aligned).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;

    fn lens(size: u64, heat: Heat<'_>) -> Vec<u64> {
        let pieces = pieces(size, heat, 256 << 10);
        pieces.iter().map(|piece| piece.len).collect()
    }

    #[test]
    fn small_files_are_one_piece_and_large_ones_depend_on_use() {
        for heat in [Heat::Unknown, Heat::Hot, Heat::Cold, Heat::Ranges(&[])] {
            assert_eq!(lens(0, heat), [0; 0]);
            assert_eq!(lens(1, heat), [1]);
            assert_eq!(lens(256 * KIB, heat), [256 * KIB]);
        }
        assert_eq!(lens(MIB, Heat::Unknown), [256 * KIB; 4]);
        assert_eq!(lens(MIB, Heat::Hot), [256 * KIB; 4]);
        assert_eq!(lens(MIB + 1, Heat::Cold), [MIB, 1]);
        assert_eq!(lens(256 * MIB, Heat::Cold), [4 * MIB; 64]);
        assert_eq!(lens(1024 * MIB, Heat::Unknown).len(), 4096);
        assert_eq!(lens(1024 * MIB + 1, Heat::Unknown).len(), 2049);
        assert_eq!(lens(64 << 30, Heat::Unknown)[0], 4 * MIB);
    }

    #[test]
    fn hot_ranges_are_cut_out_along_their_bounds() {
        let range = |start, end| ByteRange::new(start, end).unwrap();
        let ranges = [
            range(3 * MIB - 1, 3 * MIB + 1),
            range(0, 1),
            range(64 * KIB, 70 * KIB),
        ];
        let expected = [
            128 * KIB,
            MIB,
            MIB,
            MIB - 192 * KIB,
            128 * KIB,
            MIB - 64 * KIB,
        ];
        assert_eq!(lens(4 * MIB, Heat::Ranges(&ranges)), expected);
    }

    proptest! {
        #[test]
        fn pieces_cover_the_file(
            size in 0u64..20 << 20,
            hot in prop::collection::vec((0u64..25 << 20, 0u64..2 << 20), 0..8),
            chunk_bytes in 4096u32..1 << 20,
        ) {
            let ranges: Vec<ByteRange> = hot.iter().filter_map(|(at, len)| ByteRange::at(*at, *len)).collect();
            for heat in [Heat::Unknown, Heat::Hot, Heat::Cold, Heat::Ranges(&ranges)] {
                let mut at = 0;
                for piece in pieces(size, heat, chunk_bytes) {
                    prop_assert_eq!(piece.file_offset, at);
                    prop_assert!(piece.len > 0);
                    at += piece.len;
                }
                prop_assert_eq!(at, size);
            }
        }
    }
}
