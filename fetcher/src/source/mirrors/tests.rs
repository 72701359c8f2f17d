//! Whose turn it is, what is said at the end, and hosts files that change.

use std::fs;
use std::path::Path;

use super::*;
use crate::source::SourceConfig;
use crate::source::hosts::Capabilities;

fn registry(dir: Option<&Path>) -> RegistrySource {
    RegistrySource::new(SourceConfig {
        hosts_dir: dir.map(Path::to_path_buf),
        ..SourceConfig::default()
    })
    .unwrap()
}

fn candidate(name: &str, decides: bool) -> Candidate {
    Candidate {
        source: registry(None),
        capabilities: Capabilities::ALL,
        decides,
        name: name.into(),
    }
}

fn names(candidates: &[Candidate]) -> Vec<&str> {
    candidates.iter().map(|one| &*one.name).collect()
}

#[test]
fn who_is_in_trouble_comes_last_until_one_question_went_well() {
    let standing = Standing::default();
    let all = [
        candidate("a", false),
        candidate("b", false),
        candidate("up", true),
    ];
    let start = Instant::now();
    let order = |after: Duration| {
        let mut order = all.to_vec();
        standing.order(&mut order, None, start + after);
        names(&order).join(" ")
    };
    let (none, off) = (Duration::ZERO, standing::OFF);
    assert_eq!(order(none), "a b up");
    standing.troubled(&all[0], None, start);
    assert_eq!(order(none), "b up a");
    assert_eq!(order(off / 2), "b up a");
    assert_eq!(order(off), "a b up", "one tries");
    assert_eq!(order(off), "b up a", "the others wait for it");
    standing.worked(&all[0]);
    assert_eq!(order(off), "a b up");
    // A mirror that has come back is not asked behind a registry that nobody can reach.
    standing.troubled(&all[0], None, start);
    standing.troubled(&all[1], None, start);
    standing.troubled(&all[2], None, start);
    assert_eq!(order(none), "a b up");
}

#[test]
fn who_asks_for_longer_is_left_alone_for_longer() {
    let standing = Standing::default();
    let all = [candidate("a", false), candidate("up", true)];
    let start = Instant::now();
    let order = |after: Duration| {
        let mut order = all.to_vec();
        standing.order(&mut order, None, start + after);
        names(&order).join(" ")
    };
    let off = standing::OFF;
    for (asked, last) in [(off / 30, off), (2 * off, 2 * off), (120 * off, 10 * off)] {
        standing.troubled(&all[0], Some(asked), start);
        assert_eq!(order(last - Duration::from_millis(1)), "up a", "{asked:?}");
        assert_eq!(order(last), "a up", "{asked:?}");
    }
}

#[test]
fn who_has_no_such_blob_is_asked_for_it_later_and_for_others_at_once() {
    let standing = Standing::default();
    let all = [
        candidate("a", false),
        candidate("b", false),
        candidate("up", true),
    ];
    let (blob, other) = (Digest::sha256(b"blob"), Digest::sha256(b"other"));
    let start = Instant::now();
    let order = |blob: &Digest, after: Duration| {
        let mut order = all.to_vec();
        standing.order(&mut order, Some(blob), start + after);
        names(&order).join(" ")
    };
    let none = Duration::ZERO;
    standing.lacks(&all[0], &blob, start);
    standing.troubled(&all[1], None, start);
    assert_eq!(order(&blob, none), "up b a");
    assert_eq!(order(&other, none), "a up b");
    standing.worked(&all[1]);
    assert_eq!(order(&blob, none), "b up a");
    assert_eq!(order(&blob, standing::OFF), "a b up");
}

#[test]
fn who_sent_other_bytes_comes_last_for_that_blob() {
    let standing = Standing::default();
    let all = [candidate("a", false), candidate("up", true)];
    let (bad, good) = (Digest::sha256(b"bad"), Digest::sha256(b"good"));
    let order = |blob: &Digest| {
        let mut order = all.to_vec();
        standing.order(&mut order, Some(blob), Instant::now());
        names(&order).join(" ")
    };
    // Nobody has sent it.
    standing.distrust(&bad);
    assert_eq!(order(&bad), "a up");
    standing.sends(&all[0], &bad);
    standing.distrust(&bad);
    assert_eq!((order(&bad), order(&good)), ("up a".into(), "a up".into()));
    // Said twice of one sending.
    standing.distrust(&bad);
    assert_eq!(order(&bad), "up a");
    standing.sent("a", &bad);
    standing.sends(&all[1], &bad);
    standing.distrust(&bad);
    assert_eq!(order(&bad), "a up", "all of them have");
    standing.sent("up", &bad);
    standing.sends(&all[0], &bad);
    standing.distrust(&bad);
    assert_eq!(order(&bad), "up a", "whoever did last is asked last");
}

