//! Joins the texts of many callers into few calls: vectors cost a server little more for many texts than for one. Scores need no
//! such thing, as the documents of a query are one caller's and travel in one call.
//!
//! A lot is sent when it has its most texts or tokens, or soon after its first. Beneath lies any [`Model`], so the layers that
//! calls for answers go through serve these calls too. Where a server refuses a lot as somebody's fault, it is halved until
//! the one at fault is alone, and the others have their answer.
//!
//! A lot is a future that all its callers poll. So nothing is spawned, whoever leaves takes nobody's answer away, and when all
//! have left the call is dropped and its connection closed.
//!
//! Invariant: each text is answered by its own numbers, or its caller gets an error. Tenants never share a lot, so that each
//! pays for its own.

use crate::{Call, CallError, Class, Listener, Model, Task};
use forebay_schemas::{Lane, Tenant};
use futures::future::{BoxFuture, FutureExt as _, Shared, WeakShared, join_all};
use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// How often a lot that is refused may be halved: to find one text at fault among 1,024 takes ten.
const HALVED_MAX: u32 = 32;

/// How large a lot becomes, and how long it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// The most texts.
    pub texts: usize,
    /// The most tokens, as estimated. A text that has more goes alone.
    pub tokens: u64,
    /// How long its first text waits for others.
    pub wait: Duration,
}

impl Default for Size {
    fn default() -> Self {
        Self { texts: 64, tokens: 16_384, wait: Duration::from_millis(15) }
    }
}

/// For whom numbers are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asker {
    /// Whose texts they are.
    pub tenant: Tenant,
    /// In which of the two queues they waited.
    pub lane: Lane,
    /// When nobody waits any more.
    pub deadline: Option<Instant>,
}

/// Makes who hears a lot's tries. A lot has many callers, so it is not one of theirs.
pub type Listeners = Arc<dyn Fn() -> Box<dyn Listener> + Send + Sync>;

/// Vectors of texts.
pub struct Embeddings(Lots);

impl Embeddings {
    /// By this model, which takes [`Task::Embed`].
    pub fn new(model: Arc<dyn Model>, size: Size, listeners: Listeners) -> Self {
        Self(Lots { model, size, listeners, open: Mutex::default() })
    }

    /// The vector of each text.
    pub async fn embed(&self, texts: Vec<String>, asker: &Asker) -> Result<Vec<Vec<f32>>, CallError> {
        self.0.answer(texts, asker).await
    }
}

/// What the texts of a lot have in common.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Kind {
    tenant: String,
    is_backfill: bool,
}

/// One answer or error for each text of a lot.
type Answers = Arc<Vec<Result<Vec<f32>, Arc<CallError>>>>;
type Sending = BoxFuture<'static, Answers>;
/// Weak: a lot lives as long as somebody waits for it.
type Open = (Arc<Lot>, WeakShared<Sending>);

/// Lots that are open, and those under way.
struct Lots {
    model: Arc<dyn Model>,
    size: Size,
    listeners: Listeners,
    open: Mutex<HashMap<Kind, Open>>,
}

/// Texts on their way into one call.
struct Lot {
    opened: Instant,
    inside: Mutex<Inside>,
    full: Notify,
}

struct Inside {
    texts: Vec<String>,
    tokens: u64,
    /// The latest of its callers'; none where one has none.
    deadline: Option<Instant>,
    is_closed: bool,
}

impl Lots {
    async fn answer(&self, texts: Vec<String>, asker: &Asker) -> Result<Vec<Vec<f32>>, CallError> {
        let kind =
            Kind { tenant: asker.tenant.as_str().to_owned(), is_backfill: asker.lane == Lane::Backfill };
        let places = self.put(&kind, texts, asker);
        let sent = join_all(places.iter().map(|(lot, _)| lot.clone()));
        let sent = match asker.deadline {
            Some(deadline) => tokio::time::timeout_at(deadline, sent).await.map_err(|_| too_late())?,
            None => sent.await,
        };
        let mut vectors = Vec::new();
        for (answers, (_, place)) in sent.iter().zip(places) {
            for answer in &answers[place] {
                vectors.push(answer.clone().map_err(|error| error.copy())?);
            }
        }
        Ok(vectors)
    }

