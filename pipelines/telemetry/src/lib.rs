//! What a process tells about itself: metrics, traces, health, logs, and the admin port that serves them.
//!
//! The runtime asks [`Telemetry`] for one [`StepMeter`] per step and calls it around every record; operators report
//! through [`forebay_operator::Event`]s, which end in [`Telemetry::observe`]. Nobody else names OpenTelemetry.
//!
//! Invariant: telling never changes what is told. Counting waits for no collector and no scrape, an unreachable
//! collector costs dropped spans and nothing else, and a label holds one of a bounded set of words: never an id, a
//! tenant or a text of a client.

pub mod admin;
mod alerts;
mod events;
mod health;
mod instruments;
pub mod logging;
mod meter;
mod page;
pub mod pool;
mod span;
mod tables;
mod telemetry;
mod words;

pub use alerts::{AlertMeter, Lost};
pub use health::{BEAT_AGE_MAX, Component, Health, Readiness, Report};
pub use instruments::GenAi;
pub use meter::{Outcome, StepMeter};
pub use page::metrics_reference;
pub use span::StepSpan;
pub use tables::{TableFlush, TableMeter};
pub use telemetry::{Settings, StartError, Telemetry};
