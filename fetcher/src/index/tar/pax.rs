//! PAX extended headers: `<length> <key>=<value>\n`, again and again.
//!
//! Invariant: a record is used only if its length leads exactly to its newline. Keys that
//! say nothing about a layer are dropped, so what is kept stays small.
#![warn(clippy::indexing_slicing)]

use base64::Engine as _;

use super::{Xattrs, numeric};
use crate::index::Timestamp;
use crate::index::limits::XATTRS_MAX;

/// Values that override a header's. An empty value in a record takes an override away.
#[derive(Debug, Clone, Default)]
pub(super) struct Overrides {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link_path: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<Timestamp>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// A `GNU.sparse.*` record was there.
    pub(super) sparse: bool,
}

impl Overrides {
    /// Applies the records of one extended header on top of what is here.
    pub(super) fn apply(&mut self, mut records: &[u8]) -> Result<(), String> {
        while !records.is_empty() {
            // Some writers pad the last block into the header.
            if records.iter().all(|byte| *byte == 0) {
                return Ok(());
            }
            let (key, value, rest) =
                record(records).ok_or("a PAX record does not have the length it says")?;
            self.set(key, value)?;
            records = rest;
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), String> {
        match key {
            b"path" => self.path = text(value),
            b"linkpath" => self.link_path = text(value),
            b"size" => self.size = value_of(key, value, numeric::decimal)?,
            b"uid" => self.uid = value_of(key, value, numeric::decimal)?,
            b"gid" => self.gid = value_of(key, value, numeric::decimal)?,
            b"mtime" => self.mtime = value_of(key, value, numeric::time)?,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattr(name.to_vec(), value.to_vec())?;
                } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                    self.libarchive_xattr(name, value)?;
                } else if key.starts_with(b"GNU.sparse.") {
                    self.sparse = true;
                    if key == b"GNU.sparse.name" {
                        self.path = text(value);
                    }
                }
            }
        }
        Ok(())
    }

    /// Both spellings of one attribute may be there; the last counts, they say the same.
    fn xattr(&mut self, name: Vec<u8>, value: Vec<u8>) -> Result<(), String> {
        if let Some((_, known)) = self.xattrs.iter_mut().find(|(known, _)| *known == name) {
            *known = value;
        } else if self.xattrs.len() >= XATTRS_MAX {
            return Err(format!("it has more than {XATTRS_MAX} xattrs"));
        } else {
            self.xattrs.push((name, value));
        }
        Ok(())
    }

    fn libarchive_xattr(&mut self, name: &[u8], value: &[u8]) -> Result<(), String> {
        let name = url_decode(name).ok_or("the name of a LIBARCHIVE.xattr is not URL-encoded")?;
        let value = value
            .strip_suffix(b"=")
            .map_or(value, |v| v.strip_suffix(b"=").unwrap_or(v));
        let value = base64::engine::general_purpose::STANDARD_NO_PAD
            .decode(value)
            .map_err(|e| format!("the value of a LIBARCHIVE.xattr is not base64: {e}"))?;
        self.xattr(name, value)
    }
}

/// The xattrs among records of one file; `None` where any says that the file is sparse.
pub(super) fn xattrs<'a>(
    records: impl Iterator<Item = (&'a [u8], &'a [u8])>,
) -> Result<Option<Xattrs>, String> {
    let mut found = Overrides::default();
    for (key, value) in records {
        if [&b"SCHILY.xattr."[..], b"LIBARCHIVE.xattr.", b"GNU.sparse."]
            .iter()
            .any(|prefix| key.starts_with(prefix))
        {
            found.set(key, value)?;
        }
    }
    Ok((!found.sparse).then_some(found.xattrs))
}

fn text(value: &[u8]) -> Option<Vec<u8>> {
    (!value.is_empty()).then(|| value.to_vec())
}

fn value_of<T>(
    key: &[u8],
    value: &[u8],
    parse: fn(&[u8]) -> Option<T>,
) -> Result<Option<T>, String> {
    if value.is_empty() {
        return Ok(None);
    }
    match parse(value) {
        Some(value) => Ok(Some(value)),
        None => Err(format!(
            "its PAX {} {:?} makes no sense",
            String::from_utf8_lossy(key),
            String::from_utf8_lossy(value.get(..40).unwrap_or(value))
        )),
    }
}

/// Key and value of the first record, and what follows it.
pub(super) fn record(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let digits = records.iter().take(10).position(|byte| *byte == b' ')?;
    let len: usize = numeric::decimal(records.get(..digits)?)?;
    let body = records.get(digits + 1..len)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (body.get(..equals)?, body.get(equals + 1..)?);
    (!key.is_empty()).then_some((key, value, records.get(len..)?))
}

