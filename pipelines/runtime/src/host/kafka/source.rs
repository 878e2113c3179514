//! Reads a stage's topics as a member of its consumer group.
//!
//! One thread owns the consumer and never awaits a model: it polls, turns messages into records of our own at once,
//! and hands them over. Not `StreamConsumer` and not split queues, which stall silently (rust-rdkafka #638, #665).
//!
//! A rebalance is not served inside librdkafka's callback, as is usual: the callback only notes it, and the thread
//! gives partitions up after the loop has drained them, polling on meanwhile. So a drain of 10 s neither evicts the
//! member nor stops the heartbeat. Its price: librdkafka fetches nothing, also of the partitions that are kept, until
//! it is answered; they live on what was read before.
//!
//! Invariant: a partition is unassigned only after its progress is committed, or when it was lost already.

use super::{
    client::{Kafka, SettingsError, is_kip_848, log, say, shared_name},
    lifeline::Lifeline,
    read_back::read_back,
    session,
    watch::{Look, Watch, looks},
};
use crate::{
    budget::Budget,
    drive::{Event, Progress, Source},
    fence::Fence,
    message::{Group, Incoming, Input, Partition},
    once::Once,
};
use bytes::Bytes;
use forebay_plan::Channel;
use forebay_schemas::Headers as OwnHeaders;
use forebay_telemetry::{BEAT_AGE_MAX, Health, StepMeter};
use futures::future::BoxFuture;
use rdkafka::{
    ClientContext, Message, Offset, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext},
    error::{KafkaError, KafkaResult},
    message::{BorrowedMessage, Headers},
    types::{RDKafkaErrorCode, RDKafkaRespErr},
};
use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc as sync_mpsc,
    },
    time::{Duration, Instant},
};
use tokio::{runtime::Handle, sync::mpsc};
use tracing::{debug, error, warn};

/// How much may wait between the reading thread and the operator, on each channel: a backfill that waits must not keep
/// requests from being read that somebody waits for.
#[derive(Clone, Copy, Debug)]
pub struct ReadBounds {
    /// Records.
    pub records: usize,
    /// Their bytes.
    pub bytes: usize,
}

impl ReadBounds {
    /// So many records, and the usual bytes.
    pub fn new(records: usize) -> Self {
        Self { records, bytes: 16 << 20 }
    }
}

/// What a member reads with.
pub struct Reading {
    /// How much may wait.
    pub bounds: ReadBounds,
    /// The memory of the process.
    pub budget: Arc<Budget>,
    /// What is counted.
    pub meter: StepMeter,
    /// Who is well.
    pub health: Health,
    /// What the stage writes once, where it does; read back with each live partition.
    pub once: Option<Arc<Once>>,
}

/// How long the thread sleeps in a poll that brings nothing: the bound on how late it notices a command.
const POLL: Duration = Duration::from_millis(20);

/// The same where nothing has happened for [`IDLE_AFTER`]. A record or a rebalance wakes it at once; what it may notice
/// later is that the stage ends, or that a retry has become due.
const IDLE_POLL: Duration = Duration::from_millis(250);

/// After so long without a record or a command, a member is idle.
const IDLE_AFTER: Duration = Duration::from_secs(1);

/// How long the thread rests between two looks while too much waits.
const REST: Duration = Duration::from_millis(5);

/// How many records are handed over at once at most.
const BATCH: usize = 256;

/// How long it may take until a partition is read from another offset.
const SEEK_MAX: Duration = Duration::from_secs(1);

/// How often an error that lasts is said aloud.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

/// How long an outage may be that reading back waits for; then the process ends, for another to try.
const READ_BACK_MAX: Duration = Duration::from_secs(120);

/// How long commits may take to be answered when the group is left; then it is left without.
const LEAVE_MAX: Duration = Duration::from_secs(1);

/// How long to wait before that is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A member of the consumer groups of a stage.
pub struct KafkaSource {
    members: Vec<Membership>,
    /// What happens, and in which group.
    events: mpsc::UnboundedReceiver<(usize, Event)>,
    /// The groups of which partitions are to be given up, oldest first.
    leaving: VecDeque<usize>,
    waiting: Arc<Waiting>,
    meter: StepMeter,
    health: Health,
    /// The name under which the life of the loop is known.
    heart: String,
}

/// What the loop holds of one group.
struct Membership {
    /// The thread's own: it closes the consumer, and nobody else keeps it open.
    consumer: Weak<BaseConsumer<Member>>,
    commands: sync_mpsc::Sender<Command>,
    inputs: Vec<Input>,
    fence: Arc<Fence>,
    /// Whether the thread has said that it ends.
    ended: bool,
}

impl Membership {
    fn command(&self, command: Command) {
        // The thread ends only after it has said so, and then there is nothing left to command.
        let _ = self.commands.send(command);
    }
}

