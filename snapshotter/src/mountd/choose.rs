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

/// What came of trying what a wish needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Trial {
    /// The kernel does it; whether it fails short reads of an EROFS.
    Works { fails_short_reads: bool },
    /// The kernel does not, and why.
    Fails(String),
    /// The disk took no file to try it with, and why: nothing is known of the kernel.
    Untried(String),
}

/// Tries in `dir`, on the file system that holds the store, what the wish needs, chooses, and
/// says so once in the log. Takes milliseconds and blocks for them.
///
/// # Errors
/// `Environment` where the wish cannot be had.
pub fn select(dir: &Path, wish: Backend) -> Result<Choice> {
    let tried = match wish {
        Backend::Fuse => Trial::Works {
            fails_short_reads: true,
        },
        Backend::Erofs | Backend::Auto => try_erofs(dir),
        Backend::Fanotify => probe(dir),
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
            "this kernel may take for zeros what a reader that is killed did not get: complete \
             layers are not left to it, and small files are read one request each"
        );
    }
    Ok(choice)
}

/// Chooses, given what came of trying what the wish needs, EROFS over FUSE for `Auto`.
///
/// A full disk says nothing of the kernel: layers that the mount server shows are answered for,
/// and evicted from, by a daemon that goes by the wish, and kept to the cautious way.
///
/// # Errors
/// Why the wish cannot be had.
fn choose(wish: Backend, tried: Trial) -> Result<Choice, String> {
    let chose = |backend, fails_short_reads, reason: String| {
        Ok(Choice {
            backend,
            reason,
            fails_short_reads,
        })
    };
    let asked = || "it was asked for".to_owned();
    match (wish, tried) {
        (Backend::Fuse, _) => chose(wish, true, asked()),
        (Backend::Auto, Trial::Works { fails_short_reads }) => chose(
            Backend::Erofs,
            fails_short_reads,
            "fanotify shows zeros once its server and the guard are both killed; it has to be \
             asked for"
                .to_owned(),
        ),
        (_, Trial::Works { fails_short_reads }) => chose(wish, fails_short_reads, asked()),
        (Backend::Auto, Trial::Untried(why)) => chose(Backend::Erofs, false, untried(&why)),
        (_, Trial::Untried(why)) => chose(wish, false, untried(&why)),
        (Backend::Auto, Trial::Fails(why)) => chose(Backend::Fuse, true, format!("{TAKES}: {why}")),
        (Backend::Erofs, Trial::Fails(why)) => Err(format!("{TAKES}: {why}")),
        (Backend::Fanotify, Trial::Fails(why)) => Err(why),
    }
}

fn untried(why: &str) -> String {
    format!("it could not be tried: {why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case() {
        use Backend::{Auto, Erofs, Fanotify, Fuse};
        let works = |fails_short_reads| Trial::Works { fails_short_reads };
        let (yes, zeros) = (works(true), works(false));
        let (no, full) = (
            Trial::Fails("it does not".to_owned()),
            Trial::Untried("no space".to_owned()),
        );
        let table = [
            // wish, what came of it: choice, what its reason names, whether short reads fail
            (Fuse, &yes, Ok((Fuse, true)), "asked for"),
            (Fuse, &no, Ok((Fuse, true)), "asked for"),
            (Erofs, &yes, Ok((Erofs, true)), "asked for"),
            (Erofs, &zeros, Ok((Erofs, false)), "asked for"),
            (Erofs, &no, Err(()), "it does not"),
            (Erofs, &full, Ok((Erofs, false)), "no space"),
            (Fanotify, &yes, Ok((Fanotify, true)), "asked for"),
            (Fanotify, &no, Err(()), "it does not"),
            (Fanotify, &full, Ok((Fanotify, false)), "no space"),
            (Auto, &yes, Ok((Erofs, true)), "has to be asked for"),
            (Auto, &zeros, Ok((Erofs, false)), "has to be asked for"),
            (Auto, &no, Ok((Fuse, true)), "it does not"),
            (Auto, &full, Ok((Erofs, false)), "no space"),
        ];
        for (wish, tried, expected, word) in table {
            let row = format!("{wish:?} {tried:?}");
            let got = choose(wish, tried.clone());
            let (got, said) = match got {
                Ok(choice) => (
                    Ok((choice.backend, choice.fails_short_reads)),
                    choice.reason,
                ),
                Err(why) => (Err(()), why),
            };
            assert_eq!(got, expected, "{row}");
            assert!(said.contains(word), "{row}: {said}");
        }
    }
}
