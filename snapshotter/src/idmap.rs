//! Which owners a snapshot's files have on the host, as containerd says it in labels.
//!
//! A container in a user namespace sees the owners of its image. On the host those are others:
//! of each id that a map names, and of no other, the one it is mapped to. Containerd gives both
//! maps to a snapshotter that its config says maps owners (`capabilities = ["remap-ids"]`).
//!
//! Pure. Invariant: a value is one that the kernel takes for the maps of a user namespace, and
//! that has an owner for the container's root.

use crate::metastore::Labels;
use crate::{Error, Result};

/// Says which users of the container are which of the host: `container:host:size`, separated by
/// commas.
pub const UID_LABEL: &str = "containerd.io/snapshot/uidmapping";
/// The same of groups.
pub const GID_LABEL: &str = "containerd.io/snapshot/gidmapping";

/// Most ranges of one map, the kernel's own limit.
const RANGES_MAX: usize = 340;

/// The maps of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMaps {
    users: Map,
    groups: Map,
}

/// An owner of a file: user and group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Map(Vec<Range>);

/// Ids that follow one another, the same number on both sides; none is 2^32 - 1, which is no id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    container: u32,
    host: u32,
    size: u32,
}

impl IdMaps {
    /// What the labels of a snapshot say; `None` where they say nothing.
    ///
    /// # Errors
    /// `Invalid` for maps that the kernel would not take, for one without the other, and where
    /// the container's root is nobody on the host.
    pub fn of(labels: &Labels) -> Result<Option<Self>> {
        let (users, groups) = match (labels.get(UID_LABEL), labels.get(GID_LABEL)) {
            (None, None) => return Ok(None),
            (Some(users), Some(groups)) => (users, groups),
            (Some(_), None) => return Err(invalid(UID_LABEL, "the map of groups is missing")),
            (None, Some(_)) => return Err(invalid(GID_LABEL, "the map of users is missing")),
        };
        Ok(Some(Self {
            users: Map::parse(users)?,
            groups: Map::parse(groups)?,
        }))
    }

    /// The container's root, on the host.
    pub fn root(&self) -> Owner {
        // There is one: `parse` has looked.
        let of = |map: &Map| map.to_host(0).unwrap_or(u32::MAX);
        Owner {
            uid: of(&self.users),
            gid: of(&self.groups),
        }
    }

    /// Whether this owner is one that the maps lead to, and none that they lead from: files of it
    /// have been given to the host's owners before.
    pub fn is_of_host(&self, owner: Owner) -> bool {
        let only_host = |map: &Map, id| map.to_host(id).is_none() && map.is_host(id);
        only_host(&self.users, owner.uid) && only_host(&self.groups, owner.gid)
    }

    /// Both maps in the form of `/proc/<pid>/uid_map`, users first.
    pub fn lines(&self) -> [String; 2] {
        [self.users.lines(), self.groups.lines()]
    }
}

impl Map {
    fn parse(text: &str) -> Result<Self> {
        let ranges = text
            .split(',')
            .map(Range::parse)
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| {
                invalid(
                    text,
                    "it is not container:host:size, each below 2^32 with what they span, \
                     the size not 0, separated by commas",
                )
            })?;
        if ranges.len() > RANGES_MAX {
            return Err(invalid(text, "it has more than 340 ranges"));
        }
        let sides: [fn(&Range) -> u32; 2] = [|range| range.container, |range| range.host];
        if sides.into_iter().any(|side| overlap(&ranges, side)) {
            return Err(invalid(text, "two of its ranges overlap"));
        }
        let map = Self(ranges);
        match map.to_host(0) {
            Some(_) => Ok(map),
            None => Err(invalid(text, "it has no range for the container's id 0")),
        }
    }

    fn to_host(&self, id: u32) -> Option<u32> {
        let within = |range: &Range| {
            let at = id.checked_sub(range.container)?;
            (at < range.size).then(|| range.host.saturating_add(at))
        };
        self.0.iter().find_map(within)
    }

    fn is_host(&self, id: u32) -> bool {
        let within = |range: &Range| {
            let at = id.checked_sub(range.host);
            at.is_some_and(|at| at < range.size)
        };
        self.0.iter().any(within)
    }

    fn lines(&self) -> String {
        let line = |range: &Range| format!("{} {} {}\n", range.container, range.host, range.size);
        self.0.iter().map(line).collect()
    }
}

