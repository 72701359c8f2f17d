//! What was measured once about the images, and the limits that follow from it.
//!
//! Invariant: pure data and arithmetic. The figures were taken on the project's 2-core machine:
//! touched bytes by page-cache residency from cold to ready with read-ahead off, in blocks of
//! 64 KiB, each block deflated alone; warm starts with everything in the page cache. They belong
//! to the recorded workloads; nothing is known of the others.

use crate::plan::{Image, Link};

/// Round trips that no cold start can do without: connect, manifest, index, content.
const ROUND_TRIPS: u32 = 4;
/// Cores of the machine that the rates below were taken on.
const CORES: f64 = 2.0;
/// sha256 of one thread, bytes a second.
const SHA256: f64 = 1_635e6;
/// Inflate of one thread, bytes of output a second (zlib-rs).
const INFLATE: f64 = 630e6;

/// What a start of an image takes however it is done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Facts {
    /// Start to ready with all content in the page cache, seconds.
    pub(crate) warm_seconds: f64,
    /// The touched 64 KiB blocks, deflated, bytes.
    pub(crate) touched_bytes: f64,
    /// All layers as gzip, bytes.
    pub(crate) gzip_bytes: f64,
    /// All layers unpacked, bytes.
    pub(crate) unpacked_bytes: f64,
}

/// The table.
pub(crate) fn of(image: Image) -> Facts {
    let (warm_seconds, touched, gzip, unpacked) = match image {
        Image::Debian => (0.01, 0.5, 63.0, 164.0),
        Image::Python => (0.12, 11.2, 101.0, 268.0),
        Image::Java => (0.05, 11.8, 152.0, 394.0),
        Image::Nginx => (0.01, 3.0, 71.0, 181.0),
        Image::Ml => (0.69, 56.8, 1_059.0, 3_484.0),
    };
    Facts {
        warm_seconds,
        touched_bytes: touched * 1e6,
        gzip_bytes: gzip * 1e6,
        unpacked_bytes: unpacked * 1e6,
    }
}

/// Least time to ready, seconds: warm start, touched bytes over the link, four round trips.
pub(crate) fn start_limit(image: Image, link: Link) -> f64 {
    let facts = of(image);
    let bytes = link
        .bytes_per_second()
        .map_or(0.0, |rate| facts.touched_bytes / rate);
    facts.warm_seconds + bytes + (link.one_way() * 2 * ROUND_TRIPS).as_secs_f64()
}

/// Least time of a full pull of the gzip image, seconds: the link, or sha256 and inflate spread
/// over both cores, whichever takes longer.
pub(crate) fn pull_limit(image: Image, link: Link) -> f64 {
    let facts = of(image);
    let bytes = link
        .bytes_per_second()
        .map_or(0.0, |rate| facts.gzip_bytes / rate);
    let decode = (facts.gzip_bytes / SHA256 + facts.unpacked_bytes / INFLATE) / CORES;
    bytes.max(decode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_those_that_were_published_with_the_figures() {
        let table = [
            (Image::Debian, Link::Gigabit, 0.054),
            (Image::Nginx, Link::Gigabit, 0.074),
            (Image::Python, Link::Gigabit, 0.2496),
            (Image::Java, Link::Gigabit, 0.1844),
            (Image::Ml, Link::Gigabit, 1.1844),
            (Image::Ml, Link::HundredMegabit, 5.394),
            (Image::Python, Link::Loopback, 0.12),
        ];
        for (image, link, wanted) in table {
            let limit = start_limit(image, link);
            assert!((limit - wanted).abs() < 1e-9, "{image:?} {link:?}: {limit}");
        }
    }

    #[test]
    fn a_full_pull_is_bound_by_the_slower_of_link_and_cores() {
        assert!((pull_limit(Image::Ml, Link::HundredMegabit) - 84.72).abs() < 1e-9);
        let cores = pull_limit(Image::Ml, Link::Loopback);
        assert!((3.0..3.2).contains(&cores), "{cores}");
    }
}
