//! Finds topics that were deleted and made anew while they were read.
//!
//! Such a topic begins again at 0 under its old name. A consumer is told nothing: where the new one is shorter than what it has read it is
//! sent back to the beginning, and where it is longer, it reads on in the middle. So before rows are written it is asked which topics
//! these are. Ids are never given twice: where a topic has the id that it had when its partitions were set, all that was read since is of
//! that topic.
//!
//! Invariant: no message of a new topic counts for the one before, and none that was read of the one before is lost. Where both may be
//! among what waits, each message that is not of the new topic is of the old one: the new one is asked for it. Left: a cluster whose
//! brokers hear of the new topic one after the other, for as long as that takes.

use super::{Error, KAFKA_WAIT, application, lane::Lane};
use crate::decode::Message;
use forebay_runtime::host::kafka::{Kafka, LogContext, TopicIds};
use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
    types::RDKafkaErrorCode,
};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tracing::warn;

/// How long one look for a message waits at a time.
const POLL: Duration = Duration::from_millis(100);

/// The ids of the topics that are there, by their full names.
pub async fn ids(
    asked: &Arc<TopicIds>,
    topics: impl Iterator<Item = &Arc<str>>,
) -> Result<BTreeMap<String, String>, Error> {
    let (asked, names) = (Arc::clone(asked), topics.map(ToString::to_string).collect::<Vec<_>>());
    Ok(tokio::task::spawn_blocking(move || asked.of(&names, KAFKA_WAIT)).await??)
}

/// Has the partitions of topics begin anew that were made anew since these partitions were set.
pub async fn renew(
    kafka: &Kafka,
    asked: &Arc<TopicIds>,
    cluster: &str,
    lanes: &mut BTreeMap<Arc<str>, Lane>,
) -> Result<(), Error> {
    let ids = ids(asked, lanes.keys()).await?;
    for (topic, lane) in lanes {
        // One that is gone has no successor yet: what was read is its own.
        let Some(id) = ids.get(&**topic) else { continue };
        for partition in lane.outdated(|partition| application(cluster, id, partition)) {
            let (kafka, name, messages) =
                (kafka.clone(), Arc::clone(topic), lane.waiting(partition).to_vec());
            let waiting = messages.len();
            let compare = move || of_before(&kafka, &name, partition, &messages);
            let before = tokio::task::spawn_blocking(compare).await?;
            let before =
                before.map_err(|source| Error::Compare { topic: topic.to_string(), partition, source })?;
            warn!(topic = %topic, partition, id, kept = before, read_again = waiting - before,
                "a topic was deleted and made anew; what was read of the one before is kept, and the new one is read from its beginning");
            lane.begin_anew(partition, before);
        }
    }
    Ok(())
}

/// How many of these messages are of the topic before; those of the new one follow them. Blocks.
fn of_before(kafka: &Kafka, topic: &str, partition: i32, messages: &[Message]) -> Result<usize, KafkaError> {
    if messages.is_empty() {
        return Ok(0);
    }
    let reader: BaseConsumer<LogContext> = kafka.reader_config().create_with_context(LogContext)?;
    let mut failed = None;
    // Once one is of the new topic, so are all behind it: of many messages few are looked for.
    let before = messages.partition_point(|message| {
        failed.is_some()
            || !is_there(&reader, topic, partition, message).unwrap_or_else(|fault| {
                failed = Some(fault);
                false
            })
    });
    failed.map_or(Ok(before), Err)
}

/// Whether the topic that is there now has this very message at its place.
fn is_there(
    reader: &BaseConsumer<LogContext>,
    topic: &str,
    partition: i32,
    message: &Message,
) -> Result<bool, KafkaError> {
    let mut place = TopicPartitionList::new();
    place.add_partition_offset(topic, partition, Offset::Offset(message.offset))?;
    reader.assign(&place)?;
    let until = Instant::now() + KAFKA_WAIT;
    while Instant::now() < until {
        match reader.poll(POLL) {
            None => {}
            Some(Ok(found)) => {
                let is_same = found.offset() == message.offset
                    && found.timestamp().to_millis().unwrap_or(0) == message.timestamp_ms
                    && found.key() == message.key.as_deref()
                    && found.payload() == message.value.as_deref();
                return Ok(is_same);
            }
            // It ends before that, or has fewer partitions.
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(false),
            Some(Err(fault)) => match fault.rdkafka_error_code() {
                Some(RDKafkaErrorCode::UnknownPartition | RDKafkaErrorCode::UnknownTopicOrPartition) => {
                    return Ok(false);
                }
                _ => return Err(fault),
            },
        }
    }
    Err(KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut))
}
