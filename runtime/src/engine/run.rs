//! One container, from reference to exit code.
//!
//! Invariant: whatever was mounted, made or started is on the [`Stage`] before the next
//! step begins, and the stage is struck at the end of every path, error or not. A crash
//! leaves the run directory unlocked: the next run sweeps it.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt, stream};
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::task::blocking;
use lazarette_fetcher::types::Reference;
use lazarette_snapshotter::fuse::{LayerMount, LayerMounts};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use super::Engine;
use super::companions::Companions;
use super::follow::{self, Ended};
use super::profiles::{Report, Session};
use super::stage::{Stage, mount_tree, tree_of};
use crate::executor::{Embedded, Executor, External, LaunchPlan, Task};
use crate::image::pull::{LAYERS_AT_ONCE, PullMode, Puller};
use crate::image::{Image, ImageLayer};
use crate::spec::bundle::AccountFiles;
use crate::spec::{self, ContainerOptions, HostFacts, bundle};
use crate::trace::{SourceUse, StartRecord, Trace};
use crate::{Error, Result};

/// What to run.
#[derive(Debug, Clone)]
pub struct RunRequest {
    /// The image.
    pub reference: Reference,
    /// How to run it; id and root file system are the engine's to fill in.
    pub options: ContainerOptions,
    /// Lazily, or after fetching everything.
    pub mode: PullMode,
    /// Keep standard input open.
    pub interactive: bool,
    /// Whether to use a start-up profile, and to record one.
    pub profile: bool,
    /// External OCI runtime, by name or path; `None` is the built-in executor.
    pub runtime: Option<String>,
}

/// What a container starts from.
struct Prepared {
    image: Image,
    session: Session,
    /// User id of its process.
    uid: u32,
    /// The image's accounts, unless they were known before.
    accounts: Option<AccountFiles>,
}

impl Engine {
    /// Runs a container in the foreground until it ends. `prepared` is called once, when
    /// the container is about to take over the terminal.
    pub async fn run(
        self: &Arc<Self>,
        request: RunRequest,
        puller: &Puller,
        prepared: impl FnOnce(),
    ) -> Result<StartRecord> {
        request.options.check()?;
        require_root()?;
        let executor = executor(&request)?;
        let warming = Arc::clone(&executor);
        drop(tokio::task::spawn_blocking(move || warming.warm_up()));
        let mut stage = Stage::open(self).await?;
        let performers = (puller, executor.as_ref());
        let outcome = self.act(request, performers, &mut stage, prepared).await;
        let struck = stage.strike(self).await;
        // The first error is the one to tell.
        let record = outcome?;
        warn_of(struck);
        Ok(record)
    }

    async fn act(
        self: &Arc<Self>,
        mut request: RunRequest,
        (puller, executor): (&Puller, &dyn Executor),
        stage: &mut Stage,
        prepared: impl FnOnce(),
    ) -> Result<StartRecord> {
        let trace = &puller.trace;
        let Prepared {
            image,
            mut session,
            uid,
            accounts,
        } = tokio::select! {
            prepared = self.prepare(&mut request, (puller, executor), stage) => prepared?,
            signal = stop_signal() => return Err(Error::Interrupted { signal }),
        };
        self.release_db();
        prepared();
        let play = Play {
            engine: self,
            image: &image,
            uid,
            executor,
            trace,
        };
        let outcome = play.perform(&request, stage, &mut session).await;
        let failed = outcome.is_err();
        let misses = stage.misses();
        let (ended, task) = outcome.map_or_else(|e| (Err(e), None), |(e, t)| (Ok(e), Some(t)));
        session.stop_warming().await;
        // What the container leaves to do, side by side: each mostly waits.
        let deleted = async {
            match task {
                Some(task) => task.delete().await,
                None => Ok(()),
            }
        };
        let remembered = async {
            self.expect_commit().await;
            if let Some(accounts) = accounts {
                self.remember_accounts(image.manifest.digest, accounts)
                    .await;
            }
            session.finish(self, &image, trace, failed).await
        };
        let (deleted, report, ()) = tokio::join!(deleted, remembered, stage.clear());
        let mut record = self.record(&image, trace, &ended?);
        warn_of(deleted.map_err(Error::from));
        record.misses = misses;
        record.copied_bytes = puller.progress.copied();
        Ok(with_profile(record, &report))
    }

