//! A log in memory with stages whose operators do as a test says.

use bytes::Bytes;
use forebay_operator::{
    Addressed, Change, Clock, Context, Failure, Host, Opened, Port, Quiet, Step, Table as _,
};
use forebay_plan::Channel;
use forebay_runtime::{
    ahead::Ahead,
    cancels::{Cancels, CancelsTable},
    claims::{Claims, Objects, ObjectsError},
    drive::{DriveError, Limits, SendError, Sink, drive},
    host::memory::{MemoryAhead, MemoryLog, MemoryObjects, MemorySource, Sentinel, Stored},
    ledger::{
        self, LeaseClock, Ledgers, Log,
        book::{AMBIGUOUS_MAX, Terms},
    },
    message::{Input, Outgoing},
    once::Once,
    stage::{CommonTopics, Parts, Patience, RetryTopic, Stage},
};
use forebay_schemas::{
    DecodeError, Ending, Envelope, Headers, Hop, Identity, Origin, Record, Request, RequestId, Tenant,
    dead_letter::header as dead,
};
use forebay_telemetry::{Health, Settings, Telemetry};
use futures::future::BoxFuture;
use std::{
    collections::{BTreeMap, BTreeSet},
    pin::Pin,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    task::{self, Poll},
    time::Duration,
};
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

pub const NOW_MS: i64 = 1_700_000_000_000;

/// What an operator does with one record.
pub type Script = dyn Fn(Run) -> BoxFuture<'static, Result<Vec<Addressed>, Failure>> + Send + Sync;

/// One run of an operator.
#[derive(Clone, Debug)]
pub struct Run {
    /// The record.
    pub body: String,
    /// How often this record was run before.
    pub before: u32,
}

/// Wraps a closure as a script.
pub fn script<F>(run: impl Fn(Run) -> F + Send + Sync + 'static) -> Arc<Script>
where
    F: Future<Output = Result<Vec<Addressed>, Failure>> + Send + 'static,
{
    Arc::new(move |with| Box::pin(run(with)))
}

/// The record goes on as it came.
pub fn on(run: &Run) -> Addressed {
    on_text(&run.body)
}

/// A text goes on.
pub fn on_text(text: &str) -> Addressed {
    Addressed { port: "out", key: None, body: Some(text.as_bytes().to_vec()) }
}

/// An operator that does as it is told.
struct Scripted {
    is_job: bool,
    runs: Mutex<BTreeMap<String, u32>>,
    script: Arc<Script>,
}

impl Step for Scripted {
    fn operator(&self) -> &'static str {
        "scripted"
    }
    fn hop(&self) -> Option<Hop> {
        None
    }
    fn input(&self) -> &'static str {
        "Text"
    }
    fn is_job(&self) -> bool {
        self.is_job
    }
    fn ports(&self) -> &'static [Port] {
        &[Port { name: "out", record: "Text" }]
    }
    fn open(&self, key: Option<&str>, body: Option<&[u8]>) -> Result<Box<dyn Opened + '_>, DecodeError> {
        let body = body.map(|body| String::from_utf8(body.to_vec()));
        match (key, body) {
            (_, Some(Ok(body))) if body.contains("unopenable") => panic!("no bytes like these"),
            (_, Some(Ok(body))) => Ok(Box::new(Read { step: self, body })),
            (Some(key), None) => Ok(Box::new(Read { step: self, body: key.to_owned() })),
            _ => Err(DecodeError::Meaning { record: "Text", fault: "it is no text" }),
        }
    }
}

/// A text, or of a tombstone its key: an id, and where it has a second word, the milliseconds that it has until its deadline.
struct Read<'s> {
    step: &'s Scripted,
    body: String,
}

impl Opened for Read<'_> {
    fn identity(&self) -> Identity {
        let mut words = self.body.split(' ');
        let id = words.next().and_then(|id| RequestId::try_from(id.to_owned()).ok());
        Identity { id, deadline_ms: words.next().and_then(|word| word.parse().ok()), ..Identity::default() }
    }
    fn request(&self) -> Option<&Request> {
        None
    }
    fn run<'a>(self: Box<Self>, _: &'a Context) -> BoxFuture<'a, Result<Vec<Addressed>, Failure>>
    where
        Self: 'a,
    {
        let before = {
            let mut runs = self.step.runs.lock().unwrap();
            let runs = runs.entry(self.body.clone()).or_default();
            *runs += 1;
            *runs - 1
        };
        let Self { step, body } = *self;
        (step.script)(Run { body, before })
    }
}

