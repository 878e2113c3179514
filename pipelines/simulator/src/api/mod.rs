//! The wire forms: what calls ask, and how answers and refusals look.
//!
//! Invariant: nothing here decides anything; it reads and writes.

mod chat;
mod messages;
mod rank;
mod responses;
mod vectors;

pub use rank::Ranking;
pub use vectors::Vectors;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::ops::Range;

/// What is served by POST.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// OpenAI's chat completions.
    Chat,
    /// OpenAI's responses.
    Responses,
    /// Anthropic's messages.
    Messages,
    /// OpenAI's embeddings.
    Embeddings,
    /// Rerank, as Cohere, vLLM and TEI have it.
    Rerank,
}

/// Paths and what they serve.
const PATHS: &[(&str, Endpoint)] = &[
    ("/v1/chat/completions", Endpoint::Chat),
    ("/v1/responses", Endpoint::Responses),
    ("/v1/messages", Endpoint::Messages),
    ("/v1/embeddings", Endpoint::Embeddings),
    ("/v1/rerank", Endpoint::Rerank),
    ("/v2/rerank", Endpoint::Rerank),
    ("/rerank", Endpoint::Rerank),
];

/// What a call asks.
#[derive(Debug)]
pub struct Asked {
    /// Of which model; empty where it does not say.
    pub model: String,
    /// All that the model reads, as one text.
    pub prompt: String,
    /// vLLM's: the lower goes first.
    pub priority: i64,
    /// vLLM's: who shares the KV cache.
    pub cache_salt: String,
    /// For what.
    pub what: What,
}

/// What a call wants.
#[derive(Debug)]
pub enum What {
    /// An answer.
    Text {
        /// What the user said last.
        question: String,
        /// The longest answer, in tokens.
        tokens_max: Option<u32>,
        /// Whether it is streamed.
        stream: bool,
        /// Whether the stream ends with the usage.
        usage: bool,
    },
    /// A vector for each text.
    Vectors(Vectors),
    /// How well documents fit a query.
    Ranking(Ranking),
}

/// An answer, to be written in the form of an endpoint.
#[derive(Debug)]
pub struct Answer {
    /// Its id, without the prefix that an API gives it.
    pub id: String,
    /// The model.
    pub model: String,
    /// Seconds since 1970.
    pub created_s: u64,
    /// What it says.
    pub text: String,
    /// Its tokens, as ranges of the text.
    pub pieces: Vec<Range<usize>>,
    /// Whether it ends at the limit of its length.
    pub is_cut_by_length: bool,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Those of them that the KV cache knew.
    pub cached_tokens: u32,
}

impl Answer {
    /// How many tokens it has.
    pub fn tokens(&self) -> u32 {
        u32::try_from(self.pieces.len()).unwrap_or(u32::MAX)
    }

    /// Its tokens from one to another.
    fn piece(&self, place: usize) -> &str {
        self.pieces.get(place).and_then(|range| self.text.get(range.clone())).unwrap_or_default()
    }
}

/// A refusal.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// The status.
    pub status: u16,
    /// A code beside the kind that the status has.
    pub code: Option<&'static str>,
    /// Why.
    pub message: String,
}

impl Refusal {
    /// A refusal with no code of its own.
    pub fn new(status: u16, message: impl Into<String>) -> Self {
        Self { status, code: None, message: message.into() }
    }

    /// What both APIs call it.
    fn kind(&self) -> &'static str {
        match self.status {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            529 => "overloaded_error",
            400..=499 => "invalid_request_error",
            _ => "api_error",
        }
    }
}

impl Endpoint {
    /// What a path serves, and the path as it is logged.
    pub fn of(path: &str) -> Option<(Self, &'static str)> {
        PATHS.iter().find(|(known, _)| *known == path).map(|(known, endpoint)| (*endpoint, *known))
    }

    /// Whether its answers are no texts.
    pub fn is_without_text(self) -> bool {
        matches!(self, Self::Embeddings | Self::Rerank)
    }

