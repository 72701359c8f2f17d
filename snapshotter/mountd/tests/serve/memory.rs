//! What a server takes.

use std::fs;

use lazarette_mountd::ranges::Span;
use lazarette_mountd::wire::Message;

use crate::bed::{Bed, must_be_root, open, read_right};
use crate::daemon::{connect, mount};
use crate::store::{Layer, PAGE};
use crate::sys;

const LAYERS: u64 = 100;
const PAGES: u64 = 256;
/// The promise.
const RSS_KIB_MAX: u64 = 15 << 10;

fn rss_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap()
}

#[test]
fn privileged_a_hundred_layers_take_at_most_15_mib() {
    if !must_be_root("privileged_a_hundred_layers_take_at_most_15_mib") {
        return;
    }
    let bed = Bed::new(1, 120);
    let (server, _) = connect(&bed.path().join("socket"));
    let mut points = Vec::new();
    for number in 0..LAYERS {
        let dir = bed.path().join(format!("layer{number}"));
        Layer::create(&dir, PAGES);
        let at = dir.join("mnt");
        fs::create_dir(&at).unwrap();
        let layer = Layer::open(&dir);
        let mount = mount(&server, &layer, &number.to_string(), &at);
        let evictions = layer.fill(0..PAGES);
        // As scattered as can be: every other page.
        for page in (0..PAGES).step_by(2).chain((1..PAGES).step_by(2)) {
            let span = Span::new(page * PAGE, (page + 1) * PAGE).unwrap();
            let grant = Message::Grant {
                want: 0,
                mount,
                number: evictions,
                span,
            };
            server.send(&grant, &[]).unwrap();
        }
        points.push((mount, at));
    }
    for (_, at) in &points {
        let file = open(&at.join("data"), true);
        assert!(read_right(&file, 0, PAGES));
    }
    let rss = rss_kib(bed.server.id());
    for (mount, at) in &points {
        server
            .send(
                &Message::Unmount {
                    request: *mount,
                    mount: *mount,
                },
                &[],
            )
            .unwrap();
        let answer = server.receive().unwrap().0;
        let done = Message::Done {
            request: *mount,
            mount: *mount,
            errno: 0,
        };
        if answer != done {
            sys::detach(at);
        }
        assert_eq!(answer, done);
    }
    assert!(rss <= RSS_KIB_MAX, "{rss} KiB");
}
