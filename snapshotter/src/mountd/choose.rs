//! Which backend shows layers, and why.
//!
//! Invariant: [`choose`] is pure; the same facts give the same choice. A wish is kept or refused,
//! never replaced by something else.

use std::path::Path;

use super::Through;
use super::probe::probe;
use super::try_erofs::try_erofs;
use crate::fuse::Backend;
use crate::{Error, Result};

/// What this kernel was seen to do, or why not; see [`probe`](super::probe).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probed {
    /// It asks before an EROFS reads its data file, and keeps to the answer.
    pub fanotify: std::result::Result<(), String>,
    /// It mounts an EROFS whose data file is served by FUSE.
    pub erofs: std::result::Result<(), String>,
}

/// What was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// [`Backend::Fanotify`], [`Backend::Erofs`] or [`Backend::Fuse`].
    pub backend: Backend,
    /// For the log.
    pub reason: String,
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

/// Probes in `dir`, on the file system that holds the store, chooses, and says so once in the
/// log. Takes milliseconds and blocks for them.
///
/// # Errors
/// `Environment` where the wish cannot be had.
pub fn select(dir: &Path, wish: Backend) -> Result<Choice> {
    let erofs = try_erofs(dir).map_err(|error| error.to_string());
    let chosen = choose(&probe(dir, erofs), wish);
    let choice = chosen.map_err(|detail| Error::Environment {
        op: "have the backend that was asked for",
        detail: format!("{detail}; use the backend \"auto\""),
    })?;
    let (backend, reason) = (choice.backend, &choice.reason);
    tracing::info!(?backend, reason, "layers are shown");
    Ok(choice)
}

/// Chooses.
///
/// # Errors
/// Why the wish cannot be had.
pub fn choose(probed: &Probed, wish: Backend) -> std::result::Result<Choice, String> {
    let chose = |backend, reason: String| Ok(Choice { backend, reason });
    let asked = || "it was asked for".to_owned();
    match (wish, &probed.fanotify, &probed.erofs) {
        (Backend::Fuse, ..) => chose(Backend::Fuse, asked()),
        (Backend::Erofs, _, Ok(())) => chose(Backend::Erofs, asked()),
        (Backend::Erofs, _, Err(why)) => Err(why.clone()),
        (Backend::Fanotify, Ok(()), _) => chose(Backend::Fanotify, asked()),
        (Backend::Fanotify, Err(why), _) => Err(why.clone()),
        (Backend::Auto, Ok(()), Ok(())) => chose(
            Backend::Erofs,
            "fanotify could be had, but shows zeros once its server and the guard are both \
             killed; it has to be asked for"
                .to_owned(),
        ),
        (Backend::Auto, Err(why), Ok(())) => {
            chose(Backend::Erofs, format!("fanotify cannot be used: {why}"))
        }
        (Backend::Auto, _, Err(why)) => chose(
            Backend::Fuse,
            format!("erofs cannot be used (Linux 6.12 makes it of files, on a disk): {why}"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case() {
        use Backend::{Auto, Erofs, Fanotify, Fuse};
        let (yes, no) = (Ok(()), Err("it does not"));
        let table = [
            // wish, fanotify, erofs: choice, what its reason names
            (Fuse, yes, yes, Ok(Fuse), "asked for"),
            (Fuse, no, no, Ok(Fuse), "asked for"),
            (Erofs, yes, yes, Ok(Erofs), "asked for"),
            (Erofs, yes, no, Err(()), "it does not"),
            (Fanotify, yes, yes, Ok(Fanotify), "asked for"),
            (Fanotify, yes, no, Ok(Fanotify), "asked for"),
            (Fanotify, no, yes, Err(()), "it does not"),
            (Auto, yes, yes, Ok(Erofs), "has to be asked for"),
            (Auto, no, yes, Ok(Erofs), "it does not"),
            (Auto, yes, no, Ok(Fuse), "it does not"),
            (Auto, no, no, Ok(Fuse), "it does not"),
        ];
        for (wish, fanotify, erofs, expected, word) in table {
            let probed = Probed {
                fanotify: fanotify.map_err(str::to_owned),
                erofs: erofs.map_err(str::to_owned),
            };
            let row = format!("{wish:?} {probed:?}");
            match (choose(&probed, wish), expected) {
                (Ok(choice), Ok(backend)) => {
                    assert_eq!(choice.backend, backend, "{row}");
                    assert!(choice.reason.contains(word), "{row}: {}", choice.reason);
                }
                (Err(why), Err(())) => assert!(why.contains(word), "{row}: {why}"),
                (got, _) => panic!("{row}: {got:?}"),
            }
        }
    }
}