    /// Reads a call.
    pub fn read(self, body: &[u8]) -> Result<Asked, String> {
        let read = match self {
            Self::Chat => serde_json::from_slice(body).map(chat::Request::asked),
            Self::Responses => serde_json::from_slice(body).map(responses::Request::asked),
            Self::Messages => serde_json::from_slice(body).map(messages::Request::asked),
            Self::Embeddings => serde_json::from_slice(body).map(vectors::Request::asked),
            Self::Rerank => return serde_json::from_slice::<rank::Request>(body).map_err(told)?.asked(),
        };
        read.map_err(told)
    }

    /// An answer in one piece.
    pub fn whole(self, answer: &Answer) -> Vec<u8> {
        match self {
            Self::Responses => responses::whole(answer),
            Self::Messages => messages::whole(answer),
            _ => chat::whole(answer),
        }
    }

    /// What a stream begins with.
    pub fn opening(self, answer: &Answer, out: &mut Vec<u8>) {
        match self {
            Self::Responses => responses::opening(answer, out),
            Self::Messages => messages::opening(answer, out),
            _ => chat::opening(answer, out),
        }
    }

    /// A token of a stream.
    pub fn piece(self, answer: &Answer, place: usize, out: &mut Vec<u8>) {
        match self {
            Self::Responses => responses::piece(answer, place, out),
            Self::Messages => messages::piece(answer, place, out),
            _ => chat::piece(answer, place, out),
        }
    }

    /// What a stream ends with.
    pub fn closing(self, answer: &Answer, usage: bool, out: &mut Vec<u8>) {
        match self {
            Self::Responses => responses::closing(answer, out),
            Self::Messages => messages::closing(answer, out),
            _ => chat::closing(answer, usage, out),
        }
    }

    /// An event of a stream that is broken off in the middle of its JSON.
    pub fn broken(self, out: &mut Vec<u8>) {
        if self == Self::Messages {
            out.extend_from_slice(b"event: content_block_delta\n");
        }
        out.extend_from_slice(b"data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\n\n");
    }

    /// A refusal.
    pub fn refusal(self, refusal: &Refusal) -> Vec<u8> {
        let (kind, message) = (refusal.kind(), &refusal.message);
        let error = match self {
            Self::Messages => json!({"type": "error", "error": {"type": kind, "message": message}}),
            _ => json!({"error": {"message": message, "type": kind, "param": null, "code": refusal.code}}),
        };
        error.to_string().into_bytes()
    }
}

fn told(fault: serde_json::Error) -> String {
    format!("could not read the request: {fault}")
}

/// Something said: a text, or parts of which some have one.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    text: Option<String>,
}

impl Content {
    fn into_text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Parts(parts) => {
                parts.into_iter().filter_map(|part| part.text).collect::<Vec<_>>().join("\n")
            }
        }
    }
}

/// A turn of a conversation.
#[derive(Debug, Deserialize)]
struct Turn {
    #[serde(default)]
    role: String,
    content: Option<Content>,
}

/// A conversation as one text, and what the user said last.
fn conversation(turns: Vec<Turn>) -> (String, String) {
    let (mut prompt, mut question) = (String::new(), String::new());
    for Turn { role, content } in turns {
        let text = content.map(Content::into_text).unwrap_or_default();
        prompt.push_str(&role);
        prompt.push('\n');
        prompt.push_str(&text);
        prompt.push('\n');
        if role == "user" {
            question = text;
        }
    }
    (prompt, question)
}

/// An event of a stream: its name, where the API gives one, and its data.
fn event(name: Option<&str>, data: &impl Serialize, out: &mut Vec<u8>) {
    if let Some(name) = name {
        out.extend_from_slice(format!("event: {name}\n").as_bytes());
    }
    out.extend_from_slice(b"data: ");
    // What is written here has only keys that are texts, so it always can be.
    _ = serde_json::to_writer(&mut *out, data);
    out.extend_from_slice(b"\n\n");
}

/// The list of models.
pub fn models(models: &[String]) -> Vec<u8> {
    let models: Vec<Value> = models
        .iter()
        .map(|model| json!({"id": model, "object": "model", "created": 0, "owned_by": "forebay-simulator"}))
        .collect();
    json!({"object": "list", "data": models}).to_string().into_bytes()
}
