//! How the registry source behaves: tokens, redirects, resuming, limits, proxies.

#![expect(
    clippy::unwrap_used,
    reason = "a test whose set-up fails must stop there"
)]

use std::time::Duration;

use futures_util::{StreamExt as _, future};
use lazarette_fetcher::Error;
use lazarette_fetcher::source::{BlobRef, BlobSource, ProxySettings, RegistrySource, SourceConfig};
use lazarette_fetcher::test_util::contract::collect;
use lazarette_fetcher::test_util::{Endpoint, FakeRegistry, FakeRegistryBuilder, Fault};
use lazarette_fetcher::types::{ByteRange, MediaType, Reference};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

struct Case {
    registry: FakeRegistry,
    source: RegistrySource,
    blob: BlobRef,
    bytes: Vec<u8>,
}

async fn case(builder: FakeRegistryBuilder, config: SourceConfig) -> Case {
    let registry = builder.start().await.unwrap();
    let bytes: Vec<u8> = (0..200_000_u32).map(|i| (i % 251) as u8).collect();
    let digest = registry.add_blob(bytes.clone());
    let reference = Reference::parse(&format!("{}/a/b:t", registry.url_host())).unwrap();
    let repository = reference.repository().clone();
    let blob = BlobRef {
        repository,
        digest,
        size: bytes.len() as u64,
    };
    let source = RegistrySource::new(config).unwrap();
    Case {
        registry,
        source,
        blob,
        bytes,
    }
}

impl Case {
    async fn read(&self, from: u64, to: u64) -> Vec<u8> {
        let range = ByteRange::new(from, to).unwrap();
        let body = self.source.read_range(&self.blob, range).await.unwrap();
        collect(body).await.unwrap()
    }

    async fn fifty_readers(&self) {
        future::join_all((0..50_u64).map(|i| async move {
            let got = self.read(i * 1000, i * 1000 + 777).await;
            let from = usize::try_from(i).unwrap() * 1000;
            assert!(got == self.bytes[from..from + 777]);
        }))
        .await;
    }
}

#[tokio::test]
async fn fifty_readers_cost_one_token_and_a_few_redirects() {
    let case = case(
        FakeRegistry::builder().bearer().redirect(),
        SourceConfig::default(),
    )
    .await;
    case.fifty_readers().await;
    let requests = case.registry.requests();
    assert_eq!(requests.tokens, 1, "{requests:?}");
    // A few ask at once, and one more for all others: each without a token, then with it.
    assert!((2..=18).contains(&requests.blobs), "{requests:?}");
    assert_eq!(requests.cdn, 50, "{requests:?}");
    assert_eq!(requests.credentials_at_cdn, 0);
    let stats = case.source.stats();
    assert!((1..=9).contains(&stats.redirects), "{stats:?}");
    assert_eq!((stats.token_requests, stats.retries), (1, 0));
    assert_eq!(stats.requests, u64::from(requests.blobs) + 51);
    assert!(stats.bytes_received >= 50 * 777);
}

#[tokio::test]
async fn an_expired_redirect_is_asked_for_again() {
    let case = case(FakeRegistry::builder().redirect(), SourceConfig::default()).await;
    case.read(0, 10).await;
    case.registry.expire_redirects();
    case.fifty_readers().await;
    let requests = case.registry.requests();
    assert!((2..=10).contains(&requests.blobs), "{requests:?}");
}

#[tokio::test]
async fn a_revoked_token_is_replaced_once() {
    let case = case(FakeRegistry::builder().bearer(), SourceConfig::default()).await;
    case.read(0, 10).await;
    case.registry.revoke_tokens();
    case.fifty_readers().await;
    assert_eq!(case.registry.requests().tokens, 2);
}

#[tokio::test]
async fn a_token_that_does_not_last_is_not_kept() {
    let builder = FakeRegistry::builder().bearer().token_life_s(0);
    let case = case(builder, SourceConfig::default()).await;
    case.read(0, 10).await;
    let first = case.registry.requests();
    case.read(0, 10).await;
    let second = case.registry.requests();
    assert_eq!(
        second.tokens,
        first.tokens + 1,
        "replaced before a 401, not after"
    );
    assert_eq!(second.blobs, first.blobs + 1);
}

