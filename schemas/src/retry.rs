//! What a host notes on a record that it sets aside, to try it later.
//!
//! Invariant: only hosts and redrives write these headers, and only on topics that no client writes to.

use crate::{HeaderError, Headers, Source, envelope::number};
use bytes::Bytes;

/// Header names.
pub mod header {
    crate::record::headers! {
        /// When it is to be tried, in milliseconds since 1970.
        DUE = "forebay-retry-due";
        /// Tries so far in this step.
        TRIES = "forebay-retry-tries";
        /// How often it was set aside in this step.
        ROUND = "forebay-retry-round";
        /// When it first failed, in milliseconds since 1970.
        SINCE = "forebay-retry-since";
        /// `topic/partition/offset@ms` of the record that the step read first.
        SOURCE = "forebay-retry-source";
        /// That record's key, where it had one.
        KEY = "forebay-retry-key";
        /// How often it was redriven from dead letters in this step; absent for 0.
        REDRIVES = "forebay-retry-redrives";
        /// On a message that is no record: the offset, in the same partition, of a record whose request was taken back and
        /// ended before the record's turn.
        ENDED = "forebay-retry-ended";
    }
}

/// What a host notes on a record that it sets aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    /// When it is to be tried, in milliseconds since 1970.
    pub due_ms: i64,
    /// Tries so far in this step.
    pub tries: u32,
    /// How often it was set aside in this step.
    pub round: u32,
    /// When it first failed, in milliseconds since 1970.
    pub since_ms: i64,
    /// Where the record lies that the step read first.
    pub source: Source,
    /// That record's key.
    pub key: Option<Bytes>,
    /// How often it was redriven from dead letters in this step.
    pub redrives: u32,
}

impl Retry {
    /// When a record is due; `None` where nobody set it aside.
    pub fn due_ms(headers: &Headers) -> Option<i64> {
        text(headers, header::DUE)?.parse().ok()
    }

    /// The record that the step read first, and its key; `None` where nobody set the record aside.
    pub fn first(headers: &Headers) -> Option<(Source, Option<Bytes>)> {
        Some((text(headers, header::SOURCE)?.parse().ok()?, value(headers, header::KEY)))
    }

    /// Notes which record a step read first.
    pub fn write_first(headers: &mut Headers, source: &Source, key: Option<&Bytes>) {
        headers.push((header::SOURCE.to_owned(), Some(Bytes::from(source.to_string()))));
        if let Some(key) = key {
            headers.push((header::KEY.to_owned(), Some(key.clone())));
        }
    }

    /// The offset of the record that was ended before its turn, where this message says so.
    pub fn ended(headers: &Headers) -> Option<i64> {
        text(headers, header::ENDED)?.parse().ok()
    }

    /// The headers of a message that says so of the record at this offset.
    pub fn note_ended(offset: i64) -> Headers {
        [(header::ENDED.to_owned(), Some(Bytes::from(offset.to_string())))].into_iter().collect()
    }

    /// Reads what was noted; `None` where nothing was.
    pub fn read(headers: &Headers) -> Result<Option<Self>, HeaderError> {
        let text = |name| text(headers, name);
        let Some(due_ms) = number(header::DUE, text(header::DUE))? else { return Ok(None) };
        let source = text(header::SOURCE).unwrap_or_default();
        let source = source.parse().map_err(|_| {
            HeaderError::new(header::SOURCE, source, "is not topic/partition/offset@milliseconds")
        })?;
        let key = value(headers, header::KEY);
        Ok(Some(Self {
            due_ms,
            tries: number(header::TRIES, text(header::TRIES))?.unwrap_or(0),
            round: number(header::ROUND, text(header::ROUND))?.unwrap_or(0),
            since_ms: number(header::SINCE, text(header::SINCE))?.unwrap_or(due_ms),
            source,
            key,
            redrives: number(header::REDRIVES, text(header::REDRIVES))?.unwrap_or(0),
        }))
    }

    /// Notes it on a record.
    pub fn write(&self, headers: &mut Headers) {
        let mut put = |name: &str, value: String| headers.push((name.to_owned(), Some(Bytes::from(value))));
        put(header::DUE, self.due_ms.to_string());
        put(header::TRIES, self.tries.to_string());
        put(header::ROUND, self.round.to_string());
        put(header::SINCE, self.since_ms.to_string());
        if self.redrives > 0 {
            put(header::REDRIVES, self.redrives.to_string());
        }
        Self::write_first(headers, &self.source, self.key.as_ref());
    }
}

pub(crate) fn text<'h>(headers: &'h Headers, name: &str) -> Option<&'h str> {
    let (_, value) = headers.iter().find(|(key, _)| key == name)?;
    std::str::from_utf8(value.as_deref()?).ok()
}

fn value(headers: &Headers, name: &str) -> Option<Bytes> {
    headers.iter().find(|(key, _)| key == name).and_then(|(_, value)| value.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_read() {
        let source = Source { topic: "prompts".into(), partition: 3, offset: 7, timestamp_ms: 11 };
        let retry = Retry {
            due_ms: 12,
            tries: 3,
            round: 1,
            since_ms: 10,
            source,
            key: Some(Bytes::from_static(b"k")),
            redrives: 2,
        };
        let mut headers = Headers::new();
        retry.write(&mut headers);
        assert_eq!(Retry::due_ms(&headers), Some(12));
        assert_eq!(Retry::read(&headers).unwrap(), Some(retry));
        assert_eq!(Retry::read(&Headers::new()).unwrap(), None);
        assert_eq!(Retry::ended(&headers), None);
        assert_eq!(Retry::ended(&Retry::note_ended(7)), Some(7));
    }

    #[test]
    fn a_source_that_is_none_is_named() {
        let headers = [(header::DUE, "12"), (header::SOURCE, "prompts/3")];
        let headers = headers.map(|(name, value)| (name.to_owned(), Some(Bytes::from(value)))).into();
        let refused = Retry::read(&headers).unwrap_err().to_string();
        assert_eq!(
            refused,
            r#"header forebay-retry-source is "prompts/3", which is not topic/partition/offset@milliseconds"#
        );
    }
}
