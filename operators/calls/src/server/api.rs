//! The APIs that servers speak, each in a file of its own, and what they have in common.
//!
//! Invariant: whatever API answered, a reply says the same in the same words. Tokens of the prompt include those from a cache
//! (as OpenAI counts, and Anthropic does not), and the reason to stop is OpenAI's word for it, as other steps act on it.

use super::{chat, embeddings, messages, rerank, responses};
use crate::{Call, CallError, Class, Reply, Secret, Task};
use forebay_schemas::{Message, Usage};
use reqwest::RequestBuilder;
use serde_json::Value;
use std::time::Duration;

/// The version of Anthropic's API whose form is written here.
const ANTHROPIC_VERSION: &str = "2023-06-01";

/// An API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Api {
    /// OpenAI's chat completions, which most servers speak.
    #[default]
    Chat,
    /// OpenAI's responses.
    Responses,
    /// Anthropic's messages.
    Messages,
    /// OpenAI's embeddings.
    Embeddings,
    /// Rerank as Cohere, Jina and vLLM have it.
    Rerank,
    /// Rerank as text-embeddings-inference (TEI) has it: beside `/v1`, not below.
    RerankTei,
}

/// What vLLM takes beyond OpenAI's API. Others refuse fields that they do not know, so both are off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vllm {
    /// Each tenant has prefixes of its own in the cache, so none can tell by the time what another asked.
    pub cache_salt: bool,
    /// Who waits goes before the backfill. The server must schedule by priority, or it refuses the field.
    pub priority: bool,
}

impl Vllm {
    /// A name for the tenant that does not tell it.
    pub(super) fn salt(self, call: &Call<'_>) -> Option<String> {
        let salt = || blake3::derive_key("forebay cache salt v1", call.tenant.as_str().as_bytes());
        self.cache_salt.then(|| blake3::Hash::from_bytes(salt()).to_hex()[..32].to_owned())
    }

    /// vLLM serves the lowest first.
    pub(super) fn priority(self, call: &Call<'_>) -> Option<u8> {
        self.priority.then_some(match call.lane {
            forebay_schemas::Lane::Interactive => 0,
            forebay_schemas::Lane::Backfill => 1,
        })
    }
}

impl Api {
    /// The kind of provider, as rows and metrics name it.
    pub(super) fn provider(self) -> &'static str {
        match self {
            Self::Messages => "anthropic",
            Self::Chat | Self::Responses | Self::Embeddings | Self::Rerank | Self::RerankTei => {
                "openai_compatible"
            }
        }
    }

    /// Where it is below a base URL whose path ends in `/v1`.
    pub(super) fn path(self, base: &str) -> String {
        match self {
            Self::Chat => format!("{base}/chat/completions"),
            Self::Responses => format!("{base}/responses"),
            Self::Messages => format!("{base}/messages"),
            Self::Embeddings => format!("{base}/embeddings"),
            Self::Rerank => format!("{base}/rerank"),
            Self::RerankTei => format!("{}/rerank", base.trim_end_matches("/v1")),
        }
    }

    /// What shows whether it answers at all.
    pub(super) fn probe(self) -> Task<'static> {
        match self {
            Self::Chat | Self::Responses | Self::Messages => Task::Answer,
            Self::Embeddings => Task::Embed(&["yes"]),
            Self::Rerank | Self::RerankTei => Task::Rank { query: "yes", documents: &["yes"] },
        }
    }

    /// The headers that this API wants of everybody, and the key where there is one.
    pub(super) fn headers(self, request: RequestBuilder, key: Option<&Secret>) -> RequestBuilder {
        match (self, key) {
            (Self::Messages, key) => {
                let request = request.header("anthropic-version", ANTHROPIC_VERSION);
                key.iter().fold(request, |request, key| request.header("x-api-key", key.header()))
            }
            (_, Some(key)) => request.bearer_auth(key.expose()),
            (_, None) => request,
        }
    }

    /// A call as this API reads it.
    pub(super) fn body(self, call: &Call<'_>, model: &str, vllm: Vllm) -> Result<Vec<u8>, CallError> {
        let written = match (self, call.task) {
            (Self::Chat, Task::Answer) => serde_json::to_vec(&chat::request(call, model, vllm)),
            (Self::Responses, Task::Answer) => serde_json::to_vec(&responses::request(call, model, vllm)?),
            (Self::Messages, Task::Answer) => serde_json::to_vec(&messages::request(call, model)?),
            (Self::Embeddings, Task::Embed(texts)) => serde_json::to_vec(&embeddings::request(texts, model)),
            (Self::Rerank, Task::Rank { query, documents }) => {
                serde_json::to_vec(&rerank::cohere(query, documents, model))
            }
            (Self::RerankTei, Task::Rank { query, documents }) => {
                serde_json::to_vec(&rerank::tei(query, documents))
            }
            (_, Task::Answer) => return Err(rejected("this server writes no answers")),
            (_, Task::Embed(_)) => return Err(rejected("this server embeds nothing")),
            (_, Task::Rank { .. }) => return Err(rejected("this server ranks nothing")),
        };
        written.map_err(|error| rejected("the request has no JSON form").because(error))
    }

    /// Whether an answer comes as events where the call streams.
    pub(super) fn streams(self) -> bool {
        matches!(self, Self::Chat | Self::Responses | Self::Messages)
    }

    /// An answer in one piece.
    pub(super) fn whole(self, body: &[u8], call: &Call<'_>) -> Result<Written, CallError> {
        match self {
            Self::Chat => chat::whole(body),
            Self::Responses => responses::whole(body),
            Self::Messages => messages::whole(body),
            Self::Embeddings => embeddings::whole(body, call),
            Self::Rerank | Self::RerankTei => rerank::whole(body, call),
        }
    }

    /// Takes the data of an event in, and gives the text in it where there is some.
    pub(super) fn take(self, data: &str, written: &mut Written) -> Result<Option<String>, CallError> {
        let event: Value = serde_json::from_str(data).map_err(|error| malformed("no JSON").because(error))?;
        let text = match self {
            Self::Responses => responses::take(event, written),
            Self::Messages => messages::take(event, written),
            _ => chat::take(event, written),
        }?;
        let text = text.filter(|text| !text.is_empty());
        written.text.push_str(text.as_deref().unwrap_or_default());
        Ok(text)
    }
}

