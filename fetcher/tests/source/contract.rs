//! The BlobSource contract, run on every implementation: memory, faulty without faults,
//! registry over http/1.1, over TLS with HTTP/2 and a private CA, behind redirects and
//! tokens, and against Debian's docker-registry.

#![expect(
    clippy::unwrap_used,
    reason = "a test whose set-up fails must stop there"
)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use lazarette_fetcher::source::{
    BlobRef, BlobSource, Exact, ProxySettings, Pusher, RegistrySource, SourceConfig,
    install_tls_provider, stack,
};
use lazarette_fetcher::test_util::contract::{self, ARTIFACT_TYPE, Fixture, TAG};
use lazarette_fetcher::test_util::{FakeRegistry, FakeRegistryBuilder, FaultySource, MemorySource};
use lazarette_fetcher::types::{Digest, MediaType, Repository};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;

const PATH: &str = "team/app";

fn load(registry: &FakeRegistry) -> Fixture {
    let fixture = Fixture::new(&registry.url_host(), PATH);
    for blob in &fixture.blobs {
        registry.add_blob(blob.clone());
    }
    registry.add_manifest(PATH, TAG, MediaType::OciManifest, fixture.manifest.clone());
    registry.add_manifest(PATH, "", MediaType::OciManifest, fixture.referrer.clone());
    fixture
}

fn memory() -> (MemorySource, Fixture) {
    let source = MemorySource::new();
    let fixture = Fixture::new("mem.test", PATH);
    for blob in &fixture.blobs {
        source.add_blob(blob.clone());
    }
    source.add_manifest(PATH, TAG, MediaType::OciManifest, fixture.manifest.clone());
    source.add_manifest(PATH, "", MediaType::OciManifest, fixture.referrer.clone());
    (source, fixture)
}

async fn everything(source: &dyn BlobSource, fixture: &Fixture) {
    contract::check(source, fixture).await;
    contract::referrers(source, fixture).await;
}

#[tokio::test]
async fn memory_keeps_the_contract() {
    let (source, fixture) = memory();
    everything(&source, &fixture).await;
}

#[tokio::test]
async fn faulty_without_faults_keeps_the_contract() {
    let (source, fixture) = memory();
    everything(&Exact::new(FaultySource::scripted(source, [])), &fixture).await;
}

async fn fake(builder: FakeRegistryBuilder) {
    let registry = builder.start().await.unwrap();
    let fixture = load(&registry);
    let (source, _) = stack::build(SourceConfig::default()).unwrap();
    everything(source.as_ref(), &fixture).await;
    assert_eq!(registry.requests().http2, 0);
}

#[tokio::test]
async fn registry_keeps_the_contract() {
    fake(FakeRegistry::builder()).await;
}

#[tokio::test]
async fn registry_with_tokens_and_redirects_keeps_the_contract() {
    fake(FakeRegistry::builder().bearer().redirect()).await;
}

#[tokio::test]
async fn registry_over_tls_and_http2_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let (server, ca_file) = private_ca(dir.path());
    let builder = FakeRegistry::builder().tls(server).bearer().redirect();
    let registry = builder.start().await.unwrap();
    // Loopback is spoken to in the clear, so TLS needs a name of elsewhere, and a tunnel
    // to here.
    let proxy = ProxySettings {
        https: Some(tunnel_to(registry.url_host(), Arc::default()).await),
        ..ProxySettings::default()
    };
    let fixture = Fixture {
        repository: Fixture::new("registry.example", PATH).repository,
        ..load(&registry)
    };
    let config = SourceConfig {
        ca_file: Some(ca_file),
        proxy: proxy.clone(),
        ..SourceConfig::default()
    };
    let source = RegistrySource::new(config).unwrap();
    everything(&source, &fixture).await;
    let requests = registry.requests();
    assert!(requests.http2 > 50, "{requests:?}");
    assert_eq!(requests.credentials_at_cdn, 0);

    let distrusting = SourceConfig {
        proxy,
        ..SourceConfig::default()
    };
    let distrusting = RegistrySource::new(distrusting).unwrap();
    let error = distrusting
        .resolve(&fixture.tagged(TAG))
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("its certificate is not trusted"), "{error}");
    assert!(error.contains("set ca_file"), "{error}");
}

