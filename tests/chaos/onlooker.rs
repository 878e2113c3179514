//! Looks at a pipeline from outside, as anybody may, while it is being hit.
//!
//! It judges committed offsets: one never goes back, and whatever lies below it has become something: its request stands on
//! a topic that the step writes to. What a step wrote it reads after it has read the committed offset, so that what comes
//! between the two can only excuse.

use crate::site::LIMIT;
use forebay_tests::{Client, wait_for};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
};
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// How often it looks.
const EVERY: Duration = Duration::from_millis(500);

/// How long the cluster may take to answer one question; behind that the look is taken again.
const ANSWER: Duration = Duration::from_secs(5);

/// Steps with the topic that each reads, and those that it writes to beside `endings`, its retries and its overflow.
pub const STAGES: &[(&str, &str, &[&str])] = &[
    ("look_up", "requests", &["questions", "completions"]),
    ("retrieve", "questions", &["prompts"]),
    ("infer", "prompts", &["completions"]),
    ("validate", "completions", &[]),
    ("publish", "endings", &["results"]),
];

/// Somebody who looks.
pub struct Onlooker {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Seen>,
}

/// What was seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// How often a group was asked for its offsets.
    pub looks: usize,
    /// How many offsets were found below those, each judged once.
    pub offsets: usize,
    /// What must not be.
    pub faults: Vec<String>,
}

impl Onlooker {
    /// Begins to look at a pipeline whose requests have keys such as `r17`.
    pub fn start(client: &Client) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (mut looking, stopped) = (Looking::new(client), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                let next = Instant::now() + EVERY;
                // A cluster that is away is looked at again.
                let _ = looking.look();
                wait_for("the next look", ANSWER, || {
                    (Instant::now() > next || stopped.load(Ordering::Acquire)).then_some(())
                });
            }
            wait_for("the last look", LIMIT, || looking.look().ok());
            looking.seen
        });
        Self { stop, thread }
    }

    /// Looks once more, and says what it has seen.
    pub fn stop(self) -> Seen {
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap()
    }
}

struct Looking {
    prefix: String,
    reader: BaseConsumer,
    /// One for each stage; they only ask, and never join.
    groups: Vec<BaseConsumer>,
    topics: BTreeMap<String, Topic>,
    /// By stage and partition, as far as judged.
    committed: BTreeMap<(usize, i32), i64>,
    seen: Seen,
}

/// The numbers of the requests that stand on a topic.
#[derive(Default)]
struct Topic {
    /// By partition, each from offset 0 on.
    partitions: BTreeMap<i32, Vec<u32>>,
    /// By number, whether it stands there.
    has: Vec<bool>,
}

impl Looking {
    fn new(client: &Client) -> Self {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", client.servers());
        config.set("enable.auto.commit", "false").set("auto.offset.reset", "earliest");
        config.set("fetch.wait.max.ms", "50");
        let consumer = |group: &str| config.clone().set("group.id", group).create::<BaseConsumer>().unwrap();
        let groups =
            STAGES.iter().map(|(stage, ..)| consumer(&client.topic(&format!("answer.{stage}")))).collect();
        let reader = consumer("forebay-tests-onlooker");
        let prefix = client.topic("");
        // A topic that is made is known everywhere a moment later.
        let metadata = wait_for("the topics of all steps", LIMIT, || {
            let metadata = reader.fetch_metadata(None, ANSWER).ok()?;
            let is_there = |topic: &str| {
                metadata.topics().iter().any(|found| found.name().strip_prefix(&prefix) == Some(topic))
            };
            let mut all = STAGES.iter().flat_map(|(_, input, outputs)| outputs.iter().chain([input]));
            all.all(|topic| is_there(topic)).then_some(metadata)
        });
        let (mut list, mut topics) = (TopicPartitionList::new(), BTreeMap::new());
        for found in metadata.topics() {
            let Some(name) = found.name().strip_prefix(&prefix) else { continue };
            let is_read = STAGES.iter().any(|(stage, input, _)| *input == name || writes_to(stage, name));
            if !is_read {
                continue;
            }
            let topic: &mut Topic = topics.entry(name.to_owned()).or_default();
            for partition in found.partitions() {
                list.add_partition_offset(found.name(), partition.id(), Offset::Beginning).unwrap();
                topic.partitions.insert(partition.id(), Vec::new());
            }
        }
        reader.assign(&list).unwrap();
        Self { prefix, reader, groups, topics, committed: BTreeMap::new(), seen: Seen::default() }
    }

