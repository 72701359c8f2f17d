//! Against `sha2`, however the bytes are cut.

use proptest::prelude::*;

use super::*;

/// What is added: bytes in no piece, bytes of a piece, or the end of one.
#[derive(Debug, Clone)]
enum Added {
    Between(usize),
    Piece(usize),
    End,
}

fn added() -> impl Strategy<Value = Added> {
    // Lengths around blocks, and those that leave both digests on the same place of one.
    let len = prop_oneof![0_usize..200, Just(64), Just(512), Just(4096)];
    prop_oneof![
        len.clone().prop_map(Added::Between),
        len.prop_map(Added::Piece),
        Just(Added::End),
    ]
}

proptest! {
    #[test]
    fn digests_are_those_of_each_alone(steps in prop::collection::vec(added(), 0..60)) {
        for whole in [None, Some(Algorithm::Sha256), Some(Algorithm::Sha512)] {
            let mut twin = TwinHasher::new(whole);
            let (mut all, mut piece) = (Vec::new(), Vec::new());
            for step in &steps {
                let from = all.len();
                let mut bytes = |len: usize| {
                    all.extend((from..from + len).map(|at| u8::try_from(at % 251).unwrap()));
                    all.get(from..).unwrap_or_default().to_vec()
                };
                match step {
                    Added::Between(len) => twin.between(&bytes(*len)),
                    Added::Piece(len) => {
                        let bytes = bytes(*len);
                        twin.piece(&bytes);
                        piece.extend(bytes);
                    }
                    Added::End => {
                        let digest = Digest::Sha256(twin.end_piece());
                        prop_assert_eq!(digest, Digest::sha256(&std::mem::take(&mut piece)));
                    }
                }
            }
            prop_assert_eq!(twin.finish(), whole.map(|whole| Digest::of(whole, &all)));
        }
    }
}

#[test]
fn every_length_is_padded_right() {
    let bytes = [0x5a; 200];
    for len in 0..bytes.len() {
        let bytes = bytes.get(..len).unwrap();
        let mut twin = TwinHasher::new(Some(Algorithm::Sha256));
        twin.piece(bytes);
        assert_eq!(
            Digest::Sha256(twin.end_piece()),
            Digest::sha256(bytes),
            "{len}"
        );
        assert_eq!(twin.finish(), Some(Digest::sha256(bytes)), "{len}");
    }
}
