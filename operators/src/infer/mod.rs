//! Asks a model, and finds in the passages what its answer rests on.
//!
//! Invariant: a model that costs something is not called for what a ledger remembers, every try leaves a row, and work
//! stops when the client takes the request back or its deadline passes. An answer cites only what stands in a passage.

mod citations;
mod prompt;

use crate::{
    cache::Shape,
    catalogue::{Asks, Resources, Shipped},
    rows::{self, Rows},
    validate,
};
use forebay_calls::{
    Call, Model, Reply, Route, Task,
    tiers::{Judge, Verdict},
};
use forebay_operator::{Context, Failure, Operator, ports};
use forebay_schemas::{CacheStatus, Citation, Completion, Generated, Grounded, Hop, Request};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{num::NonZeroU64, sync::Arc};
use tokio::time::Instant;

/// What a model is told beside the question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Stands before everything that a served model reads; null for Forebay's own words.
    pub instructions: Option<String>,
    /// The most tokens that it may write where the request sets no limit.
    pub max_tokens: NonZeroU64,
}

impl Default for Settings {
    fn default() -> Self {
        const MAX_TOKENS: NonZeroU64 = NonZeroU64::new(1024).unwrap();
        Self { instructions: None, max_tokens: MAX_TOKENS }
    }
}

ports! {
    /// What `infer` gives.
    pub enum Inferred {
        /// The answer, not checked yet.
        Completion(Completion) = "completion",
    }
}

/// The operator `infer`.
pub struct Infer {
    model: Arc<dyn Model>,
    shape: Shape,
    settings: Settings,
}

impl Shipped for Infer {
    type Settings = Settings;

    fn asks(_: &Settings) -> Vec<Asks> {
        vec![Asks::Model]
    }

    fn new(settings: Settings, resources: &Resources) -> Self {
        Self { model: resources.model.clone(), shape: resources.shape.clone(), settings }
    }
}

impl Operator for Infer {
    const NAME: &'static str = "infer";
    const HOP: Option<Hop> = Some(Hop::Infer);
    type In = Grounded;
    type Out = Inferred;

    async fn process(&self, grounded: Grounded, cx: &Context) -> Result<Vec<Inferred>, Failure> {
        let answer = self.ask(&grounded, cx).await?;
        let Grounded { request, retrieval, passages } = grounded;
        let cache = self.cache_status(&request, cx);
        let completion = Completion { request, retrieval: Some(retrieval), passages, cache, answer };
        Ok(vec![Inferred::Completion(completion)])
    }
}

impl Infer {
    async fn ask(&self, grounded: &Grounded, cx: &Context) -> Result<Generated, Failure> {
        // What `validate` would hold back, and what it cannot know, as the marks are gone by then.
        let judge = |reply: &Reply| {
            let citations = cited(reply, grounded);
            match validate::findings(&reply.text, &citations, &grounded.passages).is_empty() {
                false => Verdict::Bad,
                true if citations::makes_up(&reply.text, &grounded.passages) => Verdict::Doubtful,
                true => Verdict::Good,
            }
        };
        let call = Call { judge: Judge(Some(&judge)), ..self.call(grounded, cx) };
        let replied = Rows::new(cx, &call).ask(&*self.model, &call).await?;
        replied.map(|reply| self.generated(reply, grounded)).map_err(|mut error| {
            let read = error.partial.take().map(|read| self.generated(*read, grounded));
            error.into_failure(format!("model {}", self.model.name())).with_partial(read)
        })
    }

    fn call<'a>(&self, Grounded { request, passages, .. }: &'a Grounded, cx: &Context) -> Call<'a> {
        let mut sampling = request.sampling.clone();
        if sampling.max_tokens.is_none() && sampling.max_completion_tokens.is_none() {
            sampling.max_tokens = Some(self.settings.max_tokens.get());
        }
        Call {
            task: Task::Answer,
            question: request.question(),
            messages: if self.model.reads_messages() {
                prompt::messages(request, passages, self.settings.instructions.as_deref())
            } else {
                Vec::new()
            },
            passages,
            model: request.model.clone(),
            sampling,
            stream: cx.envelope().stream,
            deadline: cx.remaining().map(|left| Instant::now() + left),
            tenant: cx.envelope().tenant.clone(),
            key_id: request.key_id.clone(),
            job: request.job.clone(),
            lane: cx.envelope().lane,
            metadata: request.metadata.as_ref(),
            route: Route::default(),
            ..Call::default()
        }
    }

    fn generated(&self, reply: Reply, grounded: &Grounded) -> Generated {
        let (tier, provider) =
            reply.answered.as_ref().map(|answered| (answered.tier.clone(), answered.provider)).unzip();
        let provider = provider.unwrap_or_else(|| self.model.provider()).to_owned();
        Generated {
            citations: cited(&reply, grounded),
            is_fallback: reply.fallback.is_some(),
            tier,
            text: reply.text,
            model: reply.model,
            provider: reply.fallback.unwrap_or(provider),
            usage: reply.usage,
            cost_nano_usd: reply.cost_nano_usd,
            finish_reason: reply.finish_reason,
            ttft_us: reply.ttft.map(rows::micros),
        }
    }

    /// A request that never passed a cache has no time there.
    fn cache_status(&self, request: &Request, cx: &Context) -> CacheStatus {
        match cx.envelope().timings.cache {
            Some(_) => self.shape.status_without_hit(request),
            None => CacheStatus::Bypass,
        }
    }
}

/// The quotations of an answer: its model's own, or those that are found for it.
fn cited(reply: &Reply, grounded: &Grounded) -> Vec<Citation> {
    let found = || citations::find(&reply.text, &grounded.passages);
    reply.citations.clone().unwrap_or_else(found)
}

#[cfg(test)]
mod tests;
