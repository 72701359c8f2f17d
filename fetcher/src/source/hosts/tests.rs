//! `hosts.toml` by tables: what it says, and what it must not say.

use proptest::prelude::*;

use super::parse::{Origin, parse};
use super::*;
use crate::Result;

const FULL: &str = include_str!("../../../tests/fixtures/hosts.toml");

fn read(text: &str) -> Result<Hosts> {
    let file = std::path::Path::new("/certs/reg/hosts.toml");
    let is_plain = false;
    parse(text, Origin { file, is_plain })
}

fn origins(hosts: &Hosts) -> Vec<String> {
    let all = hosts.mirrors.iter().chain([&hosts.server]);
    let endpoint = |host: &Host| {
        let endpoint = host.endpoint.as_ref();
        endpoint.map(|endpoint| endpoint.uri(&endpoint.api("/a")).unwrap().to_string())
    };
    all.map(|host| endpoint(host).unwrap_or_default()).collect()
}

fn paths(paths: &[&str]) -> Vec<PathBuf> {
    paths.iter().map(PathBuf::from).collect()
}

fn client(certificate: &str, key: Option<&str>) -> ClientFiles {
    ClientFiles {
        certificate: certificate.into(),
        key: key.map(PathBuf::from),
    }
}

#[test]
fn reads_everything_in_the_files_order() {
    let hosts = read(FULL).unwrap();
    assert_eq!(
        origins(&hosts),
        [
            "http://127.0.0.1:5001/v2/a",
            "https://mirror.lan/hub/v2/a",
            "https://api.lan/v3/images/a",
            "https://another.lan/v2/a",
            "https://registry.lan:5000/v2/a",
        ]
    );
    let [near, hub, api, another] = &hosts.mirrors[..] else {
        panic!("there are four");
    };
    assert_eq!(near.dial_timeout, Some(Duration::from_millis(200)));
    let may = |host: &Host, one| host.capabilities.has(one);
    assert!(may(near, Capability::Pull) && may(near, Capability::Resolve));
    assert!(!may(near, Capability::Push) && !may(near, Capability::Referrers));
    assert!(may(hub, Capability::Pull) && !may(hub, Capability::Resolve));
    assert_eq!(api.capabilities, Capabilities::ALL);
    assert_eq!(hub.ca, paths(&["/etc/ssl/one.pem", "/certs/reg/two.pem"]));
    assert_eq!(
        hub.client,
        [
            client("/certs/reg/node.cert", Some("/certs/reg/node.key")),
            client("/certs/reg/both.pem", None),
        ]
    );
    let names = ["/certs/reg/one.pem", "/certs/reg/two.pem"];
    assert_eq!(api.client, names.map(|name| client(name, None)));
    assert_eq!(another.client, [client("/certs/reg/one.pem", None)]);
    let values = |host: &Host, name: &str| -> Vec<String> {
        let values = host.headers.get_all(name).iter();
        values.map(|v| v.to_str().unwrap().to_owned()).collect()
    };
    assert_eq!(values(hub, "x-several"), ["a", "b"]);
    assert_eq!(values(hub, "authorization"), ["Bearer of-the-mirror"]);
    assert!(!format!("{hub:?}").contains("of-the-mirror"));
    assert!(near.headers.is_empty());
    assert_eq!(values(&hosts.server, "x-node"), ["7"]);
    assert_eq!(hosts.server.ca, paths(&["/certs/reg/registry.crt"]));
    assert_eq!(hosts.server.dial_timeout, Some(Duration::from_secs(3)));
}

#[test]
fn the_order_is_the_files_however_it_is_written() {
    let table = [
        (
            "[host.\"z\"]\n[host.\"a\"]\n[host.\"m\"]\n",
            ["z", "a", "m"],
        ),
        (
            "[host.\"z\".header]\nx='1'\n[host.\"a\"]\n[host.\"m\"]\n[host.\"z\"]\nca='c'\n",
            ["z", "a", "m"],
        ),
        (
            "host.m.capabilities = ['pull']\nhost.z.ca = 'c'\nhost.a = {}\n",
            ["m", "z", "a"],
        ),
        ("host = { z = {}, m = {}, a = {} }\n", ["z", "m", "a"]),
    ];
    for (text, names) in table {
        let mut expected = names.map(|name| format!("https://{name}/v2/a")).to_vec();
        expected.push(String::new());
        assert_eq!(origins(&read(text).unwrap()), expected, "{text}");
    }
}

#[test]
fn knows_where_an_api_is() {
    let table = [
        ("reg.lan", false, "https://reg.lan/v2/a"),
        ("reg.lan:5000", false, "https://reg.lan:5000/v2/a"),
        ("https://reg.lan:443", false, "https://reg.lan:443/v2/a"),
        ("http://reg.lan:80", false, "http://reg.lan:80/v2/a"),
        ("http://[::1]:5000/", false, "http://[::1]:5000/v2/a"),
        ("https://reg.lan/v2", false, "https://reg.lan/v2/a"),
        ("https://reg.lan//x//v2/", false, "https://reg.lan/x/v2/a"),
        ("https://reg.lan/x", false, "https://reg.lan/x/v2/a"),
        ("https://reg.lan/x/", true, "https://reg.lan/x/a"),
        ("https://reg.lan", true, "https://reg.lan/a"),
        (
            "https://docker.io",
            false,
            "https://registry-1.docker.io/v2/a",
        ),
    ];
    for (server, override_path, expected) in table {
        let text = format!("server = \"{server}\"\noverride_path = {override_path}\n");
        assert_eq!(origins(&read(&text).unwrap()), [expected], "{server}");
    }
    for nothing in ["", "server = \"\"", "unknown = 1\n[other]\nserver = 1\n"] {
        assert_eq!(origins(&read(nothing).unwrap()), [""], "{nothing}");
    }
}

