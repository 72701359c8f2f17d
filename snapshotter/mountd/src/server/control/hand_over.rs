//! Giving everything to a successor.
//!
//! Invariant: who takes nothing is given up. Until the successor has said that it has everything,
//! this server can go on; after that it answers nothing. Where it could not start a worker again, it
//! ends, and its guard answers: it is never there and answers nobody. No request is lost: those that
//! wait in a session are sent again by the kernel, to the successor; questions through fanotify are
//! handed over.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use super::Control;
use crate::client::{Connection, TAKE_WAIT};
use crate::server::layer::EIO;
use crate::server::link::Link;
use crate::server::workers::Workers;
use crate::wire::{Handed, Message, Through};
use crate::{Error, Result, log};

impl Control {
    /// `true` when the successor has everything; this server must end then.
    ///
    /// # Errors
    /// Where it has not, and this server cannot go on.
    pub(super) fn hand_over(&mut self, link: &Link) -> Result<bool> {
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
            Ok(()) => Ok(true),
            Err(error) => {
                log::say(&format!(
                    "going on, as the successor did not take over: {error}"
                ));
                self.workers = Workers::start(&self.shared, self.workers_count)?;
                Ok(false)
            }
        }
    }

    /// Answers those that wait in a session, where the kernel would not send them again.
    fn refuse_all(&self) {
        let mounts = self.shared.state.lock().list();
        for listed in mounts {
            if listed.through == Through::Fanotify {
                continue;
            }
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
        // Before all that has descriptors: the successor must have the questions' numbers.
        self.give_questions(to, &all)?;
        for mut handed in all {
            let Some(served) = self.shared.layer(handed.listed.mount) else {
                continue;
            };
            handed.mark = self.shared.marked.mark_of(served.mount);
            let fds: Vec<_> = served.files().into_iter().map(AsFd::as_fd).collect();
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
        match to.receive_within(TAKE_WAIT)? {
            (Message::Taken, _) => Ok(()),
            _ => Err(Error::Protocol("it did not say that it has everything")),
        }
    }

    /// Gives the group through which the kernel asks, and what it asked.
    fn give_questions(&self, to: &Connection, all: &[Handed]) -> Result<()> {
        let Some(group) = self.shared.marked.group() else {
            return Ok(());
        };
        to.send(&Message::HandedGroup, &[group.as_fd()])?;
        let kept = all.iter().map(|handed| &handed.listed);
        for listed in kept.filter(|listed| listed.through == Through::Fanotify) {
            let waiting = self.shared.state.lock().waiting(listed.mount);
            for read in waiting {
                let Some(number) = group.number_of(read.unique) else {
                    continue;
                };
                let waited = read.since.elapsed().as_millis();
                let message = Message::HandedRead {
                    mount: read.mount,
                    number,
                    waited_ms: u64::try_from(waited).unwrap_or(u64::MAX),
                    span: read.span,
                };
                to.send(&message, &[])?;
            }
        }
        Ok(())
    }
}
