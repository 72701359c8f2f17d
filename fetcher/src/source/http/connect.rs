//! From a URI to a connected stream: TCP, through a proxy if one is set, TLS for https.
//!
//! Connections can be begun before anyone asks for one: a start has other things to do
//! while they come to be.
//!
//! Invariant: the whole set-up ends within the connect timeout, and what a proxy sends
//! before the tunnel is bounded. Never falls back from https to http. At most
//! [`PLAIN_AHEAD`] connections wait for being asked for.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::Uri;
use http::uri::{Authority, Scheme};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_rustls::MaybeHttpsStream;
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tower_service::Service;

use super::proxy::{Proxies, Proxy};
use super::tls::Tls;
use crate::source::endpoint::bare_host;
use crate::source::retry::seconds;

/// Longest answer of a proxy to CONNECT.
const PROXY_ANSWER_BYTES_MAX: usize = 8 << 10;
/// TCP keep-alive for pooled connections: notices a vanished peer before it is reused.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// How long a connection that was begun ahead is used. Servers close idle ones sooner or
/// later, and a request on a closed one costs a retry.
const AHEAD_MAX: Duration = Duration::from_secs(10);

/// Connections that are begun ahead without TLS: one for each request that a start's profile
/// begins with. With TLS it is one: HTTP/2 needs no more, and each costs the server CPU.
const PLAIN_AHEAD: usize = 3;

/// Why no connection came to be, in words for the user.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct ConnectError(String);

/// Makes connections for the pool.
#[derive(Clone)]
pub(crate) struct Connector {
    tcp: HttpConnector,
    tls: Tls,
    proxies: Arc<Proxies>,
    timeout: Duration,
    dial_timeout: Option<Duration>,
    ahead: Arc<Mutex<Vec<Ahead>>>,
}

/// A connection that nobody has asked for yet.
struct Ahead {
    to: (Option<Scheme>, Option<Authority>),
    begun: Instant,
    task: JoinHandle<Result<MaybeHttpsStream<Conn>, ConnectError>>,
}

impl Connector {
    /// A connector; connects to nothing yet. A connection on which the peer's kernel confirms
    /// nothing for `silence` is given up.
    pub(crate) fn new(
        tls: Tls,
        proxies: Arc<Proxies>,
        timeout: Duration,
        silence: Duration,
    ) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_keepalive(Some(KEEPALIVE));
        // A peer that is gone without a word, as behind a router that forgot the connection.
        tcp.set_tcp_user_timeout(Some(silence));
        Self {
            tcp,
            tls,
            proxies,
            timeout,
            dial_timeout: None,
            ahead: Arc::default(),
        }
    }

    /// The same with a limit for TCP alone. One above the limit for everything raises that.
    pub(crate) fn with_dial_timeout(mut self, limit: Option<Duration>) -> Self {
        self.dial_timeout = limit;
        self.timeout = self.timeout.max(limit.unwrap_or_default());
        self
    }

    /// Begins connections to the host of `uri`, for who asks for some next. How that goes
    /// shows only then.
    pub(crate) fn connect_ahead(&self, uri: &Uri) {
        let count = match uri.scheme() == Some(&Scheme::HTTPS) {
            true => 1,
            false => PLAIN_AHEAD,
        };
        let begin = |_| Ahead {
            to: (uri.scheme().cloned(), uri.authority().cloned()),
            begun: Instant::now(),
            task: tokio::spawn(self.clone().connect_in_time(uri.clone())),
        };
        *self.ahead.lock() = (0..count).map(begin).collect();
    }

    /// What was begun ahead to the host of `uri`, if it is still good.
    fn take_ahead(&self, uri: &Uri) -> Option<Ahead> {
        let mut all = self.ahead.lock();
        all.retain(|ahead| ahead.begun.elapsed() < AHEAD_MAX);
        let is_there = |ahead: &Ahead| {
            ahead.to.0.as_ref() == uri.scheme() && ahead.to.1.as_ref() == uri.authority()
        };
        let place = all.iter().position(is_there)?;
        Some(all.remove(place))
    }

    async fn connect_in_time(self, uri: Uri) -> Result<MaybeHttpsStream<Conn>, ConnectError> {
        let limit = self.timeout;
        let late = || ConnectError(format!("no connection within {}", seconds(limit)));
        let connected = tokio::time::timeout(limit, self.connect(uri)).await;
        connected.unwrap_or_else(|_| Err(late()))
    }

    async fn connect(mut self, uri: Uri) -> Result<MaybeHttpsStream<Conn>, ConnectError> {
        let https = uri.scheme() == Some(&Scheme::HTTPS);
        let proxy = self.proxies.for_uri(&uri);
        let proxy = proxy
            .map_err(|detail| ConnectError(detail.to_owned()))?
            .cloned();
        let dial = proxy.as_ref().map_or(&uri, |proxy| &proxy.uri).clone();
        let mut stream = self.dial(dial, proxy.is_some()).await?;
        if !https {
            let proxied = proxy.is_some();
            return Ok(MaybeHttpsStream::Http(Conn {
                io: TokioIo::new(stream),
                proxied,
            }));
        }
        if let Some(proxy) = &proxy {
            tunnel(&mut stream, &uri, proxy).await?;
        }
        let conn = Conn {
            io: TokioIo::new(stream),
            proxied: false,
        };
        let host = bare_host(uri.authority().map_or("", |a| a.as_str())).to_owned();
        let name = ServerName::try_from(host.clone())
            .map_err(|_| ConnectError(format!("{host} is not a name a certificate can have")))?;
        let config = self.tls.config().await.map_err(ConnectError)?;
        let secured = TlsConnector::from(config)
            .connect(name, TokioIo::new(conn))
            .await
            .map_err(|error| ConnectError(tls_text(&error)))?;
        Ok(MaybeHttpsStream::Https(TokioIo::new(secured)))
    }

    async fn dial(&mut self, uri: Uri, proxy: bool) -> Result<TcpStream, ConnectError> {
        let to = uri.authority().map_or(String::new(), ToString::to_string);
        let via = if proxy { "proxy " } else { "" };
        let fail = |cause: &str| ConnectError(format!("cannot connect to {via}{to}: {cause}"));
        let dialling = self.tcp.call(uri);
        let dialled = match self.dial_timeout {
            None => dialling.await,
            Some(limit) => match tokio::time::timeout(limit, dialling).await {
                Ok(dialled) => dialled,
                Err(_) => return Err(fail(&format!("no answer within {}", seconds(limit)))),
            },
        };
        match dialled {
            Ok(stream) => Ok(stream.into_inner()),
            Err(error) => Err(fail(&super::innermost(&error))),
        }
    }
}

