//! A layer that is whole, and that the kernel reads by itself.
//!
//! Once every byte is on the disk and known to be right, an EROFS may be made of the data file
//! itself. Nobody is asked then what it reads, and nobody could be told: so no hole may be made
//! in the data file while there is such an EROFS, mounted anywhere, under an overlay, or in
//! nobody's tree any more. No process can be relied on to say that. The kernel can: it counts
//! who has a file open, and an EROFS has the image that it was made of open for as long as it
//! lives. So that image lies beside the data file and is used for nothing else:
//!
//! ```text
//! layers/<blob digest>/image    what every such EROFS of this layer was made of
//! ```
//!
//! Invariant: an EROFS over the data file itself is made, by whatever process, only of this
//! image and under the layer's lock, and only while all of the layer is recorded, and right as
//! far as this process has seen. Holes are made under the same lock, and only while nobody has
//! the image open. So it does not matter who died when, and after a boot nobody has it open.
//! What cannot be found out counts as open.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::{DATA, LayerFile};
use crate::index::ChunkId;
use crate::store::bitmap::Bitmap;
use crate::store::sys;
use crate::types::ByteRange;
use crate::{Error, Result};

/// Name of the image inside the layer's directory.
const IMAGE: &str = "image";

/// Of what an EROFS of a whole layer is made.
#[derive(Debug)]
pub struct Whole<'a> {
    /// Where its image belongs. There may be one; while somebody has that open it must stay
    /// what it is.
    pub image: &'a Path,
    /// Whether somebody has.
    pub is_open: bool,
    /// The data file, to be read only.
    pub data: &'a File,
}

impl LayerFile {
    /// Whether every byte is present and known to be right. Looks only at memory.
    pub fn is_known_whole(&self) -> bool {
        (0..self.bits.count()).all(|id| self.bits.get(id) && self.sound.get(id))
    }

    /// Whether every byte is present and right. Reads what this process has not seen, and
    /// blocks for that.
    pub fn is_whole(&self) -> Result<bool> {
        if !self.is_complete() {
            return Ok(false);
        }
        for id in 0..self.bits.count() {
            if self.is_known(id) {
                continue;
            }
            let chunk = self.chunk(id)?;
            let range = ByteRange::at(chunk.data_offset, chunk.len.into());
            // An eviction between two looks is learned of by the second.
            let vouched = range.map(|range| self.vouch(range)).transpose()?;
            if vouched.flatten().is_none() {
                return Ok(false);
            }
        }
        Ok(self.is_known_whole())
    }

    fn is_known(&self, id: ChunkId) -> bool {
        self.bits.get(id) && self.sound.get(id)
    }

    /// Has `make` make an EROFS of the data file itself, if the layer is known to be whole
    /// and is recorded; `None` if not. `make` puts the image where it belongs and returns
    /// what keeps the EROFS alive. Blocks on the device, and whoever evicts from this layer.
    ///
    /// # Errors
    /// Those of `make`. `Unsupported` where the kernel does not say who has the image open;
    /// what was made is dropped then.
    pub fn show_whole<T, E: From<Error>>(
        &self,
        make: impl FnOnce(Whole<'_>) -> Result<T, E>,
    ) -> Result<Option<T>, E> {
        let mut recorded = self.recorded.lock();
        if self.is_removed() {
            return Ok(None);
        }
        let Some(_lock) = self.lock_own()? else {
            return Ok(None);
        };
        self.catch_up(&mut recorded)?;
        // What is not recorded a device that failed to take it may have lost.
        let all = Bitmap::full(self.bits.count()).snapshot();
        if !self.is_known_whole() || recorded.stored.words != all {
            return Ok(None);
        }
        self.pad()?;
        let made = make(Whole {
            image: &self.image(),
            is_open: self.is_shown_whole()?,
            data: &self.lend()?.data,
        })?;
        if self.is_shown_whole()? {
            return Ok(Some(made));
        }
        let error = Error::Unsupported {
            what: format!("showing layer {} by the kernel alone", self.digest()),
            detail: "it does not count who has a file open".to_owned(),
        };
        Err(error.into())
    }

    /// Whether there is an EROFS over the data file itself; or somebody looks at its image in
    /// this moment.
    pub(in crate::store) fn is_shown_whole(&self) -> Result<bool> {
        let path = self.image();
        match File::open(&path) {
            Ok(image) => sys::is_open_elsewhere(&image).map_err(|e| Error::io("lock", path, e)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(Error::io("open", path, e)),
        }
    }

    /// Refuses to make holes under an EROFS. The caller holds the layer's lock.
    pub(super) fn must_not_be_shown_whole(&self) -> Result<()> {
        if !self.is_shown_whole()? {
            return Ok(());
        }
        Err(Error::Unsupported {
            what: format!("evicting from layer {} now", self.digest()),
            detail: "it is complete and mounted, and the kernel reads its data file by itself; \
                     remove the containers and images that use it"
                .to_owned(),
        })
    }

    /// Removes the image of a layer that is whole no more. The caller holds the layer's lock,
    /// and nobody has it open.
    pub(super) fn remove_image(&self) {
        match self.disk.remove_file(&self.image()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                // It only takes room.
                tracing::debug!(path = %self.dir.join(DATA).display(), %error, "an image stays");
            }
            Ok(()) | Err(_) => {}
        }
    }

    /// Whether the layer has an image that `is_right` says is not. It is removed, unless somebody
    /// has it open: that it is open says that no holes may be made.
    pub fn drop_wrong_image(&self, is_right: impl Fn(&Path) -> bool) -> Result<bool> {
        let path = self.image();
        if !path.exists() || is_right(&path) {
            return Ok(false);
        }
        let Some(_lock) = self.lock_own()? else {
            return Ok(false);
        };
        // Somebody may have been writing it.
        if !path.exists() || is_right(&path) {
            return Ok(false);
        }
        if !self.is_shown_whole()? {
            self.remove_image();
        }
        Ok(true)
    }

    fn image(&self) -> PathBuf {
        self.dir.join(IMAGE)
    }
}
