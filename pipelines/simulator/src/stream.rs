//! A streamed answer: events as the engine writes tokens, and what a fault makes of them.
//!
//! Invariant: the call is ended, and so logged, before the last bytes of its answer are handed on.

use crate::{
    Broken,
    api::{Answer, Endpoint},
    call::Call,
    dice::whole,
    faults::{Fate, Fault},
    serve::written_out,
};
use bytes::Bytes;
use hyper::body::Frame;
use std::time::Duration;

/// A streamed answer.
pub struct Streamed {
    endpoint: Endpoint,
    call: Call,
    answer: Answer,
    usage: bool,
    /// What goes wrong in the middle, and before which token.
    fault: Option<(Fault, usize)>,
    stall: Duration,
    sent: usize,
    is_opened: bool,
    is_over: bool,
}

impl Streamed {
    /// The answer to a call that the engine serves.
    pub fn new(
        endpoint: Endpoint,
        call: Call,
        answer: Answer,
        usage: bool,
        fate: &Fate,
        stall: Duration,
    ) -> Self {
        let pieces = answer.pieces.len();
        // Behind the first token, which is what makes it the middle, where there is more than one.
        let middle = usize::try_from(whole(fate.place * pieces as f64)).unwrap_or(0).clamp(1, pieces.max(1));
        let fault = fate.fault.and_then(|fault| match fault {
            Fault::Cut | Fault::StallMid | Fault::Malformed => Some((fault, middle)),
            Fault::Empty | Fault::Blank => Some((fault, 0)),
            _ => None,
        });
        Self { endpoint, call, answer, usage, fault, stall, sent: 0, is_opened: false, is_over: false }
    }

    /// The next bytes.
    pub async fn next(&mut self) -> Option<Result<Frame<Bytes>, Broken>> {
        if self.is_over {
            return None;
        }
        let part = self.part().await;
        self.is_over |= part.is_err();
        Some(part.map(|bytes| Frame::data(Bytes::from(bytes))))
    }

    async fn part(&mut self) -> Result<Vec<u8>, Broken> {
        let mut out = Vec::new();
        if let Some((fault, place)) = self.fault.filter(|(_, place)| self.sent >= *place) {
            self.fault = None;
            match fault {
                Fault::StallMid => tokio::time::sleep(self.stall).await,
                Fault::Malformed => {
                    self.endpoint.broken(&mut out);
                    return self.close(out);
                }
                Fault::Empty | Fault::Blank => {
                    self.call.beyond(u32::MAX).await;
                    (self.answer.text, self.answer.pieces) = (String::new(), Vec::new());
                    if fault == Fault::Empty {
                        self.open(&mut out);
                        self.endpoint.closing(&self.answer, self.usage, &mut out);
                    }
                    return self.close(out);
                }
                // A cut, before token `place`.
                _ => {
                    self.call
                        .note(|line| line.fault = Some(format!("{} before token {place}", fault.name())));
                    self.call.end(None)?;
                    written_out().await;
                    return Err(Broken);
                }
            }
        }
        let progress = self.call.beyond(u32::try_from(self.sent).unwrap_or(u32::MAX)).await;
        self.answer.cached_tokens = progress.cached;
        self.open(&mut out);
        let written = usize::try_from(progress.written).unwrap_or(usize::MAX);
        let until = self.fault.map_or(written, |(_, place)| written.min(place));
        while self.sent < until {
            self.endpoint.piece(&self.answer, self.sent, &mut out);
            self.sent += 1;
        }
        self.call.first_token();
        if progress.done_us.is_some() && self.fault.is_none() {
            self.endpoint.closing(&self.answer, self.usage, &mut out);
            return self.close(out);
        }
        Ok(out)
    }

    fn open(&mut self, out: &mut Vec<u8>) {
        if !self.is_opened {
            self.is_opened = true;
            self.endpoint.opening(&self.answer, out);
        }
    }

    /// Ends the call; these are its last bytes.
    fn close(&mut self, out: Vec<u8>) -> Result<Vec<u8>, Broken> {
        self.is_over = true;
        self.call.end(None)?;
        Ok(out)
    }
}
