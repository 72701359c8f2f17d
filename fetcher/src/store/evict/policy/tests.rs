//! The policy against its rules, on tables and on random histories.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::{Entry, Limits, Policy, Queue};

fn policy() -> Policy<u32> {
    Policy::new(Limits { entries: 1000 })
}

fn none(_: &u32) -> bool {
    false
}

/// The next one to go. None weighs nothing.
fn evict(policy: &mut Policy<u32>, is_pinned: impl Fn(&u32) -> bool) -> Option<(u32, u64)> {
    let victims = policy.evict(1, is_pinned);
    assert!(victims.len() <= 1, "{victims:?}");
    victims.first().copied()
}

fn drain(policy: &mut Policy<u32>) -> Vec<u32> {
    std::iter::from_fn(|| evict(policy, none).map(|(key, _)| key)).collect()
}

#[test]
fn what_was_read_once_leaves_first() {
    let mut policy = policy();
    for key in 0..10 {
        policy.insert(key, 100);
    }
    for key in [1, 4, 7] {
        policy.touch(&key);
    }
    assert_eq!(drain(&mut policy), [0, 2, 3, 5, 6, 8, 9, 1, 4, 7]);
}

#[test]
fn a_scan_does_not_push_out_what_is_read_often() {
    let mut policy = policy();
    for key in 0..10 {
        policy.insert(key, 1);
        policy.touch(&key);
    }
    for key in 100..200 {
        policy.insert(key, 1);
        if key >= 110 {
            let (gone, _) = evict(&mut policy, none).unwrap();
            assert!(gone >= 100, "{gone} is read often");
        }
    }
}

#[test]
fn what_comes_back_goes_to_the_main_queue() {
    let mut policy = policy();
    for key in 0..20 {
        policy.insert(key, 1);
    }
    assert_eq!(evict(&mut policy, none), Some((0, 1)));
    policy.insert(0, 1);
    policy.insert(50, 1);
    let order = drain(&mut policy);
    let at = |key| order.iter().position(|other| *other == key).unwrap();
    assert!(at(0) > at(50), "{order:?}");
}

#[test]
fn pins_yield_last() {
    let mut policy = policy();
    for key in 0..10 {
        policy.insert(key, 1);
        policy.touch(&key);
    }
    let pinned = |key: &u32| *key < 4;
    let order: Vec<u32> = (0..10)
        .map(|_| evict(&mut policy, pinned).expect("there are ten").0)
        .collect();
    assert!(order[..6].iter().all(|key| *key >= 4), "{order:?}");
    assert!(order[6..].iter().all(|key| *key < 4), "{order:?}");
    assert_eq!(evict(&mut policy, pinned), None);
}

fn entry(queue: Queue, touches: u8) -> Entry {
    Entry {
        weight: 1,
        touches,
        queue,
    }
}

/// What is left is nearly all pinned, or what is pinned fills the small queue: extents are chosen
/// while readers wait for room, so no more than a few looks at each entry are spent.
#[test]
fn a_batch_looks_at_each_entry_once_whatever_is_pinned() {
    const ENTRIES: u32 = 50_000;
    // How many wait in the small queue, and how many of the first are pinned.
    for (small, pinned) in [(ENTRIES, ENTRIES), (ENTRIES / 5, ENTRIES / 5)] {
        let mut policy = Policy::default();
        for key in 0..ENTRIES {
            let queue = if key < small {
                Queue::Small
            } else {
                Queue::Main
            };
            policy.push(key, entry(queue, 0));
        }
        let looks = Cell::new(0);
        let victims = policy.evict(3000, |key| {
            looks.set(looks.get() + 1);
            *key < pinned
        });
        let keys: Vec<u32> = victims.iter().map(|(key, _)| *key).collect();
        let first = if pinned < ENTRIES { pinned } else { 0 };
        assert!(keys.into_iter().eq(first..first + 3000));
        assert!(looks.get() <= ENTRIES, "{} looks", looks.get());
        // What was set aside is there, in the queue it was in.
        assert_eq!(policy.entries.len(), 47_000);
        assert_eq!(policy.small.len() + policy.main.len(), 47_000);
        assert_eq!(policy.small_weight, policy.small.len() as u64);
        assert_eq!(policy.main_weight, policy.main.len() as u64);
    }
}

