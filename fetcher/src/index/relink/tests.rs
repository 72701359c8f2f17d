//! Tables with names that are taken twice, against what extracting them leaves.

use super::*;
use crate::test_util::content::entry;

/// `A=3` is a file of 3 bytes, `B>A` a hard link, `S@x` a symbolic one, `d/` a directory.
fn table(text: &str) -> Vec<FileEntry> {
    let one = |word: &str| {
        let target = |target: &str| target.as_bytes().to_vec();
        if let Some((path, size)) = word.split_once('=') {
            let size = size.parse().unwrap();
            let data_offset = 0;
            entry(path, FileKind::Regular { size, data_offset })
        } else if let Some((path, to)) = word.split_once('>') {
            entry(path, FileKind::Hardlink { target: target(to) })
        } else if let Some((path, to)) = word.split_once('@') {
            entry(path, FileKind::Symlink { target: target(to) })
        } else {
            entry(word.trim_end_matches('/'), FileKind::Directory)
        }
    };
    text.split_whitespace().map(one).collect()
}

#[test]
fn links_lead_to_what_had_the_name_when_they_came() {
    let rows = [
        // Nothing is taken twice, or no link is between.
        ("A=1 B>A C>B", "A=1 B>A C>B"),
        ("B>A A=1", "B>A A=1"),
        ("A=1 A=2 B>A", "A=1 A=2 B>A"),
        ("d/ d/A=1 B>d/A d/", "d/ d/A=1 B>d/A d/"),
        // The file stays under the name that is left.
        ("A=1 B>A A=2", "B=1 A=2"),
        ("A=1 B>A A@x", "B=1 A@x"),
        ("A=1 B>A A/", "B=1 A/"),
        ("A=1 B>A A>B", "B=1 A>B"),
        ("A=1 B>A C>A D>B A=2 E>A", "B=1 C>B D>B A=2 E>A"),
        ("A=1 d/ d/B>A A=2", "d/B=1 d/ A=2"),
        ("A@x B>A A=2", "B@x A=2"),
        // Links that are replaced themselves want nothing.
        ("A=1 B>A A=2 B>A", "A=1 B>A A=2 B>A"),
        ("A=1 B>A C>A A=2 B=3", "C=1 B>A A=2 B=3"),
        // The file has its name still; only the link between has gone.
        ("A=1 X>A B>X X=2", "A=1 X>A B>A X=2"),
        ("A=1 X>A B>X X=2 A=3", "B=1 X>A X=2 A=3"),
        ("A=1 B>A A=2 C>A A=3", "B=1 C=2 A=3"),
    ];
    for (before, after) in rows {
        let mut files = table(before);
        to_earlier_files(&mut files).unwrap();
        assert_eq!(files, table(after), "{before}");
    }
}

#[test]
fn what_cannot_have_the_other_name_is_refused() {
    let rows = [
        "A=1 B=2 B>A A=3",
        "A=1 B/ B/c=2 B>A A=3",
        "A=1 B/c=2 B>A A=3",
        "A=1 d@e d/B>A A=2",
        "d@e A=1 d/B>A A=2",
    ];
    for before in rows {
        let (path, rule) = to_earlier_files(&mut table(before)).unwrap_err();
        assert!(path.ends_with(b"B"), "{before}");
        assert!(rule.contains("replaces later"), "{rule}");
    }
}
