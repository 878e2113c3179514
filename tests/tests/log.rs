//! The contract of the log: what Forebay needs of whatever speaks the Kafka protocol.
//!
//! Each check runs against the embedded broker and against a real Apache Kafka, through librdkafka, kcat
//! and a client written in Python. What passes on one and not on the other is a bug of the embedded one.

#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::result_large_err,
    reason = "a test that cannot go on says why by panicking"
)]

use forebay_broker::{Broker, Config};
use forebay_tests::{services, wait_for};
use rdkafka::ClientContext;
use rdkafka::admin::{
    AdminClient, AdminOptions, AlterConfig, NewPartitions, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Headers, Message, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::runtime::Runtime;

const LIMIT: Duration = Duration::from_secs(120);

/// Settings of a topic with records of long ago, which retention would delete as soon as it looks.
const FOR_EVER: &[(&str, &str)] = &[("retention.ms", "-1")];

/// Something that speaks the Kafka protocol, and names of this test's own in it.
struct Log {
    bootstrap: String,
    prefix: String,
    runtime: Runtime,
}

impl Log {
    fn new(bootstrap: String) -> Log {
        static TESTS: AtomicU32 = AtomicU32::new(0);
        let n = TESTS.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("contract-{}-{n}-", std::process::id());
        Log { bootstrap, prefix, runtime: Runtime::new().expect("a runtime") }
    }

    fn name(&self, what: &str) -> String {
        format!("{}{what}", self.prefix)
    }

    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.bootstrap);
        config
    }

    fn admin(&self) -> AdminClient<DefaultClientContext> {
        self.client().create().expect("an admin client")
    }

    /// Makes a topic and returns its name.
    fn topic(&self, what: &str, partitions: i32, settings: &[(&str, &str)]) -> String {
        let name = self.name(what);
        let made = self.create(&name, partitions, settings, false);
        assert_eq!(made, Ok(()), "create {name}");
        // On a cluster the topic is there a moment after it is made.
        let consumer = self.consumer("none", &[]);
        wait_for(&format!("{name} to have its leaders"), LIMIT, || {
            let metadata = consumer.fetch_metadata(Some(&name), LIMIT).ok()?;
            let partitions_found =
                metadata.topics().first()?.partitions().iter().filter(|p| p.leader() >= 0).count();
            (i32::try_from(partitions_found) == Ok(partitions)).then_some(())
        });
        name
    }

    fn create(
        &self,
        name: &str,
        partitions: i32,
        settings: &[(&str, &str)],
        validate_only: bool,
    ) -> Result<(), RDKafkaErrorCode> {
        let mut topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
        for (setting, value) in settings {
            topic = topic.set(setting, value);
        }
        let options = AdminOptions::new().validate_only(validate_only);
        let made = self.runtime.block_on(self.admin().create_topics([&topic], &options)).expect("an answer");
        made.into_iter().next().expect("one topic").map(drop).map_err(|(_, error)| error)
    }

    fn producer(&self, settings: &[(&str, &str)]) -> FutureProducer {
        let mut config = self.client();
        config.set("enable.idempotence", "true").set("linger.ms", "5").set("message.timeout.ms", "20000");
        for (setting, value) in settings {
            config.set(*setting, *value);
        }
        config.create().expect("a producer")
    }

    fn consumer(&self, group: &str, settings: &[(&str, &str)]) -> BaseConsumer {
        let mut config = self.client();
        config
            .set("group.id", self.name(group))
            .set("auto.offset.reset", "error")
            .set("enable.partition.eof", "false")
            .set("enable.auto.commit", "false")
            .set("allow.auto.create.topics", "true");
        for (setting, value) in settings {
            config.set(*setting, *value);
        }
        config.create().expect("a consumer")
    }

    /// Sends values to a partition, each after the other, and returns their offsets.
    fn send(&self, producer: &FutureProducer, topic: &str, partition: i32, values: &[String]) -> Vec<i64> {
        self.runtime.block_on(async {
            let sent: Vec<_> = values
                .iter()
                .map(|v| {
                    let record = FutureRecord::to(topic).partition(partition).key(v).payload(v);
                    producer.send_result(record).map_err(|(error, _)| error).expect("room in the queue")
                })
                .collect();
            let mut offsets = Vec::new();
            for delivery in sent {
                offsets.push(delivery.await.expect("the producer lives").expect("delivered").offset);
            }
            offsets
        })
    }

    /// Reads `count` records of one partition from `from` on.
    fn read(&self, topic: &str, partition: i32, from: Offset, count: usize) -> Vec<OwnedMessage> {
        let consumer = self.consumer("reader", &[]);
        assign(&consumer, topic, partition, from);
        let mut found = Vec::new();
        while found.len() < count {
            let message = consumer.poll(LIMIT).expect("a record within the limit").expect("a record");
            found.push(message.detach());
        }
        found
    }
}

