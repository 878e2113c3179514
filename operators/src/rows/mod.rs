//! Writes a row for every try of a call, and hands its tokens on.
//!
//! A hedge is a try beside another, so a ledger must know both at once: it is a call of its own there. Its answer is
//! kept under the call that it was made for, so whoever reads that call again never asks for the hedge.
//!
//! Each tier of a cascade is a call of its own too, by its place in the cascade: what one answered is remembered while the
//! next is asked. Its tries have higher numbers than those before, so whoever reads along takes its tokens for the others'. So it
//! is with the calls that a record makes one after the other.
//!
//! Invariant: a try that was started leaves one row, however it ends; where nobody waited for its end, when this is dropped.

mod account;

use account::{Account, Away, word};
use forebay_calls::{Call, CallError, Class, Happening, Listener, Model, Reply, Tried, TryId, Upstream};
use forebay_operator::{Called, Context, Event, Failure, Operation, Stop};
use forebay_schemas::{Attempt, NanoUsd};
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;

/// Times between pieces of an answer that are kept; an answer with more is no other for it.
const GAPS_MAX: usize = 8_192;

/// Indices of calls that each tier, or each call of a record, has: its own, and the hedge beside it.
const CALLS_PER_TIER: u32 = 2;

/// Listens to a call, or to the hedge beside it.
pub(crate) struct Rows<'a> {
    cx: &'a Context,
    operation: Operation,
    texts: Option<usize>,
    /// Who asked, beside the tenant.
    key_id: Option<String>,
    job: Option<String>,
    is_hedge: bool,
    is_dispensable: bool,
    tier: Mutex<Tier>,
    /// The number of the next try of both. A host that processes a record again has counted its earlier tries in the
    /// envelope.
    next: Arc<AtomicU32>,
    account: Account,
    /// The try that goes on.
    open: Mutex<Option<Open>>,
}

/// The tier that is asked, or the call of several.
#[derive(Clone, Default)]
struct Tier {
    place: u32,
    /// Absent where there are no tiers.
    name: Option<String>,
}

/// What a ledger keeps of a call. One that was cut after somebody had read its beginning is over as one that was answered
/// is: made again after a crash, it would cost more and be spliced onto what was read.
///
/// Invariant: an answer is written as itself, as it always was, and what was cut can be read as no answer.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Kept {
    Cut { cut: Reply, message: String },
    Answered(Reply),
}

impl Kept {
    fn of(result: Result<Reply, CallError>) -> Result<Self, CallError> {
        match result {
            Ok(reply) => Ok(Self::Answered(reply)),
            Err(CallError { partial: Some(read), message, .. }) => Ok(Self::Cut { cut: *read, message }),
            Err(error) => Err(error),
        }
    }

    fn into_result(self) -> Result<Reply, CallError> {
        match self {
            Self::Answered(reply) => Ok(reply),
            Self::Cut { cut, message } => Err(CallError::cut(message, cut)),
        }
    }
}

struct Open {
    attempt: u32,
    /// Texts that it brings, unless it is part of a try that is counted already.
    texts: Option<usize>,
    started_at_us: i64,
    provider: &'static str,
    endpoint: Option<String>,
    model: String,
    ttft_us: Option<i64>,
    /// When its last piece came, and the times before it.
    heard_at: Option<Instant>,
    gaps_us: Vec<u32>,
    away: Option<Away>,
    /// Known also where there is no answer.
    cost_nano_usd: Option<i64>,
}

impl<'a> Rows<'a> {
    /// Of this call.
    pub(crate) fn new(cx: &'a Context, call: &Call<'_>) -> Self {
        let next = Arc::new(AtomicU32::new(cx.next_attempt()));
        let (operation, texts, tier) = (call.task.operation(), call.task.texts(), Mutex::default());
        let key_id = call.key_id.as_ref().map(|key_id| key_id.as_str().to_owned());
        let job = call.job.as_ref().map(|job| job.as_str().to_owned());
        let (is_hedge, is_dispensable) = (false, false);
        let (account, open) = (Account::new(), Mutex::default());
        Self { cx, operation, texts, key_id, job, is_hedge, is_dispensable, tier, next, account, open }
    }

    /// The same, where its record makes several calls: this one is the `number`th, from 0.
    pub(crate) fn numbered(self, number: u32) -> Self {
        self.asked().place = number;
        self
    }

    /// The same of a call without whose answer its record goes on. Where a reading that crashed asked in vain it is not asked again:
    /// that reading may have gone on, and with an answer the record would now become another, under the same id.
    pub(crate) fn dispensable(mut self) -> Self {
        self.is_dispensable = true;
        self
    }

