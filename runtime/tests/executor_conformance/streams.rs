//! A container's streams belong to its user, who opens them by name as programs do that
//! log to `/dev/stdout`.

use lazarette_runtime::executor::Size;
use lazarette_runtime::spec::ContainerOptions;

use crate::executor_support::{Bench, executors, is_root, sh};

/// A container of a user that is not root.
fn as_www(script: &str) -> ContainerOptions {
    ContainerOptions {
        user: Some("www".into()),
        ..sh(script)
    }
}

#[tokio::test]
async fn privileged_a_user_opens_its_standard_streams() {
    need_root!("privileged_a_user_opens_its_standard_streams");
    for (kind, executor) in executors() {
        let bench = Bench::new();
        let script = "echo out >/dev/stdout; echo err >/dev/stderr; cat /dev/stdin";
        let mut running = bench
            .start(executor.as_ref(), as_www(script))
            .await
            .unwrap();
        running.type_keys(b"typed\n").await;
        running.close_input();
        let ended = running.finish().await;
        assert_eq!(
            (ended.out.as_str(), ended.err.as_str()),
            ("out\ntyped\n", "err\n"),
            "{kind}"
        );
        assert_eq!(ended.code, 0, "{kind}");
        bench.assert_clean(kind);
    }
}

#[tokio::test]
async fn privileged_a_user_opens_its_terminal() {
    need_root!("privileged_a_user_opens_its_terminal");
    for (kind, executor) in executors() {
        let bench = Bench::new();
        let script = "mine=$(tty); stat -c %u:%g $mine; echo opened $mine >$mine; \
            read line <$mine; echo got $line";
        let size = Size {
            width: 80,
            height: 24,
        };
        let mut running = bench
            .start_terminal(executor.as_ref(), as_www(script), size)
            .await
            .unwrap();
        running.type_keys(b"typed\n").await;
        let ended = running.finish().await;
        for line in ["33:5", "opened /dev/pts/0", "got typed"] {
            assert!(ended.out.contains(line), "{kind}: {:?}", ended.out);
        }
        assert_eq!(ended.code, 0, "{kind}");
        bench.assert_clean(kind);
    }
}
