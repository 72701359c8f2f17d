//! The bodies of the fuzz targets on seeded inputs and many mutations of them.
//!
//! Promise: errors, never panics. Runs on the pinned toolchain, from a fixed seed, for a
//! fixed number of inputs; libFuzzer explores further (see `snapshotter/mountd/fuzz`).

use lazarette_mountd::ranges::Span;
use lazarette_mountd::wire::{Basis, Handed, Listed, Message, Role, Through, encode};

#[path = "../fuzz/bodies.rs"]
mod bodies;

/// Mutations per seed.
const ROUNDS: u32 = 20_000;

/// SplitMix64: good enough to mutate, the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound.max(1) as u64).expect("it is below a usize")
    }

    fn mutate(&mut self, seed: &[u8]) -> Vec<u8> {
        let mut out = seed.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(out.len());
            let byte = [0, 1, 0x7f, 0x80, 0xff, self.next().to_le_bytes()[0]][self.below(6)];
            match self.below(4) {
                0 => out.truncate(at),
                1 => out.insert(at, byte),
                _ if out.is_empty() => out.push(byte),
                _ => out[at] = byte,
            }
        }
        out
    }
}

fn smoke(seeds: &[Vec<u8>], body: fn(&[u8]), mend: fn(&mut Vec<u8>)) {
    let mut random = Random(1);
    for seed in seeds {
        body(seed);
        for round in 0..ROUNDS {
            let mut input = random.mutate(seed);
            // Half of them right about what would stop them at the door.
            if round % 2 == 0 {
                mend(&mut input);
            }
            body(&input);
        }
    }
}

#[test]
fn requests() {
    let opcodes = [1, 2, 3, 14, 15, 17, 18, 25, 26, 36, 38, 42, 99_u32];
    let seed = |opcode: &u32| {
        let mut bytes = [104, *opcode].map(u32::to_ne_bytes).concat();
        bytes.extend([7, 2].map(u64::to_ne_bytes).concat());
        bytes.extend([0; 16]);
        bytes.extend((0..64).map(|at: u8| at % 9));
        bytes
    };
    let seeds: Vec<Vec<u8>> = opcodes.iter().map(seed).collect();
    smoke(&seeds, bodies::fuzz_request, |bytes| {
        let len = u32::try_from(bytes.len()).expect("it is short");
        for (to, from) in bytes.iter_mut().zip(len.to_ne_bytes()) {
            *to = from;
        }
    });
}

#[test]
fn datagrams() {
    let span = Span::new(4096, 8192).expect("it is one");
    let listed = Listed {
        mount: 1,
        through: Through::Fuse,
        size: 8192,
        name: b"sha256:ab".to_vec(),
        path: b"/run/x".to_vec(),
    };
    let handed = Handed {
        listed: listed.clone(),
        basis: Basis::Number(3),
        mark: 0,
        granted: vec![span; 3],
    };
    let kept = Handed {
        listed: Listed {
            through: Through::Fanotify,
            ..listed.clone()
        },
        basis: Basis::Kept(3),
        mark: 7,
        granted: vec![span],
    };
    let messages = [
        Message::Handed(kept),
        Message::HandedRead {
            mount: 1,
            number: 9,
            waited_ms: 0,
            span,
        },
        Message::Hello(Role::Daemon),
        Message::Grant {
            want: 1,
            mount: 2,
            number: 3,
            span,
        },
        Message::Listed(listed),
        Message::Handed(handed),
        Message::HandedAll {
            next_mount: 9,
            guarded: true,
        },
    ];
    let seeds: Vec<Vec<u8>> = messages.iter().map(encode).collect();
    smoke(&seeds, bodies::fuzz_datagram, |bytes| {
        let Some((head, body)) = bytes.split_at_mut_checked(16) else {
            return;
        };
        let len = u32::try_from(body.len()).expect("it is short");
        head[8..12].copy_from_slice(&len.to_le_bytes());
        let mut sum = crc32fast::Hasher::new();
        sum.update(&head[..12]);
        sum.update(body);
        head[12..16].copy_from_slice(&sum.finalize().to_le_bytes());
    });
}
