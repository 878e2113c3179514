//! Reads a compacted topic whole into a table, and then follows it.
//!
//! Invariant: a table says that it has caught up only when it holds all that the topic held when reading began.

use super::{
    client::{Kafka, SettingsError},
    lifeline::{LastingContext, looked_after},
};
use crate::stage::chain;
use bytes::Bytes;
use forebay_operator::{Change, Failure, Table};
use forebay_telemetry::Health;
use rdkafka::{
    Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    types::RDKafkaErrorCode,
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::{runtime::Handle, sync::watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

/// How many changes are applied at once at most, and how many bytes they may have.
const BATCH_RECORDS: usize = 1_000;
const BATCH_BYTES: usize = 8 << 20;

/// How long changes are gathered after others were applied: a commit of the store costs as much as many changes do.
const APPLY_EVERY: Duration = Duration::from_millis(50);

const WAIT: Duration = Duration::from_secs(10);

/// How long it may take until all leaders are known: a busy broker makes hundreds of new partitions one after the other.
const LEADERS_MAX: Duration = Duration::from_secs(60);

/// How long to wait before asking for a partition's leader again.
const LEADER_WAIT: Duration = Duration::from_millis(100);

/// Why a table could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// No consumer.
    #[error(transparent)]
    Client(#[from] SettingsError),
    /// The cluster did not say where the topic begins and ends.
    #[error("could not find where topic {topic} begins and ends")]
    Bounds {
        /// The topic.
        topic: String,
        /// What happened.
        #[source]
        source: KafkaError,
    },
    /// The store behind the table failed.
    #[error("could not open the table of topic {topic}")]
    Store {
        /// The topic.
        topic: String,
        /// What happened.
        #[source]
        source: Failure,
    },
}

/// A table that follows its topic.
#[derive(Clone)]
pub struct TableReader {
    topic: Arc<str>,
    caught_up: watch::Receiver<bool>,
    positions: Arc<Mutex<BTreeMap<i32, i64>>>,
}

impl TableReader {
    /// Starts to read. Blocks until the topic's bounds are known.
    pub fn start(
        kafka: &Kafka,
        topic: &Arc<str>,
        table: Arc<dyn Table>,
        health: Health,
        runtime: &Handle,
        shutdown: CancellationToken,
    ) -> Result<Self, TableError> {
        let consumer: BaseConsumer<LastingContext> = looked_after(kafka.reader_config())
            .create_with_context(LastingContext::to(kafka))
            .map_err(SettingsError::Client)?;
        let bounds = bounds(&consumer, topic, runtime)?;
        let store = |source| TableError::Store { topic: topic.to_string(), source };
        let starts = runtime.block_on(starts(&*table, &bounds)).map_err(store)?;
        let mut assignment = TopicPartitionList::new();
        for (partition, start) in &starts {
            let added = assignment.add_partition_offset(topic, *partition, Offset::Offset(*start));
            added.map_err(|source| TableError::Bounds { topic: topic.to_string(), source })?;
        }
        consumer
            .assign(&assignment)
            .map_err(|source| TableError::Bounds { topic: topic.to_string(), source })?;
        let (caught_up_in, caught_up) = watch::channel(false);
        let positions = Arc::new(Mutex::new(starts));
        let follower = Follower {
            consumer,
            topic: Arc::clone(topic),
            table,
            positions: Arc::clone(&positions),
            ends: bounds.iter().map(|(partition, (_, end))| (*partition, *end)).collect(),
            caught_up: caught_up_in,
            health,
            runtime: runtime.clone(),
            shutdown,
            applied: Instant::now(),
        };
        let thread = std::thread::Builder::new().name(format!("table {topic}"));
        thread
            .spawn(move || follower.run())
            .map_err(|fault| SettingsError::Client(KafkaError::ClientCreation(fault.to_string())))?;
        Ok(Self { topic: Arc::clone(topic), caught_up, positions })
    }

    /// The topic's full name.
    pub fn topic(&self) -> &Arc<str> {
        &self.topic
    }

    /// Waits until the table holds all that the topic held at the start. False where it never will.
    pub async fn caught_up(&self) -> bool {
        self.caught_up.clone().wait_for(|caught_up| *caught_up).await.is_ok()
    }

    /// The next offset to read of each partition.
    pub fn positions(&self) -> BTreeMap<i32, i64> {
        self.positions.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The first and the next offset of each partition. Waits for leaders: those of a topic that was made just now, or of a
/// broker that has just gone, are not known everywhere at once.
fn bounds(
    consumer: &BaseConsumer<LastingContext>,
    topic: &Arc<str>,
    runtime: &Handle,
) -> Result<BTreeMap<i32, (i64, i64)>, TableError> {
    let until = Instant::now() + LEADERS_MAX;
    loop {
        match try_bounds(consumer, topic) {
            Ok(bounds) => return Ok(bounds),
            Err(source) if Instant::now() >= until || !is_passing(&source) => {
                return Err(TableError::Bounds { topic: topic.to_string(), source });
            }
            Err(_) => runtime.block_on(tokio::time::sleep(LEADER_WAIT)),
        }
    }
}

fn try_bounds(
    consumer: &BaseConsumer<LastingContext>,
    topic: &str,
) -> Result<BTreeMap<i32, (i64, i64)>, KafkaError> {
    let metadata = consumer.fetch_metadata(Some(topic), WAIT)?;
    let mut bounds = BTreeMap::new();
    for partition in metadata.topics().iter().flat_map(|topic| topic.partitions()) {
        bounds.insert(partition.id(), consumer.fetch_watermarks(topic, partition.id(), WAIT)?);
    }
    // A table that follows nothing would say that it has caught up.
    match bounds.is_empty() {
        true => Err(KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownTopicOrPartition)),
        false => Ok(bounds),
    }
}

/// Whether the cluster may say something else in a moment.
fn is_passing(fault: &KafkaError) -> bool {
    matches!(
        fault.rdkafka_error_code(),
        Some(
            RDKafkaErrorCode::NotLeaderForPartition
                | RDKafkaErrorCode::LeaderNotAvailable
                | RDKafkaErrorCode::UnknownTopicOrPartition
                | RDKafkaErrorCode::UnknownPartition
                | RDKafkaErrorCode::BrokerTransportFailure
                | RDKafkaErrorCode::AllBrokersDown
                // One slow answer of a busy broker.
                | RDKafkaErrorCode::OperationTimedOut
                | RDKafkaErrorCode::RequestTimedOut
        )
    )
}

/// Where to read from. A copy that cannot be continued is forgotten and read again whole.
async fn starts(
    table: &dyn Table,
    bounds: &BTreeMap<i32, (i64, i64)>,
) -> Result<BTreeMap<i32, i64>, Failure> {
    let mut starts = BTreeMap::new();
    let mut continues = false;
    for (&partition, &(low, end)) in bounds {
        match table.position(partition).await? {
            // Behind the log's start something may have been taken away unseen; beyond its end the topic is another.
            Some(position) if !(low..=end).contains(&position) => {
                continues = false;
                break;
            }
            Some(position) => {
                continues = true;
                starts.insert(partition, position);
            }
            // Nothing of this partition was ever read.
            None => {
                starts.insert(partition, low);
            }
        }
    }
    if !continues {
        table.clear().await?;
        starts = bounds.iter().map(|(&partition, &(low, _))| (partition, low)).collect();
    }
    Ok(starts)
}

struct Follower {
    consumer: BaseConsumer<LastingContext>,
    topic: Arc<str>,
    table: Arc<dyn Table>,
    positions: Arc<Mutex<BTreeMap<i32, i64>>>,
    /// Where each partition ended when reading began.
    ends: BTreeMap<i32, i64>,
    caught_up: watch::Sender<bool>,
    health: Health,
    runtime: Handle,
    shutdown: CancellationToken,
    /// When a batch was last applied.
    applied: Instant,
}

impl Follower {
    fn run(mut self) {
        let component = format!("table {}", self.topic);
        self.health.set_ready(&component, false);
        let mut behind = self.ends.clone();
        while !self.shutdown.is_cancelled() {
            behind.retain(|partition, end| self.position(*partition) < *end);
            if behind.is_empty() && !*self.caught_up.borrow() {
                info!(topic = %self.topic, "table has caught up");
                self.health.set_ready(&component, true);
                self.caught_up.send_replace(true);
            }
            let (changes, reached) = self.read();
            self.consumer.context().mend(self.consumer.client());
            if !changes.is_empty() {
                self.apply(changes);
                self.applied = Instant::now();
            }
            let mut positions = self.positions.lock().unwrap_or_else(PoisonError::into_inner);
            positions.extend(reached);
        }
    }

    fn position(&self, partition: i32) -> i64 {
        let positions = self.positions.lock().unwrap_or_else(PoisonError::into_inner);
        positions.get(&partition).copied().unwrap_or(0)
    }

    /// The next batch, and how far reading has come with it.
    fn read(&self) -> (Vec<Change>, BTreeMap<i32, i64>) {
        let (mut changes, mut reached, mut bytes) = (Vec::new(), BTreeMap::new(), 0);
        let mut wait = Duration::from_millis(100);
        while changes.len() < BATCH_RECORDS && bytes < BATCH_BYTES {
            match self.consumer.poll(wait) {
                Some(Ok(message)) => {
                    bytes += message.payload_len();
                    reached.insert(message.partition(), message.offset() + 1);
                    let key = match message.key() {
                        None if !self.table.needs_key() => Some(Ok("")),
                        key => key.map(std::str::from_utf8),
                    };
                    match key {
                        Some(Ok(key)) => changes.push(Change {
                            partition: message.partition(),
                            offset: message.offset(),
                            key: key.to_owned(),
                            value: message.payload().map(Bytes::copy_from_slice),
                        }),
                        _ => {
                            warn!(topic = %self.topic, partition = message.partition(), offset = message.offset(),
                            "a record of a table has no key that is UTF-8; it is passed over")
                        }
                    }
                    // What is there already comes along. More is waited for only where the table was just changed.
                    wait = APPLY_EVERY.saturating_sub(self.applied.elapsed());
                }
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    // The last records may be gone (compaction, deletion): then no message ever reaches the end.
                    let end = self.ends.get(&partition).copied().unwrap_or(0);
                    let position =
                        reached.get(&partition).copied().unwrap_or_else(|| self.position(partition));
                    reached.insert(partition, position.max(end));
                }
                Some(Err(fault)) => {
                    warn!(topic = %self.topic, error = %fault, "could not read a table's topic; will try again");
                    break;
                }
                None => break,
            }
        }
        (changes, reached)
    }

    /// Applies a batch, however often that takes: a table must not skip what its store could not take.
    fn apply(&self, changes: Vec<Change>) {
        let mut wait = Duration::from_millis(100);
        loop {
            match self.runtime.block_on(self.table.apply(changes.clone())) {
                Ok(refused) => {
                    for (change, reason) in refused {
                        error!(topic = %self.topic, partition = change.partition, offset = change.offset, reason,
                            "a record of a table cannot be read; it is passed over");
                    }
                    return;
                }
                Err(failure) => {
                    error!(topic = %self.topic, error = chain(&failure), "could not change a table; will try again");
                    let stopped = self.shutdown.cancelled();
                    let waited = self.runtime.block_on(async { tokio::time::timeout(wait, stopped).await });
                    if waited.is_ok() {
                        return;
                    }
                    wait = (wait * 2).min(Duration::from_secs(10));
                }
            }
        }
    }
}
