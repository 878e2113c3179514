//! The output log as tables, and SQL over them.
//!
//! [`sink`] moves the rows of `outcomes`, `attempts` and their like from Kafka into Delta tables, each exactly once;
//! [`table`] says what the tables are and [`lake`] where they lie. [`session`] answers SQL over them, with [`functions`] and [`views`]
//! of our own and behind [`guards`]; [`shell`] is where a person asks, and [`report`] what one reads.
//!
//! Invariant: nothing here is linked by `forebay`. Whoever edits an operator never waits for DataFusion.

pub mod cluster;
mod compact;
#[cfg(test)]
mod dashboards;
pub mod decode;
mod encode;
pub mod format;
pub mod functions;
pub mod generate;
pub mod guards;
pub mod http;
pub mod kafka_table;
pub mod lake;
pub mod live;
pub mod pg;
#[cfg(test)]
mod reference;
pub mod report;
mod rollup;
pub mod session;
pub mod settings;
pub mod shell;
pub mod sink;
mod stall;
pub mod table;
pub mod views;
