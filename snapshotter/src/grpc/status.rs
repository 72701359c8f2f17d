//! The one table from errors to gRPC's statuses.
//!
//! Containerd reacts to four of them: `NotFound` and `AlreadyExists` are often what it hoped
//! for, `FailedPrecondition` and `InvalidArgument` are the caller's doing. Never `NotFound`
//! for bytes that a registry lacks: it would be taken for the snapshot.

use lazarette_fetcher::Error as StoreError;
use lazarette_proto::Status;
use tonic::Code;

use crate::{Error, sys};

/// What the client is told about `error`.
pub(super) fn of(error: &Error) -> Status {
    Status::new(code(error), error.to_string())
}

fn code(error: &Error) -> Code {
    match error {
        Error::NotFound { .. } => Code::NotFound,
        Error::AlreadyExists { .. } => Code::AlreadyExists,
        Error::Precondition { .. } | Error::Environment { .. } => Code::FailedPrecondition,
        Error::Invalid { .. } => Code::InvalidArgument,
        Error::Mount { source, .. } if sys::has_no_descriptors(source) => Code::ResourceExhausted,
        Error::Mount { .. } => Code::Internal,
        Error::Store(error) => match error {
            StoreError::NotFound { .. }
            | StoreError::Denied { .. }
            | StoreError::RateLimited { .. }
            | StoreError::Unavailable { .. }
            | StoreError::Db { .. } => Code::Unavailable,
            StoreError::Corrupt { .. } | StoreError::Malformed { .. } => Code::DataLoss,
            StoreError::Limit { .. } => Code::FailedPrecondition,
            StoreError::NoSpace { .. } => Code::ResourceExhausted,
            StoreError::Unsupported { .. } => Code::Unimplemented,
            StoreError::Io { source, .. } if sys::has_no_descriptors(source) => {
                Code::ResourceExhausted
            }
            StoreError::Io { .. } => Code::Internal,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn every_error_has_its_status() {
        let key = || "k".to_owned();
        let table: Vec<(Error, Code)> = vec![
            (Error::NotFound { key: key() }, Code::NotFound),
            (Error::AlreadyExists { key: key() }, Code::AlreadyExists),
            (
                Error::Precondition {
                    op: "remove",
                    key: key(),
                    detail: key(),
                },
                Code::FailedPrecondition,
            ),
            (
                Error::Invalid {
                    what: "key",
                    input: key(),
                    detail: "it is empty",
                },
                Code::InvalidArgument,
            ),
            (
                StoreError::NotFound {
                    what: key(),
                    host: key(),
                }
                .into(),
                Code::Unavailable,
            ),
            (
                Error::io("write", "/x", io::ErrorKind::StorageFull.into()),
                Code::ResourceExhausted,
            ),
            (
                Error::io("open", "/x", io::Error::from_raw_os_error(24)),
                Code::ResourceExhausted,
            ),
            (
                Error::io("write", "/x", io::ErrorKind::Other.into()),
                Code::Internal,
            ),
            (
                Error::mount("show", "/x".as_ref(), io::Error::from_raw_os_error(24)),
                Code::ResourceExhausted,
            ),
            (
                Error::mount("show", "/x".as_ref(), io::Error::from_raw_os_error(16)),
                Code::Internal,
            ),
            (StoreError::malformed("x", "y").into(), Code::DataLoss),
            (StoreError::limit("x", "y").into(), Code::FailedPrecondition),
        ];
        for (error, code) in table {
            let status = of(&error);
            assert_eq!(status.code(), code, "{error}");
            assert_eq!(status.message(), error.to_string());
        }
    }
}
