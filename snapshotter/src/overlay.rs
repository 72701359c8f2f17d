//! Snapshots: layers and local directories stacked into root file systems.
//!
//! Containerd's semantics: an active snapshot is writable and private, a view read-only,
//! a committed one is finished and may be a parent. A committed snapshot is either a local
//! directory or a lazy layer whose mount the caller names when it asks for mounts.
//!
//! Invariant: the records are the truth. A directory is made before the record that names
//! it and removed after that record is gone, so a crash leaves at most directories that no
//! record names, and [`Snapshots::open`] removes those (what they hold is deleted while others
//! go on); what a power cut took of a snapshot that was being written it makes again, empty. Never mounts a snapshot by itself:
//! [`Mount`] is a value, [`Mount::mount_at`] the only thing that acts on anything that is there. For a
//! snapshot whose owners are mapped ([`crate::idmap`]) it mounts what lies below, as it shall be
//! seen; that ends with the snapshot.

#[cfg(test)]
pub(crate) mod contract;
mod dirs;
mod execute;
mod mapped;
mod mount;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use lazarette_fetcher::types::Digest;

use self::dirs::{Dirs, Recorded};
pub use self::execute::unmount;
pub use self::mount::{Mount, OverlayMount, Upper};
use crate::idmap::IdMaps;
use crate::metastore::{
    self, Commit, Content, Create, Kind, Labels, Metastore, Record, Relabel, Usage,
};
use crate::remote::REF;
use crate::{Error, Result};

/// Finds the mount of a lazy layer by its blob digest.
pub type Resolve<'a> = &'a dyn Fn(&Digest) -> Result<PathBuf>;

/// A snapshot and all below it, as they were when they were looked up. What lies below a
/// snapshot never changes and stays as long as it does: this is good for as long.
#[derive(Debug, Clone)]
pub struct Chain(Vec<Record>);

impl Chain {
    /// Blob digests of the lazy layers that have to be mounted, topmost first.
    pub fn layers(&self) -> Vec<Digest> {
        let layer = |record: &Record| match record.content {
            Content::Layer(blob_digest) => Some(blob_digest),
            Content::Directory(_) => None,
        };
        self.0.iter().filter_map(layer).collect()
    }
}

/// The snapshots below one directory. Several processes may open the same one.
pub struct Snapshots {
    dirs: Dirs,
    store: Arc<dyn Metastore>,
    /// Overlay takes directories whose owners are mapped.
    lays_mapped: OnceLock<()>,
}

impl Snapshots {
    /// Opens the snapshots in `root`, made if absent, and removes the directories that no
    /// record names.
    pub fn open(root: &Path, store: Arc<dyn Metastore>) -> Result<Self> {
        let dirs = Dirs::open(root)?;
        let this = Self {
            dirs,
            store,
            lays_mapped: OnceLock::new(),
        };
        this.dirs.restore(&|| this.recorded())?;
        this.dirs.remove_orphans(&|| this.recorded())?;
        this.dirs.empty_trash_meanwhile()?;
        Ok(this)
    }

    /// Makes a writable snapshot on `parent`, or on nothing.
    pub fn prepare(&self, key: &str, parent: Option<&str>, labels: &Labels) -> Result<()> {
        self.create(key, parent, labels, Kind::Active)
    }

    /// Makes a read-only look at `parent`, or at an empty directory.
    pub fn view(&self, key: &str, parent: Option<&str>, labels: &Labels) -> Result<()> {
        self.create(key, parent, labels, Kind::View)
    }

    /// Closes the active snapshot `key` under its final `name`. The caller has unmounted it
    /// or at least stopped writing.
    pub fn commit(&self, name: &str, key: &str, labels: &Labels) -> Result<()> {
        self.commit_on(name, key, None, labels)
    }

