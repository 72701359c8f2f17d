//! Credentials from docker's config file and its credential helpers.
//!
//! Invariant: a missing file or entry means anonymous, never an error; a broken one means
//! anonymous too, with the reason kept for the moment the registry refuses. Secrets are
//! never printed. A helper that never ends takes one thread for its host, and no more than
//! [`LOOKUPS_MAX`] hosts take one at once: all else on blocking threads goes on.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use docker_credential::{CredentialRetrievalError, DockerCredential, get_credential_from_reader};
use futures_util::FutureExt as _;
use futures_util::future::Shared;
use parking_lot::Mutex;
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::sync::oneshot;

use super::keyring::Keyring;

/// Longest time a credential helper may take; one that asks a cloud's API needs seconds.
const HELPER_MAX: Duration = Duration::from_secs(20);
/// Look-ups that have not ended. Each holds a blocking thread, of which there are a few hundred
/// for everything; a helper that works is done with its host in a moment.
const LOOKUPS_MAX: usize = 32;
/// Entries for parts of one host that are read.
const NARROWER_MAX: usize = 256;
/// Largest config file that is read.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// How to authenticate to one host. Printed without what it holds.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// Not at all.
    Anonymous,
    /// With user and password.
    Basic {
        /// User name.
        user: String,
        /// Password or access token.
        password: String,
    },
    /// With an OAuth2 refresh token.
    Identity(String),
    /// With a token that the registry takes as it is.
    Registry(String),
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Basic { .. } => "Basic(..)",
            Self::Identity(_) => "Identity(..)",
            Self::Registry(_) => "Registry(..)",
        })
    }
}

/// Where a credential comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Docker's config file or one of its helpers.
    Config,
    /// A pull that came with it.
    Pull,
}

/// The outcome of a look-up.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// What to use.
    pub(crate) credential: Credential,
    /// Why it is anonymous although the config has something to say about the host.
    pub(crate) trouble: Option<String>,
    /// Where that is from.
    pub(crate) origin: Origin,
    /// What the config has for parts of the host, by the path that their repositories begin
    /// with, the longest first. Podman writes such entries.
    pub(crate) narrower: Vec<(String, Credential)>,
}

impl Found {
    /// What to use for one repository of the host.
    pub(crate) fn of(&self, repository: &str) -> &Credential {
        let is_below = |(path, _): &&(String, Credential)| {
            let rest = repository.strip_prefix(path.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let narrower = self.narrower.iter().find(is_below);
        narrower.map_or(&self.credential, |(_, credential)| credential)
    }

    /// What a pull came with.
    pub(crate) fn given(credential: Credential) -> Self {
        Self {
            credential,
            trouble: None,
            origin: Origin::Pull,
            narrower: Vec::new(),
        }
    }
}

/// Looks up credentials by host.
pub(crate) struct Credentials {
    path: Option<PathBuf>,
    keyring: Arc<Keyring>,
    lookups: Lookups,
}

/// Look-ups that have not ended, by host.
type Lookups = Arc<Mutex<HashMap<String, Shared<oneshot::Receiver<Found>>>>>;

/// Takes a host's look-up off when it ends, however that is.
struct UnderWay {
    host: String,
    lookups: Lookups,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.lookups.lock().remove(&self.host);
    }
}

impl Credentials {
    /// From `path`, or none at all.
    pub(crate) fn new(path: Option<PathBuf>) -> Self {
        Self {
            path,
            keyring: Arc::default(),
            lookups: Lookups::default(),
        }
    }

    /// What pulls came with.
    pub(crate) fn keyring(&self) -> &Arc<Keyring> {
        &self.keyring
    }

    /// The config's credentials for `host` as it stands in a reference. Helpers are other programs:
    /// they run on a blocking thread, and one that takes too long is given up on. Nobody ends it,
    /// so whoever asks for its host again waits for the same one.
    pub(crate) async fn find(&self, host: &str) -> Found {
        let Some(path) = self.path.clone() else {
            return anonymous(None);
        };
        let name = host.to_owned();
        let look = move || find_blocking(&path, &name);
        match tokio::time::timeout(HELPER_MAX, self.look_up(host, look)).await {
            Ok(found) => found,
            Err(_) => anonymous(Some(format!(
                "the credential helper did not answer within {} s",
                HELPER_MAX.as_secs()
            ))),
        }
    }

