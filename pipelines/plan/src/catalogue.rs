//! What a check must know of operators, without knowing one.

use serde_json::Value;

/// The operators that a pipeline may choose from.
pub trait Catalogue {
    /// The names of all.
    fn names(&self) -> Vec<&'static str>;

    /// What goes in and out of one; `None` where there is none of this name.
    fn describe(&self, operator: &str) -> Option<Description>;

    /// Whether an operator with these settings makes calls that cost something.
    fn is_paid(&self, operator: &str, settings: &Value) -> bool;

    /// What is wrong with an operator's settings; empty where nothing is.
    fn check_settings(&self, operator: &str, settings: &Value) -> Vec<SettingsFault>;
}

/// What goes in and out of an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// The name of the record that it takes.
    pub input: &'static str,
    /// Whether that record is the work of a request, which must end in a result.
    pub is_job: bool,
    /// Its ports, and the name of the record that leaves by each.
    pub ports: Vec<(&'static str, &'static str)>,
    /// The names of the records that it looks up; it needs one compacted topic of each.
    pub tables: Vec<&'static str>,
}

/// One thing that is wrong with an operator's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingsFault {
    /// The keys that lead to it; items of a list count from 0. Empty where the settings as a whole are meant.
    pub path: Vec<String>,
    /// What is wrong.
    pub message: String,
    /// The keys that would be known there, where the last of `path` is not. Otherwise empty: the value is wrong.
    pub known: Vec<String>,
}
