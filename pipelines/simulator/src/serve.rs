//! What becomes of a request: from its head to its answer, with all that is to go wrong on the way.

use crate::{
    Broken, Shared,
    api::{self, Answer, Asked, Endpoint, Refusal, Vectors, What},
    call::{self, Call},
    dice::{Dice, whole},
    engine::{Job, Work},
    faults::{Fate, Fault, RetryAfter},
    limits::{Form, Verdict},
    replica::Replica,
    settings::{Latency, Settings},
    stream::Streamed,
    text,
};
use bytes::Bytes;
use futures::{StreamExt as _, stream::BoxStream};
use http_body_util::{BodyExt as _, Either, Full, Limited, StreamBody};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::{Frame, Incoming},
    header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue},
};
use std::sync::Arc;
use tokio::time::sleep_until;

/// The largest request, in bytes.
const REQUEST_BYTES_MAX: usize = 32 * 1024 * 1024;
/// The largest document of settings, in bytes.
const SETTINGS_BYTES_MAX: usize = 1024 * 1024;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const METRICS: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
const EVENTS: HeaderValue = HeaderValue::from_static("text/event-stream; charset=utf-8");

/// What answers consist of.
pub type Body = Either<Full<Bytes>, StreamBody<BoxStream<'static, Result<Frame<Bytes>, Broken>>>>;

/// Serves a request. An error breaks the connection, with a reset.
pub async fn serve(replica: Arc<Replica>, request: Request<Incoming>) -> Result<Response<Body>, Broken> {
    if request.method() == Method::POST
        && let Some((endpoint, path)) = Endpoint::of(request.uri().path())
    {
        return called(&replica, endpoint, path, request).await;
    }
    let settings = replica.shared.settings();
    Ok(match (request.method(), request.uri().path()) {
        (&Method::GET, "/health") if replica.is_healthy(&settings) => plain(200, TEXT, ""),
        (&Method::GET, "/health") => plain(503, TEXT, "starting"),
        (&Method::GET, "/v1/models") => plain(200, JSON, api::models(&settings.models)),
        (&Method::GET, "/metrics") => {
            let model = settings.models.first().map(String::as_str).unwrap_or_default();
            plain(200, METRICS, replica.metrics(model))
        }
        (&Method::GET, "/simulate") => plain(200, TEXT, settings.document()),
        (&Method::PUT, "/simulate") => obey(&replica.shared, request.into_body()).await,
        (&Method::POST, "/simulate/restart") => {
            replica.restart();
            plain(204, TEXT, "")
        }
        (_, path) => {
            let message = format!("nothing is served at {path} by this method");
            plain(404, JSON, Endpoint::Chat.refusal(&Refusal::new(404, message)))
        }
    })
}

/// Takes new settings: those of the start, with what the document changes.
async fn obey(shared: &Shared, body: Incoming) -> Response<Body> {
    let Ok(body) = Limited::new(body, SETTINGS_BYTES_MAX).collect().await else {
        return plain(400, TEXT, format!("could not read a document of at most {SETTINGS_BYTES_MAX} bytes"));
    };
    let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
    match shared.obey(&text) {
        Ok(settings) => plain(200, TEXT, settings.document()),
        Err(fault) => plain(400, TEXT, format!("{fault}\n")),
    }
}

fn plain(status: u16, kind: HeaderValue, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Either::Left(Full::new(body.into())));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

/// A call under way, with all that its answer needs.
struct Serving<'a> {
    replica: &'a Arc<Replica>,
    settings: Arc<Settings>,
    endpoint: Endpoint,
    call: Call,
    fate: Fate,
    headers: HeaderMap,
}

