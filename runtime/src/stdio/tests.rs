//! Tests of the pumps, with pipes and a pty but no container.

use std::io::{Read, Write};
use std::time::Duration;

use tokio::io::AsyncWriteExt;

use super::*;
use crate::sys::number;

/// The container's ends as files.
fn ends(io: ContainerIo) -> (std::fs::File, std::fs::File, std::fs::File) {
    match io {
        ContainerIo::Fds {
            stdin,
            stdout,
            stderr,
        } => (stdin.into(), stdout.into(), stderr.into()),
        ContainerIo::Terminal { .. } => panic!("expected pipes"),
    }
}

#[tokio::test]
async fn both_outputs_and_the_input_pass_through() {
    let (io, streams) = pipes(true).unwrap();
    let (mut stdin, mut stdout, mut stderr) = ends(io);
    let container = std::thread::spawn(move || {
        let mut heard = String::new();
        stdin.read_to_string(&mut heard).unwrap();
        stdout.write_all(heard.to_uppercase().as_bytes()).unwrap();
        stderr.write_all(b"oops").unwrap();
    });
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let before = Instant::now();
    let user = User {
        stdin: b"hello".as_slice(),
        stdout: &mut out,
        stderr: &mut err,
    };
    let seen = attach(streams, user).await.unwrap();
    container.join().unwrap();
    assert_eq!(
        (out.as_slice(), err.as_slice()),
        (b"HELLO".as_slice(), b"oops".as_slice())
    );
    assert_eq!(seen.bytes, 9);
    assert!(!seen.output_refused);
    assert!(seen.first_byte.is_some_and(|at| at >= before));
}

#[tokio::test]
async fn an_input_that_never_ends_does_not_hold_the_end_up() {
    let (io, streams) = pipes(true).unwrap();
    let (_open, never) = tokio::io::duplex(1);
    drop(ends(io));
    let user = User {
        stdin: never,
        stdout: tokio::io::sink(),
        stderr: tokio::io::sink(),
    };
    let seen = attach(streams, user).await.unwrap();
    assert_eq!((seen.bytes, seen.first_byte.is_none()), (0, true));
}

#[tokio::test]
async fn a_slow_reader_holds_the_writer_back() {
    let (io, streams) = pipes(false).unwrap();
    let (_stdin, mut stdout, stderr) = ends(io);
    drop(stderr);
    let total = 8 << 20;
    let written = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = written.clone();
    let container = std::thread::spawn(move || {
        let block = [7; 4096];
        for _ in 0..total / block.len() {
            stdout.write_all(&block).unwrap();
            counter.fetch_add(block.len(), std::sync::atomic::Ordering::SeqCst);
        }
    });
    let (mut reader, writer) = tokio::io::duplex(4096);
    let user = User {
        stdin: tokio::io::empty(),
        stdout: writer,
        stderr: tokio::io::sink(),
    };
    let pump = tokio::spawn(attach(streams, user));
    let mut first = [0; 4096];
    reader.read_exact(&mut first).await.unwrap();
    // One pipe, one block, the duplex: the writer cannot be further ahead than these.
    assert!(written.load(std::sync::atomic::Ordering::SeqCst) < 4 * BLOCK_BYTES);
    let rest = tokio::io::copy(&mut reader, &mut tokio::io::sink())
        .await
        .unwrap();
    assert_eq!(usize::try_from(rest).unwrap() + first.len(), total);
    container.join().unwrap();
    assert_eq!(
        usize::try_from(pump.await.unwrap().unwrap().bytes).unwrap(),
        total
    );
}

#[tokio::test]
async fn a_closed_output_is_passed_on_to_the_container() {
    let (io, streams) = pipes(false).unwrap();
    let (_stdin, mut stdout, stderr) = ends(io);
    drop(stderr);
    let container = std::thread::spawn(move || {
        loop {
            if let Err(error) = stdout.write_all(&[0; 4096]) {
                return error.kind();
            }
        }
    });
    let (reader, writer) = tokio::io::duplex(64);
    drop(reader);
    let user = User {
        stdin: tokio::io::empty(),
        stdout: writer,
        stderr: tokio::io::sink(),
    };
    let seen = attach(streams, user).await.unwrap();
    assert!(seen.output_refused);
    assert_eq!(container.join().unwrap(), io::ErrorKind::BrokenPipe);
}

