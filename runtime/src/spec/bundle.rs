//! The bundle directory of one container: `config.json` and the generated `/etc` files.
//!
//! Written before a container is created, removed by the engine after it is deleted. The
//! rootfs is touched only by look-ups that cannot leave it; what is changed in it is what
//! the container could not start without. Its account files
//! may be known from before: reading them here would wait for the network.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::Spec;

pub use super::user::AccountFiles;
use super::{ContainerOptions, HostFacts, ImageConfig, Network, SpecError, Volume};
use crate::sys::rootfs::{self, Root};

/// Most bytes read of an account file of an image; larger ones are refused.
const ACCOUNT_BYTES_MAX: u64 = 4 << 20;

/// A written bundle.
#[derive(Debug)]
pub struct Bundle {
    /// The directory.
    pub path: PathBuf,
    /// The document in its `config.json`.
    pub spec: Spec,
    /// The accounts that the user was looked up in.
    pub accounts: AccountFiles,
}

impl Bundle {
    /// User id that the container's process starts with.
    #[must_use]
    pub fn uid(&self) -> u32 {
        let process = self.spec.process().as_ref();
        process.map_or(0, |process| process.user().uid())
    }
}

/// Builds the spec and writes the bundle into the directory `path`, which is created when
/// missing. Creates the working directory, in the rootfs or in a volume, when it is missing,
/// and removes links to nothing where the generated files are to be. `known` are the account
/// files of the rootfs if they were read before.
///
/// # Errors
/// What [`super::build`] refuses, a missing volume source, and I/O on the bundle or rootfs.
pub fn write(
    path: &Path,
    options: &ContainerOptions,
    image: &ImageConfig,
    facts: &HostFacts,
    known: Option<AccountFiles>,
) -> Result<Bundle, SpecError> {
    options.check()?;
    let root = Root::open(&options.rootfs).map_err(io_error(&options.rootfs))?;
    let accounts = match known {
        Some(known) => known,
        None => AccountFiles {
            passwd: account_file(&root, options, "etc/passwd")?,
            group: account_file(&root, options, "etc/group")?,
        },
    };
    fs::create_dir_all(path).map_err(io_error(path))?;
    let path = path.canonicalize().map_err(io_error(path))?;
    let spec = super::build(&path, options, image, &accounts, facts)?;
    ensure_cwd(&root, &spec, options)?;
    clear_targets(&root)?;
    let hostname = super::hostname(options, facts);
    let files = [
        ("hosts", hosts(options.network, &hostname, facts)),
        ("hostname", format!("{hostname}\n")),
        ("resolv.conf", facts.resolv_conf.clone()),
    ];
    for (name, text) in files {
        let file = path.join(name);
        write_readable(&file, &text).map_err(io_error(&file))?;
    }
    let config = path.join("config.json");
    let text = serde_json::to_vec(&spec).map_err(|error| io_error(&config)(error.into()))?;
    fs::write(&config, text).map_err(io_error(&config))?;
    Ok(Bundle {
        path,
        spec,
        accounts,
    })
}

/// A file that everybody in the container may read, whatever our umask.
fn write_readable(path: &Path, text: &str) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(text.as_bytes())?;
    file.set_permissions(Permissions::from_mode(0o644))
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> SpecError {
    let path = path.to_owned();
    move |source| SpecError::Io { path, source }
}

