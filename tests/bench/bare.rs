//! What Forebay is measured against: the same hops by plain rdkafka, with no record read, no operator and no envelope.
//!
//! Like ours it reads in a consumer group, copies each message, writes it idempotently with acks=all through one producer a
//! process, stores an offset only when all that its record became is acknowledged, and commits what is stored every 250 ms.
//! One thread a hop reads; librdkafka's own threads do the rest.
//!
//! Invariant: it promises what ours promises of offsets, or the comparison would be with something that loses records.

use crate::{cluster, cluster::Hop};
use forebay_broker::Broker;
use rdkafka::{
    ClientConfig, ClientContext, Message as _, Offset, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, CommitMode, Consumer as _},
    error::KafkaError,
    message::DeliveryResult,
    producer::{BaseRecord, ProducerContext, ThreadedProducer},
    types::RDKafkaErrorCode,
};
use std::{
    collections::{BTreeSet, HashMap},
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

const POLL: Duration = Duration::from_millis(20);
const COMMIT_EVERY: Duration = Duration::from_millis(250);

/// What a bare process does.
#[derive(Clone, Debug, clap::Args)]
pub struct Bare {
    /// Where Kafka is; with `--broker` the embedded broker listens here instead.
    #[arg(long)]
    pub at: SocketAddr,
    /// Runs the embedded broker in this process, as `forebay up` does, on this folder.
    #[arg(long)]
    pub broker: Option<std::path::PathBuf>,
    /// Goes before every topic and group.
    #[arg(long)]
    pub prefix: String,
    /// One hop only, by its number.
    #[arg(long)]
    pub hop: Option<usize>,
    /// Bytes of each message that is written, hop by hop; as long as the message read, where there are none.
    #[arg(long, value_delimiter = ',')]
    pub bytes: Vec<usize>,
}

/// Runs the hops until the process is ended from outside.
pub fn run(bare: Bare) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let _broker = bare.broker.as_deref().map(|data| runtime.block_on(broker(data, bare.at, &bare.prefix)));
    let mut config = client(bare.at);
    config.set("linger.ms", "0").set("acks", "all").set("enable.idempotence", "true");
    config.set("queue.buffering.max.kbytes", "65536").set("partitioner", "murmur2_random");
    let producer: Writer = config.create_with_context(Acknowledgements).expect("a producer");
    let producer = Arc::new(producer);
    let hops =
        cluster::HOPS.iter().enumerate().filter(|(number, _)| bare.hop.is_none_or(|hop| hop == *number));
    let threads: Vec<_> = hops
        .map(|(number, hop)| {
            let (bare, producer) = (bare.clone(), Arc::clone(&producer));
            let work = move || Reader::join(&bare, number, hop, producer).run();
            thread::Builder::new().name(format!("hop {number}")).spawn(work).expect("a thread")
        })
        .collect();
    for thread in threads {
        thread.join().expect("a hop");
    }
}

async fn broker(data: &Path, at: SocketAddr, prefix: &str) -> Broker {
    let broker = Broker::start(forebay_broker::Config::new(data, (Ipv4Addr::LOCALHOST, at.port()))).await;
    let broker = broker.expect("the embedded broker");
    cluster::make_topics(&at.to_string(), prefix).await;
    broker
}

fn client(at: SocketAddr) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", at.to_string()).set_log_level(RDKafkaLogLevel::Warning);
    config
}

/// The same settings as a stage of Forebay has.
fn group(bare: &Bare, number: usize) -> BaseConsumer {
    let mut config = client(bare.at);
    config.set("group.id", format!("{}hop-{number}", bare.prefix));
    config.set("partition.assignment.strategy", "cooperative-sticky");
    config.set("enable.auto.commit", "false").set("enable.auto.offset.store", "false");
    config.set("auto.offset.reset", "earliest").set("session.timeout.ms", "10000");
    config.set("queued.min.messages", "1000").set("queued.max.messages.kbytes", "16384");
    config.set("fetch.wait.max.ms", "100");
    config.create().expect("a consumer")
}

type Writer = ThreadedProducer<Acknowledgements>;

struct Acknowledgements;

