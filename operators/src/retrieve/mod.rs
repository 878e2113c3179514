//! Adds to a question the passages that may answer it.
//!
//! Sought among what the tenant owns and what is everybody's: a prefetch by lexical vector and, if wanted, one by the vector that an
//! embedder makes of the question, scored again by words, all rankings fused, and if wanted the best of them scored by a reranker;
//! repeats dropped, packed into a budget.
//!
//! Invariant: a question without passages still goes on. "Nothing found" is an answer the model can use; silence is
//! not. And the same question over the same documents gives the same candidates in the same order: the cache relies
//! on it.

mod embed;
mod lexical;
mod rank;
mod rerank;
mod table;

pub use table::ChunksTable;

use crate::{
    catalogue::{Asks, Resources, Shipped},
    embedder::Embedder,
    store_failure::store_failure,
    text::{tokens, words},
};
use forebay_calls::{Call, Task};
use forebay_operator::{Context, Event, Failure, Operator, ports};
use forebay_schemas::{
    Chunks, Embed, Embedding, Grounded, Hop, Passage, Record as _, Request, Rerank, Retrieval, SHARED_TENANT,
    Tenant,
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
use tokio::time::Instant;

/// Candidates that each vector search gives to the ranking.
const PREFETCH: usize = 50;

/// A candidate that shares no word with the question, and whose lexical vector points further away than this, is no candidate: only
/// chance brought it.
const COSINE_MIN: f32 = 0.2;

/// The longest that an embedder or a reranker may be waited for.
const TIMEOUT_MS_MAX: u64 = 60_000;

/// How passages are sought.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// At most so many passages; 1 to 50.
    pub limit: NonZeroUsize,
    /// At most so many tokens in all of them, estimated.
    pub tokens_max: NonZeroUsize,
    /// Whether passages are sought by the vector that an embedder makes of the question too.
    pub embed: bool,
    /// Milliseconds for which the embedder is waited for, but for no more than half of the time until the deadline; to 60000.
    pub embed_timeout_ms: NonZeroU64,
    /// So many of the best candidates are scored by the reranker, and only they are left; `limit` to 50. With 0 none is asked.
    pub rerank: usize,
    /// Milliseconds for which the reranker is waited for, but for no more than half of the time until the deadline; to 60000.
    pub rerank_timeout_ms: NonZeroU64,
}

impl Default for Settings {
    fn default() -> Self {
        const LIMIT: NonZeroUsize = NonZeroUsize::new(8).unwrap();
        const TOKENS_MAX: NonZeroUsize = NonZeroUsize::new(2400).unwrap();
        const TIMEOUT_MS: NonZeroU64 = NonZeroU64::new(2000).unwrap();
        Self {
            limit: LIMIT,
            tokens_max: TOKENS_MAX,
            embed: false,
            embed_timeout_ms: TIMEOUT_MS,
            rerank: 0,
            rerank_timeout_ms: TIMEOUT_MS,
        }
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
    embedder: Option<embed::Asked>,
    reranker: Option<Reranker>,
    retrieval: Retrieval,
}

impl Shipped for Retrieve {
    type Settings = Settings;
    const TABLES: &'static [&'static str] = &[Chunks::NAME];

    fn asks(settings: &Settings) -> Vec<Asks> {
        let asked = [(settings.embed, Asks::Embedder), (settings.rerank > 0, Asks::Reranker)];
        asked.into_iter().filter_map(|(is_asked, whom)| is_asked.then_some(whom)).collect()
    }

    fn fault(settings: &Settings) -> Option<(&'static str, String)> {
        let (limit, rerank) = (settings.limit.get(), settings.rerank);
        if limit > PREFETCH {
            return Some(("limit", format!("{limit} is over {PREFETCH}")));
        }
        if rerank > PREFETCH {
            return Some(("rerank", format!("{rerank} is over {PREFETCH}")));
        }
        if rerank > 0 && rerank < limit {
            return Some(("rerank", format!("{rerank} is under limit, which is {limit}")));
        }
        let timeouts = [
            ("embed_timeout_ms", settings.embed_timeout_ms),
            ("rerank_timeout_ms", settings.rerank_timeout_ms),
        ];
        let (key, timeout_ms) = timeouts.into_iter().find(|(_, ms)| ms.get() > TIMEOUT_MS_MAX)?;
        Some((key, format!("{timeout_ms} is over {TIMEOUT_MS_MAX}")))
    }

