//! Whoever asks: writes requests, reads results, and notes when.
//!
//! Invariant: requests are sent when they are due, whether or not earlier ones are answered, so that a slow answer does not
//! hide behind a late question.

use crate::cluster;
use forebay_schemas::{Record as _, Request, RequestId, topics};
use hdrhistogram::Histogram;
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    producer::{BaseRecord, DefaultProducerContext, ThreadedProducer},
    types::RDKafkaErrorCode,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

/// How long results may stay away before the run is given up.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// A client of one chain.
pub struct Client {
    producer: ThreadedProducer<DefaultProducerContext>,
    requests: String,
    results: mpsc::Receiver<Arrived>,
    questions: Vec<String>,
    /// Whether results are Forebay's: then each must be an answer.
    answers: bool,
    /// Given to each request, so that no two are alike and none comes from the cache.
    next: usize,
    closed: Arc<AtomicBool>,
    reading: Option<thread::JoinHandle<()>>,
}

struct Arrived {
    number: usize,
    at: Instant,
    answered: bool,
}

/// What became of a number of requests.
pub struct Served {
    pub wall: Duration,
    pub latency_us: Histogram<u64>,
}

impl Client {
    pub fn connect(at: &str, prefix: &str, questions: Vec<String>, answers: bool) -> Self {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", at).set("acks", "all").set("enable.idempotence", "true");
        config.set("linger.ms", "0");
        let closed = Arc::new(AtomicBool::new(false));
        let (sender, results) = mpsc::channel();
        let reader = cluster::reader(at);
        let mut list = TopicPartitionList::new();
        for partition in 0..cluster::PARTITIONS {
            let topic = format!("{prefix}{}", topics::RESULTS.name);
            list.add_partition_offset(&topic, partition, Offset::Beginning).expect("an offset");
        }
        reader.assign(&list).expect("an assignment");
        let stop = Arc::clone(&closed);
        let reading = thread::spawn(move || read(&reader, &sender, &stop));
        Self {
            producer: config.create().expect("a producer"),
            requests: format!("{prefix}{}", topics::REQUESTS.name),
            results,
            questions,
            answers,
            next: 0,
            closed,
            reading: Some(reading),
        }
    }

    /// Sends so many requests, one each `every` or all at once, and waits for all results.
    pub fn ask(&mut self, count: usize, every: Option<Duration>) -> Served {
        let first = self.next;
        self.next += count;
        let start = Instant::now();
        let mut sent = Vec::with_capacity(count);
        let mut arrived = 0;
        let mut last = start;
        let mut latency_us = Histogram::new(3).expect("a histogram");
        while arrived < count {
            let due = match every {
                _ if sent.len() == count => None,
                Some(every) => Some(start + every * u32::try_from(sent.len()).expect("a small count")),
                None => Some(start),
            };
            if let Some(due) = due
                && Instant::now() >= due
            {
                sent.push(Instant::now());
                self.send(first + sent.len() - 1);
                continue;
            }
            // Reading results is how this thread waits for the next request to be due.
            let wait = due.map_or(SILENCE_MAX, |due| due.saturating_duration_since(Instant::now()));
            match self.results.recv_timeout(wait) {
                Ok(result) if result.number >= first => {
                    assert!(result.answered || !self.answers, "request {} was not answered", result.number);
                    let took = result.at - sent[result.number - first];
                    latency_us.record(u64::try_from(took.as_micros()).expect("a time")).expect("a time");
                    arrived += 1;
                    last = result.at;
                }
                // A late second result of an earlier phase.
                Ok(_) => {}
                Err(_) if due.is_some() => {}
                Err(_) => panic!("{arrived} of {count} results came, and then none for {SILENCE_MAX:?}"),
            }
        }
        Served { wall: last - start, latency_us }
    }

    fn send(&self, number: usize) {
        let id = RequestId::try_from(format!("n-{number}")).expect("an id");
        let question = &self.questions[number % self.questions.len()];
        let request = Request {
            id: Some(id.clone()),
            prompt: Some(format!("{question} ({number})")),
            ..Request::default()
        };
        let body = request.encode().expect("a request").expect("a body");
        let mut record = BaseRecord::to(&self.requests).key(id.as_str()).payload(body.as_slice());
        while let Err((fault, back)) = self.producer.send(record) {
            let full = fault.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull);
            assert!(full, "could not ask: {fault}");
            record = back;
            thread::yield_now();
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
        if let Some(reading) = self.reading.take() {
            // A panic there has been seen as silence here.
            let _ = reading.join();
        }
    }
}

fn read(reader: &BaseConsumer, results: &mpsc::Sender<Arrived>, closed: &AtomicBool) {
    const ANSWERED: &[u8] = br#""status":"answered""#;
    while !closed.load(Ordering::Relaxed) {
        let Some(Ok(message)) = reader.poll(Duration::from_millis(100)) else { continue };
        let at = Instant::now();
        let key = message.key().and_then(|key| std::str::from_utf8(key).ok());
        let Some(number) = key.and_then(|key| key.strip_prefix("n-")?.parse().ok()) else { continue };
        let body = message.payload().unwrap_or_default();
        let answered = body.windows(ANSWERED.len()).any(|window| window == ANSWERED);
        if results.send(Arrived { number, at, answered }).is_err() {
            return;
        }
    }
}
