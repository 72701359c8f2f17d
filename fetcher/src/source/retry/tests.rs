//! Decisions by table; waiting with deadlines of a blink.

use http::HeaderValue;
use rand::SeedableRng;

use super::*;

const MINUTE: Duration = Duration::from_secs(60);

fn attempts(deadline: Duration) -> Attempts {
    let subject = Subject {
        what: "blob sha256:1".into(),
        host: "reg.io".into(),
    };
    let jitter = Jitter::new(StdRng::seed_from_u64(1));
    Attempts::new(subject, deadline, jitter, Arc::default())
}

fn broken(retry_after_s: Option<u64>) -> Trouble {
    Trouble::Broken {
        retry_after: retry_after_s.map(Duration::from_secs),
    }
}

#[test]
fn waits_by_the_table() {
    let ms = Duration::from_millis;
    let minute = Duration::from_secs(60);
    let table = [
        (1, broken(None), minute, 1.0, Some(ms(100))),
        (2, broken(None), minute, 0.5, Some(ms(100))),
        (7, broken(None), minute, 1.0, Some(ms(5_000))),
        (7, broken(None), minute, 0.0, Some(ms(0))),
        (8, broken(None), minute, 0.0, None),
        (2, Trouble::Connect, minute, 1.0, Some(ms(200))),
        (3, Trouble::Connect, minute, 0.0, None),
        (1, broken(Some(7)), minute, 1.0, Some(ms(7_000))),
        (1, broken(Some(60)), minute, 1.0, None),
        (
            1,
            Trouble::Limited {
                retry_after: Some(ms(1)),
            },
            minute,
            1.0,
            Some(ms(100)),
        ),
        (4, broken(None), ms(100), 1.0, None),
        (u32::MAX, broken(None), minute, 1.0, None),
    ];
    for (failures, kind, remaining, fraction, expected) in table {
        let got = next_wait(Patience::Full, failures, kind, remaining, fraction);
        assert_eq!(
            got, expected,
            "{failures} {kind:?} {remaining:?} {fraction}"
        );
    }
}

#[test]
fn what_lasts_ends_with_the_deadline_alone() {
    let limited = Trouble::Limited { retry_after: None };
    for kind in [broken(None), Trouble::Connect, Trouble::Silent, limited] {
        for failures in [3, 8, 1000] {
            let wait = next_wait(Patience::Lasting, failures, kind, MINUTE, 1.0);
            assert!(wait.is_some_and(|wait| wait <= BACKOFF_MAX), "{kind:?}");
            let late = next_wait(Patience::Lasting, failures, kind, Duration::ZERO, 1.0);
            assert_eq!(late, None, "{kind:?}");
        }
    }
}

#[test]
fn reads_retry_after_in_both_forms() {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
    let table = [
        ("120", Some(120)),
        (" 0 ", Some(0)),
        ("Sun, 06 Nov 1994 08:50:07 GMT", Some(30)),
        ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
        ("-1", None),
        ("soon", None),
        ("", None),
    ];
    for (text, expected) in table {
        let mut headers = HeaderMap::new();
        headers.insert(header::RETRY_AFTER, HeaderValue::from_str(text).unwrap());
        let got = retry_after(&headers, now);
        assert_eq!(got, expected.map(Duration::from_secs), "{text:?}");
    }
    assert_eq!(retry_after(&HeaderMap::new(), now), None);
}

#[tokio::test]
async fn a_hang_ends_at_the_deadline_and_names_it() {
    let mut attempts = attempts(Duration::from_millis(100));
    let started = Instant::now();
    let hang = || std::future::pending::<Result<(), Fault>>();
    let error = attempts.run(hang).await.unwrap_err();
    assert!(started.elapsed() >= Duration::from_millis(100));
    assert_eq!(
        error.to_string(),
        "cannot read blob sha256:1 from reg.io: no progress within the deadline of 0.1 s"
    );
}

#[tokio::test]
async fn failures_end_after_eight_and_progress_starts_over() {
    let mut attempts = attempts(MINUTE);
    attempts.failures = 7;
    attempts.progress();
    attempts.after(Fault::broken("x")).await.unwrap();
    attempts.failures = 7;
    let error = attempts.run(|| async { Err::<(), _>(Fault::broken("the server answered 503")) });
    let text = error.await.unwrap_err().to_string();
    let start = "cannot read blob sha256:1 from reg.io: the server answered 503 (tried 8 times in ";
    assert!(text.starts_with(start), "{text}");
    assert!(text.ends_with("deadline 60 s)"), "{text}");
}

#[tokio::test]
async fn a_limit_beyond_the_deadline_is_told_at_once() {
    let mut attempts = attempts(MINUTE);
    let fault = Fault::Transient(Transient {
        detail: "the server answered 429".into(),
        kind: Trouble::Limited {
            retry_after: Some(Duration::from_secs(300)),
        },
    });
    let error = attempts.after(fault).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "reg.io limits the rate of requests (429) for blob sha256:1; try again in 300 s"
    );
}

#[test]
fn who_can_ask_somebody_else_gives_up_soon() {
    let limited = Trouble::Limited { retry_after: None };
    let table = [
        (Patience::Full, 7, broken(None), false),
        (Patience::Full, 2, Trouble::Connect, false),
        (Patience::Brief, 1, broken(None), false),
        (Patience::Brief, 2, broken(None), true),
        (Patience::Brief, 1, broken(Some(1)), true),
        (Patience::Brief, 1, Trouble::Connect, true),
        (Patience::Brief, 1, Trouble::Silent, true),
        (Patience::Brief, 1, limited, true),
    ];
    for (patience, failures, kind, expected) in table {
        let got = patience.ends(failures, kind);
        assert_eq!(got, expected, "{patience:?} {failures} {kind:?}");
    }
}

#[tokio::test]
async fn why_a_host_was_given_up_is_known() {
    let limited = Trouble::Limited {
        retry_after: Some(MINUTE),
    };
    for kind in [Trouble::Connect, Trouble::Silent, broken(Some(1)), limited] {
        let manner = Manner::new(Patience::Brief);
        let mut brief = attempts(MINUTE).asking(manner.clone());
        let detail = "x".into();
        let fault = Fault::Transient(Transient { detail, kind });
        assert_eq!(manner.gave_up(), None);
        brief.after(fault).await.unwrap_err();
        assert_eq!(manner.gave_up(), Some(kind));
    }
    let manner = Manner::default();
    let mut refused = attempts(MINUTE).asking(manner.clone());
    let no = Fault::Fatal(Error::malformed("x", "y"));
    refused.after(no).await.unwrap_err();
    assert_eq!(manner.gave_up(), None);
}