fn tls_text(error: &io::Error) -> String {
    if super::tls::refused(error).is_some() {
        format!(
            "its certificate is not trusted ({error}); if you trust its authority, set ca_file \
             (or ca in its hosts.toml), and if it speaks plain http, list it in plain_http"
        )
    } else {
        format!("TLS failed ({error}); if it speaks plain http, list it in plain_http")
    }
}

/// Asks the proxy for a tunnel to `uri`'s host.
async fn tunnel(stream: &mut TcpStream, uri: &Uri, proxy: &Proxy) -> Result<(), ConnectError> {
    let fail = |detail: &str| ConnectError(format!("proxy {}: {detail}", proxy.uri));
    let host = uri.host().unwrap_or_default();
    let port = uri.port_u16().unwrap_or(443);
    let mut request =
        format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n").into_bytes();
    if let Some(authorization) = &proxy.authorization {
        request.extend_from_slice(b"Proxy-Authorization: ");
        request.extend_from_slice(authorization.as_bytes());
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"\r\n");
    stream
        .write_all(&request)
        .await
        .map_err(|e| fail(&e.to_string()))?;
    // Byte by byte, so that nothing past the headers is taken from the tunnel.
    let mut answer = Vec::with_capacity(256);
    while !answer.ends_with(b"\r\n\r\n") {
        if answer.len() >= PROXY_ANSWER_BYTES_MAX {
            return Err(fail("its answer is too long"));
        }
        match stream.read_u8().await {
            Ok(byte) => answer.push(byte),
            Err(error) => return Err(fail(&error.to_string())),
        }
    }
    let line = answer.split(|b| *b == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    match line.split(' ').nth(1) {
        Some(code) if code.len() == 3 && code.starts_with('2') => Ok(()),
        Some("407") => Err(fail("it wants credentials (407); put them into its URL")),
        Some(_) | None => Err(fail(&format!("it refused the tunnel: {line}"))),
    }
}

impl Service<Uri> for Connector {
    type Response = MaybeHttpsStream<Conn>;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move {
            if let Some(ahead) = connector.take_ahead(&uri)
                && let Ok(Ok(stream)) = ahead.task.await
            {
                return Ok(stream);
            }
            connector.connect_in_time(uri).await
        })
    }
}

