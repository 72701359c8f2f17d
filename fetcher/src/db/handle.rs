//! An open RocksDB and the lock that says so to other processes.
//!
//! Invariant: RocksDB is open only while this process holds `<path>.lock`, and is closed
//! before the lock goes. The only file of the project that names RocksDB's types.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType,
    Direction, IteratorMode, Options, WriteBatch, WriteOptions,
};

use super::table::{Op, Page};
use crate::store::lock::lock_within;
use crate::{Error, Result};

const MIB: usize = 1 << 20;

/// Fields drop in order: the database closes, then the lock goes.
pub(super) struct Handle {
    db: DB,
    path: PathBuf,
    _lock: File,
}

impl Handle {
    /// Opens the database, made if absent, with at least these column families.
    pub(super) fn open(path: &Path, families: &[String], wait: Duration) -> Result<Self> {
        std::fs::create_dir_all(path).map_err(|e| Error::io("create", path, e))?;
        let lock = take_lock(path, wait)?;
        let cache = Cache::new_lru_cache(8 * MIB);
        let options = options(&cache);
        let descriptors = names(path, &options, families)?
            .into_iter()
            .map(|name| ColumnFamilyDescriptor::new(name, self::options(&cache)));
        let db = DB::open_cf_descriptors(&options, path, descriptors)
            .map_err(|e| explain(path, "open it", &e))?;
        Ok(Self {
            db,
            path: path.to_path_buf(),
            _lock: lock,
        })
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
    pub(super) fn write(&self, ops: Vec<Op>) -> Result<()> {
        let mut batch = WriteBatch::default();
        for op in ops {
            let family = self.family(op.table)?;
            match op.value {
                Some(value) => batch.put_cf(family, op.key, value),
                None => batch.delete_cf(family, op.key),
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
fn take_lock(path: &Path, wait: Duration) -> Result<File> {
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
    Ok(file)
}

fn holder(mut file: &File) -> Option<u32> {
    let mut text = String::new();
    file.by_ref().take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// What is there already and what is asked for: RocksDB wants all of it named.
fn names(path: &Path, options: &Options, families: &[String]) -> Result<Vec<String>> {
    let mut names = families.to_vec();
    if path.join("CURRENT").exists() {
        names.extend(DB::list_cf(options, path).map_err(|e| explain(path, "open it", &e))?);
    }
    names.push("default".to_owned());
    names.sort_unstable();
    names.dedup();
    Ok(names)
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
