//! What tenants, their keys and their jobs may spend, in money and in tokens, by the minute, the day and the month.
//!
//! Before a call the most that it may take is held: its prompt, and as many tokens as its answer may have, at the model's
//! price; of each budget that it falls under, or of none. After it, what it took is counted instead. Periods are those of the
//! calendar, in UTC.
//!
//! Tenants are admitted by whoever runs Forebay; keys and jobs are a client's own word. So a tenant may have only so many of them
//! counted at a time, and one that makes them up is refused more and takes nothing from others.
//!
//! Invariant: what calls under way and calls that are over take stays within each budget, but for what one answer takes beyond
//! its estimate. A call without an answer that anybody read counts as nothing, and so does an answer that had been paid for before.

pub mod watch;

use forebay_calls::{
    Call, CallError, Class, Prices, Reply,
    allowance::{Allowances, Reservation},
    prices::Tariff,
};
use forebay_operator::{BoxError, Clock};
use forebay_schemas::{JobId, KeyId, Usage};
use forebay_stores::{
    Counters, Error,
    counters::{AMOUNT_MAX, Counted, GROUP_MAX, Hold, Line},
};
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{runtime::Handle, task::JoinHandle};

/// Until what was held for a call is free again whose process died: longer than a call with all its tries takes.
const HOLD: Duration = Duration::from_secs(20 * 60);
/// How long whoever counts is waited for.
const SETTLE_MAX: Duration = Duration::from_secs(10);
/// Nano-dollars in a dollar.
const NANOS: u64 = 1_000_000_000;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// How long the counters of a tenant's day or month stay there to be compared with the log: over the next night.
const COMPARED: Duration = Duration::from_secs(36 * 60 * 60);
/// The most that is read of how budgets stand.
pub const STANDINGS_MAX: usize = 100_000;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Nano-dollars.
    Money,
    /// Tokens, of prompts and answers.
    Tokens,
}

/// Over which time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Period {
    /// A minute of the clock.
    Minute,
    /// A day from midnight, UTC.
    Day,
    /// A month of the calendar, UTC.
    Month,
}

/// Who has a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Holder {
    /// All tenants together.
    All,
    /// A tenant.
    Tenant,
    /// An API key, of each tenant that has one of this id.
    Key,
    /// A job, of each tenant that has one of this id.
    Job,
}

/// The most that somebody may spend in a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Who has it.
    pub holder: Holder,
    /// Whose it is; none for each of them that has no such budget of its own, and for all.
    pub of: Option<String>,
    /// What is counted.
    pub unit: Unit,
    /// Over which time.
    pub period: Period,
    /// The most.
    pub limit: u64,
}

/// Whose spending it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
pub struct Subject {
    /// Of which kind.
    pub holder: Holder,
    /// The tenant; none for all of them.
    pub tenant: Option<String>,
    /// The key or the job; none for a tenant and for all.
    pub name: Option<String>,
}

