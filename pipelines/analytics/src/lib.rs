//! The output log as tables, and SQL over them.
//!
//! [`sink`] moves the rows of `outcomes`, `attempts` and their like from Kafka into Delta tables, each exactly once;
//! [`table`] says what the tables are and [`lake`] where they lie.
//!
//! Invariant: nothing here is linked by `forebay`. Whoever edits an operator never waits for DataFusion.

mod compact;
pub mod decode;
mod encode;
pub mod lake;
pub mod settings;
pub mod sink;
pub mod table;
