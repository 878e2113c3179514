//! Keeps a validated answer, so that it can be given again.
//!
//! Invariant: what is kept was answered by the model that was to, and by no stand-in, from passages in the order that they were
//! to have; it passed validation, is whole, and neither its client nor its kind forbids it. The same ending gives the same entry: its time is that of the ending's record.

use crate::{
    cache::Shape,
    catalogue::{Resources, Shipped},
};
use forebay_operator::{Context, Failure, Operator, ports};
use forebay_schemas::{CacheEntry, CacheStatus, Ending, Generated, Kept, Request, Retrieval, Status};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `fill_cache` has none: which requests are cached is a setting of `cache_lookup`, for both.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {}

ports! {
    /// What `fill_cache` gives.
    pub enum Filled {
        /// What is to be kept.
        Entry(CacheEntry) = "entry",
    }
}

/// The operator `fill_cache`.
pub struct FillCache {
    shape: Shape,
}

impl Shipped for FillCache {
    type Settings = Settings;

    fn new(Settings {}: Settings, resources: &Resources) -> Self {
        Self { shape: resources.shape.clone() }
    }
}

impl Operator for FillCache {
    const NAME: &'static str = "fill_cache";
    type In = Ending;
    type Out = Filled;

    async fn process(&self, ending: Ending, cx: &Context) -> Result<Vec<Filled>, Failure> {
        let Ending { status: Status::Answered, request: Some(request), answer: Some(answer), .. } = ending
        else {
            return Ok(Vec::new());
        };
        // What came from the cache is in there; keeping it again would make it young for ever.
        if ending.cache == CacheStatus::Hit || !self.is_kept(&request, &answer) {
            return Ok(Vec::new());
        }
        if ending.retrieval.as_ref().is_some_and(Retrieval::is_degraded) {
            return Ok(Vec::new());
        }
        let key = self.shape.key(&request, &cx.envelope().tenant);
        let (retrieval, chunks, made_at_ms) = (ending.retrieval, ending.chunks, cx.recorded_at_ms());
        let content = Some(Kept { answer, retrieval, chunks, made_at_ms });
        Ok(vec![Filled::Entry(CacheEntry { key, content })])
    }
}

impl FillCache {
    /// A request with `no_cache` wants a fresh answer, and the next one may have it.
    fn is_kept(&self, request: &Request, answer: &Generated) -> bool {
        let is_whole = !matches!(answer.finish_reason.as_deref(), Some("length" | "content_filter"));
        is_whole
            && !answer.is_fallback
            && self.shape.is_cacheable(request)
            && !request.cache.unwrap_or_default().no_store
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;
    use forebay_operator::{Clock, compliance};
    use forebay_schemas::{CacheControl, Embed, Embedding, Record as _, Rerank};

    fn cx() -> Context {
        Context::quiet(compliance::envelope(), Clock::starting_at(compliance::NOW_MS))
    }

    async fn check(change: impl FnOnce(&mut Ending), kept: bool) {
        let mut ending = samples::ending();
        change(&mut ending);
        let filled = FillCache { shape: Shape::default() }.process(ending, &cx()).await.unwrap();
        assert_eq!(filled.len(), usize::from(kept));
    }

    fn control(change: impl FnOnce(&mut CacheControl)) -> impl FnOnce(&mut Ending) {
        let mut control = CacheControl::default();
        change(&mut control);
        move |ending| ending.request.as_mut().unwrap().cache = Some(control)
    }

    fn reranked(scored: Option<&'static str>) -> impl FnOnce(&mut Ending) {
        let scored = scored.map(str::to_owned);
        move |ending| {
            ending.retrieval.as_mut().unwrap().rerank = Some(Rerank { candidates: 8, scored });
        }
    }

    fn embedded(question: Option<Embedding>) -> impl FnOnce(&mut Ending) {
        move |ending| ending.retrieval.as_mut().unwrap().embed = Some(Embed { question })
    }

    #[tokio::test]
    async fn only_a_whole_validated_answer_of_a_model_is_kept() {
        check(|_| {}, true).await;
        check(control(|cache| cache.no_cache = true), true).await;
        check(control(|cache| cache.no_store = true), false).await;
        check(|ending| ending.cache = CacheStatus::Hit, false).await;
        check(|ending| ending.status = Status::Blocked, false).await;
        check(|ending| ending.answer = None, false).await;
        check(reranked(Some("of these")), true).await;
        check(reranked(None), false).await;
        check(embedded(Embedding::new("m", vec![1.0])), true).await;
        check(embedded(None), false).await;
        check(|ending| ending.answer.as_mut().unwrap().is_fallback = true, false).await;
        check(|ending| ending.answer.as_mut().unwrap().finish_reason = Some("length".to_owned()), false)
            .await;
        check(|ending| ending.request.as_mut().unwrap().sampling.temperature = Some(1.0), false).await;
    }

    #[tokio::test]
    async fn it_complies() {
        let sample = samples::ending().encode().unwrap().unwrap();
        compliance::assert_complies(FillCache { shape: Shape::default() }, vec![sample]).await;
    }
}
