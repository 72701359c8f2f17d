//! Whose credentials are found, when, and for how long.

use proptest::prelude::*;

use super::*;
use crate::types::Reference;

fn repository(text: &str) -> Repository {
    Reference::parse(text).unwrap().repository().clone()
}

fn secret(name: &str) -> Credential {
    Credential::Identity(name.to_owned())
}

/// The name of what is found for `image`.
fn found(keyring: &Keyring, image: &str) -> Option<String> {
    let repository = repository(image);
    name(keyring.find(repository.host(), repository.path()))
}

fn name(credential: Option<Credential>) -> Option<String> {
    match credential? {
        Credential::Identity(name) => Some(name),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_a_pull_came_with_is_found_for_its_repository_only() {
    let keyring = Arc::<Keyring>::default();
    let pull = keyring.give(&repository("reg.lan:5000/a/b:1"), secret("s"));
    assert_eq!(found(&keyring, "reg.lan:5000/a/b:2"), Some("s".into()));
    pull.succeeded();
    let table = [
        (
            "reg.lan:5000/a/b@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            true,
        ),
        ("reg.lan:5000/a/c", false),
        ("reg.lan:5000/a", false),
        ("reg.lan:5000/a/b/c", false),
        ("reg.lan/a/b", false),
        ("other.lan:5000/a/b", false),
        ("docker.io/a/b", false),
    ];
    for (image, is_found) in table {
        assert_eq!(found(&keyring, image).is_some(), is_found, "{image}");
    }
    keyring.give(&repository("a/b"), secret("hub")).succeeded();
    assert_eq!(found(&keyring, "index.docker.io/a/b"), Some("hub".into()));
}

#[test]
fn a_pull_that_succeeds_replaces_and_one_that_fails_changes_nothing() {
    let keyring = Arc::<Keyring>::default();
    let image = "reg.lan/a";
    let give = |name| keyring.give(&repository(image), secret(name));
    drop(give("wrong"));
    assert_eq!(found(&keyring, image), None);
    give("old").succeeded();
    let pull = give("wrong");
    assert_eq!(found(&keyring, image), Some("wrong".into()));
    drop(pull);
    assert_eq!(found(&keyring, image), Some("old".into()));
    // The same again, which is cut off.
    drop(give("old"));
    assert_eq!(found(&keyring, image), Some("old".into()));
    // Two at once with the same one, of which the first is cut off.
    let (first, second) = (give("new"), give("new"));
    drop(first);
    assert_eq!(found(&keyring, image), Some("new".into()));
    second.succeeded();
    assert!(keyring.refused("reg.lan", "a", &secret("new")));
    assert_eq!(found(&keyring, image), None, "the old one is gone");
}

#[test]
fn a_refused_one_comes_last_for_a_while() {
    let keyring = Arc::<Keyring>::default();
    let image = "reg.lan/a";
    let start = Instant::now();
    let refuse = |name| keyring.refused_at(start, "reg.lan", "a", &secret(name));
    let after = |time| name(keyring.find_at(start + time, "reg.lan", "a"));
    keyring.give(&repository(image), secret("old")).succeeded();
    let pull = keyring.give(&repository(image), secret("new"));
    assert!(refuse("new"));
    assert_eq!(after(Duration::ZERO), Some("old".into()));
    assert!(refuse("old"));
    assert_eq!(after(Duration::ZERO), None);
    assert_eq!(
        name(keyring.find_refused("reg.lan", "a")),
        Some("new".into())
    );
    assert_eq!(after(REFUSED), Some("new".into()));
    assert!(refuse("new"));
    pull.succeeded();
    assert_eq!(after(Duration::ZERO), Some("new".into()));
    assert!(!refuse("old"), "it is gone");
    assert!(!keyring.refused("reg.lan", "b", &secret("new")));
}

#[test]
fn what_nobody_uses_is_forgotten_and_room_is_bounded() {
    let keyring = Arc::<Keyring>::default();
    let start = Instant::now();
    let give = |after: Duration, image: &str| {
        let pull = keyring.give_at(start + after, &repository(image), secret("s"));
        pull.succeeded();
    };
    let is_found =
        |after: Duration, path: &str| keyring.find_at(start + after, "reg.lan", path).is_some();
    give(Duration::ZERO, "reg.lan/a");
    give(Duration::ZERO, "reg.lan/b");
    assert!(is_found(KEEP / 2, "a"));
    assert!(is_found(KEEP, "a"), "it was used");
    assert!(!is_found(KEEP, "b"), "it was not");
    for number in (1..).take(REPOSITORIES_MAX) {
        let after = KEEP + Duration::from_secs(number);
        give(after, &format!("reg.lan/x{number}"));
        assert!(keyring.slots.lock().len() <= REPOSITORIES_MAX);
    }
    assert!(!is_found(KEEP, "a"), "the oldest had to go");
    let number = |number: usize| secret(&number.to_string());
    let pulls: Vec<_> = (0..2 * HELD_MAX)
        .map(|at| keyring.give_at(start + KEEP, &repository("reg.lan/x1"), number(at)))
        .collect();
    assert_eq!(keyring.slots.lock()["reg.lan/x1"].held.len(), HELD_MAX);
    drop(pulls);
    assert!(!is_found(KEEP, "x1"), "they pushed it out");
}

#[test]
fn secrets_are_not_printed() {
    let all = [
        Credential::Basic {
            user: "hidden-u".into(),
            password: "hidden-p".into(),
        },
        Credential::Identity("hidden".into()),
        Credential::Registry("hidden".into()),
        Credential::Anonymous,
    ];
    let text = format!("{all:?}");
    assert!(text.contains("Basic") && !text.contains("hidden"), "{text}");
}

#[test]
fn credentials_of_a_pull_are_read_as_containerd_does() {
    let basic = |user: &str, password: &str| Credential::Basic {
        user: user.into(),
        password: password.into(),
    };
    let none = PullAuth::default();
    let of_user = PullAuth {
        username: "u",
        password: "p",
        auth: "eDp5",
        identity_token: "i",
        ..none
    };
    let auth = |auth| PullAuth { auth, ..none };
    let at = |server_address| PullAuth {
        server_address,
        ..of_user
    };
    let token = PullAuth {
        registry_token: "t",
        ..none
    };
    let identity = PullAuth {
        identity_token: "i",
        ..auth("eDp5")
    };
    let table = [
        (none, Ok(None)),
        (of_user, Ok(Some(basic("u", "p")))),
        (identity, Ok(Some(Credential::Identity("i".into())))),
        (auth("eDp5OnoA"), Ok(Some(basic("x", "y:z")))),
        (auth("eDp5eg"), Ok(Some(basic("x", "yz")))),
        (token, Ok(Some(Credential::Registry("t".into())))),
        (auth("%"), Err("auth is not base64")),
        (auth("eA=="), Err("auth has no colon")),
        (auth("Onk="), Err("auth has no user")),
        (auth("//8="), Err("auth is not text")),
        (at("reg.lan"), Ok(Some(basic("u", "p")))),
        (at("https://reg.lan/v1/"), Ok(Some(basic("u", "p")))),
        (at("http://"), Ok(Some(basic("u", "p")))),
        (
            at("reg.lan.evil"),
            Err("the credentials are for another registry"),
        ),
        (
            at("reg.lan:5000"),
            Err("the credentials are for another registry"),
        ),
    ];
    for (row, (auth, expected)) in table.into_iter().enumerate() {
        let got = auth.credential(&repository("reg.lan/a"));
        assert!(got == expected, "{row}: {got:?}");
    }
    let hub = at("https://index.docker.io/v1/");
    assert!(hub.credential(&repository("debian")).unwrap().is_some());
    let long = "x".repeat(17 << 10);
    let long = PullAuth {
        username: &long,
        ..none
    };
    assert!(long.credential(&repository("debian")).is_err());
}

proptest! {
    /// Whatever pulls do, one that ended in failure leaves nothing of its own, and the last
    /// that succeeded is there while no other is under way.
    #[test]
    fn the_last_success_is_what_remains(steps in prop::collection::vec((0..5_u8, any::<bool>()), 1..60)) {
        let keyring = Arc::<Keyring>::default();
        let image = repository("reg.lan/a");
        let mut last = None;
        let mut under_way = Vec::new();
        for (number, succeeds) in steps {
            under_way.push((number, keyring.give(&image, secret(&number.to_string())), succeeds));
            // At most two at once, so that none is pushed out.
            if under_way.len() == 2 {
                let (number, pull, succeeds) = under_way.remove(0);
                if succeeds {
                    pull.succeeded();
                    last = Some(number.to_string());
                }
            }
        }
        for (number, pull, succeeds) in under_way {
            if succeeds {
                pull.succeeded();
                last = Some(number.to_string());
            }
        }
        let slots = keyring.slots.lock();
        let held: Vec<_> = slots.values().flat_map(|slot| &slot.held).collect();
        prop_assert!(held.iter().all(|held| held.proven && held.pulls == 0));
        let names: Vec<_> = held.iter().map(|held| name(Some(held.credential.clone()))).collect();
        if last.is_some() {
            prop_assert!(names.contains(&last));
        } else {
            prop_assert!(names.is_empty());
        }
    }

    /// Fields of any content are a credential or an error that repeats nothing.
    #[test]
    fn any_fields_are_read(fields in prop::array::uniform6(".{0,40}")) {
        let [username, password, auth, server_address, identity_token, registry_token] = &fields;
        let auth = PullAuth { username, password, auth, server_address, identity_token, registry_token };
        if let Ok(Some(credential)) = auth.credential(&repository("reg.lan/a")) {
            prop_assert!(credential != Credential::Anonymous);
        }
    }
}
