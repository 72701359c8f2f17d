//! What a user reads when a registry misbehaves: one table of faults and messages.

#![expect(
    clippy::unwrap_used,
    reason = "a test whose set-up fails must stop there"
)]

use std::time::Duration;

use lazarette_fetcher::source::{BlobRef, BlobSource, RegistrySource, SourceConfig};
use lazarette_fetcher::test_util::contract::collect;
use lazarette_fetcher::test_util::{Endpoint, FakeRegistry, Fault};
use lazarette_fetcher::types::{ByteRange, Digest, MediaType, Reference};
use lazarette_fetcher::{Error, Result};

const BLOB: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyz";
const MANIFEST: &str = r#"{"schemaVersion":2,"layers":[]}"#;

/// Patience for a registry of which that is to be heard: a quarter of a second where it never
/// will be. What does answer may take much longer on a machine that does much else.
fn source_for(fault: &Fault) -> RegistrySource {
    let config = match fault {
        Fault::Hang
        | Fault::HangAfter(_)
        | Fault::CloseAfter(0)
        | Fault::Status(429 | 500, None) => SourceConfig {
            deadline: Duration::from_millis(250),
            stall_timeout: Duration::from_millis(200),
            ..SourceConfig::default()
        },
        _ => SourceConfig::default(),
    };
    RegistrySource::new(config).unwrap()
}

struct Case {
    registry: FakeRegistry,
    source: RegistrySource,
    blob: BlobRef,
    tagged: Reference,
}

impl Case {
    async fn new() -> Self {
        let registry = FakeRegistry::start().await;
        let digest = registry.add_blob(BLOB);
        registry.add_manifest("a", "t", MediaType::OciManifest, MANIFEST);
        let tagged = Reference::parse(&format!("{}/a:t", registry.url_host())).unwrap();
        let blob = BlobRef {
            repository: tagged.repository().clone(),
            digest,
            size: BLOB.len() as u64,
        };
        Self {
            registry,
            source: RegistrySource::new(SourceConfig::default()).unwrap(),
            blob,
            tagged,
        }
    }

    /// One whose registry does nothing but this at `endpoint`.
    async fn with(endpoint: Endpoint, fault: &Fault) -> Self {
        let mut case = Self::new().await;
        case.registry.always(endpoint, fault.clone());
        case.source = source_for(fault);
        case
    }

    async fn range(&self) -> Result<Vec<u8>> {
        let range = ByteRange::new(4, 20).unwrap();
        collect(self.source.read_range(&self.blob, range).await?).await
    }

    async fn parts(&self) -> Result<Vec<u8>> {
        let parts = [(0, 2), (4, 20), (20, 21), (35, 36)];
        let parts = parts.map(|(start, end)| ByteRange::new(start, end).unwrap());
        collect(self.source.read_parts(&self.blob, &parts).await?).await
    }

    async fn whole(&self) -> Result<Vec<u8>> {
        collect(self.source.read_all(&self.blob).await?).await
    }

    /// The message, with host and digest replaced by H and B.
    fn text(&self, error: &Error) -> String {
        error
            .to_string()
            .replace(&self.registry.url_host(), "H")
            .replace(&self.blob.digest.to_string(), "B")
    }
}

