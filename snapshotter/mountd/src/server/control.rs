//! The thread that talks to daemons, guests, successors and the guard.
//!
//! Invariant: whatever a client sends costs at most its own connection. One daemon at a time;
//! when it is gone, everything that was its to answer waits for the next. Without descriptors
//! nothing new is mounted, and everything else goes on.

mod daemon;
mod hand_over;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::layer::{ANSWER_BYTES_MAX, EIO, Served};
use super::link::Link;
use super::workers::Workers;
use super::{Config, Ended, Shared};
use crate::client::{Connection, TAKE_WAIT};
use crate::guard::Keeper;
use crate::wire::{Basis, Handed, Message, Role};
use crate::{Error, Result, log, sys};

/// Connections at a time.
const CLIENTS_MAX: usize = 16;
/// Messages taken from one client before the others have their turn.
const TURN_MAX: usize = 64;
/// When a lock that somebody holds is tried again: an eviction takes milliseconds.
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// When a connection is tried again that could not be taken for want of a descriptor.
const DEAF_PAUSE: Duration = Duration::from_millis(100);

const EBUSY: u32 = 16;
const EMFILE: u32 = 24;

/// What becomes of a client after a message.
enum Next {
    Stays,
    /// It is a successor: hand everything over.
    HandsOver,
}

pub(super) struct Control {
    shared: Arc<Shared>,
    workers: Workers,
    workers_count: usize,
    socket: PathBuf,
    listener: OwnedFd,
    guard: Keeper,
    clients: Vec<Link>,
    /// Whether one of them is a daemon.
    has_daemon: bool,
    /// Until when nobody new is listened to.
    deaf_until: Option<Instant>,
    /// For the longest answer to a read.
    buf: Vec<u8>,
}

impl Control {
    pub(super) fn new(
        shared: Arc<Shared>,
        config: &Config,
        listener: OwnedFd,
        guard: Keeper,
    ) -> Result<Self> {
        let workers = Workers::start(&shared, config.workers)?;
        Ok(Self {
            shared,
            workers,
            workers_count: config.workers,
            socket: config.socket.clone(),
            listener,
            guard,
            clients: Vec::new(),
            has_daemon: false,
            deaf_until: None,
            buf: vec![0; ANSWER_BYTES_MAX],
        })
    }

    /// Runs until everything is handed over, or nothing could be answered any more.
    pub(super) fn run(mut self) -> Result<Ended> {
        log::ready();
        loop {
            // It may have died where it was told something; or there was none to be had.
            if self.guard.missing_for() == Some(Duration::ZERO) {
                self.renew_guard();
            }
            self.lock_unattached();
            self.send_wants();
            let mut ready = self.wait()?;
            self.shared.poke.hush();
            self.expire();
            // The guard says nothing: if it can be read, it is gone.
            if self.guard.is_there() && ready.pop() == Some(true) {
                self.guard.lost(&Error::Closed);
                self.renew_guard();
            }
            if self.turn(&ready)? {
                return Ok(Ended::HandedOver);
            }
        }
    }

