//! An open RocksDB and the lock that says so to other processes.
//!
//! Invariant: RocksDB is open only while this process holds `<path>.lock`, and is closed
//! before the lock goes. One that was opened to be read can be followed by one that writes
//! without the lock going in between. The only file of the project that names RocksDB's types.
//!
//! Opening it to write syncs four files before the first fact can be read; opening it to be
//! read writes nothing.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType,
    Direction, InfoLogger, IteratorMode, LogLevel, Options, WriteBatch, WriteOptions,
};

use super::table::{Op, Page};
use crate::lock::{LockFile, lock_within};
use crate::{Error, Result};

const MIB: usize = 1 << 20;

/// What a database is open for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// What was committed before it was opened can be read.
    Read,
    /// And more can be committed.
    Write,
}

/// The lock of a directory, held until the last who has it is gone.
#[derive(Debug, Clone)]
pub(super) struct Lock(#[expect(dead_code, reason = "held, not looked at")] Arc<LockFile>);

impl Lock {
    /// Waits for the lock of the database in `path`, whose directory is made if absent.
    pub(super) fn take(path: &Path, wait: Duration) -> Result<Self> {
        std::fs::create_dir_all(path).map_err(|e| Error::io("create", path, e))?;
        Ok(Self(Arc::new(take_lock(path, wait)?)))
    }
}

/// Fields drop in order: the database closes, then the lock goes.
pub(super) struct Handle {
    db: DB,
    path: PathBuf,
    access: Access,
    lock: Lock,
}

impl Handle {
    /// Opens the database to be read; `None` where that does not work, for it is not there
    /// yet, lacks a column family, or is damaged: opening it to write mends that or says why.
    pub(super) fn read(path: &Path, families: &[String], lock: &Lock) -> Option<Self> {
        let cache = Cache::new_lru_cache(8 * MIB);
        let mut options = options(&cache);
        options.create_if_missing(false);
        options.create_missing_column_families(false);
        // Else each who only reads leaves a log file behind.
        options.set_info_logger(InfoLogger::new_callback_logger(LogLevel::Warn, log));
        let known = existing(path, &options).ok()?;
        if !families.iter().all(|name| known.contains(name)) {
            return None;
        }
        let described = described(known, &cache);
        let opened = DB::open_cf_descriptors_read_only(&options, path, described, false);
        let db = opened
            .inspect_err(|error| tracing::debug!(path = %path.display(), %error, "database cannot be opened to be read only"))
            .ok()?;
        Some(Self::of(db, path, Access::Read, lock))
    }

    /// Opens the database, made if absent, with at least these column families.
    pub(super) fn write(path: &Path, families: &[String], lock: &Lock) -> Result<Self> {
        let cache = Cache::new_lru_cache(8 * MIB);
        let options = options(&cache);
        let known = existing(path, &options).map_err(|e| explain(path, "open it", &e))?;
        let names = families.iter().cloned().chain(known).collect();
        let db = DB::open_cf_descriptors(&options, path, described(names, &cache))
            .map_err(|e| explain(path, "open it", &e))?;
        Ok(Self::of(db, path, Access::Write, lock))
    }

    fn of(db: DB, path: &Path, access: Access, lock: &Lock) -> Self {
        Self {
            db,
            path: path.to_path_buf(),
            access,
            lock: lock.clone(),
        }
    }

    /// Whether this is enough for `access`.
    pub(super) fn allows(&self, access: Access) -> bool {
        access == Access::Read || self.access == Access::Write
    }

    /// The lock it is open under.
    pub(super) fn lock(&self) -> Lock {
        self.lock.clone()
    }

    pub(super) fn get(&self, table: &str, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let value = self.db.get_cf(self.family(table)?, key);
        value.map_err(|e| explain(&self.path, &format!("read table {table}"), &e))
    }

    /// Up to `max` entries from key `from` on that start with `prefix`.
    pub(super) fn page(&self, table: &str, from: &[u8], prefix: &[u8], max: usize) -> Result<Page> {
        let mode = IteratorMode::From(from, Direction::Forward);
        let mut page = Page::new();
        for entry in self.db.iterator_cf(self.family(table)?, mode).take(max) {
            let (key, value) =
                entry.map_err(|e| explain(&self.path, &format!("scan table {table}"), &e))?;
            if !key.starts_with(prefix) {
                break;
            }
            page.push((key.into_vec(), value.into_vec()));
        }
        Ok(page)
    }

    /// Writes all of `ops` as one record of a synced log.
    pub(super) fn apply(&self, ops: &[Op]) -> Result<()> {
        let mut batch = WriteBatch::default();
        for op in ops {
            let family = self.family(op.table)?;
            match &op.value {
                Some(value) => batch.put_cf(family, &op.key, value),
                None => batch.delete_cf(family, &op.key),
            }
        }
        let mut options = WriteOptions::default();
        options.set_sync(true);
        self.db
            .write_opt(batch, &options)
            .map_err(|e| explain(&self.path, "commit a batch", &e))
    }

    fn family(&self, table: &str) -> Result<&ColumnFamily> {
        self.db.cf_handle(table).ok_or_else(|| Error::Db {
            path: self.path.clone(),
            detail: format!("it was opened without table {table}"),
        })
    }
}

/// Waits for the lock file beside the database and writes our pid into it.
fn take_lock(path: &Path, wait: Duration) -> Result<LockFile> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let name = PathBuf::from(name);
    let err = |e| Error::io("lock", &name, e);
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&name)
        .map_err(err)?;
    if !lock_within(&file, wait).map_err(err)? {
        let holder = match holder(&file) {
            Some(pid) => format!("process {pid}"),
            None => "another process".to_owned(),
        };
        return Err(Error::Db {
            path: path.to_path_buf(),
            detail: format!(
                "{holder} has had it open for {} s; wait for it to end, or stop it",
                wait.as_secs()
            ),
        });
    }
    // Only for the message above: a failure to write it must not stop us.
    let pid = format!("{:<10}\n", std::process::id());
    let _ = file.write_all_at(pid.as_bytes(), 0);
    Ok(file.into())
}

