//! What went over one proxy: bytes over time, and the requests for blobs with their ranges.
//!
//! Invariant: counters only grow. Requests are read from the bytes as they pass and change
//! nothing; a head longer than a line buffer is cut, never kept. Samples are one per 10 ms at
//! most, so an hour is 360,000.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Distance of two samples, ms.
const SAMPLE_MS: u64 = 10;
/// Longest line of a request head that is looked at, bytes.
const LINE_BYTES_MAX: usize = 8 * 1024;

/// A request for (a part of) a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    /// Path of the request, `/v2/NAME/blobs/DIGEST`.
    pub(crate) path: String,
    /// First and last byte as asked for; none is the whole blob.
    pub(crate) range: Option<(u64, u64)>,
}

/// Counts the connections of one measurement.
#[derive(Debug)]
pub(crate) struct Meter {
    origin: Instant,
    received: AtomicU64,
    samples: Mutex<Vec<(u64, u64)>>,
    requests: Mutex<Vec<Request>>,
}

impl Meter {
    /// Nothing yet; its clock starts now.
    pub(crate) fn new() -> Self {
        Self {
            origin: Instant::now(),
            received: AtomicU64::new(0),
            samples: Mutex::default(),
            requests: Mutex::default(),
        }
    }

    /// Bytes received from the registry so far, HTTP heads included.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// (ms since the meter was made, bytes received by then), in order.
    pub(crate) fn samples(&self) -> Vec<(u64, u64)> {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        samples.clone()
    }

    /// Requests for blobs so far, in order.
    pub(crate) fn requests(&self) -> Vec<Request> {
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.clone()
    }

    pub(super) fn receive(&self, bytes: usize) {
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = u64::try_from(bytes).unwrap_or(0);
        let total = self.received.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let ms = u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX);
        let at = ms / SAMPLE_MS * SAMPLE_MS;
        match samples.last_mut() {
            Some(last) if last.0 == at => last.1 = total,
            _ => samples.push((at, total)),
        }
    }

    pub(super) fn request(&self, request: Request) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.push(request);
    }
}

/// Bytes that were asked for more than once, whole-blob requests aside.
pub(crate) fn asked_twice(requests: &[Request]) -> u64 {
    let mut ranges: Vec<_> = requests
        .iter()
        .filter_map(|r| r.range.map(|(first, last)| (&r.path, first, last)))
        .collect();
    ranges.sort();
    let mut twice = 0;
    let mut seen: Option<(&String, u64)> = None;
    for (path, first, last) in ranges {
        let end = last.saturating_add(1);
        match seen {
            Some((before, until)) if before == path => {
                twice += until.min(end).saturating_sub(first);
                seen = Some((path, until.max(end)));
            }
            _ => seen = Some((path, end)),
        }
    }
    twice
}

/// Reads request heads out of the bytes of a connection.
#[derive(Debug, Default)]
pub(super) struct Heads {
    line: Vec<u8>,
    current: Option<Request>,
}

impl Heads {
    /// Takes the next bytes; `done` gets each request for a blob when its head ends.
    pub(super) fn read(&mut self, bytes: &[u8], mut done: impl FnMut(Request)) {
        for &byte in bytes {
            if byte != b'\n' {
                if self.line.len() < LINE_BYTES_MAX {
                    self.line.push(byte);
                }
                continue;
            }
            let line = String::from_utf8_lossy(&self.line).trim_end().to_owned();
            self.line.clear();
            if line.is_empty() {
                self.current.take().into_iter().for_each(&mut done);
            } else if let Some(path) = blob_path(&line) {
                self.current = Some(Request { path, range: None });
            } else if let Some(request) = &mut self.current {
                request.range = byte_range(&line).or(request.range);
            }
        }
    }
}

fn blob_path(line: &str) -> Option<String> {
    let path = line.strip_prefix("GET ")?.strip_suffix(" HTTP/1.1")?;
    path.contains("/blobs/").then(|| path.to_owned())
}

fn byte_range(line: &str) -> Option<(u64, u64)> {
    let (name, value) = line.split_once(':')?;
    if !name.eq_ignore_ascii_case("range") {
        return None;
    }
    let (first, last) = value.trim().strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(path: &str, range: Option<(u64, u64)>) -> Request {
        Request {
            path: path.to_owned(),
            range,
        }
    }

    #[test]
    fn heads_are_read_however_the_bytes_are_cut() {
        let bytes = b"GET /v2/ HTTP/1.1\r\nHost: a\r\n\r\n\
            GET /v2/a/blobs/x HTTP/1.1\r\nrange: bytes=5-9\r\n\r\n\
            HEAD /v2/a/blobs/y HTTP/1.1\r\n\r\nGET /v2/a/blobs/z HTTP/1.1\r\nA: b\r\n\r\n";
        let wanted = [
            request("/v2/a/blobs/x", Some((5, 9))),
            request("/v2/a/blobs/z", None),
        ];
        for cut in [1, 2, 7, 64, bytes.len()] {
            let (mut heads, mut got) = (Heads::default(), Vec::new());
            for piece in bytes.chunks(cut) {
                heads.read(piece, |r| got.push(r));
            }
            assert_eq!(got, wanted, "in pieces of {cut}");
        }
    }

    #[test]
    fn an_endless_line_is_not_kept() {
        let mut heads = Heads::default();
        heads.read(&vec![b'x'; LINE_BYTES_MAX * 3], |_| unreachable!());
        assert_eq!(heads.line.len(), LINE_BYTES_MAX);
    }

    #[test]
    fn overlaps_are_counted_once_per_repetition() {
        let a = |first, last| request("/a", Some((first, last)));
        let table = [
            (vec![], 0),
            (vec![a(0, 9), a(10, 19)], 0),
            (vec![a(0, 9), a(0, 9), a(0, 9)], 20),
            (vec![a(5, 14), a(0, 9)], 5),
            (vec![a(0, 99), a(10, 19), a(50, 149)], 60),
            (
                vec![a(0, 9), request("/b", Some((0, 9))), request("/a", None)],
                0,
            ),
        ];
        for (requests, wanted) in table {
            assert_eq!(asked_twice(&requests), wanted, "{requests:?}");
        }
    }

    #[test]
    fn samples_end_with_the_total() {
        let meter = Meter::new();
        meter.receive(100);
        meter.receive(23);
        assert_eq!(meter.received(), 123);
        assert_eq!(meter.samples().last().map(|s| s.1), Some(123));
    }
}
