//! Bodies too large to travel: they come out as they went in, whatever happens to a process or to the object store.

use crate::support::{Script, Spec, Store, World, header, on, pass, script, text};
use forebay_operator::{Addressed, Failure};
use forebay_runtime::{
    claims::{Claims, Objects},
    drive::{Limits, SendError, Sink},
    host::memory::Stored,
    message::Outgoing,
};
use forebay_schemas::{Claim, claim, dead_letter};
use futures::future::BoxFuture;
use std::{
    future::pending,
    sync::{Arc, atomic::Ordering},
};

/// Bodies of more bytes do not travel; the log takes none of more than 1,000.
const OVER: usize = 200;

/// Two steps: `requests` → `out` → `end`, and an object store beside them.
struct Site {
    world: World,
    store: Arc<Store>,
    claims: Arc<Claims>,
}

impl Site {
    fn new() -> Self {
        let store = Arc::new(Store::default());
        let claims = Arc::new(Claims::new(Arc::clone(&store) as Arc<dyn Objects>, Some(OVER)));
        Self { world: World::new(), store, claims }
    }

    fn first(&self, script: Arc<Script>) -> Spec {
        Spec { claims: Some(Arc::clone(&self.claims)), ..Spec::new(script) }
    }

    fn second(&self, script: Arc<Script>) -> Spec {
        Spec { key: "second", from: vec!["out"], to: "end", ..self.first(script) }
    }

    /// Lets one large record come to `out`, where the second step is to read it.
    async fn one_on_its_way(&self, body: &str) -> Claim {
        let first = self.world.join(&self.first(pass_on()));
        self.world.write("requests", None, body);
        self.world.settled().await;
        first.stop().await.unwrap();
        claim(&self.world.log.read("out")[0])
    }

    /// Runs the second step until all is done.
    async fn then(&self, second: &Spec) {
        let second = self.world.join(second);
        self.world.settled().await;
        second.stop().await.unwrap();
    }

    fn is_away(&self, away: bool) {
        self.store.away.store(away, Ordering::SeqCst);
    }
}

fn pass_on() -> Arc<Script> {
    script(|run| async move { Ok(vec![on(&run)]) })
}

fn large(name: &str) -> String {
    format!("{name} {}", "x".repeat(4 * OVER))
}

