//! A disk that fails or crashes at a chosen operation.
//!
//! Invariant: operations take effect on a real directory, so the store under test reads
//! what it wrote; beside that a model keeps what the device would hold. A crash builds,
//! in another directory, one of the states that the model allows: unsynced writes are
//! lost, kept, or kept in part; unsynced names are lost or kept, each on its own (a
//! rename is never split). The choice comes from a seed.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::store::disk::{Disk, RealDisk, Stretch};

/// A sector: what a device writes whole or not at all.
const SECTOR: usize = 512;

/// What happens at the chosen operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The process dies before the operation: it and all later ones do nothing and fail.
    Crash,
    /// The operation fails once with `ENOSPC`.
    NoSpace,
    /// The operation and all later ones that need room fail with `ENOSPC`, until
    /// [`CrashDisk::relieve`]. Blocks that are there can be written over.
    Full,
    /// The operation fails once with `EIO`. A sync that fails loses what it had to sync.
    Io,
}

type Node = usize;

#[derive(Default)]
struct Inode {
    is_dir: bool,
    /// Content that survives any crash.
    durable: Vec<u8>,
    pending: Vec<Change>,
}

#[derive(Clone)]
enum Change {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Punch(u64, u64),
}

/// A change of names, atomic.
struct NameOp {
    durable: bool,
    edits: Vec<(Node, String, Option<Node>)>,
}

#[derive(Default)]
struct Model {
    inodes: Vec<Inode>,
    by_real: HashMap<u64, Node>,
    names: Vec<NameOp>,
    live: BTreeMap<(Node, String), Node>,
}

struct State {
    ops: u64,
    shared: u64,
    fault: Option<(u64, Fault)>,
    crashed: bool,
    model: Model,
}

/// What an operation takes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Room,
    Nothing,
}

/// Where files are kept in memory, if anywhere.
const MEMORY: &str = "/dev/shm";

/// A new directory for files that need not outlive the process: in memory where that is
/// possible. What a crash leaves is made by [`CrashDisk`], never by the device, and tests of
/// it make and drop thousands of directories: on a device they would mostly wait for it.
pub fn scratch() -> tempfile::TempDir {
    let in_memory = tempfile::tempdir_in(MEMORY);
    in_memory
        .or_else(|_| tempfile::tempdir())
        .expect("a directory for files of a test")
}

/// The recording disk, over the directory `root`.
pub struct CrashDisk {
    root: PathBuf,
    state: Mutex<State>,
}

impl CrashDisk {
    /// Records operations below `root`, an empty directory, and meets `fault` at the
    /// operation of that number (from 0).
    pub fn new(root: &Path, fault: Option<(u64, Fault)>) -> Self {
        let mut model = Model::default();
        model.inodes.push(Inode {
            is_dir: true,
            ..Inode::default()
        });
        Self {
            root: root.to_path_buf(),
            state: Mutex::new(State {
                ops: 0,
                shared: 0,
                fault,
                crashed: false,
                model,
            }),
        }
    }

    /// Operations seen so far, the failed one included.
    pub fn ops(&self) -> u64 {
        self.state.lock().ops
    }

    /// How often blocks were shared between files.
    pub fn shared(&self) -> u64 {
        self.state.lock().shared
    }

    /// Whether the crash has happened.
    pub fn crashed(&self) -> bool {
        self.state.lock().crashed
    }

    /// Builds in `into`, an empty directory, a state that a crash now may leave.
    pub fn materialise(&self, into: &Path, seed: u64) -> io::Result<()> {
        let mut rng = StdRng::seed_from_u64(seed);
        let state = self.state.lock();
        let model = &state.model;
        let mut entries: BTreeMap<(Node, String), Node> = BTreeMap::new();
        let keep_all = rng.random_bool(0.2);
        for op in &model.names {
            if !(op.durable || keep_all || rng.random_bool(0.5)) {
                continue;
            }
            apply_names(&mut entries, &op.edits);
        }
        let contents: Vec<Vec<u8>> = model
            .inodes
            .iter()
            .map(|inode| crashed_content(inode, keep_all, &mut rng))
            .collect();
        write_tree(model, &entries, &contents, (0, into))
    }

