//! News in every order, about layers that are really mounted.

use std::fs;
use std::io::Write as _;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use lazarette_fetcher::prefetch::{PAGE_BYTES, Place};
use lazarette_fetcher::store::Kept;
use lazarette_fetcher::test_util::layers::layer_of;
use lazarette_snapshotter::data::{Filling, LayerData};
use lazarette_snapshotter::fuse::{FuseOptions, LayerMount, LayerMounts, ReadAhead};
use tokio::runtime::Handle;

use super::*;

/// Longest wait for what has to happen, on a machine that does much else.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Length of the file, two blocks.
const LEN: usize = 128 << 10;

/// Data of which everything is present.
struct All {
    bytes: Vec<u8>,
    asked: AtomicU64,
}

impl LayerData for All {
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> lazarette_fetcher::Result<bool> {
        self.asked.fetch_add(buf.len() as u64, Ordering::Relaxed);
        let start = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.bytes[start..start + buf.len()]);
        Ok(true)
    }

    fn fill(&self, _: ByteRange) -> Filling<'_> {
        Box::pin(async { Ok(()) })
    }

    fn keep(&self) -> lazarette_fetcher::Result<Kept> {
        Ok(Kept::default())
    }
}

/// A mounted layer of one file.
struct Fixture {
    data: Arc<All>,
    tree: Arc<Tree>,
    mount: Arc<LayerMount>,
    file: PathBuf,
    _dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let bytes: Vec<u8> = (0..=250).cycle().take(LEN).collect();
        let index = layer_of("warmed", std::slice::from_ref(&bytes));
        let tree = Arc::new(Tree::build(&index).unwrap());
        let data = Arc::new(All {
            bytes,
            asked: AtomicU64::new(0),
        });
        let dir = tempfile::tempdir().unwrap();
        let mounts = LayerMounts::new(dir.path(), Handle::current(), FuseOptions::default());
        let shown = Arc::clone(&data) as Arc<dyn LayerData>;
        let mount = mounts.mount(index.blob_digest, Arc::clone(&tree), shown);
        let mount = mount.unwrap();
        mount.read_ahead(ReadAhead::Narrow);
        let name = fs::read_dir(mount.path()).unwrap().next().unwrap();
        Self {
            data,
            tree,
            file: name.unwrap().path(),
            mount,
            _dir: dir,
        }
    }

    fn asked(&self) -> u64 {
        self.data.asked.load(Ordering::Relaxed)
    }

    /// Says one of three things: that the second block's first eight pages are wanted, where the
    /// layer is mounted, or that all but the first two of these pages are present.
    fn say(&self, news: &WarmingNews, which: usize) {
        let (block, pages) = (1, 0xff);
        match which {
            0 => news.wanted(&Places::from([(7, vec![(0, Place { block, pages })])])),
            1 => {
                let tree = Arc::clone(&self.tree);
                news.mounted(7, self.mount.path(), || Some(tree));
            }
            _ => {
                let from = (64 << 10) + 2 * PAGE_BYTES;
                let range = ByteRange::new(from, LEN as u64).unwrap();
                news.on_present()(7, vec![range]);
            }
        }
    }

    async fn wait_for(&self, asked: u64) {
        let since = Instant::now();
        while self.asked() < asked {
            assert!(since.elapsed() < WAIT_MAX, "{} of {asked}", self.asked());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

fn is_root(test: &str) -> bool {
    let is_root = crate::sys::process::is_root();
    if !is_root {
        // Not through print!, which a passing test swallows.
        let _ = writeln!(std::io::stderr(), "SKIPPED (needs root): {test}");
    }
    is_root
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_is_wanted_and_present_is_read_in_whatever_order_it_is_said() {
    if !is_root("what_is_wanted_and_present_is_read_in_whatever_order_it_is_said") {
        return;
    }
    let orders = [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ];
    for order in orders {
        let fixture = Fixture::new();
        let warming = Warming::begin();
        for which in order {
            assert_eq!(fixture.asked(), 0);
            fixture.say(warming.news(), which);
        }
        fixture.wait_for(6 * PAGE_BYTES).await;
        warming.stop().await;
        assert_eq!(fixture.asked(), 6 * PAGE_BYTES, "{order:?}");
        let read = fs::read(&fixture.file).unwrap();
        assert!(read == fixture.data.bytes);
        // No page came twice.
        assert_eq!(fixture.asked(), LEN as u64, "{order:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_nothing_is_read_once_it_is_over() {
    if !is_root("nothing_is_read_once_it_is_over") {
        return;
    }
    let fixture = Fixture::new();
    let warming = Warming::begin();
    let news = warming.news().clone();
    fixture.say(&news, 0);
    warming.stop().await;
    fixture.say(&news, 1);
    fixture.say(&news, 2);
    assert_eq!(fixture.asked(), 0);
    let gone = Warming::begin();
    gone.news().mounted(0, Path::new("/nowhere"), || None);
    gone.news().wanted(&Places::from([(0, Vec::new())]));
    gone.stop().await;
}
