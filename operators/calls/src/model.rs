//! The port to whatever writes answers.

use crate::CallError;
use forebay_schemas::{Citation, Message, NanoUsd, Passage, Sampling, Usage};
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::time::Instant;

/// One question, with all that a model may need to answer it.
#[derive(Clone, Debug)]
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
}

/// One try, as it ended.
#[derive(Debug)]
pub struct Tried<'a> {
    /// Scheme, host and port; absent for a model in process.
    pub endpoint: Option<&'a str>,
    /// The model that was asked for.
    pub model: &'a str,
    /// From send to answer or error.
    pub duration: Duration,
    /// Time to first token, also where the answer was cut after it.
    pub ttft: Option<Duration>,
    /// How it ended.
    pub result: Result<&'a Reply, &'a CallError>,
}

/// Hears how a call goes. Tries follow one another; a try whose end is never told was given up by the caller.
pub trait Listener: Send + Sync {
    /// A try is sent, for this model at this endpoint.
    fn started(&self, endpoint: Option<&str>, model: &str);
    /// A piece of its answer came; only where the call streams.
    fn token(&self, text: &str);
    /// It ended.
    fn ended(&self, tried: &Tried<'_>);
    /// Makes a try that costs something, for this model at this endpoint, unless its answer is remembered: then this is
    /// the answer, and `call` is dropped unasked.
    fn paid<'a>(
        &'a self,
        _endpoint: Option<&'a str>,
        _model: &'a str,
        call: BoxFuture<'a, Result<Reply, CallError>>,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        call
    }
}

/// Something that writes answers. Dropping the future gives the call up and closes its connection.
pub trait Model: Send + Sync + 'static {
    /// The kind of provider: `openai_compatible`, `extractive`.
    fn provider(&self) -> &'static str;

    /// The model that answers where the call names none.
    fn name(&self) -> &str;

    /// Whether it reads the call as a conversation. One that reads question and passages says no, and is spared it.
    fn reads_messages(&self) -> bool {
        true
    }

    /// Answers.
    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>>;
}