    /// Puts texts into lots, and says where they are, in their order.
    fn put(&self, kind: &Kind, texts: Vec<String>, asker: &Asker) -> Vec<(Shared<Sending>, Range<usize>)> {
        let mut open = lock(&self.open);
        open.retain(|_, (_, sending)| sending.upgrade().is_some());
        let mut places: Vec<(Shared<Sending>, Range<usize>)> = Vec::new();
        // The last lot of this caller is not joined by its own texts alone: it stays open for others.
        let mut current: Option<(Arc<Lot>, Shared<Sending>)> =
            open.get(kind).and_then(|(lot, sending)| Some((lot.clone(), sending.upgrade()?)));
        for text in texts {
            let joined = current
                .as_ref()
                .and_then(|(lot, sending)| Some((lot.take_in(&text, &self.size, asker)?, sending.clone())));
            let (place, sending) = joined.unwrap_or_else(|| {
                let (lot, sending) = self.begin(text, asker);
                current = Some((lot, sending.clone()));
                (0, sending)
            });
            match places.last_mut() {
                Some((last, range)) if last.ptr_eq(&sending) => range.end = place + 1,
                _ => places.push((sending, place..place + 1)),
            }
        }
        if let Some((lot, sending)) = current
            && let Some(sending) = sending.downgrade()
        {
            open.insert(kind.clone(), (lot, sending));
        }
        places
    }

    /// A lot with its first text.
    fn begin(&self, text: String, asker: &Asker) -> (Arc<Lot>, Shared<Sending>) {
        let tokens = tokens(&text);
        let is_closed = self.size.texts <= 1 || tokens >= self.size.tokens;
        let inside = Inside { texts: vec![text], tokens, deadline: asker.deadline, is_closed };
        let lot = Arc::new(Lot { opened: Instant::now(), inside: Mutex::new(inside), full: Notify::new() });
        if is_closed {
            lot.full.notify_one();
        }
        let (model, listener, wait) = (self.model.clone(), (self.listeners)(), self.size.wait);
        let (asker, of) = (asker.clone(), lot.clone());
        let sending = async move {
            let until = of.opened + wait;
            let _ = tokio::time::timeout_at(until, of.full.notified()).await;
            let (texts, deadline) = of.close();
            let asker = Asker { deadline, ..asker };
            Arc::new(send(&*model, &*listener, &texts, &asker).await)
        };
        (lot, sending.boxed().shared())
    }
}

impl Lot {
    /// The place of a text in it; `None` where it takes no more.
    fn take_in(&self, text: &str, size: &Size, asker: &Asker) -> Option<usize> {
        let mut inside = lock(&self.inside);
        let tokens = tokens(text);
        let is_too_much = inside.tokens.saturating_add(tokens) > size.tokens;
        if is_too_much && !inside.is_closed {
            inside.is_closed = true;
            self.full.notify_one();
        }
        if inside.is_closed {
            return None;
        }
        inside.texts.push(text.to_owned());
        inside.tokens = inside.tokens.saturating_add(tokens);
        inside.deadline = inside.deadline.zip(asker.deadline).map(|(one, two)| one.max(two));
        if inside.texts.len() >= size.texts {
            inside.is_closed = true;
            self.full.notify_one();
        }
        Some(inside.texts.len() - 1)
    }

    fn close(&self) -> (Vec<String>, Option<Instant>) {
        let mut inside = lock(&self.inside);
        inside.is_closed = true;
        (std::mem::take(&mut inside.texts), inside.deadline)
    }
}

/// Asks for all texts, in as few calls as their server lets.
async fn send(
    model: &dyn Model,
    listener: &dyn Listener,
    texts: &[String],
    asker: &Asker,
) -> Vec<Result<Vec<f32>, Arc<CallError>>> {
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let mut answers = Vec::with_capacity(texts.len());
    // A stack, the first part on top, so that answers come in the order of the texts.
    let mut parts: Vec<_> = std::iter::once(0..texts.len()).collect();
    let mut halved = 0;
    while let Some(part) = parts.pop() {
        let task = Task::Embed(&texts[part.clone()]);
        let Asker { tenant, lane, deadline } = asker.clone();
        let call = Call { task, tenant, lane, deadline, ..Call::default() };
        match model.complete(&call, listener).await {
            Ok(reply) if reply.vectors.len() == part.len() => {
                answers.extend(reply.vectors.into_iter().map(Ok))
            }
            Ok(_) => answers.extend(part.map(|_| Err(Arc::new(not_as_many())))),
            Err(error) if part.len() > 1 && halved < HALVED_MAX && may_be_one_text(&error) => {
                halved += 1;
                let middle = part.start + part.len() / 2;
                parts.push(middle..part.end);
                parts.push(part.start..middle);
            }
            Err(error) => {
                let error = Arc::new(error);
                answers.extend(part.map(|_| Err(error.clone())));
            }
        }
    }
    answers
}

/// A model that is not there, or a key that is no good, is no text's fault.
fn may_be_one_text(error: &CallError) -> bool {
    error.class == Class::Rejected && matches!(error.http_status, Some(400 | 413 | 422))
}

fn not_as_many() -> CallError {
    CallError::new(Class::Transient, "model_malformed", "the response is not one answer for each text")
}

fn too_late() -> CallError {
    CallError::new(Class::Transient, "model_timeout", "no answer in time")
}

fn tokens(text: &str) -> u64 {
    Call { task: Task::Embed(&[text]), ..Call::default() }.prompt_tokens_estimated()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
