//! What only the embedded broker can be asked: that it survives kills, keeps its ids over restarts, says
//! what is wrong when it cannot start, and refuses clearly what it does not serve.

#![expect(
    clippy::expect_used,
    clippy::result_large_err,
    reason = "a test that cannot go on says why by panicking"
)]

use forebay_broker::{Broker, Config, Fsync, StartError};
use forebay_tests::{Running, Signal, wait_for};
use rdkafka::ClientContext;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message;
use rdkafka::producer::{
    BaseProducer, DeliveryResult, FutureProducer, FutureRecord, Producer, ProducerContext,
};
use rdkafka::producer::{BaseRecord, ThreadedProducer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

const LIMIT: Duration = Duration::from_secs(120);
/// Set: this process is a broker on that folder and not a test.
const BROKER_DATA: &str = "FOREBAY_TEST_BROKER_DATA";
const BROKER_PORT: &str = "FOREBAY_TEST_BROKER_PORT";

fn client(bootstrap: SocketAddr) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", bootstrap.to_string()).set("reconnect.backoff.max.ms", "200");
    config
}

fn runtime() -> Runtime {
    Runtime::new().expect("a runtime")
}

fn start(config: Config) -> Result<Broker, StartError> {
    runtime().block_on(Broker::start(config))
}

fn on(data: &Path) -> Config {
    Config { bind_patience: Duration::from_millis(200), ..Config::new(data, ([127, 0, 0, 1], 0)) }
}

fn create(bootstrap: SocketAddr, topic: &str, partitions: i32, settings: &[(&str, &str)]) {
    let admin: AdminClient<DefaultClientContext> = client(bootstrap).create().expect("an admin client");
    let mut new = NewTopic::new(topic, partitions, TopicReplication::Fixed(1));
    for (name, value) in settings {
        new = new.set(name, value);
    }
    let made = runtime().block_on(admin.create_topics([&new], &AdminOptions::new())).expect("an answer");
    assert!(made[0].is_ok(), "{made:?}");
}

/// Sends records with these keys and values, one after the other.
fn send(bootstrap: SocketAddr, topic: &str, records: &[(&str, Option<&str>)]) {
    let producer: FutureProducer = client(bootstrap)
        .set("enable.idempotence", "true")
        .set("linger.ms", "0")
        .create()
        .expect("a producer");
    runtime().block_on(async {
        for (key, value) in records {
            let mut record = FutureRecord::<str, str>::to(topic).partition(0).key(key);
            record.payload = *value;
            producer.send(record, LIMIT).await.expect("delivered");
        }
    });
}

/// Every record of a partition: offset, key and value.
fn read_all(bootstrap: SocketAddr, topic: &str, partition: i32) -> Vec<(i64, String, Option<String>)> {
    let consumer: BaseConsumer = client(bootstrap)
        .set("group.id", "reader")
        .set("enable.auto.commit", "false")
        .create()
        .expect("a consumer");
    let (start, end) = consumer.fetch_watermarks(topic, partition, LIMIT).expect("watermarks");
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(topic, partition, Offset::Offset(start)).expect("an offset");
    consumer.assign(&list).expect("assigned");
    let mut found: Vec<(i64, String, Option<String>)> = Vec::new();
    let text = |bytes: Option<&[u8]>| bytes.map(|b| String::from_utf8_lossy(b).into_owned());
    while found.last().map_or(start, |(offset, ..)| offset + 1) < end {
        let message = wait_for("a record", LIMIT, || consumer.poll(Duration::from_millis(200)));
        let message = message.expect("a record");
        found.push((message.offset(), text(message.key()).unwrap_or_default(), text(message.payload())));
    }
    found
}

/// Not a test of its own: the child of those that kill a broker. Runs until it is killed.
#[test]
fn child_broker() {
    let (Ok(data), Ok(port)) = (std::env::var(BROKER_DATA), std::env::var(BROKER_PORT)) else { return };
    let mut config = Config::new(PathBuf::from(data), ([127, 0, 0, 1], port.parse().expect("a port")));
    config.segment_bytes = 256 << 10;
    config.upkeep_every = Duration::from_millis(50);
    config.fsync = Fsync::Never;
    runtime().block_on(async {
        let _broker = Broker::start(config).await.expect("it starts");
        std::future::pending::<()>().await;
    });
}

