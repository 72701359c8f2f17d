//! What the allocator does with memory that is free.

#![expect(
    unsafe_code,
    reason = "the allocator's options are set through its C interface"
)]

use std::ffi::c_long;

/// `mi_option_purge_delay` of mimalloc's `mi_option_e`.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Gives freed pages back at once. A pull frees buffers all the time and keeps little: with
/// the allocator's second of patience it takes twice what it needs.
pub(crate) fn give_back_at_once() {
    const AT_ONCE: c_long = 0;
    // SAFETY: sets one number of the allocator, at any time and from any thread.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, AT_ONCE) }
}
