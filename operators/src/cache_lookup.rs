//! Answers a request from the cache, or hands it on.
//!
//! A candidate is an answer only while retrieval, run again as it was run then, gives the same chunks in the same order:
//! no answer outlives the document that it rests on. Neither embedder nor reranker is asked for that.
//!
//! Invariant: the cache fails open. Whatever is wrong with a store, the request goes on as a miss, in bounded time.

use crate::{
    cache::{Shape, TEMPERATURE_MAX, entry_key},
    catalogue::{Resources, Shipped},
    retrieve::Retriever,
    store_failure::store_failure,
};
use forebay_operator::{Context, Event, Failure, Operator, ports};
use forebay_schemas::{
    CacheEntry, CacheStatus, Chunks, Completion, Hop, Kept, Passage, Record as _, Request,
};
use forebay_stores::KeyValue;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{num::NonZeroU64, sync::Arc, time::Duration};

/// When the cache answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Seconds for which an answer may be given again, counted from when it was made.
    pub ttl_s: NonZeroU64,
    /// Requests of a higher temperature are neither answered from the cache nor kept; 0 to 2.
    pub temperature_max: f64,
    /// Milliseconds after which looking is given up and the request goes on as a miss.
    pub timeout_ms: NonZeroU64,
}

impl Default for Settings {
    fn default() -> Self {
        const TTL_S: NonZeroU64 = NonZeroU64::new(7 * 24 * 3600).unwrap();
        const TIMEOUT_MS: NonZeroU64 = NonZeroU64::new(1000).unwrap();
        Self { ttl_s: TTL_S, temperature_max: TEMPERATURE_MAX, timeout_ms: TIMEOUT_MS }
    }
}

ports! {
    /// What `cache_lookup` gives.
    pub enum Looked {
        /// The answer was there.
        Hit(Completion) = "hit",
        /// It was not, or was not looked for.
        Miss(Request) = "miss",
    }
}

/// The operator `cache_lookup`.
pub struct CacheLookup {
    cache: Arc<dyn KeyValue>,
    retriever: Retriever,
    shape: Shape,
    settings: Settings,
}

impl Shipped for CacheLookup {
    type Settings = Settings;
    const TABLES: &'static [&'static str] = &[CacheEntry::NAME, Chunks::NAME];

    fn fault(settings: &Settings) -> Option<(&'static str, String)> {
        let temperature = settings.temperature_max;
        (!(0.0..=2.0).contains(&temperature))
            .then(|| ("temperature_max", format!("{temperature} is not 0 to 2")))
    }

    fn new(settings: Settings, resources: &Resources) -> Self {
        let shape = Shape { temperature_max: settings.temperature_max, ..resources.shape.clone() };
        let retriever = Retriever::new(resources);
        Self { cache: resources.cache.clone(), retriever, shape, settings }
    }
}

impl Operator for CacheLookup {
    const NAME: &'static str = "cache_lookup";
    const HOP: Option<Hop> = Some(Hop::Cache);
    type In = Request;
    type Out = Looked;

    async fn process(&self, request: Request, cx: &Context) -> Result<Vec<Looked>, Failure> {
        if !self.shape.is_looked_up(&request) {
            cx.observe(&Event::CacheLookedUp { status: "bypass" });
            return Ok(vec![Looked::Miss(request)]);
        }
        let timeout = Duration::from_millis(self.settings.timeout_ms.get());
        let looked = tokio::select! {
            biased;
            stop = cx.cancelled() => return Err(stop.into()),
            looked = tokio::time::timeout(timeout, self.look(&request, cx)) => looked,
        };
        let (status, found) = match looked {
            Ok(Ok(Some(found))) => ("hit", Some(found)),
            Ok(Ok(None)) => ("miss", None),
            Ok(Err(failure)) => {
                tracing::warn!(
                    error = &failure as &dyn std::error::Error,
                    "cache lookup failed; taken for a miss"
                );
                ("unavailable", None)
            }
            Err(_) => {
                tracing::warn!(
                    timeout_ms = self.settings.timeout_ms,
                    "cache lookup timed out; taken for a miss"
                );
                ("unavailable", None)
            }
        };
        cx.observe(&Event::CacheLookedUp { status });
        let Some((kept, passages)) = found else { return Ok(vec![Looked::Miss(request)]) };
        Ok(vec![Looked::Hit(hit(request, kept, passages, cx))])
    }
}

impl CacheLookup {
    /// The answer that may be given again, with the passages that it was made from.
    async fn look(&self, request: &Request, cx: &Context) -> Result<Option<(Kept, Vec<Passage>)>, Failure> {
        let tenant = &cx.envelope().tenant;
        let key = entry_key(&self.shape.key(request, tenant));
        let failed = |error| store_failure("cache", error);
        let Some(value) = self.cache.get(&key).await.map_err(failed)? else { return Ok(None) };
        // An entry of another version is no answer, and no reason to stop either.
        let Some(kept) = CacheEntry::decode(&value).ok().and_then(|entry| entry.content) else {
            return Ok(None);
        };
        let age_ms = u64::try_from(cx.now_ms().saturating_sub(kept.made_at_ms)).unwrap_or(0);
        if age_ms > self.settings.ttl_s.get().saturating_mul(1000) {
            // This very entry and no younger one, which may have come meanwhile.
            self.cache.delete_if(&key, &value).await.map_err(failed)?;
            return Ok(None);
        }
        let max_age_s = request.cache.unwrap_or_default().max_age_s;
        if max_age_s.is_some_and(|max_age_s| age_ms > max_age_s.saturating_mul(1000)) {
            return Ok(None);
        }
        let passages = match &kept.retrieval {
            Some(retrieval) => {
                self.retriever.seek_again(&request.question(), tenant, retrieval, &kept.chunks).await?
            }
            None => kept.chunks.is_empty().then(Vec::new),
        };
        Ok(passages.map(|passages| (kept, passages)))
    }
}

fn hit(request: Request, kept: Kept, passages: Vec<Passage>, cx: &Context) -> Completion {
    let mut answer = kept.answer;
    // It tells how soon somebody saw the first token, and nobody waited for that one.
    answer.ttft_us = None;
    cx.delta(cx.envelope().attempts, &answer.text);
    Completion { request, retrieval: kept.retrieval, passages, cache: CacheStatus::Hit, answer }
}

#[cfg(test)]
mod tests;
