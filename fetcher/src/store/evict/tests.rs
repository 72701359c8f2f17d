//! Bounds, and what is beyond them.

use super::*;

#[test]
fn the_excess_is_what_brings_the_store_within_both_bounds() {
    let space = |used, budget, free, free_floor| Space {
        used,
        budget,
        free,
        free_floor,
    };
    let table = [
        (space(100, None, 5, 0), 0),
        (space(160, Some(160), 5, 5), 0),
        (space(161, Some(160), 5, 5), 1 + 10),
        (space(100, None, 5, 32), 27 + 2),
        (space(200, Some(160), 0, 32), 50),
    ];
    for (space, excess) in table {
        assert_eq!(space.excess(), excess, "{space:?}");
    }
}

#[test]
fn the_usual_floor_is_a_gib_at_most() {
    let floor = |free_floor, total| {
        let budget = None;
        Bounds { budget, free_floor }.floor(total)
    };
    assert_eq!(floor(None, 1 << 40), 1 << 30);
    assert_eq!(floor(None, 10 << 30), 1 << 29);
    assert_eq!(floor(Some(0), 1 << 40), 0);
    assert_eq!(floor(Some(7), 1 << 40), 7);
    assert_eq!(floor(Some(1 << 41), 1 << 40), 1 << 40);
}
