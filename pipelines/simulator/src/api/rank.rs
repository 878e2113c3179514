//! Rerank: `documents` and `relevance_score` as Cohere, Jina and vLLM have them, `texts` and `score` as TEI does.

use super::{Asked, What};
use crate::text;
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
pub(super) struct Request {
    #[serde(default)]
    model: String,
    query: String,
    documents: Option<Vec<Document>>,
    texts: Option<Vec<String>>,
    top_n: Option<usize>,
    #[serde(default)]
    return_documents: bool,
    #[serde(default)]
    return_text: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Document {
    Text(String),
    Map { text: String },
}

/// Documents whose relevance is wanted.
#[derive(Debug)]
pub struct Ranking {
    query: String,
    documents: Vec<String>,
    top_n: usize,
    has_texts: bool,
    is_tei: bool,
}

impl Request {
    pub(super) fn asked(self) -> Result<Asked, String> {
        let is_tei = self.texts.is_some();
        let documents = match (self.documents, self.texts) {
            (Some(documents), None) => documents
                .into_iter()
                .map(|document| match document {
                    Document::Text(text) | Document::Map { text } => text,
                })
                .collect(),
            (None, Some(texts)) => texts,
            _ => {
                return Err(
                    "a rerank has documents (Cohere, vLLM) or texts (TEI), and one of them".to_owned()
                );
            }
        };
        // A cross-encoder reads the query with each document.
        let prompt = documents.iter().map(|document| format!("{}\n{document}\n", self.query)).collect();
        let what = What::Ranking(Ranking {
            query: self.query,
            top_n: self.top_n.unwrap_or(usize::MAX),
            has_texts: self.return_documents || self.return_text,
            documents,
            is_tei,
        });
        Ok(Asked { model: self.model, prompt, priority: 0, cache_salt: String::new(), what })
    }
}

impl Ranking {
    /// The most documents of a call.
    pub const DOCUMENTS_MAX: usize = 1_000;

    /// Whether there are as many documents as may be.
    pub fn check(&self) -> Result<(), String> {
        let documents = self.documents.len();
        match documents {
            1..=Self::DOCUMENTS_MAX => Ok(()),
            _ => Err(format!("there are {documents} documents; there may be 1 to {}", Self::DOCUMENTS_MAX)),
        }
    }

    /// The documents by their relevance, the best first.
    pub fn answer(&self, id: &str, model: &str, prompt_tokens: u32) -> Vec<u8> {
        let mut ranked: Vec<(usize, f64)> = self
            .documents
            .iter()
            .map(|document| text::relevance(&self.query, document))
            .enumerate()
            .collect();
        ranked.sort_by(|one, two| two.1.total_cmp(&one.1));
        ranked.truncate(self.top_n);
        let results: Vec<Value> =
            ranked.into_iter().map(|(index, score)| self.result(index, score)).collect();
        if self.is_tei {
            return Value::from(results).to_string().into_bytes();
        }
        let usage = json!({"total_tokens": prompt_tokens});
        json!({"id": format!("rerank-{id}"), "model": model, "results": results, "usage": usage})
            .to_string()
            .into_bytes()
    }

    fn result(&self, index: usize, score: f64) -> Value {
        let text = self.documents.get(index).filter(|_| self.has_texts);
        match (self.is_tei, text) {
            (true, None) => json!({"index": index, "score": score}),
            (true, Some(text)) => json!({"index": index, "score": score, "text": text}),
            (false, None) => json!({"index": index, "relevance_score": score}),
            (false, Some(text)) => {
                json!({"index": index, "relevance_score": score, "document": {"text": text}})
            }
        }
    }
}
