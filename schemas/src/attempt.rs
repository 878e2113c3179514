//! Every upstream call, also those that failed: what they cost must not be lost.

use crate::row::row;

row! {
    /// One immutable row an upstream call, durable before the offset of the record that made it.
    Attempt, attempt_id;
    /// The call's id and the number of the attempt: `call/attempt`.
    attempt_id: String,
    /// Which call of which step of which request: the same over retries.
    call_id: String,
    /// The request's id.
    request_id: String,
    /// Whose request it was.
    tenant: String,
    /// Counts redrives of the request.
    generation: i32 ["redrives"],
    /// The step that called.
    stage: String,
    /// Counts from 0 within the call.
    attempt: i32,
    /// When the call was sent.
    started_at: i64 ["µs since 1970"],
    /// Until it was answered or given up.
    duration_us: i64 ["µs"],
    /// Time to first token; null unless streamed.
    ttft_us: Option<i64> ["µs"],
    /// The kind of provider.
    provider: String,
    /// Scheme, host and port that were called; null for a model in process.
    endpoint: Option<String>,
    /// The model that was asked for.
    model: Option<String>,
    /// ok, failed, rejected, cancelled, hedge_lost or ambiguous.
    status: String,
    /// The code of the error; null where there is none.
    error_code: Option<String>,
    /// The HTTP status; null where there was none.
    http_status: Option<i32>,
    /// Tokens read by the model, those from its prefix cache included.
    input_tokens: Option<i64> ["tokens"],
    /// Tokens written by the model.
    output_tokens: Option<i64> ["tokens"],
    /// What the call cost; null where it is not known.
    cost_nano_usd: Option<i64> ["nano-USD"],
    /// The tier that was asked, by the name of its model; null where there are no tiers.
    tier: Option<String>,
    /// Of the input, tokens from the provider's prefix cache; null where it does not say.
    cached_read_tokens: Option<i64> ["tokens"],
    /// Of the input, tokens written to the provider's prefix cache; null where it does not say.
    cached_write_tokens: Option<i64> ["tokens"],
    /// Of the output, tokens of reasoning; null where the provider does not say.
    reasoning_tokens: Option<i64> ["tokens"],
    /// The id of the API key by which was asked; null where the request names none.
    key_id: Option<String>,
    /// The job that the request belongs to, of its tenant's; null where it names none.
    job: Option<String>,
    /// What was asked for: `chat`, `embeddings` or `rerank`, as OpenTelemetry's `gen_ai.operation.name` has it; null in rows of before it
    /// was noted.
    operation: Option<String>,
}
