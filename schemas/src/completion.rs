//! An answer that nobody has checked yet, fresh from a model or from the cache.

use crate::{DocumentVersion, Identity, NanoUsd, Passage, Record, Request, Retrieval, record::json_wire};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A quotation of a stored document.
///
/// Invariant of a validated answer: bytes `start..end` of that version are `quote`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Citation {
    /// The document's id.
    pub document: String,
    /// The version of the document that the offsets count in.
    pub version: DocumentVersion,
    /// The first byte of the quotation, in UTF-8.
    pub start: usize,
    /// The byte after its last.
    pub end: usize,
    /// The quoted text.
    pub quote: String,
}

/// Tokens, under OpenAI's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Usage {
    /// Tokens read by the model, those from its prefix cache included.
    pub prompt_tokens: u64,
    /// Tokens written by the model, those of its reasoning included.
    pub completion_tokens: u64,
    /// Their sum.
    pub total_tokens: u64,
    /// Those of the prompt that came from a prefix cache; absent where the provider does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached_tokens: Option<u64>,
    /// Those of the prompt that were written to a prefix cache, which some providers charge for; absent where the provider
    /// does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached_write_tokens: Option<u64>,
    /// Those of the answer that went into reasoning; absent where the provider does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_tokens: Option<u64>,
}

impl Usage {
    /// Of a prompt and an answer of so many tokens.
    pub fn of(prompt_tokens: u64, completion_tokens: u64) -> Self {
        let total_tokens = prompt_tokens.saturating_add(completion_tokens);
        Self { prompt_tokens, completion_tokens, total_tokens, ..Self::default() }
    }
}

/// Whether the answer came from the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CacheStatus {
    /// From the cache.
    Hit,
    /// Looked for there and not found.
    Miss,
    /// Not looked for: the request said so, or it ended before.
    #[default]
    Bypass,
}

impl CacheStatus {
    /// The word of the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Bypass => "bypass",
        }
    }
}

/// What a model wrote, and what it took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Generated {
    /// The answer.
    pub text: String,
    /// The quotations that it rests on.
    pub citations: Vec<Citation>,
    /// The model that answered, as it names itself.
    pub model: String,
    /// Who served it: a name of the call stack's (`openai_compatible`, `extractive`).
    pub provider: String,
    /// Tokens; absent where the provider did not say.
    pub usage: Option<Usage>,
    /// What this answer cost; absent where the model has no price, zero where nothing was called.
    pub cost_nano_usd: Option<NanoUsd>,
    /// Why the model stopped, in the provider's word.
    pub finish_reason: Option<String>,
    /// Time to first token in microseconds; absent unless streamed.
    pub ttft_us: Option<i64>,
    /// Whether it comes from a stand-in, as the model that was to answer could not: not kept in the cache.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_fallback: bool,
    /// The tier that answered, by the name of its model; absent where there are no tiers, or another model stood in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tier: Option<String>,
}

/// The record of `completions`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Completion {
    /// What was asked.
    pub request: Request,
    /// How the passages were sought; absent where the answer is older than this request's retrieval.
    pub retrieval: Option<Retrieval>,
    /// The evidence that the model saw.
    pub passages: Vec<Passage>,
    /// Whether it came from the cache.
    pub cache: CacheStatus,
    /// The answer itself.
    pub answer: Generated,
}

impl Record for Completion {
    const NAME: &'static str = "Completion";
    const JOB: bool = true;
    json_wire!();
    fn request(&self) -> Option<&Request> {
        Some(&self.request)
    }
    fn identity(&self) -> Identity {
        self.request.identity()
    }
}
