//! Anthropic's messages.
//!
//! Instructions stand apart from the conversation, and whoever wants a prefix cached marks its end. Two ends are marked: that
//! of the instructions, which all calls share, and that of the conversation before the last question, which the next turn
//! shares. Prefixes too short for its cache are left alone by the server.
//!
//! Invariant: what the API cannot do is refused, but for `seed` and the penalties, which are only wishes.

use super::api::{Written, gave_up, image_url, malformed, refuse_unspoken, rejected};
use crate::{Call, CallError, Class};
use forebay_schemas::{Content, Message, Role, Usage};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

#[derive(Serialize)]
pub(super) struct Request<'a> {
    model: &'a str,
    /// Here it must be said.
    max_tokens: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    system: Vec<Value>,
    messages: Vec<Turn>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_sequences: Option<Value>,
    stream: bool,
}

#[derive(Serialize)]
struct Turn {
    role: &'static str,
    content: Vec<Value>,
}

pub(super) fn request<'a>(call: &'a Call<'_>, model: &'a str) -> Result<Request<'a>, CallError> {
    refuse_unspoken(call)?;
    let sampling = &call.sampling;
    let form = sampling.response_format.as_ref().and_then(|form| form.get("type")).and_then(Value::as_str);
    if sampling.response_format.is_some() && form != Some("text") {
        return Err(rejected(
            "the request wants its answer in a form, which this server's API cannot be told",
        ));
    }
    let (mut system, mut messages) = (Vec::new(), Vec::new());
    for message in &call.messages {
        let blocks = blocks(message)?;
        match message.role {
            Role::System | Role::Developer => system.extend(blocks),
            Role::Assistant => messages.push(Turn { role: "assistant", content: blocks }),
            // Tools were refused.
            Role::User | Role::Tool => messages.push(Turn { role: "user", content: blocks }),
        }
    }
    // Turns without text are none to this API.
    messages.retain(|turn| !turn.content.is_empty());
    mark(system.last_mut());
    let last_question = messages.iter().rposition(|turn| turn.role == "user").unwrap_or(0);
    mark(messages[..last_question].last_mut().and_then(|turn| turn.content.last_mut()));
    Ok(Request {
        model,
        max_tokens: call.answer_tokens_max(),
        system,
        messages,
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        stop_sequences: sampling.stop.as_ref().map(|stop| match stop {
            Value::String(_) => json!([stop]),
            list => list.clone(),
        }),
        stream: call.stream,
    })
}

/// The prefix that ends with this block may be cached.
fn mark(block: Option<&mut Value>) {
    if let Some(block) = block.and_then(Value::as_object_mut) {
        block.insert("cache_control".to_owned(), json!({"type": "ephemeral"}));
    }
}

fn blocks(message: &Message) -> Result<Vec<Value>, CallError> {
    match &message.content {
        None => Ok(Vec::new()),
        Some(Content::Text(text)) if text.is_empty() => Ok(Vec::new()),
        Some(Content::Text(text)) => Ok(vec![json!({"type": "text", "text": text})]),
        Some(Content::Parts(parts)) => parts.iter().map(block).collect(),
    }
}

fn block(part: &Value) -> Result<Value, CallError> {
    if let Some(text) = part.get("text").and_then(Value::as_str) {
        return Ok(json!({"type": "text", "text": text}));
    }
    let Some(url) = image_url(part) else {
        return Err(rejected("the conversation has a part that is neither a text nor an image"));
    };
    let inline = url.strip_prefix("data:").and_then(|data| data.split_once(";base64,"));
    let source = match inline {
        Some((media_type, data)) => json!({"type": "base64", "media_type": media_type, "data": data}),
        None => json!({"type": "url", "url": url}),
    };
    Ok(json!({"type": "image", "source": source}))
}

/// What is said of tokens. Of a stream, the last that says it is right: counts grow.
#[derive(Clone, Copy, Default, Deserialize)]
#[serde(default)]
struct Tokens {
    input_tokens: Option<u64>,
    cache_creation_input_tokens: Option<u64>,
    cache_read_input_tokens: Option<u64>,
    output_tokens: Option<u64>,
}

impl Tokens {
    /// `input_tokens` leave out what the cache knew and what it learned; ours leave out nothing.
    fn usage(self) -> Usage {
        let fresh = self.input_tokens.unwrap_or(0);
        let learned = self.cache_creation_input_tokens.unwrap_or(0);
        let known = self.cache_read_input_tokens.unwrap_or(0);
        let read = fresh.saturating_add(learned).saturating_add(known);
        Usage {
            cached_tokens: self.cache_read_input_tokens,
            cached_write_tokens: self.cache_creation_input_tokens,
            ..Usage::of(read, self.output_tokens.unwrap_or(0))
        }
    }
}

