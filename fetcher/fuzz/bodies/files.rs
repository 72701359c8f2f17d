//! Files of our own, whatever a disk or another node made of them, and files that a node's
//! administrator writes.

use std::time::{Duration, SystemTime};

use lazarette_fetcher::codec::Packer;
use lazarette_fetcher::elf::Program;
use lazarette_fetcher::index::seams::{Seam, Seams};
use lazarette_fetcher::index::wire;
use lazarette_fetcher::layer::open::{core_bytes, core_digest};
use lazarette_fetcher::store::PIN_TIME;
use lazarette_fetcher::test_util::parsers;
use lazarette_fetcher::types::Digest;

/// A registry's `hosts.toml`. An error names the file.
pub(crate) fn fuzz_hosts(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    for is_plain in [false, true] {
        match parsers::hosts(&text, is_plain) {
            Ok(hosts) => assert!((1..=17).contains(&hosts)),
            Err(error) => assert!(error.to_string().starts_with("/d/hosts.toml "), "{error}"),
        }
    }
}

/// Our own index file, with and without a right checksum: [`wire::decode`].
pub(crate) fn fuzz_wire(data: &[u8]) {
    check_wire(data);
    check_wire(&sealed_index(data));
}

/// An index file with these tables and no details.
fn sealed_index(tables: &[u8]) -> Vec<u8> {
    sealed(b"LAZINDEX\x03\0\0\0", tables)
}

/// A file of ours that begins with `head`, its tables packed and its checksum right.
fn sealed(head: &[u8], tables: &[u8]) -> Vec<u8> {
    let packed = Packer::new()
        .and_then(|mut packer| packer.pack(tables))
        .expect("memory");
    let mut sealed = head.to_vec();
    sealed.extend_from_slice(&crc32fast::hash(&packed).to_le_bytes());
    for len in [packed.len(), tables.len(), 0] {
        sealed.extend_from_slice(&(len as u64).to_le_bytes());
    }
    sealed.extend_from_slice(&packed);
    sealed
}

fn check_wire(bytes: &[u8]) {
    if let Ok(index) = wire::decode(bytes) {
        let len = index.spans.last().map_or(0, |span| span.details.end());
        let details = vec![0; usize::try_from(len).expect("64 bits")];
        let again = wire::encode(&index, &details).expect("memory");
        assert_eq!(wire::decode(&again).expect("what was encoded"), index);
    }
}

/// An index beside an image, of which only the first bytes are read: [`core_digest`],
/// [`core_bytes`], [`wire::decode_core`]. What is signed is what is decoded.
pub(crate) fn fuzz_offered(data: &[u8]) {
    check_offered(data);
    check_offered(&sealed_index(data));
}

fn check_offered(bytes: &[u8]) {
    let Ok(len) = core_bytes(bytes) else {
        assert!(core_digest(bytes).is_err());
        return;
    };
    let len = usize::try_from(len).expect("it is in memory");
    let (head, before) = (&bytes[..len], &bytes[..len - 1]);
    assert!(core_bytes(before).is_err(), "it is cut off");
    let digest = core_digest(bytes).expect("what has a length");
    assert_eq!(
        digest,
        Digest::sha256(head),
        "what is behind it is not signed"
    );
    let header = wire::Header::parse(head).expect("what has a length");
    let core = wire::decode_core(&header, &head[wire::HEADER_LEN..]);
    match wire::decode(bytes) {
        Ok(whole) => assert_eq!(core.expect("a part of the whole"), whole),
        // Details may have come short.
        Err(_) => drop(core),
    }
}

/// The table of chunks, with and without a right header: [`parsers::Chunks`].
pub(crate) fn fuzz_chunks(data: &[u8]) {
    thread_local! {
        static DIR: tempfile::TempDir = tempfile::tempdir().expect("a directory");
    }
    // Two buckets.
    let mut table = b"LAZCHNKS\x01\0\0\0\x02\0\0\0".to_vec();
    table.resize(4096, 0);
    table.extend(data.iter().copied().chain(std::iter::repeat(0)).take(256));
    DIR.with(|dir| {
        for file in [data, &table] {
            std::fs::write(dir.path().join("chunks"), file).expect("a file");
            let chunks = parsers::Chunks::open(dir.path());
            // Their numbers of buckets and their tags are small numbers, too.
            for first in 0..4_u8 {
                let mut digest = [0; 32];
                (digest[0], digest[8]) = (first, first);
                let place = (7, 4096);
                assert!(chunks.find(&digest).len() <= 8);
                chunks.note(&digest, place);
                assert!(chunks.find(&digest).contains(&place));
                chunks.forget(&digest, place);
                assert!(!chunks.find(&digest).contains(&place));
            }
        }
    });
}

/// What start-ups pinned: [`parsers::pinned`].
pub(crate) fn fuzz_pinned(data: &[u8]) {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    for extents in [data.len() / 4, 0, 9] {
        let pinned = parsers::pinned(data, extents, now);
        assert!(pinned.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(pinned.iter().all(|extent| (*extent as usize) < extents));
        assert!(pinned.is_empty() || data.len() / 4 == extents);
        // Nothing holds for longer than it may.
        let later = now + PIN_TIME + Duration::from_secs(3600);
        let both = parsers::pinned(data, extents, later);
        assert!(both.iter().all(|extent| !pinned.contains(extent)));
    }
}

/// Where an index is, with and without a right checksum: [`parsers::origin`].
pub(crate) fn fuzz_origin(data: &[u8]) {
    let mut sealed = b"LAZORIGN\x01\0\0\0".to_vec();
    sealed.extend_from_slice(&crc32fast::hash(data).to_le_bytes());
    sealed.extend_from_slice(data);
    for file in [data, &sealed] {
        if let Some(origin) = parsers::origin(file) {
            let again = parsers::origin(&parsers::origin_file(&origin));
            assert_eq!(again, Some(origin));
        }
    }
}

/// What a layer's index is shaped by, with and without a right checksum: [`Seams::parse`].
pub(crate) fn fuzz_seams(data: &[u8]) {
    check_seams(data);
    check_seams(&sealed(b"LAZSEAMS\x01\0\0\0", data));
}

fn check_seams(bytes: &[u8]) {
    if let Ok(seams) = Seams::parse(bytes.to_vec().into()) {
        let ascend =
            |pair: &[Seam]| pair[0].start < pair[1].start && pair[0].decoded < pair[1].decoded;
        assert!(seams.seams.windows(2).all(ascend));
        let _ = seams.frame(0);
    }
}

/// The head of a program, and the table of what it needs: [`Program`].
pub(crate) fn fuzz_program(data: &[u8]) {
    let (head, dynamic) = data.split_at(data.len().min(4096));
    if let Some(program) = Program::parse(head) {
        assert!(program.linked().iter().all(|part| !part.is_empty()));
        assert!(program.names(dynamic).len() <= dynamic.len() / 8);
        assert!(
            program
                .dynamic()
                .is_none_or(|table| table.len() <= 64 << 10)
        );
        let inside = |path: &Vec<u8>| !path.is_empty() && path.len() <= head.len();
        assert!(program.interpreter(head).as_ref().is_none_or(inside));
    }
}
