//! What has to be mounted to see a snapshot, as a value.
//!
//! Pure. The value is ours; [`Mount::fs_type`], [`Mount::source`] and [`Mount::options`]
//! show it as containerd's API does.

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::metastore::Kind;

/// Features of overlay that make its upper directory depend on where the lowers are:
/// ours move with every mount, and an upper must stay a plain directory to become a lower.
pub(super) const FEATURES_OFF: [(&str, &str); 3] = [
    ("index", "off"),
    ("metacopy", "off"),
    ("redirect_dir", "off"),
];

/// What overlay (Linux 5.10) calls an upper that may be lost.
pub(super) const PASSING: &str = "volatile";

/// One thing to mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mount {
    /// A directory shown as it is.
    Bind {
        /// The directory.
        source: PathBuf,
        /// Whether it must not be written through this mount.
        read_only: bool,
    },
    /// Directories laid over each other.
    Overlay(OverlayMount),
}

/// An overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OverlayMount {
    /// The read-only directories, topmost first: one at least with an upper, two without.
    pub lowers: Vec<PathBuf>,
    /// Where writes go; read-only without.
    pub upper: Option<Upper>,
}

/// The writable part of an overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upper {
    /// What was written.
    pub dir: PathBuf,
    /// Overlay's own directory on the same file system.
    pub work: PathBuf,
    /// Whether what was written may be lost in a crash. If not, unmounting waits until
    /// everything of the file system that holds it is on its device, whoever wrote it.
    pub passing: bool,
}

/// These directories, topmost first, each of them once.
///
/// An image may hold one layer twice. Overlay refuses a directory that stands in two
/// places, and only the topmost one shows: whatever it has hides the same below.
pub(super) fn each_once(mut lowers: Vec<PathBuf>) -> Vec<PathBuf> {
    let mut seen = HashSet::new();
    lowers.retain(|lower| seen.insert(lower.clone()));
    lowers
}

/// What shows a snapshot of this kind with these directories below it, topmost first, each of
/// them once.
pub(super) fn plan(kind: Kind, upper: Upper, mut lowers: Vec<PathBuf>) -> Mount {
    let read_only = kind != Kind::Active;
    match (read_only, lowers.len()) {
        // Overlay needs a lower, and a read-only one two of them.
        (_, 0) => Mount::Bind {
            source: upper.dir,
            read_only,
        },
        (true, 1) => Mount::Bind {
            source: lowers.remove(0),
            read_only,
        },
        (_, _) => Mount::Overlay(OverlayMount {
            lowers,
            upper: (!read_only).then_some(upper),
        }),
    }
}

impl Mount {
    /// The same for somebody who needs nothing of what is written once it is unmounted, and
    /// never mounts it again: overlay refuses the upper directory from then on.
    #[must_use]
    pub fn passing(mut self) -> Self {
        if let Self::Overlay(overlay) = &mut self
            && let Some(upper) = &mut overlay.upper
        {
            upper.passing = true;
        }
        self
    }

    /// What containerd calls the type.
    pub fn fs_type(&self) -> &'static str {
        match self {
            Self::Bind { .. } => "bind",
            Self::Overlay(_) => "overlay",
        }
    }

    /// What containerd calls the source.
    pub fn source(&self) -> &Path {
        match self {
            Self::Bind { source, .. } => source,
            Self::Overlay(_) => Path::new("overlay"),
        }
    }

    /// Options in the form of mount(8), as containerd passes them to whoever mounts.
    pub fn options(&self) -> Vec<String> {
        match self {
            Self::Bind { read_only, .. } => {
                let access = if *read_only { "ro" } else { "rw" };
                vec!["rbind".to_owned(), access.to_owned()]
            }
            Self::Overlay(overlay) => overlay.options(),
        }
    }
}

impl OverlayMount {
    fn options(&self) -> Vec<String> {
        let mut options: Vec<String> = FEATURES_OFF
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        if let Some(upper) = &self.upper {
            options.push(format!("workdir={}", escape(&upper.work)));
            options.push(format!("upperdir={}", escape(&upper.dir)));
            if upper.passing {
                options.push(PASSING.to_owned());
            }
        }
        let lowers: Vec<_> = self.lowers.iter().map(|lower| escape(lower)).collect();
        options.push(format!("lowerdir={}", lowers.join(":")));
        options
    }
}

/// A path as overlay's options spell it: `:`, `,` and `\` are special there. Paths of ours
/// are ASCII; a root directory that is not UTF-8 is refused by the kernel as not found.
fn escape(path: &Path) -> String {
    let mut out = String::new();
    for c in String::from_utf8_lossy(path.as_os_str().as_bytes()).chars() {
        if matches!(c, ':' | ',' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upper() -> Upper {
        Upper {
            dir: "/s/1/fs".into(),
            work: "/s/1/work".into(),
            passing: false,
        }
    }

    #[test]
    fn plans_what_each_snapshot_needs() {
        let two = || vec![PathBuf::from("/top"), PathBuf::from("/base")];
        let bind = |source: &str, read_only| Mount::Bind {
            source: source.into(),
            read_only,
        };
        let overlay = |lowers, upper| Mount::Overlay(OverlayMount { lowers, upper });
        let table = [
            (Kind::Active, vec![], bind("/s/1/fs", false)),
            (Kind::View, vec![], bind("/s/1/fs", true)),
            (Kind::View, vec!["/top".into()], bind("/top", true)),
            (
                Kind::Active,
                vec!["/top".into()],
                overlay(vec!["/top".into()], Some(upper())),
            ),
            (Kind::View, two(), overlay(two(), None)),
            (Kind::Active, two(), overlay(two(), Some(upper()))),
        ];
        for (kind, lowers, mount) in table {
            assert_eq!(plan(kind, upper(), lowers), mount);
        }
        let twice = ["/top", "/base", "/top"].map(PathBuf::from);
        assert_eq!(each_once(twice.to_vec()), two());
    }

    #[test]
    fn options_look_like_containerds() {
        let lowers = vec!["/a:b".into(), "/c,d".into()];
        let mount = plan(Kind::Active, upper(), lowers);
        assert_eq!(mount.fs_type(), "overlay");
        assert_eq!(
            mount.options(),
            [
                "index=off",
                "metacopy=off",
                "redirect_dir=off",
                "workdir=/s/1/work",
                "upperdir=/s/1/fs",
                "lowerdir=/a\\:b:/c\\,d",
            ]
        );
        let passing = mount.passing().options();
        assert!(passing.iter().any(|option| option == PASSING));
        let mount = plan(Kind::View, upper(), vec![]);
        assert_eq!(mount.source(), Path::new("/s/1/fs"));
        assert_eq!(mount.options(), ["rbind", "ro"]);
        assert_eq!(mount.clone().passing(), mount);
    }
}
