//! Nobody ever reads wrong bytes: everything of a layer is read through a real mount while
//! bits flip on the way from the registry, or after they flipped on the disk; in every format,
//! and shown in every way there is.
//!
//! A read may fail, and then the next may succeed; what it returns is what the image says.
//! Needs root; where this kernel lacks what a way to show layers needs, the tests of that way
//! fail and say so.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod blobs;
mod disk;
mod node;
mod sys;
mod way;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use blobs::Content;
use node::Shows;

/// Bytes of a read: no multiple of anything.
const READ_BYTES: usize = 50_001;
/// What a read fails with.
const EIO: i32 = 5;

/// Makes two tests for each way to show layers.
macro_rules! never_wrong {
    ($($name:ident $shows:ident)*) => {
        $(
            mod $name {
                use crate::node::Shows;

                #[test]
                fn privileged_bits_that_flip_on_the_way_are_never_read() {
                    crate::as_root(concat!(stringify!($name), "::privileged_bits_that_flip_on_the_way_are_never_read"), Shows::$shows, crate::way::flip);
                }

                #[test]
                fn privileged_bits_that_flipped_on_the_disk_are_never_read() {
                    crate::as_root(concat!(stringify!($name), "::privileged_bits_that_flipped_on_the_disk_are_never_read"), Shows::$shows, crate::disk::flip);
                }
            }
        )*
    };
}

never_wrong! {
    fuse Fuse
    erofs_over_fuse Erofs
    the_mount_servers_fuse ServerFuse
    fanotify ServerFanotify
    the_kernel_alone Kernel
}

/// Runs `test`, or says loudly that it does not run.
fn as_root(name: &str, shows: Shows, test: fn(Shows)) {
    if sys::is_root() {
        test(shows);
    } else {
        let _ = writeln!(std::io::stderr(), "SKIPPED (needs root): {name}");
    }
}

/// Reads every file in pieces of odd sizes; returns how many reads failed. Panics at the
/// first wrong byte.
fn read_everything(root: &Path, content: &Content, what: &str) -> usize {
    let mut failed = 0;
    for (path, expected) in content {
        let file = fs::File::open(root.join(path)).unwrap();
        assert_eq!(file.metadata().unwrap().len(), expected.len() as u64);
        let mut piece = vec![0; READ_BYTES];
        let mut at = 0;
        while at < expected.len() {
            let wanted = piece.len().min(expected.len() - at);
            match file.read_exact_at(&mut piece[..wanted], at as u64) {
                Ok(()) => assert!(
                    piece[..wanted] == expected[at..at + wanted],
                    "{what}: wrong bytes in {path} at {at}"
                ),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(EIO), "{what}: {error}");
                    failed += 1;
                }
            }
            at += wanted;
        }
    }
    failed
}
