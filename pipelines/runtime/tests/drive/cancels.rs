//! Requests that are taken back while their records wait where nobody reads: they end at once, and once.

use crate::support::{NOW_MS, Run, Script, Spec, World, ending, header, on, pass, script, text};
use forebay_operator::{Addressed, Failure};
use forebay_runtime::{
    ahead::{Ahead, Found, Wanted},
    drive::Limits,
    host::memory::MemoryAhead,
    message::Partition,
};
use forebay_schemas::{
    Envelope, Headers, NanoUsd, Origin, RequestId, Retry, Status, Tenant, header as envelope,
};
use futures::future::BoxFuture;
use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

const RETRY: &str = "retry.10m";

/// Fails once for each member, where the record's name begins with `bad`.
fn bad() -> Arc<Script> {
    script(|run: Run| async move {
        match run.body.starts_with("bad") && run.before == 0 {
            true => Err(Failure::unavailable("down", "the model", "refused")),
            false => Ok(vec![on(&run)]),
        }
    })
}

fn spec(script: Arc<Script>) -> Spec {
    Spec { retries: vec![(RETRY, 600)], ..Spec::new(script) }
}

/// Seconds from the beginning of the world to each ending, with its id and status.
fn endings(world: &World) -> Vec<(i64, String, Status)> {
    let endings = world.log.read("endings");
    let told = |message| (header(message, envelope::ID), ending(message).status);
    let at = |ms: i64| (ms - NOW_MS) / 1_000;
    let all = endings.iter().map(|message| {
        let (id, status) = told(message);
        (at(message.timestamp_ms), id, status)
    });
    all.collect()
}

