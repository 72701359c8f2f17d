//! The container's standard streams, pumped between the container and the user.
//!
//! Without a terminal: three pipes, so that the time of the first byte is known. With one:
//! the master end of a pty. A slow reader slows the container down, nothing is buffered
//! beyond one block per stream. When the user's side of an output closes, the container's
//! side closes too, and the container learns of it by its own next write, as in a shell
//! pipeline; a terminal hangs up. Ends when the container has closed its outputs.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;

use crate::executor::ContainerIo;

mod output;
mod pty;
mod user;

pub use output::{Output, output};
pub use pty::{Pty, Resizer};
pub use user::{RawMode, StdinReader, forward_signals, restore_terminal, terminal_size};

/// Bytes moved at a time; what a Linux pipe holds.
const BLOCK_BYTES: usize = 64 << 10;

/// The engine's ends of a container's streams.
#[derive(Debug)]
pub enum Streams {
    /// Pipes.
    Pipes {
        /// Write end of the container's input; `None` when its input is `/dev/null`.
        stdin: Option<pipe::Sender>,
        /// Read end of its output.
        stdout: pipe::Receiver,
        /// Read end of its error output.
        stderr: pipe::Receiver,
    },
    /// The master end of its terminal.
    Terminal(Pty),
}

/// Makes three pipes: the container's ends, and ours. Without `interactive` the container
/// reads from `/dev/null`. Must run inside a tokio runtime.
///
/// # Errors
/// When descriptors run out.
pub fn pipes(interactive: bool) -> io::Result<(ContainerIo, Streams)> {
    let (stdin, our_stdin) = if interactive {
        let (reader, writer) = crate::sys::process::pipe()?;
        (
            reader,
            Some(pipe::Sender::from_owned_fd(nonblocking(writer)?)?),
        )
    } else {
        (OwnedFd::from(std::fs::File::open("/dev/null")?), None)
    };
    let (our_stdout, stdout) = crate::sys::process::pipe()?;
    let (our_stderr, stderr) = crate::sys::process::pipe()?;
    let streams = Streams::Pipes {
        stdin: our_stdin,
        stdout: pipe::Receiver::from_owned_fd(nonblocking(our_stdout)?)?,
        stderr: pipe::Receiver::from_owned_fd(nonblocking(our_stderr)?)?,
    };
    Ok((
        ContainerIo::Fds {
            stdin,
            stdout,
            stderr,
        },
        streams,
    ))
}

fn nonblocking(fd: OwnedFd) -> io::Result<OwnedFd> {
    crate::sys::process::set_nonblocking(fd.as_fd())?;
    Ok(fd)
}

/// The user's ends of the streams.
pub struct User<I, O, E> {
    /// What the user types or pipes in.
    pub stdin: I,
    /// Where the container's output goes; all of it when it has a terminal.
    pub stdout: O,
    /// Where its error output goes.
    pub stderr: E,
}

/// What went through.
#[derive(Clone, Copy, Debug, Default)]
pub struct Attach {
    /// When the container's first output byte arrived, on either stream.
    pub first_byte: Option<Instant>,
    /// Bytes the container wrote and the user got.
    pub bytes: u64,
    /// Whether the user's side closed an output before the container had finished.
    pub output_refused: bool,
}

impl Attach {
    fn join(self, other: Self) -> Self {
        let first_byte = match (self.first_byte, other.first_byte) {
            (Some(one), Some(two)) => Some(one.min(two)),
            (one, two) => one.or(two),
        };
        Self {
            first_byte,
            bytes: self.bytes.saturating_add(other.bytes),
            output_refused: self.output_refused || other.output_refused,
        }
    }
}

/// Moves bytes until the container has closed its outputs. The user's input is given up
/// then; its end reaches the container as end of file.
///
/// # Errors
/// When a stream of the container cannot be read; what the user's side does is no error.
pub async fn attach<I, O, E>(streams: Streams, user: User<I, O, E>) -> io::Result<Attach>
where
    I: AsyncRead + Unpin,
    O: AsyncWrite + Unpin,
    E: AsyncWrite + Unpin,
{
    match streams {
        Streams::Pipes {
            stdin,
            stdout,
            stderr,
        } => {
            let outputs =
                async { tokio::try_join!(drain(stdout, user.stdout), drain(stderr, user.stderr)) };
            let (one, two) = beside(feed(user.stdin, stdin), outputs).await?;
            Ok(one.join(two))
        }
        Streams::Terminal(pty) => {
            beside(feed(user.stdin, Some(&pty)), drain(&pty, user.stdout)).await
        }
    }
}

/// Runs both until `outputs` ends.
async fn beside<T>(
    input: impl Future<Output = ()>,
    outputs: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    tokio::pin!(input, outputs);
    tokio::select! {
        done = &mut outputs => return done,
        () = &mut input => {}
    }
    outputs.await
}

/// The user's input into the container, then its end. A container that does not read any
/// more is nothing to report.
async fn feed(mut from: impl AsyncRead + Unpin, to: Option<impl AsyncWrite + Unpin>) {
    let Some(mut to) = to else { return };
    let mut block = vec![0; BLOCK_BYTES];
    loop {
        match from.read(&mut block).await {
            Ok(0) => return,
            Ok(read) => {
                let bytes = block.get(..read).unwrap_or_default();
                if to.write_all(bytes).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(error = %error, "standard input could not be read");
                return;
            }
        }
    }
}

/// One output of the container to the user, until the container closes it or the user
/// does not take it any more.
async fn drain(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<Attach> {
    let mut seen = Attach::default();
    let mut block = vec![0; BLOCK_BYTES];
    loop {
        let read = from.read(&mut block).await?;
        let bytes = block.get(..read).unwrap_or_default();
        if bytes.is_empty() {
            return Ok(seen);
        }
        seen.first_byte.get_or_insert_with(Instant::now);
        // Flushed each time: a prompt without a newline must be seen.
        let passed = match to.write_all(bytes).await {
            Ok(()) => to.flush().await,
            Err(error) => Err(error),
        };
        if let Err(error) = passed {
            tracing::warn!(error = %error, "output is not read any more; closing it");
            seen.output_refused = true;
            return Ok(seen);
        }
        seen.bytes = seen
            .bytes
            .saturating_add(u64::try_from(read).unwrap_or(u64::MAX));
    }
}

#[cfg(test)]
mod tests;
