//! Which directory is a registry's, what is read there, and when that has changed.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::*;

fn load_of(root: &Path, host: &str) -> Result<Option<Vec<Ready>>> {
    load(&mut Stamp::default(), &[root.to_path_buf()], host, false)
}

/// The last host's dial timeout in seconds tells which file was read.
fn which(root: &Path, host: &str) -> Option<u64> {
    let hosts = load_of(root, host).unwrap()?;
    let last = hosts.last().unwrap();
    Some(last.host.dial_timeout.map_or(0, |limit| limit.as_secs()))
}

/// Writes a file. What it changes gets a time of its own, for the kernel's clock may stand
/// still between two writes.
fn write(root: &Path, name: &str, text: &str) {
    static WRITES: AtomicU64 = AtomicU64::new(1);
    let path = root.join(name);
    let dir = path.parent().unwrap();
    fs::create_dir_all(dir).unwrap();
    fs::write(&path, text).unwrap();
    let seconds = WRITES.fetch_add(1, Ordering::Relaxed);
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    for changed in [path.as_path(), dir] {
        File::open(changed).unwrap().set_modified(time).unwrap();
    }
}

#[test]
fn the_first_directory_that_exists_is_the_registrys() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    assert_eq!(which(root, "a.lan"), None);
    assert_eq!(which(&root.join("none"), "a.lan"), None);
    for (name, seconds) in [
        ("_default", 1),
        ("a.lan", 2),
        ("b.lan:5000", 3),
        ("c.lan_5000_", 4),
        ("c.lan:5000", 5),
        ("[::1]_5000_", 6),
    ] {
        let text = format!("dial_timeout = '{seconds}s'");
        write(root, &format!("{name}/hosts.toml"), &text);
    }
    fs::create_dir(root.join("empty.lan")).unwrap();
    for (host, expected) in [
        ("a.lan", 2),
        ("a.lan:5000", 1),
        ("b.lan", 1),
        ("b.lan:5000", 3),
        ("c.lan:5000", 4),
        ("c.lan", 1),
        ("[::1]:5000", 6),
        ("docker.io", 1),
        // Empty, but its own.
        ("empty.lan", 0),
    ] {
        assert_eq!(which(root, host), Some(expected), "{host}");
    }
}

/// A certificate and its key in PEM.
fn pair() -> (String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["node".to_owned()]).unwrap();
    (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
}

#[test]
fn without_hosts_toml_certificates_lie_in_the_directory() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let (certificate, key) = pair();
    write(root, "a.lan/one.crt", &certificate);
    write(
        root,
        "a.lan/two.crt",
        &format!("{certificate}{certificate}"),
    );
    write(root, "a.lan/node.cert", &certificate);
    write(root, "a.lan/node.key", &key);
    write(root, "a.lan/both.cert", &format!("{certificate}{key}"));
    write(root, "a.lan/readme.txt", "no certificate");
    write(root, "a.lan/dir.crt/x", "no file");
    for empty in [false, true] {
        if empty {
            write(root, "a.lan/hosts.toml", "");
        }
        let hosts = load_of(root, "a.lan").unwrap().unwrap();
        let [Ready { host, certificates }] = &hosts[..] else {
            panic!("only the registry itself");
        };
        assert_eq!(host.endpoint, None);
        assert_eq!(certificates.authorities.len(), 3);
        assert_eq!(certificates.identities.len(), 2);
    }
    // Where there is one, only what it names is read.
    write(root, "a.lan/hosts.toml", "ca = 'one.crt'");
    let hosts = load_of(root, "a.lan").unwrap().unwrap();
    assert_eq!(hosts[0].certificates.authorities.len(), 1);
    assert!(hosts[0].certificates.identities.is_empty());
}

#[test]
fn says_which_file_is_wrong() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    write(root, "a/hosts.toml", "ca = 'none.pem'");
    write(root, "b/hosts.toml", "ca = 'hosts.toml'");
    write(root, "c/node.cert", &pair().0);
    write(root, "d/hosts.toml", "capabilities = 1");
    fs::create_dir(root.join("e")).unwrap();
    fs::write(root.join("e/hosts.toml"), [0xff, b'\n']).unwrap();
    write(root, "f/hosts.toml", &"#".repeat(70_000));
    for (host, expected) in [
        ("a", "a/none.pem"),
        (
            "b",
            "b/hosts.toml is malformed: it holds no PEM certificate",
        ),
        ("c", "c/node.cert is malformed: its key in "),
        ("d", "d/hosts.toml is malformed: capabilities: "),
        ("e", "e/hosts.toml is malformed: it is not UTF-8"),
        (
            "f",
            "f/hosts.toml exceeds the limit: it is larger than 65536 bytes",
        ),
    ] {
        let error = load_of(root, host).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_stamp_holds_until_something_changes() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let stamp = || {
        let mut stamp = Stamp::default();
        load(&mut stamp, &[root.to_path_buf()], "a.lan:1", false).unwrap();
        stamp
    };
    // Each step changes something that was looked at before.
    let (certificate, _) = pair();
    let steps: [(&str, &str); 6] = [
        ("_default/hosts.toml", "ca = '../ca.pem'"),
        ("ca.pem", &format!("{certificate}{certificate}")),
        ("a.lan:1/ca.crt", &certificate),
        ("a.lan:1/more.crt", &certificate),
        ("a.lan_1_/x", ""),
        ("a.lan_1_/hosts.toml", "server = 'b.lan'"),
    ];
    write(root, "ca.pem", &certificate);
    for (name, text) in steps {
        let before = stamp();
        assert!(before.holds(), "{name}");
        write(root, name, text);
        assert!(!before.holds(), "{name}");
    }
    let before = stamp();
    fs::remove_file(root.join("a.lan_1_/hosts.toml")).unwrap();
    assert!(!before.holds());
}

#[test]
fn the_first_root_with_a_directory_for_a_registry_decides() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let roots = [one.path(), two.path()].map(Path::to_path_buf);
    let mut stamp = Stamp::default();
    let mut which = |host: &str| {
        stamp = Stamp::default();
        let hosts = load(&mut stamp, &roots, host, false).unwrap()?;
        Some((hosts.last()?.host.dial_timeout?.as_secs(), stamp.holds()))
    };
    assert_eq!(which("a.lan"), None);
    write(two.path(), "a.lan/hosts.toml", "dial_timeout = '2s'");
    assert_eq!(which("a.lan"), Some((2, true)));
    write(one.path(), "_default/hosts.toml", "dial_timeout = '1s'");
    assert_eq!(which("a.lan"), Some((1, true)), "as containerd has it");
    fs::remove_dir_all(one.path().join("_default")).unwrap();
    assert_eq!(which("a.lan"), Some((2, true)));
    write(one.path(), "a.lan/hosts.toml", "dial_timeout = '3s'");
    assert!(!stamp.holds(), "one that was looked for in vain is there");
}
