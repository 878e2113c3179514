//! A question with what may answer it.

use crate::{Embedding, Identity, Passage, Record, Request, record::json_wire};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How passages were sought. Kept with an answer so that a cache can seek again and compare.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Retrieval {
    /// At most so many passages.
    pub limit: usize,
    /// At most so many tokens in all of them, estimated.
    pub tokens_max: usize,
    /// How a reranker had part in it; absent where none was to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rerank: Option<Rerank>,
    /// How an embedder had part in it; absent where none was to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embed: Option<Embed>,
}

/// What became of the candidates that a reranker was to score.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Rerank {
    /// At most so many candidates.
    pub candidates: usize,
    /// A hash of the ids of those that were scored, in the order in which they were found: the same candidates get the same
    /// scores. Absent where the reranker did not answer, and the passages have the order in which they were found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scored: Option<String>,
}

/// What became of a question that was to be embedded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Embed {
    /// By what passages were sought beside its words, so that they can be sought again without asking the embedder. Absent where
    /// that did not answer, and the words alone count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub question: Option<Embedding>,
}

impl Retrieval {
    /// Whether the passages may be others, or in another order, than they were to be, as embedder or reranker did not answer.
    pub fn is_degraded(&self) -> bool {
        self.rerank.as_ref().is_some_and(|rerank| rerank.scored.is_none())
            || self.embed.as_ref().is_some_and(|embed| embed.question.is_none())
    }
}

/// The record of `prompts`: a request and its passages, best first. No passages is an answer too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Grounded {
    /// What was asked.
    pub request: Request,
    /// How the passages were sought.
    pub retrieval: Retrieval,
    /// What may answer it, best first.
    pub passages: Vec<Passage>,
}

impl Record for Grounded {
    const NAME: &'static str = "Grounded";
    const JOB: bool = true;
    json_wire!();
    fn request(&self) -> Option<&Request> {
        Some(&self.request)
    }
    fn identity(&self) -> Identity {
        self.request.identity()
    }
}
