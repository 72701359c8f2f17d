//! CRC-64 of ISO 3309, as tar-split guards payloads with it.
//!
//! Invariant: the value does not depend on how the bytes are cut into pieces.

/// The polynomial x^64 + x^4 + x^3 + x + 1, bits reversed.
const POLYNOMIAL: u64 = 0xd800_0000_0000_0000;

/// Table 0 takes one byte; table n one byte that n more follow. Eight at a time keep up
/// with SHA-256 on the same thread.
static TABLES: [[u64; 256]; 8] = tables();

#[expect(clippy::indexing_slicing, reason = "evaluated by the compiler")]
const fn tables() -> [[u64; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u64;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                (crc >> 1) ^ POLYNOMIAL
            } else {
                crc >> 1
            };
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut table = 1;
    while table < 8 {
        let mut byte = 0;
        while byte < 256 {
            let shorter: u64 = tables[table - 1][byte];
            tables[table][byte] = (shorter >> 8) ^ tables[0][(shorter & 0xff) as usize];
            byte += 1;
        }
        table += 1;
    }
    tables
}

/// A checksum being taken.
#[derive(Debug, Clone, Copy)]
pub(super) struct Crc64(u64);

impl Crc64 {
    /// Of no bytes yet.
    pub(super) fn new() -> Self {
        Self(!0)
    }

    /// Adds the next bytes.
    pub(super) fn update(&mut self, bytes: &[u8]) {
        let (eights, rest) = bytes.as_chunks::<8>();
        for eight in eights {
            let mixed = self.0 ^ u64::from_le_bytes(*eight);
            let parts = mixed.to_le_bytes().into_iter();
            self.0 = parts
                .zip(TABLES.iter().rev())
                .fold(0, |crc, (byte, table)| crc ^ look_up(table, byte));
        }
        for byte in rest {
            let low = self.0.to_le_bytes()[0] ^ byte;
            self.0 = (self.0 >> 8) ^ look_up(&TABLES[0], low);
        }
    }

    /// The value in the byte order in which it is written.
    pub(super) fn finish(self) -> [u8; 8] {
        (!self.0).to_be_bytes()
    }
}

fn look_up(table: &[u64; 256], byte: u8) -> u64 {
    table.get(usize::from(byte)).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_the_known_values_however_it_is_cut() {
        let of = |pieces: &[&[u8]]| {
            let mut crc = Crc64::new();
            for piece in pieces {
                crc.update(piece);
            }
            u64::from_be_bytes(crc.finish())
        };
        // Values that Go's hash/crc64 is tested with.
        assert_eq!(of(&[]), 0);
        assert_eq!(of(&[b"a"]), 0x3420_0000_0000_0000);
        assert_eq!(of(&[b"abcdefghij"]), 0x7f5b_6e21_b002_d367);
        let text = b"The days of the digital watch are numbered.  -Tom Stoppard";
        let whole = of(&[text]);
        for at in 0..text.len() {
            assert_eq!(of(&[&text[..at], &text[at..]]), whole);
        }
    }
}
