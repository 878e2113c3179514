//! An ordinary Kafka client, as anybody's: writes records, reads topics whole, asks how far a group has come.
//!
//! Invariant: what was written is acknowledged when the call returns, and a [`Reader`] gives every record of its topic, from
//! the first on, once and in the order of each partition.

use crate::{wait::spent, wait_for};
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    message::{BorrowedMessage, Header, Headers, OwnedHeaders},
    producer::{FutureProducer, FutureRecord, future_producer::Delivery},
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

/// How long a single question to the cluster, or a write, may take: all of a suite on two cores, with brokers and processes that
/// start, has kept one waiting for more than 20 s.
const WAIT: Duration = Duration::from_secs(120);

/// A client of one cluster, under one prefix.
#[derive(Clone)]
pub struct Client {
    servers: String,
    prefix: String,
    /// Made at the first write.
    producer: Arc<OnceLock<FutureProducer>>,
}

/// A record to be written; all that is `None` or empty is left out.
#[derive(Clone, Debug, Default)]
pub struct New {
    /// Its key.
    pub key: Option<Vec<u8>>,
    /// Its value; `None` is a tombstone.
    pub value: Option<Vec<u8>>,
    /// Its headers.
    pub headers: Vec<(String, Vec<u8>)>,
}

impl New {
    /// A record of these bytes, without key and headers.
    pub fn value(value: impl Into<Vec<u8>>) -> Self {
        Self { value: Some(value.into()), ..Self::default() }
    }

    /// The same record with a key.
    #[must_use]
    pub fn key(mut self, key: impl Into<Vec<u8>>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// The same record with one more header.
    #[must_use]
    pub fn header(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

impl From<Value> for New {
    fn from(value: Value) -> Self {
        Self::value(value.to_string())
    }
}

/// A record that was read.
#[derive(Clone, Debug)]
pub struct Record {
    /// The number of its partition.
    pub partition: i32,
    /// Its offset there.
    pub offset: i64,
    /// When it was written, in milliseconds since 1970.
    pub timestamp_ms: i64,
    /// Its key.
    pub key: Option<Vec<u8>>,
    /// Its value.
    pub value: Option<Vec<u8>>,
    /// Its headers.
    pub headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Record {
    fn of(message: &BorrowedMessage<'_>) -> Self {
        let headers = message.headers().map(|headers| headers.iter()).into_iter().flatten();
        Self {
            partition: message.partition(),
            offset: message.offset(),
            timestamp_ms: message.timestamp().to_millis().unwrap_or(0),
            key: message.key().map(<[u8]>::to_vec),
            value: message.payload().map(<[u8]>::to_vec),
            headers: headers
                .map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec)))
                .collect(),
        }
    }

    /// Its key as a text; empty where there is none.
    pub fn key_text(&self) -> String {
        String::from_utf8_lossy(self.key.as_deref().unwrap_or_default()).into_owned()
    }

    /// Its value as JSON.
    ///
    /// # Panics
    /// When it is none.
    #[track_caller]
    pub fn json(&self) -> Value {
        let value = self.value.as_deref().unwrap_or_default();
        let parsed = serde_json::from_slice(value);
        parsed.unwrap_or_else(|error| panic!("no JSON: {error}: {}", String::from_utf8_lossy(value)))
    }

    /// A header as a text.
    pub fn header(&self, name: &str) -> Option<String> {
        let (_, value) = self.headers.iter().find(|(known, _)| known == name)?;
        Some(String::from_utf8_lossy(value.as_deref()?).into_owned())
    }
}

impl Client {
    /// A client of the cluster at `servers`; topics are named without `prefix`.
    pub fn new(servers: &str, prefix: &str) -> Self {
        Self { servers: servers.to_owned(), prefix: prefix.to_owned(), producer: Arc::default() }
    }

    /// Where the cluster is.
    pub fn servers(&self) -> &str {
        &self.servers
    }

    /// The full name of a topic.
    pub fn topic(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.servers);
        config
    }

    fn producer(&self, wait: Duration) -> FutureProducer {
        let mut config = self.config();
        config
            .set("enable.idempotence", "true")
            // Of two on their way to a leader that has just been elected the first may be lost (confluent-kafka-go #921).
            .set("max.in.flight", "1")
            .set("linger.ms", "1")
            .set("message.timeout.ms", wait.as_millis().to_string())
            // The topic has the last word on what is too large.
            .set("message.max.bytes", "67108864")
            .set("queue.buffering.max.messages", "0");
        must("make a producer", config.create())
    }

    /// Writes records of any size that the topic takes, and waits for all acknowledgements, each at most `wait`.
    pub fn try_write(
        &self,
        topic: &str,
        records: impl IntoIterator<Item = New>,
        wait: Duration,
    ) -> Vec<Result<(i32, i64), KafkaError>> {
        write_all(&self.producer(wait), &self.topic(topic), records)
    }

