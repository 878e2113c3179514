//! All layers of a pool's client, in their order.

use crate::{
    Allowed, Batch, Budget, Fallback, Hedge, Model, Pool, Retry, Tiers,
    allowance::Allowances,
    batch::Size,
    retry::Jitter,
    tiers::{Policy, Tier},
};
use std::{sync::Arc, time::Duration};

/// When a call is asked a second time elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hedging {
    /// Never.
    #[default]
    Off,
    /// After what 97 in 100 calls of its kind took, and at most twice what 90 took.
    Usual,
    /// After this time.
    After(Duration),
}

/// What a client is made of.
pub struct Parts {
    /// The endpoints.
    pub pool: Arc<Pool>,
    /// When a call is asked a second time elsewhere.
    pub hedging: Hedging,
    /// The models that answer where no endpoint can, in their order.
    pub fallbacks: Vec<Arc<dyn Model>>,
    /// What tenants may spend; absent where they may spend what they like.
    pub allowances: Option<Arc<dyn Allowances>>,
    /// The randomness of delays.
    pub jitter: Jitter,
}

/// A client, from the inside out. Each layer is a [`Model`] around a `Model`.
pub fn client(parts: Parts) -> Arc<dyn Model> {
    // One for all that is made beyond the first try of a call, or three layers would each add their fifth.
    tier(String::new(), parts, None, &Arc::default()).model
}

/// A client whose calls for vectors go together, in lots of this size. A lot is not hedged: it is many callers' at once.
pub fn joining(parts: Parts, size: Size) -> Arc<dyn Model> {
    let parts = Parts { hedging: Hedging::Off, ..parts };
    tier(String::new(), parts, Some(size), &Arc::default()).model
}

/// A client of several pools, the cheapest first, each under the name of its tier. Each tier is paid out of the allowances by
/// itself, as the next one may not be within them.
pub fn tiered(tiers: Vec<(String, Parts)>, policy: Policy) -> Arc<dyn Model> {
    let budget = Arc::default();
    let tiers = tiers.into_iter().map(|(name, parts)| tier(name, parts, None, &budget)).collect();
    Arc::new(Tiers::new(tiers, policy))
}

