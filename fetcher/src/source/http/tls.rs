//! Trust anchors, the node's own certificates, and the TLS client configuration.
//!
//! Invariant: certificates are always verified, against the system's authorities plus the
//! configured ones; there is no switch to turn that off. The system's store is read on
//! the first https connection only, so a node that speaks to loopback needs none.

mod named;

use std::io::{self, Read as _};
use std::path::Path;
use std::sync::Arc;

pub(crate) use self::named::is_of_authority;
use rustls::client::ResolvesClientCert;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::OnceCell;

use crate::{Error, Result};

/// Largest file with certificates or a key; the system's bundle of all authorities has
/// a fifth of that.
const PEM_BYTES_MAX: u64 = 1 << 20;

/// Installs the TLS provider that libraries without a setting of their own take (the
/// push path). Call it once early in `main`; further calls do nothing.
pub fn install_tls_provider() {
    // An error means that one is installed already, which is what is wanted.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// Certificates that go with one host.
#[derive(Debug, Clone, Default)]
pub(crate) struct Certificates {
    /// Authorities that are trusted there besides the system's and the config's.
    pub(crate) authorities: Vec<CertificateDer<'static>>,
    /// What this node shows if it is asked who it is; one of them.
    pub(crate) identities: Vec<Arc<CertifiedKey>>,
}

impl Certificates {
    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.authorities.is_empty() && self.identities.is_empty()
    }
}

/// The lazily built client configuration.
#[derive(Clone)]
pub(crate) struct Tls {
    certificates: Arc<Certificates>,
    config: Arc<OnceCell<Arc<ClientConfig>>>,
}

impl Tls {
    /// Reads and checks `ca_file`, if there is one; `own` come on top of it.
    pub(crate) fn new(ca_file: Option<&Path>, own: Certificates) -> Result<Self> {
        let mut certificates = own;
        let extra = ca_file.map(read_bundle).transpose()?.unwrap_or_default();
        certificates.authorities.extend(extra);
        Ok(Self {
            certificates: Arc::new(certificates),
            config: Arc::default(),
        })
    }

    /// The configuration: ring, TLS 1.2 and 1.3, ALPN h2 then http/1.1.
    pub(crate) async fn config(&self) -> Result<Arc<ClientConfig>, String> {
        self.config
            .get_or_try_init(|| async {
                let certificates = self.certificates.clone();
                tokio::task::spawn_blocking(move || build(&certificates))
                    .await
                    .map_err(|error| error.to_string())?
            })
            .await
            .cloned()
    }
}

/// The certificates of a PEM bundle; at least one.
pub(crate) fn read_bundle(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let pem = read(path, "read CA file")?;
    certificates(&pem, || format!("CA file {}", path.display()))
}

/// A certificate of this node with the chain that leads to it, and its key, which may be in
/// the same file.
pub(crate) fn read_identity(certificate: &Path, key: Option<&Path>) -> Result<Arc<CertifiedKey>> {
    let what = || format!("client certificate {}", certificate.display());
    let pem = read(certificate, "read client certificate")?;
    let chain = certificates(&pem, what)?;
    let key_pem = match key {
        Some(path) => read(path, "read client key")?,
        None => pem,
    };
    let in_file = key.unwrap_or(certificate).display();
    let key = PrivateKeyDer::from_pem_slice(&key_pem)
        .map_err(|error| Error::malformed(what(), format!("its key in {in_file}: {error}")))?;
    let provider = rustls::crypto::ring::default_provider();
    let pair = CertifiedKey::from_der(chain, key, &provider)
        .map_err(|error| Error::malformed(what(), format!("its key in {in_file}: {error}")))?;
    Ok(Arc::new(pair))
}

fn read(path: &Path, op: &'static str) -> Result<Vec<u8>> {
    let mut pem = Vec::new();
    let file = std::fs::File::open(path).map_err(|error| Error::io(op, path, error))?;
    file.take(PEM_BYTES_MAX + 1)
        .read_to_end(&mut pem)
        .map_err(|error| Error::io(op, path, error))?;
    if pem.len() as u64 > PEM_BYTES_MAX {
        let what = path.display().to_string();
        return Err(Error::limit(what, "it is larger than 1 MiB"));
    }
    Ok(pem)
}

fn certificates(pem: &[u8], what: impl Fn() -> String) -> Result<Vec<CertificateDer<'static>>> {
    let certificates = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| Error::malformed(what(), error.to_string()))?;
    if certificates.is_empty() {
        return Err(Error::malformed(what(), "it holds no PEM certificate"));
    }
    Ok(certificates)
}

