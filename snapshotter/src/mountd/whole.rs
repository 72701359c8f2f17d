//! A layer that is all there, shown by the kernel alone.
//!
//! ```text
//! <path>       EROFS over the data file itself: nothing of ours takes part in what is read
//!   below it   the EROFS whose data the server stands for; who had it before goes on with it
//! <layer>/image    what the upper one is made of; see `lazarette_fetcher::store::Whole`
//! ```
//!
//! Invariant: mounted only over what a server shows at the same place, and only while the store
//! says that the layer is whole; the store keeps everybody from making holes under it for as
//! long as it lives, whoever dies. Where anything of that cannot be had, what is below stays to
//! be seen, and is as right.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use lazarette_fetcher::store::{LayerFile, Whole};

use super::layer::covers;
use super::{Mounted, image};
use crate::erofs::Devices;
use crate::fuse::{Knob, ReadAhead, make_image};
use crate::tree::Tree;
use crate::{Error, Result, sys};

/// EROFS on the mountpoint of a layer whose upper one is over the data file itself.
const BOTH: usize = 2;

/// Has everybody who comes from now on see a layer by the kernel alone; `false` if it is not
/// known to be whole (see [`LayerFile::is_whole`]). Nobody else mounts or unmounts anything at
/// `mounted.path` meanwhile. Takes milliseconds and blocks for them.
///
/// # Errors
/// `Mount` when the kernel refuses; `Environment` while another version's image is in use. What
/// was to be seen before is to be seen still.
pub fn show_whole(mounted: &Mounted, layer: &LayerFile) -> Result<bool> {
    let path = mounted.path.as_path();
    if is_shown_whole(mounted)? {
        return Ok(true);
    }
    if !layer.is_known_whole() {
        return Ok(false);
    }
    let tree = Tree::build(layer.index())?;
    let made = layer.show_whole(|whole| make(&tree, &whole, path))?;
    let Some((erofs, knob)) = made else {
        return Ok(false);
    };
    sys::attach(&erofs, path).map_err(|e| Error::mount("mount erofs at", path, e))?;
    if let Some(knob) = knob {
        knob.set(ReadAhead::Wide);
    }
    Ok(true)
}

/// Has everybody who comes from now on see a layer through the server again, so that its data
/// can be evicted once nobody has it in use; `false` if that is how it is seen. The same holds of
/// others as for [`show_whole`].
///
/// # Errors
/// `Mount` with `EBUSY` while something in it is open.
pub fn hide_whole(mounted: &Mounted) -> Result<bool> {
    let path = mounted.path.as_path();
    if !is_shown_whole(mounted)? {
        return Ok(false);
    }
    sys::unmount(path).map_err(|e| Error::mount("unmount", path, e))?;
    Ok(true)
}

/// Whether who comes now sees a layer by the kernel alone.
pub fn is_shown_whole(mounted: &Mounted) -> Result<bool> {
    Ok(covers(&mounted.path)? >= BOTH)
}

fn make(tree: &Tree, whole: &Whole<'_>, path: &Path) -> Result<(OwnedFd, Option<Knob>)> {
    if whole.is_open {
        image::must_be(tree, whole.image)?;
    } else {
        image::put(tree, Devices::One, whole.image)?;
    }
    // By their descriptors, as the kernel takes no long names. They are closed when this
    // returns, and the EROFS has files of its own.
    let image = File::open(whole.image).map_err(|e| Error::io("open", whole.image, e))?;
    let files = [image.as_fd(), whole.data.as_fd()].map(sys::path_of);
    make_image(&files, path)
}
