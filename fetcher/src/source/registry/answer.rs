//! From a status code to what it means for the caller: one table.
//!
//! Invariant: words taken from a server are cut and stripped of control characters
//! before they reach an error message.

use std::time::SystemTime;

use http::{StatusCode, Uri, header};
use serde::Deserialize;

use crate::source::http::Answer;
use crate::source::retry::{Fault, Subject, Transient, Trouble, retry_after};
use crate::{Error, Result};

/// Most of an error body that is looked at.
const ERROR_BODY_BYTES_MAX: usize = 16 << 10;
/// Most of a server's words that a message repeats.
const WORDS_CHARS_MAX: usize = 200;

/// What an unsuccessful answer means. Consumes its body; 401 belongs to
/// [`super::origin`], which knows the credentials.
pub(crate) async fn fault(subject: &Subject, answer: &mut Answer) -> Fault {
    let asked = retry_after(&answer.headers, SystemTime::now());
    let words = registry_words(answer).await;
    judge(subject, answer.status, asked, words)
}

/// The table. Pure.
fn judge(
    subject: &Subject,
    status: StatusCode,
    retry_after: Option<std::time::Duration>,
    words: Option<String>,
) -> Fault {
    let Subject { what, host } = subject.clone();
    let code = status.as_u16();
    let told = words
        .as_ref()
        .map_or(String::new(), |words| format!(": {words}"));
    let unexpected = || {
        let detail = format!(
            "{host} gave the unexpected answer {code}{told}; check that it is an OCI registry"
        );
        let what = what.clone();
        Fault::from(Error::Unsupported { what, detail })
    };
    match code {
        401 | 403 => Error::Denied {
            what,
            host,
            detail: words.unwrap_or_else(|| {
                format!("the server answered {code} and gave no reason; check your access rights")
            }),
        }
        .into(),
        404 | 410 => Error::NotFound { what, host }.into(),
        416 => Error::malformed(
            what,
            format!(
                "{host} answered 416: its copy is smaller than the manifest says; \
                 push the image again or pull another tag"
            ),
        )
        .into(),
        429 => Fault::Transient(Transient {
            detail: format!("the server answered 429{told}"),
            kind: Trouble::Limited { retry_after },
        }),
        501 | 505 => unexpected(),
        408 | 425 | 500..=599 => Fault::Transient(Transient {
            detail: format!("the server answered {code}{told}"),
            kind: Trouble::Broken { retry_after },
        }),
        _ => unexpected(),
    }
}

#[derive(Deserialize)]
struct Envelope {
    errors: Vec<Complaint>,
}

