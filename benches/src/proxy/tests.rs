//! The proxy changes no byte, delayed or not, and counts all of them.

use super::*;

fn exchange(one_way: Duration) -> Duration {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = Proxy::start(&server.local_addr().unwrap().to_string(), one_way).unwrap();
    let meter = proxy.measure();
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
    let began = Instant::now();
    let mut client = TcpStream::connect(proxy.address()).unwrap();
    client.write_all(b"hello").unwrap();
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    let took = began.elapsed();
    assert_eq!(serving.join().unwrap(), *b"hello");
    assert!(got == answer);
    assert_eq!(meter.received(), 1_000_000);
    took
}

#[test]
fn counts_what_the_server_sends_and_changes_nothing() {
    exchange(Duration::ZERO);
}

#[test]
fn a_delayed_exchange_takes_two_round_trips_and_changes_nothing() {
    assert!(exchange(Duration::from_millis(10)) >= Duration::from_millis(40));
}