fn assign(consumer: &BaseConsumer, topic: &str, partition: i32, from: Offset) {
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(topic, partition, from).expect("an offset");
    consumer.assign(&list).expect("assigned");
}

fn texts(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{prefix}-{n}")).collect()
}

fn text(message: &OwnedMessage) -> String {
    String::from_utf8_lossy(message.payload().unwrap_or_default()).into_owned()
}

/// Runs each check on both logs: `embedded::check` and `apache_kafka::check`.
macro_rules! contract {
    ($($check:ident),* $(,)?) => {
        mod embedded {
            $(#[test] fn $check() { super::on_embedded(super::$check); })*
        }
        mod apache_kafka {
            $(#[test] fn $check() { super::on_kafka(super::$check); })*
        }
    };
}

contract![
    an_idempotent_producer_stores_each_record_once_and_in_order,
    every_codec_headers_keys_and_timestamps_come_back_as_they_went,
    a_fetch_begins_in_the_middle_of_a_batch,
    watermarks_and_look_ups_by_time_are_exact,
    an_offset_that_is_not_there_is_an_error,
    a_consumer_is_woken_by_the_next_record,
    three_eager_members_read_each_record_once,
    three_cooperative_members_read_each_record_once,
    commits_keep_their_metadata,
    topics_are_made_grown_altered_and_deleted,
    naming_a_topic_does_not_make_it,
    a_record_that_is_too_large_is_refused,
    a_log_append_time_topic_stamps_records_itself,
    deleted_records_are_gone,
    groups_are_listed_and_deleted,
    kcat_produces_consumes_and_lists,
    a_python_client_does_all_of_it,
];

fn on_embedded(check: fn(&Log)) {
    let _ = tracing_subscriber::fmt()
        .with_test_writer()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .try_init();
    let data = tempfile::tempdir().expect("a folder");
    let runtime = Runtime::new().expect("a runtime");
    let broker =
        runtime.block_on(Broker::start(Config::new(data.path(), ([127, 0, 0, 1], 0)))).expect("it starts");
    check(&Log::new(broker.address().to_string()));
    runtime.block_on(broker.shutdown());
}

fn on_kafka(check: fn(&Log)) {
    if let Some(bootstrap) = services::kafka() {
        check(&Log::new(bootstrap));
    }
}

fn an_idempotent_producer_stores_each_record_once_and_in_order(log: &Log) {
    let topic = log.topic("t", 3, &[]);
    let producer = log.producer(&[("batch.num.messages", "50")]);
    for partition in 0..3 {
        let sent = texts(&partition.to_string(), 2000);
        let offsets = log.send(&producer, &topic, partition, &sent);
        assert_eq!(offsets, (0..2000).collect::<Vec<i64>>());
        let read = log.read(&topic, partition, Offset::Beginning, 2000);
        assert_eq!(read.iter().map(text).collect::<Vec<_>>(), sent);
    }
}

fn every_codec_headers_keys_and_timestamps_come_back_as_they_went(log: &Log) {
    let topic = log.topic("t", 1, FOR_EVER);
    for (n, codec) in (0..).zip(["none", "gzip", "snappy", "lz4", "zstd"]) {
        let producer = log.producer(&[("compression.codec", codec)]);
        let value = format!("{codec} ").repeat(100);
        let headers = OwnedHeaders::new()
            .insert(Header { key: "twice", value: Some("one") })
            .insert(Header { key: "twice", value: Some("two") })
            .insert(Header { key: "null", value: None::<&str> });
        let timestamp = 1_700_000_000_000 + n;
        let record =
            FutureRecord::to(&topic).key(codec).payload(&value).headers(headers).timestamp(timestamp);
        log.runtime.block_on(producer.send(record, LIMIT)).expect("delivered");
        let read = log.read(&topic, 0, Offset::Offset(n), 1).remove(0);
        assert_eq!((read.key(), text(&read)), (Some(codec.as_bytes()), value));
        assert_eq!(read.timestamp().to_millis(), Some(timestamp));
        let headers = read.headers().expect("headers");
        let headers: Vec<_> = headers.iter().map(|h| (h.key, h.value)).collect();
        assert_eq!(headers, [("twice", Some(&b"one"[..])), ("twice", Some(b"two")), ("null", None)]);
    }
}

fn a_fetch_begins_in_the_middle_of_a_batch(log: &Log) {
    let topic = log.topic("t", 1, &[]);
    log.send(&log.producer(&[("linger.ms", "50")]), &topic, 0, &texts("v", 500));
    for offset in [0, 1, 37, 250, 499] {
        assert_eq!(log.read(&topic, 0, Offset::Offset(offset), 1)[0].offset(), offset);
    }
}

fn watermarks_and_look_ups_by_time_are_exact(log: &Log) {
    let topic = log.topic("t", 1, FOR_EVER);
    let consumer = log.consumer("g", &[]);
    assert_eq!(consumer.fetch_watermarks(&topic, 0, LIMIT).expect("watermarks"), (0, 0));
    // One batch: a look-up must find the record and not just the batch.
    let producer = log.producer(&[("linger.ms", "100")]);
    let times = [1_000, 3_000, 2_000, 5_000, 4_000];
    log.runtime.block_on(async {
        let sent: Vec<_> = times
            .iter()
            .map(|t| {
                producer
                    .send_result(FutureRecord::to(&topic).key("k").payload("v").timestamp(*t))
                    .expect("room")
            })
            .collect();
        for delivery in sent {
            delivery.await.expect("the producer lives").expect("delivered");
        }
    });
    assert_eq!(consumer.fetch_watermarks(&topic, 0, LIMIT).expect("watermarks"), (0, 5));
    for (time, want) in [
        (0, Offset::Offset(0)),
        (1_000, Offset::Offset(0)),
        (1_001, Offset::Offset(1)),
        (3_001, Offset::Offset(3)),
        (5_000, Offset::Offset(3)),
        (5_001, Offset::End),
    ] {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&topic, 0, Offset::Offset(time)).expect("a time");
        let found = consumer.offsets_for_times(list, LIMIT).expect("an answer");
        assert_eq!(found.elements()[0].offset(), want, "at {time}");
    }
}

fn an_offset_that_is_not_there_is_an_error(log: &Log) {
    let topic = log.topic("t", 1, &[]);
    log.send(&log.producer(&[]), &topic, 0, &texts("v", 3));
    let consumer = log.consumer("g", &[]);
    assign(&consumer, &topic, 0, Offset::Offset(1000));
    match consumer.poll(LIMIT) {
        Some(Err(KafkaError::MessageConsumption(RDKafkaErrorCode::AutoOffsetReset))) => {}
        other => panic!("got {other:?}"),
    }
}

fn a_consumer_is_woken_by_the_next_record(log: &Log) {
    let topic = log.topic("t", 1, &[]);
    // Were it not woken, it would wait longer than the limit.
    let consumer = log.consumer("g", &[("fetch.wait.max.ms", "60000"), ("socket.timeout.ms", "70000")]);
    assign(&consumer, &topic, 0, Offset::Beginning);
    let producer = log.producer(&[("linger.ms", "0")]);
    for n in 0..20 {
        let value = vec![n.to_string()];
        std::thread::scope(|threads| {
            let sent = threads.spawn(|| log.send(&producer, &topic, 0, &value));
            let message = consumer.poll(Duration::from_secs(10)).expect("woken in time").expect("a record");
            assert_eq!((message.offset(), message.payload()), (n, Some(value[0].as_bytes())));
            assert_eq!(sent.join().expect("sent"), [n]);
        });
    }
}

fn three_eager_members_read_each_record_once(log: &Log) {
    three_members_read_each_record_once(log, "range");
}

fn three_cooperative_members_read_each_record_once(log: &Log) {
    three_members_read_each_record_once(log, "cooperative-sticky");
}

/// Commits what has been read before partitions go to another member, as Forebay's own consumer does.
struct CommitsFirst;

impl ClientContext for CommitsFirst {}

impl ConsumerContext for CommitsFirst {
    fn pre_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Revoke(_) = rebalance {
            match consumer.commit_consumer_state(CommitMode::Sync) {
                Ok(()) | Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => {}
                Err(error) => panic!("could not commit before a rebalance: {error}"),
            }
        }
    }
}

