//! What travels beside a record: who asked, until when it matters, where it came from and what it took so far.
//!
//! Invariant: an envelope is made once, by the host, where a record enters from a client; a client's own headers
//! can never pose as one. Every later hop reads it from headers and writes it back with its own time added.

use crate::{Headers, NanoUsd, RequestId, Source, Tenant, retry::text};
use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Names of headers.
pub mod header {
    /// Starts the name of every header that is ours.
    pub const OURS: &str = "forebay-";

    crate::record::headers! {
        /// The request's id.
        ID = "forebay-id";
        /// Whose request it is.
        TENANT = "forebay-tenant";
        /// `backfill`; absent for the interactive lane.
        LANE = "forebay-lane";
        /// When nobody waits any more, in milliseconds since 1970; absent without a deadline.
        DEADLINE = "forebay-deadline";
        /// `topic/partition/offset@timestamp` of the record that asked.
        ORIGIN = "forebay-origin";
        /// The key of the record that asked.
        ORIGIN_KEY = "forebay-origin-key";
        /// Counts redrives; absent for 0. Each generation has a result of its own.
        GENERATION = "forebay-generation";
        /// Counts redrives that ask for a new answer, though one is recorded; absent for 0.
        AGAIN = "forebay-again";
        /// Counts passes through a loop; absent for 0.
        VISIT = "forebay-visit";
        /// Microseconds spent so far, as `name=n` joined by `;`.
        TIMINGS = "forebay-timings";
        /// Nano-dollars spent so far; absent for 0.
        SPEND = "forebay-spend";
        /// Upstream calls so far; absent for 0.
        ATTEMPTS = "forebay-attempts";
        /// `1` where somebody reads the tokens as they come.
        STREAM = "forebay-stream";
        /// A hash of what was asked, as 16 hexadecimal digits: tells a request that came twice from another under its id.
        PAYLOAD = "forebay-payload";
        /// W3C Trace Context.
        TRACEPARENT = "traceparent";
    }
}

/// Which of the two queues a request waits in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Lane {
    /// Somebody waits.
    #[default]
    Interactive,
    /// Nobody waits: it takes what the other lane leaves.
    Backfill,
}

impl Lane {
    /// The word of the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Backfill => "backfill",
        }
    }
}

/// The record that asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Origin {
    /// Its topic.
    pub topic: String,
    /// Its partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
    /// Its key, where it had one; bytes that are no UTF-8 are replaced.
    pub key: Option<String>,
}

/// A part of the way whose time is told apart in a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hop {
    /// Looking in the cache.
    Cache,
    /// Looking for passages.
    Retrieve,
    /// Inference.
    Infer,
    /// Checking the answer.
    Validate,
}

/// Microseconds spent so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// Waiting on topics, over all hops up to the ending.
    pub queue: i64,
    /// Looking in the cache.
    pub cache: Option<i64>,
    /// Looking for passages.
    pub retrieve: Option<i64>,
    /// Inference.
    pub infer: Option<i64>,
    /// Checking the answer.
    pub validate: Option<i64>,
}

impl Timings {
    /// Adds time spent in a part of the way; passing it twice adds up.
    pub fn add(&mut self, hop: Hop, micros: i64) {
        let slot = match hop {
            Hop::Cache => &mut self.cache,
            Hop::Retrieve => &mut self.retrieve,
            Hop::Infer => &mut self.infer,
            Hop::Validate => &mut self.validate,
        };
        *slot = Some(slot.unwrap_or(0).saturating_add(micros));
    }

    fn write(&self) -> String {
        use std::fmt::Write as _;
        let mut text = format!("queue={}", self.queue);
        let parts = [
            ("cache", self.cache),
            ("retrieve", self.retrieve),
            ("infer", self.infer),
            ("validate", self.validate),
        ];
        for (name, micros) in parts {
            if let Some(micros) = micros {
                // Writing to a String cannot fail.
                let _ = write!(text, ";{name}={micros}");
            }
        }
        text
    }

    fn read(text: &str) -> Option<Self> {
        let mut timings = Self::default();
        for part in text.split(';') {
            let (name, micros) = part.split_once('=')?;
            let micros = micros.parse().ok()?;
            match name {
                "queue" => timings.queue = micros,
                "cache" => timings.cache = Some(micros),
                "retrieve" => timings.retrieve = Some(micros),
                "infer" => timings.infer = Some(micros),
                "validate" => timings.validate = Some(micros),
                // A younger version may tell more apart.
                _ => {}
            }
        }
        Some(timings)
    }
}

