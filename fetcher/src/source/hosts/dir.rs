//! Directories with a directory per registry: which one is a registry's, and what is in it.
//!
//! ```text
//! registry.lan_5000_/hosts.toml     for registry.lan:5000; or
//! registry.lan:5000/hosts.toml      or
//! _default/hosts.toml               for all that have no directory of their own
//! registry.lan/ca.crt               without hosts.toml: authorities that docker trusts,
//! registry.lan/node.cert, node.key  and certificates that it shows
//! ```
//!
//! Invariant: reads, never writes; every file is bounded. The first directory that exists is
//! the registry's, whatever is in it; of several that hold them, the first that has one, be it
//! `_default`. Whoever asks again learns by [`Stamp`] whether anything
//! that was looked at has changed since, what was missing included. Blocks.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::parse::{self, FILE_BYTES_MAX};
use super::{ClientFiles, Host, Hosts};
use crate::source::http::tls::{self, Certificates};
use crate::{Error, Result};

/// Entries of a directory of certificates that are looked at.
const ENTRIES_MAX: usize = 1024;
const DEFAULT_DIR: &str = "_default";

/// A host with the contents of its files.
#[derive(Debug, Clone)]
pub(crate) struct Ready {
    /// What is written about it.
    pub(crate) host: Host,
    /// Its certificates.
    pub(crate) certificates: Certificates,
}

/// What was looked at, and what it was like.
#[derive(Debug, Default)]
pub(crate) struct Stamp(Vec<(PathBuf, Option<Mark>)>);

/// What changes when a file is written or replaced, or a directory's entries change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    modified: Option<SystemTime>,
    len: u64,
    inode: u64,
}

impl Stamp {
    /// Whether all of it is still like that.
    pub(crate) fn holds(&self) -> bool {
        let is_same = |(path, mark): &(PathBuf, Option<Mark>)| mark_of(path).ok() == Some(*mark);
        self.0.iter().all(is_same)
    }

    /// Notes what `path` is like before it is read; whether it is there.
    fn look(&mut self, path: &Path) -> Result<bool> {
        let mark = mark_of(path);
        // What cannot be looked at is noted too: it never holds, so it is tried again.
        let noted = mark.as_ref().map_or(None, |mark| *mark);
        self.0.push((path.to_path_buf(), noted));
        let found = mark.map_err(|error| Error::io("read", path, error))?;
        Ok(found.is_some())
    }
}

fn mark_of(path: &Path) -> io::Result<Option<Mark>> {
    match std::fs::metadata(path) {
        Ok(found) => Ok(Some(Mark {
            modified: found.modified().ok(),
            len: found.len(),
            inode: found.ino(),
        })),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// The hosts of the registry `host` (as it stands in a reference), the last one to be asked
/// last; `None` if no root says anything about it. `is_plain`: whether the registry is spoken
/// to without TLS.
pub(crate) fn load(
    stamp: &mut Stamp,
    roots: &[PathBuf],
    host: &str,
    is_plain: bool,
) -> Result<Option<Vec<Ready>>> {
    let mut found = None;
    let names = names(host);
    let dirs = roots
        .iter()
        .flat_map(|root| names.iter().map(|name| root.join(name)));
    for dir in dirs {
        if stamp.look(&dir)? {
            found = Some(dir);
            break;
        }
    }
    let Some(dir) = found else {
        return Ok(None);
    };
    let hosts = read_dir(stamp, &dir, is_plain)?;
    let all = hosts.mirrors.into_iter().chain([hosts.server]);
    let ready = all.map(|host| {
        let certificates = read_certificates(stamp, &host)?;
        Ok(Ready { host, certificates })
    });
    ready.collect::<Result<Vec<_>>>().map(Some)
}

/// What is said of the registry `host` itself; nothing where another stands in for it.
pub(crate) fn load_own(roots: &[PathBuf], host: &str, is_plain: bool) -> Result<Option<Ready>> {
    let found = load(&mut Stamp::default(), roots, host, is_plain)?;
    let is_own = |ready: &Ready| {
        let endpoint = ready.host.endpoint.as_ref();
        endpoint.is_none_or(|endpoint| endpoint.host() == host)
    };
    Ok(found.and_then(|mut hosts| hosts.pop()).filter(is_own))
}

/// Names that the directory of `host` may have, the first of them first.
fn names(host: &str) -> Vec<String> {
    let mut names = Vec::with_capacity(3);
    if let Some((name, port)) = host.rsplit_once(':').filter(|(name, _)| !name.is_empty()) {
        names.push(format!("{name}_{port}_"));
    }
    names.push(host.to_owned());
    names.push(DEFAULT_DIR.to_owned());
    names
}

fn read_dir(stamp: &mut Stamp, dir: &Path, is_plain: bool) -> Result<Hosts> {
    let file = dir.join("hosts.toml");
    let text = if stamp.look(&file)? {
        read_text(&file)?
    } else {
        String::new()
    };
    if !text.is_empty() {
        let file = &file;
        return parse::parse(&text, parse::Origin { file, is_plain });
    }
    let server = docker_files(stamp, dir)?;
    Ok(Hosts {
        mirrors: Vec::new(),
        server,
    })
}

fn read_text(path: &Path) -> Result<String> {
    let fail = |error| Error::io("read", path, error);
    let file = File::open(path).map_err(fail)?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(fail)?;
    let what = path.display().to_string();
    if bytes.len() as u64 > FILE_BYTES_MAX {
        let detail = format!("it is larger than {FILE_BYTES_MAX} bytes");
        return Err(Error::limit(what, detail));
    }
    String::from_utf8(bytes).map_err(|_| Error::malformed(what, "it is not UTF-8"))
}

/// The registry itself, with the certificates that lie in its directory.
fn docker_files(stamp: &mut Stamp, dir: &Path) -> Result<Host> {
    let fail = |error| Error::io("read", dir, error);
    let mut host = Host::upstream();
    let mut entries = match std::fs::read_dir(dir) {
        // A plain file of the name says nothing.
        Err(error) if is_absent(&error) => return Ok(host),
        entries => entries.map_err(fail)?,
    };
    let mut names = Vec::new();
    for entry in entries.by_ref().take(ENTRIES_MAX) {
        names.push(entry.map_err(fail)?.path());
    }
    if entries.next().is_some() {
        let what = dir.display().to_string();
        return Err(Error::limit(
            what,
            format!("more than {ENTRIES_MAX} entries"),
        ));
    }
    names.sort();
    for path in names.into_iter().filter(|path| path.is_file()) {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => host.ca.push(path),
            Some("cert") => {
                let key = path.with_extension("key");
                let key = stamp.look(&key)?.then_some(key);
                let certificate = path;
                host.client.push(ClientFiles { certificate, key });
            }
            Some(_) | None => {}
        }
    }
    Ok(host)
}

fn read_certificates(stamp: &mut Stamp, host: &Host) -> Result<Certificates> {
    let mut certificates = Certificates::default();
    for path in &host.ca {
        stamp.look(path)?;
        certificates.authorities.extend(tls::read_bundle(path)?);
    }
    for pair in &host.client {
        stamp.look(&pair.certificate)?;
        if let Some(key) = &pair.key {
            stamp.look(key)?;
        }
        let identity = tls::read_identity(&pair.certificate, pair.key.as_deref())?;
        certificates.identities.push(identity);
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests;