    /// Asks a model, unless the work on the record is to stop.
    pub(crate) async fn ask(
        &self,
        model: &dyn Model,
        call: &Call<'_>,
    ) -> Result<Result<Reply, CallError>, Stop> {
        let replied = tokio::select! {
            biased;
            stop = self.cx.cancelled() => {
                self.close(Some(Failure::from(stop).code()));
                return Err(stop);
            }
            replied = model.complete(call, self) => replied,
        };
        if let Some(duration) = self.account.rest() {
            self.cx.observe(&Event::CallOverhead { duration_us: micros(duration) });
        }
        Ok(replied)
    }

    fn asked(&self) -> MutexGuard<'_, Tier> {
        self.tier.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The index of the call.
    fn index(&self) -> u32 {
        self.asked().place.saturating_mul(CALLS_PER_TIER) + u32::from(self.is_hedge)
    }

    fn waited(&self, what: &'static str, duration: Duration) {
        self.account.waited(duration);
        self.cx.observe(&Event::CallWaited { what, duration_us: micros(duration) });
    }

    /// Leaves the row of a try that nobody waits for any more.
    fn close(&self, error: Option<&'static str>) {
        let Some(open) = self.opened().take() else { return };
        let duration_us = self.cx.clock().now_us().saturating_sub(open.started_at_us);
        let (status, error_code) = ("cancelled".to_owned(), error.map(str::to_owned));
        let row = Attempt { status, error_code, ..self.row(&open, duration_us) };
        // Why it was dropped is not always known.
        if error.is_some() {
            self.tell(open, &row, None, error);
        }
        self.cx.record(row);
    }

    /// Tells whoever counts how a try ended.
    fn tell(&self, open: Open, row: &Attempt, response_model: Option<String>, error: Option<&'static str>) {
        self.cx.observe(&Event::Called(Called {
            operation: self.operation,
            texts: open.texts,
            provider: open.provider.to_owned(),
            traceparent: self.cx.envelope().traceparent.clone(),
            endpoint: open.endpoint,
            model: open.model,
            response_model,
            started_at_us: row.started_at,
            duration_us: row.duration_us,
            ttft_us: row.ttft_us,
            input_tokens: row.input_tokens,
            output_tokens: row.output_tokens,
            gaps_us: open.gaps_us,
            error,
        }));
    }

    fn opened(&self) -> MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, attempt: u32, to: Upstream<'_>) -> Open {
        let started_at_us = self.cx.clock().now_us();
        let (endpoint, model) = (to.endpoint.map(str::to_owned), to.model.to_owned());
        Open {
            attempt,
            texts: self.texts,
            started_at_us,
            provider: to.provider,
            endpoint,
            model,
            ttft_us: None,
            heard_at: None,
            gaps_us: Vec::new(),
            away: None,
            cost_nano_usd: None,
        }
    }

    fn row(&self, open: &Open, duration_us: i64) -> Attempt {
        let call_id = self.cx.call_id(self.index()).as_str().to_owned();
        let envelope = self.cx.envelope();
        Attempt {
            attempt_id: format!("{call_id}/{}", open.attempt),
            call_id,
            request_id: envelope.id.as_str().to_owned(),
            tenant: envelope.tenant.as_str().to_owned(),
            generation: i32::try_from(envelope.generation).unwrap_or(i32::MAX),
            stage: self.cx.stage().to_owned(),
            attempt: i32::try_from(open.attempt).unwrap_or(i32::MAX),
            started_at: open.started_at_us,
            duration_us,
            ttft_us: open.ttft_us,
            provider: open.provider.to_owned(),
            endpoint: open.endpoint.clone(),
            model: Some(open.model.clone()),
            status: "ok".to_owned(),
            error_code: None,
            http_status: None,
            input_tokens: None,
            output_tokens: None,
            cost_nano_usd: open.cost_nano_usd,
            tier: self.asked().name.clone(),
            cached_read_tokens: None,
            cached_write_tokens: None,
            reasoning_tokens: None,
            key_id: self.key_id.clone(),
            job: self.job.clone(),
            operation: Some(self.operation.as_str().to_owned()),
        }
    }
}

/// The caller gave the call up, or its try was not waited for.
impl Drop for Rows<'_> {
    fn drop(&mut self) {
        self.close(None);
    }
}

