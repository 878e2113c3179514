//! All that an operator may know and do beside its record.
//!
//! Five ports lead to the host: [`paid`](Context::paid), [`record`](Context::record), [`delta`](Context::delta),
//! [`cancelled`](Context::cancelled), [`observe`](Context::observe). None tells where the record lies in Kafka.

use crate::{Clock, Failure, Found, Known, Ledger};
use forebay_schemas::{Attempt, CallId, Delta, Envelope};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::watch;

/// What a host does for an operator.
pub trait Host: Send + Sync {
    /// Sends a piece of an answer to whoever reads along. Best effort: it may be lost.
    fn delta(&self, delta: Delta);

    /// Notes that something happened.
    fn observe(&self, stage: &str, event: &Event);
}

/// Something that happened inside an operator and that somebody counts.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The cache was asked.
    CacheLookedUp {
        /// `hit`, `miss`, `bypass`, or `unavailable` where the store failed and it was taken for a miss.
        status: &'static str,
    },
    /// Passages were sought.
    Retrieved {
        /// How many were found.
        passages: usize,
    },
    /// An upstream call ended.
    Called {
        /// The kind of provider.
        provider: String,
        /// The model that answered or was asked.
        model: String,
        /// How long it took, in microseconds.
        duration_us: i64,
        /// Time to first token in microseconds, where the answer was streamed.
        ttft_us: Option<i64>,
        /// Tokens read.
        input_tokens: Option<i64>,
        /// Tokens written.
        output_tokens: Option<i64>,
        /// The code of the error, where it failed.
        error: Option<&'static str>,
    },
    /// An answer was judged.
    Judged {
        /// `pass`, `annotate` or `block`.
        judgement: &'static str,
    },
}

/// Why work should stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The client took the request back.
    Cancelled,
    /// Nobody waits any more.
    Expired,
}

impl From<Stop> for Failure {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Cancelled => Self::Cancelled,
            Stop::Expired => Self::Expired,
        }
    }
}

/// Tells an operator that its client took the request back.
#[derive(Clone, Debug)]
pub struct StopSignal(watch::Receiver<bool>);

impl StopSignal {
    /// A signal, and the switch that gives it.
    pub fn new() -> (watch::Sender<bool>, Self) {
        let (switch, signal) = watch::channel(false);
        (switch, Self(signal))
    }

    /// Resolves when the request is taken back.
    pub async fn given(&self) {
        let mut signal = self.0.clone();
        if signal.wait_for(|given| *given).await.is_err() {
            // Nobody holds the switch any more, so it will never be given.
            std::future::pending::<()>().await;
        }
    }
}

/// What a host knows of one delivery of a record.
#[derive(Clone)]
pub struct Delivery {
    /// What travels beside the record.
    pub envelope: Envelope,
    /// The timestamp of the record itself, in milliseconds since 1970. What must come out the same when the record is
    /// processed again takes its time from here and not from the clock.
    pub recorded_at_ms: i64,
    /// The step's key in its pipeline.
    pub stage: Arc<str>,
    /// The id of the Kafka cluster.
    pub cluster: Arc<str>,
    /// Where the paid calls of this record are remembered; absent where they are not.
    pub ledger: Option<Arc<dyn Ledger>>,
}

/// All that an operator may know and do beside its record.
pub struct Context {
    delivery: Delivery,
    clock: Clock,
    host: Arc<dyn Host>,
    stop: StopSignal,
    rows: Mutex<Vec<Attempt>>,
    /// The attempt that writes, and the number of its next piece.
    deltas: Mutex<(u32, u32)>,
}

impl Context {
    /// A context for one delivery.
    pub fn new(delivery: Delivery, clock: Clock, host: Arc<dyn Host>, stop: StopSignal) -> Self {
        Self { delivery, clock, host, stop, rows: Mutex::default(), deltas: Mutex::default() }
    }

    /// A context that reaches nobody, for tests of operators.
    pub fn quiet(envelope: Envelope, clock: Clock) -> Self {
        let recorded_at_ms = envelope.accepted_at_ms;
        let (stage, cluster) = ("test".into(), "test".into());
        let delivery = Delivery { envelope, recorded_at_ms, stage, cluster, ledger: None };
        // The switch is dropped: this request is never taken back.
        Self::new(delivery, clock, Arc::new(Quiet), StopSignal::new().1)
    }

    /// What travels beside the record.
    pub fn envelope(&self) -> &Envelope {
        &self.delivery.envelope
    }

    /// The timestamp of the record itself, in milliseconds since 1970.
    pub fn recorded_at_ms(&self) -> i64 {
        self.delivery.recorded_at_ms
    }

    /// The step's key in its pipeline.
    pub fn stage(&self) -> &str {
        &self.delivery.stage
    }