/// What has been written so far.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) text: String,
    pub(super) vectors: Vec<Vec<f32>>,
    pub(super) model: Option<String>,
    pub(super) usage: Option<Usage>,
    pub(super) finish_reason: Option<String>,
    pub(super) logprob: Logprob,
    /// No event follows that matters.
    pub(super) is_over: bool,
}

/// What the tokens that came say of their probability.
#[derive(Debug, Default)]
pub(super) struct Logprob {
    sum: f64,
    tokens: u32,
}

impl Logprob {
    pub(super) fn add(&mut self, logprob: f64) {
        self.sum += logprob;
        self.tokens = self.tokens.saturating_add(1);
    }

    fn mean(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.sum / f64::from(self.tokens))
    }
}

impl Written {
    /// Whether the model said that it stopped: then a missing end of the stream is forgiven.
    pub(super) fn is_whole(&self) -> bool {
        self.is_over || self.finish_reason.is_some()
    }

    pub(super) fn into_reply(self, asked: &str, ttft: Option<Duration>) -> Result<Reply, CallError> {
        match self.text.trim().is_empty() && self.vectors.is_empty() {
            true => Err(self.silence()),
            false => Ok(self.reply(asked, ttft)),
        }
    }

    /// What is there, whether or not it is an answer.
    pub(super) fn reply(self, asked: &str, ttft: Option<Duration>) -> Reply {
        Reply {
            text: self.text,
            vectors: self.vectors,
            citations: None,
            model: self.model.unwrap_or_else(|| asked.to_owned()),
            usage: self.usage,
            cost_nano_usd: None,
            finish_reason: self.finish_reason,
            ttft,
            fallback: None,
            logprob: self.logprob.mean(),
            ..Reply::default()
        }
    }

    /// Why a 200 has no text.
    fn silence(&self) -> CallError {
        let rejected = |code, message| CallError::new(Class::Rejected, code, message);
        match self.finish_reason.as_deref() {
            Some("tool_calls" | "function_call") => {
                rejected("model_tool_calls", "the model called a tool, and no step here runs tools")
            }
            Some("content_filter") => rejected("model_refused", "the provider's filter withheld the answer"),
            _ => CallError::new(Class::Transient, "model_empty", "the answer is empty"),
        }
        .with_status(200)
    }
}

/// What a request asks for that an API cannot do. Left out in silence, its answer would not be what was asked for.
pub(super) fn refuse_unspoken(call: &Call<'_>) -> Result<(), CallError> {
    if call.sampling.tools.is_some() || call.sampling.tool_choice.is_some() {
        return Err(rejected("the request brings tools, which this server's API takes in another form"));
    }
    let calls_tools = |message: &Message| {
        message.role == forebay_schemas::Role::Tool || message.rest.contains_key("tool_calls")
    };
    if call.messages.iter().any(calls_tools) {
        return Err(rejected("the conversation calls tools, which this server's API takes in another form"));
    }
    Ok(())
}

pub(super) fn rejected(message: impl Into<String>) -> CallError {
    CallError::new(Class::Rejected, "model_rejected", message)
}

pub(super) fn malformed(what: &str) -> CallError {
    CallError::new(Class::Transient, "model_malformed", format!("the response is {what}"))
}

/// A server that says in the middle of its stream that it goes no further.
pub(super) fn gave_up() -> CallError {
    CallError::new(Class::Transient, "model_unavailable", "the server gave up in mid-stream")
}

/// The URL of a part that is an image in OpenAI's form.
pub(super) fn image_url(part: &Value) -> Option<&str> {
    part.pointer("/image_url/url")?.as_str()
}
