//! When it is time to stop paying for each visit.
//!
//! Whoever waits again and again for pieces of one file, or for files of one directory,
//! pays a round trip each time. The rest of it is worth as many bytes as the link had
//! carried in half of that time: if it is never read, the mistake costs half of what was
//! paid before, and if it is, nothing more is paid. What is spent on a directory cannot be
//! spent on the one above it once more.
//!
//! Invariant: pure but for its own counts, which are bounded.

use std::collections::{HashMap, HashSet};

use super::files::Members;
use crate::link::Link;

/// Waits before anything is worth more than what was asked for.
const WAITS_MIN: u32 = 2;
/// Part of what the link carried meanwhile that is worth spending.
const PARTS: u64 = 2;
/// Most that is spent on one thing, encoded bytes: what is larger is read in places.
const SPENT_MAX: u64 = 8 << 20;
/// Files and directories that are counted.
const COUNTED_MAX: usize = 16_384;

/// What was paid so far.
#[derive(Debug, Default)]
pub(super) struct Rents {
    accounts: HashMap<Members, Account>,
    looked: HashSet<u32>,
}

#[derive(Debug, Default)]
struct Account {
    waits: u32,
    /// Encoded bytes that may be spent.
    left: u64,
}

impl Rents {
    /// Somebody waits over `link` for a piece of all of these.
    pub(super) fn paid(&mut self, around: &[Members], link: Link) {
        for members in around {
            if self.accounts.len() >= COUNTED_MAX && !self.accounts.contains_key(members) {
                continue;
            }
            let account = self.accounts.entry(*members).or_default();
            account.waits = account.waits.saturating_add(1);
            let carried = link.round_trip_bytes() / PARTS;
            account.left = account.left.saturating_add(carried);
        }
    }

    /// Encoded bytes that it is worth spending on the rest of this.
    pub(super) fn worth(&self, members: Members) -> u64 {
        match self.accounts.get(&members) {
            Some(account) if account.waits >= WAITS_MIN => account.left.min(SPENT_MAX),
            Some(_) | None => 0,
        }
    }

    /// So many encoded bytes were spent on a part of all of these.
    pub(super) fn spent(&mut self, around: &[Members], bytes: u64) {
        for members in around {
            if let Some(account) = self.accounts.get_mut(members) {
                account.left = account.left.saturating_sub(bytes);
            }
        }
    }

    /// Whether nobody looked at this file before.
    pub(super) fn look(&mut self, file: u32) -> bool {
        self.looked.len() < COUNTED_MAX && self.looked.insert(file)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    /// Half of what it carries in a round trip.
    const COIN: u64 = 625_000;

    fn link() -> Link {
        Link {
            round_trip: Duration::from_millis(10),
            bytes_per_second: 125_000_000,
        }
    }

    #[test]
    fn the_second_wait_is_worth_what_both_cost() {
        let (file, directory) = (Members::File(1), Members::Directory(1));
        let mut rents = Rents::default();
        rents.paid(&[file, directory], link());
        assert_eq!((rents.worth(file), rents.worth(directory)), (0, 0));
        rents.paid(&[Members::File(2), directory], link());
        assert_eq!((rents.worth(file), rents.worth(directory)), (0, 2 * COIN));
        rents.paid(&[file, directory], link());
        assert_eq!(rents.worth(file), 2 * COIN);
        assert_eq!(rents.worth(directory), 3 * COIN);
        rents.spent(&[file, directory], COIN);
        assert_eq!(rents.worth(file), COIN);
        assert_eq!(rents.worth(directory), 2 * COIN);
        rents.spent(&[directory], 9 * COIN);
        assert_eq!(rents.worth(directory), 0);
        assert!(rents.look(1) && !rents.look(1));
    }

    proptest! {
        /// However waits and spending follow each other, no more is spent than half of what
        /// the link carried meanwhile.
        #[test]
        fn mistakes_cost_half_of_what_was_paid(
            steps in prop::collection::vec((0_u32..4, 0_u64..4_000_000), 1..200),
        ) {
            let root = Members::Directory(9);
            let (mut rents, mut paid, mut spent) = (Rents::default(), 0, 0);
            for (file, wanted) in steps {
                let around = [Members::File(file), Members::Directory(file / 2), root];
                rents.paid(&around, link());
                paid += COIN;
                for (at, members) in around.iter().enumerate() {
                    if wanted <= rents.worth(*members) && wanted <= rents.worth(root) {
                        spent += wanted;
                        rents.spent(&around[at..], wanted);
                    }
                }
                prop_assert!(rents.worth(root) <= SPENT_MAX);
                prop_assert!(spent <= paid);
            }
        }

        #[test]
        fn counts_are_bounded(offset in 0_u32..1000) {
            let mut rents = Rents::default();
            for number in offset..offset + 2 * u32::try_from(COUNTED_MAX).unwrap() {
                rents.paid(&[Members::File(number)], link());
                rents.look(number);
            }
            prop_assert!(rents.accounts.len() <= COUNTED_MAX);
            prop_assert!(!rents.look(u32::MAX));
        }
    }
}
