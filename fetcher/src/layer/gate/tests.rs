//! Waiting for passes, giving them up, and pausing.

use std::pin::Pin;

use futures_util::{FutureExt as _, poll};

use super::*;

type Going = Pin<Box<dyn Future<Output = Option<Pass>>>>;

fn gate(slots: u32) -> Arc<Gate> {
    pausing(slots, Duration::from_secs(3600))
}

fn pausing(slots: u32, pause_max: Duration) -> Arc<Gate> {
    Gate::new(EngineConfig {
        on_demand_max: slots,
        profile_max: slots,
        background_max: slots,
        memory_bytes_max: 100,
        pause_max,
        ..EngineConfig::default()
    })
}

fn ask(class: Priority, bytes: u64) -> Ask {
    Ask {
        class,
        host: "a".into(),
        bytes,
    }
}

fn enter(gate: &Arc<Gate>, class: Priority, bytes: u64) -> Going {
    Box::pin(gate.enter(ask(class, bytes)).pass())
}

async fn goes(going: &mut Going) -> Option<Pass> {
    match poll!(going) {
        std::task::Poll::Ready(pass) => pass,
        std::task::Poll::Pending => None,
    }
}

#[tokio::test]
async fn who_goes_away_leaves_its_place() {
    let gate = gate(1);
    let running = enter(&gate, Priority::OnDemand, 10).await.unwrap();
    let mut gone = enter(&gate, Priority::OnDemand, 100);
    let mut told = enter(&gate, Priority::OnDemand, 10);
    let mut last = enter(&gate, Priority::Background, 10);
    for waiting in [&mut gone, &mut told, &mut last] {
        assert!(waiting.now_or_never().is_none());
    }
    drop(gone);
    // `told` gets its pass but is dropped before it looks.
    drop(running);
    assert_eq!(gate.memory(), 10);
    drop(told);
    drop(goes(&mut last).await.unwrap());
    assert_eq!(gate.memory(), 0);
}

/// The one who needs most memory is at the head of the line; without it the rest may go.
#[tokio::test]
async fn who_leaves_the_head_of_the_line_lets_the_others_go() {
    let gate = gate(9);
    let running = enter(&gate, Priority::OnDemand, 60).await.unwrap();
    let large = enter(&gate, Priority::OnDemand, 100);
    let mut small = enter(&gate, Priority::OnDemand, 40);
    assert!(goes(&mut small).await.is_none(), "nobody overtakes");
    drop(large);
    drop(goes(&mut small).await.unwrap());
    drop(running);
    assert_eq!(gate.memory(), 0);
}

#[tokio::test]
async fn a_background_request_pauses_while_others_go() {
    let gate = gate(2);
    let background = enter(&gate, Priority::Background, 10).await.unwrap();
    assert_eq!(background.turn().await, Turn::Go);
    let reader = enter(&gate, Priority::OnDemand, 10).await.unwrap();
    assert_eq!(reader.turn().await, Turn::Go, "only background pauses");
    let mut turn = Box::pin(background.turn());
    assert!(poll!(&mut turn).is_pending());
    drop(reader);
    assert_eq!(turn.await, Turn::Go);
}

#[tokio::test]
async fn a_pause_ends_by_leaving_or_by_being_hurried() {
    let gate = gate(2);
    let background = enter(&gate, Priority::Background, 10).await.unwrap();
    let reader = enter(&gate, Priority::OnDemand, 10).await.unwrap();
    let mut turn = Box::pin(background.turn());
    assert!(poll!(&mut turn).is_pending());
    gate.promote(background.ticket(), Priority::OnDemand);
    assert_eq!(turn.await, Turn::Go);
    drop((reader, background));
    let impatient = pausing(2, Duration::ZERO);
    let background = enter(&impatient, Priority::Background, 10).await.unwrap();
    let reader = enter(&impatient, Priority::OnDemand, 10).await.unwrap();
    assert_eq!(background.turn().await, Turn::Leave, "after a while");
    drop((reader, background));
    let background = enter(&gate, Priority::Background, 10).await.unwrap();
    let mut large = enter(&gate, Priority::OnDemand, 95);
    assert_eq!(
        background.turn().now_or_never(),
        Some(Turn::Leave),
        "it holds what a reader waits for"
    );
    drop(background);
    drop(goes(&mut large).await.unwrap());
    assert_eq!(gate.memory(), 0);
}

#[tokio::test]
async fn it_is_quiet_once_nobody_has_been_ahead_for_a_while() {
    const PAUSE: Duration = Duration::from_millis(5);
    let gate = gate(2);
    let began = Instant::now();
    let behind = enter(&gate, Priority::Background, 10).await.unwrap();
    gate.quiet(began, PAUSE).await;
    assert!(
        began.elapsed() >= PAUSE,
        "that was nobody, but it has just begun"
    );
    drop(behind);
    for class in [Priority::OnDemand, Priority::Profile] {
        let waiting = gate.quiet(began, PAUSE);
        tokio::pin!(waiting);
        let pass = enter(&gate, class, 10).await.unwrap();
        let while_it_goes_on = timeout(4 * PAUSE, &mut waiting).await;
        assert!(while_it_goes_on.is_err(), "{class:?}");
        // Before it ends: this thread may be made to wait between the two.
        let ended = Instant::now();
        drop(pass);
        waiting.await;
        assert!(ended.elapsed() >= PAUSE, "{class:?}");
    }
}
