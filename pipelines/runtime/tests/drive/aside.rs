//! What a stage sets aside: on retry topics what met a world that failed, on the overflow topic a tenant's flood.

use crate::support::{NOW_MS, Run, Script, Spec, World, header, of, on, pass, script, text};
use forebay_operator::{Addressed, Failure};
use forebay_runtime::drive::Limits;
use forebay_schemas::{
    DeadLetter, Envelope, Headers, Origin, RequestId, Retry, Tenant, dead_letter, header as envelope,
};
use std::sync::Arc;

const RETRIES: [(&str, u64); 3] = [("retry.10s", 10), ("retry.1m", 60), ("retry.10m", 600)];

fn spec(script: Arc<Script>) -> Spec {
    Spec { retries: RETRIES.into(), ..Spec::new(script) }
}

/// Fails so many times, where the record's name begins with `bad`.
fn bad(times: u32) -> Arc<Script> {
    script(move |run: Run| async move {
        match run.body.starts_with("bad") && run.before < times {
            true => Err(Failure::unavailable("down", "the model", "refused")),
            false => Ok(vec![on(&run)]),
        }
    })
}

fn retry(world: &World, topic: &str) -> Vec<Retry> {
    world.log.read(topic).iter().map(|message| Retry::read(&message.headers).unwrap().unwrap()).collect()
}

/// Seconds from the beginning of the world to each message of a topic.
fn seconds(world: &World, topic: &str) -> Vec<i64> {
    world.log.read(topic).iter().map(|message| (message.timestamp_ms - NOW_MS) / 1_000).collect()
}

#[tokio::test(start_paused = true)]
async fn a_record_passes_all_retry_topics_and_is_given_up_behind_the_last() {
    let world = World::new();
    let member = world.join(&spec(bad(9)));
    world.write("requests", Some("k"), "bad");
    world.settled().await;
    member.stop().await.unwrap();
    assert!(world.told().ends_with("; failed down"), "{}", world.told());
    for (topic, at) in [("retry.10s", 0), ("retry.1m", 10), ("retry.10m", 70), ("endings", 670)] {
        assert_eq!(seconds(&world, topic), [at], "{topic}");
    }
    let last = retry(&world, "retry.10m").remove(0);
    assert_eq!((last.tries, last.round, last.since_ms), (3, 3, NOW_MS));
    assert_eq!((last.source.to_string(), last.key.unwrap()), (format!("requests/0/0@{NOW_MS}"), "k".into()));
    let dead = &world.log.read("dead-letters")[0].headers;
    let letter = DeadLetter::read(dead).unwrap();
    assert_eq!(
        (letter.message_key(), letter.attempts, letter.since_ms),
        ("step/requests/0/0".to_owned(), 4, NOW_MS)
    );
    assert_eq!(dead_letter::original_key(dead).unwrap(), "k");
}

#[tokio::test(start_paused = true)]
async fn a_tombstone_that_is_tried_again_takes_away_the_same() {
    let world = World::new();
    let member = world.join(&Spec { from: vec!["inner"], ..spec(bad(1)) });
    let envelope = Envelope::entering(
        RequestId::try_from("id".to_owned()).unwrap(),
        Tenant::default(),
        Origin::default(),
        NOW_MS,
        Headers::new(),
    );
    world.log.append(&"inner".into(), Some("bad".into()), None, envelope.write());
    world.settled().await;
    member.stop().await.unwrap();
    assert_eq!(world.log.read("retry.10s")[0].key.as_deref(), Some(&b"id"[..]));
    assert_eq!(world.texts("out"), ["bad"], "its own key, and not the id that it waited under");
}