/// What travels beside a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// The request's id.
    pub id: RequestId,
    /// Whose request it is.
    pub tenant: Tenant,
    /// Which queue it waits in.
    pub lane: Lane,
    /// When nobody waits any more, in milliseconds since 1970.
    pub deadline_at_ms: Option<i64>,
    /// The record that asked.
    pub origin: Origin,
    /// That record's timestamp, in milliseconds since 1970.
    pub accepted_at_ms: i64,
    /// Counts redrives. Each generation has a result of its own.
    pub generation: u32,
    /// Counts redrives that ask for a new answer, though one is recorded.
    pub again: u32,
    /// Counts passes through a loop.
    pub visit: u32,
    /// Time spent so far.
    pub timings: Timings,
    /// Money spent so far.
    pub spend: NanoUsd,
    /// Upstream calls so far.
    pub attempts: u32,
    /// Whether somebody reads the tokens as they come.
    pub stream: bool,
    /// A hash of what was asked, as 16 hexadecimal digits; absent where it could not be read.
    pub payload: Option<String>,
    /// W3C `traceparent` of the hop before.
    pub traceparent: Option<String>,
    /// The client's own headers, echoed to the result.
    pub client: Headers,
}

/// A header of ours that does not say what it must.
#[derive(Debug, thiserror::Error)]
#[error("header {name} is {value:?}, which {fault}")]
pub struct HeaderError {
    name: &'static str,
    value: String,
    fault: &'static str,
}

impl HeaderError {
    pub(crate) fn new(name: &'static str, value: &str, fault: &'static str) -> Self {
        Self { name, value: value.to_owned(), fault }
    }
}

impl Envelope {
    /// The envelope of a record that has just entered; `client` are the headers that came with it.
    pub fn entering(
        id: RequestId,
        tenant: Tenant,
        origin: Origin,
        accepted_at_ms: i64,
        headers: impl IntoIterator<Item = (String, Option<Bytes>)>,
    ) -> Self {
        let mut envelope = Self {
            id,
            tenant,
            lane: Lane::default(),
            deadline_at_ms: None,
            origin,
            accepted_at_ms,
            generation: 0,
            again: 0,
            visit: 0,
            timings: Timings::default(),
            spend: NanoUsd::default(),
            attempts: 0,
            stream: false,
            payload: None,
            traceparent: None,
            client: Headers::new(),
        };
        for (name, value) in headers {
            match value {
                Some(value) if name == header::TRACEPARENT => {
                    envelope.traceparent = String::from_utf8(value.into()).ok();
                }
                // Only a host writes these; a client's are dropped, or it could pose as another tenant.
                _ if name.starts_with(header::OURS) => {}
                value => envelope.client.push((name, value)),
            }
        }
        envelope
    }

    /// Reads the envelope that a host wrote; `None` where there is none.
    pub fn read(headers: &Headers) -> Result<Option<Self>, HeaderError> {
        let text = |name: &'static str| -> Result<Option<&str>, HeaderError> {
            let Some((_, Some(value))) = headers.iter().find(|(key, _)| key == name) else { return Ok(None) };
            let lossy = || String::from_utf8_lossy(value).into_owned();
            let wrong = |_| HeaderError { name, value: lossy(), fault: "is not UTF-8" };
            std::str::from_utf8(value).map(Some).map_err(wrong)
        };
        let Some(id) = text(header::ID)? else { return Ok(None) };
        let id = RequestId::try_from(id.to_owned()).map_err(|_| HeaderError {
            name: header::ID,
            value: id.to_owned(),
            fault: "is empty or longer than 256 bytes",
        })?;
        let tenant = match text(header::TENANT)? {
            Some(tenant) => Tenant::try_from(tenant.to_owned()).map_err(|_| HeaderError {
                name: header::TENANT,
                value: tenant.to_owned(),
                fault: "is empty or longer than 256 bytes",
            })?,
            None => Tenant::default(),
        };
        let (origin, accepted_at_ms) = match text(header::ORIGIN)? {
            Some(value) => read_origin(value)?,
            None => (Origin::default(), 0),
        };
        let theirs = headers.iter().filter(|(name, _)| !name.starts_with(header::OURS)).cloned();
        let mut envelope = Self::entering(id, tenant, origin, accepted_at_ms, theirs);
        envelope.origin.key = text(header::ORIGIN_KEY)?.map(str::to_owned);
        envelope.deadline_at_ms = number(header::DEADLINE, text(header::DEADLINE)?)?;
        envelope.generation = number(header::GENERATION, text(header::GENERATION)?)?.unwrap_or(0);
        envelope.again = number(header::AGAIN, text(header::AGAIN)?)?.unwrap_or(0);
        envelope.visit = number(header::VISIT, text(header::VISIT)?)?.unwrap_or(0);
        envelope.attempts = number(header::ATTEMPTS, text(header::ATTEMPTS)?)?.unwrap_or(0);
        envelope.spend = NanoUsd(number(header::SPEND, text(header::SPEND)?)?.unwrap_or(0));
        envelope.stream = text(header::STREAM)? == Some("1");
        envelope.payload = text(header::PAYLOAD)?.map(str::to_owned);
        if text(header::LANE)? == Some(Lane::Backfill.as_str()) {
            envelope.lane = Lane::Backfill;
        }
        if let Some(value) = text(header::TIMINGS)? {
            envelope.timings = Timings::read(value).ok_or_else(|| HeaderError {
                name: header::TIMINGS,
                value: value.to_owned(),
                fault: "is not name=microseconds joined by semicolons",
            })?;
        }
        Ok(Some(envelope))
    }

    /// Whose request it is, and which, by the envelope that a host wrote; the rest of it is not read.
    pub fn whose(headers: &Headers) -> Option<(Tenant, RequestId)> {
        let id = RequestId::try_from(text(headers, header::ID)?.to_owned()).ok()?;
        let tenant = match text(headers, header::TENANT) {
            Some(tenant) => Tenant::try_from(tenant.to_owned()).ok()?,
            None => Tenant::default(),
        };
        Some((tenant, id))
    }

    /// The envelope as headers, for the next hop. What has its usual value is left out.
    pub fn write(&self) -> Headers {
        let mut headers = Headers::with_capacity(8 + self.client.len());
        let mut put = |name: &str, value: String| headers.push((name.to_owned(), Some(Bytes::from(value))));
        put(header::ID, self.id.as_str().to_owned());
        put(header::TENANT, self.tenant.as_str().to_owned());
        let Origin { topic, partition, offset, key } = &self.origin;
        put(header::ORIGIN, format!("{topic}/{partition}/{offset}@{}", self.accepted_at_ms));
        if let Some(key) = key {
            put(header::ORIGIN_KEY, key.clone());
        }
        put(header::TIMINGS, self.timings.write());
        if let Some(deadline) = self.deadline_at_ms {
            put(header::DEADLINE, deadline.to_string());
        }
        if self.lane != Lane::Interactive {
            put(header::LANE, self.lane.as_str().to_owned());
        }
        let counts = [
            (header::GENERATION, self.generation),
            (header::AGAIN, self.again),
            (header::VISIT, self.visit),
            (header::ATTEMPTS, self.attempts),
        ];
        for (name, count) in counts {
            if count > 0 {
                put(name, count.to_string());
            }
        }
        if self.spend != NanoUsd::default() {
            put(header::SPEND, self.spend.0.to_string());
        }
        if self.stream {
            put(header::STREAM, "1".to_owned());
        }
        if let Some(payload) = &self.payload {
            put(header::PAYLOAD, payload.clone());
        }
        if let Some(traceparent) = &self.traceparent {
            put(header::TRACEPARENT, traceparent.clone());
        }
        headers.extend(self.client.iter().cloned());
        headers
    }
}

