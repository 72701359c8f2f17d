//! What both programs do first: settings from file, flags and environment; logging; limits.
//!
//! Invariant: nothing but `main` of a program reads the environment, through these.

use std::path::PathBuf;

use lazarette_fetcher::source::{ProxySettings, default_docker_config, default_hosts_dir};

use crate::config::Config;
use crate::{Error, Result};

/// Flags that stand for a setting of the config.
pub(crate) struct Flags {
    pub(crate) config: Option<PathBuf>,
    pub(crate) root: Option<PathBuf>,
    pub(crate) state: Option<PathBuf>,
}

/// The config: flags go before the file, the file before what is usual on this machine.
pub(crate) fn config(flags: Flags) -> Result<Config, Error> {
    let mut config = Config::load(flags.config.as_deref())?;
    let source = &mut config.source;
    source.docker_config = source.docker_config.take().or_else(default_docker_config);
    source.hosts_dir = source
        .hosts_dir
        .take()
        .or_else(|| Some(default_hosts_dir()));
    source.proxy = ProxySettings::from_env();
    config.root = flags.root.or(config.root);
    config.state = flags.state.or(config.state);
    Ok(config)
}

/// Lets this process open as many files as it may, for the layers that it mounts.
pub(crate) fn raise_open_files() {
    if let Err(error) = crate::sys::process::raise_open_files() {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// Logs to standard error: all of ours with `debug`, else what `usual` selects, unless
/// `LAZARETTE_LOG` says something else.
pub(crate) fn logging(debug: bool, usual: &str) {
    const OURS: &str =
        "lazarette_fetcher=debug,lazarette_snapshotter=debug,lazarette_runtime=debug,info";
    let default = if debug { OURS } else { usual };
    let filter = tracing_subscriber::EnvFilter::try_from_env("LAZARETTE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
}
