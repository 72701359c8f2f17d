//! One behaviour, two executors: everything here runs on the embedded runtime and on runc,
//! as root, with a root file system made of busybox.

use std::num::NonZeroU32;
use std::time::Duration;

use lazarette_runtime::executor::{Error, ExitStatus, Size};
use lazarette_runtime::spec::{ContainerOptions, Limits, Network};

/// The test's name, for the line that says it was skipped.
macro_rules! need_root {
    ($name:literal) => {
        if !is_root($name) {
            return;
        }
    };
}

#[path = "executor_conformance/executor_support.rs"]
mod executor_support;
#[path = "executor_conformance/rootfs.rs"]
mod rootfs;
#[path = "executor_conformance/safety.rs"]
mod safety;
#[path = "executor_conformance/streams.rs"]
mod streams;

use executor_support::{Bench, Running, bounded, executors, is_root, sh, wait_gone};

struct Case {
    name: &'static str,
    options: ContainerOptions,
    code: u8,
    out: &'static str,
}

fn case(name: &'static str, script: &str, out: &'static str) -> Case {
    Case {
        name,
        options: sh(script),
        code: 0,
        out,
    }
}

fn with(mut case: Case, change: impl FnOnce(&mut ContainerOptions)) -> Case {
    change(&mut case.options);
    case
}

fn process_cases() -> Vec<Case> {
    vec![
        Case {
            code: 0,
            ..case("true", "true", "")
        },
        Case {
            code: 7,
            ..case("exit code", "echo seven; exit 7", "seven\n")
        },
        case("pid one", "echo $$", "1\n"),
        with(
            case("env", "echo $A-$B-$HOME-$PATH", "1-x=y--/root-/bin\n"),
            |o| {
                o.env = ["A=1", "B=x=y-", "PATH=/bin"].map(str::to_owned).into();
            },
        ),
        with(case("cwd", "pwd", "/tmp\n"), |o| {
            o.cwd = Some("/tmp".into())
        }),
        with(case("cwd is made", "pwd", "/new/dir\n"), |o| {
            o.cwd = Some("/new/dir".into())
        }),
        with(
            case(
                "user by name",
                "id -u; id -g; id -G; echo $HOME; cat /proc/self/status | grep CapEff",
                "33\n33\n33 44\n/srv\nCapEff:\t0000000000000000\n",
            ),
            |o| o.user = Some("www".into()),
        ),
        with(case("user by number", "id -u; id -g", "12345\n0\n"), |o| {
            o.user = Some("12345".into());
        }),
        case(
            "capabilities",
            "grep -E 'Cap(Bnd|Eff|Prm|Inh)' /proc/self/status",
            "CapInh:\t0000000000000000\nCapPrm:\t00000000a80425fb\nCapEff:\t00000000a80425fb\nCapBnd:\t00000000a80425fb\n",
        ),
        case(
            "filter is on",
            "grep '^Seccomp:' /proc/self/status",
            "Seccomp:\t2\n",
        ),
        case(
            "filter refuses",
            "unshare -U true 2>/dev/null || echo refused",
            "refused\n",
        ),
        case(
            "new privileges stay possible",
            "grep NoNewPrivs /proc/self/status",
            "NoNewPrivs:\t0\n",
        ),
        // The two above 31 are the C library's own.
        case(
            "no signal is ignored",
            "echo $((0x$(awk '/SigIgn/ { print $2 }' /proc/self/status) & 0x7ffffffb))",
            "0\n",
        ),
        // The fourth is the directory being listed.
        case(
            "no descriptors leak",
            "exec ls /proc/self/fd",
            "0\n1\n2\n3\n",
        ),
    ]
}