impl Listener for Rows<'_> {
    fn tier(&self, place: u32, name: &str) {
        *self.asked() = Tier { place, name: Some(name.to_owned()) };
        if place > 0 {
            // The tier before may have been answered from a ledger, and then no try of it was counted here.
            self.next.fetch_max(self.cx.next_attempt(), Ordering::Relaxed);
        }
    }

    fn started(&self, to: Upstream<'_>) {
        let attempt = self.next.fetch_add(1, Ordering::Relaxed);
        let away = Some(self.account.sent());
        *self.opened() = Some(Open { away, ..self.open(attempt, to) });
    }

    fn paid<'a>(
        &'a self,
        to: Upstream<'a>,
        call: BoxFuture<'a, Result<Reply, CallError>>,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        let row = move |attempt: i32| {
            // A reading that crashed may have tried more often than the envelope says.
            let attempt = u32::try_from(attempt).unwrap_or(0);
            let counted = self.next.fetch_max(attempt, Ordering::Relaxed);
            if self.is_dispensable && counted < attempt {
                let message = format!("it was asked for {} before, in vain", self.operation.as_str());
                return Err(CallError::new(Class::Rejected, "tried_before", message));
            }
            let mut row = self.row(&self.open(counted.max(attempt), to), 0);
            "ambiguous".clone_into(&mut row.status);
            Ok(row)
        };
        // What lies around the try is the ledger's.
        Box::pin(async move {
            let (began, away) = (Instant::now(), Mutex::new(Duration::ZERO));
            let timed = async {
                let sent = Instant::now();
                let result = call.await;
                *away.lock().unwrap_or_else(PoisonError::into_inner) = sent.elapsed();
                Kept::of(result)
            };
            let result = self.cx.paid(self.index(), row, timed).await.and_then(Kept::into_result);
            let away = away.into_inner().unwrap_or_else(PoisonError::into_inner);
            self.waited("ledger", began.elapsed().saturating_sub(away));
            result
        })
    }

    fn beside(&self) -> Option<Box<dyn Listener + '_>> {
        let next = Arc::clone(&self.next);
        let (account, tier) = (self.account.clone(), Mutex::new(self.asked().clone()));
        let (key_id, job) = (self.key_id.clone(), self.job.clone());
        let Self { cx, operation, texts, is_dispensable, .. } = *self;
        let (is_hedge, open) = (true, Mutex::default());
        let hedge =
            Rows { cx, operation, texts, key_id, job, is_hedge, is_dispensable, tier, next, account, open };
        (!self.is_hedge).then(|| Box::new(hedge) as Box<dyn Listener + '_>)
    }

    fn try_id(&self) -> Option<TryId> {
        let number = self.opened().as_ref()?.attempt;
        Some(TryId { call: self.cx.call_id(self.index()).as_str().to_owned(), number })
    }

    fn token(&self, text: &str) {
        let mut open = self.opened();
        let Some(open) = &mut *open else { return };
        let now_us = self.cx.clock().now_us();
        open.ttft_us.get_or_insert(now_us.saturating_sub(open.started_at_us));
        let now = Instant::now();
        if let Some(before) = open.heard_at.replace(now).filter(|_| open.gaps_us.len() < GAPS_MAX) {
            open.gaps_us.push(u32::try_from(now.duration_since(before).as_micros()).unwrap_or(u32::MAX));
        }
        self.cx.delta(open.attempt, text);
    }

    fn happened(&self, what: Happening) {
        let how = match what {
            Happening::Waited(what, duration) => return self.waited(word(what), duration),
            Happening::Joined(texts) => {
                if let Some(open) = &mut *self.opened() {
                    open.texts = texts;
                }
                return;
            }
            Happening::Retried => "retry",
            Happening::Hedged => "hedge",
            Happening::FellBack => "fallback",
        };
        self.cx.observe(&Event::CallExtended { how });
    }

    fn cost(&self, cost: NanoUsd) {
        if let Some(open) = &mut *self.opened() {
            open.cost_nano_usd = Some(cost.0);
        }
    }

    fn ended(&self, tried: &Tried<'_>) {
        let Some(mut open) = self.opened().take() else { return };
        drop(open.away.take());
        let mut row = self.row(&open, micros(tried.duration));
        row.ttft_us = tried.ttft.map(micros);
        match tried.result {
            Ok(reply) => {
                let usage = reply.usage;
                row.input_tokens = usage.map(|usage| count(usage.prompt_tokens));
                row.output_tokens = usage.map(|usage| count(usage.completion_tokens));
                row.cached_read_tokens = usage.and_then(|usage| usage.cached_tokens).map(count);
                row.cached_write_tokens = usage.and_then(|usage| usage.cached_write_tokens).map(count);
                row.reasoning_tokens = usage.and_then(|usage| usage.reasoning_tokens).map(count);
                row.cost_nano_usd = reply.cost_nano_usd.map(|cost| cost.0);
            }
            Err(error) => {
                let status = match error.class {
                    Class::Rejected => "rejected",
                    Class::Lost => {
                        self.cx.observe(&Event::CallExtended { how: "hedge_lost" });
                        "hedge_lost"
                    }
                    _ => "failed",
                };
                status.clone_into(&mut row.status);
                row.error_code = Some(error.code.to_owned());
                row.http_status = error.http_status.map(i32::from);
            }
        }
        let response_model = tried.result.ok().map(|reply| reply.model.clone());
        self.tell(open, &row, response_model, tried.result.err().map(|error| error.code));
        self.cx.record(row);
    }
}

fn count(tokens: u64) -> i64 {
    i64::try_from(tokens).unwrap_or(i64::MAX)
}

pub(crate) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}