    /// Writes records; partition and offset of each.
    ///
    /// # Panics
    /// When one was refused.
    #[track_caller]
    pub fn write(&self, topic: &str, records: impl IntoIterator<Item = New>) -> Vec<(i32, i64)> {
        let producer = self.producer.get_or_init(|| self.producer(WAIT));
        let written = write_all(producer, &self.topic(topic), records);
        written.into_iter().map(|one| must(&format!("write to {topic}"), one)).collect()
    }

    /// Writes one request.
    ///
    /// # Panics
    /// When it was refused.
    #[track_caller]
    pub fn ask(&self, request: Value) {
        self.write("requests", [New::from(request)]);
    }

    /// A reader of a whole topic.
    ///
    /// # Panics
    /// When the topic is not there.
    #[track_caller]
    pub fn read(&self, topic: &str) -> Reader {
        let topic = self.topic(topic);
        let mut config = self.config();
        config
            .set("group.id", "forebay-tests-reader")
            .set("enable.auto.commit", "false")
            .set("auto.offset.reset", "earliest")
            .set("fetch.wait.max.ms", "50")
            .set("fetch.message.max.bytes", "33554432");
        let consumer: BaseConsumer = must("make a consumer", config.create());
        let partitions = partitions(&consumer, &topic);
        let mut assignment = TopicPartitionList::new();
        for partition in partitions {
            must("assign", assignment.add_partition_offset(&topic, partition, Offset::Beginning));
        }
        must("assign", consumer.assign(&assignment));
        Reader { consumer, topic, records: Vec::new(), next: BTreeMap::new() }
    }

    /// Changes settings of a topic; those that are not named go back to their defaults.
    ///
    /// # Panics
    /// When the cluster refuses.
    #[track_caller]
    pub fn set_topic(&self, topic: &str, settings: &[(&str, &str)]) {
        let admin: AdminClient<DefaultClientContext> = must("make an admin client", self.config().create());
        let topic = self.topic(topic);
        let resource = AlterConfig::new(ResourceSpecifier::Topic(&topic));
        let change = settings.iter().fold(resource, |change, (name, value)| change.set(name, value));
        let options = AdminOptions::new().request_timeout(Some(WAIT));
        let changed = futures::executor::block_on(admin.alter_configs([&change], &options));
        for changed in must("change a topic", changed) {
            must("change a topic", changed);
        }
    }

    /// How many partitions a topic has.
    ///
    /// # Panics
    /// When it is not there.
    #[track_caller]
    pub fn partitions(&self, topic: &str) -> usize {
        let consumer: BaseConsumer = must("make a consumer", self.config().create());
        partitions(&consumer, &self.topic(topic)).len()
    }

    /// Whether so many brokers are there, and every partition has all its replicas in sync.
    ///
    /// # Panics
    /// When no client can be made.
    #[track_caller]
    pub fn is_in_sync(&self, brokers: usize) -> bool {
        let consumer: BaseConsumer = must("make a consumer", self.config().create());
        let Ok(metadata) = consumer.fetch_metadata(None, WAIT) else { return false };
        let mut partitions = metadata.topics().iter().flat_map(|topic| topic.partitions());
        metadata.brokers().len() == brokers
            && partitions.all(|one| one.leader() >= 0 && one.isr().len() == one.replicas().len())
    }

    /// How many records of a topic a group has not finished yet.
    ///
    /// # Panics
    /// When the cluster does not say.
    #[track_caller]
    pub fn lag(&self, group: &str, topic: &str) -> i64 {
        let topic = self.topic(topic);
        let mut config = self.config();
        config.set("group.id", self.topic(group));
        let consumer: BaseConsumer = must("make a consumer", config.create());
        let mut asked = TopicPartitionList::new();
        let mut ends = BTreeMap::new();
        for partition in partitions(&consumer, &topic) {
            asked.add_partition(&topic, partition);
            ends.insert(partition, ends_of(&consumer, &topic, partition));
        }
        let committed = must("ask for committed offsets", consumer.committed_offsets(asked, WAIT));
        let left = committed.elements().into_iter().map(|element| {
            let (low, high) = ends.get(&element.partition()).copied().unwrap_or_default();
            let reached = if let Offset::Offset(offset) = element.offset() { offset } else { low };
            high - reached
        });
        left.sum()
    }
}