    /// [`Self::commit`] of a snapshot that was made on nothing and shall lie on `parent`.
    pub fn commit_on(
        &self,
        name: &str,
        key: &str,
        parent: Option<&str>,
        labels: &Labels,
    ) -> Result<()> {
        let record = self.to_commit(name, key)?;
        let mut usage = Usage::default();
        if let Content::Directory(number) = record.content {
            usage = self.dirs.usage(number)?;
            self.dirs.sync(number)?;
        }
        self.store.update(&mut |records| {
            let now = now();
            let commit = Commit {
                name,
                key,
                parent,
                labels,
                usage,
                now,
            };
            metastore::commit(records, commit)
        })?;
        // What others lie on is not mounted.
        if let Content::Directory(number) = record.content
            && let Err(error) = self.dirs.end_mapped(number)
        {
            tracing::warn!(number, %error, "what a snapshot shows with other owners stays");
        }
        Ok(())
    }

    /// The snapshot `key`, unless `name` is taken. Looked up in one step: of many who commit the
    /// same at once, those who come too late all learn that it was done.
    fn to_commit(&self, name: &str, key: &str) -> Result<Record> {
        let mut found = None;
        self.store.read(&mut |records| {
            found = match records.get(name)? {
                Some(taken) => return Err(Error::AlreadyExists { key: taken.key }),
                None => records.get(key)?,
            };
            Ok(())
        })?;
        found.ok_or_else(|| Error::NotFound {
            key: key.to_owned(),
        })
    }

    /// Makes a committed snapshot whose files are those of a lazy layer.
    pub fn commit_layer(
        &self,
        name: &str,
        parent: Option<&str>,
        blob_digest: Digest,
        labels: &Labels,
    ) -> Result<()> {
        self.store.update(&mut |records| {
            let new = Create {
                key: name,
                kind: Kind::Committed,
                parent,
                content: Content::Layer(blob_digest),
                labels,
                now: now(),
            };
            metastore::commit_layer(records, new, blob_digest)
        })
    }

    /// What to mount to see the active snapshot or view `key`.
    ///
    /// `resolve` names the mounts of the lazy layers below it. The result is empty never and
    /// has one element today; it is a list because containerd's is.
    pub fn mounts(&self, key: &str, resolve: Resolve<'_>) -> Result<Vec<Mount>> {
        self.mounts_of(&self.chain(key)?, resolve)
    }

    /// [`Self::mounts`] of a snapshot that was looked up before. Reads no record.
    pub fn mounts_of(&self, chain: &Chain, resolve: Resolve<'_>) -> Result<Vec<Mount>> {
        let Some((top, below)) = chain.0.split_first() else {
            return Err(Error::NotFound { key: String::new() });
        };
        let number = match (top.kind, top.content) {
            (Kind::Active | Kind::View, Content::Directory(number)) => number,
            (Kind::Committed, _) | (_, Content::Layer(_)) => {
                return Err(Error::Precondition {
                    op: "mount",
                    key: top.key.clone(),
                    detail: "it is committed; make a view of it".to_owned(),
                });
            }
        };
        let mut lowers = below
            .iter()
            .map(|record| match record.content {
                Content::Directory(number) => Ok(self.dirs.files(number)),
                Content::Layer(blob_digest) => resolve(&blob_digest),
            })
            .collect::<Result<Vec<_>>>()?;
        let is_on_nothing = lowers.is_empty();
        if top.kind == Kind::Active && is_on_nothing && top.labels.contains_key(REF) {
            // A layer to be unpacked that may turn out to lie on others when it is committed.
            // Only an overlay is unpacked to with its whiteouts; to a directory they would be lost.
            lowers.push(self.dirs.nothing(number)?);
        }
        let mut lowers = mount::each_once(lowers);
        let maps = self.maps_of(top, below.first())?;
        if let Some(maps) = &maps {
            lowers = self.dirs.show_mapped(number, maps, &lowers)?;
        }
        let owner = maps.map(|maps| maps.root());
        match (lowers.first(), owner) {
            (Some(lower), owner) if top.kind == Kind::Active && !is_on_nothing => {
                self.dirs.adopt_root(number, lower, owner)?;
            }
            (_, Some(owner)) => self.dirs.own_root(number, owner)?,
            (_, None) => {}
        }
        let upper = Upper {
            dir: self.dirs.files(number),
            work: self.dirs.work(number),
            passing: false,
        };
        let mount = mount::plan(top.kind, upper, lowers);
        if let (Mount::Overlay(overlay), Some(_)) = (&mount, owner) {
            self.try_mapped(number, overlay)?;
        }
        Ok(vec![mount])
    }

