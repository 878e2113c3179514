//! What one record becomes.
//!
//! A stage is one step of a pipeline with its routes: it reads a message, gives the record to the operator, and says
//! which messages follow: outputs, rows about upstream calls, the record itself on a retry topic where the world failed,
//! an ending for a request that goes no further, a dead letter for a record that nobody can process.
//!
//! Invariant: every record becomes at least one message or was an `Ok` of its operator; but for one whose request was taken
//! back and ended before its turn ([`crate::ahead`]). A request whose work cannot
//! go on becomes an ending, whatever happened: bytes that are no record, a panic, a store that is away.

mod ahead;
mod claimed;

use crate::{
    cancels::Cancels,
    claims::Claims,
    host::memory::MemoryObjects,
    ledger::{Ledgers, RecordLedger},
    message::{Incoming, Outgoing, Partition},
    once::{Known, Once},
};
use bytes::Bytes;
use forebay_operator::{
    Addressed, Clock, Context, Delivery, Failure, Host, Ledger, Opened, Step, StopSignal,
};
use forebay_plan::Channel;
use forebay_schemas::{
    Attempt, CallId, DeadLetter, Ending, Envelope, Fault, Generated, Headers, Lane, NanoUsd, Origin, Record,
    Request, RequestId, Retry, Source, Status, Tenant, dead_letter::header as dead, header,
};
use forebay_telemetry::{Outcome, StepMeter};
use futures::FutureExt;
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;
use tracing::{error, warn};

use ahead::Outlook;
pub use claimed::Whole;

/// The full names of the topics that every stage may write to.
#[derive(Clone, Debug)]
pub struct CommonTopics {
    /// Where requests end.
    pub endings: Arc<str>,
    /// Where records go that nobody can process.
    pub dead_letters: Arc<str>,
    /// Where rows about upstream calls go.
    pub attempts: Arc<str>,
}

/// How long a stage waits in place for a world that failed.
#[derive(Clone, Debug)]
pub struct Patience {
    /// The waits between tries where a record cannot be set aside: its order matters, and it is given up after the last;
    /// or its deadline comes first, and the last wait is repeated until then.
    pub waits: Vec<Duration>,
    /// The wait between tries while what is needed cannot be reached at all: an outage costs no try.
    pub outage: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let waits = [500, 2_000, 8_000].map(Duration::from_millis).into();
        Self { waits, outage: Duration::from_secs(2) }
    }
}

/// A topic where records wait until they are tried again.
#[derive(Clone, Debug)]
pub struct RetryTopic {
    /// Its full name.
    pub topic: Arc<str>,
    /// How long each record waits there.
    pub delay: Duration,
}

/// All that a stage is made of.
pub struct Parts {
    /// The step's key in its pipeline.
    pub key: Arc<str>,
    /// The pipeline's name.
    pub pipeline: Arc<str>,
    /// The operator.
    pub step: Arc<dyn Step>,
    /// From port to full topic name.
    pub routes: BTreeMap<String, Arc<str>>,
    /// Full names of the topics, among those that it reads, which clients write to.
    pub from_clients: BTreeSet<Arc<str>>,
    /// From the full name of a topic to that of its backfill lane.
    pub backfill: BTreeMap<Arc<str>, Arc<str>>,
    /// Where records wait until they are tried again, in the order in which they pass them. None where order matters.
    pub retries: Vec<RetryTopic>,
    /// Where what a tenant has beyond its share of the queue waits, where the queue is fair.
    pub overflow: Option<Arc<str>>,
    /// How often one request may pass this step, where the pipeline bounds a loop here.
    pub visits_max: Option<u32>,
    /// Topics that every stage may write to.
    pub common: CommonTopics,
    /// The id of the Kafka cluster.
    pub cluster: Arc<str>,
    /// What time it is.
    pub clock: Clock,
    /// What the operator may do beside its record.
    pub host: Arc<dyn Host>,
    /// How long to wait for a world that failed.
    pub patience: Patience,
    /// What is counted.
    pub meter: StepMeter,
}

/// One step of a pipeline, ready to process records.
pub struct Stage {
    parts: Parts,
    /// Requests that their clients took back.
    cancels: Arc<Cancels>,
    /// What was written of late, where the step is the sole writer of a topic.
    once: Option<Arc<Once>>,
    /// What was paid for, where the step makes paid calls.
    ledgers: Option<Arc<Ledgers>>,
    /// Where bodies lie that are too large to travel.
    claims: Arc<Claims>,
    /// Full names of the topics whose messages may carry a claim instead of their body.
    claimed: BTreeSet<Arc<str>>,
    /// What looks ahead for requests that were taken back, where it can.
    outlook: Option<Outlook>,
    /// Fields that no version of a record knows, each warned of once.
    warned: Mutex<BTreeSet<String>>,
}

/// How many different unknown fields are told apart; a client that invents names must not fill the memory.
const WARNED_MAX: usize = 1_000;

/// How many rows about upstream calls of one record are held at a time.
const ROWS_MAX: usize = 32;

