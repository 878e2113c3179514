//! Two tries of one call: who is first, and what the other leaves.
//!
//! Invariant: one of them wins, at its first token or with its answer, and from then on nothing of the other is heard but
//! that it lost. The first is closed with the winner's answer before the second is closed.

use super::lock;
use crate::{CallError, Class, Happening, Limits, Listener, Reply, Tried, TryId, Upstream};
use forebay_schemas::NanoUsd;
use futures::future::BoxFuture;
use std::{sync::Mutex, time::Duration};
use tokio::{
    sync::{Notify, oneshot, watch},
    time::Instant,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    First,
    Second,
}

/// What both tries of a call share.
#[derive(Default)]
pub(super) struct Race {
    winner: watch::Sender<Option<Side>>,
    /// The first was sent.
    pub(super) sent: Notify,
    /// What the second answers, where there is one.
    another: Mutex<Option<oneshot::Receiver<Result<Reply, CallError>>>>,
    /// Whether the first is closed, with whatever answer.
    is_closed: watch::Sender<bool>,
    /// How long each took to its first token, or to its loss.
    pub(super) times: Mutex<Vec<Duration>>,
}

impl Race {
    pub(super) fn winner(&self) -> Option<Side> {
        *self.winner.borrow()
    }

    /// Whether this side has won, now or before.
    fn claim(&self, side: Side) -> bool {
        self.winner.send_if_modified(|winner| {
            let is_first = winner.is_none();
            winner.get_or_insert(side);
            is_first
        });
        self.winner() == Some(side)
    }

    async fn lost(&self, side: Side) {
        // The sender lives as long as this.
        let _ = self.winner.subscribe().wait_for(|winner| winner.is_some_and(|winner| winner != side)).await;
    }

    pub(super) fn expect_another(&self) -> oneshot::Sender<Result<Reply, CallError>> {
        let (sender, receiver) = oneshot::channel();
        *lock(&self.another) = Some(receiver);
        sender
    }
}

/// Hears one of two tries.
pub(super) struct Contender<'a> {
    side: Side,
    race: &'a Race,
    listener: &'a dyn Listener,
    sent: Mutex<Option<Instant>>,
    /// Where the second puts its answer.
    pub(super) answer: Mutex<Option<oneshot::Sender<Result<Reply, CallError>>>>,
}

impl<'a> Contender<'a> {
    pub(super) fn new(side: Side, race: &'a Race, listener: &'a dyn Listener) -> Self {
        Self { side, race, listener, sent: Mutex::default(), answer: Mutex::default() }
    }

    /// Times the try once.
    fn timed(&self) {
        if let Some(sent) = lock(&self.sent).take() {
            lock(&self.race.times).push(sent.elapsed());
        }
    }

    /// Goes on until the other has won.
    async fn contend(
        &self,
        to: Upstream<'_>,
        call: BoxFuture<'_, Result<Reply, CallError>>,
    ) -> Result<Reply, CallError> {
        let began = Instant::now();
        // In this order: who has lost must not end as if it had not.
        tokio::select! {
            biased;
            () = self.race.lost(self.side) => {
                self.timed();
                let error = CallError::new(Class::Lost, "hedge_lost", "another try of the call was faster");
                self.listener.ended(&Tried { to, duration: began.elapsed(), ttft: None, result: Err(&error) });
                Err(error)
            }
            result = call => {
                if result.is_ok() {
                    self.timed();
                    self.race.claim(self.side);
                }
                result
            }
        }
    }

    /// The first: what a ledger keeps under its call is the answer of whoever won.
    async fn first(
        &self,
        to: Upstream<'_>,
        call: BoxFuture<'_, Result<Reply, CallError>>,
    ) -> Result<Reply, CallError> {
        let result = self.contend(to, call).await;
        if result.is_ok() || self.race.winner() == Some(Side::First) {
            return result;
        }
        let another = lock(&self.race.another).take();
        match another {
            Some(another) => another.await.unwrap_or(result),
            None => result,
        }
    }

    async fn second(
        &self,
        to: Upstream<'_>,
        call: BoxFuture<'_, Result<Reply, CallError>>,
    ) -> Result<Reply, CallError> {
        let result = self.contend(to, call).await;
        let answer = lock(&self.answer).take();
        // What somebody read of an answer that was cut is the call's end too.
        let end = match &result {
            Ok(reply) => Some(Ok(reply.clone())),
            Err(error) => error.partial.is_some().then(|| Err(error.copy())),
        };
        if let (Some(end), Some(answer)) = (end, answer)
            && answer.send(end).is_ok()
        {
            let _ = self.race.is_closed.subscribe().wait_for(|is_closed| *is_closed).await;
        }
        result
    }
}

impl Listener for Contender<'_> {
    fn started(&self, to: Upstream<'_>) {
        *lock(&self.sent) = Some(Instant::now());
        if self.side == Side::First {
            self.race.sent.notify_one();
        }
        self.listener.started(to);
    }

    fn try_id(&self) -> Option<TryId> {
        self.listener.try_id()
    }

    fn token(&self, text: &str) {
        if self.race.claim(self.side) {
            self.timed();
            self.listener.token(text);
        }
    }

    fn ended(&self, tried: &Tried<'_>) {
        self.listener.ended(tried);
    }

    fn paid<'a>(
        &'a self,
        to: Upstream<'a>,
        call: BoxFuture<'a, Result<Reply, CallError>>,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        match self.side {
            Side::First => Box::pin(async move {
                let result = self.listener.paid(to, Box::pin(self.first(to, call))).await;
                self.race.is_closed.send_replace(true);
                result
            }),
            Side::Second => self.listener.paid(to, Box::pin(self.second(to, call))),
        }
    }

    fn cost(&self, cost: NanoUsd) {
        self.listener.cost(cost);
    }

    fn happened(&self, what: Happening) {
        self.listener.happened(what);
    }

    fn limits(&self, limits: &Limits) {
        self.listener.limits(limits);
    }
}
