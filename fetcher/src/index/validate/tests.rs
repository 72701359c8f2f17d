//! Tables that break one rule each.

use super::*;
use crate::index::{LayerIndex, Timestamp};
use crate::test_util::content::entry as file;
use crate::types::{ByteRange, Digest};

fn regular(size: u64, data_offset: u64) -> FileEntry {
    file("f", FileKind::Regular { size, data_offset })
}

fn chunk(data_offset: u64, len: u32) -> Chunk {
    Chunk {
        encoding: Encoding::Stream,
        data_offset,
        len,
        chunk_digest: Some([0; 32]),
    }
}

fn check(format: LayerFormat, files: Vec<FileEntry>, chunks: Vec<Chunk>) -> Result<LayerIndex> {
    let blob = LayerBlob {
        digest: Digest::sha256(b""),
        size: 1000,
        format,
    };
    LayerIndex::new(blob, files, chunks)
}

#[test]
fn accepts_what_is_right() {
    let files = vec![
        regular(5, 0),
        regular(0, 0),
        regular(4097, 4096),
        regular(1, 12_288),
    ];
    let chunks = vec![
        chunk(0, 2),
        chunk(2, 3),
        chunk(4096, 4097),
        chunk(12_288, 1),
    ];
    assert_eq!(
        check(LayerFormat::Tar, files, chunks).unwrap().data_len,
        12_289
    );
    assert_eq!(
        check(LayerFormat::Gzip, Vec::new(), Vec::new())
            .unwrap()
            .data_len,
        0
    );
}

#[test]
#[expect(clippy::too_many_lines, reason = "one table")]
fn names_the_file_and_the_rule() {
    let member = |start, len, skip| Chunk {
        encoding: Encoding::GzipMember {
            blob: ByteRange::at(start, len).unwrap(),
            skip,
        },
        ..chunk(0, 5)
    };
    let (tar, estargz) = (LayerFormat::Tar, LayerFormat::Estargz);
    let bad_mode = FileEntry {
        mode: 0o10_000,
        ..file("f", FileKind::Fifo)
    };
    let mtime = Timestamp {
        secs: 0,
        nanos: 1_000_000_000,
    };
    let bad_time = FileEntry {
        mtime,
        ..file("f", FileKind::Fifo)
    };
    let table = [
        (
            tar,
            vec![regular(5, 4096)],
            vec![chunk(4096, 5)],
            "it is at 4096 of the data file, not at 0",
        ),
        (
            tar,
            vec![regular(5, 0), regular(5, 5)],
            vec![chunk(0, 5), chunk(5, 5)],
            "it is at 5 of the data file, not at 4096",
        ),
        (
            tar,
            vec![regular(0, 4096)],
            vec![],
            "it is empty but has a place",
        ),
        (
            tar,
            vec![regular(5, 0)],
            vec![chunk(0, 4)],
            "its chunks end at byte 4 of 5",
        ),
        (
            tar,
            vec![regular(5, 0)],
            vec![chunk(0, 6)],
            "a chunk of 6 bytes at 0 of the data file, where 5 are due at 0",
        ),
        (
            tar,
            vec![regular(5, 0)],
            vec![chunk(0, 0)],
            "a chunk of 0 bytes",
        ),
        (
            tar,
            vec![regular(5, 0)],
            vec![chunk(1, 4)],
            "a chunk of 4 bytes at 1",
        ),
        (
            tar,
            vec![],
            vec![chunk(0, 1)],
            "chunks that belong to no file",
        ),
        (
            tar,
            vec![regular(1 << 30, 0)],
            vec![chunk(0, 1 << 30)],
            "a chunk of 1073741824 bytes, of at most",
        ),
        (
            tar,
            vec![regular(u64::MAX, 0)],
            vec![],
            "the layer exceeds 17592186044416 bytes",
        ),
        (
            tar,
            vec![regular(5, 0)],
            vec![member(0, 10, 0)],
            "in a layer of format Tar",
        ),
        (
            estargz,
            vec![regular(5, 0)],
            vec![chunk(0, 5)],
            "in a layer of format Estargz",
        ),
        (
            estargz,
            vec![regular(5, 0)],
            vec![member(995, 10, 0)],
            "a chunk at 995..1005 of a blob of 1000 bytes",
        ),
        (
            estargz,
            vec![regular(5, 0)],
            vec![member(5, 0, 0)],
            "a chunk at 5..5",
        ),
        (
            estargz,
            vec![regular(5, 0)],
            vec![member(5, 5, 1 << 40)],
            "bytes into its member",
        ),
        (
            tar,
            vec![file("a/../b", FileKind::Fifo)],
            vec![],
            "\"a/../b\": its name has a '..' part",
        ),
        (
            tar,
            vec![file("/a", FileKind::Fifo)],
            vec![],
            "an empty part",
        ),
        (
            tar,
            vec![file("", FileKind::Fifo)],
            vec![],
            "the root of a layer can only be a directory",
        ),
        (
            tar,
            vec![bad_mode],
            vec![],
            "its mode 10000 has more than permission bits",
        ),
        (
            tar,
            vec![bad_time],
            vec![],
            "more nanoseconds than a second",
        ),
    ];
    for (format, files, chunks, text) in table {
        let error = check(format, files, chunks).unwrap_err().to_string();
        assert!(error.contains(text), "{error:?} lacks {text:?}");
    }
}

