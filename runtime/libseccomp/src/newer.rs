//! Instructions in front of a filter's program: system calls that are newer than the filter do not exist.
//!
//! Programs ask for new calls and take an older one where they get ENOSYS; a filter that refuses what it
//! does not list with EPERM, as that of container engines does, makes them fail instead. So calls with a
//! larger number than every call that the filter has a rule for get ENOSYS, of each architecture, as in
//! runc. Where the default is to allow, to log or to ask somebody, or ENOSYS, nothing is in front.

use libseccomp_sys as raw;

use crate::ask::ScmpAction;

/// Instructions of classic BPF, by linux/bpf_common.h.
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_GREATER: u16 = 0x25;
const IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

/// Places in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// What tells calls of x32 from those of x86-64, which share an architecture.
const X32: u32 = 0x4000_0000;

/// An architecture of a filter, and the largest number of a call that it has a rule for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Last {
    pub(crate) architecture: u32,
    pub(crate) number: u32,
}

/// Whether calls that no rule is for fail by themselves, so that newer ones can be told apart.
pub(crate) fn is_told_apart(default: ScmpAction) -> bool {
    match default {
        ScmpAction::Errno(number) => number != libc::ENOSYS,
        ScmpAction::KillProcess | ScmpAction::KillThread | ScmpAction::Trap => true,
        ScmpAction::Notify | ScmpAction::Trace(_) | ScmpAction::Log | ScmpAction::Allow => false,
    }
}

/// The instructions, of 8 bytes each; what comes behind them is reached by every other call.
pub(crate) fn refuse(last: &[Last]) -> Vec<u8> {
    let is_x32 = |one: &&Last| one.architecture == raw::SCMP_ARCH_X32;
    let x32 = last.iter().find(is_x32);
    let others = last.iter().filter(|one| !is_x32(one));
    let blocks: Vec<_> = others.flat_map(|one| block(one, x32)).collect();
    if blocks.is_empty() {
        return Vec::new();
    }
    let mut all = vec![Instruction::new(LOAD, ARCHITECTURE)];
    all.extend(blocks);
    let len = all.len();
    let jumps = all.iter_mut().enumerate();
    for (place, jump) in jumps.filter(|(_, one)| one.code == JUMP) {
        jump.operand = u32::try_from(len - place - 1).unwrap_or(u32::MAX);
    }
    all.into_iter().flat_map(Instruction::bytes).collect()
}

/// What is done for one architecture, and passed over for others; A is the architecture before, and
/// after if it is passed over. Its jumps are to the end of all blocks.
fn block(one: &Last, x32: Option<&Last>) -> Vec<Instruction> {
    let mut block = vec![Instruction::new(LOAD, NUMBER)];
    if one.architecture == raw::SCMP_ARCH_X86_64 {
        let of_x32 = x32.map_or_else(Vec::new, |x32| beyond(x32.number));
        block.push(Instruction::unless(IF_ANY_BIT, X32, of_x32.len() + 1));
        block.extend(of_x32);
        block.push(Instruction::new(JUMP, 0));
    }
    block.extend(beyond(one.number));
    block.push(Instruction::new(JUMP, 0));
    let other = Instruction::unless(IF_EQUAL, one.architecture, block.len());
    block.insert(0, other);
    block
}

/// Returns for numbers beyond `last`; A is the number.
fn beyond(last: u32) -> Vec<Instruction> {
    let no_such_call = ScmpAction::Errno(libc::ENOSYS).number();
    vec![
        Instruction::unless(IF_GREATER, last, 1),
        Instruction::new(RETURN, no_such_call),
    ]
}

/// A `struct sock_filter`.
#[derive(Clone, Copy, Debug)]
struct Instruction {
    code: u16,
    /// How many are passed over where the condition does not hold.
    unless: u8,
    operand: u32,
}

impl Instruction {
    fn new(code: u16, operand: u32) -> Self {
        Self {
            code,
            unless: 0,
            operand,
        }
    }

    fn unless(code: u16, operand: u32, passed_over: usize) -> Self {
        // A block has ten at most.
        let unless = u8::try_from(passed_over).unwrap_or(u8::MAX);
        Self {
            unless,
            ..Self::new(code, operand)
        }
    }

    fn bytes(self) -> [u8; 8] {
        let ([a, b], [c, d, e, f]) = (self.code.to_ne_bytes(), self.operand.to_ne_bytes());
        [a, b, 0, self.unless, c, d, e, f]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the instructions answer a call with; `None` if they are passed.
    fn answer(program: &[u8], (architecture, number): (u32, u32)) -> Option<u32> {
        let (mut at, mut a) = (0, 0);
        while at < program.len() / 8 {
            let [c, d, _, unless, k @ ..]: [u8; 8] = program[at * 8..][..8].try_into().unwrap();
            let operand = u32::from_ne_bytes(k);
            let holds = match u16::from_ne_bytes([c, d]) {
                LOAD => {
                    a = if operand == NUMBER {
                        number
                    } else {
                        architecture
                    };
                    true
                }
                JUMP => {
                    at += operand as usize;
                    true
                }
                IF_EQUAL => a == operand,
                IF_GREATER => a > operand,
                IF_ANY_BIT => a & operand != 0,
                RETURN => return Some(operand),
                code => panic!("no instruction of ours: {code:#x}"),
            };
            at += 1 + if holds { 0 } else { usize::from(unless) };
        }
        assert_eq!(at, program.len() / 8, "it ends where the filter begins");
        None
    }

    #[test]
    fn newer_calls_do_not_exist_and_others_are_the_filters() {
        let (amd64, i386, x32) = (
            raw::SCMP_ARCH_X86_64,
            raw::SCMP_ARCH_X86,
            raw::SCMP_ARCH_X32,
        );
        let arm = raw::SCMP_ARCH_AARCH64;
        let last = |architecture, number| Last {
            architecture,
            number,
        };
        let refused = Some(ScmpAction::Errno(libc::ENOSYS).number());
        let both = [last(x32, X32 + 547), last(amd64, 452), last(i386, 450)];
        let program = refuse(&both);
        for (call, expected) in [
            ((amd64, 0), None),
            ((amd64, 452), None),
            ((amd64, 453), refused),
            ((amd64, X32 - 1), refused),
            ((amd64, X32), None),
            ((amd64, X32 + 547), None),
            ((amd64, X32 + 548), refused),
            ((amd64, u32::MAX), refused),
            ((i386, 450), None),
            ((i386, 451), refused),
            ((arm, 9999), None),
        ] {
            assert_eq!(answer(&program, call), expected, "{call:x?}");
        }
        let alone = refuse(&[last(amd64, 452)]);
        assert_eq!(answer(&alone, (amd64, 453)), refused);
        assert_eq!(answer(&alone, (amd64, X32 + 9999)), None, "of no business");
        assert!(refuse(&[]).is_empty());
    }
}
