//! The OCI runtime document of one container, from the image's config and the user's wishes.
//!
//! [`build`] is pure: everything it needs of the host and of the root file system comes in
//! as values ([`HostFacts`], [`AccountFiles`]). [`bundle::write`] gathers, builds and writes.
//! Defaults are what other engines give a container: 14 capabilities, a system call
//! filter, hidden kernel files, own Linux namespaces.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Capability, Linux, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxNamespace,
    LinuxNamespaceBuilder, LinuxNamespaceType, LinuxSeccomp, PosixRlimitBuilder, PosixRlimitType,
    Process, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
};
use serde::{Deserialize, Serialize};

pub mod bundle;
mod host;
mod mounts;
mod named;
mod options;
mod resources;
pub mod seccomp;
pub mod user;
mod volume;

pub use host::{Controllers, HostFacts};
pub(crate) use named::{Named, named};
pub use options::{ContainerOptions, Limits, Network};
pub use user::{AccountFiles, ResolvedUser};
pub use volume::Volume;

/// Version of the runtime specification the document follows; both runtimes read it.
const OCI_VERSION: &str = "1.0.2";
/// Search path when the image sets none.
const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Open files a container may have; less when we may have less ourselves.
const NOFILE_MAX: u64 = 1 << 20;
/// What a container's process leaves off the modes of files it makes. Said in every document:
/// else it would be that of whoever started us, and some hide all their files.
const UMASK: u32 = 0o022;
/// Files of `/etc` generated in the bundle.
const GENERATED: [&str; 3] = ["hosts", "hostname", "resolv.conf"];

