//! Ledgers of paid calls as compacted topics.
//!
//! Entries are written by the producer of the process, acknowledged by all replicas. They are read by a consumer without
//! an assignment of its own, on one thread a stage: a partition is assigned to it for as long as somebody reads it.
//!
//! All other ledgers of the stage are only listened to: where each partition ends is asked for once a second, by one request to
//! each broker. So who takes over from a process that died ten seconds ago has heard its silence already ([`Heard`]).
//!
//! Invariant: a read that says that it came to the end gave everything that was there when it began, and its age is never
//! more than that of its newest entry.

use super::{
    client::{Kafka, SettingsError},
    lifeline::{LastingContext, looked_after},
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
    error::{KafkaError, RDKafkaErrorCode},
    message::BorrowedMessage,
    metadata::MetadataTopic,
    topic_partition_list::TopicPartitionListElem,
};
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};
use tokio::sync::oneshot;
use tracing::{debug, warn};

/// How long the log may take to answer one question.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// How long one read may take; whoever asked asks again.
const READ_MAX: Duration = Duration::from_secs(30);

/// How much one read gives at most.
const READ_BYTES_MAX: usize = 8 << 20;

/// How long the thread sleeps in a poll that brings nothing: the bound on how late it hears of the next read.
const POLL: Duration = Duration::from_millis(10);

/// How often ledgers are listened to, and how long their brokers may take to say where they end.
const LISTEN_EVERY: Duration = Duration::from_secs(1);

/// After how long without an answer nothing counts as heard.
const DEAF_AFTER: Duration = Duration::from_secs(3);

/// How often it is looked whether ledgers have got more partitions.
const COUNT_EVERY: Duration = Duration::from_secs(60);

/// How much of what a client says of itself is heard at a look: more than it says until the next.
const SAID_MAX: usize = 32;

/// The ledgers of a stage.
pub struct KafkaLedger {
    sink: KafkaSink,
    asked: mpsc::Sender<Asked>,
}

enum Asked {
    Read(Begin),
    Committed { input: Partition, answer: Answer<(i64, String)> },
}

type Answer<T> = oneshot::Sender<Result<T, String>>;

/// A read that is to begin.
struct Begin {
    at: Partition,
    from: i64,
    entries_max: usize,
    answer: Answer<Chunk>,
}

impl Begin {
    fn fail(self, fault: &KafkaError) {
        // Whoever asked may have gone.
        let _ = self.answer.send(Err(fault.to_string()));
    }
}

impl KafkaLedger {
    /// Ledgers, by the full names of their topics, of the stage whose consumer groups these are; `sink` writes them.
    pub fn new(
        kafka: &Kafka,
        sink: KafkaSink,
        groups: &[Group],
        topics: Vec<Arc<str>>,
    ) -> Result<Self, SettingsError> {
        let mut config = looked_after(kafka.reader_config());
        config.set("enable.partition.eof", "false");
        config.set("fetch.wait.max.ms", "20");
        let client = |config: &ClientConfig| -> Result<BaseConsumer<LastingContext>, SettingsError> {
            config.create_with_context(LastingContext::to(kafka)).map_err(SettingsError::Client)
        };
        let consumer = client(&config)?;
        let mut offsets = Vec::with_capacity(groups.len());
        for group in groups {
            // It only asks for the group's offsets, and never joins.
            config.set("group.id", &group.name);
            offsets.push((group.inputs.clone(), client(&config)?));
        }
        let (asked, asks) = mpsc::channel();
        let heard = Heard::default();
        let ears = Ears {
            topics,
            partitions: TopicPartitionList::new(),
            counted_at: None,
            due: Instant::now(),
            heard,
        };
        let reader = Reader { consumer, offsets, asks, reads: HashMap::new(), ears };
        let name = groups.first().map_or("", |group| &group.name);
        let thread = std::thread::Builder::new().name(format!("ledger {name}"));
        thread
            .spawn(move || reader.run())
            .map_err(|fault| SettingsError::Client(KafkaError::ClientCreation(fault.to_string())))?;
        Ok(Self { sink, asked })
    }

