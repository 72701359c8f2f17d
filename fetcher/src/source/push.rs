//! Writing to a registry, for converters: blobs, mounts, manifests.
//!
//! Through `oci-client`, whose upload sessions are complete. Invariant: a blob is streamed
//! in one PUT, never buffered whole, and an upload whose bytes do not have the stated size
//! and digest is broken off before the registry can commit it. An upload may take as long as it
//! likes while it moves. A write is not retried: a stream cannot be replayed, so that is the
//! caller's to do.

mod fault;
mod login;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt as _, Stream, StreamExt as _, stream};
use http::HeaderValue;
use oci_client::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference as OciReference, RegistryOperation};
use parking_lot::Mutex;
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout_at};

use self::fault::{Wrong, error};
use self::login::Login;
use super::SourceConfig;
use super::auth::credentials::{Credential, Credentials};
use super::endpoint::Endpoint;
use super::hosts::dir::load_own;
use super::http::tls;
use super::retry::seconds;
use crate::types::{Digest, Hasher, MediaType, Reference, Repository};
use crate::{Error, Result};

type OciResult<T> = std::result::Result<T, OciDistributionError>;

/// Writes to registries with the settings and credentials of a [`SourceConfig`].
pub struct Pusher {
    config: SourceConfig,
    credentials: Arc<Credentials>,
    /// Made when it is needed first.
    login: OnceCell<Login>,
}

impl Pusher {
    /// A pusher; connects to nothing. Installs the process-wide TLS provider if there is
    /// none yet, see [`super::install_tls_provider`].
    pub fn new(config: SourceConfig) -> Self {
        tls::install_tls_provider();
        let credentials = Credentials::new(config.docker_config.clone());
        Self {
            config,
            credentials: Arc::new(credentials),
            login: OnceCell::new(),
        }
    }

    /// Whether the repository has the blob already.
    pub async fn blob_exists(&self, repository: &Repository, digest: &Digest) -> Result<bool> {
        let ask = Ask::new(format!("blob {digest}"), repository);
        let session = self.session(&ask, repository, None).await?;
        let digest = digest.to_string();
        let there = session.client.blob_exists(&session.target, &digest);
        self.bounded(&ask, there).await
    }

    /// Uploads a blob of exactly `size` bytes. `bytes` yields pieces of any size; its
    /// first error, a wrong size or a wrong digest ends the upload with that error.
    pub async fn push_blob(
        &self,
        repository: &Repository,
        digest: &Digest,
        size: u64,
        bytes: impl Stream<Item = Result<Bytes>> + Send + 'static,
    ) -> Result<()> {
        let ask = Ask::new(format!("blob {digest}"), repository);
        let session = self.session(&ask, repository, None).await?;
        let failed = Arc::new(Mutex::new(None));
        let moved = Arc::new(Mutex::new(Instant::now()));
        let moves = Arc::clone(&moved);
        let checked = checked(bytes, *digest, size, failed.clone())
            .inspect(move |_| *moves.lock() = Instant::now());
        let text = digest.to_string();
        let upload = session
            .client
            .push_blob_stream(&session.target, checked, &text, Some(size));
        match while_moving(&moved, self.config.deadline, upload).await {
            None => Err(ask.silent("the upload stood still for", self.config.deadline)),
            Some(Ok(_)) => Ok(()),
            Some(Err(refused)) => match failed.lock().take() {
                Some(Wrong::Bytes(actual)) => Err(Error::Corrupt {
                    what: ask.what,
                    expected: *digest,
                    actual,
                }),
                Some(Wrong::Size(seen)) => Err(Error::malformed(
                    ask.what,
                    format!("{seen} bytes came for upload instead of {size}"),
                )),
                Some(Wrong::Stream(cause)) => Err(cause),
                None => Err(error(&ask.what, &ask.host, refused)),
            },
        }
    }

