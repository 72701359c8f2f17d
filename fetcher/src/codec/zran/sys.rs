//! Raw deflate through zlib's C interface, which alone can stop at block boundaries and
//! resume in mid-stream.
//!
//! Invariant: the library only ever sees slices that outlive the call, and a stream that is
//! initialised, does not move and is ended once. Knows nothing of gzip's framing.

#![expect(unsafe_code, reason = "zlib's interface is C")]

use std::ffi::{c_char, c_int};

use libz_rs_sys::{
    Z_BLOCK, Z_BUF_ERROR, Z_NO_FLUSH, Z_OK, Z_STREAM_END, inflate, inflateEnd,
    inflateGetDictionary, inflateInit2_, inflatePrime, inflateReset, inflateSetDictionary,
    z_stream, zlibVersion,
};

/// Bytes of output that deflate may refer back to.
pub(in crate::codec) const WINDOW_LEN: usize = 32 << 10;

/// What one call did.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::codec) struct Step {
    /// Bytes of input that are used up.
    pub(in crate::codec) consumed: usize,
    /// Bytes of output that are filled.
    pub(in crate::codec) produced: usize,
    /// The stream ended.
    pub(in crate::codec) ended: bool,
    /// The call stopped where a block ended: how many bits of the last consumed byte belong
    /// to the next one.
    pub(in crate::codec) block_end: Option<u8>,
}

/// A raw inflate state.
pub(in crate::codec) struct RawInflate {
    /// On the heap: the state behind it may point back.
    stream: Box<z_stream>,
}

// SAFETY: the stream and all it points to belong to this value alone, and its allocator
// is the process's.
unsafe impl Send for RawInflate {}

impl RawInflate {
    /// A stream at its beginning; `None` when there is no memory for it.
    pub(in crate::codec) fn new() -> Option<Self> {
        let mut stream = Box::<z_stream>::default();
        let size = c_int::try_from(size_of::<z_stream>()).ok()?;
        // SAFETY: the stream is valid and not initialised yet; the version is the
        // library's own string.
        let code = unsafe {
            let version: *const c_char = zlibVersion();
            inflateInit2_(&raw mut *stream, -15, version, size)
        };
        (code == Z_OK).then_some(Self { stream })
    }

    /// Back to the beginning of a stream.
    pub(in crate::codec) fn reset(&mut self) -> bool {
        // SAFETY: the stream is initialised.
        unsafe { inflateReset(&raw mut *self.stream) == Z_OK }
    }

    /// Goes on in mid-stream, after a reset: the lowest `bits` of `value` come before the
    /// next input, and `window` is the output before it, at most [`WINDOW_LEN`] bytes.
    pub(in crate::codec) fn resume(&mut self, bits: u8, value: u8, window: &[u8]) -> bool {
        let Ok(len) = u32::try_from(window.len()) else {
            return false;
        };
        // SAFETY: the stream is initialised, and the window is valid for its length during
        // the call, which copies it.
        unsafe {
            let stream = &raw mut *self.stream;
            inflatePrime(stream, c_int::from(bits), c_int::from(value)) == Z_OK
                && (len == 0 || inflateSetDictionary(stream, window.as_ptr(), len) == Z_OK)
        }
    }

    /// Decodes until input or output is used up, the stream ends or, with `stop_at_blocks`,
    /// a block does. `None` for damaged data.
    pub(in crate::codec) fn run(
        &mut self,
        input: &[u8],
        out: &mut [u8],
        stop_at_blocks: bool,
    ) -> Option<Step> {
        let avail_in = u32::try_from(input.len()).unwrap_or(u32::MAX);
        let avail_out = u32::try_from(out.len()).unwrap_or(u32::MAX);
        self.stream.next_in = input.as_ptr();
        self.stream.avail_in = avail_in;
        self.stream.next_out = out.as_mut_ptr();
        self.stream.avail_out = avail_out;
        let flush = if stop_at_blocks { Z_BLOCK } else { Z_NO_FLUSH };
        // SAFETY: the stream is initialised; input and output are valid for the lengths
        // given, do not overlap, and outlive the call.
        let code = unsafe { inflate(&raw mut *self.stream, flush) };
        let used = |before: u32, after: u32| usize::try_from(before - after).unwrap_or(0);
        let mut step = Step {
            consumed: used(avail_in, self.stream.avail_in),
            produced: used(avail_out, self.stream.avail_out),
            ended: code == Z_STREAM_END,
            block_end: None,
        };
        // Nothing of ours stays behind in the stream.
        self.stream.next_in = std::ptr::null();
        self.stream.next_out = std::ptr::null_mut();
        self.stream.avail_in = 0;
        self.stream.avail_out = 0;
        if !matches!(code, Z_OK | Z_BUF_ERROR | Z_STREAM_END) {
            return None;
        }
        let state = self.stream.data_type;
        if stop_at_blocks && state & 128 != 0 && state & 64 == 0 {
            step.block_end = u8::try_from(state & 7).ok();
        }
        Some(step)
    }

    /// The last output, at most [`WINDOW_LEN`] bytes of this stream.
    pub(in crate::codec) fn window(&self) -> Vec<u8> {
        let mut window = vec![0; WINDOW_LEN];
        let mut len = 0;
        // SAFETY: the stream is initialised, and the buffer has room for the largest window.
        let code = unsafe {
            let stream: *const z_stream = &raw const *self.stream;
            inflateGetDictionary(stream, window.as_mut_ptr(), &raw mut len)
        };
        let len = if code == Z_OK { len } else { 0 };
        window.truncate(usize::try_from(len).unwrap_or(0));
        window
    }
}

impl Drop for RawInflate {
    fn drop(&mut self) {
        // SAFETY: the stream is initialised and not used again.
        unsafe {
            inflateEnd(&raw mut *self.stream);
        }
    }
}
