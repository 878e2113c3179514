//! How one record ends, whatever its operator does.

use crate::support::{NOW_MS, Run, Script, Spec, World, header, on, pass, script, text};
use bytes::Bytes;
use forebay_operator::{Addressed, Failure};
use forebay_schemas::{RequestId, dead_letter, header as envelope};
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
    assert!(header(letter, dead_letter::header::BODY).ends_with("at requests/0/0"));
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
