//! Reads a stretch of a topic, record by record.
//!
//! Invariant: a stretch has its end before it is read, so reading ends though the topic grows. Records come in the
//! order of their offsets, each once.

use crate::offsets;
use anyhow::{Context as _, bail};
use forebay_runtime::host::kafka::{Kafka, LogContext};
use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
    message::BorrowedMessage,
};
use std::{
    ops::ControlFlow,
    time::{Duration, Instant},
};

/// How long the log may take to answer, or to give the next record.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// Whatever reads without a group.
pub type Reader = BaseConsumer<LogContext>;

/// The records of a partition from one offset to another, that one left out.
#[derive(Clone, Copy, Debug)]
pub struct Stretch {
    pub partition: i32,
    pub from: i64,
    pub end: i64,
}

/// A reader of any topic.
pub fn reader(kafka: &Kafka) -> anyhow::Result<Reader> {
    Ok(kafka.reader_config().create_with_context(LogContext)?)
}

/// What a topic holds now, or what was written to it since then; empty stretches are left out. Blocks.
pub fn stretches(reader: &Reader, topic: &str, since_ms: Option<i64>) -> anyhow::Result<Vec<Stretch>> {
    let mut ends = offsets::ends(reader, topic)?;
    if let Some(since_ms) = since_ms {
        let mut asked = TopicPartitionList::new();
        for partition in ends.keys() {
            asked.add_partition_offset(topic, *partition, Offset::Offset(since_ms))?;
        }
        let found = reader
            .offsets_for_times(asked, ANSWER_MAX)
            .with_context(|| format!("looking for a time in topic {topic}"))?;
        for element in found.elements() {
            if let Some((from, end)) = ends.get_mut(&element.partition()) {
                // Nothing as young as that is told as the end.
                *from = if let Offset::Offset(offset) = element.offset() { offset } else { *end };
            }
        }
    }
    let stretch = |(partition, (from, end))| Stretch { partition, from, end };
    Ok(ends.into_iter().map(stretch).filter(|stretch| stretch.from < stretch.end).collect())
}

/// Shows every record of a stretch, until told to stop. Blocks.
pub fn visit(
    reader: &Reader,
    topic: &str,
    stretch: Stretch,
    mut each: impl FnMut(&BorrowedMessage<'_>) -> anyhow::Result<ControlFlow<()>>,
) -> anyhow::Result<ControlFlow<()>> {
    let Stretch { partition, from, end } = stretch;
    let mut assignment = TopicPartitionList::new();
    assignment.add_partition_offset(topic, partition, Offset::Offset(from))?;
    reader.assign(&assignment)?;
    let (mut next, mut heard) = (from, Instant::now());
    while next < end {
        match reader.poll(Duration::from_millis(100)) {
            Some(Ok(message)) => {
                heard = Instant::now();
                next = message.offset() + 1;
                if message.offset() < end && each(&message)?.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            // What lay last is not there any more.
            Some(Err(KafkaError::PartitionEOF(_))) => break,
            Some(Err(fault)) => {
                return Err(fault).with_context(|| format!("could not read {topic}/{partition}"));
            }
            None if heard.elapsed() > ANSWER_MAX => {
                bail!(
                    "could not read {topic}/{partition} on from offset {next} within {} s",
                    ANSWER_MAX.as_secs()
                )
            }
            None => {}
        }
    }
    Ok(ControlFlow::Continue(()))
}
