//! Adds to a question the passages that may answer it.
//!
//! Sought among what the tenant owns and what is everybody's: a prefetch by vector, scored again by words, both
//! rankings fused, repeats dropped, packed into a budget.
//!
//! Invariant: a question without passages still goes on. "Nothing found" is an answer the model can use; silence is
//! not. And the same question over the same documents gives the same passages in the same order: the cache relies
//! on it.

mod embedder;
mod rank;
mod table;

pub use table::ChunksTable;

use crate::{
    catalogue::{Resources, Shipped},
    store_failure::store_failure,
    text::{tokens, words},
};
use forebay_operator::{Context, Event, Failure, Operator, ports};
use forebay_schemas::{
    Chunks, Grounded, Hop, Passage, Record as _, Request, Retrieval, SHARED_TENANT, Tenant,
};
use forebay_stores::Vectors;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{num::NonZeroUsize, sync::Arc};

/// Candidates that the vector search gives to the ranking.
const PREFETCH: usize = 50;

/// A candidate that shares no word with the question and points further away than this is no candidate: only chance
/// brought it.
const COSINE_MIN: f32 = 0.2;

/// How passages are sought.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// At most so many passages; 1 to 50.
    pub limit: NonZeroUsize,
    /// At most so many tokens in all of them, estimated.
    pub tokens_max: NonZeroUsize,
}

impl Default for Settings {
    fn default() -> Self {
        const LIMIT: NonZeroUsize = NonZeroUsize::new(8).unwrap();
        const TOKENS_MAX: NonZeroUsize = NonZeroUsize::new(2400).unwrap();
        Self { limit: LIMIT, tokens_max: TOKENS_MAX }
    }
}

ports! {
    /// What `retrieve` gives.
    pub enum Retrieved {
        /// The question with its passages.
        Grounded(Grounded) = "grounded",
    }
}

/// The operator `retrieve`.
pub struct Retrieve {
    retriever: Retriever,
    retrieval: Retrieval,
}

impl Shipped for Retrieve {
    type Settings = Settings;
    const TABLES: &'static [&'static str] = &[Chunks::NAME];

    fn fault(settings: &Settings) -> Option<(&'static str, String)> {
        let limit = settings.limit.get();
        (limit > PREFETCH).then(|| ("limit", format!("{limit} is over {PREFETCH}")))
    }

    fn new(settings: Settings, resources: &Resources) -> Self {
        let retrieval = Retrieval { limit: settings.limit.get(), tokens_max: settings.tokens_max.get() };
        Self { retriever: Retriever::new(resources.vectors.clone()), retrieval }
    }
}

impl Operator for Retrieve {
    const NAME: &'static str = "retrieve";
    const HOP: Option<Hop> = Some(Hop::Retrieve);
    type In = Request;
    type Out = Retrieved;

    async fn process(&self, request: Request, cx: &Context) -> Result<Vec<Retrieved>, Failure> {
        let (retrieval, question) = (self.retrieval, request.question());
        let sought = self.retriever.seek(&question, &cx.envelope().tenant, retrieval);
        let passages = tokio::select! {
            biased;
            stop = cx.cancelled() => return Err(stop.into()),
            passages = sought => passages?,
        };
        cx.observe(&Event::Retrieved { passages: passages.len() });
        Ok(vec![Retrieved::Grounded(Grounded { request, retrieval, passages })])
    }
}

/// Seeks passages; shared by all who must find the same ones.
pub(crate) struct Retriever(Arc<dyn Vectors>);

impl Retriever {
    pub(crate) fn new(vectors: Arc<dyn Vectors>) -> Self {
        Self(vectors)
    }

    /// The passages for a question of this tenant, best first.
    pub(crate) async fn seek(
        &self,
        question: &str,
        tenant: &Tenant,
        retrieval: Retrieval,
    ) -> Result<Vec<Passage>, Failure> {
        let stems = words::stems(question);
        if stems.is_empty() {
            return Ok(Vec::new());
        }
        let vector = embedder::embed([stems.as_slice()]);
        let scopes = [tenant.as_str(), SHARED_TENANT];
        let hits = self.0.search(&vector, &scopes, PREFETCH).await;
        let hits = hits.map_err(|error| store_failure("vector store", error))?;
        let mut candidates = Vec::with_capacity(hits.len());
        for hit in hits {
            // Only our own table writes there, so this is a store of another version.
            let passage = serde_json::from_slice(&hit.payload)
                .map_err(|error| Failure::outage("store_unavailable", "vector store", error))?;
            candidates.push(rank::Candidate::new(passage, hit.score));
        }
        Ok(pack(rank::rank(&stems, candidates, COSINE_MIN), retrieval))
    }
}

/// The best that fit, without repeats. What is too long for the room that is left gives way to what is shorter.
fn pack(ranked: Vec<rank::Candidate>, Retrieval { limit, tokens_max }: Retrieval) -> Vec<Passage> {
    let mut packed: Vec<rank::Candidate> = Vec::new();
    let mut room = tokens_max;
    for candidate in ranked {
        if packed.len() == limit {
            break;
        }
        let length = tokens(&candidate.passage.text);
        if length <= room && !packed.iter().any(|other| other.repeats(&candidate)) {
            room -= length;
            packed.push(candidate);
        }
    }
    packed.into_iter().map(|candidate| candidate.passage).collect()
}

#[cfg(test)]
mod tests;
