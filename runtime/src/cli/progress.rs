//! Progress on standard error: bars on a terminal, plain lines elsewhere.
//!
//! Invariant: drawing only reads counters; it can neither slow nor fail the work.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::task::JoinHandle;

use crate::image::pull::{LayerProgress, PullProgress};
use crate::trace::human_bytes;

/// How often bars are redrawn; 10 Hz looks alive and costs nothing.
const REDRAW: Duration = Duration::from_millis(100);

/// Draws `progress` until it is stopped.
pub(super) struct Display {
    progress: Arc<PullProgress>,
    bars: Option<(MultiProgress, JoinHandle<()>)>,
}

impl Display {
    /// Starts to draw.
    pub(super) fn start(progress: Arc<PullProgress>) -> Self {
        let bars = std::io::stderr().is_terminal().then(|| {
            let multi = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
            let task = tokio::spawn(draw(multi.clone(), Arc::clone(&progress)));
            (multi, task)
        });
        Self { progress, bars }
    }

    /// Stops to draw and, off a terminal, says in a line a layer what was done.
    pub(super) fn stop(self) {
        match self.bars {
            Some((multi, task)) => {
                task.abort();
                let _ = multi.clear();
            }
            None => {
                for layer in self.progress.layers() {
                    eprintln!(
                        "layer {}: {} of {} fetched, {}",
                        short(&layer),
                        human_bytes(layer.received()),
                        human_bytes(layer.total()),
                        layer.state()
                    );
                }
            }
        }
    }
}

async fn draw(multi: MultiProgress, progress: Arc<PullProgress>) {
    let style =
        ProgressStyle::with_template("{prefix} {bar:30} {bytes:>10}/{total_bytes:<10} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
    let mut bars: Vec<ProgressBar> = Vec::new();
    loop {
        for (i, layer) in progress.layers().iter().enumerate() {
            if i == bars.len() {
                let bar = multi.add(ProgressBar::new(layer.total()).with_style(style.clone()));
                bar.set_prefix(short(layer));
                bars.push(bar);
            }
            if let Some(bar) = bars.get(i) {
                bar.set_position(layer.received());
                bar.set_message(layer.state());
            }
        }
        tokio::time::sleep(REDRAW).await;
    }
}

fn short(layer: &LayerProgress) -> String {
    layer.digest().hex().chars().take(12).collect()
}
