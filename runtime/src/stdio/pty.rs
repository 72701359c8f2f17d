//! The master end of a container's terminal, for async code.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::executor::Size;
use crate::sys::{number, process, terminal};

/// A terminal's master end. Clones share it; `&Pty` reads and writes. When the last is dropped
/// the container's terminal hangs up: writes to it fail, and its session gets SIGHUP.
#[derive(Clone, Debug)]
pub struct Pty(Arc<AsyncFd<std::fs::File>>);

impl Pty {
    /// Takes over `master`, see [`crate::executor::Launched::console`]. Must run inside a
    /// tokio runtime.
    ///
    /// # Errors
    /// When the descriptor cannot be polled.
    pub fn new(master: OwnedFd) -> io::Result<Self> {
        process::set_nonblocking(master.as_fd())?;
        Ok(Self(Arc::new(process::watch(master.into())?)))
    }

    /// What sets its size for as long as it is there, and does not keep it there.
    pub fn resizer(&self) -> Resizer {
        Resizer(Arc::downgrade(&self.0))
    }

    /// Sets the terminal's size; programs in the foreground get SIGWINCH.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn resize(&self, size: Size) -> io::Result<()> {
        terminal::set_size(self.0.get_ref(), size)
    }

    /// The terminal's size.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn size(&self) -> io::Result<Size> {
        terminal::size(self.0.get_ref())
    }
}

/// Sets the size of a [`Pty`], which is others' to hold.
#[derive(Clone, Debug)]
pub struct Resizer(Weak<AsyncFd<std::fs::File>>);

impl Resizer {
    /// [`Pty::resize`]; nothing to do for a terminal that is closed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn resize(&self, size: Size) -> io::Result<()> {
        self.0.upgrade().map_or(Ok(()), |pty| Pty(pty).resize(size))
    }
}

impl AsyncRead for &Pty {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx))?;
            let unfilled = buffer.initialize_unfilled();
            match ready.try_io(|file| file.get_ref().read(unfilled)) {
                Ok(Ok(read)) => {
                    buffer.advance(read);
                    return Poll::Ready(Ok(()));
                }
                // How Linux says that nobody has the other end open any more.
                Ok(Err(error)) if error.raw_os_error() == Some(number::EIO) => {
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_not_ready) => {}
            }
        }
    }
}

impl AsyncWrite for &Pty {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.0.poll_write_ready(cx))?;
            if let Ok(written) = ready.try_io(|file| file.get_ref().write(bytes)) {
                return Poll::Ready(written);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
