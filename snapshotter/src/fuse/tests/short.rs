//! Mounting with too few descriptors: in a process of its own, as all its threads share them.

use std::process::Command;

use super::*;

#[test]
fn privileged_what_cannot_be_served_is_not_mounted() {
    if !must_be_root("privileged_what_cannot_be_served_is_not_mounted") {
        return;
    }
    let name = "fuse::tests::short::mounts_with_few_descriptors";
    let output = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("1 passed"), "{output:?}");
}

/// At each number of descriptors a layer is there, or an error says that it is not.
#[test]
#[ignore = "another test runs it, as a process of its own"]
fn mounts_with_few_descriptors() {
    const PLENTY: u64 = 512;
    for backend in [Backend::Fuse, Backend::Erofs, Backend::Auto] {
        let mut fixture = Fixture::new(backend);
        let options = FuseOptions {
            backend,
            threads: 4,
        };
        let handle = fixture.runtime.handle().clone();
        fixture.mounts = LayerMounts::new(fixture.dir.path(), handle, options);
        let mut layer = LayerBuilder::new("short");
        layer.file("file", b"text");
        let (mut refused, mut mounted) = (0, 0);
        for most in 4.. {
            sys::limit_files(most).unwrap();
            let outcome = fixture
                .mounts
                .mount(layer.digest(), layer.tree(), layer.data());
            match &outcome {
                Ok(mount) => {
                    let file = fs::symlink_metadata(mount.path().join("file"));
                    assert_eq!(file.unwrap().len(), 4);
                    mounted += 1;
                }
                Err(error) => {
                    assert!(!error.to_string().contains("modprobe"), "{error}");
                    refused += 1;
                }
            }
            sys::limit_files(PLENTY).unwrap();
            drop(outcome);
            if mounted == 3 {
                break;
            }
        }
        assert!(refused > 4, "{backend:?}: {refused}");
        fixture.assert_clean();
    }
}
