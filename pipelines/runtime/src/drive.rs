//! The one loop: read, process, write, let the offset go on.
//!
//! A record goes through four states. *Waiting* until the step has room; *running* in its operator, at most
//! `in_flight` at a time; *unacknowledged* until all that it became is written; *finished*. Records finish in any
//! order; offsets go on in theirs ([`crate::tracker`]).
//!
//! A record of a retry topic that is not due yet is not held: its partition is paused, and read again from there when it
//! is. What a tenant has beyond its share of a fair queue is moved to the step's overflow topic. Requests that are taken back
//! while their records wait on either end at once (`drive/ahead.rs`).
//!
//! Invariants: an offset is stored only after every message that its record became is acknowledged. A partition that
//! is taken away is first drained, then its progress is stored, then it is given up; what still finishes later is
//! fenced off by the assignment's epoch. Every queue here has a bound.

mod ahead;

use crate::{
    crash::crash_point,
    fence::Fence,
    message::{Incoming, Outgoing, Partition},
    queue::{Queue, Waiting},
    stage::Stage,
    tracker::Tracker,
};
use bytes::Bytes;
use forebay_plan::Channel;
use forebay_schemas::Retry;
use forebay_telemetry::StepMeter;
use futures::{
    FutureExt as _, StreamExt as _,
    future::{BoxFuture, try_join_all},
    stream::FuturesUnordered,
};
use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{error, info, warn};

/// How long the loop keeps its thread while there is always something to do. Under a flood that is without end, and tokio counts
/// what it awaits and not how long it computes: two such loops held both threads of a process on two cores, and for the
/// others, for timers and for the admin port there was no turn in half a minute.
const TURN_MAX: Duration = Duration::from_millis(2);

/// Where a stage's records come from.
pub trait Source: Send {
    /// Waits for what happens next. Cancel safe: nothing is lost when the future is dropped.
    fn next(&mut self) -> BoxFuture<'_, Event>;

    /// Takes what has happened already, without waiting.
    fn try_next(&mut self) -> Option<Event>;

    /// A record of so many bytes has left the queue of those that wait: the source may read on.
    fn dispatched(&mut self, channel: Channel, bytes: usize);

    /// How many records that could be processed now are not finished, as far as is known.
    fn lag(&self) -> i64;

    /// Notes how far partitions have come. What is noted for a partition that is no longer ours is ignored.
    fn store(&mut self, progress: &[Progress]);

    /// Commits what is stored, without waiting.
    fn commit(&mut self);

    /// Reads no more of this partition until [`resume`](Self::resume).
    fn pause(&mut self, partition: &Partition);

    /// Reads on.
    fn resume(&mut self, partition: &Partition);

    /// Reads a partition once more from this offset on. What comes before [`Event::Rewound`] was read earlier.
    fn rewind(&mut self, partition: &Partition, offset: i64);

    /// The partitions of the oldest [`Event::Revoked`] are drained and stored: commit, then give them up.
    fn release(&mut self);

    /// What tells whether a partition is surely still ours; nothing where it cannot be lost unheard.
    fn fence(&self, _: &Partition) -> Option<Arc<Fence>> {
        None
    }

    /// Gives up everything: each partition comes back as [`Event::Revoked`], and [`Event::Ended`] follows.
    fn close(&mut self);
}

/// How long what waits must take before a tenant's records are set aside: that costs each of them another hop, and a
/// queue that is soon worked off delays nobody by much.
const LONG_QUEUE: Duration = Duration::from_secs(2);

/// How many records are moved to the overflow topic together.
const MOVED_MAX: usize = 256;

/// How far a partition has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The partition.
    pub partition: Partition,
    /// The next offset to read.
    pub offset: i64,
    /// What stands beside it, for whoever reads on from there.
    pub metadata: String,
}

/// What a source tells.
#[derive(Debug)]
pub enum Event {
    /// These partitions are ours from now on.
    Assigned(Vec<Partition>),
    /// These partitions are to be given up. `lost` where somebody else may own them already.
    Revoked {
        /// Which.
        partitions: Vec<Partition>,
        /// Whether it is too late to store anything.
        lost: bool,
    },
    /// Records, each partition's in order.
    Records(Vec<Incoming>),
    /// A partition is read as [`Source::rewind`] said from now on.
    Rewound(Partition),
    /// Nothing more will come.
    Ended,
    /// The source cannot go on.
    Failed(String),
}

