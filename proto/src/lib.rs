//! Messages and services of containerd's API, as much of it as is served here.
//!
//! Invariant: what is declared here agrees with the definition files in `proto/proto`; a
//! test reads those and compares names, numbers and types. There is no generated code and no
//! compiler for it: a message is a struct declared by the macro in `message`, a service a
//! trait with a server and a client side declared by the one in `service`. Imports nothing
//! of ours, and nothing below the gRPC edges imports this.

#![forbid(unsafe_code)]

pub mod images;
mod message;
mod service;
pub mod snapshots;
pub mod types;

pub use message::{Codec, Declared, Secret};
pub use prost::{DecodeError, Message};
pub use service::Streamed;
pub use tonic::Status;

/// Largest message accepted, bytes: containerd's own limit.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