#[derive(Deserialize)]
struct Answer {
    model: Option<String>,
    #[serde(default)]
    content: Vec<Block>,
    stop_reason: Option<String>,
    usage: Option<Tokens>,
}

#[derive(Deserialize)]
struct Block {
    /// Only blocks of text have it; thoughts and calls of tools do not.
    text: Option<String>,
}

fn finish_reason(stop_reason: String) -> String {
    match stop_reason.as_str() {
        "end_turn" | "stop_sequence" => "stop".to_owned(),
        "max_tokens" | "model_context_window_exceeded" => "length".to_owned(),
        "tool_use" => "tool_calls".to_owned(),
        "refusal" => "content_filter".to_owned(),
        _ => stop_reason,
    }
}

pub(super) fn whole(body: &[u8]) -> Result<Written, CallError> {
    let answer: Answer =
        serde_json::from_slice(body).map_err(|error| malformed("no message").because(error))?;
    Ok(Written {
        text: answer.content.into_iter().filter_map(|block| block.text).collect(),
        model: answer.model,
        usage: answer.usage.map(Tokens::usage),
        finish_reason: answer.stop_reason.map(finish_reason),
        is_over: true,
        ..Written::default()
    })
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Event {
    MessageStart {
        message: Answer,
    },
    ContentBlockStart {
        content_block: Block,
    },
    ContentBlockDelta {
        delta: Block,
    },
    MessageDelta {
        delta: Stopped,
        usage: Option<Tokens>,
    },
    MessageStop,
    Error {
        #[serde(default)]
        error: Map<String, Value>,
    },
    /// `ping`, `content_block_stop`, and whatever comes later: there is to be more, says the API.
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct Stopped {
    stop_reason: Option<String>,
}

pub(super) fn take(event: Value, written: &mut Written) -> Result<Option<String>, CallError> {
    match Event::deserialize(event).map_err(|error| malformed("no event of a message").because(error))? {
        Event::MessageStart { message } => {
            written.model = message.model;
            written.usage = message.usage.map(Tokens::usage);
            Ok(None)
        }
        Event::ContentBlockStart { content_block: block } | Event::ContentBlockDelta { delta: block } => {
            Ok(block.text)
        }
        Event::MessageDelta { delta, usage } => {
            written.finish_reason = delta.stop_reason.map(finish_reason).or(written.finish_reason.take());
            if let Some(tokens) = usage {
                written.usage = Some(later(written.usage.unwrap_or_default(), tokens));
            }
            Ok(None)
        }
        Event::MessageStop => {
            written.is_over = true;
            Ok(None)
        }
        Event::Error { error } => Err(failed(error.get("type").and_then(Value::as_str).unwrap_or_default())),
        Event::Other => Ok(None),
    }
}

/// The end of a stream says how much was written, and not always again how much was read.
fn later(usage: Usage, tokens: Tokens) -> Usage {
    let last = tokens.usage();
    let read = if tokens.input_tokens.is_some() { last } else { usage };
    let written = if tokens.output_tokens.is_some() { last } else { usage };
    let Usage { prompt_tokens, cached_tokens, cached_write_tokens, .. } = read;
    Usage { cached_tokens, cached_write_tokens, ..Usage::of(prompt_tokens, written.completion_tokens) }
}

/// An error in mid-stream has no status, so it gets the one that it would have had.
fn failed(kind: &str) -> CallError {
    let error = |class, code, status| {
        CallError::new(class, code, "the server gave up in mid-stream").with_status(status)
    };
    match kind {
        "overloaded_error" => error(Class::Outage, "model_unavailable", 529),
        "rate_limit_error" => error(Class::Limited, "model_rate_limited", 429),
        "authentication_error" => error(Class::Account, "model_unauthorized", 401),
        "billing_error" => error(Class::Account, "model_unauthorized", 402),
        "permission_error" => error(Class::Account, "model_unauthorized", 403),
        "invalid_request_error" => error(Class::Rejected, "model_rejected", 400),
        "not_found_error" => error(Class::Rejected, "model_rejected", 404),
        "request_too_large" => error(Class::Rejected, "model_rejected", 413),
        "timeout_error" => error(Class::Outage, "model_unavailable", 504),
        _ => gave_up(),
    }
}
