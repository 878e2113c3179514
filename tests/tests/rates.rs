//! The contract of the rate port, which both of its adapters must pass, and pools that share a limit over both.
//!
//! The suite knows the port alone. Redis is tested where `FOREBAY_TEST_REDIS` names a server.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use forebay_calls::limits::{Limits, Quota};
use forebay_calls::pool::Endpoint;
use forebay_calls::throttle::Caps;
use forebay_calls::{Call, CallError, Class, Listener, Model, Pool, Reply, Tried, Upstream};
use forebay_operators::rates::SharedRates;
use forebay_schemas::{Sampling, Usage};
use forebay_stores::rates::{Ask, Back, Heard, Local, Measures, NAME_BYTES_MAX, Slice};
use forebay_stores::{Answer, Rates, key_value};
use forebay_tests::{services, wait_for_async};
use futures::future::{BoxFuture, join_all};
use tokio::task::JoinSet;
use tokio::time::Instant;

type Outcome = Result<(), Box<dyn std::error::Error>>;
/// Lets time pass for a store, by its own clock.
type Pass<'a> = &'a (dyn Fn(Duration) -> BoxFuture<'static, ()> + Sync);

/// Long enough for a few calls of Redis, whose clock nobody sets.
const SHORT: Duration = Duration::from_secs(3);

/// What every adapter promises. `store` is empty.
async fn contract(store: &Arc<dyn Rates>, pass: Pass<'_>) -> Outcome {
    a_slice_is_a_part_of_what_is_left_and_never_less_than_is_needed(store.as_ref()).await?;
    what_is_given_back_is_there_again(store.as_ref()).await?;
    what_is_larger_than_the_limit_goes_alone(store.as_ref()).await?;
    what_was_sent_beyond_counts(store.as_ref()).await?;
    what_a_provider_says_holds_for_all_and_refills(store.as_ref(), pass).await?;
    a_pause_holds_for_all_until_it_is_over(store.as_ref(), pass).await?;
    without_a_limit_all_is_given(store.as_ref()).await?;
    of_200_at_once_as_many_are_let_in_as_there_is_room_for(store).await?;
    all_who_ask_are_counted(store.as_ref()).await?;
    what_is_over_a_limit_is_refused(store.as_ref()).await
}

fn ask(limit: u64, need: u64, want: u64) -> Ask {
    Ask {
        limits: Measures { requests: Some(limit), tokens: None },
        need: Measures { requests: need, tokens: 0 },
        want: Measures { requests: want, tokens: 0 },
        ..Ask::default()
    }
}

async fn take(store: &dyn Rates, name: &str, ask: &Ask) -> Result<Slice, forebay_stores::Error> {
    store.take(name, "me", ask).await
}

async fn a_slice_is_a_part_of_what_is_left_and_never_less_than_is_needed(store: &dyn Rates) -> Outcome {
    let taken = async |need, want| -> Result<u64, forebay_stores::Error> {
        Ok(take(store, "a", &ask(100, need, want)).await?.amount.requests)
    };
    assert_eq!(taken(1, 10).await?, 10);
    assert_eq!(taken(1, 80).await?, 22, "a quarter of 90");
    assert_eq!(taken(60, 60).await?, 60);
    assert_eq!(taken(8, 8).await?, 8, "the last");
    let full = take(store, "a", &ask(100, 1, 1)).await?;
    let wait = full.wait.ok_or("it says when")?;
    assert!(full.is_limited && full.amount == Measures::each(0));
    assert!((Duration::from_secs(58)..=Duration::from_secs(62)).contains(&wait), "{wait:?}");
    Ok(())
}

async fn what_is_given_back_is_there_again(store: &dyn Rates) -> Outcome {
    let taken = take(store, "b", &ask(10, 10, 10)).await?;
    assert_eq!(taken.amount.requests, 10);
    let back = |second, requests| vec![Back { second, amount: Measures { requests, tokens: 0 } }];
    let asked = Ask { back: back(taken.second, 4), ..ask(10, 4, 4) };
    assert_eq!(take(store, "b", &asked).await?.amount.requests, 4);
    let too_old = Ask { back: back(taken.second - 100, 4), ..ask(10, 1, 1) };
    assert_eq!(take(store, "b", &too_old).await?.amount.requests, 0);
    let too_much = Ask { back: back(taken.second, 1_000), ..ask(10, 11, 11) };
    assert_eq!(
        take(store, "b", &too_much).await?.amount.requests,
        11,
        "nothing is left of it, so it goes alone"
    );
    assert_eq!(take(store, "b", &ask(11, 1, 1)).await?.amount.requests, 0);
    Ok(())
}

async fn what_is_larger_than_the_limit_goes_alone(store: &dyn Rates) -> Outcome {
    let large = Ask {
        limits: Measures { requests: None, tokens: Some(100) },
        need: Measures { requests: 1, tokens: 500 },
        want: Measures { requests: 1, tokens: 500 },
        ..Ask::default()
    };
    assert_eq!(take(store, "c", &large).await?.amount, Measures { requests: 1, tokens: 500 });
    assert_eq!(take(store, "c", &large).await?.amount, Measures::each(0));
    Ok(())
}

async fn what_was_sent_beyond_counts(store: &dyn Rates) -> Outcome {
    let beyond = Ask { beyond: Measures { requests: 7, tokens: 0 }, ..ask(10, 0, 0) };
    assert_eq!(take(store, "d", &beyond).await?.amount.requests, 0, "nothing was asked for");
    assert_eq!(take(store, "d", &ask(10, 4, 4)).await?.amount.requests, 0);
    assert_eq!(take(store, "d", &ask(10, 3, 3)).await?.amount.requests, 3);
    Ok(())
}

async fn what_a_provider_says_holds_for_all_and_refills(store: &dyn Rates, pass: Pass<'_>) -> Outcome {
    let free = |need| Ask { limits: Measures::each(None), ..ask(0, need, need) };
    let heard = |level| {
        let heard = Heard { level, full: 100, refills: 100 - level, reset: SHORT };
        Ask { heard: Measures { requests: Some(heard), tokens: None }, ..free(0) }
    };
    assert!(take(store, "e", &heard(20)).await?.is_limited);
    assert_eq!(store.take("e", "other", &free(20)).await?.amount.requests, 20);
    let full = store.take("e", "other", &free(50)).await?;
    let wait = full.wait.ok_or("it says when")?;
    assert!(full.amount.requests == 0 && wait <= SHORT * 5 / 8 + Duration::from_millis(10), "{wait:?}");
    // What others have just taken may not be counted yet.
    take(store, "e", &heard(80)).await?;
    assert_eq!(store.take("e", "other", &free(75)).await?.amount.requests, 0);
    assert_eq!(store.take("e", "other", &free(60)).await?.amount.requests, 60);
    // With 80 that may be yet to be counted it takes up to 1.8 times as long until all is there.
    take(store, "e", &heard(0)).await?;
    pass(SHORT * 2).await;
    assert_eq!(store.take("e", "other", &free(100)).await?.amount.requests, 100);
    Ok(())
}

async fn a_pause_holds_for_all_until_it_is_over(store: &dyn Rates, pass: Pass<'_>) -> Outcome {
    let pause = Ask { pause: Some(SHORT), ..ask(100, 1, 1) };
    assert_eq!(take(store, "f", &pause).await?.amount.requests, 0);
    let other = store.take("f", "other", &ask(100, 1, 1)).await?;
    assert!(other.amount.requests == 0 && other.pause.is_some(), "{other:?}");
    pass(SHORT * 11 / 10).await;
    let other = store.take("f", "other", &ask(100, 1, 1)).await?;
    assert!(other.amount.requests == 1 && other.pause.is_none(), "{other:?}");
    Ok(())
}

async fn without_a_limit_all_is_given(store: &dyn Rates) -> Outcome {
    let free = Ask { limits: Measures::each(None), ..ask(0, 1, 1_000_000) };
    let slice = take(store, "g", &free).await?;
    assert_eq!((slice.is_limited, slice.amount.requests), (false, 1_000_000));
    Ok(())
}

async fn of_200_at_once_as_many_are_let_in_as_there_is_room_for(store: &Arc<dyn Rates>) -> Outcome {
    let tasks = (0..200).map(|n| {
        let store = Arc::clone(store);
        tokio::spawn(async move { store.take("h", &format!("sharer {}", n % 4), &ask(100, 7, 7)).await })
    });
    let mut taken = 0;
    for slice in join_all(tasks).await {
        taken += slice??.amount.requests;
    }
    assert_eq!(taken, 98);
    Ok(())
}

async fn all_who_ask_are_counted(store: &dyn Rates) -> Outcome {
    // "me", "other" and the four of the burst.
    assert_eq!(take(store, "i", &ask(1, 0, 0)).await?.sharers, 6);
    Ok(())
}

async fn what_is_over_a_limit_is_refused(store: &dyn Rates) -> Outcome {
    let long = "n".repeat(NAME_BYTES_MAX + 1);
    let back = vec![Back { second: 1, amount: Measures::each(1) }; 63];
    for refused in [
        store.take(&long, "me", &ask(1, 1, 1)).await,
        store.take("j", &long, &ask(1, 1, 1)).await,
        store.take("j", "me", &Ask { back, ..ask(1, 1, 1) }).await,
    ] {
        assert!(matches!(refused, Err(forebay_stores::Error::TooLarge { .. })), "{refused:?}");
    }
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn local_rates_keep_the_contract() -> Outcome {
    let store: Arc<dyn Rates> = Arc::new(local());
    contract(&store, &|time| Box::pin(tokio::time::advance(time))).await
}

#[tokio::test]
async fn redis_rates_keep_the_contract() -> Outcome {
    let Some(url) = services::redis() else { return Ok(()) };
    let prefix = format!("forebay-test:{}:rates:", std::process::id());
    let options = || key_value::RedisOptions { prefix: prefix.clone(), ..key_value::RedisOptions::default() };
    let redis = Arc::new(key_value::Redis::connect(&url, options()).await?);
    let store: Arc<dyn Rates> = redis.clone();
    contract(&store, &|time| Box::pin(tokio::time::sleep(time))).await?;
    // What one process takes, another one sees.
    let other = key_value::Redis::connect(&url, options()).await?;
    assert_eq!(other.take("h", "me", &ask(100, 3, 3)).await?.amount.requests, 0);
    key_value::KeyValue::clear(&*redis, "").await?;
    Ok(())
}

/// Rates that run by the time of the test.
fn local() -> Local {
    let began = Instant::now();
    Local::new(Arc::new(move || UNIX_EPOCH + Duration::from_secs(1_000) + began.elapsed()))
}

const MINUTE: Duration = Duration::from_secs(60);
const NO_CAPS: Caps = Caps { outstanding: 1_000, requests_per_minute: None, tokens_per_minute: None };
/// What a call is estimated to take, and takes.
const ESTIMATED: u64 = 100;
const TAKEN: u64 = 40;

/// What a provider got, from all processes: when, and by which.
#[derive(Default)]
struct Provider {
    got: Mutex<Vec<(Instant, usize)>>,
    /// Whether it refuses all, for three seconds.
    refuses: AtomicBool,
    /// Whether it lets calls in as a bucket does that refills, and says in each answer what is left.
    tells: Option<Telling>,
}

struct Telling {
    per_minute: f64,
    /// How many it would let in, and when that was so.
    level: Mutex<(f64, Instant)>,
    /// Says only that all of it is left, as one that rounds.
    rounds: bool,
    refused: AtomicUsize,
}

impl Telling {
    fn of(per_minute: f64, rounds: bool) -> Option<Self> {
        let level = Mutex::new((per_minute, Instant::now()));
        Some(Self { per_minute, level, rounds, refused: AtomicUsize::new(0) })
    }

    /// What is left after a call that comes now.
    fn quota(&self) -> Result<Quota, CallError> {
        let mut last = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        let refilled = last.0 + last.1.elapsed().as_secs_f64() * self.per_minute / 60.0;
        let level = refilled.min(self.per_minute) - 1.0;
        if level < 0.0 {
            self.refused.fetch_add(1, Ordering::Relaxed);
            let error = CallError::new(Class::Limited, "model_rate_limited", "too many").with_status(429);
            return Err(CallError { retry_after: Some(Duration::from_secs(1)), ..error });
        }
        *last = (level, Instant::now());
        let whole = |number: f64| Duration::from_secs_f64(number).as_secs();
        let reset = Duration::from_secs_f64((self.per_minute - level) * 60.0 / self.per_minute);
        Ok(match self.rounds {
            true => Quota { limit: None, remaining: whole(self.per_minute), reset },
            false => Quota { limit: Some(whole(self.per_minute)), remaining: whole(level), reset },
        })
    }
}

impl Provider {
    fn lock(&self) -> MutexGuard<'_, Vec<(Instant, usize)>> {
        self.got.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn got(&self) -> Vec<(Instant, usize)> {
        self.lock().clone()
    }

    /// The most calls that it got in any minute that began in these times.
    fn most_in_a_minute(&self, from: Instant, until: Instant) -> usize {
        let at: Vec<_> = self.got().into_iter().map(|(at, _)| at).filter(|at| *at >= from).collect();
        let of_minute =
            |began: &Instant| at.iter().filter(|at| (*began..*began + MINUTE).contains(at)).count();
        at.iter().filter(|at| **at < until).map(of_minute).max().unwrap_or(0)
    }
}

/// The provider as one process calls it.
struct Called(Arc<Provider>, usize);

impl Model for Called {
    fn provider(&self) -> &'static str {
        "called"
    }
    fn name(&self) -> &str {
        "m"
    }
    fn complete<'a>(
        &'a self,
        _: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        let sent = async {
            self.0.lock().push((Instant::now(), self.1));
            if self.0.refuses.load(Ordering::Relaxed) {
                let error = CallError::new(Class::Limited, "model_rate_limited", "too many").with_status(429);
                return Err(CallError { retry_after: Some(Duration::from_secs(3)), ..error });
            }
            let told = self.0.tells.as_ref().map(Telling::quota).transpose()?;
            tokio::time::sleep(Duration::from_millis(150)).await;
            if told.is_some() {
                listener.limits(&Limits { requests: told, tokens: None });
            }
            Ok(Reply {
                text: "yes".to_owned(),
                model: "m".to_owned(),
                usage: Some(Usage::of(0, TAKEN)),
                ..Reply::default()
            })
        };
        listener.paid(Upstream { provider: "called", endpoint: None, model: "m" }, Box::pin(sent))
    }
}

