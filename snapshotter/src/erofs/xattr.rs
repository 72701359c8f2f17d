//! Extended attributes: behind their inode, or once for all inodes that have the same.
//!
//! Pure. What an inode has begins with a header of 12 bytes, the ids of shared attributes
//! follow, then its own. An id is the place of the attribute in the area of the shared
//! ones, in units of 4 bytes.

use std::collections::HashMap;

use super::{Unfit, fit};
use crate::tree::{Ino, InodeRef, Tree};

const HEADER_LEN: u64 = 12;
const ID_LEN: u64 = 4;
/// Entries are padded to this.
const ALIGN: u64 = 4;
/// Most shared attributes of one inode; the header has a byte for the number.
const IDS_MAX: usize = 255;
/// Most bytes behind one inode, header and all: 65,535 units of 4 bytes count them.
const LEN_MAX: u64 = HEADER_LEN + (u16::MAX as u64 - 1) * ALIGN;

type Xattr<'t> = (&'t [u8], &'t [u8]);

/// The attributes that several inodes have.
#[derive(Debug, Default)]
pub(super) struct Shared<'t> {
    ids: HashMap<Xattr<'t>, u32>,
    /// By id.
    entries: Vec<Xattr<'t>>,
    len: u64,
}

/// What of an inode stands behind it.
struct Own<'t> {
    ids: Vec<u32>,
    entries: Vec<Xattr<'t>>,
}

impl<'t> Shared<'t> {
    /// Finds what is worth sharing.
    pub(super) fn of(tree: &'t Tree) -> Result<Self, Unfit> {
        if !tree.has_xattrs() {
            return Ok(Self::default());
        }
        let mut uses: HashMap<Xattr<'t>, u64> = HashMap::new();
        let mut order = Vec::new();
        for inode in (1..).map_while(|ino| tree.get(ino)) {
            for xattr in inode.xattrs() {
                check(inode.ino(), xattr)?;
                let count = uses.entry(xattr).or_default();
                if *count == 0 {
                    order.push(xattr);
                }
                *count += 1;
            }
        }
        let mut shared = Self::default();
        for xattr in order {
            let uses = uses.get(&xattr).copied().unwrap_or_default();
            let len = entry_len(xattr);
            if len + uses * ID_LEN < uses * len {
                let id = fit(
                    "the place of a shared attribute",
                    shared.len / ALIGN,
                    ID_MAX,
                )?;
                shared.ids.insert(xattr, id);
                shared.entries.push(xattr);
                shared.len += len;
            }
        }
        Ok(shared)
    }

    /// Bytes of the shared area.
    pub(super) fn area_len(&self) -> u64 {
        self.len
    }

    /// Appends the shared area.
    pub(super) fn append_area(&self, out: &mut Vec<u8>) {
        self.entries.iter().for_each(|xattr| append(*xattr, out));
    }

    /// Bytes behind `inode`, 0 without any attributes.
    pub(super) fn len_of(&self, inode: InodeRef<'t>) -> Result<u32, Unfit> {
        let own = self.split(inode);
        let ids = own.ids.len() as u64;
        let entries: u64 = own.entries.iter().map(|xattr| entry_len(*xattr)).sum();
        if ids + entries == 0 {
            return Ok(0);
        }
        let len = HEADER_LEN + ids * ID_LEN + entries;
        fit("the length of one file's extended attributes", len, LEN_MAX)
    }

    /// Appends what stands behind `inode`.
    pub(super) fn append_own(&self, inode: InodeRef<'t>, out: &mut Vec<u8>) {
        let own = self.split(inode);
        if own.ids.is_empty() && own.entries.is_empty() {
            return;
        }
        out.extend([0; 4]);
        // At most IDS_MAX.
        out.push(u8::try_from(own.ids.len()).unwrap_or(u8::MAX));
        out.extend([0; 7]);
        own.ids.iter().for_each(|id| out.extend(id.to_le_bytes()));
        own.entries.iter().for_each(|xattr| append(*xattr, out));
    }

    fn split(&self, inode: InodeRef<'t>) -> Own<'t> {
        let (mut ids, mut entries) = (Vec::new(), Vec::new());
        for xattr in inode.xattrs() {
            match self.ids.get(&xattr) {
                Some(id) if ids.len() < IDS_MAX => ids.push(*id),
                Some(_) | None => entries.push(xattr),
            }
        }
        Own { ids, entries }
    }
}

const ID_MAX: u64 = u32::MAX as u64;

/// How an inode says that `len` bytes stand behind it.
pub(super) fn count_of(len: u64) -> u16 {
    // At most LEN_MAX, by len_of.
    let units = len.saturating_sub(HEADER_LEN) / ALIGN + 1;
    u16::try_from(if len == 0 { 0 } else { units }).unwrap_or(u16::MAX)
}

/// The format's number of the kind of attribute, and what is left of the name.
fn split_name(name: &[u8]) -> Option<(u8, &[u8])> {
    const WHOLE: [(&[u8], u8); 2] = [
        (b"system.posix_acl_access", 2),
        (b"system.posix_acl_default", 3),
    ];
    const PREFIXES: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];
    let whole = WHOLE.iter().find(|(whole, _)| *whole == name);
    if let Some((_, kind)) = whole {
        return Some((*kind, &[]));
    }
    PREFIXES.iter().find_map(|(prefix, kind)| {
        let rest = name.strip_prefix(*prefix)?;
        (!rest.is_empty()).then_some((*kind, rest))
    })
}

fn check(ino: Ino, (name, value): Xattr<'_>) -> Result<(), Unfit> {
    let max = u64::from(u16::MAX);
    let _: u16 = fit(
        "the length of an extended attribute",
        value.len() as u64,
        max,
    )?;
    match split_name(name) {
        Some(_) => Ok(()),
        None => Err(Unfit::XattrName {
            ino,
            name: String::from_utf8_lossy(name).into_owned(),
        }),
    }
}

fn entry_len((name, value): Xattr<'_>) -> u64 {
    let rest = split_name(name).map_or(0, |(_, rest)| rest.len());
    (4 + rest as u64 + value.len() as u64).next_multiple_of(ALIGN)
}

fn append(xattr: Xattr<'_>, out: &mut Vec<u8>) {
    let (name, value) = xattr;
    // of() checked them all.
    let (kind, rest) = split_name(name).unwrap_or_default();
    let end = out.len() as u64 + entry_len(xattr);
    out.push(u8::try_from(rest.len()).unwrap_or(u8::MAX));
    out.push(kind);
    out.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
    out.extend_from_slice(rest);
    out.extend_from_slice(value);
    out.resize(usize::try_from(end).unwrap_or(out.len()), 0);
}
