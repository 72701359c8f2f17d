//! Does one step in every root, and times it.
//!
//! Invariant: what makes a state comes before the clock starts, and the same is read in every
//! root: same files in the same order, same places in the same shuffle.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::Read;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};

use super::root::Root;
use super::step::{Act, State, Step, Unit};
use crate::plan::Image;
use crate::report::spread;
use crate::sys;

/// Bytes read at a time.
const PIECE: usize = 1 << 20;
/// Bytes of a random read.
const PAGE: usize = 4096;
/// How often what is warm is done in each root for a sample, which is their median.
const WARM_TIMES: u32 = 15;
/// Most random reads of a sample.
const READS_MAX: usize = 5000;

/// Makes the state of `step`, does it in every root, and returns what it took in each, in its unit.
pub(super) fn measure(step: &Step, image: Image, roots: &[&Root]) -> Result<Vec<f64>> {
    let act = |root: &Root| {
        let what = || format!("{} of {} in {}", step.name, image.name(), root.name);
        act(step.act, image, root).with_context(what)
    };
    let seconds: Vec<f64> = match step.state {
        State::Warm => warm(roots, act)?,
        State::NamesDropped | State::MountCold | State::Disk => {
            let measure = |root: &&Root| prepare(step, root, act).and_then(|()| act(root));
            roots.iter().map(measure).collect::<Result<_>>()?
        }
    };
    let unit = match step.unit {
        Unit::Milliseconds => 1e3,
        Unit::Microseconds => 1e6,
    };
    Ok(seconds.into_iter().map(|seconds| seconds * unit).collect())
}

/// Medians of what it took where the same was done before. The roots take turns: how fast the
/// machine is changes from one moment to the next by more than they differ.
fn warm(roots: &[&Root], act: impl Fn(&Root) -> Result<f64>) -> Result<Vec<f64>> {
    drop_caches("3")?;
    for root in roots {
        act(root)?;
    }
    let mut taken = vec![Vec::new(); roots.len()];
    for _ in 0..WARM_TIMES {
        for (root, taken) in roots.iter().zip(&mut taken) {
            taken.push(act(root)?);
        }
    }
    let medians = taken.into_iter().map(|of| spread(of.into_iter()).median);
    Ok(medians.collect())
}

/// Makes the state of a step that is done once.
fn prepare(step: &Step, root: &Root, act: impl Fn(&Root) -> Result<f64>) -> Result<()> {
    if step.state == State::Disk {
        crate::process::run(&mut Command::new("sync"))?;
        return drop_caches("3");
    }
    // The kernel is to hold what the step needs because of that step alone: which pages hold
    // it, and how large they are, is of what read it first.
    drop_caches("3")?;
    act(root)?;
    if step.state == State::MountCold && root.is_copy {
        forget(step.act, root)?;
    }
    drop_caches("2")
}

/// Has the kernel forget the contents that `act` reads: an expensive thing to ask, as each file has
/// all processors look what they have of it.
fn forget(act: Act, root: &Root) -> Result<()> {
    let forget = |path: &Path| Ok(sys::forget(&File::open(path)?)?);
    match act {
        Act::Sequential | Act::Random => forget(&root.largest()?.0),
        Act::SmallFiles => root.small().try_for_each(forget),
        Act::Find | Act::FindStat | Act::Tar | Act::Exec => {
            let mut files = root.files.iter();
            files.try_for_each(|(path, _)| forget(path))
        }
    }
}

fn drop_caches(what: &str) -> Result<()> {
    fs::write("/proc/sys/vm/drop_caches", what).context("drop caches (this needs root)")
}

/// Does it; seconds, of one file or one read where the step is of many.
fn act(act: Act, image: Image, root: &Root) -> Result<f64> {
    match act {
        Act::Find => find(root, &[]),
        Act::FindStat => find(root, &["-printf", "%s\n"]),
        Act::SmallFiles => small_files(root),
        Act::Sequential => sequential(&root.largest()?.0),
        Act::Random => random(root.largest()?),
        Act::Tar => tar(&root.path),
        Act::Exec => exec(image, &root.path),
    }
}

