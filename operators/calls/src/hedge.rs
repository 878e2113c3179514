//! Asks a second endpoint where the first is slow, and takes what comes first.
//!
//! A few calls in a hundred take far longer than the rest, for reasons of the machine and not of the call; a second try
//! of the slowest twentieth cuts the tail for a twentieth more calls (Dean and Barroso, "The Tail at Scale", 2013). The
//! second is sent when the first has no token after the time within which 97 in 100 calls of its kind had one, or after a
//! fixed time; where the answer comes in one piece, that piece is the token. Whose token comes first wins, and the
//! other's connection is closed.
//!
//! Dean and Barroso take 95. But hedges are for at most 5 in 100 calls, and at 95 whatever chance adds takes the hedge from one
//! that sticks: measured with 5% that stick for 20 s, p99 stayed at 20 s and every hedge was spent. Where more than 3 in 100 stick,
//! 97 would be the time of one of these, and nothing would ever be hedged. So it is twice the time of 90 in 100 at most, beyond
//! which calls are of another kind and not just slow.
//!
//! It can do harm: the load of a pool that is slow from load. So it is off unless asked for, draws on the retry budget, is
//! sent to another endpoint in good health or not at all, for at most 5 in 100 calls and 3 in 100 of what calls with
//! a price cost, and not while the pool is nearly full, was refused of late, or the model may use tools.
//!
//! Invariant: both are tries of one call, and a ledger knows of each before it is sent. The answer is kept under the call
//! first and the hedge is closed then, so that no crash between them leaves a paid answer unknown. Whoever reads
//! along sees tokens of one try only.

mod race;

use crate::{
    Budget, Call, CallError, Class, Happening, Listener, Model, Pool, Reply,
    model::says_what_it_stands_around, window::Window,
};
use futures::future::BoxFuture;
use race::{Contender, Race, Side};
use std::{
    collections::HashMap,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::oneshot, time::Instant};

/// Kinds of calls whose times are kept apart.
const KINDS_MAX: usize = 256;
/// The youngest times of a kind that are looked at, and how few are too few.
const SAMPLES_MAX: usize = 256;
const SAMPLES_MIN: usize = 100;
const QUANTILE_PERCENT: usize = 97;
/// Of how many calls the time is looked at too, and how many times as long is no slowness of the usual kind.
const BODY_PERCENT: usize = 90;
const BODY_TIMES: u32 = 2;
/// How often a slow call is looked at, each time after as long again: more often, those that were passed over would take the
/// few hedges from those that are slow since just now.
const LOOKS_MAX: u32 = 2;
/// Over which time calls and hedges are compared, and their shares.
const OVER: Duration = Duration::from_secs(60);
const CALLS_PER_HEDGE: u64 = 20;
const SPEND_PERCENT: u64 = 3;

const CALLS: usize = 0;
const HEDGES: usize = 1;
const SPENT: usize = 2;
const SPENT_HEDGED: usize = 3;

/// See the module.
pub struct Hedge {
    pool: Arc<Pool>,
    budget: Arc<Budget>,
    /// After this time; by what was seen where absent.
    after: Option<Duration>,
    seen: Mutex<Seen>,
}

/// Model, doublings of the prompt's size, and whether the answer is streamed.
type Kind = (String, u32, bool);

struct Seen {
    times: HashMap<Kind, Times>,
    window: Window<4>,
}

/// The youngest times of a kind.
#[derive(Default)]
struct Times {
    ring: Vec<Duration>,
    next: usize,
}

impl Times {
    fn add(&mut self, time: Duration) {
        match self.ring.get_mut(self.next) {
            Some(place) => *place = time,
            None => self.ring.push(time),
        }
        self.next = (self.next + 1) % SAMPLES_MAX;
    }

    /// The time after which a call is slow.
    fn slow(&self) -> Option<Duration> {
        if self.ring.len() < SAMPLES_MIN {
            return None;
        }
        let mut sorted = self.ring.clone();
        let mut of_percent = |percent| *sorted.select_nth_unstable(self.ring.len() * percent / 100).1;
        Some(of_percent(QUANTILE_PERCENT).min(of_percent(BODY_PERCENT) * BODY_TIMES))
    }
}