pub(crate) fn number<N: std::str::FromStr>(
    name: &'static str,
    text: Option<&str>,
) -> Result<Option<N>, HeaderError> {
    let wrong =
        |value: &str| HeaderError { name, value: value.to_owned(), fault: "is not a number in range" };
    text.map(|value| value.parse().map_err(|_| wrong(value))).transpose()
}

fn read_origin(text: &str) -> Result<(Origin, i64), HeaderError> {
    let wrong = |_| HeaderError::new(header::ORIGIN, text, "is not topic/partition/offset@milliseconds");
    let Source { topic, partition, offset, timestamp_ms } = text.parse().map_err(wrong)?;
    Ok((Origin { topic, partition, offset, key: None }, timestamp_ms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn full() -> Envelope {
        let origin = Origin { topic: "requests".into(), partition: 3, offset: 7, key: Some("k".into()) };
        let client =
            vec![("x-mine".to_owned(), Some(Bytes::from_static(b"\xff"))), ("x-null".to_owned(), None)];
        let id = RequestId::try_from("a".to_owned()).unwrap();
        let mut envelope = Envelope::entering(id, Tenant::default(), origin, 1_700_000_000_000, client);
        envelope.traceparent = Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_owned());
        envelope
    }

    proptest! {
        #[test]
        fn an_envelope_survives_a_hop(
            deadline in proptest::option::of(any::<i64>()), visit: u32, attempts: u32, spend: i64, stream: bool,
            queue: i64, infer in proptest::option::of(any::<i64>()),
        ) {
            let mut envelope = full();
            (envelope.deadline_at_ms, envelope.visit, envelope.attempts) = (deadline, visit, attempts);
            (envelope.spend, envelope.stream) = (NanoUsd(spend), stream);
            (envelope.timings.queue, envelope.timings.infer) = (queue, infer);
            envelope.lane = if stream { Lane::Backfill } else { Lane::Interactive };
            prop_assert_eq!(Envelope::read(&envelope.write()).unwrap(), Some(envelope));
        }
    }

    #[test]
    fn a_client_cannot_pose_as_another_tenant() {
        let forged = vec![(header::TENANT.to_owned(), Some(Bytes::from_static(b"victim")))];
        let id = RequestId::try_from("a".to_owned()).unwrap();
        let envelope = Envelope::entering(id, Tenant::default(), Origin::default(), 0, forged);
        assert_eq!(envelope.tenant, Tenant::default());
        assert!(envelope.client.is_empty());
    }

    #[test]
    fn a_header_that_is_no_number_is_named() {
        let mut headers = full().write();
        headers.push((header::DEADLINE.to_owned(), Some(Bytes::from_static(b"soon"))));
        let refused = Envelope::read(&headers).unwrap_err().to_string();
        assert_eq!(refused, r#"header forebay-deadline is "soon", which is not a number in range"#);
    }
}