    /// Counts an operation and decides its fate.
    fn enter(&self) -> io::Result<parking_lot::MutexGuard<'_, State>> {
        self.enter_for(Need::Nothing)
    }

    fn enter_for(&self, need: Need) -> io::Result<parking_lot::MutexGuard<'_, State>> {
        let mut state = self.state.lock();
        if state.crashed {
            return Err(io::Error::other("the process is dead"));
        }
        let now = state.ops;
        state.ops += 1;
        match state.fault {
            Some((at, Fault::Full)) => match need {
                Need::Room if now >= at => Err(io::Error::from(io::ErrorKind::StorageFull)),
                Need::Room | Need::Nothing => Ok(state),
            },
            Some((at, fault)) if at == now => match fault {
                Fault::Full => Ok(state),
                Fault::Crash => {
                    state.crashed = true;
                    Err(io::Error::other("the process dies here"))
                }
                Fault::NoSpace => Err(io::Error::from(io::ErrorKind::StorageFull)),
                Fault::Io => Err(io::Error::from_raw_os_error(nix_eio())),
            },
            _ => Ok(state),
        }
    }

    /// Makes room on a disk that was full.
    pub fn relieve(&self) {
        self.state.lock().fault = None;
    }

    fn node(&self, model: &Model, path: &Path) -> io::Result<Node> {
        let (dir, name) = self.split(model, path)?;
        let found = model.live.get(&(dir, name)).copied();
        found.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }

    /// The directory that holds `path` and the name there.
    fn split(&self, model: &Model, path: &Path) -> io::Result<(Node, String)> {
        let outside = || io::Error::other(format!("{} is outside", path.display()));
        let inside = path.strip_prefix(&self.root).map_err(|_| outside())?;
        let mut parts: Vec<String> = inside
            .iter()
            .map(|part| part.to_string_lossy().into_owned())
            .collect();
        let name = parts.pop().ok_or_else(outside)?;
        let mut dir = 0;
        for part in parts {
            let found = model.live.get(&(dir, part)).copied();
            dir = found.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        }
        Ok((dir, name))
    }
}

impl Model {
    fn add(&mut self, is_dir: bool) -> Node {
        self.inodes.push(Inode {
            is_dir,
            ..Inode::default()
        });
        self.inodes.len() - 1
    }

    fn change_names(&mut self, edits: Vec<(Node, String, Option<Node>)>) {
        apply_names(&mut self.live, &edits);
        self.names.push(NameOp {
            durable: false,
            edits,
        });
    }

    fn change(&mut self, file: &File, change: Change) -> io::Result<()> {
        let node = self.of(file)?;
        self.inodes[node].pending.push(change);
        Ok(())
    }

    fn of(&self, file: &File) -> io::Result<Node> {
        let real = file.metadata()?.ino();
        let node = self.by_real.get(&real).copied();
        node.ok_or_else(|| io::Error::other("a file that was not created here"))
    }
}

impl Disk for CrashDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.enter_for(Need::Room)?;
        RealDisk.create_dir(path)?;
        let (dir, name) = self.split(&state.model, path)?;
        let node = state.model.add(true);
        state.model.change_names(vec![(dir, name, Some(node))]);
        Ok(())
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        let mut state = self.enter_for(Need::Room)?;
        let file = RealDisk.create(path)?;
        let model = &mut state.model;
        let (dir, name) = self.split(model, path)?;
        if let Some(node) = model.live.get(&(dir, name.clone())).copied() {
            model.inodes[node].pending.push(Change::SetLen(0));
        } else {
            let node = model.add(false);
            model.by_real.insert(file.metadata()?.ino(), node);
            model.change_names(vec![(dir, name, Some(node))]);
        }
        Ok(file)
    }

    fn create_nameless(&self, dir: &Path) -> io::Result<File> {
        let mut state = self.enter_for(Need::Room)?;
        let file = RealDisk.create_nameless(dir)?;
        let node = state.model.add(false);
        // Of one that is gone by now, the number may be this one's.
        state.model.by_real.insert(file.metadata()?.ino(), node);
        Ok(file)
    }

    /// Nothing is on the device before it is synced, whichever way it went.
    fn open_past(&self, path: &Path) -> io::Result<Option<File>> {
        File::options().write(true).open(path).map(Some)
    }

    fn write_at(&self, file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.enter_for(need_of(file, offset, bytes)?)?;
        RealDisk.write_at(file, offset, bytes)?;
        let change = Change::Write(offset, bytes.to_vec());
        state.model.change(file, change)
    }

    /// Shares on every file system, as far as anyone can tell.
    fn share(&self, from: &File, to: &File, stretch: Stretch) -> io::Result<()> {
        let mut state = self.enter_for(Need::Room)?;
        let mut bytes = vec![0; usize::try_from(stretch.len).unwrap_or(0)];
        from.read_exact_at(&mut bytes, stretch.from)?;
        RealDisk.write_at(to, stretch.to, &bytes)?;
        state.shared += 1;
        state.model.change(to, Change::Write(stretch.to, bytes))
    }

    fn set_len(&self, file: &File, len: u64) -> io::Result<()> {
        let mut state = self.enter()?;
        RealDisk.set_len(file, len)?;
        state.model.change(file, Change::SetLen(len))
    }

    fn punch(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let mut state = self.enter()?;
        RealDisk.punch(file, offset, len)?;
        state.model.change(file, Change::Punch(offset, len))
    }

    fn sync_data(&self, file: &File) -> io::Result<()> {
        let entered = self.enter().map(drop);
        let mut state = self.state.lock();
        if state.crashed {
            return entered;
        }
        let node = state.model.of(file)?;
        let inode = &mut state.model.inodes[node];
        let pending = std::mem::take(&mut inode.pending);
        // A failed sync marks the pages clean: no later sync writes them.
        entered?;
        for change in pending {
            apply(&mut inode.durable, &change, usize::MAX);
        }
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.enter()?;
        let dir = if path == self.root {
            0
        } else {
            self.node(&state.model, path)?
        };
        for op in &mut state.model.names {
            op.durable |= op.edits.iter().any(|(at, ..)| *at == dir);
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.enter()?;
        RealDisk.rename(from, to)?;
        let node = self.node(&state.model, from)?;
        let (from_dir, from_name) = self.split(&state.model, from)?;
        let (to_dir, to_name) = self.split(&state.model, to)?;
        let edits = vec![(from_dir, from_name, None), (to_dir, to_name, Some(node))];
        state.model.change_names(edits);
        Ok(())
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        let mut state = self.enter()?;
        RealDisk.exchange(a, b)?;
        let (node_a, node_b) = (self.node(&state.model, a)?, self.node(&state.model, b)?);
        let (dir_a, name_a) = self.split(&state.model, a)?;
        let (dir_b, name_b) = self.split(&state.model, b)?;
        let edits = vec![(dir_a, name_a, Some(node_b)), (dir_b, name_b, Some(node_a))];
        state.model.change_names(edits);
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.enter()?;
        RealDisk.remove_file(path)?;
        let (dir, name) = self.split(&state.model, path)?;
        state.model.change_names(vec![(dir, name, None)]);
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.enter()?;
        RealDisk.remove_dir(path)?;
        let (dir, name) = self.split(&state.model, path)?;
        state.model.change_names(vec![(dir, name, None)]);
        Ok(())
    }
}

