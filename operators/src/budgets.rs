//! What tenants may spend, in money and in tokens, by the minute, the day and the month.
//!
//! Before a call the most that it may take is held: its prompt, and as many tokens as its answer may have, at the model's
//! price. After it, what it took is counted instead. Periods are those of the calendar, in UTC.
//!
//! Invariant: what calls under way and calls that are over take stays within each budget, but for what one answer takes beyond
//! its estimate. A call without an answer counts as nothing.

use forebay_calls::{
    Call, CallError, Class, Prices, Reply,
    allowance::{Allowances, Reservation},
    prices::Tariff,
};
use forebay_operator::Clock;
use forebay_schemas::Usage;
use forebay_stores::{
    Counters,
    counters::{AMOUNT_MAX, Hold, Line},
};
use futures::future::BoxFuture;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// Until what was held for a call is free again whose process died: longer than a call with all its tries takes.
const HOLD: Duration = Duration::from_secs(20 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Nano-dollars.
    Money,
    /// Tokens, of prompts and answers.
    Tokens,
}

/// Over which time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Period {
    /// A minute of the clock.
    Minute,
    /// A day from midnight, UTC.
    Day,
    /// A month of the calendar, UTC.
    Month,
}

/// The most that a tenant may spend in a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Whose it is; none for each tenant that has no such budget of its own.
    pub tenant: Option<String>,
    /// What is counted.
    pub unit: Unit,
    /// Over which time.
    pub period: Period,
    /// The most.
    pub limit: u64,
}

/// See the module.
pub struct Budgets {
    budgets: Vec<Budget>,
    prices: Option<Arc<Prices>>,
    counters: Arc<dyn Counters>,
    clock: Clock,
    /// Tells the holds of this process from those of others.
    owner: String,
    held: AtomicU64,
}

impl Budget {
    /// What the word for it is, in errors and in names of counters.
    fn word(&self) -> &'static str {
        match (self.unit, self.period) {
            (Unit::Money, Period::Minute) => "money/minute",
            (Unit::Money, Period::Day) => "money/day",
            (Unit::Money, Period::Month) => "money/month",
            (Unit::Tokens, Period::Minute) => "tokens/minute",
            (Unit::Tokens, Period::Day) => "tokens/day",
            (Unit::Tokens, Period::Month) => "tokens/month",
        }
    }
}

impl Period {
    /// The number of the period that a moment lies in.
    fn at(self, now_ms: i64) -> i64 {
        match self {
            Self::Minute => now_ms.div_euclid(60_000),
            Self::Day => now_ms.div_euclid(86_400_000),
            Self::Month => month(now_ms.div_euclid(86_400_000)),
        }
    }

    fn length(self) -> Duration {
        match self {
            Self::Minute => Duration::from_secs(60),
            Self::Day => DAY,
            Self::Month => DAY * 31,
        }
    }
}

/// The month of a day, counted from March of the year 0 (Howard Hinnant, "civil_from_days").
fn month(days_since_1970: i64) -> i64 {
    let days = days_since_1970 + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let of_400 = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * of_400 + of_400 / 4 - of_400 / 100);
    (era * 400 + of_400) * 12 + (5 * of_year + 2) / 153
}

impl Budgets {
    /// These, kept in these counters. `owner` is no other process's.
    pub fn new(
        budgets: Vec<Budget>,
        prices: Option<Arc<Prices>>,
        counters: Arc<dyn Counters>,
        clock: Clock,
        owner: String,
    ) -> Self {
        Self { budgets, prices, counters, clock, owner, held: AtomicU64::new(0) }
    }

    /// Those of a tenant.
    fn of(&self, tenant: &str) -> impl Iterator<Item = &Budget> {
        self.budgets.iter().filter(move |budget| match &budget.tenant {
            Some(of) => of == tenant,
            None => !self.budgets.iter().any(|own| {
                own.tenant.as_deref() == Some(tenant)
                    && (own.unit, own.period) == (budget.unit, budget.period)
            }),
        })
    }

    /// The most that a call may take.
    fn amount(&self, unit: Unit, call: &Call<'_>, model: &str) -> Result<u64, CallError> {
        let (prompt, all) = (call.prompt_tokens_estimated(), call.tokens_estimated());
        if unit == Unit::Tokens {
            return Ok(all);
        }
        let model = call.model.as_deref().unwrap_or(model);
        let usage = Usage::of(prompt, all.saturating_sub(prompt));
        let cost = self.prices.as_ref().and_then(|prices| prices.of(&[model], usage, Tariff::Live));
        let unpriced = || {
            let message = format!("model {model:?} has no price, and the tenant has a budget of money");
            CallError::new(Class::Rejected, "model_unpriced", message)
        };
        // A client that names another model must not get around its budget.
        cost.and_then(|cost| u64::try_from(cost.0).ok()).ok_or_else(unpriced)
    }

