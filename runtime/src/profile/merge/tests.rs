//! What a merge promises, by table and by property.

use lazarette_fetcher::prefetch::Place;
use proptest::prelude::*;

use super::*;
use crate::profile::Command;

fn touch(layer: u32, block: u32, pages: u16) -> Touch {
    let place = Place { block, pages };
    Touch { layer, place }
}

fn empty() -> CommandProfile {
    CommandProfile::empty(&Command::new(&["run".to_owned()]))
}

fn after(runs: &[&[Touch]]) -> CommandProfile {
    let merged = runs.iter().fold(empty(), |old, run| merge(&old, run, 1));
    assert_eq!(merged.runs as usize, runs.len());
    merged
}

fn order(profile: &CommandProfile) -> Vec<(u32, u32)> {
    let blocks = profile.blocks.iter();
    blocks
        .map(|block| (block.layer, block.place.block))
        .collect()
}

#[test]
fn the_earliest_place_counts() {
    let (a, b, c) = (touch(0, 1, 1), touch(1, 1, 1), touch(0, 2, 1));
    assert_eq!(order(&after(&[&[a, b, c]])), [(0, 1), (1, 1), (0, 2)]);
    assert_eq!(
        order(&after(&[&[a, b, c], &[c, a]])),
        [(0, 1), (0, 2), (1, 1)]
    );
}

#[test]
fn pages_and_sightings_add_up() {
    let profile = after(&[
        &[touch(0, 1, 0b01)],
        &[touch(0, 1, 0b10), touch(0, 1, 0b10)],
        &[],
    ]);
    let block = profile.blocks[0];
    assert_eq!((block.place.pages, block.seen, block.born), (0b11, 2, 1));
}

#[test]
fn what_is_seldom_read_goes_and_what_is_new_stays() {
    let (always, once, late) = (touch(0, 1, 1), touch(0, 2, 1), touch(0, 3, 1));
    let mut runs: Vec<&[Touch]> = vec![&[], &[]];
    let (usual, first, last) = ([always], [always, once], [always, late]);
    runs[0] = &first;
    runs[1] = &usual;
    while runs.len() < 7 {
        runs.push(&usual);
    }
    assert_eq!(order(&after(&runs)), [(0, 1), (0, 2)], "too young to judge");
    runs.push(&last);
    assert_eq!(order(&after(&runs)), [(0, 1), (0, 3)]);
}

#[test]
fn order_and_sightings_do_not_tell_profiles_apart() {
    let (a, b) = (touch(0, 1, 0b11), touch(1, 1, 1));
    let profile = after(&[&[a, b]]);
    assert!(names_the_same(&profile, &after(&[&[b, a], &[b]])));
    assert!(!names_the_same(&profile, &after(&[&[a]])));
    assert!(!names_the_same(
        &profile,
        &after(&[&[a, b, touch(1, 1, 0b10)]])
    ));
    assert!(!names_the_same(&empty(), &profile));
}

#[test]
fn only_what_teaches_is_written() {
    let known = [touch(0, 1, 0b11), touch(1, 1, 1)];
    let (young, grown) = (after(&[&known]), after(&[known.as_slice(); 8]));
    assert!(teaches(&empty(), &known));
    let table: [(&[Touch], bool, bool); 5] = [
        (&known, false, false),
        (&[touch(1, 1, 1), touch(0, 1, 1)], false, false),
        (&known[1..], true, false),
        (&[known[0], touch(1, 1, 0b100)], true, true),
        (&[known[0], known[1], touch(0, 2, 1)], true, true),
    ];
    for (touches, to_young, to_grown) in table {
        assert_eq!(teaches(&young, touches), to_young, "{touches:?}");
        assert_eq!(teaches(&grown, touches), to_grown, "{touches:?}");
    }
}

#[test]
fn it_is_bounded() {
    let most = u32::try_from(BLOCKS_MAX).unwrap();
    let run: Vec<Touch> = (0..most + 10).map(|n| touch(0, n, 1)).collect();
    let profile = after(&[&run, &run[5..]]);
    assert_eq!(profile.blocks.len(), BLOCKS_MAX);
    let ends = CommandProfile {
        runs: u32::MAX,
        ..profile
    };
    assert_eq!(merge(&ends, &run, 1).runs, u32::MAX);
}

fn touches() -> impl Strategy<Value = Vec<Touch>> {
    let one = (0_u32..3, 0_u32..12, 1_u16..);
    prop::collection::vec(one.prop_map(|(l, b, p)| touch(l, b, p)), 0..30)
}

proptest! {
    #[test]
    fn merging_keeps_its_promises(runs in prop::collection::vec(touches(), 1..20)) {
        let mut profile = empty();
        for run in &runs {
            let old = profile;
            profile = merge(&old, run, 1);
            let mut places = order(&profile);
            places.sort_unstable();
            places.dedup();
            prop_assert_eq!(places.len(), profile.blocks.len(), "no block twice");
            for block in &profile.blocks {
                let at = (block.layer, block.place.block);
                let known = old.blocks.iter().any(|b| (b.layer, b.place.block) == at);
                let read = run.iter().any(|t| (t.layer, t.place.block) == at);
                prop_assert!(known || read, "nothing out of nowhere");
                prop_assert!(block.seen >= 1 && block.seen <= profile.runs && block.born <= profile.runs);
            }
            // What this run read for the first time is in it, pages and all.
            for touch in run {
                let at = (touch.layer, touch.place.block);
                let found = profile.blocks.iter().find(|b| (b.layer, b.place.block) == at);
                let known = old.blocks.iter().any(|b| (b.layer, b.place.block) == at);
                prop_assert!(known || found.is_some());
                prop_assert!(found.is_none_or(|b| b.place.pages & touch.place.pages == touch.place.pages));
            }
        }
    }

    #[test]
    fn the_same_start_again_changes_nothing_but_counts(run in touches(), times in 2_usize..12) {
        let once = after(&[&run]);
        let often = after(&vec![run.as_slice(); times]);
        prop_assert_eq!(order(&once), order(&often));
    }
}