impl Drop for KafkaSource {
    fn drop(&mut self) {
        self.health.retire(&self.heart);
    }
}

/// Where a reading thread tells what happens.
struct Events {
    group: usize,
    sender: mpsc::UnboundedSender<(usize, Event)>,
}

impl Events {
    /// Where the loop is gone, records stay unfinished, and their next owner reads them.
    fn send(&self, event: Event) {
        let _ = self.sender.send((self.group, event));
    }

    fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

enum Command {
    Pause(Partition),
    Resume(Partition),
    Rewind(Partition, i64),
    Release,
    Close,
}

/// What was read and is not dispatched yet: live, backfill, retries, overflow.
#[derive(Default)]
struct Waiting([Counts; 4]);

#[derive(Default)]
struct Counts {
    records: AtomicUsize,
    bytes: AtomicUsize,
}

impl Waiting {
    fn of(&self, channel: Channel) -> &Counts {
        let [live, backfill, retry, overflow] = &self.0;
        match channel {
            Channel::Live => live,
            Channel::Backfill => backfill,
            Channel::Retry => retry,
            Channel::Overflow => overflow,
        }
    }
}

impl KafkaSource {
    /// Joins the groups.
    ///
    /// # Panics
    /// Outside a Tokio runtime, which lends the threads that wait for commits.
    pub fn join(kafka: &Kafka, groups: &[Group], with: Reading) -> Result<Self, SettingsError> {
        let (sender, events) = mpsc::unbounded_channel();
        let waiting = Arc::new(Waiting::default());
        let heart = format!("loop {}", groups.first().map_or("", |group| &group.name));
        with.health.expect_beat(&heart, BEAT_AGE_MAX);
        let mut members = Vec::with_capacity(groups.len());
        for (number, group) in groups.iter().enumerate() {
            let events = Events { group: number, sender: sender.clone() };
            members.push(join(kafka, group, events, &waiting, &with)?);
        }
        let Reading { meter, health, .. } = with;
        Ok(Self { members, events, leaving: VecDeque::new(), waiting, meter, health, heart })
    }

    /// What the loop is to hear of what happened: not the end of one group before the end of all.
    fn told(&mut self, (group, event): (usize, Event)) -> Option<Event> {
        match &event {
            Event::Revoked { .. } => self.leaving.push_back(group),
            Event::Ended => {
                self.members.get_mut(group)?.ended = true;
                return self.has_ended().then_some(event);
            }
            _ => {}
        }
        Some(event)
    }

    fn has_ended(&self) -> bool {
        self.members.iter().all(|member| member.ended)
    }

    fn member(&self, partition: &Partition) -> Option<&Membership> {
        let reads = |member: &&Membership| member.inputs.iter().any(|input| input.topic == partition.topic);
        self.members.iter().find(reads)
    }

    fn command(&self, partition: &Partition, command: Command) {
        if let Some(member) = self.member(partition) {
            member.command(command);
        }
    }
}

/// Joins one group.
fn join(
    kafka: &Kafka,
    group: &Group,
    events: Events,
    waiting: &Arc<Waiting>,
    with: &Reading,
) -> Result<Membership, SettingsError> {
    let Group { name, inputs } = group;
    let Reading { bounds, budget, meter, health, once } = with;
    let mut config = kafka.group_config(name);
    let is_live = inputs.iter().any(|input| input.channel == Channel::Live);
    // What comes is sent at once; how soon a partition is read after a pause, or its lag is known, matters to nobody here.
    for (name, at_leisure) in [("fetch.wait.max.ms", "500"), ("statistics.interval.ms", "5000")] {
        if !is_live && kafka.config().get(name).is_none() {
            config.set(name, at_leisure);
        }
    }
    let number = |name| config.get(name).and_then(|value| value.parse::<i64>().ok()).unwrap_or(i64::MAX);
    let enough = (number("queued.min.messages"), number("queued.max.messages.kbytes").saturating_mul(1_024));
    let consumer: BaseConsumer<Member> =
        config.create_with_context(Member::new(kafka, meter.clone())).map_err(SettingsError::Client)?;
    let topics: Vec<&str> = inputs.iter().map(|input| &*input.topic).collect();
    consumer.subscribe(&topics).map_err(SettingsError::Client)?;
    let consumer = Arc::new(consumer);
    let handle = Arc::downgrade(&consumer);
    let (commands, commands_out) = sync_mpsc::channel();
    let fence = Arc::new(session::fence(&config));
    let heart = format!("consumer {name}");
    health.expect_beat(&heart, BEAT_AGE_MAX);
    health.set_ready(&heart, Err("no assignment yet".to_owned()));
    let reader = Reader {
        consumer,
        // Reading back begins the memory of a partition number anew. What was set aside comes and goes by itself: doing it
        // there too would forget what is on its way from the live topic of that number.
        once: once.clone().filter(|_| is_live).map(|once| (kafka.clone(), once)),
        unasked: is_kip_848(&config).then(|| (kafka.clone(), name.clone())),
        events,
        commands: commands_out,
        fence: Arc::clone(&fence),
        health: health.clone(),
        heart,
        waiting: Arc::clone(waiting),
        bounds: *bounds,
        budget: Arc::clone(budget),
        topics: inputs.iter().map(|input| Arc::clone(&input.topic)).collect(),
        inputs: inputs.clone(),
        paused: BTreeSet::new(),
        rewinds: Vec::new(),
        channels: inputs.iter().map(|input| input.channel).collect(),
        full: BTreeSet::new(),
        holding: BTreeSet::new(),
        rests: false,
        batch: Vec::new(),
        watch: Watch::new(enough),
        revoked: VecDeque::new(),
        drained: 0,
        parting: false,
        expected: HashMap::new(),
        closing: false,
        active: Instant::now(),
        complained: None,
    };
    let thread = std::thread::Builder::new().name(format!("read {name}"));
    thread
        .spawn(move || reader.run())
        .map_err(|fault| SettingsError::Client(KafkaError::ClientCreation(fault.to_string())))?;
    Ok(Membership { consumer: handle, commands, inputs: inputs.clone(), fence, ended: false })
}

impl Source for KafkaSource {
    fn next(&mut self) -> BoxFuture<'_, Event> {
        Box::pin(async {
            loop {
                match self.events.recv().await {
                    Some(told) => {
                        if let Some(event) = self.told(told) {
                            return event;
                        }
                    }
                    None if self.has_ended() => return Event::Ended,
                    // Threads say when they end; silence is a panic.
                    None => return Event::Failed("the reading thread has died".to_owned()),
                }
            }
        })
    }

