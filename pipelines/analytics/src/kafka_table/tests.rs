//! Topics as tables, over a broker in this process.

use super::*;
use crate::guards::Limits;
use crate::live::Live;
use crate::session::tests::{Tables, shown};
use crate::session::{Error, Session};
use forebay_broker::{Broker, Config};
use forebay_runtime::host::kafka::KafkaSettings;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use std::sync::atomic::{AtomicUsize, Ordering};
use tempfile::TempDir;

/// A broker with a client, and tables beside it.
pub(crate) struct World {
    pub(crate) tables: Tables,
    pub(crate) kafka: Kafka,
    pub(crate) producer: FutureProducer,
    _broker: Broker,
    _folder: TempDir,
}

impl World {
    pub(crate) async fn new(topic: &str, partitions: i32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let broker =
            Broker::start(Config::new(folder.path().join("broker"), ([127, 0, 0, 1], 0))).await.unwrap();
        let bootstrap_servers = broker.address().to_string();
        let kafka = Kafka::new(&KafkaSettings { bootstrap_servers, ..KafkaSettings::default() }).unwrap();
        let admin: AdminClient<DefaultClientContext> = kafka.config().create().unwrap();
        let topics = [NewTopic::new(topic, partitions, TopicReplication::Fixed(1))];
        admin.create_topics(&topics, &AdminOptions::new()).await.unwrap();
        let producer = kafka.producer_config().create().unwrap();
        Self { tables: Tables::new(), kafka, producer, _broker: broker, _folder: folder }
    }

    pub(crate) fn session(&self, limits: Limits, scope: Scope) -> Session {
        let live = Live::new(self.kafka.clone(), "outcomes".to_owned());
        let options = crate::lake::Options::default();
        Session::open(self.tables.root(), options, limits, scope, None, Some(live)).unwrap()
    }

    pub(crate) async fn send(&self, topic: &str, partition: i32, timestamp_ms: i64, value: &[u8]) {
        let record: FutureRecord<'_, [u8], [u8]> = FutureRecord::to(topic)
            .partition(partition)
            .timestamp(timestamp_ms)
            .key(b"k".as_slice())
            .payload(value)
            .headers(OwnedHeaders::new().insert(Header { key: "h", value: Some("1") }));
        self.producer.send(record, ANSWER_MAX).await.unwrap();
    }
}

