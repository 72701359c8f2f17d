//! Hosts that stand in for a registry: their order, their faults, and what each is told.

#![expect(
    clippy::unwrap_used,
    reason = "a test whose set-up fails must stop there"
)]

mod certificates;
mod trouble;

use std::sync::Arc;
use std::time::Duration;

use lazarette_fetcher::Result;
use lazarette_fetcher::source::{BlobRef, BlobSource, SourceConfig, stack};
use lazarette_fetcher::test_util::contract::{self, ARTIFACT_TYPE, Fixture, TAG, collect};
use lazarette_fetcher::test_util::{Endpoint, FakeRegistry, FakeRegistryBuilder, Fault};
use lazarette_fetcher::types::{ByteRange, Digest, MediaType};

const PATH: &str = "team/app";

/// A registry, what it holds, and a directory for its hosts.
struct Case {
    upstream: FakeRegistry,
    fixture: Fixture,
    dir: tempfile::TempDir,
}

fn load(registry: &FakeRegistry, fixture: &Fixture) {
    for blob in &fixture.blobs {
        registry.add_blob(blob.clone());
    }
    registry.add_manifest(PATH, TAG, MediaType::OciManifest, fixture.manifest.clone());
    registry.add_manifest(PATH, "", MediaType::OciManifest, fixture.referrer.clone());
}

impl Case {
    async fn new(upstream: FakeRegistryBuilder) -> Self {
        let upstream = upstream.start().await.unwrap();
        let fixture = Fixture::new(&upstream.url_host(), PATH);
        load(&upstream, &fixture);
        let dir = tempfile::tempdir().unwrap();
        Self {
            upstream,
            fixture,
            dir,
        }
    }

    /// A host that holds the same.
    async fn mirror(&self, builder: FakeRegistryBuilder) -> FakeRegistry {
        let mirror = builder.start().await.unwrap();
        load(&mirror, &self.fixture);
        mirror
    }

    fn hosts(&self, text: &str) {
        let name = self.upstream.url_host().replace(':', "_") + "_";
        let dir = self.dir.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("hosts.toml"), text).unwrap();
    }

    fn config(&self) -> SourceConfig {
        SourceConfig {
            hosts_dir: Some(self.dir.path().to_path_buf()),
            ..SourceConfig::default()
        }
    }

    fn source(&self) -> Arc<dyn BlobSource> {
        stack::build(self.config()).unwrap().0
    }

    /// One that waits for silent hosts only shortly; where they are, what others are asked
    /// cannot be counted.
    fn impatient_source(&self) -> Arc<dyn BlobSource> {
        let config = SourceConfig {
            stall_timeout: Duration::from_millis(300),
            ..self.config()
        };
        stack::build(config).unwrap().0
    }

    /// All of the large blob.
    async fn all(&self, source: &dyn BlobSource) -> Result<Vec<u8>> {
        let (blob, _) = self.fixture.large();
        collect(source.read_all(&blob).await?).await
    }

    /// Ten bytes of it.
    async fn ten(&self, source: &dyn BlobSource) -> Result<Vec<u8>> {
        let (blob, _) = self.fixture.large();
        let range = ByteRange::new(1000, 1010).unwrap();
        collect(source.read_range(&blob, range).await?).await
    }

    /// Another blob than the large one.
    fn other(&self) -> BlobRef {
        self.fixture.blob(&self.fixture.blobs[0])
    }

    fn expected_ten(&self) -> Vec<u8> {
        self.fixture.large().1[1000..1010].to_vec()
    }
}

fn host(registry: &FakeRegistry, settings: &str) -> String {
    let host = registry.url_host();
    format!("[host.\"http://{host}\"]\n{settings}\n")
}

/// The address of nobody, as long as the socket is there.
fn nobody() -> (tokio::net::TcpSocket, String) {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap().to_string();
    (socket, address)
}

#[tokio::test]
async fn a_mirror_keeps_the_contract_and_spares_the_registry() {
    let case = Case::new(FakeRegistry::builder()).await;
    let mirror = case
        .mirror(FakeRegistry::builder().bearer().redirect())
        .await;
    case.hosts(&host(&mirror, ""));
    let source = case.source();
    contract::referrers(source.as_ref(), &case.fixture).await;
    contract::documents(source.as_ref(), &case.fixture).await;
    assert_eq!(case.all(source.as_ref()).await.unwrap().len(), 300_001);
    assert_eq!(case.upstream.requests(), Default::default());
    let ns = format!("ns={}", case.upstream.url_host().replace(':', "%3A"));
    for asked in mirror.asked() {
        let is_api = !matches!(asked.endpoint, Endpoint::Cdn | Endpoint::Token);
        assert_eq!(asked.target.contains(&ns), is_api, "{asked:?}");
    }
    contract::check(source.as_ref(), &case.fixture).await;
}

