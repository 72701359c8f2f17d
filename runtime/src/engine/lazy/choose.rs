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

/// Why the mount server does not mount layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Without {
    /// This process does, for this reason.
    MountsItself(String),
    /// Nobody can, as the config wants it.
    Refused(String),
}

/// Whether the mount server mounts layers.
pub(super) fn choose(facts: &Facts) -> Result<(), Without> {
    let why = if !facts.is_root {
        "lazd does not run as root".to_owned()
    } else if facts.backend == Backend::Fuse {
        "the config wants the backend \"fuse\", and the server has erofs".to_owned()
    } else if !facts.has_program {
        "the program laz-mountd is not beside lazd".to_owned()
    } else if let Some(refused) = &facts.refused {
        format!("the mount server cannot show layers that are in the root directory: {refused}")
    } else {
        return Ok(());
    };
    let can_mount = match facts.backend {
        Backend::Auto | Backend::Fuse => true,
        // Without the program it is the same EROFS, and ends with this process.
        Backend::Erofs => facts.refused.is_none(),
        Backend::Fanotify => false,
    };
    Err(match can_mount {
        true => Without::MountsItself(why),
        false => Without::Refused(why),
    })
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
    }

    #[test]
    fn where_it_cannot_a_wish_is_not_replaced() {
        use Backend::{Auto, Erofs, Fanotify, Fuse};
        let facts = |backend, is_root, has_program, refused: Option<&str>| Facts {
            is_root,
            backend,
            has_program,
            refused: refused.map(str::to_owned),
        };
        let no = Some("ENOTBLK");
        let table = [
            // facts, whether this process mounts, what the reason names
            (facts(Auto, false, true, None), true, "root"),
            (facts(Erofs, false, true, None), true, "root"),
            (facts(Fanotify, false, true, None), false, "root"),
            (facts(Fuse, true, true, None), true, "\"fuse\""),
            (facts(Auto, true, false, None), true, "laz-mountd"),
            (facts(Erofs, true, false, None), true, "laz-mountd"),
            (facts(Fanotify, true, false, None), false, "laz-mountd"),
            (facts(Auto, true, true, no), true, "ENOTBLK"),
            (facts(Erofs, true, true, no), false, "ENOTBLK"),
            (facts(Fanotify, true, true, no), false, "ENOTBLK"),
        ];
        for (facts, mounts, word) in table {
            let (why, itself) = match choose(&facts).unwrap_err() {
                Without::MountsItself(why) => (why, true),
                Without::Refused(why) => (why, false),
            };
            assert_eq!(itself, mounts, "{facts:?}: {why}");
            assert!(why.contains(word), "{why}");
        }
    }
}
