//! What a pull holds in memory does not grow with the layer.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::process::{Command, Stdio};
use std::time::Duration;

use lazarette_fetcher::test_util::FakeRegistry;
use lazarette_fetcher::test_util::content::{TAR_END, tar_file};
use lazarette_fetcher::types::Digest;

use crate::support::{Changes, Layer, Laz, Pushed, incompressible, push};

/// Bytes of each file.
const FILE_BYTES: usize = 32 << 10;
/// How many of them nothing makes smaller.
const NOISE_BYTES: usize = 3 << 10;
const SMALL_MIB: usize = 32;
const LARGE_MIB: usize = 256;
/// What the large one may take more, bytes. Its tables have 7 times the entries; what is on
/// its way, decoded and hashed is as much as of the small one.
const GROWTH_MAX: u64 = 24 << 20;
/// How often the kernel is asked.
const PAUSE: Duration = Duration::from_millis(5);

/// A gzip layer of files that compress to a tenth, no two alike, made without holding it.
fn layer(mib: usize) -> Layer {
    let here = tempfile::tempdir().unwrap();
    let path = here.path().join("layer");
    let mut out = BufWriter::new(File::create(&path).unwrap());
    let noise = incompressible(1 << 20);
    for number in 0..(mib << 20) / FILE_BYTES {
        let line = format!("this is file {number:08}, and it says so again and again\n");
        let from = number * 7919 % (noise.len() - NOISE_BYTES);
        let mut content = noise[from..from + NOISE_BYTES].to_vec();
        content.extend(line.bytes().cycle().take(FILE_BYTES - NOISE_BYTES));
        out.write_all(&tar_file(&format!("data/{number:08}"), &content))
            .unwrap();
    }
    out.write_all(&TAR_END).unwrap();
    out.into_inner().unwrap();
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program)
            .args(args)
            .arg(&path)
            .output()
            .unwrap();
        assert!(output.status.success(), "{program}: {output:?}");
        output.stdout
    };
    let sum = String::from_utf8(run("sha256sum", &[])).unwrap();
    let hex = sum.split(' ').next().unwrap();
    Layer {
        diff_id: Digest::parse(&format!("sha256:{hex}")).unwrap(),
        blob: run("gzip", &["-1nc"]),
        toc_digest: None,
    }
}

/// The most that the process had in memory by now, bytes; `None` once it has ended.
fn peak(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

/// The most that pulling all of the image took, bytes.
async fn peak_of(args: &[&str], image: &Pushed, laz: &Laz) -> u64 {
    let args: Vec<&str> = args
        .iter()
        .copied()
        .chain([image.reference.as_str()])
        .collect();
    let mut command = laz.command(&[], &args);
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    let work = move || {
        let mut most = 0;
        while child.try_wait().unwrap().is_none() {
            // It never goes down, so only what came in the last moment is missed.
            most = most.max(peak(child.id()).unwrap_or(0));
            std::thread::sleep(PAUSE);
        }
        assert!(child.wait().unwrap().success());
        most
    };
    tokio::task::spawn_blocking(work).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_takes_as_much_memory_whatever_the_size_of_the_layer() {
    let registry = FakeRegistry::start().await;
    let mut peaks = Vec::new();
    for mib in [SMALL_MIB, LARGE_MIB] {
        let image = push(&registry, &layer(mib), &Changes::default());
        let laz = Laz::new();
        // Streamed, and then again span by span.
        let streamed = peak_of(&["pull", "--full"], &image, &laz).await;
        assert!(laz.run(&["store", "evict", "--all"]).await.code == 0);
        let filled = peak_of(&["pull", "--full"], &image, &laz).await;
        println!(
            "{mib} MiB: {} KiB streamed, {} KiB filled",
            streamed >> 10,
            filled >> 10
        );
        peaks.push([streamed, filled]);
    }
    let [small, large] = [peaks[0], peaks[1]];
    for (small, large) in small.into_iter().zip(large) {
        assert!(small > 8 << 20, "{small} bytes: nothing was measured");
        assert!(large <= small + GROWTH_MAX, "{small} bytes, then {large}");
    }
}
