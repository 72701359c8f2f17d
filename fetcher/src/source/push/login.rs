//! Tokens to push with, for who logged in with an identity token.
//!
//! `oci-client` asks for tokens with a password only, so these are asked for here, as every
//! read asks for its own, and handed to it. Invariant: a token is good for the repositories
//! of one operation, is kept as long as it lasts, and is asked for again where that may help;
//! the identity token itself goes to the token endpoint only.

use std::sync::Arc;

use http::HeaderMap;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::Ask;
use crate::Result;
use crate::source::SourceConfig;
use crate::source::auth::credentials::Credentials;
use crate::source::auth::{Access, Action, Auth};
use crate::source::endpoint::Endpoint;
use crate::source::http::Transport;
use crate::source::retry::{Attempts, Jitter, Subject};
use crate::source::stats::Counters;
use crate::types::Repository;

/// What asks for tokens.
pub(super) struct Login {
    auth: Auth,
    jitter: Jitter,
    counters: Arc<Counters>,
}

impl Login {
    /// Reads the CA file; connects to nothing.
    pub(super) fn new(config: &SourceConfig, credentials: Arc<Credentials>) -> Result<Self> {
        let counters = Arc::<Counters>::default();
        let transport = Arc::new(Transport::new(config, counters.clone())?);
        Ok(Self {
            auth: Auth::new(transport, credentials, counters.clone()),
            jitter: Jitter::new(StdRng::from_os_rng()),
            counters,
        })
    }

    /// A token for writing to `repository`, and for reading `from` if that is given;
    /// `None` if the registry wants none.
    pub(super) async fn token(
        &self,
        config: &SourceConfig,
        ask: &Ask,
        repository: &Repository,
        from: Option<&Repository>,
    ) -> Result<Option<String>> {
        let access = Access {
            host: repository.host().to_owned(),
            endpoint: Endpoint::of(repository.host(), config),
            repository: repository.path().to_owned(),
            action: Action::Push {
                from: from.map(|from| from.path().to_owned()),
            },
            headers: HeaderMap::new(),
        };
        let subject = Subject {
            what: ask.what.clone(),
            host: ask.host.clone(),
        };
        let (jitter, counters) = (self.jitter.clone(), self.counters.clone());
        let mut attempts = Attempts::new(subject.clone(), config.deadline, jitter, counters);
        attempts.run(|| self.auth.token(&access, &subject)).await
    }
}
