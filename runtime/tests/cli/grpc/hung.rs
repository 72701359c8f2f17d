//! A mount server that hangs under the real `lazd`: it is stopped while a container reads.
//!
//! Promise: no call of containerd's waits for it for ever, and what needs nothing of it is answered
//! as ever; a layer that it would have to show is left to containerd, one that is to go goes; `lazd` stops
//! and starts meanwhile. Once the server goes on, what waited for it is right, and nothing is left over.

#[path = "../../../../snapshotter/src/grpc/channel.rs"]
mod channel;

use std::fs;
use std::future::Future;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, join};
use lazarette_proto::Status;
use lazarette_proto::snapshots::{
    CleanupRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, SnapshotsClient, StatSnapshotRequest, UsageRequest,
};
use lazarette_proto::types::Mount;
use tonic::Code;

use self::channel::Channel;
use super::Wanted;
use super::bed::{Bed, program};
use super::scarce::wanted;
use crate::support::{Changes, File, Layer, Pushed, estargz, is_root, push, tar};
use crate::sys;

/// In the config: what is read has to be fetched first, and no registry is waited for long.
const ON_DEMAND: &str = "[snapshotter]\nfill = false\n[store]\nbudget = \"1t\"\n";
/// Longest wait for anything, on a machine that does much else: a call that waits for the server gives it
/// up after 30 s, and waits 10 s for another one.
const WAIT_MAX: Duration = Duration::from_secs(300);

/// A process that does nothing until this is dropped.
struct Stopped(i32);

impl Stopped {
    fn stop(pid: i32) -> Self {
        sys::stop(pid);
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        sys::go_on(self.0);
    }
}

/// A small image of a layer of its own.
struct Image(Pushed, Layer);

impl Image {
    fn push(bed: &Bed, tag: &str) -> Self {
        let layer = estargz(tar(&[File {
            path: "file",
            mode: 0o644,
            bytes: tag.as_bytes(),
        }]));
        let changes = Changes {
            tag,
            ..Changes::default()
        };
        Self(push(&bed.registry, &layer, &changes), layer)
    }

    fn wanted(&self) -> Wanted<'_> {
        wanted(&self.0, &self.1)
    }
}

/// containerd.
struct Client(SnapshotsClient<Channel>);

impl Client {
    async fn connect(bed: &Bed) -> Self {
        let socket = bed.path().join("state/snapshotter.sock");
        Self(SnapshotsClient::new(
            Channel::connect(&socket).await.unwrap(),
        ))
    }

    async fn prepare(
        &self,
        key: &str,
        parent: &str,
        wanted: Option<Wanted<'_>>,
    ) -> Result<Vec<Mount>, Status> {
        let request = PrepareSnapshotRequest {
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: wanted.map(|wanted| wanted.labels()).unwrap_or_default(),
            ..Default::default()
        };
        let answer = within(key, self.0.prepare(request)).await;
        answer.map(|answer| answer.mounts)
    }

    /// Whether a layer was brought; else containerd was told to bring it.
    async fn bring(&self, image: &Image) -> bool {
        let key = format!("extract {}", image.1.diff_id);
        match self.prepare(&key, "", Some(image.wanted())).await {
            Ok(_) => {
                self.remove(&key).await;
                false
            }
            Err(status) => {
                assert_eq!(status.code(), Code::AlreadyExists, "{status}");
                true
            }
        }
    }

    async fn remove(&self, key: &str) {
        let request = RemoveSnapshotRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        within(key, self.0.remove(request)).await.unwrap();
    }

    async fn list(&self) -> Vec<Info> {
        let request = ListSnapshotsRequest::default();
        let answers = within("a list", self.0.list(request)).await.unwrap();
        let all: Vec<_> = within("its messages", answers.collect()).await;
        all.into_iter()
            .flat_map(|answer| answer.unwrap().info)
            .collect()
    }

    async fn mounts(&self) -> Result<Vec<Mount>, Status> {
        let key = "container".to_owned();
        let request = MountsRequest {
            key,
            ..Default::default()
        };
        let answer = within("mounts", self.0.mounts(request)).await;
        answer.map(|answer| answer.mounts)
    }

    /// Everything that needs nothing of the server: containers begin and end on layers that are mounted.
    async fn goes_on(&self, top: &str) {
        let key = top.to_owned();
        let stat = StatSnapshotRequest {
            key,
            ..Default::default()
        };
        within("stat", self.0.stat(stat)).await.unwrap();
        let key = top.to_owned();
        let usage = UsageRequest {
            key,
            ..Default::default()
        };
        within("usage", self.0.usage(usage)).await.unwrap();
        assert!(self.list().await.len() >= 3);
        assert!(!self.mounts().await.unwrap().is_empty());
        self.prepare("another", top, None).await.unwrap();
        self.remove("another").await;
        let cleanup = CleanupRequest::default();
        within("cleanup", self.0.cleanup(cleanup)).await.unwrap();
    }
}

