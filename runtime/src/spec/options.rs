//! What the user asks of one container.
//!
//! Invariant: what [`ContainerOptions::check`] lets pass can only be wrong for an image.

use std::num::NonZeroU32;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{SpecError, Volume, check_name, check_working_dir, key_of, resources};

/// Which network a container sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// A Linux network namespace of its own with nothing but loopback.
    #[default]
    None,
    /// The host's.
    Host,
}

/// Resource limits; `None` means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limits {
    /// Bytes of memory; at least 6 MiB.
    pub memory_bytes: Option<u64>,
    /// CPUs, a fraction allowed.
    pub cpus: Option<f64>,
    /// Processes and threads.
    pub pids: Option<NonZeroU32>,
}

/// What the user asks of one container.
#[derive(Clone, Debug, Default)]
pub struct ContainerOptions {
    /// Id: `[A-Za-z0-9_.+-]`, unique on the host.
    pub id: String,
    /// The mounted root file system.
    pub rootfs: PathBuf,
    /// Replaces the image's `Cmd`; empty keeps it.
    pub args: Vec<String>,
    /// `KEY=VALUE` each; wins over the image's.
    pub env: Vec<String>,
    /// Working directory, absolute; wins over the image's.
    pub cwd: Option<PathBuf>,
    /// `user[:group]`; wins over the image's.
    pub user: Option<String>,
    /// Host paths shown inside.
    pub volumes: Vec<Volume>,
    /// Network.
    pub network: Network,
    /// Limits.
    pub limits: Limits,
    /// Whether the root file system is read-only.
    pub read_only: bool,
    /// Whether the process gets a terminal.
    pub terminal: bool,
    /// Host name inside; default: the first 12 characters of the id, or the host's own
    /// name when its network is shared.
    pub hostname: Option<String>,
    /// Cgroup path relative to the hierarchy's root; default `/lazarette-<id>`.
    pub cgroup: Option<PathBuf>,
}

impl ContainerOptions {
    /// What cannot be whatever the image is: for telling it before that is fetched.
    ///
    /// # Errors
    /// [`SpecError::VolumeSource`], [`SpecError::Limit`], and [`SpecError::Value`] of a variable,
    /// a working directory or a host name.
    pub fn check(&self) -> Result<(), SpecError> {
        for volume in &self.volumes {
            volume.check_source()?;
        }
        resources::check(&self.limits)?;
        for variable in &self.env {
            key_of(variable)?;
        }
        if let Some(cwd) = &self.cwd {
            check_working_dir(cwd)?;
        }
        match &self.hostname {
            Some(name) => check_name("host name", name),
            None => Ok(()),
        }
    }
}