fn child(data: &Path, port: u16) -> Running {
    let _ = std::fs::remove_file(data.join("address"));
    let mut command = Command::new(std::env::current_exe().expect("this executable"));
    command
        .args(["--exact", "child_broker", "--nocapture"])
        .env(BROKER_DATA, data)
        .env(BROKER_PORT, port.to_string());
    let child = Running::start("broker", &mut command);
    wait_for("the broker to listen", LIMIT, || data.join("address").exists().then_some(()));
    child
}

/// Collects what was acknowledged: partition and offset of each value.
#[derive(Clone, Default)]
struct Acknowledged(Arc<Mutex<BTreeMap<String, (i32, i64)>>>);

impl ClientContext for Acknowledged {}

impl ProducerContext for Acknowledged {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Ok(message) = result {
            let value = String::from_utf8_lossy(message.payload().unwrap_or_default()).into_owned();
            self.0.lock().expect("no panic").insert(value, (message.partition(), message.offset()));
        }
    }
}

#[test]
fn a_broker_killed_in_mid_write_loses_nothing_acknowledged() {
    const KILLS: usize = 6;
    let data = tempfile::tempdir().expect("a folder");
    let port = forebay_tests::free_port();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let mut broker = child(data.path(), port);
    create(address, "t", 3, &[]);
    create(address, "committed", 1, &[]);

    let acknowledged = Acknowledged::default();
    let producer: ThreadedProducer<Acknowledged> = client(address)
        .set("enable.idempotence", "true")
        .set("linger.ms", "1")
        .set("message.timeout.ms", "60000")
        .create_with_context(acknowledged.clone())
        .expect("a producer");
    let committer: BaseConsumer =
        client(address).set("group.id", "g").set("enable.auto.commit", "false").create().expect("a consumer");
    let padding = "x".repeat(700);
    let (mut sent, mut committed) = (0u32, -1);
    for kill in 0..KILLS {
        let goal = acknowledged.0.lock().expect("no panic").len() + 2000;
        let mut offset = 0;
        while acknowledged.0.lock().expect("no panic").len() < goal {
            // A bounded lead, so that the kill finds writes in flight and not a queue of them.
            if producer.in_flight_count() < 500 {
                let (partition, value) = ((sent % 3).cast_signed(), format!("{sent} {padding}"));
                let record = BaseRecord::to("t").partition(partition).key("k").payload(&value);
                producer.send(record).map_err(|(error, _)| error).expect("room in the queue");
                sent += 1;
            }
            offset += 1;
            if offset % 500 == 0 {
                committed += 1;
                let mut list = TopicPartitionList::new();
                list.add_partition_offset("committed", 0, Offset::Offset(committed)).expect("an offset");
                committer.commit(&list, CommitMode::Sync).expect("committed");
            }
        }
        broker.signal(Signal::KILL);
        broker.ended(LIMIT);
        broker = child(data.path(), port);
        let mut asked = TopicPartitionList::new();
        asked.add_partition("committed", 0);
        let found = committer.committed_offsets(asked, LIMIT).expect("an answer");
        assert_eq!(found.elements()[0].offset(), Offset::Offset(committed), "after kill {kill}");
    }
    producer.flush(Duration::from_secs(60)).expect("all delivered");

    let acknowledged = acknowledged.0.lock().expect("no panic");
    assert_eq!(acknowledged.len(), usize::try_from(sent).expect("small"), "all were acknowledged in the end");
    let mut stored: HashMap<String, (i32, i64)> = HashMap::new();
    for partition in 0..3 {
        for (n, (offset, _, value)) in (0..).zip(read_all(address, "t", partition)) {
            assert_eq!(offset, n, "offsets have no gap");
            let before = stored.insert(value.expect("a value"), (partition, offset));
            assert!(before.is_none(), "an idempotent producer's record is stored once");
        }
    }
    for (value, (partition, offset)) in acknowledged.iter() {
        let found = stored.get(value).unwrap_or_else(|| panic!("lost {:.10}", value));
        // After a restart librdkafka may be told of a record's place by its first answer only.
        assert!(*offset < 0 || *found == (*partition, *offset), "{value:.10} is where it was said to be");
    }
    assert_eq!(stored.len(), acknowledged.len());
}

