//! The bodies of the fuzz targets on seeded inputs and many mutations of them.
//!
//! Promise: errors, never panics. Runs on the pinned toolchain, from a fixed seed, for a
//! fixed number of inputs; libFuzzer explores further (see `fetcher/fuzz`).

use std::io::{Read as _, Write as _};
use std::process::Command;

use lazarette_fetcher::index::ingest::{Ingest, IngestPlan, LayerSink};
use lazarette_fetcher::types::Digest;

#[path = "../fuzz/bodies.rs"]
mod bodies;

const PLAIN: &[u8] = include_bytes!("fixtures/estargz/plain.esgz");
const PACKED: &[u8] = include_bytes!("fixtures/estargz/packed.esgz");
const CHUNKED: [(&[u8], &str); 2] = [
    (
        include_bytes!("fixtures/zstdchunked/storage.zst"),
        include_str!("fixtures/zstdchunked/storage.zst.json"),
    ),
    (
        include_bytes!("fixtures/zstdchunked/stargz.zst"),
        include_str!("fixtures/zstdchunked/stargz.zst.json"),
    ),
];
/// Layers' sizes, and zTOCs of them.
const ZTOCS: [(u64, &[u8]); 2] = [
    (458_240, include_bytes!("fixtures/soci/tar.ztoc.gz")),
    (70_958, include_bytes!("fixtures/soci/plain-v1.ztoc.gz")),
];
const INDEX: &[u8] = include_bytes!("fixtures/index-v3.bin");
/// Mutations per seed; all targets together take a few seconds.
const ROUNDS: u32 = 3000;

/// SplitMix64: good enough to mutate, the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound.max(1) as u64).expect("it is below a usize")
    }

    fn byte(&mut self) -> u8 {
        const FAVOURITES: [u8; 10] = [0, 1, 0x7f, 0x80, 0xff, b'0', b'9', b'"', b'-', b'/'];
        match self.next().to_le_bytes() {
            [0..128, at, ..] => FAVOURITES[usize::from(at) % FAVOURITES.len()],
            [_, byte, ..] => byte,
        }
    }

    fn mutate(&mut self, seed: &[u8]) -> Vec<u8> {
        let mut out = seed.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(out.len());
            let to = (at + self.below(40)).min(out.len());
            match self.below(6) {
                0 if !out.is_empty() => out[at] = self.byte(),
                1 if !out.is_empty() => out[at] ^= 1_u8 << self.below(8),
                2 => out.truncate(at),
                3 => drop(out.drain(at..to)),
                4 => {
                    let copy = out[at..to].to_vec();
                    let into = self.below(out.len());
                    out.splice(into..into, copy);
                }
                _ => {
                    let byte = self.byte();
                    out.insert(at, byte);
                }
            }
        }
        out
    }
}

fn smoke(body: fn(&[u8]), seeds: &[&[u8]]) {
    smoke_rounds(body, seeds, ROUNDS);
}

fn smoke_rounds(body: fn(&[u8]), seeds: &[&[u8]], rounds: u32) {
    let mut random = Random(7);
    body(b"");
    for seed in seeds {
        body(seed);
        for _ in 0..rounds {
            body(&random.mutate(seed));
        }
    }
}

fn tar(format: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("a"), vec![7; 700]).expect("a file");
    std::fs::write(dir.path().join("n".repeat(120)), b"x").expect("a file");
    std::os::unix::fs::symlink("a", dir.path().join("l")).expect("a link");
    let out = Command::new("tar")
        .args([format, "-b1", "-cf", "-", "-C"])
        .arg(dir.path())
        .arg(".")
        .output()
        .expect("tar is installed");
    assert!(out.status.success());
    out.stdout
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).expect("memory");
    encoder.finish().expect("memory")
}