fn find(root: &Root, how: &[&str]) -> Result<f64> {
    let mut find = Command::new("find");
    find.arg(&root.path).arg("-xdev").args(how);
    let (seconds, bytes) = read_output(&mut find)?;
    // Each is a line.
    ensure!(bytes > root.files.len() as u64, "find found too little");
    Ok(seconds)
}

fn tar(path: &Path) -> Result<f64> {
    let mut tar = Command::new("tar");
    tar.args(["--create", "--file=-", "--one-file-system", "--directory"]);
    tar.arg(path).arg(".");
    let (seconds, bytes) = read_output(&mut tar)?;
    ensure!(bytes > 0, "tar wrote nothing");
    Ok(seconds)
}

/// Runs a command and reads what it prints to its end; seconds and bytes.
fn read_output(command: &mut Command) -> Result<(f64, u64)> {
    let begin = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut output = child.stdout.take().context("stdout is piped")?;
    let mut piece = vec![0; PIECE];
    let mut bytes = 0;
    loop {
        match output.read(&mut piece)? {
            0 => break,
            read => bytes += read as u64,
        }
    }
    let status = child.wait()?;
    let seconds = begin.elapsed().as_secs_f64();
    ensure!(status.success(), "{command:?} failed ({status})");
    Ok((seconds, bytes))
}

fn small_files(root: &Root) -> Result<f64> {
    let files: Vec<&Path> = root.small().collect();
    ensure!(!files.is_empty(), "the image has no small files");
    let mut piece = vec![0; PIECE];
    let begin = Instant::now();
    for path in &files {
        read_to_end(path, &mut piece)?;
    }
    let count = u32::try_from(files.len())?;
    Ok(begin.elapsed().as_secs_f64() / f64::from(count))
}

fn sequential(path: &Path) -> Result<f64> {
    let mut piece = vec![0; PIECE];
    let begin = Instant::now();
    read_to_end(path, &mut piece)?;
    Ok(begin.elapsed().as_secs_f64())
}

fn read_to_end(path: &Path, piece: &mut [u8]) -> Result<()> {
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    while file.read(piece)? > 0 {
        black_box(&*piece);
    }
    Ok(())
}

fn random((path, len): &(std::path::PathBuf, u64)) -> Result<f64> {
    let file = File::open(path)?;
    let mut page = [0; PAGE];
    let mut taken = Vec::with_capacity(READS_MAX);
    for at in shuffled(len / PAGE as u64) {
        let begin = Instant::now();
        file.read_exact_at(&mut page, at * PAGE as u64)?;
        taken.push(begin.elapsed().as_secs_f64());
        black_box(&page);
    }
    if taken.is_empty() {
        bail!("{} is less than a page", path.display());
    }
    Ok(spread(taken.into_iter()).median)
}

/// At most [`READS_MAX`] of the numbers below `count`, each once, in an order that is always the
/// same and that no read-ahead could guess.
fn shuffled(count: u64) -> Vec<u64> {
    let mut all: Vec<u64> = (0..count).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for last in (1..all.len()).rev() {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let bound = last as u64 + 1;
        all.swap(last, usize::try_from(state % bound).unwrap_or(0));
    }
    all.truncate(READS_MAX);
    all
}

fn exec(image: Image, root: &Path) -> Result<f64> {
    let command: &[&str] = match image {
        Image::Debian | Image::Nginx => &["perl", "-MPOSIX", "-e", "1"],
        Image::Python => &["python3", "-c", "pass"],
        Image::Java => &["java", "-version"],
        Image::Ml => &["python3", "-c", "import torch"],
    };
    let mut chroot = Command::new("chroot");
    chroot.arg(root).args(command);
    chroot
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let begin = Instant::now();
    crate::process::run(&mut chroot)?;
    Ok(begin.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shuffle_has_each_once_and_is_always_the_same() {
        assert_eq!(shuffled(0), [0_u64; 0]);
        assert_eq!(shuffled(1), [0]);
        let some = shuffled(1000);
        assert_eq!(some, shuffled(1000));
        let mut sorted = some.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        let ahead = some.windows(2).filter(|pair| pair[0] + 1 == pair[1]);
        assert!(ahead.count() < 10);
        assert_eq!(shuffled(1 << 20).len(), READS_MAX);
    }
}