#[test]
fn ids_topics_and_offsets_survive_a_restart_and_the_address_is_announced() {
    let data = tempfile::tempdir().expect("a folder");
    let mut ids = Vec::new();
    for life in 0..3 {
        let fsync = [Fsync::EveryBatch, Fsync::Interval(Duration::from_millis(1)), Fsync::Never][life];
        let broker = start(Config { fsync, ..on(data.path()) }).expect("it starts");
        let announced = std::fs::read_to_string(data.path().join("address")).expect("an address");
        assert_eq!(announced.trim(), broker.address().to_string());
        if life == 0 {
            create(broker.address(), "t", 2, &[("retention.ms", "-1")]);
        }
        send(broker.address(), "t", &[("k", Some("v"))]);
        assert_eq!(read_all(broker.address(), "t", 0).len(), life + 1);
        let producer: BaseProducer = client(broker.address()).create().expect("a producer");
        ids.push(producer.client().fetch_cluster_id(LIMIT).expect("a cluster id"));
        runtime().block_on(broker.shutdown());
        assert!(!data.path().join("address").exists(), "gone with the broker");
    }
    assert!(ids.iter().all(|id| *id == ids[0] && !id.is_empty()), "{ids:?}");
}

#[test]
fn a_second_broker_on_a_folder_or_an_address_is_told_which() {
    let (data, other) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let broker = start(on(data.path())).expect("it starts");
    let error = start(on(data.path())).expect_err("the folder is taken");
    let want = format!(
        "data folder {} is in use by another process; stop that one or choose another folder",
        data.path().display()
    );
    assert_eq!(error.to_string(), want);
    let error =
        start(Config { listen: broker.address(), ..on(other.path()) }).expect_err("the address is taken");
    let want = format!(
        "address {} is in use by another process; stop that one or choose another address",
        broker.address()
    );
    assert_eq!(error.to_string(), want);
    runtime().block_on(broker.shutdown());
    start(on(data.path())).expect("the folder is free again");
}

#[test]
fn a_damaged_segment_is_named_with_its_place_and_what_to_do() {
    let data = tempfile::tempdir().expect("a folder");
    let broker = start(on(data.path())).expect("it starts");
    create(broker.address(), "t", 1, &[]);
    send(broker.address(), "t", &[("a", Some("1")), ("b", Some("2")), ("c", Some("3"))]);
    runtime().block_on(broker.shutdown());

    let topic =
        std::fs::read_dir(data.path().join("topics")).expect("topics").next().expect("one").expect("read");
    let segment = topic.path().join("0/00000000000000000000.log");
    let mut bytes = std::fs::read(&segment).expect("the segment");
    let position = bytes.len() / 3;
    bytes[position + 65] ^= 1;
    std::fs::write(&segment, &bytes).expect("written");
    let error = start(on(data.path())).expect_err("damaged").to_string();
    assert!(
        error.starts_with(&format!("segment {} is damaged at byte {position} (", segment.display())),
        "{error}"
    );
    let advice = error.split("with: ").nth(1).expect("advice");
    let done = Command::new("sh").args(["-c", advice]).status().expect("sh runs");
    assert!(done.success());
    let broker = start(on(data.path())).expect("it starts after what was advised");
    assert_eq!(read_all(broker.address(), "t", 0).len(), 1);
}

