//! The published form of a pipeline's file, from which editors complete and explain keys.
//!
//! Invariant: these types say the keys that the reader asks for, and no others; a test compares the two.

#![expect(dead_code, reason = "the types are the published form; the reader keeps places, which they cannot")]

use crate::{IN_FLIGHT_DEFAULT, name, pipeline};
use forebay_schemas::topics;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// The JSON Schema of a pipeline's file.
pub fn json_schema() -> Value {
    schemars::schema_for!(PipelineFile).to_value()
}

/// A graph of steps, joined by topics.
#[derive(JsonSchema)]
#[schemars(title = "Forebay pipeline", deny_unknown_fields)]
struct PipelineFile {
    /// The pipeline's name; with a step's key it names the step's consumer group.
    #[schemars(schema_with = "a_name")]
    name: String,
    /// Topics of the pipeline's own, beside Forebay's.
    #[schemars(default, skip_serializing_if = "unstated")]
    topics: BTreeMap<Name, TopicForm>,
    /// The steps by their keys. Each reads topics, runs an operator, and leads each of its ports to a topic.
    #[schemars(extend("minProperties" = 1))]
    steps: BTreeMap<Name, StepForm>,
}

/// A topic of the pipeline's own.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
struct TopicForm {
    /// The record that lies on it, such as `Completion`.
    record: String,
    /// How it forgets: after `hours`, or when a younger record has the same key.
    #[schemars(default)]
    cleanup: CleanupForm,
    /// Hours until a record may go.
    #[schemars(default = "hours", range(min = 1, max = 87_840))]
    hours: u32,
    /// Whether clients write to it.
    #[schemars(default)]
    from_clients: bool,
    /// Whether clients read it.
    #[schemars(default)]
    to_clients: bool,
}

/// How a topic forgets.
#[derive(Default, JsonSchema, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum CleanupForm {
    #[default]
    Delete,
    Compact,
}

/// One step.
#[derive(JsonSchema)]
#[schemars(deny_unknown_fields)]
struct StepForm {
    /// The operator that it runs.
    operator: String,
    /// The topic that it reads, or a list of them.
    from: OneOrMany,
    /// The topic to which each of the operator's ports leads. The port `ended` leads to `endings` by itself.
    #[schemars(default, skip_serializing_if = "unstated")]
    to: BTreeMap<String, TopicName>,
    /// The compacted topics that the operator looks things up in.
    #[schemars(default, skip_serializing_if = "unstated")]
    tables: OneOrMany,
    /// How many records may be under way at once.
    #[schemars(default = "in_flight", range(min = 1, max = 65_536))]
    in_flight: usize,
    /// How often one record may pass. Every cycle needs it on one of its steps.
    #[schemars(default, skip_serializing_if = "unstated", range(min = 1, max = 1_000))]
    visits_max: u32,
    /// `key` finishes records of one key one after the other; `any`, which is usual, as they come to an end.
    #[schemars(default)]
    order: OrderForm,
    /// `fair` lets tenants take turns, and sets aside on `overflow.{step}` what one of them has beyond its share of a long
    /// queue: usual where records are requests and `order` is `any`. `fifo` serves first what came first.
    #[schemars(default, skip_serializing_if = "unstated")]
    queue: QueueForm,
    /// Whether calls that cost something are remembered, so that an answer which was paid for is never paid for again; only
    /// for a step that makes such calls. The extractive model costs nothing, and nothing is remembered of it.
    #[schemars(default)]
    ledger: LedgerForm,
    /// What is done about a paid call that was under way when its process vanished: `retry` makes it again, at most twice;
    /// `park` puts the record aside as a dead letter at once.
    #[schemars(default)]
    ambiguous: AmbiguousForm,
    /// The operator's settings.
    #[schemars(default, skip_serializing_if = "unstated")]
    settings: Map<String, Value>,
}

/// In which order a step finishes its records.
#[derive(Default, JsonSchema, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum OrderForm {
    #[default]
    Any,
    Key,
}

/// How a step deals with a queue that is longer than it can work off.
#[derive(Default, JsonSchema, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum QueueForm {
    Fifo,
    #[default]
    Fair,
}

/// Whether paid calls are remembered.
#[derive(Default, JsonSchema, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum LedgerForm {
    #[default]
    On,
    Off,
}

/// What is done about a paid call whose end nobody knows.
#[derive(Default, JsonSchema, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum AmbiguousForm {
    #[default]
    Retry,
    Park,
}

/// One topic, or a list of topics.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum OneOrMany {
    One(TopicName),
    Many(Vec<TopicName>),
}

impl Default for OneOrMany {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

fn hours() -> u32 {
    pipeline::HOURS
}

fn in_flight() -> usize {
    IN_FLIGHT_DEFAULT
}

/// A key that may be absent, and whose absence is not some value.
fn unstated<T>(_: &T) -> bool {
    true
}

/// A name that the pipeline gives.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Name(String);

impl JsonSchema for Name {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Name".into()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        a_name(generator)
    }
    fn inline_schema() -> bool {
        true
    }
}

fn a_name(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "pattern": name::PATTERN, "maxLength": name::NAME_CHARS_MAX})
}

/// The name of a topic: one of Forebay's, which editors can offer, or one of the pipeline's own.
struct TopicName;

impl JsonSchema for TopicName {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Topic".into()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let known: Vec<&str> = topics::ALL.iter().map(|topic| topic.name).collect();
        json_schema!({"anyOf": [{"enum": known}, a_name(generator)]})
    }
}
