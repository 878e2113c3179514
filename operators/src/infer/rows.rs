//! Writes a row for every try of a call, and hands its tokens on.
//!
//! A hedge is a try beside another, so a ledger must know both at once: it is a call of its own there. Its answer is
//! kept under the call that it was made for, so whoever reads that call again never asks for the hedge.
//!
//! Invariant: a try that was started leaves one row, however it ends; where nobody waited for its end, when this is dropped.

use forebay_calls::{CallError, Class, Listener, Reply, Tried, TryId, Upstream};
use forebay_operator::{Context, Event, Failure, Stop};
use forebay_schemas::{Attempt, NanoUsd};
use futures::future::BoxFuture;
use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

/// The index of the call, and that of the hedge beside it.
const CALL: u32 = 0;
const HEDGE: u32 = 1;

/// Listens to a call, or to the hedge beside it.
pub(super) struct Rows<'a> {
    cx: &'a Context,
    index: u32,
    /// The number of the next try of both. A host that processes a record again has counted its earlier tries in the
    /// envelope.
    next: Arc<AtomicU32>,
    /// The try that goes on.
    open: Mutex<Option<Open>>,
}

struct Open {
    attempt: u32,
    started_at_us: i64,
    provider: &'static str,
    endpoint: Option<String>,
    model: String,
    ttft_us: Option<i64>,
    /// Known also where there is no answer.
    cost_nano_usd: Option<i64>,
}

impl<'a> Rows<'a> {
    pub(super) fn new(cx: &'a Context) -> Self {
        let next = Arc::new(AtomicU32::new(cx.envelope().attempts));
        Self { cx, index: CALL, next, open: Mutex::default() }
    }

    /// The call was given up, for this reason.
    pub(super) fn given_up(&self, stop: Stop) {
        self.close(Some(Failure::from(stop).code().to_owned()));
    }

    /// Leaves the row of a try that nobody waits for any more.
    fn close(&self, error_code: Option<String>) {
        let Some(open) = self.opened().take() else { return };
        let duration_us = self.cx.clock().now_us().saturating_sub(open.started_at_us);
        let status = "cancelled".to_owned();
        self.cx.record(Attempt { status, error_code, ..self.row(&open, duration_us) });
    }

    fn opened(&self) -> MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, attempt: u32, to: Upstream<'_>) -> Open {
        let started_at_us = self.cx.clock().now_us();
        let (endpoint, model) = (to.endpoint.map(str::to_owned), to.model.to_owned());
        Open {
            attempt,
            started_at_us,
            provider: to.provider,
            endpoint,
            model,
            ttft_us: None,
            cost_nano_usd: None,
        }
    }

    fn row(&self, open: &Open, duration_us: i64) -> Attempt {
        let call_id = self.cx.call_id(self.index).as_str().to_owned();
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
            cached_read_tokens: None,
            cached_write_tokens: None,
            reasoning_tokens: None,
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
    fn started(&self, to: Upstream<'_>) {
        let attempt = self.next.fetch_add(1, Ordering::Relaxed);
        *self.opened() = Some(self.open(attempt, to));
    }

    fn paid<'a>(
        &'a self,
        to: Upstream<'a>,
        call: BoxFuture<'a, Result<Reply, CallError>>,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        let row = move |attempt: i32| {
            // A reading that crashed may have tried more often than the envelope says.
            let attempt = u32::try_from(attempt).unwrap_or(0);
            let next = self.next.fetch_max(attempt, Ordering::Relaxed).max(attempt);
            let mut row = self.row(&self.open(next, to), 0);
            "ambiguous".clone_into(&mut row.status);
            row
        };
        Box::pin(self.cx.paid(self.index, row, call))
    }

    fn beside(&self) -> Option<Box<dyn Listener + '_>> {
        let next = Arc::clone(&self.next);
        let hedge = Rows { cx: self.cx, index: HEDGE, next, open: Mutex::default() };
        (self.index == CALL).then(|| Box::new(hedge) as Box<dyn Listener + '_>)
    }

    fn try_id(&self) -> Option<TryId> {
        let number = self.opened().as_ref()?.attempt;
        Some(TryId { call: self.cx.call_id(self.index).as_str().to_owned(), number })
    }

    fn token(&self, text: &str) {
        let mut open = self.opened();
        let Some(open) = &mut *open else { return };
        let now_us = self.cx.clock().now_us();
        open.ttft_us.get_or_insert(now_us.saturating_sub(open.started_at_us));
        self.cx.delta(open.attempt, text);
    }

    fn cost(&self, cost: NanoUsd) {
        if let Some(open) = &mut *self.opened() {
            open.cost_nano_usd = Some(cost.0);
        }
    }

    fn ended(&self, tried: &Tried<'_>) {
        let Some(open) = self.opened().take() else { return };
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
                    Class::Lost => "hedge_lost",
                    _ => "failed",
                };
                status.clone_into(&mut row.status);
                row.error_code = Some(error.code.to_owned());
                row.http_status = error.http_status.map(i32::from);
            }
        }
        self.cx.observe(&Event::Called {
            provider: open.provider.to_owned(),
            model: open.model,
            duration_us: row.duration_us,
            ttft_us: row.ttft_us,
            input_tokens: row.input_tokens,
            output_tokens: row.output_tokens,
            error: tried.result.err().map(|error| error.code),
        });
        self.cx.record(row);
    }
}

fn count(tokens: u64) -> i64 {
    i64::try_from(tokens).unwrap_or(i64::MAX)
}

pub(super) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}