/// A stage of a test. `requests` is what clients write to, in every test.
#[derive(Clone)]
pub struct Spec {
    pub key: &'static str,
    pub from: Vec<&'static str>,
    pub to: &'static str,
    /// The retry topics, which it reads too, with their delays in seconds; none are needed.
    pub retries: Vec<(&'static str, u64)>,
    /// Whether it reads `overflow`, and its queue is fair.
    pub fair: bool,
    pub is_job: bool,
    pub visits_max: Option<u32>,
    pub limits: Limits,
    pub patience: Patience,
    /// Where bodies lie that are too large for a topic that is not `end`, where there is such a place.
    pub claims: Option<Arc<Claims>>,
    pub script: Arc<Script>,
    /// Another operator than one that does as the script says.
    pub step: Option<Arc<dyn Step>>,
    /// Another host than one that does nothing.
    pub host: Option<Arc<dyn Host>>,
    /// Where its paid calls are remembered.
    pub ledger: Option<Arc<dyn Log>>,
    /// How many ambiguous tries are followed by another.
    pub ambiguous_max: usize,
    /// Another way to read on than in the world's log.
    pub ahead: Option<Arc<dyn Ahead>>,
    /// Whether it is the sole writer of `out`.
    pub once: bool,
}

impl Spec {
    pub fn new(script: Arc<Script>) -> Self {
        Self {
            key: "step",
            from: vec!["requests"],
            to: "out",
            retries: Vec::new(),
            fair: false,
            is_job: true,
            visits_max: None,
            limits: Limits::new(64),
            patience: Patience::default(),
            claims: None,
            script,
            step: None,
            host: None,
            ledger: None,
            ambiguous_max: AMBIGUOUS_MAX,
            ahead: None,
            once: false,
        }
    }
}

/// A member that a test may let crash at any await point of its loop: after it was polled so often.
struct Fragile<F> {
    loop_: Pin<Box<F>>,
    polls_left: Arc<AtomicU32>,
}

impl<F: Future<Output = Result<(), DriveError>>> Future for Fragile<F> {
    type Output = Result<(), DriveError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Self::Output> {
        let left = self.polls_left.load(Ordering::SeqCst);
        if left == 0 {
            return Poll::Ready(Ok(()));
        }
        if left != u32::MAX {
            self.polls_left.store(left - 1, Ordering::SeqCst);
        }
        self.loop_.as_mut().poll(cx)
    }
}

/// A member at work.
pub struct Member {
    polls_left: Arc<AtomicU32>,
    sentinels: mpsc::UnboundedSender<Sentinel>,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), DriveError>>,
}

impl Member {
    /// Its partition of a topic is drained, taken away, and given back.
    pub fn rebalance(&self, topic: &str) {
        self.sentinels.send(Sentinel::Rebalance(topic.into())).unwrap();
    }
    /// Its partition of a topic is gone and comes back.
    pub fn lose(&self, topic: &str) {
        self.sentinels.send(Sentinel::Lose(topic.into())).unwrap();
    }
    /// SIGTERM.
    pub async fn stop(self) -> Result<(), DriveError> {
        self.shutdown.cancel();
        self.task.await.expect("a member panicked")
    }
    /// SIGKILL.
    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
    /// SIGKILL after its loop was polled so often; at once where it does nothing more.
    pub async fn crash_after(self, polls: u32) {
        self.polls_left.store(polls, Ordering::SeqCst);
        let mut task = self.task;
        if timeout(Duration::from_millis(300), &mut task).await.is_err() {
            task.abort();
            let _ = task.await;
        }
    }
    /// Waits for an end that nobody asked for.
    pub async fn ended(self) -> Result<(), DriveError> {
        self.task.await.expect("a member panicked")
    }
}

/// A log with all that stages need beside it.
#[derive(Clone)]
pub struct World {
    pub log: Arc<MemoryLog>,
    pub clock: Clock,
    pub cancels: Arc<Cancels>,
}

impl World {
    pub fn new() -> Self {
        let clock = Clock::starting_at(NOW_MS);
        Self { log: MemoryLog::new(clock, 1_000), clock, cancels: Arc::default() }
    }

