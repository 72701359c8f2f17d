//! The warm path: complete images shown by us beside overlayfs on ext4, in one run.
//!
//! One containerd has every image once by its own overlayfs snapshotter, which unpacks it, and once
//! by each `lazd`, a backend each. All roots are mounted at once, their trees and bytes are compared,
//! which also makes ours complete, ours are mounted again, and then every step of [`step::STEPS`] is done in all of them
//! one after another, in an order that turns from round to round.
//!
//! Invariant: what is compared is the same tree, the same files and the same places in them; a
//! step's state is made anew before each sample. It never builds or pushes: `benches/warm.sh`
//! has done that before, and takes it away after.

mod act;
mod bed;
mod report;
mod root;
mod step;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use self::bed::Bed;
use self::report::{Report, Sample};
use self::root::Root;
use self::step::STEPS;
use crate::plan::Image;

/// What `warm` takes.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Registry that holds the images
    #[arg(long, value_name = "HOST:PORT")]
    registry: String,
    /// Empty directory for stores, sockets and mounts, on ext4
    #[arg(long)]
    scratch: PathBuf,
    /// The lazd program
    #[arg(long)]
    lazd: PathBuf,
    /// Directory with containerd 2.1 or later and its ctr
    #[arg(long)]
    containerd: PathBuf,
    /// Images to mount
    #[arg(long, value_enum, value_delimiter = ',', required = true)]
    images: Vec<Image>,
    /// Backends of `[mounts]` in lazd's config, each measured
    #[arg(long, value_delimiter = ',', default_value = "erofs,fuse")]
    backends: Vec<String>,
    /// Rounds; each does every step once in every root
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Mount as a container has it, with a directory for what is written, instead of a view
    #[arg(long)]
    writable: bool,
    /// Measure containers that began before the image was complete
    #[arg(long)]
    begun: bool,
    /// Directory for warm.json
    #[arg(long)]
    out: PathBuf,
}

/// Measures, prints a table and writes all samples.
pub(crate) fn measure(options: &Options) -> Result<()> {
    check_file_system(&options.scratch)?;
    let bed = Bed::start(options)?;
    fs::create_dir_all(&options.out)?;
    let path = options.out.join("warm.json");
    let mut report = Report::new(crate::this_machine(options.rounds), options.writable);
    for &image in &options.images {
        let roots = bed.roots(image)?;
        eprintln!("{}: comparing the trees", image.name());
        root::must_be_equal(&roots)?;
        if !options.begun {
            bed.mount_again(image)?;
        }
        rounds(image, &roots, options.rounds, &mut report)?;
        // What was measured before a failure is not lost.
        fs::write(&path, report.json()?).with_context(|| format!("write {}", path.display()))?;
        print!("{}", report.table(image));
    }
    println!(
        "\n{}\nsamples: {}",
        report.machine.join("\n"),
        path.display()
    );
    Ok(())
}

fn rounds(image: Image, roots: &[Root], rounds: u32, report: &mut Report) -> Result<()> {
    for round in 1..=rounds {
        for step in &STEPS {
            let roots = turn(roots, round);
            let values = act::measure(step, image, &roots)?;
            let samples = roots.iter().zip(values).map(|(root, value)| Sample {
                image,
                system: root.name.clone(),
                step: step.name,
                state: step.state,
                round,
                value,
            });
            report.samples.extend(samples);
        }
        eprintln!("{}: round {round} of {rounds} done", image.name());
    }
    Ok(())
}

/// The roots in the order of a round, which are numbered from 1: each begins another one, and
/// once each has begun, the same the other way round.
fn turn(roots: &[Root], round: u32) -> Vec<&Root> {
    let mut order: Vec<&Root> = roots.iter().collect();
    let (round, count) = (round.saturating_sub(1) as usize, order.len().max(1));
    order.rotate_left(round % count);
    if (round / count) % 2 == 1 {
        order.reverse();
    }
    order
}

/// The reference is named for it.
fn check_file_system(scratch: &Path) -> Result<()> {
    fs::create_dir_all(scratch)?;
    let mut command = std::process::Command::new("stat");
    command.args(["--file-system", "--format=%T"]).arg(scratch);
    let kind = crate::process::output(&mut command)?;
    // ext2, 3 and 4 have one number.
    if kind.trim() != "ext2/ext3" {
        bail!("{} is on {}, not on ext4", scratch.display(), kind.trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orders(names: &[&str], rounds: u32) -> Vec<String> {
        let roots: Vec<Root> = names.iter().map(|name| Root::named(name)).collect();
        let names = |round| {
            turn(&roots, round)
                .iter()
                .map(|root| root.name.as_str())
                .collect()
        };
        (1..=rounds).map(names).collect()
    }

    #[test]
    fn every_root_takes_every_place() {
        assert_eq!(orders(&["a"], 2), ["a", "a"]);
        assert_eq!(orders(&["a", "b"], 4), ["ab", "ba", "ba", "ab"]);
        let of_three = ["abc", "bca", "cab", "cba", "acb", "bac"];
        assert_eq!(orders(&["a", "b", "c"], 6), of_three);
    }
}
