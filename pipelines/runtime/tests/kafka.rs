//! The member of a consumer group, against librdkafka's mock cluster: what the log in memory cannot show.

#![cfg(test)]

use forebay_plan::Channel;
use forebay_runtime::{
    budget::Budget,
    drive::{Event, Progress, Sink as _, Source},
    host::kafka::{Kafka, KafkaLedger, KafkaSettings, KafkaSink, KafkaSource, ReadBounds, Reading},
    ledger::Log as _,
    message::{Group, Input, Outgoing, Partition},
    once::{Known, Once},
};
use forebay_schemas::{EntryKind, Headers, LedgerEntry, header};
use forebay_telemetry::{Health, Settings, Telemetry};
use rdkafka::{
    TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    message::{Header, OwnedHeaders},
    mocking::MockCluster,
    producer::{DefaultProducerContext, FutureProducer, FutureRecord},
    types::{RDKafkaApiKey, RDKafkaRespErr},
};
use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const PARTITIONS: i32 = 4;

/// Records that may wait for the loop.
const WAITING_MAX: usize = 64;

/// Far longer than anything here takes.
const LONG: Duration = Duration::from_secs(30);

struct Cluster {
    mock: MockCluster<'static, DefaultProducerContext>,
    kafka: Kafka,
    producer: FutureProducer,
    telemetry: Telemetry,
}

impl Cluster {
    fn start() -> Self {
        let mock = MockCluster::new(1).unwrap();
        mock.create_topic("requests", PARTITIONS, 1).unwrap();
        let bootstrap_servers = mock.bootstrap_servers();
        // The mock's rebalances take a second less than the session.
        let properties = [("session.timeout.ms", "3000"), ("heartbeat.interval.ms", "500")];
        let properties = properties.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let settings = KafkaSettings { bootstrap_servers, properties, ..KafkaSettings::default() };
        let kafka = Kafka::new(&settings).unwrap();
        let producer = kafka.producer_config().create().unwrap();
        let telemetry = Telemetry::start(Settings::new("test", "0")).unwrap();
        Self { mock, kafka, producer, telemetry }
    }

    fn join(&self) -> Member {
        let input = Input { topic: "requests".into(), channel: Channel::Live };
        self.join_groups(&[Group { name: "group".to_owned(), inputs: vec![input] }], None)
    }

    fn join_groups(&self, groups: &[Group], once: Option<Arc<Once>>) -> Member {
        let reading = Reading {
            bounds: ReadBounds::new(WAITING_MAX),
            budget: Budget::new(1 << 20),
            meter: self.telemetry.step("step", "none"),
            health: Health::new(),
            once,
        };
        let source = KafkaSource::join(&self.kafka, groups, reading).unwrap();
        Member {
            source,
            owned: BTreeSet::new(),
            assigned: 0,
            revoked: Vec::new(),
            read: BTreeSet::new(),
            told: Vec::new(),
            joined: false,
            ended: false,
        }
    }

    /// One record on every partition.
    async fn write(&self, text: &str) {
        for partition in 0..PARTITIONS {
            let record = FutureRecord::<str, str>::to("requests").partition(partition).payload(text);
            self.producer.send(record, LONG).await.unwrap();
        }
    }
}

/// A member, with what it was told.
struct Member {
    source: KafkaSource,
    owned: BTreeSet<i32>,
    /// How many partitions of any topic it was given so far.
    assigned: usize,
    /// What is to be given up, oldest first; the test gives it up when it wants.
    revoked: Vec<Vec<Partition>>,
    /// Partition and text.
    read: BTreeSet<(i32, String)>,
    /// Texts and rewinds as they came.
    told: Vec<String>,
    /// Whether the group has assigned something, be it nothing.
    joined: bool,
    ended: bool,
}

