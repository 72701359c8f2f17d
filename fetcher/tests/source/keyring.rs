//! Credentials that came with a pull: who gets them, and what happens when they change.

#![expect(
    clippy::unwrap_used,
    reason = "a test whose set-up fails must stop there"
)]

use std::sync::Arc;

use lazarette_fetcher::Error;
use lazarette_fetcher::source::{
    BlobRef, BlobSource, Credential, Keyring, RegistrySource, SourceConfig, stack,
};
use lazarette_fetcher::test_util::contract::collect;
use lazarette_fetcher::test_util::{Endpoint, FakeRegistry, FakeRegistryBuilder, Fault};
use lazarette_fetcher::types::{ByteRange, Reference, Repository};

struct Case {
    registry: FakeRegistry,
    source: RegistrySource,
    blob: BlobRef,
}

async fn case(builder: FakeRegistryBuilder, config: SourceConfig) -> Case {
    let registry = builder.start().await.unwrap();
    let digest = registry.add_blob(b"bytes".to_vec());
    let blob = BlobRef {
        repository: repository(&registry, "a/b"),
        digest,
        size: 5,
    };
    Case {
        registry,
        source: RegistrySource::new(config).unwrap(),
        blob,
    }
}

fn repository(registry: &FakeRegistry, path: &str) -> Repository {
    let text = format!("{}/{path}", registry.url_host());
    Reference::parse(&text).unwrap().repository().clone()
}

fn basic(user: &str) -> Credential {
    Credential::Basic {
        user: user.to_owned(),
        password: "p".to_owned(),
    }
}

impl Case {
    fn keyring(&self) -> &Arc<Keyring> {
        self.source.keyring()
    }

    async fn read(&self) -> Result<(), Error> {
        let body = self.source.read_all(&self.blob).await?;
        assert_eq!(collect(body).await?, b"bytes");
        Ok(())
    }

    async fn refusal(&self) -> String {
        let error = self.read().await.unwrap_err();
        assert!(matches!(error, Error::Denied { .. }), "{error}");
        error.to_string()
    }
}

/// Each kind of registry that wants a credential, and one that it takes.
fn kinds() -> Vec<(FakeRegistryBuilder, Credential)> {
    let token = || Credential::Identity("r".to_owned());
    vec![
        (FakeRegistry::builder().basic("u", "p"), basic("u")),
        (FakeRegistry::builder().bearer_for("u", "p"), basic("u")),
        (FakeRegistry::builder().identity("r"), token()),
    ]
}

#[tokio::test]
async fn what_a_pull_came_with_is_used_for_its_repository_only() {
    for (row, (builder, right)) in kinds().into_iter().enumerate() {
        let case = case(builder, SourceConfig::default()).await;
        case.refusal().await;
        let other = repository(&case.registry, "a/other");
        case.keyring().give(&other, right.clone()).succeeded();
        case.refusal().await;
        let pull = case.keyring().give(&case.blob.repository, right);
        case.read()
            .await
            .unwrap_or_else(|error| panic!("{row}: {error}"));
        pull.succeeded();
        case.read().await.unwrap();
    }
}

#[tokio::test]
async fn a_wrong_one_does_not_displace_a_right_one() {
    for (row, (builder, right)) in kinds().into_iter().enumerate() {
        let case = case(builder.token_life_s(0), SourceConfig::default()).await;
        let give = |credential| case.keyring().give(&case.blob.repository, credential);
        give(right).succeeded();
        case.read().await.unwrap();
        // Of another tenant's pull, which containerd has yet to refuse.
        let pull = give(basic("wrong"));
        case.read()
            .await
            .unwrap_or_else(|error| panic!("{row}: {error}"));
        drop(pull);
        case.read().await.unwrap();
    }
}

#[tokio::test]
async fn one_that_gets_tokens_which_are_good_for_nothing_is_given_up() {
    let case = case(FakeRegistry::builder().bearer(), SourceConfig::default()).await;
    let give = |user| case.keyring().give(&case.blob.repository, basic(user));
    give("right").succeeded();
    case.read().await.unwrap();
    let pull = give("wrong");
    // The old token, which has expired, and the new one, of whom may not read this.
    for _ in 0..2 {
        case.registry
            .script_on(Endpoint::Blob, Fault::Status(401, None));
    }
    let before = case.registry.requests();
    case.read().await.unwrap();
    let after = case.registry.requests();
    assert_eq!(after.tokens - before.tokens, 2, "one for each of them");
    assert_eq!(after.blobs - before.blobs, 3);
    drop(pull);
    // Refused as well, and there is no other: no request more than it takes to know.
    for _ in 0..2 {
        case.registry
            .script_on(Endpoint::Blob, Fault::Status(401, None));
    }
    case.refusal().await;
    assert_eq!(case.registry.requests().blobs - after.blobs, 2);
}

#[tokio::test]
async fn a_new_one_takes_the_place_of_one_that_was_rotated_away() {
    for (row, (builder, right)) in kinds().into_iter().enumerate() {
        let case = case(builder, SourceConfig::default()).await;
        let give = |credential| case.keyring().give(&case.blob.repository, credential);
        give(basic("old")).succeeded();
        let said = case.refusal().await;
        assert!(
            said.contains("its last pull came with are not accepted"),
            "{row}: {said}"
        );
        assert!(!said.contains("old"), "{row}: {said}");
        give(right).succeeded();
        case.read()
            .await
            .unwrap_or_else(|error| panic!("{row}: {error}"));
    }
}

