//! What travels: every record, topic name, header, id and unit of Forebay.
//!
//! A record is a plain struct that knows its wire form. What people type or read is JSON; the wide rows that
//! we write for SQL (`outcomes`, `attempts`) are Avro in single-object encoding.
//!
//! Invariant: nothing here does anything. No crate of this workspace stands below this one, and a field may be
//! added to a record but never renamed or given another meaning: `golden/` keeps a sample of each released
//! form, and all of them decode for ever.

mod alert;
mod answer;
mod attempt;
mod audit;
mod cache_entry;
mod cancel;
mod chunks;
pub mod claim;
mod completion;
pub mod dead_letter;
mod delta;
mod document;
pub mod embedding;
mod ending;
mod envelope;
mod grounded;
mod id;
mod label;
mod ledger_entry;
mod money;
mod outcome;
mod passage;
mod payload;
mod record;
mod request;
pub mod retry;
pub mod row;
mod source;
pub mod topics;
mod verdict;

pub use alert::{Alert, AlertKind, AlertState};
pub use answer::{Answer, Status, TimingsUs};
pub use attempt::Attempt;
pub use audit::Audit;
pub use cache_entry::{CacheEntry, Kept};
pub use cancel::Cancel;
pub use chunks::{Chunk, Chunks, Split};
pub use claim::Claim;
pub use completion::{CacheStatus, Citation, Completion, Generated, Usage};
pub use dead_letter::DeadLetter;
pub use delta::Delta;
pub use document::{Document, Format, SHARED_TENANT};
pub use embedding::Embedding;
pub use ending::{Ending, Fault};
pub use envelope::{Envelope, HeaderError, Hop, Lane, Origin, Timings, header};
pub use grounded::{Embed, Grounded, Rerank, Retrieval};
pub use id::{CallId, DocumentVersion, JobId, KeyId, RequestId, Tenant, TooLong};
pub use label::Label;
pub use ledger_entry::{EntryKind, LedgerEntry};
pub use money::NanoUsd;
pub use outcome::Outcome;
pub use passage::Passage;
pub use payload::Payload;
pub use record::{DecodeError, EncodeError, Headers, Identity, Record, from_json, to_json};
pub use request::{CacheControl, Content, Message, Request, Role, Sampling};
pub use retry::Retry;
pub use row::Column;
pub use source::Source;
pub use verdict::{Finding, Judgement, Verdict};
