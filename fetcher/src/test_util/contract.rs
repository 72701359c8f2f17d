//! What every [`BlobSource`] must do, as functions that take any of them.
//!
//! Invariant: a check panics with the name of what was broken; none can pass by doing
//! nothing. The fixture must have been loaded into the source before.

use bytes::Bytes;
use futures_util::{StreamExt as _, future};

use crate::source::{BlobRef, BlobSource, Body};
use crate::types::{ByteRange, Digest, MediaType, Reference, Repository};
use crate::{Error, Result};

/// Tag of the fixture's manifest.
pub const TAG: &str = "v1";
/// Artifact type of the fixture's referrer.
pub const ARTIFACT_TYPE: &str = "application/vnd.example.index";

/// Content that the checks expect to find.
#[derive(Debug, Clone)]
pub struct Fixture {
    /// Where it is.
    pub repository: Repository,
    /// Blobs of 1 byte and of 300,001 bytes.
    pub blobs: Vec<Bytes>,
    /// The manifest tagged [`TAG`], byte for byte; its spacing is unusual on purpose.
    pub manifest: Bytes,
    /// A manifest whose subject is `manifest`.
    pub referrer: Bytes,
}

impl Fixture {
    /// The fixture for `host/path`.
    pub fn new(host: &str, path: &str) -> Self {
        let reference = Reference::parse(&format!("{host}/{path}")).expect("a valid fixture name");
        let large: Bytes = (0..300_001_u32)
            .map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3])
            .collect();
        let blobs = vec![Bytes::from_static(b"x"), large];
        let descriptor = |media_type: &str, bytes: &Bytes| {
            format!(
                r#"{{"mediaType":"{media_type}","digest":"{}","size":{}}}"#,
                Digest::sha256(bytes),
                bytes.len()
            )
        };
        let config = descriptor(MediaType::OciConfig.as_str(), &blobs[0]);
        let layer = descriptor(MediaType::OciLayerTar.as_str(), &blobs[1]);
        let media_type = MediaType::OciManifest;
        let media_type = media_type.as_str();
        let manifest: Bytes = format!(
            "{{ \"schemaVersion\": 2,\n\t\"mediaType\":\"{media_type}\", \"config\":{config},\"layers\":[ {layer} ]}}\n"
        )
        .into();
        let subject = descriptor(media_type, &manifest);
        let referrer: Bytes = format!(
            r#"{{"schemaVersion":2,"mediaType":"{media_type}","artifactType":"{ARTIFACT_TYPE}","config":{config},"layers":[{layer}],"subject":{subject}}}"#
        )
        .into();
        Self {
            repository: reference.repository().clone(),
            blobs,
            manifest,
            referrer,
        }
    }

    /// The large blob.
    pub fn large(&self) -> (BlobRef, Bytes) {
        let bytes = self.blobs[1].clone();
        (self.blob(&bytes), bytes)
    }

    /// A blob of this repository.
    pub fn blob(&self, bytes: &Bytes) -> BlobRef {
        BlobRef {
            repository: self.repository.clone(),
            digest: Digest::sha256(bytes),
            size: bytes.len() as u64,
        }
    }

    /// `host/path:tag`.
    pub fn tagged(&self, tag: &str) -> Reference {
        Reference::parse(&format!("{}:{tag}", self.repository)).expect("a valid fixture name")
    }
}

/// All bytes of a body.
pub async fn collect(mut body: Body) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    while let Some(piece) = body.next().await {
        all.extend_from_slice(&piece?);
    }
    Ok(all)
}

/// Runs every check but the one of referrers, which old registries do not have.
pub async fn check(source: &dyn BlobSource, fixture: &Fixture) {
    documents(source, fixture).await;
    whole_blobs(source, fixture).await;
    ranges(source, fixture).await;
    parts(source, fixture).await;
    missing(source, fixture).await;
    abandoned(source, fixture).await;
    concurrent(source, fixture).await;
}

/// Documents come byte for byte, by tag and by digest.
pub async fn documents(source: &dyn BlobSource, fixture: &Fixture) {
    let digest = Digest::sha256(&fixture.manifest);
    for reference in [fixture.tagged(TAG), fixture.repository.with_digest(digest)] {
        let document = source.resolve(&reference).await.expect("resolve");
        assert_eq!(document.bytes, fixture.manifest, "{reference}");
        assert_eq!(document.descriptor.digest, digest, "{reference}");
        assert_eq!(document.descriptor.media_type, MediaType::OciManifest);
        assert_eq!(document.descriptor.size, fixture.manifest.len() as u64);
    }
}

/// Whole blobs and their sizes.
pub async fn whole_blobs(source: &dyn BlobSource, fixture: &Fixture) {
    for bytes in &fixture.blobs {
        let blob = fixture.blob(bytes);
        let size = source
            .stat(&blob.repository, &blob.digest)
            .await
            .expect("stat");
        assert_eq!(size, blob.size, "stat {}", blob.digest);
        let got = collect(source.read_all(&blob).await.expect("read_all")).await;
        assert!(
            got.expect("body") == bytes.as_ref(),
            "read_all {}",
            blob.digest
        );
    }
}

