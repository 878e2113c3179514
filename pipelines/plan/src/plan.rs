//! A pipeline that can run.
//!
//! Invariant: every name in a plan resolves, every port is routed, and the records at both ends of each topic are
//! the same.

use crate::{Faults, nearest};
use forebay_schemas::topics::{self, Cleanup};
use std::collections::{BTreeMap, BTreeSet};

/// The port by which what goes no further leaves any step; it leads to `endings`, and no pipeline routes it.
pub const ENDED: &str = "ended";

/// How many records of a step may be under way at once, where it does not say.
pub const IN_FLIGHT_DEFAULT: usize = 64;

/// In which order a step finishes its records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// As they come to an end.
    #[default]
    Any,
    /// Records of one key one after the other, retries included.
    Key,
}

/// How a step deals with a queue that is longer than it can work off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Queueing {
    /// First come, first served.
    Fifo,
    /// Tenants take turns, and what a tenant has beyond its share of a long queue waits in `overflow.{step}`.
    #[default]
    Fair,
}

/// What is done about a call that was under way when its process vanished: it may have been paid for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ambiguous {
    /// It is made again, at most twice; then the record is a dead letter.
    #[default]
    Retry,
    /// The record is a dead letter at once.
    Park,
}

/// What kind of queue a topic is to the step that reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Channel {
    /// Somebody waits.
    Live,
    /// Nobody waits.
    Backfill,
    /// Set aside after a failure, until it is due.
    Retry,
    /// Set aside for its tenant had more than its share of the queue.
    Overflow,
}

/// A topic that a step reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// Its name, without the prefix.
    pub topic: String,
    /// What kind of queue it is.
    pub channel: Channel,
}

/// A pipeline, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Its name.
    pub name: String,
    /// Its steps, in the order of the file.
    pub steps: Vec<PlannedStep>,
    /// What is allowed and yet looks like a mistake, such as a topic that nobody reads.
    pub warnings: Faults,
    pub(crate) own_topics: Vec<PlannedTopic>,
}

/// A step, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedStep {
    /// Its key.
    pub key: String,
    /// The operator that it runs.
    pub operator: String,
    /// The topics that it reads, at least one.
    pub from: Vec<String>,
    /// The topic to which each port leads; all but [`ENDED`].
    pub to: BTreeMap<String, String>,
    /// The compacted topics that it looks things up in.
    pub tables: Vec<String>,
    /// How many records may be under way at once.
    pub in_flight: usize,
    /// How often one record may pass; a record that comes once more ends. `None` is as often as it comes.
    pub visits_max: Option<u32>,
    /// In which order records are finished.
    pub order: Order,
    /// How it deals with a queue that is longer than it can work off. Where order matters, or records are nobody's,
    /// always first come, first served.
    pub queue: Queueing,
    /// Whether its input is the work of a request, which must end in a result.
    pub is_job: bool,
    /// Where its paid calls are remembered, what is done about one whose end nobody knows. Absent where nothing is paid,
    /// or the pipeline wants no ledger.
    pub ledger: Option<Ambiguous>,
    /// The operator's settings.
    pub settings: serde_json::Value,
}

impl PlannedStep {
    /// All topics that the step reads: those of its `from`; for the work of requests the same for the backfill lane;
    /// and those by which its host sets records aside.
    pub fn inputs(&self) -> Vec<Input> {
        let input = |topic: String, channel| Input { topic, channel };
        let mut inputs: Vec<_> = self.from.iter().map(|from| input(from.clone(), Channel::Live)).collect();
        if self.is_job {
            inputs.extend(self.from.iter().map(|from| input(topics::backfill(from), Channel::Backfill)));
        }
        inputs.extend(self.retries().into_iter().map(|(topic, _)| input(topic, Channel::Retry)));
        if self.queue == Queueing::Fair {
            inputs.push(input(topics::overflow(&self.key), Channel::Overflow));
        }
        inputs
    }

    /// From each topic that the step reads to the ledger of the paid calls that it makes for it.
    pub fn ledgers(&self) -> Vec<(String, String)> {
        let inputs = self.ledger.iter().flat_map(|_| self.inputs());
        let of = |topic: String| (topics::ledger(&self.key, &topic), topic);
        inputs.map(|input| of(input.topic)).map(|(ledger, input)| (input, ledger)).collect()
    }

    /// The topics where its records wait until they are tried again, with their delays in milliseconds. None where
    /// order matters: there a record is tried again in its place.
    pub fn retries(&self) -> Vec<(String, i64)> {
        match self.order {
            Order::Any => topics::RETRY_DELAYS.map(|(name, ms)| (topics::retry(&self.key, name), ms)).into(),
            Order::Key => Vec::new(),
        }
    }
}