#[test]
fn what_is_pinned_is_passed_over_and_keeps_its_queue() {
    type Row<'a> = (&'a [(u32, u8)], &'a [(u32, u8)], &'a [u32], &'a [u32]);
    // The queues with touches, what is pinned, and the order in which all go.
    let table: [Row<'_>; 5] = [
        (
            &[(0, 0), (1, 0), (2, 0), (3, 0)],
            &[],
            &[0, 2],
            &[1, 3, 0, 2],
        ),
        (
            &[],
            &[(0, 0), (1, 0), (2, 0), (3, 0)],
            &[0, 1],
            &[2, 3, 0, 1],
        ),
        (&[(0, 0), (1, 0)], &[(2, 0), (3, 0)], &[0, 1], &[2, 3, 0, 1]),
        // Touches count also where all of the small queue is pinned.
        (&[(0, 0), (1, 0)], &[(2, 1), (3, 0)], &[0, 1], &[3, 2, 0, 1]),
        (&[(0, 1), (1, 0)], &[(2, 0)], &[2], &[1, 0, 2]),
    ];
    for (small, main, pinned, order) in table {
        let mut policy = policy();
        for (queue, entries) in [(Queue::Small, small), (Queue::Main, main)] {
            for (key, touches) in entries {
                policy.push(*key, entry(queue, *touches));
            }
        }
        let gone = policy.evict(order.len() as u64, |key| pinned.contains(key));
        let gone: Vec<u32> = gone.iter().map(|(key, _)| *key).collect();
        assert_eq!(gone, order, "{small:?} {main:?} {pinned:?}");
    }
}

#[test]
fn memory_is_bounded() {
    let mut policy = Policy::new(Limits { entries: 8 });
    for key in 0..1000_u32 {
        policy.insert(key, 1);
        if key % 3 == 0 {
            evict(&mut policy, none);
        }
        assert!(policy.entries.len() <= 8);
        assert!(policy.small.len() + policy.main.len() <= 8);
        assert!(policy.ghosts.len() <= 8 && policy.ghost_turns.len() <= 8);
    }
}

#[derive(Debug, Clone)]
enum Op {
    Insert(u32, u64),
    Touch(u32),
    Evict(u64),
    Drop(u32),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0..30_u32, 1..100_u64).prop_map(|(key, weight)| Op::Insert(key, weight)),
        (0..30_u32).prop_map(Op::Touch),
        (1..300_u64).prop_map(Op::Evict),
        (0..30_u32).prop_map(Op::Drop),
    ]
}

proptest! {
    /// Beside it a map of what is there: nothing is lost, invented or counted wrong.
    #[test]
    fn any_history_agrees_with_a_map(ops in prop::collection::vec(op(), 0..300)) {
        let (mut policy, mut model) = (policy(), HashMap::new());
        let pinned: HashSet<u32> = (0..5).collect();
        for op in ops {
            match op {
                Op::Insert(key, weight) => {
                    policy.insert(key, weight);
                    model.insert(key, weight);
                }
                Op::Touch(key) => policy.touch(&key),
                Op::Drop(key) => {
                    policy.retain(|other| *other != key);
                    model.remove(&key);
                }
                Op::Evict(weight) => {
                    let mut taken = 0;
                    for (key, weighs) in policy.evict(weight, |key| pinned.contains(key)) {
                        let free = model.keys().any(|key| !pinned.contains(key));
                        prop_assert_eq!(model.remove(&key), Some(weighs));
                        prop_assert!(taken < weight && (!free || !pinned.contains(&key)));
                        taken += weighs;
                    }
                    prop_assert!(taken >= weight || model.is_empty());
                }
            }
            prop_assert_eq!(policy.entries.len(), model.len());
            prop_assert_eq!(policy.small.len() + policy.main.len(), model.len());
            let weight: u64 = model.values().sum();
            prop_assert_eq!(policy.small_weight + policy.main_weight, weight);
            prop_assert!(policy.ghosts.len() <= model.len().max(30));
        }
    }
}
