//! What the engine and an executor host say to each other.
//!
//! ```text
//! frame: | length u32, little endian | JSON, `length` bytes, at most 64 KiB |
//! ```
//!
//! The first frame goes to the host and is a [`Request::Launch`], but for a [`Request::Prepare`]; the
//! container's standard descriptors travel with its first byte. The end of the stream in either direction is
//! the last word: for the host it means "kill and clean up".

use std::io::{self, Read, Write};
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest frame body in bytes. Only paths and error texts travel here.
pub(super) const FRAME_BYTES_MAX: usize = 64 << 10;

/// Name, in the state directory, of a frame with the plan itself. A host holds a lock on it for as
/// long as it lives; whoever finds it without one may sweep.
pub(super) const PLAN: &str = "plan";

/// Name, in the state directory, of the socket that receives a terminal's master end.
pub(super) const CONSOLE_SOCKET: &str = "console.sock";

/// How far a container got before it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Before anything was made.
    Prepare,
    /// While Linux namespaces, mounts and limits were set up.
    Create,
    /// While the command was started.
    Start,
}

/// Which runtime makes the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Runtime {
    /// libcontainer, in the host itself.
    Embedded,
    /// A binary with the OCI command line.
    External {
        /// Absolute path.
        binary: PathBuf,
    },
}

/// What the host needs to know to make a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HostPlan {
    pub(super) id: String,
    /// Absolute.
    pub(super) bundle: PathBuf,
    /// This container's own state directory, absolute; made by the engine, removed by the
    /// host as its last act.
    pub(super) state: PathBuf,
    /// Whether a terminal's master end is to be sent to [`CONSOLE_SOCKET`].
    pub(super) terminal: bool,
    pub(super) runtime: Runtime,
}

/// Engine to host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Request {
    /// Before the first word, if at all: make ready what the embedded runtime needs for any container.
    Prepare,
    /// First word: make this container.
    Launch(HostPlan),
    /// First word: remove what a lost host left of this container.
    Sweep(HostPlan),
    /// Answers [`Event::Created`].
    Start,
    Signal {
        number: i32,
    },
    /// Kill when running, clean up, answer [`Event::Deleted`] and end.
    Delete,
}

/// Host to engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Event {
    Created { pid: u32 },
    Started,
    Exited { code: u8 },
    Failed(Failure),
    Deleted { error: Option<String> },
}

/// A container that did not start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Failure {
    pub(super) stage: Stage,
    pub(super) message: String,
    pub(super) code: u8,
}

/// One frame, ready to send.
pub(super) fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, message)?;
    let body = frame.len() - 4;
    let length = u32::try_from(body).ok().filter(|_| body <= FRAME_BYTES_MAX);
    let length = length.ok_or_else(|| io::Error::other("message longer than 64 KiB"))?;
    for (slot, byte) in frame.iter_mut().zip(length.to_le_bytes()) {
        *slot = byte;
    }
    Ok(frame)
}

/// The body length a frame header announces.
pub(super) fn body_length(header: [u8; 4]) -> io::Result<usize> {
    let length = usize::try_from(u32::from_le_bytes(header)).unwrap_or(usize::MAX);
    if length > FRAME_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "message longer than 64 KiB",
        ));
    }
    Ok(length)
}

/// The message in a frame's body.
pub(super) fn decode<T: DeserializeOwned>(body: &[u8]) -> io::Result<T> {
    Ok(serde_json::from_slice(body)?)
}

/// Writes one frame, blocking.
pub(super) fn write(mut to: impl Write, message: &impl Serialize) -> io::Result<()> {
    to.write_all(&encode(message)?)
}

/// Reads one frame, blocking; `None` at the end of the stream.
pub(super) fn read<T: DeserializeOwned>(mut from: impl Read) -> io::Result<Option<T>> {
    let mut header = [0; 4];
    match from.read_exact(&mut header) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let mut body = vec![0; body_length(header)?];
    from.read_exact(&mut body)?;
    decode(&body).map(Some)
}

/// Cuts an error text to what fits a frame with room to spare, at a character boundary.
pub(super) fn shorten(mut text: String) -> String {
    const TEXT_BYTES_MAX: usize = 4096;
    if text.len() > TEXT_BYTES_MAX {
        text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_round_trip_and_stay_bounded() {
        let failure = Failure {
            stage: Stage::Create,
            message: "ü".into(),
            code: 127,
        };
        let events = [
            Event::Created { pid: 7 },
            Event::Failed(failure),
            Event::Deleted { error: None },
        ];
        let mut wire = Vec::new();
        for event in &events {
            write(&mut wire, event).unwrap();
        }
        let mut reader = wire.as_slice();
        for event in events {
            assert_eq!(read::<Event>(&mut reader).unwrap(), Some(event));
        }
        assert_eq!(read::<Event>(&mut reader).unwrap(), None);
        assert!(encode(&"x".repeat(FRAME_BYTES_MAX)).is_err());
        assert!(read::<Event>([0xff_u8; 8].as_slice()).is_err());
        assert!(read::<Event>([4_u8, 0, 0, 0, b'{'].as_slice()).is_err());
        assert!(shorten("é".repeat(9000)).len() < 4200);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_give_an_answer(bytes: Vec<u8>) {
            let _ = read::<Event>(bytes.as_slice());
            let _ = read::<Request>(bytes.as_slice());
        }
    }
}
