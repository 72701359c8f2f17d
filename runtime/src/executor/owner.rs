//! Gives a container's streams to the user that its process runs as.
//!
//! Many programs open `/dev/stdout` or their terminal anew, by name, and for that the kernel
//! asks who owns the pipe or the pty: what root made refuses everybody else. Runtime
//! binaries see to it themselves, libcontainer does not. What others have given us, a
//! file or `/dev/null`, is theirs and never changed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, fchown};

use crate::sys::terminal;

/// Gives those of `fds` that are pipes to the user `uid`.
pub(super) fn give_pipes(fds: &[OwnedFd], uid: u32) -> io::Result<()> {
    for fd in fds {
        let file = File::from(fd.try_clone()?);
        if file.metadata()?.file_type().is_fifo() {
            give(&file, uid)?;
        }
    }
    Ok(())
}

/// Gives the terminal behind `master` to the user `uid`; its group stays.
pub(super) fn give_terminal(master: impl AsFd, uid: u32) -> io::Result<()> {
    give(&File::from(terminal::open_slave(master)?), uid)
}

/// Asks for nothing where nothing is to be done: that needs no privilege.
fn give(file: &File, uid: u32) -> io::Result<()> {
    if file.metadata()?.uid() == uid {
        return Ok(());
    }
    fchown(file, Some(uid), None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::process;

    #[test]
    fn only_pipes_change_hands() {
        if !process::is_root() {
            eprintln!("SKIPPED (needs root): only_pipes_change_hands");
            return;
        }
        let (reader, writer) = process::pipe().unwrap();
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        let null = OwnedFd::from(File::open("/dev/null").unwrap());
        let fds = [reader, file, null];
        give_pipes(&fds, 33).unwrap();
        let owners = fds.map(|fd| File::from(fd).metadata().unwrap().uid());
        assert_eq!(owners, [33, 0, 0]);
        // Both ends are one inode.
        assert_eq!(File::from(writer).metadata().unwrap().uid(), 33);
    }

    #[test]
    fn a_terminals_group_stays() {
        if !process::is_root() {
            eprintln!("SKIPPED (needs root): a_terminals_group_stays");
            return;
        }
        let (master, slave) = terminal::open_pair().unwrap();
        let slave = File::from(slave);
        let group = slave.metadata().unwrap().gid();
        give_terminal(&master, 33).unwrap();
        let after = slave.metadata().unwrap();
        assert_eq!((after.uid(), after.gid()), (33, group));
    }
}
