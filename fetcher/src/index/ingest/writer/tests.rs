//! The same writes with a thread and without, and errors that come back.

use std::sync::Arc;

use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;
use crate::types::Digest;

/// Bytes after which the next step begins another chunk.
const CHUNK_MAX: usize = 100_000;

/// A data file that others look at, and that breaks at some length.
#[derive(Clone)]
struct Shared {
    bytes: Arc<Mutex<Vec<u8>>>,
    len_max: usize,
}

impl Shared {
    fn new(len_max: usize) -> Self {
        Self {
            bytes: Arc::default(),
            len_max,
        }
    }
}

impl LayerSink for Shared {
    fn write_at(&mut self, data_offset: u64, bytes: &[u8]) -> Result<()> {
        let at = usize::try_from(data_offset).unwrap();
        let mut file = self.bytes.lock();
        assert!(at >= file.len() && !bytes.is_empty());
        if at + bytes.len() > self.len_max {
            return Err(Error::io(
                "write to",
                "a full disk",
                io::Error::other("full"),
            ));
        }
        file.resize(at, 0);
        file.extend_from_slice(bytes);
        Ok(())
    }
}

/// What a writer was given, or made of it.
#[derive(Debug, Default, PartialEq)]
struct Made {
    tar: Option<Digest>,
    chunks: Vec<Digest>,
}

/// Pushes `steps` of so many bytes, each but for its first `skip` going to the file. A step
/// that skips something begins a chunk, and so does one that comes after [`CHUNK_MAX`] bytes.
/// What the writer made of it, and what it should have.
fn run(steps: &[(usize, usize)], sink: &Shared, beside: bool) -> Result<(Made, Made)> {
    let work = Work::new(Some(Algorithm::Sha256), sink.clone());
    let mut writer = Writer::new(work);
    if beside {
        writer = writer.beside();
    }
    let (mut all, mut chunk) = (Vec::new(), Vec::new());
    let mut right = Made::default();
    let mut at = 0_u64;
    for (len, skip) in steps {
        let seed = u8::try_from(at % 251).unwrap();
        let tar: Vec<u8> = (0..*len)
            .map(|i| seed.wrapping_add(i.to_le_bytes()[0]))
            .collect();
        writer.push(&tar)?;
        all.extend_from_slice(&tar);
        let skip = (*skip).min(*len);
        if !chunk.is_empty() && (skip > 0 || chunk.len() >= CHUNK_MAX) {
            writer.end_chunk(at);
            right
                .chunks
                .push(Digest::sha256(&std::mem::take(&mut chunk)));
        }
        if skip < *len {
            let from = at + skip as u64;
            writer.write(from, len - skip, from);
            chunk.extend_from_slice(tar.get(skip..).unwrap());
        }
        at += *len as u64;
    }
    if !chunk.is_empty() {
        writer.end_chunk(at);
        right.chunks.push(Digest::sha256(&chunk));
    }
    right.tar = Some(Digest::sha256(&all));
    let work = writer.finish()?;
    let made = Made {
        tar: work.hasher.finish(),
        chunks: work.chunk_digests.into_iter().map(Digest::Sha256).collect(),
    };
    Ok((made, right))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_thread_changes_nothing(
        steps in prop::collection::vec((1_usize..70_000, 0_usize..200), 0..60),
    ) {
        let (here, there) = (Shared::new(usize::MAX), Shared::new(usize::MAX));
        for (sink, beside) in [(&here, false), (&there, true)] {
            let (made, right) = run(&steps, sink, beside).unwrap();
            prop_assert_eq!(made, right);
        }
        prop_assert!(*here.bytes.lock() == *there.bytes.lock());
    }
}

#[test]
fn an_error_of_the_sink_comes_back_as_it_is() {
    let steps = vec![(60_000, 0); 100];
    for beside in [false, true] {
        for len_max in [0, 100_000, 1_000_000, 100 * 60_000 - 1] {
            let error = run(&steps, &Shared::new(len_max), beside).unwrap_err();
            assert!(
                error.to_string().contains("a full disk"),
                "{len_max}: {error}"
            );
        }
    }
}

#[test]
fn what_is_given_up_is_gone_at_once() {
    let sink = Shared::new(usize::MAX);
    let file = Arc::clone(&sink.bytes);
    let work = Work::new(None, sink);
    let mut writer = Writer::new(work).beside();
    for _ in 0..20 {
        writer.push(&[0; 50_000]).unwrap();
    }
    assert!(Arc::strong_count(&file) > 1);
    drop(writer);
    assert_eq!(Arc::strong_count(&file), 1);
}

#[test]
fn what_lies_together_is_one_write() {
    struct Count(u32);
    impl LayerSink for Count {
        fn write_at(&mut self, _: u64, _: &[u8]) -> Result<()> {
            self.0 += 1;
            Ok(())
        }
    }
    let work = Work::new(None, Count(0));
    let mut writer = Writer::new(work);
    for at in (0..200_000).step_by(1000) {
        writer.push(&[7; 1000]).unwrap();
        writer.write(at, 1000, 4096 + at);
    }
    writer.push(&[7; 1000]).unwrap();
    writer.write(200_000, 1000, 409_600);
    assert_eq!(writer.finish().unwrap().sink.0, 2);
}
