//! Who may send a request now.
//!
//! Invariant: what a profile expects goes only while no reader waits for leave; background
//! work goes only while nobody else's request is under way or waits, one request at a time;
//! so a reader's request never waits for more than one of its
//! requests, and only if memory is short. Within a class it is first come, first served: a
//! request that needs much memory is not overtaken forever. Memory counted never exceeds
//! the budget when a request begins; [`Pass::grow`] may exceed it, and then nothing begins
//! until it is back. Never does I/O, never knows chunks.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::Priority;

/// The gate of one layer.
pub(super) struct Gate {
    /// Requests under way at once, background ones aside.
    requests_max: u32,
    /// Bytes.
    memory_max: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    on_demand: Line,
    profile: Line,
    background: Line,
    memory: u64,
}

/// Those under way and those waiting of one class.
#[derive(Default)]
struct Line {
    running: u32,
    waiting: VecDeque<Waiter>,
}

struct Waiter {
    bytes: u64,
    tell: oneshot::Sender<Pass>,
}

/// Leave to send one request. Dropped, the next one goes.
pub(super) struct Pass {
    /// Taken when it is given back.
    gate: Option<Arc<Gate>>,
    class: Priority,
    bytes: u64,
}

impl Gate {
    pub(super) fn new(requests_max: u32, memory_max: u64) -> Arc<Self> {
        Arc::new(Self {
            requests_max: requests_max.max(1),
            memory_max,
            state: Mutex::default(),
        })
    }

    /// Waits for leave to send a request that holds `bytes`; more than the budget counts
    /// as all of it, so callers refuse such requests first. `None` is never the answer
    /// while the gate exists. Dropping the future leaves the line.
    pub(super) async fn enter(self: &Arc<Self>, class: Priority, bytes: u64) -> Option<Pass> {
        let (tell, told) = oneshot::channel();
        let bytes = bytes.min(self.memory_max);
        let waiter = Waiter { bytes, tell };
        self.state.lock().line(class).waiting.push_back(waiter);
        self.admit();
        told.await.ok()
    }

    /// Lets go whoever may.
    fn admit(self: &Arc<Self>) {
        loop {
            let next = self.state.lock().next(self.requests_max, self.memory_max);
            let Some((class, waiter)) = next else {
                return;
            };
            let pass = Pass {
                gate: Some(Arc::clone(self)),
                class,
                bytes: waiter.bytes,
            };
            // Who went away meanwhile leaves its place to the next round of this loop.
            if let Err(mut unused) = waiter.tell.send(pass) {
                unused.gate = None;
                self.state.lock().release(class, unused.bytes);
            }
        }
    }

    /// Bytes that requests under way hold.
    #[cfg(test)]
    pub(super) fn memory(&self) -> u64 {
        self.state.lock().memory
    }
}

impl State {
    fn line(&mut self, class: Priority) -> &mut Line {
        match class {
            Priority::OnDemand => &mut self.on_demand,
            Priority::Profile => &mut self.profile,
            Priority::Background => &mut self.background,
        }
    }

    /// Takes out of its line who may go now, and counts it as under way.
    fn next(&mut self, requests_max: u32, memory_max: u64) -> Option<(Priority, Waiter)> {
        let ahead = self.on_demand.running + self.profile.running;
        let lines = [
            (
                Priority::OnDemand,
                self.on_demand.first(),
                self.on_demand.running < requests_max,
            ),
            (
                Priority::Profile,
                self.profile.first(),
                ahead < requests_max,
            ),
            (
                Priority::Background,
                self.background.first(),
                ahead + self.background.running == 0,
            ),
        ];
        let first = lines
            .into_iter()
            .find_map(|(class, bytes, may)| Some((class, bytes?, may)));
        let (class, bytes, may) = first?;
        if !may || self.memory.saturating_add(bytes) > memory_max {
            return None;
        }
        let line = self.line(class);
        let waiter = line.waiting.pop_front()?;
        line.running += 1;
        self.memory = self.memory.saturating_add(bytes);
        Some((class, waiter))
    }

