//! What one more start teaches.
//!
//! Invariant: pure. The result is within [`BLOCKS_MAX`], names no block twice, and keeps
//! blocks in the order of the earliest place that any recorded start had for them: what
//! is fetched too early costs little, what comes too late is waited for.

use std::collections::{BTreeMap, BTreeSet};

use super::document::{BLOCKS_MAX, Block, CommandProfile};
use super::record::Touch;

/// Starts after which a block has to have been seen in a share of them to stay.
pub const RUNS_TO_JUDGE: u32 = 8;
/// That share: one in so many.
pub const SEEN_ONE_IN: u32 = 4;

/// The profile after one more start that read `touches`, in that order, at `now` (seconds
/// since 1970).
pub fn merge(old: &CommandProfile, touches: &[Touch], now: u64) -> CommandProfile {
    let runs = old.runs.saturating_add(1);
    let mut all: BTreeMap<(u32, u32), (usize, Block)> = BTreeMap::new();
    for (rank, block) in old.blocks.iter().enumerate() {
        all.insert((block.layer, block.place.block), (rank, *block));
    }
    for (rank, touch) in touches.iter().enumerate() {
        let key = (touch.layer, touch.place.block);
        let (earliest, block) = all.entry(key).or_insert_with(|| {
            let block = Block {
                layer: touch.layer,
                place: touch.place,
                seen: 0,
                born: runs,
            };
            (rank, block)
        });
        *earliest = rank.min(*earliest);
        block.place.pages |= touch.place.pages;
        block.seen = block.seen.saturating_add(1).min(age(block, runs));
    }
    let mut ranked: Vec<(usize, Block)> = all
        .into_values()
        .filter(|(_, block)| stays(block, runs))
        .collect();
    ranked.sort_by_key(|(rank, block)| (*rank, block.layer, block.place.block));
    ranked.truncate(BLOCKS_MAX);
    CommandProfile {
        command: old.command,
        program: old.program.clone(),
        runs,
        updated_at: now,
        blocks: ranked.into_iter().map(|(_, block)| block).collect(),
    }
}

/// Whether a start that read `touches` is worth a write, which costs this start and the
/// next one milliseconds: it brings something new, or leaves out something in a profile
/// too young to tell what is read by chance. Most starts read what the last one read.
pub fn teaches(old: &CommandProfile, touches: &[Touch]) -> bool {
    let known: BTreeMap<(u32, u32), u16> = old
        .blocks
        .iter()
        .map(|block| ((block.layer, block.place.block), block.place.pages))
        .collect();
    let mut seen = BTreeSet::new();
    for touch in touches {
        let at = (touch.layer, touch.place.block);
        let pages = known.get(&at).copied().unwrap_or_default();
        if touch.place.pages & !pages != 0 {
            return true;
        }
        seen.insert(at);
    }
    old.runs < RUNS_TO_JUDGE && seen.len() < known.len()
}

/// Whether both name the same pages, in whatever order.
pub fn names_the_same(a: &CommandProfile, b: &CommandProfile) -> bool {
    let places = |profile: &CommandProfile| -> BTreeMap<(u32, u32), u16> {
        let blocks = profile.blocks.iter();
        let named = blocks.map(|block| ((block.layer, block.place.block), block.place.pages));
        named.collect()
    };
    places(a) == places(b)
}

/// Starts that could have read the block.
fn age(block: &Block, runs: u32) -> u32 {
    runs.saturating_sub(block.born).saturating_add(1)
}

fn stays(block: &Block, runs: u32) -> bool {
    let age = age(block, runs);
    age < RUNS_TO_JUDGE || block.seen.saturating_mul(SEEN_ONE_IN) >= age
}

#[cfg(test)]
mod tests;
