//! One 512-byte tar header.
//!
//! ```text
//!   0 name 100 | 100 mode 8 | 108 uid 8 | 116 gid 8 | 124 size 12 | 136 mtime 12 | 148 checksum 8
//! 156 type 1   | 157 link name 100 | 257 magic 6 | 263 version 2 | 265 user 32 | 297 group 32
//! 329 major 8  | 337 minor 8 | 345 prefix 155 (ustar; 131 in star's, none in GNU's
//! but of old Go)
//! ```
//!
//! Invariant: a [`Header`] comes only from a block whose checksum is right.
#![warn(clippy::indexing_slicing)]

use super::{BLOCK_LEN, numeric};

/// The fields that layers need, not yet combined with extended headers.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) name: Vec<u8>,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) mtime: i64,
    pub(super) type_flag: u8,
    pub(super) link_name: Vec<u8>,
    pub(super) major: u32,
    pub(super) minor: u32,
}

impl Header {
    pub(super) fn read(block: &[u8; BLOCK_LEN]) -> Result<Self, String> {
        check_sum(block)?;
        let type_flag = block.get(156).copied().unwrap_or_default();
        let device = matches!(type_flag, b'3' | b'4');
        Ok(Self {
            name: name(block),
            mode: u16::try_from(number(block, "mode", 100, 8)? & 0o7777)
                .map_err(|_| "its mode is negative".to_owned())?,
            uid: fit(number(block, "uid", 108, 8)?, "uid")?,
            gid: fit(number(block, "gid", 116, 8)?, "gid")?,
            size: fit(number(block, "size", 124, 12)?, "size")?,
            mtime: number(block, "mtime", 136, 12)?,
            type_flag,
            link_name: text(block, 157, 100).to_vec(),
            // Other types may leave garbage there.
            major: if device {
                fit(number(block, "major", 329, 8)?, "major")?
            } else {
                0
            },
            minor: if device {
                fit(number(block, "minor", 337, 8)?, "minor")?
            } else {
                0
            },
        })
    }
}

fn bytes(block: &[u8; BLOCK_LEN], at: usize, len: usize) -> &[u8] {
    block.get(at..at + len).unwrap_or_default()
}

/// A text field up to its NUL.
fn text(block: &[u8; BLOCK_LEN], at: usize, len: usize) -> &[u8] {
    let field = bytes(block, at, len);
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn number(block: &[u8; BLOCK_LEN], what: &str, at: usize, len: usize) -> Result<i64, String> {
    numeric::field(bytes(block, at, len)).ok_or_else(|| format!("its {what} field is not a number"))
}

fn fit<T: TryFrom<i64>>(value: i64, what: &str) -> Result<T, String> {
    T::try_from(value).map_err(|_| format!("its {what} is {value}"))
}

pub(super) fn name(block: &[u8; BLOCK_LEN]) -> Vec<u8> {
    let name = text(block, 0, 100);
    let prefix = match (bytes(block, 257, 6), bytes(block, 508, 4)) {
        (b"ustar\0", b"tar\0") => text(block, 345, 131),
        (b"ustar\0", _) => text(block, 345, 155),
        (b"ustar ", _) => go_prefix(block),
        _ => b"",
    };
    if prefix.is_empty() {
        name.to_vec()
    } else {
        [prefix, b"/", name].concat()
    }
}

/// The prefix that Go before 1.8 (docker up to 1.12) wrote into GNU headers, in the place of
/// two times. Told as Go's reader tells it: by what are no times, but text.
fn go_prefix(block: &[u8; BLOCK_LEN]) -> &[u8] {
    let is_no_time = |at| {
        let field = bytes(block, at, 12);
        field.first().is_some_and(|byte| *byte != 0) && numeric::field(field).is_none()
    };
    let prefix = text(block, 345, 155);
    if (is_no_time(345) || is_no_time(357)) && prefix.is_ascii() {
        prefix
    } else {
        b""
    }
}

/// The sum of all bytes with the checksum taken as spaces; old tars summed signed bytes.
pub(super) fn check_sum(block: &[u8; BLOCK_LEN]) -> Result<(), String> {
    let stored = number(block, "checksum", 148, 8)?;
    let (mut unsigned, mut signed) = (0_i64, 0_i64);
    for (at, byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&at) {
            b' '
        } else {
            *byte
        };
        unsigned += i64::from(byte);
        signed += i64::from(byte.cast_signed());
    }
    if stored == unsigned || stored == signed {
        return Ok(());
    }
    Err(format!(
        "its header checksum is {stored}, but the header sums up to {unsigned}"
    ))
}
