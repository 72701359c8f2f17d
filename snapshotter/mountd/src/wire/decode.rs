//! Bytes to messages.
//!
//! Invariant: all of a datagram makes sense, or it is no message.

use super::encode::checksum;
use super::reader::Reader;
use super::{
    Basis, DATAGRAM_BYTES_MAX, FileId, HEADER_BYTES, Handed, Listed, MAGIC, Malformed, Message,
    NAME_BYTES_MAX, PATH_BYTES_MAX, Role, SIZE_MAX, Through, VERSION,
};
use crate::ranges::SPANS_MAX;

/// Takes a datagram apart.
pub fn decode(datagram: &[u8]) -> Result<Message, Malformed> {
    let (head, body) = datagram
        .split_at_checked(HEADER_BYTES)
        .ok_or(Malformed::Foreign)?;
    let (named, sum) = head.split_at_checked(12).ok_or(Malformed::Foreign)?;
    let (kind, len) = read_header(&mut Reader::new(named)).ok_or(Malformed::Foreign)?;
    let is_whole = usize::try_from(len).is_ok_and(|len| len == body.len());
    if !is_whole
        || datagram.len() > DATAGRAM_BYTES_MAX
        || sum != checksum(named, body).to_le_bytes()
    {
        return Err(Malformed::Damaged);
    }
    let mut fields = Reader::new(body);
    read_body(kind, &mut fields)
        .filter(|_| fields.is_empty())
        .ok_or(Malformed::Body(kind))
}

/// Kind and length, if it is of this protocol.
fn read_header(head: &mut Reader<'_>) -> Option<(u16, u32)> {
    let ours = head.bytes(4)? == MAGIC && head.u16()? == VERSION;
    let header = (head.u16()?, head.u32()?);
    ours.then_some(header)
}

fn read_body(kind: u16, body: &mut Reader<'_>) -> Option<Message> {
    Some(match kind {
        1 => Message::Hello(match body.u8()? {
            0 => Role::Daemon,
            1 => Role::Successor,
            2 => Role::Guest,
            _ => return None,
        }),
        2 => {
            let request = body.u64()?;
            let Listed {
                through,
                size,
                name,
                path,
                ..
            } = read_listed(0, body)?;
            Message::Mount {
                request,
                through,
                size,
                name,
                path,
            }
        }
        3 => Message::Attach {
            request: body.u64()?,
            mount: body.u64()?,
            file: FileId {
                dev: body.u64()?,
                ino: body.u64()?,
            },
        },
        4 => Message::Unmount {
            request: body.u64()?,
            mount: body.u64()?,
        },
        5 => Message::Grant {
            want: body.u64()?,
            mount: body.u64()?,
            number: body.u64()?,
            span: body.span()?,
        },
        6 => Message::Failed {
            want: body.u64()?,
            mount: body.u64()?,
            errno: body.u32()?,
        },
        7 => Message::Taken,
        8 => Message::Mark {
            request: body.u64()?,
            mount: body.u64()?,
        },
        _ => return read_from_server(kind, body),
    })
}

fn read_from_server(kind: u16, body: &mut Reader<'_>) -> Option<Message> {
    Some(match kind {
        32 => Message::Welcome {
            mounts: body.u32()?,
        },
        33 => {
            let mount = body.u64()?;
            Message::Listed(read_listed(mount, body)?)
        }
        34 => Message::Done {
            request: body.u64()?,
            mount: body.u64()?,
            errno: body.u32()?,
        },
        35 => Message::Want {
            want: body.u64()?,
            mount: body.u64()?,
            span: body.span()?,
        },
        64 => Message::Handed(read_handed(body)?),
        65 => Message::HandedAll {
            next_mount: body.u64()?,
            guarded: match body.u8()? {
                0 => false,
                1 => true,
                _ => return None,
            },
        },
        66 => Message::Dropped { mount: body.u64()? },
        67 => Message::HandedByGuard {
            next_mount: body.u64()?,
        },
        68 => Message::HandedGroup,
        69 => Message::HandedRead {
            mount: body.u64()?,
            number: body.u32()?,
            waited_ms: body.u64()?,
            span: body.span()?,
        },
        _ => return None,
    })
}

/// Everything but its number.
fn read_listed(mount: u64, body: &mut Reader<'_>) -> Option<Listed> {
    let through = match body.u8()? {
        0 => Through::Fuse,
        1 => Through::Fanotify,
        _ => return None,
    };
    let size = body.u64().filter(|size| *size <= SIZE_MAX)?;
    let is_path = |path: &Vec<u8>| path.starts_with(b"/") && !path.contains(&0);
    Some(Listed {
        mount,
        through,
        size,
        name: body.text(NAME_BYTES_MAX)?,
        path: body.text(PATH_BYTES_MAX).filter(is_path)?,
    })
}

fn read_handed(body: &mut Reader<'_>) -> Option<Handed> {
    let mount = body.u64()?;
    let listed = read_listed(mount, body)?;
    let basis = match (listed.through, body.u8()?, body.u64()?) {
        (Through::Fuse, 0, number) => Basis::Number(number),
        (Through::Fuse, 1, 0) => Basis::Lock,
        (Through::Fanotify, 2, number) => Basis::Kept(number),
        _ => return None,
    };
    let is_marked = |mark: &u64| *mark == 0 || listed.through == Through::Fanotify;
    let mark = body.u64().filter(is_marked)?;
    let count = usize::try_from(body.u32()?).ok()?;
    if count > SPANS_MAX {
        return None;
    }
    let granted = (0..count).map(|_| body.span()).collect::<Option<_>>()?;
    Some(Handed {
        listed,
        basis,
        mark,
        granted,
    })
}
