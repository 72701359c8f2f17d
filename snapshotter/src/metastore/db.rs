//! Records in the database of facts.
//!
//! Invariant: one decision at a time. The database serialises processes, as it is open in
//! one of them only; a lock of ours serialises the threads of this one, and keeps the
//! database from being released to another process in the middle of a decision, provided
//! everyone releases it through [`DbMetastore::release`].

use std::sync::Arc;

use lazarette_fetcher::db::{Batch, Db, Table};
use parking_lot::Mutex;

use super::{Change, Decide, Metastore, Record, Records};
use crate::Result;

/// Snapshot records by key or name.
#[derive(Debug)]
pub struct SnapshotTable;

impl Table for SnapshotTable {
    const NAME: &'static str = "snapshots";
    type Key = String;
    type Value = Record;
}

/// A [`Metastore`] over a [`Db`] that was opened with the table [`SnapshotTable`].
pub struct DbMetastore {
    db: Arc<Db>,
    deciding: Mutex<()>,
}

impl DbMetastore {
    /// Keeps records in `db`.
    pub fn new(db: Arc<Db>) -> Self {
        let deciding = Mutex::new(());
        Self { db, deciding }
    }

    /// Lets other processes use the database, once no decision is being made.
    pub fn release(&self) {
        let _deciding = self.deciding.lock();
        self.db.release();
    }
}

/// The table while `deciding` is held.
struct View<'a>(&'a Db);

impl Records for View<'_> {
    fn get(&self, key: &str) -> Result<Option<Record>> {
        Ok(self.0.get::<SnapshotTable>(&key.to_owned())?)
    }

    fn all(&self) -> Result<Vec<Record>> {
        let mut all = Vec::new();
        for entry in self.0.scan::<SnapshotTable>(b"") {
            all.push(entry?.1);
        }
        Ok(all)
    }
}

impl Metastore for DbMetastore {
    fn read(&self, look: &mut dyn FnMut(&dyn Records) -> Result<()>) -> Result<()> {
        let _deciding = self.deciding.lock();
        look(&View(&self.db))
    }

    fn update(&self, decide: Decide<'_>) -> Result<()> {
        let _deciding = self.deciding.lock();
        let mut batch = Batch::new();
        for change in decide(&View(&self.db))? {
            match change {
                Change::Put(record) => {
                    batch.put::<SnapshotTable>(&record.key, &record)?;
                }
                Change::Delete(key) => {
                    batch.delete::<SnapshotTable>(&key);
                }
            }
        }
        Ok(self.db.commit(batch)?)
    }
}