/// Where a stage's messages go.
pub trait Sink: Send + Sync + 'static {
    /// Writes messages; resolves when all of them are acknowledged. Waits for a log that is away.
    fn send(&self, messages: Vec<Outgoing>) -> BoxFuture<'_, Result<(), SendError>>;
}

/// Why messages were not written.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SendError {
    /// The topic does not take so large a message; no retry can help.
    #[error("a message of {bytes} bytes is larger than topic {topic} takes")]
    TooLarge {
        /// The topic.
        topic: String,
        /// The bytes of the message's value.
        bytes: usize,
    },
    /// The sink is closed; the record stays unfinished and is read again.
    #[error("the sink is closed")]
    Closed,
    /// The sink cannot go on.
    #[error("could not write to topic {topic}: {reason}")]
    Fatal {
        /// The topic.
        topic: String,
        /// What happened.
        reason: String,
    },
}

/// The bounds of one stage.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Records in the operator at a time.
    pub in_flight: usize,
    /// Records that may wait for the operator on each channel.
    pub waiting: usize,
    /// Offsets between the lowest unfinished record of a partition and the highest that was read.
    pub window: i64,
    /// How long a partition that is taken away may take to finish what is running.
    pub drain: Duration,
    /// How often progress is committed.
    pub commit_every: Duration,
    /// Whether records of one key are processed one after the other. When a partition is taken away, what finished
    /// beyond a record that still waited for its turn is then processed again, as no commit passes that record.
    pub ordered: bool,
}

impl Limits {
    /// The usual bounds, with so many records in the operator at a time.
    pub fn new(in_flight: usize) -> Self {
        Self {
            in_flight,
            waiting: (4 * in_flight).max(2_048),
            window: 65_536,
            // Shorter than max.poll.interval.ms and than what init systems allow before they kill.
            drain: Duration::from_secs(10),
            commit_every: Duration::from_millis(250),
            ordered: false,
        }
    }
}

/// Why a stage ended before it was asked to.
#[derive(Debug, thiserror::Error)]
#[error("stage {stage} cannot go on: {reason}")]
pub struct DriveError {
    stage: String,
    reason: String,
}

impl DriveError {
    /// The loop itself panicked.
    pub(crate) fn panicked() -> Self {
        Self { stage: "(unknown)".to_owned(), reason: "its loop panicked; the log says where".to_owned() }
    }
}

/// One partition that is ours.
struct Owned {
    /// Given when it is ours no more.
    gone: CancellationToken,
    /// Gives that whenever this is dropped, for whatever reason.
    _gone: DropGuard,
    epoch: u64,
    tracker: Tracker,
    /// Records that are running or unacknowledged.
    busy: usize,
    /// Whether its window is full.
    full: bool,
    /// When the record is due at which it stands still, in milliseconds since 1970.
    due_ms: Option<i64>,
    /// Set until it is read again from that record on.
    rewinding: bool,
    /// From where on records wait that were set aside and are not read yet, where that is known.
    waits_from: Option<i64>,
    /// How many requests had been taken back when these were last looked through.
    looked: u64,
    /// Set when it is being taken away: nothing of it is dispatched any more.
    leaving: bool,
}

impl Owned {
    fn new(epoch: u64) -> Self {
        let gone = CancellationToken::new();
        let (tracker, _gone) = (Tracker::default(), gone.clone().drop_guard());
        Self {
            gone,
            _gone,
            epoch,
            tracker,
            busy: 0,
            full: false,
            due_ms: None,
            rewinding: false,
            waits_from: None,
            looked: 0,
            leaving: false,
        }
    }

    fn is_paused(&self) -> bool {
        self.full || self.due_ms.is_some()
    }

    fn is_to_be_looked_through(&self, taken_back: u64) -> bool {
        !self.leaving && self.waits_from.is_some() && self.looked < taken_back
    }
}

