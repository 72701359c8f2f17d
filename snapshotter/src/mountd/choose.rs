//! Which backend shows layers, and why.
//!
//! Invariant: [`choose`] is pure; the same facts give the same choice. A wish is kept or refused,
//! never replaced by something else. Nothing is tried that the wish has no need of.

use std::path::Path;

use super::Through;
use super::probe::probe;
use super::try_erofs::try_erofs;
use crate::fuse::Backend;
use crate::{Error, Result};

/// What is said where the kernel makes no EROFS.
const TAKES: &str = "erofs cannot be used (Linux 6.12 makes it of files, on a disk)";

/// What was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// [`Backend::Fanotify`], [`Backend::Erofs`] or [`Backend::Fuse`].
    pub backend: Backend,
    /// For the log.
    pub reason: String,
    /// Whether the kernel fails a read of an EROFS that got less than it wanted. Where it does
    /// not, it keeps zeros in place of the rest when a reader is killed: then nothing that can
    /// come in pieces may be below one.
    pub fails_short_reads: bool,
}

impl Choice {
    /// Through what the mount server is to get the data; `None` where it has no part in it.
    pub fn through(&self) -> Option<Through> {
        match self.backend {
            Backend::Fanotify => Some(Through::Fanotify),
            Backend::Erofs => Some(Through::Fuse),
            Backend::Fuse | Backend::Auto => None,
        }
    }
}

/// Tries in `dir`, on the file system that holds the store, what the wish needs, chooses, and
/// says so once in the log. Takes milliseconds and blocks for them.
///
/// # Errors
/// `Environment` where the wish cannot be had.
pub fn select(dir: &Path, wish: Backend) -> Result<Choice> {
    let tried = match wish {
        Backend::Fuse => Ok(true),
        Backend::Erofs | Backend::Auto => try_erofs(dir).map_err(|error| error.to_string()),
        Backend::Fanotify => probe(dir).map(|()| true),
    };
    let chosen = choose(wish, tried);
    let choice = chosen.map_err(|detail| Error::Environment {
        op: "have the backend that was asked for",
        detail: format!("{detail}; use the backend \"auto\""),
    })?;
    let (backend, reason) = (choice.backend, &choice.reason);
    tracing::info!(?backend, reason, "layers are shown");
    if !choice.fails_short_reads {
        tracing::warn!(
            "this kernel takes for zeros what a reader that is killed did not get: complete layers \
             are not left to it, and small files are read one request each"
        );
    }
    Ok(choice)
}

/// Chooses, where `tried` says whether this kernel does what the wish needs, EROFS over FUSE
/// for `Auto`, and whether it then fails short reads.
///
/// # Errors
/// Why the wish cannot be had.
fn choose(wish: Backend, tried: Result<bool, String>) -> Result<Choice, String> {
    let fails_short_reads = *tried.as_ref().unwrap_or(&true);
    let chose = |backend, reason: String| {
        Ok(Choice {
            backend,
            reason,
            fails_short_reads,
        })
    };
    match (wish, tried) {
        (Backend::Fuse, _) | (Backend::Erofs | Backend::Fanotify, Ok(_)) => {
            chose(wish, "it was asked for".to_owned())
        }
        (Backend::Erofs, Err(why)) => Err(format!("{TAKES}: {why}")),
        (Backend::Fanotify, Err(why)) => Err(why),
        (Backend::Auto, Ok(_)) => chose(
            Backend::Erofs,
            "fanotify shows zeros once its server and the guard are both killed; it has to be \
             asked for"
                .to_owned(),
        ),
        (Backend::Auto, Err(why)) => chose(Backend::Fuse, format!("{TAKES}: {why}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case() {
        use Backend::{Auto, Erofs, Fanotify, Fuse};
        let (yes, zeros, no) = (Ok(true), Ok(false), Err("it does not"));
        let table = [
            // wish, whether it works: choice, what its reason names
            (Fuse, yes, Ok(Fuse), "asked for"),
            (Fuse, no, Ok(Fuse), "asked for"),
            (Erofs, yes, Ok(Erofs), "asked for"),
            (Erofs, no, Err(()), "it does not"),
            (Fanotify, yes, Ok(Fanotify), "asked for"),
            (Fanotify, no, Err(()), "it does not"),
            (Auto, yes, Ok(Erofs), "has to be asked for"),
            (Auto, zeros, Ok(Erofs), "has to be asked for"),
            (Erofs, zeros, Ok(Erofs), "asked for"),
            (Auto, no, Ok(Fuse), "it does not"),
        ];
        for (wish, tried, expected, word) in table {
            let row = format!("{wish:?} {tried:?}");
            match (choose(wish, tried.map_err(str::to_owned)), expected) {
                (Ok(choice), Ok(backend)) => {
                    assert_eq!(choice.backend, backend, "{row}");
                    assert_eq!(choice.fails_short_reads, tried != zeros, "{row}");
                    assert!(choice.reason.contains(word), "{row}: {}", choice.reason);
                }
                (Err(why), Err(())) => assert!(why.contains(word), "{row}: {why}"),
                (got, _) => panic!("{row}: {got:?}"),
            }
        }
    }
}
