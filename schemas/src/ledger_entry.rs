//! What is remembered of paid calls, so that an answer that was paid for is never paid for again.

use crate::{Attempt, CallId, Record, record::json_wire};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What an entry of a ledger says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EntryKind {
    /// A call is about to be sent. Until it is closed it may have been paid for.
    Started,
    /// It was answered; closes it.
    Done,
    /// It failed, or was never sent; closes it.
    Failed,
    /// The record went to another topic; its calls are made there from now on.
    Moved,
    /// Its owner is alive, and may send calls.
    Renewed,
    /// Its owner sends no more calls. Those that are open go on, and their owner renews until they are closed.
    Released,
}

impl EntryKind {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Started, Self::Done, Self::Failed, Self::Moved, Self::Renewed, Self::Released];

    /// The word of the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Moved => "moved",
            Self::Renewed => "renewed",
            Self::Released => "released",
        }
    }
}

/// The record of `ledger.{step}.{input topic}`, at the partition of the record that makes the call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LedgerEntry {
    /// What it says.
    pub kind: EntryKind,
    /// Who writes: one assignment of one partition to one process.
    pub owner: String,
    /// When it was written, in milliseconds since 1970. For people: nothing is decided by it.
    pub at_ms: i64,
    /// The call; absent where the entry is about the owner's lease, or about a record that made none yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub call_id: Option<CallId>,
    /// The number of the try within the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<i32>,
    /// The offset of the record that makes the call, in the input topic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_offset: Option<i64>,
    /// A hash of that record, as 16 hexadecimal digits: an answer to another one is not taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// A hash of the step's settings, as 16 hexadecimal digits. Recorded only: an answer is taken across versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<String>,
    /// The answer, in the form of whoever made the call; absent also where it was too large to be kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<Value>,
    /// Why it failed, or why there is no answer; a word of a closed vocabulary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// The topic that the record went to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// The row about the try, as it lies on `attempts` or will.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Map<String, Value>>")]
    pub row: Option<Attempt>,
}

impl LedgerEntry {
    /// An entry about a lease.
    pub fn of_lease(kind: EntryKind, owner: &str, at_ms: i64) -> Self {
        Self {
            kind,
            owner: owner.to_owned(),
            at_ms,
            call_id: None,
            attempt: None,
            source_offset: None,
            input: None,
            config: None,
            answer: None,
            code: None,
            to: None,
            row: None,
        }
    }

    /// The key of the message: `call/kind/owner`. So no later entry compacts the first answer away, be it a second start
    /// or what an owner that was given up still writes.
    pub fn message_key(&self) -> String {
        let of = match (&self.call_id, self.source_offset) {
            (Some(call), _) => call.as_str().to_owned(),
            (None, Some(offset)) => format!("record-{offset}"),
            (None, None) => "lease".to_owned(),
        };
        format!("{of}/{}/{}", self.kind.as_str(), self.owner)
    }
}

impl Record for LedgerEntry {
    const NAME: &'static str = "LedgerEntry";
    json_wire!();
}