#[derive(Deserialize)]
struct Complaint {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// The first complaint of a distribution error body, cleaned; `None` if there is none.
pub(crate) async fn registry_words(answer: &mut Answer) -> Option<String> {
    let body = answer.read_at_most(ERROR_BODY_BYTES_MAX).await.ok()??;
    words(&body)
}

fn words(body: &[u8]) -> Option<String> {
    let envelope: Envelope = serde_json::from_slice(body).ok()?;
    let first = envelope.errors.into_iter().next()?;
    let text = match (first.code.is_empty(), first.message.is_empty()) {
        (true, true) => return None,
        (true, false) => first.message,
        (false, true) => first.code,
        (false, false) => format!("{} {}", first.code, first.message),
    };
    let clean = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    Some(clean.take(WORDS_CHARS_MAX).collect())
}

/// Where a redirect leads, or `None` if this is not one. From https it may only lead to
/// https.
pub(crate) fn redirect(subject: &Subject, answer: &Answer) -> Result<Option<Uri>> {
    if !matches!(answer.status.as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let location = answer.text(header::LOCATION).unwrap_or_default();
    target(subject, &answer.uri, location).map(Some)
}

fn target(subject: &Subject, from: &Uri, location: &str) -> Result<Uri> {
    let bad = |detail: String| Error::Malformed {
        what: format!("redirect of {} by {}", subject.what, subject.host),
        detail,
    };
    let base = url::Url::parse(&from.to_string()).map_err(|e| bad(e.to_string()))?;
    if location.is_empty() {
        return Err(bad("it has no Location".to_owned()));
    }
    let mut to = base.join(location).map_err(|e| bad(e.to_string()))?;
    to.set_fragment(None);
    match (base.scheme(), to.scheme()) {
        (_, "https") | ("http", "http") => {}
        (_, scheme) => return Err(bad(format!("it leads from {} to {scheme}", base.scheme()))),
    }
    to.as_str()
        .parse()
        .map_err(|_| bad("it leads to no usable address".to_owned()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn subject() -> Subject {
        Subject {
            what: "blob sha256:1".into(),
            host: "reg.io".into(),
        }
    }

    #[test]
    fn tells_statuses_apart() {
        let table = [
            (401, "access to blob sha256:1 denied by reg.io: DENIED no"),
            (403, "access to blob sha256:1 denied by reg.io: DENIED no"),
            (404, "blob sha256:1 not found at reg.io"),
            (
                416,
                "blob sha256:1 is malformed: reg.io answered 416: its copy is smaller",
            ),
            (
                418,
                "blob sha256:1 is not supported: reg.io gave the unexpected answer 418: DENIED no",
            ),
            (
                501,
                "blob sha256:1 is not supported: reg.io gave the unexpected answer 501: DENIED no",
            ),
            (
                200,
                "blob sha256:1 is not supported: reg.io gave the unexpected answer 200",
            ),
        ];
        for (code, text) in table {
            let status = StatusCode::from_u16(code).unwrap();
            match judge(&subject(), status, None, Some("DENIED no".into())) {
                Fault::Fatal(error) => {
                    assert!(error.to_string().starts_with(text), "{code}: {error}");
                }
                Fault::Transient(_) => panic!("{code} must be final"),
            }
        }
        let wait = Some(Duration::from_secs(3));
        // What stands in front of a registry has numbers of its own: 522 is Cloudflare's.
        for code in [408, 425, 429, 500, 502, 503, 504, 507, 522] {
            let status = StatusCode::from_u16(code).unwrap();
            let fault = judge(&subject(), status, wait, None);
            let Fault::Transient(transient) = fault else {
                panic!("{code} must be transient")
            };
            let expected = match code {
                429 => Trouble::Limited { retry_after: wait },
                _ => Trouble::Broken { retry_after: wait },
            };
            assert_eq!(transient.kind, expected, "{code}");
        }
    }

    #[test]
    fn repeats_a_servers_words_only_when_clean_and_short() {
        let long = format!(
            r#"{{"errors":[{{"message":"a\u001b[31m{}"}}]}}"#,
            "x".repeat(500)
        );
        let said = words(long.as_bytes()).unwrap();
        assert!(said.starts_with("a [31m") && said.chars().count() == WORDS_CHARS_MAX);
        for none in ["", "<html>", r#"{"errors":[]}"#, r#"{"errors":[{}]}"#] {
            assert_eq!(words(none.as_bytes()), None, "{none}");
        }
    }

    #[test]
    fn redirects_never_leave_tls() {
        let table = [
            (
                "https://r.io/v2/x",
                "https://cdn.io/y?s=1#f",
                Some("https://cdn.io/y?s=1"),
            ),
            ("https://r.io/v2/x", "/y", Some("https://r.io/y")),
            (
                "http://127.0.0.1:1/x",
                "http://127.0.0.1:2/y",
                Some("http://127.0.0.1:2/y"),
            ),
            (
                "http://127.0.0.1:1/x",
                "https://cdn.io/y",
                Some("https://cdn.io/y"),
            ),
            ("https://r.io/v2/x", "http://cdn.io/y", None),
            ("https://r.io/v2/x", "file:///etc/passwd", None),
            ("https://r.io/v2/x", "", None),
        ];
        for (from, location, to) in table {
            let got = target(&subject(), &from.parse().unwrap(), location);
            assert_eq!(
                got.ok().map(|uri| uri.to_string()).as_deref(),
                to,
                "{from} {location}"
            );
        }
    }
}