#[test]
fn what_one_host_sent_is_not_laid_to_the_next() {
    let standing = Standing::default();
    let all = [candidate("a", false), candidate("up", true)];
    let blob = Digest::sha256(b"blob");
    let order = || {
        let mut order = all.to_vec();
        standing.order(&mut order, Some(&blob), Instant::now());
        names(&order).join(" ")
    };
    // Two requests at once, then the first of them once more.
    standing.sends(&all[0], &blob);
    standing.sends(&all[0], &blob);
    standing.distrust(&blob);
    standing.sent("a", &blob);
    assert_eq!(order(), "up a");
    standing.sends(&all[1], &blob);
    standing.distrust(&blob);
    assert_eq!(order(), "up a", "the second of them was a's, too");
    // One body with bytes of both.
    let other = Digest::sha256(b"other");
    standing.sends(&all[0], &other);
    standing.sends(&all[1], &other);
    standing.distrust(&other);
    let mut order = all.to_vec();
    standing.order(&mut order, Some(&other), Instant::now());
    assert_eq!(names(&order), ["up", "a"]);
}

#[test]
fn what_is_said_at_the_end_names_all_and_is_of_the_deciding_kind() {
    let what = || "blob x".to_owned();
    let missing = |host: &str| Error::NotFound {
        what: what(),
        host: host.to_owned(),
    };
    let down = |host: &str| Error::Unavailable {
        what: what(),
        host: host.to_owned(),
        detail: "cannot connect".to_owned(),
    };
    let said = |failures: Vec<(&str, bool, Error)>| {
        let mut tried = Tried::default();
        for (name, decides, error) in failures {
            tried.add(&candidate(name, decides), error);
        }
        tried.into_error().to_string()
    };
    assert_eq!(
        said(vec![("up", true, missing("up"))]),
        "blob x not found at up"
    );
    assert_eq!(
        said(vec![
            ("m", false, down("m")),
            ("n", false, missing("n")),
            ("up", true, missing("up")),
        ]),
        "blob x not found at up (asked too: m: cannot connect; n: not found)"
    );
    // Asked last, for it did not answer lately; the kind is the registry's all the same.
    assert_eq!(
        said(vec![("up", true, missing("up")), ("m", false, down("m"))]),
        "blob x not found at up (asked too: m: cannot connect)"
    );
    let long = Error::malformed("blob x", "y".repeat(500));
    let text = said(vec![("m", false, long), ("up", true, down("up"))]);
    assert!(text.starts_with("cannot read blob x from up: cannot connect (asked too: m: yyy"));
    assert!(text.len() < 300, "{text}");
}

fn write(dir: &Path, text: &str) {
    let dir = dir.join("a.lan");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("hosts.toml"), text).unwrap();
}

#[test]
fn hosts_files_are_read_again_when_they_change() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let registry = registry(Some(root));
    let look =
        |before: Option<&Plan>| look(&registry, &[root.to_path_buf()], "a.lan", before.cloned());
    let named = |plan: &Plan| names(&plan.candidates).join(" ");
    let none = look(None).unwrap();
    assert_eq!(named(&none), "a.lan");
    write(root, "[host.m]\n");
    let one = look(Some(&none)).unwrap();
    assert_eq!(named(&one), "m a.lan");
    let same = look(Some(&one)).unwrap();
    assert!(Arc::ptr_eq(&same.candidates, &one.candidates));
    // A bad one changes nothing, and is read once.
    write(root, "[host.m]\ncapabilities = 'none'\n");
    let bad = look(Some(&same)).unwrap();
    assert!(Arc::ptr_eq(&bad.candidates, &one.candidates));
    let still = look(Some(&bad)).unwrap();
    assert!(Arc::ptr_eq(&still.stamp, &bad.stamp));
    let error = look(None).err().unwrap().to_string();
    assert!(error.contains("a.lan/hosts.toml is malformed: host.\"m\".capabilities"));
    write(root, "server = 'http://docker.io'\n[host.n]\n[host.m]\n");
    assert_eq!(named(&look(Some(&still)).unwrap()), "n m docker.io");
}

#[tokio::test]
async fn who_may_not_is_not_asked() {
    let root = tempfile::tempdir().unwrap();
    let text = "capabilities = ['push']\n[host.t]\ncapabilities = ['resolve']\n\
                [host.p]\ncapabilities = ['pull']\n";
    write(root.path(), text);
    let mirrors = Mirrors::looking_every(Duration::ZERO, registry(Some(root.path())));
    let tagged = Reference::parse("a.lan/x:t").unwrap();
    let asked = async |need| {
        let found = mirrors.candidates(tagged.repository(), need, None).await;
        found.map(|all| names(&all).join(" "))
    };
    assert_eq!(asked(Capability::Pull).await.unwrap(), "p");
    assert_eq!(asked(Capability::Resolve).await.unwrap(), "t");
    assert_eq!(asked(Capability::Push).await.unwrap(), "a.lan");
    assert_eq!(asked(Capability::Referrers).await.unwrap(), "t");
    // Without a restart.
    write(root.path(), "capabilities = ['push']");
    let error = mirrors.resolve(&tagged).await.unwrap_err().to_string();
    assert_eq!(
        error,
        "reading a.lan/x is not supported: no host in its hosts file has the capability \"resolve\""
    );
}