/// What the members of a group have read, and who is told to stop.
#[derive(Default)]
struct Seen {
    records: Mutex<Vec<(i32, i64)>>,
    by_member: [AtomicU32; 3],
    stop: [AtomicBool; 3],
}

impl Seen {
    fn count(&self) -> usize {
        self.records.lock().expect("no member panicked").len()
    }
}

/// Members come one after the other and one goes, all while records flow.
fn three_members_read_each_record_once(log: &Log, strategy: &str) {
    const PARTITIONS: i32 = 6;
    const ROUND: usize = 300;
    let topic = log.topic("t", PARTITIONS, &[]);
    let producer = log.producer(&[]);
    let send = || {
        for partition in 0..PARTITIONS {
            log.send(&producer, &topic, partition, &texts("v", ROUND / 6));
        }
    };
    let seen = Arc::new(Seen::default());
    let member = |n: usize| {
        let settings = [
            ("partition.assignment.strategy", strategy),
            ("auto.offset.reset", "earliest"),
            ("enable.auto.commit", "false"),
            ("enable.auto.offset.store", "false"),
            ("group.id", &log.name("g")),
            ("session.timeout.ms", "6000"),
            ("heartbeat.interval.ms", "200"),
        ];
        let mut config = log.client();
        for (setting, value) in settings {
            config.set(setting, value);
        }
        let consumer: BaseConsumer<CommitsFirst> =
            config.create_with_context(CommitsFirst).expect("a consumer");
        let (seen, topic) = (Arc::clone(&seen), topic.clone());
        std::thread::spawn(move || {
            consumer.subscribe(&[&topic]).expect("subscribed");
            while !seen.stop[n].load(Ordering::Relaxed) {
                let Some(message) = consumer.poll(Duration::from_millis(50)) else { continue };
                let message = message.expect("a record");
                let record = (message.partition(), message.offset());
                seen.records.lock().expect("no member panicked").push(record);
                // After the record counts as read: what is only in the client's queue is another's to read.
                consumer.store_offset_from_message(&message).expect("stored");
                seen.by_member[n].fetch_add(1, Ordering::Relaxed);
            }
            // Dropping it leaves the group, by way of `CommitsFirst`.
        })
    };
    let arrives = |what: &str, count: usize| {
        wait_for(what, Duration::from_secs(60), || (seen.count() >= count).then_some(()));
    };
    let reads = |n: usize, total: &mut usize| {
        // Until it has its share; it may take a rebalance or two.
        wait_for(&format!("member {n} to read"), Duration::from_secs(60), || {
            if seen.by_member[n].load(Ordering::Relaxed) > 0 {
                return Some(());
            }
            send();
            *total += ROUND;
            None
        });
    };
    let mut total = ROUND;
    send();
    let mut members = vec![member(0)];
    arrives("the first member to read all", total);
    members.push(member(1));
    reads(1, &mut total);
    members.push(member(2));
    reads(2, &mut total);
    seen.stop[1].store(true, Ordering::Relaxed);
    members.remove(1).join().expect("the second member ends well");
    send();
    total += ROUND;
    arrives("the rest to be read", total);
    seen.stop.iter().for_each(|s| s.store(true, Ordering::Relaxed));
    members.into_iter().for_each(|m| m.join().expect("the member ends well"));
    let records = seen.records.lock().expect("no member panicked");
    let once: HashSet<_> = records.iter().collect();
    assert_eq!((records.len(), once.len()), (total, total), "{strategy}: records read, and different ones");
}

