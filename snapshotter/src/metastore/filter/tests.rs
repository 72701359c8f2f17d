//! What filters match, and what they refuse.

use proptest::prelude::*;

use super::Filters;
use crate::metastore::{Content, Kind, Labels, Record};

fn record() -> Record {
    let label = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    Record {
        key: "k8s.io/3/sha256:ab".to_owned(),
        kind: Kind::Committed,
        parent: Some("k8s.io/2/sha256:cd".to_owned()),
        content: Content::Directory(1),
        labels: Labels::from([
            label("containerd.io/snapshot.ref", "sha256:ab"),
            label("plain", "some value, with a comma"),
            label("a.b", "dots"),
        ]),
        created: 1,
        updated: 1,
        usage: None,
    }
}

#[test]
fn filters_match_what_containerds_do() {
    let table: &[(&[&str], bool)] = &[
        (&[], true),
        (&[""], true),
        (&["kind==committed"], true),
        (&["kind==active"], false),
        (&["kind!=active"], true),
        (&["name==k8s.io/3/sha256:ab"], true),
        (&["key==\"k8s.io/3/sha256:ab\""], true),
        (&["parent==\"k8s.io/2/sha256:cd\""], true),
        (&["parent==\"\""], false),
        (&["name~=/sha256:[a-f]+$/"], true),
        (&["name~=|^k8s.io/|"], true),
        (&["name~=\"^default\""], false),
        (&["labels.plain"], true),
        (&["labels.missing"], false),
        (&["labels"], false),
        (&["labels.missing!=x"], true),
        (&["labels.missing~=.*"], false),
        (&["labels.a.b==dots"], true),
        (&["labels.\"a.b\"==dots"], true),
        (&["labels.plain==\"some value, with a comma\""], true),
        // What containerd's metadata asks for after ALREADY_EXISTS, word for word.
        (
            &["labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"k8s.io/2/sha256:cd\""],
            true,
        ),
        (
            &["labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"\""],
            false,
        ),
        (&["kind==active", "name~=ab$"], true),
        (&["kind == committed , name ~= ab"], true),
        (&["name==\"k8s.io\\x2f3\\u002fsha256\\072ab\""], true),
        (&["unknown"], false),
        (&["unknown!=x"], true),
    ];
    for (filters, expected) in table {
        let parsed = Filters::parse(filters).unwrap();
        assert_eq!(parsed.matches(&record()), *expected, "{filters:?}");
    }
}

#[test]
fn what_is_no_filter_is_refused() {
    let long = "a".repeat(9000);
    let many = ["kind"; 65].join(",");
    let table = [
        "==x",
        "kind==",
        "kind=active",
        "kind=",
        "kind==a b",
        "a,,b",
        "a,",
        "a.",
        ".a",
        "a~=(",
        "a~=/x",
        "a==/x/",
        "labels.\"x",
        "labels.\"\\q\"==x",
        "a==\"\\x+1\"",
        "a==\"\\xff\"",
        "a==\"x\ny\"",
        "a==x,",
        "é==x",
        "a~=(((((a{99}){99}){99}){99}){99})",
        &long,
        &many,
    ];
    for filter in table {
        let error = Filters::parse(&[filter]).unwrap_err().to_string();
        assert!(error.starts_with("invalid filter"), "{filter}: {error}");
        assert!(error.len() < 800, "{}", error.len());
    }
    assert!(Filters::parse(&["kind"; 65]).is_err());
}

proptest! {
    #[test]
    fn any_text_parses_or_is_refused(text in "\\PC{0,40}") {
        if let Ok(filters) = Filters::parse(&[text]) {
            filters.matches(&record());
        }
    }

    #[test]
    fn any_quoted_text_is_read_back(text in "[^\\x00-\\x1f]{0,20}") {
        let mut wanted = record();
        wanted.key.clone_from(&text);
        let escaped = text.replace('\\', "\\\\").replace('"', "\\\"");
        let filters = Filters::parse(&[format!("name==\"{escaped}\"")]).unwrap();
        prop_assert!(filters.matches(&wanted));
    }
}
