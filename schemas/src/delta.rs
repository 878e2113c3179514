//! A piece of an answer while it is being written.

use crate::{Record, Tenant, record::json_wire};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The record of `deltas`. Best effort: it may be lost, and the result is whole without it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Delta {
    /// The request's id.
    pub id: String,
    /// Whose request it is: ids are unique within a tenant only.
    #[serde(default)]
    pub tenant: Tenant,
    /// Which call wrote it; pieces of a higher attempt replace those of a lower.
    pub attempt: u32,
    /// Counts from 0 within an attempt.
    pub seq: u32,
    /// The text to append.
    pub text: String,
}

impl Record for Delta {
    const NAME: &'static str = "Delta";
    json_wire!();
    fn key(&self) -> Option<&str> {
        Some(&self.id)
    }
}
