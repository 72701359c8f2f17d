//! Reading a table that is a blob of its own.
//!
//! Invariant: what comes out has the digest it was asked for by, and was never longer than
//! what its reader allows. Other bytes are laid to who sent them, and read once more.

use crate::codec::VerifiedBytes;
use crate::source::{BlobRef, BlobSource, read_verified};
use crate::{Error, Result};

/// All of `blob`, of at most `len_max` bytes.
pub(super) async fn read(
    source: &dyn BlobSource,
    blob: &BlobRef,
    len_max: u64,
) -> Result<VerifiedBytes> {
    let what = || format!("index {}", blob.digest);
    if blob.size > len_max {
        let detail = format!("{} bytes of at most {len_max}", blob.size);
        return Err(Error::limit(what(), detail));
    }
    read_verified(source, blob, what).await
}
