//! What is learned of members that are verified whole, and members themselves.

use std::cell::OnceCell;
use std::sync::Arc;

use lazarette_fetcher::codec::deflate::MemberCompressor;
use lazarette_fetcher::codec::member;
use lazarette_fetcher::codec::pieces::Pieces;
use lazarette_fetcher::index::{ChunkId, Encoding, LayerIndex, estargz};
use lazarette_fetcher::store::{LayerFile, Store};
use lazarette_fetcher::test_util::content::noise;
use lazarette_fetcher::test_util::layers::layer_of;
use lazarette_fetcher::types::{ByteRange, Digest};

/// Pieces of the layer's member.
const HOT: [ChunkId; 2] = [2, 4];

/// Encoded bytes of a member: nothing comes out of them but what is promised.
pub(crate) fn fuzz_member(data: &[u8]) {
    let (lens, encoded) = data.split_at_checked(3).unwrap_or((data, &[]));
    let lens: Vec<u32> = lens.iter().map(|len| u32::from(*len) * 97).collect();
    let all: u64 = lens.iter().map(|len| u64::from(*len)).sum();
    // Whatever they decode to is what is promised, once that is known.
    let mut decoded = Vec::new();
    if let Ok(mut pieces) = Pieces::gzip(encoded)
        && let Ok(len) = u32::try_from(all)
        && let Ok(bytes) = pieces.take(0, len)
    {
        decoded = bytes.to_vec();
    }
    let Digest::Sha256(digest) = Digest::sha256(&decoded) else {
        unreachable!("it is made with SHA-256");
    };
    let Ok(found) = member::pieces(String::new, &digest, encoded, lens.iter().copied()) else {
        return;
    };
    let bytes: Vec<u8> = found.iter().flat_map(|p| p.bytes.iter().copied()).collect();
    assert!(bytes == decoded || decoded.is_empty());
    for piece in &found {
        assert!(piece.encoded_end <= encoded.len() as u64);
        assert_eq!(Digest::sha256(&piece.bytes), Digest::Sha256(piece.digest));
    }
}

/// The file of a layer that says where decoding of pieces can begin, whatever the disk made of
/// it: each piece decodes to right bytes with the index that is shaped by it, or to an error.
pub(crate) fn fuzz_entries(data: &[u8]) {
    thread_local! {
        static LAYER: OnceCell<OneMember> = const { OnceCell::new() };
    }
    LAYER.with(|layer| {
        let layer = layer.get_or_init(OneMember::new);
        layer.check(data);
        let mut over = layer.entries.clone();
        over.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        layer.check(&over);
    });
}

/// What [`fuzz_entries`] is right about.
pub(crate) fn entries_of_a_member() -> Vec<u8> {
    OneMember::new().entries
}

/// A member that is right, with the lengths that [`fuzz_member`] takes first.
pub(crate) fn a_member() -> Vec<u8> {
    let plain = noise(4, 0x0f, 97 * 350);
    let mut seed = vec![100, 200, 50];
    seed.extend(MemberCompressor::new(6).compress(&plain));
    seed
}

/// A store with a layer of one member, all of it present.
struct OneMember {
    store: Arc<Store>,
    dir: tempfile::TempDir,
    digest: Digest,
    blob: Vec<u8>,
    payload: Vec<u8>,
    index: Vec<u8>,
    entries: Vec<u8>,
}

impl OneMember {
    fn new() -> Self {
        let payload = noise(2, 0x7f, 320 << 10);
        let blob = MemberCompressor::new(6).compress(&payload);
        let mut whole: LayerIndex = layer_of("a layer", std::slice::from_ref(&payload));
        whole.blob_size = 50 * blob.len() as u64;
        for chunk in &mut whole.chunks {
            let blob = ByteRange::at(0, blob.len() as u64).expect("it is short");
            chunk.encoding = Encoding::GzipMember { blob, skip: 0 };
        }
        let (index, details) = estargz::cut(whole).expect("a right index");
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path()).expect("an empty store");
        let file = store.create_layer_with(index, &details);
        let file = file.expect("a new layer");
        let put = file.put_member(0, &blob, |_, _| ());
        assert!(put.expect("a right member"));
        file.flush().expect("room on the disk");
        let digest = *file.digest();
        drop(file);
        let mut made = Self {
            store,
            dir,
            digest,
            blob,
            payload,
            index: Vec::new(),
            entries: Vec::new(),
        };
        made.index = std::fs::read(made.path("index")).expect("an index");
        made.entries = std::fs::read(made.path("entries")).expect("a layer with members");
        made
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        let layers = self.dir.path().join("layers");
        layers.join(self.digest.file_name()).join(name)
    }

    fn open(&self) -> Arc<LayerFile> {
        let file = self.store.open_layer(&self.digest);
        file.expect("a right index").expect("the layer is there")
    }

    fn check(&self, entries: &[u8]) {
        std::fs::write(self.path("entries"), entries).expect("a file");
        // What is shaped is checked before it replaces anything.
        let shaped = self.open().shape(&HOT);
        let file = self.open();
        assert_eq!(
            shaped.is_ok_and(|s| s.is_some()),
            !file.index().has_whole_members()
        );
        if entries.get(..self.entries.len()) == Some(&self.entries) {
            assert!(!file.index().has_whole_members());
        }
        for (id, chunk) in (0..).zip(&file.index().chunks) {
            let Encoding::GzipSpan { blob, skip, span } = chunk.encoding else {
                continue;
            };
            let details = file.span_details(span).expect("they were checked");
            let bits = file.index().spans.get(span as usize).map_or(0, |s| s.bits);
            let encoded = self.blob.get(place(blob.start())..place(blob.end()));
            let encoded = encoded.expect("it was checked");
            let at = place(chunk.data_offset);
            let right = self.payload.get(at..at + chunk.len as usize);
            assert_eq!(
                file.chunk_digest(id).ok().map(Digest::Sha256),
                right.map(Digest::sha256)
            );
            let pieces = Pieces::span(encoded, bits, &details.window);
            if let Ok(bytes) = pieces.and_then(|mut pieces| pieces.take(skip, chunk.len)) {
                assert_eq!(bytes.len(), chunk.len as usize);
            }
        }
        std::fs::write(self.path("index"), &self.index).expect("a file");
        // There is none where nothing was shaped.
        let _ = std::fs::remove_file(self.path("index.plain"));
    }
}

fn place(at: u64) -> usize {
    usize::try_from(at).expect("it was checked")
}
