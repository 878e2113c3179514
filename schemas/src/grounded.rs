//! A question with what may answer it.

use crate::{Identity, Passage, Record, Request, record::json_wire};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How passages were sought. Kept with an answer so that a cache can seek again and compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Retrieval {
    /// At most so many passages.
    pub limit: usize,
    /// At most so many tokens in all of them, estimated.
    pub tokens_max: usize,
}

/// The record of `prompts`: a request and its passages, best first. No passages is an answer too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Grounded {
    /// What was asked.
    pub request: Request,
    /// How the passages were sought.
    pub retrieval: Retrieval,
    /// What may answer it, best first.
    pub passages: Vec<Passage>,
}

impl Record for Grounded {
    const NAME: &'static str = "Grounded";
    const JOB: bool = true;
    json_wire!();
    fn request(&self) -> Option<&Request> {
        Some(&self.request)
    }
    fn identity(&self) -> Identity {
        self.request.identity()
    }
}
