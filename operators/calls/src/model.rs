//! The port to whatever writes answers, or computes vectors and scores.

use crate::{
    CallError,
    limits::Limits,
    route::Route,
    tiers::{Answered, Judge},
};
use forebay_operator::Operation;
use forebay_schemas::{
    Citation, Content, JobId, KeyId, Lane, Message, NanoUsd, Passage, Sampling, Tenant, Usage,
};
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{ops::Deref, sync::Arc, time::Duration};
use tokio::time::Instant;

/// What is wanted of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Task<'a> {
    /// A text.
    #[default]
    Answer,
    /// A vector for each of these texts.
    Embed(&'a [&'a str]),
    /// How well each of these documents answers the query.
    Rank {
        /// What is sought.
        query: &'a str,
        /// Where.
        documents: &'a [&'a str],
    },
}

impl Task<'_> {
    /// What a call with it is for.
    pub fn operation(&self) -> Operation {
        match self {
            Self::Answer => Operation::Chat,
            Self::Embed(_) => Operation::Embeddings,
            Self::Rank { .. } => Operation::Rerank,
        }
    }

    /// How many texts it brings, for vectors or scores.
    pub fn texts(&self) -> Option<usize> {
        match self {
            Self::Answer => None,
            Self::Embed(texts) | Self::Rank { documents: texts, .. } => Some(texts.len()),
        }
    }
}

/// One question, with all that a model may need to answer it.
#[derive(Clone, Debug, Default)]
pub struct Call<'a> {
    /// What is wanted: a text, from the fields below, or numbers about texts.
    pub task: Task<'a>,
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
    /// By which of its keys it came, where that is told.
    pub key_id: Option<KeyId>,
    /// Which of its jobs it belongs to, where it belongs to one.
    pub job: Option<JobId>,
    /// In which of the two queues it waited.
    pub lane: Lane,
    /// What its client said beside it.
    pub metadata: Option<&'a Value>,
    /// Whether the log-probability of the answer is wanted, where the server tells it.
    pub logprobs: bool,
    /// How whoever asks judges an answer.
    pub judge: Judge<'a>,
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
        let answer = match self.task {
            Task::Answer => self.answer_tokens_max(),
            Task::Embed(_) | Task::Rank { .. } => 0,
        };
        self.prompt_tokens_estimated().saturating_add(answer)
    }

    /// The most tokens of its answer.
    pub(crate) fn answer_tokens_max(&self) -> u64 {
        let Sampling { max_tokens, max_completion_tokens, .. } = self.sampling;
        max_completion_tokens.or(max_tokens).unwrap_or(ANSWER_TOKENS)
    }

    /// About how many tokens it sends.
    pub fn prompt_tokens_estimated(&self) -> u64 {
        let said = self.messages.iter().filter_map(|message| message.content.as_ref());
        let asked: usize = match self.task {
            Task::Answer => 0,
            Task::Embed(texts) => texts.iter().map(|text| text.len()).sum(),
            // A cross-encoder reads the query with each document.
            Task::Rank { query, documents } => documents.iter().map(|text| text.len() + query.len()).sum(),
        };
        let said: usize = said
            .map(|content| match content {
                Content::Text(text) => text.len(),
                Content::Parts(parts) => {
                    parts.iter().filter_map(|part| part.get("text")?.as_str()).map(str::len).sum()
                }
            })
            .sum();
        u64::try_from((asked + said) / BYTES_PER_TOKEN).unwrap_or(u64::MAX)
    }

    /// Whether a text repeats what was asked, and so must not stand in an error.
    pub(crate) fn is_repeated_in(&self, text: &str) -> bool {
        let repeats = |asked: &str| !asked.is_empty() && text.contains(asked);
        repeats(&self.question)
            || match self.task {
                Task::Answer => false,
                Task::Embed(texts) => texts.iter().any(|asked| repeats(asked)),
                Task::Rank { query, documents } => {
                    repeats(query) || documents.iter().any(|asked| repeats(asked))
                }
            }
    }
}

/// What a model wrote, and what it took. A ledger keeps it, so it is read by later versions too.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The answer; empty only where vectors were wanted.
    pub text: String,
    /// The vector of each text; or the score of each document, as a vector of one number.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "vectors")]
    pub vectors: Vec<Vec<f32>>,
    /// The quotations that it rests on; absent for a model that writes text only.
    pub citations: Option<Vec<Citation>>,
    /// The model that answered, as it names itself.
    pub model: String,
    /// Tokens; absent where the provider did not say.
    pub usage: Option<Usage>,
    /// What it cost; absent where the model has no price.
    pub cost_nano_usd: Option<NanoUsd>,
    /// Why the model stopped, in OpenAI's words: `stop`, `length`, `content_filter`; a reason that it has no word for is the
    /// provider's.
    pub finish_reason: Option<String>,
    /// Time to first token; absent unless streamed.
    pub ttft: Option<Duration>,
    /// The kind of provider that answered, where it is not the one that was to: a fallback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
    /// The mean of the natural logarithms of its tokens' probabilities; absent unless asked for and told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprob: Option<f64>,
    /// The tier that answered, where there are tiers and none stood in. Noted around what a ledger keeps.
    #[serde(skip)]
    pub answered: Option<Answered>,
}

