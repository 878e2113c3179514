//! Every topic, its name spelled once, with what lies on it.
//!
//! Invariant: no other file of this workspace spells a topic's name, but the pipelines and the documentation.

use crate::{
    Alert, Answer, Attempt, Audit, CacheEntry, Cancel, Chunks, Completion, DeadLetter, Delta, Document,
    Ending, Grounded, Label, LedgerEntry, Outcome, Payload, Record, Request,
};

/// How Kafka forgets the records of a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cleanup {
    /// After so many hours.
    Delete {
        /// Hours until a record may go.
        hours: u32,
    },
    /// When a younger record has the same key.
    Compact,
    /// When a younger record has the same key, but not for so many hours.
    CompactAfter {
        /// Hours until a record may go.
        hours: u32,
    },
}

/// What a topic carries and how it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topic {
    /// The name, without the prefix.
    pub name: &'static str,
    /// The name of the record that lies on it.
    pub record: &'static str,
    /// How it forgets.
    pub cleanup: Cleanup,
    /// Whether clients write to it: then a record's headers are the client's, never an envelope.
    pub from_clients: bool,
}

const fn topic<R: Record>(name: &'static str, cleanup: Cleanup, from_clients: bool) -> Topic {
    Topic { name, record: R::NAME, cleanup, from_clients }
}

const DAY: Cleanup = Cleanup::Delete { hours: 24 };
const WEEK: Cleanup = Cleanup::Delete { hours: 7 * 24 };
const MONTH: Cleanup = Cleanup::Delete { hours: 30 * 24 };

/// Questions from clients, as typed into kcat.
pub const REQUESTS: Topic = topic::<Request>("requests", WEEK, true);
/// Requests that the cache could not answer.
pub const QUESTIONS: Topic = topic::<Request>("questions", WEEK, false);
/// Questions with the passages that may answer them.
pub const PROMPTS: Topic = topic::<Grounded>("prompts", WEEK, false);
/// Answers that nobody has checked yet.
pub const COMPLETIONS: Topic = topic::<Completion>("completions", WEEK, false);
/// How each request ended, before anyone is told.
pub const ENDINGS: Topic = topic::<Ending>("endings", WEEK, false);
/// What clients read.
pub const RESULTS: Topic = topic::<Answer>("results", WEEK, false);
/// One wide row a request, for SQL.
pub const OUTCOMES: Topic = topic::<Outcome>("outcomes", WEEK, false);
/// One row an upstream call.
pub const ATTEMPTS: Topic = topic::<Attempt>("attempts", WEEK, false);
/// What judges said of answers.
pub const AUDITS: Topic = topic::<Audit>("audits", WEEK, true);
/// What people said of answers.
pub const LABELS: Topic = topic::<Label>("labels", WEEK, true);
/// What was asked and answered, as text.
pub const PAYLOADS: Topic = topic::<Payload>("payloads", WEEK, true);
/// What is spent that somebody should know of.
pub const ALERTS: Topic = topic::<Alert>("alerts", MONTH, false);
/// Pieces of answers while they are written.
pub const DELTAS: Topic = topic::<Delta>("deltas", Cleanup::Delete { hours: 1 }, false);
/// Requests that their clients took back.
pub const CANCELS: Topic = topic::<Cancel>("cancels", DAY, true);
/// Sources of knowledge.
pub const DOCUMENTS: Topic = topic::<Document>("documents", Cleanup::Compact, true);
/// Documents, split for retrieval.
pub const CHUNKS: Topic = topic::<Chunks>("chunks", Cleanup::Compact, false);
/// Answers that may be given again.
pub const CACHE: Topic = topic::<CacheEntry>("cache", Cleanup::Compact, false);
/// Records that no step could process.
pub const DEAD_LETTERS: Topic = topic::<DeadLetter>("dead-letters", MONTH, false);

/// All topics, in the order in which a request meets them.
pub const ALL: &[Topic] = &[
    REQUESTS,
    QUESTIONS,
    PROMPTS,
    COMPLETIONS,
    ENDINGS,
    RESULTS,
    OUTCOMES,
    ATTEMPTS,
    AUDITS,
    LABELS,
    PAYLOADS,
    ALERTS,
    DELTAS,
    CANCELS,
    DOCUMENTS,
    CHUNKS,
    CACHE,
    DEAD_LETTERS,
];

/// What is remembered of a step's paid calls: its name is only the beginning of the topics' names, see [`ledger`].
pub const LEDGER: Topic = topic::<LedgerEntry>("ledger", Cleanup::CompactAfter { hours: 7 * 24 }, false);

/// Topics of which each step that needs one has its own.
pub const OF_STEPS: &[Topic] = &[LEDGER];

/// The delays of a step's retry topics, shortest first: the word of the name, and milliseconds. One delay a topic, so
/// that what was written first is due first.
pub const RETRY_DELAYS: [(&str, i64); 3] = [("10s", 10_000), ("1m", 60_000), ("10m", 600_000)];

/// Where a step's records wait until they are tried again.
pub fn retry(step: &str, delay: &str) -> String {
    format!("retry.{step}.{delay}")
}

/// Where a step's records wait whose tenant has more than its share of the queue.
pub fn overflow(step: &str) -> String {
    format!("overflow.{step}")
}

/// What a step was paid for on this input: its calls and their answers.
pub fn ledger(step: &str, input: &str) -> String {
    format!("{}.{step}.{input}", LEDGER.name)
}

/// The same topic for requests that nobody waits for.
pub fn backfill(topic: &str) -> String {
    format!("{topic}-backfill")
}

/// Whether a topic's name is one of those that the functions above make.
pub fn is_made_by_hosts(name: &str) -> bool {
    name.ends_with("-backfill")
        || ["retry.", "overflow.", "ledger."].iter().any(|start| name.starts_with(start))
}

/// The topic of this name.
pub fn find(name: &str) -> Option<&'static Topic> {
    ALL.iter().find(|topic| topic.name == name)
}

/// Partitions of every topic of a pipeline, unless `topics apply --partitions` says otherwise.
pub const PARTITIONS: i32 = 12;

/// The largest message of a topic that clients write to; Kafka's own default.
pub const MESSAGE_BYTES_MAX: usize = 1_048_588;

/// The largest message of every other topic: headers grow on the way, a prompt gains its passages, a split document its
/// headings, and a dead letter holds a whole record.
pub const DERIVED_MESSAGE_BYTES_MAX: usize = 4 * MESSAGE_BYTES_MAX;
