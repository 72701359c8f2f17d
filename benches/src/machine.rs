//! This machine and the registry before a cold start.
//!
//! Invariant: after `make_cold` nothing of an image is in this machine's page cache but the
//! registry's own files, which are read once: the registry stands for a remote one, whose disk
//! is not what is compared.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::http::Connection;
use crate::process;

/// Digests of all blobs of `image:tag`, as a registry at `host` has them; none if it has no such tag.
pub(crate) fn blobs(host: &str, image: &str, tag: &str) -> Result<Option<Vec<String>>> {
    let mut connection = Connection::open(host)?;
    let (mut found, mut wanted) = (Vec::new(), vec![tag.to_owned()]);
    while let Some(name) = wanted.pop() {
        let mut body = Vec::new();
        let path = format!("/v2/{image}/manifests/{name}");
        match connection.get(&path, None, &mut body)? {
            200 => {}
            404 => return Ok(None),
            status => anyhow::bail!("{path}: {status}"),
        }
        let manifest: Value = serde_json::from_slice(&body).context(path)?;
        // A list of manifests, or the config and layers of one.
        wanted.extend(digests(manifest.get("manifests")));
        found.extend(digests(manifest.get("layers")));
        found.extend(digest(manifest.get("config")));
    }
    Ok(Some(found))
}

fn digests(list: Option<&Value>) -> Vec<String> {
    let list = list.and_then(Value::as_array);
    list.into_iter()
        .flatten()
        .filter_map(|d| digest(Some(d)))
        .collect()
}

fn digest(descriptor: Option<&Value>) -> Option<String> {
    Some(descriptor?.get("digest")?.as_str()?.to_owned())
}

/// Drops the page cache, then has the registry at `host` read `blobs` of `image` once.
pub(crate) fn make_cold(host: &str, image: &str, blobs: &[String]) -> Result<()> {
    process::run(&mut Command::new("sync"))?;
    fs::write("/proc/sys/vm/drop_caches", "3")
        .context("drop the page cache (cold starts need root and a writable /proc/sys)")?;
    let mut connection = Connection::open(host)?;
    for blob in blobs {
        let path = format!("/v2/{image}/blobs/{blob}");
        let status = connection.get(&path, None, &mut std::io::sink())?;
        anyhow::ensure!(status == 200, "{path}: {status}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_come_from_descriptors_only() {
        let manifest: Value = serde_json::from_str(
            r#"{"config": {"digest": "c"}, "layers": [{"digest": "a"}, {"size": 1}, {"digest": 7}]}"#,
        )
        .unwrap();
        assert_eq!(digests(manifest.get("layers")), ["a"]);
        assert_eq!(digests(manifest.get("manifests")), [""; 0]);
        assert_eq!(digest(manifest.get("config")).as_deref(), Some("c"));
    }
}
