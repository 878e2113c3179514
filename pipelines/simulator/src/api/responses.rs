//! OpenAI's responses: one message of text, whole or as events.

use super::{Answer, Asked, Content, Turn, What, conversation, event};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
pub(super) struct Request {
    #[serde(default)]
    model: String,
    input: Input,
    instructions: Option<String>,
    stream: Option<bool>,
    max_output_tokens: Option<u32>,
    priority: Option<i64>,
    cache_salt: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Input {
    Text(String),
    Turns(Vec<Turn>),
}

impl Request {
    pub(super) fn asked(self) -> Asked {
        let said = |role: &str, text| Turn { role: role.to_owned(), content: Some(Content::Text(text)) };
        let mut turns: Vec<Turn> = self.instructions.map(|text| said("system", text)).into_iter().collect();
        match self.input {
            Input::Text(text) => turns.push(said("user", text)),
            Input::Turns(more) => turns.extend(more),
        }
        let (prompt, question) = conversation(turns);
        let (stream, tokens_max) = (self.stream.unwrap_or_default(), self.max_output_tokens);
        Asked {
            model: self.model,
            prompt,
            priority: self.priority.unwrap_or_default(),
            cache_salt: self.cache_salt.unwrap_or_default(),
            what: What::Text { question, tokens_max, stream, usage: true },
        }
    }
}

fn response(answer: &Answer, status: &str, output: &[Value]) -> Value {
    let is_over = status != "in_progress";
    let usage = is_over.then(|| {
        json!({
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {"cached_tokens": answer.cached_tokens},
            "output_tokens": answer.tokens(),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.prompt_tokens.saturating_add(answer.tokens()),
        })
    });
    let incomplete = (is_over && answer.is_cut_by_length).then(|| json!({"reason": "max_output_tokens"}));
    json!({
        "id": format!("resp_{}", answer.id), "object": "response", "created_at": answer.created_s, "status": status,
        "error": null, "incomplete_details": incomplete, "model": answer.model, "output": output, "usage": usage,
    })
}

fn status(answer: &Answer) -> &'static str {
    if answer.is_cut_by_length { "incomplete" } else { "completed" }
}

fn part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": []})
}

fn item(answer: &Answer, status: &str, content: &[Value]) -> Value {
    json!({"type": "message", "id": item_id(answer), "status": status, "role": "assistant", "content": content})
}

fn item_id(answer: &Answer) -> String {
    format!("msg_{}", answer.id)
}

pub(super) fn whole(answer: &Answer) -> Vec<u8> {
    let item = item(answer, status(answer), &[part(&answer.text)]);
    response(answer, status(answer), &[item]).to_string().into_bytes()
}

/// An event with its number; there are four before the first token.
fn send(name: &str, number: usize, mut data: Value, out: &mut Vec<u8>) {
    if let Some(data) = data.as_object_mut() {
        data.insert("type".to_owned(), json!(name));
        data.insert("sequence_number".to_owned(), json!(number));
    }
    event(Some(name), &data, out);
}

const OPENING: usize = 4;

pub(super) fn opening(answer: &Answer, out: &mut Vec<u8>) {
    let begun = json!({"response": response(answer, "in_progress", &[])});
    send("response.created", 0, begun.clone(), out);
    send("response.in_progress", 1, begun, out);
    let item = item(answer, "in_progress", &[]);
    send("response.output_item.added", 2, json!({"output_index": 0, "item": item}), out);
    let place = json!({"item_id": item_id(answer), "output_index": 0, "content_index": 0, "part": part("")});
    send("response.content_part.added", 3, place, out);
}

pub(super) fn piece(answer: &Answer, place: usize, out: &mut Vec<u8>) {
    let delta = answer.piece(place);
    let data = json!({"item_id": item_id(answer), "output_index": 0, "content_index": 0, "delta": delta});
    send("response.output_text.delta", OPENING + place, data, out);
}

pub(super) fn closing(answer: &Answer, out: &mut Vec<u8>) {
    let number = OPENING + answer.pieces.len();
    let (id, text) = (item_id(answer), &answer.text);
    let item = item(answer, status(answer), &[part(text)]);
    let place = json!({"item_id": id, "output_index": 0, "content_index": 0, "text": text});
    send("response.output_text.done", number, place, out);
    let place = json!({"item_id": id, "output_index": 0, "content_index": 0, "part": part(text)});
    send("response.content_part.done", number + 1, place, out);
    send("response.output_item.done", number + 2, json!({"output_index": 0, "item": item}), out);
    let end = if answer.is_cut_by_length { "response.incomplete" } else { "response.completed" };
    send(end, number + 3, json!({"response": response(answer, status(answer), &[item])}), out);
}