struct Deaf;

impl Listener for Deaf {
    fn started(&self, _: Upstream<'_>) {}
    fn token(&self, _: &str) {}
    fn ended(&self, _: &Tried<'_>) {}
}

/// Rates that count who asks, and can go away.
struct Watched {
    rates: Arc<dyn Rates>,
    asked: AtomicUsize,
    is_away: AtomicBool,
}

impl Watched {
    fn new(rates: Arc<dyn Rates>) -> Arc<Self> {
        Arc::new(Self { rates, asked: AtomicUsize::new(0), is_away: AtomicBool::new(false) })
    }
}

impl Rates for Watched {
    fn take<'a>(&'a self, name: &'a str, sharer: &'a str, ask: &'a Ask) -> Answer<'a, Slice> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        match self.is_away.load(Ordering::Relaxed) {
            // Nobody answers, as where a network is cut.
            true => Box::pin(std::future::pending()),
            false => self.rates.take(name, sharer, ask),
        }
    }
}

/// Processes that share a provider, each with its own way to the rates; they end with this.
struct Processes {
    pools: Vec<Arc<Pool>>,
    provider: Arc<Provider>,
    tasks: JoinSet<()>,
}

impl Processes {
    fn of(rates: &[Arc<dyn Rates>], caps: Caps) -> Self {
        Self::at(Provider::default(), rates, caps)
    }

