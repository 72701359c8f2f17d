//! A whole layer on top of the data that the server stands for.
//!
//! ```text
//! through fuse:      <path>      EROFS: what everybody sees; names and attributes never leave
//!                                the kernel
//!                      below it  the server's FUSE: `data`, and for small files `small`, reached
//!                                by EROFS alone
//! through fanotify:  <path>      EROFS over the data file, opened through a mount that nobody
//!                                else has; before it reads there the kernel asks the server
//! <metadata>                     the image, a file on a local disk
//! ```
//!
//! Of a layer that is complete there is one more on top ([`super::whole`]).
//!
//! Invariant: an image that is mounted is never written to ([`image`]). An EROFS is made only
//! after the server answers for what it will read. Where mounting fails, nothing is left
//! mounted. What a daemon that died left half way is finished by the next one that attaches;
//! an EROFS that no server answers for is nobody's, and goes before a new one comes.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lazarette_fetcher::types::{ByteRange, Digest};
use lazarette_mountd::ranges::Span;
use lazarette_mountd::table::Table;
use lazarette_mountd::wire::Message;

use super::{DATA, LentData, MountServer, Mounted, SMALL, Through, image, lost, outcome};
use crate::erofs::Devices;
use crate::fuse::{Knob, ReadAhead, mount_image};
use crate::tree::Tree;
use crate::{Error, Result, sys};

/// Mounts that are taken down where one is to be: two EROFS, what is below them, and as much of
/// an attempt before.
const ORPHANS_MAX: usize = 6;

/// What a server answers that has no such mount.
const ENOENT: i32 = 2;
/// What it answers where the mount shows another file.
const ESTALE: i32 = 116;

/// Where a layer goes.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The mountpoint, absolute, at most 250 bytes; made if absent.
    pub path: &'a Path,
    /// The file of the image, at most 255 bytes; on a disk, not in a tmpfs. Written here
    /// unless it is right.
    pub metadata: &'a Path,
}

/// How long a layer is read as it is known to be: a start is over by then, and who goes on
/// reads as anybody.
const NARROW_LASTS: Duration = Duration::from_secs(60);

/// A layer, and how it is to be mounted.
pub struct Shown<'a> {
    /// Which.
    pub blob_digest: Digest,
    /// Its names and attributes.
    pub tree: &'a Tree,
    /// Its bytes.
    pub data: Arc<dyn LentData>,
    /// Through what the kernel gets them. [`Through::Fanotify`] keeps others from evicting any
    /// of the layer while it is mounted; see [`select`](super::select).
    pub through: Through,
}

/// Why a layer is not answered for where it was mounted.
#[derive(Debug)]
pub enum Unattached {
    /// The mount is of no use: it shows another file, or is none any more, or nobody sees the layer
    /// there and it cannot be finished.
    Useless(Error),
    /// The mount may be what containers have, and may work later.
    NotNow(Error),
}

impl Unattached {
    /// What the server says, or what kept it from being asked.
    fn of(error: Error) -> Self {
        let errno = match &error {
            Error::Mount { source, .. } => source.raw_os_error(),
            _ => None,
        };
        match errno {
            Some(ESTALE | ENOENT) => Self::Useless(error),
            _ => Self::NotNow(error),
        }
    }
}

impl MountServer {
    /// Mounts a layer so that it outlives this process. Takes milliseconds and blocks for
    /// them.
    ///
    /// # Errors
    /// `Environment` where the layer does not fit into an EROFS; `Mount` when the server or
    /// the kernel refuses.
    pub fn mount_layer(
        &self,
        blob_digest: Digest,
        tree: &Tree,
        data: Arc<dyn LentData>,
        place: Place<'_>,
    ) -> Result<Mounted> {
        let through = Through::Fuse;
        let shown = Shown {
            blob_digest,
            tree,
            data,
            through,
        };
        self.mount_shown(&shown, place)
    }

