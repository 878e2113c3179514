//! One try at one server, in whichever [`Api`] it speaks.
//!
//! Whoever reads along gets the answer as server-sent events; otherwise it comes in one piece, which is cheaper.
//!
//! Invariant: an answer is whole or an error. A stream that ends without saying so, an empty 200 and a 200 that is
//! no answer of its API are errors; and an error after the first token that somebody read is [`Class::Cut`], with all that
//! was read.

mod api;
mod chat;
mod embeddings;
mod keys;
mod messages;
mod refusal;
mod rerank;
mod responses;
mod sse;

use crate::{Call, CallError, Class, Limits, Listener, Model, Reply, Secret, Task, Tried, Upstream};
pub use api::{Api, Vllm};
use api::{Written, malformed};
use futures::{StreamExt as _, future::BoxFuture};
use keys::Keys;
use reqwest::{Client, Response, Url, header::CONTENT_TYPE};
use std::time::Duration;
use tokio::time::Instant;

/// Headers that name a try to whoever keeps a log.
const CALL_ID: &str = "x-forebay-call-id";
const ATTEMPT: &str = "x-forebay-attempt";
/// The largest response, in bytes.
const RESPONSE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// How long each part of a try may take.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// Until a connection stands.
    pub connect: Duration,
    /// Until the first token of a streamed answer.
    pub first_token: Duration,
    /// Between two pieces of one: a server that stalls in mid-stream is not waited for to the end.
    pub silence: Duration,
    /// Until the answer is whole.
    pub total: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            first_token: Duration::from_secs(60),
            silence: Duration::from_secs(60),
            total: Duration::from_secs(300),
        }
    }
}