/// A topic of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedTopic {
    /// Its name, without the prefix.
    pub name: String,
    /// The name of the record that lies on it.
    pub record: String,
    /// How it forgets.
    pub cleanup: Cleanup,
    /// Whether clients write to it.
    pub from_clients: bool,
    /// Whether clients, or tools outside the pipeline, read it.
    pub to_clients: bool,
}

impl From<&topics::Topic> for PlannedTopic {
    fn from(topic: &topics::Topic) -> Self {
        let read_outside = [
            topics::RESULTS,
            topics::OUTCOMES,
            topics::ATTEMPTS,
            topics::AUDITS,
            topics::LABELS,
            topics::PAYLOADS,
            topics::ALERTS,
            topics::DELTAS,
            topics::DEAD_LETTERS,
        ];
        Self {
            name: topic.name.to_owned(),
            record: topic.record.to_owned(),
            cleanup: topic.cleanup,
            from_clients: topic.from_clients,
            to_clients: read_outside.iter().any(|other| other.name == topic.name),
        }
    }
}

/// What the host of any pipeline reads and writes beside its steps, and what anyone may add to its tables.
pub(crate) const HOST_TOPICS: [topics::Topic; 9] = [
    topics::ENDINGS,
    topics::ATTEMPTS,
    topics::AUDITS,
    topics::LABELS,
    topics::PAYLOADS,
    topics::ALERTS,
    topics::DELTAS,
    topics::CANCELS,
    topics::DEAD_LETTERS,
];

/// How topics forget on which hosts set records aside.
const ASIDE: Cleanup = Cleanup::Delete { hours: 7 * 24 };

/// A step that a plan does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("pipeline {pipeline:?} has no step {key:?}{}", hint.as_ref().map(|hint| format!("; {hint}")).unwrap_or_default())]
pub struct UnknownStep {
    /// The pipeline.
    pub pipeline: String,
    /// The key that was asked for.
    pub key: String,
    /// What was probably meant.
    pub hint: Option<String>,
}

impl Plan {
    /// Every topic that the pipeline touches: those of [`named_topics`](Self::named_topics), each followed by its
    /// backfill lane where it has one, those by which hosts set records aside, and ledgers of paid calls.
    pub fn topics(&self) -> Vec<PlannedTopic> {
        let named = self.named_topics();
        let mut all = Vec::with_capacity(2 * named.len());
        for topic in &named {
            all.push(topic.clone());
            if self.readers(&topic.name).any(|step| step.is_job) {
                all.push(PlannedTopic { name: topics::backfill(&topic.name), ..topic.clone() });
            }
        }
        for step in &self.steps {
            let Some(record) = named.iter().find(|topic| step.from.contains(&topic.name)) else { continue };
            let aside = |input: &Input| matches!(input.channel, Channel::Retry | Channel::Overflow);
            all.extend(step.inputs().into_iter().filter(aside).map(|input| PlannedTopic {
                name: input.topic,
                record: record.record.clone(),
                cleanup: ASIDE,
                from_clients: false,
                to_clients: false,
            }));
            let ledgers = step.ledgers().into_iter();
            all.extend(ledgers.map(|(_, name)| PlannedTopic { name, ..PlannedTopic::from(&topics::LEDGER) }));
        }
        all
    }

    /// The topics that the pipeline names, in the order in which a request meets them, its own ones last: those of
    /// its steps, and those of the host (`endings`, `attempts`, `deltas`, `cancels`, `dead-letters`) and of its tables.
    pub fn named_topics(&self) -> Vec<PlannedTopic> {
        let mut touched: BTreeSet<&str> = HOST_TOPICS.iter().map(|topic| topic.name).collect();
        for step in &self.steps {
            touched.extend(step.from.iter().chain(step.to.values()).chain(&step.tables).map(String::as_str));
        }
        let shared = topics::ALL.iter().map(PlannedTopic::from);
        shared
            .chain(self.own_topics.iter().cloned())
            .filter(|topic| touched.contains(topic.name.as_str()))
            .collect()
    }

    /// The step of this key.
    pub fn step(&self, key: &str) -> Result<&PlannedStep, UnknownStep> {
        self.steps.iter().find(|step| step.key == key).ok_or_else(|| UnknownStep {
            pipeline: self.name.clone(),
            key: key.to_owned(),
            hint: nearest::hint(key, self.steps.iter().map(|step| step.key.as_str())),
        })
    }

    /// The consumer group of a step. Kafka takes the name if the prefix has at most
    /// [`PREFIX_CHARS_MAX`](crate::PREFIX_CHARS_MAX) characters.
    pub fn consumer_group(&self, prefix: &str, step: &PlannedStep) -> String {
        format!("{prefix}{}.{}", self.name, step.key)
    }

    /// The steps that read a topic record by record.
    pub(crate) fn readers<'a>(&'a self, topic: &'a str) -> impl Iterator<Item = &'a PlannedStep> {
        self.steps.iter().filter(move |step| step.from.iter().any(|from| from == topic))
    }
}
