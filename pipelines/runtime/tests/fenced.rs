//! A broker that has only just started and says that its cluster has no brokers: librdkafka lets go of all that it knew then, and a
//! client that lives on must ask again once the broker knows better.
//!
//! librdkafka mostly begins anew by itself. Here it never does (`metadata.recovery.strategy`), as it sometimes does not on a busy
//! machine.

#![cfg(test)]

use forebay_plan::Channel;
use forebay_runtime::{
    budget::Budget,
    host::kafka::{
        Kafka, KafkaSettings, KafkaSink, KafkaSource, LastingContext, ReadBounds, Reading, looked_after,
    },
    message::{Group, Input, Outgoing},
};
use forebay_schemas::Headers;
use forebay_telemetry::{Health, Settings, Telemetry};
use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
};
use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// Far longer than anything here takes.
const LONG: Duration = Duration::from_secs(60);

/// Without an answer that names a broker for so long, a client has heard one that does not.
const FENCED: Duration = Duration::from_millis(700);

/// Answers what it can do and what the cluster is made of, and hangs up on whoever asks for more.
#[derive(Clone)]
struct Broker {
    port: u16,
    /// Whether it says that there are no brokers.
    is_fenced: Arc<AtomicBool>,
    /// How often it was asked what the cluster is made of.
    asked: Arc<AtomicUsize>,
}

impl Broker {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let this = Self { port, is_fenced: Arc::default(), asked: Arc::default() };
        let broker = this.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let broker = broker.clone();
                std::thread::spawn(move || broker.serve(stream));
            }
        });
        this
    }

    fn kafka(&self) -> Kafka {
        let properties = [
            ("topic.metadata.refresh.interval.ms", "100"),
            ("statistics.interval.ms", "100"),
            ("metadata.recovery.strategy", "none"),
        ];
        let properties = properties.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let bootstrap_servers = format!("127.0.0.1:{}", self.port);
        Kafka::new(&KafkaSettings { bootstrap_servers, properties, ..KafkaSettings::default() }).unwrap()
    }

    /// Ends with its connection.
    fn serve(&self, mut stream: TcpStream) -> Option<()> {
        loop {
            let mut size = [0; 4];
            stream.read_exact(&mut size).ok()?;
            let mut request = vec![0; usize::try_from(u32::from_be_bytes(size)).ok()?];
            stream.read_exact(&mut request).ok()?;
            let mut answer = request.get(4..8)?.to_vec();
            match request.get(..4)? {
                [0, 18, 0, 0] => answer.extend(self.versions(0)),
                // UNSUPPORTED_VERSION: then it asks in version 0.
                [0, 18, ..] => answer.extend(self.versions(35)),
                [0, 3, ..] => answer.extend(self.metadata()),
                _ => return None,
            }
            stream.write_all(&u32::try_from(answer.len()).ok()?.to_be_bytes()).ok()?;
            stream.write_all(&answer).ok()?;
        }
    }

    /// ApiVersions v0: itself, and Metadata up to version 1.
    fn versions(&self, fault: i16) -> Vec<u8> {
        let mut answer = fault.to_be_bytes().to_vec();
        answer.extend(2_i32.to_be_bytes());
        [18_i16, 0, 0, 3, 0, 1].iter().for_each(|number| answer.extend(number.to_be_bytes()));
        answer
    }

    /// Metadata v1: a topic of one partition.
    fn metadata(&self) -> Vec<u8> {
        let is_fenced = self.is_fenced.load(Ordering::SeqCst);
        self.asked.fetch_add(1, Ordering::SeqCst);
        let mut answer = i32::from(!is_fenced).to_be_bytes().to_vec();
        let text = |text: &str| {
            let length = i16::try_from(text.len()).unwrap().to_be_bytes();
            length.into_iter().chain(text.bytes()).collect::<Vec<_>>()
        };
        if !is_fenced {
            answer.extend(1_i32.to_be_bytes());
            answer.extend(text("127.0.0.1"));
            answer.extend(i32::from(self.port).to_be_bytes());
            answer.extend((-1_i16).to_be_bytes());
        }
        // The leader is not available, or it is broker 1, as is the controller.
        let (fault, leader) = if is_fenced { (5_i16, -1_i32) } else { (0, 1) };
        answer.extend(leader.to_be_bytes());
        answer.extend(1_i32.to_be_bytes());
        answer.extend(0_i16.to_be_bytes());
        answer.extend(text("topic"));
        answer.push(0);
        answer.extend(1_i32.to_be_bytes());
        answer.extend(fault.to_be_bytes());
        [0, leader, 1, 1, 1, 1].iter().for_each(|number: &i32| answer.extend(number.to_be_bytes()));
        answer
    }

    /// Asserts that whoever asks now asks again behind an answer without brokers. `turn` is what the client's owner does meanwhile.
    fn is_asked_again(&self, mut turn: impl FnMut()) {
        let mut turn_for = |what: &str, is_over: &mut dyn FnMut(usize) -> bool| {
            let until = Instant::now() + LONG;
            while !is_over(self.asked.load(Ordering::SeqCst)) {
                assert!(Instant::now() < until, "in vain: {what}");
                turn();
                std::thread::yield_now();
            }
        };
        for round in 0..3 {
            let known = self.asked.load(Ordering::SeqCst) + 3;
            turn_for(&format!("it asks, round {round}"), &mut |asked| asked >= known);
            self.is_fenced.store(true, Ordering::SeqCst);
            let (fenced, until) = (self.asked.load(Ordering::SeqCst), Instant::now() + FENCED);
            turn_for("it asks, and hears of no broker", &mut |asked| {
                asked > fenced && Instant::now() > until
            });
            self.is_fenced.store(false, Ordering::SeqCst);
        }
        let known = self.asked.load(Ordering::SeqCst) + 3;
        turn_for("it asks again at last", &mut |asked| asked >= known);
    }
}

fn rest() {
    std::thread::park_timeout(Duration::from_millis(10));
}

#[test]
fn a_reader_asks_again() {
    let broker = Broker::start();
    let kafka = broker.kafka();
    let reader: BaseConsumer<LastingContext> =
        looked_after(kafka.reader_config()).create_with_context(LastingContext::to(&kafka)).unwrap();
    let mut all = TopicPartitionList::new();
    all.add_partition_offset("topic", 0, Offset::Offset(0)).unwrap();
    reader.assign(&all).unwrap();
    broker.is_asked_again(|| {
        let _ = reader.poll(Duration::from_millis(10));
        reader.context().mend(reader.client());
    });
}

#[test]
fn a_producer_asks_again() {
    let broker = Broker::start();
    let sink = KafkaSink::new(&broker.kafka(), CancellationToken::new()).unwrap();
    let message = Outgoing { topic: "topic".into(), key: None, value: None, headers: Headers::new() };
    assert!(sink.send_best_effort(&message), "on its way, as the broker takes none");
    broker.is_asked_again(rest);
}

#[tokio::test]
async fn a_member_of_a_group_asks_again() {
    let broker = Broker::start();
    let telemetry = Telemetry::start(Settings::new("test", "0")).unwrap();
    let reading = Reading {
        bounds: ReadBounds::new(64),
        budget: Budget::new(1 << 20),
        meter: telemetry.step("step", "none"),
        health: Health::new(),
        once: None,
    };
    let inputs = vec![Input { topic: "topic".into(), channel: Channel::Live }];
    let group = Group { name: "group".to_owned(), inputs };
    let source = KafkaSource::join(&broker.kafka(), &[group], reading).unwrap();
    broker.is_asked_again(rest);
    drop(source);
}
