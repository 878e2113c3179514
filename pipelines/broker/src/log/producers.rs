//! What a partition remembers of its idempotent producers, so that a retry is stored once.
//!
//! Invariant: it is a function of the batches in the log, so reading them again at open gives it back.
//!
//! Limits: the last five batches of a producer (the most an idempotent client has in flight), the
//! [`PRODUCERS_MAX`] most recent producers.

use super::batch::{Header, advance};
use std::collections::{HashMap, VecDeque};

/// A client needs one id per life; beyond this the one that wrote longest ago is forgotten.
const PRODUCERS_MAX: usize = 4096;
const BATCHES_MAX: usize = 5;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Batch {
    first: i32,
    last: i32,
    base: i64,
    append_ms: i64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Producer {
    epoch: i16,
    batches: VecDeque<Batch>,
}

/// See the module's documentation.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Producers(HashMap<i64, Producer>);

/// What to do with a batch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Append,
    /// Stored before, at this offset and broker time.
    Stored {
        base: i64,
        append_ms: i64,
    },
    /// Stored before, so long ago that the offset is forgotten.
    StoredLongAgo,
    OutOfOrder,
    StaleEpoch,
}

impl Producers {
    /// Judges a batch that a client wants stored.
    pub(crate) fn judge(&self, header: &Header) -> Verdict {
        // A producer not known here (new, or its batches fell to retention) may begin anywhere.
        let Some(known) = self.0.get(&header.producer) else { return Verdict::Append };
        if header.epoch < known.epoch {
            return Verdict::StaleEpoch;
        }
        if header.epoch > known.epoch {
            return if header.sequence == 0 { Verdict::Append } else { Verdict::OutOfOrder };
        }
        let (first, last) = (header.sequence, header.last_sequence());
        if let Some(same) = known.batches.iter().find(|b| b.first == first && b.last == last) {
            return Verdict::Stored { base: same.base, append_ms: same.append_ms };
        }
        match (known.batches.front(), known.batches.back()) {
            (_, Some(latest)) if first == advance(latest.last, 1) => Verdict::Append,
            (Some(oldest), _) if last < oldest.first => Verdict::StoredLongAgo,
            (None, _) => Verdict::Append,
            _ => Verdict::OutOfOrder,
        }
    }

    /// Remembers a batch that was stored.
    pub(crate) fn note(&mut self, header: &Header) {
        if header.producer < 0 {
            return;
        }
        if self.0.len() >= PRODUCERS_MAX && !self.0.contains_key(&header.producer) {
            let idle = self.0.iter().min_by_key(|(_, p)| p.batches.back().map(|b| b.base)).map(|(id, _)| *id);
            if let Some(idle) = idle {
                self.0.remove(&idle);
            }
        }
        let known = self.0.entry(header.producer).or_default();
        if known.epoch != header.epoch {
            *known = Producer { epoch: header.epoch, batches: VecDeque::new() };
        }
        if known.batches.len() == BATCHES_MAX {
            known.batches.pop_front();
        }
        known.batches.push_back(Batch {
            first: header.sequence,
            last: header.last_sequence(),
            base: header.base,
            append_ms: if header.log_append_time() { header.max_timestamp } else { -1 },
        });
    }

    /// Base offsets of the batches that compaction must keep, if hollow, for this memory to survive.
    pub(crate) fn latest_bases(&self) -> Vec<i64> {
        self.0.values().filter_map(|p| p.batches.back().map(|b| b.base)).collect()
    }

    /// The highest producer id seen; ids handed out later must lie above it.
    pub(crate) fn highest(&self) -> i64 {
        self.0.keys().copied().max().unwrap_or(-1)
    }
}
