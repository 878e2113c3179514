//! Joins the texts of several calls for vectors into one: a server takes little longer for many texts than for one. Scores need no
//! such thing, as the documents of a query are one caller's and travel in one call.
//!
//! A lot is sent when it has its most texts or tokens, or soon after its first. It stands between the layers of a call and the pool,
//! so each caller has its own tries, deadline, ledger and budget, and hears of a try that it shares with others as of its own, with
//! its part of the tokens and of the cost. To its ledger the try begins when it joins a lot. Whoever is alone in a lot asks as if
//! there were none. Where a server refuses a lot as somebody's fault, each of its callers asks again alone, and the others of the
//! one at fault have their answer.
//!
//! A lot is a future that all its callers poll. So nothing is spawned, whoever leaves takes nobody's answer away, and when all
//! have left the call is dropped and its connection closed.
//!
//! Invariant: each text is answered by its own vector, or its caller gets an error. What is heard of a shared try adds up to what it
//! took, and whoever leaves before its end hears its part of what the try has cost by then. Tenants never share a lot, so that each pays
//! for its own.

use crate::{
    Call, CallError, Class, CostSoFar, Happening, Listener, Model, Reply, Task, Tried, Upstream, Wait,
    model::{passes_on, says_what_it_stands_around},
};
use forebay_schemas::{Lane, NanoUsd, Usage};
use futures::future::{BoxFuture, FutureExt as _, Shared, WeakShared};
use std::{
    collections::HashMap,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

/// How large a lot becomes, and how long it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// The most texts.
    pub texts: usize,
    /// The most tokens, as estimated. A text that has more goes alone.
    pub tokens: u64,
    /// How long its first call waits for others.
    pub wait: Duration,
}

impl Default for Size {
    fn default() -> Self {
        Self { texts: 64, tokens: 16_384, wait: Duration::from_millis(15) }
    }
}

impl Size {
    /// The parts of a list of texts that go in one call each.
    pub fn parts(&self, texts: &[&str]) -> Vec<Range<usize>> {
        let mut parts: Vec<Range<usize>> = Vec::new();
        let mut sum: u64 = 0;
        for (at, text) in texts.iter().enumerate() {
            let more = tokens(&[*text]);
            match parts.last_mut() {
                Some(part) if part.len() < self.texts && sum.saturating_add(more) <= self.tokens => {
                    part.end = at + 1;
                    sum += more;
                }
                _ => {
                    parts.push(at..at + 1);
                    sum = more;
                }
            }
        }
        parts
    }
}

/// A model whose calls for vectors go together. Other calls pass through.
pub struct Batch {
    pool: Arc<dyn Model>,
    size: Size,
    open: Mutex<HashMap<Kind, Open>>,
}

/// What the calls of a lot have in common.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Kind {
    tenant: String,
    is_backfill: bool,
}

type Sending = BoxFuture<'static, Option<Arc<Ended>>>;
/// Weak: a lot lives as long as somebody waits for it.
type Open = (Arc<Lot>, WeakShared<Sending>);

/// Texts on their way into one call.
struct Lot {
    opened: Instant,
    inside: Mutex<Inside>,
    full: Notify,
    /// Its try, once that is sent.
    sent: watch::Sender<Option<Sent>>,
}

#[derive(Default)]
struct Inside {
    texts: Vec<String>,
    tokens: u64,
    callers: usize,
    /// The endpoints at which any of them was tried.
    tried: Vec<usize>,
    /// The latest of its callers'; none where one has none.
    deadline: Option<Instant>,
    is_closed: bool,
}

/// What a caller has in a lot.
struct Seat {
    texts: Range<usize>,
    /// Its part of the lot's tokens, as estimated.
    tokens: Range<u64>,
}

/// A try of a lot that was sent.
#[derive(Clone)]
struct Sent {
    provider: &'static str,
    endpoint: Option<String>,
    model: String,
    /// How many texts it brings, and tokens, as estimated.
    texts: usize,
    tokens: u64,
    cost: Option<CostSoFar>,
    /// When the lot was closed, and how long it waited for room then.
    closed: Instant,
    room: Duration,
}

