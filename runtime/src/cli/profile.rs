//! `laz image profile`: what starts of an image read.
//!
//! Invariant: asks the engine once and prints once.

use std::sync::Arc;

use serde::Serialize;

use super::OutputFormat;
use super::args::{ProfileArgs, ProfileCommand};
use super::output::print_rows;
use crate::Result;
use crate::engine::Engine;
use crate::profile::ImageProfiles;
use crate::trace::human_bytes;

/// One line of `laz image profile show`.
#[derive(Debug, Serialize)]
struct Row {
    /// Digest of the command line.
    command: String,
    /// Its first word.
    program: String,
    /// Starts recorded.
    runs: u32,
    /// Blocks of 64 KiB that they read.
    blocks: usize,
    /// The pages in them, bytes.
    bytes: u64,
    /// Layers they lie in.
    layers: usize,
    /// Last start, seconds since 1970.
    updated_at: u64,
}

/// `laz image profile`
pub(super) async fn profile(
    engine: &Arc<Engine>,
    args: ProfileArgs,
    format: OutputFormat,
) -> Result<u8> {
    let profiles = match args.command {
        ProfileCommand::Show { reference } => engine.profiles(&reference).await?,
        ProfileCommand::Export { reference, file } => {
            engine.export_profiles(&reference, &file).await?
        }
        ProfileCommand::Push { reference } => {
            let (profiles, digest) = engine.push_profiles(&reference).await?;
            eprintln!("pushed as {digest}");
            profiles
        }
        ProfileCommand::Pull { reference } => engine.pull_profiles(&reference).await?,
        ProfileCommand::Import { reference, file } => {
            engine.import_profiles(&reference, &file).await?
        }
    };
    let header = ["COMMAND", "PROGRAM", "STARTS", "BLOCKS", "SIZE", "LAYERS"];
    print_rows(format, &rows(&profiles), header, |row| {
        [
            row.command.chars().skip("sha256:".len()).take(12).collect(),
            row.program.clone(),
            row.runs.to_string(),
            row.blocks.to_string(),
            human_bytes(row.bytes),
            row.layers.to_string(),
        ]
    })?;
    Ok(0)
}

fn rows(profiles: &ImageProfiles) -> Vec<Row> {
    let row = |profile: &crate::profile::CommandProfile| {
        let mut layers: Vec<u32> = profile.blocks.iter().map(|block| block.layer).collect();
        layers.sort_unstable();
        layers.dedup();
        Row {
            command: profile.command.to_string(),
            program: profile.program.clone(),
            runs: profile.runs,
            blocks: profile.blocks.len(),
            bytes: profile.bytes(),
            layers: layers.len(),
            updated_at: profile.updated_at,
        }
    };
    profiles.commands.iter().map(row).collect()
}
