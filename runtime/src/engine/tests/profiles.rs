//! What a daemon does with a profile that lies beside an image in its registry.

use std::time::Duration;

use lazarette_fetcher::test_util::FakeRegistry;

use super::*;
use crate::profile::document::COMMANDS_MAX;

/// Pushes `profiles` beside their image, as another node does.
async fn put_beside(image: &Reference, profiles: &ImageProfiles) {
    let dir = scratch();
    let engine = open(dir.path(), &Arc::default());
    import(&engine, image, profiles).await;
    engine.push_profiles(image).await.unwrap();
}

async fn import(engine: &Engine, image: &Reference, profiles: &ImageProfiles) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), serde_json::to_vec(profiles).unwrap()).unwrap();
    engine.import_profiles(image, file.path()).await.unwrap();
}

async fn resolve(engine: &Engine, image: &Reference) -> Image {
    let trace = Trace::new(Instant::now());
    engine.resolve(image, &trace).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profile_that_a_daemon_finds_leaves_its_database_open() {
    let (registry, dir) = (FakeRegistry::start().await, scratch());
    let [reference, _] = push(&registry);
    let engine = open(dir.path(), &Arc::default());
    let image = resolve(&engine, &reference).await;
    put_beside(&reference, &profiles_of(&image)).await;
    let found = engine.ask_for_profiles(&image).await;
    assert_eq!(found, Some(profiles_of(&image)));
    let wait = Duration::from_millis(1);
    let other = blocking(move || {
        let db = Db::open_within(dir.path().join("root/db"), &[], wait)?;
        db.prepare_commit()
    });
    let error = other.await.unwrap_err().to_string();
    assert!(error.contains(&std::process::id().to_string()), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profile_that_is_found_is_added_to_what_was_learnt_meanwhile() {
    let (registry, dir) = (FakeRegistry::start().await, scratch());
    let [reference, _] = push(&registry);
    let engine = open(dir.path(), &Arc::default());
    let image = resolve(&engine, &reference).await;
    let theirs = profiles_of(&image);
    put_beside(&reference, &theirs).await;
    // As a start does that is over before the registry answers.
    let mut own = theirs.clone();
    own.commands[0].command = Digest::sha256(b"own");
    import(&engine, &reference, &own).await;
    engine.ask_for_profiles(&image).await.unwrap();
    let known = engine.profiles(&reference).await.unwrap();
    for one in theirs.commands.iter().chain(&own.commands) {
        assert!(known.commands.contains(one), "{known:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_learnt_at_once_is_learnt_all() {
    let (registry, dir) = (FakeRegistry::start().await, scratch());
    let [reference, _] = push(&registry);
    let engine = open(dir.path(), &Arc::default());
    let image = resolve(&engine, &reference).await;
    let each = (0..COMMANDS_MAX).map(|n| {
        let mut one = profiles_of(&image);
        one.commands[0].command = Digest::sha256(&[u8::try_from(n).unwrap()]);
        one
    });
    let each: Vec<ImageProfiles> = each.collect();
    let learning = each.iter().map(|one| import(&engine, &reference, one));
    futures_util::future::join_all(learning).await;
    let known = engine.profiles(&reference).await.unwrap();
    for one in &each {
        assert!(known.commands.contains(&one.commands[0]), "{known:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn starts_in_the_future_leave_room_for_those_of_today() {
    let (registry, dir) = (FakeRegistry::start().await, scratch());
    let [reference, _] = push(&registry);
    let engine = open(dir.path(), &Arc::default());
    let image = resolve(&engine, &reference).await;
    let own = profiles_of(&image);
    let mut theirs = own.clone();
    theirs.commands = (0..COMMANDS_MAX)
        .map(|n| CommandProfile {
            command: Digest::sha256(&[u8::try_from(n).unwrap()]),
            updated_at: u64::MAX,
            ..own.commands[0].clone()
        })
        .collect();
    import(&engine, &reference, &theirs).await;
    let command = profile::Command::new(&["a".to_owned()]);
    let touches = own.commands[0].blocks.iter().map(|block| profile::Touch {
        layer: block.layer,
        place: block.place,
    });
    let read = touches.collect();
    engine.learn((&image, false), command.clone(), read).await;
    let known = engine.profiles(&reference).await.unwrap();
    assert!(known.of(&command).is_some(), "{known:?}");
    let now = crate::engine::now_s();
    assert!(known.commands.iter().all(|one| one.updated_at <= now));
}
