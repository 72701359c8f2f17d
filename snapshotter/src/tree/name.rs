//! What a file name means in a layer.
//!
//! Invariant: the prefix `.wh.` is interpreted here and nowhere else. Pure.

/// Prefix of every special name.
const PREFIX: &[u8] = b".wh.";
/// Prefix of names that aufs kept for itself.
const RESERVED: &[u8] = b".wh..wh.";
/// Makes the directory it lies in hide the one below.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Extended attribute by which overlay knows an opaque directory, and its value.
pub(super) const OPAQUE_XATTR: (&[u8], &[u8]) = (b"trusted.overlay.opaque", b"y");
/// Extended attributes that only overlay may set: a layer that brings its own could
/// redirect a name to any other file of the layers below.
pub(super) const OVERLAY_XATTRS: &[u8] = b"trusted.overlay.";

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name<'a> {
    /// A file of this layer.
    Plain,
    /// Deletes this name of the layers below.
    Whiteout(&'a [u8]),
    /// Marks its directory opaque.
    Opaque,
    /// Bookkeeping of aufs: not shown, but hard links may point at it.
    Reserved,
    /// The prefix and nothing else: deletes no name.
    Empty,
}

impl<'a> Name<'a> {
    /// Reads one path component.
    pub(super) fn of(name: &'a [u8]) -> Self {
        if name == OPAQUE {
            return Self::Opaque;
        }
        if name.starts_with(RESERVED) {
            return Self::Reserved;
        }
        match name.strip_prefix(PREFIX) {
            None => Self::Plain,
            Some([]) => Self::Empty,
            Some(deleted) => Self::Whiteout(deleted),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_what_the_image_spec_says() {
        let table: [(&[u8], Name<'_>); 7] = [
            (b"a", Name::Plain),
            (b".wh", Name::Plain),
            (b".wh.", Name::Empty),
            (b".wh.a", Name::Whiteout(b"a")),
            (b".wh..a", Name::Whiteout(b".a")),
            (b".wh..wh..opq", Name::Opaque),
            (b".wh..wh.plnk", Name::Reserved),
        ];
        for (name, meaning) in table {
            assert_eq!(Name::of(name), meaning, "{}", name.escape_ascii());
        }
    }
}
