//! Reads back what a sole writer wrote of late, before it writes on.

use super::client::{Kafka, LogContext};
use crate::{
    host::kafka::source::headers,
    once::{Once, REMEMBERED_MAX, Written},
};
use rdkafka::{
    Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

/// How long the log may take to answer one question.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// How long reading may take in all; shorter than max.poll.interval.ms, or the group would pass the partitions on.
const READ_MAX: Duration = Duration::from_secs(45);

/// Why it could not be read back what was written.
#[derive(Debug, thiserror::Error)]
pub enum ReadBackError {
    /// The log did not answer.
    #[error(
        "could not read back topic {topic}; it must be there and have as many partitions as its writer reads"
    )]
    Kafka {
        /// The topic.
        topic: String,
        /// What happened.
        #[source]
        source: KafkaError,
    },
    /// It took too long.
    #[error("could not read back what was written within {} s", READ_MAX.as_secs())]
    TooLong,
}

/// Lets `once` remember the last messages of these partition numbers; gives the places, `topic/partition/offset`, of those
/// that lie on their topic a second time. Blocks, and says meanwhile that it is alive.
pub(super) fn read_back(
    kafka: &Kafka,
    once: &Once,
    numbers: &BTreeSet<i32>,
    alive: impl Fn(),
) -> Result<Vec<String>, ReadBackError> {
    let failed = |topic: &str| {
        let topic = topic.to_owned();
        move |source| ReadBackError::Kafka { topic, source }
    };
    let joined = once.topics().join(", ");
    let reader: BaseConsumer<LogContext> =
        kafka.reader_config().create_with_context(LogContext).map_err(failed(&joined))?;
    let mut assignment = TopicPartitionList::new();
    // The partitions whose end is not reached yet.
    let mut behind: BTreeMap<(Arc<str>, i32), i64> = BTreeMap::new();
    let remembered = i64::try_from(REMEMBERED_MAX).unwrap_or(i64::MAX);
    for topic in once.topics() {
        for &number in numbers {
            alive();
            let (low, end) = reader.fetch_watermarks(topic, number, ANSWER_MAX).map_err(failed(topic))?;
            let from = low.max(end - remembered);
            if from < end {
                assignment
                    .add_partition_offset(topic, number, Offset::Offset(from))
                    .map_err(failed(topic))?;
                behind.insert((Arc::clone(topic), number), end);
            }
        }
    }
    reader.assign(&assignment).map_err(failed(&joined))?;
    let mut found: BTreeMap<i32, Vec<Written>> = BTreeMap::new();
    let until = Instant::now() + READ_MAX;
    while !behind.is_empty() {
        if Instant::now() > until {
            return Err(ReadBackError::TooLong);
        }
        alive();
        match reader.poll(Duration::from_millis(100)) {
            Some(Ok(message)) => {
                let (topic, number) = (message.topic(), message.partition());
                let Some(covered) = once.topics().iter().find(|covered| ***covered == *topic) else {
                    continue;
                };
                let place = (Arc::clone(covered), number);
                if behind.get(&place).is_some_and(|end| message.offset() + 1 >= *end) {
                    behind.remove(&place);
                }
                let written = Written::at(place.0, message.offset(), &headers(&message));
                found.entry(number).or_default().push(written);
            }
            // These topics are neither compacted nor written in transactions: a partition's last message comes.
            Some(Err(KafkaError::PartitionEOF(_))) => {}
            Some(Err(source)) => return Err(failed(&joined)(source)),
            None => {}
        }
    }
    let mut repeated = Vec::new();
    for &number in numbers {
        let written = found.remove(&number).unwrap_or_default();
        let places = once.restore(number, written).into_iter();
        repeated.extend(places.map(|(topic, offset)| format!("{topic}/{number}/{offset}")));
    }
    Ok(repeated)
}
