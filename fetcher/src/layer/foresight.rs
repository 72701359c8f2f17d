//! What a miss says about the reads that come next.
//!
//! Nobody knows what a program reads the first time it runs, but not all of it is a
//! surprise. A program or library that is opened is linked: its tables and its data are read
//! whole, and the libraries it names are opened next. And who has waited for some pieces of a
//! file, or of a directory, waits for more of them.
//!
//! Invariant: guesses only. They run as [`Priority::Profile`], behind readers, but for what
//! the caller of [`Layer::expect_files`] is about to wait for itself, and never fail anything.
//! What they fetch is bounded by what was waited for ([`rent`]) or by what linking reads
//! ([`crate::elf`]), and by [`BYTES_MAX`] of a layer.

mod files;
mod rent;
mod script;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::Mutex;

use self::files::{FileMap, Place};
use self::rent::Rents;
use super::{Layer, Priority, Shared, inflight};
use crate::elf::{self, Program};
use crate::index::ChunkId;
use crate::plan;
use crate::task::blocking;
use crate::types::ByteRange;
use crate::{Error, Result};

/// Encoded bytes that are guessed of one layer at most.
const BYTES_MAX: u64 = 256 << 20;

/// Bytes of a file that say what it is.
const HEAD_BYTES: u64 = 4096;

/// A file whose encoded bytes are at most one in so many of what a round trip carries is
/// fetched whole: one that somebody waits for a piece of,
const WAITED_PARTS: u64 = 4;
/// and one that is expected, which is sure to be read and has time to come.
const EXPECTED_PARTS: u64 = 1;

/// Decoded bytes of a directory that may be fetched whole.
const GROUP_BYTES_MAX: u64 = 64 << 20;

/// Decoded bytes for each encoded one, in files that shrink well.
const EXPANSION_MAX: u64 = 8;

/// What a program or script needs beside itself, as it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needs {
    /// The program's path in its layer.
    pub path: Vec<u8>,
    /// What runs it: paths, or names that are looked for as those of commands. None for a
    /// library.
    pub programs: Vec<Vec<u8>>,
    /// Names of libraries.
    pub libraries: Vec<Vec<u8>>,
    /// Directories to look for them in first, in which `$ORIGIN` is the program's own.
    pub search: Vec<Vec<u8>>,
}

/// Who is told what programs need.
pub type OnNeeds = Arc<dyn Fn(Needs) + Send + Sync>;

/// What one layer knows.
#[derive(Default)]
pub(super) struct Foresight {
    is_off: AtomicBool,
    files: OnceLock<FileMap>,
    rents: Mutex<Rents>,
    guessed: AtomicU64,
    on_needs: Mutex<Option<OnNeeds>>,
}

impl Layer {
    /// Says that the files at these places of the data file will be read, or run, or linked
    /// to what is, so that their beginnings, and what linking reads of them, come early. What
    /// is known to be read is asked for together, as urgently as said. Nobody waits for it.
    pub fn expect_files(&self, data_offsets: Vec<u64>, urgency: Priority) {
        if self.shared.foresight.is_on() {
            expect(&self.shared, data_offsets, urgency);
        }
    }

    /// Whether to fetch what a miss makes likely, which is so from the beginning. Who knows
    /// what will be read turns it off.
    pub fn set_foresight(&self, on: bool) {
        self.shared.foresight.switch(on);
    }

    /// Whether that is so.
    pub fn foresees(&self) -> bool {
        self.shared.foresight.is_on()
    }

    /// Has what programs of this layer need told to somebody who knows where that is.
    pub fn on_needs(&self, on_needs: Option<OnNeeds>) {
        self.shared.foresight.tell(on_needs);
    }
}

impl Foresight {
    fn switch(&self, on: bool) {
        self.is_off.store(!on, Ordering::Relaxed);
    }

    fn tell(&self, on_needs: Option<OnNeeds>) {
        *self.on_needs.lock() = on_needs;
    }

    fn is_on(&self) -> bool {
        !self.is_off.load(Ordering::Relaxed)
    }
}

/// A reader waits for the byte at `offset` of the data file. Returns at once.
pub(super) fn missed(shared: &Arc<Shared>, offset: u64) {
    if shared.foresight.is_on() {
        spawn(shared, offset, true);
    }
}