    fn at(provider: Provider, rates: &[Arc<dyn Rates>], caps: Caps) -> Self {
        let (provider, mut tasks) = (Arc::new(provider), JoinSet::new());
        let pools = rates.iter().enumerate().map(|(number, rates)| {
            let shared = SharedRates::new(Arc::clone(rates), "e".to_owned(), format!("process {number}"));
            let endpoint = Endpoint {
                name: "http://e".to_owned(),
                model: Arc::new(Called(Arc::clone(&provider), number)),
                caps,
                origin: String::new(),
                watch: None,
                starts_cold: false,
                shared: Some(Arc::new(shared)),
            };
            Arc::new(Pool::new("m", vec![endpoint], Arc::new(|| 0.5)))
        });
        let pools: Vec<_> = pools.collect();
        for pool in &pools {
            let pool = Arc::clone(pool);
            tasks.spawn(async move { pool.keep().await });
        }
        Self { pools, provider, tasks }
    }

    /// A process makes calls one after another, so many at a time, for as long as the test runs.
    fn calls_from(&mut self, process: usize, at_a_time: usize) {
        for _ in 0..at_a_time {
            let pool = Arc::clone(&self.pools[process]);
            self.tasks.spawn(async move {
                loop {
                    let _ = pool.complete(&call(), &Deaf).await;
                }
            });
        }
    }
}

fn call() -> Call<'static> {
    let sampling = Sampling { max_tokens: Some(ESTIMATED), ..Sampling::default() };
    Call { sampling, ..Call::default() }
}

