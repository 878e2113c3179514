//! Messages as a host reads and writes them.

use crate::budget::Held;
use bytes::Bytes;
pub use forebay_plan::Channel;
use forebay_schemas::{Headers, Source};
use std::{fmt, sync::Arc};

/// A partition of a topic, under the topic's full name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Partition {
    /// The topic's name, with its prefix.
    pub topic: Arc<str>,
    /// The partition's number.
    pub number: i32,
}

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.topic, self.number)
    }
}

/// A topic that a stage reads, under its full name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// The topic's name, with its prefix.
    pub topic: Arc<str>,
    /// What kind of queue it is.
    pub channel: Channel,
}

impl Input {
    /// A topic whose records are read as they come.
    pub fn live(topic: impl Into<Arc<str>>) -> Self {
        Self { topic: topic.into(), channel: Channel::Live }
    }
}

/// A consumer group and what it reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// Its topics.
    pub inputs: Vec<Input>,
}

/// A message that was read.
#[derive(Debug)]
pub struct Incoming {
    /// Where it lies.
    pub partition: Partition,
    /// What kind of queue that is.
    pub channel: Channel,
    /// Its offset there.
    pub offset: i64,
    /// Its timestamp, in milliseconds since 1970.
    pub timestamp_ms: i64,
    /// Its key.
    pub key: Option<Bytes>,
    /// Its value; `None` is a tombstone.
    pub value: Option<Bytes>,
    /// Its headers.
    pub headers: Headers,
    /// Its share of the process's memory.
    pub held: Held,
}

impl Incoming {
    /// `topic/partition/offset`, for a person.
    pub fn place(&self) -> String {
        format!("{}/{}", self.partition, self.offset)
    }

    /// The bytes of its key and value.
    pub fn len(&self) -> usize {
        self.key.as_ref().map_or(0, Bytes::len) + self.value.as_ref().map_or(0, Bytes::len)
    }

    /// Whether it has neither key nor value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where it lies, and since when.
    pub fn source(&self) -> Source {
        let Self { partition, offset, timestamp_ms, .. } = self;
        Source {
            topic: partition.topic.to_string(),
            partition: partition.number,
            offset: *offset,
            timestamp_ms: *timestamp_ms,
        }
    }

    /// An estimate of the memory that a message takes until it is finished.
    pub fn bytes(key: Option<&[u8]>, value: Option<&[u8]>) -> usize {
        // Headers, envelope and the struct itself, as read, as written and in the client library: measured, a million small
        // records took half a gigabyte while this said 512.
        const OVERHEAD: usize = 4_096;
        OVERHEAD + Self::copied(key.map_or(0, <[u8]>::len) + value.map_or(0, <[u8]>::len))
    }

    /// The memory that a body takes until its record is finished.
    pub fn copied(bytes: usize) -> usize {
        // As it was read, decoded, encoded for the next step, and once more on its way there.
        const COPIES: usize = 4;
        bytes.saturating_mul(COPIES)
    }
}

/// A message to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// The topic's full name.
    pub topic: Arc<str>,
    /// Its key.
    pub key: Option<Vec<u8>>,
    /// Its value; `None` is a tombstone.
    pub value: Option<Vec<u8>>,
    /// Its headers.
    pub headers: Headers,
}