fn holder(mut file: &File) -> Option<u32> {
    let mut text = String::new();
    file.by_ref().take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// The column families that are there; none if no database is.
fn existing(path: &Path, options: &Options) -> Result<Vec<String>, rocksdb::Error> {
    if path.join("CURRENT").exists() {
        return DB::list_cf(options, path);
    }
    Ok(Vec::new())
}

/// Each of `names` once, and what RocksDB always wants named.
fn described(mut names: Vec<String>, cache: &Cache) -> Vec<ColumnFamilyDescriptor> {
    names.push("default".to_owned());
    names.sort_unstable();
    names.dedup();
    let described = names.into_iter();
    described
        .map(|name| ColumnFamilyDescriptor::new(name, options(cache)))
        .collect()
}

/// What RocksDB says while it is read only. It says hundreds of lines of its settings.
fn log(level: LogLevel, text: &str) {
    match level {
        LogLevel::Warn | LogLevel::Error | LogLevel::Fatal => {
            tracing::debug!(text, "the database says");
        }
        _ => {}
    }
}

/// A small footprint: a node has thousands of facts, not millions. Measured in
/// synced-batch latency and resident memory against RocksDB's defaults.
fn options(cache: &Cache) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_block_size(8 << 10);
    blocks.set_cache_index_and_filter_blocks(true);
    blocks.set_pin_l0_filter_and_index_blocks_in_cache(true);
    blocks.set_bloom_filter(10.0, false);
    blocks.set_format_version(5);
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_write_buffer_size(4 * MIB);
    options.set_max_write_buffer_number(2);
    options.set_db_write_buffer_size(8 * MIB);
    options.set_target_file_size_base(8 << 20);
    options.set_max_open_files(64);
    options.set_max_background_jobs(2);
    options.set_max_total_wal_size(16 << 20);
    options.set_keep_log_file_num(2);
    options.set_stats_dump_period_sec(0);
    // Opened several times in one start: no thread per table file, no sampling of them.
    options.set_max_file_opening_threads(1);
    options.set_skip_stats_update_on_db_open(true);
    options.set_stats_persist_period_sec(0);
    options.set_compression_type(DBCompressionType::Lz4);
    options
}

fn explain(path: &Path, doing: &str, error: &rocksdb::Error) -> Error {
    use rocksdb::ErrorKind;
    let text = error.to_string();
    if text.contains("No space left on device") {
        return Error::NoSpace {
            path: path.to_path_buf(),
        };
    }
    let advice = match error.kind() {
        ErrorKind::Corruption => {
            "; it is damaged: move the directory away to start with an empty one \
             (layers and blobs are kept)"
        }
        _ => "",
    };
    Error::Db {
        path: path.to_path_buf(),
        detail: format!("cannot {doing}: {text}{advice}"),
    }
}
