//! Everything that takes part in a read is killed, replaced or made to fail, at every point.
//! What is read is compared then and afterwards, from what the kernel kept and anew: a page of
//! zeros that was once taken for data would still be there.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use lazarette_mountd::table::Table;
use lazarette_snapshotter::mountd::{LentData as _, Place, Shown, Through, clear};
use lazarette_snapshotter::tree::Tree;
use rand::Rng as _;
use tokio::runtime::Runtime;

use crate::bed::{end_servers, servers, soon};
use crate::checks::assert_same;
use crate::daemon::{DEATHS, Does, connect};
use crate::layer::Form;
use crate::zone::{PATIENT, READERS, Reading, Zone, start_server};
use crate::{layer, must_be_root, sys};

/// Makes two tests, for root, of each function that takes what the kernel gets data through.
macro_rules! through_both {
    ($($name:ident)*) => {
        through_both!(@ fuse Fuse $($name)*);
        through_both!(@ fanotify Fanotify $($name)*);
    };
    (@ $module:ident $through:ident $($name:ident)*) => {
        mod $module {
            use lazarette_snapshotter::mountd::Through;
            $(
                #[test]
                fn $name() {
                    let test = concat!(stringify!($module), "::", stringify!($name));
                    if crate::must_be_root(test) {
                        super::$name(Through::$through);
                    }
                }
            )*
        }
    };
}

through_both! {
    privileged_a_daemon_may_die_at_any_point_of_a_fill
    privileged_a_daemon_may_die_at_any_point_of_a_fill_of_any_form
    privileged_a_daemon_may_die_while_it_shows_a_layer_whole_or_hides_it
    privileged_a_daemon_that_fails_is_an_error_and_not_remembered
    privileged_without_a_daemon_a_read_fails_in_the_end
    privileged_a_server_that_dies_is_an_error_and_not_remembered
    privileged_a_server_may_be_replaced_while_reads_wait
    privileged_a_successor_that_dies_is_an_error_and_not_remembered
    privileged_a_guard_that_dies_is_replaced
    privileged_readers_that_are_killed_leave_nothing_wrong
    privileged_after_the_death_of_all_a_new_mount_is_right
    privileged_a_guard_with_nothing_to_guard_ends
}

fn privileged_a_daemon_may_die_at_any_point_of_a_fill(through: Through) {
    let zone = Zone::new(through, PATIENT);
    let mut inside = 0;
    for does in DEATHS.into_iter().cycle().take(5 * DEATHS.len()) {
        let mut daemon = zone.daemon(does);
        let reads = [zone.read_fresh(), zone.read_fresh()];
        daemon.wait();
        inside += u32::from(does == Does::DiesWhile && !daemon.has_filled());
        let _daemon = zone.daemon(Does::Right);
        reads.into_iter().for_each(Reading::succeeds);
    }
    assert!(inside > 0, "no death fell inside a fill");
    zone.check_all();
}

/// Files that lie in as much of a layer as a span has; large and small ones come by turns then.
const SPAN_FILES: usize = 6;
/// Most tries to have a daemon die inside a fill: it takes about as long as such a daemon lives, and
/// the one before may have brought all of it.
const TRIES_MAX: usize = 9;

fn privileged_a_daemon_may_die_at_any_point_of_a_fill_of_any_form(through: Through) {
    for form in [Form::Spans, Form::Members] {
        let zone = Zone::of(form, through, PATIENT);
        let die = |does| {
            let mut daemon = zone.daemon(does);
            let read = zone.read_behind(SPAN_FILES);
            daemon.wait();
            let _daemon = zone.daemon(Does::Right);
            read.succeeds();
            !daemon.has_filled()
        };
        for does in DEATHS.into_iter().filter(|does| *does != Does::DiesWhile) {
            die(does);
        }
        let inside = (0..TRIES_MAX).any(|_| die(Does::DiesWhile));
        assert!(inside, "{form:?}: no death fell inside a fill");
        zone.check_all();
    }
}

