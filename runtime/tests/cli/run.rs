//! `laz run` from a registry on loopback to exit code, with a user land of one file.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Stdio};

use lazarette_fetcher::test_util::{Endpoint, FakeRegistry, Fault};
use serde_json::json;

use crate::support::{
    Changes, File, IMPATIENT, Laz, Pushed, busybox, estargz, gzipped, incompressible, install,
    is_root, plain, push, said, tar, with_own_mounts,
};
use crate::sys::{kill_by_id, stop};

pub(crate) fn user_land() -> Vec<u8> {
    let big = incompressible(4 << 20);
    tar(&[
        File {
            path: "bin/busybox",
            mode: 0o755,
            bytes: &busybox(),
        },
        File {
            path: "bin/not-a-program",
            mode: 0o644,
            bytes: b"text",
        },
        File {
            path: "etc/passwd",
            mode: 0o644,
            bytes: b"root:x:0:0::/:/bin/sh\nu:x:7:8::/:\n",
        },
        File {
            path: "unread",
            mode: 0o644,
            bytes: &big,
        },
    ])
}

/// Mounts, cgroups and files that `laz` may have made.
pub(crate) fn traces(laz: &Laz) -> BTreeSet<String> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let state = laz.path("state").display().to_string();
    let mut found: BTreeSet<String> = mounts
        .lines()
        .filter(|line| line.contains(&state))
        .map(str::to_owned)
        .collect();
    let runs = std::fs::read_dir(laz.path("state/runs"))
        .into_iter()
        .flatten();
    found.extend(
        runs.filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name != "lock"),
    );
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_container_runs_and_leaves_nothing() {
    if !is_root("privileged_a_container_runs_and_leaves_nothing") {
        return;
    }
    for layer in [estargz(user_land()), plain(user_land())] {
        let registry = FakeRegistry::start().await;
        let image = push(&registry, &layer, &Changes::default());
        let laz = Laz::new();
        let trace = laz.path("trace.json").display().to_string();
        let hello = laz
            .run(&["run", "--trace-file", &trace, &image.reference])
            .await;
        assert_eq!(
            (hello.code, hello.out.as_str()),
            (0, "hello\n"),
            "{hello:?}"
        );
        let record: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&trace).unwrap()).unwrap();
        let names: BTreeSet<&str> = record["spans"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| s["name"].as_str().unwrap())
            .collect();
        let steps = [
            "resolve", "config", "index", "mount", "snapshot", "bundle", "create", "start",
        ];
        assert!(steps.iter().all(|step| names.contains(step)), "{names:?}");
        assert!(record["first_byte_ms"].as_f64().unwrap() <= record["exit_ms"].as_f64().unwrap());

        // Again without the registry: what was read is here.
        registry.always(Endpoint::Manifest, Fault::Status(503, None));
        registry.always(Endpoint::Blob, Fault::Status(503, None));
        laz.give(IMPATIENT);
        let again = laz.run(&["run", &image.reference]).await;
        assert_eq!(
            (again.code, again.out.as_str()),
            (0, "hello\n"),
            "{again:?}"
        );
        assert_eq!(traces(&laz), BTreeSet::new());

        let removed = laz.run(&["rmi", &image.reference]).await;
        assert_eq!(removed.code, 0, "{removed:?}");
        assert_eq!(
            laz.run(&["--output", "json", "store", "df"])
                .await
                .out
                .trim(),
            "[]"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_one_content_in_two_compressions_is_two_layers() {
    if !is_root("privileged_one_content_in_two_compressions_is_two_layers") {
        return;
    }
    let laz = Laz::new();
    for layer in [plain(user_land()), gzipped(user_land())] {
        let registry = FakeRegistry::start().await;
        let image = push(&registry, &layer, &Changes::default());
        let said = laz.run(&["run", &image.reference]).await;
        assert_eq!((said.code, said.out.as_str()), (0, "hello\n"), "{said:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_an_image_may_hold_a_layer_twice() {
    if !is_root("privileged_an_image_may_hold_a_layer_twice") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let layer = estargz(user_land());
    let config = json!({
        "os": "linux", "architecture": "amd64", "config": {"Cmd": ["/bin/busybox", "echo", "twice"]},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id.to_string(), layer.diff_id.to_string()]},
    });
    let config = serde_json::to_vec(&config).unwrap();
    let digest = registry.add_blob(config.clone()).to_string();
    let twice = |manifest: &mut serde_json::Value| {
        let layers = manifest["layers"].as_array_mut().unwrap();
        layers.push(layers[0].clone());
        manifest["config"]["digest"] = json!(digest);
        manifest["config"]["size"] = json!(config.len());
    };
    let changes = Changes {
        edit: &twice,
        ..Changes::default()
    };
    let image = push(&registry, &layer, &changes);
    let said = Laz::new().run(&["run", &image.reference]).await;
    assert_eq!((said.code, said.out.as_str()), (0, "twice\n"), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_only_what_is_read_is_fetched() {
    if !is_root("privileged_only_what_is_read_is_fetched") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &estargz(user_land()), &Changes::default());
    let laz = Laz::new();
    assert_eq!(laz.run(&["run", &image.reference]).await.code, 0);
    let df = laz.run(&["--output", "json", "store", "df"]).await;
    let df: serde_json::Value = serde_json::from_str(&df.out).unwrap();
    let (present, all) = (
        df[0]["present_bytes"].as_u64().unwrap(),
        df[0]["data_bytes"].as_u64().unwrap(),
    );
    assert!(
        present > 0 && present + (3 << 20) < all,
        "{present} of {all}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_exit_codes_are_dockers() {
    if !is_root("privileged_exit_codes_are_dockers") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &estargz(user_land()), &Changes::default());
    let laz = Laz::new();
    let reference = image.reference.as_str();
    let sh = |script| ["/bin/busybox", "sh", "-c", script];
    let table: [(&[&str], i32, &str); 5] = [
        (&sh("exit 7"), 7, ""),
        (&sh("kill -9 $$; exit 137"), 137, ""),
        (&["nonesuch"], 127, "nonesuch"),
        (&["/bin/not-a-program"], 126, "/bin/not-a-program"),
        (&["/bin"], 126, "/bin"),
    ];
    for (command, code, word) in table {
        for runtime in [None, Some("runc")] {
            let mut args = vec!["run"];
            args.extend(runtime.iter().flat_map(|runtime| ["--runtime", runtime]));
            args.push(reference);
            args.extend(command);
            let said = laz.run(&args).await;
            assert!(
                said.code == code && said.err.contains(word),
                "{command:?} {runtime:?}: {said:?}"
            );
        }
    }
    let missing = laz
        .run(&["run", "--runtime", "no-such-runtime", reference])
        .await;
    assert!(
        missing.code == 125 && missing.err.contains("no-such-runtime"),
        "{missing:?}"
    );
    let user = laz.run(&["run", "-u", "nobody-here", reference]).await;
    assert!(
        user.code == 125 && user.err.contains("nobody-here"),
        "{user:?}"
    );
    assert_eq!(traces(&laz), BTreeSet::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_fails_afterwards_leaves_the_exit_code() {
    if !is_root("privileged_what_fails_afterwards_leaves_the_exit_code") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &estargz(user_land()), &Changes::default());
    let laz = Laz::new();
    let command = [&image.reference, "/bin/busybox", "sh", "-c", "exit 7"];
    let file = laz.path("none/trace.json").display().to_string();
    let said = laz
        .run(&[&["run", "--trace-file", &file], &command[..]].concat())
        .await;
    assert!(said.code == 7 && said.err.contains(&file), "{said:?}");

    // One that deletes the container, and says that it could not.
    let script = "#!/bin/sh\nrunc \"$@\" || exit\ncase \" $* \" in *' delete '*) exit 9;; esac\n";
    std::fs::write(laz.path("script"), script).unwrap();
    let runtime = laz.path("runtime");
    install(&laz.path("script"), &runtime);
    let runtime = runtime.display().to_string();
    let said = laz
        .run(&[&["run", "--runtime", &runtime], &command[..]].concat())
        .await;
    assert!(said.code == 7, "{said:?}");
    assert!(
        said.err.contains("WARN") && said.err.contains(&runtime),
        "{said:?}"
    );
    assert_eq!(traces(&laz), BTreeSet::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_options_reach_the_container() {
    if !is_root("privileged_options_reach_the_container") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &estargz(user_land()), &Changes::default());
    let laz = Laz::new();
    let shared = laz.path("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("file"), "from the host").unwrap();
    let volume = format!("{}:/mnt/shared:ro", shared.display());
    let script = "busybox id -u; busybox id -g; echo $K; busybox pwd; busybox hostname; \
                  busybox cat /mnt/shared/file; echo; echo > /mnt/shared/x || echo read-only; \
                  echo > /x || echo read-only";
    let args = [
        "run",
        "-e",
        "K=v",
        "-w",
        "/etc",
        "-u",
        "u",
        "-v",
        &volume,
        "--net",
        "none",
        "--hostname",
        "box",
        "--read-only",
        &image.reference,
        "/bin/busybox",
        "sh",
        "-c",
        script,
    ];
    let said = laz.run(&args).await;
    assert_eq!(
        said.out, "7\n8\nv\n/etc\nbox\nfrom the host\nread-only\nread-only\n",
        "{said:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_read_only_volume_is_that_also_below_other_mounts() {
    if !is_root("privileged_a_read_only_volume_is_that_also_below_other_mounts") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &estargz(user_land()), &Changes::default());
    let laz = Laz::new();
    let shared = laz.path("shared").display().to_string();
    std::fs::create_dir_all(format!("{shared}/inner")).unwrap();
    let mounted = format!("mount -t tmpfs inner {shared}/inner && exec \"$0\" \"$@\"");
    let wrapper = with_own_mounts(&mounted);
    let wrapper = wrapper.each_ref().map(String::as_str);
    let (open, read_only) = (format!("{shared}:/open"), format!("{shared}:/shut:ro"));
    let script = "busybox touch /open/inner/file; \
                  busybox touch /shut/inner/file 2>&1 | busybox grep -c Read-only";
    for runtime in [&[][..], &["--runtime", "runc"]] {
        let volumes = ["run", "-v", &open, "-v", &read_only];
        let command = [&image.reference, "/bin/busybox", "sh", "-c", script];
        let args = [&volumes[..], runtime, &command].concat();
        let said = said(laz.command(&wrapper, &args)).await;
        assert_eq!((said.code, said.out.as_str()), (0, "1\n"), "{said:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_callers_umask_stays_outside() {
    if !is_root("privileged_a_callers_umask_stays_outside") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &estargz(user_land()), &Changes::default());
    let laz = Laz::new();
    let script = "umask; for f in resolv.conf hosts hostname; do busybox cat /etc/$f >/dev/null || \
         echo no $f; done; busybox stat -c %a /made /made/here /dev /dev/shm; busybox ls /dev/pts >/dev/null; echo end";
    let args = [
        "run",
        "-u",
        "u",
        "-w",
        "/made/here",
        &image.reference,
        "/bin/busybox",
        "sh",
        "-c",
        script,
    ];
    let secretive = ["sh", "-c", "umask 077; exec \"$0\" \"$@\""];
    let said = said(laz.command(&secretive, &args)).await;
    assert_eq!(said.out, "0022\n755\n755\n755\n1777\nend\n", "{said:?}");
    assert_eq!(
        (said.code, said.err.contains("denied")),
        (0, false),
        "{said:?}"
    );
}

/// Starts a container that waits for long, and waits until it does.
async fn start_waiting(laz: &Laz, options: &[&str], image: &Pushed) -> Child {
    let script = "echo up; exec busybox sleep 1000";
    let wait = [&image.reference, "/bin/busybox", "sh", "-c", script];
    let mut command = laz.command(&[], &[&["run"], options, &wait].concat());
    let started = tokio::task::spawn_blocking(move || {
        use std::io::BufRead as _;
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        std::io::BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, "up\n");
        child
    });
    started.await.unwrap()
}

/// The value of a line of a process's status; empty once it has ended.
fn status(pid: u32, name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    value.unwrap_or_default().trim().to_owned()
}

/// The process that `parent` made of this name.
fn child_of(parent: u32, name: &str) -> u32 {
    let all = std::fs::read_dir("/proc").unwrap();
    let mut pids = all.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let is_it =
        |&pid: &u32| status(pid, "PPid:") == parent.to_string() && status(pid, "Name:") == name;
    pids.find(is_it).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_a_killed_run_left_is_swept_by_the_next() {
    if !is_root("privileged_what_a_killed_run_left_is_swept_by_the_next") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &estargz(user_land()), &Changes::default());
    let laz = Laz::new();
    let mut child = start_waiting(&laz, &[], &image).await;
    assert!(!traces(&laz).is_empty(), "a running container has mounts");

    // A second one beside it: roots are shared, and the living are left alone.
    let beside = laz.run(&["run", &image.reference]).await;
    assert_eq!(
        (beside.code, beside.out.as_str()),
        (0, "hello\n"),
        "{beside:?}"
    );
    assert!(!traces(&laz).is_empty());
    let in_use = laz.run(&["rmi", &image.reference]).await;
    assert!(
        in_use.code == 125 && in_use.err.contains("in use"),
        "{in_use:?}"
    );

    child.kill().unwrap();
    child.wait().unwrap();
    let next = laz.run(&["run", &image.reference]).await;
    assert_eq!((next.code, next.out.as_str()), (0, "hello\n"), "{next:?}");
    assert_eq!(traces(&laz), BTreeSet::new());
    let removed = said(laz.command(&[], &["rmi", &image.reference])).await;
    assert_eq!(removed.code, 0, "{removed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_run_killed_with_its_executor_host_is_ended_by_the_next() {
    if !is_root("privileged_a_run_killed_with_its_executor_host_is_ended_by_the_next") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &estargz(user_land()), &Changes::default());
    let laz = Laz::new();
    for options in [&[][..], &["--runtime", "runc"]] {
        let mut child = start_waiting(&laz, options, &image).await;
        let host = child_of(child.id(), "laz-executor");
        let container = child_of(host, "busybox");
        let cgroups = std::fs::read_to_string(format!("/proc/{container}/cgroup")).unwrap();
        let (_, cgroup) = cgroups.trim().rsplit_once("/lazarette-").unwrap();
        stop(host.cast_signed());
        child.kill().unwrap();
        child.wait().unwrap();
        kill_by_id(host.cast_signed());

        let next = laz.run(&["run", &image.reference]).await;
        assert_eq!((next.code, next.out.as_str()), (0, "hello\n"), "{next:?}");
        assert!(!next.err.contains("cannot"), "{options:?}: {next:?}");
        // It is gone, or nobody's who asks how it ended.
        let state = status(container, "State:");
        assert!(
            state.is_empty() || state.starts_with('Z'),
            "{options:?}: {state}"
        );
        let left = format!("/sys/fs/cgroup/memory/lazarette-{cgroup}");
        let left = [left, format!("/sys/fs/cgroup/lazarette-{cgroup}")];
        let left = left.iter().filter(|path| Path::new(path).exists());
        assert_eq!(left.count(), 0, "{options:?}");
        assert_eq!(traces(&laz), BTreeSet::new(), "{options:?}");
    }
}