/// The capabilities of a container's root; bounding set of every container.
const CAPABILITIES: [Capability; 14] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// Why no document could be made.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Neither the image nor the user names a command.
    #[error("the image names no command: give one after the image reference")]
    NoCommand,
    /// The image has no such user.
    #[error("user {user:?} is not in the image's /etc/passwd: use a name from it or a number")]
    UnknownUser {
        /// As asked for.
        user: String,
    },
    /// The image has no such group.
    #[error("group {group:?} is not in the image's /etc/group: use a name from it or a number")]
    UnknownGroup {
        /// As asked for.
        group: String,
    },
    /// A volume that does not parse.
    #[error("volume {volume:?} is not valid: {reason}")]
    Volume {
        /// As asked for.
        volume: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The host path of a volume is missing.
    #[error("volume source {} cannot be used: {source}; create it first", path.display())]
    VolumeSource {
        /// The host path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A limit out of range.
    #[error("resource limit is not valid: {reason}")]
    Limit {
        /// What is allowed.
        reason: &'static str,
    },
    /// A text with a NUL byte, or a working directory or name that cannot be.
    #[error("{what} {value:?} is not valid: {reason}")]
    Value {
        /// Which setting.
        what: &'static str,
        /// As asked for.
        value: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The working directory cannot be made.
    #[error("working directory {} cannot be made: {source}", path.display())]
    WorkDir {
        /// In the container.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Bundle or root file system cannot be used.
    #[error("cannot use {}: {source}", path.display())]
    Io {
        /// On the host.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The OCI types refused a value.
    #[error("runtime document: {0}")]
    Document(#[from] OciSpecError),
}

impl SpecError {
    /// The exit code `laz run` ends with: the container never started.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        125
    }
}

/// The part of an image's config that says how to run it. Unknown fields are ignored:
/// the document comes from the registry and may be newer than we are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageConfig {
    /// `KEY=VALUE` each.
    #[serde(deserialize_with = "null_is_empty")]
    pub env: Vec<String>,
    /// First words of the command line.
    #[serde(deserialize_with = "null_is_empty")]
    pub entrypoint: Vec<String>,
    /// Default words after the entrypoint.
    #[serde(deserialize_with = "null_is_empty")]
    pub cmd: Vec<String>,
    /// Working directory; empty means `/`.
    #[serde(deserialize_with = "null_is_empty")]
    pub working_dir: String,
    /// `user[:group]`, names or numbers; empty means root.
    #[serde(deserialize_with = "null_is_empty")]
    pub user: String,
    /// Signal that asks the program to end, `SIGTERM` or `15` like; empty means SIGTERM.
    #[serde(deserialize_with = "null_is_empty")]
    pub stop_signal: String,
}

fn null_is_empty<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: Default + Deserialize<'de>,
    D: serde::Deserializer<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Builds the document for a container whose bundle is the directory `bundle` (absolute).
///
/// # Errors
/// See [`SpecError`].
pub fn build(
    bundle: &Path,
    options: &ContainerOptions,
    image: &ImageConfig,
    accounts: &AccountFiles,
    facts: &HostFacts,
) -> Result<Spec, SpecError> {
    check_name("container id", &options.id)?;
    let hostname = hostname(options, facts);
    check_name("host name", &hostname)?;
    let rootfs = options
        .rootfs
        .canonicalize()
        .map_err(|source| SpecError::Io {
            path: options.rootfs.clone(),
            source,
        })?;
    let root = RootBuilder::default()
        .path(rootfs)
        .readonly(options.read_only)
        .build()?;
    Ok(SpecBuilder::default()
        .version(OCI_VERSION)
        .root(root)
        .hostname(hostname)
        .mounts(mounts::mounts(bundle, &options.volumes, facts)?)
        .process(process(options, image, accounts, facts)?)
        .linux(linux(options, facts)?)
        .build()?)
}

/// The host name inside the container.
fn hostname(options: &ContainerOptions, facts: &HostFacts) -> String {
    match (&options.hostname, options.network) {
        (Some(name), _) => name.clone(),
        (None, Network::Host) if !facts.hostname.is_empty() => facts.hostname.clone(),
        (None, Network::Host | Network::None) => options.id.chars().take(12).collect(),
    }
}

fn check_name(what: &'static str, value: &str) -> Result<(), SpecError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '+');
    let dots_only = value.chars().all(|c| c == '.');
    if dots_only || value.len() > 64 || !value.chars().all(allowed) {
        let reason = "use 1 to 64 letters, digits and _ . - +";
        return Err(SpecError::Value {
            what,
            value: value.to_owned(),
            reason,
        });
    }
    Ok(())
}

fn process(
    options: &ContainerOptions,
    image: &ImageConfig,
    accounts: &AccountFiles,
    facts: &HostFacts,
) -> Result<Process, SpecError> {
    let user = user::resolve(options.user.as_deref().unwrap_or(&image.user), accounts)?;
    let args = command_line(options, image)?;
    let env = environment(options, image, &user, &hostname(options, facts))?;
    let everything: HashSet<Capability> = CAPABILITIES.into();
    // A user that is not root loses them at exec anyway; say so from the start.
    let held = if user.uid == 0 {
        everything.clone()
    } else {
        HashSet::new()
    };
    let capabilities = LinuxCapabilitiesBuilder::default()
        .bounding(everything)
        .effective(held.clone())
        .permitted(held)
        .inheritable(HashSet::new())
        .ambient(HashSet::new())
        .build()?;
    let oci_user = UserBuilder::default()
        .uid(user.uid)
        .gid(user.gid)
        .umask(UMASK)
        .additional_gids(user.additional_gids)
        .build()?;
    let nofile = facts.nofile_hard.min(NOFILE_MAX);
    let limit = PosixRlimitBuilder::default()
        .typ(PosixRlimitType::RlimitNofile)
        .hard(nofile)
        .soft(nofile)
        .build()?;
    let mut process = ProcessBuilder::default()
        .terminal(options.terminal)
        .user(oci_user)
        .args(args)
        .env(env)
        .cwd(working_dir(options, image)?)
        .capabilities(capabilities)
        .rlimits(vec![limit])
        .oom_score_adj(facts.oom_score_adj.max(0))
        .build()?;
    // Left out rather than false: setuid programs keep working, and the embedded runtime
    // then loads the filter while it still may.
    process.set_no_new_privileges(None);
    Ok(process)
}

/// The words to run: the image's entrypoint, then the command.
pub(crate) fn command_line(
    options: &ContainerOptions,
    image: &ImageConfig,
) -> Result<Vec<String>, SpecError> {
    let cmd = if options.args.is_empty() {
        &image.cmd
    } else {
        &options.args
    };
    let args: Vec<String> = image.entrypoint.iter().chain(cmd).cloned().collect();
    if args.first().is_none_or(String::is_empty) {
        return Err(SpecError::NoCommand);
    }
    match args.iter().find(|word| word.contains('\0')) {
        Some(word) => Err(nul("command word", word)),
        None => Ok(args),
    }
}

fn nul(what: &'static str, value: &str) -> SpecError {
    SpecError::Value {
        what,
        value: value.to_owned(),
        reason: "a NUL byte cannot be passed",
    }
}

/// The image's variables, then the user's; a later one replaces an earlier one in place.
fn environment(
    options: &ContainerOptions,
    image: &ImageConfig,
    user: &ResolvedUser,
    hostname: &str,
) -> Result<Vec<String>, SpecError> {
    let mut env: Vec<String> = vec![
        format!("PATH={PATH_DEFAULT}"),
        format!("HOSTNAME={hostname}"),
    ];
    if options.terminal {
        env.push("TERM=xterm".to_owned());
    }
    // An image is not the user's to mend: what is no variable is left out, as elsewhere.
    let is_variable = |entry: &&String| entry.find('=').is_some_and(|at| at > 0);
    for variable in image.env.iter().filter(is_variable).chain(&options.env) {
        let key = key_of(variable)?;
        match env.iter_mut().find(|known| has_key(known, key)) {
            Some(known) => known.clone_from(variable),
            None => env.push(variable.clone()),
        }
    }
    if !env.iter().any(|known| has_key(known, "HOME")) {
        env.push(format!("HOME={}", user.home.display()));
    }
    Ok(env)
}

/// The name in `KEY=VALUE`.
fn key_of(variable: &str) -> Result<&str, SpecError> {
    if variable.contains('\0') {
        return Err(nul("environment variable", variable));
    }
    match variable.split_once('=') {
        Some((key, _)) if !key.is_empty() => Ok(key),
        _ => Err(SpecError::Value {
            what: "environment variable",
            value: variable.to_owned(),
            reason: "expected KEY=VALUE",
        }),
    }
}

fn has_key(variable: &str, key: &str) -> bool {
    variable
        .strip_prefix(key)
        .is_some_and(|rest| rest.starts_with('='))
}

fn working_dir(options: &ContainerOptions, image: &ImageConfig) -> Result<PathBuf, SpecError> {
    let from_image = if image.working_dir.is_empty() {
        "/"
    } else {
        &image.working_dir
    };
    let cwd = options
        .cwd
        .clone()
        .unwrap_or_else(|| PathBuf::from(from_image));
    check_working_dir(&cwd)?;
    Ok(cwd)
}

fn check_working_dir(cwd: &Path) -> Result<(), SpecError> {
    if cwd.is_absolute() && !cwd.as_os_str().as_encoded_bytes().contains(&0) {
        return Ok(());
    }
    Err(SpecError::Value {
        what: "working directory",
        value: cwd.display().to_string(),
        reason: "it must be an absolute path",
    })
}

/// The system call filter of every container.
pub(crate) fn default_filter() -> Result<LinuxSeccomp, SpecError> {
    seccomp::profile(&CAPABILITIES.into())
}

fn linux(options: &ContainerOptions, facts: &HostFacts) -> Result<Linux, SpecError> {
    let cgroup = options
        .cgroup
        .clone()
        .unwrap_or_else(|| PathBuf::from(format!("/lazarette-{}", options.id)));
    Ok(LinuxBuilder::default()
        .namespaces(namespaces(options.network)?)
        .resources(resources::resources(&options.limits, facts.controllers)?)
        .cgroups_path(cgroup)
        .seccomp(default_filter()?)
        .masked_paths(mounts::owned(mounts::MASKED_PATHS))
        .readonly_paths(mounts::readonly_paths(&facts.cgroup_hierarchies))
        .build()?)
}

fn namespaces(network: Network) -> Result<Vec<LinuxNamespace>, SpecError> {
    let own_network = match network {
        Network::None => Some(LinuxNamespaceType::Network),
        Network::Host => None,
    };
    let always = [
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Cgroup,
    ];
    let build = |kind| LinuxNamespaceBuilder::default().typ(kind).build();
    Ok(always
        .into_iter()
        .chain(own_network)
        .map(build)
        .collect::<Result<_, _>>()?)
}

#[cfg(test)]
mod tests;
