//! The JSON of a TOC: one entry after another, never all of them at once.
//!
//! Invariant: entries borrow from the document; nothing is kept between them but what the
//! taker of an entry keeps. Whoever takes them can stop the parser with an error.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::Reader;

/// One entry as it is written; numbers are signed so that a lie gets a message of ours.
#[derive(Deserialize)]
#[serde(default, rename_all = "camelCase")]
#[derive(Default)]
pub(super) struct Entry<'a> {
    #[serde(borrow)]
    pub(super) name: Cow<'a, str>,
    #[serde(borrow, rename = "type")]
    pub(super) kind: Cow<'a, str>,
    pub(super) size: i64,
    #[serde(borrow)]
    pub(super) modtime: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) link_name: Cow<'a, str>,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) offset: i64,
    pub(super) inner_offset: i64,
    pub(super) dev_major: i64,
    pub(super) dev_minor: i64,
    #[serde(borrow)]
    pub(super) xattrs: Option<Xattrs<'a>>,
    pub(super) chunk_offset: i64,
    pub(super) chunk_size: i64,
    #[serde(borrow)]
    pub(super) chunk_digest: Cow<'a, str>,
    /// Only zstd:chunked: where the file's last frame ends.
    pub(super) end_offset: i64,
    /// Only zstd:chunked: empty, or "zeros" for a hole.
    #[serde(borrow)]
    pub(super) chunk_type: Cow<'a, str>,
    /// Of the whole file.
    #[serde(borrow)]
    pub(super) digest: Cow<'a, str>,
}

/// The outermost object.
pub(super) struct Document<'a>(pub(super) &'a mut Reader);

impl<'de> DeserializeSeed<'de> for Document<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Document<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a TOC")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut version, mut entries) = (None, false);
        while let Some(key) = map.next_key::<Cow<'_, str>>()? {
            match &*key {
                "version" => version = Some(map.next_value::<i64>()?),
                "entries" if !std::mem::replace(&mut entries, true) => {
                    map.next_value_seed(Entries(self.0))?;
                }
                "entries" => return Err(serde::de::Error::duplicate_field("entries")),
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        match version {
            Some(1) if entries => Ok(()),
            Some(1) => Err(serde::de::Error::missing_field("entries")),
            Some(other) => Err(serde::de::Error::custom(format!("unknown version {other}"))),
            None => Err(serde::de::Error::missing_field("version")),
        }
    }
}

/// The array of entries.
struct Entries<'a>(&'a mut Reader);

impl<'de> DeserializeSeed<'de> for Entries<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of TOC entries")
    }

    /// Go writes an empty list as `null`.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(entry) = seq.next_element::<Entry<'_>>()? {
            if let Err(refused) = self.0.entry(&entry) {
                self.0.refused = Some(refused);
                return Err(serde::de::Error::custom("refused"));
            }
        }
        Ok(())
    }
}

/// Extended attributes: name and base64 of the value, in the order of the document.
pub(super) struct Xattrs<'a>(pub(super) Vec<(Cow<'a, str>, Cow<'a, str>)>);

impl<'de: 'a, 'a> Deserialize<'de> for Xattrs<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = Xattrs<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of extended attributes")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Xattrs<'de>, A::Error> {
                let mut xattrs = Vec::new();
                while let Some((Text(name), Text(value))) = map.next_entry()? {
                    xattrs.push((name, value));
                }
                Ok(Xattrs(xattrs))
            }
        }
        deserializer.deserialize_map(Map)
    }
}

/// A string borrowed from the document where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
