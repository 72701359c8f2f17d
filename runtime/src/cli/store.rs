//! `laz store`: what is here, and keeping it small and sound.
//!
//! Invariant: each function asks the engine once for what it does and prints once.

use std::fmt::Write as _;
use std::sync::Arc;

use super::OutputFormat;
use super::args::{CheckArgs, DfArgs, EvictArgs, StoreArgs, StoreCommand};
use super::output::{emit, print_json, print_rows};
use crate::Result;
use crate::engine::{CheckReport, CheckedLayer, Engine, EvictWhat, Kept, StoreSummary};
use crate::trace::human_bytes;
use lazarette_fetcher::types::Digest;

/// What `laz store check` exits with when something is missing that was there.
const DAMAGED: u8 = 1;

/// `laz store`
pub(super) async fn store(
    engine: &Arc<Engine>,
    args: StoreArgs,
    format: OutputFormat,
) -> Result<u8> {
    match args.command {
        StoreCommand::Df(args) => df(engine, args, format).await,
        StoreCommand::Check(args) => check(engine, args, format).await,
        StoreCommand::Prune => prune(engine, format).await,
        StoreCommand::Evict(args) => evict(engine, args, format).await,
    }
}

async fn df(engine: &Arc<Engine>, args: DfArgs, format: OutputFormat) -> Result<u8> {
    let summary = engine.store_summary().await?;
    if args.summary {
        match format {
            OutputFormat::Json => print_json(&summary),
            OutputFormat::Table => emit(&summary_line(&summary)),
        }?;
        return Ok(0);
    }
    let layers = engine.layers().await?;
    let header = [
        "LAYER", "FORMAT", "FILES", "SIZE", "PRESENT", "ON DISK", "COPIED",
    ];
    print_rows(format, &layers, header, |layer| {
        [
            short(&layer.digest),
            layer.format.clone(),
            layer.files.to_string(),
            human_bytes(layer.data_bytes),
            human_bytes(layer.present_bytes),
            human_bytes(layer.disk_bytes),
            human_bytes(layer.copied_bytes),
        ]
    })?;
    if format == OutputFormat::Table {
        emit(&format!("\n{}", summary_line(&summary)))?;
    }
    Ok(0)
}

async fn check(engine: &Arc<Engine>, args: CheckArgs, format: OutputFormat) -> Result<u8> {
    let report = engine.check(args.repair).await?;
    match format {
        OutputFormat::Json => print_json(&report),
        OutputFormat::Table => emit(&check_text(&report)),
    }?;
    Ok(if report.is_sound() { 0 } else { DAMAGED })
}

async fn prune(engine: &Arc<Engine>, format: OutputFormat) -> Result<u8> {
    let pruned = engine.prune().await?;
    match format {
        OutputFormat::Json => print_json(&pruned),
        OutputFormat::Table => {
            let mut text = format!(
                "removed {} layers and {} blobs, {}\n",
                pruned.layers.len(),
                pruned.blobs.len(),
                human_bytes(pruned.freed_bytes)
            );
            text.push_str(&kept_text(&pruned.kept));
            emit(&text)
        }
    }?;
    Ok(0)
}

async fn evict(engine: &Arc<Engine>, args: EvictArgs, format: OutputFormat) -> Result<u8> {
    let what = match args.to {
        Some(bytes) => EvictWhat::To(bytes),
        None if args.all => EvictWhat::All,
        None => EvictWhat::Images(args.references),
    };
    let report = engine.evict(what).await?;
    match format {
        OutputFormat::Json => print_json(&report),
        OutputFormat::Table => {
            let mut text = format!(
                "evicted {} in {} chunks\n",
                human_bytes(report.evicted_bytes),
                report.evicted_chunks
            );
            text.push_str(&kept_text(&report.kept));
            text.push_str(&summary_line(&report.store));
            emit(&text)
        }
    }?;
    Ok(0)
}

fn check_text(report: &CheckReport) -> String {
    let (chunks, bytes) = report.layers.iter().fold((0, 0), |(chunks, bytes), layer| {
        (chunks + layer.chunks, bytes + layer.bytes)
    });
    let mut text = format!(
        "read {} in {chunks} chunks of {} layers, and {} blobs\n",
        human_bytes(bytes),
        report.layers.len(),
        report.blobs_right
    );
    for layer in report.layers.iter().filter(|layer| layer.is_damaged()) {
        let _ = writeln!(text, "layer {}: {}", layer.digest, damage(layer));
    }
    for layer in report.layers.iter().filter(|layer| layer.by_ztoc_alone) {
        let _ = writeln!(
            text,
            "layer {}: right as its zTOC says, which nothing here can check; `laz pull --full` of \
             its image does",
            layer.digest
        );
    }
    for blob in &report.blobs_lost {
        let what = match (&blob.error, blob.repaired) {
            (_, true) => "fetched again",
            (Some(error), false) => error,
            (None, false) => "pull its image again, or repair it",
        };
        let _ = writeln!(text, "blob {}: damaged and dropped; {what}", blob.digest);
    }
    text
}

fn damage(layer: &CheckedLayer) -> String {
    let mut words = Vec::new();
    if layer.dropped_chunks > 0 {
        words.push(format!("{} damaged chunks dropped", layer.dropped_chunks));
    }
    if layer.bitmap_lost {
        words.push("the record of what is present was lost".to_owned());
    }
    if !layer.damaged_files.is_empty() {
        let files = layer.damaged_files.join(", ");
        words.push(format!("damaged and dropped, only a help: {files}"));
    }
    words.extend(layer.error.clone());
    if layer.repaired {
        words.push("fetched again".to_owned());
    }
    words.join("; ")
}

fn kept_text(kept: &[Kept]) -> String {
    kept.iter()
        .map(|kept| format!("kept {}: {}\n", short(&kept.digest), kept.reason))
        .collect()
}

fn summary_line(summary: &StoreSummary) -> String {
    let budget = match summary.budget_bytes {
        Some(budget) => format!("of {} ", human_bytes(budget)),
        None => String::new(),
    };
    format!(
        "layers take {} {budget}on disk; {} free, {} must stay free\n",
        human_bytes(summary.used_bytes),
        human_bytes(summary.free_bytes),
        human_bytes(summary.free_floor_bytes)
    )
}

fn short(digest: &Digest) -> String {
    digest.hex().chars().take(12).collect()
}