/// An address that no client can be made for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is no URL.
    #[error("model URL {url:?} is no URL; give one such as http://127.0.0.1:8000/v1")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It is a URL of another form than expected.
    #[error("model URL at {host:?} {fault}")]
    Form {
        /// The host in it, or nothing; the rest may be a secret.
        host: String,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// TLS could not be set up.
    #[error("could not set up HTTP")]
    Http(#[from] reqwest::Error),
}

/// A server.
pub struct Server {
    client: Client,
    api: Api,
    vllm: Vllm,
    url: Url,
    endpoint: String,
    model: String,
    keys: Keys,
    timeouts: Timeouts,
}

impl Server {
    /// A client for `base_url`, which ends in `/v1`. Of several keys the next is used where one is refused.
    pub fn new(
        api: Api,
        base_url: &str,
        model: impl Into<String>,
        keys: Vec<Secret>,
        timeouts: Timeouts,
    ) -> Result<Self, Error> {
        let wrong = |source| Error::Url { url: base_url.to_owned(), source: Box::new(source) };
        let mut url: Url = base_url.trim().parse().map_err(wrong)?;
        let form = |fault| Error::Form { host: url.host_str().unwrap_or_default().to_owned(), fault };
        if !matches!(url.scheme(), "http" | "https") {
            return Err(form("begins with neither http:// nor https://"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(form("holds a user or a password; give the key apart from it"));
        }
        let path = url.path().trim_end_matches('/').to_owned();
        if !path.ends_with("/v1") || url.query().is_some() {
            return Err(form("does not end in /v1"));
        }
        url.set_path(&api.path(&path));
        // A redirected POST would be sent on as a GET: better to say that the address is wrong.
        let redirects = reqwest::redirect::Policy::none();
        let client = Client::builder().connect_timeout(timeouts.connect).redirect(redirects).build()?;
        let endpoint = url.origin().ascii_serialization();
        let (model, keys, vllm) = (model.into(), Keys::new(keys), Vllm::default());
        Ok(Self { client, api, vllm, url, endpoint, model, keys, timeouts })
    }

    /// The same for a vLLM, told what only it knows.
    pub fn with_vllm(self, vllm: Vllm) -> Self {
        Self { vllm, ..self }
    }

    /// Scheme, host and port.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    async fn attempt(
        &self,
        call: &Call<'_>,
        model: &str,
        pieces: &mut Pieces<'_>,
    ) -> Result<Reply, CallError> {
        let total = pieces.sent + self.timeouts.total;
        let total = call.deadline.map_or(total, |deadline| total.min(deadline));
        let answered = async {
            if call.stream && self.api.streams() {
                let first = pieces.sent + self.timeouts.first_token;
                let opened = tokio::time::timeout_at(first, self.send(call, model, pieces.listener)).await;
                let response = opened.map_err(|_| timeout("no first token"))??;
                self.read_stream(response, model, first, pieces).await
            } else {
                let body = read_body(self.send(call, model, pieces.listener).await?).await?;
                self.api.whole(&body, call)?.into_reply(model, None)
            }
        };
        let result = match tokio::time::timeout_at(total, answered).await {
            Ok(result) => result,
            Err(_) => Err(timeout("no whole answer")),
        };
        match result {
            // Whatever it was: somebody has read the beginning.
            Err(error) if pieces.ttft.is_some() => {
                let message = format!("the answer was cut after its first token: {}", error.message);
                let read = std::mem::take(&mut pieces.written).reply(model, pieces.ttft);
                let CallError { http_status, retry_after, source, .. } = error;
                Err(CallError { http_status, retry_after, source, ..CallError::cut(message, read) })
            }
            result => result,
        }
    }

    /// Sends, and gives back only a response that says success.
    async fn send(
        &self,
        call: &Call<'_>,
        model: &str,
        listener: &dyn Listener,
    ) -> Result<Response, CallError> {
        let body = self.api.body(call, model, self.vllm)?;
        let mut request =
            self.client.post(self.url.clone()).header(CONTENT_TYPE, "application/json").body(body);
        if let Some(id) = listener.try_id() {
            request = request.header(CALL_ID, id.call).header(ATTEMPT, id.number);
        }
        let key = self.keys.pick();
        request = self.api.headers(request, key.map(|key| self.keys.get(key)));
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        let limits = Limits::read(response.headers(), status.is_success());
        if !limits.is_empty() {
            listener.limits(&limits);
        }
        if status.is_success() {
            return Ok(response);
        }
        let headers = response.headers().clone();
        // A refusal whose reason cannot be read is still a refusal.
        let body = read_body(response).await.unwrap_or_default();
        let error = refusal::read(status.as_u16(), &headers, &body, call);
        if let Some(key) = key {
            self.keys.failed(key, &error);
        }
        Err(CallError { message: self.keys.redact(&error.message), ..error })
    }

    async fn read_stream(
        &self,
        response: Response,
        model: &str,
        first: Instant,
        pieces: &mut Pieces<'_>,
    ) -> Result<Reply, CallError> {
        let (mut body, mut bytes) = (response.bytes_stream(), 0);
        let mut events = sse::Events::default();
        let mut heard = Instant::now();
        while !pieces.written.is_over {
            if let Some(data) = events.next() {
                heard = Instant::now();
                if data.trim() == "[DONE]" {
                    break;
                }
                if let Some(text) = self.api.take(&data, &mut pieces.written)? {
                    pieces.give(&text);
                }
                continue;
            }
            let (until, what) = match pieces.ttft {
                Some(_) => (heard + self.timeouts.silence, "no further token"),
                None => (first, "no first token"),
            };
            match tokio::time::timeout_at(until, body.next()).await.map_err(|_| timeout(what))? {
                Some(Ok(part)) => {
                    bytes += part.len();
                    if bytes > RESPONSE_BYTES_MAX {
                        return Err(too_large());
                    }
                    events.feed(&part)?;
                }
                Some(Err(error)) => return Err(broken("the stream broke").because(error.without_url())),
                None if pieces.written.is_whole() => break,
                None => return Err(broken("the stream ended before the answer did")),
            }
        }
        std::mem::take(&mut pieces.written).into_reply(model, pieces.ttft)
    }
}

impl Model for Server {
    fn provider(&self) -> &'static str {
        self.api.provider()
    }

    fn name(&self) -> &str {
        &self.model
    }

    fn probe(&self) -> Task<'static> {
        self.api.probe()
    }

    fn has_another_way(&self, _: &Call<'_>) -> bool {
        self.keys.has_rotated()
    }

    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        let model = call.model.as_deref().unwrap_or(&self.model);
        let to = Upstream { provider: self.provider(), endpoint: Some(&self.endpoint), model };
        let sent = async move {
            listener.started(to);
            let written = Written::default();
            let mut pieces = Pieces { sent: Instant::now(), ttft: None, written, listener };
            let result = self.attempt(call, model, &mut pieces).await;
            let Pieces { sent, ttft, .. } = pieces;
            listener.ended(&Tried { to, duration: sent.elapsed(), ttft, result: result.as_ref() });
            result
        };
        // Here and not further out: a ledger must close each try before the next.
        listener.paid(to, Box::pin(sent))
    }
}

/// Hands pieces on, and notes when the first came and what they make up. It outlives the reading, which may be given up.
struct Pieces<'a> {
    sent: Instant,
    ttft: Option<Duration>,
    written: Written,
    listener: &'a dyn Listener,
}

impl Pieces<'_> {
    fn give(&mut self, text: &str) {
        self.ttft.get_or_insert_with(|| self.sent.elapsed());
        self.listener.token(text);
    }
}

async fn read_body(response: Response) -> Result<Vec<u8>, CallError> {
    let mut parts = response.bytes_stream();
    let mut body = Vec::new();
    while let Some(part) = parts.next().await {
        body.extend_from_slice(
            &part.map_err(|error| broken("the response broke off").because(error.without_url()))?,
        );
        if body.len() > RESPONSE_BYTES_MAX {
            return Err(too_large());
        }
    }
    Ok(body)
}

fn unreachable(error: reqwest::Error) -> CallError {
    // The URL is left out of the cause: the host stands in the failure already.
    let (is_connect, error) = (error.is_connect(), error.without_url());
    match is_connect {
        true => CallError::new(Class::Unreachable, "model_unavailable", "could not connect").because(error),
        false => broken("could not send the request").because(error),
    }
}

fn timeout(what: &str) -> CallError {
    CallError::new(Class::Transient, "model_timeout", format!("{what} in time"))
}

fn broken(what: &str) -> CallError {
    CallError::new(Class::Transient, "model_unavailable", what)
}

fn too_large() -> CallError {
    malformed("longer than 16 MiB")
}

#[cfg(test)]
mod tests;
