//! OpenAI's embeddings.

use super::{Asked, What};
use crate::text;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};

#[derive(Deserialize)]
pub(super) struct Request {
    #[serde(default)]
    model: String,
    input: Input,
    dimensions: Option<usize>,
    encoding_format: Option<Format>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Input {
    One(String),
    Many(Vec<String>),
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    Float,
    Base64,
}

/// Texts whose vectors are wanted.
#[derive(Debug)]
pub struct Vectors {
    texts: Vec<String>,
    dimensions: Option<usize>,
    is_base64: bool,
}

impl Request {
    pub(super) fn asked(self) -> Asked {
        let texts = match self.input {
            Input::One(text) => vec![text],
            Input::Many(texts) => texts,
        };
        let (dimensions, is_base64) = (self.dimensions, self.encoding_format == Some(Format::Base64));
        let prompt = texts.join("\n");
        let what = What::Vectors(Vectors { texts, dimensions, is_base64 });
        Asked { model: self.model, prompt, priority: 0, cache_salt: String::new(), what }
    }
}

impl Vectors {
    /// The most texts of a call, as OpenAI has it.
    pub const TEXTS_MAX: usize = 2_048;

    /// Its texts.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.texts.iter().map(String::as_str)
    }

    /// Whether there are as many texts and dimensions as may be.
    pub fn check(&self, dimensions_max: usize) -> Result<(), String> {
        if !(1..=Self::TEXTS_MAX).contains(&self.texts.len()) {
            return Err(format!(
                "input has {} texts; it may have 1 to {}",
                self.texts.len(),
                Self::TEXTS_MAX
            ));
        }
        match self.dimensions {
            Some(dimensions) if !(1..=dimensions_max).contains(&dimensions) => {
                Err(format!("dimensions is {dimensions}; it may be 1 to {dimensions_max}"))
            }
            _ => Ok(()),
        }
    }

    /// The vectors.
    pub fn answer(&self, model: &str, seed: u64, dimensions: usize, prompt_tokens: u32) -> Vec<u8> {
        let dimensions = self.dimensions.unwrap_or(dimensions);
        let data = self.texts.iter().enumerate().map(|(index, text)| {
            let vector = text::embedding(seed, text, dimensions);
            let embedding = match self.is_base64 {
                false => Embedding::Floats(vector),
                true => {
                    let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
                    Embedding::Base64(STANDARD.encode(bytes))
                }
            };
            Item { object: "embedding", index, embedding }
        });
        let usage = Usage { prompt_tokens, total_tokens: prompt_tokens };
        let answer = Answer { object: "list", data: data.collect(), model, usage };
        serde_json::to_vec(&answer).unwrap_or_default()
    }
}

/// Typed, since a tree of numbers takes longer than the numbers.
#[derive(Serialize)]
struct Answer<'a> {
    object: &'static str,
    data: Vec<Item>,
    model: &'a str,
    usage: Usage,
}

#[derive(Serialize)]
struct Item {
    object: &'static str,
    index: usize,
    embedding: Embedding,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Embedding {
    Floats(Vec<f32>),
    Base64(String),
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: u32,
    total_tokens: u32,
}