    fn try_next(&mut self) -> Option<Event> {
        loop {
            let told = self.events.try_recv().ok()?;
            if let Some(event) = self.told(told) {
                return Some(event);
            }
        }
    }

    fn dispatched(&mut self, channel: Channel, bytes: usize) {
        let waiting = self.waiting.of(channel);
        waiting.records.fetch_sub(1, Ordering::Relaxed);
        waiting.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn lag(&self) -> i64 {
        let inputs = || self.members.iter().flat_map(|member| &member.inputs);
        self.meter.lag_of_all(|topic| {
            inputs().any(|input| *input.topic == *topic && input.channel != Channel::Retry)
        })
    }

    fn store(&mut self, progress: &[Progress]) {
        // One by one: librdkafka refuses the whole list for one partition that has just been lost, and it is right
        // to refuse that one: it fences us off.
        for Progress { partition, offset, metadata } in progress {
            // Gone where the group was left: then the next owner repeats.
            let consumer = self.member(partition).and_then(|member| member.consumer.upgrade());
            let Some(consumer) = consumer else { continue };
            let mut one = TopicPartitionList::new();
            let added = one.add_partition_offset(&partition.topic, partition.number, Offset::Offset(*offset));
            if let Some(mut element) = one.find_partition(&partition.topic, partition.number) {
                element.set_metadata(metadata);
            }
            match added.and_then(|()| consumer.store_offsets(&one)) {
                Ok(()) => {
                    consumer.context().stored.store(true, Ordering::Release);
                    self.meter.committed(&partition.topic, partition.number, *offset);
                }
                Err(fault) => {
                    warn!(%partition, offset, error = %fault, "could not store an offset; its next owner repeats")
                }
            }
        }
    }

    fn commit(&mut self) {
        // The loop comes here several times a second, whatever else it does.
        self.health.beat(&self.heart);
        for consumer in self.members.iter().filter_map(|member| member.consumer.upgrade()) {
            // Where the one before is not answered, the next time says all.
            commit(consumer);
        }
    }

    fn pause(&mut self, partition: &Partition) {
        self.command(partition, Command::Pause(partition.clone()));
    }

    fn resume(&mut self, partition: &Partition) {
        self.command(partition, Command::Resume(partition.clone()));
    }

    fn rewind(&mut self, partition: &Partition, offset: i64) {
        self.command(partition, Command::Rewind(partition.clone(), offset));
    }

    fn release(&mut self) {
        let member = self.leaving.pop_front().and_then(|group| self.members.get(group));
        if let Some(member) = member {
            member.command(Command::Release);
        }
    }

    fn fence(&self, partition: &Partition) -> Option<Arc<Fence>> {
        self.member(partition).map(|member| Arc::clone(&member.fence))
    }

    fn close(&mut self) {
        self.members.iter().for_each(|member| member.command(Command::Close));
    }
}

/// What came of the wish to commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Commit {
    /// Nothing was stored since the last.
    Nothing,
    Begun,
    /// The one before is not answered yet.
    Busy,
}