/// The claim of a message, whose value is empty and no tombstone.
#[track_caller]
fn claim(message: &Stored) -> Claim {
    assert_eq!(message.value.as_deref(), Some(&[][..]));
    let claims = message.headers.iter().filter(|(name, _)| name == claim::header::CLAIM);
    assert_eq!(claims.count(), 1);
    Claim::read(&message.headers).unwrap().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_large_body_is_put_on_its_way_and_an_operator_sees_all_of_it() {
    let site = Site::new();
    let on_its_way = site.one_on_its_way(&large("a")).await;
    assert_eq!(on_its_way.bytes, large("a").len());
    site.then(&site.second(pass_on())).await;
    assert_eq!(site.world.texts("end"), [large("a")]);
    assert_eq!(site.world.told(), "out ", "nothing ended otherwise");
}

#[tokio::test(start_paused = true)]
async fn a_small_body_travels() {
    let site = Site::new();
    let first = site.world.join(&site.first(pass_on()));
    site.world.write("requests", None, &"x".repeat(OVER));
    site.world.settled().await;
    first.stop().await.unwrap();
    assert_eq!(site.world.texts("out"), ["x".repeat(OVER)]);
    assert!(site.store.objects.keys().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_body_may_grow_larger_than_any_topic_takes() {
    let site = Site::new();
    let grow = script(|run| async move {
        Ok(vec![Addressed { body: Some(run.body.repeat(100).into_bytes()), ..on(&run) }])
    });
    let count = script(|run| async move {
        Ok(vec![Addressed { body: Some(run.body.len().to_string().into()), ..on(&run) }])
    });
    let first = site.world.join(&site.first(grow));
    site.world.write("requests", None, &large("a"));
    site.then(&site.second(count)).await;
    first.stop().await.unwrap();
    assert_eq!(site.world.texts("end"), [(100 * large("a").len()).to_string()]);
}

/// A log that never answers.
struct Stuck;

impl Sink for Stuck {
    fn send(&self, _: Vec<Outgoing>) -> BoxFuture<'_, Result<(), SendError>> {
        Box::pin(pending())
    }
}

#[tokio::test(start_paused = true)]
async fn a_crash_between_the_object_and_its_message_leaves_one_of_each() {
    let site = Site::new();
    let crashing = site.world.join_over(&site.first(pass_on()), Arc::new(Stuck));
    site.world.write("requests", None, &large("a"));
    pass(1_000).await;
    let put = site.store.objects.keys();
    assert_eq!(put.len(), 1, "the object comes first");
    crashing.kill().await;
    assert_eq!(site.world.texts("out").len(), 0);
    let again = site.world.join(&site.first(pass_on()));
    site.then(&site.second(pass_on())).await;
    again.stop().await.unwrap();
    assert_eq!(site.store.objects.keys(), put);
    assert_eq!(claim(&site.world.log.read("out")[0]).key, put[0]);
    assert_eq!(site.world.texts("end"), [large("a")]);
}

#[tokio::test(start_paused = true)]
async fn a_record_that_is_delivered_twice_is_one_object() {
    let site = Site::new();
    let limits = Limits { commit_every: std::time::Duration::from_secs(3_600), ..Limits::new(64) };
    let first = site.world.join(&Spec { limits, ..site.first(pass_on()) });
    site.world.write("requests", None, &large("a"));
    pass(1_000).await;
    first.lose("requests");
    pass(1_000).await;
    first.stop().await.unwrap();
    site.then(&site.second(pass_on())).await;
    assert_eq!(site.store.objects.keys().len(), 1);
    assert_eq!(site.world.texts("end"), [large("a"), large("a")]);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_is_gone_ends_its_request_and_says_so() {
    let site = Site::new();
    let claimed = site.one_on_its_way(&large("a")).await;
    site.store.objects.delete(&claimed.key).await.unwrap();
    site.then(&site.second(pass_on())).await;
    assert_eq!(site.world.told(), "out ; dead rejected claim_missing tries=1; failed claim_missing");
    let letter = &site.world.log.read("dead-letters")[0];
    assert_eq!(claim(letter), claimed);
    assert!(header(letter, dead_letter::header::MESSAGE).contains(&claimed.key));
}

#[tokio::test(start_paused = true)]
async fn a_body_that_is_damaged_ends_its_request_and_says_so() {
    let site = Site::new();
    let claimed = site.one_on_its_way(&large("a")).await;
    site.store.objects.replace(&claimed.key, large("b").into());
    site.then(&site.second(pass_on())).await;
    assert_eq!(site.world.told(), "out ; dead rejected claim_damaged tries=1; failed claim_damaged");
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_cannot_be_read_is_put_aside() {
    let site = Site::new();
    let second = site.world.join(&site.second(pass_on()));
    let unread = vec![(claim::header::CLAIM.to_owned(), Some("nowhere".into()))];
    site.world.write_bytes("out", None, b"", unread);
    site.world.settled().await;
    second.stop().await.unwrap();
    assert_eq!(site.world.told(), "out ; dead undecodable undecodable tries=1; failed undecodable");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_is_waited_for_by_who_puts() {
    let site = Site::new();
    site.is_away(true);
    let first = site.world.join(&site.first(pass_on()));
    site.world.write("requests", None, &large("a"));
    pass(3_600_000).await;
    assert_eq!((site.world.texts("out").len(), site.world.committed("requests")), (0, 0));
    site.is_away(false);
    site.then(&site.second(pass_on())).await;
    first.stop().await.unwrap();
    assert_eq!(site.world.texts("end"), [large("a")]);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_is_waited_for_by_who_fetches_and_costs_no_try() {
    let site = Site::new();
    site.one_on_its_way(&large("a")).await;
    site.is_away(true);
    let fails_thrice = script(|run| async move {
        match run.before < 3 {
            true => Err(Failure::unavailable("down", "the model", "refused")),
            false => Ok(vec![on(&run)]),
        }
    });
    let second = site.world.join(&site.second(fails_thrice));
    pass(3_600_000).await;
    assert_eq!(site.world.texts("end").len(), 0);
    site.is_away(false);
    site.world.settled().await;
    second.stop().await.unwrap();
    assert_eq!(site.world.texts("end"), [large("a")], "it had all of its tries left");
}

#[tokio::test(start_paused = true)]
async fn a_deadline_passes_also_while_the_store_is_away() {
    let site = Site::new();
    site.one_on_its_way(&large("a 60000")).await;
    site.is_away(true);
    site.then(&site.second(pass_on())).await;
    assert_eq!(site.world.told(), "out ; expired deadline");
}

#[tokio::test(start_paused = true)]
async fn a_drain_does_not_wait_for_a_store_that_is_away() {
    let site = Site::new();
    site.one_on_its_way(&large("a")).await;
    site.is_away(true);
    let second = site.world.join(&site.second(pass_on()));
    pass(1_000).await;
    second.stop().await.unwrap();
    assert_eq!(site.world.log.committed("second", &"out".into()), 0);
    site.is_away(false);
    site.then(&site.second(pass_on())).await;
    assert_eq!(site.world.texts("end"), [large("a")]);
}

#[tokio::test(start_paused = true)]
async fn what_is_set_aside_to_be_tried_again_carries_its_claim() {
    let site = Site::new();
    let claimed = site.one_on_its_way(&large("a")).await;
    let fails_once = script(|run| async move {
        match run.before < 1 {
            true => Err(Failure::unavailable("down", "the model", "refused")),
            false => Ok(vec![on(&run)]),
        }
    });
    site.then(&Spec { retries: vec![("retry.10s", 10)], ..site.second(fails_once) }).await;
    assert_eq!(claim(&site.world.log.read("retry.10s")[0]), claimed);
    assert_eq!(site.world.texts("end"), [large("a")]);
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_carries_the_claim_of_its_record() {
    let site = Site::new();
    let claimed = site.one_on_its_way(&large("a")).await;
    let refuses = script(|_| async { Err(Failure::rejected("no", "not this one")) });
    site.then(&site.second(refuses)).await;
    assert_eq!(site.world.told(), "out ; dead rejected no tries=1; failed no");
    assert_eq!(claim(&site.world.log.read("dead-letters")[0]), claimed);
    assert_eq!(site.claims.get(&claimed).await.unwrap(), large("a"));
}

#[tokio::test(start_paused = true)]
async fn what_grows_too_large_for_a_topic_without_claims_leaves_its_claim_in_the_dead_letter() {
    let site = Site::new();
    let claimed = site.one_on_its_way(&large("a")).await;
    let grow = script(|run| async move {
        Ok(vec![Addressed { body: Some(run.body.repeat(100).into_bytes()), ..on(&run) }])
    });
    site.then(&site.second(grow)).await;
    assert_eq!(site.world.told(), "out ; dead rejected output_too_large tries=1; failed output_too_large");
    let letter = &site.world.log.read("dead-letters")[0];
    assert_eq!((claim(letter), header(letter, dead_letter::header::BODY)), (claimed, String::new()));
}

#[tokio::test(start_paused = true)]
async fn a_client_cannot_claim_what_is_not_its_own() {
    let site = Site::new();
    let of_another = site.one_on_its_way(&large("a")).await;
    let first = site.world.join(&site.first(pass_on()));
    site.world.write_bytes("requests", None, b"b", vec![of_another.header()]);
    site.world.settled().await;
    first.stop().await.unwrap();
    let out = site.world.log.read("out");
    assert_eq!((text(&out[1]), Claim::read(&out[1].headers).unwrap()), ("b".to_owned(), None));
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_large_records_goes_round_by_the_overflow_topic_with_its_claims() {
    let site = Site::new();
    let slowly = script(|run| async move {
        pass(100).await;
        Ok(vec![on(&run)])
    });
    let limits = Limits { waiting: 20, ..Limits::new(4) };
    let first = site.world.join(&Spec { limits, fair: true, ..site.first(slowly) });
    let write = |n| _ = site.world.write("requests", None, &large(&format!("r{n}")));
    (0..10).for_each(write);
    // Until it is known how long one takes.
    pass(1_000).await;
    (10..3_000).for_each(write);
    site.then(&site.second(pass_on())).await;
    first.stop().await.unwrap();
    let moved = site.world.log.read("overflow");
    assert!(!moved.is_empty());
    moved.iter().for_each(|message| _ = claim(message));
    let mut ends = site.world.texts("end");
    ends.sort_unstable();
    let mut all: Vec<_> = (0..3_000).map(|n| large(&format!("r{n}"))).collect();
    all.sort_unstable();
    assert_eq!(ends, all);
}