/// How vectors are kept: those of texts by their bytes, as their digits would take more than twice the room in a ledger, and
/// scores as the numbers that they are.
mod vectors {
    use forebay_schemas::embedding::{of_base64, to_base64};
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Kept {
        Bytes(String),
        Numbers(Vec<f32>),
    }

    pub(super) fn serialize<S: Serializer>(vectors: &[Vec<f32>], serializer: S) -> Result<S::Ok, S::Error> {
        let kept = |vector: &Vec<f32>| match vector.len() {
            ..=1 => Kept::Numbers(vector.clone()),
            _ => Kept::Bytes(to_base64(vector)),
        };
        serializer.collect_seq(vectors.iter().map(kept))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Vec<f32>>, D::Error> {
        let read = |kept| match kept {
            Kept::Numbers(numbers) => Ok(numbers),
            Kept::Bytes(text) => {
                of_base64(&text).ok_or_else(|| D::Error::custom("no base64 of 32-bit floats"))
            }
        };
        Vec::<Kept>::deserialize(deserializer)?.into_iter().map(read).collect()
    }
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

/// What the try of a call is known by, to rows and to servers alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TryId {
    /// The call's id: the same over its tries.
    pub call: String,
    /// The number of the try, from 0.
    pub number: u32,
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

/// What a try that goes on would cost if it were given up now; `None` where that is not known.
pub type CostSoFar = Arc<dyn Fn() -> Option<NanoUsd> + Send + Sync>;

/// What a call waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Room at an endpoint, as breakers and throttles have it.
    Room,
    /// Others, whose texts go with it.
    Batch,
    /// Its next try.
    Retry,
}

/// What happens to a call beside its tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happening {
    /// It waited so long; told also of a call that did not have to.
    Waited(Wait, Duration),
    /// The try that was started is shared with other calls. The first of them is told how many texts it brings in all; to the others
    /// it is part of a try that is counted already.
    Joined(Option<usize>),
    /// It is tried again.
    Retried,
    /// It is tried elsewhere too, beside a try that is slow.
    Hedged,
    /// The next model is asked.
    FellBack,
}

/// Hears how a call goes. Tries follow one another; a try whose end is never told was given up by the caller.
pub trait Listener: Send + Sync {
    /// A try is sent.
    fn started(&self, to: Upstream<'_>);
    /// What the try that was started is known by, where anybody keeps count. It travels with the try, so that what a server
    /// logs can be laid beside what we noted.
    fn try_id(&self) -> Option<TryId> {
        None
    }
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
    /// What the try costs that goes on, though it has no answer; told before its end, or when it is dropped.
    fn cost(&self, _: NanoUsd) {}
    /// By this the cost of the try that is about to be sent may be asked while it goes on: whoever shares it may leave before its end.
    fn costs(&self, _: CostSoFar) {}
    /// Something happened to the call beside its tries.
    fn happened(&self, _: Happening) {}
    /// What the provider says is left of its limits; told during a try.
    fn limits(&self, _: &Limits) {}
    /// A tier of this name is asked from now on, as a call of its own; `place` counts the tiers that were asked, from 0.
    fn tier(&self, _place: u32, _name: &str) {}
    /// Hears one try beside the one that goes on, as part of the same call. `None` where only one can be heard at a time:
    /// then none is made.
    fn beside(&self) -> Option<Box<dyn Listener + '_>> {
        None
    }
}

/// The listener that a layer's own stands around: that of a call, or that of the hedge beside it.
pub(crate) enum Around<'l> {
    /// The call's.
    Call(&'l dyn Listener),
    /// The hedge's.
    Hedge(Box<dyn Listener + 'l>),
}

impl<'l> Deref for Around<'l> {
    type Target = dyn Listener + 'l;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::Call(listener) => *listener,
            Self::Hedge(listener) => &**listener,
        }
    }
}

/// Something that writes answers. Dropping the future gives the call up and closes its connection.
///
/// Whoever asks an upstream that costs something wraps each try into [`Listener::paid`], and so tells layers and ledger of it.
pub trait Model: Send + Sync + 'static {
    /// The kind of provider: `openai_compatible`, `anthropic`, `extractive`.
    fn provider(&self) -> &'static str;

    /// The model that answers where the call names none.
    fn name(&self) -> &str;

    /// What it is asked to see whether it answers at all.
    fn probe(&self) -> Task<'static> {
        Task::Answer
    }

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