/// Begins to commit what is stored.
///
/// One at a time: when a connection breaks, librdkafka sends again whatever was not answered, each after a pause of its own
/// with jitter, so that an older offset could come after a newer one. By a call that blocks, on a thread for such,
/// since rust-rdkafka tells nobody how one that does not block has ended (#856).
fn commit(consumer: Arc<BaseConsumer<Member>>) -> Commit {
    let member = consumer.context();
    if member.committing.swap(true, Ordering::AcqRel) {
        return Commit::Busy;
    }
    // What is stored from here on is for the next.
    if !member.stored.swap(false, Ordering::AcqRel) {
        member.committing.store(false, Ordering::Release);
        return Commit::Nothing;
    }
    let runtime = member.runtime.clone();
    runtime.spawn_blocking(move || {
        let committed = consumer.commit_consumer_state(CommitMode::Sync);
        consumer.context().committed(committed);
    });
    Commit::Begun
}

/// Closes a consumer: returns when its commits are answered and the group is left, so that a process which ends then
/// loses neither. Dropping it does that, and waits; so it is dropped here and on no thread that others need.
fn close(mut consumer: Arc<BaseConsumer<Member>>) {
    loop {
        match Arc::try_unwrap(consumer) {
            Ok(last) => return drop(last),
            // The loop is just storing something.
            Err(shared) => consumer = shared,
        }
        let _ = consumer.poll(Duration::from_millis(1));
    }
}

/// What librdkafka calls back: it only takes notes.
struct Member {
    rebalances: Mutex<VecDeque<Rebalance>>,
    /// Whether the group has assigned something, be it nothing.
    joined: AtomicBool,
    /// Set when nobody drains any more: then partitions are given up at once.
    closed: AtomicBool,
    /// What was last seen of the partitions, until the thread looks at it.
    seen: Mutex<Vec<Look>>,
    /// Whether something was stored since the last commit began.
    stored: AtomicBool,
    /// Whether a commit is not answered yet.
    committing: AtomicBool,
    /// Lends the threads that wait for answers.
    runtime: Handle,
    /// When a refused commit was last said aloud.
    complained: Mutex<Option<Instant>>,
    lifeline: Lifeline,
    meter: StepMeter,
}

impl Member {
    fn new(kafka: &Kafka, meter: StepMeter) -> Self {
        Self {
            rebalances: Mutex::default(),
            joined: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            seen: Mutex::default(),
            stored: AtomicBool::new(false),
            committing: AtomicBool::new(false),
            runtime: Handle::current(),
            complained: Mutex::default(),
            lifeline: Lifeline::to(kafka),
            meter,
        }
    }

    /// A commit is answered.
    fn committed(&self, result: KafkaResult<()>) {
        // Stored by somebody whose partitions are gone since is nothing to commit.
        let is_nothing =
            |fault: &KafkaError| matches!(fault, KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset));
        if let Err(fault) = result
            && !is_nothing(&fault)
        {
            self.stored.store(true, Ordering::Release);
            let mut complained = self.complained.lock().unwrap_or_else(PoisonError::into_inner);
            if complained.is_none_or(|last| last.elapsed() > COMPLAIN_EVERY) {
                *complained = Some(Instant::now());
                warn!(error = %fault, "could not commit; will try again, and what it would have said is processed again after a restart");
            }
        }
        self.committing.store(false, Ordering::Release);
    }
}

enum Rebalance {
    Assign(TopicPartitionList),
    Revoke(TopicPartitionList),
}

impl ClientContext for Member {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log(level, facility, message);
    }
    fn error(&self, fault: KafkaError, reason: &str) {
        say(&fault, reason);
    }
    fn stats_raw(&self, statistics: &[u8]) {
        let (looks, knows_one) = match looks(statistics) {
            Ok(seen) => seen,
            Err(fault) => return error!(error = %fault, "could not read what librdkafka says of itself"),
        };
        self.lifeline.note(knows_one);
        for Look { topic, number, lag, .. } in &looks {
            if let Some(lag) = lag {
                self.meter.lag(topic, *number, *lag);
            }
        }
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = looks;
    }
}

impl ConsumerContext for Member {
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        kind: RDKafkaRespErr,
        partitions: &mut TopicPartitionList,
    ) {
        let assigns = kind == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        self.joined.store(true, Ordering::Release);
        if self.closed.load(Ordering::Acquire) {
            let done = match assigns {
                true => consumer.incremental_assign(partitions),
                false => consumer.incremental_unassign(partitions),
            };
            if let Err(fault) = done {
                warn!(error = %fault, "could not follow a rebalance while closing");
            }
            return;
        }
        let partitions = partitions.clone();
        let change = if assigns { Rebalance::Assign(partitions) } else { Rebalance::Revoke(partitions) };
        self.rebalances.lock().unwrap_or_else(PoisonError::into_inner).push_back(change);
    }
}