/// Times that it does.
const SHOWS: usize = 20;
/// Files that are read meanwhile.
const READS_MIN: u64 = 100;

fn privileged_a_daemon_may_die_while_it_shows_a_layer_whole_or_hides_it(through: Through) {
    let zone = Zone::new(through, PATIENT);
    let names = layer::files(zone.origin.path());
    let (stop, read) = (AtomicBool::new(false), AtomicU64::new(0));
    let (mut inside, mut last) = (0, None);
    std::thread::scope(|threads| {
        let reader = |first| {
            for name in names.iter().cycle().skip(first) {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                match layer::read_anew(&zone.path(name)) {
                    Ok(bytes) => {
                        assert_same(&bytes, &layer::content(zone.origin.path(), name), name);
                        read.fetch_add(1, Ordering::Relaxed);
                    }
                    // Before there is a mount.
                    Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound, "{error}"),
                }
            }
        };
        let _stop = StopOnDrop(&stop);
        let readers = [0, 100].map(|first| threads.spawn(move || reader(first)));
        let mut rng = rand::rng();
        for _ in 0..SHOWS {
            let mut daemon = zone.daemon(Does::Shows);
            daemon.wait_for_change();
            std::thread::sleep(Duration::from_micros(rng.random_range(0..8000)));
            daemon.kill();
            inside += u32::from(daemon.is_inside());
        }
        // Each of them goes on, however slowly, while somebody shows the layer.
        let mut daemon = zone.daemon(Does::Shows);
        while read.load(Ordering::Relaxed) <= READS_MIN {
            assert!(
                readers.iter().all(|reader| !reader.is_finished()),
                "one failed"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        daemon.kill();
        assert!(
            readers.iter().all(|reader| !reader.is_finished()),
            "one failed"
        );
        // Whoever waits for bytes gets them, and ends.
        last = Some(zone.daemon(Does::Right));
    });
    drop(last);
    assert!(inside > 2, "{inside} deaths fell inside");
    assert!(
        Table::read().unwrap().erofs_at(&zone.path("")) <= 2,
        "shown twice"
    );
    zone.check_all();
}

/// Tells readers to end, also where the test fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn privileged_a_daemon_that_fails_is_an_error_and_not_remembered(through: Through) {
    let zone = Zone::new(through, PATIENT);
    let mut daemon = zone.daemon(Does::Fails);
    zone.read_some_fresh().into_iter().for_each(Reading::fails);
    daemon.kill();
    zone.check_all();
}

fn privileged_without_a_daemon_a_read_fails_in_the_end(through: Through) {
    let zone = Zone::new(through, 1);
    zone.daemon(Does::Right).kill();
    zone.read_some_fresh().into_iter().for_each(Reading::fails);
    zone.check_all();
}

fn privileged_a_server_that_dies_is_an_error_and_not_remembered(through: Through) {
    let mut zone = Zone::new(through, PATIENT);
    for _ in 0..3 {
        let mut daemon = zone.daemon(Does::Hangs);
        let reads = zone.read_some_fresh();
        daemon.wait_for_asked(READERS);
        zone.kill_server();
        reads.into_iter().for_each(Reading::fails);
        zone.read_some_fresh().into_iter().for_each(Reading::fails);
        assert!(zone.path(layer::ECHO).exists(), "names go on");
        zone.start_server();
        daemon.kill();
        let _daemon = zone.daemon(Does::Right);
        let reads = zone.read_some_fresh();
        reads.into_iter().for_each(Reading::succeeds);
    }
    zone.check_all();
}

fn privileged_a_server_may_be_replaced_while_reads_wait(through: Through) {
    let mut zone = Zone::new(through, PATIENT);
    let mut daemon = zone.daemon(Does::Hangs);
    let mut reads = Vec::new();
    for _ in 0..4 {
        reads.extend(zone.read_some_fresh());
        // It is asked again for those that waited before.
        daemon.wait_for_asked(reads.len());
        zone.replace_server();
    }
    assert!(reads.iter().all(Reading::waits));
    daemon.kill();
    let _daemon = zone.daemon(Does::Right);
    reads.into_iter().for_each(Reading::succeeds);
    zone.compare_all();
}

