//! The `laz` command: arguments in, engine calls, text or JSON out.
//!
//! Invariant: standard output carries only what was asked for (a table, JSON, or the
//! container's own output); progress, traces and errors go to standard error. No logic of
//! the engine lives here.

mod args;
mod commands;
mod output;
mod profile;
mod progress;
mod run;
mod store;
mod words;

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser as _;
use lazarette_fetcher::source::install_tls_provider;

pub use args::{Args, Command, OutputFormat};

use crate::engine::Engine;
use crate::start::{self, Flags};
use crate::{Error, exit};

/// Warnings. Two libraries are quieter: libcontainer logs as errors what it then returns as
/// errors, and fuser warns when it finds a mount gone that we took down.
const LOGGED: &str = "warn,libcontainer=off,fuser=error,fuser::reply=off";

/// Runs the command line `laz` was started with. `origin` is when the process began.
pub fn main(origin: Instant) -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return usage(&error),
    };
    if matches!(args.command, Command::Pull(_)) {
        crate::sys::memory::give_back_soon();
    }
    start::logging(args.debug, LOGGED);
    install_tls_provider();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("laz: cannot start worker threads: {error}");
            return ExitCode::from(exit::ENGINE);
        }
    };
    let is_run = matches!(args.command, Command::Run(_));
    let outcome = runtime.block_on(dispatch(args, origin));
    // Blocking threads may be in a read that only its deadline ends; nobody needs it now.
    runtime.shutdown_background();
    let code = outcome.unwrap_or_else(|error| {
        eprintln!("laz: {}", error.report());
        error.exit_code()
    });
    if is_run {
        // All is recorded. Tearing down RocksDB's static tables takes milliseconds, which who
        // waits for a short container would wait for.
        let _ = std::io::stdout().flush();
        crate::sys::process::leave(code);
    }
    ExitCode::from(code)
}

async fn dispatch(args: Args, origin: Instant) -> Result<u8, Error> {
    let mut config = start::config(Flags {
        config: args.config,
        root: args.root,
        state: args.state,
    })?;
    if let Command::Run(run) = &args.command
        && let Some(name) = run.backend
    {
        config.mounts.backend = name.into();
    }
    start::raise_open_files();
    let engine = match &args.command {
        // For the first miss, or the image itself.
        Command::Run(run) => Engine::open_to_ask(config, run.words.reference.repository()),
        Command::Pull(pull) => Engine::open_to_ask(config, pull.reference.repository()),
        Command::Images | Command::Rmi(_) | Command::Store(_) | Command::Image(_) => {
            Engine::open(config)
        }
    }?;
    let format = args.output;
    match args.command {
        Command::Run(run) => run::run(engine, *run, format, origin).await,
        Command::Pull(pull) => commands::pull(&engine, pull, format, origin).await,
        Command::Images => commands::images(&engine, format).await,
        Command::Rmi(rmi) => commands::rmi(&engine, rmi, format).await,
        Command::Store(args) => store::store(&engine, args, format).await,
        Command::Image(image) => commands::image(&engine, image, format, origin).await,
    }
}

/// Help and version are not errors; a bad flag exits as docker's do.
fn usage(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    if error.use_stderr() {
        ExitCode::from(exit::ENGINE)
    } else {
        ExitCode::SUCCESS
    }
}
