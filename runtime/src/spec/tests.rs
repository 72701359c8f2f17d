//! Tests of the document builder: golden documents and the precedence of settings.

use std::num::NonZeroU32;

use super::*;

fn facts() -> HostFacts {
    HostFacts {
        controllers: Controllers {
            memory: true,
            swap: false,
            cpu: true,
            pids: true,
        },
        cgroup_hierarchies: vec!["cpu".into(), "memory".into()],
        oom_score_adj: -500,
        nofile_hard: 20_000,
        recursive_read_only: true,
        hostname: "node".into(),
        ..HostFacts::default()
    }
}

fn options() -> ContainerOptions {
    ContainerOptions {
        id: "0123456789abcdef".into(),
        rootfs: "/".into(),
        ..Default::default()
    }
}

fn image() -> ImageConfig {
    ImageConfig {
        env: vec!["PATH=/opt/bin:/bin".into(), "LANG=C".into()],
        entrypoint: vec!["/entry".into()],
        cmd: vec!["default".into()],
        working_dir: "/srv".into(),
        user: "www".into(),
        ..ImageConfig::default()
    }
}

fn accounts() -> AccountFiles {
    AccountFiles {
        passwd: "www:x:33:34::/var/www:/bin/sh".to_owned(),
        group: String::new(),
    }
}

fn built(options: &ContainerOptions, image: &ImageConfig) -> Spec {
    build(Path::new("/run/b"), options, image, &accounts(), &facts()).unwrap()
}

/// Compares without the filter table, which has tests of its own; sets compare as sets.
fn assert_golden(mut spec: Spec, golden: &str) {
    let mut linux = spec.linux().clone().unwrap();
    assert!(linux.seccomp().is_some());
    linux.set_seccomp(None);
    spec.set_linux(Some(linux));
    let expected: Spec = serde_json::from_str(golden).unwrap();
    let (got, want) = (
        serde_json::to_string_pretty(&spec),
        serde_json::to_string_pretty(&expected),
    );
    assert_eq!(
        spec,
        expected,
        "\ngot:\n{}\nexpected:\n{}",
        got.unwrap(),
        want.unwrap()
    );
}

#[test]
fn golden_plain_image() {
    assert_golden(
        built(&options(), &image()),
        include_str!("testdata/plain.json"),
    );
}

#[test]
fn golden_everything_asked_for() {
    let options = ContainerOptions {
        args: vec!["-v".into()],
        env: vec!["LANG=de".into(), "HOME=/h".into()],
        cwd: Some("/work".into()),
        user: Some("7:8".into()),
        volumes: vec![
            "/x:/data/inner:ro".parse().unwrap(),
            "/y:/data".parse().unwrap(),
        ],
        network: Network::Host,
        limits: Limits {
            memory_bytes: Some(64 << 20),
            cpus: Some(0.5),
            pids: NonZeroU32::new(10),
        },
        read_only: true,
        terminal: true,
        cgroup: Some("/pods/c".into()),
        ..options()
    };
    assert_golden(
        built(&options, &image()),
        include_str!("testdata/full.json"),
    );
}

#[test]
fn an_old_kernel_is_not_asked_for_what_it_cannot_do() {
    let mut options = options();
    options.volumes = vec!["/x:/data:ro".parse().unwrap()];
    let facts = HostFacts {
        recursive_read_only: false,
        ..facts()
    };
    let built = build(Path::new("/b"), &options, &image(), &accounts(), &facts).unwrap();
    let mounts = built.mounts().as_ref().unwrap();
    let options = mounts.last().unwrap().options().as_ref().unwrap();
    assert_eq!(*options, ["rbind", "rprivate", "ro"]);
}

#[test]
fn an_image_without_a_command_needs_one() {
    let image = ImageConfig::default();
    let error = build(Path::new("/b"), &options(), &image, &accounts(), &facts()).unwrap_err();
    assert!(matches!(error, SpecError::NoCommand), "{error}");
}

#[test]
fn unusable_settings_are_named() {
    type Change = fn(&mut ContainerOptions);
    let bad: [(Change, &str); 9] = [
        (|o| o.id = "a/b".into(), "a/b"),
        (|o| o.id = "..".into(), "container id"),
        (|o| o.hostname = Some("a b".into()), "a b"),
        (|o| o.cwd = Some("rel".into()), "rel"),
        (|o| o.env = vec!["NOVALUE".into()], "NOVALUE"),
        (|o| o.env = vec!["=x".into()], "=x"),
        (|o| o.args = vec!["a\0b".into()], "NUL"),
        (|o| o.user = Some("ghost".into()), "ghost"),
        (|o| o.rootfs = "/no/root".into(), "/no/root"),
    ];
    for (change, expected) in bad {
        let mut options = options();
        change(&mut options);
        let built = build(Path::new("/b"), &options, &image(), &accounts(), &facts());
        let error = built.unwrap_err();
        assert!(
            error.to_string().contains(expected),
            "{error} lacks {expected}"
        );
    }
}

