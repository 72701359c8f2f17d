//! As much of FlatBuffers as a zTOC needs.
//!
//! A table begins with the distance back to its vtable (i32); a vtable is its own length,
//! that of the table (both u16) and the place of each field in the table (u16, 0 if absent).
//! Strings, vectors and other tables are behind a distance forward (u32); a vector is its
//! number of elements (u32) and the elements. All little endian.
//!
//! Invariant: nothing is read outside the buffer, whatever it says, and nothing is copied.
//! Parts may overlap, so one part may be read in many places: callers bound how much they
//! keep and how often they look ([`Refs::len`] is bounded by the buffer for one vector, not
//! for all of them together).

/// What was looked for, or the rule that is broken.
pub(super) type Found<T> = Result<T, String>;

/// Bytes of a vtable before the places of fields.
const VTABLE_HEAD: usize = 4;

/// A table.
#[derive(Clone, Copy)]
pub(super) struct Table<'a> {
    all: &'a [u8],
    at: usize,
    len: usize,
    /// Places of the fields.
    fields: &'a [u8],
}

/// A vector of references.
#[derive(Clone, Copy)]
pub(super) struct Refs<'a> {
    all: &'a [u8],
    /// Of the first element.
    at: usize,
    len: usize,
}

impl<'a> Table<'a> {
    /// The table that `all` is about.
    pub(super) fn root(all: &'a [u8]) -> Found<Self> {
        Self::at(all, target(all, 0)?)
    }

    fn at(all: &'a [u8], at: usize) -> Found<Self> {
        let bad = || format!("its table at byte {at} is damaged");
        let back = i32::from_le_bytes(array(all, at).ok_or_else(bad)?);
        let vtable = i64::try_from(at).ok().map(|at| at - i64::from(back));
        let vtable = vtable.and_then(|at| usize::try_from(at).ok());
        let vtable = vtable.ok_or_else(bad)?;
        let len_at = |at: usize| array(all, at).map(|len| usize::from(u16::from_le_bytes(len)));
        let (vtable_len, len) = len_at(vtable)
            .zip(len_at(vtable.saturating_add(2)))
            .ok_or_else(bad)?;
        let fields = vtable
            .checked_add(VTABLE_HEAD)
            .zip(vtable.checked_add(vtable_len))
            .and_then(|(start, end)| all.get(start..end));
        let inside = at.checked_add(len).is_some_and(|end| end <= all.len());
        match fields {
            Some(fields) if inside => Ok(Self {
                all,
                at,
                len,
                fields,
            }),
            _ => Err(bad()),
        }
    }

    /// A signed number, 0 if absent.
    pub(super) fn i64(&self, number: u16) -> Found<i64> {
        Ok(self.scalar(number)?.map_or(0, i64::from_le_bytes))
    }

    /// A signed number, 0 if absent.
    pub(super) fn i32(&self, number: u16) -> Found<i32> {
        Ok(self.scalar(number)?.map_or(0, i32::from_le_bytes))
    }

    /// An unsigned number, 0 if absent.
    pub(super) fn u32(&self, number: u16) -> Found<u32> {
        Ok(self.scalar(number)?.map_or(0, u32::from_le_bytes))
    }

    /// A number or member of an enumeration, whose default its schema knows.
    pub(super) fn i8(&self, number: u16) -> Found<Option<i8>> {
        Ok(self.scalar(number)?.map(i8::from_le_bytes))
    }

    /// Another table.
    pub(super) fn table(&self, number: u16) -> Found<Option<Self>> {
        let place = self.place(number, 4)?;
        place
            .map(|at| Self::at(self.all, target(self.all, at)?))
            .transpose()
    }

    /// A string or a vector of bytes, empty if absent.
    pub(super) fn bytes(&self, number: u16) -> Found<&'a [u8]> {
        match self.place(number, 4)? {
            Some(at) => bytes(self.all, target(self.all, at)?),
            None => Ok(&[]),
        }
    }

    /// A vector of tables or strings, empty if absent.
    pub(super) fn refs(&self, number: u16) -> Found<Refs<'a>> {
        let all = self.all;
        match self.place(number, 4)? {
            Some(at) => {
                let at = target(all, at)?;
                let len = vector(all, at, 4)?.len() / 4;
                // A vector has a length in front of it.
                Ok(Refs {
                    all,
                    at: at.saturating_add(4),
                    len,
                })
            }
            None => Ok(Refs { all, at: 0, len: 0 }),
        }
    }

    fn scalar<const N: usize>(&self, number: u16) -> Found<Option<[u8; N]>> {
        let place = self.place(number, N)?;
        Ok(place.and_then(|at| array(self.all, at)))
    }

    /// Where a field of `len` bytes is; inside the table, and so inside the buffer.
    fn place(&self, number: u16, len: usize) -> Found<Option<usize>> {
        let at = usize::from(number) * 2;
        let place = array(self.fields, at).map_or(0, u16::from_le_bytes);
        if place == 0 {
            return Ok(None);
        }
        let place = usize::from(place);
        if place + len > self.len {
            let rule = format!("field {number} of its table at byte {} is damaged", self.at);
            return Err(rule);
        }
        Ok(Some(self.at.saturating_add(place)))
    }
}

impl<'a> Refs<'a> {
    /// Number of elements: four bytes of the buffer each.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The table of this number.
    pub(super) fn table(&self, number: usize) -> Found<Table<'a>> {
        Table::at(self.all, self.target(number)?)
    }

    /// The string of this number.
    pub(super) fn bytes(&self, number: usize) -> Found<&'a [u8]> {
        bytes(self.all, self.target(number)?)
    }

    fn target(&self, number: usize) -> Found<usize> {
        let at = number
            .checked_mul(4)
            .filter(|_| number < self.len)
            .and_then(|at| at.checked_add(self.at))
            .ok_or_else(|| format!("it has no element {number}"))?;
        target(self.all, at)
    }
}

/// Where the distance at `at` leads to.
fn target(all: &[u8], at: usize) -> Found<usize> {
    let distance = array(all, at).map(u32::from_le_bytes);
    let target = distance
        .filter(|distance| *distance > 0)
        .and_then(|distance| usize::try_from(distance).ok())
        .and_then(|distance| at.checked_add(distance));
    target.ok_or_else(|| format!("its reference at byte {at} is damaged"))
}

fn bytes(all: &[u8], at: usize) -> Found<&[u8]> {
    vector(all, at, 1)
}

/// The elements, of `size` bytes each, of the vector at `at`.
fn vector(all: &[u8], at: usize, size: usize) -> Found<&[u8]> {
    let count = array(all, at).map(u32::from_le_bytes);
    let len = count
        .and_then(|count| usize::try_from(count).ok())
        .and_then(|count| count.checked_mul(size));
    let start = at.checked_add(4);
    let range = start.zip(len).and_then(|(start, len)| {
        let end = start.checked_add(len)?;
        all.get(start..end)
    });
    range.ok_or_else(|| format!("its vector at byte {at} does not end inside it"))
}

fn array<const N: usize>(all: &[u8], at: usize) -> Option<[u8; N]> {
    let bytes = all.get(at..at.checked_add(N)?)?;
    bytes.try_into().ok()
}
