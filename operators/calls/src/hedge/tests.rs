//! Hedges against upstreams that do as they are told, in virtual time.

use super::*;
use crate::{
    pool::Endpoint,
    testing::{Heard, Next, Random, Told, call, error, limited, reply},
    throttle::Caps,
};
use futures::{StreamExt as _, stream};

const CAPS: Caps = Caps { outstanding: 16, requests_per_minute: None, tokens_per_minute: None };

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn pool(upstreams: &[&Arc<Told>]) -> Arc<Pool> {
    let endpoint = |told: &&Arc<Told>| Endpoint {
        name: "e".to_owned(),
        model: Arc::clone(told) as Arc<dyn Model>,
        caps: CAPS,
        origin: String::new(),
        watch: None,

        starts_cold: false,
        shared: None,
    };
    Arc::new(Pool::new("m", upstreams.iter().map(endpoint).collect(), Arc::new(|| 0.5)))
}

/// Two endpoints that both answer by `next`, until `slow` is told; a hedge after 500 ms; and calls enough for one.
async fn check(asked: Call<'static>, slow: fn() -> Next, other: fn() -> Next, expected: (&str, u64)) {
    let number = Arc::new(Mutex::new(0));
    let [one, two] = ["one", "two"].map(|name| {
        let number = number.clone();
        Told::by(name, move |_| {
            let mut number = number.lock().unwrap();
            *number += 1;
            match *number {
                1..=20 => Next::ok(1),
                21 => slow(),
                _ => other(),
            }
        })
    });
    let hedge = Hedge::new(pool(&[&one, &two]), Arc::default(), Some(ms(500)));
    let heard = Heard::default();
    for _ in 0..20 {
        hedge.complete(&call("why"), &heard).await.unwrap();
    }
    heard.take();
    heard.take_happenings();
    let start = Instant::now();
    let result = hedge.complete(&asked, &heard).await;
    let took = u64::try_from(start.elapsed().as_millis()).unwrap();
    let end = match result {
        Ok(_) => "answered".to_owned(),
        Err(error) => format!("{:?}", error.class).to_lowercase(),
    };
    // Which of the two was first does not matter.
    let told = heard.take();
    assert_eq!(heard.take_happenings().contains(&Happening::Hedged), told.contains("hedge to"), "{told}");
    let names =
        if told.starts_with("to two") { [("one", "b"), ("two", "a")] } else { [("one", "a"), ("two", "b")] };
    let told = names.iter().fold(told, |told, (name, short)| told.replace(name, short));
    assert_eq!((format!("{told} => {end}").as_str(), took), expected);
    assert_eq!(hedge.pool.status().iter().map(|status| status.running).sum::<usize>(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_slow_call_is_asked_elsewhere_and_its_answer_is_kept_under_the_call_first() {
    let expected = "to a, hedge to b, hedge ok, lost, kept b, hedge kept b => answered";
    check(call("why"), || Next::ok(20_000), || Next::ok(100), (expected, 600)).await;
}

#[tokio::test(start_paused = true)]
async fn the_first_may_win_after_all() {
    let expected = "to a, hedge to b, ok, kept a, hedge lost, hedge closed => answered";
    check(call("why"), || Next::ok(700), || Next::ok(5_000), (expected, 700)).await;
}

#[tokio::test(start_paused = true)]
async fn one_that_fails_leaves_it_to_the_other() {
    let expected = "to a, hedge to b, transient, hedge ok, kept b, hedge kept b => answered";
    check(call("why"), || Next::err(700, error(Class::Transient)), || Next::ok(1_000), (expected, 1_500))
        .await;
    let expected = "to a, hedge to b, hedge outage, hedge closed, ok, kept a => answered";
    check(call("why"), || Next::ok(2_000), || Next::err(10, error(Class::Outage)), (expected, 2_000)).await;
    let expected = "to a, hedge to b, hedge outage, hedge closed, transient, closed => transient";
    let late = || Next::err(2_000, error(Class::Transient));
    check(call("why"), late, || Next::err(10, error(Class::Outage)), (expected, 2_000)).await;
}

fn streamed(after_ms: u64, first_ms: u64) -> Next {
    Next { first_token: Some(ms(first_ms)), ..Next::ok(after_ms) }
}

#[tokio::test(start_paused = true)]
async fn the_first_token_wins_and_only_its_try_is_read() {
    let asked = || Call { stream: true, ..call("why") };
    let expected = "to a, hedge to b, hedge b, lost, hedge ok, kept b, hedge kept b => answered";
    check(asked(), || streamed(3_000, 2_000), || streamed(9_000, 100), (expected, 9_500)).await;
    let expected = "to a, a, ok, kept a => answered";
    check(asked(), || streamed(3_000, 400), || Next::ok(1), (expected, 3_000)).await;
    let expected = "to a, hedge to b, hedge b, lost, hedge cut, kept what was read of yes, \
                    hedge kept what was read of yes => cut";
    let cut = || Next { result: Err(CallError::cut("it broke off", reply("yes"))), ..streamed(9_000, 100) };
    check(asked(), || streamed(30_000, 20_000), cut, (expected, 9_500)).await;
}

#[tokio::test(start_paused = true)]
async fn none_is_sent_where_it_may_do_harm() {
    // With tools; without enough calls before; without another endpoint; after a rate limit; where the pool is full.
    let slow = || Told::by("slow", |_| Next::ok(2_000));
    let ask = async |hedge: &Hedge, call: Call<'static>| {
        let heard = Heard::default();
        hedge.complete(&call, &heard).await.unwrap();
        !heard.take().contains("hedge")
    };
    let hedge_of = |upstreams: &[&Arc<Told>], calls: u64| {
        let hedge = Hedge::new(pool(upstreams), Arc::default(), Some(ms(500)));
        hedge.seen().window.add(CALLS, calls, Instant::now());
        hedge
    };
    let (one, two) = (slow(), slow());
    assert!(!ask(&hedge_of(&[&one, &two], 20), call("why")).await, "else one is sent");
    assert!(ask(&hedge_of(&[&one, &two], 19), call("why")).await);
    assert!(ask(&hedge_of(&[&one], 100), call("why")).await);
    let mut tools = call("why");
    tools.sampling.tools = Some(serde_json::json!([]));
    assert!(ask(&hedge_of(&[&one, &two], 100), tools).await);
    let limiting = Told::of("limiting", (0..2).map(|_| Next::err(0, limited(ms(1)))));
    let hedge = hedge_of(&[&limiting, &one, &two], 100);
    while limiting.tries() < 1 {
        let _ = hedge.pool.complete(&call("why"), &Heard::default()).await;
    }
    assert!(ask(&hedge, call("why")).await);
    let hedge = hedge_of(&[&one, &two], 1_000);
    let full: Vec<_> =
        stream::iter(0..23).map(|_| ask(&hedge, call("why"))).buffer_unordered(23).collect().await;
    assert!(full.into_iter().all(|alone| alone));
}

/// The 99th percentile of calls of which 5 in 100 stick for 20 s, and how many calls more were made.
async fn stragglers(hedged: bool, after: Option<Duration>, stuck: f64) -> (Duration, f64) {
    const ASKED: usize = 4_000;
    let upstreams: Vec<_> = (1..=4)
        .map(|seed| {
            let mut random = Random(seed);
            Told::by("e", move |_| match random.next() < stuck {
                true => Next::ok(20_000),
                false => Next { after: random.between(ms(100), ms(1_500)), ..Next::ok(0) },
            })
        })
        .collect();
    let pool = pool(&upstreams.iter().collect::<Vec<_>>());
    let model: Arc<dyn Model> = match hedged {
        true => Arc::new(Hedge::new(pool, Arc::default(), after)),
        false => pool,
    };
    let mut times: Vec<_> = stream::iter(0..ASKED)
        .map(|_| async {
            let start = Instant::now();
            model.complete(&call("why"), &Heard::default()).await.unwrap();
            start.elapsed()
        })
        .buffer_unordered(24)
        .collect()
        .await;
    times.sort_unstable();
    let made: usize = upstreams.iter().map(|told| told.tries()).sum();
    (times[ASKED * 99 / 100], made as f64 / ASKED as f64 - 1.0)
}

#[tokio::test(start_paused = true)]
async fn stragglers_are_cut_off_for_few_calls_more() {
    for (after, stuck) in [(Some(ms(1_600)), 0.05), (None, 0.05), (None, 0.04), (None, 0.02)] {
        let ((plain, _), (hedged, more)) =
            (stragglers(false, None, stuck).await, stragglers(true, after, stuck).await);
        println!(
            "{stuck} stuck: p99 {plain:?} without, {hedged:?} with hedges after {after:?}, {more:.3} more calls"
        );
        assert!(plain >= hedged * 3, "{plain:?} {hedged:?}");
        assert!(more <= 0.05, "{more}");
    }
}
