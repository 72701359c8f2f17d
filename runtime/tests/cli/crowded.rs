//! A container that reads more than the store may hold, through FUSE alone, while `laz` is
//! killed.
//!
//! Promise: what a container reads is right as long as it lives, the next start reads the same,
//! and the store takes no more than its budget, whatever those that were killed left in it.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::Stdio;

use lazarette_fetcher::test_util::FakeRegistry;
use lazarette_fetcher::test_util::content::noise;
use lazarette_fetcher::types::Digest;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::run::traces;
use crate::store::ok;
use crate::support::{Changes, File, Laz, Pushed, busybox, estargz, is_root, push, tar};
use crate::sys;

/// What is read is more than is recorded at once, and that more than the budget.
const FILES: usize = 24;
const FILE_BYTES: usize = 2_000_000;
const BUDGET: u64 = 12 << 20;
const KILLS: u32 = 10;
/// Files after which what was fetched is recorded, and the store brought back to its budget.
const RECORDED: usize = (32 << 20) / FILE_BYTES;

/// Compares all files, from line `$1` of the list on: `right` or what is wrong, a line each.
const READER: &str = r#"(busybox tail -n "+$1" /sums; busybox cat /sums) | while read sum path; do
    if said=$(busybox sha256sum "$path"); then
        case "$said" in "$sum "*) echo right;; *) echo "wrong: $path $said";; esac
    else
        echo "failed: $path"
    fi
done"#;

fn image(registry: &FakeRegistry) -> Pushed {
    let busybox = busybox();
    let contents: Vec<(String, Vec<u8>)> = (0..FILES)
        .map(|number| {
            let seed = u32::try_from(number).unwrap();
            let mut bytes = noise(seed, 0xff, FILE_BYTES);
            // A hole is not mistaken for a file.
            bytes.iter_mut().for_each(|byte| *byte |= 1);
            (format!("data/{number}"), bytes)
        })
        .collect();
    let mut sums = String::new();
    for (path, bytes) in &contents {
        writeln!(sums, "{} /{path}", Digest::sha256(bytes).hex()).unwrap();
    }
    let file = |path, mode, bytes| File { path, mode, bytes };
    let mut files = vec![
        file("bin/busybox", 0o755, &busybox),
        file("sums", 0o644, sums.as_bytes()),
    ];
    files.extend(
        contents
            .iter()
            .map(|(path, bytes)| file(path, 0o644, bytes)),
    );
    push(registry, &estargz(tar(&files)), &Changes::default())
}

/// Starts a container that reads from file `from` on, and kills `laz` after `lines` of what it
/// says; returns how many files it read, which all were right.
async fn read(laz: &Laz, image: &Pushed, from: usize, lines: Option<usize>) -> usize {
    let from = (from + 1).to_string();
    let run = ["run", "--rm", "--backend", "fuse", &image.reference];
    let script = ["/bin/busybox", "sh", "-c", READER, "sh", &from];
    let mut command = laz.command(&[], &[&run[..], &script].concat());
    let read = tokio::task::spawn_blocking(move || {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut right = 0;
        for line in out.lines() {
            if Some(right) == lines {
                child.kill().unwrap();
            }
            match line.unwrap().as_str() {
                "right" => right += 1,
                // It may live a moment longer than what it reads.
                line if line.starts_with("failed") => {
                    assert!(lines.is_some_and(|lines| right >= lines), "{line}");
                }
                line => panic!("{line}"),
            }
        }
        let ended = child.wait().unwrap();
        assert_eq!(ended.success(), lines.is_none(), "{ended:?}");
        right
    });
    read.await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_laz_is_killed_while_it_evicts_what_its_container_reads() {
    if !is_root("privileged_laz_is_killed_while_it_evicts_what_its_container_reads") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = image(&registry);
    let laz = Laz::new();
    let mut config = std::fs::read_to_string(laz.path("config.toml")).unwrap();
    config = config.replace("900ms", "2m");
    config.push_str(&format!(
        "[store]\nbudget = \"{BUDGET}\"\nfree_floor = \"0\"\n"
    ));
    std::fs::write(laz.path("config.toml"), config).unwrap();
    let seed = rand::random();
    let mut rng = StdRng::seed_from_u64(seed);
    let _ = std::io::stderr().write_fmt(format_args!("seed {seed}\n"));
    for kill in 0..KILLS {
        let from = rng.random_range(0..FILES);
        let lines = match kill % 2 {
            0 => rng.random_range(RECORDED - 2..FILES),
            _ => rng.random_range(0..RECORDED),
        };
        read(&laz, &image, from, Some(lines)).await;
    }
    assert_eq!(read(&laz, &image, 0, None).await, 2 * FILES);
    assert_eq!(traces(&laz), std::collections::BTreeSet::new());
    let checked = ok(&laz, &["store", "check"]).await;
    assert_eq!(checked["layers"][0]["dropped_chunks"], 0, "{checked}");
    let on_disk = sys::blocks_of(&crate::store::data_file(&laz)) * 512;
    let df = ok(&laz, &["store", "df", "--summary"]).await;
    let used = df["used_bytes"].as_u64().unwrap();
    assert_eq!(used, on_disk, "{df}");
    assert!(used <= BUDGET, "{df}");
}