/// A record whose messages are acknowledged, or that is to be read again.
struct Done {
    partition: Partition,
    epoch: u64,
    offset: i64,
    key: Option<Bytes>,
    /// From its start until its messages were acknowledged; nothing for a record that was only set aside.
    took: Option<Duration>,
    result: Result<(), SendError>,
}

impl Done {
    fn of(incoming: &Incoming, epoch: u64, took: Option<Duration>, result: Result<(), SendError>) -> Self {
        let Incoming { partition, offset, key, .. } = incoming;
        Self { partition: partition.clone(), epoch, offset: *offset, key: key.clone(), took, result }
    }
}

/// Partitions that are being taken away together.
struct Leaving {
    partitions: Vec<Partition>,
    until: Instant,
}

struct Loop<S> {
    stage: Arc<Stage>,
    source: S,
    sink: Arc<dyn Sink>,
    limits: Limits,
    owned: HashMap<Partition, Owned>,
    epoch: u64,
    queue: Queue,
    /// Keys whose turn somebody has, with the records that wait for the next one; only where the step is ordered.
    turns: HashMap<Bytes, VecDeque<Incoming>>,
    room: Arc<Semaphore>,
    tasks: FuturesUnordered<BoxFuture<'static, Vec<Done>>>,
    /// Records of one partition, one after the other, that are to be moved to the overflow topic together.
    moving: Vec<Incoming>,
    /// How long a record takes, as an exponentially weighted mean of about the last fifty.
    mean: Option<Duration>,
    /// How long what waits would take.
    work_queued: Duration,
    leaving: VecDeque<Leaving>,
    looks: ahead::Looks,
}

/// Runs a stage until `shutdown` is given and its partitions are drained, or until it cannot go on.
pub async fn drive<S: Source>(
    stage: Arc<Stage>,
    source: S,
    sink: Arc<dyn Sink>,
    limits: Limits,
    shutdown: CancellationToken,
) -> Result<(), DriveError> {
    let room = Arc::new(Semaphore::new(limits.in_flight));
    let mut state = Loop {
        stage,
        source,
        sink,
        limits,
        owned: HashMap::new(),
        epoch: 0,
        queue: Queue::new(),
        turns: HashMap::new(),
        room,
        tasks: FuturesUnordered::new(),
        moving: Vec::new(),
        mean: None,
        work_queued: Duration::ZERO,
        leaving: VecDeque::new(),
        looks: ahead::Looks::default(),
    };
    state.run(shutdown).await
}

impl<S: Source> Loop<S> {
    async fn run(&mut self, shutdown: CancellationToken) -> Result<(), DriveError> {
        let mut commit = tokio::time::interval(self.limits.commit_every);
        commit.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut closing = false;
        let mut turn = Instant::now();
        loop {
            if turn.elapsed() > TURN_MAX {
                tokio::task::yield_now().await;
                turn = Instant::now();
            }
            let drained_by = self.leaving.front().map(|leaving| leaving.until);
            tokio::select! {
                biased;
                () = shutdown.cancelled(), if !closing => {
                    closing = true;
                    self.source.close();
                }
                // Before what is ready without end while there is a backlog: nothing would be committed until it is gone.
                _ = commit.tick() => {
                    self.store();
                    self.source.commit();
                    self.wake_due();
                    self.look_ahead();
                    self.measure();
                }
                () = until(drained_by), if drained_by.is_some() => self.release_drained(true),
                Some(done) = self.tasks.next() => {
                    let mut next = Some(done);
                    while let Some(done) = next {
                        done.into_iter().try_for_each(|done| self.finish(done))?;
                        let goes_on = turn.elapsed() <= TURN_MAX;
                        next = goes_on.then(|| self.tasks.next().now_or_never().flatten()).flatten();
                    }
                }
                permit = Arc::clone(&self.room).acquire_owned(), if !self.queue.is_empty() => {
                    self.dispatch(permit.map_err(|closed| self.error(closed.to_string()))?);
                    while !self.queue.is_empty() && let Ok(permit) = Arc::clone(&self.room).try_acquire_owned() {
                        self.dispatch(permit);
                    }
                }
                event = self.source.next() => {
                    if self.take(event)? {
                        return Ok(());
                    }
                    while let Some(event) = self.source.try_next() {
                        if self.take(event)? {
                            return Ok(());
                        }
                    }
                    self.move_aside();
                }
            }
        }
    }

