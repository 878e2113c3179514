//! Rerank: `documents` and `relevance_score` as Cohere, Jina and vLLM have them, `texts` and `score` as TEI does.
//!
//! Invariant: each document has one score, in the order of the documents; else there is no answer.

use super::{
    api::{Written, malformed},
    embeddings::in_order,
};
use crate::{Call, CallError, Task};
use forebay_schemas::Usage;
use serde::{Deserialize, Serialize};

#[derive(Serialize)]
pub(super) struct Cohere<'a> {
    model: &'a str,
    query: &'a str,
    documents: &'a [&'a str],
    top_n: usize,
}

pub(super) fn cohere<'a>(query: &'a str, documents: &'a [&'a str], model: &'a str) -> Cohere<'a> {
    Cohere { model, query, documents, top_n: documents.len() }
}

/// TEI serves one model, and does not ask which.
#[derive(Serialize)]
pub(super) struct Tei<'a> {
    query: &'a str,
    texts: &'a [&'a str],
    /// Or one text of many that is too long would cost all of them their scores.
    truncate: bool,
}

pub(super) fn tei<'a>(query: &'a str, documents: &'a [&'a str]) -> Tei<'a> {
    Tei { query, texts: documents, truncate: true }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ranking {
    Tei(Vec<Scored>),
    Cohere { model: Option<String>, results: Vec<Scored>, usage: Option<Tokens> },
}

#[derive(Deserialize)]
struct Scored {
    index: usize,
    #[serde(alias = "relevance_score")]
    score: f32,
}

#[derive(Deserialize)]
struct Tokens {
    #[serde(default)]
    total_tokens: u64,
}

pub(super) fn whole(body: &[u8], call: &Call<'_>) -> Result<Written, CallError> {
    let ranking = serde_json::from_slice(body).map_err(|error| malformed("no ranking").because(error))?;
    let (model, scores, usage) = match ranking {
        Ranking::Tei(scores) => (None, scores, None),
        Ranking::Cohere { model, results, usage } => (model, results, usage),
    };
    let wanted = match call.task {
        Task::Rank { documents, .. } => documents.len(),
        _ => 0,
    };
    let scores = scores.into_iter().map(|scored| (scored.index, vec![scored.score]));
    let vectors = in_order(scores, wanted).ok_or_else(|| malformed("not one score for each document"))?;
    let usage = usage.map(|tokens| Usage::of(tokens.total_tokens, 0));
    Ok(Written { vectors, model, usage, is_over: true, ..Written::default() })
}
