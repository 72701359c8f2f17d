//! Which extents of a layer start-ups read, for whoever evicts.
//!
//! Invariant: only a hint. It is not synced; whatever the file holds costs nothing but a
//! worse choice, and never for longer than [`PIN_TIME`]: what claims more is no pin.
//!
//! ```text
//! pinned   u32 each, little endian: per extent of the data file, the first hour since
//!          1970 at which it is no pin any more; 0 for none
//! ```

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::LayerFile;
use crate::index::ChunkId;
use crate::store::evict::extent_of;

const PINNED: &str = "pinned";
const HOUR_S: u64 = 3600;
/// How long what a start reads stays while there is anything else to evict. An image that
/// starts every day stays; one that nobody starts any more gives way a day later.
pub const PIN_TIME: Duration = Duration::from_secs(24 * HOUR_S);

impl LayerFile {
    /// Asks that these chunks, which a start at `now` reads, stay for [`PIN_TIME`] while
    /// there is anything else to evict. Adds to what was asked before, by any process.
    /// Blocks on the device.
    pub fn pin(&self, ids: impl IntoIterator<Item = ChunkId>, now: SystemTime) {
        let until = hour(now).saturating_add(pin_hours());
        let before = self.until_hours();
        let mut hours = before.clone();
        for id in ids {
            let extent = self.chunk(id).map(extent_of).unwrap_or(u32::MAX);
            let at = usize::try_from(extent).unwrap_or(usize::MAX);
            if let Some(hour) = hours.get_mut(at) {
                *hour = until;
            }
        }
        if hours == before || self.is_removed() {
            return;
        }
        let bytes: Vec<u8> = hours.iter().flat_map(|hour| hour.to_le_bytes()).collect();
        let path = self.dir.join(PINNED);
        let write = || {
            let file = self.disk.create(&path)?;
            self.disk.write_at(&file, 0, &bytes)
        };
        if let Err(error) = write() {
            tracing::debug!(path = %path.display(), %error, "cannot note what a start reads");
        }
    }

    /// Extents that are pinned at `now`, ascending.
    pub(in crate::store) fn pinned(&self, now: SystemTime) -> Vec<u32> {
        extents(&self.until_hours(), now)
    }

    /// What the file says.
    fn until_hours(&self) -> Vec<u32> {
        let extents = usize::try_from(self.touched.count()).unwrap_or(0);
        let max = extents as u64 * 4;
        let bytes = crate::store::read_bounded(&self.dir.join(PINNED), max).unwrap_or_default();
        decode(&bytes, extents)
    }
}

/// What the file of a layer with as many extents says; nothing if it is not as long as it
/// should be.
pub(crate) fn decode(bytes: &[u8], extents: usize) -> Vec<u32> {
    let (hours, _) = bytes.as_chunks::<4>();
    let mut hours: Vec<u32> = hours.iter().map(|hour| u32::from_le_bytes(*hour)).collect();
    if hours.len() != extents {
        hours = vec![0; extents];
    }
    hours
}

/// Extents that are pinned at `now` by what the file says of each, ascending.
pub(crate) fn extents(hours: &[u32], now: SystemTime) -> Vec<u32> {
    let now = hour(now);
    let is_pinned = |until: u32| until > now && until - now <= pin_hours();
    let hours = (0..).zip(hours);
    hours
        .filter(|(_, until)| is_pinned(**until))
        .map(|(extent, _)| extent)
        .collect()
}

/// Hours since 1970.
fn hour(time: SystemTime) -> u32 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u32::try_from(since.as_secs() / HOUR_S).unwrap_or(u32::MAX)
}

fn pin_hours() -> u32 {
    u32::try_from(PIN_TIME.as_secs() / HOUR_S).unwrap_or(u32::MAX)
}
