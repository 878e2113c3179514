//! `forebay dlq redrive`: gives dead letters to their steps once more.
//!
//! A copy goes out, is acknowledged, and then a note beside its letter says so; a letter with such a note is passed
//! over. Between the two a crash, or a second run beside the first, may send a copy twice. Both copies are the same:
//! same id, and a generation that is the letter's plus one, so `publish` writes one result.
//!
//! Invariant: no note without an acknowledged copy.

use super::{blocking, length, line, open, say_unreadable};
use crate::{
    args::{DlqRedrive, PipelineArg},
    build,
    config::Config,
    console::{out, say, wrong},
    letters::{self, Filter, Letter},
    scan::{self, Reader, Stretch},
};
use anyhow::Context as _;
use forebay_operator::Clock;
use forebay_plan::{Plan, PlannedStep};
use forebay_runtime::{
    claims::Claims,
    host::kafka::{Kafka, LogContext, headers},
};
use forebay_schemas::{
    Claim, DeadLetter, Envelope, Headers, Origin, Retry, Source, Tenant,
    dead_letter::{Redriven, original_key},
};
use rdkafka::{
    Message as _,
    error::KafkaError,
    message::{Header, OwnedHeaders},
    producer::{FutureProducer, FutureRecord, future_producer::Delivery},
    types::RDKafkaErrorCode,
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::ControlFlow,
    process::ExitCode,
    sync::Arc,
};
use tokio::{runtime::Handle, sync::mpsc, task::JoinSet};

/// Copies that are on their way at a time. Each may be as large as its topic takes.
const ON_THEIR_WAY_MAX: usize = 16;

/// Copies that wait to be sent.
const WAITING_MAX: usize = 4;

/// How many keys of a partition of an ordered topic are looked through at most.
const KEYS_MAX: usize = 1_000_000;

/// The code of a record whose answer broke off after somebody had read its beginning.
const CUT: &str = "model_cut";

/// How long a copy may take to be acknowledged.
const SENT_WITHIN_MS: &str = "30000";