fn privileged_a_successor_that_dies_is_an_error_and_not_remembered(through: Through) {
    let mut zone = Zone::new(through, PATIENT);
    let mut daemon = zone.daemon(Does::Hangs);
    let mut reads = zone.read_some_fresh();
    daemon.wait_for_asked(READERS);
    zone.replace_server();
    reads.extend(zone.read_some_fresh());
    daemon.wait_for_asked(2 * READERS);
    zone.kill_server();
    reads.into_iter().for_each(Reading::fails);
    zone.start_server();
    daemon.kill();
    zone.check_all();
}

fn privileged_a_guard_that_dies_is_replaced(through: Through) {
    let mut zone = Zone::new(through, PATIENT);
    let mut daemon = zone.daemon(Does::Hangs);
    let first = zone.guard().unwrap();
    sys::kill_by_id(first);
    let second = loop {
        match zone.guard() {
            Some(pid) if pid != first => break pid,
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    let reads = zone.read_some_fresh();
    daemon.wait_for_asked(READERS);
    zone.kill_server();
    reads.into_iter().for_each(Reading::fails);
    assert_eq!(zone.guard(), Some(second));
    zone.start_server();
    daemon.kill();
    zone.check_all();
}

fn privileged_readers_that_are_killed_leave_nothing_wrong(through: Through) {
    let zone = Zone::new(through, PATIENT);
    let _daemon = zone.daemon(Does::Right);
    let mut rng = rand::rng();
    for number in 0..layer::FRESH {
        let names = [layer::fresh(number), "sizes/1500001".to_owned()];
        let mut readers: Vec<Child> = names
            .iter()
            .map(|name| {
                let mut command = Command::new("cat");
                let command = command.arg(zone.path(name)).stdout(Stdio::null());
                command.stderr(Stdio::null()).spawn().unwrap()
            })
            .collect();
        std::thread::sleep(Duration::from_micros(rng.random_range(0..6000)));
        for reader in &mut readers {
            reader.kill().unwrap();
            reader.wait().unwrap();
        }
        for name in names {
            let origin = layer::content(zone.origin.path(), &name);
            assert_same(&fs::read(zone.path(&name)).unwrap(), &origin, &name);
            // The next reader is killed while it reads from the disk.
            sys::forget(&fs::File::open(zone.path(&name)).unwrap());
        }
    }
    zone.compare_all();
}

fn privileged_after_the_death_of_all_a_new_mount_is_right(through: Through) {
    let mut zone = Zone::new(through, PATIENT);
    let mut daemon = zone.daemon(Does::Right);
    zone.read_fresh().succeeds();
    daemon.kill();
    for (pid, _) in servers(zone.dir.path()) {
        sys::kill_by_id(pid);
    }
    zone.server.wait().unwrap();
    // Whoever has something open of what was mounted may read anything now: nobody answers for
    // it, and it is taken down.
    zone.start_server();
    let mut daemon = zone.daemon(Does::Right);
    zone.compare_all();
    daemon.kill();
    for (pid, _) in servers(zone.dir.path()) {
        sys::kill_by_id(pid);
    }
    zone.server.wait().unwrap();
    let orphan = zone.dir.path().join("mnt");
    assert_eq!(clear(zone.dir.path(), &|path| path != orphan).unwrap(), 1);
    assert!(!orphan.exists());
    zone.start_server();
    zone.check_all();
}

fn privileged_a_guard_with_nothing_to_guard_ends(through: Through) {
    let mut zone = Zone::new(through, PATIENT);
    zone.daemon(Does::Right).kill();
    zone.kill_server();
    assert!(zone.guard().is_some());
    zone.read_fresh().fails();
    for _ in 0..2 {
        sys::detach(&zone.path(""));
    }
    while zone.guard().is_some() {
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn privileged_what_is_shown_through_fanotify_is_kept_and_ends_with_its_last_user() {
    if !must_be_root(
        "privileged_what_is_shown_through_fanotify_is_kept_and_ends_with_its_last_user",
    ) {
        return;
    }
    let origin = layer::write();
    let dir = tempfile::tempdir().unwrap();
    let _server = Ends(start_server(dir.path(), PATIENT, false), dir.path());
    let runtime = Runtime::new().unwrap();
    let data = layer::open(origin.path(), &dir.path().join("store"), &runtime);
    let (server, _) = connect(dir.path(), &runtime);
    let tree = Tree::build(data.index()).unwrap();
    let shown = Shown {
        blob_digest: data.index().blob_digest,
        tree: &tree,
        data: Arc::clone(&data) as _,
        through: Through::Fanotify,
    };
    let [at, metadata, merged] = ["mnt", "metadata", "merged"].map(|name| dir.path().join(name));
    let (path, metadata) = (at.as_path(), metadata.as_path());
    let mounted = server
        .mount_shown(&shown, Place { path, metadata })
        .unwrap();
    let len = data.index().data_len;
    let first = layer::fresh(0);
    assert!(!server.tell_complete(&mounted, data.as_ref(), len).unwrap());
    fs::read(at.join(&first)).unwrap();
    assert!(data.file().evict_all().is_err(), "its bytes stay");
    assert_eq!(asked_about(dir.path()), [true]);

    // A second mount of the same data takes nobody's answers along when it ends.
    fs::create_dir_all(&merged).unwrap();
    let lowers = format!("lowerdir={}:{}", at.display(), origin.path().display());
    sys::mount_overlay(&merged, &lowers);
    assert!(server.unmount_layer(&mounted).is_err(), "somebody uses it");
    let path = at.with_file_name("mnt2");
    let path = path.as_path();
    let second = server
        .mount_shown(&shown, Place { path, metadata })
        .unwrap();
    soon(|| server.unmount_layer(&second));
    let late = layer::fresh(layer::FRESH - 1);
    let read = fs::read(merged.join(&late)).unwrap();
    assert_same(&read, &layer::content(origin.path(), &late), &late);

    runtime.block_on(data.fill_all()).unwrap();
    assert!(server.tell_complete(&mounted, data.as_ref(), len).unwrap());
    // The next question is the last one.
    while asked_about(dir.path()) != [false] {
        layer::read_anew(&merged.join(&first)).unwrap();
    }
    assert!(data.file().evict_all().is_err(), "its bytes stay");
    drop(shown);
    assert!(server.unmount_layer(&mounted).is_err(), "somebody uses it");
    for name in layer::files(origin.path()) {
        let read = layer::read_anew(&merged.join(&name)).unwrap();
        assert_same(&read, &layer::content(origin.path(), &name), &name);
    }
    sys::unmount(&merged);
    soon(|| server.unmount_layer(&mounted));
    assert_eq!(asked_about(dir.path()), [false; 0]);
    layer::evict_soon(&data);
    // As padded as it is, it is the same layer.
    assert!(
        data.vouch(lazarette_fetcher::types::ByteRange::new(0, 1).unwrap())
            .is_ok()
    );
    layer::open(origin.path(), &dir.path().join("store"), &runtime);
}

/// Of each mark that a server in `dir` has: whether it is asked.
fn asked_about(dir: &Path) -> Vec<bool> {
    let mut servers = servers(dir).into_iter();
    let (pid, _) = servers.find(|(_, is_guard)| !is_guard).unwrap();
    let facts = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let facts = facts.filter_map(|fact| fs::read_to_string(fact.unwrap().path()).ok());
    let all: String = facts.collect();
    let marks = all
        .lines()
        .filter(|line| line.starts_with("fanotify mnt_id"));
    marks.map(|mark| mark.contains("mask:100")).collect()
}

/// A server that ends with its test.
struct Ends<'a>(Child, &'a Path);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        sys::detach(&self.1.join("merged"));
        end_servers(self.1);
        let _ = self.0.wait();
    }
}
