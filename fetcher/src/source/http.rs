//! The HTTP client under every request to a registry, a token endpoint or a CDN.
//!
//! HTTP/1.1 and HTTP/2 (by ALPN) over one keep-alive pool. Invariant: everything a
//! server sends is bounded here: connect time, silence, header bytes, requests in flight
//! per host. Knows nothing of registries, retries or credentials.

pub(crate) mod connect;
pub(crate) mod line;
pub(crate) mod proxy;
pub(crate) mod tls;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use self::connect::{ConnectError, Connector};
use self::line::{Slot, Slots};
use self::proxy::Proxies;
use self::tls::Certificates;
use super::SourceConfig;
use super::retry::{Fault, Transient, Trouble, seconds};
use super::stats::{Count, Counters};
use crate::Result;

/// Most header bytes of one answer. Signed redirects run to a few KiB; more is an attack.
const HEADER_BYTES_MAX: u32 = 64 << 10;
/// Read buffer of an HTTP/1.1 connection; bounds its headers too.
const READ_BUFFER_BYTES: usize = 256 << 10;
/// HTTP/2 windows: one stream may fill a 1 Gbit/s link at 15 ms, all streams together
/// hold at most 8 MiB that nobody has read yet.
const H2_STREAM_WINDOW_BYTES: u32 = 2 << 20;
const H2_CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// An idle connection is kept this long; most servers close theirs between 60 and 120 s.
const IDLE_MAX: Duration = Duration::from_secs(50);
/// Least time without a sign of the peer before it is asked for one.
const SILENCE_MIN: Duration = Duration::from_secs(1);
/// Hosts with a semaphore of their own before the table is swept.
const HOSTS_MAX: usize = 256;
const USER_AGENT: &str = concat!("lazarette/", env!("CARGO_PKG_VERSION"));

/// How a host is reached, where that is not as the config says for all.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reach {
    /// Certificates that go with it.
    pub(crate) certificates: Certificates,
    /// Longest time for TCP's set-up.
    pub(crate) dial_timeout: Option<Duration>,
}

impl Reach {
    /// Whether the config's way is the way.
    pub(crate) fn is_usual(&self) -> bool {
        self.certificates.is_empty() && self.dial_timeout.is_none()
    }
}

/// A pooled client with bounds.
pub(crate) struct Transport {
    client: Client<Connector, Full<Bytes>>,
    connector: Connector,
    proxies: Arc<Proxies>,
    hosts: Mutex<HashMap<String, Arc<Slots>>>,
    concurrency: usize,
    stall: Duration,
    counters: Arc<Counters>,
}

impl Transport {
    /// A client with the limits of `config`. Reads the CA file, connects to nothing.
    pub(crate) fn new(config: &SourceConfig, counters: Arc<Counters>) -> Result<Self> {
        Self::reaching(config, counters, &Reach::default())
    }

    /// The same, for a host that is reached this way.
    pub(crate) fn reaching(
        config: &SourceConfig,
        counters: Arc<Counters>,
        reach: &Reach,
    ) -> Result<Self> {
        let proxies = Arc::new(Proxies::new(&config.proxy));
        let tls = tls::Tls::new(config.ca_file.as_deref(), reach.certificates.clone())?;
        // Two of these are less than what a request waits, unless that is less than three seconds:
        // by the time it is tried again, a dead connection is known to be, and another is made.
        let silence = (config.stall_timeout / 3).max(SILENCE_MIN);
        let connector = Connector::new(tls, proxies.clone(), config.connect_timeout, 2 * silence)
            .with_dial_timeout(reach.dial_timeout);
        let concurrency = config.concurrency.clamp(1, Semaphore::MAX_PERMITS);
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_MAX)
            .pool_max_idle_per_host(concurrency)
            .http1_max_buf_size(READ_BUFFER_BYTES)
            .http2_initial_stream_window_size(H2_STREAM_WINDOW_BYTES)
            .http2_initial_connection_window_size(H2_CONNECTION_WINDOW_BYTES)
            .http2_max_header_list_size(HEADER_BYTES_MAX)
            .http2_keep_alive_interval(silence)
            .http2_keep_alive_timeout(silence)
            .build(connector.clone());
        Ok(Self {
            client,
            connector,
            proxies,
            hosts: Mutex::new(HashMap::new()),
            concurrency,
            stall: config.stall_timeout,
            counters,
        })
    }

    /// Begins a connection to the host of `uri` that the next request there can have.
    pub(crate) fn connect_ahead(&self, uri: &Uri) {
        self.connector.connect_ahead(uri);
    }

    /// Sends one request and waits for the headers of its answer. Waits for a free slot
    /// of the host without a limit of its own: the caller bounds it by its deadline, which the
    /// line's getting on puts off.
    pub(crate) async fn send(&self, mut request: Request<Full<Bytes>>) -> Result<Answer, Fault> {
        let uri = request.uri().clone();
        let headers = request.headers_mut();
        headers.insert(
            header::USER_AGENT,
            header::HeaderValue::from_static(USER_AGENT),
        );
        if let Some(authorization) = self.proxies.authorization_in_request(&uri) {
            headers.insert(header::PROXY_AUTHORIZATION, authorization);
        }
        let slot = self.slot(&uri).await?;
        self.counters.add(Count::Requests, 1);
        let response = match timeout(self.stall, self.client.request(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(send_fault(&error)),
            Err(_) => return Err(self.silent("no answer")),
        };
        let (parts, body) = response.into_parts();
        if header_bytes(&parts.headers) > HEADER_BYTES_MAX as usize {
            return Err(crate::Error::limit(
                format!("answer of {}", uri.authority().map_or("", |a| a.as_str())),
                format!("its headers are longer than {HEADER_BYTES_MAX} bytes"),
            )
            .into());
        }
        Ok(Answer {
            status: parts.status,
            headers: parts.headers,
            uri,
            body,
            stall: self.stall,
            counters: self.counters.clone(),
            slot: Some(slot),
        })
    }

    async fn slot(&self, uri: &Uri) -> Result<Slot, Fault> {
        let authority = uri.authority().map_or("", |a| a.as_str()).to_owned();
        let slots = {
            let mut hosts = self.hosts.lock();
            if hosts.len() >= HOSTS_MAX {
                hosts.retain(|_, slots| Arc::strong_count(slots) > 1);
            }
            hosts
                .entry(authority)
                .or_insert_with(|| Arc::new(Slots::new(self.concurrency)))
                .clone()
        };
        let taken = slots.take().await;
        taken.map_err(|_| Fault::broken("the source is shutting down"))
    }

    fn silent(&self, what: &str) -> Fault {
        Fault::silent(format!("{what} for {}", seconds(self.stall)))
    }
}

