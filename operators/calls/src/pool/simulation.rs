//! A whole pool in virtual time, beside the two simple ways to balance: how much of its places it uses, what a prefix
//! cache sees of it, and how it shares.

use super::*;
use crate::{
    Retry,
    testing::{Heard, Next, Random, Told, call, error, limited, reply},
};
use futures::{StreamExt as _, stream};
use std::collections::HashSet;
use tokio::sync::Semaphore;

const SLOTS: usize = 16;
/// How fast the replicas are.
const SPEEDS: [f64; 4] = [0.5, 1.0, 1.0, 2.0];
const CALLS: usize = 6_000;

/// What a simulation saw.
struct Engine {
    slots: Semaphore,
    /// Time that slots were taken, by the end of each call.
    taken: Mutex<Vec<(Instant, Duration)>>,
    random: Mutex<Random>,
    speed: f64,
    /// Of a hundred calls, how many take 30 s.
    slow_percent: f64,
}

impl Engine {
    fn new(seed: u64, speed: f64, slow_percent: f64) -> Arc<Self> {
        let random = Mutex::new(Random(seed));
        let slots = Semaphore::new(SLOTS);
        Arc::new(Self { slots, taken: Mutex::default(), random, speed, slow_percent })
    }
}

impl Model for Engine {
    fn provider(&self) -> &'static str {
        "engine"
    }
    fn name(&self) -> &str {
        "m"
    }
    fn complete<'a>(
        &'a self,
        _: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        let sent = async move {
            let _slot = self.slots.acquire().await.unwrap();
            let (is_refused, time) = {
                let mut random = self.random.lock().unwrap();
                let time = random.between(ms(50), ms(5_000)).div_f64(self.speed);
                let is_slow = random.next() * 100.0 < self.slow_percent;
                (random.next() < 0.05, if is_slow { ms(30_000) } else { time })
            };
            if is_refused {
                return Err(limited(ms(1_000)));
            }
            tokio::time::sleep(time).await;
            self.taken.lock().unwrap().push((Instant::now(), time));
            let mut reply = reply("yes");
            reply.ttft = Some(time);
            Ok(reply)
        };
        listener.paid(Upstream { provider: "engine", endpoint: None, model: "m" }, Box::pin(sent))
    }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn engines(slow_percent: f64) -> Vec<Arc<Engine>> {
    (1..).zip(SPEEDS).map(|(seed, speed)| Engine::new(seed, speed, slow_percent)).collect()
}

/// The two ways to balance that everybody has.
enum Simple {
    RoundRobin,
    LeastRequests,
}

/// Balances simply: a call goes to an engine when it comes, and queues there.
struct Beside {
    engines: Vec<Arc<Engine>>,
    how: Simple,
    running: Mutex<(usize, Vec<usize>)>,
}

impl Model for Beside {
    fn provider(&self) -> &'static str {
        "beside"
    }
    fn name(&self) -> &str {
        "m"
    }
    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(async move {
            let index = {
                let (next, running) = &mut *self.running.lock().unwrap();
                *next += 1;
                let index = match self.how {
                    Simple::RoundRobin => *next % self.engines.len(),
                    Simple::LeastRequests => (0..running.len()).min_by_key(|&index| running[index]).unwrap(),
                };
                running[index] += 1;
                index
            };
            let result = self.engines[index].complete(call, listener).await;
            self.running.lock().unwrap().1[index] -= 1;
            result
        })
    }
}

/// Asks so many calls, so many at once. Gives the part of the engines' places that was taken until the last call was begun,
/// and the 99th percentile of how long the fast ones took.
async fn run(model: Arc<dyn Model>, engines: &[Arc<Engine>], at_once: usize) -> (f64, Duration) {
    let (start, last_begun) = (Instant::now(), Mutex::new(Instant::now()));
    let model = Retry::new(model, Arc::default());
    let times: Vec<Duration> = stream::iter(0..CALLS)
        .map(|_| async {
            let began = Instant::now();
            *last_begun.lock().unwrap() = began;
            // The host waits through an outage and asks again.
            while model.complete(&call("why"), &Heard::default()).await.is_err() {
                tokio::time::sleep(ms(1_000)).await;
            }
            began.elapsed()
        })
        .buffer_unordered(at_once)
        .collect()
        .await;
    let until = *last_begun.lock().unwrap();
    let mut taken = 0.0;
    for engine in engines {
        for (end, time) in engine.taken.lock().unwrap().iter() {
            let began = *end - *time;
            taken += (*end).min(until).saturating_duration_since(began).as_secs_f64();
        }
    }
    let places = (engines.len() * SLOTS) as f64 * (until - start).as_secs_f64();
    let mut fast: Vec<_> = times.into_iter().filter(|time| *time < ms(30_000)).collect();
    fast.sort_unstable();
    (taken / places, fast[fast.len() * 99 / 100])
}