impl Sent {
    fn to(&self) -> Upstream<'_> {
        let Self { provider, endpoint, model, .. } = self;
        Upstream { provider, endpoint: endpoint.as_deref(), model }
    }
}

/// What became of a lot that was tried.
struct Ended {
    result: Result<Reply, CallError>,
    duration: Duration,
    /// Known also where there is no answer.
    cost: Option<NanoUsd>,
    texts: usize,
    tokens: u64,
    /// The endpoints that it went to.
    went_to: Vec<usize>,
}

impl Batch {
    /// Calls of `pool`, which makes one try of each.
    pub fn new(pool: Arc<dyn Model>, size: Size) -> Self {
        Self { pool, size, open: Mutex::default() }
    }

    /// One try, together with others. Notes whether there were any.
    async fn together(
        &self,
        call: &Call<'_>,
        texts: &[&str],
        listener: &dyn Listener,
        is_shared: &AtomicBool,
    ) -> Result<Reply, CallError> {
        let came = Instant::now();
        let (lot, seat, mut sending) = self.take_seat(call, texts);
        let mut sent = lot.sent.subscribe();
        let mut waiting = Waiting { listener, seat: &seat, came, heard: None };
        let all = async {
            loop {
                let outcome = tokio::select! {
                    biased;
                    // Its other end is in the lot, which is ours too.
                    Ok(()) = sent.changed() => None,
                    outcome = &mut sending => Some(outcome),
                };
                // Both may have come at once.
                waiting.hear(sent.borrow_and_update().clone());
                if let Some(outcome) = outcome {
                    return outcome;
                }
            }
        };
        let outcome = match call.deadline {
            Some(deadline) => tokio::time::timeout_at(deadline, all).await.map_err(|_| too_late()),
            None => Ok(all.await),
        };
        let (result, duration, cost) = match outcome {
            // Nobody came to the first: it asks by itself.
            Ok(None) => {
                listener.happened(Happening::Waited(Wait::Batch, came.elapsed()));
                return self.pool.complete(call, &ByItself { of: listener }).await;
            }
            Ok(Some(ended)) => {
                is_shared.store(true, Ordering::Relaxed);
                ended.went_to.iter().for_each(|&endpoint| call.route.goes_to(endpoint));
                let cost = ended.cost.map(|cost| NanoUsd(seat.part(cost.0, ended.tokens)));
                (seat.answer(&ended), Some(ended.duration), cost)
            }
            Err(error) => (Err(error), None, waiting.cost()),
        };
        if let Some((sent, since)) = waiting.heard.take() {
            if let (Err(_), Some(cost)) = (&result, cost) {
                listener.cost(cost);
            }
            let duration = duration.unwrap_or_else(|| since.elapsed());
            listener.ended(&Tried { to: sent.to(), duration, ttft: None, result: result.as_ref() });
        }
        result
    }

    /// A seat in the lot that is open, or in a new one.
    fn take_seat(&self, call: &Call<'_>, texts: &[&str]) -> (Arc<Lot>, Seat, Shared<Sending>) {
        let is_backfill = call.lane == Lane::Backfill;
        let kind = Kind { tenant: call.tenant.as_str().to_owned(), is_backfill };
        let mut open = lock(&self.open);
        open.retain(|_, (_, sending)| sending.upgrade().is_some());
        if let Some((lot, sending)) = open.get(&kind)
            && let Some(sending) = sending.upgrade()
            && let Some(seat) = lot.take_in(texts, &self.size, call)
        {
            return (lot.clone(), seat, sending);
        }
        let lot = Arc::new(Lot {
            opened: Instant::now(),
            inside: Mutex::default(),
            full: Notify::new(),
            sent: watch::Sender::new(None),
        });
        let seat = lock(&lot.inside).add(texts, call);
        if seat.texts.end >= self.size.texts || seat.tokens.end >= self.size.tokens {
            lot.close();
        }
        let (tenant, lane) = (call.tenant.clone(), call.lane);
        let (model, wait, of) = (self.pool.clone(), self.size.wait, lot.clone());
        let sending = async move {
            let _ = tokio::time::timeout_at(of.opened + wait, of.full.notified()).await;
            let Inside { texts, tokens, callers, tried, deadline, .. } = of.take();
            if callers <= 1 {
                return None;
            }
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let call = Call { task: Task::Embed(&texts), tenant, lane, deadline, ..Call::default() };
            tried.into_iter().for_each(|endpoint| call.route.goes_to(endpoint));
            let before = call.route.tried().len();
            let hears = OfLot::new(&of, texts.len(), tokens);
            let result = model.complete(&call, &hears).await;
            let OfLot { duration, cost, .. } = hears;
            let (duration, cost) = (*lock(&duration), *lock(&cost));
            let cost = cost.or(result.as_ref().ok().and_then(|reply| reply.cost_nano_usd));
            let went_to = call.route.tried().split_off(before);
            Some(Arc::new(Ended { result, duration, cost, texts: texts.len(), tokens, went_to }))
        };
        let sending = sending.boxed().shared();
        if let Some(weak) = sending.downgrade() {
            open.insert(kind, (lot.clone(), weak));
        }
        (lot, seat, sending)
    }
}

