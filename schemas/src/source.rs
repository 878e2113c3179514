//! Where a record lies, and since when.

use std::{fmt, str::FromStr};

/// A record of a topic. Written as `topic/partition/offset@milliseconds`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its topic.
    pub topic: String,
    /// Its partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
    /// Its timestamp, in milliseconds since 1970.
    pub timestamp_ms: i64,
}

/// A text that is no [`Source`].
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not topic/partition/offset@milliseconds")]
pub struct SourceError(String);

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}@{}", self.topic, self.partition, self.offset, self.timestamp_ms)
    }
}

impl FromStr for Source {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        read(text).ok_or_else(|| SourceError(text.to_owned()))
    }
}

/// Topic names hold neither slash nor `@`.
fn read(text: &str) -> Option<Source> {
    let (place, timestamp) = text.rsplit_once('@')?;
    let mut parts = place.splitn(3, '/');
    let topic = parts.next()?.to_owned();
    let partition = parts.next()?.parse().ok()?;
    let offset = parts.next()?.parse().ok()?;
    Some(Source { topic, partition, offset, timestamp_ms: timestamp.parse().ok()? })
}
