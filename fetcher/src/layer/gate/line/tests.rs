//! The rules of the gate, by random operations against what they promise.

use proptest::prelude::*;

use super::*;

const MEMORY: u64 = 1000;

fn config() -> EngineConfig {
    EngineConfig {
        on_demand_max: 2,
        profile_max: 3,
        background_max: 2,
        memory_bytes_max: MEMORY,
        ..EngineConfig::default()
    }
}

fn ask(class: Priority, host: &str, bytes: u64) -> Ask {
    Ask {
        class,
        host: host.into(),
        bytes,
    }
}

/// Who goes, in order, until nobody may.
fn go(lines: &mut Lines<()>) -> Vec<Ticket> {
    std::iter::from_fn(|| lines.next().map(|(ticket, ())| ticket)).collect()
}

fn waiting(asks: &[(Ticket, Ask)]) -> Lines<()> {
    let mut lines = Lines::new(config());
    for (ticket, ask) in asks {
        lines.push(*ticket, ask.clone(), ());
    }
    lines
}

#[test]
fn background_goes_last_and_only_while_nobody_else_does() {
    use Priority::{Background, OnDemand, Profile};
    let mut lines = waiting(&[
        (1, ask(Background, "a", 1)),
        (2, ask(Profile, "a", 1)),
        (3, ask(OnDemand, "a", 1)),
        (4, ask(OnDemand, "a", 1)),
        (5, ask(OnDemand, "a", 1)),
    ]);
    assert_eq!(go(&mut lines), [3, 4], "two slots, and nobody overtakes");
    assert_eq!(lines.ahead(), Ahead::Somebody);
    lines.end(3);
    assert_eq!(go(&mut lines), [5, 2], "profile beside readers");
    lines.end(4);
    lines.end(5);
    assert_eq!(go(&mut lines), [0; 0], "but not background");
    lines.end(2);
    assert_eq!(lines.ahead(), Ahead::Nobody);
    assert_eq!(go(&mut lines), [1]);
    lines.push(6, ask(OnDemand, "a", 1), ());
    assert_eq!(go(&mut lines), [6], "it waits for no background");
    assert_eq!(lines.ahead(), Ahead::Somebody);
}

#[test]
fn a_busy_host_holds_up_only_itself() {
    use Priority::{Background, OnDemand, Profile};
    let mut lines = waiting(&[
        (1, ask(OnDemand, "a", 1)),
        (2, ask(OnDemand, "a", 1)),
        (3, ask(OnDemand, "a", 1)),
        (4, ask(OnDemand, "b", 1)),
        (5, ask(Profile, "a", 1)),
        (6, ask(Profile, "b", 1)),
        (7, ask(Background, "b", 1)),
    ]);
    assert_eq!(go(&mut lines), [1, 2, 4, 6], "5 waits for reader 3");
    for ticket in [4, 6] {
        lines.end(ticket);
    }
    assert_eq!(go(&mut lines), [0; 0], "background waits for all");
    lines.end(1);
    assert_eq!(go(&mut lines), [3, 5]);
}

#[test]
fn memory_is_given_in_order_and_a_part_is_left_to_readers() {
    use Priority::{Background, OnDemand, Profile};
    let mut lines = waiting(&[(1, ask(Background, "a", 500)), (2, ask(Background, "a", 1))]);
    assert_eq!(go(&mut lines), [1], "half of it");
    lines.push(3, ask(Profile, "a", 300), ());
    assert_eq!(lines.ahead(), Ahead::Starved);
    assert_eq!(go(&mut lines), [0; 0], "three quarters of it");
    lines.push(4, ask(OnDemand, "a", 500), ());
    lines.push(5, ask(OnDemand, "a", 1), ());
    assert_eq!(go(&mut lines), [4], "all of it");
    assert_eq!(lines.ahead(), Ahead::Starved);
    lines.grow(4, 100);
    lines.end(1);
    assert_eq!(lines.memory(), 600);
    assert_eq!(go(&mut lines), [5]);
    for ticket in [4, 5] {
        lines.end(ticket);
    }
    lines.push(6, ask(Background, "a", MEMORY), ());
    assert_eq!(go(&mut lines), [3]);
    lines.end(3);
    assert_eq!(go(&mut lines), [2]);
    lines.end(2);
    assert_eq!(go(&mut lines), [6], "alone it may have everything");
}

#[test]
fn promotion_moves_those_who_wait_and_recounts_those_under_way() {
    use Priority::{Background, OnDemand};
    let mut lines = waiting(&[
        (1, ask(Background, "a", 1)),
        (2, ask(OnDemand, "a", 1)),
        (3, ask(OnDemand, "a", 1)),
        (4, ask(OnDemand, "a", 1)),
    ]);
    lines.promote(1, OnDemand);
    assert_eq!(go(&mut lines), [1, 2], "it came first");
    lines.promote(1, Background);
    assert_eq!(lines.class(1), Some(OnDemand), "never less urgent");
    for ticket in [1, 2, 2] {
        lines.end(ticket);
    }
    assert_eq!(go(&mut lines), [3, 4]);
    for ticket in [3, 4] {
        lines.end(ticket);
    }
    lines.push(5, ask(Background, "a", 1), ());
    assert_eq!(go(&mut lines), [5]);
    lines.promote(5, OnDemand);
    lines.push(6, ask(Background, "b", 1), ());
    assert_eq!(go(&mut lines), [0; 0], "a reader's is under way now");
    lines.end(5);
    assert_eq!(go(&mut lines), [6]);
    assert!(lines.hosts.contains_key("b") && !lines.hosts.contains_key("a"));
}