#[tokio::test]
async fn the_contract_holds_whatever_is_wrong_with_mirrors() {
    let case = Case::new(FakeRegistry::builder()).await;
    let empty = FakeRegistry::builder().without_referrers();
    let empty = empty.start().await.unwrap();
    let broken = case.mirror(FakeRegistry::builder()).await;
    broken.always(Endpoint::Manifest, Fault::Status(500, None));
    broken.always(Endpoint::Blob, Fault::Status(403, None));
    let (_socket, dead) = nobody();
    let dead = format!("[host.\"http://{dead}\"]\n");
    case.hosts(&(dead + &host(&empty, "") + &host(&broken, "")));
    let source = case.source();
    contract::check(source.as_ref(), &case.fixture).await;
    contract::referrers(source.as_ref(), &case.fixture).await;
    assert!(empty.requests().blobs > 0 && broken.requests().blobs > 0);
}

#[tokio::test]
async fn hosts_are_asked_in_the_files_order() {
    let case = Case::new(FakeRegistry::builder()).await;
    let (first, second) = (FakeRegistry::start().await, FakeRegistry::start().await);
    load(&second, &case.fixture);
    case.hosts(&(host(&first, "") + &host(&second, "")));
    let source = case.source();
    let got = case.ten(source.as_ref()).await.unwrap();
    assert_eq!(got, case.expected_ten());
    let blobs = |registry: &FakeRegistry| registry.requests().blobs;
    let counts = (blobs(&first), blobs(&second), blobs(&case.upstream));
    assert_eq!(counts, (1, 1, 0));
}

#[tokio::test]
async fn tags_are_resolved_by_who_may() {
    let case = Case::new(FakeRegistry::builder()).await;
    let mirror = case.mirror(FakeRegistry::builder()).await;
    // What a host that may not resolve tags would say.
    let other = r#"{"layers":[]}"#;
    mirror.add_manifest(PATH, TAG, MediaType::OciManifest, other);
    case.hosts(&host(&mirror, "capabilities = ['pull']"));
    let source = case.source();
    contract::documents(source.as_ref(), &case.fixture).await;
    assert_eq!(mirror.requests().manifests, 1, "the digest");
    assert_eq!(case.upstream.requests().manifests, 1, "the tag");
}

#[tokio::test]
async fn only_the_server_is_asked_where_one_is_named() {
    let case = Case::new(FakeRegistry::builder()).await;
    let server = case.mirror(FakeRegistry::builder()).await;
    case.hosts(&format!("server = \"http://{}\"\n", server.url_host()));
    let source = case.source();
    contract::check(source.as_ref(), &case.fixture).await;
    assert_eq!(case.upstream.requests(), Default::default());
}

#[tokio::test]
async fn whatever_a_mirror_answers_the_registry_is_asked_next() {
    let faults = [
        Fault::Status(400, None),
        Fault::Status(401, None),
        Fault::Status(403, None),
        Fault::Status(404, None),
        Fault::Status(429, Some("3600".to_owned())),
        Fault::Status(500, None),
        Fault::Status(503, Some("3600".to_owned())),
        Fault::IgnoreRange,
        Fault::WrongContentRange,
        Fault::CloseAfter(0),
        Fault::Hang,
    ];
    for fault in faults {
        let case = Case::new(FakeRegistry::builder()).await;
        let mirror = case.mirror(FakeRegistry::builder()).await;
        mirror.always(Endpoint::Blob, fault.clone());
        case.hosts(&host(&mirror, ""));
        let source = match fault {
            Fault::Hang => case.impatient_source(),
            _ => case.source(),
        };
        let got = case.ten(source.as_ref()).await.unwrap();
        assert_eq!(got, case.expected_ten(), "{fault:?}");
        assert!(mirror.requests().blobs > 0, "{fault:?}");
    }
}

#[tokio::test]
async fn a_manifest_with_other_bytes_is_asked_for_elsewhere() {
    let case = Case::new(FakeRegistry::builder()).await;
    let mirror = case.mirror(FakeRegistry::builder()).await;
    mirror.always(Endpoint::Manifest, Fault::CorruptBytes);
    case.hosts(&host(&mirror, ""));
    let digest = Digest::sha256(&case.fixture.manifest);
    let pinned = case.fixture.repository.with_digest(digest);
    let document = case.source().resolve(&pinned).await.unwrap();
    assert_eq!(document.bytes, case.fixture.manifest);
    assert_eq!(mirror.requests().manifests, 1);
}