fn commits_keep_their_metadata(log: &Log) {
    let topic = log.topic("t", 2, &[]);
    log.send(&log.producer(&[]), &topic, 0, &texts("v", 10));
    let consumer = log.consumer("g", &[]);
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(&topic, 0, Offset::Offset(7)).expect("an offset");
    list.elements()[0].set_metadata("who = \"me\",\n\tünïcödé");
    consumer.commit(&list, CommitMode::Sync).expect("committed");
    let mut asked = TopicPartitionList::new();
    asked.add_partition(&topic, 0);
    asked.add_partition(&topic, 1);
    let found = log.consumer("g", &[]).committed_offsets(asked.clone(), LIMIT).expect("an answer");
    let found: Vec<_> = found.elements().iter().map(|e| (e.offset(), e.metadata().to_owned())).collect();
    assert_eq!(
        found,
        [(Offset::Offset(7), "who = \"me\",\n\tünïcödé".into()), (Offset::Invalid, String::new())]
    );
    let others = log.consumer("another", &[]).committed_offsets(asked, LIMIT).expect("an answer");
    assert!(others.elements().iter().all(|e| e.offset() == Offset::Invalid));
}

fn settings_of(log: &Log, topic: &str) -> HashMap<String, Option<String>> {
    let resource = [ResourceSpecifier::Topic(topic)];
    let admin = log.admin();
    let mut described =
        log.runtime.block_on(admin.describe_configs(&resource, &AdminOptions::new())).expect("an answer");
    let entries = described.remove(0).expect("described").entries;
    entries.into_iter().map(|e| (e.name, e.value)).collect()
}