    fn ask<T: Send + 'static>(
        &self,
        ask: impl FnOnce(Answer<T>) -> Asked,
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
        self.ask(|answer| Asked::Read(Begin { at, from, entries_max, answer }))
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
    /// Where the partition ended when the read began, and a moment when it ended there already.
    end: i64,
    there_at: Instant,
    until: Instant,
    answer: Answer<Chunk>,
}

struct Reader {
    consumer: BaseConsumer<LastingContext>,
    /// Who knows the offsets of which inputs.
    offsets: Vec<(Vec<Input>, BaseConsumer<LastingContext>)>,
    asks: mpsc::Receiver<Asked>,
    reads: HashMap<Partition, Read>,
    ears: Ears,
}

impl Reader {
    fn run(mut self) {
        loop {
            if self.ears.listen(&self.consumer) {
                self.look_after();
            }
            // With nothing under way it sleeps until it is asked, or listens again.
            let asked = match self.reads.is_empty() {
                true => match self.asks.recv_timeout(self.ears.due.saturating_duration_since(Instant::now()))
                {
                    Err(mpsc::RecvTimeoutError::Timeout) => continue,
                    Err(mpsc::RecvTimeoutError::Disconnected) => return,
                    Ok(asked) => Ok(asked),
                },
                false => self.asks.try_recv(),
            };
            match asked {
                Ok(asked) => self.answer(asked),
                Err(mpsc::TryRecvError::Empty) => self.poll(),
                Err(mpsc::TryRecvError::Disconnected) => return,
            }
        }
    }

    /// Hears what the clients say of themselves: a poll brings nothing else where nothing is read.
    fn look_after(&self) {
        let is_idle = self.reads.is_empty();
        let quiet =
            self.offsets.iter().map(|(_, consumer)| consumer).chain(is_idle.then_some(&self.consumer));
        for consumer in quiet {
            for _ in 0..SAID_MAX {
                // An error says of a broker that is away, of which the reading thread of the group tells.
                let _ = consumer.poll(Duration::ZERO);
            }
        }
        for consumer in self.offsets.iter().map(|(_, consumer)| consumer).chain([&self.consumer]) {
            consumer.context().mend(consumer.client());
        }
    }

    /// Answers this and whatever else has been asked by now: who takes over from a process that died asks for dozens of
    /// partitions at once, and each request by itself waits for a broker that is just then busy with the group.
    fn answer(&mut self, first: Asked) {
        let (mut reads, mut questions) = (Vec::new(), Vec::new());
        for asked in std::iter::once(first).chain(self.asks.try_iter()) {
            match asked {
                Asked::Read(begin) => reads.push(begin),
                Asked::Committed { input, answer } => questions.push((input, answer)),
            }
        }
        for (inputs, consumer) in &self.offsets {
            let reads = |at: &Partition| inputs.iter().any(|read| read.topic == at.topic);
            let (ours, others) = questions.into_iter().partition(|(at, _)| reads(at));
            questions = others;
            tell_committed(consumer, ours);
        }
        for (_, answer) in questions {
            // Whoever asked may have gone.
            let _ = answer.send(Ok((0, String::new())));
        }
        if !reads.is_empty() {
            self.begin(reads);
        }
    }

    fn begin(&mut self, reads: Vec<Begin>) {
        let bounds = match Bounds::of(&self.consumer, &reads) {
            Ok(bounds) => bounds,
            // One that has no leader fails the question about all: the others must not wait for it.
            Err(_) if reads.len() > 1 => return reads.into_iter().for_each(|read| self.begin(vec![read])),
            Err(fault) => return reads.into_iter().for_each(|read| read.fail(&fault)),
        };
        for read in reads {
            let (low, end) = match bounds.of_partition(&read.at) {
                Ok(bounds) => bounds,
                Err(fault) => {
                    read.fail(&fault);
                    continue;
                }
            };
            // Beyond the end only where the topic was made anew.
            let next = if read.from > end { low } else { read.from.max(low) };
            let chunk = Chunk { entries: Vec::new(), next, at_end: next >= end, age: Duration::ZERO };
            // A partition with nothing to read is not assigned.
            if chunk.at_end {
                let _ = read.answer.send(Ok(chunk));
                continue;
            }
            if let Err(fault) = self.assign(&read.at, next) {
                read.fail(&fault);
                continue;
            }
            let now = Instant::now();
            let there_at = self.ears.heard.since(&read.at, end, now).unwrap_or(now);
            let until = now + READ_MAX;
            let Begin { at, entries_max, answer, .. } = read;
            self.reads.insert(at, Read { chunk, bytes: 0, entries_max, end, there_at, until, answer });
        }
    }