/// How somebody's budget stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Whose it is.
    pub subject: Subject,
    /// Which of [`Budgets::all`].
    pub budget: usize,
    /// The number of its minute, day or month, see [`Period::span`].
    pub period: i64,
    /// What is used.
    pub used: u64,
    /// What is held.
    pub held: u64,
    /// How many calls there was no room for.
    pub refused: u64,
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
    /// What stands in the names of its counters.
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

    /// Whether both count the same of the same kind of holder.
    pub fn is_like(&self, other: &Self) -> bool {
        (self.holder, self.unit, self.period) == (other.holder, other.unit, other.period)
    }

    /// Whose it is of those that the call has; none where it has no such holder.
    fn holder<'c>(&self, call: &'c Call<'_>) -> Option<&'c str> {
        match self.holder {
            Holder::All => Some(""),
            Holder::Tenant => Some(call.tenant.as_str()),
            Holder::Key => call.key_id.as_ref().map(KeyId::as_str),
            Holder::Job => call.job.as_ref().map(JobId::as_str),
        }
    }

    /// The counter of a holder. Keys and jobs are a tenant's own, whose length stands before it, so that no two read the same.
    fn counter(&self, tenant: &str, holder: &str, period: i64) -> String {
        let begin = self.begin(period);
        match self.holder {
            Holder::All => begin,
            Holder::Tenant => format!("{begin}/{tenant}"),
            Holder::Key | Holder::Job => format!("{begin}/{}:{tenant}/{holder}", tenant.len()),
        }
    }

    /// How the names of its counters of a period begin.
    fn begin(&self, period: i64) -> String {
        match self.holder {
            Holder::Tenant => format!("{}/{period}", self.word()),
            holder => format!("{holder}/{}/{period}", self.word()),
        }
    }

    /// Whose a counter is, by its name.
    fn subject(&self, counter: &str, period: i64) -> Option<Subject> {
        let rest = counter.strip_prefix(&self.begin(period))?;
        let (tenant, name) = match self.holder {
            Holder::All => {
                return rest.is_empty().then_some(Subject { holder: Holder::All, tenant: None, name: None });
            }
            Holder::Tenant => (rest.strip_prefix('/')?, None),
            Holder::Key | Holder::Job => {
                let (length, rest) = rest.strip_prefix('/')?.split_once(':')?;
                let (tenant, name) = rest.split_at_checked(length.parse().ok()?)?;
                (tenant, Some(name.strip_prefix('/')?.to_owned()))
            }
        };
        Some(Subject { holder: self.holder, tenant: Some(tenant.to_owned()), name })
    }

    /// The list of its counters of a period, and of those that are like it.
    fn list(&self, period: i64) -> String {
        format!("{}/{}/{period}", self.holder, self.word())
    }

    /// Whose counters are limited together: those of a tenant's keys or jobs, over all periods that are still kept.
    fn group(&self, tenant: &str) -> Option<String> {
        matches!(self.holder, Holder::Key | Holder::Job)
            .then(|| format!("{}/{}/{tenant}", self.holder, self.word()))
    }

    /// How long a counter is kept after its last change. Those of keys and jobs go sooner, as only so many may be there.
    fn keep(&self) -> Duration {
        match (self.holder, self.period) {
            (Holder::Key | Holder::Job, _) | (_, Period::Minute) => self.period.length() + HOLD,
            _ => self.period.length() + COMPARED,
        }
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Money => "nano-USD",
            Self::Tokens => "tokens",
        })
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::All => "all",
            Self::Tenant => "tenant",
            Self::Key => "key",
            Self::Job => "job",
        })
    }
}

/// As it is said: `tenant "acme"`, `job "nightly" of tenant "acme"`, `all tenants`.
impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.name, &self.tenant) {
            (Some(name), Some(tenant)) => write!(f, "{} {name:?} of tenant {tenant:?}", self.holder),
            (None, Some(tenant)) => write!(f, "tenant {tenant:?}"),
            _ => f.write_str("all tenants"),
        }
    }
}

/// As it is written in the settings: `20 USD/day`, `0.5 USD/minute`, `1000 tokens/month`.
impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.unit {
            Unit::Tokens => write!(f, "{} tokens", self.limit)?,
            Unit::Money => {
                let (whole, nanos) = (self.limit / NANOS, self.limit % NANOS);
                let decimal = format!("{whole}.{nanos:09}");
                write!(f, "{} USD", decimal.trim_end_matches('0').trim_end_matches('.'))?;
            }
        }
        f.write_str(match self.period {
            Period::Minute => "/minute",
            Period::Day => "/day",
            Period::Month => "/month",
        })
    }
}

impl Period {
    /// The number of the period that a moment lies in.
    pub fn at(self, now_ms: i64) -> i64 {
        match self {
            Self::Minute => now_ms.div_euclid(60_000),
            Self::Day => now_ms.div_euclid(86_400_000),
            Self::Month => month(now_ms.div_euclid(86_400_000)),
        }
    }