/// Partition p has the offsets 0 to 9, a second apart.
async fn ten_a_partition() -> World {
    let world = World::new("t", 2).await;
    for partition in 0..2 {
        for offset in 0..10 {
            world
                .send("t", partition, 1_000_000 + offset * 1_000, format!("{partition}/{offset}").as_bytes())
                .await;
        }
    }
    world
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_is_a_table_of_its_messages() {
    let world = ten_a_partition().await;
    let session = world.session(Limits::default(), Scope::All);
    let ask = async |sql: &str| match session.collect(sql).await {
        Ok(answer) => shown(&answer),
        Err(error) => error.to_string(),
    };
    let first = "SELECT partition, \"offset\", timestamp, CAST(key AS TEXT), CAST(value AS TEXT), headers FROM kafka('t') WHERE offset = 3 ORDER BY 1";
    assert_eq!(
        ask(first).await,
        "0 3 1970-01-01T00:16:43Z k 0/3 {\"h\":\"1\"}\n1 3 1970-01-01T00:16:43Z k 1/3 {\"h\":\"1\"}"
    );
    for (sql, expected) in [
        ("SELECT count(*) FROM kafka('t')", "20"),
        ("SELECT count(*), min(offset), max(offset) FROM kafka('t', '1970-01-01T00:16:44', NULL)", "12 4 9"),
        (
            "SELECT count(*), min(offset), max(offset) FROM kafka('t', timestamp '1970-01-01T00:16:44Z', '1970-01-01T00:16:46')",
            "4 4 5",
        ),
        ("SELECT count(*) FROM kafka('t', now() - INTERVAL '1 hour')", "0"),
        ("SELECT count(*) FROM kafka('t') WHERE partition = 1 AND offset >= 5 AND offset < 7", "2"),
        ("SELECT count(*) FROM kafka('t') WHERE partition = 7", "0"),
        ("SELECT count(*) FROM kafka('t') WHERE 8 <= offset", "4"),
        ("SELECT count(*) FROM kafka('t') WHERE timestamp > '1970-01-01T00:16:48'", "2"),
        ("SELECT count(*) FROM kafka('t') WHERE CAST(value AS TEXT) LIKE '1/%' LIMIT 1", "10"),
        ("SELECT count(*) FROM (SELECT * FROM kafka('t') LIMIT 3)", "3"),
    ] {
        assert_eq!(ask(sql).await, expected, "{sql}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bounds_are_pushed_down_to_what_is_read() {
    let world = ten_a_partition().await;
    let few = world.session(Limits { messages: 4, ..Limits::default() }, Scope::All);
    for sql in [
        "SELECT count(*) FROM kafka('t')",
        "SELECT count(*) FROM kafka('t') WHERE CAST(value AS TEXT) = 'x'",
        "SELECT count(*) FROM kafka('t') WHERE timestamp < '1970-01-01T00:16:42'",
    ] {
        let refused = few.collect(sql).await.unwrap_err();
        assert!(matches!(refused, Error::Refused(Refused::Messages { count: 20, .. })), "{sql}: {refused}");
    }
    for sql in [
        "SELECT count(*) FROM kafka('t') WHERE partition = 1 AND offset BETWEEN 2 AND 5",
        "SELECT count(*) FROM kafka('t', '1970-01-01T00:16:48')",
        "SELECT count(*) FROM kafka('t') WHERE timestamp >= '1970-01-01T00:16:48'",
    ] {
        let told = few.collect(sql).await;
        assert!(told.as_ref().is_ok_and(|told| shown(told) == "4"), "{sql}: {told:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_told_with_the_way_out() {
    let world = ten_a_partition().await;
    let session = world.session(Limits::default(), Scope::All);
    for (sql, wanted) in [
        ("SELECT * FROM kafka('nothing')", "there is no topic nothing"),
        ("SELECT * FROM kafka()", "takes the name of a topic"),
        ("SELECT * FROM kafka(1)", "takes the name of a topic"),
        ("SELECT * FROM kafka('t', 'yesterday')", "yesterday"),
        ("SELECT * FROM kafka('t', 1, 2, 3)", "takes the name of a topic"),
    ] {
        let told = session.collect(sql).await.unwrap_err().to_string();
        assert!(told.contains(wanted), "{sql}: {told}");
    }
    let scoped = world.session(Limits::default(), Scope::Tenants(vec!["acme".to_owned()]));
    for sql in [
        "SELECT * FROM kafka('t')",
        "SELECT 1 WHERE EXISTS (SELECT 1 FROM kafka('outcomes'))",
        "EXPLAIN SELECT * FROM kafka('t')",
    ] {
        assert!(matches!(scoped.collect(sql).await.unwrap_err(), Error::Refused(Refused::Topics)), "{sql}");
    }
    let alone = Tables::new().session(Limits::default(), Scope::All);
    let told = alone.collect("SELECT * FROM kafka('t')").await.unwrap_err().to_string();
    assert!(told.contains("needs a Kafka"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_is_changing_its_leader_is_asked_again_and_what_is_not_known_is_not_empty() {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("t", 2, 1).unwrap();
    let bootstrap_servers = cluster.bootstrap_servers();
    let kafka = Kafka::new(&KafkaSettings { bootstrap_servers, ..KafkaSettings::default() }).unwrap();
    let empty = |partition| Range { partition, from: 0, to: 0 };
    let unknown = RDKafkaRespErr::RD_KAFKA_RESP_ERR_LEADER_NOT_AVAILABLE;
    for fault in [RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION, unknown] {
        cluster.request_errors(RDKafkaApiKey::ListOffsets, &[fault; 3]);
        assert_eq!(blocking(&kafka, "t", ranges).await.unwrap(), [empty(0), empty(1)]);
    }
    assert_eq!(ranges(&kafka, "nothing").unwrap(), []);
    cluster.topic_error("t", unknown).unwrap();
    assert!(is_passing(&ranges(&kafka, "t").unwrap_err()));
}

#[tokio::test(start_paused = true)]
async fn for_a_leader_is_waited_a_bounded_time_and_for_nothing_else() {
    let bootstrap_servers = "127.0.0.1:1".to_owned();
    let kafka = Kafka::new(&KafkaSettings { bootstrap_servers, ..KafkaSettings::default() }).unwrap();
    let asked = async |fault| {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        let ask = move |_: &Kafka, _: &str| {
            counted.fetch_add(1, Ordering::Relaxed);
            Err::<(), _>(KafkaError::MetadataFetch(fault))
        };
        assert!(patiently(&kafka, "t", ask).await.unwrap().is_err());
        count.load(Ordering::Relaxed)
    };
    assert_eq!(asked(RDKafkaErrorCode::TopicAuthorizationFailed).await, 1);
    let began = tokio::time::Instant::now();
    // After 0, 0.1, 0.3, … 6.3 and 12.7 s.
    assert_eq!(asked(RDKafkaErrorCode::NotLeaderForPartition).await, 8);
    assert!(began.elapsed() >= LEADER_MAX && began.elapsed() < LEADER_MAX * 2);
}