    /// The same, through FUSE or fanotify.
    ///
    /// # Errors
    /// Those of [`Self::mount_layer`]. Through fanotify also `Mount` with `EBUSY` while
    /// somebody evicts from the layer, and with whatever [`select`](super::select) would say.
    pub fn mount_shown(&self, shown: &Shown<'_>, place: Place<'_>) -> Result<Mounted> {
        let path = place.path.to_path_buf();
        take_down_orphan(&path)?;
        fs::create_dir_all(&path).map_err(|e| Error::io("create", &path, e))?;
        if shown.through == Through::Fanotify {
            shown.data.pad()?;
        }
        let data = Arc::clone(&shown.data);
        let mounted = Mounted {
            mount: self.mount_through(shown.through, shown.blob_digest, data, &path)?,
            blob_digest: Some(shown.blob_digest),
            path,
            through: shown.through,
        };
        match self.cover(&mounted, shown.tree, &shown.data, place.metadata) {
            Ok(()) => Ok(mounted),
            Err(error) => {
                // The first error tells; a mount that is left is in the server's list.
                let _ = self.unmount(&mounted);
                Err(error)
            }
        }
    }

    /// Answers for a layer that an earlier process mounted at `mounted.path`, and finishes
    /// what that one did not; that takes the layer's tree.
    ///
    /// # Errors
    /// Those of [`Self::attach`] and [`Self::mount_layer`], and what they mean for the mount.
    pub fn attach_layer(
        &self,
        mounted: &Mounted,
        tree: impl FnOnce() -> Result<Tree>,
        data: Arc<dyn LentData>,
        metadata: &Path,
    ) -> Result<(), Unattached> {
        self.attach(mounted, Arc::clone(&data))
            .map_err(Unattached::of)?;
        if covers(&mounted.path).map_err(Unattached::NotNow)? > 0 {
            return Ok(());
        }
        let covered = tree().and_then(|tree| self.cover(mounted, &tree, &data, metadata));
        covered.map_err(Unattached::Useless)
    }

