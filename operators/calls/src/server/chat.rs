//! OpenAI's chat completions, as vLLM, SGLang, TGI, llama.cpp and the cloud serve them.

use super::api::{Vllm, Written, gave_up, malformed};
use crate::{Call, CallError};
use forebay_schemas::{Message, Sampling, Usage};
use serde::{Deserialize, Serialize};
use serde_json::Value;

#[derive(Serialize)]
pub(super) struct Request<'a> {
    model: &'a str,
    messages: &'a [Message],
    #[serde(flatten)]
    sampling: &'a Sampling,
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_salt: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority: Option<u8>,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

pub(super) fn request<'a>(call: &'a Call<'a>, model: &'a str, vllm: Vllm) -> Request<'a> {
    Request {
        model,
        messages: &call.messages,
        sampling: &call.sampling,
        stream: call.stream,
        stream_options: call.stream.then_some(StreamOptions { include_usage: true }),
        cache_salt: vllm.salt(call),
        priority: vllm.priority(call),
    }
}

#[derive(Deserialize)]
struct Completion {
    model: Option<String>,
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Tokens>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    message: Said,
    #[serde(default)]
    delta: Said,
    finish_reason: Option<String>,
}

#[derive(Default, Deserialize)]
struct Said {
    content: Option<String>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(default)]
struct Tokens {
    prompt_tokens: u64,
    completion_tokens: u64,
    prompt_tokens_details: Option<PromptDetails>,
    completion_tokens_details: Option<CompletionDetails>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(default)]
struct PromptDetails {
    cached_tokens: Option<u64>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(default)]
struct CompletionDetails {
    reasoning_tokens: Option<u64>,
}

impl From<Tokens> for Usage {
    fn from(tokens: Tokens) -> Self {
        Self {
            cached_tokens: tokens.prompt_tokens_details.and_then(|details| details.cached_tokens),
            reasoning_tokens: tokens.completion_tokens_details.and_then(|details| details.reasoning_tokens),
            ..Self::of(tokens.prompt_tokens, tokens.completion_tokens)
        }
    }
}

pub(super) fn whole(body: &[u8]) -> Result<Written, CallError> {
    let completion: Completion =
        serde_json::from_slice(body).map_err(|error| malformed("no chat completion").because(error))?;
    let mut written = Written {
        model: completion.model,
        usage: completion.usage.map(Usage::from),
        is_over: true,
        ..Written::default()
    };
    if let Some(choice) = completion.choices.into_iter().next() {
        written.text = choice.message.content.unwrap_or_default();
        written.finish_reason = choice.finish_reason;
    }
    Ok(written)
}

pub(super) fn take(event: Value, written: &mut Written) -> Result<Option<String>, CallError> {
    if event.get("error").is_some_and(|error| !error.is_null()) {
        return Err(gave_up());
    }
    let chunk =
        Completion::deserialize(event).map_err(|error| malformed("no chat completion").because(error))?;
    // The last chunk brings the usage and no choice.
    written.usage = chunk.usage.map(Usage::from).or(written.usage);
    written.model = written.model.take().or(chunk.model);
    let Some(choice) = chunk.choices.into_iter().next() else { return Ok(None) };
    written.finish_reason = choice.finish_reason.or(written.finish_reason.take());
    Ok(choice.delta.content)
}
