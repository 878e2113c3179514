//! Many callers of one client, and what the servers' log says of it afterwards.

use crate::servers::{Balance, Line, Servers};
use forebay_calls::{Call, Happening, Listener, Tried, TryId, Upstream};
use forebay_operator::Clock;
use forebay_schemas::{Content, Message, Role, Sampling};
use futures::{StreamExt as _, stream};
use std::{
    collections::{HashMap, HashSet},
    sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    time::{Duration, Instant},
};
use tokio::runtime::Runtime;

/// What is asked.
#[derive(Clone, Copy)]
pub struct Load {
    /// How many calls.
    pub calls: usize,
    /// How many at once.
    pub at_once: usize,
    /// What a server works at for so long is a slow call, and all others are fast. What is left when the last call began is
    /// waited for as long.
    pub slow_from: Duration,
    /// How long a caller waits before it asks again where all tries failed, as a host does.
    pub wait: Duration,
    /// What each asks.
    pub prompt: fn(usize) -> String,
}

/// What was seen of a run.
pub struct Seen {
    /// How long each call took that ended, by its number.
    times: HashMap<usize, Duration>,
    calls: usize,
    hedges: usize,
    lines: Vec<Line>,
    slow_from_us: i64,
    /// From when as many calls had ended as are asked at once to the beginning of the last, in microseconds since 1970.
    full: (i64, i64),
}

/// Names the tries of a call, so that the servers' log can be laid beside it.
struct Numbered<'a> {
    call: usize,
    next: &'a AtomicU32,
    number: AtomicU32,
    /// Those of all calls.
    tries: &'a AtomicUsize,
    hedges: &'a AtomicUsize,
    is_over: &'a AtomicBool,
}

impl Listener for Numbered<'_> {
    fn started(&self, _: Upstream<'_>) {
        self.tries.fetch_add(1, Ordering::Relaxed);
        self.number.store(self.next.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
    }
    fn try_id(&self) -> Option<TryId> {
        Some(TryId { call: self.call.to_string(), number: self.number.load(Ordering::Relaxed) })
    }
    fn token(&self, _: &str) {}
    fn ended(&self, _: &Tried<'_>) {}
    fn happened(&self, what: Happening) {
        if what == Happening::Hedged && !self.is_over.load(Ordering::Relaxed) {
            self.hedges.fetch_add(1, Ordering::Relaxed);
        }
    }
    fn beside(&self) -> Option<Box<dyn Listener + '_>> {
        let Self { call, next, tries, hedges, is_over, .. } = *self;
        Some(Box::new(Numbered { call, next, number: AtomicU32::default(), tries, hedges, is_over }))
    }
}

impl Load {
    /// Asks all of it.
    pub fn run(&self, runtime: &Runtime, servers: &Servers, balance: Balance) -> Seen {
        let (model, pool) = servers.client(balance);
        let (tries, hedges, is_over) =
            (AtomicUsize::default(), AtomicUsize::default(), AtomicBool::default());
        let begun = AtomicUsize::default();
        let now_us = || Clock::System.now_us();
        let asking = async {
            let ask = async |number: usize| {
                let is_last = begun.fetch_add(1, Ordering::Relaxed) + 1 == self.calls;
                is_over.fetch_or(is_last, Ordering::Relaxed);
                let (next, sent) = (AtomicU32::default(), Instant::now());
                let listener = Numbered {
                    call: number,
                    next: &next,
                    number: AtomicU32::default(),
                    tries: &tries,
                    hedges: &hedges,
                    is_over: &is_over,
                };
                let call = call((self.prompt)(number));
                while model
                    .complete(&Call { route: Default::default(), ..call.clone() }, &listener)
                    .await
                    .is_err()
                {
                    tokio::time::sleep(self.wait).await;
                }
                (number, sent.elapsed())
            };
            let (mut from_us, mut until_us) = (now_us(), None);
            let mut ended = stream::iter(0..self.calls).map(ask).buffer_unordered(self.at_once).boxed_local();
            let mut times = HashMap::new();
            let mut last = None;
            loop {
                if is_over.load(Ordering::Relaxed) && last.is_none() {
                    until_us = Some(now_us());
                    last = Some(tokio::time::Instant::now() + self.slow_from.min(Duration::from_secs(60)));
                }
                let next = match last {
                    None => ended.next().await,
                    // What ends later is slow, and nothing is to be learned from it.
                    Some(last) => tokio::time::timeout_at(last, ended.next()).await.unwrap_or(None),
                };
                let Some((number, time)) = next else { break };
                times.insert(number, time);
                if times.len() == self.at_once {
                    // Connections stand from here on.
                    from_us = now_us();
                }
            }
            (times, (from_us, until_us.unwrap_or_else(now_us)))
        };
        let keeping = async {
            if let Some(pool) = pool {
                pool.keep().await;
            }
            std::future::pending::<std::convert::Infallible>().await
        };
        let (times, full) = runtime.block_on(async {
            tokio::select! {
                biased;
                seen = asking => seen,
                never = keeping => match never {},
            }
        });
        let lines = runtime.block_on(servers.lines(tries.into_inner()));
        let slow_from_us = i64::try_from(self.slow_from.as_micros()).unwrap_or(i64::MAX);
        Seen { times, calls: self.calls, hedges: hedges.into_inner(), lines, slow_from_us, full }
    }
}

