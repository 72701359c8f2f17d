//! Records of snapshots and the rules by which they change.
//!
//! Invariant: a decision reads the records it depends on and writes its outcome as one
//! atomic step ([`Metastore::update`]), so several processes may share one store. Names
//! and keys share one space: a committed snapshot's name and an active one's key are
//! never equal. The rules are pure functions in `plan`; nothing here touches snapshot
//! directories.

mod db;
pub mod filter;
mod memory;
mod plan;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use lazarette_fetcher::types::Digest;
use serde::{Deserialize, Serialize};

pub use db::{DbMetastore, SnapshotTable};
pub use memory::MemoryMetastore;
pub(crate) use plan::{
    Commit, Create, chain, commit, commit_layer, create, is_named, relabel, remove,
};

use crate::Result;

/// Longest key or name in bytes. Containerd's are under 200.
pub const KEY_LEN_MAX: usize = 1024;

/// Longest chain of parents, overlay's own limit of layers.
pub const CHAIN_MAX: usize = 500;

/// Longest key and value of one label together, bytes: containerd's own limit.
pub const LABEL_LEN_MAX: usize = 4096;

/// Most labels of one snapshot. Containerd sends under ten.
pub const LABELS_MAX: usize = 256;

/// Labels of a snapshot.
pub type Labels = BTreeMap<String, String>;

/// Which labels change. A label whose value becomes empty is gone, as containerd has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Relabel {
    /// These replace all.
    All(Labels),
    /// Only these change.
    Some(Labels),
}

/// State of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// Writable, to be committed or thrown away.
    Active,
    /// A read-only look at its parent.
    View,
    /// Finished; may be a parent.
    Committed,
}

/// Where the files of a snapshot are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// In the local directory with this number.
    Directory(u64),
    /// In the lazy layer with this blob digest.
    Layer(Digest),
}

/// Disk space of a snapshot, without its parents'.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes of allocated blocks.
    pub bytes: u64,
    /// Files, directories and everything else that has an inode.
    pub inodes: u64,
}

/// What is known about one snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its key while active, its name once committed.
    pub key: String,
    /// Its state.
    pub kind: Kind,
    /// The committed snapshot below it.
    pub parent: Option<String>,
    /// Where its files are.
    pub content: Content,
    /// Its labels.
    pub labels: Labels,
    /// Seconds since 1970 when it was made.
    pub created: i64,
    /// Seconds since 1970 when it last changed.
    pub updated: i64,
    /// Its disk space, known once it is committed.
    pub usage: Option<Usage>,
}

/// One part of a decision's outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Stores a record under its key, over any that was there.
    Put(Record),
    /// Forgets the record with this key.
    Delete(String),
}

/// Records as one decision sees them: nobody else changes them meanwhile.
pub trait Records {
    /// The record with this key or name.
    fn get(&self, key: &str) -> Result<Option<Record>>;

    /// All records, by key in byte order.
    fn all(&self) -> Result<Vec<Record>>;

    /// The first record, by key, that is `wanted`. Takes as long as looking at all.
    fn find(&self, wanted: &dyn Fn(&Record) -> bool) -> Result<Option<Record>>;
}

/// What [`Metastore::update`] calls to decide.
pub type Decide<'a> = &'a mut dyn FnMut(&dyn Records) -> Result<Vec<Change>>;

/// A durable map from key to [`Record`].
///
/// Both calls block on local disk. An implementer must make `update` serialisable with
/// every other `update` on the same store, in this process and in others, and must store
/// all changes of one decision or none, durably before it returns.
pub trait Metastore: Send + Sync {
    /// Reads without changing anything.
    fn read(&self, look: &mut dyn FnMut(&dyn Records) -> Result<()>) -> Result<()>;

    /// Lets `decide` look at the records, then stores what it returns. Stores nothing when
    /// it fails; its error is returned as it is.
    fn update(&self, decide: Decide<'_>) -> Result<()>;
}

/// What the outcome of a decision makes of records in memory.
fn apply(records: &mut BTreeMap<String, Record>, changes: Vec<Change>) {
    for change in changes {
        match change {
            Change::Put(record) => {
                records.insert(record.key.clone(), record);
            }
            Change::Delete(key) => {
                records.remove(&key);
            }
        }
    }
}
