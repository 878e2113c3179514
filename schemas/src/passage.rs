//! A piece of a document that may answer a question.

use crate::DocumentVersion;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A slice of one stored version of a document.
///
/// Invariant: `text` is byte for byte what stands in that version from `start` to `end`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Passage {
    /// The document's id.
    pub document: String,
    /// The version of the document that the offsets count in.
    pub version: DocumentVersion,
    /// The chunk's id: `document:version:hash`.
    pub chunk: String,
    /// The first byte.
    pub start: usize,
    /// The byte after the last.
    pub end: usize,
    /// Where in the document it stands: the headings above it, outermost first.
    pub heading: Vec<String>,
    /// The text.
    pub text: String,
    /// How well it matches the question; comparable within one retrieval only. Never NaN.
    #[serde(serialize_with = "crate::record::finite")]
    pub score: f32,
}
