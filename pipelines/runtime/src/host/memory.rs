//! In memory: topics are vectors, time may be virtual, and a test says when a member loses its partitions.
//!
//! Pipeline cases and simulation run here, over the same loop as production.

use crate::{
    ahead::{Ahead, Found, Wanted},
    budget::Budget,
    claims::{Objects, ObjectsError},
    drive::{Event, Progress, SendError, Sink, Source},
    ledger::{Chunk, Log},
    message::{Incoming, Input, Outgoing, Partition},
};
use bytes::Bytes;
use forebay_operator::Clock;
use forebay_plan::Channel;
use forebay_schemas::{Headers, LedgerEntry, Record as _};
use futures::future::BoxFuture;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::{mpsc, watch};

/// A message as it lies in a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// When it was written, in milliseconds since 1970.
    pub timestamp_ms: i64,
    /// Its key.
    pub key: Option<Bytes>,
    /// Its value.
    pub value: Option<Bytes>,
    /// Its headers.
    pub headers: Headers,
}

/// Topics of one partition each, and how far each group has come.
pub struct MemoryLog {
    state: Mutex<State>,
    grew: watch::Sender<()>,
    moved: watch::Sender<()>,
    clock: Clock,
    bytes_max: usize,
}

/// Under one lock, so that nobody sees a commit without the messages that came before it.
#[derive(Default)]
struct State {
    topics: BTreeMap<Arc<str>, Vec<Stored>>,
    committed: BTreeMap<(String, Arc<str>), i64>,
    /// What stands beside the committed offset.
    metadata: BTreeMap<(String, Arc<str>), String>,
}

impl State {
    fn end(&self, topic: &str) -> i64 {
        self.topics.get(topic).map_or(0, |messages| i64::try_from(messages.len()).unwrap_or(i64::MAX))
    }
}

impl MemoryLog {
    /// An empty log, whose messages may have so many bytes.
    pub fn new(clock: Clock, bytes_max: usize) -> Arc<Self> {
        let (grew, moved) = (watch::Sender::default(), watch::Sender::default());
        Arc::new(Self { state: Mutex::default(), grew, moved, clock, bytes_max })
    }

    /// Writes a message and gives its offset.
    pub fn append(
        &self,
        topic: &Arc<str>,
        key: Option<Bytes>,
        value: Option<Bytes>,
        headers: Headers,
    ) -> i64 {
        self.append_at(self.clock.now_ms(), topic, key, value, headers)
    }

    /// Writes a message that claims to have been written at another time.
    pub fn append_at(
        &self,
        timestamp_ms: i64,
        topic: &Arc<str>,
        key: Option<Bytes>,
        value: Option<Bytes>,
        headers: Headers,
    ) -> i64 {
        let mut state = self.state();
        let offset = state.end(topic);
        let stored = Stored { timestamp_ms, key, value, headers };
        state.topics.entry(Arc::clone(topic)).or_default().push(stored);
        drop(state);
        self.grew.send_replace(());
        offset
    }

    /// All messages of a topic.
    pub fn read(&self, topic: &str) -> Vec<Stored> {
        self.state().topics.get(topic).cloned().unwrap_or_default()
    }

    /// How far a group has come in a topic: the next offset that it would read.
    pub fn committed(&self, group: &str, topic: &Arc<str>) -> i64 {
        self.state().committed.get(&(group.to_owned(), Arc::clone(topic))).copied().unwrap_or(0)
    }

    /// Notes how far a group has come in a topic. False where that goes back, which no group may.
    pub fn commit(&self, group: &str, topic: &Arc<str>, offset: i64) -> bool {
        let before = self.state().committed.insert((group.to_owned(), Arc::clone(topic)), offset);
        self.moved.send_replace(());
        before.unwrap_or(0) <= offset
    }

    /// What stands beside how far a group has come.
    pub fn metadata(&self, group: &str, topic: &Arc<str>) -> String {
        self.state().metadata.get(&(group.to_owned(), Arc::clone(topic))).cloned().unwrap_or_default()
    }

    fn commit_with(&self, group: &str, topic: &Arc<str>, offset: i64, metadata: String) -> bool {
        self.state().metadata.insert((group.to_owned(), Arc::clone(topic)), metadata);
        self.commit(group, topic, offset)
    }

