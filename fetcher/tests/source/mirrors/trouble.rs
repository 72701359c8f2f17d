//! Hosts that cannot answer: they are put back, and asked again where nobody else can.

use super::*;

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
fn troubles() -> [(Fault, u32); 7] {
    [
        (Fault::Status(500, None), 2),
        (Fault::Status(503, Some("3600".to_owned())), 1),
        (Fault::Status(429, None), 1),
        (Fault::Status(429, Some("1".to_owned())), 1),
        (Fault::Status(429, Some(u64::MAX.to_string())), 1),
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
    // As of a proxy whose backend comes back: two tries a round, for two rounds and a half.
    let down = [503, 503, 503, 503, 502, 429, 429];
    for status in down {
        mirror.script_on(Endpoint::Blob, Fault::Status(status, None));
    }
    for _ in 0..2 {
        let got = case.ten(source.as_ref()).await.unwrap();
        assert_eq!(got, case.expected_ten());
    }
    assert_eq!(mirror.requests().blobs as usize, down.len() + 2);
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
