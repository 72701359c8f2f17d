//! That the disk loses what was not synced, keeps what was, and is one that ext4 can live on.

use std::collections::BTreeMap;

use super::*;
use crate::confined;
use crate::support::is_root;

const FILES: usize = 12;
const BYTES: usize = 20_000;

/// How a file was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Found {
    Right,
    Wrong,
    Absent,
}

fn content(number: usize) -> Vec<u8> {
    vec![u8::try_from(number + 1).unwrap(); BYTES]
}

fn look(path: &Path, number: usize) -> Found {
    match fs::read(path) {
        Ok(bytes) if bytes == content(number) => Found::Right,
        Ok(_) => Found::Wrong,
        Err(_) => Found::Absent,
    }
}

/// Writes a file and has it kept: its bytes, and its name.
fn write_synced(dir: &Path, name: &str, number: usize) {
    let mut file = File::create(dir.join(name)).unwrap();
    file.write_all(&content(number)).unwrap();
    file.sync_all().unwrap();
    File::open(dir).unwrap().sync_all().unwrap();
}

#[test]
#[ignore = "another test runs it, where it leaves nothing"]
fn files_of_both_kinds() {
    let dir = confined::dir();
    let disk = Disk::new(&dir, Kind::Ext4);
    let at = dir.join("mounted");
    let mounted = disk.mount(&at);
    let mut synced = Vec::new();
    for number in 0..FILES {
        fs::write(at.join(format!("other-{number}")), content(number)).unwrap();
        write_synced(&at, &format!("synced-{number}"), number);
        synced.push(disk.now());
    }
    // What nobody synced comes to the disk some time, too.
    let all = Command::new("sync").arg("-f").arg(&at).status();
    assert!(all.unwrap().success());
    drop(mounted);
    let history = disk.history();
    let mut platter = disk.platter(&history);
    let image = dir.join("after");
    let (mut found, mut lost) = (BTreeMap::new(), 0);
    let kinds = [Loses::All, Loses::Writes, Loses::Sectors, Loses::Nothing];
    for (number, end) in history.writes().into_iter().enumerate() {
        let cut = Cut {
            at: end,
            loses: kinds[number % kinds.len()],
            seed: number as u64,
        };
        let [left, all] = platter.cut(&cut, &image);
        lost += all - left;
        let mounted = Kind::Ext4.mount(&image, &at);
        for (number, synced_at) in synced.iter().enumerate() {
            let was_synced = *synced_at <= cut.at;
            let how = look(&at.join(format!("synced-{number}")), number);
            assert!(
                !was_synced || how == Found::Right,
                "{number}: {how:?} at {cut:?}"
            );
            *found.entry(("synced", was_synced, how)).or_insert(0) += 1;
            let how = look(&at.join(format!("other-{number}")), number);
            *found.entry(("other", was_synced, how)).or_insert(0) += 1;
        }
        drop(mounted);
        // Its journal was played back: nothing may be wrong with it.
        let checked = Command::new("e2fsck").arg("-fn").arg(&image).output();
        assert!(checked.as_ref().unwrap().status.success(), "{checked:?}");
    }
    let _ = writeln!(std::io::stderr(), "{lost} sectors lost: {found:?}");
    // Were it to keep everything, or its files to be whole by chance, this would show it.
    assert!(lost > 0);
    let count = |what, synced| {
        let of = found
            .iter()
            .filter(|((w, s, how), _)| (*w, *s) == (what, synced) && *how != Found::Right);
        of.map(|(_, count)| *count).sum::<usize>()
    };
    assert_eq!(count("synced", true), 0);
    assert!(count("synced", false) > 0 && count("other", true) > 0);
    assert!(found.contains_key(&("other", true, Found::Right)));
}

#[test]
fn privileged_the_disk_loses_what_was_not_synced_and_nothing_else() {
    if is_root("privileged_the_disk_loses_what_was_not_synced_and_nothing_else") {
        let said = confined::run("disk::tests::files_of_both_kinds");
        let line = said.lines().find(|line| line.contains("sectors lost"));
        let _ = writeln!(std::io::stderr(), "{}", line.unwrap_or_default());
    }
}