#[test]
fn says_which_key_is_wrong() {
    let table = [
        ("a = \n", "line 1: "),
        ("a = 1\na = 2\n", "line 2: "),
        ("host = 1", "host: it is no table"),
        ("[host]\nm = 1", "host.\"m\": it is no table"),
        ("server = 1", "server: it is no text"),
        (
            "server = 'ftp://m'",
            "server: \"ftp://m\" begins with neither",
        ),
        (
            "[host.\"http://\"]",
            "host.\"http://\": \"http://\" is no URL",
        ),
        (
            "[host.m]\ncapabilities = 'pull'",
            "host.\"m\".capabilities: it is no list",
        ),
        ("capabilities = ['pul']", "capabilities: pull, resolve,"),
        ("capabilities = [1]", "capabilities: pull, resolve,"),
        ("ca = 1", "ca: it is neither"),
        ("ca = ['a', 1]", "ca: it is neither"),
        ("client = [['a']]", "client: it is neither"),
        ("client = [['a', 'b', 'c']]", "client: it is neither"),
        ("client = {}", "client: it is neither"),
        (
            "skip_verify = 'no'",
            "skip_verify: it is neither true nor false",
        ),
        (
            "skip_verify = true",
            "skip_verify: certificates are always verified here;",
        ),
        (
            "[host.\"https://m\"]\nskip_verify = true",
            "host.\"https://m\".skip_verify: certificates are always verified here; name the \
             authority of the host's certificate with ca instead",
        ),
        (
            "[host.m]\nproxy = 'http://p'",
            "host.\"m\".proxy: a host has no proxy of its own",
        ),
        ("header = 1", "header: it is no table"),
        (
            "[host.m.header]\n'a b' = '1'",
            "host.\"m\".header.a b: no header can",
        ),
        ("[header]\na = 1", "header.a: it is neither"),
        ("[header]\na = \"1\\n2\"", "header.a: it has characters"),
        ("dial_timeout = 3", "dial_timeout: it is not a duration"),
        ("dial_timeout = '-3s'", "dial_timeout: it is not a duration"),
        ("override_path = 1", "override_path: it is neither"),
    ];
    for (text, expected) in table {
        let error = read(text).unwrap_err().to_string();
        let expected = format!("/certs/reg/hosts.toml is malformed: {expected}");
        assert!(error.starts_with(&expected), "{text}: {error}");
    }
}

#[test]
fn plain_hosts_have_nothing_to_verify() {
    let file = std::path::Path::new("/certs/reg/hosts.toml");
    let plain = |text| {
        parse(
            text,
            Origin {
                file,
                is_plain: true,
            },
        )
    };
    assert!(plain("skip_verify = true").is_ok());
    assert!(plain("skip_verify = true\nserver = 'reg.lan'").is_err());
    assert!(read("skip_verify = true\nserver = 'http://reg.lan'").is_ok());
    assert!(read("skip_verify = false\nserver = 'reg.lan'").is_ok());
}

#[test]
fn headers_that_are_the_readers_stay_so() {
    let text = "[header]\nRange = 'bytes=0-1'\nhost = 'x'\nAccept-Encoding = 'gzip'\nx-a = ''\n";
    let hosts = read(text).unwrap();
    let names: Vec<_> = hosts.server.headers.keys().map(|k| k.as_str()).collect();
    assert_eq!(names, ["x-a"]);
}

#[test]
fn everything_has_its_limit() {
    let hosts = |n: usize| -> String { (0..n).map(|i| format!("[host.h{i}]\n")).collect() };
    assert_eq!(read(&hosts(16)).unwrap().mirrors.len(), 16);
    let list = |name: &str, n| format!("{name} = [{}]", "'x', ".repeat(n));
    let headers: String = (0..33).map(|i| format!("header.x{i} = '1'\n")).collect();
    let long = format!("# {}\n", "x".repeat(64 << 10));
    assert!(read(&list("ca", 16)).is_ok() && read(&list("client", 16)).is_ok());
    for text in [
        hosts(17),
        list("ca", 17),
        list("client", 17),
        headers,
        long,
        format!("a = {}", "[".repeat(10_000)),
    ] {
        let error = read(&text).unwrap_err().to_string();
        assert!(error.starts_with("/certs/reg/hosts.toml "), "{error}");
    }
}

proptest! {
    #[test]
    fn never_panics(text in ".{0,200}") {
        let _ = read(&text);
    }

    #[test]
    fn never_panics_on_what_looks_like_one(
        name in "[a-z:/\\[\\]._\\-]{0,20}",
        key in "(server|ca|client|header|capabilities|dial_timeout|skip_verify|host|proxy)",
        value in "(true|1|'[ -&(-~]{0,12}'|\\['[a-z]{0,4}', \\['a', ''\\]\\]|\\{ x = '[a-z]{0,3}' \\})",
    ) {
        for text in [format!("{key} = {value}\n"), format!("[host.'{name}']\n{key} = {value}\n")] {
            if let Err(error) = read(&text) {
                prop_assert!(error.to_string().starts_with("/certs/reg/hosts.toml "));
            }
        }
    }
}
