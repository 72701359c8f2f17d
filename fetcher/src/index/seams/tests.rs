//! What is noted comes back; what is damaged does not.

use proptest::prelude::*;

use super::*;

/// What is said to a recorder.
#[derive(Debug, Clone)]
enum Note {
    Gap(Vec<u8>),
    Payload,
    Seam { step: u64, must: bool },
}

fn note() -> impl Strategy<Value = Note> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 1..2000).prop_map(Note::Gap),
        (1_usize..300_000).prop_map(|len| Note::Gap(vec![7; len])),
        Just(Note::Payload),
        (1_u64..60_000, any::<bool>()).prop_map(|(step, must)| Note::Seam { step, must }),
    ]
}

/// Two seams, a payload between two gaps.
fn small() -> Vec<u8> {
    let mut recorder = Recorder::new().unwrap();
    let seam = |start, decoded| Seam {
        start,
        bits: 3,
        decoded,
    };
    recorder.seam(seam(10, 0), true);
    recorder.gap(b"before").unwrap();
    recorder.payload();
    recorder.seam(seam(2000, 100_000), false);
    recorder.gap(b"behind it").unwrap();
    recorder.finish(&Digest::sha256(b"")).unwrap().unwrap()
}

proptest! {
    #[test]
    fn what_was_noted_comes_back(notes in prop::collection::vec(note(), 0..60)) {
        let mut recorder = Recorder::new().unwrap();
        let (mut gaps, mut raw, mut seams) = (vec![0_u64], Vec::new(), Vec::<Seam>::new());
        let (mut start, mut decoded) = (20, 0);
        for note in notes {
            match note {
                Note::Gap(bytes) => {
                    recorder.gap(&bytes).unwrap();
                    *gaps.last_mut().unwrap() += bytes.len() as u64;
                    raw.extend(bytes);
                }
                Note::Payload => {
                    recorder.payload();
                    if gaps.last() > Some(&0) {
                        gaps.push(0);
                    }
                }
                Note::Seam { step, must } => {
                    (start, decoded) = (start + step / 3 + 1, decoded + step);
                    let seam = Seam { start, bits: (step % 8).to_le_bytes()[0], decoded };
                    recorder.seam(seam, must);
                    let far = |last: &Seam| seam.decoded - last.decoded >= 24 << 10;
                    if must || seams.last().is_none_or(far) {
                        seams.push(seam);
                    }
                }
            }
        }
        let digest = Digest::sha256(b"a layer");
        let Some(bytes) = recorder.finish(&digest).unwrap() else {
            prop_assert!(seams.len() < 2);
            return Ok(());
        };
        let found = Seams::parse(bytes.into()).unwrap();
        prop_assert_eq!((&found.seams, &found.gaps, found.blob_digest), (&seams, &gaps, digest));
        for (number, frame) in (0..).zip(raw.chunks(FRAME_LEN)) {
            prop_assert!(found.frame(number).unwrap() == frame);
        }
        prop_assert!(found.frame(found.frames.len() as u64).is_err());
    }

    #[test]
    fn damage_is_found(at in any::<prop::sample::Index>(), bit in 0_u32..8) {
        let good = small();
        let mut bad = good.clone();
        bad[at.index(good.len())] ^= 1_u8 << bit;
        let parsed = Seams::parse(bad.into());
        prop_assert!(parsed.and_then(|seams| seams.frame(0)).is_err());
        let cut = good[..at.index(good.len())].to_vec();
        prop_assert!(Seams::parse(cut.into()).is_err());
    }
}

#[test]
fn the_file_is_what_the_header_says() {
    let bytes = small();
    let seams = Seams::parse(bytes.clone().into()).unwrap();
    assert_eq!((seams.seams.len(), &seams.gaps[..]), (2, &[6, 9][..]));
    assert_eq!(seams.frame(0).unwrap(), b"beforebehind it");
    for (at, to, text) in [
        (0, b'X', "LAZSEAMS"),
        (8, 9, "another version"),
        (12, 0xaa, "checksum"),
        (20, 1, "the length it says"),
    ] {
        let mut bad = bytes.clone();
        bad[at] = to;
        let error = Seams::parse(bad.into()).unwrap_err().to_string();
        assert!(error.contains(text), "{error:?} lacks {text:?}");
    }
    let one = {
        let mut recorder = Recorder::new().unwrap();
        recorder.gap(b"a tar").unwrap();
        recorder.finish(&Digest::sha256(b"")).unwrap()
    };
    assert_eq!(one, None, "there is nothing to choose from");
}