    fn assign(&self, at: &Partition, next: i64) -> Result<(), KafkaError> {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&at.topic, at.number, Offset::Offset(next))?;
        self.consumer.incremental_assign(&list)
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
        read.chunk.age = read.there_at.elapsed();
        let nothing = read.chunk.entries.is_empty() && !read.chunk.at_end;
        let _ = read.answer.send(match nothing {
            true => Err(format!("nothing came within {} s", READ_MAX.as_secs())),
            false => Ok(read.chunk),
        });
    }
}

/// Tells what a group has committed of these partitions, by one request.
fn tell_committed(consumer: &BaseConsumer<LastingContext>, asked: Vec<(Partition, Answer<(i64, String)>)>) {
    if asked.is_empty() {
        return;
    }
    let mut list = TopicPartitionList::new();
    for at in asked.iter().map(|(at, _)| at).collect::<HashSet<_>>() {
        list.add_partition(&at.topic, at.number);
    }
    let committed = consumer.committed_offsets(list, ANSWER_MAX);
    let of = |at: &Partition| -> Result<(i64, String), KafkaError> {
        let committed = committed.as_ref().map_err(Clone::clone)?;
        let Some(element) = committed.find_partition(&at.topic, at.number) else {
            return Ok((0, String::new()));
        };
        element.error()?;
        Ok(match element.offset() {
            Offset::Offset(offset) => (offset, element.metadata().to_owned()),
            _ => (0, String::new()),
        })
    };
    for (at, answer) in asked {
        // Whoever asked may have gone.
        let _ = answer.send(of(&at).map_err(|fault| fault.to_string()));
    }
}

/// Where partitions begin and end, by one request for each to each of their brokers.
struct Bounds {
    low: TopicPartitionList,
    end: TopicPartitionList,
}

impl Bounds {
    fn of(consumer: &BaseConsumer<LastingContext>, reads: &[Begin]) -> Result<Self, KafkaError> {
        let ask = |offset: Offset| -> Result<TopicPartitionList, KafkaError> {
            let mut list = TopicPartitionList::new();
            for at in reads.iter().map(|read| &read.at).collect::<HashSet<_>>() {
                list.add_partition_offset(&at.topic, at.number, offset)?;
            }
            consumer.offsets_for_times(list, ANSWER_MAX)
        };
        Ok(Self { low: ask(Offset::Beginning)?, end: ask(Offset::End)? })
    }

    fn of_partition(&self, at: &Partition) -> Result<(i64, i64), KafkaError> {
        let of = |list: &TopicPartitionList| {
            let unknown = || KafkaError::OffsetFetch(RDKafkaErrorCode::UnknownPartition);
            let element = list.find_partition(&at.topic, at.number).ok_or_else(unknown)?;
            element.error()?;
            match element.offset() {
                Offset::Offset(offset) => Ok(offset),
                _ => Err(unknown()),
            }
        };
        Ok((of(&self.low)?, of(&self.end)?))
    }
}

/// What listens to where the ledgers of a stage end.
struct Ears {
    topics: Vec<Arc<str>>,
    /// All their partitions, as they were counted last.
    partitions: TopicPartitionList,
    counted_at: Option<Instant>,
    /// When they are listened to next.
    due: Instant,
    heard: Heard,
}

impl Ears {
    /// Asks where all partitions end, if it is time; whether it was.
    fn listen(&mut self, consumer: &BaseConsumer<LastingContext>) -> bool {
        if Instant::now() < self.due {
            return false;
        }
        match self.ends(consumer) {
            Ok(ends) => {
                let now = Instant::now();
                self.heard.note(now, ends);
                self.due = now + LISTEN_EVERY;
            }
            Err(fault) => {
                // Nothing is lost but time at the next takeover, and a broker that is away keeps reads from their turn.
                debug!(error = %fault, "could not listen to ledgers");
                self.due = Instant::now() + DEAF_AFTER;
            }
        }
        true
    }

