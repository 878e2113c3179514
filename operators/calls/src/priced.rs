//! Puts a cost on each try.
//!
//! An answer costs what its tokens do. A try without one is not free for that: a server that was given up in mid-answer has
//! read the prompt. So its cost is estimated from what was sent and heard, but for what was refused or never arrived, which
//! is 0. A server that is paid by its time shares it out among the calls under way: each moment costs each of them its part.
//!
//! Invariant: the costs of a server's calls add up to its price × the time it was busy with ours, and what a ledger keeps of
//! an answer has its cost in it.

use crate::{
    Call, CallError, Class, CostSoFar, Happening, Limits, Listener, Model, Prices, Reply, Tried, TryId,
    Upstream, model::says_what_it_stands_around, prices::Tariff,
};
use forebay_schemas::{NanoUsd, Usage};
use futures::future::BoxFuture;
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// A model, one try at a time, whose answers have a cost.
pub struct Priced {
    inner: Arc<dyn Model>,
    prices: Arc<Prices>,
    meter: Arc<Mutex<Meter>>,
}

impl Priced {
    /// Tries of `inner`, at these prices.
    pub fn new(inner: Arc<dyn Model>, prices: Arc<Prices>) -> Self {
        Self { inner, prices, meter: Arc::default() }
    }
}

/// Shares out a server's time.
#[derive(Default)]
struct Meter {
    under_way: u32,
    /// What a call would have been given that was under way from the beginning.
    share: Duration,
    at: Option<Instant>,
}

impl Meter {
    fn share(&mut self, now: Instant) -> Duration {
        if let Some(at) = self.at.replace(now).filter(|_| self.under_way > 0) {
            self.share += now.saturating_duration_since(at) / self.under_way;
        }
        self.share
    }

    fn begun(&mut self, now: Instant) -> Duration {
        let share = self.share(now);
        self.under_way += 1;
        share
    }

    fn so_far(&mut self, since: Duration, now: Instant) -> Duration {
        self.share(now).saturating_sub(since)
    }

    fn ended(&mut self, since: Duration, now: Instant) -> Duration {
        let spent = self.so_far(since, now);
        self.under_way = self.under_way.saturating_sub(1);
        spent
    }
}

impl Model for Priced {
    says_what_it_stands_around!(inner);

    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(async move {
            let prompt_tokens = call.prompt_tokens_estimated();
            let bill = Bill {
                priced: self,
                listener,
                prompt_tokens,
                open: Mutex::default(),
                cost: Mutex::default(),
            };
            self.inner.complete(call, &bill).await
        })
    }
}

/// Hears one try, for its cost.
struct Bill<'a> {
    priced: &'a Priced,
    listener: &'a dyn Listener,
    prompt_tokens: u64,
    open: Mutex<Option<Open>>,
    /// What the answer cost, or what was read of it.
    cost: Mutex<Option<NanoUsd>>,
}

struct Open {
    endpoint: Option<String>,
    model: String,
    share: Duration,
    pieces: u64,
}

impl Bill<'_> {
    /// What the try cost that is open; closes it.
    fn close(&self, result: Option<Result<&Reply, &CallError>>) -> Option<NanoUsd> {
        let Open { endpoint, model, share, pieces } = lock(&self.open).take()?;
        let share = lock(&self.priced.meter).ended(share, Instant::now());
        let prices = &self.priced.prices;
        let answered = result.and_then(Result::ok);
        let names: Vec<&str> = endpoint
            .as_deref()
            .into_iter()
            .chain([model.as_str()])
            .chain(answered.map(|reply| reply.model.as_str()))
            .collect();
        let is_free = matches!(result, Some(Err(error)) if is_free(error));
        let cost = if prices.is_by_time(&names) {
            prices.of_time(&names, share)
        } else if is_free {
            Some(NanoUsd(0))
        } else {
            let usage = match answered {
                Some(reply) => reply.usage?,
                // A piece is about a token.
                None => Usage::of(self.prompt_tokens, pieces),
            };
            prices.of(&names, usage, Tariff::Live)
        };
        if cost.is_none() {
            prices.warn(&model);
        }
        cost
    }
}

/// Whether nobody bills for a try that ended so: it was refused, or never arrived. What a status in mid-answer cuts was begun.
fn is_free(error: &CallError) -> bool {
    match error.class {
        Class::Unreachable => true,
        Class::Cut => false,
        _ => error.http_status.is_some_and(|status| status >= 300),
    }
}

