//! In memory: topics are vectors, time may be virtual, and a test says when a member loses its partitions.
//!
//! Pipeline cases and simulation run here, over the same loop as production.

use crate::{
    budget::Budget,
    drive::{Event, SendError, Sink, Source},
    message::{Incoming, Outgoing, Partition},
};
use bytes::Bytes;
use forebay_operator::Clock;
use forebay_schemas::Headers;
use futures::future::BoxFuture;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
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
    topics: Mutex<BTreeMap<Arc<str>, Vec<Stored>>>,
    committed: Mutex<BTreeMap<(String, Partition), i64>>,
    grew: watch::Sender<()>,
    clock: Clock,
    bytes_max: usize,
}

impl MemoryLog {
    /// An empty log, whose messages may have so many bytes.
    pub fn new(clock: Clock, bytes_max: usize) -> Arc<Self> {
        let (grew, _) = watch::channel(());
        Arc::new(Self { topics: Mutex::default(), committed: Mutex::default(), grew, clock, bytes_max })
    }

    /// Writes a message and gives its offset.
    pub fn append(
        &self,
        topic: &Arc<str>,
        key: Option<Bytes>,
        value: Option<Bytes>,
        headers: Headers,
    ) -> i64 {
        let stored = Stored { timestamp_ms: self.clock.now_ms(), key, value, headers };
        let mut topics = self.topics.lock().unwrap_or_else(PoisonError::into_inner);
        let topic = topics.entry(Arc::clone(topic)).or_default();
        topic.push(stored);
        let offset = i64::try_from(topic.len() - 1).unwrap_or(i64::MAX);
        drop(topics);
        self.grew.send_replace(());
        offset
    }

    /// All messages of a topic.
    pub fn read(&self, topic: &str) -> Vec<Stored> {
        self.topics.lock().unwrap_or_else(PoisonError::into_inner).get(topic).cloned().unwrap_or_default()
    }

    /// How far a group has come in a topic: the next offset that it would read.
    pub fn committed(&self, group: &str, topic: &Arc<str>) -> i64 {
        let key = (group.to_owned(), Partition { topic: Arc::clone(topic), number: 0 });
        self.committed.lock().unwrap_or_else(PoisonError::into_inner).get(&key).copied().unwrap_or(0)
    }

    /// Resolves when something was written after this call.
    pub fn growth(&self) -> watch::Receiver<()> {
        self.grew.subscribe()
    }

    fn at(&self, partition: &Partition, offset: i64) -> Option<Stored> {
        let topics = self.topics.lock().unwrap_or_else(PoisonError::into_inner);
        topics.get(&partition.topic)?.get(usize::try_from(offset).ok()?).cloned()
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

/// What a test lets happen to a member of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sentinel {
    /// Its partitions are taken away and given back, after it has drained them.
    Rebalance,
    /// Its partitions are gone and come back: what was not committed is delivered again.
    Lose,
}

/// A member of a group.
pub struct MemorySource {
    log: Arc<MemoryLog>,
    group: String,
    partitions: Vec<Partition>,
    /// The next offset of each partition, while it is ours.
    positions: BTreeMap<Partition, i64>,
    paused: Vec<Partition>,
    stored: BTreeMap<Partition, i64>,
    events: VecDeque<Event>,
    sentinels: mpsc::UnboundedReceiver<Sentinel>,
    grew: watch::Receiver<()>,
    budget: Arc<Budget>,
    /// Whether released partitions come back.
    comes_back: bool,
    closing: bool,
}

impl MemorySource {
    /// Joins a group; the sender lets things happen to the member.
    pub fn join(
        log: &Arc<MemoryLog>,
        group: &str,
        topics: &[Arc<str>],
    ) -> (Self, mpsc::UnboundedSender<Sentinel>) {
        let (sender, sentinels) = mpsc::unbounded_channel();
        let partitions =
            topics.iter().map(|topic| Partition { topic: Arc::clone(topic), number: 0 }).collect();
        let mut source = Self {
            log: Arc::clone(log),
            group: group.to_owned(),
            partitions,
            positions: BTreeMap::new(),
            paused: Vec::new(),
            stored: BTreeMap::new(),
            events: VecDeque::new(),
            sentinels,
            grew: log.growth(),
            budget: Budget::new(usize::MAX),
            comes_back: true,
            closing: false,
        };
        source.assign();
        (source, sender)
    }

    fn assign(&mut self) {
        for partition in &self.partitions {
            self.positions.insert(partition.clone(), self.log.committed(&self.group, &partition.topic));
        }
        self.events.push_back(Event::Assigned(self.partitions.clone()));
    }

    fn revoke(&mut self, lost: bool) {
        self.positions.clear();
        if lost {
            self.stored.clear();
        }
        self.events.push_back(Event::Revoked { partitions: self.partitions.clone(), lost });
    }

    fn ready(&mut self) -> Option<Event> {
        if let Some(event) = self.events.pop_front() {
            return Some(event);
        }
        let next = self.positions.iter_mut().filter(|(partition, _)| !self.paused.contains(partition));
        for (partition, position) in next {
            let Some(stored) = self.log.at(partition, *position) else { continue };
            let Stored { timestamp_ms, key, value, headers } = stored;
            let held = self.budget.take(Incoming::bytes(key.as_deref(), value.as_deref()));
            let offset = *position;
            *position += 1;
            let partition = partition.clone();
            return Some(Event::Record(Incoming {
                partition,
                offset,
                timestamp_ms,
                key,
                value,
                headers,
                held,
            }));
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
                    Some(sentinel) = self.sentinels.recv(), if !self.closing => self.revoke(sentinel == Sentinel::Lose),
                    grew = self.grew.changed() => if grew.is_err() { return Event::Ended },
                }
            }
        })
    }

    fn try_next(&mut self) -> Option<Event> {
        self.ready()
    }

    fn dispatched(&mut self, _: usize) {}

    fn store(&mut self, progress: &[(Partition, i64)]) {
        self.stored.extend(progress.iter().cloned());
    }

    fn commit(&mut self) {
        let mut committed = self.log.committed.lock().unwrap_or_else(PoisonError::into_inner);
        for (partition, offset) in std::mem::take(&mut self.stored) {
            let before = committed.insert((self.group.clone(), partition), offset);
            debug_assert!(before.unwrap_or(0) <= offset, "a committed offset went back");
        }
    }

    fn pause(&mut self, partition: &Partition) {
        self.paused.push(partition.clone());
    }

    fn resume(&mut self, partition: &Partition) {
        self.paused.retain(|paused| paused != partition);
    }

    fn release(&mut self) {
        self.commit();
        if self.closing {
            self.events.push_back(Event::Ended);
        } else if self.comes_back {
            self.assign();
        }
    }

    fn close(&mut self) {
        self.closing = true;
        self.events.clear();
        self.revoke(false);
    }
}
