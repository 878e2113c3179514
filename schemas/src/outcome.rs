//! What each request cost, took and came to: the table that SQL reads.

use crate::row::row;

row! {
    /// One immutable row a request, written by `publish` after the result.
    Outcome, request_id;
    /// The request's id.
    request_id: String,
    /// Whose request it was.
    tenant: String,
    /// Counts redrives that asked for a new answer.
    generation: i32 ["redrives"],
    /// W3C trace id; null where nobody traced.
    trace_id: Option<String>,
    /// The conversation that it belongs to.
    conversation: Option<String>,
    /// `interactive` or `backfill`.
    lane: String,
    /// The day of `ended_at` in UTC, as 2026-11-24.
    date: String,
    /// When the request was written to its topic.
    accepted_at: i64 ["µs since 1970"],
    /// When it ended.
    ended_at: i64 ["µs since 1970"],
    /// The topic of the record that asked.
    origin_topic: String,
    /// Its partition.
    origin_partition: i32,
    /// Its offset.
    origin_offset: i64,
    /// The model that the request wanted; null where it left that open.
    model_requested: Option<String>,
    /// The model that answered.
    model_served: Option<String>,
    /// Who served it.
    provider: Option<String>,
    /// Tokens read by the model, those from its prefix cache included.
    input_tokens: Option<i64> ["tokens"],
    /// Of these, tokens from the provider's prefix cache.
    cached_read_tokens: Option<i64> ["tokens"],
    /// Of these, tokens written to the provider's prefix cache.
    cached_write_tokens: Option<i64> ["tokens"],
    /// Tokens written by the model.
    output_tokens: Option<i64> ["tokens"],
    /// Of these, tokens of reasoning.
    reasoning_tokens: Option<i64> ["tokens"],
    /// What this request cost; null where the model has no price.
    billed_nano_usd: Option<i64> ["nano-USD"],
    /// What the answer would have cost without any cache.
    list_nano_usd: Option<i64> ["nano-USD"],
    /// What the answer cache saved.
    saved_by_cache_nano_usd: Option<i64> ["nano-USD"],
    /// Time of a GPU; null where nobody counts it.
    gpu_us: Option<i64> ["µs"],
    /// Waiting on topics, over all hops up to the ending.
    queue_us: i64 ["µs"],
    /// Looking in the cache.
    cache_us: Option<i64> ["µs"],
    /// Looking for passages.
    retrieve_us: Option<i64> ["µs"],
    /// Inference, its retries included.
    infer_us: Option<i64> ["µs"],
    /// Checking the answer.
    validate_us: Option<i64> ["µs"],
    /// Time to first token; null unless streamed.
    ttft_us: Option<i64> ["µs"],
    /// From accepted to ended.
    total_us: i64 ["µs"],
    /// answered, failed, expired, cancelled or blocked.
    status: String,
    /// The step that ended it.
    stage: String,
    /// Why the model stopped, in the provider's word.
    finish_reason: Option<String>,
    /// hit, miss or bypass.
    cache_status: String,
    /// pass, annotate or block; null where nothing was checked.
    verdict: Option<String>,
    /// The codes of what validation found, joined by commas; empty on a clean pass.
    findings: Option<String>,
    /// The code of the error; null where there is none.
    error_code: Option<String>,
    /// Upstream calls made for this request.
    attempts: i32 ["calls"],
    /// Passages that the model saw.
    passages: i32 ["passages"],
    /// Quotations in the answer.
    citations: i32 ["citations"],
    /// A hash of the question, to count distinct ones.
    prompt_hash: Option<String>,
    /// The request's metadata as JSON.
    metadata: Option<String>,
    /// The tier that answered, by the name of its model; null where there are no tiers, or another model stood in.
    tier: Option<String>,
    /// The id of the API key by which was asked; null where the request names none.
    key_id: Option<String>,
    /// The job that the request belongs to, of its tenant's; null where it names none.
    job: Option<String>,
}
