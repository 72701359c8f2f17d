//! The connection: one thread receives, any thread asks.
//!
//! Invariant: who asks is answered, by the server or by the end of the connection, which a
//! server that says nothing for [`ANSWER_WAIT`] does not outlast. A mount is known here before the first of its wants is looked at.
//!
//! Locks: `pending` and `layers`, each held for a moment, never one within the other.

use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread;

use lazarette_mountd::client::{ANSWER_WAIT, Connection};
use lazarette_mountd::wire::{Listed, Message, Role};
use lazarette_mountd::{Error, Result};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::LentData;
use super::want;

/// The server's answer to a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Done {
    pub(super) mount: u64,
    /// 0 if it worked.
    pub(super) errno: u32,
}

struct Pending {
    answer: SyncSender<Done>,
    /// What answers for the mount if it works.
    data: Option<Arc<dyn LentData>>,
}

/// A connection to the server.
pub(super) struct Link {
    connection: Connection,
    handle: Handle,
    /// By request; `None` once the connection has ended.
    pending: Mutex<Option<HashMap<u64, Pending>>>,
    layers: Mutex<HashMap<u64, Arc<dyn LentData>>>,
    next: AtomicU64,
    closed: watch::Sender<bool>,
}

impl Link {
    /// Where what goes on by itself runs.
    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Connects as daemon; what the server shows.
    pub(super) fn open(socket: &Path, handle: Handle) -> Result<(Arc<Self>, Vec<Listed>)> {
        let connection = Connection::connect(socket)?;
        connection.send(&Message::Hello(Role::Daemon), &[])?;
        let listed = receive_list(&connection)?;
        let link = Arc::new(Self {
            connection,
            handle,
            pending: Mutex::new(Some(HashMap::new())),
            layers: Mutex::default(),
            next: AtomicU64::new(1),
            closed: watch::channel(false).0,
        });
        let receiver = Arc::clone(&link);
        let builder = thread::Builder::new().name("mount server".to_owned());
        // It ends with the connection, which `close` ends.
        let started = builder.spawn(move || receiver.receive());
        started.map_err(|e| Error::io("start a thread for", socket, e))?;
        Ok((link, listed))
    }

    /// Asks and waits for the answer. Blocks.
    pub(super) fn ask(
        &self,
        message: impl FnOnce(u64) -> Message,
        fds: &[BorrowedFd<'_>],
        data: Option<Arc<dyn LentData>>,
    ) -> Result<Done> {
        let request = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = sync_channel(1);
        let pending = Pending { answer, data };
        match &mut *self.pending.lock() {
            Some(all) => all.insert(request, pending),
            None => return Err(Error::Closed),
        };
        // If it fails the connection has ended, and the receiver says so to all.
        let _ = self.connection.send(&message(request), fds);
        answered.recv_timeout(ANSWER_WAIT).map_err(|why| {
            // What it does later of what was asked, the next connection finds in its list.
            self.connection.shut_down();
            self.closed.send_replace(true);
            match why {
                RecvTimeoutError::Timeout => Error::Protocol("it does not answer"),
                RecvTimeoutError::Disconnected => Error::Closed,
            }
        })
    }

    /// Says something that has no answer. Waits while the server is slow.
    pub(super) fn tell(&self, message: &Message) -> Result<()> {
        self.connection.send(message, &[])
    }

    /// What answers for a mount.
    pub(super) fn layer(&self, mount: u64) -> Option<Arc<dyn LentData>> {
        self.layers.lock().get(&mount).cloned()
    }

    /// Nobody answers for a mount any more.
    pub(super) fn forget(&self, mount: u64) {
        self.layers.lock().remove(&mount);
    }

    pub(super) fn close(&self) {
        self.connection.shut_down();
    }

    pub(super) async fn closed(&self) {
        // The sender is ours, so it cannot be gone.
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }

    pub(super) fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    fn receive(self: Arc<Self>) {
        loop {
            match self.connection.receive() {
                Ok((message, _)) => self.take(message),
                Err(error) => {
                    if !matches!(error, Error::Closed) {
                        tracing::warn!(%error, "the mount server is not understood");
                    }
                    break;
                }
            }
        }
        self.connection.shut_down();
        // First: whoever finds its sender gone then finds out why.
        self.closed.send_replace(true);
        drop(self.pending.lock().take());
        self.layers.lock().clear();
    }

    fn take(self: &Arc<Self>, message: Message) {
        match message {
            Message::Want { want, mount, span } => {
                let link = Arc::clone(self);
                self.handle.spawn(want::answer(link, want, mount, span));
            }
            Message::Done {
                request,
                mount,
                errno,
            } => {
                let pending = self
                    .pending
                    .lock()
                    .as_mut()
                    .and_then(|all| all.remove(&request));
                let Some(Pending { answer, data }) = pending else {
                    return;
                };
                if let Some(data) = data.filter(|_| errno == 0) {
                    self.layers.lock().insert(mount, data);
                }
                // Its place is free, and who asked waits.
                let _ = answer.try_send(Done { mount, errno });
            }
            _ => tracing::warn!("the mount server says what it should not"),
        }
    }
}

fn receive_list(connection: &Connection) -> Result<Vec<Listed>> {
    let count = match connection.receive_within(ANSWER_WAIT)?.0 {
        Message::Welcome { mounts } => mounts,
        Message::Done { errno, .. } => {
            return Err(Error::Refused {
                op: "have another daemon",
                source: io::Error::from_raw_os_error(errno.cast_signed()),
            });
        }
        _ => return Err(Error::Protocol("it does not welcome us")),
    };
    let mut listed = Vec::new();
    for _ in 0..count {
        match connection.receive_within(ANSWER_WAIT)?.0 {
            Message::Listed(one) => listed.push(one),
            _ => return Err(Error::Protocol("this is no list")),
        }
    }
    Ok(listed)
}
