//! A TCP proxy on loopback that counts what the registry sends.
//!
//! Invariant: a byte is counted before the client can have read it. It adds no delay on
//! purpose and models no link. Connections live as long as their two ends; nothing is retried.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use anyhow::{Context as _, Result};

/// Copy buffer of a direction, bytes: large enough that loopback is not the bottleneck.
const BUFFER_BYTES: usize = 256 * 1024;

/// A running proxy; dropping it stops accepting.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    received: Arc<AtomicU64>,
    closed: Arc<AtomicBool>,
}

impl Proxy {
    /// Listens on a free port of 127.0.0.1 and forwards to `upstream` (`host:port`).
    pub(crate) fn start(upstream: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("listen on loopback")?;
        let address = listener.local_addr()?;
        let received = Arc::new(AtomicU64::new(0));
        let closed = Arc::new(AtomicBool::new(false));
        let (upstream, counter, stop) = (upstream.to_owned(), received.clone(), closed.clone());
        thread::spawn(move || {
            for client in listener.incoming() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(client) = client else { continue };
                // A refused upstream closes the client: the system under test reports it.
                if let Ok(server) = TcpStream::connect(&upstream) {
                    forward(client, server, &counter);
                }
            }
        });
        Ok(Self {
            address,
            received,
            closed,
        })
    }

    /// `host:port` to use in references.
    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    /// Bytes received from the registry so far, HTTP heads included.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
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
fn forward(client: TcpStream, server: TcpStream, received: &Arc<AtomicU64>) {
    let (Ok(client_too), Ok(server_too)) = (client.try_clone(), server.try_clone()) else {
        return;
    };
    for stream in [&client, &server] {
        // Without this a small answer waits for the peer's delayed acknowledgement.
        let _ = stream.set_nodelay(true);
    }
    let received = received.clone();
    thread::spawn(move || pump(client, server, &AtomicU64::new(0)));
    thread::spawn(move || pump(server_too, client_too, &received));
}

fn pump(mut from: TcpStream, mut to: TcpStream, count: &AtomicU64) {
    let mut buffer = vec![0; BUFFER_BYTES];
    while let Ok(length) = from.read(&mut buffer) {
        count.fetch_add(u64::try_from(length).unwrap_or(0), Ordering::Relaxed);
        let Some(bytes) = buffer.get(..length).filter(|bytes| !bytes.is_empty()) else {
            break;
        };
        if to.write_all(bytes).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_the_server_sends_and_changes_nothing() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Proxy::start(&server.local_addr().unwrap().to_string()).unwrap();
        let answer: Vec<u8> = (0..1_000_000_u32)
            .map(|i| u8::try_from(i % 251).unwrap())
            .collect();
        let sent = answer.clone();
        let serving = thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            let mut question = [0; 5];
            stream.read_exact(&mut question).unwrap();
            stream.write_all(&sent).unwrap();
            question
        });
        let mut client = TcpStream::connect(proxy.address()).unwrap();
        client.write_all(b"hello").unwrap();
        let mut got = Vec::new();
        client.read_to_end(&mut got).unwrap();
        assert_eq!(serving.join().unwrap(), *b"hello");
        assert_eq!(got, answer);
        assert_eq!(proxy.received(), 1_000_000);
    }
}
