//! EROFS over FUSE: the layer's image, mounted over the file system that holds it.
//!
//! ```text
//! <mountpoint>    EROFS: what everybody sees; names and attributes never leave the kernel
//!   below it      FUSE ("device"): `metadata` and `data`, reached by EROFS alone
//! ```
//!
//! Both lie on one mountpoint, so what takes it down takes one after the other. Invariant:
//! where this fails, nothing is left mounted and nothing of the mountpoint is left.

use std::fs::{self, File};
use std::iter;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::FuseOptions;
use super::device::{DATA, DataLen, DeviceFs, METADATA};
use super::read_ahead::{Knob, ReadAhead, watch_erofs};
use super::reader::Reader;
use super::session::{self, Threads};
use crate::erofs::{Image, Unfit};
use crate::sys::FsContext;
use crate::tree::Tree;
use crate::{Error, Result, sys};

/// File systems on one mountpoint.
pub(super) const MOUNTS: usize = 2;

/// Times an EROFS is made until it is clear which one is ours.
const CREATIONS_MAX: usize = 4;

/// Bytes of the image that the kernel is told to read at a time.
const PIECE: usize = 256 << 10;

/// An image, and how long the data file is.
pub(super) type ImageBytes = (Box<[u8]>, DataLen);

/// A mounted image.
pub(super) struct Stack {
    pub(super) threads: Threads,
    /// What sets the read-ahead, if it could be told which one it is.
    pub(super) knob: Option<Knob>,
}

/// The image of `tree` as bytes, and what its data file is to look like.
pub(super) fn image(tree: &Tree) -> Result<ImageBytes, Unfit> {
    let image = Image::of(tree)?;
    let len = DataLen {
        layer: tree.data_len(),
        device: image.device_len(),
    };
    let mut bytes = Vec::with_capacity(usize::try_from(image.image_len()).unwrap_or(0));
    image
        .write_to(&mut bytes)
        .expect("memory takes what is written to it, and the plan counted every byte");
    Ok((bytes.into(), len))
}

/// Mounts an image at `path`, an empty directory that is removed again where that fails.
pub(super) fn mount(
    (metadata, len): ImageBytes,
    reader: Reader,
    path: &Path,
    options: FuseOptions,
) -> Result<Stack> {
    let device = DeviceFs::new(metadata, len, reader);
    let threads = session::mount(device, path, options)?;
    match mount_over(path) {
        Ok(knob) => Ok(Stack { threads, knob }),
        Err(error) => {
            // What is in use yet ends by itself.
            let _ = sys::detach(path);
            let _ = fs::remove_dir(path);
            Err(error)
        }
    }
}

fn mount_over(path: &Path) -> Result<Option<Knob>> {
    // How far is read at a time, of the image only: data is read as EROFS asks for it.
    if let Some(knob) = Knob::of_fuse(path) {
        knob.set(ReadAhead::Wide);
    }
    let files = [METADATA, DATA].map(|name| path.join(name));
    read_early(&files[0]);
    mount_image(&files, path)
}

/// Mounts the EROFS of `files`, an image and its devices, over the directory `path`.
pub(crate) fn mount_image(files: &[PathBuf], path: &Path) -> Result<Option<Knob>> {
    let (mount, knob) = make_image(files, path)?;
    sys::attach(&mount, path).map_err(|source| Error::mount("mount erofs at", path, source))?;
    Ok(knob)
}

/// Makes the EROFS of `files`, an image and its devices, that will be mounted at `path`; and
/// what sets its read-ahead, if it could be told which one it is.
pub(crate) fn make_image(files: &[PathBuf], path: &Path) -> Result<(OwnedFd, Option<Knob>)> {
    let (mut mount, mut knobs) = watch_erofs(|| create(files, path))?;
    for _ in 1..CREATIONS_MAX {
        if knobs.len() <= 1 {
            break;
        }
        (mount, knobs) = watch_erofs(|| create(files, path))?;
    }
    // Nobody's is changed where it is not clear whose it is.
    let only = knobs.pop();
    Ok((mount, if knobs.is_empty() { only } else { None }))
}

/// Makes the file system of `files`, an image and its devices, that will be mounted at `path`.
pub(crate) fn create(files: &[PathBuf], path: &Path) -> Result<OwnedFd> {
    let fail = |detail: String| {
        move |source| Error::Mount {
            op: "make an erofs for",
            path: path.to_path_buf(),
            detail,
            source,
        }
    };
    let context = FsContext::open("erofs").map_err(fail(String::new()))?;
    let keys = iter::once("source").chain(iter::repeat("device"));
    for (key, file) in keys.zip(files) {
        let set = context.set(key, file);
        set.map_err(fail(format!("as its {key}, {}", file.display())))?;
    }
    context
        .create(true)
        .map_err(|source| fail(context.log())(source))
}

/// Has the kernel read the image in large pieces, in the background; it would ask for each
/// block alone when it needs one. Without it all works the same.
fn read_early(metadata: &Path) {
    let read = || {
        let file = File::open(metadata)?;
        let len = file.metadata()?.len();
        for at in (0..len).step_by(PIECE) {
            sys::read_early(&file, at, PIECE as u64)?;
        }
        Ok::<_, std::io::Error>(())
    };
    if let Err(error) = read() {
        tracing::debug!(path = %metadata.display(), %error, "image is read block by block");
    }
}
