//! The directories of snapshots.
//!
//! ```text
//! <root>/lock            shared while a directory waits for its record, else exclusive
//! <root>/snapshots/<n>/fs     the files: overlay's upper, later a lower
//! <root>/snapshots/<n>/work   overlay's own
//! <root>/snapshots/<n>/none   empty: the lower of one that lies on nothing yet
//! <root>/snapshots/<n>/mapped what lies below, with other owners: mounts, see `mapped`
//! <root>/trash/<n>.<pid>.<k>  being deleted, by whoever opens the directories or sweeps
//! ```
//!
//! Invariant: a number names one directory as long as it exists. A directory that awaits
//! its record is never taken for an orphan: its maker holds the lock shared meanwhile, and
//! a sweep needs it alone. Nothing is moved or removed while anything is mounted in `mapped`.
//!
//! A new directory is not synced before its record is. Most file systems have it on the device
//! by then, as they keep the order in which names are made; btrfs has not, and a power cut may
//! take it. So whoever opens them makes those again that are recorded as written to: nothing that was in
//! there was synced either. What is committed was, before its record.

use std::collections::{HashMap, HashSet};
use std::fs::{self, DirBuilder, File, Metadata, Permissions, TryLockError};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use lazarette_fetcher::lock::LockFile;
use parking_lot::Mutex;

use super::mapped;
use crate::idmap::{IdMaps, Owner};
use crate::metastore::{Kind, Usage};
use crate::{Error, Result, sys};

/// Only root looks into snapshots from outside: they hold set-uid programs.
const PRIVATE: u32 = 0o700;
/// The root directory of a container with no layers.
const FILES_MODE: u32 = 0o755;

/// Numbers of the directories that records name, and what those say of them.
pub(super) type Recorded = HashMap<u64, Kind>;

pub(super) struct Dirs {
    root: PathBuf,
    /// The next number to try.
    next: AtomicU64,
    /// Tells names in the trash apart.
    trashed: AtomicU64,
    /// Held while what is in `mapped` of a snapshot changes.
    mapping: Mutex<()>,
}

/// A new directory that no record names yet. Dropping it removes it.
pub(super) struct Made<'a> {
    dirs: &'a Dirs,
    number: u64,
    kept: bool,
    /// Keeps sweeps away until the record is there.
    _lock: LockFile,
}

impl Dirs {
    pub(super) fn open(root: &Path) -> Result<Self> {
        for dir in ["snapshots", "trash"] {
            let dir = root.join(dir);
            DirBuilder::new()
                .recursive(true)
                .mode(PRIVATE)
                .create(&dir)
                .map_err(|source| Error::io("create", &dir, source))?;
        }
        // Overlay options name absolute paths.
        let root = root
            .canonicalize()
            .map_err(|source| Error::io("resolve", root, source))?;
        let dirs = Self {
            root,
            next: AtomicU64::new(1),
            trashed: AtomicU64::new(0),
            mapping: Mutex::default(),
        };
        // Not those in the trash either: a process with this one's number may have put them there.
        let last = dirs.numbers()?.into_iter().max();
        let last = last.max(dirs.trashed_numbers()?.into_iter().max());
        let last = last.unwrap_or(0);
        dirs.next.store(last.saturating_add(1), Ordering::Relaxed);
        Ok(dirs)
    }

