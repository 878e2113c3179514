//! Several endpoints of one model, used as one.
//!
//! A call waits, first come first served, until an endpoint has room for it, goes to the best one (`board.rs`), and what
//! becomes of it is told to that endpoint's breaker and throttle. How endpoints fare is looked at each second
//! ([`Pool::keep`]). One that starts cold gets calls once its health is good and a call of one token was answered; until
//! then calls wait, and whoever wakes it is told once. Slices of what several processes may send together are taken meanwhile,
//! so no call waits for them while there is enough.
//!
//! Invariant: a place that was taken is given back when the try ends, is given up, or was never made, and whoever waits
//! first is told. No call waits beyond its deadline, or beyond a minute.

mod board;
mod prefix;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
mod watch;

use crate::{
    Call, CallError, Class, CostSoFar, Happening, Limits, Listener, Model, Reply, Tried, TryId, Upstream,
    Wait,
    retry::Jitter,
    shared::{Shared, Slice, TELL_EVERY, Unreachable},
    throttle::Caps,
};
use board::{Ask, Board, Refusal, Ticket};
pub use board::{Ended, Left, ModelStatus, Status};
use forebay_schemas::{Content, Message, NanoUsd, Role, Sampling};
use futures::future::{BoxFuture, join_all};
use std::{
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};
use tracing::{info, warn};
pub use watch::{Http, Load, Watch};

/// The longest wait for room.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// How long a call waits for an endpoint that it was not at, while one is free that it was.
const ELSEWHERE_MAX: Duration = Duration::from_secs(1);
/// Finding an endpoint takes less, and that is work; from here on it is a wait.
const WAIT_MIN: Duration = Duration::from_millis(1);
/// How often an endpoint is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often one is looked at that did not say how it fares when it was asked so many times.
const LOOK_SELDOM: Duration = Duration::from_secs(60);
const UNREAD_MAX: u32 = 10;
/// Hedges are not made above this part of the places taken, and not so soon after a rate limit.
const HEDGE_SATURATION_MAX: f64 = 0.7;
const HEDGE_AFTER_LIMIT: Duration = Duration::from_secs(10);
/// The longest that a call of one token may take.
const READY_MAX: Duration = Duration::from_secs(60);
/// How long whoever keeps what processes share may take to answer; a call may wait for it.
const TAKE_MAX: Duration = Duration::from_millis(250);

/// One endpoint.
pub struct Endpoint {
    /// What it is called; no other at its origin is called so.
    pub name: String,
    /// Scheme, host and port.
    pub origin: String,
    /// Makes one try there.
    pub model: Arc<dyn Model>,
    /// The most that may be sent there.
    pub caps: Caps,
    /// Looks at it; absent where it has nothing to look at.
    pub watch: Option<Arc<dyn Watch>>,
    /// Whether it gets calls only after it was seen to answer one.
    pub starts_cold: bool,
    /// Keeps its limits for all processes that send there; absent where this is the only one. Asked by [`Pool::keep`].
    pub shared: Option<Arc<dyn Shared>>,
}

/// Wakes a pool that was scaled to nothing.
pub trait Wake: Send + Sync + 'static {
    /// A call waits and nobody is there to answer it. Told once until somebody is.
    fn wake(&self) -> BoxFuture<'_, ()>;
}

/// See the module.
pub struct Pool {
    endpoints: Vec<Endpoint>,
    name: String,
    provider: &'static str,
    board: Mutex<Board>,
    /// Whoever holds it is the first in the queue. A fair mutex is a queue.
    door: tokio::sync::Mutex<()>,
    /// Told when there may be room: the first in the queue, and those beside it.
    changed: Notify,
    /// Told when something is to be asked of whoever keeps what processes share.
    wanted: Notify,
    wake: Option<Arc<dyn Wake>>,
    is_woken: AtomicBool,
}

