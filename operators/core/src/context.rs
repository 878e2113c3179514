//! All that an operator may know and do beside its record.
//!
//! Five ports lead to the host: [`paid`](Context::paid), [`record`](Context::record), [`delta`](Context::delta),
//! [`cancelled`](Context::cancelled), [`observe`](Context::observe). None tells where the record lies in Kafka.

use crate::{
    Clock, Failure, Found, Known, Ledger,
    deltas::{Deltas, Piece},
};
use forebay_schemas::{Attempt, CallId, Delta, Envelope};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    convert::Infallible,
    future::{Future, pending},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

/// What a host does for an operator.
pub trait Host: Send + Sync {
    /// Sends a piece of an answer to whoever reads along. Best effort: it may be lost, and never waits.
    fn delta(&self, stage: &str, delta: Delta);

    /// Notes that something happened.
    fn observe(&self, stage: &str, event: &Event);
}

/// Something that happened inside an operator and that somebody counts.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "none is kept: each is told of by reference")]
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
    /// An embedder was to make a vector of a question.
    Embedded {
        /// `ok`, or the code of the error for which its passages were sought by its words alone.
        outcome: &'static str,
    },
    /// A reranker was to score passages.
    Reranked {
        /// `ok`, or the code of the error for which they have the order in which they were found.
        outcome: &'static str,
    },
    /// A try of an upstream call ended.
    Called(Called),
    /// A call waited, or did not have to.
    CallWaited {
        /// `room` at an endpoint, others for its `batch`, its next `retry`, or the `ledger`.
        what: &'static str,
        /// How long, in microseconds.
        duration_us: i64,
    },
    /// More was asked than the first try of a call.
    CallExtended {
        /// `retry`, `hedge`, `hedge_lost` or `fallback`.
        how: &'static str,
    },
    /// A call is over; beside upstreams and waits it took so long.
    CallOverhead {
        /// In microseconds.
        duration_us: i64,
    },
    /// An answer was judged.
    Judged {
        /// `pass`, `annotate` or `block`.
        judgement: &'static str,
    },
}

/// What an upstream call is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Operation {
    /// An answer.
    #[default]
    Chat,
    /// Vectors.
    Embeddings,
    /// Scores.
    Rerank,
}

impl Operation {
    /// Its name, as OpenTelemetry has it where it has one.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Embeddings => "embeddings",
            Self::Rerank => "rerank",
        }
    }
}

/// A try of an upstream call, as it ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Called {
    /// What it was for.
    pub operation: Operation,
    /// Texts that it brought, for vectors or scores; absent where it is told of as part of another that brought them.
    pub texts: Option<usize>,
    /// The kind of provider.
    pub provider: String,
    /// The hop that it is a part of, as W3C writes it.
    pub traceparent: Option<String>,
    /// Scheme, host and port; absent for a model in process.
    pub endpoint: Option<String>,
    /// The model that was asked.
    pub model: String,
    /// The model that answered, as it names itself.
    pub response_model: Option<String>,
    /// When it was sent, in microseconds since 1970.
    pub started_at_us: i64,
    /// How long it took, in microseconds.
    pub duration_us: i64,
    /// Time to first token in microseconds, where the answer was streamed.
    pub ttft_us: Option<i64>,
    /// Tokens read.
    pub input_tokens: Option<i64>,
    /// Tokens written.
    pub output_tokens: Option<i64>,
    /// From each piece of its answer to the next, in microseconds, where it was streamed.
    pub gaps_us: Vec<u32>,
    /// The code of the error, where it failed.
    pub error: Option<&'static str>,
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
            pending::<()>().await;
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
    deltas: Mutex<Deltas>,
    /// Told when a piece begins to wait for others.
    holds: Notify,
}

