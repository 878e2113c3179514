//! Ledgers of paid calls as compacted topics.
//!
//! Entries are written by the producer of the process, acknowledged by all replicas. They are read by a consumer without
//! an assignment of its own, on one thread a stage: a partition is assigned to it for as long as somebody reads it,
//! so that a ledger which nobody asks about costs nothing.
//!
//! Invariant: a read that says that it came to the end gave everything that was there when it began.

use super::{
    client::{Kafka, LogContext, SettingsError},
    sink::KafkaSink,
};
use crate::{
    drive::SendError,
    ledger::{Chunk, Log},
    message::{Group, Input, Outgoing, Partition},
};
use forebay_schemas::{Headers, LedgerEntry, Record as _};
use futures::future::BoxFuture;
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    message::BorrowedMessage,
};
use std::{
    collections::HashMap,
    sync::mpsc,
    time::{Duration, Instant},
};
use tokio::sync::oneshot;
use tracing::warn;

/// How long the log may take to answer one question.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// How long one read may take; whoever asked asks again.
const READ_MAX: Duration = Duration::from_secs(30);

/// How much one read gives at most.
const READ_BYTES_MAX: usize = 8 << 20;

/// How long the thread sleeps in a poll that brings nothing: the bound on how late it hears of the next read.
const POLL: Duration = Duration::from_millis(10);

/// The ledgers of a stage.
pub struct KafkaLedger {
    sink: KafkaSink,
    asked: mpsc::Sender<Asked>,
}

enum Asked {
    Read { at: Partition, from: i64, entries_max: usize, answer: oneshot::Sender<Result<Chunk, String>> },
    Committed { input: Partition, answer: oneshot::Sender<Result<(i64, String), String>> },
}

impl KafkaLedger {
    /// Ledgers of the stage whose consumer groups these are; `sink` writes them.
    pub fn new(kafka: &Kafka, sink: KafkaSink, groups: &[Group]) -> Result<Self, SettingsError> {
        let mut config = kafka.reader_config();
        config.set("enable.partition.eof", "false");
        config.set("fetch.wait.max.ms", "20");
        let client = |config: &ClientConfig| -> Result<BaseConsumer<LogContext>, SettingsError> {
            config.create_with_context(LogContext).map_err(SettingsError::Client)
        };
        let consumer = client(&config)?;
        let mut offsets = Vec::with_capacity(groups.len());
        for group in groups {
            // It only asks for the group's offsets, and never joins.
            config.set("group.id", &group.name);
            offsets.push((group.inputs.clone(), client(&config)?));
        }
        let (asked, asks) = mpsc::channel();
        let reader = Reader { consumer, offsets, asks, reads: HashMap::new() };
        let name = groups.first().map_or("", |group| &group.name);
        let thread = std::thread::Builder::new().name(format!("ledger {name}"));
        thread
            .spawn(move || reader.run())
            .map_err(|fault| SettingsError::Client(KafkaError::ClientCreation(fault.to_string())))?;
        Ok(Self { sink, asked })
    }

    fn ask<T: Send + 'static>(
        &self,
        ask: impl FnOnce(oneshot::Sender<Result<T, String>>) -> Asked,
    ) -> BoxFuture<'static, Result<T, String>> {
        let (answer, answered) = oneshot::channel();
        let sent = self.asked.send(ask(answer)).is_ok();
        Box::pin(async move {
            match (sent, answered.await) {
                (true, Ok(answer)) => answer,
                _ => Err("the reading thread has ended".to_owned()),
            }
        })
    }
}

impl Log for KafkaLedger {
    fn append(&self, at: &Partition, entry: &LedgerEntry) -> BoxFuture<'static, Result<i64, SendError>> {
        let (topic, number) = (at.topic.clone(), at.number);
        let key = Some(entry.message_key().into_bytes());
        match entry.encode() {
            Ok(value) => self.sink.append(Outgoing { topic, key, value, headers: Headers::new() }, number),
            Err(fault) => {
                let fault = SendError::Fatal { topic: topic.to_string(), reason: fault.to_string() };
                Box::pin(async { Err(fault) })
            }
        }
    }

    fn read(
        &self,
        at: &Partition,
        from: i64,
        entries_max: usize,
    ) -> BoxFuture<'static, Result<Chunk, String>> {
        let at = at.clone();
        self.ask(|answer| Asked::Read { at, from, entries_max, answer })
    }

    fn committed(&self, input: &Partition) -> BoxFuture<'static, Result<(i64, String), String>> {
        let input = input.clone();
        self.ask(|answer| Asked::Committed { input, answer })
    }
}

/// A read that is under way.
struct Read {
    chunk: Chunk,
    bytes: usize,
    entries_max: usize,
    /// Where the partition ended when the read began, and when that was heard.
    end: i64,
    asked: Instant,
    until: Instant,
    answer: oneshot::Sender<Result<Chunk, String>>,
}

struct Reader {
    consumer: BaseConsumer<LogContext>,
    /// Who knows the offsets of which inputs.
    offsets: Vec<(Vec<Input>, BaseConsumer<LogContext>)>,
    asks: mpsc::Receiver<Asked>,
    reads: HashMap<Partition, Read>,
}

