//! The invariant against a model of the store: readers, evictors, daemons that die, locks
//! and messages under way, in any order, one step at a time. What is served is never a hole.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::tests::listed;
use super::*;

const PAGES: u64 = 6;
const PAGES_LEN: usize = 6;
/// Steps are drawn below this.
const OPS: u8 = 32;
/// Reads under way at a time.
const READERS_MAX: usize = 12;

/// An eviction under way, by the daemon or by another process.
struct Eviction {
    page: u64,
    by_daemon: bool,
    advanced: bool,
}

/// A read that was decided to be served.
struct Reader {
    read: Read,
    ticket: Ticket,
    /// What its read of the page found.
    found: Option<bool>,
}

/// The store of one layer, the daemon, and the state under test.
struct World {
    state: State,
    mount: u64,
    /// Whether a page's bytes are in the data file.
    bytes: [bool; PAGES_LEN],
    number: u64,
    /// The server's read lock of the data file.
    locked: bool,
    eviction: Option<Eviction>,
    daemon: bool,
    attached: bool,
    asked: VecDeque<Want>,
    grants: VecDeque<(u64, u64, Span)>,
    readers: Vec<Reader>,
    unique: u64,
    served: u64,
    now: Instant,
}

fn page(number: u64) -> Span {
    Span::new(number, number + 1).unwrap()
}

fn index(page: u64) -> usize {
    usize::try_from(page).unwrap()
}

impl World {
    fn new() -> Self {
        let mut state = State::new(Duration::from_secs(1));
        let mount = state.mount(listed(PAGES, "a", "/a"), None).unwrap();
        Self {
            state,
            mount,
            bytes: [false; PAGES_LEN],
            number: 0,
            locked: false,
            eviction: None,
            daemon: true,
            attached: true,
            asked: VecDeque::new(),
            grants: VecDeque::new(),
            readers: Vec::new(),
            unique: 0,
            served: 0,
            now: Instant::now(),
        }
    }

    fn step(&mut self, op: u8, at: u64) {
        match op {
            0..4 => self.begin_read(at),
            4..8 => self.read_bytes(at),
            8..12 => self.finish_read(at),
            12 => self.begin_eviction(at),
            13 => self.go_on_evicting(),
            14..17 => self.take_wants(),
            17..20 => self.answer(),
            20..24 => self.deliver(),
            24 => self.kill(),
            25..27 => self.lock(),
            27..30 => self.come_back(),
            _ => self.grant_unasked(at),
        }
    }

    fn take_wants(&mut self) {
        while self.daemon
            && let Some(want) = self.state.next_want()
        {
            self.asked.push_back(want);
        }
    }

    fn begin_read(&mut self, at: u64) {
        if self.readers.len() + self.state.waiting >= READERS_MAX {
            return;
        }
        self.unique += 1;
        let read = Read {
            thread: None,
            mount: self.mount,
            unique: self.unique,
            span: page(at),
            zeros: 0,
            since: self.now,
        };
        self.decide(read);
    }

    fn decide(&mut self, read: Read) {
        if let Decision::Serve(ticket) = self.state.read(read) {
            let found = None;
            self.readers.push(Reader {
                read,
                ticket,
                found,
            });
        }
    }

    fn read_bytes(&mut self, at: u64) {
        let count = self.readers.len().max(1) as u64;
        if let Some(reader) = self.readers.get_mut(index(at % count)) {
            reader.found = Some(self.bytes[index(reader.read.span.start())]);
        }
    }

    fn finish_read(&mut self, at: u64) {
        let count = self.readers.len().max(1) as u64;
        let at = index(at % count);
        if self
            .readers
            .get(at)
            .is_none_or(|reader| reader.found.is_none())
        {
            return;
        }
        let reader = self.readers.remove(at);
        if self.state.holds(self.mount, reader.ticket, self.number) {
            assert_eq!(reader.found, Some(true), "a hole was served");
            self.served += 1;
        } else {
            self.decide(reader.read);
        }
    }

    /// Takes the write lock, or leaves the layer alone.
    fn begin_eviction(&mut self, at: u64) {
        if self.locked || self.eviction.is_some() {
            return;
        }
        self.eviction = Some(Eviction {
            page: at,
            by_daemon: self.daemon && self.attached && at.is_multiple_of(2),
            advanced: false,
        });
    }

    fn go_on_evicting(&mut self) {
        match self.eviction.take() {
            Some(Eviction {
                advanced: false,
                page,
                by_daemon,
            }) => {
                self.number += 1;
                self.eviction = Some(Eviction {
                    advanced: true,
                    page,
                    by_daemon,
                });
            }
            Some(Eviction { page, .. }) => self.bytes[index(page)] = false,
            None => {}
        }
    }

    /// The daemon fills a page and grants it. It finds out what is there under the layer's
    /// lock, so not in the middle of an eviction.
    fn answer(&mut self) {
        if self.eviction.is_some() || !self.daemon {
            return;
        }
        if let Some(want) = self.asked.pop_front() {
            self.bytes[index(want.span.start())] = true;
            self.grants.push_back((want.want, self.number, want.span));
        }
    }

    fn grant_unasked(&mut self, at: u64) {
        let may = self.daemon && self.attached && self.eviction.is_none();
        if may && self.bytes[index(at)] {
            self.grants.push_back((0, self.number, page(at)));
        }
    }

    fn deliver(&mut self) {
        if let Some((want, number, span)) = self.grants.pop_front() {
            let granted = self.state.grant(self.mount, want, number, span);
            assert_eq!(granted.refused, None);
            granted.again.into_iter().for_each(|read| self.decide(read));
        }
    }

    /// The daemon dies, and what it was about with it; or only its connection does, and it
    /// evicts on.
    fn kill(&mut self) {
        let by_daemon = |eviction: &Eviction| eviction.by_daemon;
        if self.unique.is_multiple_of(2) && self.eviction.as_ref().is_some_and(by_daemon) {
            self.eviction = None;
        }
        self.daemon = false;
        self.attached = false;
        self.asked.clear();
        self.grants.clear();
        self.state.disconnected();
    }

    fn lock(&mut self) {
        if !self.state.to_lock().is_empty() && self.eviction.is_none() && !self.locked {
            self.locked = self.state.locked(self.mount, self.number);
        }
    }

    fn come_back(&mut self) {
        if !self.daemon {
            self.daemon = true;
        } else if !self.attached {
            assert!(self.state.attach(self.mount, self.number));
            self.attached = true;
            self.locked = false;
        }
    }

    /// With a daemon, and nobody who evicts, every read is answered.
    fn settle(&mut self) {
        self.eviction = None;
        while !self.attached {
            self.come_back();
        }
        for _ in 0..10_000 {
            self.take_wants();
            self.answer();
            self.deliver();
            self.read_bytes(0);
            self.finish_read(0);
        }
        assert!(self.readers.is_empty() && self.state.next_expiry().is_none());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn no_order_of_steps_serves_a_hole(steps in proptest::collection::vec((0..OPS, 0..PAGES), 0..300)) {
        let mut world = World::new();
        for (op, at) in steps {
            world.step(op, at);
        }
        world.settle();
    }
}

#[test]
fn the_model_serves_a_lot() {
    let mut world = World::new();
    let mut random = 1_u64;
    for _ in 0..200_000 {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let op = u8::try_from((random >> 33) % u64::from(OPS)).unwrap();
        world.step(op, (random >> 40) % PAGES);
    }
    assert!(world.served > 1000, "served {}", world.served);
    world.settle();
}