impl Model for Batch {
    says_what_it_stands_around!(pool);

    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        let (Task::Embed(texts), None) = (call.task, &call.model) else {
            return self.pool.complete(call, listener);
        };
        let to = Upstream { provider: self.provider(), endpoint: None, model: self.name() };
        Box::pin(async move {
            let is_shared = AtomicBool::new(false);
            let tried = listener.paid(to, Box::pin(self.together(call, texts, listener, &is_shared))).await;
            match tried {
                Err(error) if is_shared.into_inner() && may_be_one_text(&error) => {
                    self.pool.complete(call, listener).await
                }
                tried => tried,
            }
        })
    }
}

impl Lot {
    /// A seat for these texts; `None` where there is none left.
    fn take_in(&self, texts: &[&str], size: &Size, call: &Call<'_>) -> Option<Seat> {
        let mut inside = lock(&self.inside);
        if inside.is_closed {
            return None;
        }
        let fits = inside.texts.len() + texts.len() <= size.texts
            && inside.tokens.saturating_add(tokens(texts)) <= size.tokens;
        let seat = fits.then(|| inside.add(texts, call));
        if !fits || inside.texts.len() >= size.texts || inside.tokens >= size.tokens {
            inside.is_closed = true;
            self.full.notify_one();
        }
        seat
    }

    fn close(&self) {
        lock(&self.inside).is_closed = true;
        self.full.notify_one();
    }

    /// All that is in it; it is closed then.
    fn take(&self) -> Inside {
        std::mem::replace(&mut *lock(&self.inside), Inside { is_closed: true, ..Inside::default() })
    }
}

impl Inside {
    fn add(&mut self, texts: &[&str], call: &Call<'_>) -> Seat {
        let (first, before) = (self.texts.len(), self.tokens);
        self.deadline = match self.callers {
            0 => call.deadline,
            _ => self.deadline.zip(call.deadline).map(|(one, two)| one.max(two)),
        };
        self.tried.extend(call.route.tried());
        self.callers += 1;
        self.texts.extend(texts.iter().map(|&text| text.to_owned()));
        self.tokens = self.tokens.saturating_add(tokens(texts));
        Seat { texts: first..self.texts.len(), tokens: before..self.tokens }
    }
}

impl Seat {
    /// Its part of what the lot took. All parts add up to the whole.
    fn part(&self, whole: i64, tokens: u64) -> i64 {
        let upto = |end: u64| i128::from(whole) * i128::from(end) / i128::from(tokens.max(1));
        i64::try_from(upto(self.tokens.end) - upto(self.tokens.start)).unwrap_or(i64::MAX)
    }

    /// Its part of the answer.
    fn answer(&self, Ended { result, texts, tokens, cost, .. }: &Ended) -> Result<Reply, CallError> {
        let reply = result.as_ref().map_err(CallError::copy)?;
        if reply.vectors.len() != *texts {
            let message = "the response is not one vector for each text";
            return Err(CallError::new(Class::Transient, "model_malformed", message));
        }
        let part = |whole: u64| {
            let whole = i64::try_from(whole).unwrap_or(i64::MAX);
            u64::try_from(self.part(whole, *tokens)).unwrap_or(0)
        };
        Ok(Reply {
            vectors: reply.vectors[self.texts.clone()].to_vec(),
            model: reply.model.clone(),
            usage: reply
                .usage
                .map(|usage| Usage::of(part(usage.prompt_tokens), part(usage.completion_tokens))),
            cost_nano_usd: cost.map(|cost| NanoUsd(self.part(cost.0, *tokens))),
            ..Reply::default()
        })
    }
}