    /// How many messages of each topic each group has not committed yet, where there are any; all as of one moment.
    pub fn lags(&self) -> BTreeMap<(String, Arc<str>), i64> {
        let state = self.state();
        let lags =
            state.committed.iter().map(|(reader, offset)| (reader.clone(), state.end(&reader.1) - offset));
        lags.filter(|(_, lag)| *lag > 0).collect()
    }

    /// Tells of every message that is written from now on.
    pub fn growth(&self) -> watch::Receiver<()> {
        self.grew.subscribe()
    }

    /// Tells of every commit from now on.
    pub fn commits(&self) -> watch::Receiver<()> {
        self.moved.subscribe()
    }

    /// The message at an offset, where there is one.
    pub fn at(&self, topic: &str, offset: i64) -> Option<Stored> {
        self.state().topics.get(topic)?.get(usize::try_from(offset).ok()?).cloned()
    }

    /// The offset behind the last message of a topic.
    pub fn end(&self, topic: &str) -> i64 {
        self.state().end(topic)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sink for MemoryLog {
    fn send(&self, messages: Vec<Outgoing>) -> BoxFuture<'_, Result<(), SendError>> {
        let too_large =
            messages.iter().find(|message| message.value.as_ref().is_some_and(|v| v.len() > self.bytes_max));
        if let Some(message) = too_large {
            let bytes = message.value.as_ref().map_or(0, Vec::len);
            let topic = message.topic.to_string();
            return Box::pin(async move { Err(SendError::TooLarge { topic, bytes }) });
        }
        for Outgoing { topic, key, value, headers } in messages {
            self.append(&topic, key.map(Bytes::from), value.map(Bytes::from), headers);
        }
        Box::pin(async { Ok(()) })
    }
}

/// Ledgers of paid calls in the same log.
pub struct MemoryLedger {
    /// The log.
    pub log: Arc<MemoryLog>,
    /// The group of the stage whose ledgers they are.
    pub group: String,
}

impl Log for MemoryLedger {
    fn append(&self, at: &Partition, entry: &LedgerEntry) -> BoxFuture<'static, Result<i64, SendError>> {
        let value = entry.encode().ok().flatten().map(Bytes::from);
        let offset = self.log.append(&at.topic, Some(entry.message_key().into()), value, Headers::new());
        Box::pin(async move { Ok(offset) })
    }

    fn read(&self, at: &Partition, from: i64, _: usize) -> BoxFuture<'static, Result<Chunk, String>> {
        let stored = self.log.read(&at.topic);
        let next = i64::try_from(stored.len()).unwrap_or(i64::MAX);
        let read =
            |(offset, stored): (i64, Stored)| Some((offset, LedgerEntry::decode(&stored.value?).ok()?));
        let entries = (0..).zip(stored).filter(|(offset, _)| *offset >= from).filter_map(read).collect();
        Box::pin(async move { Ok(Chunk { entries, next, at_end: true, age: Duration::ZERO }) })
    }

    fn committed(&self, input: &Partition) -> BoxFuture<'static, Result<(i64, String), String>> {
        let committed = self.log.committed(&self.group, &input.topic);
        let metadata = self.log.metadata(&self.group, &input.topic);
        Box::pin(async move { Ok((committed, metadata)) })
    }
}

/// Reads on in the same log.
pub struct MemoryAhead {
    /// The log.
    pub log: Arc<MemoryLog>,
    /// What the stage reads.
    pub inputs: Vec<Input>,
}

impl Ahead for MemoryAhead {
    fn read(&self, at: &Partition, from: i64, wanted: Wanted) -> BoxFuture<'static, Result<Found, String>> {
        let budget = Budget::new(usize::MAX);
        let mut found = Found::default();
        for (offset, stored) in (0..).zip(self.log.read(&at.topic)) {
            if offset >= from && wanted(&stored.headers) {
                let input = self.inputs.iter().find(|input| input.topic == at.topic);
                let channel = input.map_or(Channel::Live, |input| input.channel);
                found.records.push(incoming(at, channel, offset, stored, &budget));
            }
        }
        // A look takes its time, as it does over Kafka.
        Box::pin(async {
            tokio::task::yield_now().await;
            Ok(found)
        })
    }
}

