//! How one record ends, whatever its operator does.

use crate::support::{NOW_MS, Run, Script, Spec, World, header, on, pass, script, text};
use bytes::Bytes;
use forebay_operator::{Addressed, Failure};
use forebay_schemas::{
    CallId, DeadLetter, Envelope, Headers, NanoUsd, Origin, RequestId, Retry, Source, Tenant, dead_letter,
    header as envelope,
};
use std::sync::Arc;

/// Gives one record to a stage and says what it became.
async fn check(script: Arc<Script>, body: &str, told: &str) -> World {
    let world = World::new();
    let member = world.join(&Spec::new(script));
    world.write("requests", None, body);
    world.settled().await;
    member.stop().await.unwrap();
    assert_eq!(world.told(), told);
    world
}

/// Milliseconds from the beginning of the world to the first message of a topic.
fn passed(world: &World, topic: &str) -> i64 {
    world.log.read(topic)[0].timestamp_ms - NOW_MS
}

fn unavailable(run: &Run, times: u32, outage: bool) -> Result<Vec<Addressed>, Failure> {
    match run.before < times {
        true if outage => Err(Failure::outage("down", "the model", "refused")),
        true => Err(Failure::unavailable("down", "the model", "refused")),
        false => Ok(vec![on(run)]),
    }
}