    /// Everything before the executor: image, layers, snapshot, bundle.
    async fn prepare(
        self: &Arc<Self>,
        request: &mut RunRequest,
        (puller, executor): (&Puller, &dyn Executor),
        stage: &mut Stage,
    ) -> Result<Prepared> {
        let local = self.local(&request.reference).await?;
        let new = local.is_none();
        let image = match local {
            Some(image) => image,
            None => self.resolve_to_open(&request.reference, puller).await?,
        };
        let session = Session::begin(self, &image, request, new).await;
        let known = self.accounts(image.manifest.digest).await;
        let claim = stage.claim(self, &image);
        let companions = (!session.knows_reads()).then(|| {
            let named = spec::named(&request.options, &image.config.config);
            Companions::new(image.layers.len(), named)
        });
        let (chain, mounted) = tokio::join!(
            async {
                let chain = claim.await;
                // Layers may take minutes to stream; other processes need not wait for that.
                self.release_db();
                chain
            },
            async {
                self.look_for_indexes(&image, puller).await;
                let with = (&session, companions.as_ref());
                let performers = (puller, executor);
                self.mount_layers(&image, performers, &stage.mounter(), with)
                    .await
            },
        );
        stage.hold(mounted?);
        stage.keep(companions);
        executor.expect_launch();
        let span = puller.trace.start("snapshot", None);
        request.options.rootfs = stage.set(self, chain?).await?;
        request.options.id = stage.id().to_owned();
        span.end();
        let span = puller.trace.start("bundle", None);
        let (dir, options) = (stage.bundle(), request.options.clone());
        let (config, is_known) = (image.config.config.clone(), known.is_some());
        let bundle = blocking(move || {
            let facts = HostFacts::probe().map_err(|e| Error::io("look at", "/proc/self", e))?;
            Ok::<_, Error>(bundle::write(&dir, &options, &config, &facts, known)?)
        })
        .await?;
        span.end();
        Ok(Prepared {
            image,
            session,
            uid: bundle.uid(),
            accounts: (!is_known).then_some(bundle.accounts),
        })
    }

    /// Opens and mounts the layers, each as soon as it can be.
    async fn mount_layers(
        &self,
        image: &Image,
        (puller, executor): (&Puller, &dyn Executor),
        mounter: &LayerMounts,
        (session, companions): (&Session, Option<&Companions>),
    ) -> Result<Vec<(Arc<Layer>, Arc<LayerMount>)>> {
        let one = async |number: usize, layer: &ImageLayer| {
            let layer = puller
                .layer(image, number, layer, session.landmarks())
                .await?;
            let data = session.opened(number, &layer, &puller.trace);
            layer.set_foresight(companions.is_some());
            // Mounting takes about as long as this is good for.
            executor.expect_launch();
            let span = puller.trace.start("mount", Some(number));
            let tree = tree_of(&layer).await?;
            if let Some(companions) = companions {
                companions.opened(number, &layer, &tree);
            }
            let mount = mount_tree(mounter.clone(), &layer, Arc::clone(&tree), data).await?;
            mount.read_ahead(session.read_ahead(&layer));
            session.mounted(number, mount.path(), &tree);
            span.end();
            Ok::<_, Error>((layer, mount))
        };
        stream::iter(image.layers.iter().enumerate())
            .map(|(number, layer)| one(number, layer))
            .buffered(LAYERS_AT_ONCE)
            .try_collect()
            .await
    }

