//! Typed column families over RocksDB.