async fn called(
    replica: &Arc<Replica>,
    endpoint: Endpoint,
    path: &'static str,
    request: Request<Incoming>,
) -> Result<Response<Body>, Broken> {
    let settings = replica.shared.settings();
    let (head, body) = request.into_parts();
    let mut call = Call::begin(replica, path, &head.headers);
    let body = match Limited::new(body, REQUEST_BYTES_MAX).collect().await {
        Ok(body) => body.to_bytes(),
        Err(fault) if fault.is::<http_body_util::LengthLimitError>() => {
            let message = format!("the request is longer than {REQUEST_BYTES_MAX} bytes");
            return refused(call, endpoint, &Refusal::new(413, message), HeaderMap::new());
        }
        // Dropped, and so logged as what it is: the client went away while it asked.
        Err(_) => return Err(Broken),
    };
    let (identity, attempt) = call.identity(endpoint, &head.headers, &body);
    let fate = match Fate::of(&settings, &identity, attempt, &head.headers) {
        Ok(fate) => fate,
        Err(message) => return refused(call, endpoint, &Refusal::new(400, message), HeaderMap::new()),
    };
    let key = call::key(&head.headers);
    let is_in = |keys: &[String]| key.is_some_and(|key| keys.iter().any(|known| known == key));
    let (is_dead, is_spent) = (is_in(&settings.dead_keys), is_in(&settings.spent_keys));
    let key = key.map_or(0, |key| call::hash(key.as_bytes()));
    // Read before anything is refused, so that the log says what was asked.
    let asked = endpoint.read(&body);
    let prompt_hash = asked.as_ref().map_or(0, |asked| call::hash(asked.prompt.as_bytes()));
    if let Ok(asked) = &asked {
        let is_logged = replica.shared.log.is_some();
        call.note(|line| {
            if let (What::Vectors(vectors), true) = (&asked.what, is_logged) {
                line.text_hashes = vectors.texts().map(call::text_hash).collect();
            }
            line.model.clone_from(&asked.model);
            line.prompt_tokens = text::tokens(&asked.prompt);
            line.prompt_hash = format!("{prompt_hash:016x}");
            line.stream = matches!(asked.what, What::Text { stream: true, .. });
        });
    }
    let serving = Serving { replica, settings, endpoint, call, fate, headers: HeaderMap::new() };
    if is_dead {
        let refusal = Refusal::new(401, "this API key is not valid");
        return serving.refuse(Refusal { code: Some("invalid_api_key"), ..refusal });
    }
    if is_spent {
        return serving.refuse(usage_limit());
    }
    if !replica.is_healthy(&serving.settings) {
        return serving.refuse(Refusal::new(503, "the model is still being loaded"));
    }
    serving.meet_fate(asked, prompt_hash, key).await
}

fn usage_limit() -> Refusal {
    let message = "You have reached your specified API usage limits.";
    Refusal { code: Some("insufficient_quota"), ..Refusal::new(400, message) }
}

/// Whether a call asks for what there is, and for no more than may be.
fn check(asked: &Asked, settings: &Settings) -> Result<(), Refusal> {
    if !settings.any_model && !settings.models.contains(&asked.model) {
        let refusal = Refusal::new(404, format!("The model `{}` does not exist.", asked.model));
        return Err(Refusal { code: Some("model_not_found"), ..refusal });
    }
    let checked = match &asked.what {
        What::Text { tokens_max: Some(0), .. } => {
            Err("the longest answer must be 1 token at least".to_owned())
        }
        What::Text { .. } => Ok(()),
        What::Vectors(vectors) => vectors.check(crate::settings::DIMENSIONS_MAX),
        What::Ranking(ranking) => ranking.check(),
    };
    checked.map_err(|message| Refusal::new(400, message))
}

/// Ends a call with a refusal.
fn refused(
    mut call: Call,
    endpoint: Endpoint,
    refusal: &Refusal,
    headers: HeaderMap,
) -> Result<Response<Body>, Broken> {
    call.end(Some(refusal.status))?;
    let mut response = plain(refusal.status, JSON, endpoint.refusal(refusal));
    response.headers_mut().extend(headers);
    Ok(response)
}

