//! Messages that several services share: containerd's own and protobuf's well-known ones.
//!
//! Invariant: as `proto/types/mount.proto` and protobuf's own definitions have them.

use crate::message::messages;

messages! {
    /// What to give mount(8), or mount(2) after it.
    pub struct Mount {
        /// Type of the file system, or "bind".
        r#type: text = 1,
        /// What is mounted.
        source: text = 2,
        /// Where inside of the container; mostly empty.
        target: text = 3,
        /// Options as in fstab.
        options: texts = 4,
    }

    /// A moment.
    pub struct Timestamp {
        /// Since 1970, UTC.
        seconds: int64 = 1,
        /// Forward of that, under a second.
        nanos: int32 = 2,
    }

    /// Which fields of a message are meant.
    pub struct FieldMask {
        /// Paths with dots. A label's key is one part of it, dots and all.
        paths: texts = 1,
    }

    /// Nothing.
    pub struct Empty {}
}