/// The reading thread.
struct Reader {
    consumer: Arc<BaseConsumer<Member>>,
    /// Beaten as long as this thread turns.
    fence: Arc<Fence>,
    health: Health,
    /// The name under which this thread's life is known.
    heart: String,
    /// What the stage writes once, and where that is read back from.
    once: Option<(Kafka, Arc<Once>)>,
    /// The group whose session only the broker knows, until it is asked.
    unasked: Option<(Kafka, String)>,
    events: Events,
    commands: sync_mpsc::Receiver<Command>,
    waiting: Arc<Waiting>,
    bounds: ReadBounds,
    budget: Arc<Budget>,
    topics: Vec<Arc<str>>,
    inputs: Vec<Input>,
    /// Partitions whose window is full, or whose next record is not due yet.
    paused: BTreeSet<Partition>,
    /// Partitions that are to be read from another offset on.
    rewinds: Vec<(Partition, i64)>,
    /// The channels of its inputs.
    channels: BTreeSet<Channel>,
    /// Those of which too much waits.
    full: BTreeSet<Channel>,
    /// Those that are paused for that.
    holding: BTreeSet<Channel>,
    /// Whether all are full, and none is paused yet.
    rests: bool,
    /// What was read and is not handed over yet.
    batch: Vec<Incoming>,
    /// Finds what stands still in silence.
    watch: Watch,
    /// Partitions that are being drained, oldest first.
    revoked: VecDeque<TopicPartitionList>,
    /// How many of these are drained, and wait for their last commit.
    drained: usize,
    /// Whether the last commit of the oldest of them has begun.
    parting: bool,
    /// Where reading a partition should begin, until it has.
    expected: HashMap<Partition, i64>,
    closing: bool,
    /// When a record, a command or a rebalance came last.
    active: Instant,
    /// When an error was last said aloud: one that lasts must not fill the log.
    complained: Option<Instant>,
}

impl Reader {
    fn run(mut self) {
        let mut joined = false;
        let ended = loop {
            self.health.beat(&self.heart);
            self.fence.beat();
            // An empty assignment is one: others hold all partitions, and this member stands by.
            if !joined && self.consumer.context().joined.load(Ordering::Acquire) {
                joined = true;
                self.health.set_ready(&self.heart, true);
            }
            for command in self.commands.try_iter().collect::<Vec<_>>() {
                self.obey(command);
            }
            self.give_up_drained();
            self.follow_rebalances();
            self.rewind();
            self.hold_or_go_on();
            self.consumer.context().lifeline.mend(self.consumer.client());
            if let Some(stall) = self.stall() {
                self.health.broken(&self.heart, &stall);
                break Event::Failed(stall);
            }
            if self.closing && self.revoked.is_empty() && self.owns_nothing() {
                break Event::Ended;
            }
            if self.events.is_closed() {
                // The loop is gone: nobody will ever drain. Leave at once, so that others take over.
                break Event::Ended;
            }
            if let Some(fault) = self.read() {
                break Event::Failed(fault);
            }
        };
        self.consumer.context().closed.store(true, Ordering::Release);
        for partitions in std::mem::take(&mut self.revoked) {
            self.give_up(&partitions);
        }
        if !self.closing {
            self.consumer.unsubscribe();
        }
        self.leave();
        self.health.retire(&self.heart);
        let Self { consumer, events, .. } = self;
        close(consumer);
        // The loop may be gone already.
        events.send(ended);
    }

    /// Waits, for a bounded time, until librdkafka has nothing left to unassign or to commit. Closed before, it does not
    /// tell the group that it leaves, and its partitions stand still until its session is over.
    fn leave(&mut self) {
        let until = Instant::now() + LEAVE_MAX;
        let answered = |reader: &Self| !reader.consumer.context().committing.load(Ordering::Acquire);
        while !(self.owns_nothing() && answered(self)) && Instant::now() < until {
            // What is still read here is read again by the next owner.
            let _ = self.poll(Duration::from_millis(5));
        }
    }

    fn obey(&mut self, command: Command) {
        self.active = Instant::now();
        match command {
            Command::Pause(partition) => {
                self.set_paused(std::slice::from_ref(&partition), true);
                self.paused.insert(partition);
            }
            Command::Resume(partition) => {
                self.paused.remove(&partition);
                if !self.holding.contains(&self.channel(&partition)) {
                    self.set_paused(std::slice::from_ref(&partition), false);
                }
            }
            Command::Rewind(partition, offset) => self.rewinds.push((partition, offset)),
            Command::Release => self.drained += 1,
            Command::Close => {
                self.closing = true;
                self.consumer.unsubscribe();
            }
        }
    }

