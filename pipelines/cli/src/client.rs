//! What any client does: writes requests, reads results. An ordinary Kafka client; nothing here is privileged.

use crate::{config::Config, offsets};
use anyhow::Context as _;
use forebay_runtime::host::kafka::{Kafka, LogContext};
use forebay_schemas::{Answer, Record as _, Request, topics};
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
    results: mpsc::Receiver<anyhow::Result<(Answer, String)>>,
}

/// Results that wait to be taken.
const WAITING_MAX: usize = 1024;

impl Client {
    /// Connects; results that are written after this returns are heard.
    pub async fn connect(kafka: &Kafka, config: &Config) -> anyhow::Result<Self> {
        let reader: BaseConsumer<LogContext> = kafka.reader_config().create_with_context(LogContext)?;
        let topic = config.topic(topics::RESULTS.name);
        let (results_in, results) = mpsc::channel(WAITING_MAX);
        // Both finding the end and polling block.
        let (ready_in, ready) = tokio::sync::oneshot::channel();
        std::thread::Builder::new().name("results".to_owned()).spawn(move || {
            let started = start(&reader, &topic);
            let is_started = started.is_ok();
            let _ = ready_in.send(started);
            if is_started {
                read(&reader, &results_in);
            }
        })?;
        ready.await.context("reading results")??;
        let producer = kafka.producer_config().create_with_context(LogContext)?;
        Ok(Self { producer, requests: config.topic(topics::REQUESTS.name), results })
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

    /// The next result, and its bytes as they came. Cancel safe.
    pub async fn result(&mut self) -> anyhow::Result<(Answer, String)> {
        self.results.recv().await.context("the reader of results has ended")?
    }
}

fn start(reader: &BaseConsumer<LogContext>, topic: &str) -> anyhow::Result<()> {
    let mut assignment = TopicPartitionList::new();
    for (partition, (_, end)) in offsets::ends(reader, topic)? {
        assignment.add_partition_offset(topic, partition, Offset::Offset(end))?;
    }
    Ok(reader.assign(&assignment)?)
}

fn read(reader: &BaseConsumer<LogContext>, results: &mpsc::Sender<anyhow::Result<(Answer, String)>>) {
    while !results.is_closed() {
        let result = match reader.poll(Duration::from_millis(100)) {
            None | Some(Err(KafkaError::PartitionEOF(_))) => continue,
            Some(Ok(message)) => {
                let body = message.payload().unwrap_or_default();
                Answer::decode(body)
                    .map(|answer| (answer, String::from_utf8_lossy(body).into_owned()))
                    .with_context(|| {
                        format!("result at {}/{}/{}", message.topic(), message.partition(), message.offset())
                    })
            }
            Some(Err(fault)) => Err(fault).context("could not read results"),
        };
        if results.blocking_send(result).is_err() {
            return;
        }
    }
}
