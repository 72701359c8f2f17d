//! The default system call filter, as data.
//!
//! What is not listed fails with EPERM. The list follows what container engines allow by
//! default: everything ordinary programs use, nothing that reaches beyond the container.
//! Calls that only make sense with a capability are allowed only with that capability.

use std::collections::HashSet;

use oci_spec::runtime::{
    Arch, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompBuilder, LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};

use super::SpecError;
use crate::sys::number;

/// The flags of clone(2) that make new Linux namespaces.
const CLONE_NAMESPACES: u64 = 0x7E02_0000;
/// Address family of virtual machine sockets: the host could be reached around its firewall.
const AF_VSOCK: u64 = 40;
/// The personalities programs ask for: Linux, 32-bit, `UNAME26`, both, and the query.
const PERSONALITIES: [u64; 5] = [0x0, 0x0008, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Allowed for everybody, whatever the arguments.
#[rustfmt::skip]
pub(super) const ALLOWED: &[&str] = &[
    "accept", "accept4", "access", "adjtimex", "alarm", "bind", "brk", "cachestat", "capget",
    "capset", "chdir", "chmod", "chown", "chown32", "clock_adjtime", "clock_adjtime64",
    "clock_getres", "clock_getres_time64", "clock_gettime", "clock_gettime64",
    "clock_nanosleep", "clock_nanosleep_time64", "close", "close_range", "connect",
    "copy_file_range", "creat", "dup", "dup2", "dup3", "epoll_create", "epoll_create1",
    "epoll_ctl", "epoll_ctl_old", "epoll_pwait", "epoll_pwait2", "epoll_wait", "epoll_wait_old",
    "eventfd", "eventfd2", "execve", "execveat", "exit", "exit_group", "faccessat",
    "faccessat2", "fadvise64", "fadvise64_64", "fallocate", "fanotify_mark", "fchdir", "fchmod",
    "fchmodat", "fchmodat2", "fchown", "fchown32", "fchownat", "fcntl", "fcntl64", "fdatasync",
    "fgetxattr", "flistxattr", "flock", "fork", "fremovexattr", "fsetxattr", "fstat", "fstat64",
    "fstatat64", "fstatfs", "fstatfs64", "fsync", "ftruncate", "ftruncate64", "futex",
    "futex_requeue", "futex_time64", "futex_wait", "futex_waitv", "futex_wake", "futimesat",
    "get_robust_list", "get_thread_area", "getcpu", "getcwd", "getdents", "getdents64",
    "getegid", "getegid32", "geteuid", "geteuid32", "getgid", "getgid32", "getgroups",
    "getgroups32", "getitimer", "getpeername", "getpgid", "getpgrp", "getpid", "getppid",
    "getpriority", "getrandom", "getresgid", "getresgid32", "getresuid", "getresuid32",
    "getrlimit", "getrusage", "getsid", "getsockname", "getsockopt", "gettid", "gettimeofday",
    "getuid", "getuid32", "getxattr", "inotify_add_watch", "inotify_init", "inotify_init1",
    "inotify_rm_watch", "io_cancel", "io_destroy", "io_getevents", "io_pgetevents",
    "io_pgetevents_time64", "io_setup", "io_submit", "ioctl", "ioprio_get", "ioprio_set", "ipc",
    "kill", "landlock_add_rule", "landlock_create_ruleset", "landlock_restrict_self", "lchown",
    "lchown32", "lgetxattr", "link", "linkat", "listen", "listxattr", "llistxattr", "_llseek",
    "lremovexattr", "lseek", "lsetxattr", "lstat", "lstat64", "madvise", "map_shadow_stack",
    "membarrier", "memfd_create", "memfd_secret", "mincore", "mkdir", "mkdirat", "mknod",
    "mknodat", "mlock", "mlock2", "mlockall", "mmap", "mmap2", "mprotect", "mq_getsetattr",
    "mq_notify", "mq_open", "mq_timedreceive", "mq_timedreceive_time64", "mq_timedsend",
    "mq_timedsend_time64", "mq_unlink", "mremap", "mseal", "msgctl", "msgget", "msgrcv",
    "msgsnd", "msync", "munlock", "munlockall", "munmap", "name_to_handle_at", "nanosleep",
    "newfstatat", "_newselect", "open", "openat", "openat2", "pause", "pidfd_open",
    "pidfd_send_signal", "pipe", "pipe2", "pkey_alloc", "pkey_free", "pkey_mprotect", "poll",
    "ppoll", "ppoll_time64", "prctl", "pread64", "preadv", "preadv2", "prlimit64",
    "process_mrelease", "process_vm_readv", "process_vm_writev", "pselect6", "pselect6_time64",
    "ptrace", "pwrite64", "pwritev", "pwritev2", "read", "readahead", "readlink", "readlinkat",
    "readv", "recv", "recvfrom", "recvmmsg", "recvmmsg_time64", "recvmsg", "remap_file_pages",
    "removexattr", "rename", "renameat", "renameat2", "restart_syscall", "rmdir", "rseq",
    "rt_sigaction", "rt_sigpending", "rt_sigprocmask", "rt_sigqueueinfo", "rt_sigreturn",
    "rt_sigsuspend", "rt_sigtimedwait", "rt_sigtimedwait_time64", "rt_tgsigqueueinfo",
    "sched_get_priority_max", "sched_get_priority_min", "sched_getaffinity", "sched_getattr",
    "sched_getparam", "sched_getscheduler", "sched_rr_get_interval",
    "sched_rr_get_interval_time64", "sched_setaffinity", "sched_setattr", "sched_setparam",
    "sched_setscheduler", "sched_yield", "seccomp", "select", "semctl", "semget", "semop",
    "semtimedop", "semtimedop_time64", "send", "sendfile", "sendfile64", "sendmmsg", "sendmsg",
    "sendto", "set_robust_list", "set_thread_area", "set_tid_address", "setfsgid", "setfsgid32",
    "setfsuid", "setfsuid32", "setgid", "setgid32", "setgroups", "setgroups32", "setitimer",
    "setpgid", "setpriority", "setregid", "setregid32", "setresgid", "setresgid32", "setresuid",
    "setresuid32", "setreuid", "setreuid32", "setrlimit", "setsid", "setsockopt", "setuid",
    "setuid32", "setxattr", "shmat", "shmctl", "shmdt", "shmget", "shutdown", "sigaltstack",
    "signalfd", "signalfd4", "sigprocmask", "sigreturn", "socketcall", "socketpair", "splice",
    "stat", "stat64", "statfs", "statfs64", "statx", "symlink", "symlinkat", "sync",
    "sync_file_range", "syncfs", "sysinfo", "tee", "tgkill", "time", "timer_create",
    "timer_delete", "timer_getoverrun", "timer_gettime", "timer_gettime64", "timer_settime",
    "timer_settime64", "timerfd_create", "timerfd_gettime", "timerfd_gettime64",
    "timerfd_settime", "timerfd_settime64", "times", "tkill", "truncate", "truncate64",
    "ugetrlimit", "umask", "uname", "unlink", "unlinkat", "utime", "utimensat",
    "utimensat_time64", "utimes", "vfork", "vmsplice", "wait4", "waitid", "waitpid", "write",
    "writev",
];

/// Only on x86: thread-local storage and 16-bit segments.
const X86_ONLY: &[&str] = &["arch_prctl", "modify_ldt"];

/// Allowed when the container has the capability.
pub(super) const BY_CAPABILITY: &[(Capability, &[&str])] = &[
    (Capability::DacReadSearch, &["open_by_handle_at"]),
    (
        Capability::SysAdmin,
        &[
            "bpf",
            "clone",
            "clone3",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "perf_event_open",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "syslog",
            "umount",
            "umount2",
            "unshare",
        ],
    ),
    (Capability::SysBoot, &["reboot"]),
    (Capability::SysChroot, &["chroot"]),
    (
        Capability::SysModule,
        &["delete_module", "init_module", "finit_module"],
    ),
    (Capability::SysPacct, &["acct"]),
    (
        Capability::SysPtrace,
        &["kcmp", "pidfd_getfd", "process_madvise"],
    ),
    (Capability::SysRawio, &["iopl", "ioperm"]),
    (
        Capability::SysTime,
        &["settimeofday", "stime", "clock_settime", "clock_settime64"],
    ),
    (Capability::SysTtyConfig, &["vhangup"]),
    (
        Capability::SysNice,
        &[
            "get_mempolicy",
            "mbind",
            "set_mempolicy",
            "set_mempolicy_home_node",
        ],
    ),
    (Capability::Syslog, &["syslog"]),
    (Capability::Bpf, &["bpf"]),
    (Capability::Perfmon, &["perf_event_open"]),
];

/// The filter for a container that has `capabilities` in its bounding set.
///
/// # Errors
/// [`SpecError::Document`] if the OCI types refuse a part, which would be our mistake.
pub fn profile(capabilities: &HashSet<Capability>) -> Result<LinuxSeccomp, SpecError> {
    let mut rules = vec![allow(ALLOWED)?];
    if cfg!(any(target_arch = "x86_64", target_arch = "x86")) {
        rules.push(allow(X86_ONLY)?);
    }
    for personality in PERSONALITIES {
        rules.push(allow_if("personality", equal(personality)?)?);
    }
    rules.push(allow_if("socket", not_equal(AF_VSOCK)?)?);
    for (capability, names) in BY_CAPABILITY {
        if capabilities.contains(capability) {
            rules.push(allow(names)?);
        }
    }
    if !capabilities.contains(&Capability::SysAdmin) {
        rules.push(allow_if("clone", no_bits(CLONE_NAMESPACES)?)?);
        // The flags of clone3 lie behind a pointer no filter can see; ENOSYS makes libc
        // fall back to clone.
        rules.push(
            LinuxSyscallBuilder::default()
                .names(vec!["clone3".to_owned()])
                .action(LinuxSeccompAction::ScmpActErrno)
                .errno_ret(errno(number::ENOSYS))
                .build()?,
        );
    }
    Ok(LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .default_errno_ret(errno(number::EPERM))
        .architectures(architectures())
        .syscalls(rules)
        .build()?)
}

fn errno(number: i32) -> u32 {
    number.unsigned_abs()
}

fn architectures() -> Vec<Arch> {
    if cfg!(target_arch = "x86_64") {
        vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32]
    } else if cfg!(target_arch = "aarch64") {
        vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm]
    } else {
        vec![Arch::ScmpArchNative]
    }
}

