//! Profiles in the database.
//!
//! Invariant: one entry per manifest holds the profiles of all its commands, so that one
//! write replaces them together. Entries stay when an image is removed: they are small,
//! and the next pull of it starts well.

use lazarette_fetcher::db::Table;
use lazarette_fetcher::types::Digest;

use super::document::ImageProfiles;

/// Profiles by manifest digest.
pub struct ProfileTable;

impl Table for ProfileTable {
    const NAME: &'static str = "profiles";
    type Key = Digest;
    type Value = ImageProfiles;
}
