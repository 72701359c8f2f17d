//! Configuration, read once when the program starts.
//!
//! Invariant: nothing below `main` reads the environment or a config file. Unknown keys
//! are errors, so that a typo cannot silently do nothing.

use std::path::{Path, PathBuf};

use lazarette_fetcher::source::SourceConfig;
use lazarette_snapshotter::fuse::Backend;
use serde::Deserialize;

use crate::Error;

/// Where the store lives unless told otherwise.
pub const DEFAULT_ROOT: &str = "/var/lib/lazarette";
/// Where sockets, mountpoints and bundles live unless told otherwise.
pub const DEFAULT_STATE: &str = "/run/lazarette";
/// Read if it exists and `--config` names no other.
pub const DEFAULT_FILE: &str = "/etc/lazarette/config.toml";
/// Largest config file, bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Everything an engine needs to know.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Directory of the store, the database and the snapshots; must survive a reboot.
    pub root: Option<PathBuf>,
    /// Directory of what lives as long as a run; may be a tmpfs.
    pub state: Option<PathBuf>,
    /// How registries are reached.
    pub source: SourceConfig,
    /// What the store may take.
    pub store: StoreConfig,
    /// Whose word counts besides an image's own.
    pub trust: TrustConfig,
    /// Which layer formats are read.
    pub formats: FormatsConfig,
    /// How layers are mounted.
    pub mounts: MountsConfig,
    /// What `lazd` serves to containerd.
    pub snapshotter: SnapshotterConfig,
    /// What `lazd` serves to kubelet; nothing without it.
    pub cri: Option<CriConfig>,
}

/// What `lazd` serves to containerd.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SnapshotterConfig {
    /// Where it listens; without it, `snapshotter.sock` in the state directory.
    pub socket: Option<PathBuf>,
    /// Whether the rest of a layer comes in the background. On: a container that runs for
    /// days should not need the registry all that time.
    pub fill: bool,
}

impl Default for SnapshotterConfig {
    fn default() -> Self {
        Self {
            socket: None,
            fill: true,
        }
    }
}

/// What `lazd` serves to kubelet: CRI's image service, passed on.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CriConfig {
    /// Containerd's socket, which requests are passed on to.
    pub containerd: PathBuf,
    /// Where it listens; without it, `cri.sock` in the state directory.
    pub socket: Option<PathBuf>,
}

/// How layers are mounted.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MountsConfig {
    /// What shows a layer's files.
    pub backend: Backend,
}

/// Which layer formats are read. Those that an image itself leads to always are.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FormatsConfig {
    /// Whether SOCI indexes of version 1 are used, which refer to an image and are not named
    /// by it. Off: whoever may push to a repository can add one, and it decides what files
    /// say.
    pub soci_referrers: bool,
}

/// Whose word counts besides an image's own.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrustConfig {
    /// Files of Ed25519 public keys whose signature makes a layer index from a registry
    /// usable; see [`lazarette_fetcher::trust`].
    pub index_keys: Vec<PathBuf>,
}

/// What the store may take. Chunks that can be fetched again are evicted to keep to it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// Most bytes that layers may occupy; without it, as much as the disk has.
    #[serde(deserialize_with = "crate::size::deserialize")]
    pub budget: Option<u64>,
    /// Bytes of the file system that must stay free; without it, 5 % and at most 1 GiB.
    #[serde(deserialize_with = "crate::size::deserialize")]
    pub free_floor: Option<u64>,
}

impl Config {
    /// Reads `file`, or the default file if there is one, or the defaults.
    pub fn load(file: Option<&Path>) -> Result<Self, Error> {
        match file {
            Some(path) => Self::read(path),
            None if Path::new(DEFAULT_FILE).exists() => Self::read(Path::new(DEFAULT_FILE)),
            None => Ok(Self::default()),
        }
    }

    fn read(path: &Path) -> Result<Self, Error> {
        let bad = |detail: String| Error::Config {
            path: path.to_path_buf(),
            detail,
        };
        let size = std::fs::metadata(path)
            .map_err(|e| bad(e.to_string()))?
            .len();
        if size > FILE_BYTES_MAX {
            return Err(bad(format!("{size} bytes, at most {FILE_BYTES_MAX}")));
        }
        let text = std::fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
        toml::from_str(&text).map_err(|e| bad(e.to_string()))
    }

    /// The root directory.
    pub fn root(&self) -> PathBuf {
        self.root
            .clone()
            .unwrap_or_else(|| PathBuf::from(DEFAULT_ROOT))
    }