/// Four processes with unlike demand.
fn four(rates: &[Arc<dyn Rates>], caps: Caps) -> Processes {
    four_at(Provider::default(), rates, caps)
}

fn four_at(provider: Provider, rates: &[Arc<dyn Rates>], caps: Caps) -> Processes {
    let mut processes = Processes::at(provider, rates, caps);
    [40, 10, 3, 1].into_iter().enumerate().for_each(|(process, calls)| processes.calls_from(process, calls));
    processes
}

#[tokio::test(start_paused = true)]
async fn four_processes_never_send_more_requests_in_a_minute_than_one_may() {
    let (rates, began): (Arc<dyn Rates>, _) = (Arc::new(local()), Instant::now());
    let caps = Caps { requests_per_minute: Some(120), ..NO_CAPS };
    let processes = four(&vec![rates; 4], caps);
    tokio::time::sleep(10 * MINUTE).await;
    let most = processes.provider.most_in_a_minute(began, began + 10 * MINUTE);
    assert!((118..=120).contains(&most), "{most}");
    let all = processes.provider.got();
    assert!(all.len() >= 9 * 120, "{} of {}", all.len(), 10 * 120);
    let starved = (0..4).find(|process| all.iter().all(|(_, by)| by != process));
    assert_eq!(starved, None);
}