/// The TOC of a fixture, as JSON.
fn toc(blob: &[u8]) -> Vec<u8> {
    let footer = lazarette_fetcher::index::estargz::read_footer(blob, blob.len() as u64)
        .expect("a footer")
        .expect("a footer");
    let start = usize::try_from(footer.toc_offset()).expect("it is in memory");
    let member = lazarette_fetcher::codec::gzip::decode_member;
    let header = member(&blob[start..], 0, 512).expect("a header");
    let digits = std::str::from_utf8(&header[124..135]).expect("octal digits");
    let len = u32::from_str_radix(digits, 8).expect("octal digits");
    member(&blob[start..], 512, len).expect("a TOC")
}

#[test]
fn footer() {
    smoke(
        bodies::formats::fuzz_footer,
        &[&PLAIN[PLAIN.len() - 51..], &PACKED[PACKED.len() - 80..]],
    );
}

#[test]
fn toc_json() {
    smoke(bodies::formats::fuzz_toc, &[&toc(PLAIN), &toc(PACKED)]);
}

#[test]
fn zstdchunked_place() {
    let [(storage, storage_notes), (stargz, stargz_notes)] = CHUNKED;
    smoke(
        bodies::formats::fuzz_zstdchunked_place,
        &[
            &storage[storage.len() - 64..],
            &stargz[stargz.len() - 40..],
            storage_notes.as_bytes(),
            stargz_notes.as_bytes(),
        ],
    );
}

#[test]
fn zstdchunked_toc() {
    let toc = |blob: &[u8]| {
        let position = lazarette_fetcher::index::zstdchunked::read_footer(blob, blob.len() as u64)
            .expect("a footer")
            .expect("a footer");
        let place = |at| usize::try_from(at).expect("it is in memory");
        let toc = &blob[place(position.blob.start())..place(position.blob.end())];
        zstd::decode_all(toc).expect("a TOC")
    };
    let tocs = CHUNKED.map(|(blob, _)| toc(blob));
    smoke(
        bodies::formats::fuzz_zstdchunked_toc,
        &tocs.each_ref().map(Vec::as_slice),
    );
}

#[test]
fn soci_ztoc() {
    let seed = |(size, ztoc): (u64, &[u8])| {
        let mut seed = size.to_le_bytes().to_vec();
        let mut ztoc = flate2::read::GzDecoder::new(ztoc);
        ztoc.read_to_end(&mut seed).expect("a fixture");
        seed
    };
    let [tar, plain] = ZTOCS.map(seed);
    assert!(
        [&tar, &plain]
            .iter()
            .all(|seed| bodies::formats::read_ztoc(seed).is_some())
    );
    smoke(bodies::formats::fuzz_soci, &[&tar]);
    // Nearly all of it is windows, so it is long, and few mutations meet anything else.
    smoke_rounds(bodies::formats::fuzz_soci, &[&plain], ROUNDS / 10);
}

#[test]
fn tar_stream() {
    smoke(
        bodies::streams::fuzz_tar,
        &[
            &tar("--format=gnu"),
            &tar("--format=pax"),
            &tar("--format=oldgnu"),
        ],
    );
}

#[test]
fn index_file() {
    smoke(bodies::files::fuzz_wire, &[INDEX, &INDEX[24..]]);
}

#[test]
fn seams_file() {
    struct Nowhere;
    impl LayerSink for Nowhere {
        fn write_at(&mut self, _: u64, _: &[u8]) -> lazarette_fetcher::Result<()> {
            Ok(())
        }
    }
    // A member for each 40 KiB, so that there are blocks.
    let tar = [tar("--format=gnu"), vec![0; 300_000]].concat();
    let blob: Vec<u8> = tar.chunks(40_000).flat_map(gzip).collect();
    let plan = IngestPlan::new(Digest::sha256(&blob), blob.len() as u64, None);
    let mut ingest = Ingest::new(plan, Nowhere);
    ingest.push(&blob).expect("a right layer");
    let seams = ingest.finish().expect("a right layer").seams;
    // A digest, two seams, two gaps, a frame of four bytes that is not there.
    let body = [
        &[1][..],
        &[7; 32],
        &[2, 10, 0, 0, 90, 3, 80, 2, 9, 9, 1, 4, 0, 0, 0, 0],
    ];
    let seams = seams.expect("two blocks");
    smoke(bodies::files::fuzz_seams, &[&seams, &body.concat()]);
}