#[tokio::test]
async fn a_blob_with_other_bytes_is_read_elsewhere_next() {
    let case = Case::new(FakeRegistry::builder()).await;
    let mirror = case.mirror(FakeRegistry::builder()).await;
    mirror.always(Endpoint::Blob, Fault::CorruptBytes);
    case.hosts(&host(&mirror, ""));
    let source = case.source();
    let got = case.ten(source.as_ref()).await.unwrap();
    assert_ne!(got, case.expected_ten());
    source.distrust(&case.fixture.large().0);
    let got = case.ten(source.as_ref()).await.unwrap();
    assert_eq!(got, case.expected_ten());
    assert_eq!(mirror.requests().blobs, 1);
}

#[tokio::test]
async fn a_body_goes_on_at_the_next_host_where_it_broke() {
    for whole in [true, false] {
        let case = Case::new(FakeRegistry::builder()).await;
        let mirror = case.mirror(FakeRegistry::builder()).await;
        mirror.script_on(Endpoint::Blob, Fault::CloseAfter(100_000));
        mirror.always(Endpoint::Blob, Fault::Status(503, None));
        case.hosts(&host(&mirror, ""));
        let source = case.source();
        let (blob, bytes) = case.fixture.large();
        let parts = [(10, 90_000), (100_000, 300_000)];
        let parts = parts.map(|(from, to)| ByteRange::new(from, to).unwrap());
        let (got, expected) = if whole {
            (case.all(source.as_ref()).await.unwrap(), bytes.to_vec())
        } else {
            let body = source.read_parts(&blob, &parts).await.unwrap();
            let expected = [&bytes[10..90_000], &bytes[100_000..300_000]].concat();
            (collect(body).await.unwrap(), expected)
        };
        assert!(got == expected, "whole: {whole}");
        assert_eq!(mirror.requests().blobs, 2, "once more at the same host");
        let ranges = case.upstream.ranges();
        let [range] = &ranges[..] else {
            panic!("{ranges:?}");
        };
        let end = if whole { "-300000" } else { "-299999" };
        assert!(range.starts_with("bytes=") && range.ends_with(end));
        assert!(!range.starts_with("bytes=0-") && !range.starts_with("bytes=10-"));
    }
}

#[tokio::test]
async fn the_error_names_every_host() {
    let case = Case::new(FakeRegistry::builder()).await;
    let mirror = case.mirror(FakeRegistry::builder()).await;
    mirror.always(Endpoint::Manifest, Fault::Status(403, None));
    let (_socket, dead) = nobody();
    let dead_host = format!("[host.\"http://{dead}\"]\n");
    case.hosts(&(host(&mirror, "") + &dead_host));
    let missing = case.fixture.tagged("missing");
    mirror.add_manifest(PATH, "missing", MediaType::OciManifest, "{}");
    let error = case.source().resolve(&missing).await.unwrap_err();
    assert!(matches!(error, lazarette_fetcher::Error::NotFound { .. }));
    let (error, up, near) = (
        error.to_string(),
        case.upstream.url_host(),
        mirror.url_host(),
    );
    let start = format!("{missing} not found at {up} (asked too: {near}: denied: ");
    assert!(error.starts_with(&start), "{error}");
    let dead = format!("; {dead}: cannot connect to {dead}: ");
    assert!(error.contains(&dead), "{error}");
}

