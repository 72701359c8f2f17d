//! One FUSE session and the threads that serve it.
//!
//! Invariant: what is mounted answers. The threads end when the kernel lets go of the file
//! system, and not before; nobody waits long for that.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use fuser::{Config, Filesystem, InitFlags, KernelConfig, MountOption, Session, SessionACL};

use super::FuseOptions;
use crate::{Error, Result, sys};

/// The name that `mount` and `df` show.
const NAME: &str = "lazarette";

/// How long dropping a mount waits for its threads after the kernel let go of it. They
/// end at once unless another Linux namespace or an overlay still holds the file system.
const JOIN_WAIT: Duration = Duration::from_millis(500);

/// Read requests the kernel may send ahead at a time.
const BACKGROUND_MAX: u16 = 64;

/// Largest read in bytes the kernel may ask for at once (it calls this the largest write).
const READ_MAX: u32 = 1 << 20;

/// The threads that serve one mount.
pub(super) struct Threads {
    ended: mpsc::Receiver<io::Result<()>>,
    supervisor: thread::JoinHandle<()>,
}

impl Threads {
    /// Whether anybody answers yet.
    pub(super) fn live(&self) -> bool {
        !self.supervisor.is_finished()
    }

    /// Why they ended as they began.
    fn failure(self) -> io::Error {
        match self.ended.recv_timeout(JOIN_WAIT) {
            Ok(Err(error)) => error,
            Ok(Ok(())) | Err(_) => io::Error::other("it was unmounted at once"),
        }
    }

    /// Waits a moment for the end; threads that the kernel still needs end by themselves.
    pub(super) fn join(self) {
        if let Err(mpsc::RecvTimeoutError::Timeout) = self.ended.recv_timeout(JOIN_WAIT) {
            tracing::debug!("layer is still in use elsewhere");
        } else if self.supervisor.join().is_err() {
            tracing::warn!("fuse thread panicked");
        }
    }
}

/// Mounts `fs` at `path`, an empty directory that is removed again where that fails.
pub(super) fn mount<FS: Filesystem + Send + Sync + 'static>(
    fs: FS,
    path: &Path,
    options: FuseOptions,
) -> Result<Threads> {
    let fail = |source| abandon(path, "serve fuse at", source);
    let below = fs::metadata(path).map_err(fail)?.dev();
    let session = Session::new(fs, path, &config(options))
        .map_err(|source| abandon(path, "mount fuse at", source))?;
    let threads = spawn(session).map_err(fail)?;
    // A session opens a descriptor for each thread, and starts them, on the supervisor's. Where
    // that fails it is unmounted again: overlay would take the empty directory for the layer.
    match fs::metadata(path) {
        Ok(root) if root.dev() != below => Ok(threads),
        Ok(_) | Err(_) => Err(fail(threads.failure())),
    }
}

/// Asks the kernel for what every file system here wants; says which of `wishes` it lacks.
pub(super) fn negotiate(config: &mut KernelConfig, wishes: &[InitFlags]) {
    for wish in wishes {
        if config.add_capabilities(*wish).is_err() {
            tracing::debug!(capability = ?wish, "this kernel's fuse lacks a capability");
        }
    }
    // The error of each is the nearest value allowed; the default then stays.
    let _ = config.set_max_background(BACKGROUND_MAX);
    let _ = config.set_max_write(READ_MAX);
}

fn spawn<FS: Filesystem + Send + Sync + 'static>(session: Session<FS>) -> io::Result<Threads> {
    let (end, ended) = mpsc::channel();
    let supervisor = thread::Builder::new()
        .name("laz-fuse".to_owned())
        .spawn(move || {
            let outcome = session.run();
            match &outcome {
                Ok(()) => {}
                // Unmounted just while a request was being taken: nobody waits for that any more.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {
                    tracing::debug!(%error, "fuse session ended");
                }
                Err(error) => tracing::warn!(%error, "fuse session failed"),
            }
            // Nobody listens when the mount was detached.
            let _ = end.send(outcome);
        })?;
    Ok(Threads { ended, supervisor })
}

fn config(options: FuseOptions) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(NAME.to_owned()),
        MountOption::Subtype(NAME.to_owned()),
        MountOption::RO,
        MountOption::DefaultPermissions,
        // Images hold device nodes and set-uid programs; containers decide about them.
        MountOption::Dev,
        MountOption::Suid,
    ];
    config.acl = SessionACL::All;
    config.n_threads = Some(options.threads.max(1));
    config.clone_fd = true;
    config
}

/// Takes back what a failed mount left.
fn abandon(path: &Path, op: &'static str, source: io::Error) -> Error {
    // Not mounted is what is hoped for; the error that matters is the first one.
    let _ = sys::detach(path);
    let _ = fs::remove_dir(path);
    Error::mount(op, path, source)
}