fn topics_are_made_grown_altered_and_deleted(log: &Log) {
    let topic = log.topic("t", 2, &[("retention.ms", "1234"), ("cleanup.policy", "compact,delete")]);
    assert_eq!(log.create(&topic, 2, &[], false), Err(RDKafkaErrorCode::TopicAlreadyExists));
    assert_eq!(log.create("bad name", 1, &[], false), Err(RDKafkaErrorCode::InvalidTopic));
    let bad = log.name("bad");
    assert_eq!(log.create(&bad, 1, &[("no.such", "1")], false), Err(RDKafkaErrorCode::InvalidConfig));
    assert_eq!(log.create(&bad, 1, &[("retention.ms", "soon")], false), Err(RDKafkaErrorCode::InvalidConfig));
    assert_eq!(log.create(&bad, 0, &[], false), Err(RDKafkaErrorCode::InvalidPartitions));
    assert_eq!(log.create(&bad, 1, &[], true), Ok(()), "could be made");
    assert_eq!(log.create(&bad, 1, &[], true), Ok(()), "and was not");

    let settings = settings_of(log, &topic);
    assert_eq!(settings["retention.ms"].as_deref(), Some("1234"));
    assert_eq!(settings["cleanup.policy"].as_deref(), Some("compact,delete"));
    assert_eq!(settings["max.message.bytes"].as_deref(), Some("1048588"));

    let admin = log.admin();
    let options = AdminOptions::new();
    let grow = |count| {
        let grown =
            log.runtime.block_on(admin.create_partitions([&NewPartitions::new(&topic, count)], &options));
        grown.expect("an answer").remove(0).map(drop).map_err(|(_, error)| error)
    };
    assert_eq!(grow(5), Ok(()));
    assert_eq!(grow(4), Err(RDKafkaErrorCode::InvalidPartitions));
    let consumer = log.consumer("g", &[]);
    wait_for("five partitions", LIMIT, || {
        let metadata = consumer.fetch_metadata(Some(&topic), LIMIT).ok()?;
        (metadata.topics()[0].partitions().len() == 5).then_some(())
    });

    let alter = |value| {
        let change = AlterConfig::new(ResourceSpecifier::Topic(&topic)).set("retention.ms", value);
        let altered = log.runtime.block_on(admin.alter_configs([&change], &options)).expect("an answer");
        altered.into_iter().next().expect("one topic").map(drop).map_err(|(_, error)| error)
    };
    assert_eq!(alter("99"), Ok(()));
    // The Rust binding does not pass on why; what counts is that nothing changes.
    let _ = alter("never");
    wait_for("the setting to change", LIMIT, || {
        let settings = settings_of(log, &topic);
        // AlterConfigs replaces everything that was set.
        let now = (settings["retention.ms"].as_deref(), settings["cleanup.policy"].as_deref());
        (now == (Some("99"), Some("delete"))).then_some(())
    });

    let delete = || {
        let deleted = log.runtime.block_on(admin.delete_topics(&[&topic], &options)).expect("an answer");
        deleted.into_iter().next().expect("one topic").map(drop).map_err(|(_, error)| error)
    };
    assert_eq!(delete(), Ok(()));
    wait_for("the topic to be gone", LIMIT, || match delete() {
        Err(RDKafkaErrorCode::UnknownTopic | RDKafkaErrorCode::UnknownTopicOrPartition) => Some(()),
        _ => None,
    });
}