#[tokio::test]
async fn a_connection_that_fell_silent_is_left_for_another() {
    let dir = tempfile::tempdir().unwrap();
    let (server, ca_file) = private_ca(dir.path());
    let registry = FakeRegistry::builder().tls(server).start().await.unwrap();
    let silence = Arc::new(Notify::new());
    let tunnel = tunnel_to(registry.url_host(), Arc::clone(&silence)).await;
    let fixture = Fixture {
        repository: Fixture::new("registry.example", PATH).repository,
        ..load(&registry)
    };
    let config = SourceConfig {
        ca_file: Some(ca_file),
        stall_timeout: Duration::from_secs(1),
        proxy: ProxySettings {
            https: Some(tunnel),
            ..ProxySettings::default()
        },
        ..SourceConfig::default()
    };
    let source = RegistrySource::new(config).unwrap();
    source.resolve(&fixture.tagged(TAG)).await.unwrap();
    // As where a router on the way forgets what it had: nobody is told.
    silence.notify_waiters();
    source.resolve(&fixture.tagged(TAG)).await.unwrap();
    assert!(source.stats().retries > 0);
    assert_eq!(registry.requests().http2, registry.requests().manifests);
}

/// A proxy that tunnels whatever is asked for to `target`, until `silence`: what is open then
/// stays so, and nothing comes any more.
async fn tunnel_to(target: String, silence: Arc<Notify>) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let (target, silence) = (target.clone(), Arc::clone(&silence));
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(client.read_u8().await.unwrap());
                }
                assert!(head.starts_with(b"CONNECT registry.example:443 "));
                client
                    .write_all(b"HTTP/1.1 200 fine\r\n\r\n")
                    .await
                    .unwrap();
                let mut server = tokio::net::TcpStream::connect(target).await.unwrap();
                tokio::select! {
                    // Ends with either side; errors are the sides' affair.
                    _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                    () = silence.notified() => std::future::pending().await,
                }
            });
        }
    });
    address
}

/// A CA of our own, its bundle on disk, and a server certificate by it.
fn private_ca(dir: &std::path::Path) -> (Arc<rustls::ServerConfig>, std::path::PathBuf) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_certificate = ca.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let names = vec!["registry.example".to_owned(), "127.0.0.1".to_owned()];
    let certificate = rcgen::CertificateParams::new(names)
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let file = dir.join("ca.pem");
    std::fs::write(&file, ca_certificate.pem()).unwrap();
    let mut server = crate::tls::serving(&certificate, &key);
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    (Arc::new(server), file)
}

#[tokio::test]
async fn referrers_fall_back_to_the_tag() {
    let registry = FakeRegistry::builder()
        .without_referrers()
        .start()
        .await
        .unwrap();
    let fixture = load(&registry);
    let subject = Digest::sha256(&fixture.manifest);
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"m","digest":"{}","size":{},"artifactType":"{ARTIFACT_TYPE}"}}]}}"#,
        Digest::sha256(&fixture.referrer),
        fixture.referrer.len(),
    );
    registry.add_manifest(PATH, &subject.file_name(), MediaType::OciIndex, index);
    let source = RegistrySource::new(SourceConfig::default()).unwrap();
    contract::referrers(&source, &fixture).await;
}