    /// A client takes its request back, and every process has read that.
    pub async fn cancel(&self, id: &str) {
        let value = Some(format!(r#"{{"id": "{id}"}}"#).into());
        let change = Change { partition: 0, offset: 0, key: String::new(), value };
        let refused = CancelsTable(Arc::clone(&self.cancels)).apply(vec![change]).await.unwrap();
        assert!(refused.is_empty());
    }

    /// A client writes a text, under a key where it has one.
    pub fn write(&self, topic: &str, key: Option<&str>, body: &str) -> i64 {
        self.write_bytes(topic, key, body.as_bytes(), Headers::new())
    }

    pub fn write_bytes(&self, topic: &str, key: Option<&str>, body: &[u8], headers: Headers) -> i64 {
        let key = key.map(|key| key.to_owned().into());
        self.log.append(&topic.into(), key, Some(body.to_vec().into()), headers)
    }

    /// Reads on for a stage.
    pub fn ahead(&self, spec: &Spec) -> MemoryAhead {
        MemoryAhead { log: Arc::clone(&self.log), inputs: inputs(spec) }
    }

    /// A member of the stage's group, over the log.
    pub fn join(&self, spec: &Spec) -> Member {
        self.join_over(spec, Arc::clone(&self.log) as Arc<dyn Sink>)
    }

    /// The same, writing through another sink.
    pub fn join_over(&self, spec: &Spec, sink: Arc<dyn Sink>) -> Member {
        let scripted =
            Scripted { is_job: spec.is_job, runs: Mutex::default(), script: Arc::clone(&spec.script) };
        let step = spec.step.clone().unwrap_or_else(|| Arc::new(scripted));
        let meter = telemetry().step(spec.key, "scripted");
        let stage = Stage::new(Parts {
            key: spec.key.into(),
            pipeline: "test".into(),
            step,
            routes: BTreeMap::from([("out".to_owned(), spec.to.into())]),
            from_clients: ["requests".into(), "requests-backfill".into()].into(),
            backfill: BTreeMap::from([("out".into(), "out-backfill".into())]),
            retries: spec.retries.iter().map(retry_topic).collect(),
            overflow: spec.fair.then(|| "overflow".into()),
            visits_max: spec.visits_max,
            common: CommonTopics {
                endings: "endings".into(),
                dead_letters: "dead-letters".into(),
                attempts: "attempts".into(),
            },
            cluster: "memory".into(),
            clock: self.clock,
            host: spec.host.clone().unwrap_or_else(|| Arc::new(Quiet)),
            patience: spec.patience.clone(),
            meter: meter.clone(),
        });
        let ledgers = spec.ledger.iter().map(|log| {
            Arc::new(Ledgers::new(ledger::Parts {
                log: Arc::clone(log),
                topics: inputs(spec)
                    .into_iter()
                    .map(|input| (input.topic.clone(), format!("ledger.step.{}", input.topic).into()))
                    .collect(),
                ambiguous_max: spec.ambiguous_max,
                finished_max: 1_000,
                config: "c".to_owned(),
                terms: Terms::default(),
                lease_clock: LeaseClock::Virtual(tokio::time::Instant::now()),
                clock: self.clock,
                meter: meter.clone(),
                health: Health::new(),
                name: "ledger".to_owned(),
            }))
        });
        let ahead = spec.ahead.clone().unwrap_or_else(|| Arc::new(self.ahead(spec)));
        let stage = stage.with_cancels(Arc::clone(&self.cancels)).with_ahead(ahead);
        let stage = ledgers.into_iter().fold(stage, Stage::with_ledgers);
        let stage =
            if spec.once { stage.with_once(Arc::new(Once::new(vec![spec.to.into()]))) } else { stage };
        let stage = Arc::new(match &spec.claims {
            Some(claims) => stage.with_claims(Arc::clone(claims), claimed(spec)),
            None => stage,
        });
        let (source, sentinels) = MemorySource::join(&self.log, spec.key, &inputs(spec));
        let shutdown = CancellationToken::new();
        let polls_left = Arc::new(AtomicU32::new(u32::MAX));
        let loop_ = Box::pin(drive(stage, source, sink, spec.limits, shutdown.clone()));
        let task = tokio::spawn(Fragile { loop_, polls_left: Arc::clone(&polls_left) });
        Member { polls_left, sentinels, shutdown, task }
    }

    /// Waits until every group has committed all that was written.
    pub async fn settled(&self) {
        let mut commits = self.log.commits();
        let all = async {
            while !self.log.lags().is_empty() {
                commits.changed().await.unwrap();
            }
        };
        let settled = timeout(Duration::from_secs(3 * 3600), all).await;
        assert!(settled.is_ok(), "stuck; behind: {:?}", self.log.lags());
    }

    pub fn committed(&self, topic: &str) -> i64 {
        self.log.committed("step", &topic.into())
    }

    /// The texts of a topic.
    pub fn texts(&self, topic: &str) -> Vec<String> {
        self.log.read(topic).iter().map(text).collect()
    }

    /// What was written to the topics that stages write to, each message as a few words, in the order of topics.
    pub fn told(&self) -> String {
        let out =
            self.log.read("out").iter().map(|message| format!("out {}", text(message))).collect::<Vec<_>>();
        let letters = self.log.read("dead-letters");
        let letters = letters.iter().map(|letter| {
            let header = |name| header(letter, name);
            format!("dead {} {} tries={}", header(dead::CLASS), header(dead::CODE), header(dead::ATTEMPTS))
        });
        let endings = self.log.read("endings");
        let endings = endings.iter().map(|message| {
            let ending = ending(message);
            format!("{} {}", ending.status.as_str(), ending.error.map(|fault| fault.code).unwrap_or_default())
        });
        out.into_iter().chain(letters).chain(endings).collect::<Vec<_>>().join("; ")
    }
}

pub fn text(message: &Stored) -> String {
    String::from_utf8_lossy(message.value.as_deref().unwrap_or_default()).into_owned()
}

pub fn ending(message: &Stored) -> Ending {
    Ending::decode(message.value.as_deref().unwrap()).unwrap()
}

pub fn header(message: &Stored, name: &str) -> String {
    let found = message.headers.iter().find(|(known, _)| known == name);
    let value = found.and_then(|(_, value)| value.as_deref()).unwrap_or_default();
    String::from_utf8_lossy(value).into_owned()
}

fn telemetry() -> &'static Telemetry {
    static TELEMETRY: OnceLock<Telemetry> = OnceLock::new();
    TELEMETRY.get_or_init(|| Telemetry::start(Settings::new("test", "0")).unwrap())
}

fn retry_topic((topic, seconds): &(&'static str, u64)) -> RetryTopic {
    RetryTopic { topic: (*topic).into(), delay: Duration::from_secs(*seconds) }
}

fn claimed(spec: &Spec) -> BTreeSet<Arc<str>> {
    let between = [spec.to, "out-backfill", "overflow"].into_iter().filter(|topic| *topic != "end");
    between.chain(spec.retries.iter().map(|(topic, _)| *topic)).map(Arc::from).collect()
}

fn inputs(spec: &Spec) -> Vec<Input> {
    let channel = |topic: &str| if topic.ends_with("-backfill") { Channel::Backfill } else { Channel::Live };
    let from = spec.from.iter().map(|topic| (*topic, channel(topic)));
    let retries = spec.retries.iter().map(|(topic, _)| (*topic, Channel::Retry));
    let overflow = spec.fair.then_some(("overflow", Channel::Overflow));
    let all = from.chain(retries).chain(overflow);
    all.map(|(topic, channel)| Input { topic: topic.into(), channel }).collect()
}

/// Advances virtual time.
pub async fn pass(ms: u64) {
    tokio::time::sleep(Duration::from_millis(ms)).await;
}

/// A log whose acknowledgements take their time.
pub struct Slow {
    pub log: Arc<MemoryLog>,
    pub ms: u64,
}

impl Sink for Slow {
    fn send(&self, messages: Vec<Outgoing>) -> BoxFuture<'_, Result<(), SendError>> {
        Box::pin(async move {
            pass(self.ms).await;
            self.log.send(messages).await
        })
    }
}

/// An object store that may be away.
#[derive(Default)]
pub struct Store {
    pub objects: MemoryObjects,
    pub away: AtomicBool,
}

fn away<'a, T>() -> BoxFuture<'a, Result<T, ObjectsError>> {
    Box::pin(async { Err(ObjectsError::Unavailable("no route to host".into())) })
}

impl Store {
    fn ask<'a, T>(
        &self,
        asked: BoxFuture<'a, Result<T, ObjectsError>>,
    ) -> BoxFuture<'a, Result<T, ObjectsError>> {
        if self.away.load(Ordering::SeqCst) { away() } else { asked }
    }
}

impl Objects for Store {
    fn put<'a>(&'a self, key: &'a str, body: Bytes) -> BoxFuture<'a, Result<(), ObjectsError>> {
        if self.away.load(Ordering::SeqCst) { away() } else { self.objects.put(key, body) }
    }
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Bytes>, ObjectsError>> {
        self.ask(self.objects.get(key))
    }
    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), ObjectsError>> {
        self.ask(self.objects.delete(key))
    }
    fn list<'a>(&'a self, prefix: &'a str, limit: usize) -> BoxFuture<'a, Result<Vec<String>, ObjectsError>> {
        self.ask(self.objects.list(prefix, limit))
    }
}

/// A record as a host wrote it.
pub fn of(world: &World, topic: &str, tenant: &str, id: &str, body: &str) {
    let key = id;
    let id = RequestId::try_from(id.to_owned()).unwrap();
    let tenant = Tenant::try_from(tenant.to_owned()).unwrap();
    let headers = Envelope::entering(id, tenant, Origin::default(), NOW_MS, Headers::new()).write();
    world.write_bytes(topic, Some(key), body.as_bytes(), headers);
}
