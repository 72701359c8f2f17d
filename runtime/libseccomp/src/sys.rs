//! libseccomp and the kernel: numbers of system calls, programs of filters, and loading one.
//!
//! All `unsafe` of the crate is here. A context of libseccomp lives for one call of [`compile`].

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::{AsRawFd as _, RawFd};
use std::ptr::NonNull;

use libseccomp_sys as raw;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::ask::ScmpAction;
use crate::error::SeccompError;
use crate::filter::{Filter, Program, Rule};
use crate::newer::Last;

type Result<T> = std::result::Result<T, SeccompError>;

/// Bytes of one instruction, a `struct sock_filter`.
const INSTRUCTION: usize = 8;
const SECCOMP_SET_MODE_FILTER: libc::c_uint = 1;
const NEW_LISTENER: u32 = 1 << 3;

/// libseccomp's number for the system call `name`.
#[expect(unsafe_code, reason = "libseccomp has a C interface")]
pub(crate) fn number_of(name: &CStr) -> Option<i32> {
    // SAFETY: the name ends with a NUL byte and is only read.
    let number = unsafe { raw::seccomp_syscall_resolve_name(name.as_ptr()) };
    (number != raw::__NR_SCMP_ERROR).then_some(number)
}

/// A context of libseccomp, released with this.
struct Context(NonNull<libc::c_void>);

impl Context {
    #[expect(unsafe_code, reason = "libseccomp has a C interface")]
    fn new(default: ScmpAction) -> Result<Self> {
        // SAFETY: the call takes a number.
        let context = unsafe { raw::seccomp_init(default.number()) };
        let made = NonNull::new(context).map(Self);
        made.ok_or_else(|| {
            let source = io::Error::from(io::ErrorKind::InvalidInput);
            SeccompError::new(format!("make a filter with {default:?} by default"), source)
        })
    }

    #[expect(unsafe_code, reason = "libseccomp has a C interface")]
    fn add_architecture(&mut self, number: u32) -> Result<()> {
        // SAFETY: the context is valid as long as this is.
        let answer = unsafe { raw::seccomp_arch_add(self.0.as_ptr(), number) };
        // It may be there, as the native one is from the beginning.
        if answer == 0 || answer == -libc::EEXIST {
            return Ok(());
        }
        let what = format!("filter the system calls of architecture {number:#x}");
        Err(SeccompError::of_answer(what, answer))
    }

    #[expect(unsafe_code, reason = "libseccomp has a C interface")]
    fn add_rule(&mut self, rule: &Rule) -> Result<()> {
        let number = rule.syscall.number();
        let conditions: Vec<_> = rule.conditions.iter().map(|one| one.raw()).collect();
        let refused = |answer| {
            let what = format!("add the rule {:?} for system call {number}", rule.action);
            SeccompError::of_answer(what, answer)
        };
        let count = u32::try_from(conditions.len()).map_err(|_| refused(-libc::E2BIG))?;
        // SAFETY: the context is valid as long as this is; the array has `count` conditions and is
        // only read.
        let answer = unsafe {
            let context = self.0.as_ptr();
            let action = rule.action.number();
            raw::seccomp_rule_add_array(context, action, number, count, conditions.as_ptr())
        };
        if answer == 0 {
            Ok(())
        } else {
            Err(refused(answer))
        }
    }

    #[expect(unsafe_code, reason = "libseccomp has a C interface")]
    fn export(&self) -> Result<Vec<u8>> {
        let refused = |source| SeccompError::new("compile a filter", source);
        let made = memfd_create(c"seccomp", MFdFlags::MFD_CLOEXEC);
        let mut file = File::from(made.map_err(io::Error::from).map_err(refused)?);
        // SAFETY: the context is valid as long as this is, the descriptor as long as `file`.
        let answer = unsafe { raw::seccomp_export_bpf(self.0.as_ptr(), file.as_raw_fd()) };
        if answer != 0 {
            return Err(SeccompError::of_answer("compile a filter", answer));
        }
        let mut program = Vec::new();
        file.rewind().map_err(refused)?;
        file.read_to_end(&mut program).map_err(refused)?;
        Ok(program)
    }
}

