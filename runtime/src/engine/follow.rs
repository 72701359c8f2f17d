//! Following a container in the foreground: its streams are this process's, its signals
//! are those this process gets.
//!
//! Invariant: the user's terminal is given back as it was on every way out, and as soon as
//! it is not the container's any more. Ends when the container's init has ended and all its
//! output has been passed on.

use std::io::{self, IsTerminal as _};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::executor::{ContainerIo, ExitStatus, Launched, Task};
use crate::stdio::{self, Attach, Pty, RawMode, StdinReader, Streams, User};
use crate::{Error, Result};

/// How the container ended.
pub(super) struct Ended {
    pub(super) status: ExitStatus,
    pub(super) first_byte: Option<Instant>,
    pub(super) at: Instant,
}

/// The engine's side of the streams until the container is there.
pub(super) struct Ends {
    pipes: Option<Streams>,
    interactive: bool,
}

/// Makes the container's standard descriptors.
pub(super) fn open(terminal: bool, interactive: bool) -> Result<(ContainerIo, Ends)> {
    if !terminal {
        let (io, pipes) = stdio::pipes(interactive).map_err(|e| local("make pipes for", e))?;
        return Ok((
            io,
            Ends {
                pipes: Some(pipes),
                interactive,
            },
        ));
    }
    if interactive && !io::stdin().is_terminal() {
        return Err(Error::Refused {
            what: "-t needs a terminal, and standard input is none".to_owned(),
            todo: "leave out -t, or run it from a terminal".to_owned(),
        });
    }
    let size = stdio::terminal_size(io::stdin());
    Ok((
        ContainerIo::Terminal { size },
        Ends {
            pipes: None,
            interactive,
        },
    ))
}

/// Pumps and forwards until the container has ended. `output` becomes true with the first
/// byte it writes.
pub(super) async fn follow(
    launched: &mut Launched,
    ends: Ends,
    output: &AtomicBool,
) -> Result<Ended> {
    let console = launched.console.take().map(Pty::new).transpose();
    let pty = console.map_err(|e| local("poll the terminal of", e))?;
    let raw = match (&pty, ends.interactive) {
        (Some(_), true) => {
            Some(RawMode::enter(io::stdin()).map_err(|e| local("set the terminal for", e))?)
        }
        (Some(_) | None, _) => None,
    };
    // Whoever else held the terminal would keep it open when its output is refused: the
    // container would wait in a write for a reader that never comes.
    let resizer = pty.as_ref().map(Pty::resizer);
    let streams = ends.pipes.or_else(|| pty.map(Streams::Terminal));
    let task = launched.task.as_ref();
    tokio::select! {
        outcome = until_end(task, (streams, raw), ends.interactive, output) => outcome,
        failed = stdio::forward_signals(task, resizer) => {
            Err(failed.err().map_or_else(
                || local("forward signals to", io::ErrorKind::BrokenPipe.into()),
                |error| local("forward signals to", error),
            ))
        }
    }
}

async fn until_end(
    task: &dyn Task,
    (streams, raw): (Option<Streams>, Option<RawMode>),
    interactive: bool,
    output: &AtomicBool,
) -> Result<Ended> {
    let stdin: Box<dyn AsyncRead + Send + Unpin> = if interactive {
        Box::new(StdinReader::new().map_err(|e| local("read standard input for", e))?)
    } else {
        Box::new(tokio::io::empty())
    };
    let user = User {
        stdin,
        stdout: Noting::new(stdio::output(io::stdout(), tokio::io::stdout()), output),
        stderr: Noting::new(stdio::output(io::stderr(), tokio::io::stderr()), output),
    };
    let pump = async {
        let attach = match streams {
            Some(streams) => stdio::attach(streams, user).await,
            None => Ok(Attach::default()),
        };
        // The container may go on without a terminal; keys do not go to it any more.
        drop(raw);
        attach
    };
    let (attach, status) = tokio::join!(pump, task.wait());
    let attach = attach.map_err(|e| local("read the output of", e))?;
    Ok(Ended {
        status: status?,
        first_byte: attach.first_byte,
        at: Instant::now(),
    })
}

fn local(op: &'static str, source: io::Error) -> Error {
    Error::io(op, "the container", source)
}

/// A writer that notes that something was written.
struct Noting<'a, W> {
    inner: W,
    written: &'a AtomicBool,
}

impl<'a, W> Noting<'a, W> {
    fn new(inner: W, written: &'a AtomicBool) -> Self {
        Self { inner, written }
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Noting<'_, W> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.written.store(true, Ordering::Relaxed);
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