/// A pipe and a terminal, each non-blocking and with no room left: its reader, its writer, and
/// how many bytes it holds.
fn full_outputs() -> [(std::fs::File, std::fs::File, usize); 2] {
    let pipe = crate::sys::process::pipe().unwrap();
    [pipe, crate::sys::terminal::open_pair().unwrap()].map(|(reader, writer)| {
        let mut writer = std::fs::File::from(nonblocking(writer).unwrap());
        let mut held = 0;
        loop {
            match writer.write(&[b'x'; 512]) {
                Ok(written) => held += written,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    return (reader.into(), writer, held);
                }
            }
        }
    })
}

#[tokio::test]
async fn a_non_blocking_output_that_is_full_is_waited_for() {
    let total = 1 << 20;
    for (mut reader, writer, held) in full_outputs() {
        let (io, streams) = pipes(false).unwrap();
        let (_stdin, mut stdout, stderr) = ends(io);
        drop(stderr);
        let container = std::thread::spawn(move || stdout.write_all(&vec![b'y'; total]));
        let usual = tokio::fs::File::from_std(writer.try_clone().unwrap());
        let user = User {
            stdin: tokio::io::empty(),
            stdout: output(&writer, usual),
            stderr: tokio::io::sink(),
        };
        let pump = tokio::spawn(attach(streams, user));
        let user = std::thread::spawn(move || {
            let mut got = vec![0; held + total];
            reader.read_exact(&mut got).map(|()| got)
        });
        let seen = pump.await.unwrap().unwrap();
        assert_eq!((seen.output_refused, seen.bytes), (false, 1 << 20));
        container.join().unwrap().unwrap();
        let got = user.join().unwrap().unwrap();
        assert!(got[..held].iter().all(|byte| *byte == b'x'));
        assert!(got[held..].iter().all(|byte| *byte == b'y'));
        // It is not ours alone.
        assert!(crate::sys::process::is_nonblocking(&writer).unwrap());
    }
}

#[tokio::test]
async fn a_refused_output_hangs_the_containers_terminal_up() {
    let (master, slave) = crate::sys::terminal::open_pair().unwrap();
    let pty = Pty::new(master).unwrap();
    let mut slave = std::fs::File::from(slave);
    let (tell, told) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let failed =
            std::iter::repeat_with(|| slave.write_all(&[b'y'; 4096])).find_map(Result::err);
        let _ = tell.send(failed);
    });
    let (reader, writer) = tokio::io::duplex(64);
    drop(reader);
    let (_keys, stdin) = tokio::io::duplex(64);
    let user = User {
        stdin,
        stdout: writer,
        stderr: tokio::io::sink(),
    };
    let recorder = Recorder::default();
    let forwarding = forward_signals(&recorder, Some(pty.resizer()));
    let refused = async {
        let seen = attach(Streams::Terminal(pty), user).await.unwrap();
        assert!(seen.output_refused);
        // Bounds a failure only: a write to a terminal that stays open never ends.
        let told = tokio::time::timeout(std::time::Duration::from_secs(60), told).await;
        told.expect("the write fails").unwrap().unwrap()
    };
    let error = tokio::select! {
        ended = forwarding => panic!("forwarding ended: {ended:?}"),
        error = refused => error,
    };
    assert_eq!(error.raw_os_error(), Some(number::EIO));
}

#[tokio::test]
async fn without_interaction_the_input_is_empty() {
    let (io, _streams) = pipes(false).unwrap();
    let (mut stdin, _stdout, _stderr) = ends(io);
    let mut text = String::new();
    assert_eq!(stdin.read_to_string(&mut text).unwrap(), 0);
}

#[tokio::test]
async fn a_terminal_echoes_resizes_and_ends() {
    let pair = crate::sys::terminal::open_pair().unwrap();
    let pty = Pty::new(pair.0).unwrap();
    let size = crate::executor::Size {
        width: 91,
        height: 17,
    };
    pty.resize(size).unwrap();
    assert_eq!(terminal_size(&pair.1), Some(size));
    let mut slave = std::fs::File::from(pair.1);
    let container = std::thread::spawn(move || {
        let mut line = [0; 6];
        slave.read_exact(&mut line).unwrap();
        slave.write_all(b"got it").unwrap();
        line
    });
    let (mut keys, stdin) = tokio::io::duplex(64);
    keys.write_all(b"typed\r").await.unwrap();
    let mut shown = Vec::new();
    let user = User {
        stdin,
        stdout: &mut shown,
        stderr: tokio::io::sink(),
    };
    attach(Streams::Terminal(pty), user).await.unwrap();
    assert_eq!(&container.join().unwrap(), b"typed\n");
    assert_eq!(String::from_utf8(shown).unwrap(), "typed\r\ngot it");
}