impl Member {
    async fn listen(&mut self) {
        match timeout(Duration::from_millis(50), self.source.next()).await {
            Ok(Event::Assigned(partitions)) => {
                self.joined = true;
                self.assigned += partitions.len();
                self.owned.extend(partitions.iter().map(|one| one.number));
            }
            Ok(Event::Revoked { partitions, lost }) => {
                assert!(!lost);
                partitions.iter().for_each(|one| {
                    self.owned.remove(&one.number);
                });
                self.revoked.push(partitions);
            }
            Ok(Event::Records(records)) => {
                for record in records {
                    self.source.dispatched(record.channel, record.held.bytes());
                    let text = String::from_utf8(record.value.unwrap().to_vec()).unwrap();
                    let partition = record.partition.clone();
                    let metadata = String::new();
                    self.source.store(&[Progress { partition, offset: record.offset + 1, metadata }]);
                    self.told.push(text.clone());
                    self.read.insert((record.partition.number, text));
                }
            }
            Ok(Event::Rewound(partition)) => self.told.push(format!("rewound {}", partition.number)),
            Ok(Event::Ended) => self.ended = true,
            Ok(Event::Failed(fault)) => panic!("{fault}"),
            Err(_) => {}
        }
    }

    fn release_all(&mut self) {
        for _ in std::mem::take(&mut self.revoked) {
            self.source.release();
        }
    }

    fn has_read(&self, text: &str) -> usize {
        self.read.iter().filter(|(_, read)| read == text).count()
    }
}

/// Listens to all members until something holds.
async fn until(members: &mut [&mut Member], what: &str, mut holds: impl FnMut(&mut [&mut Member]) -> bool) {
    let begun = Instant::now();
    while !holds(members) {
        assert!(begun.elapsed() < LONG, "{what} did not come about");
        for member in members.iter_mut() {
            member.listen().await;
        }
    }
}

/// What is beyond the bounds is paused for, and who pauses waits for librdkafka.
#[tokio::test]
async fn no_more_is_read_at_once_than_may_wait() {
    let cluster = Cluster::start();
    for _ in 0..80 {
        cluster.write("text").await;
    }
    let mut member = cluster.join();
    let first = loop {
        if let Event::Records(records) = timeout(LONG, member.source.next()).await.unwrap() {
            break records;
        }
    };
    assert!(first.len() <= WAITING_MAX, "{} records came at once", first.len());
}

#[tokio::test]
async fn a_partition_that_was_paused_when_it_went_is_read_when_it_comes_back() {
    let cluster = Cluster::start();
    let mut first = cluster.join();
    until(&mut [&mut first], "an assignment", |members| members[0].owned.len() == 4).await;
    for number in 0..PARTITIONS {
        first.source.pause(&Partition { topic: "requests".into(), number });
    }
    let mut second = cluster.join();
    until(&mut [&mut first, &mut second], "a rebalance", |members| {
        members.iter_mut().for_each(|member| member.release_all());
        members.iter().all(|member| member.owned.len() == 2)
    })
    .await;
    for number in first.owned.clone() {
        first.source.resume(&Partition { topic: "requests".into(), number });
    }
    second.source.close();
    until(&mut [&mut first, &mut second], "the other's end", |members| {
        members.iter_mut().for_each(|member| member.release_all());
        members[1].ended && members[0].owned.len() == 4
    })
    .await;
    cluster.write("after").await;
    until(&mut [&mut first], "reading", |members| members[0].has_read("after") == 4).await;
    drop(cluster.mock);
}

