//! A complete layer that the kernel shows by itself: who evicts from it, and who dies.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lazarette_fetcher::layer::Layer;
use lazarette_mountd::table::Table;
use lazarette_snapshotter::mountd::{
    MountServer, Mounted, Place, Shown, Through, clear, hide_whole, show_whole,
};
use lazarette_snapshotter::tree::Tree;
use tokio::runtime::Runtime;

use crate::bed::{end_servers, servers, soon};
use crate::checks::assert_same;
use crate::daemon::connect;
use crate::zone::{PATIENT, start_server};
use crate::{layer, must_be_root, sys};

/// Makes two tests, for root, of each function.
macro_rules! through_both {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                if must_be_root(stringify!($name)) {
                    [Through::Fuse, Through::Fanotify].into_iter().for_each(scenes::$name);
                }
            }
        )*
    };
}

through_both! {
    privileged_it_stays_whole_for_its_last_user_whoever_dies
    privileged_what_is_hidden_again_is_evicted_and_fetched_again
    privileged_another_server_and_another_daemon_go_on_with_it
}

/// A node: a server, what a daemon has of a layer, and what it has mounted.
struct Scene {
    origin: tempfile::TempDir,
    dir: tempfile::TempDir,
    process: Child,
    runtime: Runtime,
    layer: Arc<Layer>,
    server: MountServer,
    mounted: Mounted,
}

impl Scene {
    fn new(through: Through) -> Self {
        let (origin, dir) = (layer::write(), tempfile::tempdir().unwrap());
        let process = start_server(dir.path(), PATIENT, false);
        let runtime = Runtime::new().unwrap();
        let layer = layer::open(origin.path(), &dir.path().join("store"), &runtime);
        let (server, _) = connect(dir.path(), &runtime);
        let mounted = mount(&server, &layer, dir.path(), through);
        Self {
            origin,
            dir,
            process,
            runtime,
            layer,
            server,
            mounted,
        }
    }

    fn fill(&self) {
        self.runtime.block_on(self.layer.fill_all()).unwrap();
    }

    fn shows_whole(&self) -> bool {
        show_whole(&self.mounted, self.layer.file()).unwrap()
    }

    /// How many EROFS lie where the layer is.
    fn erofs(&self) -> usize {
        Table::read().unwrap().erofs_at(&self.mounted.path)
    }

    /// Somebody else who looks at the store.
    fn other(&self) -> Arc<Layer> {
        layer::open(
            self.origin.path(),
            &self.dir.path().join("store"),
            &self.runtime,
        )
    }

    /// A container that begins now.
    fn overlay(&self, name: &str) -> PathBuf {
        let merged = self.dir.path().join(name);
        fs::create_dir_all(&merged).unwrap();
        let (at, other) = (self.mounted.path.display(), self.origin.path().display());
        sys::mount_overlay(&merged, &format!("lowerdir={at}:{other}"));
        merged
    }

    /// Ends the server and its guard, or the server alone.
    fn kill(&mut self, guard_too: bool) {
        for (pid, is_guard) in servers(self.dir.path()) {
            if guard_too || !is_guard {
                sys::kill_by_id(pid);
            }
        }
        self.process.wait().unwrap();
    }

    /// A server again, of which we are the daemon; what it has mounted.
    fn begin_again(&mut self, take_over: bool) -> Vec<Mounted> {
        let process = start_server(self.dir.path(), PATIENT, take_over);
        let mut before = std::mem::replace(&mut self.process, process);
        before.wait().unwrap();
        let (server, mounts) = connect(self.dir.path(), &self.runtime);
        self.server = server;
        mounts
    }

    #[track_caller]
    fn is_right(&self, root: &Path) {
        for name in layer::files(self.origin.path()) {
            let read = layer::read_anew(&root.join(&name)).unwrap();
            assert_same(&read, &layer::content(self.origin.path(), &name), &name);
        }
    }

