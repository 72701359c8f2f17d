//! Whose word for a layer index counts.
//!
//! An index that this node did not make, and that the image does not name, says where the
//! files of a layer are and what their bytes hash to: whoever writes it decides what is
//! read. So it is used only with an Ed25519 signature by a key that the config trusts.
//! Invariant: a signature binds one index to one layer; it is worth nothing for another
//! layer, another index or another kind of document. Never reads the network.
//!
//! Keys are what `openssl genpkey -algorithm ed25519` writes (PKCS#8, PEM) and what
//! `openssl pkey -pubout` makes of them (SubjectPublicKeyInfo, PEM). A signature is 64 bytes
//! in base64, over the text
//!
//! ```text
//! lazarette layer index\n
//! <blob digest of the layer>\n
//! <digest of the index's core>\n
//! ```

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer};

use crate::types::Digest;
use crate::{Error, Result};

/// Largest key file that is read. A key takes some hundred bytes.
const KEY_BYTES_MAX: u64 = 64 << 10;
/// Most keys that are tried for one signature.
pub const KEYS_MAX: usize = 64;
/// A SubjectPublicKeyInfo of Ed25519 up to the key itself (RFC 8410): there is one spelling.
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 3, 0x21, 0];

/// What a signature is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statement {
    /// The layer.
    pub blob_digest: Digest,
    /// Digest of the core of its index, which has the digests of the rest.
    pub core_digest: Digest,
}

impl Statement {
    fn message(&self) -> String {
        let Self {
            blob_digest,
            core_digest,
        } = self;
        format!("lazarette layer index\n{blob_digest}\n{core_digest}\n")
    }
}

/// The keys whose signatures count.
#[derive(Debug, Clone, Default)]
pub struct TrustedKeys {
    keys: Vec<TrustedKey>,
}

#[derive(Debug, Clone)]
struct TrustedKey {
    path: PathBuf,
    public: [u8; 32],
}

impl TrustedKeys {
    /// Reads public keys, at most [`KEYS_MAX`]. A file that is not one is an error: a node
    /// that silently trusts fewer keys than it was told would pull everything whole.
    pub fn load(paths: &[PathBuf]) -> Result<Self> {
        if paths.len() > KEYS_MAX {
            let detail = format!("{} keys, at most {KEYS_MAX} are tried", paths.len());
            return Err(Error::limit("trust.index_keys", detail));
        }
        let keys = paths.iter().map(|path| TrustedKey::read(path));
        Ok(Self {
            keys: keys.collect::<Result<_>>()?,
        })
    }

    /// Whether no signature can count.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The file of the key that made `signature` (base64) of `statement`, if one did.
    pub fn signer(&self, statement: &Statement, signature: &str) -> Option<&Path> {
        let signature = BASE64.decode(signature).ok()?;
        let message = statement.message();
        let made_it = |key: &&TrustedKey| {
            let public = UnparsedPublicKey::new(&ED25519, key.public);
            public.verify(message.as_bytes(), &signature).is_ok()
        };
        self.keys.iter().find(made_it).map(|key| &*key.path)
    }
}

impl TrustedKey {
    fn read(path: &Path) -> Result<Self> {
        let pem = read_key(path)?;
        let spki = SubjectPublicKeyInfoDer::from_pem_slice(&pem)
            .map_err(|error| not_a_key(path, "public", &error.to_string()))?;
        let public = spki.strip_prefix(&SPKI_PREFIX[..]);
        let public = public.and_then(|key| key.try_into().ok());
        let public = public.ok_or_else(|| not_a_key(path, "public", "it is of another kind"))?;
        Ok(Self {
            path: path.to_path_buf(),
            public,
        })
    }
}

/// A key that signs indexes.
pub struct SigningKey {
    pair: Ed25519KeyPair,
}

