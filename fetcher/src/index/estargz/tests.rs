//! Blobs of the reference writer, and every lie a TOC can tell.

mod lies;
mod support;
mod written;
