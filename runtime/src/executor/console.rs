//! Receiving the master end of a container's terminal from its runtime.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use super::protocol::CONSOLE_SOCKET;
use crate::sys::socket;

/// Most bytes of the message that carries the descriptor; runtimes send a device name.
const NAME_BYTES_MAX: usize = 4096;

/// A socket in a container's state directory that its runtime sends the master end to.
pub(super) struct ConsoleSocket(UnixListener);

impl ConsoleSocket {
    /// Binds in `state`. The path may be longer than a socket address: it is bound through
    /// an open descriptor of the directory.
    pub(super) fn bind(state: &Path) -> io::Result<Self> {
        use std::os::fd::AsRawFd;
        let dir = std::fs::File::open(state)?;
        let short = format!("/proc/self/fd/{}/{CONSOLE_SOCKET}", dir.as_raw_fd());
        let listener = UnixListener::bind(short)?;
        listener.set_nonblocking(true)?;
        Ok(Self(listener))
    }

    /// Takes the master end. Call once the container is created: the runtime has sent it
    /// by then, so nothing is waited for.
    pub(super) fn receive(&self) -> io::Result<OwnedFd> {
        let (stream, _) = self.0.accept()?;
        stream.set_nonblocking(true)?;
        let mut name = [0; NAME_BYTES_MAX];
        let (_, fds) = socket::recv_with_fds(&stream, &mut name)?;
        let missing = || io::Error::other("the runtime sent no terminal");
        fds.into_iter().next().ok_or_else(missing)
    }
}