/// What it comes to; that it does not is a failure.
async fn within<T>(what: &str, call: impl Future<Output = T>) -> T {
    let answer = tokio::time::timeout(WAIT_MAX, call).await;
    answer.unwrap_or_else(|_| panic!("{what} is waited for after {WAIT_MAX:?}"))
}

/// Reads a file in a thread of its own, however long that takes.
fn begin_read(bed: &Bed, path: &str) -> Receiver<std::io::Result<Vec<u8>>> {
    let (done, read) = sync_channel(1);
    let path = bed.files.rootfs.join(path);
    // Nobody may be there to be told.
    std::thread::spawn(move || drop(done.send(fs::read(path))));
    read
}

/// Removes an unused layer and wants two more, while containers begin and end on the one at the top.
async fn is_bounded(bed: &Bed, client: &Client, (top, unused): (&str, &str), wanted: [&Image; 2]) {
    let is_over = AtomicBool::new(false);
    let beside = async {
        let mut rounds = 0_u32;
        while !is_over.load(Ordering::Relaxed) {
            client.goes_on(top).await;
            rounds += 1;
        }
        rounds
    };
    let asked = async {
        let [late, later] = wanted.map(|image| client.bring(image));
        let ((), late, later) = join!(client.remove(unused), late, later);
        is_over.store(true, Ordering::Relaxed);
        (late, later) == (false, false)
    };
    let (is_left_to_containerd, rounds) = join!(asked, beside);
    assert!(is_left_to_containerd, "{}", bed.files.log());
    assert!(rounds > 0);
}

/// Names in the directories where something of a layer is.
fn kept(dir: &Path) -> [usize; 3] {
    let count = |name: &&str| fs::read_dir(dir.join(name)).unwrap().count();
    ["state/layers", "root/meta", "root/layers"].map(|name| count(&name))
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_nothing_waits_for_ever_for_a_mount_server_that_hangs() {
    if !is_root("privileged_nothing_waits_for_ever_for_a_mount_server_that_hangs") {
        return;
    }
    let mut bed = Bed::configured("2m", ON_DEMAND).await;
    let images = ["gone", "late", "later"].map(|tag| Image::push(&bed, tag));
    let [gone, late, later] = &images;
    bed.start_lazd(&program("lazd"));
    let client = Client::connect(&bed).await;
    let top = client.list().await;
    let top = top.iter().find(|info| info.name == "container").unwrap();
    let top = top.parent.clone();
    assert!(client.bring(gone).await);
    let listed = client.list().await;
    let unused = listed.iter().find(|info| {
        let target = info.labels.get(super::REF);
        target == Some(&gone.1.diff_id.to_string())
    });
    let unused = unused.unwrap().name.clone();
    assert!(bed.store().evict());
    assert_eq!(kept(bed.path()), [3; 3]);

    let stopped = Stopped::stop(bed.servers()[0]);
    let read = begin_read(&bed, "base/f5");
    is_bounded(
        &bed,
        &client,
        (top.as_str(), unused.as_str()),
        [late, later],
    )
    .await;
    assert!(read.try_recv().is_err(), "nobody can have answered it");

    // It does not keep lazd from ending, nor the next from serving what needs no mount.
    bed.stop_lazd();
    bed.start_lazd(&program("lazd"));
    let client = Client::connect(&bed).await;
    assert_eq!(client.list().await.len(), 3);
    let refused = client.mounts().await.unwrap_err();
    assert!(refused.message().contains("mount server"), "{refused}");

    drop(stopped);
    let bytes = read.recv_timeout(WAIT_MAX).expect("a read hangs").unwrap();
    assert!(bed.files.is("base/f5", &bytes), "wrong bytes");
    let since = Instant::now();
    while !client.bring(late).await {
        assert!(since.elapsed() < WAIT_MAX, "{}", bed.files.log());
    }
    assert!(client.bring(later).await && !client.mounts().await.unwrap().is_empty());
    bed.read_all_here().await;
    assert_eq!(bed.servers().len(), 2, "the same server and its guard");
    // Of the one that was removed meanwhile nothing is left. Another process that was begun meanwhile may
    // have its mount for a moment, too: what could not be unmounted is tried again with the next removal.
    let since = Instant::now();
    while kept(bed.path()) != [4; 3] {
        assert!(since.elapsed() < WAIT_MAX, "{:?}", kept(bed.path()));
        assert!(client.bring(gone).await);
        client.remove(&unused).await;
    }
    is_removed(&bed, &client, late).await;
}

/// Removes all there is; nothing of it is left.
async fn is_removed(bed: &Bed, client: &Client, late: &Image) {
    bed.unmount();
    client.remove("container").await;
    let mut rest = client.list().await;
    rest.sort_by_key(|info| info.parent.is_empty());
    for info in rest {
        client.remove(&info.name).await;
    }
    // As above.
    let since = Instant::now();
    while kept(bed.path()) != [0; 3] {
        assert!(since.elapsed() < WAIT_MAX, "{}", bed.files.log());
        assert!(client.bring(late).await);
        for info in client.list().await {
            client.remove(&info.name).await;
        }
    }
    assert_eq!(bed.mounts(), [] as [std::path::PathBuf; 0]);
}
