//! The policy against its rules, on tables and on random histories.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::{Limits, Policy};

fn policy() -> Policy<u32> {
    Policy::new(Limits { entries: 1000 })
}

fn none(_: &u32) -> bool {
    false
}

fn drain(policy: &mut Policy<u32>) -> Vec<u32> {
    std::iter::from_fn(|| policy.evict(none).map(|(key, _)| key)).collect()
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
            let (gone, _) = policy.evict(none).unwrap();
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
    assert_eq!(policy.evict(none), Some((0, 1)));
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
        .map(|_| policy.evict(pinned).expect("there are ten").0)
        .collect();
    assert!(order[..6].iter().all(|key| *key >= 4), "{order:?}");
    assert!(order[6..].iter().all(|key| *key < 4), "{order:?}");
    assert_eq!(policy.evict(pinned), None);
}

#[test]
fn memory_is_bounded() {
    let mut policy = Policy::new(Limits { entries: 8 });
    for key in 0..1000_u32 {
        policy.insert(key, 1);
        if key % 3 == 0 {
            policy.evict(none);
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
    Evict,
    Drop(u32),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0..30_u32, 1..100_u64).prop_map(|(key, weight)| Op::Insert(key, weight)),
        (0..30_u32).prop_map(Op::Touch),
        Just(Op::Evict),
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
                Op::Evict => {
                    let free = model.keys().any(|key| !pinned.contains(key));
                    let gone = policy.evict(|key| pinned.contains(key));
                    prop_assert_eq!(gone.is_none(), model.is_empty());
                    if let Some((key, weight)) = gone {
                        prop_assert_eq!(model.remove(&key), Some(weight));
                        prop_assert!(!free || !pinned.contains(&key));
                    }
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
