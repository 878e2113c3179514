//! A record that a step could not process, kept whole, and the note that it was given to its step once more.
//!
//! Invariant: a dead letter carries all that a redrive needs: the original's bytes as its value, its envelope, and
//! beside them the headers below. Letters of one key are one letter; the one with the most redrives counts.

use crate::{
    DecodeError, EncodeError, HeaderError, Headers, NanoUsd, Record, RequestId, Source, Tenant,
    envelope::number, retry::text,
};
use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Header names of `dead-letters`. The message's value is the original record's bytes, untouched; all that is
/// known about it stands in headers, so that a redrive is a copy.
pub mod header {
    /// Starts the name of every one of them.
    pub const OURS: &str = "forebay-dead-";

    crate::record::headers! {
        /// The name of the record that the step wanted.
        SCHEMA = "forebay-dead-schema";
        /// The id of the request; derived where the record did not say.
        ID = "forebay-dead-id";
        /// Whose request it was.
        TENANT = "forebay-dead-tenant";
        /// How often the request had been redriven, at any step.
        GENERATION = "forebay-dead-generation";
        /// Present where the original was too large to copy: `omitted, n bytes at topic/partition/offset@ms`.
        BODY = "forebay-dead-body";
        /// The step that gave up.
        STAGE = "forebay-dead-stage";
        /// The pipeline of that step.
        PIPELINE = "forebay-dead-pipeline";
        /// The topic, partition, offset and timestamp of the original: `topic/partition/offset@ms`.
        SOURCE = "forebay-dead-source";
        /// The original's key, where it had one.
        KEY = "forebay-dead-key";
        /// `undecodable`, `rejected`, `unavailable` or `panicked`.
        CLASS = "forebay-dead-class";
        /// A word of a closed vocabulary.
        CODE = "forebay-dead-code";
        /// What happened, for a person; at most 1 KiB.
        MESSAGE = "forebay-dead-message";
        /// How often it was tried.
        ATTEMPTS = "forebay-dead-attempts";
        /// When it first failed in this step, in milliseconds since 1970.
        SINCE = "forebay-dead-since";
        /// The id of the first upstream call that the step makes for it.
        CALL = "forebay-dead-call";
        /// When nobody waits any more, in milliseconds since 1970; absent without a deadline.
        DEADLINE = "forebay-dead-deadline";
        /// Nano-dollars spent on the request so far.
        PAID = "forebay-dead-paid";
        /// How often this record had been redriven at this step.
        REDRIVES = "forebay-dead-redrives";
        /// On a message without a value: the dead letter of this key was redriven, to `topic/partition/offset@ms`, in
        /// the generation and as the redrive that stand beside.
        REDRIVEN = "forebay-dead-redriven";
    }
}

/// The longest message that a dead letter carries.
pub const MESSAGE_BYTES_MAX: usize = 1024;

/// What the headers of a dead letter say, as `dlq` and the table sink read them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeadLetter {
    /// The name of the record that the step wanted.
    pub schema: String,
    /// The id of the request; derived where the record did not say.
    pub id: RequestId,
    /// Whose request it was.
    pub tenant: Tenant,
    /// How often the request had been redriven, at any step.
    pub generation: u32,
    /// The step that gave up.
    pub stage: String,
    /// The pipeline of that step.
    pub pipeline: String,
    /// The topic of the original.
    pub topic: String,
    /// Its partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
    /// Its timestamp, in milliseconds since 1970.
    pub timestamp_ms: i64,
    /// `undecodable`, `rejected`, `unavailable` or `panicked`.
    pub class: String,
    /// A word of a closed vocabulary.
    pub code: String,
    /// What happened.
    pub message: String,
    /// How often it was tried.
    pub attempts: u32,
    /// When it first failed in this step, in milliseconds since 1970.
    pub since_ms: i64,
    /// The id of the first upstream call that the step makes for it.
    pub call_id: String,
    /// When nobody waits any more, in milliseconds since 1970.
    pub deadline_at_ms: Option<i64>,
    /// What was spent on the request so far.
    pub paid_nano_usd: NanoUsd,
    /// How often this record had been redriven at this step.
    pub redrives: u32,
    /// Where the original's bytes lie, if they were too large to copy.
    pub body: Option<String>,
}

