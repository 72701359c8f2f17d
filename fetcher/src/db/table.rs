//! Keys, values and batches: typed outside, bytes inside.
//!
//! Invariant: encoding a key keeps order where the key type has one, and decoding never
//! panics. Knows nothing of RocksDB.

use std::collections::VecDeque;
use std::marker::PhantomData;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Db;
use crate::types::Digest;
use crate::{Error, Result};

const VALUE_VERSION: u8 = 1;
/// Entries read at a time by a scan: a bound on memory, not on the scan.
const PAGE_ENTRIES: usize = 256;

/// Raw entries in key order.
pub(super) type Page = Vec<(Vec<u8>, Vec<u8>)>;

/// A kind of fact.
pub trait Table {
    /// Name of the column family. Never changes once released.
    const NAME: &'static str;
    /// What a fact is found by.
    type Key: Key;
    /// The fact. Fields may be added (with `#[serde(default)]`), never reused.
    type Value: Serialize + DeserializeOwned;
}

/// Something that becomes the bytes of a key and back.
pub trait Key: Sized {
    /// Appends the bytes.
    fn encode(&self, out: &mut Vec<u8>);
    /// The reverse; `None` if `bytes` is not what `encode` writes.
    fn decode(bytes: &[u8]) -> Option<Self>;
}

impl Key for String {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.as_bytes());
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        std::str::from_utf8(bytes).ok().map(str::to_owned)
    }
}

impl Key for u64 {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.to_be_bytes());
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self::from_be_bytes)
    }
}

impl Key for Digest {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.to_string().as_bytes());
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        Self::parse(std::str::from_utf8(bytes).ok()?).ok()
    }
}

pub(super) fn key_bytes(key: &impl Key) -> Vec<u8> {
    let mut out = Vec::new();
    key.encode(&mut out);
    out
}

fn encode_value<T: Table>(value: &T::Value) -> Result<Vec<u8>> {
    let mut out = vec![VALUE_VERSION];
    serde_json::to_writer(&mut out, value)
        .map_err(|e| Error::malformed(format!("value for table {}", T::NAME), e.to_string()))?;
    Ok(out)
}

pub(super) fn decode_value<T: Table>(key: &T::Key, bytes: &[u8]) -> Result<T::Value> {
    decode_raw::<T>(&key_bytes(key), bytes)
}

fn decode_raw<T: Table>(key: &[u8], bytes: &[u8]) -> Result<T::Value> {
    let bad = |detail: String| {
        let key = key.escape_ascii().to_string();
        Error::malformed(format!("entry {key:?} of table {}", T::NAME), detail)
    };
    match bytes.split_first() {
        Some((&VALUE_VERSION, json)) => {
            serde_json::from_slice(json).map_err(|e| bad(e.to_string()))
        }
        Some((version, _)) => Err(bad(format!(
            "version {version} is not known to this build; use a newer one"
        ))),
        None => Err(bad("it is empty".to_owned())),
    }
}

/// One change of a batch.
pub(super) struct Op {
    pub(super) table: &'static str,
    pub(super) key: Vec<u8>,
    /// `None` deletes.
    pub(super) value: Option<Vec<u8>>,
}

/// Changes to any tables that happen together or not at all.
#[derive(Default)]
#[must_use = "a batch does nothing until it is committed"]
pub struct Batch {
    ops: Vec<Op>,
}

impl Batch {
    /// No changes yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the value of `key`.
    pub fn put<T: Table>(&mut self, key: &T::Key, value: &T::Value) -> Result<&mut Self> {
        let value = Some(encode_value::<T>(value)?);
        self.ops.push(Op {
            table: T::NAME,
            key: key_bytes(key),
            value,
        });
        Ok(self)
    }

    /// Removes `key` if it is there.
    pub fn delete<T: Table>(&mut self, key: &T::Key) -> &mut Self {
        self.ops.push(Op {
            table: T::NAME,
            key: key_bytes(key),
            value: None,
        });
        self
    }

    /// Whether there are no changes.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    pub(super) fn into_ops(self) -> Vec<Op> {
        self.ops
    }
}

/// Entries of a table in key order. Ends after the first error.
pub struct Scan<'a, T> {
    db: &'a Db,
    prefix: Vec<u8>,
    /// Where the next page starts; `None` after the last one.
    next: Option<Vec<u8>>,
    page: VecDeque<(Vec<u8>, Vec<u8>)>,
    table: PhantomData<fn() -> T>,
}

impl<'a, T: Table> Scan<'a, T> {
    pub(super) fn new(db: &'a Db, prefix: &[u8]) -> Self {
        Self {
            db,
            prefix: prefix.to_vec(),
            next: Some(prefix.to_vec()),
            page: VecDeque::new(),
            table: PhantomData,
        }
    }

    fn load(&mut self, from: &[u8]) -> Result<()> {
        let page = self.db.page(T::NAME, from, &self.prefix, PAGE_ENTRIES)?;
        if page.len() == PAGE_ENTRIES {
            // The smallest key after `last` is `last` with a zero byte.
            self.next = page
                .last()
                .map(|(last, _)| [last.as_slice(), &[0]].concat());
        }
        self.page = page.into();
        Ok(())
    }

    fn decode(&self, key: &[u8], value: &[u8]) -> Result<(T::Key, T::Value)> {
        let decoded = T::Key::decode(key).ok_or_else(|| {
            let key = key.escape_ascii();
            self.db
                .error(format!("table {} has a malformed key \"{key}\"", T::NAME))
        })?;
        Ok((decoded, decode_raw::<T>(key, value)?))
    }
}

impl<T: Table> Iterator for Scan<'_, T> {
    type Item = Result<(T::Key, T::Value)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.page.is_empty() {
            let from = self.next.take()?;
            if let Err(error) = self.load(&from) {
                return Some(Err(error));
            }
        }
        let (key, value) = self.page.pop_front()?;
        let entry = self.decode(&key, &value);
        if entry.is_err() {
            self.page.clear();
            self.next = None;
        }
        Some(entry)
    }
}