/// A message as a stage gets it.
fn incoming(at: &Partition, channel: Channel, offset: i64, stored: Stored, budget: &Arc<Budget>) -> Incoming {
    let Stored { timestamp_ms, key, value, headers } = stored;
    let held = budget.take(Incoming::bytes(key.as_deref(), value.as_deref()));
    Incoming { partition: at.clone(), channel, offset, timestamp_ms, key, value, headers, held }
}

/// Objects in a map.
#[derive(Default)]
pub struct MemoryObjects(Mutex<BTreeMap<String, Bytes>>);

impl MemoryObjects {
    /// The keys of all that is there.
    pub fn keys(&self) -> Vec<String> {
        self.objects().keys().cloned().collect()
    }

    /// Damages an object.
    pub fn replace(&self, key: &str, body: Bytes) {
        self.objects().insert(key.to_owned(), body);
    }

    fn objects(&self) -> MutexGuard<'_, BTreeMap<String, Bytes>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Objects for MemoryObjects {
    fn put<'a>(&'a self, key: &'a str, body: Bytes) -> BoxFuture<'a, Result<(), ObjectsError>> {
        self.objects().entry(key.to_owned()).or_insert(body);
        Box::pin(async { Ok(()) })
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Bytes>, ObjectsError>> {
        let found = self.objects().get(key).cloned();
        Box::pin(async { Ok(found) })
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), ObjectsError>> {
        self.objects().remove(key);
        Box::pin(async { Ok(()) })
    }

    fn list<'a>(&'a self, prefix: &'a str, limit: usize) -> BoxFuture<'a, Result<Vec<String>, ObjectsError>> {
        let objects = self.objects();
        let keys = objects.range(prefix.to_owned()..).map(|(key, _)| key);
        let keys = keys.take_while(|key| key.starts_with(prefix)).take(limit).cloned().collect();
        Box::pin(async { Ok(keys) })
    }
}

/// What a test lets happen to a member of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sentinel {
    /// A topic's partition is taken away and given back, after the member has drained it.
    Rebalance(Arc<str>),
    /// A topic's partition is gone, also from a drain, and comes back: what was not committed is delivered again.
    Lose(Arc<str>),
}

/// How many records of a channel may wait between a member and its operator, as over Kafka.
const WAITING_MAX: usize = 2_048;

/// Partitions that are being drained together.
struct Draining {
    partitions: Vec<Partition>,
    lost: bool,
}

/// A member of a group.
pub struct MemorySource {
    log: Arc<MemoryLog>,
    group: String,
    inputs: Vec<Input>,
    /// The next offset of each partition, while it is ours.
    positions: BTreeMap<Partition, i64>,
    /// Oldest first.
    draining: VecDeque<Draining>,
    paused: BTreeSet<Partition>,
    stored: BTreeMap<Partition, (i64, String)>,
    events: VecDeque<Event>,
    sentinels: mpsc::UnboundedReceiver<Sentinel>,
    grew: watch::Receiver<()>,
    budget: Arc<Budget>,
    waiting: BTreeMap<Channel, usize>,
    closing: bool,
}

impl MemorySource {
    /// Joins a group; the sender lets things happen to the member.
    pub fn join(
        log: &Arc<MemoryLog>,
        group: &str,
        inputs: &[Input],
    ) -> (Self, mpsc::UnboundedSender<Sentinel>) {
        let (sender, sentinels) = mpsc::unbounded_channel();
        let mut source = Self {
            log: Arc::clone(log),
            group: group.to_owned(),
            inputs: inputs.to_vec(),
            positions: BTreeMap::new(),
            draining: VecDeque::new(),
            paused: BTreeSet::new(),
            stored: BTreeMap::new(),
            events: VecDeque::new(),
            sentinels,
            grew: log.growth(),
            budget: Budget::new(usize::MAX),
            waiting: BTreeMap::new(),
            closing: false,
        };
        source.assign(
            inputs.iter().map(|input| Partition { topic: Arc::clone(&input.topic), number: 0 }).collect(),
        );
        (source, sender)
    }

    fn assign(&mut self, partitions: Vec<Partition>) {
        for partition in &partitions {
            let committed = self.log.committed(&self.group, &partition.topic);
            // A group is known from its first member on, also before it has come anywhere.
            self.log.commit(&self.group, &partition.topic, committed);
            self.positions.insert(partition.clone(), committed);
        }
        self.events.push_back(Event::Assigned(partitions));
    }

