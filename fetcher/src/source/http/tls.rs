//! Trust anchors and the TLS client configuration.
//!
//! Invariant: certificates are always verified, against the system's authorities plus the
//! configured bundle; there is no switch to turn that off. The system's store is read on
//! the first https connection only, so a node that speaks to loopback needs none.

use std::path::Path;
use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::sync::OnceCell;

use crate::{Error, Result};

/// Installs the TLS provider that libraries without a setting of their own take (the
/// push path). Call it once early in `main`; further calls do nothing.
pub fn install_tls_provider() {
    // An error means that one is installed already, which is what is wanted.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The lazily built client configuration.
#[derive(Clone)]
pub(crate) struct Tls {
    extra: Arc<Vec<CertificateDer<'static>>>,
    config: Arc<OnceCell<Arc<ClientConfig>>>,
}

impl Tls {
    /// Reads and checks `ca_file`, if there is one.
    pub(crate) fn new(ca_file: Option<&Path>) -> Result<Self> {
        let extra = ca_file.map(read_bundle).transpose()?.unwrap_or_default();
        Ok(Self {
            extra: Arc::new(extra),
            config: Arc::default(),
        })
    }

    /// The configuration: ring, TLS 1.2 and 1.3, ALPN h2 then http/1.1.
    pub(crate) async fn config(&self) -> Result<Arc<ClientConfig>, String> {
        self.config
            .get_or_try_init(|| async {
                let extra = self.extra.clone();
                tokio::task::spawn_blocking(move || build(&extra))
                    .await
                    .map_err(|error| error.to_string())?
            })
            .await
            .cloned()
    }
}

/// The certificates of a PEM bundle; at least one.
pub(crate) fn read_bundle(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let pem = std::fs::read(path).map_err(|error| Error::io("read CA file", path, error))?;
    let what = || format!("CA file {}", path.display());
    let certificates = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| Error::malformed(what(), error.to_string()))?;
    if certificates.is_empty() {
        return Err(Error::malformed(what(), "it holds no PEM certificate"));
    }
    Ok(certificates)
}

fn build(extra: &[CertificateDer<'static>]) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    let system = rustls_native_certs::load_native_certs();
    for error in &system.errors {
        tracing::warn!(error = %error, "cannot read a system certificate");
    }
    roots.add_parsable_certificates(system.certs);
    for certificate in extra {
        roots
            .add(certificate.clone())
            .map_err(|error| format!("the CA file holds an unusable certificate: {error}"))?;
    }
    if roots.is_empty() {
        return Err(
            "no certificate authorities on this machine; install ca-certificates or set ca_file"
                .to_owned(),
        );
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_which_ca_file_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("ca.pem");
        std::fs::write(&empty, "no certificate here\n").unwrap();
        let message = Tls::new(Some(&empty)).err().unwrap().to_string();
        assert!(
            message.ends_with("ca.pem is malformed: it holds no PEM certificate"),
            "{message}"
        );
        let missing = Tls::new(Some(&dir.path().join("none.pem")))
            .err()
            .unwrap()
            .to_string();
        assert!(missing.starts_with("cannot read CA file "), "{missing}");
    }
}