    /// Wall time, in milliseconds since 1970.
    pub fn now_ms(&self) -> i64 {
        self.clock.now_ms()
    }

    /// The clock, for what measures more finely.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// How long somebody will still wait; `None` without a deadline, zero when it has passed.
    pub fn remaining(&self) -> Option<Duration> {
        let left = self.delivery.envelope.deadline_at_ms?.saturating_sub(self.now_ms());
        Some(Duration::from_millis(u64::try_from(left).unwrap_or(0)))
    }

    /// The id of an upstream call of this step: the same whenever this record is processed again.
    pub fn call_id(&self, call_index: u32) -> CallId {
        let Envelope { tenant, id, again, visit, .. } = &self.delivery.envelope;
        CallId::new(&self.delivery.cluster, tenant, id, *again, &self.delivery.stage, *visit, call_index)
    }

    /// Makes one try of an upstream call that costs something, unless it was answered already: then this is the answer,
    /// and nothing is paid. `row` gives the row about the try, from its number, as it stands while nobody knows how it
    /// ends. What the call leaves is told by [`record`](Self::record), under the same attempt id.
    pub async fn paid<A, E>(
        &self,
        call_index: u32,
        row: impl Fn(i32) -> Attempt + Send,
        call: impl Future<Output = Result<A, E>> + Send,
    ) -> Result<A, E>
    where
        A: Serialize + DeserializeOwned + Send,
        E: From<Failure> + Send,
    {
        let Some(ledger) = &self.delivery.ledger else { return call.await };
        let unreadable = |error: serde_json::Error| Failure::rejected("ledger_unreadable", error.to_string());
        let id = self.call_id(call_index);
        let (mut turn, attempt_id) = loop {
            let Found { rows, known } = ledger.find(&id).await?;
            rows.into_iter().for_each(|row| self.record(row));
            let (attempt, mut turn) = match known {
                Known::Answered(answer) => return Ok(serde_json::from_slice(&answer).map_err(unreadable)?),
                Known::Refused(failure) => return Err(failure.into()),
                Known::Open { attempt, turn } => (attempt, turn),
            };
            let row = row(attempt);
            let attempt_id = row.attempt_id.clone();
            if turn.start(row).await? {
                break (turn, attempt_id);
            }
        };
        let result = call.await;
        let row = self.row(&attempt_id);
        match &result {
            Ok(answer) => turn.done(serde_json::to_vec(answer).map_err(unreadable)?, row).await?,
            Err(_) => turn.failed(row).await?,
        }
        result
    }

    /// The row that was recorded under this id.
    fn row(&self, attempt_id: &str) -> Option<Attempt> {
        let rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        rows.iter().rev().find(|row| row.attempt_id == attempt_id).cloned()
    }

    /// Keeps a row about an upstream call. It is durable before the record counts as done, also when the step fails.
    pub fn record(&self, row: Attempt) {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner).push(row);
    }

    /// The number of the next try: above those of all rows that are here, and of the tries that the host has counted.
    pub fn next_attempt(&self) -> u32 {
        let rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        let known = rows.iter().filter_map(|row| u32::try_from(row.attempt).ok()?.checked_add(1)).max();
        known.unwrap_or(0).max(self.delivery.envelope.attempts)
    }

    /// Takes the rows that were recorded; for hosts.
    pub fn take_rows(&self) -> Vec<Attempt> {
        std::mem::take(&mut self.rows.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends a piece of the answer to whoever reads along; nothing happens where nobody does.
    pub fn delta(&self, attempt: u32, text: &str) {
        if self.delivery.envelope.stream {
            let id = self.delivery.envelope.id.as_str().to_owned();
            let tenant = self.delivery.envelope.tenant.clone();
            let mut next = self.deltas.lock().unwrap_or_else(PoisonError::into_inner);
            let seq = if next.0 == attempt { next.1 } else { 0 };
            *next = (attempt, seq.saturating_add(1));
            self.host.delta(Delta { id, tenant, attempt, seq, text: text.to_owned() });
        }
    }

    /// Resolves when the client takes the request back or its deadline passes.
    pub async fn cancelled(&self) -> Stop {
        let deadline = async {
            match self.remaining() {
                Some(left) => tokio::time::sleep(left).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.stop.given() => Stop::Cancelled,
            () = deadline => Stop::Expired,
        }
    }

    /// Notes that something happened.
    pub fn observe(&self, event: &Event) {
        self.host.observe(&self.delivery.stage, event);
    }
}

/// A host that does nothing: calls are made, nobody reads along, nobody counts.
#[derive(Clone, Copy, Debug)]
pub struct Quiet;

impl Host for Quiet {
    fn delta(&self, _: Delta) {}
    fn observe(&self, _: &str, _: &Event) {}
}
