//! The decision, by table and in general.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

const MB: u64 = 1_000_000;

fn link(ms: u64, megabytes: u64) -> Link {
    Link {
        round_trip: Duration::from_millis(ms),
        bytes_per_second: megabytes * MB,
    }
}

fn facts(missing_bytes: u64, covered_bytes: Option<u64>, link: Link) -> LayerFacts {
    LayerFacts {
        missing_bytes,
        covered_bytes,
        link,
    }
}

#[test]
fn each_reason_has_its_layers() {
    let usual = Link::GUESS;
    let slow = link(20, 2);
    let far = link(200, 125);
    let table = [
        (facts(0, None, usual), Share::Full, Why::Complete),
        (facts(292, None, usual), Share::Full, Why::Small),
        (facts(2 * MB, None, usual), Share::Full, Why::Small),
        (facts(3 * MB, None, usual), Share::Lazy, Why::Large),
        (facts(100_000, None, slow), Share::Full, Why::Small),
        (facts(MB, None, slow), Share::Lazy, Why::Large),
        (facts(20 * MB, None, far), Share::Lazy, Why::Large),
        // A profile knows better.
        (facts(292, Some(0), usual), Share::Lazy, Why::Uncovered),
        (facts(2 * MB, Some(MB), usual), Share::Lazy, Why::Uncovered),
        (facts(100_000, Some(1000), usual), Share::Full, Why::Small),
        (
            facts(100 * MB, Some(70 * MB), slow),
            Share::Full,
            Why::Covered,
        ),
        (
            facts(100 * MB, Some(70 * MB - 1), far),
            Share::Lazy,
            Why::Uncovered,
        ),
    ];
    for (facts, share, why) in table {
        assert_eq!(decide(&facts), (share, why), "{facts:?}");
    }
}

proptest! {
    #[test]
    fn less_to_fetch_or_more_to_read_is_never_lazier(
        missing in 1_u64..400 * MB,
        less in 0_u64..400 * MB,
        covered in prop::option::of(0_u64..400 * MB),
        more in 0_u64..400 * MB,
        link in (0_u64..1000, 1_u64..10_000).prop_map(|(ms, mb)| link(ms, mb)),
    ) {
        let covered = covered.map(|covered| covered.min(missing));
        let before = decide(&facts(missing, covered, link)).0;
        let grown = covered.map(|covered| covered.saturating_add(more).min(missing));
        let fewer = missing.saturating_sub(less).max(covered.unwrap_or(0));
        for after in [facts(missing, grown, link), facts(fewer, covered, link)] {
            prop_assert!(before == Share::Lazy || decide(&after).0 == Share::Full);
        }
    }

    #[test]
    fn parts_are_shares(bytes in any::<u64>(), part in any::<u64>(), whole in any::<u64>()) {
        let part = part.min(whole);
        let share = part_of(bytes, part, whole);
        prop_assert!(share <= bytes);
        prop_assert_eq!(share == 0, bytes == 0 || part == 0);
    }
}