    /// What all snapshots are below.
    pub(super) fn path(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// Where the files of snapshot `number` are.
    pub(super) fn files(&self, number: u64) -> PathBuf {
        self.snapshot(number).join("fs")
    }

    /// Overlay's work directory of snapshot `number`.
    pub(super) fn work(&self, number: u64) -> PathBuf {
        self.snapshot(number).join("work")
    }

    /// An empty directory of snapshot `number` for overlay, which wants something below. Made if absent.
    pub(super) fn nothing(&self, number: u64) -> Result<PathBuf> {
        let path = self.snapshot(number).join("none");
        match make_dir(&path, FILES_MODE) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(Error::io("create", &path, error))
            }
            Ok(()) | Err(_) => Ok(path),
        }
    }

    /// Makes an empty directory under a number that no other process uses.
    pub(super) fn make(&self) -> Result<Made<'_>> {
        let lock = self.open_lock()?;
        lock.lock_shared()
            .map_err(|source| Error::io("lock", self.lock_path(), source))?;
        let number = loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            match make_dir(&self.snapshot(number), PRIVATE) {
                Ok(()) => break number,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(Error::io("create", self.snapshot(number), source)),
            }
        };
        let made = Made {
            dirs: self,
            number,
            kept: false,
            _lock: lock,
        };
        let [_, files, work] = self.parts(number);
        for (dir, mode) in [files, work] {
            make_dir(&dir, mode).map_err(|source| Error::io("create", &dir, source))?;
        }
        Ok(made)
    }

    /// Gives the root of a snapshot that was never mounted the mode of the topmost directory
    /// below it, and its owner unless another one is named: overlay shows the upper one's.
    pub(super) fn adopt_root(&self, number: u64, lower: &Path, owner: Option<Owner>) -> Result<()> {
        if !is_empty(&self.work(number))? {
            return Ok(());
        }
        let files = self.files(number);
        let like = fs::metadata(lower).map_err(|source| Error::io("stat", lower, source))?;
        let owner = owner.unwrap_or_else(|| owner_of(&like));
        give(&files, owner)?;
        fs::set_permissions(&files, Permissions::from_mode(like.mode() & 0o7777))
            .map_err(|source| Error::io("change the mode of", &files, source))
    }

    /// Gives the root of a snapshot with nothing below it, and nothing in it yet, an owner.
    pub(super) fn own_root(&self, number: u64, owner: Owner) -> Result<()> {
        let files = self.files(number);
        match is_empty(&files)? {
            true => give(&files, owner),
            false => Ok(()),
        }
    }

    /// Who has the root of a snapshot's files.
    pub(super) fn root_owner(&self, number: u64) -> Result<Owner> {
        let files = self.files(number);
        let meta = fs::metadata(&files).map_err(|source| Error::io("stat", &files, source))?;
        Ok(owner_of(&meta))
    }

    /// Shows what lies below a snapshot with its owners mapped; where, in the order of `lowers`.
    pub(super) fn show_mapped(
        &self,
        number: u64,
        maps: &IdMaps,
        lowers: &[PathBuf],
    ) -> Result<Vec<PathBuf>> {
        let _alone = self.mapping.lock();
        mapped::show(&self.mapped(number), maps, lowers)
    }

    /// Ends what [`Dirs::show_mapped`] shows.
    pub(super) fn end_mapped(&self, number: u64) -> Result<()> {
        let _alone = self.mapping.lock();
        mapped::end(&self.mapped(number))
    }

    fn mapped(&self, number: u64) -> PathBuf {
        self.snapshot(number).join("mapped")
    }

    /// Writes the files of a snapshot to disk.
    pub(super) fn sync(&self, number: u64) -> Result<()> {
        let files = self.files(number);
        let fail = |source| Error::io("sync", &files, source);
        let dir = File::open(&files).map_err(fail)?;
        sys::sync_file_system(dir.as_fd()).map_err(fail)
    }

    /// Disk space of a snapshot's files. A file with several names counts once; what
    /// vanishes meanwhile does not count.
    pub(super) fn usage(&self, number: u64) -> Result<Usage> {
        let mut usage = Usage::default();
        let mut linked = HashSet::new();
        let mut todo = vec![self.files(number)];
        while let Some(path) = todo.pop() {
            let Some(meta) = present(fs::symlink_metadata(&path), "stat", &path)? else {
                continue;
            };
            if !meta.is_dir() && meta.nlink() > 1 && !linked.insert((meta.dev(), meta.ino())) {
                continue;
            }
            usage.inodes += 1;
            usage.bytes = usage
                .bytes
                .saturating_add(meta.blocks().saturating_mul(512));
            if meta.is_dir()
                && let Some(entries) = present(fs::read_dir(&path), "list", &path)?
            {
                for entry in entries {
                    todo.push(
                        entry
                            .map_err(|source| Error::io("list", &path, source))?
                            .path(),
                    );
                }
            }
        }
        Ok(usage)
    }

    /// Removes a directory that no record names. What fails is logged and left to the next
    /// [`Dirs::remove_orphans`]: the snapshot itself is gone already.
    pub(super) fn discard(&self, number: u64) {
        if let Some(trash) = self.to_trash(number) {
            delete(&trash);
        }
    }

    /// Takes a directory that no record names out of the way; where to, unless that fails.
    fn to_trash(&self, number: u64) -> Option<PathBuf> {
        // As one, so that nothing is mounted there in between.
        let _alone = self.mapping.lock();
        if let Err(error) = mapped::end(&self.mapped(number)) {
            tracing::warn!(number, %error, "what a snapshot shows with other owners stays");
            return None;
        }
        let unique = self.trashed.fetch_add(1, Ordering::Relaxed);
        let name = format!("{number}.{}.{unique}", std::process::id());
        let trash = self.trash().join(name);
        let path = self.snapshot(number);
        match fs::rename(&path, &trash) {
            Ok(()) => Some(trash),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "snapshot directory cannot be removed");
                None
            }
        }
    }

    /// Removes the directories that are not among `recorded()`. Does nothing while another
    /// process makes a snapshot: the next open will. What they hold is for [`Self::empty_trash`].
    pub(super) fn remove_orphans(&self, recorded: &dyn Fn() -> Result<Recorded>) -> Result<()> {
        let Some(_alone) = self.lock_alone()? else {
            return Ok(());
        };
        // Read under the lock: every directory whose maker is done has its record.
        let recorded = recorded()?;
        for number in self.numbers()? {
            if !recorded.contains_key(&number) {
                tracing::info!(number, "removing a snapshot directory that nothing names");
                self.to_trash(number);
            }
        }
        Ok(())
    }

    /// Deletes what lies in the trash, which may be millions of files, and is nobody's: no lock
    /// is held, and another process, or thread, may be doing the same.
    pub(super) fn empty_trash(&self) -> Result<()> {
        list(&self.trash())?.iter().for_each(|path| delete(path));
        Ok(())
    }

    /// Does that, if there is anything, while the caller goes on. What is left when this process
    /// ends is for the next.
    pub(super) fn empty_trash_meanwhile(&self) -> Result<()> {
        let todo = list(&self.trash())?;
        if todo.is_empty() {
            return Ok(());
        }
        tracing::info!(
            directories = todo.len(),
            "deleting what is left of removed snapshots"
        );
        std::thread::Builder::new()
            .name("laz-trash".to_owned())
            .spawn(move || todo.iter().for_each(|path| delete(path)))
            .map(drop)
            .map_err(|source| Error::io("start a thread to empty", self.trash(), source))
    }

    /// Makes the directories among `recorded()` again that a power cut took from snapshots that
    /// are written to. Does nothing while another process makes a snapshot: the next open will.
    pub(super) fn restore(&self, recorded: &dyn Fn() -> Result<Recorded>) -> Result<()> {
        let Some(_alone) = self.lock_alone()? else {
            return Ok(());
        };
        let mut made = Vec::new();
        for (number, kind) in recorded()? {
            if !matches!(kind, Kind::Active | Kind::View) {
                continue;
            }
            mapped::forget_unmounted(&self.mapped(number));
            if self.make_lost(number)? {
                made.push(number);
            }
        }
        if made.is_empty() {
            return Ok(());
        }
        // Another process may have removed one of these meanwhile: its record first.
        let recorded = recorded()?;
        for number in made {
            match recorded.contains_key(&number) {
                true => tracing::warn!(
                    path = %self.snapshot(number).display(),
                    "directories of a snapshot were lost, and are made again, empty"
                ),
                false => self.discard(number),
            }
        }
        Ok(())
    }

    /// Makes what is gone of the directory of a snapshot; whether anything was.
    fn make_lost(&self, number: u64) -> Result<bool> {
        let mut was_lost = false;
        for (dir, mode) in self.parts(number) {
            match make_dir(&dir, mode) {
                Ok(()) => was_lost = true,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(Error::io("create", &dir, source)),
            }
        }
        Ok(was_lost)
    }

    /// The lock, alone; `None` while another process makes a snapshot.
    fn lock_alone(&self) -> Result<Option<LockFile>> {
        let lock = self.open_lock()?;
        match lock.try_lock() {
            Ok(()) => Ok(Some(lock)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(Error::io("lock", self.lock_path(), source)),
        }
    }

    /// What a snapshot has, outermost first.
    fn parts(&self, number: u64) -> [(PathBuf, u32); 3] {
        [
            (self.snapshot(number), PRIVATE),
            (self.files(number), FILES_MODE),
            (self.work(number), PRIVATE),
        ]
    }

    fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }

    fn snapshot(&self, number: u64) -> PathBuf {
        self.root.join("snapshots").join(number.to_string())
    }

    fn numbers(&self) -> Result<Vec<u64>> {
        let names = list(&self.root.join("snapshots"))?;
        Ok(names
            .iter()
            .filter_map(|path| path.file_name()?.to_str()?.parse().ok())
            .collect())
    }

    fn trashed_numbers(&self) -> Result<Vec<u64>> {
        let names = list(&self.trash())?;
        Ok(names
            .iter()
            .filter_map(|path| path.file_stem()?.to_str()?.split('.').next()?.parse().ok())
            .collect())
    }

    fn lock_path(&self) -> PathBuf {
        self.root.join("lock")
    }

    fn open_lock(&self) -> Result<LockFile> {
        let path = self.lock_path();
        let opened = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path);
        opened
            .map(LockFile::from)
            .map_err(|source| Error::io("open", &path, source))
    }
}