#[test]
fn a_compacted_topic_keeps_the_last_value_of_each_key() {
    let data = tempfile::tempdir().expect("a folder");
    let broker =
        start(Config { upkeep_every: Duration::from_millis(20), ..on(data.path()) }).expect("it starts");
    let settings = [
        ("cleanup.policy", "compact"),
        ("segment.ms", "1"),
        ("min.cleanable.dirty.ratio", "0.01"),
        ("delete.retention.ms", "0"),
    ];
    create(broker.address(), "t", 1, &settings);
    let records = [
        ("a", Some("1")),
        ("b", Some("1")),
        ("a", Some("2")),
        ("gone", Some("1")),
        ("gone", None),
        ("b", Some("3")),
    ];
    send(broker.address(), "t", &records);
    wait_for("compaction", LIMIT, || {
        let kept: Vec<_> = read_all(broker.address(), "t", 0);
        let kept: Vec<_> = kept.iter().map(|(o, k, v)| (*o, k.as_str(), v.as_deref())).collect();
        (kept == [(2, "a", Some("2")), (5, "b", Some("3"))]).then_some(())
    });
}

#[test]
fn what_is_not_the_protocol_ends_its_own_connection_only() {
    let data = tempfile::tempdir().expect("a folder");
    let broker = start(on(data.path())).expect("it starts");
    let mut bystander = TcpStream::connect(broker.address()).expect("connected");
    let request = |key: u8, version: u8, body: &[u8]| {
        let length = u8::try_from(8 + body.len()).expect("short");
        [&[0, 0, 0, length, 0, key, 0, version, 0, 0, 0, 9][..], body].concat()
    };
    let garbage: [Vec<u8>; 6] = [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 64],
        // A Metadata request whose body ends in the middle.
        request(3, 9, &[0, 1]),
        // A request that is not served, a version that is not, and a key that no request has.
        request(26, 0, &[0xff, 0xff]),
        request(0, 99, &[0xff, 0xff]),
        request(250, 0, &[0xff, 0xff]),
    ];
    for bytes in garbage {
        let mut socket = TcpStream::connect(broker.address()).expect("connected");
        socket.set_read_timeout(Some(LIMIT)).expect("a limit");
        socket.write_all(&bytes).expect("sent");
        let mut answer = Vec::new();
        // Closed with bytes unread, the socket may be reset instead of ended.
        let read = socket.read_to_end(&mut answer);
        assert!(
            !matches!(&read, Err(e) if e.kind() == std::io::ErrorKind::WouldBlock),
            "not closed: {bytes:?}"
        );
        assert_eq!(answer, b"", "{bytes:?}");
    }
    // ApiVersions in a version to come: UNSUPPORTED_VERSION in the form of version 0.
    bystander.set_read_timeout(Some(LIMIT)).expect("a limit");
    bystander.write_all(&request(18, 99, &[0xff, 0xff])).expect("sent");
    let mut answer = [0; 10];
    bystander.read_exact(&mut answer).expect("an answer");
    assert_eq!(answer[4..], [0, 0, 0, 9, 0, 35]);
}

#[test]
fn the_new_group_protocol_is_refused_as_final() {
    let data = tempfile::tempdir().expect("a folder");
    let broker = start(on(data.path())).expect("it starts");
    create(broker.address(), "t", 1, &[]);
    let consumer: BaseConsumer = client(broker.address())
        .set("group.id", "g")
        .set("group.protocol", "consumer")
        .create()
        .expect("a consumer");
    consumer.subscribe(&["t"]).expect("subscribed");
    let error = wait_for("a refusal", LIMIT, || consumer.poll(Duration::from_millis(100)));
    match error {
        Err(KafkaError::MessageConsumptionFatal(RDKafkaErrorCode::UnsupportedVersion)) => {}
        other => panic!("got {other:?}"),
    }
}

#[test]
fn a_transactional_producer_is_refused_as_final() {
    let data = tempfile::tempdir().expect("a folder");
    let broker = start(on(data.path())).expect("it starts");
    let producer: BaseProducer =
        client(broker.address()).set("transactional.id", "x").create().expect("a producer");
    let began = Instant::now();
    let error = producer.init_transactions(LIMIT).expect_err("refused");
    assert!(began.elapsed() < LIMIT / 2, "refused and not timed out: {error}");
    assert!(error.to_string().contains("does not support transactions"), "{error}");
}

