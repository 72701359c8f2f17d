//! Children: what they are told, what they do, and what they say of it.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::atomic::AtomicBool;

use lazarette_fetcher::index::ChunkId;
use lazarette_fetcher::store::Store;

use crate::support::{StopOnDrop, disturb, evict_at_random, fill, index, ingest};

pub(crate) const DIR: &str = "LAZARETTE_SHARED_STORE_DIR";
pub(crate) const WORK: &str = "LAZARETTE_SHARED_STORE_WORK";
pub(crate) const SEED: &str = "LAZARETTE_SHARED_STORE_SEED";

pub(crate) fn work(root: &Path, work: &str, seed: u64) {
    let store = Store::open(root).unwrap();
    let say = |batch: &[ChunkId]| eprintln!("flushed {batch:?}");
    match work {
        "fill" => fill(&store, "shared", seed, say),
        "evict" => {
            let file = store.open_layer(&index("shared").blob_digest);
            let file = file.unwrap().unwrap();
            let stop = AtomicBool::new(false);
            eprintln!("evicting");
            std::thread::scope(|threads| {
                threads.spawn(|| disturb(&file, seed + 1, &stop));
                let _stop = StopOnDrop(&stop);
                evict_at_random(&file, seed, 100);
            });
        }
        "ingest" => ingest(&store, "whole", || {
            eprintln!("begun");
            // Until the parent says so by closing its end.
            std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        }),
        "everything" => {
            for n in 0_u32.. {
                let name = format!("whole{}", n % 3);
                ingest(&store, &name, || {});
                eprintln!("whole {name}");
                fill(&store, "shared", seed + u64::from(n), say);
                store.remove_layer(&index(&name).blob_digest).unwrap();
            }
        }
        other => panic!("unknown work {other}"),
    }
}

/// A child and the lines it says.
pub(crate) struct Worker {
    pub(crate) child: Child,
    pub(crate) lines: std::io::Lines<BufReader<ChildStderr>>,
}

impl Worker {
    pub(crate) fn start(root: &Path, work: &str, seed: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored", "--nocapture"])
            .args(["--test-threads", "1"])
            .env(DIR, root)
            .env(WORK, work)
            .env(SEED, seed.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        Self { child, lines }
    }

    /// The next line; `None` at the end of its work.
    pub(crate) fn line(&mut self) -> Option<String> {
        let line = self.lines.next().expect("it says when it ends").unwrap();
        assert!(!line.contains("panicked"), "{line}");
        (line != "end").then_some(line)
    }

    pub(crate) fn finish(mut self) {
        drop(self.child.stdin.take());
        while self.line().is_some() {}
        assert!(self.child.wait().unwrap().success());
    }

    /// SIGKILL, wherever it is; returns what it had said before it died.
    pub(crate) fn kill(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let mut said = String::new();
        for line in self.lines {
            said.push_str(&line.unwrap());
            said.push('\n');
        }
        assert!(!said.contains("panicked"), "{said}");
        // A line cut short by the kill has not been said.
        said.lines().map(str::to_owned).collect()
    }
}

/// The ids in a line "flushed [1, 2]"; none in any other or in one cut short.
pub(crate) fn ids(line: &str) -> Vec<ChunkId> {
    let list = line.strip_prefix("flushed [");
    let list = list.and_then(|list| list.strip_suffix(']'));
    list.map(|list| list.split(", ").map(|id| id.parse().unwrap()).collect())
        .unwrap_or_default()
}