impl Made<'_> {
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// The record is there.
    pub(super) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.dirs.discard(self.number);
        }
    }
}

/// Deletes a directory of the trash, if it is there. What fails is logged.
fn delete(trash: &Path) {
    if let Err(error) = fs::remove_dir_all(trash)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %trash.display(), %error, "trash cannot be deleted");
    }
}

/// Makes one directory with exactly this mode, whatever the umask.
fn make_dir(path: &Path, mode: u32) -> io::Result<()> {
    DirBuilder::new().mode(mode).create(path)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

fn is_empty(dir: &Path) -> Result<bool> {
    let mut entries = fs::read_dir(dir).map_err(|source| Error::io("list", dir, source))?;
    Ok(entries.next().is_none())
}

fn owner_of(meta: &Metadata) -> Owner {
    Owner {
        uid: meta.uid(),
        gid: meta.gid(),
    }
}

fn give(path: &Path, owner: Owner) -> Result<()> {
    std::os::unix::fs::chown(path, Some(owner.uid), Some(owner.gid))
        .map_err(|source| Error::io("change the owner of", path, source))
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let fail = |source| Error::io("list", dir, source);
    fs::read_dir(dir)
        .map_err(fail)?
        .map(|entry| entry.map(|entry| entry.path()).map_err(fail))
        .collect()
}

/// `None` when it is not there any more.
fn present<T>(outcome: io::Result<T>, op: &'static str, path: &Path) -> Result<Option<T>> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::io(op, path, source)),
    }
}