fn file_system_cases() -> Vec<Case> {
    vec![
        case("root is writable", "touch /file && echo ok", "ok\n"),
        with(
            case(
                "read-only root",
                "touch /file 2>/dev/null || echo refused",
                "refused\n",
            ),
            |o| {
                o.read_only = true;
            },
        ),
        case(
            "device nodes",
            "for d in null zero full random urandom tty ptmx; do test -c /dev/$d || echo no $d; done; \
             test -d /dev/pts && test -d /dev/shm && test -d /dev/mqueue && test -L /dev/fd && echo ok",
            "ok\n",
        ),
        case(
            "no other devices",
            "mknod /dev/disk b 254 0 && cat /dev/disk 2>/dev/null || echo refused",
            "refused\n",
        ),
        case(
            "masked paths",
            "head -c1 /proc/kcore | wc -c; ls /sys/firmware | wc -l",
            "0\n0\n",
        ),
        case(
            "kernel settings are read-only",
            "echo 1 2>/dev/null > /proc/sys/vm/panic_on_oom || echo refused",
            "refused\n",
        ),
        case(
            "control groups are read-only",
            "for d in /sys/fs/cgroup /sys/fs/cgroup/*/; do mkdir $d/x 2>/dev/null && echo made $d/x; done; \
             for f in /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max; do \
             test -e $f && echo -1 2>/dev/null > $f && echo wrote $f; done; echo done",
            "done\n",
        ),
        with(
            case(
                "hostname",
                "hostname; cat /etc/hostname; grep -c box /etc/hosts",
                "box\nbox\n1\n",
            ),
            |o| {
                o.hostname = Some("box".into());
            },
        ),
        case("resolv.conf", "test -f /etc/resolv.conf && echo ok", "ok\n"),
        case(
            "no network but loopback",
            "ls /sys/class/net; cat /proc/net/dev | tail -n +3 | cut -d: -f1 | tr -d ' '",
            "lo\nlo\n",
        ),
    ]
}

async fn check(cases: Vec<Case>) {
    for (kind, executor) in executors() {
        let bench = Bench::new();
        for case in &cases {
            let ended = bench.run(executor.as_ref(), case.options.clone()).await;
            let ended = ended.unwrap_or_else(|error| panic!("{kind}: {}: {error}", case.name));
            let name = case.name;
            assert_eq!(
                ended.out, case.out,
                "{kind}: {name}: stderr {:?}",
                ended.err
            );
            assert_eq!(
                ended.code, case.code,
                "{kind}: {name}: stderr {:?}",
                ended.err
            );
        }
        bench.assert_clean(kind);
    }
}

#[tokio::test]
async fn privileged_processes_get_what_they_should() {
    need_root!("privileged_processes_get_what_they_should");
    check(process_cases()).await;
}

#[tokio::test]
async fn privileged_file_systems_look_as_they_should() {
    need_root!("privileged_file_systems_look_as_they_should");
    check(file_system_cases()).await;
}

#[tokio::test]
async fn privileged_host_network_is_the_hosts() {
    need_root!("privileged_host_network_is_the_hosts");
    let mine = std::fs::read_link("/proc/self/ns/net").unwrap();
    for (kind, executor) in executors() {
        let bench = Bench::new();
        let mut options = sh("readlink /proc/self/ns/net");
        options.network = Network::Host;
        let ended = bench.run(executor.as_ref(), options).await.unwrap();
        assert_eq!(ended.out.trim(), mine.to_str().unwrap(), "{kind}");
        let ended = bench
            .run(executor.as_ref(), sh("readlink /proc/self/ns/net"))
            .await
            .unwrap();
        assert_ne!(ended.out.trim(), mine.to_str().unwrap(), "{kind}");
        bench.assert_clean(kind);
    }
}

#[tokio::test]
async fn privileged_volumes_are_mounted() {
    need_root!("privileged_volumes_are_mounted");
    for (kind, executor) in executors() {
        let bench = Bench::new();
        let (shared, fixed) = (bench.path("shared"), bench.path("fixed"));
        for dir in [&shared, &fixed] {
            std::fs::create_dir(dir).unwrap();
            std::fs::write(dir.join("old"), "old").unwrap();
        }
        let mut options = sh(
            "cat /rw/old /rw/ro/old; echo new > /rw/new; touch /rw/ro/new 2>/dev/null || echo no",
        );
        // The inner one first: order must not matter.
        options.volumes = vec![
            format!("{}:/rw/ro:ro", fixed.display()).parse().unwrap(),
            format!("{}:/rw", shared.display()).parse().unwrap(),
        ];
        let ended = bench.run(executor.as_ref(), options).await.unwrap();
        assert_eq!(ended.out, "oldoldno\n", "{kind}: {}", ended.err);
        assert_eq!(
            std::fs::read_to_string(shared.join("new")).unwrap(),
            "new\n",
            "{kind}"
        );
        assert!(!fixed.join("new").exists(), "{kind}");
        bench.assert_clean(kind);
    }
}

