//! How far the kernel reads ahead in a mount, and where it is told so.
//!
//! Without any of it all works the same, so failures are logged and nothing else.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use crate::sys;

/// The kernel's read-ahead window of a mount. It is also what one page fault of a mapped
/// file reads around it, bytes that nobody asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadAhead {
    /// Hardly more than is asked for: where what is read is recorded, or was, a page too
    /// many is a chunk too many.
    Narrow,
    /// Few round trips to this process, and fewer to the registry.
    Wide,
}

impl ReadAhead {
    fn kib(self) -> u32 {
        match self {
            Self::Narrow => 32,
            // Twice the kernel's usual.
            Self::Wide => 256,
        }
    }
}

/// The file that sets the window of one mount.
#[derive(Debug)]
pub(crate) struct Knob(PathBuf);

impl Knob {
    /// That of the FUSE file system mounted at `path`.
    pub(super) fn of_fuse(path: &Path) -> Option<Self> {
        match fs::metadata(path) {
            Ok(stat) => {
                let (major, minor) = sys::split_dev(stat.dev());
                Some(Self::named(&format!("{major}:{minor}")))
            }
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "read-ahead stays as it is");
                None
            }
        }
    }

    /// That of what the kernel lists under `name`.
    fn named(name: &str) -> Self {
        Self(Path::new(LIST).join(name).join("read_ahead_kb"))
    }

    /// Sets the window of files that are opened from now on.
    pub(crate) fn set(&self, window: ReadAhead) {
        if let Err(error) = fs::write(&self.0, window.kib().to_string()) {
            tracing::debug!(path = %self.0.display(), %error, "read-ahead stays as it is");
        }
    }
}

/// Where the kernel lists what it reads ahead through.
const LIST: &str = "/sys/class/bdi";

/// Runs `make`, which makes an EROFS, and finds its knob. The kernel does not say which one
/// it is, but numbers what it makes: one that is new is meant. There are several if another
/// process makes an EROFS in the same moment, and none where the kernel does not list them.
pub(super) fn watch_erofs<T, E>(make: impl FnOnce() -> Result<T, E>) -> Result<(T, Vec<Knob>), E> {
    /// Those of this process come one after the other.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock();
    let before = erofs_names();
    let made = make()?;
    let after = erofs_names();
    let new = after.difference(&before).map(|name| Knob::named(name));
    Ok((made, new.collect()))
}

fn erofs_names() -> HashSet<String> {
    let Ok(list) = fs::read_dir(LIST) else {
        return HashSet::new();
    };
    list.filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("erofs-"))
        .collect()
}