#[test]
fn compressed_stream() {
    let tar = tar("--format=gnu");
    let zstd = zstd::encode_all(&tar[..], 1).expect("memory");
    smoke(bodies::streams::fuzz_stream, &[PLAIN, &gzip(&tar), &zstd]);
}

#[test]
fn whole_layer() {
    let tar = tar("--format=pax");
    let zstd = zstd::encode_all(&tar[..], 1).expect("memory");
    smoke(
        bodies::streams::fuzz_ingest,
        &[&tar, PLAIN, &gzip(&tar), &zstd],
    );
}

#[test]
fn layer_writers() {
    smoke(
        bodies::formats::fuzz_write,
        &[&tar("--format=gnu"), &tar("--format=pax")],
    );
}

#[test]
fn offered_index() {
    smoke(bodies::files::fuzz_offered, &[INDEX, &INDEX[24..]]);
}

#[test]
fn several_ranges() {
    let go = "--b0\r\nContent-Range: bytes 0-9/1000\r\nContent-Type: x\r\n\r\n0123456789\r\n\
              --b0\r\nContent-Range: bytes 400-403/1000\r\n\r\nabcd\r\n--b0--\r\n";
    let nginx = "\r\n--b0\r\nContent-Range: bytes 498-505/*\r\n\r\n--b0\r\n--\r\n--b0--\r\n";
    let kind = "Multipart/ByteRanges; charset=x; boundary=\"a b\"";
    smoke(
        bodies::streams::fuzz_byteranges,
        &[go.as_bytes(), nginx.as_bytes(), kind.as_bytes()],
    );
}

#[test]
fn chunk_table() {
    // A tag, a layer, an offset; one entry with the tag of all zeros.
    let entry = |tag: u8, layer: u8| [tag, 0, 0, 0, layer, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0];
    let full: Vec<u8> = (0..16).flat_map(|n| entry(n % 4, n + 1)).collect();
    let mut table = b"LAZCHNKS\x01\0\0\0\x02\0\0\0".to_vec();
    table.resize(4096, 0);
    table.extend(&full);
    smoke_rounds(bodies::files::fuzz_chunks, &[&full, &table], ROUNDS / 3);
}

#[test]
fn program_head() {
    let mut head = vec![0; 8192];
    let mut own = std::fs::File::open("/proc/self/exe").expect("this program is a file");
    own.read_exact(&mut head).expect("it is longer");
    smoke(bodies::files::fuzz_program, &[&head, &head[..200]]);
}

#[test]
fn pinned_file() {
    // Hours up to a day after the one that the body asks about, and nonsense.
    let hours = [0, 500_000, 500_001, 500_024, 500_025, u32::MAX];
    smoke(
        bodies::files::fuzz_pinned,
        &[&hours.map(u32::to_le_bytes).concat()],
    );
}

#[test]
fn origin_file() {
    let place = format!("localhost:5000/a/b@{}", Digest::sha256(b"an index"));
    let rest = [&77_u64.to_le_bytes()[..], place.as_bytes()].concat();
    smoke(bodies::files::fuzz_origin, &[&rest]);
}

#[test]
fn learned_file() {
    let learned = bodies::learned::learned_digests();
    // Each opens the layer twice and reads all of it.
    smoke_rounds(bodies::learned::fuzz_learned, &[&learned], ROUNDS / 10);
}

#[test]
fn entries_file() {
    let entries = bodies::members::entries_of_a_member();
    // Each shapes an index twice.
    smoke_rounds(bodies::members::fuzz_entries, &[&entries], ROUNDS / 30);
}

#[test]
fn members() {
    let member = bodies::members::a_member();
    smoke(bodies::members::fuzz_member, &[&member]);
}

#[test]
fn hosts_file() {
    let full = include_str!("fixtures/hosts.toml");
    let flat = "host.\"a:1\" = { client = [[\"c\", \"\"], \"d\"], header.x = [\"1\"] }\nskip_verify = true";
    smoke(
        bodies::files::fuzz_hosts,
        &[full.as_bytes(), flat.as_bytes()],
    );
}
