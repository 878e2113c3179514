//! OpenAI's embeddings, as vLLM, TEI and others serve them.
//!
//! Invariant: each text has one vector, in the order of the texts, and all have the same length; else there is no answer.

use super::api::{Written, malformed};
use crate::{Call, CallError, Task};
use forebay_schemas::Usage;
use serde::{Deserialize, Serialize};

#[derive(Serialize)]
pub(super) struct Request<'a> {
    model: &'a str,
    input: &'a [&'a str],
    encoding_format: &'static str,
}

pub(super) fn request<'a>(texts: &'a [&'a str], model: &'a str) -> Request<'a> {
    Request { model, input: texts, encoding_format: "float" }
}

#[derive(Deserialize)]
struct List {
    model: Option<String>,
    #[serde(default)]
    data: Vec<Item>,
    usage: Option<Tokens>,
}

#[derive(Deserialize)]
struct Item {
    index: usize,
    embedding: Vec<f32>,
}

#[derive(Deserialize)]
struct Tokens {
    #[serde(default)]
    prompt_tokens: u64,
}

pub(super) fn whole(body: &[u8], call: &Call<'_>) -> Result<Written, CallError> {
    let list: List =
        serde_json::from_slice(body).map_err(|error| malformed("no list of vectors").because(error))?;
    let wanted = match call.task {
        Task::Embed(texts) => texts.len(),
        _ => 0,
    };
    let items = list.data.into_iter().map(|item| (item.index, item.embedding));
    let vectors = in_order(items, wanted).ok_or_else(|| malformed("not one vector for each text"))?;
    if vectors.iter().any(|vector| vector.is_empty() || vector.len() != vectors[0].len()) {
        return Err(malformed("vectors of several lengths, or of none"));
    }
    let usage = list.usage.map(|tokens| Usage::of(tokens.prompt_tokens, 0));
    Ok(Written { vectors, model: list.model, usage, is_over: true, ..Written::default() })
}

/// Numbered things in the order of their numbers; `None` unless each number below `wanted` is there once.
pub(super) fn in_order<T>(items: impl Iterator<Item = (usize, T)>, wanted: usize) -> Option<Vec<T>> {
    let mut places: Vec<Option<T>> = std::iter::repeat_with(|| None).take(wanted).collect();
    for (index, item) in items {
        if places.get_mut(index)?.replace(item).is_some() {
            return None;
        }
    }
    places.into_iter().collect()
}