    fn obey(&mut self, sentinel: Sentinel) {
        let (topic, lost) = match sentinel {
            Sentinel::Rebalance(topic) => (topic, false),
            Sentinel::Lose(topic) => (topic, true),
        };
        let partition = Partition { topic, number: 0 };
        if self.positions.contains_key(&partition) {
            return self.revoke(vec![partition], lost);
        }
        // It is being drained. Nobody tells the member once more: it learns when its commit is refused.
        if lost {
            self.stored.remove(&partition);
            let same = self.draining.iter_mut().filter(|draining| draining.partitions.contains(&partition));
            same.for_each(|draining| draining.lost = true);
        }
    }

    fn revoke(&mut self, partitions: Vec<Partition>, lost: bool) {
        for partition in &partitions {
            self.positions.remove(partition);
            self.paused.remove(partition);
            if lost {
                self.stored.remove(partition);
            }
        }
        self.draining.push_back(Draining { partitions: partitions.clone(), lost });
        self.events.push_back(Event::Revoked { partitions, lost });
    }

    fn is_ours(&self, partition: &Partition) -> bool {
        let mut kept = self.draining.iter().filter(|draining| !draining.lost);
        self.positions.contains_key(partition) || kept.any(|draining| draining.partitions.contains(partition))
    }

    fn ready(&mut self) -> Option<Event> {
        if let Some(event) = self.events.pop_front() {
            return Some(event);
        }
        let reading = self.positions.iter_mut().filter(|(partition, _)| !self.paused.contains(partition));
        for (partition, position) in reading {
            let input = self.inputs.iter().find(|input| input.topic == partition.topic);
            let channel = input.map_or(Channel::Live, |input| input.channel);
            let waiting = self.waiting.entry(channel).or_default();
            if *waiting >= WAITING_MAX {
                continue;
            }
            let Some(stored) = self.log.at(&partition.topic, *position) else { continue };
            let incoming = incoming(partition, channel, *position, stored, &self.budget);
            *position += 1;
            *waiting += 1;
            return Some(Event::Records(vec![incoming]));
        }
        None
    }
}

impl Source for MemorySource {
    fn next(&mut self) -> BoxFuture<'_, Event> {
        Box::pin(async {
            loop {
                self.grew.mark_unchanged();
                if let Some(event) = self.ready() {
                    return event;
                }
                tokio::select! {
                    Some(sentinel) = self.sentinels.recv(), if !self.closing => self.obey(sentinel),
                    grew = self.grew.changed() => if grew.is_err() { return Event::Ended },
                }
            }
        })
    }

    fn try_next(&mut self) -> Option<Event> {
        self.ready()
    }

    fn dispatched(&mut self, channel: Channel, _: usize) {
        *self.waiting.entry(channel).or_default() -= 1;
    }

    fn lag(&self) -> i64 {
        let left = self.positions.iter().filter(|(partition, _)| !self.paused.contains(partition));
        left.map(|(partition, position)| self.log.end(&partition.topic) - position).sum()
    }

    fn store(&mut self, progress: &[Progress]) {
        for Progress { partition, offset, metadata } in progress {
            if self.is_ours(partition) {
                self.stored.insert(partition.clone(), (*offset, metadata.clone()));
            }
        }
    }

    fn commit(&mut self) {
        for (partition, (offset, metadata)) in std::mem::take(&mut self.stored) {
            let forward = self.log.commit_with(&self.group, &partition.topic, offset, metadata);
            debug_assert!(forward, "group {} went back in {partition}", self.group);
        }
    }

    fn pause(&mut self, partition: &Partition) {
        self.paused.insert(partition.clone());
    }

    fn resume(&mut self, partition: &Partition) {
        self.paused.remove(partition);
    }

    fn rewind(&mut self, partition: &Partition, offset: i64) {
        if let Some(position) = self.positions.get_mut(partition) {
            *position = offset;
            self.events.push_back(Event::Rewound(partition.clone()));
        }
    }

    fn release(&mut self) {
        self.commit();
        let Some(Draining { partitions, .. }) = self.draining.pop_front() else { return };
        if !self.closing {
            self.assign(partitions);
        } else if self.draining.is_empty() {
            self.events.push_back(Event::Ended);
        }
    }

    fn close(&mut self) {
        self.closing = true;
        let partitions: Vec<_> = self.positions.keys().cloned().collect();
        self.revoke(partitions, false);
    }
}