fn account_file(root: &Root, options: &ContainerOptions, name: &str) -> Result<String, SpecError> {
    let shown = options.rootfs.join(name);
    let file = match root.open_file(Path::new(name)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Err(source) => {
            return Err(SpecError::Io {
                path: shown,
                source,
            });
        }
    };
    let mut text = Vec::new();
    let read = file.take(ACCOUNT_BYTES_MAX + 1).read_to_end(&mut text);
    read.map_err(io_error(&shown))?;
    if u64::try_from(text.len()).unwrap_or(u64::MAX) > ACCOUNT_BYTES_MAX {
        let source = io::Error::new(io::ErrorKind::InvalidData, "larger than 4 MiB");
        return Err(SpecError::Io {
            path: shown,
            source,
        });
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// A working directory that is missing is created, as engines do: in the root file system,
/// or in the volume that it lies in.
fn ensure_cwd(root: &Root, spec: &Spec, options: &ContainerOptions) -> Result<(), SpecError> {
    let Some(process) = spec.process() else {
        return Ok(());
    };
    let cwd = process.cwd();
    let above = |volume: &&Volume| cwd.starts_with(&volume.destination);
    let depth = |volume: &&Volume| volume.destination.components().count();
    // The innermost one, and the later of two at one place: what is mounted last.
    match options.volumes.iter().filter(above).max_by_key(depth) {
        Some(volume) => ensure_in_volume(volume, cwd),
        None => root.create_dir_all(cwd).map_err(cwd_error(cwd)),
    }
}

/// Leaves to the runtime what is not for us to find: a file that is mounted, `..`, and links,
/// which lead elsewhere in the container than in the volume.
fn ensure_in_volume(volume: &Volume, cwd: &Path) -> Result<(), SpecError> {
    let rest = cwd.strip_prefix(&volume.destination).unwrap_or(cwd);
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
    let is_volume = rest.as_os_str().is_empty();
    if is_volume || !rest.components().all(plain) || !volume.source.is_dir() {
        return Ok(());
    }
    let inside = Root::open(&volume.source).map_err(io_error(&volume.source))?;
    let inside = inside.without_links();
    let there = if volume.read_only {
        inside.find_dir(rest)
    } else {
        inside.create_dir_all(rest)
    };
    match there {
        Err(error) if rootfs::is_link(&error) => Ok(()),
        Err(error) if volume.read_only && error.kind() == io::ErrorKind::NotFound => {
            Err(SpecError::Value {
                what: "working directory",
                value: cwd.display().to_string(),
                reason: "the volume it lies in does not have it and is read-only: create it first",
            })
        }
        there => there.map_err(cwd_error(cwd)),
    }
}

fn cwd_error(cwd: &Path) -> impl FnOnce(io::Error) -> SpecError {
    let path = cwd.to_owned();
    move |source| SpecError::WorkDir { path, source }
}

/// Images point files of `/etc` at what a service would make in `/run`. A link to nothing
/// cannot be mounted over, so it goes; the mount needs a file of that name, and makes it.
fn clear_targets(root: &Root) -> Result<(), SpecError> {
    for name in super::GENERATED {
        let target = Path::new("/etc").join(name);
        let cleared = root.remove_dangling(&target);
        cleared.map_err(io_error(&target))?;
    }
    Ok(())
}

fn hosts(network: Network, hostname: &str, facts: &HostFacts) -> String {
    match network {
        Network::Host if !facts.hosts.is_empty() => facts.hosts.clone(),
        Network::Host | Network::None => format!(
            "127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n\
             fe00::0\tip6-localnet\nff00::0\tip6-mcastprefix\nff02::1\tip6-allnodes\n\
             ff02::2\tip6-allrouters\n"
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn options(rootfs: &Path) -> ContainerOptions {
        ContainerOptions {
            id: "c1".to_owned(),
            rootfs: rootfs.to_owned(),
            args: vec!["sh".to_owned()],
            hostname: Some("box".to_owned()),
            ..ContainerOptions::default()
        }
    }

    #[test]
    fn a_bundle_holds_the_document_and_the_files() {
        let dir = tempfile::tempdir().unwrap();
        let rootfs = dir.path().join("rootfs");
        fs::create_dir_all(rootfs.join("etc")).unwrap();
        fs::write(rootfs.join("etc/real"), "web:x:7:8::/srv:/bin/sh\n").unwrap();
        symlink("/etc/real", rootfs.join("etc/passwd")).unwrap();
        let mut options = options(&rootfs);
        options.user = Some("web".to_owned());
        options.cwd = Some("/made/here".into());
        let facts = HostFacts {
            resolv_conf: "nameserver ::1\n".into(),
            ..HostFacts::default()
        };
        let bundle = write(
            &dir.path().join("b"),
            &options,
            &ImageConfig::default(),
            &facts,
            None,
        )
        .unwrap();
        assert_eq!(bundle.uid(), 7);
        assert!(rootfs.join("made/here").is_dir());
        assert_eq!(bundle.accounts.passwd, "web:x:7:8::/srv:/bin/sh\n");
        let known = AccountFiles {
            passwd: "web:x:9:9::/:\n".to_owned(),
            ..AccountFiles::default()
        };
        let path = dir.path().join("known");
        let image = ImageConfig::default();
        let by_known = write(&path, &options, &image, &facts, Some(known)).unwrap();
        assert_eq!(by_known.uid(), 9);
        let read = |name| fs::read_to_string(bundle.path.join(name)).unwrap();
        assert_eq!(read("hostname"), "box\n");
        assert_eq!(read("resolv.conf"), "nameserver ::1\n");
        assert!(read("hosts").starts_with("127.0.0.1\tlocalhost box\n"));
        let back: Spec = serde_json::from_str(&read("config.json")).unwrap();
        assert_eq!(back, bundle.spec);
    }

    #[test]
    fn a_working_directory_in_a_volume_is_made_there() {
        let dir = tempfile::tempdir().unwrap();
        let (rootfs, outer) = (dir.path().join("rootfs"), dir.path().join("outer"));
        let (inner, outside) = (dir.path().join("inner"), dir.path().join("outside"));
        for path in [&rootfs, &outer, &inner, &outside] {
            fs::create_dir(path).unwrap();
        }
        fs::write(outer.join("file"), "").unwrap();
        symlink(&outside, outer.join("link")).unwrap();
        let mut options = options(&rootfs);
        let volumes = [(&outer, "/data"), (&inner, "/data/inner")];
        let (facts, image) = (HostFacts::default(), ImageConfig::default());
        let mut try_cwd = |cwd: &str, access: &str| {
            let volume = |(source, at): (&PathBuf, _)| {
                let text = format!("{}:{at}:{access}", source.display());
                text.parse().unwrap()
            };
            options.volumes = volumes.map(volume).into();
            options.cwd = Some(cwd.into());
            let written = write(&dir.path().join("b"), &options, &image, &facts, None);
            written.map(drop).map_err(|error| error.to_string())
        };
        assert_eq!(try_cwd("/data/new/deep", "rw"), Ok(()));
        assert!(outer.join("new/deep").is_dir());
        assert_eq!(try_cwd("/data/inner/new", "rw"), Ok(()));
        assert!(inner.join("new").is_dir() && !outer.join("inner").exists());
        assert_eq!(try_cwd("/data/link/new", "rw"), Ok(()));
        assert_eq!(try_cwd("/data/../new", "rw"), Ok(()));
        assert!(!outer.join("../new").exists() && !outside.join("new").exists());
        assert!(try_cwd("/data/file/new", "rw").is_err());
        assert_eq!(try_cwd("/data", "ro"), Ok(()));
        assert_eq!(try_cwd("/data/new/deep", "ro"), Ok(()));
        let error = try_cwd("/data/none", "ro").unwrap_err();
        assert!(
            error.contains("/data/none") && error.contains("read-only"),
            "{error}"
        );
        assert!(!outer.join("none").exists());
        assert_eq!(fs::read_dir(&rootfs).unwrap().count(), 0);
    }

    #[test]
    fn what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        let image = ImageConfig::default();
        let facts = HostFacts::default();
        let mut options = options(dir.path());
        options.volumes = vec!["/no/such/source:/data".parse().unwrap()];
        let error = write(&dir.path().join("b"), &options, &image, &facts, None).unwrap_err();
        assert!(error.to_string().contains("/no/such/source"), "{error}");
        options.volumes.clear();
        // Not a regular file, as a fifo or a device would be.
        fs::create_dir(dir.path().join("etc/passwd")).unwrap();
        let error = write(&dir.path().join("b"), &options, &image, &facts, None).unwrap_err();
        assert!(error.to_string().contains("etc/passwd"), "{error}");
    }
}
