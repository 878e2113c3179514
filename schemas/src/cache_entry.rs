//! An answer that may be given again.

use crate::{DecodeError, EncodeError, Generated, Record, Retrieval};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The record of `cache`; its key names the scope and the question. Without a value it is a removal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(from = "Written")]
pub struct CacheEntry {
    /// A hash of the tenant, of all that shapes the answer, and of the question.
    pub key: String,
    /// What is kept; absent where it was taken away.
    #[serde(flatten)]
    pub content: Option<Kept>,
}

/// An answer and what it rests on.
///
/// It names its passages and does not hold them: before it is given again they are sought again, and a changed
/// document gives other ids.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Kept {
    /// The answer.
    pub answer: Generated,
    /// How the passages were sought, so that they can be sought again.
    pub retrieval: Option<Retrieval>,
    /// The ids of all chunks that the model saw, best first.
    pub chunks: Vec<String>,
    /// When the answer was made, in milliseconds since 1970.
    pub made_at_ms: i64,
}

/// What a message with a value says: the content is there.
///
/// A type of its own, since serde takes a flattened `Option` that it cannot read for absent: a damaged record
/// would remove an answer.
#[derive(Deserialize, JsonSchema)]
struct Written {
    /// A hash of the tenant, of all that shapes the answer, and of the question.
    key: String,
    #[serde(flatten)]
    content: Kept,
}

impl From<Written> for CacheEntry {
    fn from(Written { key, content }: Written) -> Self {
        Self { key, content: Some(content) }
    }
}

impl Record for CacheEntry {
    const NAME: &'static str = "CacheEntry";

    fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        crate::from_json(body)
    }

    fn encode(&self) -> Result<Option<Vec<u8>>, EncodeError> {
        if self.content.is_none() { Ok(None) } else { crate::to_json(self) }
    }

    fn decode_tombstone(key: &str) -> Option<Self> {
        Some(Self { key: key.to_owned(), content: None })
    }

    fn key(&self) -> Option<&str> {
        Some(&self.key)
    }
}