impl Range {
    fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split(':').map(|number| {
            // `parse` would take a sign.
            let is_plain = number.bytes().all(|byte| byte.is_ascii_digit());
            is_plain.then(|| number.parse().ok()).flatten()
        });
        let mut next = || numbers.next().flatten();
        let (container, host, size) = (next()?, next()?, next()?);
        if numbers.next().is_some() || size == 0 {
            return None;
        }
        let range = Self {
            container,
            host,
            size,
        };
        // The end of each side is an id, too, so that 2^32 - 1 is none.
        container.checked_add(size)?;
        host.checked_add(size)?;
        Some(range)
    }
}

/// Whether two ranges share an id on one side.
fn overlap(ranges: &[Range], side: fn(&Range) -> u32) -> bool {
    let mut sorted: Vec<_> = ranges.iter().map(|r| (side(r), r.size)).collect();
    sorted.sort_unstable();
    sorted.windows(2).any(|pair| match pair {
        [(first, size), (second, _)] => first.saturating_add(*size) > *second,
        _ => false,
    })
}

fn invalid(input: &str, detail: &'static str) -> Error {
    Error::Invalid {
        what: "map of owners",
        input: input.chars().take(64).collect(),
        detail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(users: Option<&str>, groups: Option<&str>) -> Labels {
        let pairs = [(UID_LABEL, users), (GID_LABEL, groups)];
        let given = |(key, value): (&str, Option<&str>)| Some((key.to_owned(), value?.to_owned()));
        pairs.into_iter().filter_map(given).collect()
    }

    fn maps(users: &str, groups: &str) -> IdMaps {
        let maps = IdMaps::of(&labels(Some(users), Some(groups)));
        maps.unwrap().unwrap()
    }

    fn owner(uid: u32, gid: u32) -> Owner {
        Owner { uid, gid }
    }

    #[test]
    fn labels_are_what_containerd_writes() {
        assert_eq!(IdMaps::of(&labels(None, None)).unwrap(), None);
        let one = maps("0:100000:65536", "0:200000:65536");
        assert_eq!(one.root(), owner(100_000, 200_000));
        assert_eq!(one.lines(), ["0 100000 65536\n", "0 200000 65536\n"]);
        let several = maps("1:5:1,0:4294967294:1", "0:0:4294967295");
        assert_eq!(several.root(), owner(4_294_967_294, 0));
        assert_eq!(several.lines()[0], "1 5 1\n0 4294967294 1\n");
    }

    #[test]
    fn what_the_kernel_would_not_take_is_refused() {
        let bad = "it is not container:host:size";
        let many: Vec<_> = (0..341).map(|id| format!("{id}:{id}:1")).collect();
        let table = [
            ("", bad),
            ("0", bad),
            ("0:1", bad),
            ("0:1:2:3", bad),
            ("0:1:1,", bad),
            ("0:1:x", bad),
            ("0:-1:1", bad),
            ("0:+1:1", bad),
            ("0: 1:1", bad),
            ("0::1", bad),
            ("0:1:0", bad),
            ("0:4294967296:1", bad),
            ("0:4294967295:1", bad),
            ("0:1:4294967295", bad),
            ("0:18446744073709551616:1", bad),
            ("1:1:1", "no range for the container's id 0"),
            ("0:0:10,9:20:1", "overlap"),
            ("0:0:10,10:9:1", "overlap"),
            ("5:90:10,0:100:1,20:95:3", "overlap"),
            (&many.join(","), "more than 340 ranges"),
        ];
        let good = "0:100000:65536";
        for (text, why) in table {
            for (users, groups) in [(text, good), (good, text)] {
                let error = IdMaps::of(&labels(Some(users), Some(groups))).unwrap_err();
                assert!(error.to_string().contains(why), "{text}: {error}");
                assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
            }
        }
        for (users, groups) in [(Some(good), None), (None, Some(good))] {
            let error = IdMaps::of(&labels(users, groups)).unwrap_err();
            assert!(error.to_string().contains("is missing"), "{error}");
        }
        assert_eq!(maps(&many[..340].join(","), good).root().uid, 0);
    }

    #[test]
    fn owners_that_were_mapped_before_are_told() {
        let pod = maps("0:100000:65536", "0:100000:65536");
        assert!(pod.is_of_host(owner(100_000, 100_000)));
        assert!(pod.is_of_host(owner(165_535, 101_000)));
        for not in [(0, 0), (1000, 100_000), (100_000, 0), (165_536, 165_536)] {
            assert!(!pod.is_of_host(owner(not.0, not.1)), "{not:?}");
        }
        // Where an id is one of both sides nothing can be told.
        let same = maps("0:0:65536", "0:0:65536");
        assert!(!same.is_of_host(owner(0, 0)));
    }
}