    fn new(settings: Settings, resources: &Resources) -> Self {
        let Settings { limit, tokens_max, embed, embed_timeout_ms, rerank, rerank_timeout_ms } = settings;
        let [embed_timeout, rerank_timeout] =
            [embed_timeout_ms, rerank_timeout_ms].map(|ms| Duration::from_millis(ms.get()));
        let embedder = resources.embedder.clone().filter(|_| embed);
        let reranker = resources.reranker.clone().filter(|_| rerank > 0);
        Self {
            retriever: Retriever::new(resources),
            embedder: embedder.map(|embedder| embed::Asked { embedder, timeout: embed_timeout }),
            reranker: reranker.map(|model| Reranker { model, candidates: rerank, timeout: rerank_timeout }),
            retrieval: Retrieval {
                limit: limit.get(),
                tokens_max: tokens_max.get(),
                rerank: None,
                embed: None,
            },
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
        if let Some(embedder) = self.embedder.as_ref().filter(|_| !question.trim().is_empty()) {
            retrieval.embed = Some(embedder.embed(&request, &question, cx).await?);
        }
        let embedding = retrieval.embed.as_ref().and_then(|embed| embed.question.as_ref());
        let sought = self.retriever.candidates(&question, &cx.envelope().tenant, embedding);
        let mut candidates = tokio::select! {
            biased;
            stop = cx.cancelled() => return Err(stop.into()),
            candidates = sought => candidates?,
        };
        if let Some(reranker) = &self.reranker {
            // The first call has the number 0, whichever it is: by it a host knows copies of a record.
            let number = u32::from(self.embedder.is_some());
            let (ordered, rerank) = reranker.rerank(&request, candidates, number, cx).await?;
            (candidates, retrieval.rerank) = (ordered, Some(rerank));
        }
        let passages = pack(candidates, &retrieval);
        cx.observe(&Event::Retrieved { passages: passages.len() });
        Ok(vec![Retrieved::Grounded(Grounded { request, retrieval, passages })])
    }
}

/// A call for numbers that a question needs, and goes on without.
fn call<'a>(task: Task<'a>, request: &Request, timeout: Duration, cx: &Context) -> Call<'a> {
    // The other half is for whoever writes the answer.
    let timeout = cx.remaining().map_or(timeout, |left| timeout.min(left / 2));
    Call {
        task,
        // All layers keep to it, so the try ends by itself and a ledger hears how; dropped, it would be ambiguous.
        deadline: Some(Instant::now() + timeout),
        tenant: cx.envelope().tenant.clone(),
        key_id: request.key_id.clone(),
        job: request.job.clone(),
        lane: cx.envelope().lane,
        ..Call::default()
    }
}

/// Passages whose counted words are kept, at about 10 KiB each.
const COUNTED_MAX: usize = 2000;

/// Seeks passages; shared by all who must find the same ones.
pub(crate) struct Retriever {
    vectors: Arc<dyn Vectors>,
    embedder: Option<Embedder>,
    /// By the chunk's id, which says all: the same id is the same document, version and text.
    counted: RwLock<HashMap<String, Arc<rank::Counted>>>,
}

impl Retriever {
    pub(crate) fn new(resources: &Resources) -> Self {
        let (vectors, embedder) = (resources.vectors.clone(), resources.embedder.clone());
        Self { vectors, embedder, counted: RwLock::default() }
    }

    /// The passages that an answer rests on, while seeking as it was done then gives these chunks in this order.
    ///
    /// Neither embedder nor reranker is asked again: the question's vector is known, the same candidates would get the same scores,
    /// and they cost more than what is saved.
    pub(crate) async fn seek_again(
        &self,
        question: &str,
        tenant: &Tenant,
        retrieval: &Retrieval,
        chunks: &[String],
    ) -> Result<Option<Vec<Passage>>, Failure> {
        let embedding = match &retrieval.embed {
            None => None,
            Some(Embed { question }) => match question.as_ref().filter(|one| self.knows(one)) {
                None => return Ok(None),
                known => known,
            },
        };
        let mut candidates = self.candidates(question, tenant, embedding).await?;
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

    /// Whether the vectors of passages that are here may be compared with this one.
    fn knows(&self, embedding: &Embedding) -> bool {
        self.embedder.as_ref().is_some_and(|embedder| embedder.knows(embedding))
    }

    /// What may answer a question of this tenant, best first; sought by its words, and by its vector where there is one.
    async fn candidates(
        &self,
        question: &str,
        tenant: &Tenant,
        embedding: Option<&Embedding>,
    ) -> Result<Vec<Candidate>, Failure> {
        let stems = words::stems(question);
        let scopes = [tenant.as_str(), SHARED_TENANT];
        let by_vector = self.embedder.as_ref().zip(embedding);
        let _turn = match by_vector {
            Some((embedder, _)) => Some(embedder.searching().await),
            None => None,
        };
        let lexical = match stems.is_empty() {
            true => Vec::new(),
            false => search(&*self.vectors, &lexical::embed([stems.as_slice()]), &scopes).await?,
        };
        let dense = match by_vector {
            Some((embedder, embedding)) => search(&*embedder.vectors, embedding.vector(), &scopes).await?,
            None => Vec::new(),
        };
        let mut candidates: Vec<Candidate> = Vec::with_capacity(lexical.len() + dense.len());
        for hit in lexical {
            let cosine = Some(hit.score);
            candidates.push(Candidate::new(self.counted(hit)?, cosine, None));
        }
        for hit in dense {
            let dense = Some(hit.score);
            match candidates.iter_mut().find(|known| known.counted.passage.chunk == hit.id) {
                Some(known) => known.dense = dense,
                None => candidates.push(Candidate::new(self.counted(hit)?, None, dense)),
            }
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

async fn search(vectors: &dyn Vectors, vector: &[f32], scopes: &[&str]) -> Result<Vec<Hit>, Failure> {
    let hits = vectors.search(vector, scopes, PREFETCH).await;
    hits.map_err(|error| store_failure("vector store", error))
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
