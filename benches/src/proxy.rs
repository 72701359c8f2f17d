//! A TCP proxy that stands for the way to the registry: it delays and it counts.
//!
//! Invariant: a byte is counted before the client can have read it. With no delay it models
//! nothing; with one, every byte arrives that much later in either direction and none is lost,
//! reordered or held back further (bandwidth is shaped elsewhere: `benches/links.sh`). What is
//! under way is bounded per direction. Connections live as long as their two ends.

mod delay;
mod meter;

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

pub(crate) use meter::{Meter, Request, asked_twice};

/// Copy buffer of a direction, bytes: large enough that loopback is not the bottleneck.
const BUFFER_BYTES: usize = 256 * 1024;
/// Most bytes under way in one direction of a connection: 100 ms at 1 Gbit/s and a bit, as a
/// well tuned TCP window would allow.
const WINDOW_BYTES: usize = 16 << 20;

/// A running proxy; dropping it stops accepting.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    meter: Arc<Mutex<Arc<Meter>>>,
    closed: Arc<AtomicBool>,
}

impl Proxy {
    /// Listens on a free port of 127.0.0.1 and forwards to `upstream` (`host:port`), each
    /// direction `one_way` later.
    pub(crate) fn start(upstream: &str, one_way: Duration) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("listen on loopback")?;
        let proxy = Self {
            address: listener.local_addr()?,
            meter: Arc::new(Mutex::new(Arc::new(Meter::new()))),
            closed: Arc::new(AtomicBool::new(false)),
        };
        let (upstream, meter, closed) = (
            upstream.to_owned(),
            Arc::clone(&proxy.meter),
            Arc::clone(&proxy.closed),
        );
        thread::spawn(move || {
            for client in listener.incoming() {
                if closed.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(client) = client else { continue };
                // A refused upstream closes the client: the system under test reports it.
                if let Ok(server) = TcpStream::connect(&upstream) {
                    let meter = Arc::clone(&meter.lock().unwrap_or_else(PoisonError::into_inner));
                    forward(client, server, &meter, one_way);
                }
            }
        });
        Ok(proxy)
    }

    /// `host:port` to use in references.
    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    /// A new meter for the connections made from now on; earlier ones keep theirs.
    pub(crate) fn measure(&self) -> Arc<Meter> {
        let meter = Arc::new(Meter::new());
        *self.meter.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&meter);
        meter
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
        // Wakes the accept loop, which then sees that it is closed.
        drop(TcpStream::connect(self.address));
    }
}

/// Pumps both directions on threads of their own; they end with their connection.
fn forward(client: TcpStream, server: TcpStream, meter: &Arc<Meter>, one_way: Duration) {
    let (Ok(client_too), Ok(server_too)) = (client.try_clone(), server.try_clone()) else {
        return;
    };
    for stream in [&client, &server] {
        // Without this a small answer waits for the peer's delayed acknowledgement.
        let _ = stream.set_nodelay(true);
    }
    let (asked, answered) = (Arc::clone(meter), Arc::clone(meter));
    thread::spawn(move || {
        let mut heads = meter::Heads::default();
        let see = |bytes: &[u8]| heads.read(bytes, |request| asked.request(request));
        // The connection was made without the delay; the first bytes pay for its handshake.
        let way = delay::Way {
            one_way,
            first: one_way * 2,
        };
        pump(client, server, way, see);
    });
    thread::spawn(move || {
        let see = |bytes: &[u8]| answered.receive(bytes.len());
        let way = delay::Way {
            one_way,
            first: Duration::ZERO,
        };
        pump(server_too, client_too, way, see);
    });
}

/// Copies `from` to `to` until either ends; `see` gets every piece just before it is sent.
fn pump(from: TcpStream, to: TcpStream, way: delay::Way, see: impl FnMut(&[u8]) + Send) {
    if way.one_way.is_zero() {
        copy(&from, &to, see);
    } else {
        delayed(&from, &to, way, see);
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}

fn copy(mut from: &TcpStream, mut to: &TcpStream, mut see: impl FnMut(&[u8])) {
    let mut buffer = vec![0; BUFFER_BYTES];
    while let Ok(length) = from.read(&mut buffer) {
        let Some(bytes) = buffer.get(..length).filter(|bytes| !bytes.is_empty()) else {
            break;
        };
        see(bytes);
        if to.write_all(bytes).is_err() {
            break;
        }
    }
}

fn delayed(
    mut from: &TcpStream,
    mut to: &TcpStream,
    way: delay::Way,
    mut see: impl FnMut(&[u8]) + Send,
) {
    let queue = delay::Queue::new(way, WINDOW_BYTES);
    thread::scope(|scope| {
        scope.spawn(|| {
            while let Some(bytes) = queue.pop() {
                see(&bytes);
                if to.write_all(&bytes).is_err() {
                    break;
                }
            }
            // The reader may wait for room, or for bytes that nobody wants any more.
            queue.close();
            let _ = from.shutdown(Shutdown::Read);
        });
        let mut buffer = vec![0; BUFFER_BYTES];
        while let Ok(length) = from.read(&mut buffer) {
            let Some(bytes) = buffer.get(..length).filter(|bytes| !bytes.is_empty()) else {
                break;
            };
            if !queue.push(bytes, Instant::now()) {
                break;
            }
        }
        queue.close();
    });
}

#[cfg(test)]
mod tests;