    /// Takes in what the source tells; true at its end.
    fn take(&mut self, event: Event) -> Result<bool, DriveError> {
        match event {
            Event::Records(records) => records.into_iter().for_each(|incoming| self.admit(incoming)),
            Event::Rewound(partition) => {
                if let Some(owned) = self.owned.get_mut(&partition) {
                    owned.rewinding = false;
                }
            }
            Event::Assigned(partitions) => self.assign(partitions),
            Event::Revoked { partitions, lost } => self.revoke(partitions, lost),
            Event::Ended => return Ok(true),
            Event::Failed(reason) => return Err(self.error(reason)),
        }
        Ok(false)
    }

    fn assign(&mut self, partitions: Vec<Partition>) {
        for partition in partitions {
            self.epoch += 1;
            self.stage.assigned(&partition);
            self.owned.insert(partition, Owned::new(self.epoch));
        }
        self.meter().assigned(self.owned.len());
        info!(stage = %self.stage.key(), partitions = self.owned.len(), "partitions assigned");
    }

    fn admit(&mut self, incoming: Incoming) {
        let (channel, bytes) = (incoming.channel, incoming.held.bytes());
        let unread = |owned: &&mut Owned| !owned.leaving && !owned.rewinding;
        let Some(owned) = self.owned.get_mut(&incoming.partition).filter(unread) else {
            // It was read before its partition was taken away, or rewound: it is read again.
            return self.source.dispatched(channel, bytes);
        };
        if let Some(due_ms) = due_ms(&incoming).filter(|due_ms| *due_ms > self.stage.now_ms()) {
            (owned.due_ms, owned.rewinding) = (Some(due_ms), true);
            owned.waits_from = Some(incoming.offset);
            self.source.pause(&incoming.partition);
            self.source.rewind(&incoming.partition, incoming.offset);
            return self.source.dispatched(channel, bytes);
        }
        if !owned.tracker.begin(incoming.offset) {
            return self.source.dispatched(channel, bytes);
        }
        // On a retry topic more may be due: only where one stands still others wait behind it.
        owned.waits_from = (channel == Channel::Overflow).then_some(incoming.offset + 1);
        let becomes_full = !owned.full && owned.tracker.span() > self.limits.window;
        if becomes_full {
            owned.full = true;
            self.source.pause(&incoming.partition);
        }
        self.stage.meter().received(&incoming.partition.topic, incoming.len());
        let (tenant, partition) = (self.stage.tenant(&incoming), incoming.partition.clone());
        let long = self.work_queued >= LONG_QUEUE && channel == Channel::Live;
        let waiting = Waiting { incoming, tenant, has_turn: false };
        if long && self.queue.is_over_share(&waiting.tenant, self.limits.waiting) {
            self.set_aside(waiting);
        } else {
            self.queue.push(waiting);
        }
        // A flood that waits would hide what lies beyond the window.
        if becomes_full && long {
            for waiting in self.queue.take_flood(&partition, self.limits.waiting) {
                self.set_aside(waiting);
            }
        }
    }

    /// Moves a record to the overflow topic where that may be, together with those of its partition that come next.
    fn set_aside(&mut self, waiting: Waiting) {
        if !self.stage.may_be_set_aside(&waiting.incoming) {
            return self.queue.push(waiting);
        }
        let incoming = waiting.incoming;
        // It waits for the operator no more; until it is written, the window and the budget bound it.
        self.source.dispatched(incoming.channel, incoming.held.bytes());
        if self.moving.first().is_some_and(|first| first.partition != incoming.partition)
            || self.moving.len() == MOVED_MAX
        {
            self.move_aside();
        }
        self.moving.push(incoming);
    }

    fn move_aside(&mut self) {
        let records = std::mem::take(&mut self.moving);
        let Some(first) = records.first() else { return };
        let Some((epoch, ours)) = self.begin(&first.partition.clone(), records.len()) else { return };
        let (stage, sink) = (Arc::clone(&self.stage), Arc::clone(&self.sink));
        self.tasks.push(Box::pin(async move {
            let result = set_aside(&stage, &*sink, &records, &ours).await;
            records.into_iter().map(|incoming| Done::of(&incoming, epoch, None, result.clone())).collect()
        }));
    }