/// How long an outage is waited for at most: a request without a deadline must end too.
const JOB_LIFE: Duration = Duration::from_secs(24 * 60 * 60);

/// How long whoever asks to be left alone is left alone at most; then it is asked again.
const LEFT_ALONE_MAX: Duration = Duration::from_secs(10 * 60);

/// How many bytes of the key of the record that asked travel along. It comes back in the result, and must not be what
/// makes that too large.
const ORIGIN_KEY_BYTES_MAX: usize = 1024;

/// Why a record becomes a dead letter.
struct Death<'a> {
    class: &'static str,
    code: &'a str,
    message: String,
    /// Tries of this reading.
    attempts: u32,
    /// When the first of them failed, in milliseconds since 1970; just now where it does not say.
    since_ms: Option<i64>,
    /// What was read of its answer.
    partial: Option<&'a Generated>,
}

impl Stage {
    /// A stage of these parts.
    pub fn new(parts: Parts) -> Self {
        let (claims, claimed) = (Claims::new(Arc::new(MemoryObjects::default()), None), BTreeSet::new());
        Self {
            parts,
            cancels: Arc::default(),
            once: None,
            ledgers: None,
            claims: Arc::new(claims),
            claimed,
            outlook: None,
            warned: Mutex::default(),
        }
    }

    /// The same stage, hearing of these cancels.
    pub fn with_cancels(self, cancels: Arc<Cancels>) -> Self {
        Self { cancels, ..self }
    }

    /// The same stage, writing messages of these topics once.
    pub fn with_once(self, once: Arc<Once>) -> Self {
        Self { once: Some(once), ..self }
    }

    /// The same stage, remembering its paid calls.
    pub fn with_ledgers(self, ledgers: Arc<Ledgers>) -> Self {
        Self { ledgers: Some(ledgers), ..self }
    }

    /// A partition is ours from now on.
    pub fn assigned(&self, partition: &Partition) {
        if let Some(ledgers) = &self.ledgers {
            ledgers.assigned(partition);
        }
        if let Some(outlook) = &self.outlook {
            outlook.forget(partition);
        }
    }

    /// A partition is ours no more.
    pub fn given_up(&self, partition: &Partition) {
        if let Some(ledgers) = &self.ledgers {
            ledgers.given_up(partition);
        }
        if let Some(outlook) = &self.outlook {
            outlook.forget(partition);
        }
    }

    /// What is to stand beside a committed offset.
    pub fn metadata(&self, partition: &Partition, offset: i64) -> String {
        self.ledgers.as_ref().and_then(|ledgers| ledgers.metadata(partition, offset)).unwrap_or_default()
    }

    /// Whether calls that this record made may have been paid for, so that it must be finished where it is.
    fn may_have_paid(&self, incoming: &Incoming) -> bool {
        let first = || self.first_call_of(incoming);
        self.ledgers.as_ref().is_some_and(|ledgers| ledgers.may_have_paid(incoming, first().as_ref()))
    }

    /// Where the paid calls of a record are remembered.
    pub fn ledger_of(&self, incoming: &Incoming) -> Option<Arc<RecordLedger>> {
        self.ledgers.as_ref().map(|ledgers| ledgers.of(incoming, self.first_call_of(incoming)))
    }

    /// The first call that a record makes, by which its copies know each other: whoever wrote it may have crashed before it noted so,
    /// and written it again. Nothing where clients write, as the record itself says whose it is there; nothing of what is to be tried
    /// again, as it may come to a retry topic more than once; nothing where a step is visited more than once, as only what is read
    /// says which visit it is.
    fn first_call_of(&self, incoming: &Incoming) -> Option<CallId> {
        if self.enters(incoming)
            || self.parts.visits_max.is_some()
            || Retry::due_ms(&incoming.headers).is_some()
        {
            return None;
        }
        Some(self.first_call(&Envelope::read(&incoming.headers).ok()??))
    }

    fn first_call(&self, envelope: &Envelope) -> CallId {
        let Envelope { tenant, id, again, visit, .. } = envelope;
        CallId::new(&self.parts.cluster, tenant, id, *again, &self.parts.key, *visit, 0)
    }

    /// The same stage, leaving bodies that are too large to travel on these topics at an object store.
    pub fn with_claims(self, claims: Arc<Claims>, claimed: BTreeSet<Arc<str>>) -> Self {
        Self { claims, claimed, ..self }
    }

    /// What was written of late, where the step is the sole writer of a topic.
    pub fn once(&self) -> Option<&Arc<Once>> {
        self.once.as_ref()
    }

    /// The step's key in its pipeline.
    pub fn key(&self) -> &Arc<str> {
        &self.parts.key
    }

    /// The topic for what a tenant has beyond its share of the queue, where the queue is fair.
    pub fn overflow(&self) -> Option<&Arc<str>> {
        self.parts.overflow.as_ref()
    }

    /// What time it is, in milliseconds since 1970.
    pub fn now_ms(&self) -> i64 {
        self.parts.clock.now_ms()
    }

