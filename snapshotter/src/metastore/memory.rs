//! Records in memory, for tests and for a store that need not survive.
//!
//! Invariant: the same as every [`Metastore`]'s, within one process.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use super::{Decide, Metastore, Record, Records};
use crate::Result;

/// A [`Metastore`] that is gone when it is dropped.
#[derive(Debug, Default)]
pub struct MemoryMetastore {
    records: Mutex<BTreeMap<String, Record>>,
}

impl Records for BTreeMap<String, Record> {
    fn get(&self, key: &str) -> Result<Option<Record>> {
        Ok(Self::get(self, key).cloned())
    }

    fn all(&self) -> Result<Vec<Record>> {
        Ok(self.values().cloned().collect())
    }

    fn find(&self, wanted: &dyn Fn(&Record) -> bool) -> Result<Option<Record>> {
        Ok(self.values().find(|record| wanted(record)).cloned())
    }
}

impl Metastore for MemoryMetastore {
    fn read(&self, look: &mut dyn FnMut(&dyn Records) -> Result<()>) -> Result<()> {
        look(&*self.records.lock())
    }

    fn update(&self, decide: Decide<'_>) -> Result<()> {
        let mut records = self.records.lock();
        let changes = decide(&*records)?;
        super::apply(&mut records, changes);
        Ok(())
    }
}
