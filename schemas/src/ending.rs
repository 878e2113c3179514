//! How a request ended, before anyone is told.

use crate::{
    CacheStatus, Generated, Identity, Record, Request, Retrieval, Status, Verdict, record::json_wire,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Fault {
    /// A word of a closed vocabulary, such as `undecodable`, `model_rejected`, `deadline`.
    pub code: String,
    /// What happened, for a person; never the prompt or a key.
    pub message: String,
}

/// The record of `endings`: all that `publish` needs to write the result and the wide row.
///
/// It carries the ids of the passages and not their text: nobody behind it reads them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Ending {
    /// How it ended.
    pub status: Status,
    /// The step that ended it.
    pub stage: String,
    /// What was asked; absent where it could not be read.
    pub request: Option<Request>,
    /// How passages were sought; absent where none were.
    pub retrieval: Option<Retrieval>,
    /// The ids of the chunks that the model saw, best first.
    pub chunks: Vec<String>,
    /// Whether the answer came from the cache.
    pub cache: CacheStatus,
    /// The answer; present also where it was blocked, and, as far as it was read, where it broke off.
    pub answer: Option<Generated>,
    /// What validation found; absent where it did not run.
    pub verdict: Option<Verdict>,
    /// Why there is no answer.
    pub error: Option<Fault>,
}

impl Ending {
    /// A request that ends without an answer.
    pub fn without_answer(
        status: Status,
        stage: impl Into<String>,
        request: Option<Request>,
        error: Fault,
    ) -> Self {
        Self {
            status,
            stage: stage.into(),
            request,
            retrieval: None,
            chunks: Vec::new(),
            cache: CacheStatus::Bypass,
            answer: None,
            verdict: None,
            error: Some(error),
        }
    }
}

impl Record for Ending {
    const NAME: &'static str = "Ending";
    json_wire!();
    fn request(&self) -> Option<&Request> {
        self.request.as_ref()
    }
    fn identity(&self) -> Identity {
        self.request.as_ref().map(Request::identity).unwrap_or_default()
    }
}
