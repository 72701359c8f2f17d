//! `laz-mountd`: see the library. Arguments in, exit code out.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use lazarette_mountd::client::Connection;
use lazarette_mountd::server::{self, Config, Ended, WAIT_MAX};
use lazarette_mountd::table::Table;
use lazarette_mountd::wire::{Message, Role, Through};
use lazarette_mountd::{Error, Result, guard};

const SOCKET: &str = "/run/lazarette/mountd.sock";
/// Threads that answer the kernel: local reads are short, and readers are many.
const WORKERS: usize = 4;
/// More only take memory.
const WORKERS_MAX: usize = 64;
const USAGE: &str = "usage: laz-mountd [--socket PATH] [--wait SECONDS] [--workers N] [--take-over]
       laz-mountd list [--socket PATH]
  --socket     where daemons connect (default: /run/lazarette/mountd.sock)
  --wait       how long a read may wait for bytes before it fails (default: 600)
  --workers    threads that answer the kernel, 1 to 64 (default: 4)
  --take-over  replace the server that runs, without unmounting anything
";

enum Command {
    Serve,
    /// Started by the server itself.
    Guard,
    List,
}

fn main() -> ExitCode {
    let Some((command, config)) = parse(std::env::args_os().skip(1)) else {
        let _ = std::io::stderr().write_all(USAGE.as_bytes());
        return ExitCode::from(2);
    };
    let outcome = match command {
        Command::Serve => server::run(&config).map(|ended| match ended {
            Ended::HandedOver => "a successor took over",
            Ended::AlreadyRunning => "another server runs already",
        }),
        Command::Guard => guard::run(&config.socket).map(|()| ""),
        Command::List => list(&config).map(|()| ""),
    };
    let (line, code) = match outcome {
        Ok("") => return ExitCode::SUCCESS,
        Ok(line) => (line.to_owned(), ExitCode::SUCCESS),
        Err(error) => (error.to_string(), ExitCode::FAILURE),
    };
    let _ = writeln!(std::io::stderr(), "laz-mountd: {line}");
    code
}

fn parse(args: impl Iterator<Item = OsString>) -> Option<(Command, Config)> {
    let mut config = Config {
        socket: PathBuf::from(SOCKET),
        wait_max: WAIT_MAX,
        workers: WORKERS,
        take_over: false,
    };
    let mut command = Command::Serve;
    let mut args = args.peekable();
    match args.peek().and_then(|arg| arg.to_str()) {
        Some("guard") => command = Command::Guard,
        Some("list") => command = Command::List,
        _ => {}
    }
    if !matches!(command, Command::Serve) {
        args.next();
    }
    while let Some(arg) = args.next() {
        match arg.to_str()? {
            "--socket" => config.socket = args.next()?.into(),
            "--wait" => {
                let seconds = args.next()?.to_str()?.parse().ok()?;
                config.wait_max = Duration::from_secs(seconds);
            }
            "--workers" => {
                let count = args.next()?.to_str()?.parse().ok()?;
                config.workers = (1..=WORKERS_MAX).contains(&count).then_some(count)?;
            }
            "--take-over" => config.take_over = true,
            _ => return None,
        }
    }
    Some((command, config))
}

/// Prints what is mounted: number, bytes, layer, mountpoint, and through what a container that
/// comes now reads it.
fn list(config: &Config) -> Result<()> {
    let read = Table::read();
    let table = read.map_err(|e| Error::io("read", "the table of mounts", e))?;
    let server = Connection::connect(&config.socket)?;
    server.send(&Message::Hello(Role::Guest), &[])?;
    let mut left = u32::MAX;
    let mut out = std::io::stdout().lock();
    while left > 0 {
        match server.receive()?.0 {
            Message::Welcome { mounts } => left = mounts,
            Message::Listed(listed) => {
                left -= 1;
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                let (name, path) = (text(&listed.name), text(&listed.path));
                let is_whole = table.erofs_at(Path::new(&path)) > 1;
                let through = match (is_whole, listed.through) {
                    (true, _) => "kernel",
                    (false, Through::Fuse) => "fuse",
                    (false, Through::Fanotify) => "fanotify",
                };
                let (mount, size) = (listed.mount, listed.size);
                // Whoever reads it may stop reading.
                let _ = writeln!(out, "{mount}\t{size}\t{name}\t{path}\t{through}");
            }
            _ => return Err(Error::Protocol("this is no list")),
        }
    }
    Ok(())
}
