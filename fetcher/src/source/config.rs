//! Settings of the network source.
//!
//! Invariant: a `SourceConfig` is plain data; parsing it touches neither network nor
//! environment. The functions that look at the environment or the file system say so and are
//! called by `main`, nowhere else.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::http::proxy::ProxySettings;

/// How registries are reached. Every default is meant to be right for most nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SourceConfig {
    /// Hosts (`name` or `name:port`) spoken to without TLS. Loopback needs no entry.
    pub plain_http: Vec<String>,
    /// PEM bundle of certificate authorities trusted besides the system's.
    pub ca_file: Option<PathBuf>,
    /// Longest time a call may go on without a byte of progress, retries included.
    /// 60 s outlasts a registry's restart and stays below kubelet's two minutes.
    #[serde(with = "duration_text")]
    pub deadline: Duration,
    /// Longest silence on one connection before it is dropped and the rest is asked for
    /// again. 15 s is far above any healthy pause, and leaves room for retries.
    #[serde(with = "duration_text")]
    pub stall_timeout: Duration,
    /// Longest time for TCP, proxy and TLS set-up together. 10 s covers two lost SYNs.
    #[serde(with = "duration_text")]
    pub connect_timeout: Duration,
    /// Requests in flight per host. 16 fills a 1 Gbit/s link at 64 KiB pieces and 10 ms
    /// without looking like an attack to a public registry.
    pub concurrency: usize,
    /// Docker's `config.json` (or containers' `auth.json`); `None` reads anonymously.
    /// See [`default_docker_config`].
    pub docker_config: Option<PathBuf>,
    /// Directories, colons between them, with a directory per registry that says which hosts
    /// to ask in its place, and with which certificates, as containerd reads its `config_path`;
    /// `None`, or an empty path, asks registries themselves. See [`default_hosts_dir`].
    pub hosts_dir: Option<PathBuf>,
    /// Proxies; empty means direct. Not read from a file: see [`ProxySettings::from_env`].
    #[serde(skip)]
    pub proxy: ProxySettings,
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self {
            plain_http: Vec::new(),
            ca_file: None,
            deadline: Duration::from_secs(60),
            stall_timeout: Duration::from_secs(15),
            connect_timeout: Duration::from_secs(10),
            concurrency: 16,
            docker_config: None,
            hosts_dir: None,
            proxy: ProxySettings::default(),
        }
    }
}

impl SourceConfig {
    /// The directories of `hosts_dir`; none for an empty path.
    pub(crate) fn hosts_dirs(&self) -> Vec<PathBuf> {
        let dirs = self.hosts_dir.as_deref().unwrap_or(Path::new(""));
        let dirs = std::env::split_paths(dirs);
        dirs.filter(|dir| !dir.as_os_str().is_empty()).collect()
    }
}

/// Where `docker login` (`$DOCKER_CONFIG`, `~/.docker`) or `podman login`
/// (`$XDG_RUNTIME_DIR`, or `/run` where there is none) left credentials. Where none did yet, the first of these places: a
/// daemon runs before somebody logs in. Reads the environment.
pub fn default_docker_config() -> Option<PathBuf> {
    let dir = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let places = [
        dir("DOCKER_CONFIG").map(|dir| dir.join("config.json")),
        dir("HOME").map(|dir| dir.join(".docker/config.json")),
        dir("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json")),
        own_user().map(|uid| format!("/run/containers/{uid}/auth.json").into()),
    ];
    first_there(places.into_iter().flatten().collect())
}

/// Whose processes this one's are.
fn own_user() -> Option<u32> {
    let own = std::fs::metadata("/proc/self").ok()?;
    Some(own.uid())
}

/// The first place with a file, or else the first place.
fn first_there(places: Vec<PathBuf>) -> Option<PathBuf> {
    let there = places.iter().find(|place| place.is_file()).cloned();
    there.or_else(|| places.into_iter().next())
}

/// Where containerd's configuration keeps the hosts of registries, and docker's certificates of
/// them, as is containerd's own default; there or not: a directory that is made later counts.
pub fn default_hosts_dir() -> PathBuf {
    PathBuf::from("/etc/containerd/certs.d:/etc/docker/certs.d")
}

/// Durations as people write them: `500ms`, `15s`, `2m`.
mod duration_text {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(value: &Duration, out: S) -> Result<S::Ok, S::Error> {
        out.serialize_str(&format!("{}ms", value.as_millis()))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(input)?;
        parse(&text).ok_or_else(|| {
            D::Error::custom(format!(
                "{text:?} is not a duration above zero like 500ms, 15s or 2m"
            ))
        })
    }

    fn parse(text: &str) -> Option<Duration> {
        let split = text.find(|c: char| !c.is_ascii_digit())?;
        let (number, unit) = text.split_at_checked(split)?;
        let number: u64 = number.parse().ok()?;
        let factor = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            _ => return None,
        };
        let millis = number.checked_mul(factor).filter(|ms| *ms > 0)?;
        Some(Duration::from_millis(millis))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_that_nobody_has_yet_have_a_place() {
        let dir = tempfile::tempdir().unwrap();
        let places = || ["a", "b"].map(|name| dir.path().join(name)).to_vec();
        assert_eq!(first_there(places()), Some(dir.path().join("a")));
        std::fs::write(dir.path().join("b"), "{}").unwrap();
        assert_eq!(first_there(places()), Some(dir.path().join("b")));
        assert_eq!(first_there(Vec::new()), None);
    }

    #[test]
    fn hosts_are_in_a_list_of_directories() {
        let dirs = |text: Option<&str>| {
            let hosts_dir = text.map(PathBuf::from);
            let config = SourceConfig {
                hosts_dir,
                ..SourceConfig::default()
            };
            config.hosts_dirs()
        };
        assert_eq!(dirs(None), Vec::<PathBuf>::new());
        assert_eq!(dirs(Some("")), Vec::<PathBuf>::new());
        assert_eq!(dirs(Some("/a")), [PathBuf::from("/a")]);
        assert_eq!(dirs(Some(":/a::/b")), ["/a", "/b"].map(PathBuf::from));
        let usual = default_hosts_dir();
        assert_eq!(dirs(usual.to_str()).len(), 2);
    }

    #[test]
    fn proxies_are_not_in_a_file() {
        let config = toml::from_str::<SourceConfig>("[proxy]\nhttp = \"http://proxy:3128\"\n");
        assert!(config.unwrap_err().message().contains("proxy"));
    }

    #[test]
    fn reads_toml_and_keeps_defaults() {
        let config: SourceConfig = toml::from_str(
            "deadline = \"2m\"\nstall_timeout = \"500ms\"\nplain_http = [\"reg.lan:5000\"]\n",
        )
        .unwrap();
        assert_eq!(config.deadline, Duration::from_secs(120));
        assert_eq!(config.stall_timeout, Duration::from_millis(500));
        assert_eq!(
            config.connect_timeout,
            SourceConfig::default().connect_timeout
        );
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<SourceConfig>(&text).unwrap(), config);
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        for bad in [
            "dead_line = \"1s\"",
            "deadline = \"1\"",
            "deadline = \"0s\"",
            "deadline = \"1h\"",
            "deadline = \"99999999999999999999s\"",
        ] {
            assert!(toml::from_str::<SourceConfig>(bad).is_err(), "{bad}");
        }
    }
}
