//! How the allocator treats memory that is free.
//!
//! Invariant: called once, before there is a second thread; changes nothing that a program can
//! see but what it takes. For a program that streams: a start that decodes piece by piece takes a
//! fifth longer with it (ml by profile 2.2 s instead of 1.8), as it faults the same pages in again
//! and again.

#![expect(unsafe_code, reason = "mimalloc's options have no other interface")]

use std::ffi::{c_int, c_long};

// So that it is linked, whatever the allocator of who uses this crate is.
use mimalloc as _;

/// Milliseconds after which free memory is given back. mimalloc's own second means, while a layer
/// streams at a hundred MB/s, as many more MB than are used: from the network's thread to the
/// decoder's every piece is in other memory.
const FREE_MS_MAX: c_long = 10;
/// The number of `mi_option_purge_delay` in `mimalloc.h`, the same in its versions 2 and 3.
const PURGE_DELAY: c_int = 15;

unsafe extern "C" {
    fn mi_option_set(option: c_int, value: c_long);
}

/// Has memory that is free given back to the system soon.
pub(crate) fn give_back_soon() {
    // SAFETY: the function is mimalloc's of this name and signature, and takes any number.
    unsafe { mi_option_set(PURGE_DELAY, FREE_MS_MAX) };
}
