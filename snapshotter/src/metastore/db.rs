//! Records in the database of facts.
//!
//! Invariant: one decision at a time. The database serialises processes, as it is open in
//! one of them only; a lock of ours serialises the threads of this one, and keeps the
//! database from being released to another process in the middle of a decision, provided
//! everyone releases it through [`DbMetastore::release`].
//!
//! From the first look at all records until the release, this process knows them by heart:
//! nobody else can change them meanwhile. So thousands are listed without decoding them
//! again, and removing one does not read all others from the disk. What cannot be stored
//! makes it forget.

use std::cell::RefCell;
use std::collections::BTreeMap;
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

/// All records, once they have been looked at.
type Known = Option<BTreeMap<String, Record>>;

/// A [`Metastore`] over a [`Db`] that was opened with the table [`SnapshotTable`].
pub struct DbMetastore {
    db: Arc<Db>,
    /// Held while a decision is made.
    known: Mutex<Known>,
}

impl DbMetastore {
    /// Keeps records in `db`.
    pub fn new(db: Arc<Db>) -> Self {
        let known = Mutex::default();
        Self { db, known }
    }

    /// Lets other processes use the database, once no decision is being made.
    pub fn release(&self) {
        let mut known = self.known.lock();
        *known = None;
        self.db.release();
    }
}

/// The table while a decision is made.
struct View<'a> {
    db: &'a Db,
    known: RefCell<&'a mut Known>,
}

impl View<'_> {
    /// Looks at all records, which are read if they are not known.
    fn look<T>(&self, look: impl FnOnce(&BTreeMap<String, Record>) -> T) -> Result<T> {
        let mut known = self.known.borrow_mut();
        if let Some(records) = &**known {
            return Ok(look(records));
        }
        let entries = self.db.scan::<SnapshotTable>(b"");
        let records = entries.collect::<lazarette_fetcher::Result<_>>()?;
        Ok(look(known.insert(records)))
    }
}

impl Records for View<'_> {
    fn get(&self, key: &str) -> Result<Option<Record>> {
        if let Some(records) = &**self.known.borrow() {
            return Ok(records.get(key).cloned());
        }
        Ok(self.db.get::<SnapshotTable>(&key.to_owned())?)
    }

    fn all(&self) -> Result<Vec<Record>> {
        self.look(|records| records.values().cloned().collect())
    }

    fn find(&self, wanted: &dyn Fn(&Record) -> bool) -> Result<Option<Record>> {
        self.look(|records| records.values().find(|record| wanted(record)).cloned())
    }
}

impl Metastore for DbMetastore {
    fn read(&self, look: &mut dyn FnMut(&dyn Records) -> Result<()>) -> Result<()> {
        let mut known = self.known.lock();
        look(&View {
            db: &self.db,
            known: RefCell::new(&mut known),
        })
    }

    fn update(&self, decide: Decide<'_>) -> Result<()> {
        let mut known = self.known.lock();
        let changes = decide(&View {
            db: &self.db,
            known: RefCell::new(&mut known),
        })?;
        // Back only if the database has it.
        let before = known.take();
        let mut batch = Batch::new();
        for change in &changes {
            match change {
                Change::Put(record) => {
                    batch.put::<SnapshotTable>(&record.key, record)?;
                }
                Change::Delete(key) => {
                    batch.delete::<SnapshotTable>(key);
                }
            }
        }
        self.db.commit(batch)?;
        *known = before.map(|mut records| {
            super::apply(&mut records, changes);
            records
        });
        Ok(())
    }
}
