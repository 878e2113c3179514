//! A record that a step could not process, kept whole.

use crate::{DecodeError, EncodeError, Record};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Header names of `dead-letters`. The message's value is the original record's bytes, untouched; all that is
/// known about it stands in headers, so that a redrive is a copy.
pub mod header {
    /// Starts the name of every one of them.
    pub const OURS: &str = "forebay-dead-";

    crate::record::headers! {
        /// The id of the request; derived where the record did not say.
        ID = "forebay-dead-id";
        /// Whose request it was.
        TENANT = "forebay-dead-tenant";
        /// Present where the original was too large to copy; says where it lies.
        BODY = "forebay-dead-body";
        /// The step that gave up.
        STAGE = "forebay-dead-stage";
        /// The topic, partition, offset and timestamp of the original: `topic/partition/offset@ms`.
        SOURCE = "forebay-dead-source";
        /// The original's key, where it had one.
        KEY = "forebay-dead-key";
        /// `undecodable`, `rejected`, `unavailable` or `panicked`.
        CLASS = "forebay-dead-class";
        /// A word of a closed vocabulary.
        CODE = "forebay-dead-code";
        /// What happened, for a person; at most 1 KiB.
        MESSAGE = "forebay-dead-message";
        /// How often it was tried.
        ATTEMPTS = "forebay-dead-attempts";
    }
}

/// The longest message that a dead letter carries.
pub const MESSAGE_BYTES_MAX: usize = 1024;

/// What the headers of a dead letter say, as `dlq` and the table sink read them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeadLetter {
    /// The step that gave up.
    pub stage: String,
    /// The topic of the original.
    pub topic: String,
    /// Its partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
    /// Its timestamp, in milliseconds since 1970.
    pub timestamp_ms: i64,
    /// `undecodable`, `rejected`, `unavailable` or `panicked`.
    pub class: String,
    /// A word of a closed vocabulary.
    pub code: String,
    /// What happened.
    pub message: String,
    /// How often it was tried.
    pub attempts: u32,
}

impl DeadLetter {
    /// The key of the message: the step and where the original lies, so that a second copy is recognised.
    pub fn key_of(stage: &str, topic: &str, partition: i32, offset: i64) -> String {
        format!("{stage}/{topic}/{partition}/{offset}")
    }

    /// `message`, cut at a character to the bytes that a dead letter may carry.
    pub fn cut(message: &str) -> &str {
        let mut end = message.len().min(MESSAGE_BYTES_MAX);
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        &message[..end]
    }
}

impl Record for DeadLetter {
    const NAME: &'static str = "DeadLetter";
    fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        crate::from_json(body)
    }
    fn encode(&self) -> Result<Option<Vec<u8>>, EncodeError> {
        crate::to_json(self)
    }
}