#[tokio::test]
async fn a_partition_that_is_rewound_while_it_is_paused_is_read_from_there() {
    let cluster = Cluster::start();
    let mut member = cluster.join();
    until(&mut [&mut member], "an assignment", |members| members[0].owned.len() == 4).await;
    let all = ["one", "two", "three"];
    for text in all {
        cluster.write(text).await;
    }
    let read_all = |members: &mut [&mut Member]| all.iter().all(|text| members[0].has_read(text) == 4);
    until(&mut [&mut member], "reading", read_all).await;
    let last = Partition { topic: "requests".into(), number: 3 };
    member.source.pause(&last);
    member.source.rewind(&last, 1);
    until(&mut [&mut member], "the rewind", |members| members[0].told.iter().any(|told| told == "rewound 3"))
        .await;
    member.told.clear();
    cluster.write("four").await;
    until(&mut [&mut member], "the others", |members| members[0].has_read("four") == 3).await;
    assert_eq!(member.told, ["four"; 3], "it is paused");
    // A pause after the rewind must not bring the old position back.
    member.source.pause(&last);
    member.source.resume(&last);
    until(&mut [&mut member], "reading on", |members| members[0].has_read("four") == 4).await;
    assert_eq!(member.told[3..], ["two", "three", "four"]);
}

#[tokio::test]
async fn what_is_on_its_way_is_remembered_while_what_was_set_aside_comes_and_goes() {
    let cluster = Cluster::start();
    cluster.mock.create_topic("aside", PARTITIONS, 1).unwrap();
    cluster.mock.create_topic("results", PARTITIONS, 1).unwrap();
    let group = |name: &str, topic: &str, channel| {
        let inputs = vec![Input { topic: topic.into(), channel }];
        Group { name: name.to_owned(), inputs }
    };
    let (live, aside) =
        (group("group", "requests", Channel::Live), group("group.aside", "aside", Channel::Retry));
    let once = Arc::new(Once::new(vec!["results".into()]));
    let mut first = cluster.join_groups(&[live, aside.clone()], Some(Arc::clone(&once)));
    until(&mut [&mut first], "an assignment of both", |members| members[0].assigned == 8).await;
    let result = Outgoing { topic: "results".into(), key: None, value: None, headers: Headers::new() };
    for number in 0..PARTITIONS {
        assert_eq!(once.admit(number, &result), Known::New);
    }
    // Another member takes a part of what was set aside and leaves, so that it comes back.
    let mut second = cluster.join_groups(&[aside], None);
    until(&mut [&mut first, &mut second], "a rebalance", |members| {
        members.iter_mut().for_each(|member| member.release_all());
        members[1].assigned == 2
    })
    .await;
    second.source.close();
    until(&mut [&mut first, &mut second], "the other's end", |members| {
        members.iter_mut().for_each(|member| member.release_all());
        members[1].ended && members[0].assigned == 10
    })
    .await;
    for number in 0..PARTITIONS {
        assert_eq!(once.admit(number, &result), Known::Written, "{number}");
    }
}

#[tokio::test]
async fn a_result_that_lies_twice_on_its_topic_is_counted() {
    let cluster = Cluster::start();
    cluster.mock.create_topic("results", PARTITIONS, 1).unwrap();
    for id in ["a", "b", "a"] {
        let header = Header { key: header::ID, value: Some(id) };
        let record = FutureRecord::<str, str>::to("results").partition(2).payload("{}");
        let record = record.headers(OwnedHeaders::new().insert(header));
        cluster.producer.send(record, LONG).await.unwrap();
    }
    let input = Input { topic: "requests".into(), channel: Channel::Live };
    let group = Group { name: "group".to_owned(), inputs: vec![input] };
    let once = Arc::new(Once::new(vec!["results".into()]));
    let mut member = cluster.join_groups(&[group], Some(once));
    until(&mut [&mut member], "an assignment", |members| members[0].owned.len() == 4).await;
    let shown = cluster.telemetry.prometheus();
    let repeated = shown.lines().find(|line| line.starts_with("forebay_results_repeated_total{")).unwrap();
    assert!(repeated.ends_with(" 1"), "{repeated}");
}

