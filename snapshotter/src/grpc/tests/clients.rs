//! Clients that come at once, and clients that go away half way.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use lazarette_fetcher::types::Digest;
use lazarette_proto::Status;
use lazarette_proto::snapshots::{CommitSnapshotRequest, PrepareSnapshotRequest};
use tonic::Code;

use super::subject::{Client, Remote, Stop, own};
use super::{brought, of_layer};
use crate::metastore::{Kind, Labels};
use crate::overlay::contract::{Refusal, Subject as _};

/// Who asks for the same at once.
const MANY: usize = 32;

fn prepare(key: &str, parent: &str, labels: &Labels) -> PrepareSnapshotRequest {
    PrepareSnapshotRequest {
        snapshotter: own("lazarette"),
        key: own(key),
        parent: own(parent),
        labels: labels.clone(),
    }
}

#[test]
fn many_who_ask_at_once_get_one_snapshot() {
    for remote in [Remote::new(), Remote::over_socket()] {
        let [target, blob] = [b"target", b"a blob"].map(|text| Digest::sha256(text));
        remote.layers.available.lock().insert(blob);
        let labels = of_layer(&target, &blob);
        let (client, runtime) = (&remote.client, &remote.runtime);
        // Half of them under keys that others have.
        let ask = |number| client.prepare(prepare(&format!("extract-{}", number / 2), "", &labels));
        let answers = runtime.block_on(join_all((0..MANY).map(ask)));
        for answer in answers {
            assert_eq!(answer.unwrap_err().code(), Code::AlreadyExists);
        }
        assert_eq!(remote.list(&[]).unwrap().len(), 1);
        assert_eq!(remote.directories(), 0);
    }
}

#[test]
fn one_of_many_prepares_of_one_key_makes_it() {
    for remote in [Remote::new(), Remote::over_socket()] {
        let clients: Vec<Client> = match remote.root().with_file_name("socket").exists() {
            // Containerd has one connection; others may have their own.
            true => (0..4).map(|_| remote.connect()).collect(),
            false => vec![remote.client.clone()],
        };
        let ask = |number: usize| {
            let client = &clients[number % clients.len()];
            client.prepare(prepare("ns/1/key", "", &Labels::new()))
        };
        let answers = remote.runtime.block_on(join_all((0..MANY).map(ask)));
        let (made, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
        assert_eq!((made.len(), refused.len()), (1, MANY - 1));
        for answer in refused {
            assert_eq!(answer.unwrap_err().code(), Code::AlreadyExists);
        }
        let all = remote.list(&[]).unwrap();
        assert_eq!((all.len(), all[0].kind), (1, Kind::Active));
        assert_eq!(remote.directories(), 1);
        let mounts = remote.mounts("ns/1/key").unwrap();
        let answered = made.into_iter().flatten().flat_map(|answer| answer.mounts);
        let places: Vec<std::path::PathBuf> = answered.map(|mount| mount.source.into()).collect();
        assert_eq!(places, [mounts[0].source.clone()], "it was told where");
        assert!(mounts[0].source.is_dir());
    }
}

#[test]
fn a_layer_is_one_snapshot_in_all_namespaces() {
    let remote = Remote::new();
    let [target, blob] = [b"target", b"a blob"].map(|text| Digest::sha256(text));
    remote.layers.available.lock().insert(blob);
    let labels = of_layer(&target, &blob);
    let mut names = BTreeSet::new();
    for key in ["ns1/1/extract", "ns2/1/extract"] {
        let answer = remote.prepare(key, "", &labels);
        assert_eq!(answer, Err(Refusal::AlreadyExists));
        // Containerd's metadata of each namespace names what it finds so.
        names.extend(brought(&remote, &target, "").into_iter().map(|s| s.name));
    }
    let name = names.pop_first().unwrap();
    assert!(names.is_empty(), "{names:?}");
    // It is removed once no namespace names it; until then a child in either holds it.
    remote.prepare("ns2/2/c", &name, &Labels::new()).unwrap();
    assert_eq!(remote.remove(&name), Err(Refusal::Precondition));
    remote.remove("ns2/2/c").unwrap();
    remote.remove(&name).unwrap();
    assert!(remote.layers.mounted.lock().is_empty());
}

#[test]
fn a_layer_without_a_snapshot_is_let_go_unless_another_has_it() {
    let remote = Remote::new();
    let [target, other, blob] = [b"target", b"others", b"a blob"].map(|text| Digest::sha256(text));
    remote.layers.available.lock().insert(blob);
    // It is brought, and then nothing can be made of it.
    let fail = || {
        let labels = of_layer(&other, &blob);
        let answer = remote.prepare("ns/1/extract", "nobody", &labels);
        assert_eq!(answer, Err(Refusal::NotFound));
    };
    fail();
    assert!(remote.layers.mounted.lock().is_empty());
    let labels = of_layer(&target, &blob);
    let answer = remote.prepare("ns/2/extract", "", &labels);
    assert_eq!(answer, Err(Refusal::AlreadyExists));
    fail();
    assert_eq!(remote.layers.mounted.lock().len(), 1);
}

/// How a client goes away.
#[derive(Debug, Clone, Copy)]
enum Leaving {
    /// It drops what it waits for, in this process.
    Dropped,
    /// It resets the request and keeps the connection.
    Reset,
    /// It closes the connection.
    Closed,
}

const LEAVINGS: [Leaving; 3] = [Leaving::Dropped, Leaving::Reset, Leaving::Closed];

impl Leaving {
    fn remote(self) -> Remote {
        match self {
            Self::Dropped => Remote::new(),
            Self::Reset | Self::Closed => Remote::over_socket(),
        }
    }

    /// Has a client ask, and go away while the work is held up at `stop`.
    fn in_the_middle<T, F>(self, remote: &Remote, stop: Stop, ask: impl FnOnce(Client) -> F)
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let client = match self {
            Self::Dropped | Self::Reset => remote.client.clone(),
            Self::Closed => remote.connect(),
        };
        remote.gate.shut(stop);
        let asking = remote.runtime.spawn(ask(client));
        remote.gate.wait_for_one();
        asking.abort();
        let ended = remote.runtime.block_on(asking);
        assert!(ended.is_err_and(|error| error.is_cancelled()));
        // Whoever answers others has seen meanwhile that it is gone.
        for _ in 0..20 {
            assert_eq!(remote.stat("nothing"), Err(Refusal::NotFound));
        }
        remote.gate.open();
    }
}

