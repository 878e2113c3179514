//! A pool against upstreams that do as they are told, in virtual time.

use super::*;
use crate::{
    Budget, Retry,
    limits::Quota,
    testing::{Heard, Next, Told, call, error, limited},
};
use forebay_operator::BoxError;
use futures::future::join_all;

const CAPS: Caps = Caps { outstanding: 16, requests_per_minute: None, tokens_per_minute: None };

fn endpoint(told: &Arc<Told>, name: &str, caps: Caps) -> Endpoint {
    let (name, model) = (name.to_owned(), told.clone());
    Endpoint { name, model, caps, origin: String::new(), watch: None, starts_cold: false, shared: None }
}

fn pool(upstreams: &[&Arc<Told>], caps: Caps) -> Arc<Pool> {
    let endpoints = upstreams.iter().map(|told| endpoint(told, "e", caps)).collect();
    Arc::new(Pool::new("m", endpoints, Arc::new(|| 0.5)))
}

fn retried(pool: &Arc<Pool>) -> Retry {
    Retry::new(pool.clone(), Arc::new(Budget::default())).with_jitter(Arc::new(|| 1.0))
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[tokio::test(start_paused = true)]
async fn what_failed_at_one_endpoint_is_tried_at_another_at_once() {
    for class in [Class::Unreachable, Class::Outage, Class::Transient, Class::Account, Class::Limited] {
        let (bad, good) =
            (Told::by("bad", move |_| Next::err(10, error(class))), Told::by("good", |_| Next::ok(100)));
        let (pool, heard, start) = (pool(&[&bad, &good], CAPS), Heard::default(), Instant::now());
        for _ in 0..4 {
            retried(&pool).complete(&call("why"), &heard).await.unwrap();
        }
        let told = heard.take();
        assert_eq!(told.matches("to good, ok, kept good").count(), 4, "{class:?}: {told}");
        assert!(start.elapsed() <= ms(4 * 110), "nothing was waited for");
        assert!(bad.tries() > 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_is_asked_for_is_kept_where_there_is_no_other_endpoint() {
    let one = Told::of("one", [Next::err(0, limited(ms(3_000)))]);
    let (pool, start) = (pool(&[&one], CAPS), Instant::now());
    retried(&pool).complete(&call("why"), &Heard::default()).await.unwrap();
    assert_eq!(start.elapsed(), ms(3_100));
}

#[tokio::test(start_paused = true)]
async fn twelve_callers_errors_close_nothing_off() {
    let one = Told::of("one", (0..12).map(|_| Next::err(0, error(Class::Rejected))));
    let pool = pool(&[&one], CAPS);
    for _ in 0..12 {
        let refused = pool.complete(&call("why"), &Heard::default()).await.unwrap_err();
        assert_eq!(refused.class, Class::Rejected);
    }
    pool.complete(&call("why"), &Heard::default()).await.unwrap();
    assert_eq!(pool.status()[0].models[0].breaker, "closed");
}

#[tokio::test(start_paused = true)]
async fn where_nothing_is_up_that_is_said_at_once_and_until_when() {
    let one = Told::of("one", (0..5).map(|_| Next::err(0, error(Class::Unreachable))));
    let pool = pool(&[&one], CAPS);
    for _ in 0..5 {
        pool.complete(&call("why"), &Heard::default()).await.unwrap_err();
    }
    let down = pool.complete(&call("why"), &Heard::default()).await.unwrap_err();
    assert_eq!((down.class, down.retry_after), (Class::Closed, Some(ms(5_000))));
    assert_eq!(one.tries(), 5, "it was left alone");
    tokio::time::advance(ms(5_000)).await;
    for _ in 0..3 {
        pool.complete(&call("why"), &Heard::default()).await.unwrap();
    }
    assert_eq!(pool.status()[0].models[0].breaker, "ramp");
}

#[tokio::test(start_paused = true)]
async fn no_more_run_than_there_are_places_and_who_waited_first_goes_first() {
    let one = Told::by("one", |_| Next::ok(100));
    let (pool, start) = (pool(&[&one], Caps { outstanding: 4, ..CAPS }), Instant::now());
    let ends = join_all((0..20).map(|_| async {
        pool.complete(&call("why"), &Heard::default()).await.unwrap();
        start.elapsed().as_millis() / 100
    }));
    let expected: Vec<u128> = (0..20).map(|number| number / 4 + 1).collect();
    assert_eq!(ends.await, expected);
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_another_endpoint_holds_nobody_up_and_not_for_long() {
    let long = Told::by("long", |_| Next::ok(30_000));
    let short = Told::of("short", [Next::err(10, error(Class::Outage))]);
    let pool = pool(&[&long, &short], Caps { outstanding: 1, ..CAPS });
    let retry = retried(&pool);
    let start = Instant::now();
    let ask = async |after_ms: u64| {
        tokio::time::sleep(ms(after_ms)).await;
        retry.complete(&call("why"), &Heard::default()).await.unwrap();
        start.elapsed().as_millis()
    };
    let mut ends = join_all([ask(0), ask(0), ask(20)]).await;
    ends.sort_unstable();
    assert_eq!(ends, [120, 1_110, 30_000]);
}

#[tokio::test(start_paused = true)]
async fn a_burst_does_not_go_beyond_a_budget() {
    let one = Told::by("one", |_| Next::ok(100));
    let pool = pool(&[&one], Caps { outstanding: 200, requests_per_minute: Some(50), ..CAPS });
    let burst = join_all((0..200).map(|_| async {
        let call = Call { deadline: Some(Instant::now() + ms(30_000)), ..call("why") };
        pool.complete(&call, &Heard::default()).await.map_err(|error| error.code)
    }));
    let results = burst.await;
    assert_eq!(one.tries(), 50);
    assert_eq!(results.iter().filter(|result| **result == Err("model_saturated")).count(), 150);
}

#[tokio::test(start_paused = true)]
async fn what_the_provider_says_is_left_is_followed() {
    let mut left = [1, 0, 0].into_iter();
    let one = Told::by("one", move |_| {
        let remaining = left.next().unwrap();
        let requests = Some(Quota { limit: Some(2), remaining, reset: ms(2_000) });
        Next { limits: Some(Limits { requests, tokens: None }), ..Next::ok(0) }
    });
    let (pool, start) = (pool(&[&one], CAPS), Instant::now());
    for expected in [0, 0, 1_000] {
        pool.complete(&call("why"), &Heard::default()).await.unwrap();
        assert!(start.elapsed() >= ms(expected), "{expected}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_given_up_gives_its_place_back() {
    let one = Told::by("one", |_| Next::ok(60_000));
    let pool = pool(&[&one], Caps { outstanding: 1, ..CAPS });
    for _ in 0..3 {
        let (call, heard) = (call("why"), Heard::default());
        assert!(tokio::time::timeout(ms(10), pool.complete(&call, &heard)).await.is_err());
    }
    assert_eq!((one.tries(), pool.status()[0].running, pool.status()[0].tokens), (3, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_deadline_holds_in_the_queue() {
    let one = Told::by("one", |_| Next::ok(60_000));
    let pool = pool(&[&one], Caps { outstanding: 1, ..CAPS });
    let hurried = Call { deadline: Some(Instant::now() + ms(500)), ..call("why") };
    let (first, heard, start) = (call("why"), Heard::default(), Instant::now());
    tokio::select! {
        biased;
        _ = pool.complete(&first, &heard) => panic!("it takes a minute"),
        late = pool.complete(&hurried, &heard) => assert_eq!(late.unwrap_err().code, "model_saturated"),
    }
    assert_eq!(start.elapsed(), ms(500));
}

/// An engine that says what it is told to.
struct Says(Mutex<(Load, bool, usize)>);

impl Watch for Says {
    fn load(&self) -> BoxFuture<'_, Result<Load, BoxError>> {
        Box::pin(async { Ok(self.0.lock().unwrap().0) })
    }
    fn is_healthy(&self) -> BoxFuture<'_, bool> {
        Box::pin(async { self.0.lock().unwrap().1 })
    }
}

impl Wake for Says {
    fn wake(&self) -> BoxFuture<'_, ()> {
        self.0.lock().unwrap().2 += 1;
        Box::pin(async {})
    }
}

#[tokio::test(start_paused = true)]
async fn a_cold_endpoint_is_woken_once_and_gets_calls_when_it_answers() {
    let engine = Arc::new(Says(Mutex::new((Load::default(), false, 0))));
    let mut cold = true;
    let one = Told::by("one", move |_| {
        // Well, but the first answer fails: the model is still being loaded.
        if std::mem::take(&mut cold) { Next::err(0, error(Class::Outage)) } else { Next::ok(100) }
    });
    let endpoint = Endpoint { watch: Some(engine.clone()), starts_cold: true, ..endpoint(&one, "one", CAPS) };
    let pool = Pool::new("m", vec![endpoint], Arc::new(|| 0.5)).woken_by(engine.clone());
    let start = Instant::now();
    let asked = join_all((0..5).map(|_| async {
        pool.complete(&call("why"), &Heard::default()).await.unwrap();
    }));
    let becomes_well = async {
        tokio::time::sleep(ms(9_500)).await;
        engine.0.lock().unwrap().1 = true;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        _ = asked => {}
        () = async { tokio::join!(pool.keep(), becomes_well); } => {}
    }
    assert_eq!(engine.0.lock().unwrap().2, 1, "woken once");
    assert_eq!(one.tries(), 2 + 5, "two calls of one token");
    assert!((ms(11_200)..ms(11_700)).contains(&start.elapsed()), "{:?}: a tenth at first", start.elapsed());
    assert_eq!(pool.status()[0].models[0].breaker, "ramp");
}

#[tokio::test(start_paused = true)]
async fn who_has_a_queue_or_says_nothing_gets_none_while_others_may_take_it() {
    let upstreams = ["idle", "queue", "cache"].map(|name| Told::by(name, |_| Next::ok(10)));
    let loads = [(0.0, 0.1), (6.0, 0.1), (0.0, 0.9)];
    let endpoints = upstreams.iter().zip(loads).map(|(told, (waiting, kv_used))| {
        let says = Says(Mutex::new((Load { waiting, running: 0.0, kv_used }, true, 0)));
        Endpoint { watch: Some(Arc::new(says)), ..endpoint(told, "e", CAPS) }
    });
    let pool = Pool::new("m", endpoints.collect(), Arc::new(|| 0.5));
    let ask = async |times| {
        for _ in 0..times {
            pool.complete(&call("why"), &Heard::default()).await.unwrap();
        }
        upstreams.each_ref().map(|told| std::mem::take(&mut *told.tries.lock().unwrap()).len())
    };
    let seen = tokio::select! {
        biased;
        () = pool.keep() => panic!("it keeps"),
        seen = ask(30) => seen,
    };
    assert_eq!(seen, [30, 0, 0]);
    tokio::time::advance(ms(3_100)).await;
    assert_eq!(ask(30).await, [10, 10, 10], "all are stale, so all are full");
}