    /// Gives up what is drained, behind a last commit.
    fn give_up_drained(&mut self) {
        while self.drained > 0 {
            if !self.consumer.assignment_lost() {
                // Refused, it is not tried again: others wait for these partitions, and process again what it would have said.
                let is_over = self.parting && !self.consumer.context().committing.load(Ordering::Acquire);
                if !is_over {
                    match commit(Arc::clone(&self.consumer)) {
                        Commit::Nothing => {}
                        Commit::Begun => return self.parting = true,
                        Commit::Busy => return,
                    }
                }
            }
            (self.drained, self.parting) = (self.drained - 1, false);
            if let Some(partitions) = self.revoked.pop_front() {
                self.give_up(&partitions);
            }
        }
    }

    /// Unassigns what is still assigned. Leaving the group in the middle of a drain revokes once more what is drained
    /// already, and librdkafka refuses a whole list for one partition that it does not find; but it wants the call,
    /// be it with an empty list, or it waits for ever.
    fn give_up(&self, partitions: &TopicPartitionList) {
        let (owned, mut left) = (self.owned(), TopicPartitionList::new());
        for partition in self.partitions(partitions).iter().filter(|partition| owned.contains(partition)) {
            left.add_partition(&partition.topic, partition.number);
        }
        if let Err(fault) = self.consumer.incremental_unassign(&left) {
            warn!(error = %fault, "could not give partitions up");
        }
    }

    fn follow_rebalances(&mut self) {
        loop {
            // The lock is not held on: what follows may call back.
            let change =
                self.consumer.context().rebalances.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            match change {
                Some(Rebalance::Assign(partitions)) => self.assign(&partitions),
                Some(Rebalance::Revoke(partitions)) => self.revoke(partitions),
                None => return,
            }
            self.active = Instant::now();
        }
    }

    fn assign(&mut self, partitions: &TopicPartitionList) {
        if self.closing {
            // The second half of a rebalance that was under way when we left: it wants an answer, and nothing is read.
            if let Err(fault) = self.consumer.incremental_assign(&TopicPartitionList::new()) {
                warn!(error = %fault, "could not follow a rebalance while closing");
            }
            return;
        }
        if let Some((kafka, group)) = self.unasked.take() {
            session::ask(&kafka, &group, &self.fence);
        }
        // Before the first record is read, or a second copy could pass.
        if let Err(fault) = self.read_back(partitions) {
            self.events.send(Event::Failed(fault));
            return;
        }
        let owned = self.partitions(partitions);
        // librdkafka keeps our pause over a loss: one that was paused when it went would never be read again.
        self.set_paused(&owned, false);
        if let Err(fault) = self.consumer.incremental_assign(partitions) {
            warn!(error = %fault, "could not take partitions on");
            return;
        }
        // Known only to tell a loss from a gap; without an answer nothing is told.
        if let Ok(committed) = self.consumer.committed_offsets(partitions.clone(), Duration::from_secs(2)) {
            for element in committed.elements() {
                if let Offset::Offset(offset) = element.offset() {
                    let topic = shared_name(&self.topics, element.topic());
                    self.expected.insert(Partition { topic, number: element.partition() }, offset);
                }
            }
        }
        let held = owned.iter().filter(|one| self.holding.contains(&self.channel(one)));
        self.set_paused(&held.cloned().collect::<Vec<_>>(), true);
        self.events.send(Event::Assigned(owned));
    }

    /// Reads back what was written of late at these partitions' numbers, over an outage that is not too long.
    fn read_back(&mut self, partitions: &TopicPartitionList) -> Result<(), String> {
        let Some((kafka, once)) = self.once.clone() else { return Ok(()) };
        let numbers = partitions.elements().iter().map(|element| element.partition()).collect();
        let until = Instant::now() + READ_BACK_MAX;
        loop {
            match read_back(&kafka, &once, &numbers, || self.health.beat(&self.heart)) {
                Ok(repeated) => {
                    if let Some(first) = repeated.first() {
                        self.consumer.context().meter.repeated(repeated.len());
                        warn!(
                            repeated = repeated.len(),
                            first,
                            "messages that are written once lie on their topic twice: \
                            a process was cut off beyond its session with them on their way"
                        );
                    }
                    return Ok(());
                }
                Err(fault) => {
                    let cause = std::error::Error::source(&fault);
                    let fault = cause.map_or_else(|| fault.to_string(), |cause| format!("{fault}: {cause}"));
                    if Instant::now() > until || self.events.is_closed() {
                        return Err(fault);
                    }
                    warn!(fault, "could not read back what was written of late; will try again");
                }
            }
            // Waiting for a log that is away is no stall. The fence is not told: the group was not heard meanwhile.
            self.health.beat(&self.heart);
            if let Some(fault) = self.poll(RETRY_AFTER) {
                return Err(fault);
            }
        }
    }

