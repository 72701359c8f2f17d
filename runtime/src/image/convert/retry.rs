//! Pushing again after failures that may pass.
//!
//! Invariant: only transient failures are tried again, a bounded number of times.

use std::time::Duration;

use lazarette_fetcher::{Error, Result};

/// How often a blob or manifest is pushed before its failure is final.
const PUSH_TRIES: u32 = 5;
/// Longest pause that a registry may ask for.
const PUSH_PAUSE_MAX: Duration = Duration::from_secs(60);

/// Does `work` again after failures that may pass, the first time after `pause`.
pub(super) async fn retried<T>(
    mut pause: Duration,
    work: impl AsyncFn() -> Result<T>,
) -> Result<T> {
    let mut tries = 1;
    loop {
        match work().await {
            Err(error) if error.is_transient() && tries < PUSH_TRIES => {
                let asked = match &error {
                    Error::RateLimited { retry_after, .. } => *retry_after,
                    _ => None,
                };
                let wait = asked.map_or(pause, |asked| asked.max(pause).min(PUSH_PAUSE_MAX));
                tokio::time::sleep(wait).await;
                pause *= 2;
                tries += 1;
            }
            outcome => return outcome,
        }
    }
}
