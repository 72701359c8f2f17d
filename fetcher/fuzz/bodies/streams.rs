//! Bodies and tars, in pieces as they come.

use bytes::Bytes;
use lazarette_fetcher::Result;
use lazarette_fetcher::codec::stream::{Decoder, detect};
use lazarette_fetcher::index::ingest::{Ingest, IngestPlan, LayerSink};
use lazarette_fetcher::index::tar::{Parser, Step};
use lazarette_fetcher::index::wire;
use lazarette_fetcher::test_util::parsers;
use lazarette_fetcher::types::Digest;

/// Decoded bytes a target accepts: enough to leave every state, little enough to be quick.
const OUT_MAX: u64 = 1 << 22;

/// A tar, pushed in two pieces and in small ones: [`Parser`].
pub(crate) fn fuzz_tar(data: &[u8]) {
    let whole = read_tar(data, usize::MAX);
    let pieces = read_tar(data, 97);
    assert_eq!(whole, pieces, "pieces must not matter");
}

fn read_tar(data: &[u8], piece: usize) -> Option<(usize, usize)> {
    let mut parser = Parser::new("layer".to_owned());
    let (mut entries, mut bytes) = (0, 0);
    for mut input in data.chunks(piece.min(data.len()).max(1)) {
        loop {
            match parser.step(&mut input).ok()? {
                Step::NeedInput => break,
                Step::Entry(_) => entries += 1,
                Step::Data(data) => bytes += data.len(),
                Step::EndOfFile => {}
            }
        }
    }
    parser.finish().ok()?;
    Some((entries, bytes))
}

/// A body of several ranges, in one piece and in small ones, and the words of its type.
pub(crate) fn fuzz_byteranges(data: &[u8]) {
    const SIZE: u64 = 1000;
    const TYPE: &str = "multipart/byteranges; boundary=b0";
    let read = |content_type: &str, piece: usize, end: u64| {
        let pieces = data.chunks(piece).map(Bytes::copy_from_slice);
        let parts = parsers::byteranges(content_type, SIZE, pieces, end)?.ok()?;
        let (mut reached, mut bytes) = (0, Vec::new());
        for (at, run) in &parts.runs {
            let run_end = at + run.len() as u64;
            assert!(reached <= *at && *at < run_end && run_end <= SIZE);
            assert!(*at >= end || run_end <= end, "no run goes on past {end}");
            reached = run_end;
            bytes.extend((*at..).zip(run.iter().copied()));
        }
        Some((bytes, parts.is_over))
    };
    let whole = read(TYPE, usize::MAX, SIZE);
    assert_eq!(whole, read(TYPE, 7, 500), "pieces must not matter");
    read(&String::from_utf8_lossy(data), 100, SIZE);
}

/// A blob in any compression: [`Decoder`].
pub(crate) fn fuzz_stream(data: &[u8]) {
    let Ok(mut decoder) = Decoder::new(detect(data), OUT_MAX) else {
        return;
    };
    let mut out = 0;
    let done = data.chunks(1000).try_for_each(|piece| {
        decoder.push(piece, &mut |run| {
            out += run.decoded.len() as u64;
            Ok(())
        })
    });
    assert!(out <= OUT_MAX);
    if done.is_ok() {
        drop(decoder.finish());
    }
}

/// A whole plain layer: [`Ingest`].
pub(crate) fn fuzz_ingest(data: &[u8]) {
    struct Count(u64);
    impl LayerSink for Count {
        fn write_at(&mut self, data_offset: u64, bytes: &[u8]) -> Result<()> {
            assert!(data_offset >= self.0, "offsets ascend");
            self.0 = data_offset + bytes.len() as u64;
            Ok(())
        }
    }
    let plan =
        IngestPlan::new(Digest::sha256(data), data.len() as u64, None).decoded_len_max(OUT_MAX);
    let mut ingest = Ingest::new(plan, Count(0));
    if data
        .chunks(1000)
        .try_for_each(|piece| ingest.push(piece))
        .is_err()
    {
        return;
    }
    if let Ok(ingested) = ingest.finish() {
        let (index, Count(end)) = (ingested.index, ingested.sink);
        assert_eq!(index.data_len, end);
        let encoded = wire::encode(&index, &ingested.details).expect("memory");
        assert_eq!(wire::decode(&encoded).expect("what was encoded"), index);
    }
}