    /// When the period of this number begins and when the next one does, in milliseconds since 1970.
    pub fn span(self, number: i64) -> (i64, i64) {
        let begins = |number: i64| match self {
            Self::Minute => number.saturating_mul(60_000),
            Self::Day => number.saturating_mul(86_400_000),
            Self::Month => first_day(number).saturating_mul(86_400_000),
        };
        (begins(number), begins(number.saturating_add(1)))
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

/// The first day of a month by that number, since 1970 ("days_from_civil").
fn first_day(month: i64) -> i64 {
    let (year, of_year) = (month.div_euclid(12), month.rem_euclid(12));
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    year.saturating_mul(365) + leap_days + (153 * of_year + 2) / 5 - 719_468
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

    /// All of them, in the order of the settings.
    pub fn all(&self) -> &[Budget] {
        &self.budgets
    }

    /// Where they are counted.
    pub fn counters(&self) -> &Arc<dyn Counters> {
        &self.counters
    }

    /// How they stand now, and how those stood in the end whose period ended since then: at most [`STANDINGS_MAX`].
    pub async fn standings(&self, since_ms: i64, now_ms: i64) -> Result<Vec<Standing>, Error> {
        let mut standings = Vec::new();
        for (index, budget) in self.budgets.iter().enumerate() {
            // Budgets that are alike stand in one list.
            if self.budgets[..index].iter().any(|other| other.is_like(budget)) {
                continue;
            }
            let (then, now) = (budget.period.at(since_ms), budget.period.at(now_ms));
            for period in [then, now].into_iter().take(if then == now { 1 } else { 2 }) {
                self.standings_of(budget, period, &mut standings).await?;
            }
        }
        Ok(standings)
    }

    async fn standings_of(
        &self,
        budget: &Budget,
        period: i64,
        standings: &mut Vec<Standing>,
    ) -> Result<(), Error> {
        let (list, mut after) = (budget.list(period), String::new());
        while standings.len() < STANDINGS_MAX {
            let page = self.counters.listed(&list, &after).await?;
            let Some(last) = page.last() else { break };
            after.clone_from(&last.name);
            let of = |counted: Counted| {
                let Counted { name, used, held, refused } = counted;
                let subject = budget.subject(&name, period)?;
                let holder = subject.name.as_deref().or(subject.tenant.as_deref()).unwrap_or_default();
                let budget = self
                    .budgets
                    .iter()
                    .position(|one| one.is_like(budget) && self.falls_under(one, holder))?;
                Some(Standing { subject, budget, period, used, held, refused })
            };
            standings.extend(page.into_iter().filter_map(of));
        }
        standings.truncate(STANDINGS_MAX);
        Ok(())
    }

    /// Whether the budget is this holder's: the one with its name, or else the one for each.
    fn falls_under(&self, budget: &Budget, holder: &str) -> bool {
        match &budget.of {
            Some(of) => of == holder,
            None => {
                let is_own = |own: &Budget| own.is_like(budget) && own.of.as_deref() == Some(holder);
                !self.budgets.iter().any(is_own)
            }
        }
    }

    /// Those that a call falls under, with whose each is.
    fn of<'b, 'c>(&'b self, call: &'c Call<'_>) -> Vec<(&'b Budget, &'c str)> {
        let held = |budget: &'b Budget| {
            let holder = budget.holder(call)?;
            self.falls_under(budget, holder).then_some((budget, holder))
        };
        self.budgets.iter().filter_map(held).collect()
    }

    /// The most that a call may take.
    fn amount(&self, unit: Unit, call: &Call<'_>, model: &str) -> Result<u64, CallError> {
        let (prompt, all) = (call.prompt_tokens_estimated(), call.tokens_estimated());
        if unit == Unit::Tokens {
            return Ok(all);
        }
        let model = call.model.as_deref().unwrap_or(model);
        let usage = Usage::of(prompt, all.saturating_sub(prompt));
        // Where writing to the provider's cache is dearer than reading afresh, all of the prompt may be written there.
        let written = Usage { cached_write_tokens: Some(prompt), ..usage };
        let cost = |usage| self.prices.as_ref().and_then(|prices| prices.of(&[model], usage, Tariff::Live));
        let unpriced = || {
            let message =
                format!("model {model:?} has no price, and there is a budget of money for its call");
            CallError::new(Class::Rejected, "model_unpriced", message)
        };
        // A client that names another model must not get around its budget.
        let most = cost(usage).max(cost(written));
        most.and_then(|cost| u64::try_from(cost.0).ok()).ok_or_else(unpriced)
    }

    async fn hold(&self, call: &Call<'_>, model: &str) -> Result<Box<dyn Reservation>, CallError> {
        let (now_ms, budgets) = (self.clock.now_ms(), self.of(call));
        let mut lines = Vec::with_capacity(budgets.len());
        for (budget, holder) in &budgets {
            let (tenant, period) = (call.tenant.as_str(), budget.period.at(now_ms));
            lines.push(Line {
                name: budget.counter(tenant, holder, period),
                amount: self.amount(budget.unit, call, model)?,
                limit: budget.limit.min(AMOUNT_MAX),
                keep: budget.keep(),
                group: budget.group(tenant),
                list: Some(budget.list(period)),
            });
        }
        let id = format!("{}-{}", self.owner, self.held.fetch_add(1, Ordering::Relaxed));
        let units = budgets.iter().map(|(budget, _)| budget.unit).collect();
        // It exists before its answer is there: where nobody waits for that, or it comes too late, it may be held all the same.
        let mut held = Held { counters: Arc::clone(&self.counters), id, lines, units, is_open: true };
        if !held.lines.is_empty() {
            let taken = self.counters.hold(&held.id, &held.lines, HOLD).await.map_err(unavailable)?;
            held.is_open = taken == Hold::Taken;
            let refused = match taken {
                Hold::Taken => None,
                Hold::Over { line, .. } => budgets.get(line).map(|(budget, holder)| match budget.holder {
                    Holder::All => format!("all tenants together have no room for this call in their budget of {budget}"),
                    of => format!("{of} {holder:?} has no room for this call in its budget of {budget}"),
                }),
                Hold::Full { line } => budgets.get(line).map(|(budget, holder)| {
                    format!(
                        "{} {holder:?} is one too many: budgets of {budget} are counted for {GROUP_MAX} of a tenant at a time",
                        budget.holder
                    )
                }),
            };
            if let Some(message) = refused {
                return Err(CallError::new(Class::Rejected, "budget_exceeded", message));
            }
        }
        Ok(Box::new(held))
    }
}

/// Nothing was sent: the host waits until the counters can be read.
fn unavailable(error: Error) -> CallError {
    CallError::new(Class::Closed, "store_unavailable", "could not count what the call may spend")
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

/// What is held for a call, or may be, and given back when it is dropped.
struct Held {
    counters: Arc<dyn Counters>,
    id: String,
    lines: Vec<Line>,
    units: Vec<Unit>,
    /// Whether it may be held and is not settled.
    is_open: bool,
}

impl Held {
    /// Counts what was used, once, beside whoever asks for it.
    fn close(&mut self, used: Vec<u64>) -> Option<JoinHandle<()>> {
        if !std::mem::take(&mut self.is_open) || self.lines.is_empty() {
            return None;
        }
        // Without a runtime the process ends, and the hold runs out by itself.
        let runtime = Handle::try_current().ok()?;
        let (counters, id) = (Arc::clone(&self.counters), std::mem::take(&mut self.id));
        let lines = std::mem::take(&mut self.lines);
        Some(runtime.spawn(async move { settle(&*counters, &id, &lines, &used).await }))
    }
}

impl Reservation for Held {
    fn settle<'a>(mut self: Box<Self>, reply: &'a Reply) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let used = self.lines.iter().zip(&self.units).map(|(line, unit)| match unit {
                Unit::Tokens => reply.usage.map_or(line.amount, |usage| usage.total_tokens),
                // Where nobody says what it took, it took what it might.
                Unit::Money => {
                    reply.cost_nano_usd.map_or(line.amount, |cost| u64::try_from(cost.0).unwrap_or(0))
                }
            });
            let used: Vec<_> = used.map(|used| used.min(AMOUNT_MAX)).collect();
            if let Some(counting) = self.close(used) {
                // Waited for, so that the next call finds it counted; whoever has no time for that leaves it to the task.
                let _ = counting.await;
            }
        })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.close(vec![0; self.lines.len()]);
    }
}

