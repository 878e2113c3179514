//! Adds to a question the passages that may answer it.
//!
//! Sought among what the tenant owns and what is everybody's: a prefetch by vector, scored again by words, both
//! rankings fused, and if wanted the best of them scored by a reranker; repeats dropped, packed into a budget.
//!
//! Invariant: a question without passages still goes on. "Nothing found" is an answer the model can use; silence is
//! not. And the same question over the same documents gives the same candidates in the same order: the cache relies
//! on it.

mod embedder;
mod rank;
mod rerank;
mod table;

pub use table::ChunksTable;

use crate::{
    catalogue::{Asks, Resources, Shipped},
    store_failure::store_failure,
    text::{tokens, words},
};
use forebay_operator::{Context, Event, Failure, Operator, ports};
use forebay_schemas::{
    Chunks, Grounded, Hop, Passage, Record as _, Request, Rerank, Retrieval, SHARED_TENANT, Tenant,
};
use forebay_stores::{Vectors, vectors::Hit};
use rank::Candidate;
use rerank::Reranker;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    num::{NonZeroU64, NonZeroUsize},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

/// Candidates that the vector search gives to the ranking.
const PREFETCH: usize = 50;

/// A candidate that shares no word with the question and points further away than this is no candidate: only chance
/// brought it.
const COSINE_MIN: f32 = 0.2;

/// The longest that a reranker may be waited for.
const RERANK_TIMEOUT_MS_MAX: u64 = 60_000;

/// How passages are sought.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// At most so many passages; 1 to 50.
    pub limit: NonZeroUsize,
    /// At most so many tokens in all of them, estimated.
    pub tokens_max: NonZeroUsize,
    /// So many of the best candidates are scored by the reranker, and only they are left; `limit` to 50. With 0 none is asked.
    pub rerank: usize,
    /// Milliseconds for which the reranker is waited for, but for no more than half of the time until the deadline; to 60000.
    pub rerank_timeout_ms: NonZeroU64,
}

impl Default for Settings {
    fn default() -> Self {
        const LIMIT: NonZeroUsize = NonZeroUsize::new(8).unwrap();
        const TOKENS_MAX: NonZeroUsize = NonZeroUsize::new(2400).unwrap();
        const RERANK_TIMEOUT_MS: NonZeroU64 = NonZeroU64::new(2000).unwrap();
        Self { limit: LIMIT, tokens_max: TOKENS_MAX, rerank: 0, rerank_timeout_ms: RERANK_TIMEOUT_MS }
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
    reranker: Option<Reranker>,
    retrieval: Retrieval,
}

impl Shipped for Retrieve {
    type Settings = Settings;
    const TABLES: &'static [&'static str] = &[Chunks::NAME];

    fn asks(settings: &Settings) -> Option<Asks> {
        (settings.rerank > 0).then_some(Asks::Reranker)
    }

    fn fault(settings: &Settings) -> Option<(&'static str, String)> {
        let (limit, rerank, timeout_ms) =
            (settings.limit.get(), settings.rerank, settings.rerank_timeout_ms.get());
        if limit > PREFETCH {
            return Some(("limit", format!("{limit} is over {PREFETCH}")));
        }
        if rerank > PREFETCH {
            return Some(("rerank", format!("{rerank} is over {PREFETCH}")));
        }
        if rerank > 0 && rerank < limit {
            return Some(("rerank", format!("{rerank} is under limit, which is {limit}")));
        }
        (timeout_ms > RERANK_TIMEOUT_MS_MAX)
            .then(|| ("rerank_timeout_ms", format!("{timeout_ms} is over {RERANK_TIMEOUT_MS_MAX}")))
    }

    fn new(settings: Settings, resources: &Resources) -> Self {
        let Settings { limit, tokens_max, rerank: candidates, rerank_timeout_ms } = settings;
        let timeout = Duration::from_millis(rerank_timeout_ms.get());
        let reranker = resources.reranker.clone().filter(|_| candidates > 0);
        Self {
            retriever: Retriever::new(resources.vectors.clone()),
            reranker: reranker.map(|model| Reranker { model, candidates, timeout }),
            retrieval: Retrieval { limit: limit.get(), tokens_max: tokens_max.get(), rerank: None },
        }
    }
}

impl Operator for Retrieve {
    const NAME: &'static str = "retrieve";
    const HOP: Option<Hop> = Some(Hop::Retrieve);
    type In = Request;
    type Out = Retrieved;

    async fn process(&self, request: Request, cx: &Context) -> Result<Vec<Retrieved>, Failure> {
        let (mut retrieval, question) = (self.retrieval.clone(), request.question());
        let sought = self.retriever.candidates(&question, &cx.envelope().tenant);
        let mut candidates = tokio::select! {
            biased;
            stop = cx.cancelled() => return Err(stop.into()),
            candidates = sought => candidates?,
        };
        if let Some(reranker) = &self.reranker {
            let (ordered, rerank) = reranker.rerank(&request, candidates, cx).await?;
            (candidates, retrieval.rerank) = (ordered, Some(rerank));
        }
        let passages = pack(candidates, &retrieval);
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

    /// The passages that an answer rests on, while seeking as it was done then gives these chunks in this order.
    ///
    /// A reranker is not asked again: it would give the same candidates the same scores, and cost more than what is saved.
    pub(crate) async fn seek_again(
        &self,
        question: &str,
        tenant: &Tenant,
        retrieval: &Retrieval,
        chunks: &[String],
    ) -> Result<Option<Vec<Passage>>, Failure> {
        let mut candidates = self.candidates(question, tenant).await?;
        let passages = match &retrieval.rerank {
            None => pack(candidates, retrieval),
            Some(Rerank { candidates: scored_max, scored }) => {
                candidates.truncate(*scored_max);
                if *scored != Some(rerank::fingerprint(&candidates)) {
                    return Ok(None);
                }
                let of = |chunk: &String| candidates.iter().find(|one| one.counted.passage.chunk == *chunk);
                chunks.iter().filter_map(of).map(Candidate::passage).collect()
            }
        };
        let is_same = passages.iter().map(|passage| &passage.chunk).eq(chunks);
        Ok(is_same.then_some(passages))
    }

    /// What may answer a question of this tenant, best first.
    async fn candidates(&self, question: &str, tenant: &Tenant) -> Result<Vec<Candidate>, Failure> {
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
            candidates.push(Candidate::new(self.counted(hit)?, cosine));
        }
        Ok(rank::rank(&stems, candidates, COSINE_MIN))
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
fn pack(ranked: Vec<Candidate>, Retrieval { limit, tokens_max, .. }: &Retrieval) -> Vec<Passage> {
    let mut packed: Vec<Candidate> = Vec::new();
    let mut room = *tokens_max;
    for candidate in ranked {
        if packed.len() == *limit {
            break;
        }
        let length = tokens(&candidate.counted.passage.text);
        if length <= room && !packed.iter().any(|other| other.counted.repeats(&candidate.counted)) {
            room -= length;
            packed.push(candidate);
        }
    }
    packed.iter().map(Candidate::passage).collect()
}

#[cfg(test)]
mod tests;
