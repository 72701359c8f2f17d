//! Noting what a start reads.
//!
//! A [`Recorder`] gives out one tap per layer; a tap stands between a mount and its layer.
//! What it notes is what the kernel asks for, which is more than programs do: read-ahead
//! is in it, and with it what the next start will ask for too.
//!
//! Invariant: a read that touches nothing new costs two relaxed loads per 64 KiB, and no
//! read waits for anything but a push onto a list. Never changes what a read returns.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::prefetch::{BLOCK_BYTES, PAGE_BYTES, Place};
use lazarette_fetcher::store::Kept;
use lazarette_fetcher::types::ByteRange;
use lazarette_snapshotter::data::{Filling, LayerData};
use parking_lot::Mutex;

use super::document::BLOCKS_MAX;

/// Blocks of one layer that can be told apart: 64 GiB of data, in 2 MiB of memory. What is
/// behind them is not recorded.
const LAYER_BLOCKS_MAX: u64 = 1 << 20;

/// Pages of a block that a start read, blocks in the order of their first read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touch {
    /// Position of the layer, from the base.
    pub layer: u32,
    /// Where in its data file.
    pub place: Place,
}

/// What one start has read so far.
#[derive(Debug)]
pub struct Recorder {
    began: Instant,
    closed: AtomicBool,
    /// When something new was read last, in milliseconds since `began`.
    news_ms: AtomicU64,
    /// Reads that wait for data.
    waiting: AtomicU32,
    order: Mutex<Order>,
}

#[derive(Debug, Default)]
struct Order {
    taps: Vec<(u32, Arc<Pages>)>,
    /// Position in `taps`, and block.
    first: Vec<(usize, u32)>,
}

/// Pages of one layer that were read, sixteen per block.
type Pages = [AtomicU16];

impl Recorder {
    /// Nothing has been read.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            began: Instant::now(),
            closed: AtomicBool::new(false),
            news_ms: AtomicU64::new(0),
            waiting: AtomicU32::new(0),
            order: Mutex::default(),
        })
    }

    /// `inner`, which is layer `number` of the image, with its reads noted.
    pub fn tap(self: &Arc<Self>, number: u32, inner: Arc<Layer>) -> Arc<dyn LayerData> {
        let data_len = inner.index().data_len;
        self.tap_data(number, inner, data_len)
    }

    /// [`Self::tap`] over any data file of `data_len` bytes.
    pub fn tap_data(
        self: &Arc<Self>,
        number: u32,
        inner: Arc<dyn LayerData>,
        data_len: u64,
    ) -> Arc<dyn LayerData> {
        let blocks = data_len.div_ceil(BLOCK_BYTES).min(LAYER_BLOCKS_MAX);
        let pages: Arc<Pages> = (0..blocks).map(|_| AtomicU16::new(0)).collect();
        let mut order = self.order.lock();
        let slot = order.taps.len();
        order.taps.push((number, Arc::clone(&pages)));
        Arc::new(Tap {
            recorder: Arc::clone(self),
            slot,
            pages,
            inner,
        })
    }

    /// Notes nothing any more.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// What has been read.
    pub fn touches(&self) -> Vec<Touch> {
        let order = self.order.lock();
        let touch = |(slot, block): &(usize, u32)| {
            let (layer, pages) = order.taps.get(*slot)?;
            let pages = pages.get(usize::try_from(*block).ok()?)?;
            let place = Place {
                block: *block,
                pages: pages.load(Ordering::Relaxed),
            };
            Some(Touch {
                layer: *layer,
                place,
            })
        };
        order.first.iter().filter_map(touch).collect()
    }

    /// Whether anything has been read.
    pub fn has_any(&self) -> bool {
        !self.order.lock().first.is_empty()
    }

    /// Whether a read waits for data.
    pub fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// How long nothing new has been read.
    pub fn quiet_for(&self) -> Duration {
        let news = Duration::from_millis(self.news_ms.load(Ordering::Relaxed));
        self.began.elapsed().saturating_sub(news)
    }

    fn note_first(&self, slot: usize, block: u32) {
        let mut order = self.order.lock();
        if order.first.len() < BLOCKS_MAX {
            order.first.push((slot, block));
        }
    }

    fn note_news(&self) {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.news_ms.fetch_max(now, Ordering::Relaxed);
    }
}

/// One layer's reads on their way through.
struct Tap {
    recorder: Arc<Recorder>,
    slot: usize,
    pages: Arc<Pages>,
    inner: Arc<dyn LayerData>,
}

impl Tap {
    fn note(&self, offset: u64, len: u64) {
        if len == 0 || self.recorder.closed.load(Ordering::Relaxed) {
            return;
        }
        let last = offset.saturating_add(len - 1);
        let mut has_news = false;
        for block in offset / BLOCK_BYTES..=last / BLOCK_BYTES {
            let Some(pages) = usize::try_from(block)
                .ok()
                .and_then(|at| self.pages.get(at))
            else {
                break;
            };
            let mask = page_mask(block, offset, last);
            if pages.load(Ordering::Relaxed) & mask == mask {
                continue;
            }
            has_news = true;
            if pages.fetch_or(mask, Ordering::Relaxed) == 0
                && let Ok(block) = u32::try_from(block)
            {
                self.recorder.note_first(self.slot, block);
            }
        }
        if has_news {
            self.recorder.note_news();
        }
    }
}

/// The pages of `block` that bytes `offset..=last` touch; they touch the block.
fn page_mask(block: u64, offset: u64, last: u64) -> u16 {
    let start = block.saturating_mul(BLOCK_BYTES);
    let page = |at: u64| (at.saturating_sub(start).min(BLOCK_BYTES - 1)) / PAGE_BYTES;
    let (from, to) = (page(offset), page(last));
    let upto = |n: u64| u16::try_from((1_u32 << n) - 1).unwrap_or(u16::MAX);
    upto(to + 1) & !upto(from)
}

impl LayerData for Tap {
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> lazarette_fetcher::Result<bool> {
        self.note(offset, buf.len() as u64);
        self.inner.try_read(offset, buf)
    }

    fn fill(&self, range: ByteRange) -> Filling<'_> {
        Box::pin(async move {
            let _waiting = Waiting::new(&self.recorder.waiting);
            self.inner.fill(range).await
        })
    }

    fn keep(&self) -> lazarette_fetcher::Result<Kept> {
        self.inner.keep()
    }
}

/// Counted while it lives.
struct Waiting<'a>(&'a AtomicU32);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicU32) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
