//! Every command but `run`.
//!
//! Invariant: each function asks the engine once and prints once.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use lazarette_fetcher::index::write::HotFiles;

use super::OutputFormat;
use super::args::{ConvertArgs, ImageArgs, ImageCommand, IndexArgs, PullArgs, RmiArgs};
use super::output::{emit, print_json, print_rows};
use super::progress::Display;
use crate::engine::{Engine, PullReport};
use crate::image::convert::{ConvertEvent, parse_prioritized};
use crate::image::pull::PullMode;
use crate::trace::{Trace, copied_words, human_bytes, percent};
use crate::{Error, Result};

/// `laz pull`
pub(super) async fn pull(
    engine: &Arc<Engine>,
    args: PullArgs,
    format: OutputFormat,
    origin: Instant,
) -> Result<u8> {
    let mode = if args.full {
        PullMode::Full
    } else {
        PullMode::Lazy
    };
    let mut puller = engine.puller(mode, Trace::new(origin));
    // All of an image is fetched ahead of time where nothing starts right behind it.
    puller.read_soon = !args.full;
    let image = engine.resolve_to_open(&args.reference, &puller).await?;
    let display = Display::start(Arc::clone(&puller.progress));
    let outcome = engine.pull(&image, &puller).await;
    display.stop();
    outcome?;
    let report = PullReport {
        reference: image.reference.clone(),
        manifest_digest: image.manifest.digest,
        layers: image.layers.len(),
        image_bytes: image.layer_bytes(),
        fetched_bytes: engine.registry().stats().bytes_received,
        copied_bytes: puller.progress.copied(),
    };
    match format {
        OutputFormat::Json => print_json(&report),
        OutputFormat::Table => emit(&format!(
            "{}@{}\n{} layers, {}; {} fetched{}\n",
            report.reference,
            report.manifest_digest,
            report.layers,
            human_bytes(report.image_bytes),
            human_bytes(report.fetched_bytes),
            copied_words(report.copied_bytes)
        )),
    }?;
    Ok(0)
}

/// `laz images`
pub(super) async fn images(engine: &Arc<Engine>, format: OutputFormat) -> Result<u8> {
    let images = engine.images().await?;
    let header = ["REFERENCE", "MANIFEST", "LAYERS", "SIZE", "PRESENT"];
    print_rows(format, &images, header, |image| {
        [
            image.reference.to_string(),
            image.manifest_digest.hex().chars().take(12).collect(),
            image.layers.to_string(),
            human_bytes(image.image_bytes),
            format!("{:.0} %", percent(image.present_bytes, image.data_bytes)),
        ]
    })?;
    Ok(0)
}

/// `laz rmi`
pub(super) async fn rmi(engine: &Arc<Engine>, args: RmiArgs, format: OutputFormat) -> Result<u8> {
    let (mut removed, mut failed) = (Vec::new(), None);
    // All of them, whatever becomes of one: who asks again would be told that they are gone.
    for reference in &args.references {
        match engine.remove_image(reference).await {
            Ok(done) => removed.push(done),
            Err(error) => {
                eprintln!("laz: {}", error.report());
                failed.get_or_insert(error.exit_code());
            }
        }
    }
    if let Some(code) = failed.filter(|_| removed.is_empty()) {
        return Ok(code);
    }
    print_rows(
        format,
        &removed,
        ["REMOVED", "LAYERS", "FREED"],
        |removed| {
            [
                removed.reference.to_string(),
                removed.layers.to_string(),
                human_bytes(removed.freed_bytes),
            ]
        },
    )?;
    Ok(failed.unwrap_or_default())
}

/// `laz image`
pub(super) async fn image(
    engine: &Arc<Engine>,
    args: ImageArgs,
    format: OutputFormat,
    origin: Instant,
) -> Result<u8> {
    match args.command {
        ImageCommand::Convert(args) => convert(engine, args, format).await,
        ImageCommand::Index(args) => index(engine, args, format, origin).await,
        ImageCommand::Profile(args) => super::profile::profile(engine, args, format).await,
    }
}

async fn index(
    engine: &Arc<Engine>,
    args: IndexArgs,
    format: OutputFormat,
    origin: Instant,
) -> Result<u8> {
    let puller = engine.puller(PullMode::Lazy, Trace::new(origin));
    let image = engine.resolve_to_open(&args.reference, &puller).await?;
    let display = Display::start(Arc::clone(&puller.progress));
    let pulled = engine.pull(&image, &puller).await;
    display.stop();
    let layers = pulled?;
    engine.shape(&image).await;
    let indexes = engine.indexes(&layers).await?;
    let header = ["LAYER", "FORMAT", "SIZE", "INDEX", "LAZY"];
    print_rows(format, &indexes, header, |index| {
        [
            index.layer.hex().chars().take(12).collect(),
            index.format.clone(),
            human_bytes(index.blob_bytes),
            human_bytes(index.index_bytes),
            format!("{:.0} %", index.lazy_percent),
        ]
    })?;
    if let (true, Some(key)) = (args.push, &args.key) {
        let (count, digest) = engine.push_indexes(&image, &layers, key).await?;
        eprintln!("{count} indexes pushed as {digest}");
    }
    Ok(0)
}

async fn convert(engine: &Arc<Engine>, args: ConvertArgs, format: OutputFormat) -> Result<u8> {
    let hot = match &args.prioritize {
        Some(file) => Some(HotFiles::whole(read_list(file)?)),
        None if args.profile => Some(engine.hot_files(&args.src).await?),
        None => None,
    };
    let report = engine
        .convert(&args.src, &args.dst, (args.format(), hot), &say)
        .await?;
    if !report.missing_prioritized.is_empty() {
        eprintln!(
            "laz: the image does not have these prioritized files: {}",
            report.missing_prioritized.join(", ")
        );
    }
    match format {
        OutputFormat::Json => print_json(&report),
        OutputFormat::Table => emit(&format!("{}@{}\n", args.dst, report.manifest.digest)),
    }?;
    Ok(0)
}

/// Largest list of prioritized files, bytes.
const LIST_BYTES_MAX: u64 = 64 << 20;

fn read_list(file: &Path) -> Result<Vec<String>> {
    let io = |source| Error::io("read", file, source);
    let size = std::fs::metadata(file).map_err(io)?.len();
    if size > LIST_BYTES_MAX {
        return Err(Error::Refused {
            what: format!("{} has {size} bytes", file.display()),
            todo: format!("list the files to put first, in at most {LIST_BYTES_MAX} bytes"),
        });
    }
    let text = std::fs::read_to_string(file).map_err(io)?;
    Ok(parse_prioritized(&file.display().to_string(), &text)?)
}

/// Says a line for each step of a conversion.
fn say(event: ConvertEvent<'_>) {
    match event {
        ConvertEvent::Resolved { layers, bytes } => {
            eprintln!("{layers} layers, {}", human_bytes(bytes));
        }
        ConvertEvent::Fetching { layer, from } => {
            eprintln!("layer {layer}: fetching {}", human_bytes(from.size));
        }
        ConvertEvent::Compressing {
            layer,
            uncompressed_size,
        } => {
            eprintln!(
                "layer {layer}: compressing {}",
                human_bytes(uncompressed_size)
            );
        }
        ConvertEvent::Pushed { layer, to } => {
            eprintln!("layer {layer}: pushed {}", human_bytes(to.blob_size));
        }
    }
}
