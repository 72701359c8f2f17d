//! What indexing adds to streaming a gzip layer: the same bytes are inflated, hashed as blob
//! and as tar, and written to one file, without and with an index made on the way, taking
//! turns in one run. One thread each; times are its CPU time.
//!
//!     cargo bench --workspace --bench ingest --profile dev [-- LAYER.tar.gz [ROUNDS]]
//!
//! Without a layer it takes one made of files of this machine.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lazarette_fetcher::codec::deflate::MemberCompressor;
use lazarette_fetcher::codec::unpack;
use lazarette_fetcher::index::ingest::{Ingest, IngestPlan, LayerSink};
use lazarette_fetcher::test_util::content::{TAR_END, tar_file};
use lazarette_fetcher::types::{Algorithm, Digest, Hasher};

/// Bytes of the layer that is made where none is given.
const OWN_BYTES: usize = 64 << 20;
/// Where its files are from.
const OWN_DIR: &str = "/usr/bin";
/// What is handed on at a time, about what a connection brings.
const PIECE: usize = 64 << 10;
const ROUNDS: usize = 5;

fn main() -> Result<()> {
    // Cargo passes `--bench` along.
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let blob = match args.next() {
        Some(path) => fs::read(&path).with_context(|| format!("cannot read {path}"))?,
        None => own_layer()?,
    };
    let rounds = args.next().map_or(Ok(ROUNDS), |rounds| rounds.parse())?;
    let digest = Digest::sha256(&blob);
    let (mut plain, mut indexed) = (Vec::new(), Vec::new());
    let mut made = None;
    // Written over in every round: what new memory for a file costs is the machine's affair,
    // on a virtual one more than all the rest, and not the same twice.
    let file = tempfile::tempfile()?;
    stream(&blob, digest, &file)?;
    for _ in 0..rounds.max(1) {
        let (took, diff_id) = timed(|| stream(&blob, digest, &file))?;
        plain.push(took);
        let (took, index_bytes) = timed(|| index(&blob, (digest, diff_id), &file))?;
        indexed.push(took);
        made = Some(index_bytes);
    }
    let (plain, indexed) = (median(plain), median(indexed));
    let index_bytes = made.context("no round was run")?;
    println!("layer                {:>8.1} MB", megabytes(blob.len()));
    println!("streamed             {:>8.2} s", plain.as_secs_f64());
    println!("streamed and indexed {:>8.2} s", indexed.as_secs_f64());
    let ratio = indexed.as_secs_f64() / plain.as_secs_f64();
    println!("                     {ratio:>8.2} x");
    let share = 100.0 * megabytes(index_bytes) / megabytes(blob.len());
    println!("details and seams    {share:>8.2} % of the layer");
    Ok(())
}

/// Inflates, hashes and writes; the digest of the tar.
fn stream(blob: &[u8], digest: Digest, file: &File) -> Result<Digest> {
    let mut at = 0;
    let (mut of_blob, mut of_tar) = (sha256(), sha256());
    // What is hashed and inflated by turns is in the processor's cache for both.
    for piece in blob.chunks(PIECE) {
        of_blob.update(piece);
    }
    let mut decoder = unpack::decoder(blob)?;
    let mut buffer = vec![0; PIECE];
    loop {
        let count = decoder.read(&mut buffer)?;
        let bytes = buffer.get(..count).context("more than asked for")?;
        if bytes.is_empty() {
            break;
        }
        of_tar.update(bytes);
        file.write_all_at(bytes, at)?;
        at += bytes.len() as u64;
    }
    ensure!(of_blob.finish() == digest, "these are other bytes");
    Ok(of_tar.finish())
}

struct Sink(File);

impl LayerSink for Sink {
    fn write_at(&mut self, data_offset: u64, bytes: &[u8]) -> lazarette_fetcher::Result<()> {
        let written = self.0.write_all_at(bytes, data_offset);
        written.map_err(|error| lazarette_fetcher::Error::io("write", Path::new("a sink"), error))
    }
}

/// The same with an index; the bytes that stand beside the layer for it, but for the tables.
fn index(blob: &[u8], (digest, diff_id): (Digest, Digest), file: &File) -> Result<usize> {
    let plan = IngestPlan::new(digest, blob.len() as u64, Some(diff_id));
    let mut ingest = Ingest::new(plan, Sink(file.try_clone()?));
    for piece in blob.chunks(PIECE) {
        ingest.push(piece)?;
    }
    let made = ingest.finish()?;
    Ok(made.details.len() + made.seams.map_or(0, |seams| seams.len()))
}

/// A layer of files of this machine.
fn own_layer() -> Result<Vec<u8>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(OWN_DIR)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.symlink_metadata().is_ok_and(|meta| meta.is_file()))
        .collect();
    paths.sort_unstable();
    let mut tar = Vec::new();
    for path in paths {
        if tar.len() > OWN_BYTES {
            break;
        }
        let name = path.to_string_lossy();
        if name.len() <= 100 {
            tar.extend(tar_file(name.trim_start_matches('/'), &fs::read(&path)?));
        }
    }
    tar.extend(TAR_END);
    Ok(MemberCompressor::new(6).compress(&tar))
}

fn sha256() -> Hasher {
    Hasher::new(Algorithm::Sha256)
}

/// CPU time of `work`, which stays on its thread: what others do meanwhile is not in it.
fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(Duration, T)> {
    let began = cpu_time()?;
    let made = work()?;
    Ok((cpu_time()?.saturating_sub(began), made))
}

/// How long this thread has run (see proc_pid_schedstat(5)).
fn cpu_time() -> Result<Duration> {
    let stat = fs::read_to_string("/proc/thread-self/schedstat")?;
    let nanos = stat.split_ascii_whitespace().next();
    let nanos = nanos.context("an empty schedstat")?.parse()?;
    Ok(Duration::from_nanos(nanos))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn megabytes(bytes: usize) -> f64 {
    bytes as f64 / 1e6
}
