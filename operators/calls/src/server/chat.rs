//! OpenAI's chat completions, as vLLM, SGLang, TGI, llama.cpp and the cloud serve them.

use super::api::{Vllm, Written, gave_up, malformed};
use crate::{Call, CallError};
use forebay_schemas::{Message, Sampling, Usage};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The reason to stop where the provider or the model withheld the answer.
const REFUSED: &str = "content_filter";

#[derive(Serialize)]
pub(super) struct Request<'a> {
    model: &'a str,
    messages: &'a [Message],
    #[serde(flatten)]
    sampling: &'a Sampling,
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    logprobs: bool,
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
        logprobs: call.logprobs,
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
    logprobs: Option<Logprobs>,
}

#[derive(Deserialize)]
struct Logprobs {
    content: Option<Vec<TokenLogprob>>,
}

#[derive(Deserialize)]
struct TokenLogprob {
    logprob: f64,
}

impl Choice {
    /// Tells what its tokens say of their probability.
    fn tell(&mut self, written: &mut Written) {
        let tokens = self.logprobs.take().and_then(|logprobs| logprobs.content).unwrap_or_default();
        tokens.iter().for_each(|token| written.logprob.add(token.logprob));
    }
}

#[derive(Default, Deserialize)]
struct Said {
    content: Option<String>,
    refusal: Option<String>,
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

/// The reason to stop of a model that refuses in words of their own, as structured outputs do.
fn refused(refusal: Option<String>) -> Option<String> {
    refusal.filter(|refusal| !refusal.is_empty()).map(|_| REFUSED.to_owned())
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
    if let Some(mut choice) = completion.choices.into_iter().next() {
        choice.tell(&mut written);
        written.text = choice.message.content.unwrap_or_default();
        written.finish_reason = refused(choice.message.refusal).or(choice.finish_reason);
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
    let Some(mut choice) = chunk.choices.into_iter().next() else { return Ok(None) };
    choice.tell(written);
    let known = refused(choice.delta.refusal).or(written.finish_reason.take());
    // Of a refusal that is streamed the last chunk says no more than that it stopped.
    written.finish_reason = known.filter(|known| known == REFUSED).or(choice.finish_reason);
    Ok(choice.delta.content)
}
