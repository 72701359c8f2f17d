//! What a guard lets go of.

use super::*;
use crate::wire::{Basis, Listed, Through};

/// Two ends of a connection, in a directory of their own.
fn pair(dir: &Path) -> (Connection, Connection) {
    let path = dir.join("server");
    let listener = listen(&path).unwrap();
    let ours = Connection::connect(&path).unwrap();
    (
        ours,
        Connection::new(sys::accept(listener.as_fd(), TAKE_WAIT).unwrap()),
    )
}

fn handed() -> Handed {
    Handed {
        listed: Listed {
            mount: 7,
            through: Through::Fuse,
            size: 4096,
            name: b"layer".to_vec(),
            path: b"/mnt".to_vec(),
        },
        basis: Basis::Number(0),
        mark: 0,
        granted: Vec::new(),
    }
}

#[test]
fn a_guard_that_does_not_understand_its_server_lets_go_of_everything() {
    let dir = tempfile::tempdir().unwrap();
    let (server, link) = pair(dir.path());
    let mut guard = Guard {
        listener: listen(&dir.path().join("guard")).unwrap(),
        server: Some(link),
        held: BTreeMap::new(),
        group: None,
        next_mount: 1,
    };
    let null = || File::open("/dev/null").unwrap();
    let files = [null(), null(), null()];
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    server.send(&Message::HandedGroup, &fds[..1]).unwrap();
    server.send(&Message::Handed(handed()), &fds).unwrap();
    guard.listen_to_server();
    assert!(guard.group.is_some() && guard.held.contains_key(&7));
    assert!(guard.is_needed());
    // No server says this to its guard.
    server.send(&Message::Taken, &[]).unwrap();
    guard.listen_to_server();
    assert!(guard.server.is_none() && guard.held.is_empty());
    assert!(
        guard.group.is_none(),
        "it would deny what a server that lives is asked"
    );
    assert!(!guard.is_needed());
}
