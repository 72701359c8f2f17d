//! One layer, shown by every backend: names, attributes and bytes are those of the tree that
//! it was made of, however they are read and whatever is killed meanwhile.
//!
//! Promise: a read returns the layer's bytes, or fails where something it needs is gone; never
//! zeros in place of data, nor anything else. Needs root; where this kernel lacks what a
//! backend needs, the tests of that backend fail and say so.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod bed;
mod checks;
mod daemon;
mod layer;
mod sys;
mod whole;
mod zeros;
mod zone;

use std::io::Write as _;

use bed::{Bed, Seen, Shows};

/// Whether this process is root; if not, says loudly that `test` does not run.
fn must_be_root(test: &str) -> bool {
    if !sys::is_root() {
        let _ = writeln!(std::io::stderr(), "SKIPPED (needs root): {test}");
    }
    sys::is_root()
}

/// Makes one test per backend, of all checks, on the mount itself and over an overlay. Each check
/// has a mount of its own, of which nothing was read.
macro_rules! conforms {
    ($($name:ident $shows:ident)*) => {
        $(
            #[test]
            fn $name() {
                if !must_be_root(stringify!($name)) {
                    return;
                }
                let layer = layer::write();
                for seen in [Seen::Bare, Seen::Overlay] {
                    for (what, check) in checks::ALL {
                        let name = stringify!($name);
                        let _ = writeln!(std::io::stderr(), "{name}, {seen:?}: {what}");
                        let bed = Bed::new(&layer, Shows::$shows, seen);
                        check(&bed);
                        bed.end();
                    }
                }
            }
        )*
    };
}

conforms! {
    privileged_fuse_shows_the_layer Fuse
    privileged_erofs_over_fuse_shows_the_layer Erofs
    privileged_the_mount_servers_fuse_shows_the_layer ServerFuse
    privileged_the_mount_servers_fuse_shows_the_layer_by_one_file ServerDataAlone
    privileged_fanotify_shows_the_layer ServerFanotify
    privileged_the_kernel_alone_shows_a_complete_layer Kernel
}