impl Drop for Context {
    #[expect(unsafe_code, reason = "libseccomp has a C interface")]
    fn drop(&mut self) {
        // SAFETY: the context is valid, and nobody has it after this.
        unsafe { raw::seccomp_release(self.0.as_ptr()) }
    }
}

/// The largest number of a call that the filter has a rule for, of each of its architectures.
pub(crate) fn last_numbers(filter: &Filter) -> Vec<Last> {
    let numbers = filter.rules.iter().map(|rule| rule.syscall.number());
    let names: Vec<CString> = numbers.filter_map(name_of).collect();
    let mut architectures = vec![native()];
    for one in filter.architectures.iter().map(|one| one.number()) {
        if one != raw::SCMP_ARCH_NATIVE && !architectures.contains(&one) {
            architectures.push(one);
        }
    }
    let last = |architecture| {
        // What an architecture has not, it has a negative number for.
        let numbers = names
            .iter()
            .filter_map(|name| number_at(architecture, name));
        let number = numbers.max()?;
        Some(Last {
            architecture,
            number,
        })
    };
    architectures.into_iter().filter_map(last).collect()
}

#[expect(unsafe_code, reason = "libseccomp has a C interface")]
fn native() -> u32 {
    // SAFETY: the call takes nothing and returns a number.
    unsafe { raw::seccomp_arch_native() }
}

/// The name of one of the native architecture's calls.
#[expect(unsafe_code, reason = "libseccomp has a C interface")]
fn name_of(number: i32) -> Option<CString> {
    // SAFETY: the call takes numbers.
    let name = unsafe { raw::seccomp_syscall_resolve_num_arch(native(), number) };
    if name.is_null() {
        return None;
    }
    // SAFETY: it is a string that libseccomp allocated for us, and freed once.
    unsafe {
        let copy = CStr::from_ptr(name).to_owned();
        libc::free(name.cast_mut().cast());
        Some(copy)
    }
}

#[expect(unsafe_code, reason = "libseccomp has a C interface")]
fn number_at(architecture: u32, name: &CStr) -> Option<u32> {
    // SAFETY: the name ends with a NUL byte and is only read.
    let number = unsafe { raw::seccomp_syscall_resolve_name_arch(architecture, name.as_ptr()) };
    u32::try_from(number).ok()
}

/// The program that libseccomp makes of a filter.
pub(crate) fn compile(filter: &Filter) -> Result<Vec<u8>> {
    let mut context = Context::new(filter.default)?;
    for architecture in &filter.architectures {
        context.add_architecture(architecture.number())?;
    }
    for rule in &filter.rules {
        context.add_rule(rule)?;
    }
    context.export()
}

/// Puts a program on this thread, for good, with `flags` of seccomp(2); the descriptor for
/// notifications if they ask for one.
#[expect(unsafe_code, reason = "seccomp(2) has no safe wrapper")]
pub(crate) fn install(program: &Program, flags: u32) -> Result<Option<RawFd>> {
    let refused = |source| SeccompError::new("load a filter", source);
    let len = u16::try_from(program.0.len() / INSTRUCTION);
    let len = len.map_err(|_| refused(io::Error::from_raw_os_error(libc::E2BIG)))?;
    // The kernel copies it, wherever it lies: its alignment is nobody's matter.
    let filter = program.0.as_ptr().cast_mut().cast();
    let program = libc::sock_fprog { len, filter };
    let (call, operation) = (libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER);
    // SAFETY: the program and its `len` instructions outlive the call, which only reads them.
    let answer = unsafe { libc::syscall(call, operation, flags, &raw const program) };
    match i32::try_from(answer) {
        Ok(0) => Ok(None),
        Ok(fd) if fd > 0 && flags & NEW_LISTENER != 0 => Ok(Some(fd)),
        // A thread that has a filter of its own, where all of them should get this one.
        Ok(thread) if thread > 0 => Err(refused(io::Error::from_raw_os_error(libc::ESRCH))),
        Ok(_) | Err(_) => Err(refused(io::Error::last_os_error())),
    }
}

/// Has this thread, and what it becomes, never gain a privilege: who has none may load a filter then.
#[cfg(test)]
pub(crate) fn set_no_new_privs() -> nix::Result<()> {
    nix::sys::prctl::set_no_new_privs()
}
