//! From a URI to a connected stream: TCP, through a proxy if one is set, TLS for https.
//!
//! Invariant: the whole set-up ends within the connect timeout, and what a proxy sends
//! before the tunnel is bounded. Never falls back from https to http.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use http::uri::Scheme;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_rustls::MaybeHttpsStream;
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
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
}

impl Connector {
    /// A connector; connects to nothing yet.
    pub(crate) fn new(tls: Tls, proxies: Arc<Proxies>, timeout: Duration) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_keepalive(Some(KEEPALIVE));
        Self {
            tcp,
            tls,
            proxies,
            timeout,
        }
    }

    async fn connect(mut self, uri: Uri) -> Result<MaybeHttpsStream<Conn>, ConnectError> {
        let https = uri.scheme() == Some(&Scheme::HTTPS);
        let proxy = self.proxies.for_uri(&uri).cloned();
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
        match self.tcp.call(uri).await {
            Ok(stream) => Ok(stream.into_inner()),
            Err(error) => {
                let cause = super::innermost(&error);
                let via = if proxy { "proxy " } else { "" };
                Err(ConnectError(format!(
                    "cannot connect to {via}{to}: {cause}"
                )))
            }
        }
    }
}

fn tls_text(error: &io::Error) -> String {
    let untrusted = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
        .is_some_and(|inner| matches!(inner, rustls::Error::InvalidCertificate(_)));
    if untrusted {
        format!(
            "its certificate is not trusted ({error}); if you trust its authority, set ca_file, \
             and if it speaks plain http, list it in plain_http"
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
        let limit = self.timeout;
        Box::pin(async move {
            match tokio::time::timeout(limit, connector.connect(uri)).await {
                Ok(outcome) => outcome,
                Err(_) => Err(ConnectError(format!(
                    "no connection within {}",
                    seconds(limit)
                ))),
            }
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
