//! Blobs that decode to next to nothing take next to no memory.

use super::*;

/// A step that decodes to nothing.
fn nothing(encoded: &[u8]) -> Run<'_> {
    Run {
        encoded,
        decoded: &[],
        stop: Stop::Anywhere,
    }
}

#[test]
fn encoded_bytes_that_decode_to_nothing_are_not_kept() {
    let window = vec![7; REACH];
    let mut gzip = Gzip {
        entries: vec![Entry {
            start: 0,
            bits: 0,
            decoded: 0,
            number: None,
            window: Vec::new(),
        }],
        probe: Some(Probe {
            window: window.clone(),
            encoded: Vec::new(),
            start: 0,
        }),
        packer: None,
    };
    // Empty stored blocks.
    let blocks = [0, 0, 0, 0xff, 0xff].repeat(1000);
    for _ in 0..200 {
        let run = nothing(&blocks);
        gzip.ran(&run, &run.stop, Position::default()).unwrap();
        let kept = gzip.probe.as_ref().map_or(0, |probe| probe.encoded.len());
        assert!(kept <= PROBE_LEN_MAX, "{kept}");
    }
    // All of the window is kept, as nothing tells what of it is needed.
    assert!(gzip.probe.is_none());
    let all = Packer::fast().unwrap().pack(&window).unwrap();
    assert!(gzip.entries.iter().all(|entry| entry.window == all));
}

#[test]
fn places_of_frames_without_chunks_are_few() {
    let mut frames = Frames::default();
    let mut now = Position::default();
    for _ in 0..1_000_000 {
        now.encoded += 12;
        now.decoded += FRAME_LEN_MIN;
        frames.ended(now);
    }
    let few = FRAMES_MAX as u64 + now.decoded / FRAME_LEN_MIN_BEYOND;
    assert!(frames.0.len() as u64 <= few + 1, "{}", frames.0.len());
    // Once a chunk was found, each is a place again.
    let start = now.decoded;
    assert!(frames.take(start).is_some());
    assert_eq!(frames.0.len(), 1);
    for _ in 0..10 {
        now.decoded += FRAME_LEN_MIN;
        frames.ended(now);
    }
    assert_eq!(frames.0.len(), 11);
}
