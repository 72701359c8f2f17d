//! A client's end of a unix socket, for tests and benchmarks: one HTTP/2 connection, as
//! containerd has one.
//!
//! Invariant: a request that is dropped is reset, and the connection ends with the last
//! clone. Never used by what is shipped.

use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper::client::conn::http2::{self, SendRequest};
use hyper::{Request, Response, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, StdError};

/// A connection. Clones are one.
#[derive(Clone)]
pub(crate) struct Channel {
    sender: SendRequest<Body>,
    _connection: Arc<Connection>,
}

/// What moves its bytes; ends when it is dropped.
struct Connection(JoinHandle<()>);

impl Channel {
    /// Connects to the server behind `socket`.
    pub(crate) async fn connect(socket: &Path) -> Result<Self, StdError> {
        let stream = UnixStream::connect(socket).await?;
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .handshake(TokioIo::new(stream))
            .await?;
        // How it ends the requests tell.
        let moving = tokio::spawn(async move { drop(connection.await) });
        Ok(Self {
            sender,
            _connection: Arc::new(Connection(moving)),
        })
    }
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Body>;
    type Error = StdError;
    type Future = BoxFuture<Response<Body>, StdError>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), StdError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let mut sender = self.sender.clone();
        Box::pin(async move {
            *request.uri_mut() = addressed(request.uri())?;
            sender.ready().await?;
            Ok(sender.send_request(request).await?.map(Body::new))
        })
    }
}

/// For a server that has no name.
fn addressed(uri: &Uri) -> Result<Uri, StdError> {
    let path = uri.path_and_query().ok_or("a request without a path")?;
    let addressed = Uri::builder()
        .scheme("http")
        .authority("localhost")
        .path_and_query(path.clone());
    Ok(addressed.build()?)
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}