#[derive(Debug, Clone)]
enum Step {
    Push(u8, u8, u64),
    /// These take one of those under way or waiting, by number.
    End(usize),
    Leave(usize),
    Promote(usize, u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..3_u8, 0..3_u8, 0..=MEMORY).prop_map(|(c, h, b)| Step::Push(c, h, b)),
        3 => any::<usize>().prop_map(Step::End),
        1 => any::<usize>().prop_map(Step::Leave),
        1 => (any::<usize>(), 0..3_u8).prop_map(|(n, class)| Step::Promote(n, class)),
    ]
}

/// What the test knows of every request.
#[derive(Default)]
struct Model {
    waiting: BTreeMap<Ticket, Ask>,
    running: BTreeMap<Ticket, Ask>,
    is_promoted: bool,
}

impl Model {
    fn pick(map: &BTreeMap<Ticket, Ask>, n: usize) -> Option<Ticket> {
        map.keys().nth(n.checked_rem(map.len())?).copied()
    }

    /// Checks one that goes now against those that stay and those that went before.
    fn goes(&mut self, ticket: Ticket) {
        let ask = self.waiting.remove(&ticket).expect("it waited");
        let is_alone = ask.class == Priority::Background;
        let mut stays = self.waiting.values();
        let held = stays.any(|stay| stay.class < ask.class && (is_alone || stay.host == ask.host));
        assert!(!held, "less urgent");
        let overtaken = self.waiting.iter().filter(|(other, stay)| {
            **other < ticket && stay.class == ask.class && stay.host == ask.host
        });
        assert_eq!(overtaken.count(), 0, "first come, first served");
        let urgent = |ask: &&Ask| ask.class < Priority::Background;
        let mut running = self.running.values();
        assert!(ask.class < Priority::Background || !running.any(|ask| urgent(&ask)));
        self.running.insert(ticket, ask);
        let memory: u64 = self.running.values().map(|ask| ask.bytes).sum();
        assert!(memory <= MEMORY, "{memory}");
        if !self.is_promoted {
            self.check_slots();
        }
    }

    fn check_slots(&self) {
        for host in ["0", "1", "2"] {
            let of = |class| {
                let same = |ask: &&Ask| &*ask.host == host && ask.class == class;
                self.running.values().filter(same).count()
            };
            assert!(of(Priority::OnDemand) <= 2 && of(Priority::Background) <= 2);
            assert!(of(Priority::Profile) <= 3);
        }
    }
}

proptest! {
    #[test]
    fn rules_hold_and_everybody_gets_a_turn(steps in prop::collection::vec(step(), 1..120)) {
        let mut lines = Lines::new(config());
        let mut model = Model::default();
        let classes = Priority::ALL;
        for (ticket, step) in (1..).zip(steps) {
            match step {
                Step::Push(class, host, bytes) => {
                    let ask = ask(classes[class as usize], &host.to_string(), bytes);
                    lines.push(ticket, ask.clone(), ());
                    model.waiting.insert(ticket, ask);
                }
                Step::End(n) => {
                    if let Some(ticket) = Model::pick(&model.running, n) {
                        lines.end(ticket);
                        model.running.remove(&ticket);
                    }
                }
                Step::Leave(n) => {
                    if let Some(ticket) = Model::pick(&model.waiting, n) {
                        lines.leave(ticket);
                        model.waiting.remove(&ticket);
                    }
                }
                Step::Promote(n, class) => {
                    let to = classes[class as usize];
                    model.is_promoted = true;
                    let all = model.waiting.iter_mut().chain(&mut model.running);
                    if let Some((ticket, ask)) = all.take(n % 50 + 1).last() {
                        lines.promote(*ticket, to);
                        ask.class = ask.class.min(to);
                    }
                }
            }
            for ticket in go(&mut lines) {
                model.goes(ticket);
            }
            let memory: u64 = model.running.values().map(|ask| ask.bytes).sum();
            prop_assert_eq!(lines.memory(), memory);
        }
        // Whatever waits goes once the others have ended.
        while let Some(ticket) = Model::pick(&model.running, 0) {
            lines.end(ticket);
            model.running.remove(&ticket);
            for ticket in go(&mut lines) {
                model.goes(ticket);
            }
        }
        prop_assert!(model.waiting.is_empty());
        prop_assert!(lines.hosts.is_empty() && lines.memory() == 0);
    }
}