    /// What the look-up for `host` finds that is under way, or else `look`.
    async fn look_up(&self, host: &str, look: impl FnOnce() -> Found + Send + 'static) -> Found {
        let (lookup, begun) = {
            let mut lookups = self.lookups.lock();
            let is_full = lookups.len() >= LOOKUPS_MAX;
            match lookups.get(host) {
                Some(lookup) => (lookup.clone(), None),
                None if is_full => {
                    let trouble = format!("{LOOKUPS_MAX} credential helpers have not answered yet");
                    return anonymous(Some(trouble));
                }
                None => {
                    let (tell, told) = oneshot::channel();
                    let lookup = told.shared();
                    lookups.insert(host.to_owned(), lookup.clone());
                    (lookup, Some(tell))
                }
            }
        };
        if let Some(tell) = begun {
            let under_way = UnderWay {
                host: host.to_owned(),
                lookups: Arc::clone(&self.lookups),
            };
            // Ends by itself, or never; then it is the only one of its host.
            tokio::task::spawn_blocking(move || {
                let found = look();
                drop(under_way);
                // Nobody may be waiting any more.
                let _ = tell.send(found);
            });
        }
        let gone = |_| anonymous(Some("the look-up ended without an answer".to_owned()));
        lookup.await.unwrap_or_else(gone)
    }
}

fn anonymous(trouble: Option<String>) -> Found {
    Found {
        credential: Credential::Anonymous,
        trouble,
        origin: Origin::Config,
        narrower: Vec::new(),
    }
}

fn find_blocking(path: &Path, host: &str) -> Found {
    let text = match read_config(path) {
        Ok(Some(text)) => text,
        Ok(None) => return anonymous(None),
        Err(error) => return anonymous(Some(format!("{}: {error}", path.display()))),
    };
    Found {
        narrower: narrower(&text, host),
        ..find_whole(path, &text, host)
    }
}

/// The entry for all of a host.
fn find_whole(path: &Path, text: &[u8], host: &str) -> Found {
    let mut trouble = None;
    for name in names(host) {
        match get_credential_from_reader(text, name) {
            Ok(credential) => {
                return Found {
                    credential: convert(credential),
                    ..anonymous(None)
                };
            }
            Err(CredentialRetrievalError::NoCredentialConfigured) => {}
            Err(CredentialRetrievalError::HelperFailure {
                helper,
                stdout,
                stderr,
            }) => {
                // Helpers have no code for "nothing here", only this text.
                if !stdout.contains("credentials not found") {
                    let said = if stdout.trim().is_empty() {
                        stderr
                    } else {
                        stdout
                    };
                    let said: String = said.trim().chars().take(200).collect();
                    trouble = Some(format!("credential helper {helper} failed: {said}"));
                }
            }
            Err(error) => trouble = Some(format!("{}: {error}", path.display())),
        }
    }
    anonymous(trouble)
}

/// Entries for parts of a host; nothing where they would be asked of a helper, which has none.
fn narrower(text: &[u8], host: &str) -> Vec<(String, Credential)> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Keys {
        #[serde(default)]
        auths: BTreeMap<String, IgnoredAny>,
        creds_store: Option<String>,
    }
    let keys = match serde_json::from_slice::<Keys>(text) {
        Ok(keys) if keys.creds_store.is_none() => keys.auths,
        // What is wrong with the file is told by who looks for the host.
        _ => return Vec::new(),
    };
    let path = |key: &String| {
        let path = key
            .strip_prefix(host)?
            .strip_prefix('/')?
            .trim_end_matches('/');
        (!path.is_empty()).then(|| path.to_owned())
    };
    let entry = |key: &String| {
        let credential = get_credential_from_reader(text, key).ok()?;
        Some((path(key)?, convert(credential)))
    };
    let of_host = keys.keys().filter(|key| path(key).is_some());
    let mut found: Vec<_> = of_host.take(NARROWER_MAX).filter_map(entry).collect();
    found.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
    found
}

/// Names a host may have in the file. Docker Hub is under its old API's address.
fn names(host: &str) -> Vec<&str> {
    match host {
        "docker.io" => vec![
            "https://index.docker.io/v1/",
            "docker.io",
            "registry-1.docker.io",
        ],
        other => vec![other],
    }
}

fn read_config(path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut text = Vec::new();
    file.take(CONFIG_BYTES_MAX + 1).read_to_end(&mut text)?;
    if text.len() as u64 > CONFIG_BYTES_MAX {
        return Err(std::io::Error::other("the file is larger than 1 MiB"));
    }
    Ok(Some(text))
}

