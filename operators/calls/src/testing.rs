//! What the tests of several layers share: an upstream that does as it is told, in virtual time.

use crate::{Call, CallError, Class, Happening, Listener, Model, Reply, Tried, Upstream, limits::Limits};
use forebay_schemas::{Content, Message, NanoUsd, Role, Usage};
use futures::future::BoxFuture;
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::time::Instant;

/// What an upstream is told to answer that shall answer its name.
const YES: &str = "yes";

/// Notes what it hears, a word each; also of a try beside.
#[derive(Clone, Default)]
pub(crate) struct Heard {
    words: Arc<Mutex<Vec<String>>>,
    happenings: Arc<Mutex<Vec<Happening>>>,
    who: &'static str,
}

impl Heard {
    pub(crate) fn take(&self) -> String {
        std::mem::take(&mut *self.words.lock().unwrap()).join(", ")
    }
    pub(crate) fn take_happenings(&self) -> Vec<Happening> {
        std::mem::take(&mut *self.happenings.lock().unwrap())
    }
    fn add(&self, word: String) {
        self.words.lock().unwrap().push(format!("{}{word}", self.who));
    }
}

impl Listener for Heard {
    fn started(&self, to: Upstream<'_>) {
        self.add(format!("to {}", to.endpoint.unwrap_or(to.model)));
    }
    fn tier(&self, place: u32, name: &str) {
        self.add(format!("tier {place} {name}"));
    }
    fn token(&self, text: &str) {
        self.add(text.to_owned());
    }
    fn happened(&self, what: Happening) {
        self.happenings.lock().unwrap().push(what);
    }
    fn cost(&self, cost: NanoUsd) {
        self.add(format!("cost {}", cost.0));
    }
    fn ended(&self, tried: &Tried<'_>) {
        self.add(match tried.result {
            Ok(Reply { cost_nano_usd: Some(cost), .. }) => format!("ok {}", cost.0),
            Ok(_) => "ok".to_owned(),
            Err(error) => format!("{:?}", error.class).to_lowercase(),
        });
    }
    fn paid<'a>(
        &'a self,
        _: Upstream<'a>,
        call: BoxFuture<'a, Result<Reply, CallError>>,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(async move {
            let result = call.await;
            self.add(match &result {
                Ok(reply) => format!("kept {}", reply.text),
                Err(CallError { partial: Some(read), .. }) => format!("kept what was read of {}", read.text),
                Err(_) => "closed".to_owned(),
            });
            result
        })
    }
    fn beside(&self) -> Option<Box<dyn Listener + '_>> {
        Some(Box::new(Self { who: "hedge ", ..self.clone() }))
    }
}

pub(crate) fn reply(text: &str) -> Reply {
    Reply {
        text: text.to_owned(),
        vectors: Vec::new(),
        citations: None,
        model: "m".to_owned(),
        usage: Some(Usage::of(10, 10)),
        cost_nano_usd: None,
        finish_reason: None,
        ttft: None,
        fallback: None,
        ..Reply::default()
    }
}

pub(crate) fn error(class: Class) -> CallError {
    CallError::new(class, "model_unavailable", "it failed")
}

pub(crate) fn limited(wait: Duration) -> CallError {
    CallError { retry_after: Some(wait), ..error(Class::Limited) }.with_status(429)
}

pub(crate) fn call(text: &str) -> Call<'static> {
    let content = Some(Content::Text(text.to_owned()));
    let messages = vec![Message { role: Role::User, content, rest: Default::default() }];
    Call { messages, ..Call::default() }
}

/// What the next try comes to: after so long, an answer or an error; and, where the call streams, a first token before.
pub(crate) struct Next {
    pub(crate) after: Duration,
    pub(crate) first_token: Option<Duration>,
    pub(crate) result: Result<Reply, CallError>,
    pub(crate) limits: Option<Limits>,
}

impl Next {
    pub(crate) fn ok(ms: u64) -> Self {
        Self { after: Duration::from_millis(ms), first_token: None, result: Ok(reply(YES)), limits: None }
    }
    /// An answer that is not just the upstream's name.
    pub(crate) fn says(ms: u64, reply: Reply) -> Self {
        Self { result: Ok(reply), ..Self::ok(ms) }
    }
    pub(crate) fn err(ms: u64, error: CallError) -> Self {
        Self { result: Err(error), ..Self::ok(ms) }
    }
}

type Script = Box<dyn FnMut(&Call<'_>) -> Next + Send>;

/// An upstream.
pub(crate) struct Told {
    name: &'static str,
    script: Mutex<Script>,
    /// When each try came, and how many were given up.
    pub(crate) tries: Mutex<Vec<Instant>>,
}

impl Told {
    pub(crate) fn by(
        name: &'static str,
        script: impl FnMut(&Call<'_>) -> Next + Send + 'static,
    ) -> Arc<Self> {
        Arc::new(Self { name, script: Mutex::new(Box::new(script)), tries: Mutex::default() })
    }

    /// These in turn, and then answers after 100 ms.
    pub(crate) fn of(name: &'static str, nexts: impl IntoIterator<Item = Next>) -> Arc<Self> {
        let mut nexts: VecDeque<_> = nexts.into_iter().collect();
        Self::by(name, move |_| nexts.pop_front().unwrap_or_else(|| Next::ok(100)))
    }

    pub(crate) fn tries(&self) -> usize {
        self.tries.lock().unwrap().len()
    }
}

impl Model for Told {
    fn provider(&self) -> &'static str {
        "told"
    }
    fn name(&self) -> &str {
        "m"
    }
    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        let to = Upstream { provider: "told", endpoint: Some(self.name), model: "m" };
        let sent = async move {
            listener.started(to);
            let started = Instant::now();
            self.tries.lock().unwrap().push(started);
            let Next { after, first_token, mut result, limits } = (self.script.lock().unwrap())(call);
            if let Some(first) = first_token {
                tokio::time::sleep(first).await;
                listener.token(self.name);
            }
            tokio::time::sleep_until(started + after).await;
            if let Some(limits) = limits {
                listener.limits(&limits);
            }
            if let Ok(reply) = &mut result {
                reply.ttft = first_token;
                if reply.text == YES {
                    self.name.clone_into(&mut reply.text);
                }
            }
            let tried = Tried { to, duration: after, ttft: first_token, result: result.as_ref() };
            listener.ended(&tried);
            result
        };
        listener.paid(to, Box::pin(sent))
    }
}

/// Numbers from 0 to 1, the same for the same seed (Steele et al., SplitMix64).
#[derive(Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn next(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.bits() % u64::try_from(bound).unwrap()).unwrap()
    }

    /// Log-normal, so that all but 2% lie between the bounds; cut off there.
    pub(crate) fn between(&mut self, low: Duration, high: Duration) -> Duration {
        let (low, high) = (low.as_secs_f64().ln(), high.as_secs_f64().ln());
        // Box and Muller.
        let normal =
            (-2.0 * self.next().max(1e-12).ln()).sqrt() * (std::f64::consts::TAU * self.next()).cos();
        let sigma = (high - low) / (2.0 * 2.326);
        Duration::from_secs_f64(((low + high) / 2.0 + sigma * normal).clamp(low, high).exp())
    }
}