#[tokio::test(start_paused = true)]
async fn all_outputs_of_a_record_are_written() {
    let twice = script(|run| async move { Ok(vec![on(&run), on(&run)]) });
    check(twice, "a", "out a; out a").await;
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_tried_once_more() {
    let once = script(|run| async move {
        assert!(run.before > 0, "the first time");
        Ok(vec![on(&run)])
    });
    check(once, "a", "out a").await;
}

#[tokio::test(start_paused = true)]
async fn a_second_panic_is_the_reason_of_a_dead_letter() {
    let always = script(|run| async move { panic!("cannot do {}", run.body) });
    let world = check(always, "a", "dead panicked panicked tries=2; failed panicked").await;
    let letter = &world.log.read("dead-letters")[0];
    assert_eq!(header(letter, dead_letter::header::MESSAGE), "cannot do a");
    assert_eq!(text(letter), "a");
}

#[tokio::test(start_paused = true)]
async fn who_asks_to_be_left_alone_is_left_alone() {
    let asks = script(|run: Run| async move {
        let minutes = Some(std::time::Duration::from_secs(180));
        unavailable(&run, 1, true).map_err(|failure| failure.retry_after(minutes))
    });
    let world = check(asks, "a", "out a").await;
    assert_eq!(passed(&world, "out"), 180_000);
}

#[tokio::test(start_paused = true)]
async fn a_world_that_comes_back_is_waited_for() {
    let world = check(script(|run| async move { unavailable(&run, 3, false) }), "a", "out a").await;
    assert_eq!(passed(&world, "out"), 500 + 2_000 + 8_000);
}

#[tokio::test(start_paused = true)]
async fn a_world_that_stays_away_ends_the_record() {
    let never = script(|run| async move { unavailable(&run, u32::MAX, false) });
    check(never, "a", "dead unavailable down tries=4; failed down").await;
}

#[tokio::test(start_paused = true)]
async fn an_outage_costs_no_try() {
    let long = script(|run| async move {
        match run.before < 1_000 {
            true => unavailable(&run, 1_000, true),
            false => unavailable(&run, 1_003, false),
        }
    });
    let world = check(long, "a", "out a").await;
    assert_eq!(passed(&world, "out"), 1_000 * 2_000 + 10_500);
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_at_the_deadline() {
    let never = script(|run| async move { unavailable(&run, u32::MAX, true) });
    let world = check(never, "a 5000", "expired deadline").await;
    assert_eq!(passed(&world, "endings"), 5_000);
}

#[tokio::test(start_paused = true)]
async fn what_comes_too_late_is_not_begun() {
    let world = World::new();
    let never = script(|_| async { panic!("it was begun") });
    world.write("requests", None, "a 5000");
    pass(5_000).await;
    let member = world.join(&Spec::new(never));
    world.settled().await;
    member.stop().await.unwrap();
    assert_eq!(world.told(), "expired deadline");
}

#[tokio::test(start_paused = true)]
async fn a_refused_record_is_not_tried_again() {
    let refuse = script(|_| async { Err(Failure::rejected("wrong", "it is wrong")) });
    check(refuse, "a", "dead rejected wrong tries=1; failed wrong").await;
}

#[tokio::test(start_paused = true)]
async fn a_record_that_is_no_request_ends_as_a_dead_letter_alone() {
    let world = World::new();
    let refuse = script(|_| async { Err(Failure::rejected("wrong", "it is wrong")) });
    let member = world.join(&Spec { is_job: false, ..Spec::new(refuse) });
    world.write("requests", None, "a 1");
    pass(10).await;
    world.settled().await;
    member.stop().await.unwrap();
    assert_eq!(world.told(), "dead rejected wrong tries=1");
}

#[tokio::test(start_paused = true)]
async fn an_output_that_is_too_large_leaves_its_record_where_it_lies() {
    let grow =
        script(
            |run| async move { Ok(vec![on(&run), Addressed { body: Some(vec![b'x'; 1_001]), ..on(&run) }]) },
        );
    let world = check(grow, "a", "dead rejected output_too_large tries=1; failed output_too_large").await;
    let letter = &world.log.read("dead-letters")[0];
    assert_eq!(letter.value, None);
    assert!(header(letter, dead_letter::header::BODY).ends_with(&format!("at requests/0/0@{NOW_MS}")));
}

#[tokio::test(start_paused = true)]
async fn bytes_that_are_no_record_are_kept_whole() {
    let world = World::new();
    let member = world.join(&Spec::new(script(|run| async move { Ok(vec![on(&run)]) })));
    let headers = vec![("mine".to_owned(), Some(Bytes::from_static(b"kept")))];
    world.write_bytes("requests", Some("key"), b"\xff\xfe", headers);
    world.write("requests", None, "unopenable");
    world.write("requests", None, "a");
    world.settled().await;
    member.stop().await.unwrap();
    assert_eq!(
        world.told(),
        "out a; dead undecodable undecodable tries=1; dead undecodable undecodable tries=1; \
         failed undecodable; failed undecodable"
    );
    let letter = &world.log.read("dead-letters")[0];
    assert_eq!(letter.value.as_deref(), Some(&b"\xff\xfe"[..]));
    assert_eq!(header(letter, dead_letter::header::KEY), "key");
    assert_eq!(header(letter, "mine"), "kept");
    assert_eq!(header(letter, dead_letter::header::SOURCE), format!("requests/0/0@{NOW_MS}"));
    let id = RequestId::derived("memory", "requests", 0, 0, NOW_MS);
    assert_eq!(world.log.read("endings")[0].key.as_deref(), Some(id.as_str().as_bytes()));
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_says_all_that_a_redrive_needs() {
    let world = World::new();
    let refuse = script(|_| async { Err(Failure::rejected("wrong", "it is wrong")) });
    let member = world.join(&Spec::new(refuse));
    let headers = vec![
        ("mine".to_owned(), Some(Bytes::from_static(b"kept"))),
        (envelope::TENANT.to_owned(), Some(Bytes::from_static(b"forged"))),
    ];
    world.write_bytes("requests", Some("key"), b"a 5000", headers);
    world.settled().await;
    member.stop().await.unwrap();
    let stored = &world.log.read("dead-letters")[0];
    let letter = DeadLetter::read(&stored.headers).unwrap();
    let id = RequestId::try_from("a".to_owned()).unwrap();
    let source = Source { topic: "requests".into(), partition: 0, offset: 0, timestamp_ms: NOW_MS };
    let call = CallId::new("memory", &Tenant::default(), &id, 0, "step", 0, 0);
    assert_eq!(stored.key.as_deref(), Some(letter.message_key().as_bytes()));
    assert_eq!((&*letter.stage, &*letter.pipeline, &*letter.schema), ("step", "test", "Text"));
    assert_eq!((letter.source(), &letter.id, letter.tenant), (source, &id, Tenant::default()));
    assert_eq!((&*letter.class, &*letter.code, &*letter.message), ("rejected", "wrong", "it is wrong"));
    assert_eq!((letter.attempts, letter.redrives, letter.generation), (1, 0, 0));
    assert_eq!((letter.since_ms, letter.deadline_at_ms), (NOW_MS, Some(NOW_MS + 5_000)));
    assert_eq!(letter.call_id, call.as_str());
    let carried = Envelope::read(&stored.headers).unwrap().unwrap();
    assert_eq!((carried.id, carried.tenant, carried.accepted_at_ms), (id, Tenant::default(), NOW_MS));
    assert_eq!(carried.deadline_at_ms, Some(NOW_MS + 5_000));
    assert_eq!(carried.client, [("mine".to_owned(), Some(Bytes::from_static(b"kept")))]);
}

#[tokio::test(start_paused = true)]
async fn a_record_that_was_set_aside_dies_as_what_its_step_read_first() {
    let world = World::new();
    let refuse = script(|_| async { Err(Failure::rejected("wrong", "it is wrong")) });
    let from = vec!["requests", "retry.step.10s"];
    let member = world.join(&Spec { from, ..Spec::new(refuse) });
    let source = Source { topic: "inner".into(), partition: 3, offset: 7, timestamp_ms: 11 };
    let retry = Retry {
        due_ms: NOW_MS,
        tries: 3,
        round: 1,
        since_ms: NOW_MS - 9_000,
        source: source.clone(),
        key: Some("first".into()),
        redrives: 2,
    };
    let id = RequestId::try_from("a".to_owned()).unwrap();
    let mut carried = Envelope::entering(id, Tenant::default(), Origin::default(), 5, Headers::new());
    (carried.generation, carried.spend) = (2, NanoUsd(48));
    let mut headers = carried.write();
    retry.write(&mut headers);
    world.write_bytes("retry.step.10s", Some("a"), b"a", headers.clone());
    // From a client it is a claim like any other.
    world.write_bytes("requests", Some("a"), b"b", headers);
    world.settled().await;
    member.stop().await.unwrap();
    let letters = world.log.read("dead-letters");
    let read = |key: &str| {
        let found = letters.iter().find(|letter| letter.key.as_deref() == Some(key.as_bytes())).unwrap();
        let key = dead_letter::original_key(&found.headers).unwrap();
        (DeadLetter::read(&found.headers).unwrap(), key)
    };
    let (letter, key) = read("step/inner/3/7");
    assert_eq!((letter.source(), &key[..]), (source, &b"first"[..]));
    assert_eq!((letter.attempts, letter.since_ms, letter.redrives), (4, NOW_MS - 9_000, 2));
    assert_eq!((letter.generation, letter.paid_nano_usd), (2, NanoUsd(48)));
    let (claimed, _) = read("step/requests/0/0");
    assert_eq!((claimed.attempts, claimed.redrives, claimed.generation), (1, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn an_envelope_that_cannot_be_read_ends_the_record_where_a_host_wrote_it() {
    let forged = || {
        vec![
            (envelope::ID.to_owned(), Some(Bytes::from_static(b"forged"))),
            (envelope::DEADLINE.to_owned(), Some(Bytes::from_static(b"soon"))),
        ]
    };
    let world = World::new();
    let from = vec!["requests", "inner"];
    let member = world.join(&Spec { from, ..Spec::new(script(|run| async move { Ok(vec![on(&run)]) })) });
    world.write_bytes("requests", None, b"a", forged());
    world.write_bytes("inner", None, b"b", forged());
    world.settled().await;
    member.stop().await.unwrap();
    assert_eq!(world.told(), "out a; dead undecodable undecodable tries=1; failed undecodable");
    assert_eq!(header(&world.log.read("out")[0], envelope::ID), "a", "a client's envelope is none");
}

#[tokio::test(start_paused = true)]
async fn a_loop_ends_after_the_visits_that_the_pipeline_allows() {
    let world = World::new();
    let spec = Spec { from: vec!["requests", "again"], to: "again", visits_max: Some(3), ..endless() };
    let member = world.join(&spec);
    world.write("requests", None, "a");
    world.settled().await;
    member.stop().await.unwrap();
    assert_eq!(world.texts("again"), ["a"; 3]);
    assert_eq!(world.told(), "dead rejected visits_spent tries=1; failed visits_spent");
}

fn endless() -> Spec {
    Spec::new(script(|run| async move { Ok(vec![on(&run)]) }))
}
