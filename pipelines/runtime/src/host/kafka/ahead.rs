//! Reads on in partitions of Kafka beside the member that they are assigned to.
//!
//! Invariant: nothing is held open before the first cancel, and nobody's thread is blocked for longer than [`READ_MAX`].

use super::{
    client::{Kafka, LogContext},
    source::headers,
};
use crate::{
    ahead::{Ahead, FOUND_MAX, Found, Wanted},
    budget::Budget,
    message::{Incoming, Input, Partition},
};
use bytes::Bytes;
use forebay_plan::Channel;
use futures::future::BoxFuture;
use rdkafka::{
    Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How long the log may take to say where a partition ends.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// How long one read may take: a process that ends waits for it.
const READ_MAX: Duration = Duration::from_secs(2);

/// How many bytes one read gives at most, but for the last message.
const FOUND_BYTES_MAX: usize = 8 << 20;

/// Reads on in the partitions of a stage.
pub struct KafkaAhead(Arc<Parts>);

struct Parts {
    kafka: Kafka,
    inputs: Vec<Input>,
    budget: Arc<Budget>,
    /// Made when it is first needed, and anew after one that failed: nobody looks after it in between. One read at a time.
    reader: Mutex<Option<BaseConsumer<LogContext>>>,
}

impl KafkaAhead {
    /// For a stage with these inputs; what is found counts against the budget.
    pub fn new(kafka: &Kafka, inputs: Vec<Input>, budget: Arc<Budget>) -> Self {
        Self(Arc::new(Parts { kafka: kafka.clone(), inputs, budget, reader: Mutex::default() }))
    }
}

impl Ahead for KafkaAhead {
    fn read(&self, at: &Partition, from: i64, wanted: Wanted) -> BoxFuture<'static, Result<Found, String>> {
        let (parts, at) = (Arc::clone(&self.0), at.clone());
        Box::pin(async move {
            let read = tokio::task::spawn_blocking(move || parts.read(&at, from, &*wanted));
            read.await.map_err(|ended| ended.to_string())?.map_err(|fault| fault.to_string())
        })
    }
}

impl Parts {
    fn read(
        &self,
        at: &Partition,
        from: i64,
        wanted: &dyn Fn(&forebay_schemas::Headers) -> bool,
    ) -> Result<Found, KafkaError> {
        let mut kept = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let reader = match kept.take() {
            Some(reader) => reader,
            None => {
                let mut config = self.kafka.reader_config();
                config.set("fetch.wait.max.ms", "20");
                // What it said of itself between two reads would only pile up.
                config.set("statistics.interval.ms", "0");
                config.create_with_context(LogContext)?
            }
        };
        let found = self.read_with(&reader, at, from, wanted)?;
        *kept = Some(reader);
        Ok(found)
    }

    fn read_with(
        &self,
        reader: &BaseConsumer<LogContext>,
        at: &Partition,
        from: i64,
        wanted: &dyn Fn(&forebay_schemas::Headers) -> bool,
    ) -> Result<Found, KafkaError> {
        let (low, end) = reader.fetch_watermarks(&at.topic, at.number, ANSWER_MAX)?;
        let (mut next, until) = (from.max(low), Instant::now() + READ_MAX);
        let (mut records, mut bytes) = (Vec::new(), 0);
        if next < end {
            let mut assignment = TopicPartitionList::new();
            assignment.add_partition_offset(&at.topic, at.number, Offset::Offset(next))?;
            reader.assign(&assignment)?;
        }
        while next < end && records.len() < FOUND_MAX && bytes < FOUND_BYTES_MAX && Instant::now() < until {
            match reader.poll(Duration::from_millis(100)) {
                Some(Ok(message)) if message.offset() >= next => {
                    next = message.offset() + 1;
                    let headers = headers(&message);
                    if wanted(&headers) {
                        let taken = Incoming::bytes(message.key(), message.payload());
                        bytes += taken;
                        records.push(Incoming {
                            partition: at.clone(),
                            channel: self.channel(at),
                            offset: message.offset(),
                            timestamp_ms: message.timestamp().to_millis().unwrap_or(0),
                            key: message.key().map(Bytes::copy_from_slice),
                            value: message.payload().map(Bytes::copy_from_slice),
                            headers,
                            held: self.budget.take(taken),
                        });
                    }
                }
                // Such a topic is neither compacted nor written in transactions: its last message comes.
                Some(Ok(_) | Err(KafkaError::PartitionEOF(_))) | None => {}
                Some(Err(fault)) => return Err(fault),
            }
        }
        reader.unassign()?;
        Ok(Found { records, next: (next < end).then_some(next) })
    }

    fn channel(&self, at: &Partition) -> Channel {
        let input = self.inputs.iter().find(|input| input.topic == at.topic);
        input.map_or(Channel::Live, |input| input.channel)
    }
}