    fn revoke(&mut self, partitions: TopicPartitionList) {
        let lost = self.consumer.assignment_lost();
        let gone = self.partitions(&partitions);
        for partition in &gone {
            self.paused.remove(partition);
            self.rewinds.retain(|(rewound, _)| rewound != partition);
            self.expected.remove(partition);
            self.consumer.context().meter.revoked(&partition.topic, partition.number);
        }
        self.revoked.push_back(partitions);
        self.events.send(Event::Revoked { partitions: gone, lost });
    }

    /// Stops reading a channel while too much of it waits, and goes on when half of it is gone.
    ///
    /// A pause throws away what librdkafka has fetched, and all of that is fetched again behind it: measured, `look_up` worked
    /// off a long queue of small records at 2,700 a second with pauses alone, and at tens of thousands without. So first the
    /// thread rests: it takes one record now and then, since whoever polls for rebalances must take what comes. Only where
    /// that becomes too much it pauses.
    fn hold_or_go_on(&mut self) {
        let mut rests = true;
        for channel in self.channels.clone() {
            let (bounds, budget) = (&self.bounds, &self.budget);
            let waiting = self.waiting.of(channel);
            let (records, bytes) =
                (waiting.records.load(Ordering::Relaxed), waiting.bytes.load(Ordering::Relaxed));
            if self.is_full(channel) {
                self.full.insert(channel);
            } else if records <= bounds.records / 2 && bytes <= bounds.bytes / 2 && budget.is_roomy() {
                self.full.remove(&channel);
            }
            let over = |bound: usize| bound + bound / 8;
            rests &= self.full.contains(&channel)
                && records < over(bounds.records)
                && bytes < over(bounds.bytes)
                && !budget.is_overdrawn();
        }
        for channel in self.channels.clone() {
            let (is_full, is_held) = (self.full.contains(&channel), self.holding.contains(&channel));
            if is_full && !is_held && !rests {
                self.holding.insert(channel);
                self.set_paused(&self.owned_of(channel), true);
            } else if !is_full && is_held {
                self.holding.remove(&channel);
                let owned = self.owned_of(channel).into_iter();
                let reading: Vec<_> = owned.filter(|one| !self.paused.contains(one)).collect();
                self.set_paused(&reading, false);
            }
        }
        self.rests = rests && self.holding.is_empty();
    }

    /// Whether as much of a channel waits as may.
    fn is_full(&self, channel: Channel) -> bool {
        let waiting = self.waiting.of(channel);
        waiting.records.load(Ordering::Relaxed) >= self.bounds.records
            || waiting.bytes.load(Ordering::Relaxed) >= self.bounds.bytes
            || self.budget.is_spent()
    }

    /// Reads partitions from other offsets on, as soon as librdkafka lets us.
    fn rewind(&mut self) {
        for (partition, offset) in std::mem::take(&mut self.rewinds) {
            let seek =
                self.consumer.seek(&partition.topic, partition.number, Offset::Offset(offset), SEEK_MAX);
            match seek {
                Ok(()) => {
                    self.events.send(Event::Rewound(partition));
                }
                // It is being assigned or taken away; what goes is forgotten with the revocation.
                Err(fault) => {
                    debug!(%partition, offset, error = %fault, "could not seek yet; will try again");
                    self.rewinds.push((partition, offset));
                }
            }
        }
    }

    /// Why nothing more is to be expected of a partition, where that is so.
    fn stall(&mut self) -> Option<String> {
        let seen =
            std::mem::take(&mut *self.consumer.context().seen.lock().unwrap_or_else(PoisonError::into_inner));
        // Nothing is fetched while a rebalance waits for its answer.
        if seen.is_empty() || !self.revoked.is_empty() || self.closing {
            return None;
        }
        let owned: BTreeSet<_> = self.owned().into_iter().collect();
        let reading = |partition: &Partition| {
            owned.contains(partition)
                && !self.paused.contains(partition)
                && !self.holding.contains(&self.channel(partition))
        };
        let looks = seen.into_iter().map(|look| {
            let topic = shared_name(&self.topics, &look.topic);
            (Partition { topic, number: look.number }, look)
        });
        let looks = looks.filter(|(partition, _)| reading(partition)).collect();
        self.watch.look(Instant::now(), looks)
    }

    /// All messages that are here, handed over together; waits a little where there is none.
    fn read(&mut self) -> Option<String> {
        if self.rests {
            // What comes now is one of the few that may be beyond the bounds.
            let fault = self.poll(Duration::ZERO);
            self.hand_over();
            if let Ok(command) = self.commands.recv_timeout(REST) {
                self.obey(command);
            }
            return fault;
        }
        let is_idle = self.active.elapsed() > IDLE_AFTER;
        let mut fault = self.poll(if is_idle { IDLE_POLL } else { POLL });
        // Not beyond the bounds, or whoever reads large records never rests and always pauses. A partition that goes on is
        // fetched again only when its broker's thread in librdkafka wakes, up to a second later: measured, records of 6 KB
        // came at 800 a second so, whatever the model did.
        while fault.is_none()
            && self.batch.last().is_some_and(|last| !self.is_full(last.channel))
            && self.batch.len() < BATCH
        {
            let before = self.batch.len();
            fault = self.poll(Duration::ZERO);
            if self.batch.len() == before {
                break;
            }
        }
        self.hand_over();
        fault
    }

