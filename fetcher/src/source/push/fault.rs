//! From `oci-client`'s errors to ours: one table.
//!
//! Invariant: no type of that library passes this file.

use std::io;

use oci_client::errors::{OciDistributionError, OciErrorCode};

use crate::Error;
use crate::source::http::tls;
use crate::types::Digest;

/// Why an upload was broken off on our side.
#[derive(Debug, thiserror::Error)]
pub(super) enum Wrong {
    /// The bytes have this digest instead.
    #[error("the bytes have the digest {0}")]
    Bytes(Digest),
    /// This many bytes came.
    #[error("{0} bytes came")]
    Size(u64),
    /// The caller's stream failed.
    #[error(transparent)]
    Stream(Error),
}

/// What the library's error means.
pub(super) fn error(what: &str, host: &str, refused: OciDistributionError) -> Error {
    let (what, host) = (what.to_owned(), host.to_owned());
    match refused {
        OciDistributionError::AuthenticationFailure(said) => denied(what, host, &said),
        OciDistributionError::UnauthorizedError { .. } => denied(what, host, ""),
        OciDistributionError::ServerError { code, message, .. } => {
            by_code(what, host, code, &message)
        }
        OciDistributionError::RegistryError { envelope, .. } => {
            let said = envelope.to_string();
            match envelope.errors.first().map(|first| &first.code) {
                Some(OciErrorCode::Unauthorized | OciErrorCode::Denied) => {
                    denied(what, host, &said)
                }
                Some(OciErrorCode::Toomanyrequests) => by_code(what, host, 429, &said),
                Some(
                    OciErrorCode::BlobUnknown
                    | OciErrorCode::ManifestUnknown
                    | OciErrorCode::NameUnknown,
                ) => by_code(what, host, 404, &said),
                Some(_) | None => by_code(what, host, 400, &said),
            }
        }
        OciDistributionError::RequestError(failed) => match failed.status() {
            Some(status) => by_code(what, host, status.as_u16(), ""),
            None => unanswered(what, host, &failed),
        },
        other => Error::Unsupported {
            what: format!("pushing {what} to {host}"),
            detail: clean(&other.to_string()),
        },
    }
}

fn by_code(what: String, host: String, code: u16, said: &str) -> Error {
    match code {
        401 | 403 => denied(what, host, said),
        404 => Error::NotFound { what, host },
        429 => Error::RateLimited {
            what,
            host,
            retry_after: None,
        },
        500.. => Error::Unavailable {
            what,
            host,
            detail: format!("the server answered {code} {}", clean(said)),
        },
        _ => Error::Unsupported {
            what: format!("pushing {what} to {host}"),
            detail: format!("the server answered {code} {}", clean(said)),
        },
    }
}

fn denied(what: String, host: String, said: &str) -> Error {
    let advice = format!("log in with `docker login {host}` as someone who may push");
    let said = clean(said);
    let detail = if said.is_empty() {
        advice
    } else {
        format!("{said} ({advice})")
    };
    Error::Denied { what, host, detail }
}

/// A server's words, cut and stripped of control characters.
fn clean(said: &str) -> String {
    said.trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(200)
        .collect()
}

/// No answer came.
fn unanswered(what: String, host: String, failed: &reqwest::Error) -> Error {
    let mut deepest: &dyn std::error::Error = failed;
    let mut refused = None;
    loop {
        refused = refused.or_else(|| tls::refused(deepest.downcast_ref::<io::Error>()?));
        match deepest.source() {
            Some(cause) => deepest = cause,
            None => break,
        }
    }
    let Some(refused) = refused else {
        let detail = deepest.to_string();
        return Error::Unavailable { what, host, detail };
    };
    let todo = match tls::is_of_authority(refused) {
        true => {
            "nothing is pushed by a certificate that says it is an authority's: make one with \
                 basicConstraints=CA:FALSE, or by an authority"
        }
        false => "if you trust its authority, set ca_file, or ca in its hosts.toml",
    };
    Error::Unsupported {
        what: format!("pushing {what} to {host}"),
        detail: format!("its certificate is not trusted ({refused}); {todo}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_codes_apart() {
        let table = [
            (
                401,
                "access to w denied by h: a b (log in with `docker login h`",
            ),
            (403, "access to w denied by h: a b (log in"),
            (404, "w not found at h"),
            (429, "h limits the rate of requests (429) for w"),
            (503, "cannot read w from h: the server answered 503 a b"),
            (
                400,
                "pushing w to h is not supported: the server answered 400 a b",
            ),
        ];
        for (code, text) in table {
            let refused = OciDistributionError::ServerError {
                code,
                url: String::new(),
                message: "a\nb".to_owned(),
            };
            let message = error("w", "h", refused).to_string();
            assert!(message.starts_with(text), "{code}: {message}");
        }
    }
}