fn build(certificates: &Certificates) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    let system = rustls_native_certs::load_native_certs();
    for error in &system.errors {
        tracing::warn!(error = %error, "cannot read a system certificate");
    }
    roots.add_parsable_certificates(system.certs);
    for certificate in &certificates.authorities {
        roots
            .add(certificate.clone())
            .map_err(|error| format!("a CA file holds an unusable certificate: {error}"))?;
    }
    if roots.is_empty() {
        return Err(
            "no certificate authorities on this machine; install ca-certificates or set ca_file"
                .to_owned(),
        );
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = named::Verifier::new(roots, Arc::clone(&provider))?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        // It is called so for those who verify less; see there.
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = if certificates.identities.is_empty() {
        builder.with_no_client_auth()
    } else {
        let identities = certificates.identities.clone();
        builder.with_client_cert_resolver(Arc::new(Identities(identities)))
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Why a server's certificate was refused, if that is what happened.
pub(crate) fn refused(error: &io::Error) -> Option<&rustls::Error> {
    let inner = error.get_ref()?;
    if let Some(deeper) = inner.downcast_ref::<io::Error>() {
        return refused(deeper);
    }
    let error = inner.downcast_ref::<rustls::Error>()?;
    matches!(error, rustls::Error::InvalidCertificate(_)).then_some(error)
}

/// Which of several certificates to show.
#[derive(Debug)]
struct Identities(Vec<Arc<CertifiedKey>>);

impl Identities {
    /// The first by an authority that the server names, else the first that it can check.
    fn choose(&self, authorities: &[&[u8]], schemes: &[SignatureScheme]) -> Option<usize> {
        let fits = |pair: &CertifiedKey| pair.key.choose_scheme(schemes).is_some();
        // A certificate holds its issuer's name byte for byte as the server sends it.
        let is_by = |pair: &CertifiedKey| {
            let mut names = authorities.iter().filter(|name| !name.is_empty());
            names.any(|name| pair.cert.iter().any(|one| contains(one.as_ref(), name)))
        };
        let named = self.0.iter().position(|pair| fits(pair) && is_by(pair));
        named.or_else(|| self.0.iter().position(|pair| fits(pair)))
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

impl ResolvesClientCert for Identities {
    fn resolve(
        &self,
        authorities: &[&[u8]],
        schemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        self.0.get(self.choose(authorities, schemes)?).cloned()
    }

    fn has_certs(&self) -> bool {
        !self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_which_ca_file_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("ca.pem");
        std::fs::write(&empty, "no certificate here\n").unwrap();
        let message = Tls::new(Some(&empty), Certificates::default())
            .err()
            .unwrap()
            .to_string();
        assert!(
            message.ends_with("ca.pem is malformed: it holds no PEM certificate"),
            "{message}"
        );
        let missing = Tls::new(Some(&dir.path().join("none.pem")), Certificates::default())
            .err()
            .unwrap()
            .to_string();
        assert!(missing.starts_with("cannot read CA file "), "{missing}");
    }

    /// A certificate by an authority of this name.
    fn issued(dir: &Path, authority: &str) -> Arc<CertifiedKey> {
        let ca_key = rcgen::KeyPair::generate().unwrap();
        let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
        ca.distinguished_name = rcgen::DistinguishedName::new();
        ca.distinguished_name
            .push(rcgen::DnType::CommonName, authority);
        let issuer = rcgen::Issuer::new(ca, ca_key);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec!["node".to_owned()])
            .unwrap()
            .signed_by(&key, &issuer)
            .unwrap();
        let file = dir.join(format!("{authority}.pem"));
        std::fs::write(&file, certificate.pem() + &key.serialize_pem()).unwrap();
        read_identity(&file, None).unwrap()
    }

    #[test]
    fn shows_what_the_server_asks_for() {
        let dir = tempfile::tempdir().unwrap();
        let issued = |authority| issued(dir.path(), authority);
        let identities = Identities(vec![issued("authority-one"), issued("authority-two")]);
        // What a server sends ends with this, and so does the name in the certificate.
        let two = "authority-two";
        let schemes = [SignatureScheme::ECDSA_NISTP256_SHA256];
        type Asked<'a> = (&'a [&'a [u8]], &'a [SignatureScheme], Option<usize>);
        let table: [Asked<'_>; 4] = [
            (&[], &schemes, Some(0)),
            (&[b"", b"nobody"], &schemes, Some(0)),
            (&[two.as_bytes()], &schemes, Some(1)),
            (
                &[two.as_bytes()],
                &[SignatureScheme::RSA_PKCS1_SHA256],
                None,
            ),
        ];
        for (authorities, schemes, expected) in table {
            let got = identities.choose(authorities, schemes);
            assert_eq!(got, expected, "{authorities:?}");
        }
    }

    #[test]
    fn says_which_client_certificate_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(format!("{name}.pem"));
        issued(dir.path(), "a");
        issued(dir.path(), "b");
        std::fs::write(file("empty"), "").unwrap();
        let table = [
            ("a", Some("b"), "a.pem is malformed: its key in "),
            ("a", Some("empty"), "a.pem is malformed: its key in "),
            ("a", Some("none"), "cannot read client key "),
            ("none", None, "cannot read client certificate "),
            (
                "empty",
                None,
                "empty.pem is malformed: it holds no PEM certificate",
            ),
        ];
        for (certificate, key, expected) in table {
            let key = key.map(file);
            let got = read_identity(&file(certificate), key.as_deref());
            let message = got.err().unwrap().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
