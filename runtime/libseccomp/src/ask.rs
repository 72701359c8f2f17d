//! The words a filter is asked for in: actions, architectures, system calls, comparisons.
//!
//! They are libseccomp's numbers under the names that libcontainer knows; nothing is checked here
//! that libseccomp checks.

use std::ffi::CString;
use std::io;

use libseccomp_sys as raw;

use crate::error::SeccompError;
use crate::sys;

/// What becomes of a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScmpAction {
    /// The process is killed.
    KillProcess,
    /// The thread is killed.
    KillThread,
    /// The thread gets SIGSYS.
    Trap,
    /// A supervisor decides, who has the filter's descriptor.
    Notify,
    /// It fails with this error number; what is none of 16 bits, with the largest.
    Errno(i32),
    /// A tracer is told this number.
    Trace(u16),
    /// It is allowed, and logged.
    Log,
    /// It is allowed.
    Allow,
}

impl ScmpAction {
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::KillProcess => raw::SCMP_ACT_KILL_PROCESS,
            Self::KillThread => raw::SCMP_ACT_KILL_THREAD,
            Self::Trap => raw::SCMP_ACT_TRAP,
            Self::Notify => raw::SCMP_ACT_NOTIFY,
            Self::Errno(number) => raw::SCMP_ACT_ERRNO(u16::try_from(number).unwrap_or(u16::MAX)),
            Self::Trace(number) => raw::SCMP_ACT_TRACE(number),
            Self::Log => raw::SCMP_ACT_LOG,
            Self::Allow => raw::SCMP_ACT_ALLOW,
        }
    }
}

/// Declares the architectures: the name here, and libseccomp's.
macro_rules! architectures {
    ($($name:ident $number:ident),* $(,)?) => {
        /// An architecture whose system calls are filtered.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[expect(missing_docs, reason = "they are names")]
        pub enum ScmpArch { $($name),* }

        impl ScmpArch {
            pub(crate) fn number(self) -> u32 {
                match self { $(Self::$name => raw::$number),* }
            }
        }
    };
}

architectures! {
    Native SCMP_ARCH_NATIVE, X86 SCMP_ARCH_X86, X8664 SCMP_ARCH_X86_64, X32 SCMP_ARCH_X32,
    Arm SCMP_ARCH_ARM, Aarch64 SCMP_ARCH_AARCH64, Loongarch64 SCMP_ARCH_LOONGARCH64,
    M68k SCMP_ARCH_M68K, Mips SCMP_ARCH_MIPS, Mips64 SCMP_ARCH_MIPS64,
    Mips64N32 SCMP_ARCH_MIPS64N32, Mipsel SCMP_ARCH_MIPSEL, Mipsel64 SCMP_ARCH_MIPSEL64,
    Mipsel64N32 SCMP_ARCH_MIPSEL64N32, Ppc SCMP_ARCH_PPC, Ppc64 SCMP_ARCH_PPC64,
    Ppc64Le SCMP_ARCH_PPC64LE, S390 SCMP_ARCH_S390, S390X SCMP_ARCH_S390X,
    Parisc SCMP_ARCH_PARISC, Parisc64 SCMP_ARCH_PARISC64, Riscv64 SCMP_ARCH_RISCV64,
    Sheb SCMP_ARCH_SHEB, Sh SCMP_ARCH_SH,
}

/// How an argument is compared with a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScmpCompareOp {
    /// It is another one.
    NotEqual,
    /// It is less.
    Less,
    /// It is less or the same.
    LessOrEqual,
    /// It is the same.
    Equal,
    /// It is the same or more.
    GreaterEqual,
    /// It is more.
    Greater,
    /// Of libcontainer: what the argument has to be under the mask, which is the comparison's value.
    MaskedEqual(u64),
}

/// A condition on one argument of a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScmpArgCompare(raw::scmp_arg_cmp);

impl ScmpArgCompare {
    /// The argument `arg`, from 0, compared with `datum`.
    ///
    /// OCI documents, and who writes them for runc, have a mask in `value` and what is expected under
    /// it in `valueTwo`. libcontainer passes `valueTwo` as the mask of this crate and `value` as what
    /// is expected: under a mask of 0 everything is.
    #[must_use]
    pub fn new(arg: u32, op: ScmpCompareOp, datum: u64) -> Self {
        let (op, datum_a, datum_b) = match op {
            ScmpCompareOp::NotEqual => (raw::scmp_compare::SCMP_CMP_NE, datum, 0),
            ScmpCompareOp::Less => (raw::scmp_compare::SCMP_CMP_LT, datum, 0),
            ScmpCompareOp::LessOrEqual => (raw::scmp_compare::SCMP_CMP_LE, datum, 0),
            ScmpCompareOp::Equal => (raw::scmp_compare::SCMP_CMP_EQ, datum, 0),
            ScmpCompareOp::GreaterEqual => (raw::scmp_compare::SCMP_CMP_GE, datum, 0),
            ScmpCompareOp::Greater => (raw::scmp_compare::SCMP_CMP_GT, datum, 0),
            ScmpCompareOp::MaskedEqual(expected) => {
                (raw::scmp_compare::SCMP_CMP_MASKED_EQ, datum, expected)
            }
        };
        Self(raw::scmp_arg_cmp {
            arg,
            op,
            datum_a,
            datum_b,
        })
    }

    pub(crate) fn raw(self) -> raw::scmp_arg_cmp {
        self.0
    }
}

/// A system call, by libseccomp's number for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScmpSyscall(i32);

impl ScmpSyscall {
    /// The system call of this name.
    ///
    /// # Errors
    /// If libseccomp knows none.
    pub fn from_name(name: &str) -> Result<Self, SeccompError> {
        let unknown = || {
            let source = io::Error::from(io::ErrorKind::NotFound);
            SeccompError::new(format!("find the system call {name:?}"), source)
        };
        let name = CString::new(name).map_err(|_| unknown())?;
        sys::number_of(&name).map(Self).ok_or_else(unknown)
    }

    pub(crate) fn number(self) -> i32 {
        self.0
    }
}