fn naming_a_topic_does_not_make_it(log: &Log) {
    let name = log.name("nobody-made-me");
    // The consumer allows it (`allow.auto.create.topics`); the log must not.
    let consumer = log.consumer("g", &[]);
    for _ in 0..2 {
        let metadata = consumer.fetch_metadata(Some(&name), LIMIT).expect("an answer");
        assert!(metadata.topics()[0].error().is_some());
    }
    let all = consumer.fetch_metadata(None, LIMIT).expect("an answer");
    assert!(all.topics().iter().all(|t| t.name() != name));
}

fn a_record_that_is_too_large_is_refused(log: &Log) {
    let topic = log.topic("t", 1, &[("max.message.bytes", "2000")]);
    let producer = log.producer(&[("compression.codec", "none")]);
    let send = |bytes: usize| {
        let value = "v".repeat(bytes);
        log.runtime.block_on(producer.send(FutureRecord::<str, str>::to(&topic).payload(&value), LIMIT))
    };
    let (error, _) = send(3000).expect_err("too large");
    assert_eq!(error.rdkafka_error_code(), Some(RDKafkaErrorCode::MessageSizeTooLarge));
    assert_eq!(send(1000).expect("small enough").offset, 0);
}

fn a_log_append_time_topic_stamps_records_itself(log: &Log) {
    let topic = log.topic("t", 1, &[("message.timestamp.type", "LogAppendTime")]);
    let producer = log.producer(&[]);
    let record = FutureRecord::to(&topic).key("k").payload("v").timestamp(1_000);
    let delivered = log.runtime.block_on(producer.send(record, LIMIT)).expect("delivered");
    let read = log.read(&topic, 0, Offset::Beginning, 1).remove(0);
    let rdkafka::Timestamp::LogAppendTime(at) = read.timestamp() else {
        panic!("got {:?}", read.timestamp())
    };
    assert!(at > 1_700_000_000_000, "the broker's clock, not the client's");
    assert_eq!(delivered.timestamp.to_millis(), Some(at), "the producer is told");
}

fn deleted_records_are_gone(log: &Log) {
    let topic = log.topic("t", 1, &[]);
    log.send(&log.producer(&[]), &topic, 0, &texts("v", 10));
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(&topic, 0, Offset::Offset(4)).expect("an offset");
    let deleted =
        log.runtime.block_on(log.admin().delete_records(&list, &AdminOptions::new())).expect("an answer");
    assert_eq!(deleted.elements()[0].offset(), Offset::Offset(4));
    let consumer = log.consumer("g", &[]);
    assert_eq!(consumer.fetch_watermarks(&topic, 0, LIMIT).expect("watermarks"), (4, 10));
    assert_eq!(log.read(&topic, 0, Offset::Beginning, 6)[0].offset(), 4);
    assign(&consumer, &topic, 0, Offset::Offset(3));
    let error = consumer.poll(LIMIT).expect("an answer").expect_err("below the start");
    assert_eq!(error.rdkafka_error_code(), Some(RDKafkaErrorCode::AutoOffsetReset));
}

