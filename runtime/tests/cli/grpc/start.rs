//! What comes for the first start of an image, of which containerd says nothing.

use serde_json::json;

use super::*;

const NO_FILL: &str = "[snapshotter]\nfill = false\n";
const LIBRARY_BYTES: usize = 4 << 20;
/// What linking reads of the library.
const TABLES: u64 = 512 << 10;

/// A program of `len` bytes that hardly shrink, whose code begins at `tables` and which needs
/// the library `needs`.
fn program(len: usize, tables: u64, needs: &str) -> Vec<u8> {
    let mut file = incompressible(len);
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    let end = len as u64;
    let dynamic_at: u64 = 0x1000;
    let strings_at: u64 = 0x2000;
    put(0, b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    put(16, &[3, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &0_u64.to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(40, &[0; 24]);
    put(52, &[64, 0, 56, 0, 3, 0]);
    // Type, flags, where it is and how long.
    let segments: [(u32, u32, u64, u64); 3] = [
        (1, 4, 0, tables),
        (1, 5, tables, end - tables),
        (2, 4, dynamic_at, 48),
    ];
    for (number, (kind, flags, at, len)) in segments.into_iter().enumerate() {
        let place = 64 + 56 * number;
        put(place, &kind.to_le_bytes());
        put(place + 4, &flags.to_le_bytes());
        for (field, value) in [at, at, at, len, len, 4096].into_iter().enumerate() {
            put(place + 8 + 8 * field, &value.to_le_bytes());
        }
    }
    // DT_STRTAB, DT_NEEDED, DT_NULL.
    let dynamic = [(5, strings_at), (1, 1), (0, 0)];
    for (number, (tag, value)) in (0..).step_by(16).zip(dynamic) {
        let at = usize::try_from(dynamic_at).unwrap() + number;
        put(at, &u64::to_le_bytes(tag));
        put(at + 8, &u64::to_le_bytes(value));
    }
    let strings = [b"\0", needs.as_bytes(), b"\0"].concat();
    put(usize::try_from(strings_at).unwrap(), &strings);
    file
}

fn layer_of(path: &str, bytes: &[u8]) -> Layer {
    estargz(tar(&[File {
        path,
        mode: 0o755,
        bytes,
    }]))
}

/// Bytes that the registry has sent come to the store: at least this many, some time.
async fn comes(node: &Node, name: &str, bytes: u64) {
    let has_come = async {
        while usage(node, name).await < bytes {
            tokio::task::yield_now().await;
        }
    };
    let bound = std::time::Duration::from_secs(60);
    tokio::time::timeout(bound, has_come).await.unwrap();
}

async fn usage(node: &Node, name: &str) -> u64 {
    let request = UsageRequest {
        key: name.to_owned(),
        ..Default::default()
    };
    let usage = node.client.usage(request).await.unwrap();
    usage.size.try_into().unwrap()
}

/// The program is in one layer and its library in another, which another image may have
/// brought before.
#[tokio::test(flavor = "multi_thread")]
async fn privileged_the_libraries_of_the_images_command_come_before_it_is_run() {
    if !is_root("privileged_the_libraries_of_the_images_command_come_before_it_is_run") {
        return;
    }
    for is_shared in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let registry = FakeRegistry::start().await;
        let library = program(LIBRARY_BYTES, TABLES, "libnone.so");
        let base = layer_of("usr/lib/liba.so", &library);
        let top = layer_of("opt/bin/app", &program(64 << 10, 0x3000, "liba.so"));
        let other = layer_of("etc/other", b"nothing that is run");
        let command = json!({"Entrypoint": ["app"], "Env": ["PATH=/bin:/opt/bin"]});
        let other_image = push_two_with(&registry, [&base, &other], "other", &json!({}));
        let image = push_two_with(&registry, [&base, &top], "app", &command);
        let all = [Digest::sha256(&base.blob), Digest::sha256(&top.blob)];
        let of = |image, chain_id, blob, all| Wanted {
            image,
            chain_id,
            blob,
            all,
        };
        let (node, _) = Node::open_with(dir.path(), NO_FILL).await;
        let first = match is_shared {
            true => {
                let wanted = of(&other_image, base.diff_id, all[0], &all[..1]);
                node.bring("", &wanted).await
            }
            false => {
                node.bring("", &of(&image, base.diff_id, all[0], &all))
                    .await
            }
        };
        if is_shared {
            assert!(
                usage(&node, &first).await < TABLES,
                "nobody said what is run"
            );
        }
        let wanted = of(&image, chain(&base, &top), all[1], &all[1..]);
        let second = node.bring(&first, &wanted).await;
        comes(&node, &first, TABLES).await;
        let code = (LIBRARY_BYTES as u64) / 2;
        assert!(usage(&node, &first).await < code, "its code is not linked");
        node.remove(&second).await;
        node.remove(&first).await;
        node.close().await;
    }
}