    fn release(&mut self, class: Priority, bytes: u64) {
        self.memory = self.memory.saturating_sub(bytes);
        let line = self.line(class);
        line.running = line.running.saturating_sub(1);
    }
}

impl Line {
    /// Bytes that the first who still waits needs.
    fn first(&mut self) -> Option<u64> {
        while self.waiting.front()?.tell.is_closed() {
            self.waiting.pop_front();
        }
        self.waiting.front().map(|waiter| waiter.bytes)
    }
}

impl Pass {
    /// Counts `bytes` more that this request turned out to hold.
    pub(super) fn grow(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        if let Some(gate) = &self.gate {
            let mut state = gate.state.lock();
            state.memory = state.memory.saturating_add(bytes);
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if let Some(gate) = self.gate.take() {
            gate.state.lock().release(self.class, self.bytes);
            gate.admit();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use futures_util::{FutureExt as _, poll};

    use super::*;

    type Entering = Pin<Box<dyn Future<Output = Option<Pass>>>>;

    fn enter(gate: &Arc<Gate>, class: Priority, bytes: u64) -> Entering {
        let gate = Arc::clone(gate);
        Box::pin(async move { gate.enter(class, bytes).await })
    }

    async fn goes(entering: &mut Entering) -> Option<Pass> {
        match poll!(entering) {
            std::task::Poll::Ready(pass) => pass,
            std::task::Poll::Pending => None,
        }
    }

    #[tokio::test]
    async fn background_goes_alone_and_after_every_reader() {
        let gate = Gate::new(2, 100);
        let background = enter(&gate, Priority::Background, 10).await.unwrap();
        let mut second = enter(&gate, Priority::Background, 10);
        assert!(goes(&mut second).await.is_none(), "one at a time");
        // It is under way, and a reader goes at once beside it.
        let mut readers: Vec<Entering> = (0..3)
            .map(|_| enter(&gate, Priority::OnDemand, 10))
            .collect();
        let first = goes(&mut readers[0]).await.unwrap();
        let other = goes(&mut readers[1]).await.unwrap();
        assert!(
            goes(&mut readers[2]).await.is_none(),
            "two requests at once"
        );
        drop(background);
        assert!(goes(&mut second).await.is_none(), "readers are under way");
        drop(first);
        let third = goes(&mut readers[2]).await.unwrap();
        drop(other);
        assert!(goes(&mut second).await.is_none());
        drop(third);
        drop(goes(&mut second).await.unwrap());
        assert_eq!(gate.memory(), 0);
    }

    #[tokio::test]
    async fn memory_is_shared_out_in_order() {
        let gate = Gate::new(10, 100);
        let mut small = enter(&gate, Priority::OnDemand, 60).await.unwrap();
        let mut large = enter(&gate, Priority::OnDemand, 500);
        let mut late = enter(&gate, Priority::OnDemand, 10);
        assert!(goes(&mut large).await.is_none());
        assert!(goes(&mut late).await.is_none(), "nobody overtakes");
        small.grow(70);
        assert_eq!(gate.memory(), 130);
        drop(small);
        let large = goes(&mut large).await.unwrap();
        assert_eq!(gate.memory(), 100, "more than all is all");
        drop(large);
        drop(goes(&mut late).await.unwrap());
        assert_eq!(gate.memory(), 0);
    }

    #[tokio::test]
    async fn who_goes_away_leaves_its_place() {
        let gate = Gate::new(1, 100);
        let running = enter(&gate, Priority::OnDemand, 10).await.unwrap();
        let mut gone = enter(&gate, Priority::OnDemand, 100);
        let mut told = enter(&gate, Priority::OnDemand, 10);
        let mut last = enter(&gate, Priority::Background, 10);
        for waiting in [&mut gone, &mut told, &mut last] {
            assert!(waiting.now_or_never().is_none());
        }
        drop(gone);
        // `told` gets its pass but is dropped before it looks.
        drop(running);
        assert_eq!(gate.memory(), 10);
        drop(told);
        drop(goes(&mut last).await.unwrap());
        assert_eq!(gate.memory(), 0);
    }
}
