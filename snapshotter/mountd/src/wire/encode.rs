//! Messages to bytes.
//!
//! Invariant: what is written is what [`decode`](super::decode) reads, in the order that the
//! table of [`super`] says.

use super::{Basis, Handed, Listed, MAGIC, Message, Role, Through, VERSION};
use crate::ranges::SPANS_MAX;

/// The datagram of a message. Texts and spans beyond their limits are cut: whoever made
/// them checked them, and the reader refuses what is missing.
pub fn encode(message: &Message) -> Vec<u8> {
    let mut out = Writer(Vec::with_capacity(64));
    out.0.extend_from_slice(&MAGIC);
    out.0.extend_from_slice(&VERSION.to_le_bytes());
    out.0.extend_from_slice(&message.kind().to_le_bytes());
    let mut body = Writer(Vec::with_capacity(64));
    write_body(&mut body, message);
    out.u32(u32::try_from(body.0.len()).unwrap_or(u32::MAX));
    let sum = checksum(&out.0, &body.0);
    out.u32(sum);
    out.0.extend_from_slice(&body.0);
    out.0
}

#[expect(
    clippy::too_many_lines,
    reason = "one arm per message, as in its table"
)]
fn write_body(out: &mut Writer, message: &Message) {
    match message {
        Message::Hello(role) => out.0.push(match role {
            Role::Daemon => 0,
            Role::Successor => 1,
            Role::Guest => 2,
        }),
        Message::Mount {
            request,
            through,
            size,
            name,
            path,
        } => {
            out.u64s(&[*request]);
            out.through(*through);
            out.u64s(&[*size]);
            out.text(name);
            out.text(path);
        }
        Message::Attach {
            request,
            mount,
            file,
        } => {
            out.u64s(&[*request, *mount, file.dev, file.ino]);
        }
        Message::Unmount { request, mount } | Message::Mark { request, mount } => {
            out.u64s(&[*request, *mount]);
        }
        Message::Grant {
            want,
            mount,
            number,
            span,
        } => {
            out.u64s(&[*want, *mount, *number, span.start(), span.end()]);
        }
        Message::Failed {
            want: id,
            mount,
            errno,
        }
        | Message::Done {
            request: id,
            mount,
            errno,
        } => {
            out.u64s(&[*id, *mount]);
            out.u32(*errno);
        }
        Message::Taken | Message::HandedGroup => {}
        Message::Welcome { mounts } => out.u32(*mounts),
        Message::Listed(listed) => write_listed(out, listed),
        Message::Want { want, mount, span } => {
            out.u64s(&[*want, *mount, span.start(), span.end()]);
        }
        Message::Handed(handed) => write_handed(out, handed),
        Message::HandedAll {
            next_mount,
            guarded,
        } => {
            out.u64s(&[*next_mount]);
            out.0.push(u8::from(*guarded));
        }
        Message::HandedByGuard { next_mount: mount } | Message::Dropped { mount } => {
            out.u64s(&[*mount]);
        }
        Message::HandedRead {
            mount,
            number,
            waited_ms,
            span,
        } => {
            out.u64s(&[*mount]);
            out.u32(*number);
            out.u64s(&[*waited_ms, span.start(), span.end()]);
        }
    }
}

fn write_listed(out: &mut Writer, listed: &Listed) {
    out.u64s(&[listed.mount]);
    out.through(listed.through);
    out.u64s(&[listed.size]);
    out.text(&listed.name);
    out.text(&listed.path);
}

fn write_handed(out: &mut Writer, handed: &Handed) {
    let (basis, number) = match handed.basis {
        Basis::Number(number) => (0, number),
        Basis::Lock => (1, 0),
        Basis::Kept(number) => (2, number),
    };
    write_listed(out, &handed.listed);
    out.0.push(basis);
    out.u64s(&[number, handed.mark]);
    let granted = handed.granted.get(..SPANS_MAX).unwrap_or(&handed.granted);
    out.u32(u32::try_from(granted.len()).unwrap_or_default());
    for span in granted {
        out.u64s(&[span.start(), span.end()]);
    }
}

/// Of the header before it and the body behind.
pub(super) fn checksum(head: &[u8], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(body);
    hasher.finalize()
}

/// Collects fields.
pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn u64s(&mut self, values: &[u64]) {
        for value in values {
            self.0.extend_from_slice(&value.to_le_bytes());
        }
    }

    pub(super) fn text(&mut self, text: &[u8]) {
        let len = u16::try_from(text.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&len.to_le_bytes());
        self.0
            .extend_from_slice(text.get(..usize::from(len)).unwrap_or_default());
    }

    fn through(&mut self, through: Through) {
        self.0.push(match through {
            Through::Fuse => 0,
            Through::Fanotify => 1,
        });
    }
}
