//! Reading on in a partition beside its consumer, for what cannot wait for its turn.
//!
//! A record on a retry topic is read when it is due, which may be in ten minutes. A client that takes its request back
//! should not wait for that: so whoever owns the partition looks ahead, at headers alone, and ends the request at once.
//! The record stays where it is, and a note behind it, on the same partition, says that its request has ended; whoever
//! reads the record later writes nothing. `publish` alone would not do for that: it remembers so many results, and in ten
//! minutes more than these may pass.
//!
//! Invariant: an ending that is written ahead is noted after it is acknowledged and before the record's turn is passed
//! over. Between the two a crash makes it come again, soon, and `publish` knows it; nothing is lost by any.

use crate::message::{Incoming, Partition};
use forebay_schemas::Headers;
use futures::future::BoxFuture;
use std::sync::Arc;

/// How many records one read gives at most.
pub const FOUND_MAX: usize = 1_000;

/// Which messages are wanted, by their headers.
pub type Wanted = Arc<dyn Fn(&Headers) -> bool + Send + Sync>;

/// Reads on in partitions.
pub trait Ahead: Send + Sync + 'static {
    /// Reads a partition from an offset on, to where it ends now, or as far as is good at once.
    fn read(&self, at: &Partition, from: i64, wanted: Wanted) -> BoxFuture<'static, Result<Found, String>>;
}

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// The messages that are wanted, in order.
    pub records: Vec<Incoming>,
    /// From where the partition is to be read on; `None` where its end was reached.
    pub next: Option<i64>,
}
