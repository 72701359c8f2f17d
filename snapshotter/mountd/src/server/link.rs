//! A client of the server: its connection, what it came for, what it has not read yet.
//!
//! Invariant: a client that does not read costs at most [`QUEUE_MAX`] messages; beyond that
//! it is let go.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};

use crate::client::Connection;
use crate::wire::{Message, Role, encode};
use crate::{Error, Result};

/// Messages that wait for one client: a list of all mounts, and as many answers.
const QUEUE_MAX: usize = 2 * crate::state::MOUNTS_MAX + 48;

/// One client.
pub(super) struct Link {
    connection: Connection,
    /// What it said that it is.
    pub(super) role: Option<Role>,
    queue: VecDeque<Vec<u8>>,
    /// To be let go once it has read everything.
    pub(super) leaving: bool,
}

impl Link {
    pub(super) fn new(connection: Connection) -> Self {
        Self {
            connection,
            role: None,
            queue: VecDeque::new(),
            leaving: false,
        }
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Sends a message now or later.
    pub(super) fn send(&mut self, message: &Message) -> Result<()> {
        if self.queue.len() >= QUEUE_MAX {
            return Err(Error::Protocol("it does not read what it is sent"));
        }
        self.queue.push_back(encode(message));
        self.flush()
    }

    /// Sends what waits, as far as it is read.
    pub(super) fn flush(&mut self) -> Result<()> {
        while let Some(datagram) = self.queue.front() {
            if !self.connection.try_send(datagram)? {
                return Ok(());
            }
            self.queue.pop_front();
        }
        Ok(())
    }

    /// Whether something waits to be sent.
    pub(super) fn is_behind(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Whether it can be let go now.
    pub(super) fn is_done(&self) -> bool {
        self.leaving && self.queue.is_empty()
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}
