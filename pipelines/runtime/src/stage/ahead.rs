//! Requests that end before the turn of their record, since their clients took them back.
//!
//! Invariant: a record whose request was ended ahead becomes nothing when its turn comes, whoever owns its partition then.

use super::{Stage, copy};
use crate::{
    ahead::{Ahead, Found},
    message::{Incoming, Outgoing, Partition},
};
use forebay_operator::Failure;
use forebay_plan::Channel;
use forebay_schemas::{Envelope, RequestId, Retry, Tenant};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use std::{
    collections::{HashMap, HashSet},
    fmt::Display,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::Mutex as AsyncMutex;
use tracing::warn;

/// How many endings are on their way at a time.
const AT_ONCE: usize = 64;

/// How many records of a partition may be known to have ended ahead of their turn; others wait for it.
const ENDED_MAX: usize = 100_000;

/// What looks ahead, and what it knows of the partitions that are ours.
pub(super) struct Outlook {
    ahead: Arc<dyn Ahead>,
    partitions: Mutex<HashMap<Partition, Arc<View>>>,
}

/// What is known of one partition.
#[derive(Default)]
struct View {
    /// Held while endings are written ahead or notes are looked for: all notes from this offset on are known; `None` before
    /// any were looked for.
    known_from: AsyncMutex<Option<i64>>,
    ended: Mutex<Ended>,
}

/// Which records of a partition have ended ahead of their turn.
#[derive(Default)]
struct Ended {
    offsets: HashSet<i64>,
    /// Up to here the turn of records has come: nobody ends them ahead of it any more.
    begun: Option<i64>,
}

impl Outlook {
    pub(super) fn new(ahead: Arc<dyn Ahead>) -> Self {
        Self { ahead, partitions: Mutex::default() }
    }

    fn of(&self, partition: &Partition) -> Arc<View> {
        let mut partitions = self.partitions.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(partitions.entry(partition.clone()).or_default())
    }

    /// Begins anew: whoever owns a partition in between may note more.
    pub(super) fn forget(&self, partition: &Partition) {
        self.partitions.lock().unwrap_or_else(PoisonError::into_inner).remove(partition);
    }

    /// Looks for the notes from an offset on, where they are not known.
    async fn know(
        &self,
        view: &View,
        known_from: &mut Option<i64>,
        partition: &Partition,
        from: i64,
    ) -> Result<(), String> {
        if known_from.is_some_and(|known| known <= from) {
            return Ok(());
        }
        let mut next = Some(from);
        while let Some(from) = next {
            let is_note = Arc::new(|headers: &_| Retry::ended(headers).is_some());
            let found = self.ahead.read(partition, from, is_note).await?;
            let notes = found.records.iter().filter_map(|note| Retry::ended(&note.headers));
            view.ended().offsets.extend(notes);
            next = found.next;
        }
        *known_from = Some(from);
        Ok(())
    }
}

impl View {
    fn ended(&self) -> MutexGuard<'_, Ended> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The turn of a record has come, once while the partition is ours; whether its request ended ahead of it.
    fn begin(&self, offset: i64) -> bool {
        let mut ended = self.ended();
        ended.begun = ended.begun.max(Some(offset));
        ended.offsets.remove(&offset)
    }
}

/// Whether what lies there was set aside, by hosts alone, and is read by one stage alone.
fn is_aside(channel: Channel) -> bool {
    matches!(channel, Channel::Retry | Channel::Overflow)
}

impl Stage {
    /// The same stage, ending what was set aside as soon as its client takes it back.
    pub fn with_ahead(self, ahead: Arc<dyn Ahead>) -> Self {
        let outlook = self.parts.step.is_job().then(|| Outlook::new(ahead));
        Self { outlook, ..self }
    }

    /// How many requests were taken back so far that this stage looks ahead for.
    pub fn taken_back(&self) -> u64 {
        self.outlook.as_ref().map_or(0, |_| self.cancels.heard())
    }

    /// Ends, by `end`, those records of a partition from an offset on whose requests were taken back and have not ended yet;
    /// or as many as is good at once, and gives the offset to go on from. `end` writes an ending and then its note.
    pub async fn look_ahead<E: Display, F: Future<Output = Result<(), E>>>(
        &self,
        at: &Partition,
        from: i64,
        end: impl Fn(Arc<Incoming>) -> F,
    ) -> Result<Option<i64>, String> {
        let Some(outlook) = &self.outlook else { return Ok(None) };
        let view = outlook.of(at);
        let mut known_from = view.known_from.lock().await;
        outlook.know(&view, &mut known_from, at, from).await?;
        let cancels = Arc::clone(&self.cancels);
        let is_taken_back = move |headers: &_| {
            Envelope::whose(headers).is_some_and(|(tenant, id)| cancels.contains(&tenant, &id))
        };
        let Found { mut records, next } = outlook.ahead.read(at, from, Arc::new(is_taken_back)).await?;
        {
            let ended = view.ended();
            let has_begun = |offset| ended.begun.is_some_and(|begun| offset <= begun);
            // A note comes to the partition of its record only by the same key.
            let may_end =
                |one: &Incoming| one.key.is_some() && matches!(Envelope::read(&one.headers), Ok(Some(_)));
            records
                .retain(|one| !has_begun(one.offset) && !ended.offsets.contains(&one.offset) && may_end(one));
            records.truncate(ENDED_MAX.saturating_sub(ended.offsets.len()));
        }
        let endings = records.into_iter().map(|incoming| {
            let (view, incoming) = (Arc::clone(&view), Arc::new(incoming));
            let written = end(Arc::clone(&incoming));
            async move {
                written.await?;
                view.ended().offsets.insert(incoming.offset);
                Ok(())
            }
        });
        let endings = stream::iter(endings).map(Ok).try_for_each_concurrent(AT_ONCE, |end| end);
        endings.await.map_err(|fault: E| fault.to_string())?;
        Ok(next)
    }

    /// The ending of a record whose request was taken back.
    pub fn end_ahead(&self, incoming: &Incoming) -> Vec<Outgoing> {
        let Ok(Some(mut envelope)) = Envelope::read(&incoming.headers) else { return Vec::new() };
        let waited_us = self.parts.clock.now_us() - incoming.timestamp_ms.saturating_mul(1000);
        envelope.timings.queue = envelope.timings.queue.saturating_add(waited_us.max(0));
        let (messages, outcome) = self.end(incoming, &envelope, &Failure::Cancelled, 0, None);
        let waited = Duration::from_micros(waited_us.max(0).unsigned_abs());
        self.parts.meter.finished(outcome, Duration::ZERO, waited);
        messages
    }

    /// The note that a record's request has ended.
    pub fn note_of(&self, incoming: &Incoming) -> Outgoing {
        let headers = Retry::note_ended(incoming.offset);
        Outgoing { value: None, ..copy(incoming, &incoming.partition.topic, headers) }
    }

    /// Whether a record's request ended before the record's turn came, which is now; or the message is a note of that, and no
    /// record. Where it cannot be told yet it is waited for: an ending could not be written either.
    pub(super) async fn has_ended(&self, incoming: &Incoming) -> bool {
        let Some(outlook) = self.outlook.as_ref().filter(|_| is_aside(incoming.channel)) else {
            return false;
        };
        if Retry::ended(&incoming.headers).is_some() {
            return true;
        }
        let view = outlook.of(&incoming.partition);
        let is_taken_back = |(tenant, id): (Tenant, RequestId)| self.cancels.contains(&tenant, &id);
        // What nobody took back was not ended, as far as anybody remembers.
        if Envelope::whose(&incoming.headers).is_some_and(is_taken_back) {
            let mut known_from = view.known_from.lock().await;
            let (at, from) = (&incoming.partition, incoming.offset);
            while let Err(fault) = outlook.know(&view, &mut known_from, at, from).await {
                warn!(stage = %self.parts.key, place = %incoming.place(), error = fault,
                    "could not read whether a request has ended already; will try again");
                tokio::time::sleep(self.parts.patience.outage).await;
            }
            // Whoever looks ahead waits until it has begun.
            return view.begin(incoming.offset);
        }
        view.begin(incoming.offset)
    }
}