    async fn hold(&self, call: &Call<'_>, model: &str) -> Result<Box<dyn Reservation>, CallError> {
        let (tenant, now_ms) = (call.tenant.as_str(), self.clock.now_ms());
        let (mut lines, mut units) = (Vec::new(), Vec::new());
        for budget in self.of(tenant) {
            let name = format!("{}/{}/{tenant}", budget.word(), budget.period.at(now_ms));
            let amount = self.amount(budget.unit, call, model)?;
            let keep = budget.period.length() + HOLD;
            lines.push(Line { name, amount, limit: budget.limit.min(AMOUNT_MAX), keep });
            units.push(budget.unit);
        }
        let id = format!("{}-{}", self.owner, self.held.fetch_add(1, Ordering::Relaxed));
        if !lines.is_empty() {
            let taken = self.counters.hold(&id, &lines, HOLD).await.map_err(unavailable)?;
            if let Hold::Over { line, .. } = taken {
                let budget = self.of(tenant).nth(line).map(Budget::word).unwrap_or_default();
                let message = format!("the tenant's budget of {budget} has no room for this call");
                return Err(CallError::new(Class::Rejected, "budget_exceeded", message));
            }
        }
        Ok(Box::new(Held { counters: Arc::clone(&self.counters), hold: Some((id, lines)), units }))
    }
}

/// Nothing was sent: the host waits until the counters can be read.
fn unavailable(error: forebay_stores::Error) -> CallError {
    CallError::new(Class::Closed, "store_unavailable", "could not count what the tenant spends")
        .because(error)
}

impl Allowances for Budgets {
    fn reserve<'a>(
        &'a self,
        call: &'a Call<'_>,
        model: &'a str,
    ) -> BoxFuture<'a, Result<Box<dyn Reservation>, CallError>> {
        Box::pin(self.hold(call, model))
    }
}

/// What is held for a call, and given back when it is dropped.
struct Held {
    counters: Arc<dyn Counters>,
    hold: Option<(String, Vec<Line>)>,
    units: Vec<Unit>,
}

impl Reservation for Held {
    fn settle<'a>(mut self: Box<Self>, reply: &'a Reply) -> BoxFuture<'a, ()> {
        let (hold, units) = (self.hold.take(), std::mem::take(&mut self.units));
        let counters = Arc::clone(&self.counters);
        Box::pin(async move {
            let Some((id, lines)) = hold else { return };
            let used = lines.iter().zip(units).map(|(line, unit)| match unit {
                Unit::Tokens => reply.usage.map_or(line.amount, |usage| usage.total_tokens),
                // Where nobody says what it took, it took what it might.
                Unit::Money => {
                    reply.cost_nano_usd.map_or(line.amount, |cost| u64::try_from(cost.0).unwrap_or(0))
                }
            });
            settle(&*counters, &id, &lines, &used.map(|used| used.min(AMOUNT_MAX)).collect::<Vec<_>>()).await;
        })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some((id, lines)) = self.hold.take().filter(|(_, lines)| !lines.is_empty()) else { return };
        let counters = Arc::clone(&self.counters);
        // Without a runtime the process ends, and the hold runs out by itself.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { settle(&*counters, &id, &lines, &vec![0; lines.len()]).await });
        }
    }
}

