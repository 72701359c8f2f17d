//! The allocator of both programs: mimalloc, but for what is huge.
//!
//! Each thread that serves FUSE has a buffer of 16 MiB of zeros, of which it uses a page.
//! mimalloc may hand out memory that was used before and writes the zeros, 4,096 page faults
//! for each of two threads of each layer, before the layer can be mounted; the system maps
//! fresh pages, which are zero until somebody touches them.
//!
//! Invariant: which of the two has a block follows from its size alone, so each gets back
//! what it gave.

#![expect(unsafe_code, reason = "an allocator is unsafe to be and to call")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr;

use mimalloc::MiMalloc;

/// Bytes from which a block is the system's. More than any buffer that comes and goes while
/// layers are fetched: those are what mimalloc is here for.
const HUGE_BYTES_MIN: usize = 16 << 20;

/// mimalloc, and the system's allocator for blocks of 16 MiB and more.
#[derive(Debug, Clone, Copy)]
pub struct Allocator;

fn is_huge(bytes: usize) -> bool {
    bytes >= HUGE_BYTES_MIN
}

// SAFETY: every call goes to one of two allocators, each of which keeps the contract. A block's
// layout comes back with it, so `dealloc` and `realloc` ask the one that made it; a block that
// is to become the other's is copied, as the trait's own `realloc` does. Neither panics.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are passed on.
        unsafe {
            if is_huge(layout.size()) {
                System.alloc(layout)
            } else {
                MiMalloc.alloc(layout)
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are passed on.
        unsafe {
            if is_huge(layout.size()) {
                System.alloc_zeroed(layout)
            } else {
                MiMalloc.alloc_zeroed(layout)
            }
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the block came from `alloc` with this layout, and so from the same allocator.
        unsafe {
            if is_huge(layout.size()) {
                System.dealloc(block, layout);
            } else {
                MiMalloc.dealloc(block, layout);
            }
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: as for `dealloc`; the new size is not 0 and, rounded up to the alignment,
        // no larger than `isize::MAX`, so the new layout is valid; both blocks are at least
        // as long as what is copied, and the new one is nobody else's.
        unsafe {
            match (is_huge(layout.size()), is_huge(new_size)) {
                (true, true) => System.realloc(block, layout, new_size),
                (false, false) => MiMalloc.realloc(block, layout, new_size),
                (true, false) | (false, true) => {
                    let to = Layout::from_size_align_unchecked(new_size, layout.align());
                    let fresh = self.alloc(to);
                    if !fresh.is_null() {
                        ptr::copy_nonoverlapping(block, fresh, layout.size().min(new_size));
                        self.dealloc(block, layout);
                    }
                    fresh
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_keep_their_bytes_from_one_allocator_to_the_other() {
        let sizes = [
            1000,
            HUGE_BYTES_MIN - 1,
            HUGE_BYTES_MIN,
            HUGE_BYTES_MIN * 2,
            HUGE_BYTES_MIN,
            4096,
        ];
        let first = Layout::from_size_align(sizes[0], 64).unwrap();
        // SAFETY: each block is used within its size and freed once, with its last layout.
        unsafe {
            let mut block = Allocator.alloc(first);
            assert!(!block.is_null());
            block.write_bytes(7, first.size());
            let mut layout = first;
            for size in &sizes[1..] {
                block = Allocator.realloc(block, layout, *size);
                assert!(!block.is_null() && block.addr().is_multiple_of(64));
                let kept = std::slice::from_raw_parts(block, first.size());
                assert!(kept.iter().all(|byte| *byte == 7), "{size}");
                layout = Layout::from_size_align(*size, 64).unwrap();
            }
            Allocator.dealloc(block, layout);
        }
        for size in [4096, HUGE_BYTES_MIN] {
            let layout = Layout::from_size_align(size, 8).unwrap();
            // SAFETY: the block is read within its size and freed once, with its layout.
            unsafe {
                let block = Allocator.alloc_zeroed(layout);
                let bytes = std::slice::from_raw_parts(block, size);
                assert!(bytes.iter().all(|byte| *byte == 0));
                Allocator.dealloc(block, layout);
            }
        }
    }
}
