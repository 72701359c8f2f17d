//! Blocking work beside the async workers.
//!
//! Invariant: file and database calls never run on an async worker. A panic in the work
//! is a panic of the caller, never a lost result.

/// Runs `work` on tokio's blocking pool. Dropping the future does not stop the work.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(stopped) => std::panic::resume_unwind(stopped.into_panic()),
    }
}
