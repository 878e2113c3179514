//! OpenAI's chat completions, with vLLM's `priority` and `cache_salt`.

use super::{Answer, Asked, Turn, What, conversation, event};
use serde::{Deserialize, Serialize};

#[derive(Deserialize)]
pub(super) struct Request {
    #[serde(default)]
    model: String,
    messages: Vec<Turn>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    priority: Option<i64>,
    cache_salt: Option<String>,
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

impl Request {
    pub(super) fn asked(self) -> Asked {
        let (prompt, question) = conversation(self.messages);
        Asked {
            model: self.model,
            prompt,
            priority: self.priority.unwrap_or_default(),
            cache_salt: self.cache_salt.unwrap_or_default(),
            what: What::Text {
                question,
                tokens_max: self.max_completion_tokens.or(self.max_tokens),
                stream: self.stream.unwrap_or_default(),
                usage: self.stream_options.is_some_and(|options| options.include_usage),
            },
        }
    }
}

/// Written by hand and not as maps: this is what a load test asks for most.
#[derive(Serialize)]
struct Completion<'a> {
    id: String,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [Choice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Said<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Said<'a>>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct Said<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: Details,
}

#[derive(Serialize)]
struct Details {
    cached_tokens: u32,
}

fn usage(answer: &Answer) -> Usage {
    Usage {
        prompt_tokens: answer.prompt_tokens,
        completion_tokens: answer.tokens(),
        total_tokens: answer.prompt_tokens.saturating_add(answer.tokens()),
        prompt_tokens_details: Details { cached_tokens: answer.cached_tokens },
    }
}

fn finish(answer: &Answer) -> &'static str {
    if answer.is_cut_by_length { "length" } else { "stop" }
}

fn completion<'a>(
    answer: &'a Answer,
    object: &'static str,
    choices: &'a [Choice<'a>],
    usage: Option<Usage>,
) -> Completion<'a> {
    let id = format!("chatcmpl-{}", answer.id);
    Completion { id, object, created: answer.created_s, model: &answer.model, choices, usage }
}

pub(super) fn whole(answer: &Answer) -> Vec<u8> {
    let message = Said { role: Some("assistant"), content: Some(&answer.text) };
    let choices =
        [Choice { index: 0, message: Some(message), delta: None, finish_reason: Some(finish(answer)) }];
    serde_json::to_vec(&completion(answer, "chat.completion", &choices, Some(usage(answer))))
        .unwrap_or_default()
}

fn chunk(answer: &Answer, delta: Said<'_>, finish_reason: Option<&'static str>, out: &mut Vec<u8>) {
    let choices = [Choice { index: 0, message: None, delta: Some(delta), finish_reason }];
    event(None, &completion(answer, "chat.completion.chunk", &choices, None), out);
}

pub(super) fn opening(answer: &Answer, out: &mut Vec<u8>) {
    chunk(answer, Said { role: Some("assistant"), content: Some("") }, None, out);
}

pub(super) fn piece(answer: &Answer, place: usize, out: &mut Vec<u8>) {
    chunk(answer, Said { role: None, content: Some(answer.piece(place)) }, None, out);
}

pub(super) fn closing(answer: &Answer, is_usage_wanted: bool, out: &mut Vec<u8>) {
    chunk(answer, Said { role: None, content: None }, Some(finish(answer)), out);
    if is_usage_wanted {
        event(None, &completion(answer, "chat.completion.chunk", &[], Some(usage(answer))), out);
    }
    out.extend_from_slice(b"data: [DONE]\n\n");
}
