//! Anthropic's messages. Its `input_tokens` leave out what the cache knew.

use super::{Answer, Asked, Content, Turn, What, conversation, event};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
pub(super) struct Request {
    #[serde(default)]
    model: String,
    messages: Vec<Turn>,
    system: Option<Content>,
    max_tokens: u32,
    stream: Option<bool>,
}

impl Request {
    pub(super) fn asked(self) -> Asked {
        let system = self.system.map(|content| Turn { role: "system".to_owned(), content: Some(content) });
        let (prompt, question) = conversation(system.into_iter().chain(self.messages).collect());
        let (stream, tokens_max) = (self.stream.unwrap_or_default(), Some(self.max_tokens));
        let what = What::Text { question, tokens_max, stream, usage: true };
        Asked { model: self.model, prompt, priority: 0, cache_salt: String::new(), what }
    }
}

fn usage(answer: &Answer, output_tokens: u32) -> Value {
    json!({
        "input_tokens": answer.prompt_tokens.saturating_sub(answer.cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": answer.cached_tokens,
        "output_tokens": output_tokens,
    })
}

fn stop_reason(answer: &Answer) -> &'static str {
    if answer.is_cut_by_length { "max_tokens" } else { "end_turn" }
}

fn message(answer: &Answer, content: &[Value], stop_reason: Option<&str>, output_tokens: u32) -> Value {
    json!({
        "id": format!("msg_{}", answer.id), "type": "message", "role": "assistant", "model": answer.model,
        "content": content, "stop_reason": stop_reason, "stop_sequence": null, "usage": usage(answer, output_tokens),
    })
}

pub(super) fn whole(answer: &Answer) -> Vec<u8> {
    let content = [json!({"type": "text", "text": answer.text})];
    message(answer, &content, Some(stop_reason(answer)), answer.tokens()).to_string().into_bytes()
}

fn send(data: &Value, out: &mut Vec<u8>) {
    event(data.get("type").and_then(Value::as_str), data, out);
}

pub(super) fn opening(answer: &Answer, out: &mut Vec<u8>) {
    send(&json!({"type": "message_start", "message": message(answer, &[], None, 1)}), out);
    let block = json!({"type": "text", "text": ""});
    send(&json!({"type": "content_block_start", "index": 0, "content_block": block}), out);
    send(&json!({"type": "ping"}), out);
}

pub(super) fn piece(answer: &Answer, place: usize, out: &mut Vec<u8>) {
    let delta = json!({"type": "text_delta", "text": answer.piece(place)});
    send(&json!({"type": "content_block_delta", "index": 0, "delta": delta}), out);
}

pub(super) fn closing(answer: &Answer, out: &mut Vec<u8>) {
    send(&json!({"type": "content_block_stop", "index": 0}), out);
    let delta = json!({"stop_reason": stop_reason(answer), "stop_sequence": null});
    send(&json!({"type": "message_delta", "delta": delta, "usage": usage(answer, answer.tokens())}), out);
    send(&json!({"type": "message_stop"}), out);
}
