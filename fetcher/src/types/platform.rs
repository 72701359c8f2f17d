//! Operating system and CPU an image is built for.
//!
//! Invariant: names are normalised to Go's (`amd64`, `arm64`), so equality is matching.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::ParseError;

/// `os/architecture[/variant]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Raw")]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// Go's name of the architecture: `amd64`, `arm64`, …
    pub architecture: String,
    /// `v7`, `v8`, …; `None` when the architecture has only one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// A platform as documents spell it, before normalisation.
#[derive(Deserialize)]
struct Raw {
    os: String,
    architecture: String,
    variant: Option<String>,
}

impl From<Raw> for Platform {
    fn from(raw: Raw) -> Self {
        Self::new(&raw.os, &raw.architecture, raw.variant.as_deref())
    }
}

impl Platform {
    /// A normalised platform: `x86_64` becomes `amd64`, `aarch64` and `arm64/v8` become `arm64`.
    pub fn new(os: &str, architecture: &str, variant: Option<&str>) -> Self {
        let architecture = match architecture.to_ascii_lowercase().as_str() {
            "x86_64" | "x86-64" => "amd64".to_owned(),
            "aarch64" => "arm64".to_owned(),
            "i386" | "i686" | "x86" => "386".to_owned(),
            other => other.to_owned(),
        };
        let variant = variant
            .filter(|v| !v.is_empty() && (architecture != "arm64" || *v != "v8"))
            .map(str::to_owned);
        Self {
            os: os.to_ascii_lowercase(),
            architecture,
            variant,
        }
    }

    /// The platform this program was built for.
    pub fn host() -> Self {
        Self::new("linux", std::env::consts::ARCH, None)
    }

    /// Whether an image for `self` runs on `host`: same system and architecture. The
    /// variant must match only where both name one.
    pub fn runs_on(&self, host: &Self) -> bool {
        self.os == host.os
            && self.architecture == host.architecture
            && match (&self.variant, &host.variant) {
                (Some(ours), Some(theirs)) => ours == theirs,
                (None, _) | (_, None) => true,
            }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut parts = text.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(os), Some(arch), variant, None) if !os.is_empty() && !arch.is_empty() => {
                Ok(Self::new(os, arch, variant))
            }
            _ => Err(ParseError::new(
                "platform",
                text,
                "expected os/architecture[/variant]",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalises_and_matches() {
        let arm: Platform = "linux/aarch64/v8".parse().unwrap();
        assert_eq!(arm.to_string(), "linux/arm64");
        assert!(!arm.runs_on(&"linux/amd64".parse().unwrap()));
        assert!(
            "linux/x86_64"
                .parse::<Platform>()
                .unwrap()
                .runs_on(&Platform::new("linux", "amd64", None))
        );
        for bad in ["linux", "/amd64", "linux/", "a/b/c/d"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
    }
}
