//! What validation found.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is to become of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Judgement {
    /// It goes out.
    Pass,
    /// It goes out, and the findings with it.
    Annotate,
    /// It does not go out.
    Block,
}

impl Judgement {
    /// The word of the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Annotate => "annotate",
            Self::Block => "block",
        }
    }
}

/// One thing that a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Finding {
    /// A word of a closed vocabulary, such as `answer_empty`.
    pub code: String,
    /// What was found, for a person.
    pub message: String,
}

/// The judgement of all checks on one answer, and what they found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Verdict {
    /// What is to become of the answer.
    pub judgement: Judgement,
    /// What was found; empty on a clean pass.
    pub findings: Vec<Finding>,
}
