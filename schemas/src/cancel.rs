//! A request taken back.

use crate::{Record, RequestId, Tenant, record::json_wire};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The record of `cancels`: `{"id": "…", "tenant": "…"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Cancel {
    /// The request that nobody wants any more.
    pub id: RequestId,
    /// Whose it is; `default` when absent.
    #[serde(default)]
    pub tenant: Tenant,
}

impl Record for Cancel {
    const NAME: &'static str = "Cancel";
    json_wire!();
    fn key(&self) -> Option<&str> {
        Some(self.id.as_str())
    }
}