    fn ends(&mut self, consumer: &BaseConsumer<LastingContext>) -> Result<Vec<(Partition, i64)>, KafkaError> {
        if self.counted_at.is_none_or(|at| at.elapsed() >= COUNT_EVERY) {
            let mut all = TopicPartitionList::new();
            for topic in &self.topics {
                let metadata = consumer.fetch_metadata(Some(topic), LISTEN_EVERY)?;
                for partition in metadata.topics().iter().flat_map(MetadataTopic::partitions) {
                    all.add_partition_offset(topic, partition.id(), Offset::End)?;
                }
            }
            (self.partitions, self.counted_at) = (all, Some(Instant::now()));
        }
        if self.partitions.count() == 0 {
            return Ok(Vec::new());
        }
        let ends = consumer.offsets_for_times(self.partitions.clone(), LISTEN_EVERY)?;
        let end = |one: &TopicPartitionListElem<'_>| match (one.error(), one.offset()) {
            (Ok(()), Offset::Offset(end)) => {
                Some((Partition { topic: one.topic().into(), number: one.partition() }, end))
            }
            _ => None,
        };
        Ok(ends.elements().iter().filter_map(end).collect())
    }
}

/// Since when partitions have ended where they end: how long whoever writes there has been silent.
///
/// What counts is time in which the log answered. Where it did not, whoever is alive could not have been heard.
#[derive(Default)]
struct Heard {
    ends: HashMap<Partition, (i64, Instant)>,
    last: Option<Instant>,
}

impl Heard {
    /// Partitions ended here when, at this moment, the answer came.
    fn note(&mut self, now: Instant, ends: impl IntoIterator<Item = (Partition, i64)>) {
        self.ends = ends
            .into_iter()
            .map(|(at, end)| {
                let since = self.since(&at, end, now).unwrap_or(now);
                (at, (end, since))
            })
            .collect();
        self.last = Some(now);
    }

    /// A moment when a partition that ends here now did so already.
    fn since(&self, at: &Partition, end: i64, now: Instant) -> Option<Instant> {
        self.last.filter(|last| now.saturating_duration_since(*last) < DEAF_AFTER)?;
        self.ends.get(at).filter(|(heard, _)| *heard == end).map(|(_, since)| *since)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(number: i32) -> Partition {
        Partition { topic: "ledger".into(), number }
    }

    #[test]
    fn silence_counts_from_when_an_end_was_first_heard() {
        let (start, mut heard) = (Instant::now(), Heard::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(heard.since(&ledger(0), 7, start), None, "before anything was heard");
        heard.note(at(0), [(ledger(0), 7), (ledger(1), 1)]);
        heard.note(at(1), [(ledger(0), 7), (ledger(1), 2)]);
        heard.note(at(2), [(ledger(0), 7), (ledger(1), 2)]);
        assert_eq!(heard.since(&ledger(0), 7, at(3)), Some(at(0)));
        assert_eq!(heard.since(&ledger(1), 2, at(3)), Some(at(1)));
        assert_eq!(heard.since(&ledger(0), 8, at(3)), None, "somebody wrote since");
        assert_eq!(heard.since(&ledger(2), 0, at(3)), None, "nobody listened there");
    }

    #[test]
    fn what_a_log_that_was_away_did_not_say_is_no_silence() {
        let (start, mut heard) = (Instant::now(), Heard::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        heard.note(at(0), [(ledger(0), 7)]);
        assert_eq!(heard.since(&ledger(0), 7, at(2)), Some(at(0)));
        assert_eq!(heard.since(&ledger(0), 7, at(3)), None, "it has not answered for too long");
        heard.note(at(9), [(ledger(0), 7)]);
        assert_eq!(heard.since(&ledger(0), 7, at(10)), Some(at(9)), "and counts anew");
    }
}