/// The files at these places of the data file will be read. Returns at once.
fn expect(shared: &Arc<Shared>, offsets: Vec<u64>, urgency: Priority) {
    let held = Arc::clone(shared);
    // It ends by itself: it waits for nobody but a thread.
    shared.tasks.spawn(async move {
        ask_together(&held, &offsets, urgency).await;
        for offset in offsets {
            spawn(&held, offset, false);
        }
    });
}

/// Asks for what comes of each of these files however it goes on, in as few requests as it
/// takes. Those who follow each of them find it under way.
pub(super) async fn ask_together(shared: &Arc<Shared>, offsets: &[u64], urgency: Priority) {
    have_files(shared).await;
    let small = shared.host.link().round_trip_bytes() / EXPECTED_PARTS;
    let places = offsets
        .iter()
        .filter_map(|offset| files(shared).at(*offset));
    let mut ids: Vec<ChunkId> = places
        .flat_map(|place| {
            let whole = shared.file.missing(place.range);
            let bytes = plan::whole::encoded_bytes(shared.file.index(), &whole);
            match bytes.is_some_and(|bytes| bytes <= small) {
                true => whole,
                false => within(&place, 0, HEAD_BYTES)
                    .map(|head| shared.file.missing(head))
                    .unwrap_or_default(),
            }
        })
        .collect();
    ids.sort_unstable();
    ids.dedup();
    drop(shared.fetch(&ids, urgency, None));
}

/// Logs what a reader waited for since `began`.
pub(super) fn log_wait(shared: &Shared, range: ByteRange, began: Instant) {
    if !tracing::enabled!(tracing::Level::DEBUG) {
        return;
    }
    let Some(file) = files(shared).at(range.start()) else {
        return;
    };
    let took_ms = began.elapsed().as_millis();
    let offset = range.start().saturating_sub(file.range.start());
    let path = shared.path_of(&file);
    let path = path.escape_ascii();
    tracing::debug!(%path, offset, len = range.len(), took_ms, "a read waited");
}

fn spawn(shared: &Arc<Shared>, offset: u64, waited: bool) {
    let held = Arc::clone(shared);
    shared.tasks.spawn(async move {
        let cancel = held.cancel.clone();
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            outcome = follow(&held, offset, waited) => if let Err(error) = outcome {
                tracing::debug!(digest = %held.blob.digest, %error, "a guess came to nothing");
            }
        }
    });
}

/// A file that is read, or will be: fetches what is likely to be read next.
pub(super) async fn follow(shared: &Arc<Shared>, offset: u64, waited: bool) -> Result<()> {
    have_files(shared).await;
    let Some(file) = files(shared).at(offset) else {
        return Ok(());
    };
    let is_new = shared.foresight.rents.lock().look(file.number);
    if waited {
        fetch_around(shared, &file);
    }
    match is_new {
        true => look(shared, &file, waited).await,
        false => Ok(()),
    }
}

/// Fetches the rest of what the file is a part of, as far as that is worth it by now.
fn fetch_around(shared: &Arc<Shared>, file: &Place) {
    let around = files(shared).around(file, GROUP_BYTES_MAX);
    let rents = &shared.foresight.rents;
    rents.lock().paid(&around, shared.host.link());
    for (at, members) in around.iter().enumerate() {
        let worth = rents.lock().worth(*members);
        // Looking for what is missing of it takes longer than it is worth.
        if files(shared).bytes_of(*members) > worth.saturating_mul(EXPANSION_MAX) {
            continue;
        }
        let places = files(shared).of_group(*members);
        let missing = places.iter().flat_map(|p| shared.file.missing(p.range));
        if let Some(bytes) = guess(shared, missing.collect(), worth) {
            let above = around.get(at..).unwrap_or_default();
            rents.lock().spent(above, bytes);
        }
    }
}

/// Makes the map of files, which takes a while, where no other task waits for it.
async fn have_files(shared: &Arc<Shared>) {
    if shared.foresight.files.get().is_none() {
        let held = Arc::clone(shared);
        blocking(move || files(&held).len()).await;
    }
}

fn files(shared: &Shared) -> &FileMap {
    let make = || FileMap::of(shared.file.index());
    shared.foresight.files.get_or_init(make)
}

