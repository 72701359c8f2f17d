//! Why there is no filter.

use std::io;

/// A step that libseccomp or the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {source}")]
pub struct SeccompError {
    pub(crate) what: String,
    pub(crate) source: io::Error,
}

impl SeccompError {
    pub(crate) fn new(what: impl Into<String>, source: io::Error) -> Self {
        Self {
            what: what.into(),
            source,
        }
    }

    /// libseccomp answers with the negative of an error number.
    pub(crate) fn of_answer(what: impl Into<String>, answer: i32) -> Self {
        Self::new(what, io::Error::from_raw_os_error(answer.saturating_neg()))
    }
}