    /// The same, or it cannot be read.
    fn is_not_wrong(&self, root: &Path) {
        for name in layer::files(self.origin.path()) {
            if let Ok(read) = layer::read_anew(&root.join(&name)) {
                assert_same(&read, &layer::content(self.origin.path(), &name), &name);
            }
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for name in ["old", "new"] {
            sys::detach(&self.dir.path().join(name));
        }
        end_servers(self.dir.path());
        let _ = self.process.wait();
    }
}

fn mount(server: &MountServer, layer: &Arc<Layer>, dir: &Path, through: Through) -> Mounted {
    let tree = Tree::build(layer.index()).unwrap();
    let shown = Shown {
        blob_digest: layer.index().blob_digest,
        tree: &tree,
        data: Arc::clone(layer) as _,
        through,
    };
    let place = Place {
        path: &dir.join("mnt"),
        metadata: &dir.join("metadata"),
    };
    server.mount_shown(&shown, place).unwrap()
}

#[track_caller]
fn refuses_to_evict(layer: &Layer) {
    let refused = layer.file().evict_all().unwrap_err().to_string();
    assert!(refused.contains("evicting from layer"), "{refused}");
}

/// Reads so many files of which nobody has read anything, from number `first` on; their bytes.
fn read_fresh(scene: &Scene, first: usize, count: usize) -> usize {
    let read = |number| {
        let name = layer::fresh(number);
        let bytes = fs::read(scene.mounted.path.join(&name)).unwrap();
        assert_same(&bytes, &layer::content(scene.origin.path(), &name), &name);
        bytes.len()
    };
    (first..first + count).map(read).sum()
}

#[test]
fn privileged_what_was_read_through_fanotify_is_in_memory_once_when_all_is_there() {
    if !must_be_root(
        "privileged_what_was_read_through_fanotify_is_in_memory_once_when_all_is_there",
    ) {
        return;
    }
    let scene = Scene::new(Through::Fanotify);
    let read = read_fresh(&scene, 0, layer::FRESH / 2);
    scene.fill();
    let layers = fs::read_dir(scene.dir.path().join("store/layers")).unwrap();
    let data = layers
        .map(|layer| layer.unwrap().path().join("data"))
        .next();
    let data = File::options().read(true).write(true).open(data.unwrap());
    let data = data.unwrap();
    // As after a fetch: none of it is on the disk, so the kernel must not forget it.
    let mut bytes = Vec::new();
    (&data).read_to_end(&mut bytes).unwrap();
    data.write_all_at(&bytes, 0).unwrap();
    assert!(sys::cached_bytes(&data) >= bytes.len());
    let layer = scene.layer.as_ref();
    let len = layer.index().data_len;
    let told = scene.server.tell_complete(&scene.mounted, layer, len);
    assert!(told.unwrap());
    // The last question.
    read_fresh(&scene, layer::FRESH - 1, 1);
    let since = Instant::now();
    while sys::cached_bytes(&data) > bytes.len() - read / 2 {
        let late = since.elapsed() > Duration::from_secs(60);
        assert!(
            !late,
            "{} of {} bytes",
            sys::cached_bytes(&data),
            bytes.len()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    scene.is_right(&scene.mounted.path);
}

mod scenes {
    use super::*;

    pub(super) fn privileged_it_stays_whole_for_its_last_user_whoever_dies(through: Through) {
        let mut scene = Scene::new(through);
        let old = scene.overlay("old");
        assert!(!scene.shows_whole(), "nothing of it is there");
        scene.fill();
        assert!(scene.shows_whole() && scene.shows_whole());
        assert_eq!(scene.erofs(), 2, "once");
        let new = scene.overlay("new");
        let name = layer::fresh(3);
        let held = File::open(scene.mounted.path.join(&name)).unwrap();
        refuses_to_evict(&scene.layer);
        scene.is_right(&old);
        scene.kill(true);
        // The server's lock is gone. What has not ended is known all the same.
        refuses_to_evict(&scene.layer);
        refuses_to_evict(&scene.other());
        scene.is_right(&new);
        scene.is_right(&scene.mounted.path);
        let others = |path: &Path| path != scene.mounted.path;
        assert_eq!(clear(scene.dir.path(), &others).unwrap(), 1);
        assert!(!scene.mounted.path.exists());
        refuses_to_evict(&scene.layer);
        scene.is_right(&new);
        scene.is_not_wrong(&old);
        sys::unmount(&old);
        sys::unmount(&new);
        // A file that is open is the last one that needs it.
        refuses_to_evict(&scene.other());
        sys::forget(&held);
        let mut read = Vec::new();
        (&held).read_to_end(&mut read).unwrap();
        let origin = layer::content(scene.origin.path(), &name);
        assert_same(&read, &origin, &name);
        drop(held);
        assert!(layer::evict_soon(&scene.other()) > 0);
        assert!(scene.begin_again(false).is_empty());
        scene.mounted = mount(&scene.server, &scene.layer, scene.dir.path(), through);
        assert!(!scene.shows_whole(), "it was evicted");
        scene.is_right(&scene.mounted.path);
        scene.fill();
        assert!(scene.shows_whole());
        scene.is_right(&scene.mounted.path);
    }

    pub(super) fn privileged_what_is_hidden_again_is_evicted_and_fetched_again(through: Through) {
        let scene = Scene::new(through);
        scene.fill();
        let len = scene.layer.index().data_len;
        let layer = scene.layer.as_ref();
        let told = scene.server.tell_complete(&scene.mounted, layer, len);
        assert!(told.unwrap() && scene.shows_whole());
        let new = scene.overlay("new");
        assert!(soon(|| hide_whole(&scene.mounted)));
        assert!(!hide_whole(&scene.mounted).unwrap(), "it is");
        assert_eq!(scene.erofs(), 1);
        refuses_to_evict(&scene.layer);
        scene.is_right(&new);
        sys::unmount(&new);
        if through == Through::Fanotify {
            // The one below has the same rule.
            refuses_to_evict(&scene.layer);
        } else {
            assert!(layer::evict_soon(&scene.layer) > 0);
            assert!(!scene.shows_whole());
            scene.is_right(&scene.mounted.path);
            scene.fill();
        }
        assert!(scene.shows_whole());
        scene.is_right(&scene.mounted.path);
        soon(|| scene.server.unmount_layer(&scene.mounted));
        assert!(!scene.mounted.path.exists());
        assert!(layer::evict_soon(&scene.layer) > 0);
    }

    pub(super) fn privileged_another_server_and_another_daemon_go_on_with_it(through: Through) {
        let mut scene = Scene::new(through);
        scene.fill();
        assert!(scene.shows_whole());
        for take_over in [true, false] {
            if !take_over {
                scene.kill(false);
            }
            let mounts = scene.begin_again(take_over);
            assert_eq!(mounts, [scene.mounted.clone()]);
            // A daemon that has seen nothing of the layer yet.
            scene.layer = scene.other();
            let metadata = scene.dir.path().join("metadata");
            let no_tree = || unreachable!("it is mounted");
            let data = Arc::clone(&scene.layer) as _;
            let attached = scene
                .server
                .attach_layer(&scene.mounted, no_tree, data, &metadata);
            attached.unwrap();
            assert!(scene.shows_whole());
            assert_eq!(scene.erofs(), 2);
            refuses_to_evict(&scene.layer);
            scene.is_right(&scene.mounted.path);
        }
        soon(|| scene.server.unmount_layer(&scene.mounted));
        assert_eq!(scene.erofs(), 0);
        assert!(layer::evict_soon(&scene.layer) > 0);
    }
}