    /// Which of listener, `poke` and clients have something for us.
    fn wait(&self) -> Result<Vec<bool>> {
        let now = Instant::now();
        let deaf = self.deaf_until.map(|at| at.saturating_duration_since(now));
        let deaf = deaf.filter(|left| !left.is_zero());
        let listener = (self.listener.as_fd(), false);
        let listener = deaf.is_none().then_some(listener);
        let poke = (self.shared.poke.as_fd(), false);
        let clients = self
            .clients
            .iter()
            .map(|link| (link.as_fd(), link.is_behind()));
        let guard = self.guard.as_fd().map(|fd| (fd, false));
        let fds: Vec<(BorrowedFd<'_>, bool)> = (listener.into_iter().chain([poke]).chain(clients))
            .chain(guard)
            .collect();
        let timeout = {
            let state = self.shared.state.lock();
            let expiry = state.next_expiry();
            let expiry = expiry.map(|at| at.saturating_duration_since(now));
            let locks = (!state.to_lock().is_empty()).then_some(LOCK_PAUSE);
            let guard = self.guard.missing_for();
            let pauses = locks.into_iter().chain(deaf).chain(guard);
            expiry.into_iter().chain(pauses).min()
        };
        let mut ready =
            sys::wait(&fds, timeout).map_err(|e| Error::io("wait at", &self.socket, e))?;
        if deaf.is_some() {
            ready.insert(0, false);
        }
        Ok(ready)
    }

    /// Another guard in place of one that is gone.
    fn renew_guard(&mut self) {
        if !self.guard.renew() {
            return;
        }
        if let Some(group) = self.shared.marked.group() {
            self.guard.keep_group(group);
        }
        let (all, _) = self.shared.state.lock().hand_over();
        for handed in all {
            if let Some(served) = self.shared.layer(handed.listed.mount) {
                self.have_kept(handed, &served);
            }
        }
    }

    /// Has the guard hold a mount, of which it serves nothing.
    fn have_kept(&mut self, mut handed: Handed, served: &Served) {
        if served.fuse().is_some() {
            handed.basis = Basis::Number(0);
        }
        handed.mark = self.shared.marked.mark_of(served.mount);
        handed.granted = Vec::new();
        self.guard.keep(&handed, &served.files());
    }

    /// Answers those whose time is over.
    fn expire(&self) {
        let expired = self.shared.state.lock().expire(Instant::now());
        for read in expired {
            if let Some(served) = self.shared.layer(read.mount) {
                served.refuse(read.unique, EIO);
            }
        }
    }

    /// Locks the data files of layers without a daemon, as far as nobody evicts from them.
    fn lock_unattached(&self) {
        let mounts = self.shared.state.lock().to_lock();
        for mount in mounts {
            let Some(served) = self.shared.layer(mount) else {
                continue;
            };
            match sys::lock_against_evictions(&served.data) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    log::say(&format!(
                        "cannot lock the data of {}: {error}",
                        served.path.display()
                    ));
                    continue;
                }
            }
            let number = served.number_now().ok();
            let mut state = self.shared.state.lock();
            let kept = number.is_some_and(|number| state.locked(mount, number));
            drop(state);
            if !kept {
                // It fails only where the file has no locks, and then it had none.
                let _ = sys::unlock(&served.data);
            }
        }
    }

    /// One turn for everybody who is ready; `true` when everything was handed over.
    fn turn(&mut self, ready: &[bool]) -> Result<bool> {
        let mut ready = ready.iter().copied();
        let newcomer = ready.next().unwrap_or(false);
        let ready: Vec<bool> = ready.skip(1).collect();
        let mut stay = Vec::new();
        let mut successor = None;
        for (at, mut link) in std::mem::take(&mut self.clients).into_iter().enumerate() {
            let is_ready = ready.get(at).copied().unwrap_or(false);
            let next = if is_ready {
                self.serve(&mut link)
            } else {
                Ok(Next::Stays)
            };
            match next {
                Ok(Next::HandsOver) => successor = Some(link),
                Ok(Next::Stays) if link.is_done() => {}
                Ok(Next::Stays) => stay.push(link),
                Err(error) => self.lost(&link, &error),
            }
        }
        self.clients.extend(stay);
        if newcomer {
            self.accept();
        }
        successor.map_or(Ok(false), |link| self.hand_over(&link))
    }

    fn accept(&mut self) {
        match sys::accept(self.listener.as_fd(), TAKE_WAIT) {
            Ok(socket) if self.clients.len() < CLIENTS_MAX => {
                self.deaf_until = None;
                self.clients.push(Link::new(Connection::new(socket)));
            }
            // Closed at once: one too many.
            Ok(_) => self.deaf_until = None,
            Err(error) => {
                // It is there still, and would be met again at once.
                if self.deaf_until.is_none() {
                    log::say(&format!("cannot accept a connection: {error}"));
                }
                self.deaf_until = Some(Instant::now() + DEAF_PAUSE);
            }
        }
    }

    /// Takes what a client sent.
    fn serve(&mut self, link: &mut Link) -> Result<Next> {
        link.flush()?;
        for _ in 0..TURN_MAX {
            let (message, fds) = match link.connection().try_receive() {
                Ok(None) => break,
                Ok(Some(received)) => received,
                Err(Error::NoDescriptors(message)) => {
                    lack(link, &message)?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            match (link.role, message) {
                (None, Message::Hello(Role::Successor)) => return Ok(Next::HandsOver),
                (None, Message::Hello(role)) => self.greet(link, role)?,
                (Some(Role::Daemon), message) => self.daemon_says(link, message, fds)?,
                (_, _) => return Err(Error::Protocol("it says what it may not say")),
            }
        }
        Ok(Next::Stays)
    }

    fn greet(&mut self, link: &mut Link, role: Role) -> Result<()> {
        if role == Role::Daemon && self.has_daemon {
            link.leaving = true;
            return link.send(&Message::Done {
                request: 0,
                mount: 0,
                errno: EBUSY,
            });
        }
        link.role = Some(role);
        self.has_daemon |= role == Role::Daemon;
        let list = self.shared.state.lock().list();
        let mounts = u32::try_from(list.len()).unwrap_or(u32::MAX);
        link.send(&Message::Welcome { mounts })?;
        for listed in list {
            link.send(&Message::Listed(listed))?;
        }
        Ok(())
    }

    /// A client is gone, or has to go.
    fn lost(&mut self, link: &Link, error: &Error) {
        if !matches!(error, Error::Closed) {
            log::say(&format!("letting a client go: {error}"));
        }
        if link.role == Some(Role::Daemon) {
            self.has_daemon = false;
            self.shared.state.lock().disconnected();
        }
    }

    /// Sends wants while the daemon reads them.
    fn send_wants(&mut self) {
        let is_daemon = |link: &&mut Link| link.role == Some(Role::Daemon);
        let Some(link) = self.clients.iter_mut().find(is_daemon) else {
            return;
        };
        while !link.is_behind() {
            let Some(want) = self.shared.state.lock().next_want() else {
                return;
            };
            let want = Message::Want {
                want: want.want,
                mount: want.mount,
                span: want.span,
            };
            // A connection that is broken is noticed where it is read.
            if link.send(&want).is_err() {
                return;
            }
        }
    }
}

/// Answers a request whose files could not be taken.
fn lack(link: &mut Link, message: &Message) -> Result<()> {
    let (Some(Role::Daemon), Message::Mount { request, .. } | Message::Mark { request, .. }) =
        (link.role, message)
    else {
        return Err(Error::Protocol("it sends files that nobody wants"));
    };
    log::say("cannot mount a layer: as many files are open as may be (LimitNOFILE=)");
    link.send(&Message::Done {
        request: *request,
        mount: 0,
        errno: EMFILE,
    })
}