/// An answer whose body is still arriving. Dropping it ends the transfer and frees the
/// host's slot; a body read to its end leaves the connection in the pool.
pub(crate) struct Answer {
    /// Status of the answer.
    pub(crate) status: StatusCode,
    /// Its headers, bounded.
    pub(crate) headers: HeaderMap,
    /// What was asked.
    pub(crate) uri: Uri,
    body: Incoming,
    stall: Duration,
    counters: Arc<Counters>,
    slot: Option<Slot>,
}

impl Answer {
    /// Frees the host's slot; for an answer of which only a few words are of use.
    pub(crate) fn give_up_slot(&mut self) {
        self.slot = None;
    }

    /// The next bytes, never empty; `None` at the end of the body.
    pub(crate) async fn piece(&mut self) -> Result<Option<Bytes>, Fault> {
        loop {
            let frame = match timeout(self.stall, self.body.frame()).await {
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(error))) => {
                    return Err(Fault::broken(format!(
                        "the connection broke: {}",
                        innermost(&error)
                    )));
                }
                Ok(None) => return Ok(None),
                Err(_) => {
                    return Err(Fault::silent(format!(
                        "no bytes for {}",
                        seconds(self.stall)
                    )));
                }
            };
            if let Ok(data) = frame.into_data()
                && !data.is_empty()
            {
                self.counters.add(Count::Bytes, data.len() as u64);
                if let Some(slot) = &self.slot {
                    slot.moves();
                }
                return Ok(Some(data));
            }
        }
    }

    /// The whole body, or `None` when it is longer than `bytes_max`.
    pub(crate) async fn read_at_most(&mut self, bytes_max: usize) -> Result<Option<Bytes>, Fault> {
        if self
            .content_length()
            .is_some_and(|len| len > bytes_max as u64)
        {
            return Ok(None);
        }
        let mut whole = Vec::new();
        while let Some(piece) = self.piece().await? {
            if whole.len() + piece.len() > bytes_max {
                return Ok(None);
            }
            whole.extend_from_slice(&piece);
        }
        Ok(Some(whole.into()))
    }

    /// The announced length of the body in bytes, if there is one.
    pub(crate) fn content_length(&self) -> Option<u64> {
        self.text(header::CONTENT_LENGTH)?.trim().parse().ok()
    }

    /// A header as text.
    pub(crate) fn text(&self, name: header::HeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

fn header_bytes(headers: &HeaderMap) -> usize {
    headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len())
        .sum()
}

/// Tells what cannot be mended (a certificate nobody trusts) from what may.
fn send_fault(error: &hyper_util::client::legacy::Error) -> Fault {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(connect) = error.downcast_ref::<ConnectError>() {
            return Fault::Transient(Transient {
                detail: connect.to_string(),
                kind: Trouble::Connect,
            });
        }
        cause = error.source();
    }
    Fault::broken(format!("the request failed: {}", innermost(error)))
}

/// The root cause, which is the only part of hyper's chain that helps a user.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut deepest = error;
    while let Some(cause) = deepest.source() {
        deepest = cause;
    }
    deepest.to_string()
}
