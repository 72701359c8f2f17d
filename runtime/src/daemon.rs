//! The `lazd` daemon: the engine as a service. Its roles are containerd's snapshotter and, if
//! it is told where containerd is, kubelet's image service in front of containerd's.
//!
//! Invariant: one daemon per state directory, and it has the database to itself as long as
//! it runs: containerd's snapshots must not change under it, and no request waits for the
//! database to be opened. `laz` on the same root waits, then says who has it.
//!
//! Started: find the mount server or start it, answer for the layers of committed snapshots
//! that it shows, mount the others, then listen. Stopped (TERM or INT): listen no more,
//! answer what was asked, and leave what the mount server shows, as a crash would.

mod socket;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use futures_util::FutureExt;
use lazarette_fetcher::source::install_tls_provider;
use lazarette_snapshotter::grpc::images::Images;
use lazarette_snapshotter::grpc::{self, Service};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::engine::Engine;
use crate::engine::lazy::NodeLayers;
use crate::start::{self, Flags};
use crate::{Error, Result, exit};

/// What is done for whom, and why not; fuser warns when it finds a mount gone that we took
/// down, and answers are not wanted any more then.
const LOGGED: &str =
    "warn,lazarette_snapshotter=info,lazarette_runtime=info,fuser=error,fuser::reply=off";

/// Serves lazily loaded layers to containerd.
#[derive(Debug, Parser)]
#[command(name = "lazd", version)]
struct Args {
    /// Config file [default: /etc/lazarette/config.toml if it exists]
    #[arg(long, env = "LAZARETTE_CONFIG")]
    config: Option<PathBuf>,
    /// Directory of the store [default: /var/lib/lazarette]
    #[arg(long, env = "LAZARETTE_ROOT")]
    root: Option<PathBuf>,
    /// Directory of mountpoints and sockets [default: /run/lazarette]
    #[arg(long, env = "LAZARETTE_STATE")]
    state: Option<PathBuf>,
    /// Log everything of ours
    #[arg(long)]
    debug: bool,
}

/// Runs the daemon that the process was started as.
pub fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    start::logging(args.debug, LOGGED);
    install_tls_provider();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(run(args));
            // Blocking threads may be in a read that only its deadline ends.
            runtime.shutdown_background();
            outcome
        }
        Err(error) => Err(Error::io("start worker threads of", "lazd", error)),
    };
    let code = match outcome {
        Ok(()) => 0,
        Err(error) => {
            tracing::error!(error = error.report(), "lazd ends");
            exit::ENGINE
        }
    };
    // Those threads may use the database still: they would find RocksDB's static tables torn down,
    // and abort.
    crate::sys::process::leave(code)
}

async fn run(args: Args) -> Result<()> {
    // Caught from the start: a stop while layers are being mounted must not leave them.
    let mut stop = Stop::catch()?;
    let config = start::config(Flags {
        config: args.config,
        root: args.root,
        state: args.state,
    })?;
    start::raise_open_files();
    let sockets = std::iter::once(config.snapshotter_socket()).chain(config.cri_socket());
    let bound = socket::bind(&config.state(), sockets.collect())?;
    let containerd = config.cri.as_ref().map(|cri| cri.containerd.clone());
    let engine = Engine::open(config)?;
    let images = containerd.map(|socket| Images::new(socket, engine.registry().keyring().clone()));
    let layers = NodeLayers::open(&engine, &mount_server()).await?;
    let served = serve((&layers, images), bound, &mut stop).await;
    let closed = layers.close().await;
    tracing::info!("stopped");
    served.and(closed)
}

/// The mount server's program: it is installed beside this one.
fn mount_server() -> PathBuf {
    let me = std::env::current_exe().unwrap_or_default();
    me.with_file_name("laz-mountd")
}

async fn serve(
    (layers, images): (&std::sync::Arc<NodeLayers>, Option<Images>),
    bound: socket::Bound,
    stop: &mut Stop,
) -> Result<()> {
    let restored = tokio::select! {
        restored = layers.restore() => restored?,
        () = stop.asked() => return Ok(()),
    };
    let service = Service::new(layers.snapshots(), std::sync::Arc::clone(layers) as _);
    let mut listeners = bound.listen()?.into_iter();
    tracing::info!(
        restored,
        serves_images = images.is_some(),
        "snapshotter is ready"
    );
    socket::tell_ready();
    let asked = stop.asked().shared();
    let (for_snapshots, for_images) = (listeners.next(), listeners.next());
    let snapshots = async {
        if let Some(listener) = for_snapshots {
            grpc::serve(listener, service, asked.clone()).await;
        }
    };
    let images = async {
        if let (Some(listener), Some(images)) = (for_images, images) {
            grpc::serve_images(listener, images, asked.clone()).await;
        }
    };
    tokio::join!(snapshots, images);
    Ok(())
}

/// The signals that ask a daemon to stop.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn catch() -> Result<Self> {
        let catch = |kind| signal(kind).map_err(|e| Error::io("catch signals of", "lazd", e));
        Ok(Self {
            terminate: catch(SignalKind::terminate())?,
            interrupt: catch(SignalKind::interrupt())?,
        })
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