/// A message of `dead-letters` that is no dead letter.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Without it there is nothing to act on.
    #[error("a dead letter has no header {0}")]
    Missing(&'static str),
    /// A header says what it cannot mean.
    #[error(transparent)]
    Header(#[from] HeaderError),
}

impl DeadLetter {
    /// Reads the headers of a dead letter.
    pub fn read(headers: &Headers) -> Result<Self, ReadError> {
        let text = |name| text(headers, name);
        let wanted = |name| text(name).ok_or(ReadError::Missing(name));
        let said = |name| text(name).unwrap_or_default().to_owned();
        let count = |name| number(name, text(name)).map(Option::unwrap_or_default);
        let Source { topic, partition, offset, timestamp_ms } =
            source(header::SOURCE, wanted(header::SOURCE)?)?;
        let (id, tenant) = (wanted(header::ID)?, text(header::TENANT));
        let fault = "is empty or longer than 256 bytes";
        Ok(Self {
            schema: said(header::SCHEMA),
            id: RequestId::try_from(id.to_owned()).map_err(|_| HeaderError::new(header::ID, id, fault))?,
            tenant: match tenant {
                Some(tenant) => Tenant::try_from(tenant.to_owned())
                    .map_err(|_| HeaderError::new(header::TENANT, tenant, fault))?,
                None => Tenant::default(),
            },
            generation: count(header::GENERATION)?,
            stage: wanted(header::STAGE)?.to_owned(),
            pipeline: said(header::PIPELINE),
            topic,
            partition,
            offset,
            timestamp_ms,
            class: said(header::CLASS),
            code: said(header::CODE),
            message: said(header::MESSAGE),
            attempts: count(header::ATTEMPTS)?,
            since_ms: number(header::SINCE, text(header::SINCE))?.unwrap_or(timestamp_ms),
            call_id: said(header::CALL),
            deadline_at_ms: number(header::DEADLINE, text(header::DEADLINE))?,
            paid_nano_usd: NanoUsd(number(header::PAID, text(header::PAID))?.unwrap_or_default()),
            redrives: count(header::REDRIVES)?,
            body: text(header::BODY).map(str::to_owned),
        })
    }

    /// The letter as headers; `key` is the original's, byte for byte.
    pub fn write(&self, key: Option<&Bytes>) -> Headers {
        let mut headers = Headers::new();
        let mut put = |name: &str, value: String| headers.push((name.to_owned(), Some(Bytes::from(value))));
        put(header::STAGE, self.stage.clone());
        put(header::PIPELINE, self.pipeline.clone());
        put(header::SOURCE, self.source().to_string());
        put(header::SCHEMA, self.schema.clone());
        put(header::ID, self.id.as_str().to_owned());
        put(header::TENANT, self.tenant.as_str().to_owned());
        put(header::GENERATION, self.generation.to_string());
        put(header::CLASS, self.class.clone());
        put(header::CODE, self.code.clone());
        put(header::MESSAGE, Self::cut(&self.message).to_owned());
        put(header::ATTEMPTS, self.attempts.to_string());
        put(header::SINCE, self.since_ms.to_string());
        put(header::CALL, self.call_id.clone());
        if let Some(deadline) = self.deadline_at_ms {
            put(header::DEADLINE, deadline.to_string());
        }
        put(header::PAID, self.paid_nano_usd.0.to_string());
        put(header::REDRIVES, self.redrives.to_string());
        if let Some(body) = &self.body {
            put(header::BODY, body.clone());
        }
        if let Some(key) = key {
            headers.push((header::KEY.to_owned(), Some(key.clone())));
        }
        headers
    }

    /// Where the original lies.
    pub fn source(&self) -> Source {
        let Self { topic, partition, offset, timestamp_ms, .. } = self;
        Source { topic: topic.clone(), partition: *partition, offset: *offset, timestamp_ms: *timestamp_ms }
    }

    /// The key of the message: the step and where the original lies, so that a second copy is recognised.
    pub fn message_key(&self) -> String {
        let Self { stage, topic, partition, offset, .. } = self;
        format!("{stage}/{topic}/{partition}/{offset}")
    }

    /// What stands in place of a body that was too large to copy.
    pub fn omitted(bytes: usize, at: &Source) -> String {
        format!("omitted, {bytes} bytes at {at}")
    }

    /// Where the original's bytes lie, if they were too large to copy.
    pub fn body_at(&self) -> Option<Source> {
        self.body.as_deref()?.rsplit_once(" at ")?.1.parse().ok()
    }

    /// `message`, cut at a character to the bytes that a dead letter may carry.
    pub fn cut(message: &str) -> &str {
        let mut end = message.len().min(MESSAGE_BYTES_MAX);
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        &message[..end]
    }
}

/// The original's key, byte for byte.
pub fn original_key(headers: &Headers) -> Option<Bytes> {
    headers.iter().find(|(name, _)| name == header::KEY).and_then(|(_, value)| value.clone())
}

/// The note that a dead letter was given to its step once more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redriven {
    /// Where the copy lies, and since when.
    pub to: Source,
    /// The generation of the copy.
    pub generation: u32,
    /// How often the record had been redriven with this copy: one more than its letter says.
    pub redrives: u32,
}

