//! Why libcontainer could not make a container.
//!
//! Its errors name the step that failed; what failed in it is only logged, mostly by the
//! container's init, a process of its own. So what is logged as an error while a container
//! is made goes to a file that both processes have. The first line is the cause: the
//! later ones say what it was a part of.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use tracing::Level;

use crate::sys::process;

/// Most bytes read of the first line; it quotes a mount, or a path or two.
const LINE_BYTES_MAX: usize = 2048;

/// What is logged while a container is made.
pub(super) struct Cause(Arc<File>);

impl Cause {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(process::nameless_file()?)))
    }

    /// Runs `make`; errors that it logs, or a process that it forks, are kept.
    pub(super) fn watch<T>(&self, make: impl FnOnce() -> T) -> T {
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(Level::ERROR)
            .without_time()
            .with_level(false)
            .with_target(false)
            .with_ansi(false)
            .with_writer(Arc::clone(&self.0))
            .finish();
        tracing::subscriber::with_default(subscriber, make)
    }

    /// The first error that was kept.
    pub(super) fn first(&self) -> Option<String> {
        let mut bytes = [0; LINE_BYTES_MAX];
        // By position: the writers share the file's offset with us.
        let read = self.0.read_at(&mut bytes, 0).ok()?;
        let text = String::from_utf8_lossy(bytes.get(..read)?);
        let line = text.lines().next()?.trim();
        (!line.is_empty()).then(|| line.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_is_the_cause() {
        let cause = Cause::new().unwrap();
        cause.watch(|| tracing::warn!("not an error"));
        assert_eq!(cause.first(), None);
        let made = cause.watch(|| {
            tracing::error!(error = 7, "no such thing");
            tracing::error!("a part failed");
            "made"
        });
        assert_eq!(made, "made");
        assert_eq!(cause.first().as_deref(), Some("no such thing error=7"));
        let long = Cause::new().unwrap();
        long.watch(|| tracing::error!("{}", "ü".repeat(LINE_BYTES_MAX)));
        assert!(long.first().is_some_and(|line| line.starts_with('ü')));
    }
}