#[test]
fn a_layer_is_brought_though_the_client_is_gone() {
    for leaving in LEAVINGS {
        let remote = leaving.remote();
        let [target, blob] = [b"target", b"a blob"].map(|text| Digest::sha256(text));
        remote.layers.available.lock().insert(blob);
        let request = prepare("ns/1/extract", "", &of_layer(&target, &blob));
        let again = request.clone();
        let ask = |client: Client| async move { client.prepare(request).await };
        leaving.in_the_middle(&remote, Stop::Claim, ask);
        remote.becomes(|| !remote.list(&[]).unwrap().is_empty());
        for _ in 0..2 {
            let all = remote.list(&[]).unwrap();
            assert_eq!(all, brought(&remote, &target, ""), "{leaving:?}");
            assert_eq!((all.len(), all[0].kind), (1, Kind::Committed));
            assert_eq!(remote.directories(), 0);
            let answer = remote.wait(remote.client.prepare(again.clone()));
            assert_eq!(answer.unwrap_err(), Refusal::AlreadyExists);
        }
        remote
            .prepare(
                "ns/2/c",
                &brought(&remote, &target, "")[0].name,
                &Labels::new(),
            )
            .unwrap();
    }
}

#[test]
fn a_snapshot_is_made_though_the_client_is_gone() {
    for leaving in LEAVINGS {
        let remote = leaving.remote();
        let request = prepare("ns/1/key", "", &Labels::new());
        let ask = |client: Client| async move { client.prepare(request).await };
        leaving.in_the_middle(&remote, Stop::Update, ask);
        remote.becomes(|| remote.stat("ns/1/key").is_ok());
        assert_eq!(remote.list(&[]).unwrap().len(), 1, "{leaving:?}");
        assert_eq!(remote.directories(), 1);
        assert!(remote.mounts("ns/1/key").unwrap()[0].source.is_dir());
        let again = remote.prepare("ns/1/key", "", &Labels::new());
        assert_eq!(again, Err(Refusal::AlreadyExists));
        // Containerd numbers its keys, and has what it does not know removed.
        remote.prepare("ns/2/key", "", &Labels::new()).unwrap();
        remote.remove("ns/1/key").unwrap();
        assert_eq!(
            (remote.list(&[]).unwrap().len(), remote.directories()),
            (1, 1)
        );
    }
}

#[test]
fn a_snapshot_that_cannot_be_mounted_is_taken_back_though_the_client_is_gone() {
    for leaving in LEAVINGS {
        let remote = leaving.remote();
        let [target, blob] = [b"target", b"a blob"].map(|text| Digest::sha256(text));
        remote.layers.available.lock().insert(blob);
        let labels = of_layer(&target, &blob);
        remote.prepare("ns/1/extract", "", &labels).unwrap_err();
        let base = brought(&remote, &target, "").remove(0).name;
        let mounted = std::mem::take(&mut *remote.layers.mounted.lock());
        let request = prepare("ns/2/key", &base, &Labels::new());
        let ask = |client: Client| async move { client.prepare(request).await };
        leaving.in_the_middle(&remote, Stop::Update, ask);
        // Its directory was there, before the record: gone, both are.
        remote.becomes(|| remote.directories() == 0);
        assert_eq!(
            remote.stat("ns/2/key"),
            Err(Refusal::NotFound),
            "{leaving:?}"
        );
        assert_eq!(remote.list(&[]).unwrap().len(), 1);
        *remote.layers.mounted.lock() = mounted;
        remote.prepare("ns/2/key", &base, &Labels::new()).unwrap();
    }
}

#[test]
fn a_commit_is_done_though_the_client_is_gone() {
    for leaving in LEAVINGS {
        let remote = leaving.remote();
        let mounts = remote.prepare("ns/1/key", "", &Labels::new()).unwrap();
        std::fs::write(mounts[0].source.join("file"), [1; 10_000]).unwrap();
        let request = CommitSnapshotRequest {
            snapshotter: own("lazarette"),
            name: own("ns/2/name"),
            key: own("ns/1/key"),
            ..Default::default()
        };
        let again = request.clone();
        let ask = |client: Client| async move { client.commit(request).await };
        leaving.in_the_middle(&remote, Stop::Update, ask);
        remote.becomes(|| remote.stat("ns/2/name").is_ok());
        let all = remote.list(&[]).unwrap();
        assert_eq!(
            (all.len(), all[0].kind),
            (1, Kind::Committed),
            "{leaving:?}"
        );
        assert_eq!(remote.directories(), 1);
        assert_eq!(remote.usage("ns/2/name").unwrap().inodes, 2);
        let answer = remote.wait(remote.client.commit(again));
        assert_eq!(answer.unwrap_err(), Refusal::AlreadyExists);
        remote
            .prepare("ns/3/key", "ns/2/name", &Labels::new())
            .unwrap();
    }
}
