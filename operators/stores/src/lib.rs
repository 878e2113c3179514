//! Where steps keep what must outlive a record: ports to key-value, vector and object stores, to counters and to rates, each with its
//! adapters.
//!
//! An operator holds an `Arc<dyn` [`KeyValue`]`>`, `Arc<dyn` [`Vectors`]`>` or `Arc<dyn` [`Objects`]`>` and cannot
//! tell which adapter is behind it; one contract suite per port runs against them all. Bytes go in and bytes come
//! out: what they mean is the business of the operator.
//!
//! The embedded adapters of the key-value and the vector port share one [`Database`], a file, with one order of
//! writes. Invariant: after a crash that file is as it was after some earlier write, with all the writes before it
//! and none after it, across both ports. So a position of a topic that is stored after what was read up to there
//! never runs ahead of it.

mod clock;
pub mod counters;
pub mod database;
mod error;
pub mod key_value;
pub mod objects;
pub mod rates;
pub mod vectors;

pub use clock::{Clock, wall_clock};
pub use counters::Counters;
pub use database::Database;
pub use error::Error;
pub use key_value::KeyValue;
pub use objects::Objects;
pub use rates::Rates;
pub use vectors::Vectors;

/// What every port answers with.
pub type Answer<'a, T> = futures::future::BoxFuture<'a, Result<T, Error>>;
