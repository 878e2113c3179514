//! The log of calls: one line of JSON for each, what an account of a provider would say.
//!
//! Invariant: a line is in its file before the last byte of its answer is handed to the connection. So `kill -9` of the
//! simulator loses no call that was answered whole; a call under way then has no line. A power cut may lose lines.

use serde::Serialize;
use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::Path,
};

/// A call, as it ended.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Line {
    /// Microseconds since 1970 at which it came.
    pub started_us: u64,
    /// Which replica served it, from 0.
    pub replica: usize,
    /// The path that was asked.
    pub path: &'static str,
    /// What the caller names it by: `x-forebay-call-id`, `idempotency-key` or `x-request-id`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub call_id: Option<String>,
    /// Which try of it this is, from 0.
    pub attempt: u32,
    /// The beginning of a hash of the API key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The model that was asked for.
    pub model: String,
    /// The beginning of a hash of the prompt.
    pub prompt_hash: String,
    /// The same of each text, where vectors of texts are wanted: what several callers ask together is no one's call, and this says whose
    /// texts it brings.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub text_hashes: Vec<String>,
    /// Whether the answer was to be streamed.
    pub stream: bool,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Those of them that the KV cache knew.
    pub cached_tokens: u32,
    /// Tokens that were written, also where nobody got them.
    pub completion_tokens: u32,
    /// The status that was answered; none where there was no answer.
    pub status: Option<u16>,
    /// What went wrong on purpose.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
    /// Microseconds since 1970 at which it left the queue.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admitted_us: Option<u64>,
    /// The same of its first token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_token_us: Option<u64>,
    /// The same of its end.
    pub ended_us: u64,
    /// Who ended it.
    pub ended_by: EndedBy,
}

/// Who ended a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EndedBy {
    /// The simulator answered, refused, or broke off on purpose.
    #[default]
    Server,
    /// The client went away first.
    Client,
    /// The simulator was stopped.
    Stop,
}

/// A file that lines are appended to.
#[derive(Debug)]
pub struct CallLog(File);

impl CallLog {
    /// Opens it, and makes it where it is missing.
    pub fn open(path: &Path) -> io::Result<Self> {
        OpenOptions::new().append(true).create(true).open(path).map(Self)
    }

    /// Appends a line by one write, so that lines of several threads or processes do not mix.
    pub fn append(&self, line: &Line) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        (&self.0).write_all(&text)
    }
}
