//! `runtime.v1.ImageService`: as much of it as is looked into on its way.
//!
//! Invariant: as `proto/runtime/v1/images.proto` has it. These messages are read and never
//! sent: what goes on to containerd are the bytes that came.

use crate::message::messages;

/// The service, as it stands in a path.
pub const SERVICE: &str = "/runtime.v1.ImageService/";
/// The method that brings an image, as it stands in a path.
pub const PULL_IMAGE: &str = "/runtime.v1.ImageService/PullImage";

messages! {
    /// Names an image.
    pub struct ImageSpec {
        /// Its reference.
        image: text = 1,
    }

    /// Credentials. What is not given is empty.
    pub struct AuthConfig {
        /// User name.
        username: secret = 1,
        /// Its password.
        password: secret = 2,
        /// Both, with a colon between them, in base64.
        auth: secret = 3,
        /// The registry that they are for.
        server_address: text = 4,
        /// An OAuth2 refresh token.
        identity_token: secret = 5,
        /// A token for the registry itself.
        registry_token: secret = 6,
    }

    /// Asks for an image.
    pub struct PullImageRequest {
        /// Which.
        image: one<ImageSpec> = 1,
        /// By which right.
        auth: one<AuthConfig> = 2,
    }
}
