//! Requests that are passed on to another gRPC server of this node, and their answers.
//!
//! Invariant: what is passed on is what came, byte for byte: headers, messages and trailers,
//! of methods and fields that nobody here has heard of, too. Each request has a connection
//! of its own, which ends with the answer: when the one who asked goes away, the other
//! server sees that at once, and no connection outlives a restart of either.

use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http2;
use hyper::header::HeaderMap;
use hyper::http::uri::PathAndQuery;
use hyper::{Request, Response, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use lazarette_proto::Status;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

/// Called once with an answer's status, if it has one.
pub(super) type OnStatus = Box<dyn FnOnce(bool) + Send + Sync>;

/// The body of an answer, and the connection that it comes by.
#[derive(Default)]
pub(super) struct Relayed {
    body: Option<Incoming>,
    on_status: Option<OnStatus>,
    _connection: Option<Connection>,
}

/// A connection that ends when it is dropped.
struct Connection(JoinHandle<()>);

/// Asks the server behind `socket`. `on_status` is told whether the answer is a success; it
/// is dropped uncalled if there is no whole answer.
pub(super) async fn ask<B>(
    socket: &Path,
    request: Request<B>,
    on_status: Option<OnStatus>,
) -> Result<Response<Relayed>, Status>
where
    B: Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>>
        + Send
        + Unpin
        + 'static,
{
    let lost = |error: &dyn std::error::Error| {
        Status::unavailable(format!("containerd at {}: {error}", socket.display()))
    };
    let stream = UnixStream::connect(socket).await.map_err(|e| lost(&e))?;
    let (mut sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|e| lost(&e))?;
    // It ends with the answer's body, below.
    let connection = Connection(tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to containerd broke");
        }
    }));
    let request = addressed(request).map_err(|e| lost(&e))?;
    let answer = sender.send_request(request).await.map_err(|e| lost(&e))?;
    let mut on_status = on_status;
    // An answer without a message has its status in the headers.
    tell(&mut on_status, answer.headers());
    Ok(answer.map(|body| Relayed {
        body: Some(body),
        on_status,
        _connection: Some(connection),
    }))
}

/// The request for a server that has no name.
fn addressed<B>(request: Request<B>) -> Result<Request<B>, hyper::http::Error> {
    let (mut parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().cloned();
    parts.uri = Uri::builder()
        .scheme("http")
        .authority("localhost")
        .path_and_query(path.unwrap_or_else(|| PathAndQuery::from_static("/")))
        .build()?;
    Ok(Request::from_parts(parts, body))
}

fn tell(on_status: &mut Option<OnStatus>, headers: &HeaderMap) {
    if let Some(status) = headers.get("grpc-status")
        && let Some(on_status) = on_status.take()
    {
        on_status(status == "0");
    }
}

impl Body for Relayed {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        let Some(body) = &mut this.body else {
            return Poll::Ready(None);
        };
        let frame = Pin::new(body).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &frame
            && let Some(trailers) = frame.trailers_ref()
        {
            tell(&mut this.on_status, trailers);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body
            .as_ref()
            .map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}