    /// Reads on where a record has become due.
    fn wake_due(&mut self) {
        let now_ms = self.stage.now_ms();
        for (partition, owned) in &mut self.owned {
            if owned.due_ms.is_some_and(|due_ms| due_ms <= now_ms) {
                owned.due_ms = None;
                if !owned.is_paused() {
                    self.source.resume(partition);
                }
            }
        }
    }

    /// Gives the record whose turn it is to the operator.
    fn dispatch(&mut self, permit: OwnedSemaphorePermit) {
        let Some(Waiting { incoming, has_turn, .. }) = self.queue.pop() else { return };
        if has_turn {
            return self.start(incoming, permit);
        }
        self.source.dispatched(incoming.channel, incoming.held.bytes());
        if self.limits.ordered
            && let Some(key) = incoming.key.clone()
        {
            if let Some(turn) = self.turns.get_mut(&key) {
                return turn.push_back(incoming);
            }
            self.turns.insert(key, VecDeque::new());
        }
        self.start(incoming, permit);
    }

    /// Lets a record go its way beside the loop.
    fn start(&mut self, incoming: Incoming, permit: OwnedSemaphorePermit) {
        let Some((epoch, ours)) = self.begin(&incoming.partition, 1) else {
            return self.next_turn(incoming.key.as_ref());
        };
        let (stage, sink) = (Arc::clone(&self.stage), Arc::clone(&self.sink));
        self.tasks.push(Box::pin(async move {
            let started = Instant::now();
            let result = advance(&stage, &*sink, &incoming, permit, &ours).await;
            vec![Done::of(&incoming, epoch, Some(started.elapsed()), result)]
        }));
    }

    /// Counts so many records of a partition as busy, while it is ours.
    fn begin(&mut self, partition: &Partition, records: usize) -> Option<(u64, Ours)> {
        let owned = self.owned.get_mut(partition).filter(|owned| !owned.leaving)?;
        owned.busy += records;
        Some((owned.epoch, Ours { fence: self.source.fence(partition), gone: owned.gone.clone() }))
    }

    fn finish(&mut self, done: Done) -> Result<(), DriveError> {
        let Done { partition, epoch, offset, key, took, result } = done;
        if let Some(took) = took {
            self.mean = Some(self.mean.map_or(took, |mean| mean.mul_f64(0.98) + took.mul_f64(0.02)));
        }
        self.next_turn(key.as_ref());
        let finished = match result {
            Ok(()) => true,
            Err(SendError::Closed) => false,
            Err(fault) => return Err(self.error(fault.to_string())),
        };
        let Some(owned) = self.owned.get_mut(&partition).filter(|owned| owned.epoch == epoch) else {
            warn!(stage = %self.stage.key(), %partition, offset,
                "a record finished after its partition was given up; its next owner may process it again");
            return Ok(());
        };
        owned.busy -= 1;
        if finished {
            owned.tracker.finish(offset);
        }
        if owned.full && owned.tracker.span() <= self.limits.window / 2 {
            owned.full = false;
            if !owned.is_paused() {
                self.source.resume(&partition);
            }
        }
        if owned.leaving {
            self.release_drained(false);
        }
        Ok(())
    }

    /// Passes the turn of a key on, to the record that has waited longest.
    fn next_turn(&mut self, key: Option<&Bytes>) {
        let Some((key, mut turn)) = key.and_then(|key| self.turns.remove_entry(key)) else { return };
        if let Some(incoming) = turn.pop_front() {
            self.turns.insert(key, turn);
            self.queue.push(Waiting { incoming, tenant: Bytes::new(), has_turn: true });
        }
    }

