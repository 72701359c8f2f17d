//! What linking reads of a program or library, by its head.
//!
//! Everything before the first code segment (symbols, relocations, names) and everything
//! that is writable (relocated, so written to) is read whole; code is read here and there.
//!
//! Invariant: pure. Whatever the bytes say, places are bounded in number and length, and
//! nothing but a guess follows from them. What is no ELF file is `None`.

use ::elf::abi::{
    DT_NEEDED, DT_RPATH, DT_RUNPATH, DT_STRTAB, EI_NIDENT, PF_W, PF_X, PT_DYNAMIC, PT_INTERP,
    PT_LOAD,
};
use ::elf::dynamic::{Dyn, DynamicTable};
use ::elf::endian::AnyEndian;
use ::elf::file::{Class, ELF64_EHDR_TAILSIZE, FileHeader, parse_ident};
use ::elf::parse::ParseAt;
use ::elf::segment::{ProgramHeader, SegmentTable};

use crate::types::ByteRange;

/// Longest name, bytes; `$ORIGIN`-relative lists of directories are the long ones.
pub const NAME_BYTES_MAX: u64 = 1024;
/// Segments that are looked at.
const SEGMENTS_MAX: usize = 64;
/// Bytes of the table that says what is needed.
const DYNAMIC_BYTES_MAX: u64 = 64 << 10;
/// Names that are read.
const NAMES_MAX: usize = 256;
/// Longest part that is read whole, bytes.
const PART_BYTES_MAX: u64 = 128 << 20;
/// Bytes of the longer kind of file header. Its parser wants to have all of it.
const HEADER_BYTES: usize = EI_NIDENT + ELF64_EHDR_TAILSIZE;

/// A program or library.
#[derive(Debug, Clone)]
pub struct Program {
    class: Class,
    endian: AnyEndian,
    segments: Vec<ProgramHeader>,
}

/// A name in a program's table of strings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name {
    /// Where it begins in the file.
    pub offset: u64,
    /// What it says.
    pub kind: NameKind,
}

/// What a name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameKind {
    /// A library that is needed.
    Library,
    /// Directories to look for them in, between colons.
    Search,
}

impl Program {
    /// What the first bytes of a file say; `None` if it is not a program.
    pub fn parse(head: &[u8]) -> Option<Self> {
        let (identity, tail) = head.get(..HEADER_BYTES)?.split_at_checked(EI_NIDENT)?;
        let identity = parse_ident::<AnyEndian>(identity).ok()?;
        let (endian, class) = (identity.0, identity.1);
        let header = FileHeader::parse_tail(identity, tail).ok()?;
        let start = usize::try_from(header.e_phoff).ok()?;
        let count = usize::from(header.e_phnum).min(SEGMENTS_MAX);
        // Entries of another length than theirs are nobody's.
        let entry = ProgramHeader::validate_entsize(class, header.e_phentsize.into()).ok()?;
        let len = count.checked_mul(entry)?;
        let table = head.get(start..start.checked_add(len)?)?;
        let segments = SegmentTable::new(endian, class, table).iter().collect();
        Some(Self {
            class,
            endian,
            segments,
        })
    }

    /// Parts of the file that linking reads, which may overlap.
    pub fn linked(&self) -> Vec<ByteRange> {
        let code = self.loaded().filter(|s| s.p_flags & PF_X != 0);
        let tables = code.map(|s| s.p_offset).min().unwrap_or(0);
        let tables = ByteRange::new(0, tables);
        let written = self.loaded().filter(|s| s.p_flags & PF_W != 0);
        let written = written.filter_map(|s| ByteRange::at(s.p_offset, s.p_filesz));
        let parts = tables.into_iter().chain(written);
        parts
            .filter(|part| !part.is_empty() && part.len() <= PART_BYTES_MAX)
            .collect()
    }

    /// The table that says what it needs.
    pub fn dynamic(&self) -> Option<ByteRange> {
        let segment = self.segments.iter().find(|s| s.p_type == PT_DYNAMIC)?;
        ByteRange::at(segment.p_offset, segment.p_filesz.min(DYNAMIC_BYTES_MAX))
    }

    /// What runs it, if its head has all of that.
    pub fn interpreter(&self, head: &[u8]) -> Option<Vec<u8>> {
        let segment = self.segments.iter().find(|s| s.p_type == PT_INTERP)?;
        let start = usize::try_from(segment.p_offset).ok()?;
        let end = start.checked_add(usize::try_from(segment.p_filesz).ok()?)?;
        let path = head.get(start..end)?.split(|byte| *byte == 0).next()?;
        (!path.is_empty()).then(|| path.to_vec())
    }

