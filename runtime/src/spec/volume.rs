//! `SRC:DST[:ro|rw]`, parsed once at the edge.

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use super::SpecError;

/// A host directory or file shown inside the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Absolute path on the host.
    pub source: PathBuf,
    /// Absolute, normalised path in the container; never `/`.
    pub destination: PathBuf,
    /// Whether the container may not write to it.
    pub read_only: bool,
}

impl Volume {
    /// Whether the host has what is to be shown.
    pub(super) fn check_source(&self) -> Result<(), SpecError> {
        let path = self.source.clone();
        match fs::metadata(&path) {
            Ok(_) => Ok(()),
            Err(source) => Err(SpecError::VolumeSource { path, source }),
        }
    }
}

impl FromStr for Volume {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let bad = |reason| SpecError::Volume {
            volume: text.to_owned(),
            reason,
        };
        let mut parts = text.split(':');
        let (Some(source), Some(destination)) = (parts.next(), parts.next()) else {
            return Err(bad("expected SRC:DST[:ro|rw]"));
        };
        let read_only = match (parts.next(), parts.next()) {
            (None | Some("rw"), None) => false,
            (Some("ro"), None) => true,
            _ => return Err(bad("the only options are ro and rw")),
        };
        if text.contains('\0') {
            return Err(bad("a NUL byte cannot be part of a path"));
        }
        let source = PathBuf::from(source);
        if !source.is_absolute() {
            return Err(bad("the host path must be absolute"));
        }
        let destination = normal(Path::new(destination))
            .ok_or_else(|| bad("the container path must be absolute, without .., and not /"))?;
        Ok(Self {
            source,
            destination,
            read_only,
        })
    }
}

fn normal(path: &Path) -> Option<PathBuf> {
    let mut normal = PathBuf::from("/");
    for part in path.is_absolute().then(|| path.components())? {
        match part {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => normal.push(name),
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    (normal != Path::new("/")).then_some(normal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_parse() {
        for (text, expected) in [
            ("/a:/b", Some(("/a", "/b", false))),
            ("/a:/b/./c/:ro", Some(("/a", "/b/c", true))),
            ("/a:/b:rw", Some(("/a", "/b", false))),
            ("/a", None),
            ("a:/b", None),
            ("/a:b", None),
            ("/a:/", None),
            ("/a:/b/../..", None),
            ("/a:/b:rx", None),
            ("/a:/b:ro:ro", None),
            ("/a\0:/b", None),
            ("", None),
        ] {
            let parsed = text.parse::<Volume>().ok();
            let expected = expected.map(|(source, destination, read_only)| Volume {
                source: source.into(),
                destination: destination.into(),
                read_only,
            });
            assert_eq!(parsed, expected, "{text}");
        }
    }
}