#[tokio::test]
async fn a_member_that_leaves_in_the_middle_of_a_drain_leaves() {
    let cluster = Cluster::start();
    let mut first = cluster.join();
    until(&mut [&mut first], "an assignment", |members| members[0].owned.len() == 4).await;
    cluster.write("before").await;
    until(&mut [&mut first], "reading", |members| members[0].has_read("before") == 4).await;
    let mut second = cluster.join();
    // The mock refuses commits until all have synchronised, which Kafka does not.
    until(&mut [&mut first, &mut second], "a rebalance", |members| {
        !members[0].revoked.is_empty() && members[1].joined
    })
    .await;
    first.source.close();
    // librdkafka may say at once that all must go, or only after what is being drained is given up.
    first.listen().await;
    until(&mut [&mut first, &mut second], "its end", |members| {
        members[0].release_all();
        members[0].ended
    })
    .await;
    until(&mut [&mut second], "taking over", |members| members[0].owned.len() == 4).await;
    cluster.write("after").await;
    until(&mut [&mut second], "reading on", |members| members[0].has_read("after") == 4).await;
    assert_eq!(second.has_read("before"), 0, "what the first stored was committed before it ended");
}

/// Committed by three commits, and by a fourth whose connection breaks before any of them was answered: all of them are sent
/// again, each when it comes to it.
#[tokio::test(flavor = "multi_thread")]
async fn no_commit_that_is_sent_again_goes_back_behind_a_later_one() {
    let cluster = Cluster::start();
    let mut member = cluster.join();
    until(&mut [&mut member], "an assignment", |members| members[0].owned.len() == 4).await;
    let partition = Partition { topic: "requests".into(), number: 0 };
    let onlooker: BaseConsumer = cluster.kafka.group_config("group").create().unwrap();
    let committed = || {
        let mut list = TopicPartitionList::new();
        list.add_partition("requests", 0);
        let committed = onlooker.committed_offsets(list, LONG).unwrap();
        committed.elements()[0].offset().to_raw().unwrap().max(0)
    };
    let (mut stored, mut seen) = (0, 0);
    for _ in 0..5 {
        cluster.mock.broker_round_trip_time(1, Duration::from_millis(300)).unwrap();
        for number in 0..4 {
            if number == 3 {
                cluster.mock.request_errors(
                    RDKafkaApiKey::OffsetCommit,
                    &[RDKafkaRespErr::RD_KAFKA_RESP_ERR__TRANSPORT],
                );
            }
            stored += 1;
            let metadata = String::new();
            member.source.store(&[Progress { partition: partition.clone(), offset: stored, metadata }]);
            member.source.commit();
            member.listen().await;
        }
        cluster.mock.broker_round_trip_time(1, Duration::ZERO).unwrap();
        let (begun, mut commits) = (Instant::now(), Instant::now());
        while seen < stored || begun.elapsed() < Duration::from_millis(600) {
            assert!(begun.elapsed() < LONG, "{seen} of {stored} committed");
            if commits.elapsed() > Duration::from_millis(250) {
                member.source.commit();
                commits = Instant::now();
            }
            let now = committed();
            assert!(now >= seen, "it went back from {seen} to {now}");
            seen = now;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_a_ledger_over_has_heard_already_how_long_it_was_silent() {
    let cluster = Cluster::start();
    cluster.mock.create_topic("ledger", PARTITIONS, 1).unwrap();
    let sink = KafkaSink::new(&cluster.kafka, CancellationToken::new()).unwrap();
    let ledger = KafkaLedger::new(&cluster.kafka, sink, &[], vec!["ledger".into()]).unwrap();
    let at = Partition { topic: "ledger".into(), number: 2 };
    let write = async || {
        let entry = LedgerEntry::of_lease(EntryKind::Renewed, "another", 0);
        ledger.append(&at, &entry).await.unwrap()
    };
    let age = async || {
        let chunk = ledger.read(&at, 0, usize::MAX).await.unwrap();
        assert!(chunk.at_end && !chunk.entries.is_empty(), "{chunk:?}");
        chunk.age
    };
    let written = Instant::now();
    write().await;
    // Nobody reads it meanwhile but these, and none of them takes as long.
    let heard = timeout(LONG, async {
        loop {
            let age = age().await;
            assert!(age <= written.elapsed(), "it is not older than it is");
            if age > Duration::from_secs(2) {
                return;
            }
        }
    });
    heard.await.expect("heard");
    let written = Instant::now();
    write().await;
    assert!(age().await <= written.elapsed(), "whoever writes is not silent");
}

/// Whoever takes over asks for all its ledgers at once. One that has no leader is read when it has one again, and keeps no other from being read.
#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_without_a_leader_keeps_no_other_from_being_read() {
    let cluster = Cluster::start();
    cluster.mock.create_topic("ledger", PARTITIONS, 1).unwrap();
    let sink = KafkaSink::new(&cluster.kafka, CancellationToken::new()).unwrap();
    let ledger = KafkaLedger::new(&cluster.kafka, sink, &[], vec!["ledger".into()]).unwrap();
    let at = |number| Partition { topic: "ledger".into(), number };
    for number in 0..PARTITIONS {
        let entry = LedgerEntry::of_lease(EntryKind::Renewed, "an owner", 0);
        timeout(LONG, ledger.append(&at(number), &entry)).await.unwrap().unwrap();
    }
    cluster.mock.partition_leader("ledger", 0, None).unwrap();
    // The first keeps the reader busy, and the others wait for it together.
    let reads: Vec<_> = [0, 0, 1, 2].map(|number| ledger.read(&at(number), 0, usize::MAX)).into();
    let read = timeout(2 * LONG, futures::future::join_all(reads)).await.expect("each is answered");
    let entries: Vec<_> =
        read.iter().map(|read| read.as_ref().map_or(0, |chunk| chunk.entries.len())).collect();
    assert_eq!(entries, [0, 0, 1, 1], "{read:?}");
}

/// Of several requests on their way the first is refused by a broker that is no leader yet, and the next are taken by the same broker once
/// it is: it knows nothing of this producer and takes any sequence number, and librdkafka then calls the first one written
/// (confluent-kafka-go #921).
#[tokio::test]
async fn a_message_is_written_though_one_behind_it_was_before() {
    const MESSAGES: usize = 5;
    let cluster = Cluster::start();
    let properties = [("batch.num.messages", "1")].map(|(name, value)| (name.to_owned(), value.to_owned()));
    let settings = KafkaSettings {
        bootstrap_servers: cluster.mock.bootstrap_servers(),
        properties: properties.into(),
        registry: None,
    };
    let sink = KafkaSink::new(&Kafka::new(&settings).unwrap(), CancellationToken::new()).unwrap();
    let message = |number: usize| Outgoing {
        topic: "requests".into(),
        key: Some(b"one partition".to_vec()),
        value: Some(number.to_string().into_bytes()),
        headers: Headers::new(),
    };
    // Knows its broker and its own id from here on; on another partition.
    timeout(LONG, sink.send(vec![Outgoing { key: Some(b"another".to_vec()), ..message(0) }]))
        .await
        .unwrap()
        .unwrap();
    // All are on their way before the first is answered.
    cluster.mock.broker_round_trip_time(1, Duration::from_millis(500)).unwrap();
    let refusal = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION;
    cluster.mock.request_errors(RDKafkaApiKey::Produce, &[refusal]);
    timeout(LONG, sink.send((1..=MESSAGES).map(message).collect())).await.unwrap().unwrap();

    let consumer: BaseConsumer = cluster.kafka.reader_config().create().unwrap();
    let mut all = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        all.add_partition_offset("requests", partition, rdkafka::Offset::Beginning).unwrap();
    }
    consumer.assign(&all).unwrap();
    let (mut written, begun) = (BTreeSet::new(), Instant::now());
    while written.len() <= MESSAGES {
        assert!(begun.elapsed() < LONG, "acknowledged, and not written; there are only {written:?}");
        if let Some(Ok(read)) = consumer.poll(Duration::from_millis(100)) {
            written.insert(String::from_utf8(rdkafka::Message::payload(&read).unwrap().to_vec()).unwrap());
        }
    }
}
