//! Why a model did not answer, in classes that a layer can act on.

use forebay_operator::{BoxError, Failure};
use std::time::Duration;

/// What a layer, and in the end the host, may do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The world failed; the same call may succeed shortly.
    Transient,
    /// The provider cannot be reached or takes no more now. Worth a retry, and no fault of this request.
    Outage,
    /// The key is not good, or nothing is left on it. Another try now gives the same; a person must act.
    Account,
    /// The request is at fault; no try can help.
    Rejected,
    /// The stream broke after somebody had read its beginning. Another answer must not be spliced onto it.
    Cut,
}

/// Why a model did not answer.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct CallError {
    /// What may be done.
    pub class: Class,
    /// A word of the closed vocabulary of operators/README.md.
    pub code: &'static str,
    /// What happened, for a person; never the prompt, never a key.
    pub message: String,
    /// The HTTP status, where there was one.
    pub http_status: Option<u16>,
    /// How long the provider asks us to wait.
    pub retry_after: Option<Duration>,
    /// The cause.
    #[source]
    pub source: Option<BoxError>,
}

impl CallError {
    /// An error without a status or a cause.
    pub fn new(class: Class, code: &'static str, message: impl Into<String>) -> Self {
        Self { class, code, message: message.into(), http_status: None, retry_after: None, source: None }
    }

    /// The same with its cause.
    pub fn because(mut self, source: impl Into<BoxError>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The same with the HTTP status that told of it.
    pub fn with_status(mut self, status: u16) -> Self {
        self.http_status = Some(status);
        self
    }

    /// Whether another try, now, may succeed.
    pub fn is_retryable(&self) -> bool {
        matches!(self.class, Class::Transient | Class::Outage)
    }

    /// The same in the words of a host.
    pub fn into_failure(self, what: impl Into<String>) -> Failure {
        let (code, asked) = (self.code, self.retry_after);
        let failure = match self.class {
            Class::Rejected | Class::Cut => Failure::rejected(code, self.message),
            Class::Transient => Failure::unavailable(code, what, self),
            // A key that ran out fails every request alike: none of them may be dropped for it.
            Class::Outage | Class::Account => Failure::outage(code, what, self),
        };
        failure.retry_after(asked)
    }
}

/// What a ledger says instead of an answer.
impl From<Failure> for CallError {
    fn from(failure: Failure) -> Self {
        let class = match failure {
            // Another try now meets the same log.
            Failure::Unavailable { outage: true, .. } => Class::Account,
            Failure::Unavailable { .. } => Class::Transient,
            Failure::Rejected { .. } | Failure::Expired | Failure::Cancelled => Class::Rejected,
        };
        Self::new(class, failure.code(), failure.to_string()).because(failure)
    }
}
