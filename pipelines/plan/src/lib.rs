//! Reads a pipeline and checks it: from the text of a file to a plan that can run, or to all its faults at once.
//!
//! A fault says file, line, column and what is wrong, and where it can, what was meant. The same check runs in
//! tests, in `forebay check` and at start.
//!
//! Invariant: a [`Plan`] exists only for a pipeline without faults, so what runs a plan never has to ask whether
//! a topic is known or a port is routed. This crate knows no operator and no Kafka: operators come in through
//! [`Catalogue`].

pub mod cases;
mod catalogue;
mod check;
pub mod explain;
mod faults;
mod fields;
mod graph;
pub mod leaves;
mod name;
mod nearest;
mod pipeline;
mod plan;
mod schema;
mod yaml;

pub use catalogue::{Catalogue, Description, SettingsFault};
pub use check::check;
pub use faults::{Fault, Faults, Place};
pub use name::{NAME_CHARS_MAX, PREFIX_CHARS_MAX};
pub use pipeline::{OwnTopic, Pipeline, Placed, Route, Settings, Step, parse};
pub use plan::{
    Ambiguous, Channel, ENDED, IN_FLIGHT_DEFAULT, Input, Order, Plan, PlannedStep, PlannedTopic, Queueing,
    UnknownStep,
};
pub use schema::json_schema;
pub use yaml::{DEPTH_MAX, FILE_BYTES_MAX, NODES_MAX, utf8};

/// Parses and checks in one go, so that the faults of both come together.
///
/// Where the file could only be read in part, its steps are checked as far as they go; what depends on the whole
/// graph waits until the file can be read, since half a graph has faults that nobody made.
pub fn plan(file: &str, text: &str, catalogue: &dyn Catalogue) -> Result<Plan, Faults> {
    let (pipeline, mut faults) = pipeline::parse_what_can_be(file, text);
    let Some(pipeline) = pipeline else { return Err(faults) };
    match check(&pipeline, catalogue) {
        Ok(plan) => faults.or(plan),
        Err(more) => {
            faults.extend(more);
            Err(faults)
        }
    }
}
