//! What any client does: writes requests, reads results, and reads along. An ordinary Kafka client; nothing here is privileged.

use crate::{config::Config, offsets};
use anyhow::Context as _;
use forebay_runtime::host::kafka::{Kafka, LogContext};
use forebay_schemas::{Answer, Delta, Record as _, Request, topics};
use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
    producer::{FutureProducer, FutureRecord},
};
use std::time::Duration;
use tokio::sync::mpsc;

/// A client that hears of all results from now on.
pub struct Client {
    producer: FutureProducer<LogContext>,
    requests: String,
    heard: mpsc::Receiver<anyhow::Result<Heard>>,
}

/// What a client hears.
pub enum Heard {
    /// A result, and its bytes as they came.
    Result(Box<Answer>, String),
    /// A piece of an answer.
    Delta(Delta),
}

/// Records that wait to be taken.
const WAITING_MAX: usize = 1024;

impl Client {
    /// Connects; results that are written after this returns are heard, and the pieces of answers where it reads along.
    pub async fn connect(kafka: &Kafka, config: &Config, reads_along: bool) -> anyhow::Result<Self> {
        let reader: BaseConsumer<LogContext> = kafka.reader_config().create_with_context(LogContext)?;
        let (results, deltas) = (config.topic(topics::RESULTS.name), config.topic(topics::DELTAS.name));
        let (heard_in, heard) = mpsc::channel(WAITING_MAX);
        // Both finding the end and polling block.
        let (ready_in, ready) = tokio::sync::oneshot::channel();
        std::thread::Builder::new().name("results".to_owned()).spawn(move || {
            let topics = if reads_along { vec![&*results, &*deltas] } else { vec![&*results] };
            let started = start(&reader, &topics);
            let is_started = started.is_ok();
            let _ = ready_in.send(started);
            if is_started {
                read(&reader, &results, &heard_in);
            }
        })?;
        ready.await.context("reading results")??;
        let producer = kafka.producer_config_in_turn().create_with_context(LogContext)?;
        Ok(Self { producer, requests: config.topic(topics::REQUESTS.name), heard })
    }

    /// Writes a request; it is acknowledged when this returns.
    pub async fn ask(&self, request: &Request) -> anyhow::Result<()> {
        let body = request.encode()?.unwrap_or_default();
        let mut record = FutureRecord::<str, [u8]>::to(&self.requests).payload(&body);
        record.key = request.id.as_ref().map(|id| id.as_str());
        let sent = self.producer.send(record, Duration::from_secs(10)).await;
        sent.map_err(|(fault, _)| fault)
            .with_context(|| format!("could not write to topic {}", self.requests))?;
        Ok(())
    }

    /// What comes next. Cancel safe.
    pub async fn hear(&mut self) -> anyhow::Result<Heard> {
        self.heard.recv().await.context("the reader of results has ended")?
    }

    /// The next result, and its bytes as they came. Cancel safe.
    pub async fn result(&mut self) -> anyhow::Result<(Answer, String)> {
        loop {
            if let Heard::Result(answer, raw) = self.hear().await? {
                return Ok((*answer, raw));
            }
        }
    }
}

fn start(reader: &BaseConsumer<LogContext>, topics: &[&str]) -> anyhow::Result<()> {
    let mut assignment = TopicPartitionList::new();
    for topic in topics {
        for (partition, (_, end)) in offsets::ends(reader, topic)? {
            assignment.add_partition_offset(topic, partition, Offset::Offset(end))?;
        }
    }
    Ok(reader.assign(&assignment)?)
}

fn read(reader: &BaseConsumer<LogContext>, results: &str, heard: &mpsc::Sender<anyhow::Result<Heard>>) {
    while !heard.is_closed() {
        let next = match reader.poll(Duration::from_millis(100)) {
            None | Some(Err(KafkaError::PartitionEOF(_))) => continue,
            Some(Ok(message)) => {
                let body = message.payload().unwrap_or_default();
                let read = match message.topic() == results {
                    true => Answer::decode(body).map(|answer| {
                        Heard::Result(Box::new(answer), String::from_utf8_lossy(body).into_owned())
                    }),
                    false => Delta::decode(body).map(Heard::Delta),
                };
                read.with_context(|| {
                    format!("record at {}/{}/{}", message.topic(), message.partition(), message.offset())
                })
            }
            Some(Err(fault)) => Err(fault).context("could not read results"),
        };
        if heard.blocking_send(next).is_err() {
            return;
        }
    }
}
