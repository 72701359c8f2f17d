//! Hosts that stand in for a registry: their order, their faults, and what each is told.

#![expect(
    clippy::unwrap_used,
    reason = "a test whose set-up fails must stop there"
)]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
async fn a_silent_mirror_is_asked_once() {
    let case = Case::new(FakeRegistry::builder()).await;
    let mirror = case.mirror(FakeRegistry::builder()).await;
    mirror.always(Endpoint::Blob, Fault::Hang);
    case.hosts(&host(&mirror, ""));
    let source = case.impatient_source();
    for _ in 0..5 {
        let got = case.ten(source.as_ref()).await.unwrap();
        assert_eq!(got, case.expected_ten());
    }
    assert_eq!(mirror.requests().blobs, 1);
    assert!(case.upstream.requests().blobs >= 5);
}

/// The faults of a host that is in trouble, and how often it is asked for a blob then.
fn troubles() -> [(Fault, u32); 6] {
    [
        (Fault::Status(500, None), 2),
        (Fault::Status(503, Some("3600".to_owned())), 1),
        (Fault::Status(429, None), 1),
        (Fault::Status(429, Some("1".to_owned())), 1),
        (Fault::HangAfter(0), 1),
        (Fault::HangAfter(5), 1),
    ]
}

#[tokio::test]
async fn a_mirror_in_trouble_is_left_alone_for_all_blobs() {
    for (fault, asked) in troubles() {
        let case = Case::new(FakeRegistry::builder()).await;
        let mirror = case.mirror(FakeRegistry::builder()).await;
        mirror.always(Endpoint::Blob, fault.clone());
        case.hosts(&host(&mirror, ""));
        let source = case.impatient_source();
        for _ in 0..5 {
            let got = case.ten(source.as_ref()).await.unwrap();
            assert_eq!(got, case.expected_ten());
        }
        let other = case.other();
        let got = collect(source.read_all(&other).await.unwrap()).await;
        assert_eq!(got.unwrap().len() as u64, other.size);
        assert_eq!(mirror.requests().blobs, asked, "{fault:?}");
    }
}

#[tokio::test]
async fn a_mirror_without_a_blob_is_asked_for_it_once() {
    for fault in [
        Fault::Status(404, None),
        Fault::Status(403, None),
        Fault::IgnoreRange,
    ] {
        let case = Case::new(FakeRegistry::builder()).await;
        let mirror = case.mirror(FakeRegistry::builder()).await;
        mirror.always(Endpoint::Blob, fault.clone());
        case.hosts(&host(&mirror, ""));
        let source = case.source();
        for _ in 0..5 {
            let got = case.ten(source.as_ref()).await.unwrap();
            assert_eq!(got, case.expected_ten());
        }
        assert_eq!(mirror.requests().blobs, 1, "{fault:?}");
        let other = case.other();
        let range = ByteRange::new(0, 1).unwrap();
        collect(source.read_range(&other, range).await.unwrap())
            .await
            .unwrap();
        assert_eq!(mirror.requests().blobs, 2, "{fault:?}");
    }
}