    fn revoke(&mut self, partitions: Vec<Partition>, lost: bool) {
        let gone: HashSet<_> = partitions.iter().cloned().collect();
        // What waits was never started: the next owner reads it.
        for turn in self.turns.values_mut() {
            turn.retain(|incoming| !gone.contains(&incoming.partition));
        }
        let mut given_back = Vec::new();
        for Waiting { incoming, has_turn, .. } in self.queue.take_out(&gone) {
            if has_turn {
                given_back.push(incoming.key);
            } else {
                self.source.dispatched(incoming.channel, incoming.held.bytes());
            }
        }
        // Behind it a record of the same key may wait that lies on another topic, and is still ours.
        for key in &given_back {
            self.next_turn(key.as_ref());
        }
        for partition in &partitions {
            if lost {
                self.owned.remove(partition);
                self.stage.given_up(partition);
            } else if let Some(owned) = self.owned.get_mut(partition) {
                owned.leaving = true;
            }
        }
        self.meter().rebalanced();
        info!(stage = %self.stage.key(), partitions = partitions.len(), lost, "partitions revoked; draining");
        self.leaving.push_back(Leaving { partitions, until: Instant::now() + self.limits.drain });
        self.release_drained(false);
    }

    /// Gives up, in order, all partitions that are drained; the first also when its time is up.
    fn release_drained(&mut self, mut late: bool) {
        while let Some(leaving) = self.leaving.front() {
            let busy = |partition| self.owned.get(partition).map_or(0, |owned: &Owned| owned.busy);
            let unfinished: usize = leaving.partitions.iter().map(busy).sum();
            if unfinished > 0 && !late {
                return;
            }
            if unfinished > 0 {
                warn!(stage = %self.stage.key(), unfinished,
                    "partitions are given up before all their records finished; these will be processed again");
            }
            late = false;
            self.store();
            let Some(leaving) = self.leaving.pop_front() else { return };
            for partition in &leaving.partitions {
                // One that was lost may be ours again, under another epoch.
                if self.owned.get(partition).is_some_and(|owned| owned.leaving) {
                    self.owned.remove(partition);
                    self.stage.given_up(partition);
                }
            }
            self.meter().assigned(self.owned.len());
            self.source.release();
        }
    }

    fn store(&mut self) {
        let mut progress = Vec::new();
        for (partition, owned) in &mut self.owned {
            if let Some(offset) = owned.tracker.take_progress() {
                let metadata = self.stage.metadata(partition, offset);
                progress.push(Progress { partition: partition.clone(), offset, metadata });
            }
        }
        if !progress.is_empty() {
            crash_point("store");
            self.source.store(&progress);
            crash_point("commit");
        }
    }

    fn measure(&mut self) {
        if let Some(mean) = self.mean {
            self.work_queued = work(self.source.lag(), mean, self.limits.in_flight);
        }
        let meter = self.meter();
        meter.in_flight(self.limits.in_flight - self.room.available_permits());
        let (records, bytes) = self.queue.size();
        meter.buffered(records, bytes);
        meter.seconds_of_work_queued(self.work_queued.as_secs_f64());
        meter.paused(self.owned.values().filter(|owned| owned.is_paused()).count());
    }

    fn meter(&self) -> &StepMeter {
        self.stage.meter()
    }

    fn error(&self, reason: String) -> DriveError {
        error!(stage = %self.stage.key(), reason, "a stage cannot go on");
        DriveError { stage: self.stage.key().to_string(), reason }
    }
}

/// Takes a record from running to acknowledged. One that is not ours any more is left to its new owner: before its
/// operator starts, since that may cost something, and before anything of it is written.
async fn advance(
    stage: &Stage,
    sink: &dyn Sink,
    incoming: &Incoming,
    permit: OwnedSemaphorePermit,
    ours: &Ours,
) -> Result<(), SendError> {
    ours.still().await?;
    // What lies elsewhere is held until all that becomes of it is written.
    let whole = tokio::select! {
        whole = stage.fetch(incoming) => whole,
        () = ours.gone.cancelled() => return Err(SendError::Closed),
    };
    ours.still().await?;
    let ledger = stage.ledger_of(incoming);
    // A paid call is heard out also when its partition is gone: its answer is in the ledger then, for the next owner.
    let gone = async {
        ours.gone.cancelled().await;
        if let Some(ledger) = &ledger {
            ledger.heard_out().await;
        }
    };
    let (incoming, messages) = match &whole {
        Ok(whole) => tokio::select! {
            messages = stage.process(whole, ledger.as_ref()) => (&**whole, messages),
            () = gone => return Err(SendError::Closed),
        },
        Err(messages) => (incoming, messages.clone()),
    };
    // The operator is free for the next record while this one's messages are on their way.
    drop(permit);
    write(stage, sink, incoming, messages, ours).await
}