    /// Whose a record is, where tenants take turns; else nobody's. What a client wrote is looked at and not opened: whoever
    /// writes what is no request counts as nobody.
    pub fn tenant(&self, incoming: &Incoming) -> Bytes {
        #[derive(Deserialize)]
        struct Whose {
            tenant: Option<String>,
        }
        if self.parts.overflow.is_none() {
            return Bytes::new();
        }
        if !self.enters(incoming) {
            let tenant = incoming.headers.iter().find(|(name, _)| name == header::TENANT);
            return tenant.and_then(|(_, tenant)| tenant.clone()).unwrap_or_default();
        }
        let whose = incoming.value.as_deref().and_then(|value| serde_json::from_slice::<Whose>(value).ok());
        let tenant = whose.map(|whose| whose.tenant.unwrap_or_else(|| Tenant::default().as_str().to_owned()));
        tenant.map(Bytes::from).unwrap_or_default()
    }

    /// Whether a record may go to the overflow topic: what may have been paid for here is finished here.
    pub fn may_be_set_aside(&self, incoming: &Incoming) -> bool {
        self.parts.overflow.is_some() && !self.may_have_paid(incoming)
    }

    /// A record as it goes to the overflow topic, where no client writes: with its envelope. `None` where it cannot be read.
    pub fn set_aside(&self, incoming: &Incoming) -> Option<Outgoing> {
        let topic = self.parts.overflow.as_ref()?;
        let (source, key) = self.first(incoming);
        let mut aside = match self.enters(incoming) {
            false => copy(incoming, topic, incoming.headers.clone()),
            true => {
                let envelope = self.envelope(incoming, &*self.open(incoming).ok()?).ok()?;
                let key = Some(envelope.id.as_str().as_bytes().to_vec());
                Outgoing { key, ..copy(incoming, topic, envelope.write()) }
            }
        };
        Retry::write_first(&mut aside.headers, &source, key.as_ref());
        self.parts.meter.set_aside("overflow");
        Some(aside)
    }

    /// What is counted.
    pub fn meter(&self) -> &StepMeter {
        &self.parts.meter
    }

    /// What this record becomes. Takes as long as the operator does, retries included.
    pub async fn process(&self, incoming: &Incoming, ledger: Option<&Arc<RecordLedger>>) -> Vec<Outgoing> {
        let started = Instant::now();
        let queue_us = self.parts.clock.now_us() - incoming.timestamp_ms.saturating_mul(1000);
        let queue_us = queue_us.max(0);
        let (messages, outcome) = self.become_messages(incoming, ledger, queue_us).await;
        self.parts.meter.finished(outcome, started.elapsed(), Duration::from_micros(queue_us.unsigned_abs()));
        messages
    }

    async fn become_messages(
        &self,
        incoming: &Incoming,
        ledger: Option<&Arc<RecordLedger>>,
        queue_us: i64,
    ) -> (Vec<Outgoing>, Outcome) {
        let opened = match self.open(incoming) {
            Ok(opened) => opened,
            Err(fault) => return (self.undecodable(incoming, &*fault), Outcome::Undecodable),
        };
        let mut envelope = match self.envelope(incoming, &*opened) {
            Ok(envelope) => envelope,
            Err(fault) => return (self.undecodable(incoming, &*fault), Outcome::Undecodable),
        };
        let retry = match Retry::read(&incoming.headers).map(|retry| retry.filter(|_| !self.enters(incoming)))
        {
            Ok(retry) => retry,
            Err(fault) => return (self.undecodable(incoming, &fault), Outcome::Undecodable),
        };
        // What a sole writer writes must stay the same however late its record is delivered: its own wait is no part of it.
        if self.once.is_none() {
            envelope.timings.queue = envelope.timings.queue.saturating_add(queue_us);
        }
        // Whoever comes back to be tried again was counted when it came first.
        if let Some(visits_max) = self.parts.visits_max.filter(|_| retry.is_none()) {
            envelope.visit = envelope.visit.saturating_add(1);
            if envelope.visit > visits_max {
                let message = format!("it came to step {} more than {visits_max} times", self.parts.key);
                let (messages, outcome) =
                    self.end(incoming, &envelope, &Failure::rejected("visits_spent", message), 1, None);
                return (messages, outcome);
            }
        }
        let span = self.parts.meter.span(
            envelope.traceparent.as_deref(),
            &incoming.partition.topic,
            incoming.partition.number,
            incoming.offset,
        );
        if let Some(traceparent) = span.traceparent() {
            envelope.traceparent = Some(traceparent);
        }
        let (messages, outcome) = self.run(incoming, ledger, opened, envelope, retry).await;
        span.end(outcome);
        (messages, outcome)
    }

