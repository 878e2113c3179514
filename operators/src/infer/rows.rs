//! Writes a row for every try of a call, and hands its tokens on.
//!
//! Invariant: a try that was started leaves one row, however it ends.

use forebay_calls::{CallError, Class, Listener, Reply, Tried};
use forebay_operator::{Context, Event, Failure, Stop};
use forebay_schemas::Attempt;
use futures::future::BoxFuture;
use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Listens to a call.
pub(super) struct Rows<'a> {
    cx: &'a Context,
    provider: &'static str,
    state: Mutex<State>,
}

struct State {
    /// The number of the next try. A host that processes a record again has counted its earlier tries in the envelope.
    next: u32,
    /// The try that goes on.
    open: Option<Open>,
}

struct Open {
    attempt: u32,
    started_at_us: i64,
    endpoint: Option<String>,
    model: String,
    ttft_us: Option<i64>,
}

impl<'a> Rows<'a> {
    pub(super) fn new(cx: &'a Context, provider: &'static str) -> Self {
        let state = Mutex::new(State { next: cx.envelope().attempts, open: None });
        Self { cx, provider, state }
    }

    /// The call was given up, for this reason. What it had cost by then nobody says.
    pub(super) fn given_up(&self, stop: Stop) {
        let Some(open) = self.take() else { return };
        let duration_us = self.cx.clock().now_us().saturating_sub(open.started_at_us);
        let mut row = self.row(&open, duration_us);
        "cancelled".clone_into(&mut row.status);
        row.error_code = Some(Failure::from(stop).code().to_owned());
        self.cx.record(row);
    }

    fn take(&self) -> Option<Open> {
        self.state().open.take()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, attempt: u32, endpoint: Option<&str>, model: &str) -> Open {
        let started_at_us = self.cx.clock().now_us();
        let (endpoint, model) = (endpoint.map(str::to_owned), model.to_owned());
        Open { attempt, started_at_us, endpoint, model, ttft_us: None }
    }

    fn row(&self, open: &Open, duration_us: i64) -> Attempt {
        let call_id = self.cx.call_id(0).as_str().to_owned();
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
            provider: self.provider.to_owned(),
            endpoint: open.endpoint.clone(),
            model: Some(open.model.clone()),
            status: "ok".to_owned(),
            error_code: None,
            http_status: None,
            input_tokens: None,
            output_tokens: None,
            cost_nano_usd: None,
        }
    }
}

impl Listener for Rows<'_> {
    fn started(&self, endpoint: Option<&str>, model: &str) {
        let mut state = self.state();
        state.open = Some(self.open(state.next, endpoint, model));
        state.next = state.next.saturating_add(1);
    }

    fn paid<'a>(
        &'a self,
        endpoint: Option<&'a str>,
        model: &'a str,
        call: BoxFuture<'a, Result<Reply, CallError>>,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        let row = move |attempt: i32| {
            let mut state = self.state();
            // A reading that crashed may have tried more often than the envelope says.
            state.next = state.next.max(u32::try_from(attempt).unwrap_or(0));
            let mut row = self.row(&self.open(state.next, endpoint, model), 0);
            "ambiguous".clone_into(&mut row.status);
            row
        };
        Box::pin(self.cx.paid(0, row, call))
    }

    fn token(&self, text: &str) {
        let mut state = self.state();
        let Some(open) = &mut state.open else { return };
        let now_us = self.cx.clock().now_us();
        open.ttft_us.get_or_insert(now_us.saturating_sub(open.started_at_us));
        self.cx.delta(open.attempt, text);
    }

    fn ended(&self, tried: &Tried<'_>) {
        let Some(open) = self.take() else { return };
        let mut row = self.row(&open, micros(tried.duration));
        row.ttft_us = tried.ttft.map(micros);
        match tried.result {
            Ok(reply) => {
                row.input_tokens = reply.usage.map(|usage| count(usage.prompt_tokens));
                row.output_tokens = reply.usage.map(|usage| count(usage.completion_tokens));
                row.cost_nano_usd = reply.cost_nano_usd.map(|cost| cost.0);
            }
            Err(error) => {
                let status = if error.class == Class::Rejected { "rejected" } else { "failed" };
                status.clone_into(&mut row.status);
                row.error_code = Some(error.code.to_owned());
                row.http_status = error.http_status.map(i32::from);
            }
        }
        self.cx.observe(&Event::Called {
            provider: self.provider.to_owned(),
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
