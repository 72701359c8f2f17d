//! `laz run`: arguments to a request, the record to a waterfall.
//!
//! Invariant: the exit code is the container's own, or the engine's when it could not run:
//! what fails after it has ended is only told.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::OutputFormat;
use super::args::RunArgs;
use super::progress::Display;
use crate::engine::{Engine, RunRequest};
use crate::image::pull::PullMode;
use crate::spec::{ContainerOptions, Limits};
use crate::trace::{StartRecord, Trace};
use crate::{Error, Result};

/// Runs the container and returns its exit code.
pub(super) async fn run(
    engine: Arc<Engine>,
    args: RunArgs,
    format: OutputFormat,
    origin: Instant,
) -> Result<u8> {
    let (trace, trace_file) = (args.trace, args.trace_file.clone());
    let request = request(args);
    let full = request.mode == PullMode::Full;
    let puller = Arc::new(engine.puller(request.mode, Trace::new(origin)));
    let display = full.then(|| Display::start(Arc::clone(&puller.progress)));
    let stop_display = move || {
        if let Some(display) = display {
            display.stop();
        }
    };
    let record = engine.run(request, &puller, stop_display).await?;
    if let Some(file) = &trace_file
        && let Err(error) = write_record(file, &record)
    {
        eprintln!("laz: {}", error.report());
    }
    match format {
        OutputFormat::Json if trace_file.is_none() => {
            if let Ok(text) = serde_json::to_string(&record) {
                eprintln!("{text}");
            }
        }
        OutputFormat::Table if trace => eprint!("{}", record.waterfall()),
        OutputFormat::Json | OutputFormat::Table => {}
    }
    Ok(record.exit_code)
}

fn request(args: RunArgs) -> RunRequest {
    let options = ContainerOptions {
        args: args.words.command,
        env: args.env.into_iter().filter_map(with_value).collect(),
        cwd: args.workdir,
        user: args.user,
        volumes: args.volume,
        network: args.net.into(),
        limits: Limits {
            memory_bytes: args.memory,
            cpus: args.cpus,
            pids: args.pids_limit,
        },
        read_only: args.read_only,
        terminal: args.tty,
        hostname: args.hostname,
        // Id, root file system and cgroup are the engine's to choose.
        ..ContainerOptions::default()
    };
    RunRequest {
        reference: args.words.reference,
        options,
        mode: if args.full {
            PullMode::Full
        } else {
            PullMode::Lazy
        },
        interactive: args.interactive,
        profile: !args.no_profile,
        runtime: args.runtime,
    }
}

/// `K` alone passes our own value on, and nothing when we have none (docker's rule).
fn with_value(entry: String) -> Option<String> {
    if entry.contains('=') {
        return Some(entry);
    }
    std::env::var(&entry)
        .ok()
        .map(|value| format!("{entry}={value}"))
}

fn write_record(path: &Path, record: &StartRecord) -> Result<()> {
    let text = serde_json::to_string_pretty(record).unwrap_or_default();
    std::fs::write(path, text + "\n").map_err(|e| Error::io("write the trace to", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_environment_entry_without_a_value_takes_ours() {
        assert_eq!(with_value("A=".into()).as_deref(), Some("A="));
        assert_eq!(with_value("LAZ_SURELY_NOT_SET".into()), None);
        assert_eq!(
            with_value("PATH".into()),
            Some(format!("PATH={}", std::env::var("PATH").unwrap()))
        );
    }
}