fn docker_config(dir: &tempfile::TempDir, host: &str, entry: &str) -> SourceConfig {
    let path = dir.path().join("config.json");
    std::fs::write(&path, format!(r#"{{"auths":{{"{host}":{entry}}}}}"#)).unwrap();
    SourceConfig {
        docker_config: Some(path),
        ..SourceConfig::default()
    }
}

#[tokio::test]
async fn credentials_come_from_the_docker_config() {
    // "u:p" in base64.
    let password = r#"{"auth":"dTpw"}"#;
    let table = [
        (FakeRegistry::builder().basic("u", "p"), password, true),
        (FakeRegistry::builder().basic("u", "other"), password, false),
        (FakeRegistry::builder().bearer_for("u", "p"), password, true),
        (
            FakeRegistry::builder().bearer_for("u", "other"),
            password,
            false,
        ),
        (
            FakeRegistry::builder().identity("r1"),
            r#"{"identitytoken":"r1"}"#,
            true,
        ),
        (
            FakeRegistry::builder().identity("r2"),
            r#"{"identitytoken":"r1"}"#,
            false,
        ),
    ];
    for (row, (builder, entry, accepted)) in table.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let mut case = case(builder, SourceConfig::default()).await;
        let host = case.registry.url_host();
        let anonymous = case
            .source
            .read_all(&case.blob)
            .await
            .err()
            .unwrap()
            .to_string();
        assert!(
            anonymous.contains(&format!("run `docker login {host}`")),
            "{row}: {anonymous}"
        );
        case.source = RegistrySource::new(docker_config(&dir, &host, entry)).unwrap();
        match case.source.read_all(&case.blob).await {
            Ok(body) => {
                assert!(accepted, "{row}");
                assert!(collect(body).await.unwrap() == case.bytes, "{row}");
            }
            Err(error) => {
                assert!(!accepted, "{row}: {error}");
                assert!(matches!(error, Error::Denied { .. }), "{row}: {error}");
                assert!(
                    error.to_string().contains("are not accepted"),
                    "{row}: {error}"
                );
            }
        }
    }
}

#[tokio::test]
async fn a_broken_body_is_resumed_where_it_broke() {
    for builder in [FakeRegistry::builder(), FakeRegistry::builder().redirect()] {
        let case = case(builder, SourceConfig::default()).await;
        for len in [50_000, 0, 99_999] {
            case.registry.script(Fault::CloseAfter(len));
        }
        assert!(case.read(10, 180_000).await == case.bytes[10..180_000]);
        let starts: Vec<u64> = case
            .registry
            .ranges()
            .iter()
            .map(|range| {
                let (from, to) = range
                    .strip_prefix("bytes=")
                    .unwrap()
                    .split_once('-')
                    .unwrap();
                assert_eq!(to, "179999");
                from.parse().unwrap()
            })
            .collect();
        assert!(
            starts.len() == 4 && starts.is_sorted() && starts[3] > 10,
            "{starts:?}"
        );
        assert!(case.source.stats().retries >= 3);
    }
}

#[tokio::test]
async fn a_stalled_body_is_resumed_too() {
    let config = SourceConfig {
        stall_timeout: Duration::from_millis(500),
        ..SourceConfig::default()
    };
    let case = case(FakeRegistry::builder(), config).await;
    case.registry.script(Fault::HangAfter(70_000));
    assert!(case.read(0, 200_000).await == case.bytes);
    // More where the machine itself stalls for as long.
    assert!(case.source.stats().retries >= 1);
}

#[tokio::test]
async fn a_whole_blob_is_resumed_even_without_ranges() {
    let case = case(FakeRegistry::builder(), SourceConfig::default()).await;
    case.registry.script(Fault::CloseAfter(120_000));
    case.registry.always(Endpoint::Blob, Fault::IgnoreRange);
    let body = case.source.read_all(&case.blob).await.unwrap();
    assert!(collect(body).await.unwrap() == case.bytes);
    let ranges = case.registry.ranges();
    assert!(
        ranges.len() == 2 && ranges[0].is_empty() && ranges[1].starts_with("bytes="),
        "{ranges:?}"
    );
}

#[tokio::test]
async fn retry_after_is_waited_for() {
    for (status, wait) in [(429, "1"), (503, "1"), (500, "0"), (408, "0")] {
        let case = case(FakeRegistry::builder(), SourceConfig::default()).await;
        case.registry
            .script(Fault::Status(status, Some(wait.to_owned())));
        let started = std::time::Instant::now();
        assert!(case.read(5, 15).await == case.bytes[5..15]);
        let asked = Duration::from_secs(wait.parse().unwrap());
        assert!(started.elapsed() >= asked, "{status}");
        assert_eq!(case.source.stats().retries, 1, "{status}");
    }
}

#[tokio::test]
async fn a_token_endpoint_in_trouble_is_asked_again() {
    let case = case(FakeRegistry::builder().bearer(), SourceConfig::default()).await;
    case.registry
        .script_on(Endpoint::Token, Fault::Status(503, None));
    assert!(case.read(5, 15).await == case.bytes[5..15]);
    assert_eq!(case.registry.requests().tokens, 2);
}

#[tokio::test]
async fn dropped_bodies_free_their_slots() {
    let config = SourceConfig {
        concurrency: 2,
        ..SourceConfig::default()
    };
    let case = case(FakeRegistry::builder(), config).await;
    for _ in 0..20 {
        let mut body = case.source.read_all(&case.blob).await.unwrap();
        body.next().await.unwrap().unwrap();
    }
    case.fifty_readers().await;
}

#[tokio::test]
async fn waiting_for_a_slot_is_no_failure_while_the_line_moves() {
    let config = SourceConfig {
        concurrency: 1,
        deadline: Duration::from_millis(400),
        ..SourceConfig::default()
    };
    let case = case(FakeRegistry::builder(), config).await;
    let big = BlobRef {
        digest: case.registry.add_blob(vec![7; 8 << 20]),
        size: 8 << 20,
        ..case.blob.clone()
    };
    let mut before = case.source.read_all(&big).await.unwrap();
    let slow = async {
        for _ in 0..12 {
            before.next().await.unwrap().unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        before
    };
    let next = case.read(5, 15);
    tokio::pin!(next);
    let held = tokio::select! {
        _ = &mut next => panic!("there was no slot for it"),
        held = slow => held,
    };
    drop(held);
    assert!(next.await == case.bytes[5..15]);

    let stands = case.source.read_all(&big).await.unwrap();
    let range = ByteRange::new(5, 15).unwrap();
    let error = case.source.read_range(&case.blob, range).await.err();
    let text = error.expect("nobody let it in").to_string();
    assert!(text.contains("deadline of 0.4 s"), "{text}");
    drop(stands);
}

#[tokio::test]
async fn an_empty_blob_is_empty() {
    let mut case = case(FakeRegistry::builder(), SourceConfig::default()).await;
    case.blob.digest = case.registry.add_blob("");
    case.blob.size = 0;
    let body = case.source.read_all(&case.blob).await.unwrap();
    assert!(collect(body).await.unwrap().is_empty());
    let stat = case
        .source
        .stat(&case.blob.repository, &case.blob.digest)
        .await;
    assert_eq!(stat.unwrap(), 0);
}

#[tokio::test]
async fn an_unusual_manifest_arrives_byte_for_byte() {
    let case = case(FakeRegistry::builder().bearer(), SourceConfig::default()).await;
    let odd = "{\n\t\"layers\" : [ ],\"schemaVersion\":2}\n\n";
    case.registry
        .add_manifest("a/b", "odd", MediaType::from("application/json"), odd);
    let reference = format!("{}/a/b:odd", case.registry.url_host());
    let document = case
        .source
        .resolve(&Reference::parse(&reference).unwrap())
        .await
        .unwrap();
    assert_eq!(document.bytes, odd);
    assert_eq!(document.descriptor.media_type, MediaType::OciManifest);
}

/// A proxy that records request lines, and tunnels CONNECT to a fixed address.
async fn proxy(target: String) -> (String, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (lines, seen) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let (target, lines) = (target.clone(), lines.clone());
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(client.read_u8().await.unwrap());
                }
                let text = String::from_utf8(head.clone()).unwrap();
                let mut server = tokio::net::TcpStream::connect(target).await.unwrap();
                if text.starts_with("CONNECT ") {
                    client
                        .write_all(b"HTTP/1.1 200 fine\r\n\r\n")
                        .await
                        .unwrap();
                } else {
                    server.write_all(&head).await.unwrap();
                }
                lines.send(text).unwrap();
                // Ends with either side; errors are the sides' affair.
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    (address, seen)
}

#[tokio::test]
async fn plain_http_goes_through_the_proxy_in_absolute_form() {
    let case = case(FakeRegistry::builder(), SourceConfig::default()).await;
    let (address, mut seen) = proxy(case.registry.url_host()).await;
    let config = SourceConfig {
        plain_http: vec!["reg.example".into()],
        proxy: ProxySettings {
            http: Some(format!("http://u:p@{address}")),
            ..ProxySettings::default()
        },
        ..SourceConfig::default()
    };
    let source = RegistrySource::new(config).unwrap();
    let repository = Reference::parse("reg.example/a/b")
        .unwrap()
        .repository()
        .clone();
    let size = source.stat(&repository, &case.blob.digest).await.unwrap();
    assert_eq!(size, case.blob.size);
    let head = seen.recv().await.unwrap();
    let expected = format!(
        "HEAD http://reg.example/v2/a/b/blobs/{} HTTP/1.1\r\n",
        case.blob.digest
    );
    assert!(head.starts_with(&expected), "{head}");
    assert!(
        head.contains("proxy-authorization: Basic dTpw\r\n"),
        "{head}"
    );
    // Loopback itself is reached directly, although a proxy is set.
    assert_eq!(
        source
            .stat(&case.blob.repository, &case.blob.digest)
            .await
            .unwrap(),
        size
    );
    assert!(seen.try_recv().is_err());
}

#[tokio::test]
async fn https_goes_through_a_tunnel() {
    let case = case(FakeRegistry::builder(), SourceConfig::default()).await;
    let (address, mut seen) = proxy(case.registry.url_host()).await;
    let config = SourceConfig {
        proxy: ProxySettings {
            https: Some(format!("u:p@{address}")),
            ..ProxySettings::default()
        },
        ..SourceConfig::default()
    };
    let source = RegistrySource::new(config).unwrap();
    let reference = Reference::parse("reg.example/a/b").unwrap();
    // Behind the tunnel is a plain http server, so TLS must fail, and say so.
    let error = source.resolve(&reference).await.unwrap_err().to_string();
    assert!(
        error.contains("TLS failed") && error.contains("plain_http"),
        "{error}"
    );
    let head = seen.recv().await.unwrap();
    assert!(
        head.starts_with("CONNECT reg.example:443 HTTP/1.1\r\nHost: reg.example:443\r\n"),
        "{head}"
    );
    assert!(
        head.contains("Proxy-Authorization: Basic dTpw\r\n"),
        "{head}"
    );
}

#[tokio::test]
async fn a_registry_that_is_away_for_a_while_is_waited_for() {
    let mut case = case(FakeRegistry::builder(), SourceConfig::default()).await;
    case.read(0, 10).await;
    case.registry.close().await;
    let range = ByteRange::new(10, 20).unwrap();
    let body = case.source.read_range(&case.blob, range);
    let back = async {
        // More failures than a mistyped address is given.
        while case.source.stats().retries < 5 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        case.registry.reopen().await.unwrap();
    };
    let (body, ()) = tokio::join!(body, back);
    assert_eq!(collect(body.unwrap()).await.unwrap(), case.bytes[10..20]);
}
