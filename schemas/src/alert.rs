//! What somebody spends that somebody else should know of.

use crate::{Record, Tenant, record::json_wire};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AlertKind {
    /// More was spent in a minute than the settings allow anybody without a word.
    Rate,
    /// Many times as much was spent in a minute as in those before it, by their exponentially weighted moving average (EWMA).
    Ewma,
    /// Spent on like this, a budget does not last its day or month.
    Forecast,
    /// So much of a budget is used and held.
    Cap,
}

impl AlertKind {
    /// The word of it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Ewma => "ewma",
            Self::Forecast => "forecast",
            Self::Cap => "cap",
        }
    }
}

/// Whether it begins or is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AlertState {
    /// It is so now.
    Firing,
    /// It was so and is over.
    Resolved,
}

impl AlertState {
    /// The word of it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Firing => "firing",
            Self::Resolved => "resolved",
        }
    }
}

/// The record of `alerts`: one when it begins and one, of the same id, when it is over. All fields are always there; amounts are
/// in `unit`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Alert {
    /// The same of both records, and of a record that is told twice.
    pub id: String,
    /// Whether it begins or is over.
    pub state: AlertState,
    /// What is told.
    pub kind: AlertKind,
    /// Whose spending it is: `all`, `tenant`, `key` or `job`.
    pub holder: String,
    /// The tenant; null for `all`.
    pub tenant: Option<Tenant>,
    /// The key or the job; null for a tenant and for `all`.
    pub name: Option<String>,
    /// The budget by whose counter it is known, as it is written in the settings.
    pub budget: String,
    /// What amounts count: `nano-USD` or `tokens`.
    pub unit: String,
    /// The end of the minute it was seen in. [µs since 1970]
    pub seen_at: i64,
    /// The end of the minute it began in. [µs since 1970]
    pub began_at: i64,
    /// What was spent a minute.
    pub spent: u64,
    /// The EWMA of what was spent a minute before: of all minutes for `forecast`, else of those in which anything was.
    pub pace: u64,
    /// What is used of the budget in its day, month or minute.
    pub used: u64,
    /// What calls under way hold of it.
    pub held: u64,
    /// The most that may be used and held.
    pub limit: u64,
    /// What was compared with the threshold.
    pub value: u64,
    /// What it must be for an alert.
    pub threshold: u64,
    /// When the budget is used up by this pace; null for other kinds, or where it is not. [µs since 1970]
    pub reached_at: Option<i64>,
    /// The same in words.
    pub message: String,
}

impl Record for Alert {
    const NAME: &'static str = "Alert";
    json_wire!();
    fn key(&self) -> Option<&str> {
        Some(&self.id)
    }
}