/// A caller with a seat in a lot.
struct Waiting<'w> {
    listener: &'w dyn Listener,
    seat: &'w Seat,
    came: Instant,
    /// The lot's try, and since when it goes on; none before, and none after its end is told.
    heard: Option<(Sent, Instant)>,
}

impl Waiting<'_> {
    fn hear(&mut self, sent: Option<Sent>) {
        let Some(sent) = sent.filter(|_| self.heard.is_none()) else { return };
        let Self { listener, seat, came, .. } = *self;
        listener.started(sent.to());
        // Counted once: by the first of them.
        listener.happened(Happening::Joined((seat.texts.start == 0).then_some(sent.texts)));
        listener.happened(Happening::Waited(Wait::Batch, sent.closed.saturating_duration_since(came)));
        listener.happened(Happening::Waited(Wait::Room, sent.room));
        self.heard = Some((sent, Instant::now()));
    }

    /// Its part of what the try has cost so far.
    fn cost(&self) -> Option<NanoUsd> {
        let (sent, _) = self.heard.as_ref()?;
        let cost = (sent.cost.as_ref()?)()?;
        Some(NanoUsd(self.seat.part(cost.0, sent.tokens)))
    }
}

/// Its call is taken back, while the try of the others goes on.
impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(cost) = self.cost() {
            self.listener.cost(cost);
        }
    }
}

/// Hears the try of a lot, for all of its callers.
struct OfLot<'l> {
    lot: &'l Lot,
    texts: usize,
    tokens: u64,
    so_far: Mutex<Option<CostSoFar>>,
    closed: Instant,
    room: Mutex<Duration>,
    duration: Mutex<Duration>,
    cost: Mutex<Option<NanoUsd>>,
}

impl<'l> OfLot<'l> {
    fn new(lot: &'l Lot, texts: usize, tokens: u64) -> Self {
        let (so_far, room, duration, cost) = Default::default();
        Self { lot, texts, tokens, so_far, closed: Instant::now(), room, duration, cost }
    }
}

impl Listener for OfLot<'_> {
    fn started(&self, to: Upstream<'_>) {
        let sent = Sent {
            provider: to.provider,
            endpoint: to.endpoint.map(str::to_owned),
            model: to.model.to_owned(),
            texts: self.texts,
            tokens: self.tokens,
            cost: lock(&self.so_far).clone(),
            closed: self.closed,
            room: *lock(&self.room),
        };
        self.lot.sent.send_replace(Some(sent));
    }

    fn token(&self, _: &str) {}

    fn ended(&self, tried: &Tried<'_>) {
        *lock(&self.duration) = tried.duration;
    }

    fn cost(&self, cost: NanoUsd) {
        *lock(&self.cost) = Some(cost);
    }

    fn costs(&self, so_far: CostSoFar) {
        *lock(&self.so_far) = Some(so_far);
    }

    fn happened(&self, what: Happening) {
        if let Happening::Waited(Wait::Room, room) = what {
            *lock(&self.room) = room;
        }
    }
}

/// Hears a call that was alone in its lot, and is in its ledger already.
struct ByItself<'a> {
    of: &'a dyn Listener,
}

impl Listener for ByItself<'_> {
    passes_on!(of);
}

/// A model that is not there, or a key that is no good, is no text's fault.
fn may_be_one_text(error: &CallError) -> bool {
    error.class == Class::Rejected && matches!(error.http_status, Some(400 | 413 | 422))
}

fn too_late() -> CallError {
    CallError::new(Class::Transient, "model_timeout", "no answer in time")
}

fn tokens(texts: &[&str]) -> u64 {
    // Each at least one, or an empty text would have no part.
    let of = |text: &&str| {
        Call { task: Task::Embed(&[*text]), ..Call::default() }.prompt_tokens_estimated().max(1)
    };
    texts.iter().map(of).fold(0, u64::saturating_add)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