/// The offsets that notes name.
fn notes(world: &World, topic: &str) -> Vec<i64> {
    world.log.read(topic).iter().filter_map(|message| Retry::ended(&message.headers)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_request_that_waits_for_its_retry_ends_soon_after_it_is_taken_back_and_once() {
    let world = World::new();
    let member = world.join(&spec(bad()));
    ["bad1", "bad2", "bad3"].iter().for_each(|body| _ = world.write("requests", None, body));
    pass(5_000).await;
    world.cancel("bad2").await;
    world.cancel("nobody").await;
    pass(3_000).await;
    assert_eq!(endings(&world), [(6, "bad2".to_owned(), Status::Cancelled)]);
    assert_eq!(notes(&world, RETRY), [1]);
    world.settled().await;
    assert_eq!(endings(&world).len(), 1, "it becomes nothing when it is due");
    assert_eq!(world.texts("out"), ["bad1", "bad3"]);
    assert_eq!(world.told(), "out bad1; out bad3; cancelled cancelled");
    member.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_it_cost_so_far_is_in_the_ending() {
    let world = World::new();
    let member = world.join(&spec(bad()));
    let id = RequestId::try_from("a".to_owned()).unwrap();
    let mut carried = Envelope::entering(id, Tenant::default(), Origin::default(), 5, Headers::new());
    (carried.generation, carried.spend, carried.attempts) = (2, NanoUsd(48), 3);
    let mut headers = carried.write();
    let source = "prompts/0/0@0".parse().unwrap();
    let due_ms = NOW_MS + 600_000;
    Retry { due_ms, tries: 1, round: 1, since_ms: 0, source, key: None, redrives: 0 }.write(&mut headers);
    world.write_bytes(RETRY, Some("a"), b"a", headers);
    pass(1_000).await;
    world.cancel("a").await;
    pass(3_000).await;
    let written = world.log.read("endings").remove(0);
    let told = Envelope::read(&written.headers).unwrap().unwrap();
    assert_eq!((told.generation, told.spend, told.attempts), (2, NanoUsd(48), 3));
    assert!(told.timings.queue > 1_000_000, "it waited {} µs", told.timings.queue);
    member.stop().await.unwrap();
}

/// Kills the first member so long after a cancel; what the endings are when all is over, and how many of them came while
/// the record waited.
async fn killed_after(ms: u64) -> (usize, usize) {
    let world = World::new();
    let spec = spec(bad());
    let first = world.join(&spec);
    world.write("requests", None, "bad");
    pass(5_000).await;
    world.cancel("bad").await;
    pass(ms).await;
    first.kill().await;
    let second = world.join(&spec);
    pass(5_000).await;
    let early = endings(&world).len();
    world.settled().await;
    second.stop().await.unwrap();
    assert!(world.texts("out").is_empty());
    assert!(endings(&world).iter().all(|(_, id, status)| id == "bad" && *status == Status::Cancelled));
    (early, endings(&world).len())
}

#[tokio::test(start_paused = true)]
async fn whoever_takes_the_partition_over_ends_it_and_knows_what_has_ended() {
    for ms in (0..3_000).step_by(50) {
        assert_eq!(killed_after(ms).await, (1, 1), "killed after {ms} ms");
    }
}

#[tokio::test(start_paused = true)]
async fn crashed_between_any_two_steps_of_a_look_it_comes_again_soon_and_not_when_it_is_due() {
    let mut twice = 0;
    for polls in 0..12 {
        let world = World::new();
        let spec = spec(bad());
        let slow = Arc::new(crate::support::Slow { log: Arc::clone(&world.log), ms: 20 });
        let first = world.join_over(&spec, Arc::clone(&slow) as _);
        world.write("requests", None, "bad");
        pass(5_000).await;
        world.cancel("bad").await;
        // The look begins between one and one and a half seconds later; an ending and a note take 20 ms each.
        while world.log.read("endings").is_empty() && polls > 0 {
            pass(1).await;
        }
        pass(polls * 3).await;
        first.kill().await;
        let second = world.join(&spec);
        pass(5_000).await;
        let early = endings(&world).len();
        world.settled().await;
        second.stop().await.unwrap();
        assert!(early == 1 || early == 2, "{early} after {polls}");
        assert_eq!(endings(&world).len(), early, "none when it is due, after {polls}");
        twice += usize::from(early == 2);
    }
    assert!(twice > 0, "no crash hit between an ending and its note");
}

#[tokio::test(start_paused = true)]
async fn a_new_owner_of_what_is_due_already_knows_what_has_ended() {
    let world = World::new();
    let spec = spec(bad());
    let first = world.join(&spec);
    world.write("requests", None, "bad");
    pass(5_000).await;
    world.cancel("bad").await;
    pass(5_000).await;
    first.kill().await;
    pass(3_600_000).await;
    let second = world.join(&spec);
    world.settled().await;
    second.stop().await.unwrap();
    assert_eq!(endings(&world).len(), 1);
    assert_eq!(world.texts("out").len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_thousand_cancels_at_once_are_looked_for_together_and_a_partition_that_moves_doubles_none() {
    let world = World::new();
    let member = world.join(&spec(bad()));
    for number in 0..2_000 {
        world.write("requests", None, &format!("bad{number}"));
    }
    pass(5_000).await;
    for number in (0..2_000).step_by(2) {
        world.cancel(&format!("bad{number}")).await;
        if number == 1_000 {
            pass(1_300).await;
            member.rebalance(RETRY);
        }
    }
    pass(30_000).await;
    assert_eq!(endings(&world).len(), 1_000, "all have ended long before they are due");
    member.rebalance(RETRY);
    world.settled().await;
    member.stop().await.unwrap();
    assert_eq!((endings(&world).len(), world.texts("out").len()), (1_000, 1_000));
    let mut ids: Vec<_> = endings(&world).into_iter().map(|(_, id, _)| id).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 1_000);
}

/// Counts what is read.
struct Counted {
    inner: MemoryAhead,
    looks: Arc<AtomicU32>,
}

impl Ahead for Counted {
    fn read(&self, at: &Partition, from: i64, wanted: Wanted) -> BoxFuture<'static, Result<Found, String>> {
        self.looks.fetch_add(1, Ordering::SeqCst);
        self.inner.read(at, from, wanted)
    }
}

#[tokio::test(start_paused = true)]
async fn old_cancels_are_looked_for_once_in_an_assignment() {
    let (world, looks) = (World::new(), Arc::new(AtomicU32::new(0)));
    for number in 0..100 {
        world.cancel(&format!("old{number}")).await;
    }
    let inner = world.ahead(&spec(bad()));
    let ahead = Some(Arc::new(Counted { inner, looks: Arc::clone(&looks) }) as Arc<dyn Ahead>);
    let member = world.join(&Spec { ahead, ..spec(bad()) });
    world.write("requests", None, "bad");
    pass(300_000).await;
    let first = looks.load(Ordering::SeqCst);
    assert!((1..=2).contains(&first), "once for notes and once for what was taken back, not {first} times");
    member.rebalance(RETRY);
    pass(200_000).await;
    assert_eq!(looks.load(Ordering::SeqCst), 2 * first);
    world.settled().await;
    assert_eq!(world.texts("out"), ["bad"]);
    member.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_taken_back_while_it_fails_is_not_set_aside() {
    let world = World::new();
    let failing = script(|_| async {
        pass(2_000).await;
        Err::<Vec<Addressed>, _>(Failure::unavailable("down", "the model", "refused"))
    });
    let member = world.join(&spec(failing));
    world.write("requests", None, "a");
    pass(1_000).await;
    world.cancel("a").await;
    world.settled().await;
    assert_eq!((world.told().as_str(), world.log.read(RETRY).len()), ("cancelled cancelled", 0));
    member.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_request_deep_in_an_overflow_topic_ends_before_its_turn() {
    let slow = script(|run: Run| async move {
        pass(1_000).await;
        Ok::<Vec<Addressed>, Failure>(vec![on(&run)])
    });
    let world = World::new();
    for number in 0..6_000 {
        let id = RequestId::try_from(format!("f{number}")).unwrap();
        let headers = Envelope::entering(id, Tenant::default(), Origin::default(), NOW_MS, Headers::new());
        world.write_bytes(
            "prompts",
            Some(&format!("f{number}")),
            format!("f{number}").as_bytes(),
            headers.write(),
        );
    }
    let spec = Spec { from: vec!["prompts"], fair: true, limits: Limits::new(4), ..Spec::new(slow) };
    let member = world.join(&spec);
    pass(30_000).await;
    let last = text(world.log.read("overflow").last().unwrap());
    world.cancel(&last).await;
    pass(5_000).await;
    assert_eq!(endings(&world), [(31, last.clone(), Status::Cancelled)]);
    world.settled().await;
    assert_eq!((endings(&world).len(), world.texts("out").len()), (1, 5_999));
    member.stop().await.unwrap();
}
