//! Whether a process, or one it started, listens on a TCP port.
//!
//! Reads `/proc`: the sockets that the processes have open, and which sockets of their
//! Linux network namespace listen.
//!
//! Invariant: never fails; what cannot be read is not listening. Reads a bounded number
//! of bytes, processes and descriptors, whatever the container does.

use std::collections::{HashSet, VecDeque};
use std::fs;
use std::io::Read as _;
use std::path::Path;

/// Processes looked at. A start-up has few; a fork bomb has many.
const PROCESSES_MAX: usize = 64;
/// Threads of each whose children are looked for, and descriptors of each.
const ENTRIES_MAX: usize = 256;
/// Bytes read of a file: some 7,000 sockets.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Whether `pid`, or a process below it, listens on a TCP port.
pub fn is_listening(pid: u32) -> bool {
    let sockets: HashSet<u64> = family(pid).into_iter().flat_map(sockets_of).collect();
    if sockets.is_empty() {
        return false;
    }
    ["tcp", "tcp6"].iter().any(|name| {
        let text = read(Path::new(&format!("/proc/{pid}/net/{name}")));
        listening(&text).any(|inode| sockets.contains(&inode))
    })
}

/// The process and those below it, as far as they are looked at.
fn family(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let mut next = VecDeque::from([pid]);
    while let Some(pid) = next.pop_front() {
        if found.len() == PROCESSES_MAX {
            break;
        }
        found.push(pid);
        for thread in names(Path::new(&format!("/proc/{pid}/task"))) {
            let text = read(Path::new(&format!("/proc/{pid}/task/{thread}/children")));
            let children = text.split_ascii_whitespace();
            next.extend(
                children
                    .filter_map(|child| child.parse::<u32>().ok())
                    .take(PROCESSES_MAX),
            );
        }
    }
    found
}

fn sockets_of(pid: u32) -> Vec<u64> {
    let dir = format!("/proc/{pid}/fd");
    let links = names(Path::new(&dir)).into_iter();
    links
        .filter_map(|name| fs::read_link(Path::new(&dir).join(name)).ok())
        .filter_map(|target| socket_inode(target.to_str()?))
        .collect()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().take(ENTRIES_MAX);
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect()
}

fn read(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = fs::File::open(path) {
        // What was read before a failure is as good as what a moment earlier was there.
        let _ = file.take(FILE_BYTES_MAX).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// `socket:[123]` is 123.
fn socket_inode(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

/// Inodes of the sockets that listen, of a `/proc/net/tcp` table.
fn listening(table: &str) -> impl Iterator<Item = u64> + '_ {
    const STATE: usize = 3;
    const INODE: usize = 9;
    const LISTEN: &str = "0A";
    table.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let state = fields.nth(STATE)?;
        let inode = fields.nth(INODE - STATE - 1)?;
        (state == LISTEN).then(|| inode.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0 0 10 0
   1: 0100007F:1F90 0100007F:AAAA 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0 20 4 30 10 -1
   2: short 0A
   3: 0100007F:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 none 1
";

    #[test]
    fn the_table_is_read_as_far_as_it_makes_sense() {
        assert_eq!(listening(TABLE).collect::<Vec<_>>(), [4711]);
        assert_eq!(listening("").count(), 0);
    }

    #[test]
    fn only_sockets_have_an_inode() {
        let table = [
            ("socket:[17]", Some(17)),
            ("socket:[]", None),
            ("socket:[x]", None),
            ("pipe:[17]", None),
            ("/tmp/socket:[17]", None),
        ];
        for (link, inode) in table {
            assert_eq!(socket_inode(link), inode, "{link}");
        }
    }

    #[test]
    fn a_listener_of_this_process_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(is_listening(std::process::id()));
        drop(listener);
        assert!(!is_listening(u32::MAX));
    }
}