#[test]
fn raw_mode_is_taken_back_on_every_path() {
    let (_master, slave) = crate::sys::terminal::open_pair().unwrap();
    let flags = || crate::sys::terminal::settings(&slave).unwrap().local_flags;
    let before = flags();
    {
        let _raw = RawMode::enter(&slave).unwrap();
        assert_ne!(flags(), before);
        assert!(RawMode::enter(&slave).is_err(), "only one at a time");
    }
    assert_eq!(flags(), before);
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _raw = RawMode::enter(&slave).unwrap();
        assert_eq!(flags(), before, "this fails on purpose");
    }));
    assert!(panicked.is_err());
    assert_eq!(flags(), before);
    let raw = RawMode::enter(&slave).unwrap();
    restore_terminal();
    assert_eq!(flags(), before);
    drop(raw);
    assert!(RawMode::enter(std::fs::File::open("/dev/null").unwrap()).is_err());
}

#[tokio::test]
async fn standard_input_is_read_in_blocks_and_ends() {
    let text = "0123456789".repeat(10_000);
    let (source, writer) = crate::sys::process::pipe().unwrap();
    let mut writer = std::fs::File::from(writer);
    let written = text.clone();
    let user = std::thread::spawn(move || writer.write_all(written.as_bytes()));
    let mut read = String::new();
    StdinReader::reading(std::fs::File::from(source))
        .unwrap()
        .read_to_string(&mut read)
        .await
        .unwrap();
    assert_eq!(read, text);
    user.join().unwrap().unwrap();
}

#[tokio::test]
async fn a_non_blocking_input_that_is_empty_is_waited_for() {
    let pipe = crate::sys::process::pipe().unwrap();
    let (master, slave) = crate::sys::terminal::open_pair().unwrap();
    for (source, writer) in [pipe, (slave, master)] {
        let source = std::fs::File::from(nonblocking(source).unwrap());
        let shared = source.try_clone().unwrap();
        let mut reader = StdinReader::reading(source).unwrap();
        let mut line = [0; 4];
        let early = tokio::time::timeout(Duration::from_millis(50), reader.read_exact(&mut line));
        assert!(early.await.is_err(), "there is nothing to read yet");
        let mut writer = std::fs::File::from(writer);
        writer.write_all(b"key\n").unwrap();
        reader.read_exact(&mut line).await.unwrap();
        assert_eq!(&line, b"key\n");
        assert!(crate::sys::process::is_nonblocking(&shared).unwrap());
    }
}

/// A task that only remembers the signals it was sent.
#[derive(Default)]
struct Recorder {
    signals: parking_lot::Mutex<Vec<i32>>,
    sent: tokio::sync::Notify,
}

#[async_trait::async_trait]
impl crate::executor::Task for Recorder {
    fn pid(&self) -> u32 {
        1
    }

    fn times(&self) -> crate::executor::Times {
        crate::executor::Times {
            created: Instant::now(),
            started: Instant::now(),
        }
    }

    async fn wait(&self) -> Result<crate::executor::ExitStatus, crate::executor::Error> {
        std::future::pending().await
    }

    fn signal(&self, signal: i32) -> Result<(), crate::executor::Error> {
        self.signals.lock().push(signal);
        self.sent.notify_one();
        Ok(())
    }

    async fn delete(self: Box<Self>) -> Result<(), crate::executor::Error> {
        Ok(())
    }
}

#[tokio::test]
async fn signals_to_this_process_are_passed_on() {
    let recorder = Recorder::default();
    let forwarding = forward_signals(&recorder, None);
    tokio::pin!(forwarding);
    // The first poll catches the signals; only then may they be sent.
    tokio::select! {
        biased;
        ended = &mut forwarding => panic!("forwarding ended: {ended:?}"),
        () = std::future::ready(()) => {}
    }
    let me = std::process::id().to_string();
    let names = ["INT", "TERM", "HUP", "QUIT", "USR1", "USR2"];
    for name in names {
        let sent = std::process::Command::new("kill")
            .args(["-s", name, &me])
            .status()
            .unwrap();
        assert!(sent.success());
        tokio::select! {
            ended = &mut forwarding => panic!("forwarding ended: {ended:?}"),
            () = recorder.sent.notified() => {}
        }
    }
    let expected = [
        number::SIGINT,
        number::SIGTERM,
        number::SIGHUP,
        number::SIGQUIT,
        number::SIGUSR1,
        number::SIGUSR2,
    ];
    assert_eq!(*recorder.signals.lock(), expected);
}