fn write_all(
    producer: &FutureProducer,
    topic: &str,
    records: impl IntoIterator<Item = New>,
) -> Vec<Result<(i32, i64), KafkaError>> {
    let send = |New { key, value, headers }: New| {
        let mut record = FutureRecord::<[u8], [u8]>::to(topic);
        record.key = key.as_deref();
        record.payload = value.as_deref();
        if !headers.is_empty() {
            let all = headers.iter().fold(OwnedHeaders::new(), |all, (name, value)| {
                all.insert(Header { key: name, value: Some(value) })
            });
            record = record.headers(all);
        }
        producer.send_result(record).map_err(|(fault, _)| fault)
    };
    // All are on their way before the first is waited for.
    let sent: Vec<_> = records.into_iter().map(send).collect();
    let acknowledged = |delivery| match futures::executor::block_on(delivery) {
        Ok(Ok(Delivery { partition, offset, .. })) => Ok((partition, offset)),
        Ok(Err((fault, _))) => Err(fault),
        Err(_) => Err(KafkaError::Canceled),
    };
    sent.into_iter().map(|sent| sent.and_then(acknowledged)).collect()
}

#[track_caller]
fn partitions(consumer: &BaseConsumer, topic: &str) -> Vec<i32> {
    let metadata = must("ask for a topic", consumer.fetch_metadata(Some(topic), WAIT));
    let numbers: Vec<_> = metadata
        .topics()
        .iter()
        .flat_map(|topic| topic.partitions())
        .map(|partition| partition.id())
        .collect();
    assert!(!numbers.is_empty(), "topic {topic} is not there");
    numbers
}

/// Reads a topic from its first record on, and keeps all that it has read.
pub struct Reader {
    consumer: BaseConsumer,
    topic: String,
    records: Vec<Record>,
    /// The offset after the last record that was read, by partition.
    next: BTreeMap<i32, i64>,
}

impl Reader {
    /// All that was read so far.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    fn poll(&mut self, wait: Duration) {
        // A broker that is away for a moment is part of some tests, so an error is waited through.
        if let Some(Ok(message)) = self.consumer.poll(wait) {
            let record = Record::of(&message);
            let before = self.next.insert(record.partition, record.offset + 1);
            assert!(before.unwrap_or(0) <= record.offset, "read twice: {record:?}");
            self.records.push(record);
        }
    }

    /// Reads on until `condition` gives a value for all that was read so far.
    ///
    /// # Panics
    /// When `limit` has passed without one.
    #[track_caller]
    pub fn until<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut condition: impl FnMut(&[Record]) -> Option<T>,
    ) -> T {
        let start = Instant::now();
        let mut checked = usize::MAX;
        loop {
            // Nothing new, nothing to ask.
            if checked != self.records.len() {
                checked = self.records.len();
                if let Some(value) = condition(&self.records) {
                    return value;
                }
            }
            if start.elapsed() >= limit {
                panic!(
                    "waited {limit:?} in vain for {what}; {checked} records were read from {}",
                    self.topic
                );
            }
            self.poll(Duration::from_millis(100));
        }
    }

    /// Waits for so many records.
    ///
    /// # Panics
    /// When they have not come within `limit`.
    #[track_caller]
    pub fn at_least(&mut self, count: usize, limit: Duration) -> &[Record] {
        let what = format!("{count} records of {}", self.topic);
        self.until(&what, limit, |records| (records.len() >= count).then_some(()));
        &self.records
    }

    /// Waits for the record of this key.
    ///
    /// # Panics
    /// When it has not come within `limit`.
    #[track_caller]
    pub fn of_key(&mut self, key: &str, limit: Duration) -> Record {
        let what = format!("{key:?} on {}", self.topic);
        self.until(&what, limit, |records| {
            records.iter().find(|record| record.key.as_deref() == Some(key.as_bytes())).cloned()
        })
    }

    /// Reads up to where the topic ends now.
    ///
    /// # Panics
    /// When that takes longer than `limit`.
    #[track_caller]
    pub fn to_the_end(&mut self, limit: Duration) -> &[Record] {
        let start = Instant::now();
        for partition in partitions(&self.consumer, &self.topic) {
            let (low, high) = ends_of(&self.consumer, &self.topic, partition);
            while self.next.get(&partition).copied().unwrap_or(low) < high {
                spent(&format!("the end of {}/{partition}", self.topic), start, limit);
                self.poll(Duration::from_millis(100));
            }
        }
        &self.records
    }
}

/// The first offset of a partition, and the one after its last. A leader that is just being elected is waited for.
#[track_caller]
fn ends_of(consumer: &BaseConsumer, topic: &str, partition: i32) -> (i64, i64) {
    wait_for(&format!("the ends of {topic}/{partition}"), WAIT, || {
        consumer.fetch_watermarks(topic, partition, WAIT).ok()
    })
}

/// The value, or the test's end with a word on what could not be done.
#[track_caller]
pub(crate) fn must<T, E: Debug>(what: &str, result: Result<T, E>) -> T {
    result.unwrap_or_else(|error| panic!("could not {what}: {error:?}"))
}
