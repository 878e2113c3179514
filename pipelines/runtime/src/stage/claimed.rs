//! Bodies that a stage leaves at the object store and brings from there.
//!
//! Invariant: a message with a claim is written only when its object is there, and an operator never sees that a body was
//! away. Where the object store is unavailable, both wait, as for any outage: it costs a record none of its tries.

use super::{JOB_LIFE, Stage};
use crate::{
    claims::{ClaimError, ObjectsError},
    message::{Incoming, Outgoing},
};
use bytes::Bytes;
use forebay_operator::Failure;
use forebay_schemas::{Claim, HeaderError, header};
use std::{ops::Deref, time::Duration};
use tokio::time::Instant;
use tracing::warn;

/// A record with its body.
pub enum Whole<'i> {
    /// It came with it.
    Inline(&'i Incoming),
    /// It was brought.
    Fetched(Box<Incoming>),
}

impl Deref for Whole<'_> {
    type Target = Incoming;

    fn deref(&self) -> &Incoming {
        match self {
            Self::Inline(incoming) => incoming,
            Self::Fetched(incoming) => incoming,
        }
    }
}

impl Stage {
    /// The record with its body; or what it becomes where that is not to be had. That is nothing where its request has ended.
    pub async fn fetch<'i>(&self, incoming: &'i Incoming) -> Result<Whole<'i>, Vec<Outgoing>> {
        if self.has_ended(incoming).await {
            return Err(Vec::new());
        }
        let claim = match self.claim(incoming) {
            Ok(None) => return Ok(Whole::Inline(incoming)),
            Ok(Some(claim)) => claim,
            Err(fault) => return Err(self.undecodable(incoming, &fault)),
        };
        let started = Instant::now();
        let envelope = self.derived_envelope_of_job(incoming);
        let running = self.cancels.register(&envelope.tenant, &envelope.id);
        // Before the body is in memory, and until all that becomes of it is written.
        let held = incoming.held.more(Incoming::copied(claim.bytes)).await;
        let mut since_ms = None;
        let failure = loop {
            if let Some(stop) = self.stopped(&envelope) {
                break stop;
            }
            let fault = match self.claims.get(&claim).await {
                Ok(body) => {
                    self.parts.meter.claim_fetched(body.len());
                    return Ok(Whole::Fetched(Box::new(Incoming {
                        partition: incoming.partition.clone(),
                        channel: incoming.channel,
                        offset: incoming.offset,
                        timestamp_ms: incoming.timestamp_ms,
                        key: incoming.key.clone(),
                        value: Some(body),
                        headers: incoming.headers.clone(),
                        held,
                    })));
                }
                Err(fault) => fault,
            };
            let code = fault.code();
            let ClaimError::Objects { source: ObjectsError::Unavailable(_), .. } = &fault else {
                break Failure::rejected(code, super::chain(&fault));
            };
            since_ms.get_or_insert_with(|| self.now_ms());
            if started.elapsed() >= JOB_LIFE {
                break Failure::outage(code, "the object store", fault);
            }
            self.parts.meter.retried();
            warn!(stage = %self.parts.key, code, error = %super::chain(&fault), place = %incoming.place(),
                "could not fetch the body of a record; will try again");
            self.wait(self.parts.patience.outage, &envelope, running.signal()).await;
        };
        let (messages, outcome) = self.end(incoming, &envelope, &failure, 1, since_ms);
        self.parts.meter.finished(outcome, started.elapsed(), Duration::ZERO);
        Err(messages)
    }

    /// The messages as they are written: what is too large lies at the object store now. Waits for it, as for a log that
    /// is away.
    pub async fn check_in(&self, mut messages: Vec<Outgoing>) -> Vec<Outgoing> {
        for message in &mut messages {
            let bytes = message.value.as_ref().map_or(0, Vec::len);
            if self.claims.are_for(bytes) && self.claimed.contains(&message.topic) {
                self.leave(message).await;
            }
        }
        messages
    }

    /// Leaves the body of a message at the object store; where that will not have it, the topic is to judge.
    async fn leave(&self, message: &mut Outgoing) {
        let body = Bytes::from(message.value.take().unwrap_or_default());
        let tenant = message.headers.iter().find(|(name, _)| name == header::TENANT);
        let tenant = tenant.and_then(|(_, tenant)| tenant.clone()).unwrap_or_default();
        loop {
            match self.claims.put(&tenant, body.clone(), self.now_ms()).await {
                Ok(claim) => {
                    self.parts.meter.claim_put(claim.bytes);
                    message.headers.push(claim.header());
                    message.value = Some(Vec::new());
                    return;
                }
                Err(fault @ ObjectsError::Refused(_)) => {
                    warn!(stage = %self.parts.key, topic = %message.topic, error = %super::chain(&fault),
                        "could not leave a body at the object store; it travels in its message");
                    message.value = Some(body.into());
                    return;
                }
                Err(fault @ ObjectsError::Unavailable(_)) => {
                    warn!(stage = %self.parts.key, topic = %message.topic, error = %super::chain(&fault),
                        "could not leave a body at the object store; will try again");
                    tokio::time::sleep(self.parts.patience.outage).await;
                }
            }
        }
    }

    /// The claim that a record came with; from a client it would be the client's.
    pub(super) fn claim(&self, incoming: &Incoming) -> Result<Option<Claim>, HeaderError> {
        if self.enters(incoming) { Ok(None) } else { Claim::read(&incoming.headers) }
    }
}
