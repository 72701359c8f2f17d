//! Profiles that users carry from node to node in files.
//!
//! Invariant: a file is read as hostile input, and up to its limit only; what is in it is used
//! for the very image that it names or refused, saying why.

use std::path::Path;

use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::Reference;

use super::{Engine, is_of};
use crate::profile::ImageProfiles;
use crate::profile::document::DOCUMENT_BYTES_MAX;
use crate::{Error, Result};

impl Engine {
    /// Writes the profiles of a pulled image to `file`; what was written.
    pub async fn export_profiles(
        &self,
        reference: &Reference,
        file: &Path,
    ) -> Result<ImageProfiles> {
        let profiles = self.profiles(reference).await?;
        let mut text = serde_json::to_vec(&profiles).unwrap_or_default();
        text.push(b'\n');
        let (path, io) = (file.to_path_buf(), |e| {
            Error::io("write the profile to", file, e)
        });
        blocking(move || std::fs::write(path, text))
            .await
            .map_err(io)?;
        Ok(profiles)
    }

    /// Adds the profiles in `file`, which must be of this very image. Commands that have a
    /// profile here learn from it as from one more start.
    pub async fn import_profiles(
        &self,
        reference: &Reference,
        file: &Path,
    ) -> Result<ImageProfiles> {
        let text = read_bounded(file).await?;
        let what = format!("profile {}", file.display());
        let theirs = ImageProfiles::parse(&what, &text)?;
        let image = self.image(reference).await?;
        if !is_of(&theirs, &image) {
            return Err(Error::Refused {
                what: format!("{what} is of another image, {}", theirs.manifest),
                todo: format!(
                    "{reference} is {}; import it for the image it was exported from",
                    image.manifest.digest
                ),
            });
        }
        self.learn_from(&image, theirs).await
    }
}

/// The file's bytes, up to one more than a profile may have.
async fn read_bounded(file: &Path) -> Result<Vec<u8>> {
    let (path, io) = (file.to_path_buf(), |e| Error::io("read", file, e));
    let read = move || {
        use std::io::Read as _;
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path)?;
        file.take(DOCUMENT_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    blocking(read).await.map_err(io)
}
