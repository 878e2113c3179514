//! What a record is: a name, a wire form, and whose request it belongs to.

use crate::{Request, RequestId, Tenant};
use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

/// Kafka record headers in the order in which they were written; a name may repeat and a value may be null.
pub type Headers = Vec<(String, Option<Bytes>)>;

/// One kind of value that travels on a topic.
///
/// The same bytes always decode to the same value, and `decode(encode(x)) == x`.
pub trait Record: Sized + Send + Sync + 'static {
    /// The name by which a pipeline's plan compares the two ends of a topic.
    const NAME: &'static str;

    /// True where the record is the work of one request, which must end in a result. A record that is not
    /// (a document, an ending) can only be dead-lettered; so an ending that fails never makes another ending.
    const JOB: bool = false;

    /// Reads the record from a message's value.
    fn decode(body: &[u8]) -> Result<Self, DecodeError>;

    /// Writes the record as a message's value; `None` is a tombstone.
    fn encode(&self) -> Result<Option<Vec<u8>>, EncodeError>;

    /// Reads a message that has a key and no value. Only records of compacted topics have such a form.
    fn decode_tombstone(_key: &str) -> Option<Self> {
        None
    }

    /// The key under which the record is produced; `None` means the id of the request.
    fn key(&self) -> Option<&str> {
        None
    }

    /// What the record says of itself where it enters a pipeline.
    fn identity(&self) -> Identity {
        Identity::default()
    }

    /// The request that the record is the work of.
    fn request(&self) -> Option<&Request> {
        None
    }
}

/// What a client may say of its own record; the host completes what is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The client's id.
    pub id: Option<RequestId>,
    /// Whose record it is; `default` when absent.
    pub tenant: Option<Tenant>,
    /// Milliseconds from the record's timestamp until nobody waits any more.
    pub deadline_ms: Option<u64>,
    /// Whether somebody reads the tokens as they come.
    pub stream: bool,
    /// Names of fields that no version of the record knows; carried along and warned of once.
    pub unknown_fields: Vec<String>,
}

/// A message that is not the record which its topic carries.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The bytes are not JSON, or not the JSON that the record wants.
    #[error("could not read a {record}")]
    Json {
        /// The record that was wanted.
        record: &'static str,
        /// Says line, column and what was expected there.
        #[source]
        source: serde_json::Error,
    },
    /// The JSON has the right form and asks for something impossible.
    #[error("could not read a {record}: {fault}")]
    Meaning {
        /// The record that was wanted.
        record: &'static str,
        /// What is wrong, and what would be right.
        fault: &'static str,
    },
    /// The bytes are not Avro single-object encoding of a known schema.
    #[error("could not read a {record} from Avro single-object encoding: {detail}")]
    Avro {
        /// The record that was wanted.
        record: &'static str,
        /// What the decoder met. Text, since no caller can act on it and its type is large.
        detail: String,
    },
    /// A message without a value on a topic whose records have no such form.
    #[error("could not read a {record}: the message has no value")]
    Tombstone {
        /// The record that was wanted.
        record: &'static str,
    },
}

/// A record that has no wire form; only a value that JSON cannot carry gets here.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// JSON refused the value.
    #[error("could not write a {record} as JSON")]
    Json {
        /// The record that was to be written.
        record: &'static str,
        /// What the encoder met.
        #[source]
        source: serde_json::Error,
    },
    /// Avro refused the value.
    #[error("could not write a {record} as Avro: {detail}")]
    Avro {
        /// The record that was to be written.
        record: &'static str,
        /// What the encoder met.
        detail: String,
    },
}

/// Reads a JSON record.
///
/// Numbers are 64-bit integers or doubles: a longer integer becomes the nearest double, and one beyond the range
/// of doubles is refused. Of a name that comes twice, a field refuses the second and free JSON keeps it.
pub fn from_json<R: Record + DeserializeOwned>(body: &[u8]) -> Result<R, DecodeError> {
    // Windows shells write a byte order mark; without this the error would point at JSON that looks right.
    let body = body.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(body);
    serde_json::from_slice(body).map_err(|source| DecodeError::Json { record: R::NAME, source })
}

/// Writes a JSON record.
pub fn to_json<R: Record + Serialize>(record: &R) -> Result<Option<Vec<u8>>, EncodeError> {
    serde_json::to_vec(record).map(Some).map_err(|source| EncodeError::Json { record: R::NAME, source })
}

/// Writes a number that must come back as a number: JSON has no NaN and no infinity, and serde_json would write
/// null, which the next step could not read.
pub(crate) fn finite<S: serde::Serializer>(number: &f32, serializer: S) -> Result<S::Ok, S::Error> {
    match number.is_finite() {
        true => serializer.serialize_f32(*number),
        false => Err(serde::ser::Error::custom(format_args!("JSON has no number {number}"))),
    }
}

/// Declares names of headers with what they say, and `ALL` of them for the reference.
macro_rules! headers {
    ($( $(#[doc = $meaning:literal])+ $header:ident = $name:literal; )*) => {
        $( $(#[doc = $meaning])+ pub const $header: &str = $name; )*

        /// All of them, each with what it says.
        pub const ALL: &[(&str, &str)] = &[$( ($name, concat!($($meaning),+).trim_ascii_start()) ),*];
    };
}
pub(crate) use headers;

/// The two functions of [`Record`] that every JSON record has alike.
macro_rules! json_wire {
    () => {
        fn decode(body: &[u8]) -> Result<Self, crate::DecodeError> {
            crate::from_json(body)
        }
        fn encode(&self) -> Result<Option<Vec<u8>>, crate::EncodeError> {
            crate::to_json(self)
        }
    };
}
pub(crate) use json_wire;
