//! The bytes behind a mounted layer.
//!
//! Invariant: what passes this seam was verified below it. Never knows which file of the
//! layer a range belongs to.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use lazarette_fetcher::layer::Layer;
use lazarette_fetcher::store::Kept;
use lazarette_fetcher::types::ByteRange;
use lazarette_fetcher::{Error, Result};

/// What [`LayerData::fill`] returns.
pub type Filling<'a> = Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;

/// Fills of one read before it fails. From the second on nobody evicts meanwhile, so it takes a
/// file system that has no locks, or a disk that loses what was just written.
const FILLS_MAX: usize = 3;

/// A layer's data file, parts of which may be absent.
///
/// All calls may come from any thread, any number at once. Bytes may vanish again between
/// a `fill` and the next `try_read`; the reader then fills again.
pub trait LayerData: Send + Sync + 'static {
    /// Reads `buf.len()` bytes at `offset` if all are present. `false`, with `buf`
    /// unspecified, if any is absent. Local disk only, never the network.
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool>;

    /// Makes `range` present. Dropping the future abandons this wait and nothing else.
    fn fill(&self, range: ByteRange) -> Filling<'_>;

    /// Has what is present, and what comes, stay until the result is dropped. Local disk only.
    fn keep(&self) -> Result<Kept>;
}

impl LayerData for Layer {
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool> {
        Self::try_read(self, offset, buf)
    }

    fn fill(&self, range: ByteRange) -> Filling<'_> {
        Box::pin(Self::fill(self, range))
    }

    fn keep(&self) -> Result<Kept> {
        self.file().keep()
    }
}

/// Makes `range` present and has `look`, which may wait for the local disk, take of it what it
/// wants; it says `None` if bytes are absent. A store with less room than what is being read
/// evicts what has just come: that is fetched once more and kept until `look` had it.
pub(crate) async fn fill_and<D, T, F>(data: &Arc<D>, range: ByteRange, look: F) -> Result<T>
where
    D: LayerData + ?Sized,
    T: Send + 'static,
    F: Fn(&D) -> Result<Option<T>> + Clone + Send + 'static,
{
    let mut kept = None;
    for _ in 0..FILLS_MAX {
        data.fill(range).await?;
        let look = look.clone();
        let looked = blocking(Arc::clone(data), range, move |data| look(data));
        if let Some(wanted) = looked.await? {
            return Ok(wanted);
        }
        if kept.is_none() {
            kept = Some(blocking(Arc::clone(data), range, D::keep).await?);
        }
    }
    let detail = "they vanished again after each fetch; give the store a larger budget";
    Err(failed(range, detail))
}

/// Has `work` wait for the local disk.
pub(crate) async fn blocking<D, T>(
    data: Arc<D>,
    range: ByteRange,
    work: impl FnOnce(&D) -> Result<T> + Send + 'static,
) -> Result<T>
where
    D: LayerData + ?Sized,
    T: Send + 'static,
{
    let done = tokio::task::spawn_blocking(move || work(&data)).await;
    done.unwrap_or_else(|stopped| Err(failed(range, &stopped.to_string())))
}

/// Bytes that are not to be had.
pub(crate) fn failed(range: ByteRange, detail: &str) -> Error {
    Error::Unavailable {
        what: format!("bytes {range} of a layer"),
        host: "the local store".to_owned(),
        detail: detail.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use lazarette_fetcher::store::{LayerFile, Store};
    use lazarette_fetcher::test_util::layers::{CHUNK_LEN, chunk_bytes, layer_of, put_chunk};

    use super::*;

    /// A layer of one chunk in a store so small that what comes is evicted at once.
    struct Evicted {
        file: Arc<LayerFile>,
        fills: AtomicU32,
    }

    impl LayerData for Evicted {
        fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool> {
            self.file.read_at(offset, buf)
        }

        fn fill(&self, _: ByteRange) -> Filling<'_> {
            Box::pin(async move {
                self.fills.fetch_add(1, Ordering::Relaxed);
                put_chunk(&self.file, 0)?;
                match self.file.evict_all() {
                    Ok(_) | Err(Error::Unsupported { .. }) => Ok(()),
                    Err(error) => Err(error),
                }
            })
        }

        fn keep(&self) -> Result<Kept> {
            self.file.keep()
        }
    }

    #[tokio::test]
    async fn what_was_evicted_before_it_was_read_is_kept_the_next_time() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let layer = layer_of("layer", &[chunk_bytes(0)]);
        let data = Arc::new(Evicted {
            file: store.create_layer(layer).unwrap(),
            fills: AtomicU32::new(0),
        });
        let range = ByteRange::at(0, CHUNK_LEN.into()).unwrap();
        let look = |data: &Evicted| {
            let mut bytes = vec![0; CHUNK_LEN as usize];
            let is_there = data.try_read(0, &mut bytes)?;
            Ok(is_there.then_some(bytes))
        };
        let read = fill_and(&data, range, look).await.unwrap();
        assert_eq!(read, chunk_bytes(0));
        assert_eq!(data.fills.load(Ordering::Relaxed), 2);
        assert_eq!(data.file.evict_all().unwrap().chunks, 1, "kept no longer");
    }
}