    /// Makes a blob of another repository of the same registry available in `repository`
    /// without uploading it. `false` means that the registry does not do this and the
    /// blob has to be pushed.
    pub async fn mount_blob(
        &self,
        repository: &Repository,
        from: &Repository,
        digest: &Digest,
    ) -> Result<bool> {
        if repository.host() != from.host() {
            return Ok(false);
        }
        let ask = Ask::new(format!("blob {digest}"), repository);
        let session = self.session(&ask, repository, Some(from)).await?;
        let source =
            OciReference::with_tag(host_of(from), from.path().to_owned(), "latest".to_owned());
        let digest = digest.to_string();
        let mount = async {
            match session
                .client
                .mount_blob(&session.target, &source, &digest)
                .await
            {
                Ok(()) => Ok(true),
                // 202: the registry opened an upload instead, which it will expire.
                Err(OciDistributionError::SpecViolationError(_)) => Ok(false),
                Err(refused) => Err(refused),
            }
        };
        self.bounded(&ask, mount).await
    }

    /// Uploads a manifest or index under the reference's tag, or its digest if it has
    /// only that. Yields the digest of `bytes`, which a pinning reference must match.
    pub async fn push_manifest(
        &self,
        reference: &Reference,
        media_type: &MediaType,
        bytes: Bytes,
    ) -> Result<Digest> {
        let ask = Ask::new(reference.to_string(), reference.repository());
        let what = format!("manifest of {reference}");
        let digest = match reference.digest() {
            Some(expected) => {
                let actual = Digest::of(expected.algorithm(), &bytes);
                if actual != *expected {
                    return Err(Error::Corrupt {
                        what,
                        expected: *expected,
                        actual,
                    });
                }
                actual
            }
            None => Digest::sha256(&bytes),
        };
        let content_type = HeaderValue::from_str(media_type.as_str())
            .map_err(|_| Error::malformed(what.as_str(), "its media type is no header value"))?;
        let session = self.session(&ask, reference.repository(), None).await?;
        let target = match reference.tag() {
            Some(tag) => OciReference::with_tag(
                host_of(reference.repository()),
                reference.repository().path().to_owned(),
                tag.to_owned(),
            ),
            None => OciReference::with_digest(
                host_of(reference.repository()),
                reference.repository().path().to_owned(),
                digest.to_string(),
            ),
        };
        let put = session
            .client
            .push_manifest_raw(&target, bytes, content_type);
        // The library panics when a push by digest is answered without a Location.
        let put = std::panic::AssertUnwindSafe(put)
            .catch_unwind()
            .map(|outcome| outcome.unwrap_or(Err(OciDistributionError::RegistryNoLocationError)));
        let location = self.bounded(&ask, put).await?;
        match stored_digest(&location) {
            Some(actual) if actual.algorithm() == digest.algorithm() && actual != digest => {
                Err(Error::Corrupt {
                    what,
                    expected: digest,
                    actual,
                })
            }
            Some(_) | None => Ok(digest),
        }
    }

    /// A client that is logged in for pushing to `repository`, with blobs of `from` if that
    /// is given. One per operation: the library never replaces credentials it was given.
    async fn session(
        &self,
        ask: &Ask,
        repository: &Repository,
        from: Option<&Repository>,
    ) -> Result<Session> {
        let client = Client::try_from(self.client_config(repository)?)
            .map_err(|refused| error(&ask.what, &ask.host, refused))?;
        let host = host_of(repository);
        let target =
            OciReference::with_tag(host, repository.path().to_owned(), "latest".to_owned());
        let found = self.credentials.find(repository.host()).await;
        let auth = match found.of(repository.path()).clone() {
            Credential::Anonymous => RegistryAuth::Anonymous,
            Credential::Basic { user, password } => RegistryAuth::Basic(user, password),
            Credential::Registry(token) => RegistryAuth::Bearer(token),
            Credential::Identity(_) => {
                let new = async || Login::new(&self.config, Arc::clone(&self.credentials));
                let login = self.login.get_or_try_init(new).await?;
                let token = login.token(&self.config, ask, repository, from).await?;
                token.map_or(RegistryAuth::Anonymous, RegistryAuth::Bearer)
            }
        };
        // Asked for at once, because later the library would swallow a refusal.
        self.bounded(ask, client.auth(&target, &auth, RegistryOperation::Push))
            .await?;
        Ok(Session { client, target })
    }