#[tokio::test]
async fn privileged_commands_that_cannot_run_get_dockers_codes() {
    need_root!("privileged_commands_that_cannot_run_get_dockers_codes");
    for (kind, executor) in executors() {
        let bench = Bench::new();
        for (command, code) in [
            ("no-such-command", 127),
            ("/no/such/file", 127),
            ("/etc/passwd", 126),
            ("/etc", 126),
        ] {
            let options = ContainerOptions {
                args: vec![command.into()],
                ..sh("")
            };
            match bench.run(executor.as_ref(), options).await {
                Ok(ended) => panic!("{kind}: {command} ran: {}", ended.code),
                Err(error) => {
                    assert_eq!(error.exit_code(), code, "{kind}: {command}: {error}");
                    assert!(error.to_string().contains(command), "{kind}: {error}");
                }
            }
        }
        bench.assert_clean(kind);
    }
}

/// Only the embedded runtime can tell these from a program that fails.
#[tokio::test]
async fn privileged_files_the_kernel_refuses_are_told_apart() {
    need_root!("privileged_files_the_kernel_refuses_are_told_apart");
    let (kind, executor) = executors().swap_remove(0);
    let bench = Bench::new();
    bench.program("rubbish", "neither a program nor a script");
    bench.program("orphan", "#!/no/such/interpreter\n");
    for (command, code, advice) in [
        ("/bin/rubbish", 126, "architecture"),
        ("orphan", 127, "interpreter"),
    ] {
        let options = ContainerOptions {
            args: vec![command.into()],
            ..sh("")
        };
        let error = bench.run(executor.as_ref(), options).await.unwrap_err();
        assert_eq!(error.exit_code(), code, "{kind}: {error}");
        assert!(error.to_string().contains(advice), "{kind}: {error}");
    }
    bench.assert_clean(kind);
}

#[tokio::test]
async fn privileged_memory_limit_kills() {
    need_root!("privileged_memory_limit_kills");
    for (kind, executor) in executors() {
        let bench = Bench::new();
        let limits = Limits {
            memory_bytes: Some(32 << 20),
            ..Limits::default()
        };
        let file = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null \
            || cat /sys/fs/cgroup/memory.max";
        let ended = bench
            .run(executor.as_ref(), ContainerOptions { limits, ..sh(file) })
            .await;
        assert_eq!(ended.unwrap().out.trim(), "33554432", "{kind}");
        let hungry = "exec awk 'BEGIN { x = \"x\"; while (1) x = x x }'";
        let ended = bench
            .run(
                executor.as_ref(),
                ContainerOptions {
                    limits,
                    ..sh(hungry)
                },
            )
            .await;
        assert_eq!(ended.unwrap().code, 137, "{kind}");
        bench.assert_clean(kind);
    }
}

#[tokio::test]
async fn privileged_pids_and_cpu_limits_hold() {
    need_root!("privileged_pids_and_cpu_limits_hold");
    for (kind, executor) in executors() {
        let bench = Bench::new();
        let limits = Limits {
            pids: NonZeroU32::new(8),
            cpus: Some(0.5),
            memory_bytes: None,
        };
        let script = "cat /sys/fs/cgroup/pids/pids.max 2>/dev/null || cat /sys/fs/cgroup/pids.max; \
            cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null || cut -d' ' -f1 /sys/fs/cgroup/cpu.max; \
            for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 20 & done";
        let ended = bench
            .run(
                executor.as_ref(),
                ContainerOptions {
                    limits,
                    ..sh(script)
                },
            )
            .await;
        let ended = ended.unwrap();
        assert_eq!(ended.out, "8\n50000\n", "{kind}");
        assert_ne!(ended.code, 0, "{kind}: all processes were allowed");
        assert!(ended.err.contains("fork"), "{kind}: {}", ended.err);
        bench.assert_clean(kind);
    }
}

#[tokio::test]
async fn privileged_terminals_have_a_size_and_resize() {
    need_root!("privileged_terminals_have_a_size_and_resize");
    for (kind, executor) in executors() {
        let bench = Bench::new();
        let script = "test -t 0 && test -t 1 && test -t 2 && test -c /dev/console && stty size; \
            read line; stty size; echo $TERM-$line";
        let size = Size {
            width: 101,
            height: 33,
        };
        let mut running = bench
            .start_terminal(executor.as_ref(), sh(script), size)
            .await
            .unwrap();
        running.wait_for_output("33 101").await;
        running.resize(Size {
            width: 55,
            height: 22,
        });
        running.type_keys(b"typed\n").await;
        let ended = running.finish().await;
        assert!(ended.out.contains("22 55"), "{kind}: {:?}", ended.out);
        assert!(ended.out.contains("xterm-typed"), "{kind}: {:?}", ended.out);
        assert_eq!(ended.code, 0, "{kind}");
        bench.assert_clean(kind);
    }
}

