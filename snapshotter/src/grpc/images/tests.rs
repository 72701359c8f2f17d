//! Images asked for through the socket, with a fake containerd behind it.

use std::collections::HashMap;
use std::convert::Infallible;
use std::path::Path;
use std::time::Duration;

use futures_util::stream;
use http_body_util::StreamBody;
use hyper::body::Frame;
use hyper::header::{HeaderMap, HeaderValue};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use lazarette_proto::Secret;
use lazarette_proto::images::{AuthConfig, ImageSpec};
use parking_lot::Mutex;
use proptest::prelude::*;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tonic::Code;

use super::*;
use crate::grpc::serve_images;

/// What a fake containerd does with the next question.
#[derive(Clone, Copy)]
enum Reply {
    /// These bytes, and this status after them.
    Body(&'static [u8], &'static str),
    /// A status and nothing else.
    Bare(&'static str),
    /// Bytes, and then the connection breaks.
    Cut,
}

/// What it was asked.
#[derive(Debug, Default, Clone)]
struct Asked {
    path: String,
    headers: HeaderMap,
    body: Bytes,
    /// Whether there were credentials for the image at that time.
    had_credentials: bool,
}

struct Node {
    dir: tempfile::TempDir,
    keyring: Arc<Keyring>,
    replies: Arc<Mutex<HashMap<String, Reply>>>,
    asked: Arc<Mutex<Vec<Asked>>>,
    tasks: Vec<JoinHandle<()>>,
}

const IMAGE: &str = "reg.lan:5000/app:1";

fn repository() -> Repository {
    Reference::parse(IMAGE).unwrap().repository().clone()
}

type Frames = stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, std::io::Error>>>;

fn reply(reply: Reply) -> Response<StreamBody<Frames>> {
    let mut frames = Vec::new();
    let mut headers = HeaderMap::new();
    match reply {
        Reply::Body(bytes, status) => {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", HeaderValue::from_static(status));
            trailers.insert("x-after", HeaderValue::from_static("kept"));
            frames.push(Ok(Frame::data(Bytes::from_static(bytes))));
            frames.push(Ok(Frame::trailers(trailers)));
        }
        Reply::Bare(status) => {
            headers.insert("grpc-status", HeaderValue::from_static(status));
            headers.insert("grpc-message", HeaderValue::from_static("why"));
        }
        Reply::Cut => {
            frames.push(Ok(Frame::data(Bytes::from_static(b"\0"))));
            frames.push(Err(std::io::Error::other("cut")));
        }
    }
    let mut response = Response::new(StreamBody::new(stream::iter(frames)));
    *response.headers_mut() = headers;
    response
}

impl Node {
    fn start() -> Self {
        let mut node = Self {
            dir: tempfile::tempdir().unwrap(),
            keyring: Arc::default(),
            replies: Arc::default(),
            asked: Arc::default(),
            tasks: Vec::new(),
        };
        node.start_containerd();
        let listener = UnixListener::bind(node.dir.path().join("cri.sock")).unwrap();
        let images = Images::new(node.dir.path().join("c.sock"), Arc::clone(&node.keyring));
        let serving = serve_images(listener, images, std::future::pending());
        node.tasks.push(tokio::spawn(serving));
        node
    }