    /// How the owners of what lies below a snapshot are to be seen, unless as they are: also
    /// where they were given to the host's owners before. Containerd that was not told that
    /// owners are mapped here does that with a copy of the image, and asks for the map all the same.
    fn maps_of(&self, top: &Record, below: Option<&Record>) -> Result<Option<IdMaps>> {
        let Some(maps) = IdMaps::of(&top.labels)? else {
            return Ok(None);
        };
        let root = match below.map(|below| below.content) {
            Some(Content::Directory(number)) => self.dirs.root_owner(number)?,
            // Nobody writes to a layer.
            Some(Content::Layer(_)) | None => return Ok(Some(maps)),
        };
        Ok((!maps.is_of_host(root)).then_some(maps))
    }

    /// Finds out, once, whether overlay takes what has its owners mapped.
    ///
    /// # Errors
    /// `Environment` where it does not.
    fn try_mapped(&self, number: u64, overlay: &OverlayMount) -> Result<()> {
        if self.lays_mapped.get().is_some() {
            return Ok(());
        }
        let nothing = self.dirs.nothing(number)?;
        let mut lowers: Vec<_> = overlay.lowers.iter().take(1).cloned().collect();
        lowers.push(nothing.clone());
        let read_only = OverlayMount {
            lowers,
            upper: None,
        };
        match read_only.try_out(&nothing) {
            Err(Error::Mount { source, detail, .. })
                if source.kind() == std::io::ErrorKind::InvalidInput =>
            {
                return Err(Error::Environment {
                    op: "map owners for a user namespace",
                    detail: format!(
                        "overlay of this kernel does not take what has its owners mapped, as Linux \
                         5.19 and later does: {source} ({detail})"
                    ),
                });
            }
            tried => tried?,
        }
        // Somebody else may have found out.
        let _ = self.lays_mapped.set(());
        Ok(())
    }

    /// `key` and all below it.
    pub fn chain(&self, key: &str) -> Result<Chain> {
        let mut chain = Vec::new();
        self.store.read(&mut |records| {
            chain = metastore::chain(records, Some(key))?;
            Ok(())
        })?;
        Ok(Chain(chain))
    }

    /// Blob digests of the lazy layers that `key` needs mounted, topmost first.
    pub fn layers(&self, key: &str) -> Result<Vec<Digest>> {
        Ok(self.chain(key)?.layers())
    }

    /// Removes a snapshot that no other one lies on. The caller has unmounted it.
    ///
    /// Returns the lazy layer that it was the last to name.
    pub fn remove(&self, key: &str) -> Result<Option<Digest>> {
        let mut removed = None;
        self.store.update(&mut |records| {
            let (record, changes) = metastore::remove(records, key)?;
            removed = Some(record.content);
            Ok(changes)
        })?;
        match removed {
            Some(Content::Directory(number)) => self.dirs.discard(number),
            Some(Content::Layer(blob_digest)) if !self.is_named(&blob_digest)? => {
                return Ok(Some(blob_digest));
            }
            Some(Content::Layer(_)) | None => {}
        }
        Ok(None)
    }

    /// Whether the files of some snapshot are those of this layer.
    pub fn is_named(&self, blob_digest: &Digest) -> Result<bool> {
        let mut named = false;
        self.store.read(&mut |records| {
            named = metastore::is_named(records, blob_digest)?;
            Ok(())
        })?;
        Ok(named)
    }

    /// Removes what removed snapshots left and could not be removed then.
    pub fn cleanup(&self) -> Result<()> {
        self.dirs.remove_orphans(&|| self.recorded())?;
        self.dirs.empty_trash()
    }