    /// Unmounts a layer that nothing uses any more, and removes its mountpoint.
    ///
    /// # Errors
    /// `Mount` with `EBUSY` while something in it is open; then it stays mounted.
    pub fn unmount_layer(&self, mounted: &Mounted) -> Result<()> {
        let path = &mounted.path;
        for _ in 0..covers(path)?.min(ORPHANS_MAX) {
            sys::unmount(path).map_err(|e| Error::mount("unmount", path, e))?;
        }
        self.unmount(mounted)?;
        match fs::remove_dir(path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io("remove", path, e)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Tells the server that all of a layer is present, `len` bytes of data; `false` where it is
    /// not. Of a mount through fanotify nothing is asked any more then. Reads what this process
    /// has not seen yet, and blocks for that.
    pub fn tell_complete(&self, mounted: &Mounted, data: &dyn LentData, len: u64) -> Result<bool> {
        let mut at = 0;
        while at < len {
            let first = ByteRange::new(at, at.saturating_add(1));
            let Some(vouched) = first.map(|first| data.vouch(first)).transpose()?.flatten() else {
                return Ok(false);
            };
            let Some(span) = Span::new(at, vouched.range.end()) else {
                return Ok(false);
            };
            at = span.end();
            let grant = Message::Grant {
                want: 0,
                mount: mounted.mount,
                number: vouched.evictions,
                span,
            };
            self.link.tell(&grant).map_err(|error| lost(&error))?;
        }
        Ok(true)
    }

    /// Mounts the image over what the server answers for.
    fn cover(
        &self,
        mounted: &Mounted,
        tree: &Tree,
        data: &Arc<dyn LentData>,
        metadata: &Path,
    ) -> Result<()> {
        let path = &mounted.path;
        // Open until the EROFS has opened its data through it.
        let own;
        let (devices, mut files) = match mounted.through {
            Through::Fuse if self.data_alone => (Devices::One, vec![path.join(DATA)]),
            Through::Fuse => shown_below(path)?,
            Through::Fanotify => {
                own = self.mark(mounted, data.as_ref())?;
                (Devices::One, vec![sys::path_of(own.as_fd())])
            }
        };
        image::put(tree, devices, metadata)?;
        files.insert(0, metadata.to_path_buf());
        if let Some(knob) = mount_image(&files, path)? {
            match data.is_known() {
                true => self.narrow(knob),
                false => knob.set(ReadAhead::Wide),
            }
        }
        Ok(())
    }

    /// Has the kernel read hardly more than is asked for, for a while.
    fn narrow(&self, knob: Knob) {
        knob.set(ReadAhead::Narrow);
        self.link.handle().spawn(async move {
            tokio::time::sleep(NARROW_LASTS).await;
            knob.set(ReadAhead::Wide);
        });
    }

    /// Makes a mount of the data file alone, and has the kernel ask the server before anything
    /// is read through it.
    fn mark(&self, mounted: &Mounted, data: &dyn LentData) -> Result<OwnedFd> {
        let (path, mount) = (&mounted.path, mounted.mount);
        let lent = data.lend()?;
        let own = sys::mount_of_its_own(&lent.data);
        let own = own.map_err(|e| Error::mount("mount the data file for", path, e))?;
        let message = |request| Message::Mark { request, mount };
        let done = self.link.ask(message, &[own.as_fd()], None);
        outcome(done, "be asked about the data of", path)?;
        Ok(own)
    }
}

/// What a server shows at `path` that an image can be made for.
fn shown_below(path: &Path) -> Result<(Devices, Vec<PathBuf>)> {
    let [data, small] = [DATA, SMALL].map(|name| path.join(name));
    match fs::symlink_metadata(&small) {
        Ok(_) => Ok((Devices::SmallApart, vec![data, small])),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok((Devices::One, vec![data])),
        Err(e) => Err(Error::io("inspect", &small, e)),
    }
}

/// How many EROFS lie at `path`, which somebody may have removed. No file system is asked: what is
/// below them is the server's, which may hang.
pub(super) fn covers(path: &Path) -> Result<usize> {
    let table = Table::read().map_err(|e| Error::io("read the table of mounts for", path, e))?;
    Ok(table.erofs_at(path))
}

/// Takes down what is mounted where no server has a layer. If there was a server that answered
/// for it, it is gone, and its guard too; so is whoever could have told whether what was read
/// of it since was right.
fn take_down_orphan(path: &Path) -> Result<()> {
    for _ in 0..ORPHANS_MAX {
        match sys::is_erofs(path) {
            Ok(false) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Ok(true) => {}
            // A FUSE whose server is gone, under an EROFS that is gone, too.
            Err(error) if error.kind() == ErrorKind::NotConnected => {}
            Err(error) => return Err(Error::io("inspect", path, error)),
        }
        tracing::warn!(path = %path.display(), "taking down a mount that no server answers for");
        sys::detach(path).map_err(|e| Error::mount("unmount", path, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_server_says_of_a_mount_makes_it_useless() {
        let (path, os) = (Path::new("/x"), std::io::Error::from_raw_os_error);
        for (errno, is_useless) in [(ENOENT, true), (ESTALE, true), (5, false), (24, false)] {
            let said = Unattached::of(Error::mount("answer for", path, os(errno)));
            assert_eq!(
                matches!(said, Unattached::Useless(_)),
                is_useless,
                "{said:?}"
            );
            let own = Unattached::of(Error::io("open", path, os(errno)));
            assert!(matches!(own, Unattached::NotNow(_)), "{own:?}");
        }
    }

    #[test]
    fn small_files_are_apart_where_the_server_has_them_apart() {
        let here = tempfile::tempdir().unwrap();
        let path = here.path();
        fs::write(path.join(DATA), b"").unwrap();
        let old = (Devices::One, vec![path.join(DATA)]);
        assert_eq!(
            shown_below(path).unwrap(),
            old,
            "a server of another version"
        );
        fs::write(path.join(SMALL), b"").unwrap();
        let both = vec![path.join(DATA), path.join(SMALL)];
        assert_eq!(shown_below(path).unwrap(), (Devices::SmallApart, both));
    }
}
