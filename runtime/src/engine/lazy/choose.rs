//! Whether layers are mounted by the mount server.
//!
//! Pure. Invariant: where they cannot be, the reason is one sentence for whoever runs the
//! node.

use lazarette_snapshotter::fuse::Backend;

/// What there is to be known before the server is asked.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub(super) is_root: bool,
    /// What the config says of mounts.
    pub(super) backend: Backend,
    /// Whether the server's program is there.
    pub(super) has_program: bool,
    /// Why the server cannot show layers as the config wants it, if it cannot.
    pub(super) refused: Option<String>,
}

/// `Err` says why layers are mounted by this process itself.
pub(super) fn choose(facts: &Facts) -> Result<(), String> {
    if !facts.is_root {
        return Err("lazd does not run as root".to_owned());
    }
    if facts.backend == Backend::Fuse {
        return Err("the config wants the backend \"fuse\", and the server has erofs".to_owned());
    }
    if !facts.has_program {
        return Err("the program laz-mountd is not beside lazd".to_owned());
    }
    match &facts.refused {
        Some(refused) => Err(format!(
            "the mount server cannot show layers that are in the root directory: {refused}"
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_takes_all_of_it() {
        let all = Facts {
            is_root: true,
            backend: Backend::Auto,
            has_program: true,
            refused: None,
        };
        assert_eq!(choose(&all), Ok(()));
        let erofs = Facts {
            backend: Backend::Erofs,
            ..all.clone()
        };
        assert_eq!(choose(&erofs), Ok(()));
        let refused = Some("ENOTBLK".to_owned());
        let table = [
            (
                Facts {
                    is_root: false,
                    ..all.clone()
                },
                "root",
            ),
            (
                Facts {
                    backend: Backend::Fuse,
                    ..all.clone()
                },
                "\"fuse\"",
            ),
            (
                Facts {
                    has_program: false,
                    ..all.clone()
                },
                "laz-mountd",
            ),
            (Facts { refused, ..all }, "ENOTBLK"),
        ];
        for (facts, word) in table {
            let why = choose(&facts).unwrap_err();
            assert!(why.contains(word), "{why}");
        }
    }
}