fn allow(names: &[&str]) -> Result<LinuxSyscall, SpecError> {
    Ok(LinuxSyscallBuilder::default()
        .names(
            names
                .iter()
                .map(|&name| name.to_owned())
                .collect::<Vec<_>>(),
        )
        .action(LinuxSeccompAction::ScmpActAllow)
        .build()?)
}

fn allow_if(name: &str, first_argument: LinuxSeccompArg) -> Result<LinuxSyscall, SpecError> {
    Ok(LinuxSyscallBuilder::default()
        .names(vec![name.to_owned()])
        .action(LinuxSeccompAction::ScmpActAllow)
        .args(vec![first_argument])
        .build()?)
}

fn equal(value: u64) -> Result<LinuxSeccompArg, SpecError> {
    argument(value, None, LinuxSeccompOperator::ScmpCmpEq)
}

fn not_equal(value: u64) -> Result<LinuxSeccompArg, SpecError> {
    argument(value, None, LinuxSeccompOperator::ScmpCmpNe)
}

fn no_bits(mask: u64) -> Result<LinuxSeccompArg, SpecError> {
    argument(mask, Some(0), LinuxSeccompOperator::ScmpCmpMaskedEq)
}

fn argument(
    value: u64,
    value_two: Option<u64>,
    op: LinuxSeccompOperator,
) -> Result<LinuxSeccompArg, SpecError> {
    let builder = LinuxSeccompArgBuilder::default()
        .index(0_usize)
        .value(value)
        .op(op);
    Ok(match value_two {
        Some(two) => builder.value_two(two).build()?,
        None => builder.build()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(profile: &LinuxSeccomp, action: LinuxSeccompAction) -> Vec<&str> {
        let rules = profile.syscalls().as_ref().unwrap();
        rules
            .iter()
            .filter(|rule| rule.action() == action && rule.args().is_none())
            .flat_map(|rule| rule.names().iter().map(String::as_str))
            .collect()
    }

    #[test]
    fn no_name_twice_and_nothing_dangerous_for_everybody() {
        let mut seen = HashSet::new();
        for name in ALLOWED {
            assert!(seen.insert(*name), "{name} is listed twice");
        }
        for (_, guarded) in BY_CAPABILITY {
            for name in *guarded {
                assert!(
                    !seen.contains(name),
                    "{name} needs a capability but is always allowed"
                );
            }
        }
        for name in [
            "keyctl",
            "kexec_load",
            "userfaultfd",
            "io_uring_setup",
            "swapon",
            "uselib",
        ] {
            assert!(!seen.contains(name), "{name}");
        }
    }

    #[test]
    fn capabilities_open_their_groups_only() {
        let plain = profile(&HashSet::new()).unwrap();
        let denied = LinuxSeccompAction::ScmpActErrno;
        let allowed = LinuxSeccompAction::ScmpActAllow;
        assert_eq!(names(&plain, denied), ["clone3"]);
        assert!(!names(&plain, allowed).contains(&"chroot"));
        assert!(!names(&plain, allowed).contains(&"mount"));
        let chroot = profile(&HashSet::from([Capability::SysChroot])).unwrap();
        assert!(names(&chroot, allowed).contains(&"chroot"));
        let admin = profile(&HashSet::from([Capability::SysAdmin])).unwrap();
        assert!(names(&admin, allowed).contains(&"clone3"));
        assert!(names(&admin, denied).is_empty());
    }
}