#[tokio::test]
async fn privileged_signals_reach_init() {
    need_root!("privileged_signals_reach_init");
    for (kind, executor) in executors() {
        let bench = Bench::new();
        let script = "trap 'exit 143' TERM; trap 'echo usr1' USR1; echo ready; \
            while true; do sleep 30 & wait $!; done";
        let mut running = bench.start(executor.as_ref(), sh(script)).await.unwrap();
        running.wait_for_output("ready").await;
        running.task().signal(libc::SIGUSR1).unwrap();
        running.wait_for_output("usr1").await;
        running.task().signal(libc::SIGTERM).unwrap();
        assert_eq!(running.finish().await.code, 143, "{kind}");
        let mut running = bench
            .start(executor.as_ref(), sh("echo up; sleep 60"))
            .await
            .unwrap();
        running.wait_for_output("up").await;
        running.task().signal(libc::SIGKILL).unwrap();
        let task = running.task();
        assert_eq!(
            bounded(task.wait()).await.unwrap(),
            ExitStatus { code: 137 },
            "{kind}"
        );
        assert_eq!(
            bounded(task.wait()).await.unwrap(),
            ExitStatus { code: 137 },
            "{kind}"
        );
        assert!(
            matches!(task.signal(libc::SIGTERM), Err(Error::NotRunning { .. })),
            "{kind}"
        );
        running.finish().await;
        bench.assert_clean(kind);
    }
}

#[tokio::test]
async fn privileged_input_is_echoed_and_its_end_seen() {
    need_root!("privileged_input_is_echoed_and_its_end_seen");
    for (kind, executor) in executors() {
        let bench = Bench::new();
        let mut running = bench
            .start(executor.as_ref(), sh("cat; echo end"))
            .await
            .unwrap();
        running.type_keys(b"some words\n").await;
        running.wait_for_output("some words\n").await;
        running.close_input();
        let ended = running.finish().await;
        assert_eq!(ended.out, "some words\nend\n", "{kind}");
        assert!(ended.times.started >= ended.times.created, "{kind}");
        assert!(
            ended
                .seen
                .first_byte
                .is_some_and(|at| at >= ended.times.created),
            "{kind}"
        );
        bench.assert_clean(kind);
    }
}

#[tokio::test]
async fn privileged_delete_ends_a_running_container() {
    need_root!("privileged_delete_ends_a_running_container");
    for (kind, executor) in executors() {
        let bench = Bench::new();
        let running = bench
            .start(executor.as_ref(), sh("sleep 600"))
            .await
            .unwrap();
        let pid = running.task().pid();
        running.delete().await;
        assert!(
            !std::path::Path::new(&format!("/proc/{pid}")).exists(),
            "{kind}"
        );
        bench.assert_clean(kind);
    }
}

#[tokio::test]
async fn privileged_ids_are_unique_and_the_first_keeps_running() {
    need_root!("privileged_ids_are_unique_and_the_first_keeps_running");
    for (kind, executor) in executors() {
        let bench = Bench::new();
        let mut options = sh("cat");
        options.id = bench.next_id();
        let running = bench
            .start(executor.as_ref(), options.clone())
            .await
            .unwrap();
        let error = bench.start(executor.as_ref(), options).await.err().unwrap();
        assert!(
            error.to_string().contains("exists already"),
            "{kind}: {error}"
        );
        let mut running: Running = running;
        running.type_keys(b"alive\n").await;
        running.wait_for_output("alive").await;
        running.close_input();
        assert_eq!(running.finish().await.code, 0, "{kind}");
        bench.assert_clean(kind);
    }
}

#[tokio::test]
async fn privileged_dropping_launch_or_task_undoes_the_container() {
    need_root!("privileged_dropping_launch_or_task_undoes_the_container");
    for (kind, executor) in executors() {
        let bench = Bench::new();
        for wait_ms in [0, 1, 3, 6, 12, 25] {
            let launch = bench.start(executor.as_ref(), sh("sleep 600"));
            let started = tokio::time::timeout(Duration::from_millis(wait_ms), launch).await;
            drop(started);
            wait_gone(|| bench.leftovers().is_empty()).await;
        }
        bench.assert_clean(kind);
    }
}

