//! Lets a reranker score the candidates: a model that reads each of them beside the question, which the search does not.
//!
//! All candidates travel in one call. Nobody else's could join it, as a call is of one question, and its rows, its ledger and its
//! budgets are those of the one request.
//!
//! Invariant: whatever the reranker does, the question goes on, in bounded time: by its scores, or in the order in which the
//! candidates were found.

use super::rank::Candidate;
use crate::{rows::Rows, text};
use forebay_calls::{CallError, Class, Model, Reply, Task};
use forebay_operator::{Context, Event, Stop};
use forebay_schemas::{Request, Rerank};
use std::{sync::Arc, time::Duration};

/// A reranker, and how it is asked.
pub(super) struct Reranker {
    pub(super) model: Arc<dyn Model>,
    /// At most so many candidates are scored.
    pub(super) candidates: usize,
    /// How long it is waited for.
    pub(super) timeout: Duration,
}

impl Reranker {
    /// The best candidates in the order of their scores, or as they are where it does not answer. `number` counts the record's
    /// calls, from 0.
    pub(super) async fn rerank(
        &self,
        request: &Request,
        mut candidates: Vec<Candidate>,
        number: u32,
        cx: &Context,
    ) -> Result<(Vec<Candidate>, Rerank), Stop> {
        candidates.truncate(self.candidates);
        let mut rerank = Rerank { candidates: self.candidates, scored: Some(fingerprint(&candidates)) };
        if candidates.is_empty() {
            return Ok((candidates, rerank));
        }
        let outcome = match self.ask(request, &candidates, number, cx).await? {
            Ok(scores) => {
                for (candidate, score) in candidates.iter_mut().zip(scores) {
                    candidate.score = score;
                }
                // Stable: of two with one score the one that was found first stays first.
                candidates.sort_by(|a, b| b.score.total_cmp(&a.score));
                "ok"
            }
            Err(error) => {
                let cause = &error as &dyn std::error::Error;
                tracing::warn!(
                    error = cause,
                    code = error.code,
                    model = self.model.name(),
                    "could not rerank; passages keep the order in which they were found"
                );
                rerank.scored = None;
                error.code
            }
        };
        cx.observe(&Event::Reranked { outcome });
        Ok((candidates, rerank))
    }

    /// The score of each candidate.
    async fn ask(
        &self,
        request: &Request,
        candidates: &[Candidate],
        number: u32,
        cx: &Context,
    ) -> Result<Result<Vec<f32>, CallError>, Stop> {
        let question = request.question();
        let passages = candidates.iter().map(|candidate| &candidate.counted.passage);
        let texts: Vec<String> =
            passages.map(|passage| text::under(&passage.heading, &passage.text)).collect();
        let documents: Vec<&str> = texts.iter().map(String::as_str).collect();
        let task = Task::Rank { query: &question, documents: &documents };
        let call = super::call(task, request, self.timeout, cx);
        let rows = Rows::new(cx, &call).numbered(number).dispensable();
        let replied = rows.ask(&*self.model, &call).await?;
        Ok(replied.and_then(|reply| scores(reply, candidates.len())))
    }
}

/// A number for each document; a server that gives others is not to be trusted with any.
fn scores(reply: Reply, wanted: usize) -> Result<Vec<f32>, CallError> {
    let scores: Vec<f32> = reply.vectors.into_iter().flatten().filter(|score| score.is_finite()).collect();
    match scores.len() == wanted {
        true => Ok(scores),
        false => {
            let message = format!("the reranker gave {} scores for {wanted} passages", scores.len());
            Err(CallError::new(Class::Transient, "model_malformed", message))
        }
    }
}

/// Tells candidates in their order from all others. A chunk's id stands for its document, version and text.
pub(super) fn fingerprint(candidates: &[Candidate]) -> String {
    let mut hasher = blake3::Hasher::new();
    for candidate in candidates {
        let chunk = candidate.counted.passage.chunk.as_bytes();
        // Its length first, or "a" and "bc" would read like "ab" and "c".
        hasher.update(&(chunk.len() as u64).to_be_bytes());
        hasher.update(chunk);
    }
    hasher.finalize().to_hex()[..32].to_owned()
}