#[test]
fn a_full_disk_is_an_answer_and_what_fits_again_is_stored() {
    // A small file system of its own; making one needs the right to mount.
    let disk = tempfile::tempdir().expect("a folder");
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "none"]).arg(disk.path()).output();
    if !mounted.is_ok_and(|m| m.status.success()) {
        let _ = writeln!(std::io::stderr(), "skipped: a_full_disk needs the right to mount a tmpfs");
        return;
    }
    struct Mounted(PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        }
    }
    let _mounted = Mounted(disk.path().to_owned());
    let broker = start(on(disk.path())).expect("it starts");
    create(broker.address(), "t", 1, &[]);
    let ballast = disk.path().join("ballast");
    send(broker.address(), "t", &[("before", Some("1"))]);
    // All but a little: the next batch fits in part.
    std::fs::write(&ballast, vec![0; 1 << 20]).expect("room for the ballast");
    let producer: FutureProducer = client(broker.address())
        .set("compression.codec", "none")
        .set("message.timeout.ms", "60000")
        .set("retry.backoff.ms", "50")
        .set("message.send.max.retries", "0")
        .create()
        .expect("a producer");
    let large = "x".repeat(900 << 10);
    let send_large =
        || runtime().block_on(producer.send(FutureRecord::<str, str>::to("t").payload(&large), LIMIT));
    let error = wait_for("the disk to be full", LIMIT, || send_large().err()).0;
    assert_eq!(error.rdkafka_error_code(), Some(RDKafkaErrorCode::KafkaStorageError));
    let stored = read_all(broker.address(), "t", 0).len();
    std::fs::remove_file(&ballast).expect("removed");
    send_large().expect("stored once there is room");
    assert_eq!(read_all(broker.address(), "t", 0).len(), stored + 1, "what was refused is not there");
    runtime().block_on(broker.shutdown());
    start(on(disk.path())).expect("it starts on what a full disk left");
}

/// How fast it is; a figure to read, not a bound to keep on a machine that others load too.
#[test]
#[ignore = "a measurement: cargo test -p forebay-tests --test log_embedded throughput -- --ignored --nocapture"]
fn throughput() {
    const COUNT: usize = 200_000;
    let data = tempfile::tempdir().expect("a folder");
    let broker = start(on(data.path())).expect("it starts");
    create(broker.address(), "t", 1, &[]);
    let producer: BaseProducer = client(broker.address())
        .set("enable.idempotence", "true")
        .set("linger.ms", "5")
        .set("queue.buffering.max.messages", "1000000")
        .create()
        .expect("a producer");
    let value = vec![7u8; 1024];
    let began = Instant::now();
    for n in 0..COUNT {
        while producer.send(BaseRecord::<[u8], [u8]>::to("t").partition(0).payload(&value)).is_err() {
            producer.poll(Duration::from_millis(1));
        }
        if n % 1000 == 0 {
            producer.poll(Duration::ZERO);
        }
    }
    producer.flush(LIMIT).expect("delivered");
    let rate = |took: Duration| COUNT as f64 / took.as_secs_f64();
    println!("produce {:.0} msg/s of 1 KiB", rate(began.elapsed()));

    let consumer: BaseConsumer = client(broker.address()).set("group.id", "g").create().expect("a consumer");
    let mut list = TopicPartitionList::new();
    list.add_partition_offset("t", 0, Offset::Beginning).expect("an offset");
    consumer.assign(&list).expect("assigned");
    let began = Instant::now();
    let mut count = 0;
    while count < COUNT {
        count += usize::from(consumer.poll(Duration::from_millis(100)).is_some_and(|m| m.is_ok()));
    }
    println!("consume {:.0} msg/s", rate(began.elapsed()));

    let producer: FutureProducer =
        client(broker.address()).set("linger.ms", "0").create().expect("a producer");
    let runtime = runtime();
    let mut trips: Vec<Duration> = (0..2000)
        .map(|_| {
            let began = Instant::now();
            runtime
                .block_on(
                    producer.send(FutureRecord::<[u8], [u8]>::to("t").partition(0).payload(&value), LIMIT),
                )
                .expect("delivered");
            wait_for("the record", LIMIT, || consumer.poll(Duration::from_millis(100))).expect("a record");
            began.elapsed()
        })
        .collect();
    trips.sort_unstable();
    println!("produce, acknowledge, consume: p50 {:?}, p99 {:?}", trips[1000], trips[1980]);
}
