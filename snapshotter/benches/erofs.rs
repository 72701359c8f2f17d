//! What it takes to make a metadata image of a layer with 35,000 inodes, which is a large
//! image's large layer: time on one thread, bytes per inode. The aims are 30 ms and 140.
//!
//!     cargo bench --workspace --bench erofs --profile dev [-- ROUNDS]

use std::io::{self, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lazarette_fetcher::index::{FileEntry, FileKind, LayerFormat, LayerIndex, Timestamp};
use lazarette_fetcher::types::Digest;
use lazarette_snapshotter::erofs::Image;
use lazarette_snapshotter::tree::Tree;

/// Directories and files in each: with the root 35,001 inodes, about as in `/usr`.
const DIRS: u64 = 3500;
const FILES: u64 = 9;

fn main() -> Result<()> {
    let number = std::env::args().skip(1).find_map(|arg| arg.parse().ok());
    let rounds: usize = number.unwrap_or(21);
    let index = layer();
    let (mut build, mut plan, mut write) = (Vec::new(), Vec::new(), Vec::new());
    let mut len = 0;
    let mut inodes = 0;
    for _ in 0..rounds {
        let began = Instant::now();
        let tree = Tree::build(&index)?;
        build.push(began.elapsed());
        let began = Instant::now();
        let image = Image::of(&tree)?;
        plan.push(began.elapsed());
        let mut out = Count(0);
        image.write_to(&mut out)?;
        write.push(began.elapsed());
        ensure!(out.0 == image.image_len(), "the image has another length");
        (len, inodes) = (out.0, tree.len() as u64);
    }
    println!(
        "{inodes} inodes: tree {:?}, then layout {:?}, layout and image {:?} (medians of {rounds})",
        median(&mut build)?,
        median(&mut plan)?,
        median(&mut write)?,
    );
    println!("{len} bytes, {} per inode", len.div_ceil(inodes));
    Ok(())
}

fn median(took: &mut [Duration]) -> Result<Duration> {
    took.sort_unstable();
    took.get(took.len() / 2).copied().context("no rounds")
}

/// Where the image goes: memory that is written once and read by nobody.
struct Count(u64);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += std::hint::black_box(bytes).len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Names of the length they have in `/usr`, one symbolic link in nine files, and the
/// attribute that file capabilities are on one in ninety.
fn layer() -> LayerIndex {
    let mut files = Vec::new();
    let mut data_len: u64 = 0;
    for dir in 0..DIRS {
        let base = format!("usr/lib/group-{:02}/package-{dir:04}", dir % 70);
        files.push(entry(base.clone(), FileKind::Directory));
        for file in 0..FILES {
            let path = format!("{base}/module-name-{file:02}.py");
            let kind = if file == 0 {
                let target = b"../../other/module-name.py".to_vec();
                FileKind::Symlink { target }
            } else {
                let size = 1 + (dir * FILES + file) % 40_000;
                let data_offset = data_len;
                data_len += size.next_multiple_of(4096);
                FileKind::Regular { size, data_offset }
            };
            let mut entry = entry(path, kind);
            if file == 1 && dir % 10 == 0 {
                entry.xattrs = vec![(b"security.capability".to_vec(), vec![1; 20])];
            }
            files.push(entry);
        }
    }
    LayerIndex {
        blob_digest: Digest::sha256(b"bench"),
        blob_size: 1,
        format: LayerFormat::Estargz,
        files,
        chunks: Vec::new(),
        spans: Vec::new(),
        data_len,
    }
}

fn entry(path: String, kind: FileKind) -> FileEntry {
    FileEntry {
        path: path.into_bytes(),
        kind,
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: Timestamp {
            secs: 1_700_000_000,
            nanos: 123_456_789,
        },
        xattrs: Vec::new(),
    }
}