impl Pool {
    /// A pool of these endpoints, all of which serve the model `name`.
    pub fn new(name: impl Into<String>, endpoints: Vec<Endpoint>, jitter: Jitter) -> Self {
        let mut board = Board::new(jitter);
        for Endpoint { name, origin, caps, starts_cold, shared, .. } in &endpoints {
            board.add([name, origin], *caps, !starts_cold, shared.is_some());
        }
        Self {
            provider: endpoints.first().map_or("pool", |endpoint| endpoint.model.provider()),
            endpoints,
            name: name.into(),
            board: Mutex::new(board),
            door: tokio::sync::Mutex::default(),
            changed: Notify::new(),
            wanted: Notify::new(),
            wake: None,
            is_woken: AtomicBool::new(false),
        }
    }

    /// The same with somebody to wake it.
    pub fn woken_by(self, wake: Arc<dyn Wake>) -> Self {
        Self { wake: Some(wake), ..self }
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How each endpoint stands.
    pub fn status(&self) -> Vec<Status> {
        self.board().status(Instant::now())
    }

    /// Looks at the endpoints, and keeps up with other processes, for as long as it is polled or until nothing is left to do.
    pub async fn keep(&self) {
        let looks = join_all((0..self.endpoints.len()).map(|index| self.look_at(index)));
        tokio::join!(looks, self.share());
    }

    /// Takes slices of what several processes may send, as calls want them, and tells the others what they should know.
    async fn share(&self) {
        if self.endpoints.iter().all(|endpoint| endpoint.shared.is_none()) {
            return;
        }
        let mut is_away = false;
        loop {
            let asked_at = Instant::now();
            let asks = self.board().asks(&self.name, asked_at);
            let taken = asks.iter().map(|(index, model, ask)| async move {
                let shared = self.endpoints[*index].shared.as_ref()?;
                let late = |late| Err(Unreachable(Box::new(late)));
                Some(tokio::time::timeout(TAKE_MAX, shared.take(model, ask)).await.unwrap_or_else(late))
            });
            let taken: Vec<Result<Slice, Unreachable>> =
                join_all(taken).await.into_iter().flatten().collect();
            for (ask, taken) in asks.iter().zip(&taken) {
                self.board().answered(ask, taken.as_ref().ok(), asked_at, Instant::now());
            }
            match taken.iter().find_map(|taken| taken.as_ref().err()) {
                Some(error) if !is_away => {
                    is_away = true;
                    warn!(
                        error = %error, cause = %error.0,
                        "limits are not shared any more; until they are, this process sends its part of them"
                    );
                }
                None if is_away && !taken.is_empty() => {
                    is_away = false;
                    info!("limits are shared again");
                }
                _ => {}
            }
            if !taken.is_empty() {
                self.changed.notify_waiters();
            }
            // Asked or not, there may be something to tell by then.
            let _ = tokio::time::timeout(TELL_EVERY, self.wanted.notified()).await;
        }
    }

    /// Chooses on the board, and sees to it that what is wanted for it is asked for.
    fn choose(&self, ask: &Ask<'_>, now: Instant) -> Result<Ticket, Refusal> {
        let mut board = self.board();
        let chosen = board.choose(ask, now);
        if board.wants(now) {
            self.wanted.notify_one();
        }
        chosen
    }

    async fn look_at(&self, index: usize) {
        let Endpoint { watch, model, starts_cold, .. } = &self.endpoints[index];
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut is_ready = !starts_cold;
        // How often it could not be read, while it never could.
        let mut unread = Some(0);
        loop {
            ticks.tick().await;
            if !is_ready {
                let is_healthy = match watch {
                    Some(watch) => watch.is_healthy().await,
                    None => true,
                };
                if is_healthy && answers(&**model).await {
                    is_ready = true;
                    self.board().ready(index, &self.name, Instant::now());
                    self.is_woken.store(false, Ordering::Release);
                    self.changed.notify_waiters();
                }
            }
            match watch {
                Some(watch) => match watch.load().await {
                    Ok(load) => {
                        unread = None;
                        self.board().scraped(index, load, Instant::now());
                    }
                    // What was read once grows stale, and counts as full then.
                    Err(_) => unread = unread.map(|unread| unread + 1),
                },
                None if is_ready => return,
                None => {}
            }
            // Who never said how it fares will hardly begin to; a cloud service must not be asked for nothing each second.
            if is_ready && unread.is_some_and(|unread| unread >= UNREAD_MAX) {
                ticks.reset_after(LOOK_SELDOM);
            }
        }
    }

    /// Whether a hedge of this call may do more good than harm.
    pub(crate) fn may_hedge(&self, call: &Call<'_>) -> bool {
        // Whoever waits takes the place that is free for a moment between two calls.
        if self.door.try_lock().is_err() {
            return false;
        }
        let (now, model) = (Instant::now(), call.model.as_deref().unwrap_or(&self.name));
        let mut board = self.board();
        let was_limited =
            board.limited_at().is_some_and(|limited| now.duration_since(limited) < HEDGE_AFTER_LIMIT);
        let tried = call.route.tried();
        let ask = Ask { model, blocks: &[], tokens: call.tokens_estimated(), tried: &tried, is_hedge: true };
        !was_limited && board.saturation(model, now) <= HEDGE_SATURATION_MAX && board.has_another(&ask, now)
    }

    /// Waits for the right to send.
    async fn admit(&self, call: &Call<'_>) -> Result<Ticket, CallError> {
        let model = call.model.as_deref().unwrap_or(&self.name);
        let blocks = if self.endpoints.len() > 1 { prefix::blocks(model, call) } else { Vec::new() };
        let (tried, is_hedge) = (call.route.tried(), call.route.is_hedge());
        let ask = Ask { model, blocks: &blocks, tokens: call.tokens_estimated(), tried: &tried, is_hedge };
        if is_hedge {
            return self.choose(&ask, Instant::now()).map_err(|_| saturated("now"));
        }
        let began = Instant::now();
        let last = call.deadline.map_or(began + WAIT_MAX, |deadline| deadline.min(began + WAIT_MAX));
        let admitted = async {
            // Who was there already waits beside the queue: it may want what is not free, while what is would do for others.
            let _first = if tried.is_empty() { Some(self.door.lock().await) } else { None };
            loop {
                let mut changed = pin!(self.changed.notified());
                changed.as_mut().enable();
                let now = Instant::now();
                let is_picky = !tried.is_empty() && now < began + ELSEWHERE_MAX;
                let ask = Ask { tried: if is_picky { &tried } else { &[] }, ..ask };
                let refusal = match self.choose(&ask, now) {
                    Ok(ticket) => return Ok(ticket),
                    Err(refusal) => refusal,
                };
                let until = match refusal {
                    Refusal::Down(until) => return Err(down(until)),
                    Refusal::Cold => {
                        self.wake_once().await;
                        last
                    }
                    Refusal::Busy(until) => until.unwrap_or(last),
                };
                let until = if is_picky { until.min(began + ELSEWHERE_MAX) } else { until };
                // Woken or not, the board says what is possible.
                let _ = tokio::time::timeout_at(until, changed).await;
            }
        };
        tokio::time::timeout_at(last, admitted).await.unwrap_or_else(|_| Err(saturated("in time")))
    }

    async fn wake_once(&self) {
        if let Some(wake) = &self.wake
            && !self.is_woken.swap(true, Ordering::AcqRel)
        {
            wake.wake().await;
        }
    }
}

/// No endpoint is up.
fn down(until: Option<Instant>) -> CallError {
    let retry_after = until.map(|until| until.duration_since(Instant::now()));
    CallError {
        retry_after,
        ..CallError::new(Class::Closed, "model_unavailable", "no endpoint of the pool is up")
    }
}

fn saturated(when: &str) -> CallError {
    CallError::new(Class::Closed, "model_saturated", format!("no endpoint of the pool had room {when}"))
}

/// Whether a model answers a call of one token. No record asks for it, so it leaves no row.
async fn answers(model: &dyn Model) -> bool {
    let content = Some(Content::Text("Say yes.".to_owned()));
    let call = Call {
        task: model.probe(),
        question: "Say yes.".to_owned(),
        messages: vec![Message { role: Role::User, content, rest: Default::default() }],
        sampling: Sampling { max_tokens: Some(1), ..Sampling::default() },
        deadline: Some(Instant::now() + READY_MAX),
        ..Call::default()
    };
    match model.complete(&call, &Unheard).await {
        Ok(_) => true,
        // One token may well be a space.
        Err(error) => error.code == "model_empty",
    }
}

struct Unheard;

impl Listener for Unheard {
    fn started(&self, _: Upstream<'_>) {}
    fn token(&self, _: &str) {}
    fn ended(&self, _: &Tried<'_>) {}
}

impl Model for Pool {
    fn provider(&self) -> &'static str {
        self.provider
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn reads_messages(&self) -> bool {
        self.endpoints.iter().any(|endpoint| endpoint.model.reads_messages())
    }

    fn has_another_way(&self, call: &Call<'_>) -> bool {
        let tried = call.route.tried();
        let (model, tokens) = (call.model.as_deref().unwrap_or(&self.name), call.tokens_estimated());
        let ask = Ask { model, blocks: &[], tokens, tried: &tried, is_hedge: false };
        let last = tried.last().and_then(|&index| self.endpoints.get(index));
        last.is_some_and(|endpoint| endpoint.model.has_another_way(call))
            || self.board().has_another(&ask, Instant::now())
    }

    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(async move {
            let began = Instant::now();
            let admitted = self.admit(call).await;
            let waited = Some(began.elapsed()).filter(|&waited| waited >= WAIT_MIN).unwrap_or_default();
            listener.happened(Happening::Waited(Wait::Room, waited));
            let ticket = admitted?;
            let (endpoint, model) = (ticket.endpoint, ticket.model.clone());
            call.route.goes_to(endpoint);
            let place = Mutex::new(Some(Place { pool: self, ticket: Some(ticket), was_sent: false }));
            let watched = Watched { pool: self, endpoint, model, place, listener };
            self.endpoints[endpoint].model.complete(call, &watched).await
        })
    }
}

/// A place at an endpoint, which is given back when this is dropped.
struct Place<'a> {
    pool: &'a Pool,
    ticket: Option<Ticket>,
    was_sent: bool,
}

impl Place<'_> {
    fn ended(mut self, result: Result<&Reply, &CallError>) {
        if let Some(ticket) = self.ticket.take() {
            let model = &self.pool.endpoints[ticket.endpoint].model;
            let has_key = model.has_another_way(&Call::default());
            let (now, mut board) = (Instant::now(), self.pool.board());
            board.ended(ticket, result, has_key, now);
            if board.wants(now) {
                self.pool.wanted.notify_one();
            }
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.pool.board().given_up(ticket, self.was_sent, Instant::now());
        }
        self.pool.changed.notify_waiters();
    }
}