#[tokio::test(start_paused = true)]
async fn four_processes_never_take_more_tokens_in_a_minute_than_one_may() {
    let (rates, began): (Arc<dyn Rates>, _) = (Arc::new(local()), Instant::now());
    let caps = Caps { tokens_per_minute: Some(6_000), ..NO_CAPS };
    let processes = four(&vec![rates; 4], caps);
    tokio::time::sleep(10 * MINUTE).await;
    let most = processes.provider.most_in_a_minute(began, began + 10 * MINUTE);
    // What they reserve and do not take is there for others.
    assert!((140..=150).contains(&most), "{most} of 150");
}

#[tokio::test(start_paused = true)]
async fn what_a_provider_says_is_left_is_shared_and_hardly_any_call_is_refused() {
    let rates: Arc<dyn Rates> = Arc::new(local());
    let provider = Provider { tells: Telling::of(240.0, false), ..Provider::default() };
    let processes = four_at(provider, &vec![rates; 4], NO_CAPS);
    tokio::time::sleep(10 * MINUTE).await;
    let sent = processes.provider.got().len();
    let refused = processes.provider.tells.as_ref().map_or(0, |tells| tells.refused.load(Ordering::Relaxed));
    // It lets in 240 at once, and then 240 a minute.
    assert!(sent >= 11 * 240 * 9 / 10, "{sent} of 2640");
    assert!(refused <= 20, "{refused} of {sent} refused");
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_rounds_what_is_left_stops_nobody() {
    let rates: Arc<dyn Rates> = Arc::new(local());
    let provider = Provider { tells: Telling::of(100_000.0, true), ..Provider::default() };
    let processes = four_at(provider, &vec![rates; 4], NO_CAPS);
    tokio::time::sleep(2 * MINUTE).await;
    // 54 calls at a time of 150 ms each.
    let sent = processes.provider.got().len();
    assert!(sent >= 120 * 54 * 1_000 / 150 * 9 / 10, "{sent}");
}

#[tokio::test(start_paused = true)]
async fn a_pause_that_one_process_was_asked_for_holds_for_the_others_within_a_second() {
    for caps in [NO_CAPS, Caps { requests_per_minute: Some(100_000), ..NO_CAPS }] {
        let rates: Arc<dyn Rates> = Arc::new(local());
        let mut processes = Processes::of(&vec![rates; 2], caps);
        processes.calls_from(1, 4);
        tokio::time::sleep(Duration::from_secs(5)).await;
        processes.provider.refuses.store(true, Ordering::Relaxed);
        let refused_at = Instant::now();
        for _ in 0..3 {
            assert!(processes.pools[0].complete(&call(), &Deaf).await.is_err());
        }
        processes.provider.refuses.store(false, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(6)).await;
        let mut got = processes.provider.got();
        got.retain(|(at, by)| *by == 1 && *at > refused_at + Duration::from_millis(1_010));
        let first = got.first().map(|(at, _)| *at - refused_at);
        assert!(first.is_some_and(|first| first >= Duration::from_secs(3)), "{first:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn while_nobody_keeps_the_limits_each_process_sends_its_part_of_them() {
    let rates = Watched::new(Arc::new(local()));
    let caps = Caps { requests_per_minute: Some(120), ..NO_CAPS };
    let processes = four(&vec![rates.clone() as Arc<dyn Rates>; 4], caps);
    tokio::time::sleep(3 * MINUTE).await;
    rates.is_away.store(true, Ordering::Relaxed);
    let away = Instant::now();
    tokio::time::sleep(5 * MINUTE).await;
    let sent = |from: Instant| processes.provider.got().iter().filter(|(at, _)| *at >= from).count();
    let most = processes.provider.most_in_a_minute(away, Instant::now());
    assert!((100..=120).contains(&most), "{most}: not unlimited, and not nothing");
    assert!(sent(away) >= 4 * 100, "{}", sent(away));
    rates.is_away.store(false, Ordering::Relaxed);
    tokio::time::sleep(5 * MINUTE).await;
    // Around the change a process may have used what another takes for its part.
    let most = processes.provider.most_in_a_minute(away - MINUTE, Instant::now());
    assert!(most <= 240, "{most}");
    let back = Instant::now() - 4 * MINUTE;
    let most = processes.provider.most_in_a_minute(back, Instant::now());
    assert!((110..=120).contains(&most), "{most}: shared again");
}

#[tokio::test]
async fn four_processes_share_a_limit_in_redis_and_seldom_ask_for_it() -> Outcome {
    let Some(url) = services::redis() else { return Ok(()) };
    let prefix = format!("forebay-test:{}:limits:", std::process::id());
    let (mut stores, mut rates) = (Vec::new(), Vec::new());
    for _ in 0..4 {
        let options =
            key_value::RedisOptions { prefix: prefix.clone(), ..key_value::RedisOptions::default() };
        let redis = Arc::new(key_value::Redis::connect(&url, options).await?);
        rates.push(Watched::new(redis.clone()));
        stores.push(redis);
    }
    let shares: Vec<_> = rates.iter().map(|rates| rates.clone() as Arc<dyn Rates>).collect();
    let caps = Caps { requests_per_minute: Some(400), ..NO_CAPS };
    let processes = four(&shares, caps);
    // Well below a minute, so nothing comes back meanwhile.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let got = wait_for_async("most of the limit", Duration::from_secs(40), async || {
        Some(processes.provider.got().len()).filter(|got| *got >= 360)
    });
    let got = got.await;
    assert!(got <= 400, "{got} of 400");
    let asked: usize = rates.iter().map(|rates| rates.asked.load(Ordering::Relaxed)).sum();
    assert!(asked < 200, "{asked} times for {got} calls");
    drop(processes);
    key_value::KeyValue::clear(&*stores[0], "").await?;
    Ok(())
}
