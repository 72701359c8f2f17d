//! The image of a layer, as a file that an EROFS is mounted from.
//!
//! Invariant: a file is used only if it is, byte for byte, what would be written now; so it
//! does not matter what a crash or a disk made of an older one, and nothing waits for the
//! disk. A file that is there is never written to: a new one takes its name.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;

use lazarette_fetcher::index::LayerIndex;

use crate::erofs::{Devices, Image};
use crate::tree::Tree;
use crate::{Error, Result};

/// Bytes compared or written at a time.
const PIECE_BYTES: usize = 64 << 10;
/// What a file is called until it is whole.
const NEW: &str = ".new";

/// What is done where an image does not fit.
const OP: &str = "mount a layer through erofs";

/// Sees to it that `to` is the image of `tree`. Makes the directory that it lies in.
pub(super) fn put(tree: &Tree, devices: Devices, to: &Path) -> Result<()> {
    let image = of(tree)?.for_devices(devices);
    if is_there(&image, to) {
        return Ok(());
    }
    if let Some(dir) = to.parent() {
        fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, e))?;
    }
    let mut new = to.as_os_str().to_owned();
    new.push(NEW);
    let new = Path::new(&new);
    let write = || {
        let mut out = BufWriter::with_capacity(PIECE_BYTES, File::create(new)?);
        image.write_to(&mut out)?;
        out.flush()?;
        fs::rename(new, to)
    };
    write().map_err(|e| Error::io("write", to, e))
}

/// Whether `path` is the image of the layer of `index`, through however many files it is read.
pub fn is_image_of(index: &LayerIndex, path: &Path) -> Result<bool> {
    let tree = Tree::build(index)?;
    for devices in [Devices::One, Devices::SmallApart] {
        if is_there(&of(&tree)?.for_devices(devices), path) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Fails where `path` is not the image of `tree`.
pub(super) fn must_be(tree: &Tree, path: &Path) -> Result<()> {
    if is_there(&of(tree)?, path) {
        return Ok(());
    }
    let detail = format!("{} is another one, and in use", path.display());
    Err(Error::Environment { op: OP, detail })
}

fn of(tree: &Tree) -> Result<Image<'_>> {
    Image::of(tree).map_err(|unfit| Error::Environment {
        op: OP,
        detail: unfit.to_string(),
    })
}

/// Whether `path` holds the image and nothing else. What cannot be read is not it.
fn is_there(image: &Image<'_>, path: &Path) -> bool {
    let compare = || {
        let file = File::open(path)?;
        if file.metadata()?.len() != image.image_len() {
            return Ok(false);
        }
        let mut same = Same {
            file: BufReader::with_capacity(PIECE_BYTES, file),
            piece: Vec::new(),
        };
        image.write_to(&mut same).map(|()| true)
    };
    compare().unwrap_or_else(|error: io::Error| {
        tracing::debug!(path = %path.display(), %error, "the image is written anew");
        false
    })
}

/// Takes the bytes that a file holds, and fails at the first other one.
struct Same<R> {
    file: R,
    piece: Vec<u8>,
}

impl<R: Read> Write for Same<R> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.piece.resize(bytes.len(), 0);
        self.file.read_exact(&mut self.piece)?;
        if self.piece == bytes {
            return Ok(bytes.len());
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "it is another"))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::test_util::LayerBuilder;

    #[test]
    fn it_is_written_once_and_again_only_where_it_is_not_the_same() {
        let here = tempfile::tempdir().unwrap();
        let path = here.path().join("meta/layer.erofs");
        let tree = |name: &str| {
            let mut layer = LayerBuilder::new("layer");
            layer.dir("a");
            layer.file(name, b"content");
            layer.tree()
        };
        let first = tree("a/b");
        put(&first, Devices::One, &path).unwrap();
        let right = fs::read(&path).unwrap();
        let number = || fs::metadata(&path).unwrap().ino();
        let whose = number();
        put(&first, Devices::One, &path).unwrap();
        assert_eq!(number(), whose, "it was right, and is what it was");
        let mut damaged = [right.clone(), right.clone(), right.clone(), Vec::new()];
        *damaged[0].last_mut().unwrap() ^= 1;
        damaged[1].pop();
        damaged[2].push(0);
        for wrong in damaged {
            let held = File::open(&path).unwrap();
            fs::write(here.path().join("wrong"), &wrong).unwrap();
            fs::rename(here.path().join("wrong"), &path).unwrap();
            put(&first, Devices::One, &path).unwrap();
            assert_eq!(fs::read(&path).unwrap(), right);
            let mut before = Vec::new();
            (&held).read_to_end(&mut before).unwrap();
            assert_eq!(before, right, "who has an older one goes on with that");
        }
        // As a crash leaves it.
        fs::write(here.path().join("meta/layer.erofs.new"), b"half").unwrap();
        let second = tree("a/c");
        put(&second, Devices::SmallApart, &path).unwrap();
        assert_ne!(fs::read(&path).unwrap(), right);
        assert_eq!(fs::read_dir(here.path().join("meta")).unwrap().count(), 1);
    }

    #[test]
    fn what_is_its_image_is_told_whichever_way_it_is_mounted() {
        let here = tempfile::tempdir().unwrap();
        let path = here.path().join("layer.erofs");
        let index = |content: &[u8]| {
            let mut layer = LayerBuilder::new("layer");
            layer.file("a", content);
            layer.index()
        };
        let (right, other) = (index(b"content"), index(b"contents"));
        assert!(!is_image_of(&right, &path).unwrap(), "there is none");
        for devices in [Devices::One, Devices::SmallApart] {
            put(&Tree::build(&right).unwrap(), devices, &path).unwrap();
            assert!(is_image_of(&right, &path).unwrap());
            assert!(!is_image_of(&other, &path).unwrap());
        }
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(!is_image_of(&right, &path).unwrap());
    }
}