fn tier(name: String, parts: Parts, lots: Option<Size>, budget: &Arc<Budget>) -> Tier {
    let Parts { pool, hedging, fallbacks, allowances, jitter } = parts;
    // One try, at the best endpoint that its breaker and throttle let it go to.
    let model: Arc<dyn Model> = pool.clone();
    // Around it: what several calls want at once is one try.
    let model: Arc<dyn Model> = match lots {
        Some(size) => Arc::new(Batch::new(model, size)),
        None => model,
    };
    // Around one try: a hedge is the other half of it. It knows the pool, as it must not fire when that is full.
    let model: Arc<dyn Model> = match hedging {
        Hedging::Off => model,
        Hedging::Usual => Arc::new(Hedge::new(pool, budget.clone(), None)),
        Hedging::After(after) => Arc::new(Hedge::new(pool, budget.clone(), Some(after))),
    };
    // Around both halves: what neither could, a later try may.
    let model: Arc<dyn Model> = Arc::new(Retry::new(model, budget.clone()).with_jitter(jitter));
    // Around all tries: another model is asked only when this one is given up.
    let with_fallbacks: Arc<dyn Model> = match fallbacks.is_empty() {
        true => model.clone(),
        false => Arc::new(Fallback::new(model.clone(), fallbacks.clone(), budget.clone())),
    };
    let stand_ins: Option<Arc<dyn Model>> = (!fallbacks.is_empty())
        .then(|| Arc::new(Fallback::instead_of(model.clone(), fallbacks.clone(), budget.clone())) as _);
    // Outermost: who may not spend makes no call at all, and pays once whatever it took.
    let allowed = |model: Arc<dyn Model>| match &allowances {
        Some(allowances) => Arc::new(Allowed::new(model, allowances.clone())) as Arc<dyn Model>,
        None => model,
    };
    Tier { name, model: allowed(with_fallbacks), alone: allowed(model), stand_ins: stand_ins.map(allowed) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Call, CallError, Class, Happening, Reply, Wait,
        allowance::Reservation,
        pool::Endpoint,
        testing::{Heard, Next, Told, call, error},
        throttle::Caps,
    };
    use futures::future::BoxFuture;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::time::Instant;

    fn parts(told: &Arc<Told>, last: &Arc<Told>) -> Parts {
        let endpoint = Endpoint {
            name: "e".to_owned(),
            model: told.clone(),
            caps: Caps { outstanding: 8, requests_per_minute: None, tokens_per_minute: None },
            origin: String::new(),
            watch: None,
            starts_cold: false,
            shared: None,
        };
        Parts {
            pool: Arc::new(Pool::new("m", vec![endpoint], Arc::new(|| 0.5))),
            hedging: Hedging::Off,
            fallbacks: vec![last.clone()],
            allowances: None,
            jitter: Arc::new(|| 1.0),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_tier_has_a_stack_of_its_own_and_who_stands_in_answers_only_where_nothing_else_does() {
        let escalation = crate::tiers::Escalation { on_refusal: true, ..Default::default() };
        let refusal = || Next::says(1, crate::testing::reply("I cannot help with that."));
        for (small, expected, asked_last) in [
            (refusal as fn() -> Next, "I cannot help with that.", 0),
            (|| Next::err(1, error(Class::Unreachable)), "last", 1),
        ] {
            let small = Told::by("small", move |_| small());
            let dead = Told::by("dead", |_| Next::err(0, error(Class::Unreachable)));
            let last = Told::by("last", |_| Next::ok(1));
            let named = |name: &str, told| (name.to_owned(), parts(told, &last));
            let policy = Policy { escalation, ..Policy::default() };
            let model = tiered(vec![named("small", &small), named("large", &dead)], policy);
            let reply = model.complete(&call("why"), &Heard::default()).await.unwrap();
            assert_eq!((reply.text.as_str(), last.tries()), (expected, asked_last));
            assert_eq!(reply.answered.is_some(), asked_last == 0, "who stands in is of no tier");
            assert_eq!(dead.tries(), if asked_last == 0 { 3 } else { 0 }, "a better tier is tried again too");
        }
    }

    /// Refuses so many calls, since it cannot count them.
    struct Uncounted(AtomicUsize);
    struct Free;

    impl Allowances for Uncounted {
        fn reserve<'a>(
            &'a self,
            _: &'a Call<'_>,
            _: &'a str,
        ) -> BoxFuture<'a, Result<Box<dyn Reservation>, CallError>> {
            let left = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
            let refused = || CallError::new(Class::Closed, "store_unavailable", "could not count");
            Box::pin(
                async move { left.map_or(Ok(Box::new(Free) as Box<dyn Reservation>), |_| Err(refused())) },
            )
        }
    }
    impl Reservation for Free {
        fn settle<'a>(self: Box<Self>, _: &'a Reply) -> BoxFuture<'a, ()> {
            Box::pin(async {})
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_may_not_spend_asks_nobody_once_and_no_breaker_counts_it() {
        let (told, last) = (Told::of("e", []), Told::of("last", []));
        let allowances = Some(Arc::new(Uncounted(AtomicUsize::new(50))) as Arc<dyn Allowances>);
        let model = client(Parts { allowances, ..parts(&told, &last) });
        for _ in 0..50 {
            let heard = Heard::default();
            let error = model.complete(&call("why"), &heard).await.unwrap_err();
            assert_eq!((error.class, error.code), (Class::Closed, "store_unavailable"), "as it was given");
            assert_eq!(heard.take(), "closed", "a ledger hears of a failed try that nobody sent");
        }
        assert_eq!((told.tries(), last.tries()), (0, 0));
        let begun = Instant::now();
        assert_eq!(model.complete(&call("why"), &Heard::default()).await.unwrap().text, "e");
        assert_eq!(begun.elapsed(), Duration::from_millis(100), "it was let in at once");
    }

    #[tokio::test(start_paused = true)]
    async fn who_stands_in_answers_an_outage_that_a_better_tier_would_make_a_rejection() {
        let escalation = crate::tiers::Escalation { on_outage: true, ..Default::default() };
        let dead = Told::by("dead", |_| Next::err(0, error(Class::Unreachable)));
        let large = Told::by("large", |_| Next::err(0, error(Class::Rejected)));
        let last = Told::by("last", |_| Next::ok(1));
        let named = |name: &str, told| (name.to_owned(), parts(told, &last));
        let policy = Policy { escalation, ..Policy::default() };
        let model = tiered(vec![named("small", &dead), named("large", &large)], policy);
        let reply = model.complete(&call("why"), &Heard::default()).await.unwrap();
        assert_eq!(
            (reply.text.as_str(), reply.fallback.as_deref(), reply.answered),
            ("last", Some("told"), None)
        );
        assert_eq!((dead.tries(), large.tries(), last.tries()), (3, 1, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn an_endpoint_that_is_gone_costs_a_few_calls_some_time_and_the_rest_none() {
        let dead = Told::by("dead", |_| Next::err(0, error(Class::Unreachable)));
        let last = Told::by("last", |_| Next::ok(100));
        let endpoint = |told: &Arc<Told>| Endpoint {
            name: "e".to_owned(),
            model: told.clone(),
            caps: Caps { outstanding: 8, requests_per_minute: None, tokens_per_minute: None },
            origin: String::new(),
            watch: None,

            starts_cold: false,
            shared: None,
        };
        let pool = Pool::new("m", vec![endpoint(&dead)], Arc::new(|| 0.5));
        let model = client(Parts {
            pool: Arc::new(pool),
            hedging: Hedging::Usual,
            fallbacks: vec![last.clone()],
            allowances: None,
            jitter: Arc::new(|| 1.0),
        });
        let waited = |wait, ms| Happening::Waited(wait, Duration::from_millis(ms));
        let (room, retry) = (|| waited(Wait::Room, 0), |ms| [waited(Wait::Retry, ms), Happening::Retried]);
        let tried = [vec![room()], retry(250).into(), vec![room()], retry(500).into(), vec![room()]].concat();
        for (expected_ms, tries) in [(850, &tried[..]), (850, &tried), (100, &tried[..1]), (100, &tried[..1])]
        {
            let (heard, start) = (Heard::default(), Instant::now());
            let reply = model.complete(&call("why"), &heard).await.unwrap();
            assert_eq!(reply.fallback.as_deref(), Some("told"));
            let happened = [tries, &[Happening::FellBack]].concat();
            assert_eq!(heard.take_happenings(), happened, "{expected_ms}");
            assert_eq!(start.elapsed(), Duration::from_millis(expected_ms), "{}", heard.take());
        }
        assert_eq!(dead.tries(), 5, "then its breaker is open, and the fallback is asked at once");
        assert_eq!(last.tries(), 4);
    }
}