/// Fetches a small file, and what is read of a program.
async fn look(shared: &Arc<Shared>, file: &Place, waited: bool) -> Result<()> {
    let parts = if waited { WAITED_PARTS } else { EXPECTED_PARTS };
    let small = shared.host.link().round_trip_bytes() / parts;
    let whole = guess(shared, shared.file.missing(file.range), small);
    let head = read(shared, file, 0, HEAD_BYTES).await?;
    let listener = shared.foresight.on_needs.lock().clone();
    let Some(program) = Program::parse(&head) else {
        let programs = script::programs(&head);
        if let Some(listener) = listener.filter(|_| !programs.is_empty()) {
            listener(Needs::of(shared, file, programs));
        }
        return Ok(());
    };
    if whole.is_none() {
        let parts = program.linked().into_iter();
        let parts = parts.filter_map(|part| within(file, part.start(), part.len()));
        let ids = parts.flat_map(|part| shared.file.missing(part)).collect();
        guess(shared, ids, BYTES_MAX);
    }
    if let Some(listener) = listener {
        let interpreter = program.interpreter(&head).into_iter().collect();
        let needs = Needs::of(shared, file, interpreter);
        listener(libraries(shared, file, &program, needs).await?);
    }
    Ok(())
}

/// `needs` with what a program says of libraries.
async fn libraries(
    shared: &Arc<Shared>,
    file: &Place,
    program: &Program,
    mut needs: Needs,
) -> Result<Needs> {
    let dynamic = match program.dynamic() {
        Some(part) => read(shared, file, part.start(), part.len()).await?,
        None => Vec::new(),
    };
    for name in program.names(&dynamic) {
        let text = read(shared, file, name.offset, elf::NAME_BYTES_MAX).await?;
        let Some(text) = text
            .split(|byte| *byte == 0)
            .next()
            .filter(|t| !t.is_empty())
        else {
            continue;
        };
        match name.kind {
            elf::NameKind::Library => needs.libraries.push(text.to_vec()),
            elf::NameKind::Search => {
                let dirs = text.split(|byte| *byte == b':');
                needs.search.extend(dirs.map(<[u8]>::to_vec));
            }
        }
    }
    Ok(needs)
}

impl Needs {
    /// Of a file that `programs` run.
    fn of(shared: &Shared, file: &Place, programs: Vec<Vec<u8>>) -> Self {
        Self {
            path: shared.path_of(file),
            programs,
            libraries: Vec::new(),
            search: Vec::new(),
        }
    }
}

impl Shared {
    fn path_of(&self, file: &Place) -> Vec<u8> {
        let entry = self.file.index().files.get(file.entry);
        entry.map(|entry| entry.path.clone()).unwrap_or_default()
    }
}

/// Starts to fetch `ids` (of several places, each ascending) if their encoded bytes are no
/// more than `bytes_max` and than what is left to guess; how many they are, if they are.
fn guess(shared: &Arc<Shared>, mut ids: Vec<ChunkId>, bytes_max: u64) -> Option<u64> {
    ids.sort_unstable();
    ids.dedup();
    let bytes = plan::whole::encoded_bytes(shared.file.index(), &ids)?;
    let guessed = &shared.foresight.guessed;
    let total = guessed.load(Ordering::Relaxed).saturating_add(bytes);
    if bytes > bytes_max || total > BYTES_MAX {
        return None;
    }
    guessed.fetch_add(bytes, Ordering::Relaxed);
    // Nobody waits for it.
    drop(shared.fetch(&ids, Priority::Profile, None));
    Some(bytes)
}

/// `len` bytes from `start` of a file on, as far as it goes.
async fn read(shared: &Arc<Shared>, file: &Place, start: u64, len: u64) -> Result<Vec<u8>> {
    let Some(range) = within(file, start, len) else {
        return Ok(Vec::new());
    };
    let missing = shared.file.missing(range);
    inflight::wait(shared.fetch(&missing, Priority::Profile, None)).await?;
    let (data, bytes) = (Arc::clone(&shared.file), usize::try_from(range.len()));
    blocking(move || {
        let mut bytes = vec![0; bytes.unwrap_or(0)];
        match data.read_at(range.start(), &mut bytes)? {
            true => Ok(bytes),
            false => Err(Error::NotFound {
                what: format!("bytes {range} that were here"),
                host: "this node".to_owned(),
            }),
        }
    })
    .await
}

/// The part of the data file that `len` bytes of a file from `start` on are.
fn within(file: &Place, start: u64, len: u64) -> Option<ByteRange> {
    let start = file.range.start().checked_add(start)?;
    let end = start.checked_add(len)?.min(file.range.end());
    ByteRange::new(start, end).filter(|range| !range.is_empty())
}