#[tokio::test]
async fn privileged_a_killed_host_takes_its_container_along() {
    need_root!("privileged_a_killed_host_takes_its_container_along");
    for (kind, executor) in executors() {
        let bench = Bench::new();
        let running = bench
            .start(executor.as_ref(), sh("sleep 600"))
            .await
            .unwrap();
        let pid = running.task().pid();
        executor_support::kill(executor_support::parent_of(pid));
        let error = bounded(running.task().wait()).await.unwrap_err();
        assert!(matches!(error, Error::HostLost { .. }), "{kind}: {error}");
        running.delete().await;
        assert!(!executor_support::alive(pid), "{kind}");
        bench.assert_clean(kind);
    }
}

/// Not a test by itself: the process that the next test kills.
#[tokio::test]
#[ignore = "started by privileged_killing_the_engine_ends_its_containers"]
async fn engine_to_be_killed() {
    let name = std::env::var("LAZ_TEST_EXECUTOR").unwrap();
    let dir = std::path::PathBuf::from(std::env::var_os("LAZ_TEST_DIR").unwrap());
    let (_, executor) = executors()
        .into_iter()
        .find(|(kind, _)| *kind == name)
        .unwrap();
    let bench = Bench::at(dir);
    let mut options = sh("sleep 600");
    options.id = std::env::var("LAZ_TEST_ID").unwrap();
    let running = bench.start(executor.as_ref(), options).await.unwrap();
    std::fs::write(bench.path("pid.new"), running.task().pid().to_string()).unwrap();
    std::fs::rename(bench.path("pid.new"), bench.path("pid")).unwrap();
    std::future::pending::<()>().await;
}

/// Starts [`engine_to_be_killed`], and waits for its container, whose process it returns.
async fn start_engine(kind: &str, bench: &Bench) -> (std::process::Child, u32) {
    let mut engine = std::process::Command::new(std::env::current_exe().expect("a program runs"));
    let engine = engine
        .args(["--exact", "engine_to_be_killed", "--ignored"])
        .env("LAZ_TEST_EXECUTOR", kind)
        .env("LAZ_TEST_DIR", bench.dir())
        .env("LAZ_TEST_ID", bench.next_id())
        .stdout(std::process::Stdio::null())
        .spawn();
    let engine = engine.expect("this very program can be started");
    let pid_file = bench.path("pid");
    wait_gone(|| pid_file.exists()).await;
    let pid = std::fs::read_to_string(&pid_file).expect("it is there");
    (engine, pid.parse().expect("it is a number"))
}

#[tokio::test]
async fn privileged_killing_the_engine_ends_its_containers() {
    need_root!("privileged_killing_the_engine_ends_its_containers");
    for (kind, _) in executors() {
        let bench = Bench::new();
        let (mut engine, pid) = start_engine(kind, &bench).await;
        assert!(executor_support::alive(pid), "{kind}");
        assert!(
            !bench.leftovers().is_empty(),
            "{kind}: the check for leftovers sees nothing"
        );
        engine.kill().unwrap();
        engine.wait().unwrap();
        wait_gone(|| !executor_support::alive(pid) && bench.leftovers().is_empty()).await;
        bench.assert_clean(kind);
    }
}

/// The engine and the host of a container, killed in one moment, leave it to whoever comes next.
#[tokio::test]
async fn privileged_what_lost_engine_and_host_is_swept() {
    need_root!("privileged_what_lost_engine_and_host_is_swept");
    for (kind, _) in executors() {
        let bench = Bench::new();
        let (mut engine, pid) = start_engine(kind, &bench).await;
        let host = executor_support::parent_of(pid);
        executor_support::stop(host);
        engine.kill().unwrap();
        engine.wait().unwrap();
        executor_support::kill(host);
        wait_gone(|| !executor_support::alive(host)).await;
        if kind == "embedded" {
            wait_gone(|| !executor_support::alive(pid)).await;
        }
        assert!(!bench.leftovers().is_empty(), "{kind}: nothing to be swept");
        let sweeper = executor_support::embedded();
        bounded(sweeper.sweep(&bench.path("state"))).await.unwrap();
        assert!(!executor_support::alive(pid), "{kind}");
        bench.assert_clean(kind);
        // Again, with nothing there.
        bounded(sweeper.sweep(&bench.path("state"))).await.unwrap();
    }
}

#[test]
fn a_missing_runtime_is_named() {
    for name in ["no-such-runtime", "/no/such/runtime"] {
        let error = lazarette_runtime::executor::External::new(name).unwrap_err();
        assert_eq!(error.exit_code(), 125);
        assert!(error.to_string().contains(name), "{error}");
    }
}