#[test]
fn what_is_no_variable_of_an_image_is_left_out() {
    let mut image = image();
    image.env = ["NOVALUE", "", "=x", "EMPTY=", "A=b=c"]
        .map(str::to_owned)
        .into();
    let spec = built(&options(), &image);
    let env = spec.process().as_ref().unwrap().env().clone().unwrap();
    assert_eq!(env[2..4], ["EMPTY=", "A=b=c"]);
    assert!(
        env.iter().all(|variable| !variable.contains("NOVALUE")),
        "{env:?}"
    );
    assert!(
        env.iter().all(|variable| variable.find('=') > Some(0)),
        "{env:?}"
    );
}

#[test]
fn image_config_tolerates_nulls_and_unknown_fields() {
    let text = r#"{"Env":null,"Cmd":["a"],"Entrypoint":null,"Future":{"x":1},"User":""}"#;
    let config: ImageConfig = serde_json::from_str(text).unwrap();
    assert_eq!(
        config,
        ImageConfig {
            cmd: vec!["a".into()],
            ..ImageConfig::default()
        }
    );
}

#[test]
fn own_oom_score_is_the_floor() {
    for (own, expected) in [(-500, 0), (0, 0), (300, 300)] {
        let facts = HostFacts {
            oom_score_adj: own,
            ..facts()
        };
        let spec = build(Path::new("/b"), &options(), &image(), &accounts(), &facts).unwrap();
        assert_eq!(
            spec.process().as_ref().unwrap().oom_score_adj(),
            Some(expected)
        );
    }
}

#[test]
fn programs_are_looked_for_where_the_container_will() {
    let with = |entry: &[&str], args: &[&str], env: &[&str], cwd: Option<&str>| {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let image = ImageConfig {
            entrypoint: owned(entry),
            ..image()
        };
        let options = ContainerOptions {
            args: owned(args),
            env: owned(env),
            cwd: cwd.map(PathBuf::from),
            ..options()
        };
        let first = named(&options, &image).files.into_iter().next();
        first.unwrap_or_default()
    };
    assert_eq!(with(&["/entry"], &["x"], &[], None), ["/entry"]);
    assert_eq!(with(&[], &["sh"], &[], None), ["/opt/bin/sh", "/bin/sh"]);
    assert_eq!(with(&[], &["sh"], &["PATH=/a"], None), ["/a/sh"]);
    assert_eq!(with(&[], &["./run"], &[], None), ["/srv/./run"]);
    assert_eq!(with(&[], &["b/run"], &[], Some("/d")), ["/d/b/run"]);
    assert_eq!(with(&[], &[""], &[], None), [""; 0]);
}

#[test]
fn words_name_what_is_opened_next() {
    let with = |words: &[&str]| {
        let options = ContainerOptions {
            args: words.iter().map(|word| (*word).to_owned()).collect(),
            env: vec!["PATH=/a".to_owned()],
            cwd: Some(PathBuf::from("/d")),
            ..options()
        };
        let image = ImageConfig {
            entrypoint: Vec::new(),
            ..image()
        };
        let named = named(&options, &image);
        assert_eq!(named.search, ["/a"]);
        let files = named.files.into_iter().skip(1);
        files.map(|paths| paths.join(" ")).collect::<Vec<_>>()
    };
    assert_eq!(with(&["tini", "--", "x"]), ["/d/x /a/x"]);
    let jar = ["java", "-cp", "/l/a.jar:lib/b.jar", "-jar", "c.jar"];
    assert_eq!(
        with(&jar),
        ["/l/a.jar", "/d/lib/b.jar", "/d/c.jar /a/c.jar"]
    );
    assert_eq!(with(&["x", "--config=/etc/x", "-v"]), ["/etc/x"]);
    let script = ["/bin/sh", "-ec", "dpkg -l|wc -l && exec '/opt/x' \"y\""];
    let named = ["/d/dpkg /a/dpkg", "/d/wc /a/wc", "/d/exec /a/exec"];
    assert_eq!(with(&script)[..3], named);
    assert_eq!(with(&script)[3..], ["/opt/x", "/d/y /a/y"]);
    // Of another program `-c` says something else.
    assert_eq!(with(&["x", "-c", "a b"]), ["/d/a b /a/a b"]);
    assert_eq!(with(&["x"; 1000]).len(), 63);
}

proptest::proptest! {
    #[test]
    fn any_words_name_a_bounded_number_of_files(args: Vec<String>, path: String) {
        let options = ContainerOptions { args, env: vec![format!("PATH={path}")], ..options() };
        assert!(named(&options, &image()).files.len() <= 64);
    }
}