fn groups_are_listed_and_deleted(log: &Log) {
    let topic = log.topic("t", 1, &[]);
    log.send(&log.producer(&[]), &topic, 0, &texts("v", 3));
    let group = log.name("g");
    let settings =
        [("auto.offset.reset", "earliest"), ("session.timeout.ms", "6000"), ("client.id", "contract")];
    let consumer = log.consumer("g", &settings);
    consumer.subscribe(&[&topic]).expect("subscribed");
    // A rebalance ends a poll early, without a record.
    let message = wait_for("a record", LIMIT, || consumer.poll(Duration::from_millis(100)));
    let message = message.expect("a record");
    consumer.commit_message(&message, CommitMode::Sync).expect("committed");
    drop(message);

    let groups = consumer.fetch_group_list(Some(&group), LIMIT).expect("an answer");
    let listed = &groups.groups()[0];
    assert_eq!(
        (listed.name(), listed.state(), listed.protocol_type()),
        (group.as_str(), "Stable", "consumer")
    );
    assert_eq!(listed.members()[0].client_id(), "contract");

    let admin = log.admin();
    let delete = || {
        let deleted =
            log.runtime.block_on(admin.delete_groups(&[&group], &AdminOptions::new())).expect("an answer");
        deleted.into_iter().next().expect("one group").map(drop).map_err(|(_, error)| error)
    };
    assert_eq!(delete(), Err(RDKafkaErrorCode::NonEmptyGroup));
    drop(consumer);
    wait_for("the group to be empty and then deleted", LIMIT, || delete().ok());
    let mut asked = TopicPartitionList::new();
    asked.add_partition(&topic, 0);
    let found = log.consumer("g", &[]).committed_offsets(asked, LIMIT).expect("an answer");
    assert_eq!(found.elements()[0].offset(), Offset::Invalid, "its offsets went with it");
}

/// Runs a program to its end and returns what it printed.
fn output(command: &mut Command, input: &str) -> String {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("could not start {command:?}: {error}"));
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("written");
    let done = child.wait_with_output().expect("it ends");
    let printed = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{command:?}: {printed}{}", String::from_utf8_lossy(&done.stderr));
    printed
}

fn kcat_produces_consumes_and_lists(log: &Log) {
    let Some(kcat) = services::kcat() else { return };
    let topic = log.topic("t", 2, &[]);
    let run = |arguments: &[&str], input| {
        output(Command::new(&kcat).args(["-b", &log.bootstrap, "-m", "20"]).args(arguments), input)
    };
    run(&["-P", "-t", &topic, "-p", "1", "-K", ":"], "a:1\nb:2\nc:three, and a colon: here\n");
    let read = run(&["-C", "-q", "-t", &topic, "-p", "1", "-e", "-f", "%o %k=%s\n"], "");
    assert_eq!(read, "0 a=1\n1 b=2\n2 c=three, and a colon: here\n");

    let listed: serde_json::Value = serde_json::from_str(&run(&["-L", "-J"], "")).expect("JSON");
    let topics = listed["topics"].as_array().expect("topics");
    let mine = topics.iter().find(|t| t["topic"] == topic.as_str()).expect("the topic is listed");
    assert_eq!(mine["partitions"].as_array().map(Vec::len), Some(2));
    assert_eq!(listed["brokers"][0]["name"], log.bootstrap.as_str());

    let query = run(&["-Q", "-t", &format!("{topic}:1:-1")], "");
    assert!(query.contains("offset 3"), "{query}");
}

fn a_python_client_does_all_of_it(log: &Log) {
    let Some(python) = services::python() else { return };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/log_client.py");
    let printed = output(Command::new(python).args([script, &log.bootstrap, &log.prefix]), "");
    let results: BTreeMap<String, serde_json::Value> =
        serde_json::from_str(printed.lines().last().unwrap_or_default()).expect("JSON on the last line");
    let want = serde_json::json!({
        "produced": [0, 1, 2],
        "consumed": [["k0", "v0"], ["k1", "v1"], ["k2", "v2"]],
        "committed": [2, "from python"],
        "beginning_and_end": [0, 3],
        "by_time": 1,
        "listed": true,
        "created_twice": "TopicAlreadyExistsError",
        "deleted": true,
    });
    assert_eq!(serde_json::to_value(results).expect("JSON"), want);
}
