//! From what a start read to the files that a converter puts first.
//!
//! Invariant: pure but for reading the layers' tables; places that no file covers mean
//! nothing.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use lazarette_fetcher::index::write::{HotFile, HotFiles};
use lazarette_fetcher::index::{FileEntry, FileKind, LayerIndex};
use lazarette_fetcher::store::Store;
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::{ByteRange, Reference};

use super::Engine;
use crate::Result;
use crate::profile::{CommandProfile, ImageProfiles};

impl Engine {
    /// What the last recorded start of `reference` read, as files and ranges of them in the
    /// order of first access.
    pub async fn hot_files(&self, reference: &Reference) -> Result<HotFiles> {
        let profiles = self.profiles(reference).await?;
        let store = Arc::clone(&self.store);
        blocking(move || hot_files(&profiles, &store)).await
    }
}

fn hot_files(profiles: &ImageProfiles, store: &Store) -> Result<HotFiles> {
    let latest = profiles
        .commands
        .iter()
        .max_by_key(|profile| profile.updated_at);
    let mut indexes: Vec<Option<Arc<LayerIndex>>> = Vec::new();
    for digest in &profiles.layers {
        let file = store.open_layer(digest)?;
        indexes.push(file.map(|file| Arc::clone(file.index())));
    }
    Ok(latest.map_or_else(HotFiles::default, |profile| by_file(profile, &indexes)))
}

/// The places of a profile, by the file they are in.
fn by_file(profile: &CommandProfile, indexes: &[Option<Arc<LayerIndex>>]) -> HotFiles {
    let mut files: Vec<HotFile> = Vec::new();
    let mut known: HashMap<String, usize> = HashMap::new();
    for block in &profile.blocks {
        let index = usize::try_from(block.layer)
            .ok()
            .and_then(|at| indexes.get(at));
        let Some(Some(index)) = index else {
            continue;
        };
        for wanted in block.place.ranges() {
            for (path, range) in touched(index, wanted) {
                match known.entry(path) {
                    Entry::Occupied(at) => {
                        if let Some(file) = files.get_mut(*at.get()) {
                            file.ranges.push(range);
                        }
                    }
                    Entry::Vacant(free) => {
                        let path = free.key().clone();
                        free.insert(files.len());
                        let ranges = vec![range];
                        files.push(HotFile { path, ranges });
                    }
                }
            }
        }
    }
    HotFiles { files }
}

/// Files that share bytes with `wanted` of the data file, and which of their own bytes.
fn touched(index: &LayerIndex, wanted: ByteRange) -> Vec<(String, ByteRange)> {
    let files = index
        .files
        .iter()
        .filter_map(|file| place(file).map(|place| (file, place)));
    let shared = files.filter_map(|(file, place)| {
        let start = place.start().max(wanted.start());
        let end = place.end().min(wanted.end());
        let range = ByteRange::new(
            start.checked_sub(place.start())?,
            end.checked_sub(place.start())?,
        )?;
        let path = String::from_utf8(file.path.clone()).ok()?;
        (!range.is_empty()).then_some((path, range))
    });
    shared.collect()
}

/// Where a file's bytes are in the data file.
fn place(file: &FileEntry) -> Option<ByteRange> {
    match file.kind {
        FileKind::Regular { size, data_offset } if size > 0 => ByteRange::at(data_offset, size),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use lazarette_fetcher::index::{Chunk, Encoding};
    use lazarette_fetcher::index::{LayerBlob, LayerFormat, Timestamp};
    use lazarette_fetcher::prefetch::Place;
    use lazarette_fetcher::types::Digest;

    use super::*;
    use crate::profile::Block;

    fn index(sizes: &[u32]) -> Arc<LayerIndex> {
        let (mut files, mut chunks, mut at) = (Vec::new(), Vec::new(), 0_u64);
        for (number, size) in sizes.iter().enumerate() {
            files.push(FileEntry {
                path: format!("f{number}").into_bytes(),
                kind: FileKind::Regular {
                    size: u64::from(*size),
                    data_offset: at,
                },
                mode: 0o644,
                uid: 0,
                gid: 0,
                mtime: Timestamp::default(),
                xattrs: Vec::new(),
            });
            chunks.push(Chunk {
                encoding: Encoding::Stream,
                data_offset: at,
                len: *size,
                chunk_digest: Some([0; 32]),
            });
            at = (at + u64::from(*size)).next_multiple_of(4096);
        }
        let blob = LayerBlob {
            digest: Digest::sha256(b"layer"),
            size: 1,
            format: LayerFormat::Tar,
        };
        Arc::new(LayerIndex::new(blob, files, chunks).unwrap())
    }

    #[test]
    fn places_become_ranges_of_files_in_order() {
        let block = |layer, block, pages| Block {
            layer,
            place: Place { block, pages },
            seen: 1,
            born: 1,
        };
        let profile = CommandProfile {
            command: Digest::sha256(b"x"),
            program: "x".to_owned(),
            runs: 1,
            updated_at: 1,
            // The third file first, then the first two; a layer and a block that are not there.
            blocks: vec![
                block(0, 0, 0b100),
                block(0, 0, 0b11),
                block(0, 1, 1),
                block(7, 0, 1),
                block(0, 900, 1),
            ],
        };
        let hot = by_file(&profile, &[Some(index(&[100, 4096, 100_000])), None]);
        let found: Vec<_> = (hot.files.iter())
            .map(|file| {
                let ranges = file.ranges.iter().map(|range| (range.start(), range.end()));
                (file.path.as_str(), ranges.collect::<Vec<_>>())
            })
            .collect();
        assert_eq!(
            found,
            [
                ("f2", vec![(0, 4096), (57_344, 61_440)]),
                ("f0", vec![(0, 100)]),
                ("f1", vec![(0, 4096)]),
            ]
        );
    }
}