    /// Where `lazd` listens for containerd.
    pub fn snapshotter_socket(&self) -> PathBuf {
        let given = self.snapshotter.socket.clone();
        given.unwrap_or_else(|| self.state().join("snapshotter.sock"))
    }

    /// Where `lazd` listens for kubelet, if it is to.
    pub fn cri_socket(&self) -> Option<PathBuf> {
        let given = self.cri.as_ref()?.socket.clone();
        Some(given.unwrap_or_else(|| self.state().join("cri.sock")))
    }

    /// The state directory.
    pub fn state(&self) -> PathBuf {
        self.state
            .clone()
            .unwrap_or_else(|| PathBuf::from(DEFAULT_STATE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_is_an_error_that_names_the_file_and_the_key() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        std::fs::write(&file, "[source]\nplain_htp = [\"reg:5000\"]\n").unwrap();
        let error = Config::load(Some(&file)).unwrap_err().to_string();
        assert!(
            error.contains("config.toml") && error.contains("plain_htp"),
            "{error}"
        );
        std::fs::write(&file, "root = \"/srv/laz\"\n").unwrap();
        assert_eq!(
            Config::load(Some(&file)).unwrap().root(),
            Path::new("/srv/laz")
        );
    }

    #[test]
    fn bounds_of_the_store_are_sizes() {
        let read = |text: &str| toml::from_str::<Config>(text).map(|config| config.store);
        let store = read("[store]\nbudget = \"50g\"\nfree_floor = \"0\"\n").unwrap();
        assert_eq!((store.budget, store.free_floor), (Some(50 << 30), Some(0)));
        let none = read("").unwrap();
        assert_eq!((none.budget, none.free_floor), (None, None));
        for bad in ["budget = \"much\"", "budget = 5", "floor = \"1g\""] {
            assert!(read(&format!("[store]\n{bad}\n")).is_err(), "{bad}");
        }
    }

    #[test]
    fn referrers_are_not_trusted_unless_told() {
        let read = |text: &str| toml::from_str::<Config>(text).map(|config| config.formats);
        assert!(!read("").unwrap().soci_referrers);
        let told = read("[formats]\nsoci_referrers = true\n").unwrap();
        assert!(told.soci_referrers);
        assert!(read("[formats]\nsoci = true\n").is_err());
    }

    #[test]
    fn the_socket_follows_the_state_directory_unless_told() {
        let read = |text: &str| toml::from_str::<Config>(text).map(|c| c.snapshotter_socket());
        let table = [
            ("", "/run/lazarette/snapshotter.sock"),
            ("state = \"/s\"", "/s/snapshotter.sock"),
            ("[snapshotter]\nsocket = \"/x.sock\"", "/x.sock"),
        ];
        for (text, socket) in table {
            assert_eq!(read(text).unwrap(), Path::new(socket));
        }
        assert!(read("[snapshotter]\nsock = \"/x\"").is_err());
        let fills = |text: &str| toml::from_str::<Config>(text).unwrap().snapshotter.fill;
        assert!(fills("") && fills("[snapshotter]\n"));
        assert!(!fills("[snapshotter]\nfill = false\n"));
    }

    #[test]
    fn kubelet_is_served_where_containerd_is_named() {
        let read = |text: &str| toml::from_str::<Config>(text).map(|c| c.cri_socket());
        let socket = "[cri]\ncontainerd = \"/c.sock\"\nsocket = \"/x.sock\"\n";
        let table = [
            ("", None),
            (
                "[cri]\ncontainerd = \"/c.sock\"\n",
                Some("/run/lazarette/cri.sock"),
            ),
            (socket, Some("/x.sock")),
        ];
        for (text, socket) in table {
            assert_eq!(read(text).unwrap(), socket.map(PathBuf::from));
        }
        assert!(read("[cri]\nsocket = \"/x.sock\"\n").is_err());
        assert!(read("[cri]\ncontainerd = \"/c\"\nimages = true\n").is_err());
    }

    #[test]
    fn backends_have_names() {
        let read = |text: &str| toml::from_str::<Config>(text).map(|config| config.mounts.backend);
        assert_eq!(read("").unwrap(), Backend::default());
        for (name, backend) in [
            ("auto", Backend::Auto),
            ("erofs", Backend::Erofs),
            ("fuse", Backend::Fuse),
        ] {
            let text = format!("[mounts]\nbackend = \"{name}\"\n");
            assert_eq!(read(&text).unwrap(), backend);
        }
        assert!(read("[mounts]\nbackend = \"ext4\"\n").is_err());
    }

    #[test]
    fn a_missing_file_is_an_error_only_when_it_was_named() {
        assert!(Config::load(Some(Path::new("/nonexistent/laz.toml"))).is_err());
    }
}