    /// Finds out whether overlay takes the directories that are written to, by making one of
    /// two empty ones. What this process may not find out, the client has to.
    ///
    /// # Errors
    /// `Environment` if the file system that holds them cannot be written to through overlay,
    /// or this kernel has none.
    pub fn try_writable(&self) -> Result<()> {
        let [lower, upper, target] = [self.dirs.make()?, self.dirs.make()?, self.dirs.make()?]
            .map(|made| (self.dirs.files(made.number()), made));
        let overlay = OverlayMount {
            lowers: vec![lower.0.clone()],
            upper: Some(Upper {
                dir: upper.0.clone(),
                work: self.dirs.work(upper.1.number()),
                passing: false,
            }),
        };
        match overlay.try_out(&target.0) {
            Err(Error::Mount { source, detail, .. }) if !is_forbidden(&source) => {
                Err(Error::Environment {
                    op: "make writable snapshots",
                    detail: format!(
                        "overlay cannot write to {}: {source} ({detail}); \
                         use a --root on ext4 or xfs",
                        self.dirs.path().display()
                    ),
                })
            }
            Err(Error::Mount { .. }) | Ok(()) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// What is known about `key`.
    pub fn stat(&self, key: &str) -> Result<Record> {
        let mut found = None;
        self.store.read(&mut |records| {
            found = records.get(key)?;
            Ok(())
        })?;
        found.ok_or_else(|| Error::NotFound {
            key: key.to_owned(),
        })
    }

    /// Changes labels of `key`, and returns what is known of it now.
    pub fn relabel(&self, key: &str, change: &Relabel) -> Result<Record> {
        let mut changed = None;
        self.store.update(&mut |records| {
            let record = metastore::relabel(records, key, change, now())?;
            changed = Some(record.clone());
            Ok(vec![metastore::Change::Put(record)])
        })?;
        changed.ok_or_else(|| Error::NotFound {
            key: key.to_owned(),
        })
    }

    /// Disk space of `key` without its parents'. Of an active snapshot it is what lies there
    /// now; of a lazy layer zero, its bytes are the content store's.
    pub fn usage(&self, key: &str) -> Result<Usage> {
        let record = self.stat(key)?;
        match (record.usage, record.content) {
            (Some(usage), _) => Ok(usage),
            (None, Content::Directory(number)) => self.dirs.usage(number),
            (None, Content::Layer(_)) => Ok(Usage::default()),
        }
    }

    /// All snapshots, by key in byte order.
    pub fn list(&self) -> Result<Vec<Record>> {
        let mut all = Vec::new();
        self.store.read(&mut |records| {
            all = records.all()?;
            Ok(())
        })?;
        Ok(all)
    }

    fn create(&self, key: &str, parent: Option<&str>, labels: &Labels, kind: Kind) -> Result<()> {
        // What can never be mounted is not made.
        IdMaps::of(labels)?;
        let made = self.dirs.make()?;
        let content = Content::Directory(made.number());
        let recorded = self.store.update(&mut |records| {
            let new = Create {
                key,
                kind,
                parent,
                content,
                labels,
                now: now(),
            };
            metastore::create(records, new)
        });
        if recorded.is_ok() || self.may_name(key, content) {
            made.keep();
        }
        recorded
    }

    /// Whether the record of `key` names `content`, as far as anyone can tell: one that could
    /// not be stored may be there all the same. What is kept for nothing, a sweep removes.
    fn may_name(&self, key: &str, content: Content) -> bool {
        match self.stat(key) {
            Ok(record) => record.content == content,
            Err(Error::NotFound { .. }) => false,
            Err(_) => true,
        }
    }

    fn recorded(&self) -> Result<Recorded> {
        let records = self.list()?;
        let of = |record: &Record| match record.content {
            Content::Directory(number) => Some((number, record.kind)),
            Content::Layer(_) => None,
        };
        Ok(records.iter().filter_map(of).collect())
    }
}

fn is_forbidden(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::PermissionDenied
}

/// Seconds since 1970.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    })
}
