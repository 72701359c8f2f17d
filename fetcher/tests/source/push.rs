//! Pushing with each kind of credential, to a registry that looks at what tokens are for.

#![expect(
    clippy::unwrap_used,
    reason = "a test whose set-up fails must stop there"
)]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use lazarette_fetcher::source::{BlobRef, BlobSource, Pusher, RegistrySource, SourceConfig};
use lazarette_fetcher::test_util::contract::collect;
use lazarette_fetcher::test_util::{Endpoint, FakeRegistry, FakeRegistryBuilder, Fault};
use lazarette_fetcher::types::{Digest, MediaType, Reference, Repository};
use lazarette_fetcher::{Error, Result};

use crate::tls::{self_signed, serving};

const BLOB: &[u8] = b"a layer";
const MANIFEST: &[u8] = b"{}";

struct Case {
    registry: FakeRegistry,
    config: SourceConfig,
    _dir: tempfile::TempDir,
}

impl Case {
    /// A registry, and docker's config with this entry for it.
    async fn new(builder: FakeRegistryBuilder, entry: &str) -> Self {
        let registry = builder.start().await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let config = format!(r#"{{"auths":{{"{}":{entry}}}}}"#, registry.url_host());
        std::fs::write(&path, config).unwrap();
        Self {
            registry,
            config: SourceConfig {
                docker_config: Some(path),
                ..SourceConfig::default()
            },
            _dir: dir,
        }
    }

    fn repository(&self, path: &str) -> Repository {
        let text = format!("{}/{path}:t", self.registry.url_host());
        Reference::parse(&text).unwrap().repository().clone()
    }
}

async fn push(pusher: &Pusher, repository: &Repository) -> Result<()> {
    let (digest, size) = (Digest::sha256(BLOB), BLOB.len() as u64);
    let body = stream::iter([Ok(Bytes::from_static(BLOB))]);
    pusher.push_blob(repository, &digest, size, body).await
}

#[tokio::test]
async fn each_kind_of_credential_pushes_where_it_is_accepted() {
    // "u:p" in base64.
    let password = r#"{"auth":"dTpw"}"#;
    // As docker writes it for registries that know no users.
    let identity = r#"{"auth":"MDAwOg==","identitytoken":"r1"}"#;
    let new = FakeRegistry::builder;
    let table = [
        (new(), identity, true),
        (new().identity("r1"), identity, true),
        (new().identity("r2"), identity, false),
        (new().basic("u", "p"), identity, false),
        (new().bearer_for("u", "p"), identity, false),
        (new().bearer_for("u", "p"), password, true),
        (new().basic("u", "p"), password, true),
        (new().identity("r1"), password, false),
    ];
    for (row, (builder, entry, accepted)) in table.into_iter().enumerate() {
        let case = Case::new(builder, entry).await;
        let repository = case.repository("a/b");
        let pusher = Pusher::new(case.config.clone());
        let pushed = push(&pusher, &repository).await;
        if !accepted {
            let error = pushed.unwrap_err();
            assert!(matches!(error, Error::Denied { .. }), "{row}: {error}");
            assert!(error.to_string().contains("docker login"), "{row}: {error}");
            continue;
        }
        pushed.unwrap();
        let (digest, size) = (Digest::sha256(BLOB), BLOB.len() as u64);
        assert!(pusher.blob_exists(&repository, &digest).await.unwrap());
        let reference = repository.with_digest(Digest::sha256(MANIFEST));
        let manifest = Bytes::from_static(MANIFEST);
        let stored = pusher
            .push_manifest(&reference, &MediaType::OciManifest, manifest)
            .await;
        assert_eq!(stored.unwrap(), Digest::sha256(MANIFEST), "{row}");
        let source = RegistrySource::new(case.config.clone()).unwrap();
        let blob = BlobRef {
            repository,
            digest,
            size,
        };
        let body = source.read_all(&blob).await.unwrap();
        assert_eq!(collect(body).await.unwrap(), BLOB, "{row}");
    }
}

#[tokio::test]
async fn a_registry_is_written_to_as_its_directory_says() {
    let (own, key) = self_signed(false);
    let builder = FakeRegistry::builder().tls(Arc::new(serving(&own, &key)));
    let mut case = Case::new(builder, "{}").await;
    let hosts = tempfile::tempdir().unwrap();
    case.config.hosts_dir = Some(hosts.path().to_path_buf());
    let dir = hosts.path().join(case.registry.url_host());
    std::fs::create_dir(&dir).unwrap();
    let at = case.registry.url_host();
    // What is on loopback is spoken to over http, if nothing is said.
    let text = format!("server = \"https://{at}\"\n[host.\"http://mirror.lan\"]\n");
    let repository = case.repository("a/b");
    let pusher = Pusher::new(case.config.clone());
    std::fs::write(dir.join("hosts.toml"), &text).unwrap();
    let error = push(&pusher, &repository).await.unwrap_err();
    let todo = "if you trust its authority, set ca_file, or ca in its hosts.toml";
    assert!(error.to_string().ends_with(todo), "{error}");
    std::fs::write(dir.join("ca.crt"), own.pem()).unwrap();
    std::fs::write(dir.join("hosts.toml"), format!("ca = \"ca.crt\"\n{text}")).unwrap();
    push(&pusher, &repository).await.unwrap();
    // One that stands in for it is not written to.
    std::fs::write(dir.join("hosts.toml"), "server = \"https://other.lan\"\n").unwrap();
    push(&pusher, &repository).await.unwrap_err();
}

#[tokio::test]
async fn a_certificate_that_pushes_do_not_take_is_named_at_once() {
    let (own, key) = self_signed(true);
    let builder = FakeRegistry::builder().tls(Arc::new(serving(&own, &key)));
    let mut case = Case::new(builder, "{}").await;
    let hosts = tempfile::tempdir().unwrap();
    let dir = hosts.path().join(case.registry.url_host());
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("ca.crt"), own.pem()).unwrap();
    let server = format!(
        "server = 'https://{}'\nca = 'ca.crt'\n",
        case.registry.url_host()
    );
    std::fs::write(dir.join("hosts.toml"), server).unwrap();
    case.config.hosts_dir = Some(hosts.path().to_path_buf());
    let pusher = Pusher::new(case.config.clone());
    let error = push(&pusher, &case.repository("a/b")).await.unwrap_err();
    assert!(!error.is_transient(), "{error}");
    assert!(error.to_string().contains("CA:FALSE"), "{error}");
}

