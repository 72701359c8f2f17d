//! A container's terminal: its master end comes from the runtime and is made ready here.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use super::protocol::CONSOLE_SOCKET;
use super::{Error, Size, owner};
use crate::sys::{socket, terminal};

/// Most bytes of the message that carries the descriptor; runtimes send a device name.
const NAME_BYTES_MAX: usize = 4096;

/// A terminal that a container is about to get.
pub(super) struct Console {
    socket: ConsoleSocket,
    size: Option<Size>,
    uid: Option<u32>,
}

impl Console {
    /// Expects it in the container's directory `state`. It gets `size` and goes to the
    /// user `uid`, where they are given.
    pub(super) fn expect(
        state: &Path,
        size: Option<Size>,
        uid: Option<u32>,
    ) -> Result<Self, Error> {
        let socket = ConsoleSocket::bind(state);
        let socket = socket.map_err(Error::io("bind the terminal's socket"))?;
        Ok(Self { socket, size, uid })
    }

    /// Its master end, as the command is to find it. Call once the container is created,
    /// before the command runs.
    pub(super) fn receive(&self) -> Result<OwnedFd, Error> {
        let master = self.socket.receive();
        let master = master.map_err(Error::io("receive the container's terminal"))?;
        if let Some(size) = self.size {
            terminal::set_size(&master, size).map_err(Error::io("set the terminal's size"))?;
        }
        if let Some(uid) = self.uid {
            let given = owner::give_terminal(&master, uid);
            given.map_err(Error::io("give the container's user its terminal"))?;
        }
        Ok(master)
    }
}

/// A socket in a container's state directory that its runtime sends the master end to.
struct ConsoleSocket(UnixListener);

impl ConsoleSocket {
    /// Binds in `state`. The path may be longer than a socket address: it is bound through
    /// an open descriptor of the directory.
    fn bind(state: &Path) -> io::Result<Self> {
        use std::os::fd::AsRawFd;
        let dir = std::fs::File::open(state)?;
        let short = format!("/proc/self/fd/{}/{CONSOLE_SOCKET}", dir.as_raw_fd());
        let listener = UnixListener::bind(short)?;
        listener.set_nonblocking(true)?;
        Ok(Self(listener))
    }

    /// Takes the master end. The runtime of a container that is created has sent it, so
    /// nothing is waited for.
    fn receive(&self) -> io::Result<OwnedFd> {
        let (stream, _) = self.0.accept()?;
        stream.set_nonblocking(true)?;
        let mut name = [0; NAME_BYTES_MAX];
        let (_, fds) = socket::recv_with_fds(&stream, &mut name)?;
        let missing = || io::Error::other("the runtime sent no terminal");
        fds.into_iter().next().ok_or_else(missing)
    }
}
