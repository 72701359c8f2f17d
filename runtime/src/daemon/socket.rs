//! The daemon's sockets: who may have them, and who may connect.
//!
//! Invariant: the lock file in the state directory is held as long as the daemon lives, and
//! a socket file is removed only by who holds that lock. Only root may connect: a snapshotter
//! mounts what it is told to, and kubelet tells secrets.

use std::fs::{self, DirBuilder, File, Permissions, TryLockError};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};

use lazarette_fetcher::lock::LockFile;
use tokio::net::UnixListener;

use crate::{Error, Result};

/// The right to listen.
pub(super) struct Bound {
    paths: Vec<PathBuf>,
    _lock: LockFile,
}

/// Takes the right to listen at `paths` for the one daemon of `state`.
pub(super) fn bind(state: &Path, paths: Vec<PathBuf>) -> Result<Bound> {
    let parents = paths.iter().filter_map(|path| path.parent());
    for dir in parents.chain([state]) {
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(dir)
            .map_err(|e| Error::io("create", dir, e))?;
    }
    let path = state.join("lazd.lock");
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| Error::io("open", &path, e))?;
    match lock.try_lock() {
        Ok(()) => Ok(Bound {
            paths,
            _lock: lock.into(),
        }),
        Err(TryLockError::WouldBlock) => Err(Error::Refused {
            what: format!("another lazd runs with state directory {}", state.display()),
            todo: "stop it first, or use another --state".to_owned(),
        }),
        Err(TryLockError::Error(error)) => Err(Error::io("lock", path, error)),
    }
}

impl Bound {
    /// Listens at all of them, in their order.
    pub(super) fn listen(&self) -> Result<Vec<UnixListener>> {
        self.paths.iter().map(|path| listen(path)).collect()
    }
}

/// Listens. A socket that is there is a dead daemon's.
fn listen(path: &Path) -> Result<UnixListener> {
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io("remove", path, error)),
    }
    let fail = |error| Error::io("listen at", path, error);
    let listener = UnixListener::bind(path).map_err(fail)?;
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(fail)?;
    Ok(listener)
}

impl Drop for Bound {
    fn drop(&mut self) {
        for path in &self.paths {
            // Not there if it never listened.
            let _ = fs::remove_file(path);
        }
    }
}

/// Tells systemd that the daemon is ready, where it asked to be told.
pub(super) fn tell_ready() {
    let Some(place) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let tell = || {
        let name = place.to_string_lossy();
        let address = match name.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&place)?,
        };
        UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address)
    };
    if let Err(error) = tell() {
        tracing::warn!(%error, "systemd cannot be told that lazd is ready");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_daemon_has_the_socket_and_a_dead_ones_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let (state, socket) = (dir.path().join("state"), dir.path().join("sub/s.sock"));
        let other = dir.path().join("other.sock");
        let both = || vec![socket.clone(), other.clone()];
        let first = bind(&state, both()).unwrap();
        let listeners = first.listen().unwrap();
        let error = bind(&state, both()).err().unwrap().to_string();
        assert!(error.contains("another lazd"), "{error}");
        assert_eq!(
            fs::metadata(&socket).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(listeners.len(), 2);
        drop((first, listeners));
        assert!(!socket.exists() && !other.exists());
        // As a daemon leaves it that was killed.
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let second = bind(&state, both()).unwrap();
        let _listeners = second.listen().unwrap();
        tokio::net::UnixStream::connect(&socket).await.unwrap();
        tokio::net::UnixStream::connect(&other).await.unwrap();
    }
}