/// What is changed of a table of two spans that are verified whole.
type Change = fn(&mut Vec<Chunk>, &mut Vec<Span>);

/// Three chunks of a file in two spans that are verified whole, changed.
fn whole_spans(format: LayerFormat, change: Change) -> Result<LayerIndex> {
    let whole = |data_offset, blob: (u64, u64), span| Chunk {
        encoding: Encoding::WholeSpan {
            blob: ByteRange::new(blob.0, blob.1).unwrap(),
            skip: data_offset,
            span,
        },
        chunk_digest: None,
        ..chunk(data_offset, 5)
    };
    let span = |start, details| Span {
        start,
        bits: 1,
        first_chunk: 9,
        chunk_count: 9,
        details: ByteRange::at(details, 32).unwrap(),
        details_digest: [0; 32],
    };
    let blob = LayerBlob {
        digest: Digest::sha256(b""),
        size: 1000,
        format,
    };
    // The spans share a byte, as they do where they meet within one.
    let (first, second) = ((10, 500), (499, 1000));
    let mut chunks = vec![whole(0, first, 0), whole(5, first, 0), whole(10, second, 1)];
    let mut spans = vec![span(10, 0), span(499, 32)];
    change(&mut chunks, &mut spans);
    LayerIndex::with_spans(blob, vec![regular(15, 0)], chunks, spans)
}

#[test]
fn chunks_of_a_whole_span_agree_on_what_it_is() {
    for format in [LayerFormat::Gzip, LayerFormat::Tar] {
        let index = whole_spans(format, |_, _| {}).unwrap();
        let told = |span: &Span| (span.first_chunk, span.chunk_count, index.digests_of(span));
        let told: Vec<_> = index.spans.iter().map(told).collect();
        assert_eq!(told, [(0, 2, 1), (2, 1, 1)]);
    }
    let table: [(Change, &str); 7] = [
        (|_, spans| spans.truncate(1), "a chunk is not where it says"),
        (
            |_, spans| spans[1].start = 498,
            "a chunk is not where it says",
        ),
        (|_, spans| spans[0].start = 600, "does not ascend"),
        (
            |chunks, _| chunks[0].chunk_digest = Some([0; 32]),
            "a digest of its own",
        ),
        (
            |_, spans| spans[1].details = ByteRange::at(32, 31).unwrap(),
            "too short for its digests",
        ),
        (
            |chunks, _| {
                let blob = ByteRange::new(10, 501).unwrap();
                let (skip, span) = (5, 0);
                chunks[1].encoding = Encoding::WholeSpan { blob, skip, span };
            },
            "do not follow one another",
        ),
        (
            |chunks, _| {
                let blob = ByteRange::new(10, 500).unwrap();
                let (skip, span) = (5, 0);
                chunks[1].encoding = Encoding::GzipSpan { blob, skip, span };
            },
            "do not follow one another",
        ),
    ];
    for (change, says) in table {
        let error = whole_spans(LayerFormat::Gzip, change)
            .unwrap_err()
            .to_string();
        assert!(error.contains(says), "{error:?} lacks {says:?}");
    }
    for format in [
        LayerFormat::Estargz,
        LayerFormat::Zstd,
        LayerFormat::ZstdChunked,
    ] {
        let error = whole_spans(format, |_, _| {}).unwrap_err().to_string();
        assert!(error.contains("in a layer of format"), "{error}");
    }
}

#[test]
fn targets_may_be_told_through_symbolic_links() {
    let link = |path, to: &str| {
        let target = to.as_bytes().to_vec();
        file(path, FileKind::Hardlink { target })
    };
    let target = b"usr/lib".to_vec();
    let symlink = file("lib", FileKind::Symlink { target });
    let fifo = |path| file(path, FileKind::Fifo);
    let table = [
        (
            vec![symlink.clone(), fifo("usr/lib/x"), link("top", "lib/x")],
            true,
        ),
        (
            vec![symlink.clone(), fifo("lib/x"), link("z", "usr/lib/x")],
            true,
        ),
        // No symbolic link is in the way.
        (
            vec![symlink.clone(), fifo("usr/lib/x"), link("z", "usr/x")],
            false,
        ),
        (vec![fifo("usr/lib/x"), link("top", "lib/x")], false),
    ];
    for (files, is_right) in table {
        let checked = check(LayerFormat::Tar, files, Vec::new());
        assert_eq!(checked.is_ok(), is_right, "{checked:?}");
    }
}

#[test]
fn long_chains_and_circles_of_links_end() {
    let link = |from: usize, to: usize| {
        let target = format!("l{to}").into_bytes();
        file(format!("l{from}"), FileKind::Hardlink { target })
    };
    let chain = |len: usize| (0..len).map(|n| link(n, n + 1)).collect::<Vec<_>>();
    let mut good = chain(30);
    good.push(file("l30", FileKind::Fifo));
    assert!(check(LayerFormat::Tar, good, Vec::new()).is_ok());
    let mut circle = chain(30);
    circle.push(link(30, 0));
    let error = check(LayerFormat::Tar, circle, Vec::new())
        .unwrap_err()
        .to_string();
    assert!(error.contains("in a circle"), "{error}");
}