/// Sends them.
pub async fn run(args: DlqRedrive, config: Config) -> anyhow::Result<ExitCode> {
    let filter = Filter::new(&args.filter, args.letters.clone());
    let DlqRedrive { limit, all, dry_run, .. } = args;
    let chosen = filter.stage.is_some() || filter.error.is_some() || filter.tenant.is_some();
    if !(chosen || !args.letters.is_empty() || args.filter.since.is_some() || limit.is_some() || all) {
        return Err(wrong(
            "say which dead letters: by key or id, --stage, --error, --tenant, --since or --limit, or --all",
        ));
    }
    let plan = build::plan(&PipelineArg { pipeline: args.filter.pipeline.clone() })?;
    if let Some(stage) = &filter.stage {
        plan.step(stage).map_err(wrong)?;
    }
    let (kafka, topic) = open(&config).await?;
    let now_ms = Clock::System.now_ms();
    let since_ms = letters::since_ms(args.filter.since, Clock::System);
    let judge = Judge {
        plan,
        prefix: config.topic_prefix.clone(),
        topics: crate::commands::topics::there(&kafka).await?,
        again: args.again,
        reset_deadline: args.reset_deadline,
        now_ms,
        bodies: Bodies { claims: build::claims(&config).await?, runtime: Handle::current() },
        dry_run,
        sources: Sources { reader: scan::reader(&kafka)?, latest: HashMap::new() },
    };
    let (judged_in, judged) = mpsc::channel(WAITING_MAX);
    let name = topic.clone();
    let reading = blocking(&kafka, move |reader| {
        let mut judge = judge;
        letters::each(&reader, &name, since_ms, |letter| {
            if !filter.wants(&letter) {
                return Ok(ControlFlow::Continue(()));
            }
            let judged = judge.judge(letter)?;
            // Nobody takes it where enough were sent, or where sending failed.
            let taken = judged_in.blocking_send(judged).is_ok();
            Ok(if taken { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        })
    });
    let writer = Writer::new(&kafka, topic.clone())?;
    let told = Told { missing: args.letters.into_iter().collect(), ..Told::default() };
    let writing = write(writer, judged, limit.unwrap_or(u64::MAX), dry_run, told);
    let (told, unreadable) = tokio::join!(writing, reading);
    let told = told?;
    say_unreadable(&topic, unreadable?);
    for name in &told.missing {
        say(format_args!("forebay: no dead letter has the key or the id {name:?}"));
    }
    out(told.sum(dry_run));
    Ok(if told.refused == 0 && told.missing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Where bodies lie that are too large to travel, for a thread that may block.
struct Bodies {
    claims: Arc<Claims>,
    runtime: Handle,
}

impl Bodies {
    /// The claim of a copy: to the same body, put anew, so that it is kept as long as any. On a dry run the one that is there.
    fn claim(&self, said: &Claim, tenant: &Tenant, put_ms: Option<i64>) -> Result<Claim, String> {
        let text = |fault: anyhow::Error| format!("its body is not to be had: {fault:#}");
        let body = self.runtime.block_on(self.claims.get(said)).map_err(|fault| text(fault.into()))?;
        let Some(now_ms) = put_ms else { return Ok(said.clone()) };
        let put = self.claims.put(tenant.as_str().as_bytes(), body, now_ms);
        self.runtime.block_on(put).map_err(|fault| text(fault.into()))
    }
}

/// What is to be done about a letter.
struct Judged {
    /// The letter's key.
    key: String,
    /// The request's id.
    id: String,
    what: What,
}

enum What {
    Send(Box<Copy>),
    /// It was redriven before.
    Before,
    /// A record with its key came after it, which it must not replace.
    Superseded(Source),
    /// Why it cannot be redriven.
    Refuse(String),
}

/// A record as its step is to see it once more.
struct Copy {
    way: Way,
    value: Option<Vec<u8>>,
    redrives: u32,
    /// The partition of the letter, where the note must go too.
    letter_partition: i32,
}

/// Where a copy goes, and what goes with it.
struct Way {
    topic: String,
    /// By its key where it does not say.
    partition: Option<i32>,
    key: Option<Vec<u8>>,
    headers: Headers,
    /// What the headers say of it; 0 where its step will make it an envelope anew.
    generation: u32,
}

/// Says what is to be done about each letter.
struct Judge {
    plan: Plan,
    prefix: String,
    /// Full name → number of partitions, of all topics.
    topics: BTreeMap<String, i32>,
    again: bool,
    reset_deadline: bool,
    now_ms: i64,
    bodies: Bodies,
    dry_run: bool,
    sources: Sources,
}

impl Judge {
    fn judge(&mut self, letter: Letter) -> anyhow::Result<Judged> {
        let (key, id) = (letter.key.clone(), letter.letter.id.as_str().to_owned());
        Ok(Judged { key, id, what: self.what(letter)? })
    }

    fn what(&mut self, letter: Letter) -> anyhow::Result<What> {
        let Letter { letter: said, partition, headers, value, redriven, .. } = letter;
        if redriven.is_some() {
            return Ok(What::Before);
        }
        if !said.pipeline.is_empty() && said.pipeline != self.plan.name {
            return Ok(What::Refuse(format!(
                "it is of pipeline {:?}; name that by --pipeline",
                said.pipeline
            )));
        }
        let step = match self.plan.step(&said.stage) {
            Ok(step) => step.clone(),
            Err(unknown) => return Ok(What::Refuse(unknown.to_string())),
        };
        let mut envelope = envelope(&said, &headers);
        if let Some(fault) = self.past_deadline(&step, &mut envelope) {
            return Ok(What::Refuse(fault));
        }
        let mut original = Original { key: original_key(&headers).map(Into::into), value };
        if let Some(omitted) = &said.body {
            let Some((read, client)) = self.sources.original(&said)? else {
                return Ok(What::Refuse(format!(
                    "its body was too large to copy ({omitted}), and is not there any more"
                )));
            };
            (original, envelope.client) = (read, client);
        }
        envelope.generation = envelope.generation.saturating_add(1);
        // Of an answer that was cut the ledger keeps what was read, which is not what anybody redrives it for.
        let again = self.again || said.code == CUT;
        envelope.again = envelope.again.saturating_add(u32::from(again));
        let claim = match Claim::read(&headers) {
            Ok(None) => None,
            Ok(Some(said)) => {
                match self.bodies.claim(&said, &envelope.tenant, (!self.dry_run).then_some(self.now_ms)) {
                    Ok(claim) => Some(claim),
                    Err(reason) => return Ok(What::Refuse(reason)),
                }
            }
            Err(fault) => return Ok(What::Refuse(fault.to_string())),
        };
        let mut way = match step.retries().into_iter().next() {
            Some((retry, _)) => self.by_retry(&said, original.key, &envelope, &retry),
            None => self.by_source(&said, original.key, &envelope, &step)?,
        };
        if let (Ok(way), Some(claim)) = (&mut way, claim) {
            way.headers.push(claim.header());
        }
        let redrives = said.redrives.saturating_add(1);
        let copy = |way| Copy { way, value: original.value, redrives, letter_partition: partition };
        Ok(way.map_or_else(|what| what, |way| What::Send(Box::new(copy(way)))))
    }

    /// Why it would only expire; nothing where it has time, or is given some.
    fn past_deadline(&self, step: &PlannedStep, envelope: &mut Envelope) -> Option<String> {
        let deadline = envelope.deadline_at_ms.filter(|_| step.is_job)?;
        // Longer than at first where it was reset before: of that only the deadline is left.
        let allowed = deadline.saturating_sub(envelope.accepted_at_ms).max(0);
        if self.reset_deadline {
            envelope.deadline_at_ms = Some(self.now_ms.saturating_add(allowed));
            return None;
        }
        let late = self.now_ms.saturating_sub(deadline);
        (late >= 0).then(|| {
            format!(
                "its deadline passed {} ago; --reset-deadline gives it its {} from now on",
                length(late),
                length(allowed)
            )
        })
    }

    /// To the step's own retry topic, where it is due at once. What lies there is trusted.
    fn by_retry(
        &self,
        said: &DeadLetter,
        key: Option<Vec<u8>>,
        envelope: &Envelope,
        retry: &str,
    ) -> Result<Way, What> {
        let topic = format!("{}{retry}", self.prefix);
        if !self.topics.contains_key(&topic) {
            return Err(What::Refuse(format!("topic {topic} is not there; `forebay topics apply` makes it")));
        }
        let mut headers = envelope.write();
        let retry = Retry {
            due_ms: self.now_ms,
            tries: 0,
            round: 0,
            since_ms: said.since_ms,
            source: said.source(),
            key: key.map(Into::into),
            redrives: said.redrives.saturating_add(1),
        };
        retry.write(&mut headers);
        // By the request's id, so that it meets all else of its request at one partition number.
        let key = Some(envelope.id.as_str().into());
        Ok(Way { topic, partition: None, key, headers, generation: envelope.generation })
    }

    /// To where it came from: its step works off the records of a key in order, so it must not come before one that
    /// lies there already, and must not replace a younger one.
    fn by_source(
        &mut self,
        said: &DeadLetter,
        key: Option<Vec<u8>>,
        envelope: &Envelope,
        step: &PlannedStep,
    ) -> anyhow::Result<Result<Way, What>> {
        let name = said.topic.strip_prefix(&self.prefix);
        let read = name.filter(|name| step.inputs().iter().any(|input| input.topic == *name));
        let (Some(name), true) = (read, self.topics.contains_key(&said.topic)) else {
            return Ok(Err(What::Refuse(format!("step {} reads {} no more", step.key, said.topic))));
        };
        let enters = self.plan.topics().iter().any(|topic| topic.name == name && topic.from_clients);
        if enters && step.is_job {
            return Ok(Err(What::Refuse(format!(
                "step {} keeps the order of what clients write; write the request anew, under an id of its own",
                step.key
            ))));
        }
        if let Some(key) = &key
            && let Some(later) = self.sources.later(said, key)?
        {
            return Ok(Err(What::Superseded(later)));
        }
        let (headers, generation) = match enters {
            true => (envelope.client.clone(), 0),
            false => (envelope.write(), envelope.generation),
        };
        let (topic, partition) = (said.topic.clone(), Some(said.partition));
        Ok(Ok(Way { topic, partition, key, headers, generation }))
    }
}

/// The envelope of the record; one that says the same of it where the letter carries none.
fn envelope(said: &DeadLetter, headers: &Headers) -> Envelope {
    let carried = Envelope::read(headers).ok().flatten();
    carried.filter(|envelope| envelope.id == said.id && envelope.tenant == said.tenant).unwrap_or_else(|| {
        let origin =
            Origin { topic: said.topic.clone(), partition: said.partition, offset: said.offset, key: None };
        Envelope {
            generation: said.generation,
            deadline_at_ms: said.deadline_at_ms,
            spend: said.paid_nano_usd,
            ..Envelope::entering(
                said.id.clone(),
                said.tenant.clone(),
                origin,
                said.timestamp_ms,
                headers.clone(),
            )
        }
    })
}

/// A record as it lay where it died.
struct Original {
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
}

/// The topics that dead letters came from.
struct Sources {
    reader: Reader,
    /// Of partitions that were looked through: the last offset of each key.
    latest: HashMap<(String, i32), HashMap<Vec<u8>, i64>>,
}

impl Sources {
    /// The original of a letter without a body, with its client's headers, if it lies there still.
    fn original(&self, said: &DeadLetter) -> anyhow::Result<Option<(Original, Headers)>> {
        let Some(at) = said.body_at() else { return Ok(None) };
        let stretch = Stretch { partition: at.partition, from: at.offset, end: at.offset + 1 };
        let ends = crate::offsets::ends(&self.reader, &at.topic)?;
        if ends.get(&at.partition).is_none_or(|(low, end)| at.offset < *low || at.offset >= *end) {
            return Ok(None);
        }
        let mut found = None;
        let _ = scan::visit(&self.reader, &at.topic, stretch, |message| {
            // A topic that was made anew has other records at the same offsets.
            if message.timestamp().to_millis() == Some(at.timestamp_ms) {
                let (key, value) = (message.key().map(<[u8]>::to_vec), message.payload().map(<[u8]>::to_vec));
                found = Some((Original { key, value }, headers(message)));
            }
            Ok(ControlFlow::Break(()))
        })?;
        Ok(found.map(|(original, headers)| {
            let retry = Retry::read(&headers).ok().flatten();
            let key = retry.map_or(original.key, |retry| retry.key.map(Into::into));
            let entered =
                Envelope::entering(said.id.clone(), said.tenant.clone(), Origin::default(), 0, headers);
            (Original { key, ..original }, entered.client)
        }))
    }

    /// A record of the same key that came after the original. What a client writes in this very moment is not seen.
    fn later(&mut self, said: &DeadLetter, key: &[u8]) -> anyhow::Result<Option<Source>> {
        let place = (said.topic.clone(), said.partition);
        if !self.latest.contains_key(&place) {
            let latest = self.look_through(&place)?;
            self.latest.insert(place.clone(), latest);
        }
        let latest = self.latest.get(&place).and_then(|keys| keys.get(key)).copied();
        let later = |offset| Source { offset, ..said.source() };
        Ok(latest.filter(|offset| *offset > said.offset).map(later))
    }

    fn look_through(&self, (topic, partition): &(String, i32)) -> anyhow::Result<HashMap<Vec<u8>, i64>> {
        let mut latest = HashMap::new();
        let stretches = scan::stretches(&self.reader, topic, None)?;
        let Some(stretch) = stretches.into_iter().find(|stretch| stretch.partition == *partition) else {
            return Ok(latest);
        };
        let _ = scan::visit(&self.reader, topic, stretch, |message| {
            if let Some(key) = message.key() {
                latest.insert(key.to_vec(), message.offset());
            }
            anyhow::ensure!(
                latest.len() <= KEYS_MAX,
                "{topic}/{partition} has more than {KEYS_MAX} keys; write the records anew instead of redriving them"
            );
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(latest)
    }
}

/// Sends copies and notes.
#[derive(Clone)]
struct Writer {
    producer: FutureProducer<LogContext>,
    letters: Arc<str>,
}

impl Writer {
    fn new(kafka: &Kafka, letters: String) -> anyhow::Result<Self> {
        let mut config = kafka.producer_config_in_turn();
        config.set("message.timeout.ms", SENT_WITHIN_MS);
        Ok(Self { producer: config.create_with_context(LogContext)?, letters: letters.into() })
    }

    /// Sends a copy, then notes it. The reason where the topic does not take a record of this size.
    async fn redrive(self, key: String, copy: Copy) -> anyhow::Result<(String, Result<Redriven, String>)> {
        let Copy { way, value, redrives, letter_partition } = copy;
        let topic = &way.topic;
        let to = match self.send(&way, value.as_deref()).await {
            Ok(to) => to,
            Err(fault) if fault.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageSizeTooLarge) => {
                let bytes = value.as_ref().map_or(0, Vec::len);
                let reason =
                    format!("topic {topic} takes no record of {bytes} bytes; raise its max.message.bytes");
                return Ok((key, Err(reason)));
            }
            Err(fault) => {
                return Err(fault).with_context(|| format!("could not redrive {key} to topic {topic}"));
            }
        };
        let redriven = Redriven { to, generation: way.generation, redrives };
        let note = Way {
            topic: self.letters.to_string(),
            partition: Some(letter_partition),
            key: Some(key.clone().into_bytes()),
            headers: redriven.write(),
            generation: way.generation,
        };
        self.send(&note, None).await.with_context(|| {
            format!("could not note on topic {} that {key} was redriven to {}", self.letters, redriven.to)
        })?;
        Ok((key, Ok(redriven)))
    }

    async fn send(&self, way: &Way, value: Option<&[u8]>) -> Result<Source, KafkaError> {
        let Way { topic, partition, key, headers, .. } = way;
        let mut owned = OwnedHeaders::new_with_capacity(headers.len());
        for (name, value) in headers {
            owned = owned.insert(Header { key: name, value: value.as_deref() });
        }
        let mut record = FutureRecord::<[u8], [u8]>::to(topic).headers(owned);
        (record.partition, record.key, record.payload) = (*partition, key.as_deref(), value);
        let delivery = self.producer.send_result(record).map_err(|(fault, _)| fault)?;
        let delivered = delivery.await.map_err(|_| KafkaError::Canceled)?;
        let Delivery { partition, offset, timestamp } = delivered.map_err(|(fault, _)| fault)?;
        let timestamp_ms = timestamp.to_millis().unwrap_or_default();
        Ok(Source { topic: topic.to_owned(), partition, offset, timestamp_ms })
    }
}

/// What became of the letters.
#[derive(Default)]
struct Told {
    sent: u64,
    before: u64,
    superseded: u64,
    refused: u64,
    /// Keys and ids that were asked for and not met.
    missing: BTreeSet<String>,
}

impl Told {
    fn refuse(&mut self, key: &str, reason: &str) {
        self.refused += 1;
        say(format_args!("forebay: could not redrive {}: {}", line(key), line(reason)));
    }

    fn sum(&self, dry_run: bool) -> String {
        let Self { sent, before, superseded, refused, .. } = self;
        let verb = if dry_run { "would be redriven" } else { "redriven" };
        let parts = [(before, "redriven before"), (superseded, "superseded"), (refused, "not redriven")];
        let parts =
            parts.iter().filter(|(count, _)| **count > 0).map(|(count, what)| format!("; {count} {what}"));
        format!("{sent} {verb}{}", parts.collect::<String>())
    }
}

/// Sends what is to be sent, at most so many, and tells of each.
async fn write(
    writer: Writer,
    mut judged: mpsc::Receiver<Judged>,
    limit: u64,
    dry_run: bool,
    mut told: Told,
) -> anyhow::Result<Told> {
    let mut sending = JoinSet::new();
    let mut left = limit;
    while left > 0
        && let Some(Judged { key, id, what }) = judged.recv().await
    {
        match what {
            What::Before => told.before += 1,
            What::Superseded(later) => {
                told.superseded += 1;
                say(format_args!("forebay: {} is superseded by {later}, and left alone", line(&key)));
            }
            What::Refuse(reason) => told.refuse(&key, &reason),
            What::Send(copy) if dry_run => {
                left -= 1;
                told.sent += 1;
                out(format_args!("{} → {}  generation {}", line(&key), copy.way.topic, copy.way.generation));
            }
            What::Send(copy) => {
                left -= 1;
                sending.spawn(writer.clone().redrive(key.clone(), *copy));
            }
        }
        told.missing.remove(&key);
        told.missing.remove(&id);
        while sending.len() >= ON_THEIR_WAY_MAX {
            tell(&mut sending, &mut told).await?;
        }
    }
    if left == 0 {
        // What was not looked for any more cannot be called missing.
        told.missing.clear();
    }
    // The reader stops at the next letter that it finds.
    drop(judged);
    while !sending.is_empty() {
        tell(&mut sending, &mut told).await?;
    }
    Ok(told)
}

/// Waits for a copy and its note, and tells of them.
async fn tell(
    sending: &mut JoinSet<anyhow::Result<(String, Result<Redriven, String>)>>,
    told: &mut Told,
) -> anyhow::Result<()> {
    let Some(sent) = sending.join_next().await else { return Ok(()) };
    match sent?? {
        (key, Ok(Redriven { to, generation, .. })) => {
            told.sent += 1;
            out(format_args!("{} → {to}  generation {generation}", line(&key)));
        }
        (key, Err(reason)) => told.refuse(&key, &reason),
    }
    Ok(())
}