/// Ranges at the edges and inside; refused when empty or beyond the end.
pub async fn ranges(source: &dyn BlobSource, fixture: &Fixture) {
    let (blob, bytes) = fixture.large();
    let end = bytes.len();
    for (from, to) in [
        (0, 1),
        (0, end),
        (end - 1, end),
        (65_535, 65_537),
        (1, 200_000),
    ] {
        let range = ByteRange::new(from as u64, to as u64).expect("ordered");
        let body = source.read_range(&blob, range).await.expect("read_range");
        assert!(
            collect(body).await.expect("body") == bytes[from..to],
            "{range}"
        );
    }
    let size = blob.size;
    for (from, to) in [(0, 0), (size, size), (size, size + 1), (0, size + 1)] {
        let range = ByteRange::new(from, to).expect("ordered");
        let refused = source.read_range(&blob, range).await.err();
        assert!(
            matches!(refused, Some(Error::Malformed { .. })),
            "{range}: {refused:?}"
        );
    }
}

/// As many parts as the source takes at once, joined and apart; refused when out of order.
pub async fn parts(source: &dyn BlobSource, fixture: &Fixture) {
    let (blob, bytes) = fixture.large();
    for gap in [0, 1, 700] {
        let parts_max = source.parts_max(&blob).min(40);
        assert!(parts_max > 0, "a source takes at least one part");
        let part = |n| ByteRange::at(10 + n * (5_001 + gap), 5_001).expect("small");
        let parts: Vec<ByteRange> = (0..parts_max as u64).map(part).collect();
        let expected: Vec<u8> = parts
            .iter()
            .flat_map(|part| (part.start()..part.end()).filter_map(|at| usize::try_from(at).ok()))
            .map(|at| bytes[at])
            .collect();
        let body = source.read_parts(&blob, &parts).await.expect("read_parts");
        assert!(collect(body).await.expect("body") == expected, "{parts:?}");
    }
    if source.parts_max(&blob) < 2 {
        return;
    }
    let range = |from, to| ByteRange::new(from, to).expect("ordered");
    let table = [
        vec![],
        vec![range(10, 20), range(0, 5)],
        vec![range(10, 20), range(19, 25)],
        vec![range(10, 20), range(20, 20)],
        vec![range(0, 1), range(blob.size, blob.size + 1)],
    ];
    for parts in table {
        let refused = source.read_parts(&blob, &parts).await.err();
        assert!(
            matches!(refused, Some(Error::Malformed { .. })),
            "{parts:?}: {refused:?}"
        );
    }
}

/// What is not there is [`Error::NotFound`], whatever is asked of it.
pub async fn missing(source: &dyn BlobSource, fixture: &Fixture) {
    let absent = fixture.blob(&Bytes::from_static(b"absent"));
    let range = ByteRange::new(0, 1).expect("ordered");
    let outcomes = [
        source.resolve(&fixture.tagged("absent")).await.err(),
        source.stat(&absent.repository, &absent.digest).await.err(),
        source.read_range(&absent, range).await.err(),
        source.read_all(&absent).await.err(),
    ];
    for outcome in outcomes {
        assert!(
            matches!(outcome, Some(Error::NotFound { .. })),
            "{outcome:?}"
        );
    }
}

/// Bodies dropped unread and half read leave the source working.
pub async fn abandoned(source: &dyn BlobSource, fixture: &Fixture) {
    let (blob, bytes) = fixture.large();
    for _ in 0..40 {
        let mut body = source.read_all(&blob).await.expect("read_all");
        body.next().await.expect("a piece").expect("piece");
        drop(body);
        drop(source.read_all(&blob).await.expect("read_all"));
    }
    let got = collect(source.read_all(&blob).await.expect("read_all")).await;
    assert!(got.expect("body") == bytes.as_ref());
}

/// Fifty readers at once get each its own bytes.
pub async fn concurrent(source: &dyn BlobSource, fixture: &Fixture) {
    let (blob, bytes) = fixture.large();
    let reads = (0..50_usize).map(|i| {
        let (blob, bytes) = (&blob, &bytes);
        async move {
            let range = ByteRange::at(i as u64 * 5_000, 5_001).expect("small");
            let body = source.read_range(blob, range).await.expect("read_range");
            let got = collect(body).await.expect("body");
            assert!(got == bytes[i * 5_000..i * 5_000 + 5_001], "{range}");
        }
    });
    future::join_all(reads).await;
}

/// Referrers are found, and filtered by type.
pub async fn referrers(source: &dyn BlobSource, fixture: &Fixture) {
    let subject = Digest::sha256(&fixture.manifest);
    let expected = Digest::sha256(&fixture.referrer);
    for (kind, count) in [(None, 1), (Some(ARTIFACT_TYPE), 1), (Some("other/type"), 0)] {
        let found = source.referrers(&fixture.repository, &subject, kind).await;
        let found = found.expect("referrers");
        assert_eq!(found.len(), count, "{kind:?}");
        assert!(found.iter().all(|d| d.digest == expected), "{kind:?}");
    }
    let none = Digest::sha256(b"nobody refers to this");
    let found = source.referrers(&fixture.repository, &none, None).await;
    assert!(found.expect("referrers").is_empty());
}