/// An answer is not withheld because it could not be counted; what was held for it stays held for a while.
async fn settle(counters: &dyn Counters, id: &str, lines: &[Line], used: &[u64]) {
    if lines.is_empty() {
        return;
    }
    let settled = tokio::time::timeout(SETTLE_MAX, counters.settle(id, lines, used)).await;
    if let Err(error) = settled.map_err(BoxError::from).and_then(|settled| settled.map_err(BoxError::from)) {
        tracing::warn!(error = %error, "could not count what a call took; what was held for it counts until it runs out");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_calls::{Allowed, Listener, Model, Tried, Upstream};
    use forebay_schemas::{NanoUsd, Sampling, Tenant};
    use forebay_stores::{Answer, counters::Local};
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
            listener: &'a dyn Listener,
        ) -> BoxFuture<'a, Result<Reply, CallError>> {
            let to = Upstream { provider: "taking", endpoint: None, model: "m" };
            let sent = async {
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
            };
            listener.paid(to, Box::pin(sent))
        }
    }

    struct Deaf;
    impl Listener for Deaf {
        fn started(&self, _: Upstream<'_>) {}
        fn token(&self, _: &str) {}
        fn ended(&self, _: &Tried<'_>) {}
    }

    fn budget(tenant: Option<&str>, unit: Unit, period: Period, limit: u64) -> Budget {
        Budget { holder: Holder::Tenant, of: tenant.map(str::to_owned), unit, period, limit }
    }

    fn of(holder: Holder, of: Option<&str>, unit: Unit, limit: u64) -> Budget {
        Budget { holder, of: of.map(str::to_owned), unit, period: Period::Day, limit }
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
        allowed_by(|local| Arc::new(local), budgets, takes)
    }

    fn allowed_by(
        counters: impl FnOnce(Local) -> Arc<dyn Counters>,
        budgets: Vec<Budget>,
        takes: impl Fn(u64) -> Option<u64> + Send + Sync + 'static,
    ) -> (Arc<Taking>, Allowed) {
        let (taking, _, allowed) = parts_by(counters, budgets, takes);
        (taking, allowed)
    }

    fn parts(
        budgets: Vec<Budget>,
        takes: impl Fn(u64) -> Option<u64> + Send + Sync + 'static,
    ) -> (Arc<Taking>, Arc<Budgets>, Allowed) {
        parts_by(|local| Arc::new(local), budgets, takes)
    }

    fn parts_by(
        counters: impl FnOnce(Local) -> Arc<dyn Counters>,
        budgets: Vec<Budget>,
        takes: impl Fn(u64) -> Option<u64> + Send + Sync + 'static,
    ) -> (Arc<Taking>, Arc<Budgets>, Allowed) {
        // 2026-11-30, 23:59 UTC.
        let (clock, began) = (Clock::starting_at(1_796_083_140_000), Instant::now());
        let counters = counters(Local::new(Arc::new(move || UNIX_EPOCH + began.elapsed())));
        let prices = Prices::new(clock)
            .with_table("t.json", r#"{"m": {"output_cost_per_token": 1e-9}}"#, None)
            .unwrap();
        let taking = Arc::new(Taking(Box::new(takes), AtomicU64::new(0), AtomicU64::new(0)));
        let budgets = Budgets::new(budgets, Some(Arc::new(prices)), counters, clock, "test".to_owned());
        let budgets = Arc::new(budgets);
        (taking.clone(), budgets.clone(), Allowed::new(taking, budgets))
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

    /// Counters that do what they are told at once, and say so late.
    struct Late {
        inner: Local,
        hold: Duration,
        settle: Duration,
    }

    impl Counters for Late {
        fn hold<'a>(&'a self, id: &'a str, lines: &'a [Line], time: Duration) -> Answer<'a, Hold> {
            Box::pin(async move {
                let taken = self.inner.hold(id, lines, time).await;
                tokio::time::sleep(self.hold).await;
                taken
            })
        }
        fn settle<'a>(&'a self, id: &'a str, lines: &'a [Line], used: &'a [u64]) -> Answer<'a, ()> {
            Box::pin(async move {
                tokio::time::sleep(self.settle).await;
                self.inner.settle(id, lines, used).await
            })
        }
        fn listed<'a>(&'a self, list: &'a str, after: &'a str) -> Answer<'a, Vec<Counted>> {
            self.inner.listed(list, after)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_held_after_nobody_waits_for_it_is_given_back() {
        let hold = Duration::from_secs(1);
        let late = |inner| Arc::new(Late { inner, hold, settle: Duration::ZERO }) as Arc<dyn Counters>;
        let (taking, allowed) =
            allowed_by(late, vec![budget(None, Unit::Tokens, Period::Day, 100)], |_| Some(100));
        let asked = call("a", "m");
        for _ in 0..3 {
            assert!(tokio::time::timeout(hold / 2, allowed.complete(&asked, &Deaf)).await.is_err());
            tokio::time::sleep(hold).await;
        }
        assert_eq!(taking.1.load(Ordering::Relaxed), 0);
        assert_eq!(code(&allowed, "a", "m").await, "ok");
        assert_eq!(code(&allowed, "a", "m").await, "budget_exceeded");
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_call_took_is_counted_though_nobody_waits_for_that() {
        let settle = Duration::from_secs(1);
        let late = |inner| Arc::new(Late { inner, hold: Duration::ZERO, settle }) as Arc<dyn Counters>;
        let (taking, allowed) =
            allowed_by(late, vec![budget(None, Unit::Tokens, Period::Day, 140)], |_| Some(40));
        let asked = call("a", "m");
        assert!(tokio::time::timeout(settle / 2, allowed.complete(&asked, &Deaf)).await.is_err());
        assert_eq!(taking.2.load(Ordering::Relaxed), 40, "it was answered");
        tokio::time::sleep(settle).await;
        assert_eq!(code(&allowed, "a", "m").await, "ok", "40 are counted and none held");
        assert_eq!(code(&allowed, "a", "m").await, "budget_exceeded", "80 are counted");
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

    #[tokio::test(start_paused = true)]
    async fn all_budgets_that_a_call_falls_under_must_have_room_and_the_one_without_is_named() {
        let budgets = vec![
            budget(None, Unit::Tokens, Period::Day, 500),
            of(Holder::Key, Some("ci"), Unit::Tokens, 300),
            of(Holder::Job, None, Unit::Money, 200),
            of(Holder::Job, Some("small"), Unit::Money, 100),
        ];
        let (_, allowed) = allowed(budgets, |_| Some(100));
        let ask = async |tenant: &str, key: Option<&str>, job: Option<&str>| {
            let key_id = key.map(|key| KeyId::try_from(key.to_owned()).unwrap());
            let job = job.map(|job| JobId::try_from(job.to_owned()).unwrap());
            let call = Call { key_id, job, ..call(tenant, "m") };
            allowed.complete(&call, &Deaf).await.map_or_else(|error| error.to_string(), |_| "ok".to_owned())
        };
        assert_eq!(ask("a", Some("ci"), Some("small")).await, "ok");
        let full = ask("a", Some("ci"), Some("small")).await;
        assert!(
            full.contains(r#"job "small" has no room for this call in its budget of 0.0000001 USD/day"#),
            "{full}"
        );
        // What was refused holds nothing of the others: the key has two calls left, and then the tenant has two.
        assert_eq!(ask("a", Some("ci"), Some("large")).await, "ok");
        assert_eq!(ask("a", Some("ci"), None).await, "ok");
        let full = ask("a", Some("ci"), None).await;
        assert!(
            full.contains(r#"key "ci" has no room for this call in its budget of 300 tokens/day"#),
            "{full}"
        );
        assert_eq!(ask("a", Some("other"), Some("large")).await, "ok");
        let full = ask("a", None, Some("large")).await;
        assert!(full.contains(r#"job "large""#), "{full}");
        assert_eq!(ask("a", None, None).await, "ok");
        let full = ask("a", None, None).await;
        assert!(
            full.contains(r#"tenant "a" has no room for this call in its budget of 500 tokens/day"#),
            "{full}"
        );
        assert_eq!(ask("b", Some("ci"), Some("small")).await, "ok", "keys and jobs are a tenant's own");
    }

    #[tokio::test(start_paused = true)]
    async fn a_tenant_that_makes_up_jobs_is_refused_more_of_them_and_stops_nobody_else() {
        let (_, allowed) = allowed(vec![of(Holder::Job, None, Unit::Tokens, 200)], |_| Some(100));
        let allowed = &allowed;
        let ask = |tenant: &'static str, job: usize| async move {
            let job = Some(JobId::try_from(format!("j{job}")).unwrap());
            let asked = allowed.complete(&Call { job, ..call(tenant, "m") }, &Deaf).await;
            asked.map_or_else(|error| format!("{}: {error}", error.code), |_| "ok".to_owned())
        };
        assert!(join_all((0..GROUP_MAX).map(|job| ask("a", job))).await.iter().all(|asked| asked == "ok"));
        let full = ask("a", GROUP_MAX).await;
        assert_eq!(
            full,
            r#"budget_exceeded: job "j10000" is one too many: budgets of 200 tokens/day are counted for 10000 of a tenant at a time"#
        );
        assert_eq!(ask("a", 7).await, "ok", "whose counter is there");
        assert_eq!(ask("b", 0).await, "ok");
    }

    #[test]
    fn no_two_holders_share_a_counter() {
        let job = of(Holder::Job, None, Unit::Money, 1);
        assert_ne!(job.counter("a", "b/c", 0), job.counter("a/b", "c", 0));
        assert_eq!(job.counter("a", "b", 0), "job/money/day/0/1:a/b");
    }

    #[tokio::test(start_paused = true)]
    async fn how_budgets_stand_is_read_of_all_that_have_been_asked_of() {
        let (money, tokens) = (Unit::Money, Unit::Tokens);
        let budgets = vec![
            budget(Some("rich"), money, Period::Day, 900),
            budget(None, money, Period::Day, 250),
            Budget { holder: Holder::All, ..budget(None, money, Period::Day, 2_000) },
            of(Holder::Job, None, tokens, 150),
        ];
        let (_, budgets, allowed) = parts(budgets, |_| Some(100));
        let (began_ms, day) = (budgets.clock.now_ms(), Period::Day.at(budgets.clock.now_ms()));
        let job = Some(JobId::try_from("b/c".to_owned()).unwrap());
        for tenant in ["rich", "a/b", "a/b", "a/b"] {
            let _ = allowed.complete(&Call { job: job.clone(), ..call(tenant, "m") }, &Deaf).await;
        }
        assert_eq!(code(&allowed, "a/b", "m").await, "ok");
        assert_eq!(code(&allowed, "a/b", "m").await, "budget_exceeded");
        let subject = |holder, tenant: Option<&str>, name: Option<&str>| Subject {
            holder,
            tenant: tenant.map(str::to_owned),
            name: name.map(str::to_owned),
        };
        let stood = vec![
            (subject(Holder::Tenant, Some("a/b"), None), 1, day, 200, 1),
            (subject(Holder::Tenant, Some("rich"), None), 0, day, 100, 0),
            (subject(Holder::All, None, None), 2, day, 300, 0),
            (subject(Holder::Job, Some("a/b"), Some("b/c")), 3, day, 100, 2),
            (subject(Holder::Job, Some("rich"), Some("b/c")), 3, day, 100, 0),
        ];
        let read = async |since_ms| {
            let standings = budgets.standings(since_ms, budgets.clock.now_ms()).await.unwrap();
            let of = |one: Standing| (one.subject, one.budget, one.period, one.used + one.held, one.refused);
            standings.into_iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(read(began_ms).await, stood);
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(read(budgets.clock.now_ms()).await, [], "a new day");
        assert_eq!(read(began_ms).await, stood, "how the last one ended");
        tokio::time::advance(DAY + COMPARED).await;
        assert_eq!(read(began_ms).await, [], "nobody compares it any more");
    }

    #[test]
    fn months_are_those_of_the_calendar() {
        // 2024-02-29, 2024-03-01, 2024-12-31, 2025-01-01.
        let months = [19_782, 19_783, 20_088, 20_089].map(|day| month(day) - month(19_782));
        assert_eq!(months, [0, 1, 10, 11]);
        for day in (-200_000..200_000).step_by(7) {
            let (begins, ends) = Period::Month.span(month(day));
            assert!((begins..ends).contains(&(day * 86_400_000)), "{day}");
            assert!([28, 29, 30, 31].contains(&((ends - begins) / 86_400_000)), "{day}");
        }
    }
}
