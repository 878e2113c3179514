//! The JSON of the OpenAI chat API, as far as Forebay speaks it.

use super::malformed;
use crate::{Call, CallError, Class, Reply};
use forebay_schemas::{Message, Sampling, Usage};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::time::Duration;

#[derive(Serialize)]
pub(super) struct Request<'a> {
    model: &'a str,
    messages: &'a [Message],
    #[serde(flatten)]
    sampling: &'a Sampling,
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

pub(super) fn request<'a>(call: &'a Call<'a>, model: &'a str) -> Request<'a> {
    Request {
        model,
        messages: &call.messages,
        sampling: &call.sampling,
        stream: call.stream,
        stream_options: call.stream.then_some(StreamOptions { include_usage: true }),
    }
}

#[derive(Deserialize)]
pub(super) struct Completion {
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

#[derive(Clone, Copy, Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Tokens {
    prompt_tokens: u64,
    completion_tokens: u64,
}

impl From<Tokens> for Usage {
    fn from(Tokens { prompt_tokens, completion_tokens }: Tokens) -> Self {
        let total_tokens = prompt_tokens.saturating_add(completion_tokens);
        Self { prompt_tokens, completion_tokens, total_tokens }
    }
}

impl Completion {
    pub(super) fn read(body: &[u8]) -> Result<Self, CallError> {
        serde_json::from_slice(body).map_err(|error| malformed("no chat completion").because(error))
    }

    pub(super) fn into_reply(self, asked: &str) -> Result<Reply, CallError> {
        let mut written = Written { model: self.model, usage: self.usage, ..Written::default() };
        if let Some(choice) = self.choices.into_iter().next() {
            written.text = choice.message.content.unwrap_or_default();
            written.finish_reason = choice.finish_reason;
        }
        written.into_reply(asked, None)
    }
}

/// What has been written so far.
#[derive(Default)]
pub(super) struct Written {
    text: String,
    model: Option<String>,
    usage: Option<Tokens>,
    finish_reason: Option<String>,
}

impl Written {
    /// Takes the data of an event in, and gives the text in it where there is some.
    pub(super) fn take(&mut self, data: &str) -> Result<Option<String>, CallError> {
        let value: Value =
            serde_json::from_str(data).map_err(|error| malformed("no chat completion").because(error))?;
        if value.get("error").is_some_and(|error| !error.is_null()) {
            return Err(CallError::new(
                Class::Transient,
                "model_unavailable",
                "the server gave up in mid-stream",
            ));
        }
        let chunk =
            Completion::deserialize(value).map_err(|error| malformed("no chat completion").because(error))?;
        // The last chunk brings the usage and no choice.
        self.usage = chunk.usage.or(self.usage);
        self.model = self.model.take().or(chunk.model);
        let Some(choice) = chunk.choices.into_iter().next() else { return Ok(None) };
        self.finish_reason = choice.finish_reason.or(self.finish_reason.take());
        let text = choice.delta.content.filter(|text| !text.is_empty());
        self.text.push_str(text.as_deref().unwrap_or_default());
        Ok(text)
    }

    /// Whether the model said that it stopped: then a missing `[DONE]` is forgiven.
    pub(super) fn is_whole(&self) -> bool {
        self.finish_reason.is_some()
    }

    pub(super) fn into_reply(self, asked: &str, ttft: Option<Duration>) -> Result<Reply, CallError> {
        if self.text.trim().is_empty() {
            return Err(self.silence());
        }
        Ok(Reply {
            text: self.text,
            citations: None,
            model: self.model.unwrap_or_else(|| asked.to_owned()),
            usage: self.usage.map(Usage::from),
            cost_nano_usd: None,
            finish_reason: self.finish_reason,
            ttft,
            fallback: None,
        })
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
