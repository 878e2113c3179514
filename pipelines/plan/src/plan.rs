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
    /// Whether its input is the work of a request, which must end in a result.
    pub is_job: bool,
    /// The operator's settings.
    pub settings: serde_json::Value,
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
        let read_outside =
            [topics::RESULTS, topics::OUTCOMES, topics::ATTEMPTS, topics::DELTAS, topics::DEAD_LETTERS];
        Self {
            name: topic.name.to_owned(),
            record: topic.record.to_owned(),
            cleanup: topic.cleanup,
            from_clients: topic.from_clients,
            to_clients: read_outside.iter().any(|other| other.name == topic.name),
        }
    }
}

/// What the host of any pipeline reads and writes beside its steps.
pub(crate) const HOST_TOPICS: [topics::Topic; 5] =
    [topics::ENDINGS, topics::ATTEMPTS, topics::DELTAS, topics::CANCELS, topics::DEAD_LETTERS];

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
    /// Every topic that the pipeline touches, in the order in which a request meets them, its own ones last:
    /// those of its steps, and those of the host (`endings`, `attempts`, `deltas`, `cancels`, `dead-letters`).
    pub fn topics(&self) -> Vec<PlannedTopic> {
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
