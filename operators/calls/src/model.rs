//! The port to whatever writes answers.

use crate::{CallError, limits::Limits, route::Route};
use forebay_schemas::{Citation, Content, Message, NanoUsd, Passage, Sampling, Tenant, Usage};
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::time::Instant;

/// One question, with all that a model may need to answer it.
#[derive(Clone, Debug, Default)]
pub struct Call<'a> {
    /// What is asked, without history or sources.
    pub question: String,
    /// What may answer it, best first.
    pub passages: &'a [Passage],
    /// The same as a conversation: for a model that reads text and not passages; else empty.
    pub messages: Vec<Message>,
    /// The model that is wanted; the server's configured one when absent.
    pub model: Option<String>,
    /// What shapes the sampling.
    pub sampling: Sampling,
    /// Whether somebody reads the tokens as they come.
    pub stream: bool,
    /// When nobody waits any more.
    pub deadline: Option<Instant>,
    /// Whose call it is.
    pub tenant: Tenant,
    /// Where it was tried already; layers note and read it, whoever calls begins with an empty one.
    pub route: Route,
}

/// How many tokens an answer is taken to have where the call sets no limit.
const ANSWER_TOKENS: u64 = 1024;
/// English has about four bytes a token; other languages fewer tokens than this says, which errs to the safe side.
const BYTES_PER_TOKEN: usize = 4;

impl Call<'_> {
    /// About how many tokens it takes, before anybody has counted: those it sends, and the most it may get.
    pub fn tokens_estimated(&self) -> u64 {
        let Sampling { max_tokens, max_completion_tokens, .. } = self.sampling;
        let answer = max_completion_tokens.or(max_tokens).unwrap_or(ANSWER_TOKENS);
        self.prompt_tokens_estimated().saturating_add(answer)
    }

    /// About how many tokens it sends.
    pub fn prompt_tokens_estimated(&self) -> u64 {
        let said = self.messages.iter().filter_map(|message| message.content.as_ref());
        let bytes: usize = said
            .map(|content| match content {
                Content::Text(text) => text.len(),
                Content::Parts(parts) => {
                    parts.iter().filter_map(|part| part.get("text")?.as_str()).map(str::len).sum()
                }
            })
            .sum();
        u64::try_from(bytes / BYTES_PER_TOKEN).unwrap_or(u64::MAX)
    }
}

/// What a model wrote, and what it took. A ledger keeps it, so it is read by later versions too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The answer; never empty.
    pub text: String,
    /// The quotations that it rests on; absent for a model that writes text only.
    pub citations: Option<Vec<Citation>>,
    /// The model that answered, as it names itself.
    pub model: String,
    /// Tokens; absent where the provider did not say.
    pub usage: Option<Usage>,
    /// What it cost; absent where the model has no price.
    pub cost_nano_usd: Option<NanoUsd>,
    /// Why the model stopped, in the provider's word.
    pub finish_reason: Option<String>,
    /// Time to first token; absent unless streamed.
    pub ttft: Option<Duration>,
    /// The kind of provider that answered, where it is not the one that was to: a fallback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
}

/// Whom a try asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upstream<'a> {
    /// The kind of provider.
    pub provider: &'static str,
    /// Scheme, host and port; absent for a model in process.
    pub endpoint: Option<&'a str>,
    /// The model that is asked for.
    pub model: &'a str,
}

/// One try, as it ended.
#[derive(Debug)]
pub struct Tried<'a> {
    /// Who was asked.
    pub to: Upstream<'a>,
    /// From send to answer or error.
    pub duration: Duration,
    /// Time to first token, also where the answer was cut after it.
    pub ttft: Option<Duration>,
    /// How it ended.
    pub result: Result<&'a Reply, &'a CallError>,
}

/// Hears how a call goes. Tries follow one another; a try whose end is never told was given up by the caller.
pub trait Listener: Send + Sync {
    /// A try is sent.
    fn started(&self, to: Upstream<'_>);
    /// A piece of its answer came; only where the call streams.
    fn token(&self, text: &str);
    /// It ended.
    fn ended(&self, tried: &Tried<'_>);
    /// Makes a try that costs something, unless its answer is remembered: then this is the answer, and `call` is dropped
    /// unasked.
    fn paid<'a>(
        &'a self,
        _to: Upstream<'a>,
        call: BoxFuture<'a, Result<Reply, CallError>>,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        call
    }
    /// What the provider says is left of its limits; told during a try.
    fn limits(&self, _: &Limits) {}
    /// Hears one try beside the one that goes on, as part of the same call. `None` where only one can be heard at a time:
    /// then none is made.
    fn beside(&self) -> Option<Box<dyn Listener + '_>> {
        None
    }
}

/// Something that writes answers. Dropping the future gives the call up and closes its connection.
///
/// Whoever asks an upstream that costs something wraps each try into [`Listener::paid`], and so tells layers and ledger of it.
pub trait Model: Send + Sync + 'static {
    /// The kind of provider: `openai_compatible`, `extractive`.
    fn provider(&self) -> &'static str;

    /// The model that answers where the call names none.
    fn name(&self) -> &str;

    /// Whether it reads the call as a conversation. One that reads question and passages says no, and is spared it.
    fn reads_messages(&self) -> bool {
        true
    }

    /// Whether it answers in this process, at no cost and no load for anyone.
    fn is_local(&self) -> bool {
        false
    }

    /// Whether the call, tried again at once, would go where its last try did not: to another endpoint, by another key.
    fn has_another_way(&self, _: &Call<'_>) -> bool {
        false
    }

    /// Answers.
    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>>;
}
