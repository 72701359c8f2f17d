//! Starting a mount server where there is none.
//!
//! Invariant: at most one runs at a socket, however many start one at once: all but one of
//! those end by themselves. What is started is nobody's child to be stopped with us; under
//! systemd it has a unit of its own, which `deploy/` holds, and is never started here.

use std::io::Read as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use lazarette_mountd::client::Connection;
use lazarette_mountd::{Error as ServerError, READY};

use crate::{Error, Result};

const OP: &str = "start the mount server";

/// Returns when a server listens at `socket`.
pub(super) fn ensure(socket: &Path, program: &Path) -> Result<()> {
    if is_there(socket)? {
        return Ok(());
    }
    let failed = |detail: String| Error::Environment { op: OP, detail };
    let mut command = Command::new(program);
    command.arg("--socket").arg(socket);
    // Out of reach of the Ctrl-C that ends us.
    command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let started = command.spawn();
    let mut server = started.map_err(|e| failed(format!("{}: {e}", program.display())))?;
    let mut said = Vec::new();
    if let Some(out) = &mut server.stdout {
        // It says so once it listens, or ends; then what it said tells.
        let len = READY.len() as u64;
        let read = out.take(len).read_to_end(&mut said);
        read.map_err(|e| failed(format!("{}: {e}", program.display())))?;
    }
    if said == READY {
        // When it ends before us, somebody has to have waited for it.
        let wait = move || drop(server.wait());
        let waits = thread::Builder::new().name("mount server".to_owned());
        return waits
            .spawn(wait)
            .map(drop)
            .map_err(|e| failed(e.to_string()));
    }
    // Another one may have been faster.
    if is_there(socket)? {
        return Ok(());
    }
    let ended = server
        .wait()
        .map_or_else(|e| e.to_string(), |status| status.to_string());
    Err(failed(format!(
        "{} does not listen: {ended}",
        program.display()
    )))
}

fn is_there(socket: &Path) -> Result<bool> {
    match Connection::connect(socket) {
        Ok(_) => Ok(true),
        Err(ServerError::Closed) => Ok(false),
        Err(error) => Err(super::lost(&error)),
    }
}