/// Hears a try at one endpoint, for the board.
struct Watched<'a> {
    pool: &'a Pool,
    endpoint: usize,
    model: String,
    /// Moves into the try, so that it is given back with it and not with the call, which a ledger may keep open longer.
    place: Mutex<Option<Place<'a>>>,
    listener: &'a dyn Listener,
}

impl Listener for Watched<'_> {
    fn started(&self, to: Upstream<'_>) {
        self.listener.started(to);
    }

    fn try_id(&self) -> Option<TryId> {
        self.listener.try_id()
    }

    fn token(&self, text: &str) {
        self.listener.token(text);
    }

    fn ended(&self, tried: &Tried<'_>) {
        self.listener.ended(tried);
    }

    fn paid<'a>(
        &'a self,
        to: Upstream<'a>,
        call: BoxFuture<'a, Result<Reply, CallError>>,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        let place = self.place.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.listener.paid(
            to,
            Box::pin(async move {
                let mut place = place;
                if let Some(place) = &mut place {
                    place.was_sent = true;
                }
                let result = call.await;
                if let Some(place) = place {
                    place.ended(result.as_ref());
                }
                result
            }),
        )
    }

    fn cost(&self, cost: NanoUsd) {
        self.listener.cost(cost);
    }

    fn costs(&self, so_far: CostSoFar) {
        self.listener.costs(so_far);
    }

    fn happened(&self, what: Happening) {
        self.listener.happened(what);
    }

    fn limits(&self, limits: &Limits) {
        let (now, mut board) = (Instant::now(), self.pool.board());
        board.heard(self.endpoint, &self.model, limits, now);
        if board.wants(now) {
            self.pool.wanted.notify_one();
        }
        drop(board);
        self.listener.limits(limits);
    }

    fn beside(&self) -> Option<Box<dyn Listener + '_>> {
        self.listener.beside()
    }
}
