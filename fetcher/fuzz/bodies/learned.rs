//! Digests that were learned of a layer, and what a store makes of wrong ones.

use std::cell::OnceCell;
use std::io::Read as _;

use lazarette_fetcher::codec;
use lazarette_fetcher::codec::unpack::decoder;
use lazarette_fetcher::index::ChunkId;
use lazarette_fetcher::store::Store;
use lazarette_fetcher::types::Digest;

use super::formats::read_ztoc;

/// Digests that were learned of a layer that is here in full, whatever the disk made of
/// them: chunks are absent whose digests are not what they were, and no others.
pub(crate) fn fuzz_learned(data: &[u8]) {
    thread_local! {
        static LAYER: OnceCell<LearnedLayer> = const { OnceCell::new() };
    }
    LAYER.with(|layer| {
        let layer = layer.get_or_init(LearnedLayer::new);
        layer.check(data);
        let mut over = layer.learned.clone();
        over.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        layer.check(&over);
    });
}

/// What [`fuzz_learned`] is right about.
pub(crate) fn learned_digests() -> Vec<u8> {
    LearnedLayer::new().learned
}

/// A store with a layer whose spans are verified whole, all of it present.
struct LearnedLayer {
    store: std::sync::Arc<Store>,
    dir: tempfile::TempDir,
    digest: Digest,
    learned: Vec<u8>,
}

impl LearnedLayer {
    const ZTOC: &[u8] = include_bytes!("../../tests/fixtures/soci/tar.ztoc.gz");
    const BLOB_SIZE: u64 = 458_240;

    fn new() -> Self {
        let mut input = Self::BLOB_SIZE.to_le_bytes().to_vec();
        decoder(Self::ZTOC)
            .and_then(|mut ztoc| ztoc.read_to_end(&mut input))
            .expect("a fixture");
        let ztoc = read_ztoc(&input).expect("a right zTOC");
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path()).expect("an empty store");
        let file = store.create_layer_with(ztoc.index, &ztoc.details);
        let file = file.expect("a new layer");
        for (id, chunk) in (0..).zip(&file.index().chunks) {
            let bytes = Self::bytes(id, chunk.len);
            let verified = codec::verify(String::new, &Digest::sha256(&bytes), bytes);
            file.put(id, &verified.expect("its own digest"))
                .expect("room on the disk");
        }
        file.flush().expect("room on the disk");
        let digest = *file.digest();
        drop(file);
        let mut made = Self {
            store,
            dir,
            digest,
            learned: Vec::new(),
        };
        made.learned = std::fs::read(made.path()).expect("spans that are verified whole");
        made
    }

    fn bytes(id: ChunkId, len: u32) -> Vec<u8> {
        vec![id.to_le_bytes()[0]; len as usize]
    }

    fn path(&self) -> std::path::PathBuf {
        let layer = self.dir.path().join("layers").join(self.digest.file_name());
        layer.join("learned")
    }

    fn check(&self, learned: &[u8]) {
        std::fs::write(self.path(), learned).expect("a file");
        let Ok(opened) = self.store.open_layer(&self.digest) else {
            assert_ne!(learned.len(), self.learned.len());
            return;
        };
        let file = opened.expect("the layer is there");
        let entries = learned.chunks(32).zip(self.learned.chunks(32));
        for ((id, chunk), (now, then)) in (0..).zip(&file.index().chunks).zip(entries) {
            let mut read = vec![0; chunk.len as usize];
            let is_here = file.read_at(chunk.data_offset, &mut read);
            assert_eq!(is_here.expect("a file"), now == then);
            assert!(now != then || read == Self::bytes(id, chunk.len));
        }
    }
}