/// A TCP stream that remembers whether requests on it need the absolute form.
pub(crate) struct Conn {
    io: TokioIo<TcpStream>,
    proxied: bool,
}

impl Connection for Conn {
    fn connected(&self) -> Connected {
        self.io.inner().connected().proxy(self.proxied)
    }
}

impl Read for Conn {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl Write for Conn {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;
    use crate::source::SourceConfig;
    use crate::source::http::tls::Certificates;

    /// Takes so many connections, and fails if there are more.
    async fn accept(listener: &TcpListener, count: usize) {
        for _ in 0..count {
            let bound = Duration::from_secs(60);
            let accepted = tokio::time::timeout(bound, listener.accept()).await;
            accepted.expect("a connection is made").unwrap();
        }
        // Those that were asked for are there by now; what is begun beside them is soon.
        let soon = Duration::from_millis(200);
        let more = tokio::time::timeout(soon, listener.accept()).await;
        assert!(more.is_err(), "more than {count}");
    }

    fn connector() -> Connector {
        let config = SourceConfig::default();
        let proxies = Arc::new(Proxies::new(&config.proxy));
        let tls = Tls::new(None, Certificates::default()).unwrap();
        Connector::new(
            tls,
            proxies,
            config.connect_timeout,
            Duration::from_secs(10),
        )
    }

    #[tokio::test]
    async fn connections_begun_ahead_are_the_next_ones_there() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let here: Uri = format!("http://{}/a", listener.local_addr().unwrap())
            .parse()
            .unwrap();
        let mut connector = connector();
        connector.connect_ahead(&here);
        // Another port is another host.
        let elsewhere = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let there: Uri = format!("http://{}/", elsewhere.local_addr().unwrap())
            .parse()
            .unwrap();
        drop(connector.call(there).await.unwrap());
        accept(&elsewhere, 1).await;
        for _ in 0..PLAIN_AHEAD {
            drop(connector.call(here.clone()).await.unwrap());
        }
        // Taken, not made anew.
        accept(&listener, PLAIN_AHEAD).await;
        drop(connector.call(here.clone()).await.unwrap());
        // They are used up.
        accept(&listener, 1).await;
    }

    #[tokio::test]
    async fn one_begun_ahead_that_failed_does_not_fail_who_comes_next() {
        // A port that is ours, and where nobody listens yet.
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let here: Uri = format!("http://{}/a", socket.local_addr().unwrap())
            .parse()
            .unwrap();
        let mut connector = connector();
        connector.connect_ahead(&here);
        while !connector
            .ahead
            .lock()
            .iter()
            .all(|it| it.task.is_finished())
        {
            tokio::task::yield_now().await;
        }
        let listener = socket.listen(8).unwrap();
        assert!(connector.call(here).await.is_ok());
        accept(&listener, 1).await;
    }

    /// A listener whose queue is full, so that the kernel answers no more.
    async fn deaf() -> (Vec<TcpStream>, TcpListener) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queued = Vec::new();
        // It takes one more than it was told; nobody is to be turned away for being slow.
        for _ in 0..2 {
            queued.push(TcpStream::connect(address).await.unwrap());
        }
        let wait = Duration::from_millis(300);
        while let Ok(stream) = tokio::time::timeout(wait, TcpStream::connect(address)).await {
            queued.push(stream.unwrap());
            assert!(queued.len() < 64, "the queue never fills");
        }
        (queued, listener)
    }

    #[tokio::test]
    async fn a_host_that_does_not_answer_costs_its_own_limit() {
        let (_queued, listener) = deaf().await;
        let there: Uri = format!("http://{}/", listener.local_addr().unwrap())
            .parse()
            .unwrap();
        let config = SourceConfig::default();
        let proxies = Arc::new(Proxies::new(&config.proxy));
        let hour = Duration::from_secs(3600);
        let mut connector = Connector::new(
            Tls::new(None, Certificates::default()).unwrap(),
            proxies,
            hour,
            hour,
        )
        .with_dial_timeout(Some(Duration::from_millis(200)));
        let error = connector.call(there).await.err().unwrap().to_string();
        assert!(error.ends_with(": no answer within 0.2 s"), "{error}");
    }
}
