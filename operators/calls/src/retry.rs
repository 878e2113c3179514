//! Tries a call again when the world failed: a few times, shortly, and never past the deadline.
//!
//! The delays are those of "full jitter" (a random part of a doubling bound; Brooker, "Exponential Backoff And Jitter",
//! AWS 2015), so that callers which failed together do not come back together. A provider that says how long to wait
//! is obeyed instead. Where the next try goes elsewhere, it need not wait for what failed here.
//!
//! Invariant: what is returned is the last error itself, so that the caller knows why; no wait outlives the deadline, as
//! an error now is worth more than an answer that nobody waits for; and no try is made that the budget does not have.

use crate::{
    Budget, Call, CallError, Class, Happening, Listener, Model, Reply, Wait,
    model::says_what_it_stands_around,
};
use futures::future::BoxFuture;
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

/// Tries after the first.
pub const RETRIES_MAX: u32 = 2;
/// The bound of the first delay; it doubles with each try.
const DELAY_MIN: Duration = Duration::from_millis(250);
/// The same after a timeout: most of the wait lies behind.
const DELAY_MIN_TIMEOUT: Duration = Duration::from_millis(100);
/// The same after a rate limit that names no wait; this one is quadrupled, and no delay is below `DELAY_MIN`.
const DELAY_MIN_LIMITED: Duration = Duration::from_secs(2);
/// The bound of every delay that we choose.
const DELAY_MAX: Duration = Duration::from_secs(8);
/// The longest wait that is spent here. Whoever asks for more fails the try, and the host says when the next one comes.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// Gives numbers from 0 to 1; passed in, so that a test can choose them.
pub type Jitter = Arc<dyn Fn() -> f64 + Send + Sync>;

/// A model that is tried again.
pub struct Retry {
    inner: Arc<dyn Model>,
    budget: Arc<Budget>,
    jitter: Jitter,
}

impl Retry {
    /// Tries `inner` again, after random delays and as often as the budget has it.
    pub fn new(inner: Arc<dyn Model>, budget: Arc<Budget>) -> Self {
        Self { inner, budget, jitter: Arc::new(rand::random::<f64>) }
    }

    /// The same with chosen randomness.
    pub fn with_jitter(self, jitter: Jitter) -> Self {
        Self { jitter, ..self }
    }

    /// How long to wait after try `number` (from 0) ended in `error`; `None` where it was the last.
    fn delay(&self, number: u32, error: &CallError, elsewhere: bool) -> Option<Duration> {
        if number >= RETRIES_MAX || !error.is_retryable(elsewhere) {
            return None;
        }
        let part = (self.jitter)().clamp(0.0, 1.0);
        let doubled = |first: Duration| first.saturating_mul(2u32.saturating_pow(number)).min(DELAY_MAX);
        match error.retry_after {
            _ if elsewhere => Some(Duration::ZERO),
            Some(asked) if asked > RETRY_AFTER_MAX => None,
            Some(asked) => Some(asked),
            None if error.class == Class::Limited => {
                let bound = DELAY_MIN_LIMITED.saturating_mul(4u32.saturating_pow(number)).min(DELAY_MAX);
                Some(DELAY_MIN + (bound - DELAY_MIN).mul_f64(part))
            }
            None if error.code == "model_timeout" => Some(doubled(DELAY_MIN_TIMEOUT).mul_f64(part)),
            None => Some(doubled(DELAY_MIN).mul_f64(part)),
        }
    }
}