fn convert(credential: DockerCredential) -> Credential {
    match credential {
        DockerCredential::IdentityToken(token) => Credential::Identity(token),
        DockerCredential::UsernamePassword(user, _) if user.is_empty() => Credential::Anonymous,
        DockerCredential::UsernamePassword(user, password) => Credential::Basic { user, password },
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    fn find(config: &str, host: &str) -> Found {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, config).unwrap();
        find_blocking(&path, host)
    }

    fn basic(user: &str, password: &str) -> Credential {
        Credential::Basic {
            user: user.into(),
            password: password.into(),
        }
    }

    #[test]
    fn finds_entries_as_docker_writes_them() {
        let config = r#"{"auths":{
            "https://index.docker.io/v1/":{"auth":"aHViOnB3"},
            "reg.lan:5000":{"auth":"dTpwOnc="},
            "id.lan":{"identitytoken":"refresh"}}}"#;
        let table = [
            ("docker.io", basic("hub", "pw")),
            ("reg.lan:5000", basic("u", "p:w")),
            ("id.lan", Credential::Identity("refresh".into())),
            ("other.lan", Credential::Anonymous),
        ];
        for (host, expected) in table {
            let found = find(config, host);
            assert!(
                found.credential == expected && found.trouble.is_none(),
                "{host}"
            );
        }
    }

    #[test]
    fn finds_entries_as_podman_writes_them() {
        let config = r#"{"auths":{
            "quay.io/org":{"auth":"b3JnOnB3"},
            "quay.io/org/team/":{"auth":"dGVhbTpwdw=="},
            "quay.io":{"auth":"YWxsOnB3"},
            "other.lan/a":{"auth":"YTpwdw=="},
            "https://quay.io.lan/v1/":{"auth":"bGFuOnB3"}}}"#;
        let table = [
            ("quay.io", "org/app", basic("org", "pw")),
            ("quay.io", "org", basic("org", "pw")),
            ("quay.io", "org/team/app", basic("team", "pw")),
            ("quay.io", "org/teams/app", basic("org", "pw")),
            ("quay.io", "orgs/app", basic("all", "pw")),
            ("other.lan", "a/b", basic("a", "pw")),
            ("other.lan", "b", Credential::Anonymous),
            ("quay.io.lan", "v1/x", basic("lan", "pw")),
        ];
        for (host, repository, expected) in table {
            let found = find(config, host);
            assert!(*found.of(repository) == expected, "{host}/{repository}");
        }
        let stored = config.replacen('{', r#"{"credsStore":"none","#, 1);
        assert!(find(&stored, "other.lan").narrower.is_empty());
    }

    #[test]
    fn missing_is_anonymous_and_broken_says_why() {
        let missing = find_blocking(Path::new("/nonexistent/config.json"), "h");
        assert!(missing == anonymous(None));
        let broken = find("{", "h");
        assert!(broken.credential == Credential::Anonymous);
        assert!(broken.trouble.unwrap().contains("config.json"));
        let helper = find(r#"{"credHelpers":{"h.lan":"laz-no-such-helper"}}"#, "h.lan");
        assert!(helper.trouble.is_some());
    }

    #[tokio::test]
    async fn one_that_never_ends_is_the_only_one_of_its_host() {
        let credentials = Credentials::new(None);
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let stuck = move || {
            let _ = wait.recv();
            anonymous(Some("stuck".to_owned()))
        };
        let at_once = Duration::ZERO;
        let first = credentials.look_up("h.lan", stuck);
        assert!(tokio::time::timeout(at_once, first).await.is_err());
        for _ in 0..3 {
            let again = credentials.look_up("h.lan", || panic!("a second one has begun"));
            assert!(tokio::time::timeout(at_once, again).await.is_err());
        }
        let given = || Found::given(basic("u", "p"));
        let other = credentials.look_up("other.lan", given).await;
        assert!(
            other.credential == basic("u", "p"),
            "other hosts do not wait"
        );
        let mut waiting = pin!(credentials.look_up("h.lan", || panic!("a second one has begun")));
        assert!(tokio::time::timeout(at_once, &mut waiting).await.is_err());
        drop(end);
        assert_eq!(waiting.await.trouble.as_deref(), Some("stuck"));
        let next = credentials.look_up("h.lan", given).await;
        assert!(next.credential == basic("u", "p"), "it has ended");
    }

    #[tokio::test]
    async fn helpers_that_never_end_leave_threads_for_others() {
        let credentials = Credentials::new(None);
        let mut ends = Vec::new();
        for nr in 0..LOOKUPS_MAX {
            let (end, wait) = std::sync::mpsc::channel::<()>();
            ends.push(end);
            let stuck = move || {
                let _ = wait.recv();
                anonymous(None)
            };
            let host = format!("h{nr}.lan");
            let lookup = credentials.look_up(&host, stuck);
            assert!(tokio::time::timeout(Duration::ZERO, lookup).await.is_err());
        }
        let more = credentials.look_up("more.lan", || panic!("one too many has begun"));
        assert!(more.await.trouble.unwrap().contains("not answered"));
    }
}