/// What a layer says of itself: what the model says that it stands around. One list for all layers, or the next question
/// that is added here would be answered by its default where a layer forgot to ask.
macro_rules! says_what_it_stands_around {
    ($inner:tt) => {
        fn provider(&self) -> &'static str {
            self.$inner.provider()
        }

        fn name(&self) -> &str {
            self.$inner.name()
        }

        fn probe(&self) -> $crate::Task<'static> {
            self.$inner.probe()
        }

        fn reads_messages(&self) -> bool {
            self.$inner.reads_messages()
        }

        fn is_local(&self) -> bool {
            self.$inner.is_local()
        }

        fn has_another_way(&self, call: &$crate::Call<'_>) -> bool {
            self.$inner.has_another_way(call)
        }
    };
}
pub(crate) use says_what_it_stands_around;

/// What a layer's listener only passes on: all but the calls that cost something, and the hedge beside them. One list, for
/// the same reason.
macro_rules! passes_on {
    ($around:ident) => {
        fn started(&self, to: $crate::Upstream<'_>) {
            self.$around.started(to);
        }

        fn try_id(&self) -> Option<$crate::TryId> {
            self.$around.try_id()
        }

        fn token(&self, text: &str) {
            self.$around.token(text);
        }

        fn ended(&self, tried: &$crate::Tried<'_>) {
            self.$around.ended(tried);
        }

        fn cost(&self, cost: forebay_schemas::NanoUsd) {
            self.$around.cost(cost);
        }

        fn costs(&self, so_far: $crate::CostSoFar) {
            self.$around.costs(so_far);
        }

        fn happened(&self, what: $crate::Happening) {
            self.$around.happened(what);
        }

        fn limits(&self, limits: &$crate::Limits) {
            self.$around.limits(limits);
        }

        fn tier(&self, place: u32, name: &str) {
            self.$around.tier(place, name);
        }
    };
}
pub(crate) use passes_on;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Allowed, Budget, Priced, Prices, Retry,
        allowance::{Allowances, Reservation},
    };
    use forebay_operator::Clock;

    #[test]
    fn a_ledger_keeps_vectors_exactly_and_reads_those_of_older_versions() {
        let of = |vectors: Vec<Vec<f32>>| Reply { vectors, ..Reply::default() };
        let reply = of(vec![vec![0.1, -2.0e-9, f32::MAX], vec![0.25]]);
        let written = serde_json::to_value(&reply).unwrap();
        assert_eq!(written["vectors"][1], serde_json::json!([0.25]));
        assert!(written["vectors"][0].is_string(), "{written}");
        assert_eq!(serde_json::from_value::<Reply>(written.clone()).unwrap(), reply);
        let mut older = written;
        older["vectors"] = serde_json::json!([[0.5, 1.5], [0.25]]);
        assert_eq!(serde_json::from_value::<Reply>(older).unwrap(), of(vec![vec![0.5, 1.5], vec![0.25]]));
    }

    /// Answers every question otherwise than by default.
    struct Own;

    impl Model for Own {
        fn provider(&self) -> &'static str {
            "own"
        }
        fn name(&self) -> &str {
            "mine"
        }
        fn probe(&self) -> Task<'static> {
            Task::Embed(&[])
        }
        fn reads_messages(&self) -> bool {
            false
        }
        fn is_local(&self) -> bool {
            true
        }
        fn has_another_way(&self, _: &Call<'_>) -> bool {
            true
        }
        fn complete<'a>(
            &'a self,
            _: &'a Call<'_>,
            _: &'a dyn Listener,
        ) -> BoxFuture<'a, Result<Reply, CallError>> {
            unreachable!("nobody asks it")
        }
    }

    struct Nothing;

    impl Allowances for Nothing {
        fn reserve<'a>(
            &'a self,
            _: &'a Call<'_>,
            _: &'a str,
        ) -> BoxFuture<'a, Result<Box<dyn Reservation>, CallError>> {
            unreachable!("nobody calls")
        }
    }

    #[test]
    fn a_layer_says_of_itself_what_it_stands_around() {
        let layers: [Arc<dyn Model>; 3] = [
            Arc::new(Priced::new(Arc::new(Own), Arc::new(Prices::new(Clock::System)))),
            Arc::new(Retry::new(Arc::new(Own), Arc::new(Budget::default()))),
            Arc::new(Allowed::new(Arc::new(Own), Arc::new(Nothing))),
        ];
        for layer in layers {
            assert_eq!((layer.provider(), layer.name()), ("own", "mine"));
            assert!(matches!(layer.probe(), Task::Embed(_)), "a server of vectors is asked for vectors");
            assert!(!layer.reads_messages() && layer.is_local() && layer.has_another_way(&Call::default()));
        }
    }
}