/// Moves records to the overflow topic together, while their partition is ours.
async fn set_aside(
    stage: &Stage,
    sink: &dyn Sink,
    records: &[Incoming],
    ours: &Ours,
) -> Result<(), SendError> {
    ours.still().await?;
    let (mut messages, mut ledgers) = (Vec::with_capacity(records.len()), Vec::new());
    for incoming in records {
        match stage.set_aside(incoming) {
            Some(aside) => {
                messages.push(aside);
                ledgers.extend(stage.ledger_of(incoming));
            }
            // What cannot be read becomes a dead letter at once.
            None => messages.extend(stage.process(incoming, None).await),
        }
    }
    if let Some(topic) = stage.overflow() {
        try_join_all(ledgers.iter().map(|ledger| ledger.moves_to(topic))).await?;
    }
    ours.still().await?;
    let written = unless_gone(ours, async { sink.send(stage.check_in(messages).await).await }).await;
    crash_point("aside");
    let Err(SendError::TooLarge { .. }) = written else { return written };
    // Which of them, only each alone can tell; a second copy is known by its id.
    for incoming in records {
        let messages = match stage.set_aside(incoming) {
            Some(aside) => vec![aside],
            None => stage.process(incoming, None).await,
        };
        write(stage, sink, incoming, messages, ours).await?;
    }
    Ok(())
}

/// Writes what a record became, while the record is ours; another ending where a topic would not take it.
async fn write(
    stage: &Stage,
    sink: &dyn Sink,
    incoming: &Incoming,
    messages: Vec<Outgoing>,
    ours: &Ours,
) -> Result<(), SendError> {
    ours.still().await?;
    unless_gone(ours, async {
        let messages = stage.check_in(messages).await;
        crash_point("output");
        let mut result = sink.send(messages).await;
        crash_point("written");
        for bare in [false, true] {
            let Err(SendError::TooLarge { topic, .. }) = &result else { break };
            result = sink.send(stage.too_large(incoming, topic, bare)).await;
        }
        result
    })
    .await
}

/// A log that is away may be waited for beyond the time that a partition is ours.
async fn unless_gone(
    ours: &Ours,
    write: impl Future<Output = Result<(), SendError>>,
) -> Result<(), SendError> {
    tokio::select! {
        result = write => result,
        () = ours.gone.cancelled() => Err(SendError::Closed),
    }
}

/// Whether a record's partition is ours.
struct Ours {
    fence: Option<Arc<Fence>>,
    gone: CancellationToken,
}

impl Ours {
    /// Returns when it surely is, or with an error when it is not any more.
    async fn still(&self) -> Result<(), SendError> {
        if let Some(fence) = self.fence.as_ref().filter(|fence| !fence.is_sure()) {
            tokio::select! {
                () = self.gone.cancelled() => {}
                () = fence.sure() => {}
            }
        }
        if self.gone.is_cancelled() { Err(SendError::Closed) } else { Ok(()) }
    }
}

/// How long so many records take, where so many are under way at a time and each takes that long (Little's law).
fn work(records: i64, mean: Duration, in_flight: usize) -> Duration {
    let number = |n: usize| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
    let turns = number(usize::try_from(records).unwrap_or(0)) / number(in_flight.max(1));
    Duration::try_from_secs_f64(mean.as_secs_f64() * turns).unwrap_or(Duration::MAX)
}

/// When a record is to be tried that a host set aside. On a topic of clients the header would be theirs.
fn due_ms(incoming: &Incoming) -> Option<i64> {
    match incoming.channel {
        Channel::Retry => Retry::due_ms(&incoming.headers),
        Channel::Live | Channel::Backfill | Channel::Overflow => None,
    }
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_what_waits_times_what_each_takes_over_all_places() {
        assert_eq!(work(1_000, Duration::from_millis(500), 50), Duration::from_secs(10));
    }
}
