//! A document, split for retrieval.

use crate::{DecodeError, DocumentVersion, Embedding, EncodeError, Record, Tenant};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A piece of a document, with where it stands there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Chunk {
    /// `document:version:hash of the text`.
    pub id: String,
    /// The first byte in the document's text.
    pub start: usize,
    /// The byte after the last.
    pub end: usize,
    /// The headings above it, outermost first.
    pub heading: Vec<String>,
    /// Bytes `start..end` of the document's text.
    pub text: String,
    /// What an embedder made of its headings and its text; absent where none was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding: Option<Embedding>,
}

/// The record of `chunks`: all chunks of one version of a document; its key is the document's id.
///
/// One record holds them all, so that a reader passes from one version to the next in a single step and never
/// sees half of each. A message without a value takes the document away.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(from = "Written")]
pub struct Chunks {
    /// The document's id.
    pub document: String,
    /// What it now is; absent where it was deleted.
    #[serde(flatten)]
    pub content: Option<Split>,
}

/// One version of a document in pieces.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Split {
    /// Whose it is; `*` is everybody's.
    pub tenant: Tenant,
    /// The version that the offsets count in.
    pub version: DocumentVersion,
    /// The pieces, in the order of the document.
    pub chunks: Vec<Chunk>,
}

/// What a message with a value says: the content is there.
///
/// A type of its own, since serde takes a flattened `Option` that it cannot read for absent: a damaged record
/// would remove a document.
#[derive(Deserialize, JsonSchema)]
struct Written {
    /// The document's id.
    document: String,
    #[serde(flatten)]
    content: Split,
}

impl From<Written> for Chunks {
    fn from(Written { document, content }: Written) -> Self {
        Self { document, content: Some(content) }
    }
}

impl Record for Chunks {
    const NAME: &'static str = "Chunks";

    fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        crate::from_json(body)
    }

    fn encode(&self) -> Result<Option<Vec<u8>>, EncodeError> {
        if self.content.is_none() { Ok(None) } else { crate::to_json(self) }
    }

    fn decode_tombstone(key: &str) -> Option<Self> {
        Some(Self { document: key.to_owned(), content: None })
    }

    fn key(&self) -> Option<&str> {
        Some(&self.document)
    }
}