impl Context {
    /// A context for one delivery.
    pub fn new(delivery: Delivery, clock: Clock, host: Arc<dyn Host>, stop: StopSignal) -> Self {
        let (rows, deltas, holds) = Default::default();
        Self { delivery, clock, host, stop, rows, deltas, holds }
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
    /// ends, or says why it is not to be made. What the call leaves is told by [`record`](Self::record), under the same attempt id.
    pub async fn paid<A, E>(
        &self,
        call_index: u32,
        row: impl Fn(i32) -> Result<Attempt, E> + Send,
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
            let row = row(attempt)?;
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

    /// Sends a piece of the answer to whoever reads along, together with what comes shortly after it; nothing happens where
    /// nobody does.
    pub fn delta(&self, attempt: u32, text: &str) {
        if self.delivery.envelope.stream {
            let mut deltas = self.deltas();
            let was_empty = deltas.due().is_none();
            let pieces = deltas.add(attempt, text, Instant::now());
            self.send(pieces.into_iter().flatten());
            if was_empty && deltas.due().is_some() {
                self.holds.notify_one();
            }
        }
    }

    /// Sends what waits for more of the answer when it has waited long enough, for as long as it is polled; for hosts.
    pub async fn send_deltas(&self) -> Infallible {
        if !self.delivery.envelope.stream {
            return pending().await;
        }
        loop {
            let due = self.deltas().due();
            match due {
                None => self.holds.notified().await,
                Some(due) => {
                    tokio::time::sleep_until(due).await;
                    let mut deltas = self.deltas();
                    self.send(deltas.take_due(Instant::now()));
                }
            }
        }
    }

    /// Sends what still waits for more of the answer; for hosts, before they send what the step gives.
    pub fn flush_deltas(&self) {
        let mut deltas = self.deltas();
        self.send(deltas.take());
    }

    fn deltas(&self) -> MutexGuard<'_, Deltas> {
        self.deltas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called with the pieces' lock held, or two of them might change places.
    fn send(&self, pieces: impl IntoIterator<Item = Piece>) {
        for Piece { attempt, seq, text } in pieces {
            let id = self.delivery.envelope.id.as_str().to_owned();
            let tenant = self.delivery.envelope.tenant.clone();
            self.host.delta(&self.delivery.stage, Delta { id, tenant, attempt, seq, text });
        }
    }

    /// Resolves when the client takes the request back or its deadline passes.
    pub async fn cancelled(&self) -> Stop {
        let deadline = async {
            match self.remaining() {
                Some(left) => tokio::time::sleep(left).await,
                None => pending().await,
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
    fn delta(&self, _: &str, _: Delta) {}
    fn observe(&self, _: &str, _: &Event) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compliance;

    /// Notes pieces, and when they came.
    struct Reader(Instant, Mutex<Vec<String>>);
    impl Host for Reader {
        fn delta(&self, stage: &str, Delta { id, attempt, seq, text, .. }: Delta) {
            assert_eq!((stage, id.as_str()), ("infer", compliance::envelope().id.as_str()));
            let came = format!("{} ms: {attempt}.{seq} {text}", self.0.elapsed().as_millis());
            self.1.lock().unwrap().push(came);
        }
        fn observe(&self, _: &str, _: &Event) {}
    }

    fn read_by(stream: bool) -> (Arc<Reader>, Context) {
        let envelope = Envelope { stream, ..compliance::envelope() };
        let (stage, cluster) = ("infer".into(), "test".into());
        let delivery = Delivery { envelope, recorded_at_ms: 0, stage, cluster, ledger: None };
        let reader = Arc::new(Reader(Instant::now(), Mutex::default()));
        let cx = Context::new(delivery, Clock::System, reader.clone(), StopSignal::new().1);
        (reader, cx)
    }

    /// Writes ten tokens 7 ms apart, with a stall of a second behind the sixth.
    async fn write(cx: &Context) {
        for number in 0..10_u64 {
            cx.delta(2, &format!("{number} "));
            tokio::time::sleep(Duration::from_millis(if number == 5 { 1_000 } else { 7 })).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_piece_waits_longer_than_20_ms_also_where_none_follows() {
        let (reader, cx) = read_by(true);
        tokio::select! {
            () = write(&cx) => cx.flush_deltas(),
            never = cx.send_deltas() => match never {},
        }
        cx.flush_deltas();
        let expected = [
            "0 ms: 2.0 0 ",
            "27 ms: 2.1 1 2 3 ",
            "48 ms: 2.2 4 5 ",
            "1055 ms: 2.3 6 7 8 ",
            "1063 ms: 2.4 9 ",
        ];
        assert_eq!(*reader.1.lock().unwrap(), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_sent_where_nobody_reads() {
        let (reader, cx) = read_by(false);
        tokio::select! {
            () = write(&cx) => cx.flush_deltas(),
            never = cx.send_deltas() => match never {},
        }
        assert_eq!(reader.1.lock().unwrap().len(), 0);
    }
}
