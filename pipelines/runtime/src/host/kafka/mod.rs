//! Over Kafka: a consumer group for each stage, one producer for each process.

mod ahead;
mod client;
mod ledger;
mod lifeline;
mod read_back;
pub mod registry;
mod session;
mod sink;
mod source;
mod table;
mod topic_ids;
pub mod topics;
mod watch;

pub use ahead::KafkaAhead;
pub use client::{Kafka, KafkaSettings, LogContext, SettingsError, UnreachableError, may_be_secret};
pub use ledger::KafkaLedger;
pub use lifeline::{LastingContext, looked_after};
pub use registry::{Registry, RegistryError, RegistrySettings};
pub use sink::KafkaSink;
pub use source::{KafkaSource, ReadBounds, Reading, headers};
pub use table::{TableError, TableReader};
pub use topic_ids::{TopicIds, TopicIdsError};
