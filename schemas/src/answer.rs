//! What the client reads on `results`.

use crate::{
    CacheStatus, Citation, Fault, NanoUsd, Origin, Record, RequestId, Tenant, Usage, record::json_wire,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// There is an answer, and it passed validation.
    Answered,
    /// It could not be answered; `error` says why.
    Failed,
    /// Its deadline passed first.
    Expired,
    /// Its client took it back.
    Cancelled,
    /// There was an answer, and validation held it back.
    Blocked,
}

impl Status {
    /// The word of the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Failed => "failed",
            Self::Expired => "expired",
            Self::Cancelled => "cancelled",
            Self::Blocked => "blocked",
        }
    }
}

/// Where the time went, in microseconds; null where a request did not pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TimingsUs {
    /// Waiting on topics, summed over all hops up to the ending.
    pub queue: Option<i64>,
    /// Looking in the cache.
    pub cache: Option<i64>,
    /// Looking for passages.
    pub retrieve: Option<i64>,
    /// Inference, its retries included.
    pub infer: Option<i64>,
    /// To the first token; only where the answer was streamed.
    pub ttft: Option<i64>,
    /// Checking the answer.
    pub validate: Option<i64>,
    /// From the request's record timestamp to the record timestamp of its ending; whole milliseconds.
    pub total: Option<i64>,
}

/// The record of `results`; its key is `id`. Every field is always present, null where there is nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Answer {
    /// The client's id, or the derived one.
    pub id: RequestId,
    /// Whose request it was.
    pub tenant: Tenant,
    /// How it ended.
    pub status: Status,
    /// The answer; where it broke off while somebody read it (`model_cut`), what was read.
    pub text: Option<String>,
    /// The quotations that it rests on; half-open byte offsets into the stored version.
    pub citations: Vec<Citation>,
    /// Whether it came from the cache.
    pub cache: CacheStatus,
    /// The model that answered.
    pub model: Option<String>,
    /// Tokens that the answer took when it was made.
    pub usage: Option<Usage>,
    /// What this request cost: null where the model has no price, 0 for a cache hit or the extractive model.
    pub cost_nano_usd: Option<NanoUsd>,
    /// Why there is no answer.
    pub error: Option<Fault>,
    /// The record that asked.
    pub origin: Option<Origin>,
    /// The request's own, echoed.
    pub metadata: Option<Value>,
    /// Where the time went.
    pub timings_us: TimingsUs,
    /// 0 at first; a redriven request has a higher one.
    pub generation: u32,
}

impl Record for Answer {
    const NAME: &'static str = "Answer";
    json_wire!();
    fn key(&self) -> Option<&str> {
        Some(self.id.as_str())
    }
}