    fn hand_over(&mut self) {
        if !self.batch.is_empty() {
            self.active = Instant::now();
            // Where the loop is gone, records stay unfinished, and their next owner reads them.
            self.events.send(Event::Records(std::mem::take(&mut self.batch)));
        }
    }

    /// One message, if any comes; the fault where the consumer cannot go on.
    fn poll(&mut self, wait: Duration) -> Option<String> {
        // A second handle, since a message borrows the consumer.
        let consumer = Arc::clone(&self.consumer);
        match consumer.poll(wait)? {
            Ok(message) => self.take_in(&message),
            Err(KafkaError::PartitionEOF(_)) => {}
            Err(KafkaError::MessageConsumptionFatal(code)) => {
                return Some(format!("the consumer met a fatal error: {code}"));
            }
            Err(fault) => self.complain(&fault),
        }
        None
    }

    fn take_in(&mut self, message: &BorrowedMessage<'_>) {
        let partition =
            Partition { topic: shared_name(&self.topics, message.topic()), number: message.partition() };
        if let Some(expected) = self.expected.remove(&partition) {
            self.check_for_loss(&partition, expected, message.offset());
        }
        let bytes = Incoming::bytes(message.key(), message.payload());
        let channel = self.channel(&partition);
        self.batch.push(Incoming {
            partition,
            channel,
            offset: message.offset(),
            timestamp_ms: message.timestamp().to_millis().unwrap_or(0),
            key: message.key().map(Bytes::copy_from_slice),
            value: message.payload().map(Bytes::copy_from_slice),
            headers: headers(message),
            held: self.budget.take(bytes),
        });
        let waiting = self.waiting.of(channel);
        waiting.records.fetch_add(1, Ordering::Relaxed);
        waiting.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Records that Kafka forgot before we read them are a loss, and are said aloud.
    fn check_for_loss(&self, partition: &Partition, expected: i64, first: i64) {
        if first <= expected {
            return;
        }
        let marks =
            self.consumer.fetch_watermarks(&partition.topic, partition.number, Duration::from_secs(2));
        if let Ok((low, _)) = marks
            && low > expected
        {
            error!(%partition, committed = expected, log_start = low, lost = low - expected,
                "records were deleted before they were processed; raise retention.ms of the topic");
        }
    }

    fn complain(&mut self, fault: &KafkaError) {
        if self.complained.is_none_or(|last| last.elapsed() > COMPLAIN_EVERY) {
            self.complained = Some(Instant::now());
            error!(error = %fault, topics = ?self.topics, "could not read; will try again");
        }
    }

    fn owned(&self) -> Vec<Partition> {
        self.consumer.assignment().map(|assignment| self.partitions(&assignment)).unwrap_or_default()
    }

    fn owned_of(&self, channel: Channel) -> Vec<Partition> {
        self.owned().into_iter().filter(|partition| self.channel(partition) == channel).collect()
    }

    fn channel(&self, partition: &Partition) -> Channel {
        let input = self.inputs.iter().find(|input| input.topic == partition.topic);
        input.map_or(Channel::Live, |input| input.channel)
    }

    fn owns_nothing(&self) -> bool {
        self.consumer.assignment().is_ok_and(|assignment| assignment.count() == 0)
    }

    fn partitions(&self, list: &TopicPartitionList) -> Vec<Partition> {
        let partition = |element: rdkafka::topic_partition_list::TopicPartitionListElem<'_>| Partition {
            topic: shared_name(&self.topics, element.topic()),
            number: element.partition(),
        };
        list.elements().into_iter().map(partition).collect()
    }

    fn set_paused(&self, partitions: &[Partition], paused: bool) {
        if partitions.is_empty() {
            return;
        }
        let mut list = TopicPartitionList::new();
        for partition in partitions {
            list.add_partition(&partition.topic, partition.number);
        }
        let set = if paused { self.consumer.pause(&list) } else { self.consumer.resume(&list) };
        if let Err(fault) = set {
            warn!(error = %fault, paused, "could not change whether partitions are read");
        }
    }
}

/// A message's headers, as our own.
pub fn headers(message: &BorrowedMessage<'_>) -> OwnHeaders {
    let Some(headers) = message.headers() else { return OwnHeaders::new() };
    let own = |header: rdkafka::message::Header<'_, &[u8]>| {
        (header.key.to_owned(), header.value.map(Bytes::copy_from_slice))
    };
    headers.iter().map(own).collect()
}
