//! Names of a layer: from the spelling of an archive to the one form of the file table.
//!
//! Invariant: what [`normalize`] returns satisfies [`check`]. Names are bytes; nothing here
//! assumes UTF-8.

use std::borrow::Cow;

use super::limits::{NAME_LEN_MAX, PATH_LEN_MAX};

/// Relative form of `name`: without empty and `.` parts, wherever they are; empty for the
/// root directory. An absolute name is relative to the root of the layer, as everything
/// that unpacks tars has it: so tables of contents may spell names as their tar does.
/// `Err` says which rule the name breaks.
pub(super) fn normalize(name: &[u8]) -> Result<Vec<u8>, &'static str> {
    let name = name.strip_suffix(b"/").unwrap_or(name);
    if check(name).is_ok() {
        return Ok(name.to_vec());
    }
    let mut out = Vec::with_capacity(name.len());
    for part in name.split(|byte| *byte == b'/') {
        if part.is_empty() || part == b"." {
            continue;
        }
        if !out.is_empty() {
            out.push(b'/');
        }
        out.extend_from_slice(part);
    }
    check(&out)?;
    Ok(out)
}

/// Whether `path` has the form that the file table promises.
pub(super) fn check(path: &[u8]) -> Result<(), &'static str> {
    if path.is_empty() {
        return Ok(());
    }
    if path.len() > PATH_LEN_MAX {
        return Err("its name is longer than 4095 bytes");
    }
    if path.contains(&0) {
        return Err("its name contains a NUL byte");
    }
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" => return Err("its name has an empty part"),
            b"." => return Err("its name has a '.' part"),
            b".." => return Err("its name has a '..' part"),
            part if part.len() > part_len_max(part) => {
                return Err("a part of its name is longer than 255 bytes");
            }
            _ => {}
        }
    }
    Ok(())
}

/// A whiteout's name is longer than the name it hides.
fn part_len_max(part: &[u8]) -> usize {
    NAME_LEN_MAX + if part.starts_with(b".wh.") { 4 } else { 0 }
}

/// Checks a symbolic link's target.
pub(super) fn check_symlink(target: &[u8]) -> Result<(), &'static str> {
    match target {
        b"" => Err("its link target is empty"),
        t if t.len() > PATH_LEN_MAX => Err("its link target is longer than 4095 bytes"),
        t if t.contains(&0) => Err("its link target contains a NUL byte"),
        _ => Ok(()),
    }
}

/// Files of the eStargz format itself, which are no part of the image.
pub(super) fn is_format_file(path: &[u8]) -> bool {
    matches!(
        path,
        b"stargz.index.json" | b".prefetch.landmark" | b".no.prefetch.landmark"
    )
}

/// A name for messages, cut to 200 characters.
pub(super) fn show(path: &[u8]) -> String {
    let text: Cow<'_, str> = String::from_utf8_lossy(path.get(..800).unwrap_or(path));
    let mut short: String = text.escape_debug().take(200).collect();
    if path.len() > 200 {
        short.push('…');
    }
    format!("\"{short}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_form_for_every_spelling() {
        for (name, path) in [
            ("etc/passwd", "etc/passwd"),
            ("./etc/passwd", "etc/passwd"),
            ("etc/", "etc"),
            ("./", ""),
            (".", ""),
            ("", ""),
            ("a//b/./c/", "a/b/c"),
            (".../x", ".../x"),
            ("/", ""),
            ("///", ""),
            ("/etc/", "etc"),
            ("//etc/./passwd", "etc/passwd"),
        ] {
            assert_eq!(
                normalize(name.as_bytes()).unwrap(),
                path.as_bytes(),
                "{name}"
            );
        }
        assert_eq!(normalize(b"\xff\xfe/x").unwrap(), b"\xff\xfe/x");
    }

    #[test]
    fn refuses_what_leaves_the_layer_or_the_limits() {
        let long_part = [&b"a/"[..], &[b'x'; 256]].concat();
        let long = b"ab/".repeat(1400);
        for (name, reason) in [
            (&b"../x"[..], "'..'"),
            (b"/../x", "'..'"),
            (b"/..", "'..'"),
            (b"a/../b", "'..'"),
            (b"a/..", "'..'"),
            (b"./../b", "'..'"),
            (b"a\0b", "NUL"),
            (&long_part, "255"),
            (&long, "4095"),
        ] {
            assert!(
                normalize(name).unwrap_err().contains(reason),
                "{}",
                show(name)
            );
        }
        let whiteout = [&b".wh."[..], &[b'x'; 255]].concat();
        assert!(normalize(&whiteout).is_ok());
    }
}