    fn start_containerd(&mut self) {
        let listener = UnixListener::bind(self.dir.path().join("c.sock")).unwrap();
        let (replies, asked) = (Arc::clone(&self.replies), Arc::clone(&self.asked));
        let keyring = Arc::clone(&self.keyring);
        self.tasks.push(tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (replies, asked) = (Arc::clone(&replies), Arc::clone(&asked));
                let keyring = Arc::clone(&keyring);
                let answer = service_fn(move |request: Request<Incoming>| {
                    let (replies, asked) = (Arc::clone(&replies), Arc::clone(&asked));
                    let keyring = Arc::clone(&keyring);
                    async move {
                        let (parts, body) = request.into_parts();
                        let path = parts.uri.path().to_owned();
                        let body = body.collect().await.unwrap().to_bytes();
                        asked.lock().push(Asked {
                            path: path.clone(),
                            headers: parts.headers,
                            body,
                            had_credentials: keyring.has(&repository()),
                        });
                        let next = replies.lock()[&path];
                        Ok::<_, Infallible>(reply(next))
                    }
                });
                let connection = http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), answer);
                tokio::spawn(async move {
                    let _ = connection.await;
                });
            }
        }));
    }

    fn on(&self, path: &str, reply: Reply) {
        self.replies.lock().insert(path.to_owned(), reply);
    }

    /// Headers or status, body and trailers that a client gets.
    async fn ask(&self, path: &str, body: &[u8]) -> (HeaderMap, Vec<u8>, Option<HeaderMap>) {
        ask(&self.dir.path().join("cri.sock"), path, body).await
    }

    fn last(&self) -> Asked {
        self.asked.lock().last().cloned().unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn ask(socket: &Path, path: &str, body: &[u8]) -> (HeaderMap, Vec<u8>, Option<HeaderMap>) {
    let request = Request::builder()
        .method("POST")
        .uri(path)
        .header("te", "trailers")
        .header("content-type", "application/grpc")
        .header("x-mine", "kept")
        .body(Full::new(Bytes::copy_from_slice(body)))
        .unwrap();
    let answer = relay::ask(socket, request, None).await.unwrap();
    let (parts, body) = answer.into_parts();
    match body.collect().await {
        Ok(all) => {
            let trailers = all.trailers().cloned();
            (parts.headers, all.to_bytes().to_vec(), trailers)
        }
        Err(_) => (parts.headers, Vec::new(), None),
    }
}

/// A message in gRPC's frame.
fn framed(request: &PullImageRequest, more: &[u8]) -> Vec<u8> {
    let mut message = request.encode_to_vec();
    message.extend_from_slice(more);
    let mut body = vec![0];
    body.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    body.extend_from_slice(&message);
    body
}

fn pull_of(image: &str) -> PullImageRequest {
    PullImageRequest {
        image: Some(ImageSpec {
            image: image.to_owned(),
        }),
        auth: Some(AuthConfig {
            username: Secret("u".to_owned()),
            password: Secret("hidden".to_owned()),
            ..Default::default()
        }),
    }
}

#[tokio::test]
async fn what_comes_is_passed_on_byte_for_byte() {
    let node = Node::start();
    // Methods that are known and such that are not, and messages that nobody here reads.
    for method in ["ListImages", "StreamImages", "OfALaterVersion"] {
        let path = format!("{SERVICE}{method}");
        node.on(&path, Reply::Body(b"\0\0\0\0\x03any", "0"));
        let (_, body, trailers) = node.ask(&path, b"\0\0\0\0\x02\xff\xff").await;
        assert_eq!(body, b"\0\0\0\0\x03any");
        let trailers = trailers.unwrap();
        assert_eq!(
            (&trailers["grpc-status"], &trailers["x-after"]),
            (
                &HeaderValue::from_static("0"),
                &HeaderValue::from_static("kept")
            )
        );
        let asked = node.last();
        assert_eq!(
            (asked.path, &asked.body[..]),
            (path, &b"\0\0\0\0\x02\xff\xff"[..])
        );
        assert_eq!(asked.headers["x-mine"], "kept");
    }
    let body = framed(&pull_of(IMAGE), b"\xd2\x02\x03new");
    node.on(PULL_IMAGE, Reply::Bare("2"));
    let (headers, _, _) = node.ask(PULL_IMAGE, &body).await;
    assert_eq!(
        (&headers["grpc-status"], &headers["grpc-message"]),
        (
            &HeaderValue::from_static("2"),
            &HeaderValue::from_static("why")
        )
    );
    assert_eq!(
        &node.last().body[..],
        &body[..],
        "fields of later versions, too"
    );
}

#[tokio::test]
async fn credentials_stay_if_the_pull_succeeds() {
    let body = framed(&pull_of(IMAGE), b"");
    for (reply, stay) in [
        (Reply::Body(b"\0\0\0\0\0", "0"), true),
        (Reply::Body(b"\0\0\0\0\0", "2"), false),
        (Reply::Bare("5"), false),
        (Reply::Cut, false),
    ] {
        let node = Node::start();
        node.on(PULL_IMAGE, reply);
        node.ask(PULL_IMAGE, &body).await;
        assert!(node.last().had_credentials, "containerd asks us meanwhile");
        // The answer's last frame may reach the client before it is dropped on the way.
        let settled = async {
            while node.keyring.has(&repository()) != stay {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), settled)
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn a_pull_that_cannot_be_read_is_passed_on_all_the_same() {
    let node = Node::start();
    node.on(PULL_IMAGE, Reply::Body(b"\0\0\0\0\0", "0"));
    for body in [&b"\0\0\0\0\x02\x0a\x09"[..], b"\x01\0\0\0\0", b""] {
        let (_, _, trailers) = node.ask(PULL_IMAGE, body).await;
        assert_eq!(trailers.unwrap()["grpc-status"], "0");
        assert_eq!(&node.last().body[..], body);
    }
}

#[tokio::test]
async fn other_services_and_a_missing_containerd_are_statuses() {
    let node = Node::start();
    let status = |headers: &HeaderMap| headers["grpc-status"].to_str().unwrap().parse::<i32>();
    for path in [
        "/runtime.v1.RuntimeService/Version",
        "/runtime.v1alpha2.ImageService/PullImage",
        "/",
    ] {
        let (headers, _, _) = node.ask(path, b"").await;
        assert_eq!(
            Code::from_i32(status(&headers).unwrap()),
            Code::Unimplemented,
            "{path}"
        );
    }
    assert!(node.asked.lock().is_empty());
    std::fs::remove_file(node.dir.path().join("c.sock")).unwrap();
    let (headers, _, _) = node.ask(PULL_IMAGE, &framed(&pull_of(IMAGE), b"")).await;
    assert_eq!(Code::from_i32(status(&headers).unwrap()), Code::Unavailable);
    assert!(!node.keyring.has(&repository()));
}

#[test]
fn a_pull_says_what_it_came_with() {
    let basic = Credential::Basic {
        user: "u".to_owned(),
        password: "hidden".to_owned(),
    };
    let without = PullImageRequest {
        auth: None,
        ..pull_of(IMAGE)
    };
    let empty = PullImageRequest {
        auth: Some(AuthConfig::default()),
        ..pull_of(IMAGE)
    };
    let nameless = PullImageRequest {
        image: None,
        ..pull_of(IMAGE)
    };
    let found = Ok(Some((repository(), basic)));
    let table = [
        (framed(&pull_of(IMAGE), b""), found.clone()),
        (framed(&pull_of(IMAGE), b"\xd2\x02\x03new"), found),
        (framed(&without, b""), Ok(None)),
        (framed(&empty, b""), Ok(None)),
        (framed(&nameless, b""), Err("the image's name is malformed")),
        (
            framed(&pull_of("A B"), b""),
            Err("the image's name is malformed"),
        ),
        (
            framed(&pull_of(IMAGE), b"\x0a\x7f"),
            Err("the message is malformed"),
        ),
        (b"\x01\0\0\0\0".to_vec(), Err("the message is compressed")),
        (b"\0\0".to_vec(), Err("the message is cut off")),
    ];
    for (row, (body, expected)) in table.into_iter().enumerate() {
        assert!(pulled(&body) == expected, "{row}: {:?}", pulled(&body));
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read(message: Vec<u8>) {
        let _ = pulled(&message);
        let body: Vec<u8> = [&[0; PREFIX_BYTES], &message[..]].concat();
        let _ = pulled(&body);
    }

    /// Damage to a pull changes what is found or is an error; the text of it has no secret.
    #[test]
    fn a_damaged_pull_is_read(at in 0..60_usize, byte: u8) {
        let mut body = framed(&pull_of(IMAGE), b"");
        let at = at % body.len();
        body[at] = byte;
        let found = format!("{:?}", pulled(&body));
        prop_assert!(!found.contains("hidden"), "{found}");
    }
}
