//! A call from its first byte to its line in the log.
//!
//! Invariant: a call has one line, however it ends: it is written when it is ended, or when whoever serves it is dropped,
//! which means that the client went away or the simulator stops.

use crate::{
    Broken, Shared,
    api::Endpoint,
    dice::first_8,
    log::{EndedBy, Line},
    metrics::Served,
    replica::{Progress, Replica, Ticket},
};
use hyper::HeaderMap;
use std::{sync::Arc, sync::atomic::Ordering};

/// Headers by which a caller may name a call, the first found.
const ID_HEADERS: [&str; 3] = ["x-forebay-call-id", "idempotency-key", "x-request-id"];
/// Headers by which a caller may number its tries.
const ATTEMPT_HEADERS: [&str; 2] = ["x-forebay-attempt", "x-stainless-retry-count"];
/// Longer ids are cut.
const ID_CHARS_MAX: usize = 200;

/// A call that is being served.
pub struct Call {
    replica: Arc<Replica>,
    line: Line,
    began_us: u64,
    is_cut_by_length: bool,
    ticket: Option<Ticket>,
    is_over: bool,
}

impl Call {
    /// A call that came just now.
    pub fn begin(replica: &Arc<Replica>, path: &'static str, headers: &HeaderMap) -> Self {
        let clock = replica.shared.clock;
        let began_us = clock.now_us();
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let call_id =
            ID_HEADERS.iter().find_map(|name| text(name)).map(|id| id.chars().take(ID_CHARS_MAX).collect());
        let line = Line {
            started_us: clock.wall_us(began_us),
            replica: replica.number,
            path,
            call_id,
            key: key(headers).map(|key| format!("{:08x}", hash(key.as_bytes()) >> 32)),
            ..Line::default()
        };
        let replica = Arc::clone(replica);
        Self { replica, line, began_us, is_cut_by_length: false, ticket: None, is_over: false }
    }

    /// What fate hangs on: the call's id, or else its body. Notes the number of its try.
    pub fn identity(&mut self, endpoint: Endpoint, headers: &HeaderMap, body: &[u8]) -> (Vec<u8>, u32) {
        let identity = match &self.line.call_id {
            Some(id) => id.as_bytes().to_vec(),
            None => hash(body).to_le_bytes().to_vec(),
        };
        let text = |name: &&str| headers.get(*name)?.to_str().ok()?.trim().parse().ok();
        self.line.attempt = match ATTEMPT_HEADERS.iter().find_map(text) {
            Some(attempt) => attempt,
            None => {
                let path = format!("{endpoint:?}");
                self.shared().attempts.next(hash(&[path.as_bytes(), identity.as_slice()].concat()))
            }
        };
        (identity, self.line.attempt)
    }

    /// What is known of it besides.
    pub fn note(&mut self, note: impl FnOnce(&mut Line)) {
        note(&mut self.line);
    }

    /// Whether its answer ends at the limit of its length.
    pub fn note_length(&mut self, is_cut_by_length: bool) {
        self.is_cut_by_length = is_cut_by_length;
    }

    /// The engine serves it.
    pub fn serve(&mut self, ticket: Ticket) {
        self.ticket = Some(ticket);
    }

    /// Waits until more than so many tokens are written, or all are.
    pub async fn beyond(&mut self, tokens: u32) -> Progress {
        match &mut self.ticket {
            Some(ticket) => ticket.beyond(tokens).await,
            None => Progress::default(),
        }
    }

    /// The first token goes out now.
    pub fn first_token(&mut self) {
        let clock = self.shared().clock;
        self.line.first_token_us.get_or_insert(clock.wall_us(clock.now_us()));
    }

    /// What it shares with all others.
    pub fn shared(&self) -> &Shared {
        &self.replica.shared
    }

    /// It ends, with this status or with no answer. An answer whose line could not be written must not go out.
    pub fn end(&mut self, status: Option<u16>) -> Result<(), Broken> {
        self.close(status, EndedBy::Server)
    }

    /// The status that is on its way while its body is not.
    pub fn begin_answer(&mut self, status: u16) {
        self.line.status = Some(status);
    }

    fn close(&mut self, status: Option<u16>, ended_by: EndedBy) -> Result<(), Broken> {
        self.is_over = true;
        let clock = self.shared().clock;
        let now_us = clock.now_us();
        if let Some(mut ticket) = self.ticket.take() {
            let progress = ticket.progress();
            self.line.cached_tokens = progress.cached;
            self.line.completion_tokens = progress.written;
            self.line.admitted_us = progress.admitted_us.map(|at| clock.wall_us(at));
            self.replica.served(&self.served(progress, now_us));
        }
        self.line.status = status.or(self.line.status);
        self.line.ended_us = clock.wall_us(now_us);
        self.line.ended_by = ended_by;
        match &self.shared().log {
            Some(log) => log.append(&self.line).map_err(|_| Broken),
            None => Ok(()),
        }
    }

    fn served(&self, progress: Progress, now_us: u64) -> Served {
        let since_s = |at: u64| at.saturating_sub(self.began_us) as f64 / 1e6;
        Served {
            prompt: self.line.prompt_tokens,
            written: progress.written,
            is_done: progress.done_us.is_some(),
            is_cut_by_length: self.is_cut_by_length,
            queue_s: progress.admitted_us.map(since_s),
            first_token_s: progress.first_us.map(since_s),
            request_s: since_s(progress.done_us.unwrap_or(now_us)),
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.is_over {
            let is_stopping = self.shared().is_stopping.load(Ordering::Relaxed);
            // Nobody is there to be told that the line could not be written.
            _ = self.close(None, if is_stopping { EndedBy::Stop } else { EndedBy::Client });
        }
    }
}

/// The API key of a call.
pub fn key(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get("authorization").and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    bearer.or_else(|| headers.get("x-api-key")?.to_str().ok()).map(str::trim)
}

/// What a text is known by in the log of calls: the beginning of its hash.
pub fn text_hash(text: &str) -> String {
    format!("{:016x}", hash(text.as_bytes()))
}

/// A number for a text.
pub fn hash(text: &[u8]) -> u64 {
    first_8(&blake3::hash(text))
}