/// What a write takes: nothing where the file has blocks already.
fn need_of(file: &File, offset: u64, bytes: &[u8]) -> io::Result<Need> {
    let meta = file.metadata()?;
    let is_dense = meta.blocks() * 512 >= meta.len();
    let is_inside = offset.saturating_add(bytes.len() as u64) <= meta.len();
    Ok(if is_dense && is_inside {
        Need::Nothing
    } else {
        Need::Room
    })
}

fn apply_names(
    entries: &mut BTreeMap<(Node, String), Node>,
    edits: &[(Node, String, Option<Node>)],
) {
    for (dir, name, node) in edits {
        match node {
            Some(node) => entries.insert((*dir, name.clone()), *node),
            None => entries.remove(&(*dir, name.clone())),
        };
    }
}

/// Applies at most the first `sectors` of a write.
fn apply(content: &mut Vec<u8>, change: &Change, sectors: usize) {
    let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
    match change {
        Change::SetLen(len) => content.resize(at(*len), 0),
        Change::Punch(offset, len) => {
            let end = at(offset.saturating_add(*len)).min(content.len());
            let start = at(*offset).min(end);
            let len = sectors.saturating_mul(SECTOR).min(end - start);
            content[start..start + len].fill(0);
        }
        Change::Write(offset, bytes) => {
            let start = at(*offset);
            let whole = bytes.len();
            let len = sectors.saturating_mul(SECTOR).min(whole);
            // The length may be there without the bytes: that is how zeros appear.
            if content.len() < start + whole {
                content.resize(start + whole, 0);
            }
            content[start..start + len].copy_from_slice(&bytes[..len]);
        }
    }
}

fn crashed_content(inode: &Inode, keep_all: bool, rng: &mut StdRng) -> Vec<u8> {
    let mut content = inode.durable.clone();
    for change in &inode.pending {
        match rng.random_range(0..3) {
            _ if keep_all => apply(&mut content, change, usize::MAX),
            0 => {}
            1 => apply(&mut content, change, usize::MAX),
            _ => apply(&mut content, change, rng.random_range(0..4)),
        }
    }
    content
}

fn write_tree(
    model: &Model,
    entries: &BTreeMap<(Node, String), Node>,
    contents: &[Vec<u8>],
    (dir, into): (Node, &Path),
) -> io::Result<()> {
    for ((_, name), node) in entries.range((dir, String::new())..(dir + 1, String::new())) {
        let path = into.join(name);
        if model.inodes[*node].is_dir {
            std::fs::create_dir(&path)?;
            write_tree(model, entries, contents, (*node, &path))?;
        } else {
            std::fs::write(&path, &contents[*node])?;
        }
    }
    Ok(())
}

/// `EIO` as the kernel numbers it.
fn nix_eio() -> i32 {
    5
}
