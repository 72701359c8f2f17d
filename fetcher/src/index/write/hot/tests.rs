//! Tests of looking hot files up in the layers of an image.

use super::super::entry::Meta;
use super::super::scan::Scanned;
use super::*;

/// `d/` is a directory, `a->b` a symlink, `a=b` a hard link, anything else a file.
fn survey(entries: &[&str]) -> Survey {
    let entry = |text: &&str| {
        let (name, kind, link) = if let Some((name, target)) = text.split_once("->") {
            (name, Kind::Symlink, target)
        } else if let Some((name, target)) = text.split_once('=') {
            (name, Kind::Hardlink, target)
        } else if let Some(name) = text.strip_suffix('/') {
            (name, Kind::Directory, "")
        } else {
            (*text, Kind::Regular, "")
        };
        Scanned {
            meta: Meta {
                kind,
                link: link.to_owned(),
                ..Meta::of_our_own(name, 0)
            },
            head_offset: 0,
            head_len: 0,
        }
    };
    Survey {
        entries: entries.iter().map(entry).collect(),
    }
}

/// Each layer's names, and what is missing.
fn found(layers: &[&[&str]], paths: &[&str]) -> (Vec<Vec<String>>, Vec<String>) {
    let surveys: Vec<Survey> = layers.iter().map(|entries| survey(entries)).collect();
    let surveys: Vec<&Survey> = surveys.iter().collect();
    let hot = HotFiles::whole(paths.iter().map(|path| (*path).to_owned()));
    let resolved = resolve(&surveys, &hot);
    let names = |hot: &HotFiles| hot.files.iter().map(|file| file.path.clone()).collect();
    (
        resolved.layers.iter().map(names).collect(),
        resolved.missing,
    )
}

#[test]
fn paths_lead_through_symlinks_of_any_layer() {
    let base: &[&str] = &[
        "bin->usr/bin",
        "usr/",
        "usr/bin/bash",
        "lib->/usr/lib",
        "usr/lib/l",
    ];
    let top: &[&str] = &[
        "usr/bin/sh->bash",
        "opt/tool->../bin/../bin/sh",
        "etc/up->../../../lib/l",
    ];
    let table: [(&str, &[&str], &[&str]); 7] = [
        ("/bin/bash", &["bin", "usr/bin/bash"], &[]),
        ("usr/bin/bash", &["usr/bin/bash"], &[]),
        ("./bin//sh", &["bin", "usr/bin/bash"], &["usr/bin/sh"]),
        (
            "/opt/tool",
            &["bin", "usr/bin/bash"],
            &["opt/tool", "usr/bin/sh"],
        ),
        ("/../etc/up", &["lib", "usr/lib/l"], &["etc/up"]),
        ("usr", &["usr"], &[]),
        ("/lib/l", &["lib", "usr/lib/l"], &[]),
    ];
    for (path, low, high) in table {
        let (layers, missing) = found(&[base, top], &[path]);
        assert_eq!(
            (&layers[0][..], &layers[1][..]),
            (
                &low.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>()[..],
                &high.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>()[..]
            ),
            "{path}"
        );
        assert_eq!(missing, [""; 0], "{path}");
    }
}

#[test]
fn what_is_not_there_is_missing() {
    let loops: &[&str] = &["a->b", "b->a", "c->c/c", "dangling->gone", "f"];
    let paths = ["a", "c", "dangling", "nothing", "/f"];
    let (layers, missing) = found(&[loops], &paths);
    assert_eq!(layers, [["f"]]);
    assert_eq!(missing, ["a", "c", "dangling", "nothing"]);
}

#[test]
fn upper_layers_hide_lower_ones() {
    let low: &[&str] = &["a/x", "a/y", "b/x", "c/x", "d", "e/x", "f->g", "g"];
    let high: &[&str] = &[
        "a/.wh.x",
        "b/.wh..wh..opq",
        "b/new",
        ".wh.c",
        "d",
        "e",
        "f/",
    ];
    let paths = [
        "a/x", "a/y", "b/x", "b/new", "c/x", "d", "e/x", "e", "f/g", "f",
    ];
    let (layers, missing) = found(&[low, high], &paths);
    assert_eq!(layers, [vec!["a/y"], vec!["b/new", "d", "e", "f"]]);
    assert_eq!(missing, ["a/x", "b/x", "c/x", "e/x", "f/g"]);
}

#[test]
fn hard_links_heat_what_they_link_to() {
    let (layers, _) = found(&[&["a", "b=a", "c=b", "d=d"]], &["c", "a"]);
    assert_eq!(layers, [["c", "b", "a"]]);
}

#[test]
fn ranges_of_one_file_add_up() {
    let survey = survey(&["f", "s->f", "w"]);
    let range = |start, end| ByteRange::new(start, end).unwrap();
    let hot = |path: &str, ranges: &[ByteRange]| HotFile {
        path: path.to_owned(),
        ranges: ranges.to_vec(),
    };
    let files = vec![
        hot("f", &[range(0, 1)]),
        hot("s", &[range(5, 9)]),
        hot("w", &[range(0, 1)]),
        hot("w", &[]),
    ];
    let resolved = resolve(&[&survey], &HotFiles { files });
    let f = hot("f", &[range(0, 1), range(5, 9)]);
    let s = hot("s", &[range(5, 9)]);
    assert_eq!(resolved.layers[0].files, [f, s, hot("w", &[])]);
}