#[tokio::test]
async fn manifests() {
    let status = |code| Fault::Status(code, None);
    let table = [
        (
            status(401),
            "access to H/a:t denied by H: FAULT scripted fault (no credentials for it; if it exists and is private, run `docker login H`)",
        ),
        (
            status(403),
            "access to H/a:t denied by H: FAULT scripted fault",
        ),
        (status(404), "H/a:t not found at H"),
        (
            Fault::Status(429, Some("90".into())),
            "H limits the rate of requests (429) for H/a:t; try again in 90 s",
        ),
        (
            Fault::Status(503, Some("90".into())),
            "cannot read H/a:t from H: the server answered 503: FAULT scripted fault (tried 1 times in ",
        ),
        (
            status(418),
            "H/a:t is not supported: H gave the unexpected answer 418: FAULT scripted fault; check that it is an OCI registry",
        ),
        (Fault::Hang, "cannot read H/a:t from H: no"),
        (Fault::HangAfter(3), "cannot read H/a:t from H: no"),
    ];
    for (fault, expected) in table {
        let case = Case::with(Endpoint::Manifest, &fault).await;
        let error = case.source.resolve(&case.tagged).await.unwrap_err();
        let text = case.text(&error);
        assert!(text.starts_with(expected), "{fault:?}: {text}");
        if matches!(fault, Fault::Hang | Fault::HangAfter(_)) {
            assert!(
                text.contains("deadline") && error.is_transient(),
                "{fault:?}: {text}"
            );
        }
    }
}

#[tokio::test]
async fn a_manifest_that_is_not_what_its_digest_says() {
    let case = Case::new().await;
    let digest = Digest::sha256(MANIFEST.as_bytes());
    case.registry
        .always(Endpoint::Manifest, Fault::CorruptBytes);
    let pinned = case.tagged.repository().with_digest(digest);
    let error = case.source.resolve(&pinned).await.unwrap_err();
    let expected = format!("manifest of H/a@{digest} is corrupt: expected {digest}, got sha256:");
    assert!(case.text(&error).starts_with(&expected), "{error}");
    assert_eq!(
        case.registry.requests().manifests,
        1,
        "the same copy must not be asked again"
    );
}

#[tokio::test]
async fn a_manifest_that_is_too_large_or_no_manifest() {
    let case = Case::new().await;
    let huge = " ".repeat((4 << 20) + 1);
    case.registry
        .add_manifest("a", "huge", MediaType::OciManifest, huge);
    case.registry
        .add_manifest("a", "html", MediaType::from("text/html"), "<html>");
    let host = case.registry.url_host();
    for (tag, expected) in [
        (
            "huge",
            "manifest of H/a:huge exceeds the limit: it is larger than 4194304 bytes",
        ),
        (
            "html",
            "manifest of H/a:html is malformed: H answered with \"text/html\" that is no JSON; check that it is an OCI registry",
        ),
    ] {
        let reference = Reference::parse(&format!("{host}/a:{tag}")).unwrap();
        let error = case.source.resolve(&reference).await.unwrap_err();
        assert_eq!(case.text(&error), expected);
    }
}

#[tokio::test]
async fn ranges() {
    let table = [
        (Fault::Status(401, None), "access to blob B denied by H: "),
        (
            Fault::Status(403, None),
            "access to blob B denied by H: FAULT scripted fault",
        ),
        (Fault::Status(404, None), "blob B not found at H"),
        (
            Fault::Status(429, None),
            "H limits the rate of requests (429) for blob B; try again later",
        ),
        (Fault::Status(500, None), "cannot read blob B from H: "),
        (
            Fault::Status(416, None),
            "blob B is malformed: H answered 416: its copy is smaller than the manifest says; push the image again or pull another tag",
        ),
        (
            Fault::IgnoreRange,
            "a range of blob B is not supported: H ignores Range requests; the layer has to be pulled in full",
        ),
        (
            Fault::WrongContentRange,
            "blob B is malformed: H answered with \"bytes 5-20/36\" instead of \"bytes 4-19/36\"",
        ),
        (
            Fault::TooLong,
            "blob B is malformed: H sent more bytes than were asked for",
        ),
        (
            Fault::Half,
            "blob B is malformed: H answered with \"bytes 4-17/18\" instead of \"bytes 4-19/36\"",
        ),
        (Fault::Hang, "cannot read blob B from H: no"),
        (Fault::HangAfter(0), "cannot read blob B from H: no"),
        (Fault::CloseAfter(0), "cannot read blob B from H: "),
    ];
    for (fault, expected) in table {
        let case = Case::with(Endpoint::Blob, &fault).await;
        let error = case.range().await.unwrap_err();
        let text = case.text(&error);
        assert!(text.starts_with(expected), "{fault:?}: {text}");
    }
}

