//! Lists of referrers that go round in circles, or on for ever: a bounded number of requests,
//! and an error that says so. And answers that are none.

use lazarette_fetcher::Error;
use lazarette_fetcher::source::{BlobSource, RegistrySource, SourceConfig};
use lazarette_fetcher::test_util::{FakeRegistry, Paging};
use lazarette_fetcher::types::{Digest, MediaType, Reference};

#[tokio::test]
async fn pages_that_do_not_end_are_an_error_after_a_few() {
    let table = [
        (Paging::Loop, 1, "the page after one of its pages"),
        (Paging::Endless, 8, "more than 8 pages"),
    ];
    for (paging, requests, words) in table {
        let registry = FakeRegistry::start().await;
        registry.page_referrers(paging);
        let image = Reference::parse(&format!("{}/a/b:t", registry.url_host())).unwrap();
        let source = RegistrySource::new(SourceConfig::default()).unwrap();
        let of = Digest::sha256(b"an image");
        let listed = source.referrers(image.repository(), &of, Some("a/b")).await;
        let error = listed.unwrap_err();
        let is_told = matches!(error, Error::Malformed { .. } | Error::Limit { .. });
        assert!(is_told && !error.is_transient(), "{error:?}");
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.to_string().contains("referrers list"), "{error}");
        assert_eq!(registry.requests().referrers, requests);
    }
}

#[tokio::test]
async fn registries_without_the_api_say_so_in_ways_of_their_own() {
    let builders = [
        FakeRegistry::builder().referrers_elsewhere(),
        FakeRegistry::builder().without_referrers(),
    ];
    for builder in builders {
        let registry = builder.start().await.unwrap();
        let manifest = br#"{"schemaVersion":2}"#.to_vec();
        let subject = Digest::sha256(&manifest);
        // The tag of the list is answered with the manifest that has this digest.
        let (tag, kind) = (subject.file_name(), MediaType::OciManifest);
        registry.add_manifest("a/b", &tag, kind, manifest);
        let image = Reference::parse(&format!("{}/a/b:t", registry.url_host())).unwrap();
        let source = RegistrySource::new(SourceConfig::default()).unwrap();
        let listed = source.referrers(image.repository(), &subject, None).await;
        assert_eq!(listed.unwrap(), []);
        assert_eq!(registry.requests().cdn, 0);
    }
}
