//! A compacted topic that a process reads whole, so that its operators can look things up.
//!
//! Kafka Streams calls this a global table. The topic is the truth; what a table keeps locally is a copy that may
//! be thrown away and read again.

use crate::Failure;
use bytes::Bytes;
use futures::future::BoxFuture;

/// One record of a compacted topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The partition that it lies in.
    pub partition: i32,
    /// Its offset there.
    pub offset: i64,
    /// What it is about.
    pub key: String,
    /// What it now is; `None` takes it away.
    pub value: Option<Bytes>,
}

/// A copy of a compacted topic.
///
/// Applying a change twice is harmless, and changes of one key arrive in the order of the topic.
pub trait Table: Send + Sync + 'static {
    /// The name of the topic's record.
    fn record(&self) -> &'static str;

    /// Whether a record without a key is none of the table's. A table that reads only values says no.
    fn needs_key(&self) -> bool {
        true
    }

    /// The next offset to read of a partition, where the copy remembers one that is as old as its content.
    /// `None` means from the start.
    fn position(&self, partition: i32) -> BoxFuture<'_, Result<Option<i64>, Failure>>;

    /// Forgets everything: the topic was made anew, or forgot what this copy had not read yet.
    fn clear(&self) -> BoxFuture<'_, Result<(), Failure>>;

    /// Takes changes in. A change that cannot be read is given back with the reason, and is passed over.
    fn apply(&self, changes: Vec<Change>) -> BoxFuture<'_, Result<Vec<(Change, String)>, Failure>>;
}
