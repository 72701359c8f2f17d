//! One computation per key however many ask at once, and its value kept while fresh.
//!
//! Invariant: for one key at most one `init` runs at a time; when it fails or its caller
//! is dropped, the next waiter takes over. Bounded: a full table is emptied, since every
//! value can be had again. The lock is never held across an await.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::OnceCell;

/// A bounded table of values that are expensive to obtain.
pub(crate) struct SingleFlight<K, V> {
    cells: Mutex<HashMap<K, Arc<OnceCell<V>>>>,
    entries_max: usize,
}

impl<K: Eq + Hash, V: Clone> SingleFlight<K, V> {
    /// An empty table of at most `entries_max` values.
    pub(crate) fn new(entries_max: usize) -> Self {
        Self {
            cells: Mutex::new(HashMap::new()),
            entries_max,
        }
    }

    /// The value of `key`: the kept one while `fresh`, else what `init` yields.
    pub(crate) async fn get<E, F: Future<Output = Result<V, E>>>(
        &self,
        key: K,
        fresh: impl Fn(&V) -> bool,
        init: impl FnOnce() -> F,
    ) -> Result<V, E> {
        let cell = self.cell(key, fresh);
        cell.get_or_try_init(init).await.cloned()
    }

    /// The kept value, fresh or not, without computing one.
    pub(crate) fn peek(&self, key: &K) -> Option<V> {
        self.cells.lock().get(key)?.get().cloned()
    }

    /// Keeps a value that was had without this table, in place of what is there. Who is
    /// computing one goes on, for those who wait for it.
    pub(crate) fn keep(&self, key: K, value: V) {
        let mut cells = self.cells.lock();
        self.make_room(&mut cells, &key);
        cells.insert(key, Arc::new(OnceCell::new_with(Some(value))));
    }

    /// Drops the value of `key` if it is the one that failed; a newer one stays.
    pub(crate) fn forget(&self, key: &K, failed: impl Fn(&V) -> bool) {
        let mut cells = self.cells.lock();
        if cells
            .get(key)
            .and_then(|cell| cell.get())
            .is_some_and(failed)
        {
            cells.remove(key);
        }
    }

    fn cell(&self, key: K, fresh: impl Fn(&V) -> bool) -> Arc<OnceCell<V>> {
        let mut cells = self.cells.lock();
        self.make_room(&mut cells, &key);
        let cell = cells.entry(key).or_default();
        if cell.get().is_some_and(|value| !fresh(value)) {
            *cell = Arc::default();
        }
        cell.clone()
    }

    fn make_room(&self, cells: &mut HashMap<K, Arc<OnceCell<V>>>, key: &K) {
        if cells.len() >= self.entries_max && !cells.contains_key(key) {
            cells.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use futures_util::future::join_all;

    use super::*;

    #[tokio::test]
    async fn many_waiters_one_computation() {
        let table = SingleFlight::new(4);
        let runs = AtomicU32::new(0);
        let got = join_all((0..50).map(|_| {
            table.get(
                "k",
                |_| true,
                || async {
                    tokio::task::yield_now().await;
                    Ok::<_, ()>(runs.fetch_add(1, Ordering::Relaxed))
                },
            )
        }))
        .await;
        assert!(got.into_iter().all(|value| value == Ok(0)));
        assert_eq!(runs.into_inner(), 1);
    }

    #[tokio::test]
    async fn a_failure_or_a_dropped_caller_hands_over() {
        let table = SingleFlight::new(4);
        assert_eq!(
            table
                .get(1, |_| true, || async { Err::<u8, _>("no") })
                .await,
            Err("no")
        );
        let never = table.get(1, |_| true, std::future::pending::<Result<u8, &str>>);
        drop(tokio::time::timeout(std::time::Duration::ZERO, never).await);
        assert_eq!(
            table.get(1, |_| true, || async { Ok::<_, &str>(7) }).await,
            Ok(7)
        );
        table.forget(&1, |value| *value == 8);
        assert_eq!(table.peek(&1), Some(7));
        assert_eq!(
            table.get(1, |_| false, || async { Ok::<_, &str>(8) }).await,
            Ok(8)
        );
    }

    #[tokio::test]
    async fn what_is_kept_replaces_what_was_there() {
        let table = SingleFlight::new(4);
        let slow = table.get(
            1,
            |_| true,
            || async {
                table.keep(1, 7);
                tokio::task::yield_now().await;
                Ok::<_, &str>(6)
            },
        );
        assert_eq!(slow.await, Ok(6));
        assert_eq!(table.peek(&1), Some(7), "kept meanwhile");
        table.keep(1, 8);
        assert_eq!(table.peek(&1), Some(8));
        let got = table.get(1, |_| true, || async { Err::<u8, _>("not asked") });
        assert_eq!(got.await, Ok(8));
    }

    #[tokio::test]
    async fn stays_within_its_bound() {
        let table = SingleFlight::new(2);
        for key in 0..9 {
            table.keep(key + 10, 0);
            table
                .get(key, |_| true, || async { Ok::<_, ()>(key) })
                .await
                .unwrap();
            assert!(table.cells.lock().len() <= 2);
        }
    }
}
