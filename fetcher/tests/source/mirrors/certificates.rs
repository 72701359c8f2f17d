//! Hosts with certificates of their own, and what is trusted there.

use std::path::Path;

use super::*;
use crate::tls::{self_signed, serving};

/// A CA of our own; a server that wants a certificate by it; and in `dir` its `ca.pem`, and
/// `node.cert` and `node.key` by it.
fn private_ca(dir: &Path) -> Arc<rustls::ServerConfig> {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority = ca.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let issue = |name: &str| {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.signed_by(&key, &issuer).unwrap(), key)
    };
    let (node, node_key) = issue("node");
    let (server, server_key) = issue("127.0.0.1");
    std::fs::write(dir.join("ca.pem"), authority.pem()).unwrap();
    std::fs::write(dir.join("node.cert"), node.pem()).unwrap();
    std::fs::write(dir.join("node.key"), node_key.serialize_pem()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.der().clone()).unwrap();
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots),
        provider.clone(),
    )
    .build()
    .unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![server.der().clone()],
            rustls_pki_types::PrivateKeyDer::try_from(server_key.serialize_der()).unwrap(),
        )
        .unwrap();
    Arc::new(config)
}

#[tokio::test]
async fn a_mirror_has_its_own_authority_and_certificates() {
    let case = Case::new(FakeRegistry::builder()).await;
    let files = tempfile::tempdir().unwrap();
    let tls = private_ca(files.path());
    let mirror = case.mirror(FakeRegistry::builder().tls(tls).bearer()).await;
    let section = format!("[host.\"https://{}\"]\n", mirror.url_host());
    let path = |name: &str| files.path().join(name).display().to_string();
    let ca = format!("ca = '{}'\n", path("ca.pem"));
    let client = format!(
        "client = [['{}', '{}']]\n",
        path("node.cert"),
        path("node.key")
    );
    let table = [
        (section.clone(), false),
        (section.clone() + &client, false),
        (section.clone() + &ca, false),
        (section + &ca + &client, true),
    ];
    for (text, served) in table {
        case.hosts(&text);
        let before = (mirror.requests().blobs, case.upstream.requests().blobs);
        let source = case.source();
        assert_eq!(
            case.ten(source.as_ref()).await.unwrap(),
            case.expected_ten()
        );
        assert_eq!(mirror.requests().blobs > before.0, served, "{text}");
        assert_eq!(case.upstream.requests().blobs > before.1, !served, "{text}");
    }
    assert_eq!(mirror.requests().tokens, 1);
}

#[tokio::test]
async fn a_certificate_as_openssl_makes_it_is_trusted_where_it_is_named() {
    let case = Case::new(FakeRegistry::builder()).await;
    let made = |name: &str| {
        let (certificate, key) = self_signed(true);
        std::fs::write(case.dir.path().join(name), certificate.pem()).unwrap();
        (certificate, key)
    };
    let (own, key) = made("own.crt");
    made("other.crt");
    let tls = serving(&own, &key);
    let builder = FakeRegistry::builder().tls(Arc::new(tls));
    let mirror = case.mirror(builder).await;
    for (name, served) in [("other.crt", false), ("own.crt", true)] {
        let ca = case.dir.path().join(name).display().to_string();
        let host = mirror.url_host();
        case.hosts(&format!("[host.\"https://{host}\"]\nca = '{ca}'\n"));
        let got = case.ten(case.source().as_ref()).await.unwrap();
        assert_eq!(got, case.expected_ten());
        assert_eq!(mirror.requests().blobs > 0, served, "{name}");
    }
}
