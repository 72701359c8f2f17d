//! One end of a connection: messages in, messages out, descriptors beside them.
//!
//! Invariant: a message that is received has exactly the descriptors its kind says; all
//! others are closed. What does not decode is an error and ends the connection; a message whose
//! descriptors this process could not take is another, which ends nothing.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use crate::wire::{DATAGRAM_BYTES_MAX, Message, decode, encode};
use crate::{Error, Result, sys};

/// Longest wait for what the other side does at once if it does anything.
pub const ANSWER_WAIT: Duration = Duration::from_secs(30);

/// How long who came may leave a message where it is. Nothing else is done meanwhile: readers wait.
pub(crate) const TAKE_WAIT: Duration = Duration::from_secs(10);

/// A connection.
pub struct Connection {
    socket: OwnedFd,
}

impl Connection {
    /// Connects to the server at `path`.
    ///
    /// # Errors
    /// `Closed` when nobody listens there.
    pub fn connect(path: &Path) -> Result<Self> {
        use io::ErrorKind::{ConnectionRefused, NotFound};
        match sys::connect_to(path, ANSWER_WAIT) {
            Ok(socket) => Ok(Self { socket }),
            Err(e) if matches!(e.kind(), ConnectionRefused | NotFound) => Err(Error::Closed),
            Err(e) => Err(Error::io("connect to", path, e)),
        }
    }

    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Ends it: whoever receives at either end is told so.
    pub fn shut_down(&self) {
        // It fails only where it has ended already.
        let _ = sys::shut_down(self.socket.as_fd());
    }

    /// Sends a message, waiting while the other side is slow. Any thread, any number at once.
    /// If it fails the connection has ended.
    pub fn send(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<()> {
        debug_assert_eq!(message.descriptors(), fds.len());
        let sent = sys::send(self.socket.as_fd(), &encode(message), fds, true);
        sent.map_err(|error| {
            self.shut_down();
            closed(error)
        })
    }

    /// The same, not waiting; `false` if it would have had to.
    pub(crate) fn try_send(&self, datagram: &[u8]) -> Result<bool> {
        match sys::send(self.socket.as_fd(), datagram, &[], false) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(closed(e)),
        }
    }

    /// The next message. Blocks. One thread at a time.
    pub fn receive(&self) -> Result<(Message, Vec<OwnedFd>)> {
        loop {
            match self.receive_now(true) {
                Ok(Some(received)) => return Ok(received),
                Ok(None) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The next message, if it comes in time. If not, the connection has ended, for the other
    /// side too: no message is lost that it believes to have sent.
    pub fn receive_within(&self, time: Duration) -> Result<(Message, Vec<OwnedFd>)> {
        let late = || Error::Protocol("it says nothing");
        let ready = sys::wait(&[(self.as_fd(), false)], Some(time));
        if ready.is_ok_and(|ready| ready == [true]) {
            return self.try_receive()?.ok_or_else(late);
        }
        self.shut_down();
        // It may have come in this moment.
        match self.try_receive() {
            Ok(None) | Err(Error::Closed) => Err(late()),
            Ok(Some(received)) => Ok(received),
            Err(error) => Err(error),
        }
    }

    /// The next message if there is one.
    pub(crate) fn try_receive(&self) -> Result<Option<(Message, Vec<OwnedFd>)>> {
        self.receive_now(false)
    }

    fn receive_now(&self, patient: bool) -> Result<Option<(Message, Vec<OwnedFd>)>> {
        let mut buf = vec![0; DATAGRAM_BYTES_MAX];
        let sys::Received { len, fds, lacks } = match sys::receive(self.as_fd(), &mut buf, patient)
        {
            Ok(sys::Received { len: 0, .. }) => return Err(Error::Closed),
            Ok(received) => received,
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                return Ok(None);
            }
            Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                return Err(Error::Protocol("a message is too long"));
            }
            Err(e) => return Err(closed(e)),
        };
        let message = decode(buf.get(..len).unwrap_or_default())?;
        if lacks {
            return Err(Error::NoDescriptors(Box::new(message)));
        }
        if message.descriptors() != fds.len() {
            return Err(Error::Protocol(
                "a message has not the descriptors it should have",
            ));
        }
        Ok(Some((message, fds)))
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn closed(error: io::Error) -> Error {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected, WouldBlock};
    match error.kind() {
        BrokenPipe | ConnectionReset | NotConnected => Error::Closed,
        WouldBlock => Error::Protocol("it takes nothing"),
        _ => Error::io("use", "the mount server's socket", error),
    }
}