impl SigningKey {
    /// Reads a private key.
    pub fn read(path: &Path) -> Result<Self> {
        let pem = read_key(path)?;
        let der = PrivatePkcs8KeyDer::from_pem_slice(&pem)
            .map_err(|error| not_a_key(path, "private", &error.to_string()))?;
        // openssl leaves the public half out, which there is then nothing to check against.
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der())
            .map_err(|error| not_a_key(path, "private", &error.to_string()))?;
        Ok(Self { pair })
    }

    /// The signature of `statement`, in base64.
    pub fn sign(&self, statement: &Statement) -> String {
        BASE64.encode(self.pair.sign(statement.message().as_bytes()))
    }

    /// The public half as PEM, for who shall trust it.
    pub fn public_pem(&self) -> String {
        let der = [&SPKI_PREFIX[..], self.pair.public_key().as_ref()].concat();
        let text = BASE64.encode(der);
        format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n")
    }
}

impl std::fmt::Debug for SigningKey {
    /// Nothing of the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SigningKey").finish_non_exhaustive()
    }
}

fn read_key(path: &Path) -> Result<Vec<u8>> {
    let io = |error| Error::io("read", path, error);
    let len = std::fs::metadata(path).map_err(io)?.len();
    if len > KEY_BYTES_MAX {
        let detail = format!("{len} bytes, at most {KEY_BYTES_MAX}");
        return Err(Error::limit(format!("key {}", path.display()), detail));
    }
    std::fs::read(path).map_err(io)
}

fn not_a_key(path: &Path, half: &str, why: &str) -> Error {
    let option = if half == "private" { "" } else { " -pubout" };
    Error::malformed(
        format!("key {}", path.display()),
        format!(
            "it is not an Ed25519 {half} key in PEM ({why}); `openssl genpkey -algorithm ed25519` \
             makes a private one, `openssl pkey{option}` prints it"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` (3.0.19).
    const PRIVATE: &str = include_str!("../tests/fixtures/index-key.pem");
    const PUBLIC: &str = include_str!("../tests/fixtures/index-key.pub");

    fn statement() -> Statement {
        Statement {
            blob_digest: Digest::sha256(b"layer"),
            core_digest: Digest::sha256(b"core"),
        }
    }

    fn file(dir: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn a_signature_counts_for_its_statement_and_key_only() {
        let dir = tempfile::tempdir().unwrap();
        let key = SigningKey::read(&file(&dir, "key", PRIVATE)).unwrap();
        assert_eq!(key.public_pem(), PUBLIC, "as openssl prints it");
        let public = file(&dir, "pub", PUBLIC);
        let trusted = TrustedKeys::load(std::slice::from_ref(&public)).unwrap();
        let signature = key.sign(&statement());
        assert_eq!(trusted.signer(&statement(), &signature), Some(&*public));
        let (layer, core) = (statement(), statement());
        let others = [
            Statement {
                blob_digest: Digest::sha256(b"other"),
                ..layer
            },
            Statement {
                core_digest: Digest::sha256(b"other"),
                ..core
            },
        ];
        for other in others {
            assert_eq!(trusted.signer(&other, &signature), None);
        }
        let flipped = key.sign(&others[0]);
        for bad in ["", "!", "AAAA", flipped.as_str()] {
            assert_eq!(trusted.signer(&statement(), bad), None, "{bad}");
        }
        assert_eq!(
            TrustedKeys::default().signer(&statement(), &signature),
            None
        );
    }

    #[test]
    fn what_is_no_key_is_said_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let rsa = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VuAyEA\n-----END PUBLIC KEY-----\n";
        for text in ["", "hello", PRIVATE, rsa] {
            let path = file(&dir, "bad.pub", text);
            let error = TrustedKeys::load(&[path]).unwrap_err().to_string();
            assert!(
                error.contains("bad.pub") && error.contains("openssl"),
                "{error}"
            );
        }
        let path = file(&dir, "bad.pem", PUBLIC);
        let error = SigningKey::read(&path).unwrap_err().to_string();
        assert!(error.contains("not an Ed25519 private key"), "{error}");
        let many = vec![file(&dir, "pub", PUBLIC); KEYS_MAX + 1];
        assert!(TrustedKeys::load(&many).is_err());
        assert!(TrustedKeys::load(&[dir.path().join("absent")]).is_err());
        let large = file(&dir, "large", &"x".repeat(70_000));
        assert!(TrustedKeys::load(&[large]).is_err());
    }
}