    fn record(&self, image: &Image, trace: &Trace, ended: &Ended) -> StartRecord {
        let stats = self.registry.stats();
        let exit_ms = trace.ms(ended.at);
        let first_byte_ms = ended.first_byte.map(|at| trace.ms(at));
        StartRecord {
            reference: image.reference.to_string(),
            manifest_digest: image.manifest.digest.to_string(),
            image_bytes: image.layer_bytes(),
            image_layers: image.layers.len(),
            spans: trace.spans(),
            layers: trace.shares(),
            ready_ms: first_byte_ms.unwrap_or(exit_ms),
            first_byte_ms,
            exit_ms,
            exit_code: ended.status.code,
            sources: vec![SourceUse {
                name: image.reference.host().to_owned(),
                requests: stats.requests,
                bytes: stats.bytes_received,
            }],
            fetched_bytes: stats.bytes_received,
            copied_bytes: 0,
            misses: 0,
            ready_by: None,
            profile: None,
            recorded: None,
        }
    }
}

fn with_profile(record: StartRecord, report: &Report) -> StartRecord {
    StartRecord {
        ready_by: report.ready_by,
        profile: report.used,
        recorded: report.recorded,
        ..record
    }
}

/// How long a signal waits for a container that is being started, to be passed on to it.
const LAUNCH_GRACE: Duration = Duration::from_secs(3);

/// What a container's run is about.
struct Play<'a> {
    engine: &'a Arc<Engine>,
    image: &'a Image,
    uid: u32,
    executor: &'a dyn Executor,
    trace: &'a Trace,
}

impl Play<'_> {
    /// Starts the container and pumps its streams until it ends; what is left to be deleted.
    /// After an error nothing is.
    async fn perform(
        &self,
        request: &RunRequest,
        stage: &Stage,
        session: &mut Session,
    ) -> Result<(Ended, Box<dyn Task>)> {
        let began = Instant::now();
        let (io, ends) = follow::open(request.options.terminal, request.interactive)?;
        let plan = LaunchPlan {
            id: stage.id().to_owned(),
            bundle: stage.bundle(),
            uid: self.uid,
            state_root: stage.executor(),
            io,
        };
        let launching = self.executor.launch(plan);
        tokio::pin!(launching);
        let (mut launched, early) = tokio::select! {
            launched = &mut launching => (launched?, None),
            signal = stop_signal() => match timeout(LAUNCH_GRACE, &mut launching).await {
                Ok(launched) => (launched?, Some(signal)),
                Err(_) => return Err(Error::Interrupted { signal }),
            },
        };
        // The container may have run for a while before it was known to.
        if let Some(signal) = early
            && let Err(error) = launched.task.signal(signal.into())
        {
            tracing::debug!(%error, "a signal came too late");
        }
        let times = launched.task.times();
        self.trace.record("create", began, times.created);
        self.trace.record("start", times.created, times.started);
        let (pid, output) = (launched.task.pid(), AtomicBool::new(false));
        let following = follow::follow(&mut launched, ends, &output);
        let outcome = session
            .beside(
                (self.engine, self.image),
                (pid, &output),
                || stage.settle(),
                following,
            )
            .await;
        match outcome {
            Ok(ended) => Ok((ended, launched.task)),
            Err(error) => {
                // The first error is the one to tell.
                let _ = launched.task.delete().await;
                Err(error)
            }
        }
    }
}

/// Logs what could not be cleaned up after a container: how that ended is what its user asks
/// for, and the next run sweeps.
fn warn_of(cleaned: Result<()>) {
    if let Err(error) = cleaned {
        let error = error.report();
        tracing::warn!(error, "what a container left cannot be removed");
    }
}

fn executor(request: &RunRequest) -> Result<Arc<dyn Executor>> {
    Ok(match &request.runtime {
        None => Arc::new(Embedded::new()),
        Some(runtime) => Arc::new(External::new(runtime)?),
    })
}

/// Waits for a signal that asks this process to end; its number.
async fn stop_signal() -> u8 {
    let caught =
        |kind| signal(kind).map_err(|error| tracing::warn!(%error, "signals cannot be caught"));
    let (Ok(mut interrupt), Ok(mut terminate)) = (
        caught(SignalKind::interrupt()),
        caught(SignalKind::terminate()),
    ) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => 2,
        _ = terminate.recv() => 15,
    }
}

fn require_root() -> Result<()> {
    if crate::sys::process::is_root() {
        return Ok(());
    }
    Err(Error::Refused {
        what: "laz run needs root to mount and to make Linux namespaces".to_owned(),
        todo: "run it with sudo".to_owned(),
    })
}
