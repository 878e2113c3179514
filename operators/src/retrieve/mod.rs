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
use forebay_stores::{Vectors, vectors::Hit};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    num::NonZeroUsize,
    sync::{Arc, PoisonError, RwLock},
};

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

/// Passages whose counted words are kept, at about 10 KiB each.
const COUNTED_MAX: usize = 2000;

/// Seeks passages; shared by all who must find the same ones.
pub(crate) struct Retriever {
    vectors: Arc<dyn Vectors>,
    /// By the chunk's id, which says all: the same id is the same document, version and text.
    counted: RwLock<HashMap<String, Arc<rank::Counted>>>,
}

impl Retriever {
    pub(crate) fn new(vectors: Arc<dyn Vectors>) -> Self {
        Self { vectors, counted: RwLock::default() }
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
        let hits = self.vectors.search(&vector, &scopes, PREFETCH).await;
        let hits = hits.map_err(|error| store_failure("vector store", error))?;
        let mut candidates = Vec::with_capacity(hits.len());
        for hit in hits {
            let cosine = hit.score;
            candidates.push(rank::Candidate::new(self.counted(hit)?, cosine));
        }
        Ok(pack(rank::rank(&stems, candidates, COSINE_MIN), retrieval))
    }

    /// The passage of a hit. Its words are counted once and not for each question.
    fn counted(&self, hit: Hit) -> Result<Arc<rank::Counted>, Failure> {
        let known = self.counted.read().unwrap_or_else(PoisonError::into_inner).get(&hit.id).cloned();
        if let Some(counted) = known {
            return Ok(counted);
        }
        // Only our own table writes there, so what cannot be read is of another version.
        let passage = serde_json::from_slice(&hit.payload)
            .map_err(|error| Failure::outage("store_unavailable", "vector store", error))?;
        let counted = Arc::new(rank::Counted::new(passage));
        let mut all = self.counted.write().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= COUNTED_MAX {
            all.clear();
        }
        all.insert(hit.id, counted.clone());
        Ok(counted)
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
        let length = tokens(&candidate.counted.passage.text);
        if length <= room && !packed.iter().any(|other| other.counted.repeats(&candidate.counted)) {
            room -= length;
            packed.push(candidate);
        }
    }
    let passage =
        |candidate: rank::Candidate| Passage { score: candidate.score, ..candidate.counted.passage.clone() };
    packed.into_iter().map(passage).collect()
}

#[cfg(test)]
mod tests;
