//! What a pull says of its credentials, as kubelet has it.
//!
//! Pure. Input comes from other processes: anything but a credential that can be used is
//! an error without a word of it.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};

use super::Credential;
use crate::types::Repository;

/// Longest credential that is kept, bytes. Tokens of clouds take some KiB.
const CREDENTIAL_BYTES_MAX: usize = 16 << 10;
const HUB: &str = "docker.io";

/// Credentials in the fields of CRI's `AuthConfig`; those that are not given are empty.
#[derive(Clone, Copy, Default)]
pub struct PullAuth<'a> {
    /// User name.
    pub username: &'a str,
    /// Its password.
    pub password: &'a str,
    /// Both, with a colon between them, in base64.
    pub auth: &'a str,
    /// The registry that they are for; empty for the image's.
    pub server_address: &'a str,
    /// An OAuth2 refresh token.
    pub identity_token: &'a str,
    /// A token for the registry itself.
    pub registry_token: &'a str,
}

impl PullAuth<'_> {
    /// The credential for reading `repository`, if there is one; the first that is given in
    /// the order in which containerd looks.
    ///
    /// # Errors
    /// Why what is there cannot be used. No part of it is in the text.
    pub fn credential(&self, repository: &Repository) -> Result<Option<Credential>, &'static str> {
        let fields = [
            self.username,
            self.password,
            self.auth,
            self.identity_token,
            self.registry_token,
        ];
        if fields.iter().map(|field| field.len()).sum::<usize>() > CREDENTIAL_BYTES_MAX {
            return Err("the credentials are longer than 16 KiB");
        }
        let host = host_of(self.server_address);
        if !host.is_empty() && canonical(host) != canonical(repository.host()) {
            return Err("the credentials are for another registry");
        }
        let found = match self {
            auth if !auth.username.is_empty() => Credential::Basic {
                user: auth.username.to_owned(),
                password: auth.password.to_owned(),
            },
            auth if !auth.identity_token.is_empty() => {
                Credential::Identity(auth.identity_token.to_owned())
            }
            auth if !auth.auth.is_empty() => basic(auth.auth)?,
            auth if !auth.registry_token.is_empty() => {
                Credential::Registry(auth.registry_token.to_owned())
            }
            _ => return Ok(None),
        };
        Ok(Some(found))
    }
}

/// `user:password` in base64, with or without its padding, and with zeros after it, which
/// old clients leave there.
fn basic(text: &str) -> Result<Credential, &'static str> {
    let bytes = STANDARD
        .decode(text)
        .or_else(|_| STANDARD_NO_PAD.decode(text))
        .map_err(|_| "auth is not base64")?;
    let text = String::from_utf8(bytes).map_err(|_| "auth is not text")?;
    let (user, password) = text.split_once(':').ok_or("auth has no colon")?;
    if user.is_empty() {
        return Err("auth has no user");
    }
    Ok(Credential::Basic {
        user: user.to_owned(),
        password: password.trim_end_matches('\0').to_owned(),
    })
}

/// The host of an address that may be a URL.
fn host_of(address: &str) -> &str {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    rest.split('/').next().unwrap_or_default()
}

/// The one name of a registry that has several.
pub(super) fn canonical(host: &str) -> &str {
    match host {
        "index.docker.io" | "registry-1.docker.io" => HUB,
        other => other,
    }
}