impl Serving<'_> {
    fn refuse(self, refusal: Refusal) -> Result<Response<Body>, Broken> {
        refused(self.call, self.endpoint, &refusal, self.headers)
    }

    /// What goes wrong before anything is served, or else the answer.
    async fn meet_fate(
        mut self,
        asked: Result<Asked, String>,
        prompt_hash: u64,
        key: u64,
    ) -> Result<Response<Body>, Broken> {
        match self.fate.fault {
            Some(Fault::Reset) => {
                self.note_fault();
                self.call.end(None)?;
                return Err(Broken);
            }
            Some(Fault::Status(status)) => return self.fail(status).await,
            Some(Fault::UsageLimit) => {
                self.note_fault();
                return self.refuse(usage_limit());
            }
            Some(Fault::Stall) => {
                self.note_fault();
                tokio::time::sleep(self.settings.stall).await;
            }
            _ => {}
        }
        match asked {
            Ok(asked) => self.answer(asked, prompt_hash, key).await,
            Err(message) => self.refuse(Refusal::new(400, message)),
        }
    }

    /// The log names a fault where it is met: a call may be refused for another reason before.
    fn note_fault(&mut self) {
        let fault = self.fate.fault;
        self.call.note(|line| line.fault = fault.map(Fault::name));
    }

    /// A status that was to come, after the latency that the caller asked for.
    async fn fail(mut self, status: u16) -> Result<Response<Body>, Broken> {
        self.note_fault();
        if let Some(latency) = self.fate.latency {
            tokio::time::sleep(latency).await;
        }
        let now = self.replica.shared.clock.now_us();
        let retry_after = match &self.fate.retry_after {
            RetryAfter::Given(value) => Some(("retry-after", value.clone())),
            RetryAfter::Millis(wait) => Some(("retry-after-ms", wait.as_millis().to_string())),
            _ if !matches!(status, 429 | 503 | 529) => None,
            RetryAfter::Nothing => None,
            RetryAfter::Seconds(wait) => Some(("retry-after", seconds_up(*wait))),
            RetryAfter::Date(wait) => {
                // A date has whole seconds, so it is the next.
                let until =
                    self.replica.shared.clock.wall(now) + *wait + std::time::Duration::from_millis(999);
                Some(("retry-after", httpdate::fmt_http_date(until)))
            }
        };
        if let Some((name, value)) = retry_after {
            self.add_header(name, &value);
        }
        let code = (status == 429).then_some("rate_limit_exceeded");
        self.refuse(Refusal { code, ..Refusal::new(status, format!("simulated status {status}")) })
    }

    fn add_header(&mut self, name: &'static str, value: &str) {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(HeaderName::from_static(name), value);
        }
    }

    async fn answer(
        mut self,
        mut asked: Asked,
        prompt_hash: u64,
        key: u64,
    ) -> Result<Response<Body>, Broken> {
        let settings = Arc::clone(&self.settings);
        if asked.model.is_empty()
            && let Some(first) = settings.models.first()
        {
            asked.model.clone_from(first);
        }
        if let Err(refusal) = check(&asked, &settings) {
            return self.refuse(refusal);
        }
        let prompt_tokens = text::tokens(&asked.prompt);
        let (said, tokens_max) = self.said(&asked, prompt_hash);

        let verdict = self.replica.admit(key, prompt_tokens.saturating_add(tokens_max), &settings);
        self.tell_limits(verdict);
        if let Some(wait) = verdict.wait {
            self.add_header("retry-after", &seconds_up(wait));
            self.add_header("retry-after-ms", &wait.as_millis().to_string());
            let refusal = Refusal::new(429, "Rate limit reached; see the headers.");
            return self.refuse(Refusal { code: Some("rate_limit_exceeded"), ..refusal });
        }

        self.note_fault();
        let answer = said.map(|said| self.written(&asked, said, prompt_tokens));
        let output = answer.as_ref().map_or(0, Answer::tokens);
        let wanted = prompt_tokens.saturating_add(output);
        if wanted > settings.context_tokens || self.fate.fault == Some(Fault::ContextLength) {
            let context = settings.context_tokens;
            let message = format!(
                "This model's maximum context length is {context} tokens. However, your request has {wanted}."
            );
            return self
                .refuse(Refusal { code: Some("context_length_exceeded"), ..Refusal::new(400, message) });
        }

        let warm_us = self.replica.warm_us(&settings);
        if warm_us > self.replica.shared.clock.now_us() {
            sleep_until(self.replica.shared.clock.instant(warm_us)).await;
        }
        let job = Job { priority: asked.priority, output, work: self.work(&asked, prompt_tokens) };
        let Some(ticket) = self.replica.submit(job, settings.queue) else {
            let message = format!("the queue is full: {} calls wait", settings.queue);
            return self.refuse(Refusal::new(503, message));
        };
        self.call.serve(ticket);
        self.served(asked, answer, prompt_hash, prompt_tokens).await
    }

    /// The words of an answer, where one is wanted, and the most tokens that it may have.
    fn said(&self, asked: &Asked, prompt_hash: u64) -> (Option<String>, u32) {
        let What::Text { question, tokens_max, .. } = &asked.what else { return (None, 0) };
        // They hang on what was asked alone, and not on which try this is.
        let mut dice = Dice::of(self.settings.seed, &[b"answer", &prompt_hash.to_le_bytes()]);
        let drawn = u32::try_from(whole(self.settings.answer_tokens.draw(&mut dice))).unwrap_or(u32::MAX);
        let tokens = self.fate.tokens.unwrap_or(drawn).min(tokens_max.unwrap_or(u32::MAX));
        let tokens = tokens.clamp(1, crate::settings::TOKENS_MAX);
        (Some(text::answer(question, tokens, &mut dice)), tokens_max.unwrap_or(tokens))
    }

    /// What the engine is at work on, handed on as it was asked for.
    async fn served(
        mut self,
        asked: Asked,
        answer: Option<Answer>,
        prompt_hash: u64,
        prompt_tokens: u32,
    ) -> Result<Response<Body>, Broken> {
        let answer = match (&asked.what, answer) {
            (What::Text { stream: true, usage, .. }, Some(answer)) => return Ok(self.stream(answer, *usage)),
            (_, answer) => answer,
        };
        let progress = self.call.beyond(u32::MAX).await;
        let body = match (&asked.what, answer) {
            (What::Vectors(vectors), _) => self.vectors(vectors, &asked.model, prompt_tokens),
            (What::Ranking(ranking), _) => {
                ranking.answer(&format!("{prompt_hash:016x}"), &asked.model, prompt_tokens)
            }
            (What::Text { .. }, Some(mut answer)) => {
                answer.cached_tokens = progress.cached;
                if self.fate.fault == Some(Fault::Empty) {
                    (answer.text, answer.pieces) = (String::new(), Vec::new());
                }
                self.endpoint.whole(&answer)
            }
            // A text always has its answer.
            (What::Text { .. }, None) => return Err(Broken),
        };
        self.deliver(body)
    }

    fn vectors(&self, vectors: &Vectors, model: &str, prompt_tokens: u32) -> Vec<u8> {
        vectors.answer(model, self.settings.seed, self.settings.dimensions, prompt_tokens)
    }

    fn tell_limits(&mut self, verdict: Verdict) {
        if self.settings.limit_headers {
            let form = if self.endpoint == Endpoint::Messages { Form::Anthropic } else { Form::OpenAi };
            let clock = self.replica.shared.clock;
            verdict.headers(form, clock.wall(clock.now_us()), &mut self.headers);
        }
    }

    /// The answer with these words, as far as it may go.
    fn written(&mut self, asked: &Asked, mut said: String, prompt_tokens: u32) -> Answer {
        let tokens_max = match asked.what {
            What::Text { tokens_max: Some(tokens_max), .. } => {
                usize::try_from(tokens_max).unwrap_or(usize::MAX)
            }
            _ => usize::MAX,
        };
        let mut end = 0;
        let ranges = text::pieces(&said).into_iter().take(tokens_max).map(|piece| {
            let start = end;
            end += piece.len();
            start..end
        });
        let pieces: Vec<_> = ranges.collect();
        let is_cut_by_length = end < said.len();
        said.truncate(end);
        self.call.note_length(is_cut_by_length);
        let clock = self.replica.shared.clock;
        Answer {
            id: format!("{:016x}", self.fate.dice.number()),
            model: asked.model.clone(),
            created_s: clock.wall_us(clock.now_us()) / 1_000_000,
            text: said,
            pieces,
            is_cut_by_length,
            prompt_tokens,
            cached_tokens: 0,
        }
    }

    /// What it takes: as the engine says, or as long as a caller or a setting wants it.
    fn work(&mut self, asked: &Asked, prompt: u32) -> Work {
        let speed = self.replica.speed(&self.settings);
        let micros = |seconds: f64| whole(seconds * 1e6);
        let gap = micros(self.settings.token_gap.as_secs_f64() / speed);
        match (&self.settings.latency, self.fate.latency) {
            (_, Some(latency)) => Work::Timed { first: micros(latency.as_secs_f64()), gap },
            (Latency::Given(spread), None) => {
                Work::Timed { first: micros(spread.draw(&mut self.fate.dice) / speed), gap }
            }
            (Latency::Modelled, None) => {
                let blocks = text::blocks(&asked.cache_salt, &asked.prompt, self.settings.block_tokens);
                Work::Modelled { prompt, blocks }
            }
        }
    }

    /// Hands on an answer that comes in one piece, or what a fault makes of it.
    fn deliver(mut self, body: Vec<u8>) -> Result<Response<Body>, Broken> {
        let body = Bytes::from(body);
        // Not the first byte and not the last: something is there, and something is missing.
        let place = usize::try_from(whole(self.fate.place * body.len() as f64)).unwrap_or(0);
        let middle = place.clamp(1, body.len().saturating_sub(1).max(1)).min(body.len());
        let mut response = match self.fate.fault {
            Some(Fault::Malformed) => plain(200, JSON, body.slice(..middle)),
            // Vectors and ranks have no text that could be missing.
            Some(Fault::Empty) if self.endpoint.is_without_text() => plain(200, JSON, ""),
            Some(Fault::Blank) => plain(200, JSON, ""),
            Some(fault @ (Fault::Cut | Fault::StallMid)) => {
                self.call.begin_answer(200);
                let length = body.len();
                let parts =
                    halves(self.call, body.slice(..middle), body.slice(middle..), fault, self.settings.stall);
                let mut response = Response::new(Either::Right(StreamBody::new(parts)));
                response.headers_mut().insert(CONTENT_TYPE, JSON);
                response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
                response.headers_mut().extend(self.headers);
                return Ok(response);
            }
            _ => plain(200, JSON, body),
        };
        response.headers_mut().extend(self.headers);
        self.call.first_token();
        self.call.end(Some(200))?;
        Ok(response)
    }

    /// Hands on an answer as it is written.
    fn stream(mut self, answer: Answer, usage: bool) -> Response<Body> {
        self.call.begin_answer(200);
        let streamed =
            Streamed::new(self.endpoint, self.call, answer, usage, &self.fate, self.settings.stall);
        let parts =
            futures::stream::unfold(streamed, async |mut streamed| Some((streamed.next().await?, streamed)));
        let mut response = Response::new(Either::Right(StreamBody::new(parts.boxed())));
        response.headers_mut().insert(CONTENT_TYPE, EVENTS);
        response.headers_mut().extend(self.headers);
        response
    }
}

/// The first half of a body, then what the fault makes of the second.
fn halves(
    mut call: Call,
    first: Bytes,
    second: Bytes,
    fault: Fault,
    stall: std::time::Duration,
) -> BoxStream<'static, Result<Frame<Bytes>, Broken>> {
    call.first_token();
    let rest = futures::stream::once(async move {
        if fault == Fault::StallMid {
            tokio::time::sleep(stall).await;
        }
        call.end(None)?;
        if fault != Fault::Cut {
            return Ok(Frame::data(second));
        }
        written_out().await;
        Err(Broken)
    });
    futures::stream::iter([Ok(Frame::data(first))]).chain(rest).boxed()
}

/// Lets what was handed on before go out: hyper writes when a body has nothing more to give, and drops what it has not written
/// when the body breaks.
pub async fn written_out() {
    tokio::task::yield_now().await;
}

fn seconds_up(wait: std::time::Duration) -> String {
    (wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).to_string()
}