#[tokio::test]
async fn a_mirrors_restart_is_a_pause_where_nobody_reaches_the_registry() {
    let case = Case::new(FakeRegistry::builder()).await;
    let mirror = case.mirror(FakeRegistry::builder()).await;
    let (_socket, dead) = nobody();
    case.hosts(&format!(
        "server = \"http://{dead}\"\n{}",
        host(&mirror, "")
    ));
    let source = case.source();
    for faults in [1, 0] {
        (0..faults).for_each(|_| mirror.script_on(Endpoint::Blob, Fault::Status(429, None)));
        let began = Instant::now();
        let got = case.ten(source.as_ref()).await.unwrap();
        assert_eq!(got, case.expected_ten());
        // Less than the deadline, which a registry alone is tried for.
        assert!(began.elapsed() < Duration::from_secs(30));
    }
    assert_eq!(mirror.requests().blobs, 3);
    mirror.always(Endpoint::Blob, Fault::Status(404, None));
    let hopeless = SourceConfig {
        deadline: Duration::from_millis(500),
        ..case.config()
    };
    let source = stack::build(hopeless).unwrap().0;
    let error = case.ten(source.as_ref()).await.unwrap_err().to_string();
    let near = mirror.url_host();
    assert!(
        error.contains(&format!("from {dead}: cannot connect")),
        "{error}"
    );
    assert!(error.contains(&format!("{near}: not found")), "{error}");
    assert_eq!(error.matches("asked too").count(), 1, "{error}");
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

/// A CA of our own; a server that wants a certificate by it; and in `dir` its `ca.pem`, and
/// `node.cert` and `node.key` by it.
fn private_ca(dir: &Path) -> Arc<rustls::ServerConfig> {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority = ca.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let issue = |name: &str| {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.signed_by(&key, &issuer).unwrap(), key)
    };
    let (node, node_key) = issue("node");
    let (server, server_key) = issue("127.0.0.1");
    std::fs::write(dir.join("ca.pem"), authority.pem()).unwrap();
    std::fs::write(dir.join("node.cert"), node.pem()).unwrap();
    std::fs::write(dir.join("node.key"), node_key.serialize_pem()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.der().clone()).unwrap();
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots),
        provider.clone(),
    )
    .build()
    .unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![server.der().clone()],
            rustls_pki_types::PrivateKeyDer::try_from(server_key.serialize_der()).unwrap(),
        )
        .unwrap();
    Arc::new(config)
}

#[tokio::test]
async fn a_mirror_has_its_own_authority_and_certificates() {
    let case = Case::new(FakeRegistry::builder()).await;
    let files = tempfile::tempdir().unwrap();
    let tls = private_ca(files.path());
    let mirror = case.mirror(FakeRegistry::builder().tls(tls).bearer()).await;
    let section = format!("[host.\"https://{}\"]\n", mirror.url_host());
    let path = |name: &str| files.path().join(name).display().to_string();
    let ca = format!("ca = '{}'\n", path("ca.pem"));
    let client = format!(
        "client = [['{}', '{}']]\n",
        path("node.cert"),
        path("node.key")
    );
    let table = [
        (section.clone(), false),
        (section.clone() + &client, false),
        (section.clone() + &ca, false),
        (section + &ca + &client, true),
    ];
    for (text, served) in table {
        case.hosts(&text);
        let before = (mirror.requests().blobs, case.upstream.requests().blobs);
        let source = case.source();
        assert_eq!(
            case.ten(source.as_ref()).await.unwrap(),
            case.expected_ten()
        );
        assert_eq!(mirror.requests().blobs > before.0, served, "{text}");
        assert_eq!(case.upstream.requests().blobs > before.1, !served, "{text}");
    }
    assert_eq!(mirror.requests().tokens, 1);
}

#[tokio::test]
async fn a_certificate_as_openssl_makes_it_is_trusted_where_it_is_named() {
    let case = Case::new(FakeRegistry::builder()).await;
    // As by `openssl req -x509`, which says that it is an authority's.
    let made = |name: &str| {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(case.dir.path().join(name), certificate.pem()).unwrap();
        (certificate, key)
    };
    let (own, key) = made("own.crt");
    made("other.crt");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![own.der().clone()],
            rustls_pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    let builder = FakeRegistry::builder().tls(Arc::new(tls));
    let mirror = case.mirror(builder).await;
    for (name, served) in [("other.crt", false), ("own.crt", true)] {
        let ca = case.dir.path().join(name).display().to_string();
        let host = mirror.url_host();
        case.hosts(&format!("[host.\"https://{host}\"]\nca = '{ca}'\n"));
        let got = case.ten(case.source().as_ref()).await.unwrap();
        assert_eq!(got, case.expected_ten());
        assert_eq!(mirror.requests().blobs > 0, served, "{name}");
    }
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