/// Once `fault` has shown, it is there or not for good.
#[tokio::test]
async fn parts_come_one_at_a_time_from_who_cannot_send_several() {
    let right = b"01456789abcdefghijkz";
    type Row = (Fault, bool, Option<usize>);
    let table: [Row; 13] = [
        // Only the answer to several parts is strange, and no reader hears of it.
        (Fault::FirstPartOnly, true, Some(1)),
        (Fault::PartsBackwards, true, Some(1)),
        (Fault::PartsJoined, true, Some(48)),
        (Fault::WrongContentRange, false, Some(1)),
        (Fault::IgnoreRange, false, Some(1)),
        // A connection that breaks says nothing about parts.
        (Fault::CloseAfter(70), false, Some(48)),
        (Fault::CloseAfter(3), false, Some(48)),
        (Fault::Status(500, None), false, Some(48)),
        (Fault::Status(503, None), false, Some(48)),
        // Some servers refuse several parts, and zot calls them unsatisfiable.
        (Fault::Status(416, None), false, Some(1)),
        (Fault::Status(400, None), false, Some(1)),
        (Fault::Status(501, None), false, Some(1)),
        (Fault::Status(416, None), true, None),
    ];
    for (fault, always, parts_max) in table {
        let case = Case::new().await;
        assert_eq!(case.source.parts_max(&case.blob), 48);
        case.registry.script_on(Endpoint::Blob, fault.clone());
        if always {
            case.registry.always(Endpoint::Blob, fault.clone());
        }
        let got = case.parts().await;
        let Some(parts_max) = parts_max else {
            let text = case.text(&got.unwrap_err());
            assert!(text.contains("smaller than the manifest says"), "{text}");
            continue;
        };
        assert_eq!(got.unwrap(), right, "{fault:?}");
        assert_eq!(case.source.parts_max(&case.blob), parts_max, "{fault:?}");
    }
}

#[tokio::test]
async fn whole_blobs() {
    let table = [
        (
            Fault::Half,
            "blob B is malformed: H answered with 18 bytes instead of 36",
        ),
        (
            Fault::TooLong,
            "blob B is malformed: H sent more bytes than were asked for",
        ),
        (Fault::HangAfter(0), "cannot read blob B from H: no"),
        (Fault::CloseAfter(0), "cannot read blob B from H: "),
    ];
    for (fault, expected) in table {
        let case = Case::with(Endpoint::Blob, &fault).await;
        let text = case.text(&case.whole().await.unwrap_err());
        assert!(text.starts_with(expected), "{fault:?}: {text}");
    }
}

#[tokio::test]
async fn a_hang_names_the_deadline_and_is_transient() {
    let case = Case::with(Endpoint::Blob, &Fault::Hang).await;
    let error = case.range().await.unwrap_err();
    assert!(error.is_transient());
    let text = case.text(&error);
    assert!(
        text.contains("deadline") && text.contains("0.2 s"),
        "{text}"
    );
}

#[tokio::test]
async fn nobody_listening() {
    // Nobody else can get the port, and nobody listens there.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let port = socket.local_addr().unwrap().port();
    let reference = Reference::parse(&format!("127.0.0.1:{port}/a:t")).unwrap();
    let source = RegistrySource::new(SourceConfig::default()).unwrap();
    let text = source.resolve(&reference).await.unwrap_err().to_string();
    let expected = format!(
        "cannot read 127.0.0.1:{port}/a:t from 127.0.0.1:{port}: cannot connect to 127.0.0.1:{port}: "
    );
    assert!(text.starts_with(&expected), "{text}");
    assert!(
        text.contains("refused") && text.contains("tried 3 times"),
        "{text}"
    );
}