/// Debian's registry on a free port, with its data in a directory of its own.
struct DockerRegistry {
    child: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl DockerRegistry {
    /// `None`, said loudly, when the program is not installed.
    fn start(test: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        // It takes a port that is free, and says which.
        let config = dir.path().join("config.yml");
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"127.0.0.1:0\"}}\n",
                dir.path().join("data").display()
            ),
        )
        .unwrap();
        let spawned = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let child = match spawned {
            Ok(child) => child,
            Err(error) => {
                let line =
                    format!("SKIPPED (needs docker-registry from Debian: {error}): {test}\n");
                std::io::stderr().write_all(line.as_bytes()).unwrap();
                return None;
            }
        };
        let mut registry = Self {
            child,
            port: 0,
            _dir: dir,
        };
        let said = BufReader::new(registry.child.stderr.take().unwrap());
        let mut said = said.lines().map_while(Result::ok);
        let port = said.find_map(|line| {
            let (_, port) = line.split_once("listening on 127.0.0.1:")?;
            port.split('"').next()?.parse().ok()
        });
        registry.port = port.expect("docker-registry listens");
        // What it says later is of no interest, and must not stop it.
        std::thread::spawn(move || said.for_each(drop));
        Some(registry)
    }
}

#[tokio::test]
async fn docker_registry_takes_what_we_push_and_keeps_the_contract() {
    install_tls_provider();
    let Some(registry) = DockerRegistry::start("docker_registry_takes_what_we_push") else {
        return;
    };
    let fixture = Fixture::new(&format!("127.0.0.1:{}", registry.port), PATH);
    let pusher = Pusher::new(SourceConfig::default());
    for bytes in &fixture.blobs {
        let blob = fixture.blob(bytes);
        assert!(
            !pusher
                .blob_exists(&blob.repository, &blob.digest)
                .await
                .unwrap()
        );
        let pieces: Vec<_> = bytes
            .chunks(70_000)
            .map(|piece| Ok(bytes.slice_ref(piece)))
            .collect();
        let body = stream::iter(pieces);
        pusher
            .push_blob(&blob.repository, &blob.digest, blob.size, body)
            .await
            .unwrap();
        assert!(
            pusher
                .blob_exists(&blob.repository, &blob.digest)
                .await
                .unwrap()
        );
    }
    let stored = pusher
        .push_manifest(
            &fixture.tagged(TAG),
            &MediaType::OciManifest,
            fixture.manifest.clone(),
        )
        .await
        .unwrap();
    assert_eq!(stored, Digest::sha256(&fixture.manifest));

    let source = RegistrySource::new(SourceConfig::default()).unwrap();
    contract::check(&source, &fixture).await;
    // This registry is older than the referrers API and has no tag either.
    let none = source
        .referrers(&fixture.repository, &stored, None)
        .await
        .unwrap();
    assert!(none.is_empty());

    let (large, bytes) = fixture.large();
    let other = Fixture::new(&format!("127.0.0.1:{}", registry.port), "other/app").repository;
    assert!(
        pusher
            .mount_blob(&other, &large.repository, &large.digest)
            .await
            .unwrap()
    );
    assert!(pusher.blob_exists(&other, &large.digest).await.unwrap());

    refuses_wrong_bytes(&pusher, &other, &large, bytes).await;
}

/// Bytes that are not what their digest says never become a blob or a manifest.
async fn refuses_wrong_bytes(pusher: &Pusher, other: &Repository, large: &BlobRef, bytes: Bytes) {
    let wrong = Digest::sha256(b"promised");
    let body = stream::iter([Ok(bytes.clone())]);
    let error = pusher
        .push_blob(other, &wrong, large.size, body)
        .await
        .unwrap_err();
    let expected = format!(
        "blob {wrong} is corrupt: expected {wrong}, got {}",
        large.digest
    );
    assert_eq!(error.to_string(), expected);
    assert!(!pusher.blob_exists(other, &wrong).await.unwrap());
    let pinned = other.with_digest(wrong);
    let error = pusher
        .push_manifest(&pinned, &MediaType::OciManifest, bytes)
        .await
        .unwrap_err();
    assert!(error.to_string().starts_with("manifest of "), "{error}");
}
