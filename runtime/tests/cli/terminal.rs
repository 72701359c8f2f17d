//! `laz run -it`: the user's terminal, and the container's.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lazarette_fetcher::test_util::FakeRegistry;

use crate::run::{traces, user_land};
use crate::support::{Changes, Laz, estargz, is_root, push};
use crate::sys;

/// Waits until `is_so`, or ends `child` and fails.
fn wait_until(child: &mut Child, what: &str, mut is_so: impl FnMut(&mut Child) -> bool) {
    let began = Instant::now();
    while !is_so(child) {
        if began.elapsed() > Duration::from_secs(120) {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("still not so: {what}");
        }
        std::thread::yield_now();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_terminal_whose_output_nobody_reads_is_given_back() {
    if !is_root("privileged_a_terminal_whose_output_nobody_reads_is_given_back") {
        return;
    }
    let registry = FakeRegistry::start().await;
    let image = push(&registry, &estargz(user_land()), &Changes::default());
    let laz = Laz::new();
    let shared = laz.path("shared");
    std::fs::create_dir(&shared).unwrap();
    let end = shared.join("end");
    assert!(Command::new("mkfifo").arg(&end).status().unwrap().success());
    let volume = format!("{}:/mnt/shared", shared.display());
    // It learns of the end by its write, as it does not let itself be told, and goes on.
    let script = "trap '' HUP; while echo y; do :; done; read -r code </mnt/shared/end; exit $code";
    let words = ["run", "-it", "-v", &volume, &image.reference];
    let sh = ["/bin/busybox", "sh", "-c", script];
    let mut command = laz.command(&[], &[&words[..], &sh].concat());
    let (_master, slave) = sys::terminal();
    command
        .stdin(slave.try_clone().unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let code = tokio::task::spawn_blocking(move || {
        let mut child = command.spawn().unwrap();
        let mut output = child.stdout.take().unwrap();
        output.read_exact(&mut [0]).unwrap();
        assert!(sys::is_raw(&slave));
        drop(output);
        wait_until(&mut child, "the user has the terminal", |_| {
            !sys::is_raw(&slave)
        });
        assert_eq!(child.try_wait().unwrap(), None, "the container goes on");
        // Opened for both it waits for nobody.
        let end = std::fs::File::options().read(true).write(true).open(end);
        end.as_ref().unwrap().write_all(b"7\n").unwrap();
        wait_until(&mut child, "the container's write failed", |child| {
            child.try_wait().unwrap().is_some()
        });
        child.wait().unwrap().code()
    });
    assert_eq!(code.await.unwrap(), Some(7));
    assert_eq!(traces(&laz), BTreeSet::new());
}
