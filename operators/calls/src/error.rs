//! Why a model did not answer, in classes that a layer can act on.

use crate::Reply;
use forebay_operator::{BoxError, Failure};
use std::time::Duration;

/// The codes that a try may end in: all that `error.type` of a metric can say. The last two are the host's, of a try that it
/// stopped; the others are of a [`CallError`]. operators/README.md has their meaning.
pub const CODES: [&str; 14] = [
    "model_unavailable",
    "model_timeout",
    "model_rate_limited",
    "model_unauthorized",
    "model_saturated",
    "model_malformed",
    "model_empty",
    "model_rejected",
    "model_refused",
    "model_tool_calls",
    "model_cut",
    "hedge_lost",
    "deadline",
    "cancelled",
];

/// What a layer, and in the end the host, may do about an error.
///
/// | Class | Comes of | Tried again | Breaker | Throttle | To the host |
/// |---|---|---|---|---|---|
/// | `Unreachable` | no connection | elsewhere | counts, also in a row | | outage |
/// | `Outage` | 502, 503, 504, 529, a redirect | elsewhere | counts | 503 and 529 | outage |
/// | `Transient` | 408, other 5xx, no first token in time, an empty 200, a body that is cut or no answer | elsewhere | counts | | unavailable |
/// | `Limited` | 429 | after the wait it names, by another key, or elsewhere | no | yes | outage |
/// | `Account` | 401, 402, 403, a 400 or 429 that says nothing is left | by another key, or elsewhere | no | | outage |
/// | `Closed` | no endpoint is up, or none had room: nothing was sent | never here | no | | outage |
/// | `Rejected` | 400, 404, 413, 422, other 4xx, context length, a refusal | never | **no** | | rejected |
/// | `Cut` | a stream that broke after its first token | never | counts | | rejected |
/// | `Lost` | a hedge that another try was faster than | never | no | | |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// No connection stands. Worth a retry, and no fault of this request.
    Unreachable,
    /// The provider takes no more now. Worth a retry, and no fault of this request.
    Outage,
    /// The world failed; the same call may succeed shortly.
    Transient,
    /// The provider takes no more of us now.
    Limited,
    /// The key is not good, or nothing is left on it. Another try with it gives the same; a person must act.
    Account,
    /// Nothing was sent, as no endpoint is up or none had room. Whoever can wait longer than a call may come again.
    Closed,
    /// The request is at fault; no try can help.
    Rejected,
    /// The stream broke after somebody had read its beginning. Another answer must not be spliced onto it.
    Cut,
    /// Another try of the same call was faster.
    Lost,
}

/// What an end says about the health of whoever was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It works.
    Good,
    /// It does not.
    Failed,
    /// It cannot even be reached.
    Unreachable,
    /// Nothing: it refused us, the request, or was not waited for.
    Unknown,
}

impl Class {
    /// What it says about the health of whoever was asked.
    pub fn health(self) -> Health {
        match self {
            Self::Unreachable => Health::Unreachable,
            Self::Outage | Self::Transient | Self::Cut => Health::Failed,
            Self::Limited | Self::Account | Self::Closed | Self::Rejected | Self::Lost => Health::Unknown,
        }
    }
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
    /// What was written of the answer before it broke off, as somebody read it; only where the class is [`Class::Cut`].
    pub partial: Option<Box<Reply>>,
    /// The cause.
    #[source]
    pub source: Option<BoxError>,
}

impl CallError {
    /// An error without a status or a cause.
    pub fn new(class: Class, code: &'static str, message: impl Into<String>) -> Self {
        let (http_status, retry_after, partial, source) = Default::default();
        Self { class, code, message: message.into(), http_status, retry_after, partial, source }
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

    /// An answer that broke off after this had been read of it.
    pub fn cut(message: impl Into<String>, partial: Reply) -> Self {
        Self { partial: Some(Box::new(partial)), ..Self::new(Class::Cut, "model_cut", message) }
    }

    /// The same, with what was read of the answer changed so.
    pub(crate) fn with_partial(mut self, change: impl FnOnce(Reply) -> Reply) -> Self {
        self.partial = self.partial.map(|partial| Box::new(change(*partial)));
        self
    }

    /// The same for another who waited for it. Of its cause the words are left.
    pub(crate) fn copy(&self) -> Self {
        let source = self.source.as_ref().map(|source| source.to_string().into());
        Self { message: self.message.clone(), partial: self.partial.clone(), source, ..*self }
    }

    /// Whether another try may succeed. `elsewhere` where it would go to another endpoint or by another key.
    pub fn is_retryable(&self, elsewhere: bool) -> bool {
        match self.class {
            Class::Unreachable | Class::Outage | Class::Transient | Class::Limited => true,
            Class::Account => elsewhere,
            Class::Closed | Class::Rejected | Class::Cut | Class::Lost => false,
        }
    }

    /// Whether another model may answer what this one could not.
    pub fn may_fall_back(&self) -> bool {
        self.class == Class::Closed || self.is_retryable(true)
    }

    /// Whether it says that whoever was asked has too much to do.
    pub fn is_overload(&self) -> bool {
        self.class == Class::Limited || matches!(self.http_status, Some(503 | 529))
    }

    /// The same in the words of a host.
    pub fn into_failure(self, what: impl Into<String>) -> Failure {
        let (code, asked) = (self.code, self.retry_after);
        let failure = match self.class {
            Class::Rejected | Class::Cut => Failure::rejected(code, self.message),
            Class::Transient | Class::Lost => Failure::unavailable(code, what, self),
            // A key that ran out fails every request alike: none of them may be dropped for it.
            Class::Unreachable | Class::Outage | Class::Limited | Class::Account | Class::Closed => {
                Failure::outage(code, what, self)
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_operator::Stop;
    use std::{collections::BTreeSet, fs, path::Path};

    /// Looks like a code, and is a reason for which Anthropic's models stop.
    const NO_CODE: &str = "model_context_window_exceeded";

    /// The codes in the literals of these sources.
    fn written(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                written(&path, found);
            } else {
                let source = fs::read_to_string(&path).unwrap();
                let literals = source.split('"').skip(1);
                let is_code = |word: &&str| {
                    let name = word.strip_prefix("model_").or(word.strip_prefix("hedge_"));
                    let is_name = |name: &str| name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
                    *word != NO_CODE && name.is_some_and(|name| !name.is_empty() && is_name(name))
                };
                found.extend(literals.filter(is_code).map(str::to_owned));
            }
        }
    }

    #[test]
    fn the_vocabulary_is_closed_and_its_words_have_a_meaning() {
        let crate_ = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut used = BTreeSet::new();
        written(&crate_.join("src"), &mut used);
        let stopped = [Stop::Expired, Stop::Cancelled].map(|stop| Failure::from(stop).code().to_owned());
        used.extend(stopped.clone());
        assert_eq!(used, CODES.map(str::to_owned).into(), "used, and in the vocabulary");
        let readme = fs::read_to_string(crate_.join("../README.md")).unwrap();
        let rows = readme.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | calls |"));
        let mut told: BTreeSet<String> = rows.map(|(code, _)| code.to_owned()).collect();
        let [expired, cancelled] = &stopped;
        if readme.contains(&format!("\n| `{expired}`, `{cancelled}` | core |")) {
            told.extend(stopped);
        }
        assert_eq!(told, CODES.map(str::to_owned).into(), "operators/README.md and the vocabulary");
    }
}