impl Model for Retry {
    says_what_it_stands_around!(inner);

    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(async move {
            self.budget.asked();
            let mut number = 0;
            loop {
                let error = match self.inner.complete(call, listener).await {
                    Ok(reply) => return Ok(reply),
                    Err(error) => error,
                };
                let elsewhere = self.inner.has_another_way(call);
                let Some(delay) = self.delay(number, &error, elsewhere) else { return Err(error) };
                let wake = Instant::now() + delay;
                if call.deadline.is_some_and(|deadline| wake >= deadline) || !self.budget.draw() {
                    return Err(error);
                }
                tokio::time::sleep_until(wake).await;
                listener.happened(Happening::Waited(Wait::Retry, delay));
                listener.happened(Happening::Retried);
                number += 1;
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::VecDeque, sync::Mutex};

    struct Deaf;
    impl Listener for Deaf {
        fn started(&self, _: crate::Upstream<'_>) {}
        fn token(&self, _: &str) {}
        fn ended(&self, _: &crate::Tried<'_>) {}
    }

    /// Fails as it was told and then answers.
    struct Scripted {
        errors: Mutex<VecDeque<CallError>>,
        elsewhere: bool,
    }
    impl Model for Scripted {
        fn provider(&self) -> &'static str {
            "scripted"
        }
        fn name(&self) -> &str {
            "scripted"
        }
        fn has_another_way(&self, _: &Call<'_>) -> bool {
            self.elsewhere
        }
        fn complete<'a>(
            &'a self,
            _: &'a Call<'_>,
            _: &'a dyn Listener,
        ) -> BoxFuture<'a, Result<Reply, CallError>> {
            Box::pin(async {
                let next = self.errors.lock().unwrap().pop_front();
                next.map_or_else(|| Ok(reply()), Err)
            })
        }
    }

    fn reply() -> Reply {
        Reply {
            text: "yes".to_owned(),
            vectors: Vec::new(),
            citations: None,
            model: "scripted".to_owned(),
            usage: None,
            cost_nano_usd: None,
            finish_reason: None,
            ttft: None,
            fallback: None,
            ..Reply::default()
        }
    }

    fn error(class: Class, retry_after_s: Option<u64>) -> CallError {
        let retry_after = retry_after_s.map(Duration::from_secs);
        CallError { retry_after, ..CallError::new(class, "model_unavailable", "it failed") }
    }

    /// Runs the script with the largest jitter and says how it went and after how many milliseconds.
    async fn check(script: Vec<CallError>, deadline_ms: Option<u64>, expected: &str) {
        run(script, deadline_ms, false, &Arc::default(), expected).await;
    }

    async fn run(
        script: Vec<CallError>,
        deadline_ms: Option<u64>,
        elsewhere: bool,
        budget: &Arc<Budget>,
        expected: &str,
    ) {
        let deadline = deadline_ms.map(|ms| Instant::now() + Duration::from_millis(ms));
        let call = Call { deadline, ..Call::default() };
        let script: VecDeque<_> = script.into();
        let tries = script.len();
        let scripted = Arc::new(Scripted { errors: Mutex::new(script), elsewhere });
        let started = Instant::now();
        let retry = Retry::new(scripted.clone(), budget.clone()).with_jitter(Arc::new(|| 1.0));
        let result = retry.complete(&call, &Deaf).await;
        let unused = scripted.errors.lock().unwrap().len();
        let seen = format!(
            "{} after {} failures and {} ms",
            if result.is_ok() { "answered" } else { "failed" },
            tries - unused,
            started.elapsed().as_millis()
        );
        assert_eq!(seen, expected);
    }

    #[tokio::test(start_paused = true)]
    async fn the_world_gets_two_more_chances_at_doubling_delays() {
        use Class::{Outage, Transient};
        check(vec![], None, "answered after 0 failures and 0 ms").await;
        check(vec![error(Transient, None)], None, "answered after 1 failures and 250 ms").await;
        let twice = vec![error(Outage, None), error(Transient, None)];
        check(twice, None, "answered after 2 failures and 750 ms").await;
        let thrice = (0..3).map(|_| error(Transient, None)).collect();
        check(thrice, None, "failed after 3 failures and 750 ms").await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_no_try_can_help_is_not_tried_again() {
        for class in [Class::Rejected, Class::Account, Class::Cut] {
            check(vec![error(class, None)], None, "failed after 1 failures and 0 ms").await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_limit_is_given_more_time_and_a_timeout_less() {
        let limited = || error(Class::Limited, None);
        check(vec![limited(), limited()], None, "answered after 2 failures and 10000 ms").await;
        let late = || CallError::new(Class::Transient, "model_timeout", "too late");
        check(vec![late(), late()], None, "answered after 2 failures and 300 ms").await;
    }

    #[tokio::test(start_paused = true)]
    async fn another_way_is_taken_at_once_also_past_a_dead_key() {
        for class in [Class::Limited, Class::Account, Class::Unreachable] {
            let script = vec![error(class, Some(3)), error(class, Some(90))];
            run(script, Some(1), true, &Arc::default(), "answered after 2 failures and 0 ms").await;
        }
        let rejected = vec![error(Class::Rejected, None)];
        run(rejected, None, true, &Arc::default(), "failed after 1 failures and 0 ms").await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_budget_does_not_have_is_not_made() {
        let budget = Arc::new(Budget::default());
        while budget.draw() {}
        let script = vec![error(Class::Transient, None)];
        run(script, None, false, &budget, "failed after 1 failures and 0 ms").await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_provider_that_says_how_long_to_wait_is_obeyed() {
        check(vec![error(Class::Outage, Some(3))], None, "answered after 1 failures and 3000 ms").await;
        check(vec![error(Class::Outage, Some(61))], None, "failed after 1 failures and 0 ms").await;
    }

    #[tokio::test(start_paused = true)]
    async fn no_wait_outlives_the_deadline() {
        check(vec![error(Class::Outage, Some(3))], Some(3000), "failed after 1 failures and 0 ms").await;
        check(vec![error(Class::Outage, Some(3))], Some(3001), "answered after 1 failures and 3000 ms").await;
    }
}
