//! Filters that are loaded, each on a thread of its own: the kernel says what they do.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};

use crate::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall, prepare,
    sys,
};

/// What no system call of these fails with by itself.
const REFUSED: i32 = libc::EXFULL;

/// Runs `body` on a thread that may load filters.
fn filtered<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(|| {
        sys::set_no_new_privs().unwrap();
        body()
    });
    thread.join().unwrap()
}

/// Refuses getcwd(2) with an error number.
fn refuse_getcwd(number: i32) -> ScmpFilterContext {
    let mut context = ScmpFilterContext::new(ScmpAction::Allow).unwrap();
    context.set_ctl_nnp(false).unwrap();
    context.add_arch(ScmpArch::Native).unwrap();
    let getcwd = ScmpSyscall::from_name("getcwd").unwrap();
    context.add_rule(ScmpAction::Errno(number), getcwd).unwrap();
    context
}

fn getcwd_error() -> Option<i32> {
    std::env::current_dir()
        .err()
        .and_then(|error| error.raw_os_error())
}

#[test]
fn a_filter_does_what_it_was_asked_for() {
    let before_and_after = filtered(|| {
        let before = getcwd_error();
        refuse_getcwd(REFUSED).load().unwrap();
        (before, getcwd_error())
    });
    assert_eq!(before_and_after, (None, Some(REFUSED)));
}

#[test]
fn what_is_prepared_is_not_loaded_until_it_is() {
    let seen = filtered(|| {
        let program = prepare(|| refuse_getcwd(REFUSED).load().unwrap()).unwrap();
        assert_eq!(program.instructions().len() % 8, 0);
        let before = getcwd_error();
        refuse_getcwd(REFUSED).load().unwrap();
        (before, getcwd_error())
    });
    assert_eq!(seen, (None, Some(REFUSED)));
}

#[test]
fn another_filter_than_the_prepared_one_is_itself() {
    let seen = filtered(|| {
        prepare(|| refuse_getcwd(libc::EBADE).load().unwrap()).unwrap();
        refuse_getcwd(REFUSED).load().unwrap();
        getcwd_error()
    });
    assert_eq!(seen, Some(REFUSED));
}

#[test]
fn preparing_that_fails_leaves_loading_as_it_was() {
    let seen = filtered(|| {
        assert!(prepare(|| ()).is_none(), "nothing was asked for");
        let refused = || {
            let mut context = refuse_getcwd(REFUSED);
            let getcwd = ScmpSyscall::from_name("getcwd").unwrap();
            let seventh = ScmpArgCompare::new(6, ScmpCompareOp::Equal, 0);
            context
                .add_rule_conditional(ScmpAction::Log, getcwd, &[seventh])
                .unwrap();
            let error = context.load().unwrap_err().to_string();
            assert!(
                error.contains("add the rule Log for system call"),
                "{error}"
            );
        };
        assert!(prepare(refused).is_none());
        let panicked = std::panic::catch_unwind(|| prepare(|| panic!("as it was asked for")));
        assert!(panicked.is_err());
        refuse_getcwd(REFUSED).load().unwrap();
        getcwd_error()
    });
    assert_eq!(seen, Some(REFUSED));
}

#[test]
fn masked_comparisons_are_what_documents_mean() {
    // As libcontainer passes `value: 3, valueTwo: 2`, which is (argument & 3) == 2, SEEK_END.
    let from_end = ScmpArgCompare::new(2, ScmpCompareOp::MaskedEqual(2), 3);
    let file = tempfile::tempfile().unwrap();
    let seek = |mut file: &File, to| file.seek(to).err().and_then(|error| error.raw_os_error());
    let seen = filtered(move || {
        let mut context = ScmpFilterContext::new(ScmpAction::Allow).unwrap();
        let lseek = ScmpSyscall::from_name("lseek").unwrap();
        let conditions = [from_end];
        context
            .add_rule_conditional(ScmpAction::Errno(REFUSED), lseek, &conditions)
            .unwrap();
        context.load().unwrap();
        [SeekFrom::Start(0), SeekFrom::Current(0), SeekFrom::End(0)].map(|to| seek(&file, to))
    });
    assert_eq!(seen, [None, None, Some(REFUSED)]);
}

#[test]
fn names_that_nobody_knows_are_refused() {
    for name in ["", "no_such_call", "get\0cwd"] {
        assert!(ScmpSyscall::from_name(name).is_err(), "{name:?}");
    }
    let asked = ScmpFilterContext::new(ScmpAction::Allow).unwrap();
    assert!(asked.get_notify_fd().is_err(), "nothing is loaded");
}

#[test]
fn a_filter_that_notifies_has_a_descriptor() {
    let fd = filtered(|| {
        let mut context = ScmpFilterContext::new(ScmpAction::Allow).unwrap();
        let getcwd = ScmpSyscall::from_name("getcwd").unwrap();
        context.add_rule(ScmpAction::Notify, getcwd).unwrap();
        context.set_ctl_tsync(false).unwrap();
        context.load().unwrap();
        context.get_notify_fd().unwrap()
    });
    let name = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
    assert_eq!(name.to_str(), Some("anon_inode:seccomp notify"));
}
