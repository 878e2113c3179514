//! Looks ahead, beside the loop, for requests that were taken back while their records wait where nobody reads.
//!
//! Invariant: after a cancel that is heard, each partition of ours where something was set aside is looked through once
//! more; so an old cancel is looked for once in an assignment. At most one look goes on at a time, and looking takes at
//! most a tenth of the time.

use super::{Loop, Ours, Source, write};
use crate::{
    drive::Sink,
    message::{Incoming, Partition},
    stage::Stage,
};
use std::{sync::Arc, time::Duration};
use tokio::{task::JoinSet, time::Instant};
use tracing::warn;

/// How long after a cancel is looked ahead at the earliest: cancels that come together are looked for together, and
/// whoever was about to set a record aside has heard of them too.
const LOOK_AFTER: Duration = Duration::from_secs(1);

/// How many times as long as a look took nobody looks.
const REST: u32 = 9;

/// Looks that go on, and the next.
#[derive(Default)]
pub(super) struct Looks {
    /// At most one.
    tasks: JoinSet<Looked>,
    /// When the next one begins, and how many requests had been taken back when that was decided.
    next: Option<(Instant, u64)>,
    rest_until: Option<Instant>,
}

/// A look that is over.
struct Looked {
    took: Duration,
    /// Partitions that could not be looked through.
    again: Vec<Partition>,
}

impl<S: Source> Loop<S> {
    /// Looks ahead where that is due.
    pub(super) fn look_ahead(&mut self) {
        let now = Instant::now();
        while let Some(looked) = self.looks.tasks.try_join_next() {
            // A look that panicked is not repeated: what it was for waits for its turn.
            let Ok(Looked { took, again }) = looked else { continue };
            self.looks.rest_until = Some(now + took * REST);
            for partition in again {
                if let Some(owned) = self.owned.get_mut(&partition) {
                    owned.looked = 0;
                }
            }
        }
        let taken_back = self.stage.taken_back();
        match self.looks.next {
            None if self.owned.values().any(|owned| owned.is_to_be_looked_through(taken_back)) => {
                let earliest = self.looks.rest_until.map_or(now, |rest| rest.max(now));
                self.looks.next = Some((earliest + LOOK_AFTER, taken_back));
            }
            Some((at, taken_back)) if now >= at && self.looks.tasks.is_empty() => {
                self.looks.next = None;
                self.look(taken_back);
            }
            _ => {}
        }
    }

    fn look(&mut self, taken_back: u64) {
        let mut places = Vec::new();
        for (partition, owned) in &mut self.owned {
            let Some(from) = owned.waits_from.filter(|_| owned.is_to_be_looked_through(taken_back)) else {
                continue;
            };
            owned.looked = taken_back;
            let ours = Ours { fence: self.source.fence(partition), gone: owned.gone.clone() };
            places.push((partition.clone(), from, ours));
        }
        let (stage, sink) = (Arc::clone(&self.stage), Arc::clone(&self.sink));
        self.looks.tasks.spawn(async move {
            let (started, mut again) = (Instant::now(), Vec::new());
            for (at, from, ours) in places {
                if let Err(fault) = look_through(&stage, &*sink, &at, from, &ours).await {
                    warn!(stage = %stage.key(), partition = %at, error = fault,
                        "could not look for requests that were taken back; will try again");
                    again.push(at);
                }
            }
            Looked { took: started.elapsed(), again }
        });
    }
}

/// Ends all requests that were taken back and wait in a partition, from an offset on, while the partition is ours.
async fn look_through(
    stage: &Arc<Stage>,
    sink: &dyn Sink,
    at: &Partition,
    from: i64,
    ours: &Ours,
) -> Result<(), String> {
    let end = async |incoming: Arc<Incoming>| {
        let messages = stage.end_ahead(&incoming);
        write(stage, sink, &incoming, messages, ours).await?;
        write(stage, sink, &incoming, vec![stage.note_of(&incoming)], ours).await
    };
    let mut next = Some(from);
    while let Some(from) = next {
        next = tokio::select! {
            looked = stage.look_ahead(at, from, &end) => match looked {
                // Whoever has the partition now looks through it too.
                Err(_) if ours.gone.is_cancelled() => return Ok(()),
                looked => looked?,
            },
            () = ours.gone.cancelled() => return Ok(()),
        };
    }
    Ok(())
}