impl Redriven {
    /// Reads a note; `None` where the message is none.
    pub fn read(headers: &Headers) -> Result<Option<Self>, HeaderError> {
        let Some(to) = text(headers, header::REDRIVEN) else { return Ok(None) };
        let count = |name| number(name, text(headers, name)).map(Option::unwrap_or_default);
        Ok(Some(Self {
            to: source(header::REDRIVEN, to)?,
            generation: count(header::GENERATION)?,
            redrives: count(header::REDRIVES)?,
        }))
    }

    /// The note as headers.
    pub fn write(&self) -> Headers {
        let said = [
            (header::REDRIVEN, self.to.to_string()),
            (header::GENERATION, self.generation.to_string()),
            (header::REDRIVES, self.redrives.to_string()),
        ];
        said.map(|(name, value)| (name.to_owned(), Some(Bytes::from(value)))).into()
    }
}

fn source(name: &'static str, text: &str) -> Result<Source, HeaderError> {
    text.parse().map_err(|_| HeaderError::new(name, text, "is not topic/partition/offset@milliseconds"))
}

impl Record for DeadLetter {
    const NAME: &'static str = "DeadLetter";
    fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        crate::from_json(body)
    }
    fn encode(&self) -> Result<Option<Vec<u8>>, EncodeError> {
        crate::to_json(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn letter() -> DeadLetter {
        DeadLetter {
            schema: "Grounded".into(),
            id: RequestId::try_from("order-17".to_owned()).unwrap(),
            tenant: Tenant::try_from("shop".to_owned()).unwrap(),
            generation: 1,
            stage: "infer".into(),
            pipeline: "answer".into(),
            topic: "x-prompts".into(),
            partition: 3,
            offset: 17,
            timestamp_ms: 1_795_500_000_123,
            class: "unavailable".into(),
            code: "model_unavailable".into(),
            message: "could not reach 127.0.0.1:8000".into(),
            attempts: 4,
            since_ms: 1_795_500_000_200,
            call_id: "0123".into(),
            deadline_at_ms: None,
            paid_nano_usd: NanoUsd(48_000),
            redrives: 1,
            body: None,
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            generation: u32, partition: i32, offset: i64, attempts: u32, since_ms: i64, paid: i64, redrives: u32,
            deadline_at_ms in proptest::option::of(any::<i64>()), message in ".{0,200}", omitted: bool,
            key in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..9)),
        ) {
            let mut letter = DeadLetter {
                generation, partition, offset, attempts, since_ms, redrives, deadline_at_ms, message,
                paid_nano_usd: NanoUsd(paid), ..letter()
            };
            let lies = letter.source();
            letter.body = omitted.then(|| DeadLetter::omitted(9, &lies));
            let key = key.map(Bytes::from);
            let headers = letter.write(key.as_ref());
            prop_assert_eq!(original_key(&headers), key);
            let read = DeadLetter::read(&headers).unwrap();
            prop_assert_eq!(read.body_at(), omitted.then_some(lies));
            prop_assert_eq!(read, letter);
            prop_assert_eq!(Redriven::read(&headers).unwrap(), None);
        }
    }

    #[test]
    fn a_note_of_a_redrive_is_read_and_is_no_letter() {
        let to = Source { topic: "retry.infer.10s".into(), partition: 1, offset: 2, timestamp_ms: 3 };
        let note = Redriven { to, generation: 2, redrives: 1 };
        assert_eq!(Redriven::read(&note.write()).unwrap(), Some(note.clone()));
        let refused = DeadLetter::read(&note.write()).unwrap_err().to_string();
        assert_eq!(refused, "a dead letter has no header forebay-dead-source");
    }

    #[test]
    fn a_header_that_cannot_be_meant_is_named() {
        let mut headers = letter().write(None);
        headers.iter_mut().find(|(name, _)| name == header::ATTEMPTS).unwrap().1 = Some("many".into());
        let refused = DeadLetter::read(&headers).unwrap_err().to_string();
        assert_eq!(refused, r#"header forebay-dead-attempts is "many", which is not a number in range"#);
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let long = format!("{}ü", "x".repeat(MESSAGE_BYTES_MAX - 1));
        assert_eq!(DeadLetter::cut(&long).len(), MESSAGE_BYTES_MAX - 1);
    }
}
