//! A whole layer on top of the data file that the server shows.
//!
//! ```text
//! <path>      EROFS: what everybody sees; names and attributes never leave the kernel
//!   below it  the server's FUSE: `data`, reached by EROFS alone
//! <metadata>  the image, a file on a local disk
//! ```
//!
//! Invariant: an image that is mounted is never written to ([`image`]). Where mounting
//! fails, nothing is left mounted. What a daemon that died left half way is finished by the
//! next one that attaches.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use lazarette_fetcher::types::Digest;

use super::{DATA, LentData, MountServer, Mounted, image};
use crate::fuse::{ReadAhead, mount_image};
use crate::tree::Tree;
use crate::{Error, Result, sys};

/// Where a layer goes.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The mountpoint, absolute, at most 250 bytes; made if absent.
    pub path: &'a Path,
    /// The file of the image, at most 255 bytes; on a disk, not in a tmpfs. Written here
    /// unless it is right.
    pub metadata: &'a Path,
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
        image::put(tree, place.metadata)?;
        let path = place.path.to_path_buf();
        fs::create_dir_all(&path).map_err(|e| Error::io("create", &path, e))?;
        let mount = self.mount(blob_digest, data, &path)?;
        let mounted = Mounted {
            mount,
            blob_digest: Some(blob_digest),
            path,
        };
        match cover(&mounted.path, place.metadata) {
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
    /// Those of [`Self::attach`] and [`Self::mount_layer`].
    pub fn attach_layer(
        &self,
        mounted: &Mounted,
        tree: impl FnOnce() -> Result<Tree>,
        data: Arc<dyn LentData>,
        metadata: &Path,
    ) -> Result<()> {
        self.attach(mounted, data)?;
        if is_covered(&mounted.path)? {
            return Ok(());
        }
        image::put(&tree()?, metadata)?;
        cover(&mounted.path, metadata)
    }

    /// Unmounts a layer that nothing uses any more, and removes its mountpoint.
    ///
    /// # Errors
    /// `Mount` with `EBUSY` while something in it is open; then it stays mounted.
    pub fn unmount_layer(&self, mounted: &Mounted) -> Result<()> {
        let path = &mounted.path;
        if is_covered(path)? {
            sys::unmount(path).map_err(|e| Error::mount("unmount", path, e))?;
        }
        self.unmount(mounted)?;
        match fs::remove_dir(path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io("remove", path, e)),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

/// Whether an EROFS is seen at `path`, which somebody may have removed.
fn is_covered(path: &Path) -> Result<bool> {
    match sys::is_erofs(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        is => is.map_err(|e| Error::io("inspect", path, e)),
    }
}

fn cover(path: &Path, metadata: &Path) -> Result<()> {
    let files = [metadata.to_path_buf(), path.join(DATA)];
    if let Some(knob) = mount_image(&files, path)? {
        knob.set(ReadAhead::Wide);
    }
    Ok(())
}
