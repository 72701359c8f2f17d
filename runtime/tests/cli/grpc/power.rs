//! A node whose power fails: what its disk was not made to keep is lost.
//!
//! Promise: whatever was answered before is there, with its parent, its usage and its bytes,
//! without a registry; nothing is half there; and what the store says is present is on the disk.
//! That is all of a snapshot that is committed. Of an active one there is a directory, and of
//! what was written to it what the container had synced, as on any disk.
//!
//! A node works on an ext4 whose [`disk`](crate::disk) remembers in which order it was told what.
//! Of that, images are made of the disk as many power cuts would leave it, and each is mounted
//! and opened by another node. All of it runs [`confined`].

mod check;
mod work;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lazarette_fetcher::test_util::FakeRegistry;
use parking_lot::Mutex;
use tokio::task::JoinSet;

use self::check::{Check, Seen};
use super::crash::log::Log;
use super::crash::{Image, push_all};
use crate::confined;
use crate::disk::{Cut, Disk, History, Kind, Loses};
use crate::support::{estargz, gzipped, is_root};

/// Names how many cuts to try, for a longer run.
const CUTS_ENV: &str = "LAZ_POWER_CUTS";
const CUTS: usize = 72;
/// Names another file system than ext4.
const KIND_ENV: &str = "LAZ_POWER_FS";
/// Cuts that are looked at at a time.
const AT_ONCE: usize = 3;
const WORKERS: usize = 2;

/// Half of the cuts come right after an answer, and take all that they may. The others come
/// before a flush is over, and take some of it. Spread evenly over the history; in order.
fn choose(history: &History, answers: &[u64], count: usize) -> Vec<Cut> {
    let spread = |of: &[u64], count: usize| -> Vec<u64> {
        let count = count.min(of.len());
        (0..count).map(|n| of[n * of.len() / count]).collect()
    };
    let after = spread(answers, count / 2);
    let after = after.into_iter().map(|at| (at, Loses::All));
    // The position of a flush less one is that of the last write before it.
    let before = spread(&history.flushes(), count - count / 2);
    let kinds = [
        Loses::Sectors,
        Loses::Writes,
        Loses::Nothing,
        Loses::Sectors,
    ];
    let before = before
        .into_iter()
        .map(|at| at - 1)
        .zip(kinds.into_iter().cycle());
    let mut cuts: Vec<_> = after.chain(before).collect();
    cuts.sort_by_key(|(at, _)| *at);
    let cuts = cuts.into_iter().zip(0..);
    cuts.map(|((at, loses), seed)| Cut { at, loses, seed })
        .collect()
}

fn pushed(registry: &FakeRegistry) -> (Vec<Image>, work::Data) {
    let pack = |layer, tar| match layer {
        // Streamed in full, as nothing says where its files are.
        2 => gzipped(tar),
        _ => estargz(tar),
    };
    let mut images = push_all(registry, WORKERS, pack);
    let (image, data) = work::Data::push(registry);
    images.push(image);
    (images, data)
}

/// Tries all cuts, some at a time; what was seen.
async fn try_all(
    check: &Arc<Check>,
    dir: &Path,
    (disk, history): (&Disk, &History),
    cuts: &[Cut],
) -> Seen {
    let mut platter = disk.platter(history);
    let (mut trying, mut seen) = (JoinSet::new(), Seen::default());
    for (number, cut) in cuts.iter().enumerate() {
        while trying.len() >= AT_ONCE {
            seen.add(trying.join_next().await.unwrap().unwrap());
        }
        let dir = dir.join(format!("cut-{number}"));
        std::fs::create_dir(&dir).unwrap();
        let [left, all] = platter.cut(cut, &dir.join("image"));
        seen.lost += all - left;
        let (check, cut) = (Arc::clone(check), *cut);
        trying.spawn(async move { check.after(&cut, &dir, number).await });
    }
    while let Some(tried) = trying.join_next().await {
        seen.add(tried.unwrap());
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "another test runs it, where it leaves nothing"]
async fn node_that_loses_its_power() {
    let dir = confined::dir();
    let kind = match std::env::var(KIND_ENV).as_deref() {
        Ok("xfs") => Kind::Xfs,
        Ok("btrfs") => Kind::Btrfs,
        _ => Kind::Ext4,
    };
    let disk = Disk::new(&dir.join("disk"), kind);
    let works = dir.join("node");
    let mounted = disk.mount(&works.join("root"));
    let registry = FakeRegistry::start().await;
    let (images, data) = pushed(&registry);
    let log = dir.join("log");
    let written = Mutex::new(Log::timed(&log, Box::new(disk.clock())));
    let synced = work::work(&works, (&images, &data), &written, disk.clock()).await;
    drop((registry, mounted));
    let history = disk.history();
    let answers = Log::answers(&log);
    let count = std::env::var(CUTS_ENV).map_or(CUTS, |count| count.parse().unwrap());
    let cuts = choose(&history, &answers, count);
    let check = Arc::new(Check {
        kind,
        images,
        data,
        log,
        synced,
    });
    let seen = try_all(&check, &dir, (&disk, &history), &cuts).await;
    let flushes = history.flushes().len();
    let _ = writeln!(
        std::io::stderr(),
        "{} cuts of {flushes} flushes and {} answers: {seen:?}",
        cuts.len(),
        answers.len()
    );
    seen.must_be_of_everything();
}

#[test]
fn privileged_a_node_that_loses_its_power_keeps_what_it_answered() {
    if is_root("privileged_a_node_that_loses_its_power_keeps_what_it_answered") {
        let said = confined::run("grpc::power::node_that_loses_its_power");
        let line = said.lines().find(|line| line.contains(" cuts of "));
        let _ = writeln!(std::io::stderr(), "{}", line.unwrap_or_default());
    }
}

/// What is mounted nowhere else and holds a container's files.
fn container_of(dir: &Path) -> PathBuf {
    dir.join("container")
}
