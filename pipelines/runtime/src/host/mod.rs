//! Where stages run: over Kafka, or in memory for tests. An operator cannot tell which.

pub mod kafka;
pub mod memory;
