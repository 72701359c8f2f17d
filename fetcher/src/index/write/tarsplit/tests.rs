//! Tests of the tar-split lines.

use super::*;

#[test]
fn lines_are_as_tar_split_writes_them() {
    let mut split = TarSplit::new(3).unwrap();
    split.segment(b"head");
    split
        .file("./a", 3, Some([0, 1, 2, 3, 4, 5, 6, 7]))
        .unwrap();
    split.segment(b"pad");
    split.segment(b"head");
    split.file("<b>", 0, None).unwrap();
    split.segment(b"end");
    let (frame, len) = split.finish().unwrap();
    let lines = zstd::decode_all(&frame[..]).unwrap();
    assert_eq!(lines.len() as u64, len);
    let expected = concat!(
        "{\"type\":2,\"payload\":\"aGVhZA==\",\"position\":0}\n",
        "{\"type\":1,\"name\":\"./a\",\"size\":3,\"payload\":\"AAECAwQFBgc=\",\"position\":1}\n",
        "{\"type\":2,\"payload\":\"cGFkaGVhZA==\",\"position\":2}\n",
        "{\"type\":1,\"name\":\"<b>\",\"payload\":null,\"position\":3}\n",
        "{\"type\":2,\"payload\":\"ZW5k\",\"position\":4}\n",
    );
    assert_eq!(std::str::from_utf8(&lines).unwrap(), expected);
}