impl Reader {
    fn run(mut self) {
        loop {
            // With nothing under way it sleeps until it is asked.
            let asked = match self.reads.is_empty() {
                true => self.asks.recv().map_err(|_| mpsc::TryRecvError::Disconnected),
                false => self.asks.try_recv(),
            };
            match asked {
                Ok(Asked::Read { at, from, entries_max, answer }) => {
                    self.begin(at, from, entries_max, answer)
                }
                Ok(Asked::Committed { input, answer }) => {
                    // Whoever asked may have gone.
                    let _ = answer.send(self.committed(&input).map_err(|fault| fault.to_string()));
                }
                Err(mpsc::TryRecvError::Empty) => self.poll(),
                Err(mpsc::TryRecvError::Disconnected) => return,
            }
        }
    }

    fn committed(&self, input: &Partition) -> Result<(i64, String), KafkaError> {
        let mut list = TopicPartitionList::new();
        list.add_partition(&input.topic, input.number);
        let reads = |inputs: &[Input]| inputs.iter().any(|read| read.topic == input.topic);
        let Some((_, consumer)) = self.offsets.iter().find(|(inputs, _)| reads(inputs)) else {
            return Ok((0, String::new()));
        };
        let committed = consumer.committed_offsets(list, ANSWER_MAX)?;
        let element = committed.find_partition(&input.topic, input.number);
        Ok(match element.as_ref().map(|element| (element.offset(), element.metadata())) {
            Some((Offset::Offset(offset), metadata)) => (offset, metadata.to_owned()),
            _ => (0, String::new()),
        })
    }

    fn begin(
        &mut self,
        at: Partition,
        from: i64,
        entries_max: usize,
        answer: oneshot::Sender<Result<Chunk, String>>,
    ) {
        match self.assign(&at, from) {
            Ok((next, end)) => {
                let chunk = Chunk { entries: Vec::new(), next, at_end: next >= end, age: Duration::ZERO };
                if chunk.at_end {
                    let _ = answer.send(Ok(chunk));
                    return;
                }
                let asked = Instant::now();
                let until = asked + READ_MAX;
                self.reads.insert(at, Read { chunk, bytes: 0, entries_max, end, asked, until, answer });
            }
            Err(fault) => {
                let _ = answer.send(Err(fault.to_string()));
            }
        }
    }

    /// Where the read begins and ends; a partition with nothing to read is not assigned.
    fn assign(&self, at: &Partition, from: i64) -> Result<(i64, i64), KafkaError> {
        let (low, end) = self.consumer.fetch_watermarks(&at.topic, at.number, ANSWER_MAX)?;
        // Beyond the end only where the topic was made anew.
        let next = if from > end { low } else { from.max(low) };
        if next < end {
            let mut list = TopicPartitionList::new();
            list.add_partition_offset(&at.topic, at.number, Offset::Offset(next))?;
            self.consumer.incremental_assign(&list)?;
        }
        Ok((next, end))
    }

    fn poll(&mut self) {
        match self.consumer.poll(POLL) {
            Some(Ok(message)) => {
                if let Some(done) = take(&mut self.reads, &message) {
                    self.finish(&done);
                }
            }
            Some(Err(fault)) => {
                // The client library goes on by itself; whoever waits is told when its time is up.
                warn!(error = %fault, "could not read a ledger; will try again");
            }
            None => {}
        }
        let now = Instant::now();
        let late: Vec<_> =
            self.reads.iter().filter(|(_, read)| now > read.until).map(|(at, _)| at.clone()).collect();
        late.iter().for_each(|at| self.finish(at));
    }

    fn finish(&mut self, at: &Partition) {
        let Some(mut read) = self.reads.remove(at) else { return };
        let mut list = TopicPartitionList::new();
        list.add_partition(&at.topic, at.number);
        if let Err(fault) = self.consumer.incremental_unassign(&list) {
            warn!(ledger = %at, error = %fault, "could not stop reading a ledger");
        }
        read.chunk.at_end = read.chunk.next >= read.end;
        // Nothing is read beyond the end as it was then.
        read.chunk.age = read.asked.elapsed();
        let nothing = read.chunk.entries.is_empty() && !read.chunk.at_end;
        let _ = read.answer.send(match nothing {
            true => Err(format!("nothing came within {} s", READ_MAX.as_secs())),
            false => Ok(read.chunk),
        });
    }
}

/// Takes a message in; the partition, where its read is done.
fn take(reads: &mut HashMap<Partition, Read>, message: &BorrowedMessage<'_>) -> Option<Partition> {
    let at = Partition { topic: message.topic().into(), number: message.partition() };
    let read = reads.get_mut(&at)?;
    // What a partition had fetched before it was assigned anew.
    if message.offset() < read.chunk.next {
        return None;
    }
    // Behind a gap that compaction left comes what is newer than this read.
    if message.offset() >= read.end {
        read.chunk.next = read.end;
        return Some(at);
    }
    let body = message.payload().unwrap_or_default();
    match LedgerEntry::decode(body) {
        Ok(entry) => read.chunk.entries.push((message.offset(), entry)),
        Err(fault) => {
            warn!(ledger = %at, offset = message.offset(), error = %fault, "an entry cannot be read")
        }
    }
    read.bytes += body.len();
    read.chunk.next = message.offset() + 1;
    let enough = read.bytes >= READ_BYTES_MAX || read.chunk.entries.len() >= read.entries_max;
    (read.chunk.next >= read.end || enough).then_some(at)
}
