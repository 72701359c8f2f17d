//! CRI's image service, passed on to containerd, which has the images.
//!
//! Kubelet hands the credentials of a pod's secrets to whoever it asks for an image, and to
//! nobody else. So it asks here, and containerd gets what it asked; the credentials are kept
//! for the layers of that image that are read later (see [`Keyring`]).
//!
//! Invariant: containerd gets the bytes that came, and kubelet gets containerd's answer,
//! whether or not credentials could be read. They count from before containerd hears of the
//! pull, because it asks for snapshots while it pulls. No credential is in a log or an
//! error. Other services are refused.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::{Request, Response};
use lazarette_fetcher::source::{Credential, Given, Keyring, PullAuth};
use lazarette_fetcher::types::{Reference, Repository};
use lazarette_proto::images::{PULL_IMAGE, PullImageRequest, SERVICE};
use lazarette_proto::{MESSAGE_BYTES_MAX, Message, Status};

use super::relay::{self, OnStatus, Relayed};

/// Flag and length before a message.
const PREFIX_BYTES: usize = 5;

/// The service. Clones are one.
#[derive(Clone)]
pub struct Images {
    containerd: Arc<PathBuf>,
    keyring: Arc<Keyring>,
}

impl Images {
    /// Passes requests on to the socket `containerd`, and keeps credentials in `keyring`.
    pub fn new(containerd: PathBuf, keyring: Arc<Keyring>) -> Self {
        Self {
            containerd: Arc::new(containerd),
            keyring,
        }
    }

    pub(super) async fn answer(&self, request: Request<Incoming>) -> Response<Relayed> {
        let outcome = match request.uri().path() {
            PULL_IMAGE => self.pull(request).await,
            path if path.starts_with(SERVICE) => relay::ask(&self.containerd, request, None).await,
            _ => Err(Status::unimplemented("only CRI's image service is here")),
        };
        outcome.unwrap_or_else(Status::into_http)
    }

    async fn pull(&self, request: Request<Incoming>) -> Result<Response<Relayed>, Status> {
        let (parts, body) = request.into_parts();
        let body = Limited::new(body, MESSAGE_BYTES_MAX + PREFIX_BYTES);
        let body = body.collect().await.map_err(|error| {
            Status::invalid_argument(format!("a pull that cannot be read: {error}"))
        })?;
        let body = body.to_bytes();
        let on_status = self.keep(&body).map(|given| -> OnStatus {
            Box::new(move |is_success| {
                if is_success {
                    given.succeeded();
                }
            })
        });
        let request = Request::from_parts(parts, Full::new(body));
        relay::ask(&self.containerd, request, on_status).await
    }

    /// Keeps what the pull came with.
    fn keep(&self, body: &Bytes) -> Option<Given> {
        match pulled(body) {
            Ok(Some((repository, credential))) => {
                tracing::debug!(%repository, ?credential, "a pull came with credentials");
                Some(self.keyring.give(&repository, credential))
            }
            Ok(None) => None,
            Err(why) => {
                tracing::warn!(why, "credentials of a pull cannot be used");
                None
            }
        }
    }
}

/// What a pull's body, a message in gRPC's frame, says of credentials.
///
/// # Errors
/// Why they cannot be used. No part of them is in the text.
pub fn pulled(body: &[u8]) -> Result<Option<(Repository, Credential)>, &'static str> {
    let (prefix, message) = body
        .split_at_checked(PREFIX_BYTES)
        .ok_or("the message is cut off")?;
    if prefix.first() != Some(&0) {
        return Err("the message is compressed");
    }
    let request = PullImageRequest::decode(message).map_err(|_| "the message is malformed")?;
    let Some(auth) = request.auth else {
        return Ok(None);
    };
    let auth = PullAuth {
        username: &auth.username.0,
        password: &auth.password.0,
        auth: &auth.auth.0,
        server_address: &auth.server_address,
        identity_token: &auth.identity_token.0,
        registry_token: &auth.registry_token.0,
    };
    let image = request.image.unwrap_or_default().image;
    let reference = Reference::parse(&image).map_err(|_| "the image's name is malformed")?;
    let repository = reference.repository();
    let credential = auth.credential(repository)?;
    Ok(credential.map(|credential| (repository.clone(), credential)))
}

#[cfg(test)]
mod tests;