    fn client_config(&self, repository: &Repository) -> Result<ClientConfig> {
        let host = repository.host();
        let mut is_plain = Endpoint::of(host, &self.config).is_plain();
        let mut extra = match &self.config.ca_file {
            Some(path) => tls::read_bundle(path)?,
            None => Vec::new(),
        };
        // The library shows no certificate of ours to one host and not to all.
        if let Some(own) = load_own(&self.config.hosts_dirs(), host, is_plain)? {
            is_plain = own.host.endpoint.map_or(is_plain, |at| at.is_plain());
            extra.extend(own.certificates.authorities);
        }
        // The library takes proxies from the environment unless given one; giving one
        // with everything exempt is how to say "none".
        let unused = || Some("http://127.0.0.1:9".to_owned());
        let proxy = &self.config.proxy;
        let mut direct = proxy.no_proxy.clone();
        direct.extend(["localhost", "127.0.0.0/8", "::1"].map(str::to_owned));
        if proxy.http.is_none() && proxy.https.is_none() {
            // The library takes "*" for names only.
            direct = ["*", "0.0.0.0/0", "::/0"].map(str::to_owned).to_vec();
        }
        Ok(ClientConfig {
            protocol: if is_plain {
                ClientProtocol::Http
            } else {
                ClientProtocol::Https
            },
            use_monolithic_push: true,
            extra_root_certificates: extra
                .into_iter()
                .map(|der| Certificate {
                    encoding: CertificateEncoding::Der,
                    data: der.to_vec(),
                })
                .collect(),
            // It would be for a whole upload: it begins with the request and ends with the answer.
            read_timeout: None,
            connect_timeout: Some(self.config.connect_timeout),
            http_proxy: proxy.http.clone().or_else(unused),
            https_proxy: proxy.https.clone().or_else(unused),
            no_proxy: Some(direct.join(",")),
            user_agent: concat!("lazarette/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        })
    }

    /// Runs a short exchange within the deadline. Uploads have none as a whole, see
    /// [`while_moving`].
    async fn bounded<T>(&self, ask: &Ask, work: impl Future<Output = OciResult<T>>) -> Result<T> {
        let limit: Duration = self.config.deadline;
        match tokio::time::timeout(limit, work).await {
            Ok(outcome) => outcome.map_err(|refused| error(&ask.what, &ask.host, refused)),
            Err(_) => Err(ask.silent("no answer within the deadline of", limit)),
        }
    }
}

struct Session {
    client: Client,
    target: OciReference,
}

/// What an operation is about, for its errors.
struct Ask {
    what: String,
    host: String,
}

impl Ask {
    fn new(what: String, repository: &Repository) -> Self {
        Self {
            what,
            host: repository.host().to_owned(),
        }
    }

    fn silent(&self, how: &str, limit: Duration) -> Error {
        Error::Unavailable {
            what: self.what.clone(),
            host: self.host.clone(),
            detail: format!("{how} {}", seconds(limit)),
        }
    }
}

/// The library's name of a host: it maps Docker Hub's API itself.
fn host_of(repository: &Repository) -> String {
    repository.host().to_owned()
}

/// The outcome of `upload`, or nothing once `limit` has passed since it `moved`: since a piece of it
/// was taken, or the last one, after which the registry may have to do as much again.
async fn while_moving<T>(
    moved: &Mutex<Instant>,
    limit: Duration,
    upload: impl Future<Output = T>,
) -> Option<T> {
    let mut upload = pin!(upload);
    loop {
        let end = *moved.lock() + limit;
        if let Ok(outcome) = timeout_at(end, upload.as_mut()).await {
            return Some(outcome);
        }
        if *moved.lock() + limit <= end {
            return None;
        }
    }
}

/// The digest a manifest's Location ends with, if it ends with one.
fn stored_digest(location: &str) -> Option<Digest> {
    let path = location.split(['?', '#']).next()?;
    Digest::parse(path.rsplit('/').next()?).ok()
}

/// Passes `bytes` on, and breaks the stream off at its end unless size and digest are
/// right: the request body stays short and no registry commits it.
fn checked(
    bytes: impl Stream<Item = Result<Bytes>> + Send + 'static,
    expected: Digest,
    size: u64,
    failed: Arc<Mutex<Option<Wrong>>>,
) -> impl Stream<Item = OciResult<Bytes>> + Send + 'static {
    struct Check<S> {
        bytes: std::pin::Pin<Box<S>>,
        hasher: Hasher,
        seen: u64,
        held: Option<Bytes>,
    }
    let start = Check {
        bytes: Box::pin(bytes),
        hasher: Hasher::new(expected.algorithm()),
        seen: 0,
        held: None,
    };
    // One piece is held back: the last may only leave once everything has been checked.
    stream::try_unfold(Some(start), move |state| {
        let failed = failed.clone();
        async move {
            let Some(mut check) = state else {
                return Ok(None);
            };
            let fail = |wrong: Wrong| {
                let error = std::io::Error::other(wrong.to_string());
                *failed.lock() = Some(wrong);
                Err(OciDistributionError::from(error))
            };
            loop {
                match check.bytes.next().await {
                    Some(Ok(piece)) => {
                        check.seen += piece.len() as u64;
                        if check.seen > size {
                            return fail(Wrong::Size(check.seen));
                        }
                        check.hasher.update(&piece);
                        if let Some(ready) = check.held.replace(piece) {
                            return Ok(Some((ready, Some(check))));
                        }
                    }
                    Some(Err(cause)) => return fail(Wrong::Stream(cause)),
                    None if check.seen != size => return fail(Wrong::Size(check.seen)),
                    None => {
                        let actual = check.hasher.finish();
                        if actual != expected {
                            return fail(Wrong::Bytes(actual));
                        }
                        return Ok(check.held.map(|last| (last, None)));
                    }
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn run(pieces: Vec<Result<Bytes>>, of: &[u8]) -> (Vec<u8>, Option<String>) {
        let failed = Arc::new(Mutex::new(None));
        let size = of.len() as u64;
        let mut out = Vec::new();
        let stream = checked(
            stream::iter(pieces),
            Digest::sha256(of),
            size,
            failed.clone(),
        );
        let mut stream = std::pin::pin!(stream);
        while let Some(Ok(piece)) = stream.next().await {
            out.extend_from_slice(&piece);
        }
        let wrong = failed.lock().take().map(|wrong| wrong.to_string());
        (out, wrong)
    }

    #[tokio::test]
    async fn only_right_bytes_leave_completely() {
        let b = |text: &'static str| Ok(Bytes::from_static(text.as_bytes()));
        assert_eq!(
            run(vec![b("ab"), b("c")], b"abc").await,
            (b"abc".to_vec(), None)
        );
        assert_eq!(run(vec![], b"").await, (vec![], None));
        for pieces in [
            vec![b("ab"), b("x")],
            vec![b("ab")],
            vec![b("ab"), b("cd")],
            vec![b("ab"), Err(Error::malformed("x", "y"))],
        ] {
            let (out, wrong) = run(pieces, b"abc").await;
            assert!(out.len() < 3 && wrong.is_some(), "{out:?} {wrong:?}");
        }
    }

    #[tokio::test]
    async fn an_upload_may_take_long_and_may_not_stand_still() {
        let (limit, hour) = (Duration::from_millis(10), Duration::from_secs(3600));
        let moved = Mutex::new(Instant::now());
        let long = async {
            *moved.lock() = Instant::now() + hour;
            tokio::time::sleep(5 * limit).await;
        };
        assert_eq!(while_moving(&moved, limit, long).await, Some(()));
        *moved.lock() = Instant::now();
        let still = std::future::pending::<()>();
        assert_eq!(while_moving(&moved, limit, still).await, None);
    }

    #[test]
    fn reads_the_stored_digest() {
        let digest = Digest::sha256(b"x");
        let location = format!("http://r/v2/a/manifests/{digest}?x=1");
        assert_eq!(stored_digest(&location), Some(digest));
        assert_eq!(stored_digest("http://r/v2/a/manifests/latest"), None);
    }
}