    /// Runs the operator until it answers, refuses or is given up.
    async fn run<'s>(
        &'s self,
        incoming: &'s Incoming,
        ledger: Option<&Arc<RecordLedger>>,
        opened: Box<dyn Opened + 's>,
        mut envelope: Envelope,
        retry: Option<Retry>,
    ) -> (Vec<Outgoing>, Outcome) {
        let mut rows = Vec::new();
        let mut opened = Some(opened);
        let mut tries: u32 = 0;
        let mut panicked = false;
        let mut since_ms = None;
        let began = Instant::now();
        if let Some(messages) = self.moved(incoming, ledger, &mut envelope, retry.as_ref()).await {
            return (messages, Outcome::SetAside);
        }
        let running = self.cancels.register(&envelope.tenant, &envelope.id);
        let failure = loop {
            if let Some(stop) = self.stopped(&envelope) {
                // Calls of a reading that crashed have cost something too.
                let earlier = ledger.filter(|_| tries == 0).map(|ledger| ledger.rows_of_all());
                rows.extend(self.spend(&mut envelope, earlier.unwrap_or_default()));
                break stop;
            }
            let attempt = match opened.take() {
                Some(opened) => opened,
                // Read again: the first reading went with the first try.
                None => match self.open(incoming) {
                    Ok(opened) => opened,
                    Err(fault) => return (self.undecodable(incoming, &*fault), Outcome::Undecodable),
                },
            };
            let cx = self.context(incoming, &envelope, ledger, running.signal());
            let started = Instant::now();
            let result = tokio::select! {
                biased;
                result = AssertUnwindSafe(attempt.run(&cx)).catch_unwind() => result,
                never = cx.send_deltas() => match never {},
            };
            // However it ended: whoever reads along has all of it before the result.
            cx.flush_deltas();
            let micros = i64::try_from(started.elapsed().as_micros()).unwrap_or(i64::MAX);
            if let Some(hop) = self.parts.step.hop() {
                envelope.timings.add(hop, micros);
            }
            let mut recorded = cx.take_rows();
            if let Some(ledger) = ledger {
                let stop = match &result {
                    Ok(Err(stop @ (Failure::Cancelled | Failure::Expired))) => Some(stop.code()),
                    _ => None,
                };
                recorded.extend(ledger.drop_calls(stop, &recorded).await);
            }
            rows.extend(self.spend(&mut envelope, recorded));
            // An outage makes a row a try: the first and the last tell of it, and memory is bounded.
            if rows.len() > ROWS_MAX {
                rows.drain(ROWS_MAX / 2..rows.len() - ROWS_MAX / 2);
            }
            tries += 1;
            match result {
                Ok(Ok(outputs)) => {
                    let outputs = outputs.into_iter().map(|output| self.route(output, &envelope)).collect();
                    return match self.new_ones(incoming, outputs) {
                        Ok(outputs) => {
                            rows.extend(outputs);
                            (rows, Outcome::Ok)
                        }
                        Err(death) => {
                            rows.extend(self.give_up(incoming, &envelope, &death));
                            (rows, Outcome::Rejected)
                        }
                    };
                }
                Ok(Err(Failure::Unavailable { outage, retry_after, what, code, source })) => {
                    // Taken back meanwhile: what is set aside hears of that late.
                    if let Some(stop) = self.stopped(&envelope) {
                        break stop;
                    }
                    since_ms.get_or_insert_with(|| self.now_ms());
                    self.parts.meter.retried();
                    let wait = match self.next_try(&envelope, retry.as_ref(), tries) {
                        _ if outage && began.elapsed() < JOB_LIFE => self.parts.patience.outage,
                        Next::Wait(wait) => wait,
                        Next::SetAside(to) => {
                            // A log that is closed takes the record no more either: it stays here.
                            if let Some(ledger) = ledger {
                                let _ = ledger.moves_to(&to.topic).await;
                            }
                            let since_ms = since_ms.unwrap_or_else(|| self.now_ms());
                            let again = self.retry(incoming, &envelope, retry, (tries, since_ms), to);
                            warn!(stage = %self.parts.key, code, %what, error = %chain(&*source), place = %incoming.place(),
                                topic = %to.topic, "could not process a record; it is set aside to be tried again");
                            rows.push(again);
                            return (rows, Outcome::SetAside);
                        }
                        Next::GiveUp => {
                            break Failure::Unavailable { outage, retry_after, what, code, source };
                        }
                    };
                    let wait = wait.max(retry_after.unwrap_or_default().min(LEFT_ALONE_MAX));
                    warn!(stage = %self.parts.key, code, %what, error = %chain(&*source), place = %incoming.place(),
                        wait_ms = wait.as_millis(), "could not process a record; will try again");
                    if outage {
                        tries -= 1;
                    }
                    self.wait(wait, &envelope, running.signal()).await;
                }
                Ok(Err(failure)) => break failure,
                // A panic is a bug. Once more alone, then the record is put aside with the panic as its reason.
                Err(panic) => {
                    let message = panic_message(&*panic);
                    error!(stage = %self.parts.key, place = %incoming.place(), panic = message, "an operator panicked");
                    if std::mem::replace(&mut panicked, true) {
                        let death = Death {
                            class: "panicked",
                            code: "panicked",
                            message,
                            attempts: tries,
                            since_ms,
                            partial: None,
                        };
                        rows.extend(self.give_up(incoming, &envelope, &death));
                        return (rows, Outcome::Panicked);
                    }
                }
            }
        };
        let (ended, outcome) = self.end(incoming, &envelope, &failure, tries, since_ms);
        rows.extend(ended);
        (rows, outcome)
    }

    /// The messages of a record that was on its way to another topic when its process crashed: it goes there again, since
    /// whoever reads it there knows by that topic's ledger whether it was paid for.
    async fn moved(
        &self,
        incoming: &Incoming,
        ledger: Option<&Arc<RecordLedger>>,
        envelope: &mut Envelope,
        retry: Option<&Retry>,
    ) -> Option<Vec<Outgoing>> {
        let ledger = ledger?;
        let to = ledger.moved_to().await?;
        let mut messages = self.spend(envelope, ledger.rows_of_all());
        messages.push(match self.parts.retries.iter().find(|retry| *retry.topic == *to) {
            Some(to) => self.retry(incoming, envelope, retry.cloned(), (0, self.now_ms()), to),
            None => {
                let key = Some(envelope.id.as_str().as_bytes().to_vec());
                Outgoing { key, ..copy(incoming, &to.into(), envelope.write()) }
            }
        });
        Some(messages)
    }

    /// When a record is tried again that met a world which failed.
    fn next_try(&self, envelope: &Envelope, retry: Option<&Retry>, tries: u32) -> Next<'_> {
        let Parts { retries, patience, .. } = &self.parts;
        let number = usize::try_from(tries - 1).unwrap_or(usize::MAX);
        if retries.is_empty() {
            return patience.waits.get(number).map_or(Next::GiveUp, |wait| Next::Wait(*wait));
        }
        let round = retry.map_or(0, |retry| usize::try_from(retry.round).unwrap_or(usize::MAX));
        let Some(upto) = retries.get(..=round.min(retries.len() - 1)) else { return Next::GiveUp };
        let Some(deadline) = envelope.deadline_at_ms.filter(|_| self.parts.step.is_job()) else {
            return retries.get(round).map_or(Next::GiveUp, Next::SetAside);
        };
        // Not beyond the deadline: sooner, or in place, but as long as somebody waits.
        let left = Duration::from_millis(u64::try_from(deadline - self.now_ms()).unwrap_or(0));
        match upto.iter().rev().find(|to| to.delay < left) {
            Some(to) => Next::SetAside(to),
            None => {
                let last = patience.waits.last().copied().unwrap_or(patience.outage);
                Next::Wait(patience.waits.get(number).copied().unwrap_or(last))
            }
        }
    }

    /// A record as it goes to a retry topic.
    fn retry(
        &self,
        incoming: &Incoming,
        envelope: &Envelope,
        before: Option<Retry>,
        (tries, since_ms): (u32, i64),
        to: &RetryTopic,
    ) -> Outgoing {
        self.parts.meter.set_aside("retry");
        let (now_ms, (source, key)) = (self.now_ms(), self.first(incoming));
        let mut retry = before.unwrap_or_else(|| Retry {
            due_ms: now_ms,
            tries: 0,
            round: 0,
            since_ms,
            source,
            key,
            redrives: 0,
        });
        retry.due_ms = now_ms.saturating_add(i64::try_from(to.delay.as_millis()).unwrap_or(i64::MAX));
        retry.tries = retry.tries.saturating_add(tries);
        retry.round = retry.round.saturating_add(1);
        let mut headers = envelope.write();
        retry.write(&mut headers);
        let key = Some(envelope.id.as_str().as_bytes().to_vec());
        Outgoing { key, ..copy(incoming, &to.topic, headers) }
    }

    /// Messages of a record whose operator said why it goes no further.
    fn end(
        &self,
        incoming: &Incoming,
        envelope: &Envelope,
        failure: &Failure,
        tries: u32,
        since_ms: Option<i64>,
    ) -> (Vec<Outgoing>, Outcome) {
        let (class, outcome, partial) = match failure {
            Failure::Expired => {
                let fault = Fault { code: "deadline".to_owned(), message: self.lateness(envelope) };
                return (self.ended(incoming, envelope, Status::Expired, fault, None), Outcome::Expired);
            }
            Failure::Cancelled => {
                let fault = Fault { code: "cancelled".to_owned(), message: failure.to_string() };
                return (self.ended(incoming, envelope, Status::Cancelled, fault, None), Outcome::Cancelled);
            }
            Failure::Rejected { partial, .. } => ("rejected", Outcome::Rejected, partial.as_deref()),
            Failure::Unavailable { .. } => ("unavailable", Outcome::Unavailable, None),
        };
        let (code, message) = (failure.code(), chain(failure));
        let death = Death { class, code, message, attempts: tries, since_ms, partial };
        (self.give_up(incoming, envelope, &death), outcome)
    }

    /// What becomes of a record whose messages a topic would not take.
    /// `bare` leaves out also what the client sent beside it.
    pub fn too_large(&self, incoming: &Incoming, topic: &str, bare: bool) -> Vec<Outgoing> {
        let message = format!(
            "what {} makes of {} is larger than topic {topic} takes; raise max.message.bytes of that topic or send less",
            self.parts.key,
            incoming.place()
        );
        error!(stage = %self.parts.key, place = %incoming.place(), topic, "a record grew larger than its topic takes");
        let death = Death {
            class: "rejected",
            code: "output_too_large",
            message,
            attempts: 1,
            since_ms: None,
            partial: None,
        };
        let mut envelope = match self.open(incoming).and_then(|opened| self.envelope(incoming, &*opened)) {
            Ok(envelope) => envelope,
            Err(_) => self.derived_envelope_of_job(incoming),
        };
        if bare {
            envelope.client.clear();
            envelope.origin.key = None;
        }
        let mut messages = self.give_up(incoming, &envelope, &death);
        // The record itself may be what is too large: then its copy stays where it lies, and the ending goes without it.
        let is_elsewhere = matches!(self.claim(incoming), Ok(Some(_)));
        for message in &mut messages {
            if message.topic == self.parts.common.dead_letters {
                if bare {
                    message.headers.retain(|(name, _)| name != dead::KEY);
                }
                if is_elsewhere {
                    continue;
                }
                message.value = None;
                let omitted = DeadLetter::omitted(incoming.len(), &incoming.source());
                message.headers.push((dead::BODY.to_owned(), Some(Bytes::from(omitted))));
            } else {
                *message = self.ending(&envelope, Status::Failed, None, fault_of(&death), None);
            }
        }
        messages
    }

    fn open(&self, incoming: &Incoming) -> Result<Box<dyn Opened + '_>, Box<dyn Error + Send + Sync>> {
        // What was set aside lies under its request's id: the key that the step read first may have been another, which names
        // what a tombstone takes away.
        let (_, key) = self.first(incoming);
        let key = key.as_deref().and_then(|key| std::str::from_utf8(key).ok());
        let open = || self.parts.step.open(key, incoming.value.as_deref());
        // Whatever the bytes are, they must not stop what lies behind them.
        match catch_unwind(AssertUnwindSafe(open)) {
            Ok(opened) => Ok(opened?),
            Err(panic) => Err(format!("reading it panicked: {}", panic_message(&*panic)).into()),
        }
    }

    /// The envelope that travels with a record: its host's, or a new one where it enters.
    fn envelope(
        &self,
        incoming: &Incoming,
        opened: &dyn Opened,
    ) -> Result<Envelope, Box<dyn Error + Send + Sync>> {
        if !self.enters(incoming)
            && let Some(envelope) = Envelope::read(&incoming.headers)?
        {
            return Ok(envelope);
        }
        let identity = opened.identity();
        self.warn_of(&identity.unknown_fields, incoming);
        let mut envelope = self.derived_envelope(incoming);
        if let Some(id) = identity.id {
            envelope.id = id;
        }
        envelope.tenant = identity.tenant.unwrap_or_default();
        envelope.stream = identity.stream;
        if incoming.channel == Channel::Backfill {
            envelope.lane = Lane::Backfill;
        }
        envelope.payload = opened.request().and_then(payload_of);
        // A deadline beyond all time is none.
        let deadline = identity.deadline_ms.and_then(|left| i64::try_from(left).ok());
        envelope.deadline_at_ms = deadline.and_then(|left| incoming.timestamp_ms.checked_add(left));
        Ok(envelope)
    }

    /// What was noted when this record was set aside, as far as it can be read.
    fn set_aside_before(&self, incoming: &Incoming) -> Option<Retry> {
        Retry::read(&incoming.headers).ok().flatten().filter(|_| !self.enters(incoming))
    }

    /// The record that the step read first, and its key: another than this where it was set aside meanwhile.
    fn first(&self, incoming: &Incoming) -> (Source, Option<Bytes>) {
        let noted = Retry::first(&incoming.headers).filter(|_| !self.enters(incoming));
        noted.unwrap_or_else(|| (incoming.source(), incoming.key.clone()))
    }

    /// Whether a record comes from a client, so that its headers are the client's.
    fn enters(&self, incoming: &Incoming) -> bool {
        self.parts.from_clients.contains(&incoming.partition.topic)
    }

    /// The envelope of a record that says nothing of itself.
    fn derived_envelope(&self, incoming: &Incoming) -> Envelope {
        let Incoming { partition, offset, timestamp_ms, .. } = incoming;
        let id = RequestId::derived(
            &self.parts.cluster,
            &partition.topic,
            partition.number,
            *offset,
            *timestamp_ms,
        );
        let key = incoming
            .key
            .as_ref()
            .map(|key| String::from_utf8_lossy(&key[..key.len().min(ORIGIN_KEY_BYTES_MAX)]).into_owned());
        let origin =
            Origin { topic: partition.topic.to_string(), partition: partition.number, offset: *offset, key };
        let headers = incoming.headers.clone();
        Envelope::entering(id, Tenant::default(), origin, *timestamp_ms, headers)
    }

    fn warn_of(&self, fields: &[String], incoming: &Incoming) {
        for field in fields {
            let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
            if warned.len() < WARNED_MAX && warned.insert(field.clone()) {
                warn!(field, place = %incoming.place(), "a request has a field that nobody reads; it is carried along");
            }
        }
    }

    fn context(
        &self,
        incoming: &Incoming,
        envelope: &Envelope,
        ledger: Option<&Arc<RecordLedger>>,
        stop: StopSignal,
    ) -> Context {
        let delivery = Delivery {
            envelope: envelope.clone(),
            recorded_at_ms: incoming.timestamp_ms,
            stage: Arc::clone(&self.parts.key),
            cluster: Arc::clone(&self.parts.cluster),
            ledger: ledger.map(|ledger| Arc::clone(ledger) as Arc<dyn Ledger>),
        };
        Context::new(delivery, self.parts.clock, Arc::clone(&self.parts.host), stop)
    }

    /// Why work on a request should not go on. An ending goes on: whoever asked must still hear of it.
    fn stopped(&self, envelope: &Envelope) -> Option<Failure> {
        if !self.parts.step.is_job() {
            return None;
        }
        if self.cancels.contains(&envelope.tenant, &envelope.id) {
            return Some(Failure::Cancelled);
        }
        let deadline = envelope.deadline_at_ms?;
        (self.parts.clock.now_ms() >= deadline).then_some(Failure::Expired)
    }

    /// The outputs without those that were written already; a death where they tell of another request under the
    /// same id.
    fn new_ones(&self, incoming: &Incoming, outputs: Vec<Outgoing>) -> Result<Vec<Outgoing>, Death<'static>> {
        let Some(once) = &self.once else { return Ok(outputs) };
        // All are judged before the first counts as written: a conflict must not leave half of them marked.
        let number = incoming.partition.number;
        let conflicts = |output: &Outgoing| once.judge(number, output) == Known::Conflicts;
        if outputs.iter().any(|output| once.covers(&output.topic) && conflicts(output)) {
            let message = "another request had this id before; give each request an id of its own".to_owned();
            return Err(Death {
                class: "rejected",
                code: "id_conflict",
                message,
                attempts: 1,
                since_ms: None,
                partial: None,
            });
        }
        let mut new = Vec::with_capacity(outputs.len());
        for output in outputs {
            if !once.covers(&output.topic) {
                new.push(output);
                continue;
            }
            match once.admit(number, &output) {
                Known::New => new.push(output),
                Known::Written | Known::Conflicts => self.parts.meter.deduplicated(),
            }
        }
        Ok(new)
    }

    fn lateness(&self, envelope: &Envelope) -> String {
        let allowed = envelope.deadline_at_ms.unwrap_or(envelope.accepted_at_ms) - envelope.accepted_at_ms;
        format!("not answered within {allowed} ms; it had come as far as step {}", self.parts.key)
    }

    /// Waits, but not beyond the deadline nor once the request is taken back.
    async fn wait(&self, wait: Duration, envelope: &Envelope, stop: StopSignal) {
        let left = envelope.deadline_at_ms.map(|deadline| deadline - self.parts.clock.now_ms());
        let left = left.map(|left| Duration::from_millis(u64::try_from(left).unwrap_or(0)));
        if !self.parts.step.is_job() {
            return tokio::time::sleep(wait).await;
        }
        // Either way the caller looks again at what to do.
        let _ = tokio::time::timeout(left.map_or(wait, |left| left.min(wait)), stop.given()).await;
    }

    /// Adds what upstream calls took to the envelope, and gives the rows about them.
    fn spend(&self, envelope: &mut Envelope, rows: Vec<Attempt>) -> Vec<Outgoing> {
        let mut messages = Vec::with_capacity(rows.len());
        for row in rows {
            envelope.attempts = envelope.attempts.saturating_add(1);
            envelope.spend = envelope.spend.plus(NanoUsd(row.cost_nano_usd.unwrap_or(0)));
            match row.encode() {
                Ok(value) => messages.push(Outgoing {
                    topic: Arc::clone(&self.parts.common.attempts),
                    key: Some(row.attempt_id.into_bytes()),
                    value,
                    headers: Headers::new(),
                }),
                Err(fault) => error!(error = %fault, "could not write a row about an upstream call"),
            }
        }
        messages
    }

    fn route(&self, output: Addressed, envelope: &Envelope) -> Outgoing {
        let key = output.key.unwrap_or_else(|| envelope.id.as_str().to_owned()).into_bytes();
        // `plan::check` has seen to it that every port has a route; an ending is the safe place for a bug.
        let topic = self.parts.routes.get(output.port).unwrap_or(&self.parts.common.endings);
        let lane = (envelope.lane == Lane::Backfill).then(|| self.parts.backfill.get(topic)).flatten();
        let topic = lane.unwrap_or(topic);
        Outgoing { topic: Arc::clone(topic), key: Some(key), value: output.body, headers: envelope.write() }
    }

    fn undecodable(&self, incoming: &Incoming, fault: &(dyn Error + 'static)) -> Vec<Outgoing> {
        warn!(stage = %self.parts.key, place = %incoming.place(), "could not read a record; it goes to dead letters");
        let death = Death {
            class: "undecodable",
            code: "undecodable",
            message: chain(fault),
            attempts: 1,
            since_ms: None,
            partial: None,
        };
        self.give_up(incoming, &self.derived_envelope_of_job(incoming), &death)
    }

    /// The envelope of a record that cannot be read: the one that its host wrote, as far as that can be read.
    fn derived_envelope_of_job(&self, incoming: &Incoming) -> Envelope {
        match Envelope::read(&incoming.headers) {
            Ok(Some(envelope)) if !self.enters(incoming) => envelope,
            _ => self.derived_envelope(incoming),
        }
    }

    /// The dead letter, and the ending where the record was somebody's request.
    fn give_up(&self, incoming: &Incoming, envelope: &Envelope, death: &Death<'_>) -> Vec<Outgoing> {
        self.parts.meter.dead_lettered(death.class);
        let mut messages = vec![self.dead_letter(incoming, envelope, death)];
        messages.extend(self.ended(incoming, envelope, Status::Failed, fault_of(death), death.partial));
        messages
    }

    /// The record as a dead letter: its bytes, its envelope, and all that is known of its end. Of a record that was set
    /// aside meanwhile, what its step read first counts, or each copy would be a letter of its own.
    fn dead_letter(&self, incoming: &Incoming, envelope: &Envelope, death: &Death<'_>) -> Outgoing {
        let Envelope { tenant, id, .. } = envelope;
        let stage = &*self.parts.key;
        let retry = self.set_aside_before(incoming);
        let (first, key) = self.first(incoming);
        let letter = DeadLetter {
            schema: self.parts.step.input().to_owned(),
            id: id.clone(),
            tenant: tenant.clone(),
            generation: envelope.generation,
            stage: stage.to_owned(),
            pipeline: self.parts.pipeline.to_string(),
            topic: first.topic,
            partition: first.partition,
            offset: first.offset,
            timestamp_ms: first.timestamp_ms,
            class: death.class.to_owned(),
            code: death.code.to_owned(),
            message: death.message.clone(),
            attempts: retry.as_ref().map_or(0, |retry| retry.tries).saturating_add(death.attempts),
            since_ms: retry
                .as_ref()
                .map(|retry| retry.since_ms)
                .or(death.since_ms)
                .unwrap_or_else(|| self.now_ms()),
            call_id: self.first_call(envelope).as_str().to_owned(),
            deadline_at_ms: envelope.deadline_at_ms,
            paid_nano_usd: envelope.spend,
            redrives: retry.as_ref().map_or(0, |retry| retry.redrives),
            body: None,
        };
        let mut headers = envelope.write();
        headers.extend(letter.write(key.as_ref()));
        let mut value = incoming.value.as_ref().map(|value| value.to_vec());
        if let Ok(Some(claim)) = self.claim(incoming) {
            headers.push(claim.header());
            value = Some(Vec::new());
        }
        Outgoing {
            topic: Arc::clone(&self.parts.common.dead_letters),
            key: Some(letter.message_key().into_bytes()),
            value,
            headers,
        }
    }

    /// The ending of a request that goes no further, with what was read of its answer; nothing for a record that is no request.
    fn ended(
        &self,
        incoming: &Incoming,
        envelope: &Envelope,
        status: Status,
        fault: Fault,
        partial: Option<&Generated>,
    ) -> Vec<Outgoing> {
        if !self.parts.step.is_job() {
            return Vec::new();
        }
        let request = self.open(incoming).ok().and_then(|opened| opened.request().cloned());
        vec![self.ending(envelope, status, request, fault, partial)]
    }

    fn ending(
        &self,
        envelope: &Envelope,
        status: Status,
        request: Option<Request>,
        fault: Fault,
        partial: Option<&Generated>,
    ) -> Outgoing {
        let ending = Ending::without_answer(status, &*self.parts.key, request, fault);
        let ending = Ending { answer: partial.cloned(), ..ending };
        let value = ending.encode().unwrap_or_else(|fault| {
            error!(error = %fault, "could not write an ending");
            None
        });
        Outgoing {
            topic: Arc::clone(&self.parts.common.endings),
            key: Some(envelope.id.as_str().as_bytes().to_vec()),
            value,
            headers: envelope.write(),
        }
    }
}

/// When a record is tried again.
enum Next<'s> {
    /// In place, after a wait.
    Wait(Duration),
    /// When its turn on this topic comes.
    SetAside(&'s RetryTopic),
    /// No more.
    GiveUp,
}

/// A record on another topic, under other headers.
fn copy(incoming: &Incoming, topic: &Arc<str>, headers: Headers) -> Outgoing {
    Outgoing {
        topic: Arc::clone(topic),
        key: incoming.key.as_ref().map(|key| key.to_vec()),
        value: incoming.value.as_ref().map(|value| value.to_vec()),
        headers,
    }
}

fn fault_of(death: &Death<'_>) -> Fault {
    Fault { code: death.code.to_owned(), message: DeadLetter::cut(&death.message).to_owned() }
}

/// A hash of what is asked: the same however the client wrote its JSON.
fn payload_of(request: &Request) -> Option<String> {
    let bytes = request.encode().ok()??;
    Some(blake3::hash(&bytes).to_hex()[..16].to_owned())
}

/// An error with its causes, as one line.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("without a message").to_owned()
}
