//! A wrapper that makes any source fail on purpose, by script or by seed.
//!
//! Invariant: the same script or seed and the same order of calls give the same faults.

use std::collections::VecDeque;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::source::{BlobRef, BlobSource, Body, Document};
use crate::types::{ByteRange, Descriptor, Digest, Reference, Repository};
use crate::{Error, Result};

/// What goes wrong with one read of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadFault {
    /// The read fails before a byte comes; a retry may help.
    Unavailable,
    /// The body ends with a transient error after this many bytes.
    Short(u64),
    /// The body ends early as if complete, against the contract, after this many bytes.
    Truncated(u64),
    /// Every byte of the first piece is inverted.
    WrongBytes,
    /// This bit of the body is inverted, counted from the lowest of the first byte; bodies
    /// that end before it are right.
    FlippedBit(u64),
    /// The read starts after this long.
    Delay(Duration),
    /// Ranges are not supported.
    NoRanges,
}

/// Logarithms of how far into a body a random bit is flipped, in bits: most bodies are some
/// KiB long, some are MiB.
const FLIPPED_BITS: std::ops::RangeInclusive<u32> = 12..=23;

enum Schedule {
    Script(VecDeque<Option<ReadFault>>),
    Seeded { rng: Box<StdRng>, one_in: u32 },
}

/// See the module's documentation.
pub struct FaultySource<S> {
    inner: S,
    schedule: Mutex<Schedule>,
}

impl<S: BlobSource> FaultySource<S> {
    /// Fails reads as `script` says, one entry per read; none when it is used up.
    pub fn scripted(inner: S, script: impl IntoIterator<Item = Option<ReadFault>>) -> Self {
        let script = script.into_iter().collect();
        Self {
            inner,
            schedule: Mutex::new(Schedule::Script(script)),
        }
    }

    /// Fails one read in `one_in` on average, in ways that `seed` decides.
    pub fn seeded(inner: S, seed: u64, one_in: u32) -> Self {
        let rng = Box::new(StdRng::seed_from_u64(seed));
        Self {
            inner,
            schedule: Mutex::new(Schedule::Seeded {
                rng,
                one_in: one_in.max(1),
            }),
        }
    }

    /// Adds a fault to the end of the script; has no effect on a seeded schedule.
    pub fn script(&self, fault: Option<ReadFault>) {
        if let Schedule::Script(script) = &mut *self.schedule.lock() {
            script.push_back(fault);
        }
    }

    /// The wrapped source.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    fn next(&self) -> Option<ReadFault> {
        match &mut *self.schedule.lock() {
            Schedule::Script(script) => script.pop_front().flatten(),
            Schedule::Seeded { rng, one_in } => {
                if !rng.random_ratio(1, *one_in) {
                    return None;
                }
                Some(match rng.random_range(0..5) {
                    0 => ReadFault::Unavailable,
                    1 => ReadFault::Short(rng.random_range(0..65_536)),
                    2 => ReadFault::WrongBytes,
                    3 => {
                        let bits = rng.random_range(FLIPPED_BITS);
                        ReadFault::FlippedBit(rng.random_range(0..1_u64 << bits))
                    }
                    _ => ReadFault::Delay(Duration::from_millis(rng.random_range(0..20))),
                })
            }
        }
    }

    async fn read(
        &self,
        blob: &BlobRef,
        ranged: bool,
        read: impl Future<Output = Result<Body>>,
    ) -> Result<Body> {
        let Some(fault) = self.next() else {
            return read.await;
        };
        match fault {
            ReadFault::Unavailable => Err(broken(blob)),
            ReadFault::NoRanges if ranged => Err(Error::Unsupported {
                what: format!("a range of blob {}", blob.digest),
                detail: "the layer has to be pulled in full".to_owned(),
            }),
            ReadFault::NoRanges => read.await,
            ReadFault::Delay(wait) => {
                tokio::time::sleep(wait).await;
                read.await
            }
            ReadFault::Short(len) => {
                let end = stream::iter([Err(broken(blob))]);
                Ok(cut(read.await?, len).chain(end).boxed())
            }
            ReadFault::Truncated(len) => Ok(cut(read.await?, len)),
            ReadFault::FlippedBit(bit) => Ok(flipped(read.await?, bit)),
            ReadFault::WrongBytes => {
                let mut first = true;
                Ok(read
                    .await?
                    .map(move |piece| {
                        let piece = piece?;
                        if !std::mem::take(&mut first) {
                            return Ok(piece);
                        }
                        Ok(piece.iter().map(|byte| !byte).collect::<Bytes>())
                    })
                    .boxed())
            }
        }
    }
}

fn broken(blob: &BlobRef) -> Error {
    Error::Unavailable {
        what: format!("blob {}", blob.digest),
        host: blob.repository.host().to_owned(),
        detail: "the connection broke on purpose".to_owned(),
    }
}

/// The first `len` bytes of a body.
fn cut(body: Body, len: u64) -> Body {
    body.scan(len, |left, piece| {
        let kept = piece.map(|piece: Bytes| {
            let take = usize::try_from(*left)
                .unwrap_or(usize::MAX)
                .min(piece.len());
            *left -= take as u64;
            piece.slice(..take)
        });
        let done = matches!(&kept, Ok(piece) if piece.is_empty());
        std::future::ready((!done).then_some(kept))
    })
    .boxed()
}

/// A body with one bit inverted.
fn flipped(body: Body, bit: u64) -> Body {
    body.scan(bit / 8, move |before, piece| {
        let piece = piece.map(|piece: Bytes| {
            let at = usize::try_from(*before).unwrap_or(usize::MAX);
            *before = before.wrapping_sub(piece.len() as u64);
            let mut bytes = piece.to_vec();
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << (bit % 8);
                *before = u64::MAX;
            }
            Bytes::from(bytes)
        });
        std::future::ready(Some(piece))
    })
    .boxed()
}

#[async_trait]
impl<S: BlobSource> BlobSource for FaultySource<S> {
    async fn resolve(&self, reference: &Reference) -> Result<Document> {
        self.inner.resolve(reference).await
    }

    async fn stat(&self, repository: &Repository, digest: &Digest) -> Result<u64> {
        self.inner.stat(repository, digest).await
    }

    async fn read_range(&self, blob: &BlobRef, range: ByteRange) -> Result<Body> {
        self.read(blob, true, self.inner.read_range(blob, range))
            .await
    }

    fn parts_max(&self, blob: &BlobRef) -> usize {
        self.inner.parts_max(blob)
    }

    async fn read_parts(&self, blob: &BlobRef, parts: &[ByteRange]) -> Result<Body> {
        self.read(blob, true, self.inner.read_parts(blob, parts))
            .await
    }

    async fn read_all(&self, blob: &BlobRef) -> Result<Body> {
        self.read(blob, false, self.inner.read_all(blob)).await
    }

    async fn referrers(
        &self,
        repository: &Repository,
        digest: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>> {
        self.inner
            .referrers(repository, digest, artifact_type)
            .await
    }
}