fn pool_of(engines: &[Arc<Engine>]) -> Arc<Pool> {
    let caps = Caps { outstanding: SLOTS, requests_per_minute: None, tokens_per_minute: None };
    let endpoint = |engine: &Arc<Engine>| {
        let model: Arc<dyn Model> = engine.clone();
        Endpoint {
            name: "e".to_owned(),
            model,
            caps,
            origin: String::new(),
            watch: None,
            starts_cold: false,
            shared: None,
        }
    };
    Arc::new(Pool::new("m", engines.iter().map(endpoint).collect(), Arc::new(|| 0.5)))
}

/// Nearly all of what is there, with unequal replicas, slow calls and refusals. Balanced simply, a call queues at one engine
/// while another is idle.
#[tokio::test(start_paused = true)]
async fn the_places_of_a_pool_are_used() {
    let at_once = SLOTS * SPEEDS.len() * 3 / 2;
    let seen = engines(1.0);
    let (used, p99) = run(pool_of(&seen), &seen, at_once).await;
    let plain = engines(0.0);
    let (_, p99_plain) = run(pool_of(&plain), &plain, at_once).await;
    let mut beside = Vec::new();
    for how in [Simple::RoundRobin, Simple::LeastRequests] {
        let engines = engines(1.0);
        let running = Mutex::new((0, vec![0; engines.len()]));
        let model = Arc::new(Beside { engines: engines.clone(), how, running });
        beside.push(run(model, &engines, at_once).await);
    }
    println!(
        "pool {used:.3} p99 {p99:?} (without slow calls {p99_plain:?}); round robin, least requests {beside:?}"
    );
    assert!(used >= 0.97, "{used}");
    assert!(p99 <= p99_plain * 2, "{p99:?} {p99_plain:?}");
    assert!(beside[0].0 < used, "{beside:?}");
}

#[tokio::test(start_paused = true)]
async fn shared_prefixes_are_found_again_and_no_replica_is_overloaded() {
    const PREFIXES: usize = 64;
    const REPLICAS: usize = 4;
    let caches: Arc<Mutex<Vec<HashSet<u64>>>> = Arc::new(Mutex::new(vec![HashSet::new(); REPLICAS]));
    let hits = Arc::new(Mutex::new(0));
    let upstreams: Vec<_> = (0..REPLICAS)
        .map(|replica| {
            let (caches, hits) = (caches.clone(), hits.clone());
            let mut random = Random(replica as u64);
            Told::by("replica", move |call| {
                let prefix = prefix::blocks("m", call)[15];
                *hits.lock().unwrap() += usize::from(!caches.lock().unwrap()[replica].insert(prefix));
                Next { after: random.between(ms(100), ms(1_000)), ..Next::ok(0) }
            })
        })
        .collect();
    let caps = Caps { outstanding: SLOTS, requests_per_minute: None, tokens_per_minute: None };
    let endpoints = upstreams.iter().map(|told| Endpoint {
        name: "e".to_owned(),
        model: told.clone(),
        caps,
        origin: String::new(),
        watch: None,

        starts_cold: false,
        shared: None,
    });
    let pool = Pool::new("m", endpoints.collect(), Arc::new(|| 0.5));
    let mut random = Random(7);
    // Some prefixes are asked for far more often than others.
    let asked: Vec<usize> = (0..CALLS).map(|_| random.below(PREFIXES).min(random.below(PREFIXES))).collect();
    let different: HashSet<_> = asked.iter().collect();
    stream::iter(&asked)
        .for_each_concurrent(SLOTS * 2, |prefix| {
            // About 2,000 tokens.
            let text = format!("{prefix} {}", "x".repeat(8_192));
            let pool = &pool;
            async move {
                pool.complete(&call(&text), &Heard::default()).await.unwrap();
            }
        })
        .await;
    let best = (CALLS - different.len()) as f64;
    let hit = *hits.lock().unwrap() as f64 / best;
    let tries: Vec<usize> = upstreams.iter().map(|told| told.tries()).collect();
    let load = *tries.iter().max().unwrap() as f64 * REPLICAS as f64 / CALLS as f64;
    println!("{hit:.3} of the best hit rate, the most loaded replica has {load:.2} of the mean: {tries:?}");
    assert!(hit >= 0.9, "{hit}");
    assert!(load <= 1.5, "{load}");
}

