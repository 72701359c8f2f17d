//! The user's side: their terminal, their input, the signals they send.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::Resizer;
use crate::executor::{Size, Task};
use crate::sys::{number, process, terminal};

/// Bytes read from standard input at a time.
const BLOCK_BYTES: usize = 16 << 10;

/// The terminal whose settings are changed now, and the settings to give back to it.
static CHANGED: Mutex<Option<(OwnedFd, terminal::Settings)>> = Mutex::new(None);

/// While it lives, a terminal is raw: every key goes to the container, Ctrl-C included.
/// Dropping it gives the terminal back as it was, on unwinding too; for exits that do not
/// unwind there is [`restore_terminal`].
#[derive(Debug)]
#[must_use]
pub struct RawMode(());

impl RawMode {
    /// Makes the terminal `fd` raw.
    ///
    /// # Errors
    /// When `fd` is no terminal, or one is raw already.
    pub fn enter(fd: impl AsFd) -> io::Result<Self> {
        let mut changed = CHANGED.lock();
        if changed.is_some() {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "a terminal is raw already",
            ));
        }
        let fd = fd.as_fd().try_clone_to_owned()?;
        let before = terminal::settings(&fd)?;
        terminal::apply(&fd, &terminal::raw(&before))?;
        *changed = Some((fd, before));
        Ok(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// Gives the terminal that [`RawMode`] changed back as it was; without one does nothing.
/// For panic hooks and for code that calls `std::process::exit`.
pub fn restore_terminal() {
    if let Some((fd, before)) = CHANGED.lock().take() {
        // The terminal may be gone; then there is nothing to restore.
        let _ = terminal::apply(&fd, &before);
    }
}

/// The size of the terminal `fd`; `None` when it is no terminal.
pub fn terminal_size(fd: impl AsFd) -> Option<Size> {
    terminal::size(fd).ok()
}

/// Standard input for async code.
///
/// A thread of its own does the blocking reads, one block ahead. It is not part of the
/// async runtime: a read that never returns does not keep the program from ending.
#[derive(Debug)]
pub struct StdinReader {
    blocks: mpsc::Receiver<io::Result<Vec<u8>>>,
    current: Vec<u8>,
    taken: usize,
}

impl StdinReader {
    /// Starts reading this process's standard input. Create one at most: two would share
    /// the bytes.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn new() -> io::Result<Self> {
        Self::reading(io::stdin())
    }

    /// Also of one that is non-blocking, as another process that shares it made it: that flag
    /// belongs to all who do.
    pub(super) fn reading(mut source: impl Read + AsFd + Send + 'static) -> io::Result<Self> {
        let (sender, blocks) = mpsc::channel(1);
        std::thread::Builder::new()
            .name("stdin".to_owned())
            .spawn(move || {
                let mut block = vec![0; BLOCK_BYTES];
                loop {
                    let message = match source.read(&mut block) {
                        Ok(0) => return,
                        Ok(read) => Ok(block.get(..read).unwrap_or_default().to_vec()),
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            match process::wait_readable(source.as_fd()) {
                                Ok(()) => continue,
                                Err(error) => Err(error),
                            }
                        }
                        Err(error) => Err(error),
                    };
                    let failed = message.is_err();
                    if sender.blocking_send(message).is_err() || failed {
                        return;
                    }
                }
            })?;
        Ok(Self {
            blocks,
            current: Vec::new(),
            taken: 0,
        })
    }
}

impl AsyncRead for StdinReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.taken >= self.current.len() {
            match ready!(self.blocks.poll_recv(cx)) {
                Some(block) => self.current = block?,
                None => return Poll::Ready(Ok(())),
            }
            self.taken = 0;
        }
        let rest = self.current.get(self.taken..).unwrap_or_default();
        let take = rest.len().min(buffer.remaining());
        buffer.put_slice(rest.get(..take).unwrap_or_default());
        self.taken += take;
        Poll::Ready(Ok(()))
    }
}

/// Passes the signals a user sends this process on to the container's init, and changes of
/// the size of this process's terminal to the container's. Runs until dropped; drop it when the
/// container has ended. While it runs these signals do not end this process.
///
/// # Errors
/// When a signal cannot be caught.
pub async fn forward_signals(task: &dyn Task, terminal: Option<Resizer>) -> io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut quit = signal(SignalKind::quit())?;
    let mut user1 = signal(SignalKind::user_defined1())?;
    let mut user2 = signal(SignalKind::user_defined2())?;
    let mut resized = signal(SignalKind::window_change())?;
    // What changed while the container was started.
    resize(terminal.as_ref());
    loop {
        let number = tokio::select! {
            _ = interrupt.recv() => number::SIGINT,
            _ = terminate.recv() => number::SIGTERM,
            _ = hangup.recv() => number::SIGHUP,
            _ = quit.recv() => number::SIGQUIT,
            _ = user1.recv() => number::SIGUSR1,
            _ = user2.recv() => number::SIGUSR2,
            _ = resized.recv() => {
                resize(terminal.as_ref());
                continue;
            }
        };
        if let Err(error) = task.signal(number) {
            tracing::debug!(error = %error, "signal came too late for the container");
        }
    }
}

fn resize(terminal: Option<&Resizer>) {
    if let (Some(terminal), Some(size)) = (terminal, terminal_size(io::stdin()))
        && let Err(error) = terminal.resize(size)
    {
        tracing::warn!(error = %error, "the container's terminal could not be resized");
    }
}