    fn look(&mut self) -> Result<(), KafkaError> {
        while self.read(Duration::from_millis(10)) {}
        for (number, (stage, input, _)) in STAGES.iter().enumerate() {
            let mut asked = TopicPartitionList::new();
            for partition in self.topics[*input].partitions.keys() {
                asked.add_partition(&format!("{}{input}", self.prefix), *partition);
            }
            let committed = self.groups[number].committed_offsets(asked, ANSWER)?;
            self.seen.looks += 1;
            for element in committed.elements() {
                let (partition, Offset::Offset(to)) = (element.partition(), element.offset()) else {
                    continue;
                };
                let from = self.committed.get(&(number, partition)).copied().unwrap_or(0);
                if to < from {
                    let fault = format!("{stage} went back from {from} to {to} on {input}/{partition}");
                    self.seen.faults.push(fault);
                }
                self.judge(stage, input, partition, from..to)?;
                self.seen.offsets += usize::try_from(to - from).unwrap_or(0);
                self.committed.insert((number, partition), to);
            }
        }
        Ok(())
    }

    /// Whether all that lies there has become something.
    fn judge(
        &mut self,
        stage: &str,
        input: &str,
        partition: i32,
        offsets: std::ops::Range<i64>,
    ) -> Result<(), KafkaError> {
        self.read_up_to(input, partition, offsets.end)?;
        let place = |offset: i64| usize::try_from(offset).unwrap();
        let records = &self.topics[input].partitions[&partition];
        let mut left = records.get(place(offsets.start)..place(offsets.end)).unwrap_or_default().to_vec();
        left.retain(|number| !self.has_become(stage, *number));
        if left.is_empty() {
            return Ok(());
        }
        // It may be there, and not read yet.
        let outputs: Vec<_> = self.topics.keys().filter(|name| writes_to(stage, name)).cloned().collect();
        for name in outputs {
            let partitions: Vec<_> = self.topics[&name].partitions.keys().copied().collect();
            for partition in partitions {
                let (_, end) =
                    self.reader.fetch_watermarks(&format!("{}{name}", self.prefix), partition, ANSWER)?;
                self.read_up_to(&name, partition, end)?;
            }
        }
        left.retain(|number| !self.has_become(stage, *number));
        let faults = left.into_iter().map(|number| {
            format!("{stage} committed {} on {input}/{partition}; r{number} has become nothing", offsets.end)
        });
        self.seen.faults.extend(faults);
        Ok(())
    }

    fn has_become(&self, stage: &str, number: u32) -> bool {
        let number = usize::try_from(number).unwrap();
        let mut outputs = self.topics.iter().filter(|(name, _)| writes_to(stage, name));
        outputs.any(|(_, topic)| topic.has.get(number) == Some(&true))
    }

    fn read_up_to(&mut self, name: &str, partition: i32, end: i64) -> Result<(), KafkaError> {
        let until = Instant::now() + ANSWER;
        let end = usize::try_from(end).unwrap();
        while self.topics[name].partitions[&partition].len() < end {
            if Instant::now() > until {
                return Err(KafkaError::NoMessageReceived);
            }
            self.read(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Takes one record in, if any comes.
    fn read(&mut self, wait: Duration) -> bool {
        let Some(Ok(message)) = self.reader.poll(wait) else { return false };
        let name = message.topic().strip_prefix(&self.prefix).unwrap();
        let number: u32 = str::from_utf8(message.key().unwrap()).unwrap()[1..].parse().unwrap();
        let topic = self.topics.get_mut(name).unwrap();
        let records = topic.partitions.get_mut(&message.partition()).unwrap();
        assert_eq!(usize::try_from(message.offset()).unwrap(), records.len(), "a gap on {name}");
        records.push(number);
        let place = usize::try_from(number).unwrap();
        if topic.has.len() <= place {
            topic.has.resize(place + 1, false);
        }
        topic.has[place] = true;
        true
    }
}

/// Whether a step writes records of its requests to this topic.
fn writes_to(stage: &str, topic: &str) -> bool {
    let own = STAGES.iter().any(|(name, _, outputs)| *name == stage && outputs.contains(&topic));
    let aside = |kind: &str| topic.strip_prefix(kind).is_some_and(|rest| rest.starts_with(stage));
    own || aside("retry.") || aside("overflow.") || (topic == "endings" && stage != "publish")
}
