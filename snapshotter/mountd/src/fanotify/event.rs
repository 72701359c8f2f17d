//! Events from bytes.
//!
//! Invariant: whatever the bytes are, nothing beyond them is read, and what is not understood
//! is [`Event::Foreign`], which ends the list. Pure; numbers are in the machine's order.
//!
//! ```text
//!  0  length    u32, of all of the event
//!  4  version   u8, 3
//!  6  header    u16, where the records begin: 24
//!  8  mask      u64
//! 16  number    i32, a descriptor, or less than 0
//! 20  process   i32
//! 24  records   kind u8, 0 u8, length u16; of kind 6: 0 u32, offset u64, count u64
//! ```

use crate::ranges::Span;
use crate::sys::fanotify::PRE_ACCESS;

const VERSION: u8 = 3;
const HEADER_BYTES: usize = 24;
const RECORD_RANGE: u8 = 6;

/// One event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// Somebody waits for an answer.
    Asks {
        /// Names the question.
        number: i32,
        /// The bytes that will be read, if that is said.
        span: Option<Span>,
    },
    /// Nobody does, but there is a descriptor to be closed.
    Tells {
        /// Which.
        number: i32,
    },
    /// Not even that.
    Nothing,
    /// No event of this kernel interface.
    Foreign,
}

/// All events in `bytes`.
pub(super) fn events(bytes: &[u8]) -> Vec<Event> {
    let (mut all, mut rest) = (Vec::new(), bytes);
    while !rest.is_empty() {
        let Some((event, behind)) = split(rest) else {
            all.push(Event::Foreign);
            break;
        };
        all.push(event);
        rest = behind;
    }
    all
}

fn split(bytes: &[u8]) -> Option<(Event, &[u8])> {
    let len = usize::try_from(u32_at(bytes, 0)?).ok()?;
    let (event, behind) = bytes.split_at_checked(len)?;
    let header = usize::from(u16_at(event, 6)?);
    if header < HEADER_BYTES || *event.get(4)? != VERSION {
        return None;
    }
    let mask = u64_at(event, 8)?;
    let number = u32_at(event, 16)?.cast_signed();
    let event = match (number, mask & PRE_ACCESS) {
        (..0, _) => Event::Nothing,
        (number, 0) => Event::Tells { number },
        (number, _) => Event::Asks {
            number,
            span: span_in(event.get(header..)?),
        },
    };
    Some((event, behind))
}

/// The bytes that are asked about, from the records of an event.
fn span_in(mut records: &[u8]) -> Option<Span> {
    loop {
        let len = usize::from(u16_at(records, 2)?);
        let (record, rest) = records.split_at_checked(len.max(4))?;
        if *record.first()? == RECORD_RANGE {
            let start = u64_at(record, 8)?;
            return Span::new(start, start.checked_add(u64_at(record, 16)?)?);
        }
        records = rest;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_ne_bytes(bytes.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event(mask: u64, number: i32, records: &[Vec<u8>]) -> Vec<u8> {
        let records = records.concat();
        let len = u32::try_from(HEADER_BYTES + records.len()).unwrap();
        let mut out = len.to_ne_bytes().to_vec();
        out.extend([VERSION, 0]);
        out.extend(24_u16.to_ne_bytes());
        out.extend(mask.to_ne_bytes());
        out.extend(number.to_ne_bytes());
        out.extend(77_i32.to_ne_bytes());
        out.extend(records);
        out
    }

    fn record(kind: u8, start: u64, count: u64) -> Vec<u8> {
        let mut out = vec![kind, 0];
        out.extend(24_u16.to_ne_bytes());
        out.extend([0; 4]);
        out.extend(start.to_ne_bytes());
        out.extend(count.to_ne_bytes());
        out
    }

    #[test]
    fn events_as_the_kernel_lays_them_out() {
        let asks = |number, start, end| Event::Asks {
            number,
            span: Span::new(start, end),
        };
        let all = [
            event(PRE_ACCESS, 5, &[record(6, 4096, 131_072)]),
            event(PRE_ACCESS, 6, &[record(4, 1, 1), record(6, 0, 4096)]),
            event(PRE_ACCESS, 7, &[]),
            event(PRE_ACCESS, 8, &[record(6, 4096, 0)]),
            event(PRE_ACCESS, 9, &[record(6, u64::MAX, 2)]),
            event(8, 10, &[]),
            event(0x4000, -1, &[]),
        ];
        let expected = [
            asks(5, 4096, 135_168),
            asks(6, 0, 4096),
            asks(7, 1, 0),
            asks(8, 1, 0),
            asks(9, 1, 0),
            Event::Tells { number: 10 },
            Event::Nothing,
        ];
        assert_eq!(events(&all.concat()), expected);
        let mut later = event(PRE_ACCESS, 5, &[]);
        later[4] = 4;
        assert_eq!(events(&later), [Event::Foreign]);
        assert_eq!(events(&all[0][..40]), [Event::Foreign]);
        assert_eq!(events(&[]), []);
    }

    proptest! {
        #[test]
        fn any_bytes_are_events_or_not(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), len in 0..60_u32) {
            events(&bytes);
            if let Some(front) = bytes.get_mut(..8) {
                front.copy_from_slice(&[len.to_ne_bytes(), [VERSION, 0, 24, 0]].concat());
            }
            prop_assert!(events(&bytes).len() <= 9);
        }
    }
}