fn call(text: String) -> Call<'static> {
    let message = Message { role: Role::User, content: Some(Content::Text(text)), rest: Default::default() };
    let sampling = Sampling { max_tokens: Some(64), ..Sampling::default() };
    Call { messages: vec![message], sampling, ..Call::default() }
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { f64::NAN }
}

impl Seen {
    fn worked_us(line: &Line) -> i64 {
        line.admitted_us.map_or(0, |admitted| line.ended_us - admitted)
    }

    /// The part of the places that was taken while there were calls enough for all, of so many at each replica. A call's line has
    /// the moment at which its answer was handed on, up to a millisecond after its place is free.
    pub fn used(&self, replicas: usize, slots: usize) -> f64 {
        let (from, until) = self.full;
        let slots = i64::try_from(slots).unwrap_or(i64::MAX);
        let taken: i64 = (0..replicas).map(|replica| self.taken_us(replica, slots)).sum();
        ratio(taken as f64, (until - from) as f64 * slots as f64 * replicas as f64)
    }

    /// Microseconds that places of a replica were taken, of so many.
    fn taken_us(&self, replica: usize, slots: i64) -> i64 {
        let (from, until) = self.full;
        let of_replica = self.lines.iter().filter(|line| line.replica == replica);
        let within = |at: i64| at.clamp(from, until);
        let mut changes: Vec<_> = of_replica
            .filter_map(|line| Some([(within(line.admitted_us?), 1), (within(line.ended_us), -1)]))
            .flatten()
            .collect();
        changes.sort_unstable();
        let (mut taken, mut running, mut since) = (0, 0, from);
        for (at, change) in changes {
            taken += (at - since) * i64::min(running, slots);
            (running, since) = (running + change, at);
        }
        taken
    }

    /// The quantile of how long callers of fast calls waited, in seconds.
    pub fn fast_quantile(&self, quantile: f64) -> f64 {
        let slow: HashSet<usize> = self
            .lines
            .iter()
            .filter(|line| Self::worked_us(line) >= self.slow_from_us)
            .filter_map(|line| line.call_id.as_ref()?.parse().ok())
            .collect();
        let fast = self.times.iter().filter(|(number, _)| !slow.contains(number));
        let mut fast: Vec<_> = fast.map(|(_, time)| time.as_secs_f64()).collect();
        fast.sort_by(f64::total_cmp);
        let index = (0..fast.len()).find(|&index| (index + 1) as f64 >= quantile * fast.len() as f64);
        index.and_then(|index| fast.get(index)).copied().unwrap_or(f64::NAN)
    }

    /// Tries beyond the first, as a part of the calls.
    pub fn more(&self) -> f64 {
        ratio(self.lines.len() as f64, self.calls as f64) - 1.0
    }

    /// Calls that a server worked at for so long, as a part of all.
    pub fn stuck(&self, time: Duration) -> f64 {
        let time_us = i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
        let stuck = self.lines.iter().filter(|line| Self::worked_us(line) >= time_us).count();
        ratio(stuck as f64, self.calls as f64)
    }

    /// Hedges that were sent while calls came.
    pub fn hedges(&self) -> f64 {
        self.hedges as f64
    }

    /// Tokens that a cache knew, as a part of what one cache for all would have known.
    pub fn hits(&self, shared: impl Fn(usize) -> String) -> f64 {
        let answered = || self.lines.iter().filter(|line| line.status == Some(200));
        let numbers = answered().filter_map(|line| line.call_id.as_ref()?.parse().ok());
        let prefixes: Vec<String> = numbers.map(shared).collect();
        let different = prefixes.iter().collect::<HashSet<_>>().len();
        let most = answered().map(|line| line.cached_tokens).max().unwrap_or(0);
        let known: u64 = answered().map(|line| line.cached_tokens).sum();
        ratio(known as f64, (prefixes.len() - different) as f64 * most as f64)
    }

    /// The calls of the replica that had the most, as a part of the mean.
    pub fn most_loaded(&self, replicas: usize) -> f64 {
        let of = |replica| self.lines.iter().filter(|line| line.replica == replica).count();
        let most = (0..replicas).map(of).max().unwrap_or(0);
        ratio(most as f64 * replicas as f64, self.lines.len() as f64)
    }
}
