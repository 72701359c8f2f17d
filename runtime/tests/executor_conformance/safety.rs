//! What keeps a container from what is not its own: the default system call filter, as the kernel applies
//! it to arguments, and the program that it is forked from.

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;

use lazarette_runtime::spec::ContainerOptions;

use crate::executor_support::{Bench, executors, is_root, parent_of, sh};

/// What is tried: a name, the system call and its first argument, for clone(2) with SIGCHLD.
const CALLS: [(&str, i64, i64); 9] = [
    ("a process", libc::SYS_clone, 17),
    ("a user namespace", libc::SYS_clone, 0x1000_0000 | 17),
    ("a mount namespace", libc::SYS_clone, 0x0002_0000 | 17),
    ("both", libc::SYS_clone, 0x1002_0000 | 17),
    ("the personality", libc::SYS_personality, 0xffff_ffff),
    ("one that is allowed", libc::SYS_personality, 0),
    ("another one", libc::SYS_personality, 1),
    ("a socket of virtual machines", libc::SYS_socket, 40),
    ("one of another year", 9999, 0),
];

/// A program of Perl, which Debian always has, that makes the call and says what came of it.
fn attempts() -> String {
    let calls = CALLS.map(|(name, number, argument)| format!("['{name}', {number}, {argument}],"));
    format!(
        "for (({})) {{
            my ($name, $number, $argument) = @$_;
            my $made = syscall($number, $argument, 0, 0, 0, 0);
            exec '/bin/true' if $made == 0 && $number == {};
            print $name, ': ', $made == -1 ? ($!+0 == 1 ? 'refused' : \"error $!\") : 'made', \"\\n\";
        }}",
        calls.concat(),
        libc::SYS_clone
    )
}

#[tokio::test]
async fn privileged_arguments_are_filtered() {
    need_root!("privileged_arguments_are_filtered");
    let host = ["/usr", "/lib", "/lib64"].into_iter();
    let volumes = host.filter(|dir| Path::new(dir).exists());
    let options = ContainerOptions {
        args: ["perl", "-e", &attempts()].map(str::to_owned).into(),
        env: vec!["PATH=/usr/bin:/bin".to_owned()],
        volumes: volumes
            .map(|dir| format!("{dir}:{dir}:ro").parse().unwrap())
            .collect(),
        ..ContainerOptions::default()
    };
    let expected = "a process: made\na user namespace: refused\na mount namespace: refused\n\
        both: refused\nthe personality: made\none that is allowed: made\nanother one: refused\n\
        a socket of virtual machines: refused\n\
        one of another year: error Function not implemented\n";
    for (kind, executor) in executors() {
        let bench = Bench::new();
        for is_expected in [false, true] {
            if is_expected {
                executor.warm_up();
            }
            let ended = bench.run(executor.as_ref(), options.clone()).await;
            let ended = ended.unwrap();
            assert_eq!(ended.out, expected, "{kind}: {}", ended.err);
        }
        bench.assert_clean(kind);
    }
}

/// A container's init could keep the file it is forked from, and write it when nobody runs it any more.
#[tokio::test]
async fn privileged_the_hosts_program_is_not_written() {
    need_root!("privileged_the_hosts_program_is_not_written");
    for (kind, executor) in executors() {
        let bench = Bench::new();
        let started = bench.start(executor.as_ref(), sh("cat")).await;
        let mut running = started.unwrap();
        let program = format!("/proc/{}/exe", parent_of(running.task().pid()));
        // Asked about first, before whether somebody runs it: nothing is lost where it is written.
        let opened = File::options().write(true).truncate(true).open(program);
        let error = opened.unwrap_err();
        assert_eq!(
            error.kind(),
            ErrorKind::ReadOnlyFilesystem,
            "{kind}: {error}"
        );
        running.close_input();
        assert_eq!(running.finish().await.code, 0, "{kind}");
        bench.assert_clean(kind);
    }
}
