//! Connections of a unix socket to a service.
//!
//! Invariant: at most [`CONNECTIONS_MAX`] connections are served, each in a task that is
//! joined before [`serve`] returns; requests under way when it is told to stop are answered
//! if that takes no longer than [`STOP_WAIT`]. Who may connect is the socket's owner's
//! business.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Incoming};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use lazarette_proto::snapshots::SnapshotsServer;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::codegen::Service as _;

use super::images::Images;
use super::{Service, relay};

/// Most connections at once. Containerd has one, kubelet has one.
const CONNECTIONS_MAX: usize = 64;
/// How long requests under way may take after the order to stop.
const STOP_WAIT: Duration = Duration::from_secs(5);
/// Pause after a failed accept, which is mostly for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a connection's requests are answered by.
trait Answer: Clone + Send + Sync + 'static {
    type Body: Body<Data = Bytes, Error: Into<BoxError> + Send> + Send + 'static;

    fn answer(
        &self,
        request: Request<Incoming>,
    ) -> impl Future<Output = Response<Self::Body>> + Send;
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl Answer for SnapshotsServer<Service> {
    type Body = tonic::body::Body;

    async fn answer(&self, request: Request<Incoming>) -> Response<Self::Body> {
        match self.clone().call(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }
}

impl Answer for Images {
    type Body = relay::Relayed;

    async fn answer(&self, request: Request<Incoming>) -> Response<Self::Body> {
        self.answer(request).await
    }
}

/// Serves snapshots until `stop` is ready.
pub async fn serve(listener: UnixListener, service: Service, stop: impl Future<Output = ()>) {
    serve_all(listener, SnapshotsServer::new(Arc::new(service)), stop).await;
}

/// Serves images until `stop` is ready.
pub async fn serve_images(listener: UnixListener, images: Images, stop: impl Future<Output = ()>) {
    serve_all(listener, images, stop).await;
}

async fn serve_all(listener: UnixListener, server: impl Answer, stop: impl Future<Output = ()>) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let (end, ended) = watch::channel(());
    let mut connections = JoinSet::new();
    tokio::pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => break,
            Some(_) = connections.join_next() => continue,
            accepted = accept(&listener, &permits) => accepted,
        };
        match accepted {
            Ok((stream, permit)) => {
                let (server, ended) = (server.clone(), ended.clone());
                connections.spawn(async move {
                    converse(stream, server, ended).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    end.send_replace(());
    let all = async { while connections.join_next().await.is_some() {} };
    if timeout(STOP_WAIT, all).await.is_err() {
        tracing::warn!("requests are cut off");
        connections.shutdown().await;
    }
}

async fn accept(
    listener: &UnixListener,
    permits: &Arc<Semaphore>,
) -> io::Result<(UnixStream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = Arc::clone(permits).acquire_owned().await;
    let permit = permit.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, permit))
}

async fn converse(stream: UnixStream, server: impl Answer, mut ended: watch::Receiver<()>) {
    let answer = service_fn(move |request| {
        let server = server.clone();
        async move { Ok::<_, Infallible>(server.answer(request).await) }
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), answer);
    tokio::pin!(connection);
    let outcome = tokio::select! {
        outcome = &mut connection => outcome,
        _ = ended.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "a client went away");
    }
}