#[tokio::test]
async fn nobody_is_told_what_is_for_another() {
    let up = FakeRegistry::builder()
        .basic("up", "secret-of-up")
        .redirect();
    let case = Case::new(up).await;
    let builder = FakeRegistry::builder().bearer_for("near", "secret-of-near");
    let mirror = case.mirror(builder.redirect()).await;
    // The mirror has no manifests by tag, so that both are asked.
    mirror.always(Endpoint::Manifest, Fault::Status(404, None));
    let settings = format!(
        "[host.\"http://{}\".header]\nx-secret = 'of-near'\naccept = 'none'\n",
        mirror.url_host()
    );
    case.hosts(&settings);
    let docker = case.dir.path().join("config.json");
    let entry = |registry: &FakeRegistry, user: &str| {
        let host = registry.url_host();
        let auth = encoded(&format!("{user}:secret-of-{user}"));
        format!(r#""{host}":{{"auth":"{auth}"}}"#)
    };
    let entries = [entry(&case.upstream, "up"), entry(&mirror, "near")].join(",");
    std::fs::write(&docker, format!(r#"{{"auths":{{{entries}}}}}"#)).unwrap();
    let config = SourceConfig {
        docker_config: Some(docker),
        ..case.config()
    };
    let (source, _) = stack::build(config).unwrap();
    contract::documents(source.as_ref(), &case.fixture).await;
    assert_eq!(
        case.ten(source.as_ref()).await.unwrap(),
        case.expected_ten()
    );

    let up_auth = format!("Basic {}", encoded("up:secret-of-up"));
    for asked in case.upstream.asked() {
        assert!(!asked.headers.contains_key("x-secret"), "{asked:?}");
        if let Some(given) = asked.headers.get("authorization") {
            assert_eq!(given, up_auth.as_str());
        }
    }
    let near_auth = format!("Basic {}", encoded("near:secret-of-near"));
    let mut served = 0;
    for asked in mirror.asked() {
        let given = asked.headers.get("authorization");
        let given = given.map_or("", |value| value.to_str().unwrap());
        match asked.endpoint {
            Endpoint::Cdn => {
                assert!(given.is_empty() && !asked.headers.contains_key("x-secret"));
                served += 1;
            }
            Endpoint::Token => {
                assert_eq!(given, near_auth);
                assert_eq!(asked.headers.get("x-secret").unwrap(), "of-near");
            }
            _ => {
                assert_eq!(asked.headers.get("x-secret").unwrap(), "of-near");
                assert!(given.is_empty() || given.starts_with("Bearer token-"));
                let accepts = asked.headers.get("accept");
                assert_eq!(
                    accepts.is_some_and(|a| a == "none"),
                    asked.endpoint == Endpoint::Blob
                );
            }
        }
    }
    assert_eq!(served, 1);
    assert!(case.upstream.requests().manifests > 0);
}

fn encoded(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}

#[tokio::test]
async fn referrers_come_from_who_knows_them() {
    let table = [
        // Knows neither the API nor the tag.
        ("", FakeRegistry::builder().without_referrers(), 1, 1),
        (
            "capabilities = ['pull', 'resolve']",
            FakeRegistry::builder(),
            0,
            1,
        ),
        (
            "capabilities = ['referrers']",
            FakeRegistry::builder(),
            1,
            0,
        ),
    ];
    for (settings, builder, near, up) in table {
        let case = Case::new(FakeRegistry::builder()).await;
        let mirror = case.mirror(builder).await;
        case.hosts(&host(&mirror, settings));
        let subject = Digest::sha256(&case.fixture.manifest);
        let repository = &case.fixture.repository;
        let source = case.source();
        let found = source.referrers(repository, &subject, Some(ARTIFACT_TYPE));
        assert_eq!(found.await.unwrap().len(), 1, "{settings}");
        let counts = (
            mirror.requests().referrers,
            case.upstream.requests().referrers,
        );
        assert_eq!(counts, (near, up), "{settings}");
        let asked = mirror.asked();
        let targets = asked
            .iter()
            .filter(|one| one.endpoint == Endpoint::Referrers);
        for one in targets {
            assert!(one.target.contains("?artifactType=") && one.target.contains("&ns="));
        }
    }
    // Nobody has any.
    let case = Case::new(FakeRegistry::builder().without_referrers()).await;
    let mirror = case
        .mirror(FakeRegistry::builder().without_referrers())
        .await;
    case.hosts(&host(&mirror, ""));
    let subject = Digest::sha256(b"nothing");
    let found = case.source();
    let found = found.referrers(&case.fixture.repository, &subject, None);
    assert!(found.await.unwrap().is_empty());
}

#[tokio::test]
async fn a_bad_file_is_named_and_an_empty_path_is_none() {
    let case = Case::new(FakeRegistry::builder()).await;
    let mirror = case.mirror(FakeRegistry::builder()).await;
    case.hosts("[host.\"https://mirror.lan\"]\nskip_verify = true\n");
    let error = case
        .ten(case.source().as_ref())
        .await
        .unwrap_err()
        .to_string();
    let expected = "hosts.toml is malformed: host.\"https://mirror.lan\".skip_verify: ";
    assert!(error.contains(expected), "{error}");
    assert_eq!(mirror.requests().blobs, 0);
    let config = SourceConfig {
        hosts_dir: Some("".into()),
        ..case.config()
    };
    let (source, _) = stack::build(config).unwrap();
    assert_eq!(
        case.ten(source.as_ref()).await.unwrap(),
        case.expected_ten()
    );
}

#[tokio::test]
async fn a_token_is_good_for_the_project_that_stands_in() {
    let case = Case::new(FakeRegistry::builder()).await;
    let mirror = case.mirror(FakeRegistry::builder().bearer()).await;
    let address = mirror.url_host();
    case.hosts(&format!(
        "[host.\"http://{address}/v2/hub\"]\noverride_path = true\n"
    ));
    let source = case.source();
    let read = case.ten(source.as_ref()).await.unwrap();
    assert_eq!(read, case.expected_ten());
    assert_eq!(case.upstream.requests().blobs, 0);
    assert_eq!(mirror.requests().tokens, 1);
}

#[tokio::test]
async fn a_connection_begun_ahead_goes_to_the_first_host() {
    let case = Case::new(FakeRegistry::builder()).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    case.hosts(&format!("[host.\"http://{address}\"]\n"));
    let (_, mirrors) = stack::build(case.config()).unwrap();
    mirrors.connect_ahead(&case.fixture.repository);
    listener.accept().await.unwrap();
    assert_eq!(mirrors.stats().requests, 0);
}
