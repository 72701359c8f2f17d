//! What a request should be on a given link.
//!
//! A request costs a round trip, but not the time of one: several are under way at once,
//! so that of `n` that go together each costs about an `n`-th of it. That is what a gap of
//! unwanted bytes may cost at most; the plain formula, all bytes of a round trip, is for
//! links on which one request goes after another. At 1 Gbit/s and 10 ms it would fetch
//! 1.2 MB to save a request, more than most starts need in all of a layer.
//!
//! Bytes are not free either: they are decoded by nobody, but the link is shared with
//! other nodes and other layers, and what a start fetches before it is ready should stay
//! near what it reads. So
//! - a gap is never longer than the base limit, and
//! - where many requests go at once anyway, in a profile and in the background, all gaps
//!   together are at most an eighth of the wanted bytes: slots hide the round trips, bytes
//!   are what is left. A reader's own few misses may take gaps as they come.
//!
//! A request longer than a round trip's bytes gains nothing by being longer, since another
//! that is asked for meanwhile begins when it ends. Shorter ones leave the link idle if
//! there is only one. So a request is a round trip's bytes and at least 1 MiB, which keeps
//! the number of requests of a large layer near that of its megabytes; what is longer goes
//! over several connections at once. On a link with a short round trip there is no gain
//! in that, and 1 MiB still is some milliseconds.
//!
//! A server's own work for a request is mostly the same however little is asked for (one
//! that is common allocates 4 MiB for each), and much less for a further part of one. So
//! where a source takes several parts in a request, what many requests would bring comes
//! in few, and hardly a gap is worth its bytes.
//!
//! Invariant: never looser than the base limits. Pure.

use super::PlanLimits;
use crate::layer::Priority;
use crate::link::Link;

/// Requests that go together at least, among readers.
const TOGETHER: u64 = 4;
/// Shortest limit on a gap: the headers of a request and its answer are a tenth of it.
const GAP_BYTES_MIN: u64 = 8 << 10;
/// Shortest limit on a request.
const REQUEST_BYTES_MIN: u64 = 1 << 20;
/// Wanted bytes for one byte of gaps, where many requests go at once.
const WANTED_PER_GAP: u64 = 8;

impl PlanLimits {
    /// These limits, as tight as `link`, the parts that the source takes in a request, and
    /// the kind of request make sensible. Readers' requests stay of one part: what one
    /// waits for should not come behind what others want.
    #[must_use]
    pub fn on(self, link: Link, parts_max: usize, priority: Priority) -> Self {
        let parts_max = match priority {
            Priority::OnDemand => 1,
            Priority::Profile | Priority::Background => parts_max.max(1),
        };
        let round_trip = link.round_trip_bytes();
        let gap = match parts_max {
            1 => (round_trip / TOGETHER).max(GAP_BYTES_MIN),
            _ => GAP_BYTES_MIN,
        };
        let wanted_per_gap = match priority {
            Priority::OnDemand => self.wanted_per_gap,
            Priority::Profile | Priority::Background => self.wanted_per_gap.max(WANTED_PER_GAP),
        };
        Self {
            gap_bytes_max: self.gap_bytes_max.min(gap),
            request_bytes_max: self
                .request_bytes_max
                .min(round_trip.max(REQUEST_BYTES_MIN)),
            wanted_per_gap,
            parts_max,
            ..self
        }
    }
}