/// One replica dies for a while, one stalls, one talks nonsense, one refuses: each call is answered, each try is told of
/// twice, and the one that died is used again.
#[tokio::test(start_paused = true)]
async fn whatever_replicas_do_no_call_is_lost_and_no_try_is_untold() {
    let start = Instant::now();
    let replica = |name, seed, fails: fn(f64, Duration) -> Option<(u64, CallError)>| {
        let mut random = Random(seed);
        Told::by(name, move |_| match fails(random.next(), start.elapsed()) {
            Some((after_ms, error)) => Next::err(after_ms, error),
            None => Next { after: random.between(ms(50), ms(500)), ..Next::ok(0) },
        })
    };
    let dies = replica("dies", 1, |_, now| {
        (ms(5_000)..ms(20_000)).contains(&now).then(|| (0, error(Class::Unreachable)))
    });
    let upstreams = [
        dies.clone(),
        replica("stalls", 2, |random, _| (random < 0.02).then(|| (10_000, error(Class::Cut)))),
        replica("babbles", 3, |random, _| (random < 0.1).then(|| (100, error(Class::Transient)))),
        replica("refuses", 4, |random, _| (random < 0.1).then(|| (0, limited(ms(1_000))))),
    ];
    let caps = Caps { outstanding: 8, requests_per_minute: None, tokens_per_minute: None };
    let endpoint = |told: &Arc<Told>| {
        let (name, model) = ("e".to_owned(), told.clone());
        Endpoint { name, model, caps, origin: String::new(), watch: None, starts_cold: false, shared: None }
    };
    let pool = Arc::new(Pool::new("m", upstreams.iter().map(endpoint).collect(), Arc::new(|| 0.5)));
    let model = Retry::new(pool.clone(), Arc::default());
    let heard = Heard::default();
    stream::iter(0..8_000)
        .for_each_concurrent(24, |_| async {
            while model.complete(&call("why"), &heard).await.is_err() {
                tokio::time::sleep(ms(1_000)).await;
            }
        })
        .await;
    let told = heard.take();
    let count = |word: &str| told.split(", ").filter(|told| *told == word).count();
    let tries: usize = upstreams.iter().map(|told| told.tries()).sum();
    let begun: usize =
        ["dies", "stalls", "babbles", "refuses"].iter().map(|name| count(&format!("to {name}"))).sum();
    let failed = ["unreachable", "cut", "transient", "limited"].map(count);
    assert_eq!((count("ok"), begun), (8_000, tries));
    assert_eq!(failed.iter().sum::<usize>(), tries - 8_000, "{failed:?}");
    assert!(failed.iter().all(|&times| times > 0), "{failed:?}");
    let died = start + ms(5_000);
    let tries_of = |from: u64, until: u64| {
        let tries = dies.tries.lock().unwrap();
        tries.iter().filter(|at| (died + ms(from)..died + ms(until)).contains(at)).count()
    };
    println!(
        "{failed:?} failed of {tries} tries in {:?}; {} while it was dead",
        start.elapsed(),
        tries_of(0, 15_000)
    );
    assert!(tries_of(0, 15_000) < 20, "{}: it is left alone", tries_of(0, 15_000));
    assert!(tries_of(20_000, 80_000) > 100, "{}: it came back", tries_of(20_000, 80_000));
    assert!(pool.status().iter().all(|status| status.running == 0 && status.tokens == 0));
}