#[tokio::test]
async fn a_registry_that_takes_a_blob_and_says_nothing_costs_the_deadline() {
    let mut case = Case::new(FakeRegistry::builder(), "{}").await;
    case.config.deadline = Duration::from_millis(300);
    case.registry.always(Endpoint::Upload, Fault::Hang);
    let pusher = Pusher::new(case.config.clone());
    let error = push(&pusher, &case.repository("a/b")).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("stood still for 0.3 s"), "{text}");
    assert!(error.is_transient(), "{text}");
}

#[tokio::test]
async fn an_identity_token_is_exchanged_once_for_each_repository() {
    let entry = r#"{"identitytoken":"r1"}"#;
    let case = Case::new(FakeRegistry::builder().identity("r1"), entry).await;
    let pusher = Pusher::new(case.config.clone());
    let (a, b) = (case.repository("team/a"), case.repository("team/b"));
    for _ in 0..3 {
        push(&pusher, &a).await.unwrap();
    }
    assert_eq!(case.registry.requests().tokens, 1);
    // Its token is good for reading the other one, too.
    let digest = Digest::sha256(BLOB);
    assert!(pusher.mount_blob(&b, &a, &digest).await.unwrap());
    assert!(pusher.mount_blob(&b, &a, &digest).await.unwrap());
    assert_eq!(case.registry.requests().tokens, 2);
    push(&pusher, &b).await.unwrap();
    assert_eq!(case.registry.requests().tokens, 3);
}

#[tokio::test]
async fn a_token_that_does_not_last_is_not_kept() {
    let entry = r#"{"identitytoken":"r1"}"#;
    let builder = FakeRegistry::builder().identity("r1").token_life_s(0);
    let case = Case::new(builder, entry).await;
    let pusher = Pusher::new(case.config.clone());
    for tokens in 1..=2 {
        push(&pusher, &case.repository("a")).await.unwrap();
        assert_eq!(case.registry.requests().tokens, tokens);
    }
}