impl Hedge {
    /// Hedges the calls of a pool: after a fixed time, or by what was seen.
    pub fn new(pool: Arc<Pool>, budget: Arc<Budget>, after: Option<Duration>) -> Self {
        let seen = Mutex::new(Seen { times: HashMap::new(), window: Window::new(OVER) });
        Self { pool, budget, after, seen }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kind(&self, call: &Call<'_>) -> Kind {
        let model = call.model.as_deref().unwrap_or(self.pool.name());
        (model.to_owned(), call.prompt_tokens_estimated().max(1).ilog2(), call.stream)
    }

    /// Whether one may be sent now; then it counts.
    fn may(&self, call: &Call<'_>) -> bool {
        let now = Instant::now();
        let mut seen = self.seen();
        let [calls, hedges, spent, spent_hedged] = seen.window.sums(now);
        let may = call.sampling.tools.is_none()
            && (hedges + 1) * CALLS_PER_HEDGE <= calls
            && spent_hedged.saturating_mul(100) <= spent.saturating_mul(SPEND_PERCENT)
            && self.pool.may_hedge(call)
            && self.budget.draw();
        if may {
            seen.window.add(HEDGES, 1, now);
        }
        may
    }

    async fn race(&self, call: &Call<'_>, listener: &dyn Listener) -> Result<Reply, CallError> {
        let kind = self.kind(call);
        let after = self.after.or_else(|| self.seen().times.get(&kind)?.slow());
        let race = Race::default();
        let first = Contender::new(Side::First, &race, listener);
        let mut asked = pin!(self.pool.complete(call, &first));
        let slow = async {
            race.sent.notified().await;
            // Where there was no room for a hedge, as of those there may be few, there may be later.
            for _ in 0..after.map_or(0, |_| LOOKS_MAX) {
                tokio::time::sleep(after.unwrap_or_default()).await;
                if race.winner().is_none()
                    && let Some(beside) = listener.beside()
                    && self.may(call)
                {
                    return beside;
                }
            }
            std::future::pending().await
        };
        let result = tokio::select! {
            biased;
            result = &mut asked => Ok(result),
            beside = slow => Err(beside),
        };
        let hedged = result.is_err();
        let result = match result {
            Ok(result) => result,
            Err(beside) => {
                listener.happened(Happening::Hedged);
                let elsewhere = Call { route: call.route.hedge(), ..call.clone() };
                let second = Contender::new(Side::Second, &race, &*beside);
                let (first, second) =
                    tokio::join!(asked, self.second(&elsewhere, &second, race.expect_another()));
                // A retry goes elsewhere than both.
                let tried = elsewhere.route.tried();
                tried.iter().skip(call.route.tried().len()).for_each(|&index| call.route.goes_to(index));
                match (first, second) {
                    (Err(first), Err(second)) if first.class == Class::Lost => Err(second),
                    (first, _) => first,
                }
            }
        };
        self.note(kind, &race, &result, hedged);
        result
    }

    /// The second try. What it answers is the first's answer too, which is kept before this one is closed.
    async fn second(
        &self,
        call: &Call<'_>,
        contender: &Contender<'_>,
        answer: oneshot::Sender<Result<Reply, CallError>>,
    ) -> Result<Reply, CallError> {
        *lock(&contender.answer) = Some(answer);
        let result = self.pool.complete(call, contender).await;
        // Never sent: then nobody waits for it.
        lock(&contender.answer).take();
        result
    }

    fn note(&self, kind: Kind, race: &Race, result: &Result<Reply, CallError>, hedged: bool) {
        let now = Instant::now();
        let mut seen = self.seen();
        seen.window.add(CALLS, 1, now);
        if let Ok(cost) = result.as_ref().map(|reply| reply.cost_nano_usd.map_or(0, |cost| cost.0)) {
            let cost = u64::try_from(cost).unwrap_or(0);
            seen.window.add(SPENT, cost, now);
            // What the loser cost nobody says: at most about as much.
            seen.window.add(SPENT_HEDGED, if hedged { cost } else { 0 }, now);
        }
        // A try that lost took at least so long. Left out, the slow ones would vanish from what is usual.
        let times = std::mem::take(&mut *lock(&race.times));
        if seen.times.contains_key(&kind) || seen.times.len() < KINDS_MAX {
            let of_kind = seen.times.entry(kind).or_default();
            times.into_iter().for_each(|time| of_kind.add(time));
        }
    }
}

impl Model for Hedge {
    says_what_it_stands_around!(pool);

    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(self.race(call, listener))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
