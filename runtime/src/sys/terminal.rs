//! Terminals: raw mode, window sizes, and the slave end of a master.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

/// Settings of a terminal.
pub(crate) use nix::sys::termios::Termios as Settings;

/// Columns and rows of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// The terminal settings in force now.
pub(crate) fn settings(fd: impl AsFd) -> io::Result<Settings> {
    Ok(tcgetattr(fd)?)
}

/// Puts `settings` in force at once.
pub(crate) fn apply(fd: impl AsFd, settings: &Settings) -> io::Result<()> {
    Ok(tcsetattr(fd, SetArg::TCSANOW, settings)?)
}

/// `settings` changed to raw: no echo, no line editing, no signals from keys.
pub(crate) fn raw(settings: &Settings) -> Settings {
    let mut raw = settings.clone();
    cfmakeraw(&mut raw);
    raw
}

/// The window size of a terminal.
#[expect(unsafe_code, reason = "window sizes travel by ioctl only")]
pub(crate) fn size(fd: impl AsFd) -> io::Result<Size> {
    let mut raw = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes one winsize, which `raw` is, and keeps no pointer.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TIOCGWINSZ, &raw mut raw) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Size {
        width: raw.ws_col,
        height: raw.ws_row,
    })
}

/// Sets the window size; the kernel tells the foreground processes by SIGWINCH.
#[expect(unsafe_code, reason = "window sizes travel by ioctl only")]
pub(crate) fn set_size(fd: impl AsFd, size: Size) -> io::Result<()> {
    let raw = libc::winsize {
        ws_row: size.height,
        ws_col: size.width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize, which `raw` is, and keeps no pointer.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const raw) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The slave end of the pseudo terminal that `master` is of, close-on-exec: also where its
/// name means nothing to us, as in a container. It does not become our controlling terminal.
#[expect(
    unsafe_code,
    reason = "opening the peer of a terminal is an ioctl only"
)]
pub(crate) fn open_slave(master: impl AsFd) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes an integer and touches no memory of ours.
    let raw = unsafe { libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCGPTPEER, flags) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor to us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// A new pseudo terminal: master, slave.
#[cfg(test)]
pub(crate) fn open_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let pair = nix::pty::openpty(None, None)?;
    Ok((pair.master, pair.slave))
}
