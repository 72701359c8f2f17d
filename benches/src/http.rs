//! As much HTTP as the benchmark itself asks: one GET at a time over plain TCP.
//!
//! Invariant: an answer is complete or an error. Bodies need a Content-Length, as docker-registry
//! sends for everything asked for here. It never follows redirects and is not what is measured.

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

/// How long a connection may be silent.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest head, bytes.
const HEAD_BYTES_MAX: u64 = 64 * 1024;
/// What manifests may be: OCI's and docker's, single or a list.
const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";

/// A connection that is kept between requests.
#[derive(Debug)]
pub(crate) struct Connection {
    host: String,
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Connects to `host` (`host:port`).
    pub(crate) fn open(host: &str) -> Result<Self> {
        let address = host.to_socket_addrs()?.next().context("no address")?;
        let stream = TcpStream::connect_timeout(&address, PATIENCE)
            .with_context(|| format!("connect to {host}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            host: host.to_owned(),
            stream: BufReader::with_capacity(256 * 1024, stream),
        })
    }

    /// Gets `path`, or the bytes `range` (first, last) of it, into `sink`; returns the status.
    pub(crate) fn get(
        &mut self,
        path: &str,
        range: Option<(u64, u64)>,
        sink: &mut impl std::io::Write,
    ) -> Result<u16> {
        let range = range.map_or_else(String::new, |(first, last)| {
            format!("Range: bytes={first}-{last}\r\n")
        });
        let head = format!(
            "GET {path} HTTP/1.1\r\nHost: {}\r\nAccept: {ACCEPT}\r\n{range}\r\n",
            self.host
        );
        self.stream.get_mut().write_all(head.as_bytes())?;
        let (status, length) = self.head()?;
        let length = length.with_context(|| format!("{path}: no length"))?;
        let copied = std::io::copy(&mut self.stream.by_ref().take(length), sink)?;
        if copied < length {
            bail!("{path}: {copied} of {length} bytes");
        }
        Ok(status)
    }

    /// Status and content length.
    fn head(&mut self) -> Result<(u16, Option<u64>)> {
        let mut head = self.stream.by_ref().take(HEAD_BYTES_MAX);
        let mut line = String::new();
        head.read_line(&mut line)?;
        let status = line
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .with_context(|| format!("not an HTTP answer: {line:?}"))?;
        let mut length = None;
        loop {
            line.clear();
            if head.read_line(&mut line)? == 0 {
                bail!("an HTTP head without an end");
            }
            let text = line.trim_end();
            if text.is_empty() {
                return Ok((status, length));
            }
            if let Some((name, value)) = text.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().ok();
            }
        }
    }
}

/// Whether something at `host` answers `GET /` with 200 right now.
pub(crate) fn answers(host: &str) -> bool {
    Connection::open(host)
        .and_then(|mut connection| connection.get("/", None, &mut std::io::sink()))
        .is_ok_and(|status| status == 200)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::thread;

    /// Serves one connection: `answer` to each of the first `times` requests.
    fn serve(answer: &'static str, times: usize) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        thread::spawn(move || {
            let mut stream = BufReader::new(listener.accept().unwrap().0);
            for _ in 0..times {
                let mut line = String::new();
                while stream.read_line(&mut line).unwrap() > 2 {
                    line.clear();
                }
                stream.get_mut().write_all(answer.as_bytes()).unwrap();
            }
        });
        host
    }

    #[test]
    fn a_connection_is_kept_between_requests() {
        let host = serve("HTTP/1.1 206 Partial\r\ncontent-LENGTH: 3\r\n\r\nabc", 2);
        let mut connection = Connection::open(&host).unwrap();
        for _ in 0..2 {
            let mut body = Vec::new();
            assert_eq!(connection.get("/", Some((0, 2)), &mut body).unwrap(), 206);
            assert_eq!(body, b"abc");
        }
    }

    #[test]
    fn an_answer_is_complete_or_an_error() {
        for answer in [
            "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
            "HTTP/1.1 200 OK\r\n\r\nabc",
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n",
            "what",
            "",
        ] {
            assert!(!answers(&serve(answer, 1)), "{answer:?}");
        }
        assert!(answers(&serve(
            "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            1
        )));
        assert!(!answers(&serve(
            "HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n",
            1
        )));
    }
}