#[tokio::test]
async fn the_config_is_asked_where_the_pulls_is_refused() {
    for (row, builder) in [
        FakeRegistry::builder().basic("u", "p"),
        FakeRegistry::builder().bearer_for("u", "p"),
        // As ECR does with a token that has expired.
        FakeRegistry::builder().basic("u", "p").forbidding(),
    ]
    .into_iter()
    .enumerate()
    {
        let dir = tempfile::tempdir().unwrap();
        let mut case = case(builder, SourceConfig::default()).await;
        let path = dir.path().join("config.json");
        let host = case.registry.url_host();
        // "u:p" in base64.
        let text = format!(r#"{{"auths":{{"{host}":{{"auth":"dTpw"}}}}}}"#);
        std::fs::write(&path, text).unwrap();
        case.source = RegistrySource::new(SourceConfig {
            docker_config: Some(path),
            ..SourceConfig::default()
        })
        .unwrap();
        case.keyring()
            .give(&case.blob.repository, basic("old"))
            .succeeded();
        case.read()
            .await
            .unwrap_or_else(|error| panic!("{row}: {error}"));
        case.read().await.unwrap();
    }
}

#[tokio::test]
async fn a_registrys_own_token_is_sent_as_it_is() {
    let case = case(FakeRegistry::builder().bearer(), SourceConfig::default()).await;
    // What the first question for a token gets; it counts from one.
    case.read().await.unwrap();
    let fresh = RegistrySource::new(SourceConfig::default()).unwrap();
    let tokens = case.registry.requests().tokens;
    let token = Credential::Registry(format!("token-{tokens}"));
    fresh
        .keyring()
        .give(&case.blob.repository, token)
        .succeeded();
    let body = fresh.read_all(&case.blob).await.unwrap();
    assert_eq!(collect(body).await.unwrap(), b"bytes");
    assert_eq!(
        case.registry.requests().tokens,
        tokens,
        "none was asked for"
    );
}

#[tokio::test]
async fn what_one_repository_wants_another_need_not() {
    let builder = FakeRegistry::builder().basic("u", "p").private("a/b");
    let case = case(builder, SourceConfig::default()).await;
    case.refusal().await;
    let public = BlobRef {
        repository: repository(&case.registry, "for/all"),
        ..case.blob.clone()
    };
    let body = case.source.read_all(&public).await.unwrap();
    assert_eq!(collect(body).await.unwrap(), b"bytes");
    case.refusal().await;
}

#[tokio::test]
async fn what_one_repository_refuses_is_read_from_another_that_has_it() {
    let builder = FakeRegistry::builder().basic("u", "p").private("a/b");
    let Case { registry, blob, .. } = case(builder, SourceConfig::default()).await;
    let (source, mirrors) = stack::build(SourceConfig::default()).unwrap();
    let read = async || collect(source.read_all(&blob).await?).await;
    let (own, other) = (
        repository(&registry, "a/b"),
        repository(&registry, "for/all"),
    );
    assert!(matches!(read().await, Err(Error::Denied { .. })));
    mirrors.homes().note(&blob.digest, &own);
    assert!(matches!(read().await, Err(Error::Denied { .. })));
    mirrors.homes().note(&blob.digest, &other);
    assert_eq!(read().await.unwrap(), b"bytes");
    // It is asked first from then on.
    let before = registry.requests().blobs;
    assert_eq!(read().await.unwrap(), b"bytes");
    assert_eq!(registry.requests().blobs, before + 1);
    // What is no refusal is for everybody.
    registry.script_on(Endpoint::Blob, Fault::TooLong);
    assert!(matches!(read().await, Err(Error::Malformed { .. })));
    mirrors.homes().forget(&blob.digest);
    assert!(matches!(read().await, Err(Error::Denied { .. })));
}

#[tokio::test]
async fn another_repository_that_fails_is_left_for_the_own_one() {
    let Case { registry, blob, .. } = case(FakeRegistry::builder(), SourceConfig::default()).await;
    let other = FakeRegistry::start().await;
    other.add_blob(b"bytes".to_vec());
    let (source, mirrors) = stack::build(SourceConfig::default()).unwrap();
    let all = ByteRange::new(0, 5).unwrap();
    let read = async || collect(source.read_range(&blob, all).await?).await;
    mirrors
        .homes()
        .note(&blob.digest, &repository(&other, "a/b"));
    registry.always(Endpoint::Blob, Fault::Status(403, None));
    assert_eq!(read().await.unwrap(), b"bytes");
    registry.behave();
    // Neither refused nor not there.
    other.always(Endpoint::Blob, Fault::IgnoreRange);
    assert_eq!(read().await.unwrap(), b"bytes");
    let before = other.requests().blobs;
    assert_eq!(read().await.unwrap(), b"bytes");
    assert_eq!(
        other.requests().blobs,
        before,
        "its own is asked first again"
    );
}
