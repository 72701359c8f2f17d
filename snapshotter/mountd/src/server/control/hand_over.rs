//! Giving everything to a successor.
//!
//! Invariant: until the successor has said that it has everything, this server can go on;
//! after that it answers nothing. No request is lost: those that wait are sent again by the
//! kernel, to the successor.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Control;
use crate::server::layer::EIO;
use crate::server::link::Link;
use crate::server::workers::Workers;
use crate::wire::Message;
use crate::{Error, Result, log, sys};

/// How long a successor may take to say that it has everything.
const TAKEN_WAIT: Duration = Duration::from_secs(10);

impl Control {
    /// `true` when the successor has everything; this server must end then.
    pub(super) fn hand_over(&mut self, link: &Link) -> bool {
        self.workers.stop();
        // Daemons come back to whoever listens then.
        self.clients.clear();
        self.has_daemon = false;
        self.shared.state.lock().disconnected();
        self.lock_unattached();
        if !self.shared.resends.load(Ordering::Relaxed) {
            self.refuse_all();
        }
        match self.give(link) {
            Ok(()) => true,
            Err(error) => {
                log::say(&format!(
                    "going on, as the successor did not take over: {error}"
                ));
                match Workers::start(&self.shared, self.workers_count) {
                    Ok(workers) => self.workers = workers,
                    Err(error) => log::say(&format!("cannot go on: {error}")),
                }
                false
            }
        }
    }

    /// Answers those that wait, where the kernel would not send them again.
    fn refuse_all(&self) {
        let mounts = self.shared.state.lock().list();
        for listed in mounts {
            let waiting = self.shared.state.lock().take_waiting(listed.mount);
            if let Some(served) = self.shared.layer(listed.mount) {
                waiting
                    .iter()
                    .for_each(|read| served.refuse(read.unique, EIO));
            }
        }
    }

    fn give(&self, link: &Link) -> Result<()> {
        let (all, next_mount) = self.shared.state.lock().hand_over();
        let to = link.connection();
        for handed in all {
            let Some(served) = self.shared.layer(handed.listed.mount) else {
                continue;
            };
            let fds = [
                served.fuse.as_fd(),
                served.data.as_fd(),
                served.evictions.as_fd(),
            ];
            to.send(&Message::Handed(handed), &fds)?;
        }
        let guard = self.guard.as_fd();
        let guarded = guard.is_some();
        let fds: Vec<_> = [self.listener.as_fd()].into_iter().chain(guard).collect();
        to.send(
            &Message::HandedAll {
                next_mount,
                guarded,
            },
            &fds,
        )?;
        let ready = sys::wait(&[(to.as_fd(), false)], Some(TAKEN_WAIT));
        let ready = ready.map_err(|e| Error::io("wait for", "the successor", e))?;
        if ready != [true] {
            return Err(Error::Protocol("it took too long"));
        }
        match to.receive()? {
            (Message::Taken, _) => Ok(()),
            _ => Err(Error::Protocol("it did not say that it has everything")),
        }
    }
}
