//! What a root file system or a volume lacks is made before the container needs it.

use std::os::unix::fs::symlink;

use crate::executor_support::{Bench, executors, is_root, sh};

#[tokio::test]
async fn privileged_links_to_nothing_are_mounted_over() {
    need_root!("privileged_links_to_nothing_are_mounted_over");
    for (kind, executor) in executors() {
        let bench = Bench::new();
        for (name, target) in [
            ("resolv.conf", "../run/systemd/resolve/stub-resolv.conf"),
            ("hosts", "/no/such/hosts"),
            ("hostname", "hostname"),
        ] {
            symlink(target, bench.path("rootfs/etc").join(name)).unwrap();
        }
        let script = "cat /etc/hostname; grep -c box /etc/hosts; \
            test -f /etc/resolv.conf && test ! -L /etc/resolv.conf && echo file";
        let mut options = sh(script);
        options.hostname = Some("box".into());
        let ended = bench.run(executor.as_ref(), options).await.unwrap();
        assert_eq!(ended.out, "box\n1\nfile\n", "{kind}: {}", ended.err);
        assert_eq!(ended.code, 0, "{kind}");
        bench.assert_clean(kind);
    }
}

#[tokio::test]
async fn privileged_a_working_directory_is_made_in_its_volume() {
    need_root!("privileged_a_working_directory_is_made_in_its_volume");
    for (kind, executor) in executors() {
        let bench = Bench::new();
        let shared = bench.path("shared");
        std::fs::create_dir(&shared).unwrap();
        let mut options = sh("pwd; echo here >file");
        options.volumes = vec![format!("{}:/data", shared.display()).parse().unwrap()];
        options.cwd = Some("/data/new/dir".into());
        let ended = bench.run(executor.as_ref(), options).await.unwrap();
        assert_eq!(ended.out, "/data/new/dir\n", "{kind}: {}", ended.err);
        let file = shared.join("new/dir/file");
        assert_eq!(std::fs::read_to_string(file).unwrap(), "here\n", "{kind}");
        bench.assert_clean(kind);
    }
}

#[tokio::test]
async fn privileged_a_mount_that_fails_is_named() {
    need_root!("privileged_a_mount_that_fails_is_named");
    for (kind, executor) in executors() {
        let bench = Bench::new();
        let shared = bench.path("shared");
        std::fs::create_dir(&shared).unwrap();
        let mut options = sh("true");
        options.volumes = vec![
            format!("{}:/etc/passwd/x", shared.display())
                .parse()
                .unwrap(),
        ];
        let error = bench.run(executor.as_ref(), options).await.unwrap_err();
        assert_eq!(error.exit_code(), 125, "{kind}: {error}");
        assert!(
            error.to_string().contains("/etc/passwd/x"),
            "{kind}: {error}"
        );
        bench.assert_clean(kind);
    }
}
