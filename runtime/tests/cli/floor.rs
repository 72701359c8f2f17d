//! What must stay free of a small disk stays free, at the cost of what no start reads.

use lazarette_fetcher::test_util::{Endpoint, FakeRegistry, Fault};
use serde_json::Value;

use crate::store::{ok, present};
use crate::support::{
    Changes, File, IMPATIENT, Laz, Pushed, Root, busybox, estargz, incompressible, is_root, push,
    tar,
};

/// Size of the disk and of its floor, MiB. The database takes some of the rest.
const DISK_MIB: u64 = 96;
const FLOOR_MIB: u64 = 32;
/// What only its image's own start reads, MiB.
const COLD_MIB: u64 = 12;
/// Images that come after the first one. Without a floor they would fill the disk.
const OTHERS: u8 = 7;
/// What the database may write behind the last eviction, bytes.
const TOLERANCE: u64 = 1 << 20;

fn image(registry: &FakeRegistry, tag: &str, seed: u8) -> Pushed {
    let mut cold = incompressible(usize::try_from(COLD_MIB << 20).unwrap());
    cold.iter_mut().for_each(|byte| *byte ^= seed);
    let layer = estargz(tar(&[
        File {
            path: "bin/busybox",
            mode: 0o755,
            bytes: &busybox(),
        },
        File {
            path: "data/cold",
            mode: 0o644,
            bytes: &cold,
        },
    ]));
    let changes = Changes {
        tag,
        ..Changes::default()
    };
    push(registry, &layer, &changes)
}

async fn summary(laz: &Laz) -> (u64, u64) {
    let df = ok(laz, &["store", "df", "--summary"]).await;
    let number = |key: &str| df[key].as_u64().unwrap();
    (number("free_bytes"), number("free_floor_bytes"))
}

/// Decoded bytes that are here of the only image with this tag.
async fn present_of(laz: &Laz, image: &Pushed) -> u64 {
    let images = ok(laz, &["images"]).await;
    let mut images = images.as_array().unwrap().iter();
    let is_it = |one: &&Value| one["reference"] == image.reference;
    images.find(is_it).unwrap()["present_bytes"]
        .as_u64()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_the_free_floor_takes_cold_chunks_and_leaves_what_starts_read() {
    let test = "privileged_the_free_floor_takes_cold_chunks_and_leaves_what_starts_read";
    if !is_root(test) {
        return;
    }
    let registry = FakeRegistry::start().await;
    let laz = Laz::new();
    let small = Root::mount(&laz.path(""), "tmpfs", &format!("size={DISK_MIB}m"));
    let mut config = std::fs::read_to_string(laz.path("config.toml")).unwrap();
    config.push_str(&format!("[store]\nfree_floor = \"{FLOOR_MIB}m\"\n"));
    std::fs::write(laz.path("config.toml"), config).unwrap();

    let first = image(&registry, "first", 0);
    let said = laz.run(&["run", "--rm", &first.reference]).await;
    assert_eq!((said.code, said.out.as_str()), (0, "hello\n"), "{said:?}");
    ok(&laz, &["pull", "--full", &first.reference]).await;
    let program = busybox().len() as u64;
    assert_eq!(present_of(&laz, &first).await, program + (COLD_MIB << 20));

    // The oldest image, and the one that nobody has read since.
    for n in 1..=OTHERS {
        let other = image(&registry, &format!("other-{n}"), n);
        ok(&laz, &["pull", "--full", &other.reference]).await;
        let (free, floor) = summary(&laz).await;
        assert_eq!(floor, FLOOR_MIB << 20);
        assert!(free + TOLERANCE >= floor, "{free} after {n}");
    }
    let (there, all) = present(&laz).await;
    assert!(there < all && there > 0, "{there} of {all}");
    let left = present_of(&laz, &first).await;
    assert!(left >= program, "{left} is left of what its start reads");
    assert!(left < program + (4 << 20), "{left} is left, though cold");
    // It starts of what is here, as nothing else can be had.
    registry.always(Endpoint::Blob, Fault::Status(503, None));
    laz.give(IMPATIENT);
    let said = laz.run(&["run", "--rm", &first.reference]).await;
    assert_eq!((said.code, said.out.as_str()), (0, "hello\n"), "{said:?}");
    drop(small);
}
