//! All layers of a pool's client, in their order.

use crate::{Allowed, Budget, Fallback, Hedge, Model, Pool, Retry, allowance::Allowances, retry::Jitter};
use std::{sync::Arc, time::Duration};

/// When a call is asked a second time elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hedging {
    /// Never.
    #[default]
    Off,
    /// After what 95 in 100 calls of its kind took.
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
pub fn client(Parts { pool, hedging, fallbacks, allowances, jitter }: Parts) -> Arc<dyn Model> {
    // One for all that is made beyond the first try of a call, or three layers would each add their fifth.
    let budget = Arc::new(Budget::default());
    // One try, at the best endpoint that its breaker and throttle let it go to.
    let model: Arc<dyn Model> = pool.clone();
    // Around one try: a hedge is the other half of it. It knows the pool, as it must not fire when that is full.
    let model: Arc<dyn Model> = match hedging {
        Hedging::Off => model,
        Hedging::Usual => Arc::new(Hedge::new(pool, budget.clone(), None)),
        Hedging::After(after) => Arc::new(Hedge::new(pool, budget.clone(), Some(after))),
    };
    // Around both halves: what neither could, a later try may.
    let model: Arc<dyn Model> = Arc::new(Retry::new(model, budget.clone()).with_jitter(jitter));
    // Around all tries: another model is asked only when this one is given up.
    let model: Arc<dyn Model> = match fallbacks.is_empty() {
        true => model,
        false => Arc::new(Fallback::new(model, fallbacks, budget)),
    };
    // Outermost: who may not spend makes no call at all, and pays once whatever it took.
    match allowances {
        Some(allowances) => Arc::new(Allowed::new(model, allowances)),
        None => model,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Class,
        pool::Endpoint,
        testing::{Heard, Next, Told, call, error},
        throttle::Caps,
    };
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn an_endpoint_that_is_gone_costs_a_few_calls_some_time_and_the_rest_none() {
        let dead = Told::by("dead", |_| Next::err(0, error(Class::Unreachable)));
        let last = Told::by("last", |_| Next::ok(100));
        let endpoint = |told: &Arc<Told>| Endpoint {
            name: "e".to_owned(),
            model: told.clone(),
            caps: Caps { outstanding: 8, requests_per_minute: None, tokens_per_minute: None },
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
        for expected_ms in [250 + 500 + 100, 250 + 500 + 100, 100, 100] {
            let (heard, start) = (Heard::default(), Instant::now());
            let reply = model.complete(&call("why"), &heard).await.unwrap();
            assert_eq!(reply.fallback.as_deref(), Some("told"));
            assert_eq!(start.elapsed(), Duration::from_millis(expected_ms), "{}", heard.take());
        }
        assert_eq!(dead.tries(), 5, "then its breaker is open, and the fallback is asked at once");
        assert_eq!(last.tries(), 4);
    }
}