/// An answer is not withheld because it could not be counted; what was held for it stays held for a while.
async fn settle(counters: &dyn Counters, id: &str, lines: &[Line], used: &[u64]) {
    if lines.is_empty() {
        return;
    }
    if let Err(error) = counters.settle(id, lines, used).await {
        tracing::warn!(error = %error, "could not count what a call took; what was held for it counts until it runs out");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_calls::{Allowed, Listener, Model, Tried, Upstream};
    use forebay_schemas::{NanoUsd, Sampling, Tenant};
    use forebay_stores::counters::Local;
    use futures::future::join_all;
    use std::time::UNIX_EPOCH;
    use tokio::time::Instant;

    /// Takes so many tokens, of which each costs a nano-dollar; none is an error.
    struct Taking(Box<dyn Fn(u64) -> Option<u64> + Send + Sync>, AtomicU64, AtomicU64);

    impl Model for Taking {
        fn provider(&self) -> &'static str {
            "taking"
        }
        fn name(&self) -> &str {
            "m"
        }
        fn complete<'a>(
            &'a self,
            _: &'a Call<'_>,
            _: &'a dyn Listener,
        ) -> BoxFuture<'a, Result<Reply, CallError>> {
            Box::pin(async {
                let nth = self.1.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(100 + nth * 37 % 1_000)).await;
                let tokens = (self.0)(nth)
                    .ok_or_else(|| CallError::new(Class::Outage, "model_unavailable", "gone"))?;
                self.2.fetch_add(tokens, Ordering::Relaxed);
                Ok(Reply {
                    text: "yes".to_owned(),
                    vectors: Vec::new(),
                    citations: None,
                    model: "m".to_owned(),
                    usage: Some(Usage::of(0, tokens)),
                    cost_nano_usd: i64::try_from(tokens).ok().map(NanoUsd),
                    finish_reason: None,
                    ttft: None,
                    fallback: None,
                    ..Reply::default()
                })
            })
        }
    }

    struct Deaf;
    impl Listener for Deaf {
        fn started(&self, _: Upstream<'_>) {}
        fn token(&self, _: &str) {}
        fn ended(&self, _: &Tried<'_>) {}
    }

    fn budget(tenant: Option<&str>, unit: Unit, period: Period, limit: u64) -> Budget {
        Budget { tenant: tenant.map(str::to_owned), unit, period, limit }
    }

    fn call(tenant: &str, model: &str) -> Call<'static> {
        let sampling = Sampling { max_tokens: Some(100), ..Sampling::default() };
        let tenant = Tenant::try_from(tenant.to_owned()).unwrap();
        Call { sampling, tenant, model: Some(model.to_owned()), ..Call::default() }
    }

    fn allowed(
        budgets: Vec<Budget>,
        takes: impl Fn(u64) -> Option<u64> + Send + Sync + 'static,
    ) -> (Arc<Taking>, Allowed) {
        // 2026-11-30, 23:59 UTC.
        let (clock, began) = (Clock::starting_at(1_796_083_140_000), Instant::now());
        let counters = Local::new(Arc::new(move || UNIX_EPOCH + began.elapsed()));
        let prices = Prices::new(clock)
            .with_table("t.json", r#"{"m": {"output_cost_per_token": 1e-9}}"#, None)
            .unwrap();
        let taking = Arc::new(Taking(Box::new(takes), AtomicU64::new(0), AtomicU64::new(0)));
        let budgets =
            Budgets::new(budgets, Some(Arc::new(prices)), Arc::new(counters), clock, "test".to_owned());
        (taking.clone(), Allowed::new(taking, Arc::new(budgets)))
    }

    async fn code(allowed: &Allowed, tenant: &str, model: &str) -> &'static str {
        allowed.complete(&call(tenant, model), &Deaf).await.map_or_else(|error| error.code, |_| "ok")
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_of_200_calls_stays_within_its_budget() {
        for unit in [Unit::Money, Unit::Tokens] {
            let (taking, allowed) =
                allowed(vec![budget(None, unit, Period::Day, 5_050)], |nth| Some(20 + nth % 80));
            let codes = join_all((0..200).map(|_| code(&allowed, "a", "m"))).await;
            let answered = codes.iter().filter(|code| **code == "ok").count();
            assert_eq!(answered, 50, "as many as there is room for");
            assert!(codes.iter().all(|code| matches!(*code, "ok" | "budget_exceeded")));
            // What they left of their estimates is there for others, one after the other.
            while code(&allowed, "a", "m").await == "ok" {}
            let taken = taking.2.load(Ordering::Relaxed);
            assert!((4_950..=5_050).contains(&taken), "{taken} of {unit:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_takes_more_than_it_might_is_the_only_one_over() {
        let (taking, allowed) = allowed(vec![budget(None, Unit::Tokens, Period::Day, 1_000)], |_| Some(300));
        for _ in 0..200 {
            code(&allowed, "a", "m").await;
        }
        assert_eq!(taking.2.load(Ordering::Relaxed), 1_200);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_without_an_answer_counts_as_nothing() {
        let (_, allowed) =
            allowed(vec![budget(None, Unit::Tokens, Period::Day, 100)], |nth| (nth > 1).then_some(100));
        assert_eq!(code(&allowed, "a", "m").await, "model_unavailable");
        tokio::task::yield_now().await;
        let (asked, short) = (call("a", "m"), Duration::from_millis(5));
        assert!(tokio::time::timeout(short, allowed.complete(&asked, &Deaf)).await.is_err(), "given up");
        tokio::task::yield_now().await;
        assert_eq!(code(&allowed, "a", "m").await, "ok");
        assert_eq!(code(&allowed, "a", "m").await, "budget_exceeded");
    }

    #[tokio::test(start_paused = true)]
    async fn tenants_have_budgets_of_their_own_and_a_new_period_a_new_one() {
        for period in [Period::Minute, Period::Day, Period::Month] {
            let budgets =
                vec![budget(None, Unit::Money, period, 100), budget(Some("rich"), Unit::Money, period, 200)];
            let (_, allowed) = allowed(budgets, |_| Some(100));
            for (tenant, expected) in [
                ("a", "ok"),
                ("a", "budget_exceeded"),
                ("b", "ok"),
                ("rich", "ok"),
                ("rich", "ok"),
                ("rich", "budget_exceeded"),
            ] {
                assert_eq!(code(&allowed, tenant, "m").await, expected, "{tenant}");
            }
            assert_eq!(code(&allowed, "c", "free").await, "model_unpriced");
            tokio::time::advance(Duration::from_secs(60)).await;
            assert_eq!(code(&allowed, "a", "m").await, "ok", "December has begun");
        }
    }

    #[test]
    fn months_are_those_of_the_calendar() {
        // 2024-02-29, 2024-03-01, 2024-12-31, 2025-01-01.
        let months = [19_782, 19_783, 20_088, 20_089].map(|day| month(day) - month(19_782));
        assert_eq!(months, [0, 1, 10, 11]);
    }
}
