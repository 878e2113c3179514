//! Why a record could not be processed, in the words that a host acts on.

use forebay_schemas::Generated;
use std::time::Duration;

/// Any error, as the cause of a failure.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why a record could not be processed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The world failed; the same record may succeed later. The host waits and tries again.
    #[error("{what} is unavailable")]
    Unavailable {
        /// What could not be had, such as `model http://127.0.0.1:8000`.
        what: String,
        /// A word of a closed vocabulary, such as `model_unavailable`.
        code: &'static str,
        /// Whether it cannot be reached at all. Waiting for that costs a record none of its tries: an outage must
        /// not turn a topic into dead letters.
        outage: bool,
        /// How long it asked to be left alone.
        retry_after: Option<Duration>,
        /// What happened.
        #[source]
        source: BoxError,
    },
    /// The record is at fault; no retry can help. The host keeps it as a dead letter.
    #[error("{message}")]
    Rejected {
        /// A word of a closed vocabulary, such as `model_rejected`.
        code: &'static str,
        /// What is wrong with the record, for a person.
        message: String,
        /// What was made of an answer before it broke off, where somebody has read it: it goes into the result.
        partial: Option<Box<Generated>>,
    },
    /// The deadline passed.
    #[error("the deadline passed")]
    Expired,
    /// The client took the request back.
    #[error("the request was cancelled")]
    Cancelled,
}

impl Failure {
    /// The record is at fault.
    pub fn rejected(code: &'static str, message: impl Into<String>) -> Self {
        Self::Rejected { code, message: message.into(), partial: None }
    }

    /// The world failed.
    pub fn unavailable(code: &'static str, what: impl Into<String>, source: impl Into<BoxError>) -> Self {
        Self::Unavailable { what: what.into(), code, outage: false, retry_after: None, source: source.into() }
    }

    /// The world cannot be reached.
    pub fn outage(code: &'static str, what: impl Into<String>, source: impl Into<BoxError>) -> Self {
        Self::Unavailable { what: what.into(), code, outage: true, retry_after: None, source: source.into() }
    }

    /// The same, where what is unavailable said how long it asks to be left alone.
    pub fn retry_after(mut self, asked: Option<Duration>) -> Self {
        if let Self::Unavailable { retry_after, .. } = &mut self {
            *retry_after = asked;
        }
        self
    }

    /// The same, where this was read of an answer before it broke off.
    pub fn with_partial(mut self, read: Option<Generated>) -> Self {
        if let Self::Rejected { partial, .. } = &mut self {
            *partial = read.map(Box::new);
        }
        self
    }

    /// The word of the closed vocabulary under which this is counted.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unavailable { code, .. } | Self::Rejected { code, .. } => code,
            Self::Expired => "deadline",
            Self::Cancelled => "cancelled",
        }
    }
}