#[tokio::test(start_paused = true)]
async fn who_waits_to_be_tried_again_is_in_nobodys_way() {
    let world = World::new();
    let member = world.join(&Spec { limits: Limits::new(1), ..spec(bad(2)) });
    for number in 0..100 {
        world.write(
            "requests",
            None,
            &if number % 10 == 0 { format!("bad{number}") } else { format!("good{number}") },
        );
    }
    pass(1_000).await;
    assert_eq!(world.texts("out").len(), 90, "the good ones have passed");
    assert_eq!(world.committed("requests"), 100);
    assert_eq!(world.committed("retry.10s"), 0);
    // Whoever comes later waits as long, and no longer.
    pass(4_000).await;
    world.write("requests", None, "bad later");
    pass(5_500).await;
    assert_eq!(world.committed("retry.10s"), 10, "due first, tried first");
    world.settled().await;
    assert_eq!(seconds(&world, "out")[90..], [[70; 10].as_slice(), &[75]].concat());
    member.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_member_that_takes_a_retry_topic_over_waits_for_what_is_due() {
    let world = World::new();
    let spec = spec(bad(1));
    let first = world.join(&spec);
    world.write("requests", None, "bad");
    pass(5_000).await;
    first.rebalance("retry.10s");
    pass(1_000).await;
    first.kill().await;
    let second = world.join(&spec);
    world.settled().await;
    // The record is new to the second member's operator, which fails it once more.
    assert_eq!(seconds(&world, "retry.1m"), [10]);
    assert_eq!(seconds(&world, "out"), [70]);
    second.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_deadline_that_comes_before_a_retry_is_due_is_waited_for_in_place() {
    let world = World::new();
    let member = world.join(&spec(bad(3)));
    world.write("requests", None, "bad1 5000");
    world.settled().await;
    assert_eq!(world.told(), "expired deadline");
    assert_eq!(world.log.read("endings")[0].timestamp_ms - NOW_MS, 5_000);
    assert!(world.log.read("retry.10s").is_empty());
    // Sooner where later would be too late: twice 10 s, and then in place.
    world.write("requests", None, "bad2 25000");
    world.settled().await;
    assert_eq!(world.log.read("retry.10s").len(), 2);
    assert!(world.log.read("retry.1m").is_empty());
    assert_eq!(world.texts("out"), ["bad2 25000"]);
    member.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_outage_is_waited_for_in_place_and_costs_no_try() {
    let outage = script(|run: Run| async move {
        match run.before {
            0..=50 => Err(Failure::outage("down", "the model", "refused")),
            51 => Err(Failure::unavailable("down", "the model", "refused")),
            _ => Ok(vec![on(&run)]),
        }
    });
    let world = World::new();
    let member = world.join(&spec(outage));
    world.write("requests", None, "a");
    world.settled().await;
    assert_eq!(retry(&world, "retry.10s")[0].tries, 1);
    assert_eq!(world.texts("out"), ["a"]);
    member.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_writes_retry_headers_changes_nothing() {
    let world = World::new();
    let member = world.join(&spec(bad(0)));
    let mut headers = Headers::new();
    let source = "requests/0/0@0".parse().unwrap();
    let due_ms = NOW_MS + 3_600_000;
    Retry { due_ms, tries: 9, round: 9, since_ms: 0, source, key: None, redrives: 9 }.write(&mut headers);
    world.write_bytes("requests", None, b"a", headers);
    world.settled().await;
    assert_eq!(seconds(&world, "out"), [0]);
    member.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_is_of_the_backfill_stays_in_its_lane_and_takes_two_of_ten_places() {
    let slow = script(|run: Run| async move {
        pass(100).await;
        Ok::<Vec<Addressed>, Failure>(vec![on(&run)])
    });
    let world = World::new();
    let from = vec!["requests", "requests-backfill"];
    for number in 0..100 {
        world.write("requests-backfill", None, &format!("b{number}"));
    }
    let member = world.join(&Spec { from, limits: Limits::new(10), ..Spec::new(slow) });
    pass(150).await;
    let before = world.texts("out-backfill").len();
    for number in 0..100 {
        world.write("requests", None, &format!("a{number}"));
    }
    pass(1_000).await;
    let (live, backfill) = (world.texts("out").len(), world.texts("out-backfill").len() - before);
    assert!(live >= 70 && backfill <= 30, "{live} and {backfill}");
    world.settled().await;
    assert_eq!((world.texts("out").len(), world.texts("out-backfill").len()), (100, 100));
    let lane = header(&world.log.read("out-backfill")[0], envelope::LANE);
    assert_eq!((lane.as_str(), header(&world.log.read("out")[0], envelope::LANE).as_str()), ("backfill", ""));
    member.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn behind_one_tenants_flood_the_ten_of_another_are_served_soon() {
    let slow = script(|run: Run| async move {
        pass(10).await;
        Ok::<Vec<Addressed>, Failure>(vec![on(&run)])
    });
    let world = World::new();
    (0..20_000)
        .for_each(|number| of(&world, "prompts", "flood", &format!("f{number}"), &format!("f{number}")));
    (0..10).for_each(|number| of(&world, "prompts", "small", &format!("s{number}"), &format!("s{number}")));
    let spec = Spec { from: vec!["prompts"], fair: true, limits: Limits::new(4), ..Spec::new(slow) };
    let member = world.join(&spec);
    world.settled().await;
    let out = world.log.read("out");
    let last = out.iter().rposition(|message| text(message).starts_with('s')).unwrap();
    // A quarter of a second passes until the length of the queue is known.
    assert!(last < 200, "its ten were over after {last} of {}", out.len());
    assert_eq!(out.len(), 20_010);
    assert!(world.log.read("overflow").len() > 10_000);
    member.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_goes_round_by_the_overflow_topic_dies_as_what_its_step_read_first() {
    let slow = script(|run: Run| async move {
        pass(10).await;
        match run.body.starts_with("bad") {
            true if run.body.ends_with("down") => Err(Failure::unavailable("down", "the model", "refused")),
            true => Err(Failure::rejected("wrong", "it is wrong")),
            false => Ok::<Vec<Addressed>, Failure>(vec![on(&run)]),
        }
    });
    let world = World::new();
    for number in 0..6_000 {
        world.write("requests", None, &format!("f{number}"));
        of(&world, "prompts", "flood", &format!("g{number}"), &format!("g{number}"));
    }
    let of_client = ["bad", "bad-down"].map(|body| world.write("requests", Some("k"), body));
    let of_host = world.log.end("prompts");
    of(&world, "prompts", "flood", "x", "bad");
    let from = vec!["requests", "prompts"];
    let member = world.join(&Spec { from, fair: true, limits: Limits::new(4), ..spec(slow) });
    world.settled().await;
    member.stop().await.unwrap();
    let overflown: Vec<_> =
        world.texts("overflow").into_iter().filter(|text| text.starts_with("bad")).collect();
    assert_eq!(overflown.len(), 3, "they went round");
    let letters = world.log.read("dead-letters").into_iter().map(|letter| {
        let key = dead_letter::original_key(&letter.headers);
        (DeadLetter::read(&letter.headers).unwrap().message_key(), key.unwrap())
    });
    let mut letters: Vec<_> = letters.collect();
    letters.sort();
    let mut expected = of_client.map(|offset| (format!("step/requests/0/{offset}"), "k".into())).to_vec();
    expected.insert(0, (format!("step/prompts/0/{of_host}"), "x".into()));
    assert_eq!(letters, expected);
}

#[tokio::test(start_paused = true)]
async fn what_is_too_large_to_be_set_aside_is_a_dead_letter_and_stops_nobody() {
    let slow = script(|run: Run| async move {
        pass(10).await;
        Ok::<Vec<Addressed>, Failure>(vec![on(&run)])
    });
    let world = World::new();
    // More than a topic of this world takes from a stage.
    let large = "x".repeat(2_000);
    for number in 0..4_000 {
        of(&world, "prompts", "flood", &format!("f{number}"), &large);
    }
    let spec = Spec { from: vec!["prompts"], fair: true, limits: Limits::new(4), ..Spec::new(slow) };
    let member = world.join(&spec);
    world.settled().await;
    assert_eq!((world.texts("out").len(), world.log.read("overflow").len()), (0, 0));
    assert_eq!((world.log.read("dead-letters").len(), world.log.read("endings").len()), (4_000, 4_000));
    member.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_tenant_alone_within_its_share_sets_nothing_aside() {
    let world = World::new();
    let pass_on = script(|run| async move { Ok(vec![on(&run)]) });
    let member = world.join(&Spec { from: vec!["prompts"], fair: true, ..Spec::new(pass_on) });
    (0..500).for_each(|number| of(&world, "prompts", "a", &format!("f{number}"), &format!("f{number}")));
    world.settled().await;
    assert_eq!((world.texts("out").len(), world.log.read("overflow").len()), (500, 0));
    member.stop().await.unwrap();
}