    /// Names in the table `dynamic`, which may have been cut.
    pub fn names(&self, dynamic: &[u8]) -> Vec<Name> {
        let table = DynamicTable::new(self.endian, self.class, dynamic);
        let strings = table.iter().find(|entry| entry.d_tag == DT_STRTAB);
        let Some(strings) = strings.and_then(|entry| self.place_of(entry.d_ptr())) else {
            return Vec::new();
        };
        let name = |entry: Dyn| {
            let kind = match entry.d_tag {
                DT_NEEDED => NameKind::Library,
                DT_RPATH | DT_RUNPATH => NameKind::Search,
                _ => return None,
            };
            let offset = strings.checked_add(entry.d_val())?;
            Some(Name { offset, kind })
        };
        table.iter().filter_map(name).take(NAMES_MAX).collect()
    }

    fn loaded(&self) -> impl Iterator<Item = &ProgramHeader> {
        self.segments.iter().filter(|s| s.p_type == PT_LOAD)
    }

    /// Where in the file what is at this address comes from.
    fn place_of(&self, address: u64) -> Option<u64> {
        let mut segments = self.loaded();
        segments.find_map(|segment| {
            let inside = address.checked_sub(segment.p_vaddr)?;
            let is_inside = inside < segment.p_filesz;
            is_inside.then(|| segment.p_offset.checked_add(inside))?
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The program that runs these tests is one.
    fn own() -> Vec<u8> {
        std::fs::read("/proc/self/exe").unwrap()
    }

    fn own_head() -> Vec<u8> {
        let mut head = vec![0; 4096];
        let mut file = std::fs::File::open("/proc/self/exe").unwrap();
        std::io::Read::read_exact(&mut file, &mut head).unwrap();
        head
    }

    fn text(file: &[u8], name: Name) -> String {
        let start = usize::try_from(name.offset).unwrap();
        let bytes = file[start..].split(|byte| *byte == 0).next().unwrap();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    fn part(file: &[u8], range: ByteRange) -> &[u8] {
        &file[usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()]
    }

    #[test]
    fn a_real_program_says_what_it_needs() {
        let file = own();
        let program = Program::parse(&file[..4096]).unwrap();
        let interpreter = program.interpreter(&file[..4096]).unwrap();
        let interpreter = String::from_utf8(interpreter).unwrap();
        assert!(
            std::path::Path::new(&interpreter).is_file(),
            "{interpreter}"
        );
        let dynamic = part(&file, program.dynamic().unwrap());
        let names = program.names(dynamic);
        let libraries = names.iter().filter(|n| n.kind == NameKind::Library);
        let libraries: Vec<String> = libraries.map(|n| text(&file, *n)).collect();
        assert!(libraries.contains(&"libc.so.6".to_owned()), "{libraries:?}");
    }

    #[test]
    fn tables_and_data_are_linked_and_code_is_not() {
        let file = own();
        let program = Program::parse(&file[..4096]).unwrap();
        let linked = program.linked();
        let dynamic = program.dynamic().unwrap();
        assert!(linked.iter().any(|part| part.contains(&dynamic)));
        let code = program.loaded().find(|s| s.p_flags & PF_X != 0).unwrap();
        let code = ByteRange::at(code.p_offset, code.p_filesz).unwrap();
        assert!(
            linked
                .iter()
                .all(|part| part.end() <= code.start() || part.start() >= code.end()),
            "{linked:?}"
        );
        let total: u64 = linked.iter().map(ByteRange::len).sum();
        assert!(total > 0 && total < file.len() as u64);
    }

    #[test]
    fn what_is_no_program_is_none() {
        let file = own();
        for head in [
            &b""[..],
            b"#!/bin/sh\n",
            &[0; 4096],
            &file[..15],
            &file[..63],
            &file[..80],
        ] {
            assert!(Program::parse(head).is_none());
        }
        let mut longer = own_head();
        // The length of an entry.
        longer[55] = 1;
        assert!(Program::parse(&longer).is_none());
    }

    proptest! {
        #[test]
        fn no_bytes_harm(
            changes in prop::collection::vec((0_usize..1024, any::<u8>()), 0..40),
            dynamic in prop::collection::vec(any::<u8>(), 0..600),
        ) {
            let mut head = own_head();
            for (at, byte) in changes {
                head[at] = byte;
            }
            if let Some(program) = Program::parse(&head) {
                prop_assert!(program.segments.len() <= SEGMENTS_MAX);
                for part in program.linked() {
                    prop_assert!(part.len() <= PART_BYTES_MAX);
                }
                prop_assert!(program.dynamic().is_none_or(|d| d.len() <= DYNAMIC_BYTES_MAX));
                prop_assert!(program.names(&dynamic).len() <= NAMES_MAX);
                let _ = program.interpreter(&head);
            }
        }
    }
}