impl ClientContext for Acknowledgements {}

impl ProducerContext for Acknowledgements {
    type DeliveryOpaque = Arc<Unfinished>;

    fn delivery(&self, result: &DeliveryResult<'_>, _: Self::DeliveryOpaque) {
        // The record finishes when the last of its messages lets go of it.
        if let Err((fault, _)) = result {
            panic!("could not write a message: {fault}");
        }
    }
}

/// A record some of whose messages are not acknowledged.
struct Unfinished {
    progress: Arc<Mutex<Progress>>,
    partition: i32,
    offset: i64,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.entry(self.partition).or_default().open.remove(&self.offset);
    }
}

type Progress = HashMap<i32, Partition>;

/// Acknowledgements come in any order: only what is below the lowest open offset may be committed.
#[derive(Default)]
struct Partition {
    open: BTreeSet<i64>,
    next: i64,
    stored: i64,
}

struct Reader {
    consumer: BaseConsumer,
    producer: Arc<Writer>,
    from: String,
    to: Vec<String>,
    bytes: Vec<Option<usize>>,
    progress: Arc<Mutex<Progress>>,
}

impl Reader {
    fn join(bare: &Bare, number: usize, hop: &Hop, producer: Arc<Writer>) -> Self {
        let full = |name: &str| format!("{}{name}", bare.prefix);
        let consumer = group(bare, number);
        let from = full(hop.from);
        consumer.subscribe(&[&from]).expect("a subscription");
        let before: usize = cluster::HOPS[..number].iter().map(|hop| hop.to.len()).sum();
        let bytes = (0..hop.to.len()).map(|at| bare.bytes.get(before + at).copied()).collect();
        let to = hop.to.iter().map(|name| full(name)).collect();
        Self { consumer, producer, from, to, bytes, progress: Arc::default() }
    }

    fn run(self) {
        let mut committed = Instant::now();
        loop {
            match self.consumer.poll(POLL) {
                Some(Ok(message)) => {
                    let (partition, offset) = (message.partition(), message.offset());
                    {
                        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
                        let progress = progress.entry(partition).or_default();
                        progress.next = offset + 1;
                        progress.open.insert(offset);
                    }
                    let open =
                        Arc::new(Unfinished { progress: Arc::clone(&self.progress), partition, offset });
                    self.copy(
                        message.key().unwrap_or_default(),
                        message.payload().unwrap_or_default(),
                        &open,
                    );
                }
                // A topic that was made just now is not known everywhere at once.
                Some(Err(KafkaError::MessageConsumption(RDKafkaErrorCode::UnknownTopicOrPartition)))
                | None => {}
                Some(Err(fault)) => panic!("could not read {}: {fault}", self.from),
            }
            if committed.elapsed() >= COMMIT_EVERY {
                committed = Instant::now();
                self.commit();
            }
        }
    }

    fn copy(&self, key: &[u8], value: &[u8], open: &Arc<Unfinished>) {
        for (topic, bytes) in self.to.iter().zip(&self.bytes) {
            let mut value = value.to_vec();
            value.resize(bytes.unwrap_or(value.len()), b' ');
            let mut record =
                BaseRecord::with_opaque_to(topic, Arc::clone(open)).key(key).payload(value.as_slice());
            while let Err((fault, back)) = self.producer.send(record) {
                let full = fault.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull);
                assert!(full, "could not write to {topic}: {fault}");
                record = back;
                thread::yield_now();
            }
        }
    }

    fn commit(&self) {
        let mut list = TopicPartitionList::new();
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        for (number, partition) in progress.iter_mut() {
            let reached = partition.open.first().copied().unwrap_or(partition.next);
            if reached > partition.stored {
                partition.stored = reached;
                list.add_partition_offset(&self.from, *number, Offset::Offset(reached)).expect("an offset");
            }
        }
        drop(progress);
        if list.count() > 0 {
            self.consumer.store_offsets(&list).expect("a stored offset");
            match self.consumer.commit_consumer_state(CommitMode::Async) {
                Ok(()) | Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => {}
                Err(fault) => panic!("could not commit {}: {fault}", self.from),
            }
        }
    }
}