impl Listener for Bill<'_> {
    fn started(&self, to: Upstream<'_>) {
        let Priced { prices, meter, .. } = self.priced;
        let share = lock(meter).begun(Instant::now());
        let (endpoint, model) = (to.endpoint.map(str::to_owned), to.model.to_owned());
        self.listener.costs(Arc::new({
            let (prices, meter) = (prices.clone(), meter.clone());
            let (endpoint, model, sent) = (endpoint.clone(), model.clone(), Usage::of(self.prompt_tokens, 0));
            move || {
                let names: Vec<&str> = endpoint.as_deref().into_iter().chain([model.as_str()]).collect();
                let spent = lock(&meter).so_far(share, Instant::now());
                match prices.is_by_time(&names) {
                    true => prices.of_time(&names, spent),
                    false => prices.of(&names, sent, Tariff::Live),
                }
            }
        }));
        *lock(&self.open) = Some(Open { endpoint, model, share, pieces: 0 });
        self.listener.started(to);
    }

    fn try_id(&self) -> Option<TryId> {
        self.listener.try_id()
    }

    fn token(&self, text: &str) {
        if let Some(open) = &mut *lock(&self.open) {
            open.pieces += 1;
        }
        self.listener.token(text);
    }

    fn ended(&self, tried: &Tried<'_>) {
        let cost = self.close(Some(tried.result));
        match tried.result {
            Ok(reply) => {
                *lock(&self.cost) = cost;
                let reply = Reply { cost_nano_usd: cost, ..reply.clone() };
                self.listener.ended(&Tried { result: Ok(&reply), ..*tried });
            }
            Err(_) => {
                *lock(&self.cost) = cost;
                if let Some(cost) = cost {
                    self.listener.cost(cost);
                }
                self.listener.ended(tried);
            }
        }
    }

    fn paid<'a>(
        &'a self,
        to: Upstream<'a>,
        call: BoxFuture<'a, Result<Reply, CallError>>,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        // Inside what a ledger keeps.
        let billed = async move {
            let given_up = GivenUp(self);
            let result = call.await;
            drop(given_up);
            let cost_nano_usd = lock(&self.cost).take();
            let costing = |reply| Reply { cost_nano_usd, ..reply };
            result.map(costing).map_err(|error| error.with_partial(costing))
        };
        self.listener.paid(to, Box::pin(billed))
    }

    fn happened(&self, what: Happening) {
        self.listener.happened(what);
    }

    fn limits(&self, limits: &Limits) {
        self.listener.limits(limits);
    }

    fn cost(&self, cost: NanoUsd) {
        self.listener.cost(cost);
    }

    fn costs(&self, so_far: CostSoFar) {
        self.listener.costs(so_far);
    }

    fn beside(&self) -> Option<Box<dyn Listener + '_>> {
        self.listener.beside()
    }
}

/// Tells the cost of a try that is dropped before its end: a hedge that lost, a request taken back.
struct GivenUp<'a, 'b>(&'a Bill<'b>);

impl Drop for GivenUp<'_, '_> {
    fn drop(&mut self) {
        if let Some(cost) = self.0.close(None) {
            self.0.listener.cost(cost);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Heard, Next, Told, call, error, reply};
    use forebay_operator::Clock;
    use futures::future::join_all;

    const TABLE: &str = r#"{
        "m": {"input_cost_per_token": 1e-9, "output_cost_per_token": 1e-8},
        "gpu": {"input_cost_per_second": 0.001}
    }"#;

    fn priced(told: Arc<Told>) -> Priced {
        let prices = Prices::new(Clock::System).with_table("t.json", TABLE, None).unwrap();
        Priced::new(told, Arc::new(prices))
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_has_its_cost_where_it_is_kept_and_told() {
        let heard = Heard::default();
        let reply = priced(Told::of("one", [Next::ok(5)])).complete(&call("why"), &heard).await.unwrap();
        assert_eq!(reply.cost_nano_usd, Some(NanoUsd(10 + 100)));
        assert_eq!(heard.take(), "to one, ok 110, kept one");
    }

    #[tokio::test(start_paused = true)]
    async fn a_try_without_an_answer_costs_what_was_sent_and_heard() {
        // As one that says in mid-answer that its limit is reached.
        let read = CallError::cut("it broke off", reply("one")).with_status(429);
        let cut = Next { first_token: Some(Duration::from_millis(1)), ..Next::err(9, read) };
        let refused = Next::err(1, error(Class::Outage).with_status(503));
        let gone = Next::err(1, error(Class::Unreachable));
        let (heard, asked) = (Heard::default(), call(&"x".repeat(400)));
        let priced = priced(Told::of("one", [cut, refused, gone]));
        for (expected, of_what_was_read) in [
            ("to one, one, cost 110, cut, kept what was read of one", Some(NanoUsd(110))),
            ("to one, cost 0, outage, closed", None),
            ("to one, cost 0, unreachable, closed", None),
        ] {
            let error = priced.complete(&asked, &heard).await.unwrap_err();
            assert_eq!(heard.take(), expected);
            assert_eq!(error.partial.and_then(|read| read.cost_nano_usd), of_what_was_read, "{expected}");
        }
        let given_up = tokio::time::timeout(Duration::from_millis(50), priced.complete(&asked, &heard)).await;
        assert!(given_up.is_err());
        assert_eq!(heard.take(), "to one, cost 100");
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_of_a_server_is_shared_by_the_calls_under_way() {
        let priced = priced(Told::of("gpu", [300, 100, 100].map(Next::ok)));
        let (asked, heard) = (call("why"), Heard::default());
        let replies = join_all((0..3).map(|_| priced.complete(&asked, &heard))).await;
        let costs: Vec<_> =
            replies.into_iter().map(|reply| reply.unwrap().cost_nano_usd.unwrap().0).collect();
        // 100 ms for three, then 200 for one, at 1,000,000 a second.
        assert_eq!(costs, [233_333, 33_333, 33_333]);
        tokio::time::advance(Duration::from_secs(60)).await;
        let later = priced.complete(&asked, &heard).await.unwrap();
        assert_eq!(later.cost_nano_usd, Some(NanoUsd(100_000)), "nobody pays for idle time");
    }
}
