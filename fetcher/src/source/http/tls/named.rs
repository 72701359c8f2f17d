//! Servers' certificates: by an authority that is trusted, or that authority's own.
//!
//! A certificate that `openssl req -x509` makes, as docker's guide to a registry does, says of
//! itself that it is an authority's. webpki takes none of these for a server's, whoever trusts it;
//! Go, and so docker and containerd, does where it is itself among the trusted ones.
//!
//! Invariant: what webpki refuses stays refused, for whatever reason but that one; and then only
//! what has the name and the key of a trusted authority passes, which could sign itself any
//! certificate. webpki has checked its dates by then, its name is checked here, and that the
//! server has its key by the handshake; what it says that its key is for is not looked at.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Verifier {
    trusted: Arc<RootCertStore>,
    usual: Arc<WebPkiServerVerifier>,
}

impl Verifier {
    /// Trusts the authorities `trusted`, at least one.
    pub(super) fn new(
        trusted: RootCertStore,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, String> {
        let trusted = Arc::new(trusted);
        let builder = WebPkiServerVerifier::builder_with_provider(Arc::clone(&trusted), provider);
        let usual = builder.build().map_err(|error| error.to_string())?;
        Ok(Self { trusted, usual })
    }

    /// Whether it is a certificate of a trusted authority itself.
    fn is_trusted(&self, certificate: &CertificateDer<'_>) -> bool {
        let mut alone = RootCertStore::empty();
        alone.add(certificate.clone().into_owned()).is_ok()
            && alone
                .roots
                .iter()
                .all(|one| self.trusted.roots.contains(one))
    }
}

/// Whether all there is to say against a certificate is that it is an authority's.
pub(crate) fn is_of_authority(error: &Error) -> bool {
    let Error::InvalidCertificate(CertificateError::Other(other)) = error else {
        return false;
    };
    matches!(
        other.0.downcast_ref::<webpki::Error>(),
        Some(webpki::Error::CaUsedAsEndEntity)
    )
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let usual = self.usual.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        match usual {
            Err(error) if is_of_authority(&error) && self.is_trusted(end_entity) => {
                let parsed = ParsedCertificate::try_from(end_entity)?;
                verify_server_name(&parsed, server_name)?;
                Ok(ServerCertVerified::assertion())
            }
            usual => usual,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let usual = &self.usual;
        usual.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let usual = &self.usual;
        usual.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.usual.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    /// One that names `host` and says it is an authority's.
    fn own(key: &KeyPair, host: &str, days: std::ops::Range<i64>) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        let day = |days: i64| epoch + Duration::from_secs(86_400 * days.unsigned_abs());
        (params.not_before, params.not_after) = (day(days.start), day(days.end));
        params.self_signed(key).unwrap().der().clone()
    }

    fn check(trusted: &CertificateDer<'static>, shown: &CertificateDer<'_>) -> Result<(), Error> {
        let mut roots = RootCertStore::empty();
        roots.add(trusted.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = Verifier::new(roots, provider).unwrap();
        let name = ServerName::try_from("registry.lan").unwrap();
        let now = UnixTime::since_unix_epoch(Duration::from_secs(86_400 * 100));
        let verified = verifier.verify_server_cert(shown, &[], &name, &[], now);
        verified.map(drop)
    }

    #[test]
    fn an_authority_serves_with_its_own_certificate() {
        let (key, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let named = own(&key, "registry.lan", 50..150);
        check(&named, &named).unwrap();
        let refused = |trusted: &CertificateDer<'static>, shown: &CertificateDer<'_>| {
            check(trusted, shown).unwrap_err().to_string()
        };
        let error = refused(&own(&other, "registry.lan", 50..150), &named);
        assert!(error.contains("CaUsedAsEndEntity"), "another's: {error}");
        let elsewhere = own(&key, "other.lan", 50..150);
        let error = refused(&elsewhere, &elsewhere);
        assert!(error.contains("not valid for name"), "{error}");
        for (days, reason) in [(50..99, "expired"), (101..150, "not valid yet")] {
            let late = own(&key, "registry.lan", days);
            let error = refused(&late, &late);
            assert!(error.contains(reason), "{error}");
        }
    }
}
