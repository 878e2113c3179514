//! OpenAI's responses.
//!
//! Invariant: the provider is told to keep nothing. What the API cannot do is refused, but for `seed` and the penalties, which
//! are only wishes.

use super::api::{Vllm, Written, gave_up, image_url, malformed, refuse_unspoken, rejected};
use crate::{Call, CallError, Class};
use forebay_schemas::{Content, Message, Role, Usage};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

#[derive(Serialize)]
pub(super) struct Request<'a> {
    model: &'a str,
    input: Vec<Value>,
    max_output_tokens: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<Value>,
    stream: bool,
    /// Kept for thirty days unless refused.
    store: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_salt: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority: Option<u8>,
}

pub(super) fn request<'a>(call: &'a Call<'_>, model: &'a str, vllm: Vllm) -> Result<Request<'a>, CallError> {
    refuse_unspoken(call)?;
    let sampling = &call.sampling;
    if sampling.stop.is_some() {
        return Err(rejected("the request says where to stop, which this server's API cannot be told"));
    }
    Ok(Request {
        model,
        input: call.messages.iter().map(turn).collect::<Result<_, _>>()?,
        max_output_tokens: call.answer_tokens_max(),
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        text: sampling.response_format.as_ref().map(|form| json!({"format": format(form)})),
        stream: call.stream,
        store: false,
        cache_salt: vllm.salt(call),
        priority: vllm.priority(call),
    })
}

/// Chat completions have a schema one level deeper.
fn format(form: &Value) -> Value {
    let Some(Value::Object(schema)) = form.get("json_schema") else { return form.clone() };
    let mut flat = schema.clone();
    flat.insert("type".to_owned(), json!("json_schema"));
    Value::Object(flat)
}

fn turn(message: &Message) -> Result<Value, CallError> {
    let kind = if message.role == Role::Assistant { "output_text" } else { "input_text" };
    let part = |part: &Value| {
        if let Some(text) = part.get("text").and_then(Value::as_str) {
            return Ok(json!({"type": kind, "text": text}));
        }
        let Some(url) = image_url(part) else {
            return Err(rejected("the conversation has a part that is neither a text nor an image"));
        };
        Ok(json!({"type": "input_image", "image_url": url}))
    };
    let content = match &message.content {
        None => json!(""),
        Some(Content::Text(text)) => json!(text),
        Some(Content::Parts(parts)) => Value::from(parts.iter().map(part).collect::<Result<Vec<_>, _>>()?),
    };
    Ok(json!({"role": message.role, "content": content}))
}

#[derive(Deserialize)]
struct Response {
    model: Option<String>,
    #[serde(default)]
    status: String,
    error: Option<Fault>,
    incomplete_details: Option<Incomplete>,
    #[serde(default)]
    output: Vec<Item>,
    usage: Option<Tokens>,
}

#[derive(Default, Deserialize)]
struct Fault {
    #[serde(default)]
    code: Option<String>,
}

#[derive(Deserialize)]
struct Incomplete {
    reason: Option<String>,
}

#[derive(Deserialize)]
struct Item {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    content: Option<Vec<Part>>,
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type", default)]
    kind: String,
    text: Option<String>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(default)]
struct Tokens {
    input_tokens: u64,
    output_tokens: u64,
    input_tokens_details: Option<Cached>,
    output_tokens_details: Option<Reasoned>,
}

#[derive(Clone, Copy, Deserialize)]
struct Cached {
    cached_tokens: Option<u64>,
}

#[derive(Clone, Copy, Deserialize)]
struct Reasoned {
    reasoning_tokens: Option<u64>,
}

impl From<Tokens> for Usage {
    fn from(tokens: Tokens) -> Self {
        Self {
            cached_tokens: tokens.input_tokens_details.and_then(|details| details.cached_tokens),
            reasoning_tokens: tokens.output_tokens_details.and_then(|details| details.reasoning_tokens),
            ..Self::of(tokens.input_tokens, tokens.output_tokens)
        }
    }
}

impl Response {
    fn finish_reason(&self) -> Option<String> {
        let is = |item: &Item, kind: &str, part: &str| {
            item.kind == kind
                && (part.is_empty() || item.content.iter().flatten().any(|inside| inside.kind == part))
        };
        let incomplete = self.incomplete_details.as_ref().and_then(|details| details.reason.as_deref());
        Some(match (self.status.as_str(), incomplete) {
            (_, Some("max_output_tokens")) => "length".to_owned(),
            (_, Some(reason)) => reason.to_owned(),
            _ if self.output.iter().any(|item| is(item, "function_call", "")) => "tool_calls".to_owned(),
            _ if self.output.iter().any(|item| is(item, "message", "refusal")) => "content_filter".to_owned(),
            ("completed", None) => "stop".to_owned(),
            ("incomplete", None) => "length".to_owned(),
            _ => return None,
        })
    }

    /// Everything but the text, which a stream has brought already.
    fn end(self, written: &mut Written) -> Result<Vec<Item>, CallError> {
        if self.status == "failed" || self.error.is_some() {
            return Err(failed(self.error.unwrap_or_default()));
        }
        written.finish_reason = self.finish_reason();
        written.usage = self.usage.map(Usage::from);
        written.model = self.model;
        written.is_over = true;
        Ok(self.output)
    }
}

fn failed(fault: Fault) -> CallError {
    match fault.code.as_deref() {
        Some("rate_limit_exceeded") => {
            CallError::new(Class::Limited, "model_rate_limited", "the server gave up in mid-answer")
                .with_status(429)
        }
        Some("invalid_prompt") => rejected("the server refused the prompt in mid-answer"),
        _ => gave_up(),
    }
}

pub(super) fn whole(body: &[u8]) -> Result<Written, CallError> {
    let response: Response =
        serde_json::from_slice(body).map_err(|error| malformed("no response of a model").because(error))?;
    let mut written = Written::default();
    let items = response.end(&mut written)?;
    let parts = items.into_iter().filter(|item| item.kind == "message").flat_map(|item| item.content);
    let parts = parts.flatten().filter(|part| part.kind == "output_text");
    written.text = parts.filter_map(|part| part.text).collect();
    Ok(written)
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum Event {
    #[serde(rename = "response.output_text.delta")]
    Text { delta: String },
    #[serde(rename = "response.completed", alias = "response.incomplete", alias = "response.failed")]
    End { response: Response },
    #[serde(rename = "error")]
    Error {
        #[serde(default)]
        code: Option<String>,
    },
    /// Beginnings and ends of parts, and what comes later.
    #[serde(other)]
    Other,
}

pub(super) fn take(event: Value, written: &mut Written) -> Result<Option<String>, CallError> {
    match Event::deserialize(event).map_err(|error| malformed("no event of a response").because(error))? {
        Event::Text { delta } => Ok(Some(delta)),
        Event::End { response } => response.end(written).map(|_| None),
        Event::Error { code } => Err(failed(Fault { code })),
        Event::Other => Ok(None),
    }
}