fn url_decode(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    loop {
        match rest {
            [] => return Some(out),
            [b'%', hex @ ..] => {
                let (digits, after) = hex.split_at_checked(2)?;
                let digits = std::str::from_utf8(digits).ok()?;
                if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                    return None;
                }
                out.push(u8::from_str_radix(digits, 16).ok()?);
                rest = after;
            }
            [byte, after @ ..] => {
                out.push(*byte);
                rest = after;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(records: &[u8]) -> Result<Overrides, String> {
        let mut overrides = Overrides::default();
        overrides.apply(records).map(|()| overrides)
    }

    /// A record with the right length in front.
    fn record_of(key: &str, value: &[u8]) -> Vec<u8> {
        let body = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
        let mut len = body.len() + 1;
        while len.to_string().len() + body.len() != len {
            len += 1;
        }
        [len.to_string().as_bytes(), &body].concat()
    }

    #[test]
    fn reads_records() {
        let records = [
            record_of("path", b"a b"),
            record_of("linkpath", b"x=y/z\n"),
            record_of("uid", b"1000"),
            record_of("gid", b"70000"),
            record_of("mtime", b"1700000000.5"),
            record_of("uid", b""),
            record_of("comment", &[b'c'; 200]),
            vec![0; 7],
        ]
        .concat();
        let out = apply(&records).unwrap();
        assert_eq!(out.path.as_deref(), Some(&b"a b"[..]));
        assert_eq!(out.link_path.as_deref(), Some(&b"x=y/z\n"[..]));
        assert_eq!((out.uid, out.gid, out.size), (None, Some(70_000), None));
        assert_eq!(
            out.mtime,
            Some(Timestamp {
                secs: 1_700_000_000,
                nanos: 500_000_000
            })
        );
        assert!(!out.sparse);
    }

    #[test]
    fn both_spellings_of_xattrs() {
        let records = [
            record_of("SCHILY.xattr.user.a", b"1\n2"),
            record_of("LIBARCHIVE.xattr.user%2Eb", b"AAECAw=="),
            record_of("LIBARCHIVE.xattr.user.a", b"MQoy"),
        ]
        .concat();
        let expected = [
            (b"user.a".to_vec(), b"1\n2".to_vec()),
            (b"user.b".to_vec(), vec![0, 1, 2, 3]),
        ];
        assert_eq!(apply(&records).unwrap().xattrs, expected);
    }

    #[test]
    fn records_one_by_one_give_xattrs_only() {
        let of = |records: &[(&'static [u8], &'static [u8])]| xattrs(records.iter().copied());
        let one: (&[u8], &[u8]) = (b"SCHILY.xattr.user.a", b"1");
        let expected = vec![(b"user.a".to_vec(), b"1".to_vec())];
        let plain = of(&[(b"uid", b"no number"), one]).unwrap();
        assert_eq!(plain, Some(expected));
        let sparse = of(&[one, (b"GNU.sparse.major", b"1")]).unwrap();
        assert_eq!(sparse, None);
        assert!(of(&[(b"LIBARCHIVE.xattr.a", b"!")]).is_err());
    }

    #[test]
    fn more_xattrs_than_a_file_has_are_refused() {
        let records: Vec<u8> = (0..=XATTRS_MAX)
            .flat_map(|n| record_of(&format!("SCHILY.xattr.user.{n}"), b""))
            .collect();
        assert!(
            apply(&records)
                .unwrap_err()
                .contains("more than 1024 xattrs")
        );
    }

    #[test]
    fn refuses_records_that_lie() {
        for bad in [
            &b"x"[..],
            b"5 a=b\n",
            b"7 a=b\n",
            b"6 a=bc\n",
            b"99999999999999999999 a=b\n",
            b"5 ab\n",
            b"5 =b\n",
            b"-6 a=b\n",
            b"3 \n",
            b"0 a=b\n",
        ] {
            assert!(apply(bad).is_err(), "{:?}", String::from_utf8_lossy(bad));
        }
        for (key, value, text) in [
            ("uid", "-1", "PAX uid \"-1\""),
            ("uid", "4294967296", "PAX uid"),
            ("size", "x", "PAX size"),
            ("mtime", "x", "PAX mtime"),
            ("LIBARCHIVE.xattr.a%2", "AA==", "URL"),
            ("LIBARCHIVE.xattr.a", "!!!", "base64"),
        ] {
            let error = apply(&record_of(key, value.as_bytes())).unwrap_err();
            assert!(error.contains(text), "{error}");
        }
    }
}
