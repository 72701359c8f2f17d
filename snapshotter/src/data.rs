//! The bytes behind a mounted layer.
//!
//! Invariant: what passes this seam was verified below it. Never knows which file of the
//! layer a range belongs to.

use std::future::Future;
use std::pin::Pin;

use lazarette_fetcher::Result;
use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::types::ByteRange;

/// What [`LayerData::fill`] returns.
pub type Filling<'a> = Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;

/// A layer's data file, parts of which may be absent.
///
/// Both calls may come from any thread, any number at once. Bytes may vanish again between
/// a `fill` and the next `try_read`; the reader then fills again.
pub trait LayerData: Send + Sync + 'static {
    /// Reads `buf.len()` bytes at `offset` if all are present. `false`, with `buf`
    /// unspecified, if any is absent. Local disk only, never the network.
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool>;

    /// Makes `range` present. Dropping the future abandons this wait and nothing else.
    fn fill(&self, range: ByteRange) -> Filling<'_>;
}

impl LayerData for Layer {
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool> {
        Self::try_read(self, offset, buf)
    }

    fn fill(&self, range: ByteRange) -> Filling<'_> {
        Box::pin(Self::fill(self, range))
    }
}
