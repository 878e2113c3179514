//! Hosts any operator: moves its records from topic to topic, over Kafka or in memory.
//!
//! Follow a record: a [`host`] hands it to [`drive`], the only loop; [`stage`] says what the record becomes;
//! the host's sink has it acknowledged; [`tracker`] then lets the offset go on.
//!
//! Architecture invariant: this crate knows no operator. An operator reaches it as a `dyn Step`, and its settings,
//! stores and models are somebody else's business.

pub mod ahead;
pub mod budget;
pub mod cancels;
pub mod cases;
pub mod claims;
pub mod crash;
pub mod drive;
pub mod fence;
pub mod host;
pub mod ledger;
pub mod message;
pub mod once;
pub mod process;
mod queue;
mod site;
pub mod stage;
pub mod tracker;
