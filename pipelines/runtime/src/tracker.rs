//! Which offset of a partition may be committed, while its records finish in any order.
//!
//! Invariant: what is committed never passes unfinished work and never goes back.
//!
//! Sans-IO: nothing here reads, writes or waits.

use std::collections::BTreeSet;

/// The progress of one partition during one assignment.
#[derive(Debug, Default)]
pub struct Tracker {
    unfinished: BTreeSet<i64>,
    /// The offset after the highest that was begun.
    next: i64,
    /// What was last handed out to be committed.
    stored: Option<i64>,
}

impl Tracker {
    /// Notes that a record was read. False where that offset is known already: a host reads some twice after a pause.
    pub fn begin(&mut self, offset: i64) -> bool {
        if offset < self.next {
            return false;
        }
        self.next = offset + 1;
        self.unfinished.insert(offset)
    }

    /// Notes that a record is finished: all that it became is acknowledged.
    pub fn finish(&mut self, offset: i64) {
        self.unfinished.remove(&offset);
    }

    /// Whether nothing is unfinished.
    pub fn is_idle(&self) -> bool {
        self.unfinished.is_empty()
    }

    /// How many offsets lie between the lowest unfinished record and the highest that was read.
    pub fn span(&self) -> i64 {
        self.unfinished.first().map_or(0, |first| self.next - first)
    }

    /// The next offset to commit, where it has moved since it was last asked for.
    pub fn take_progress(&mut self) -> Option<i64> {
        let reached = self.unfinished.first().copied().unwrap_or(self.next);
        // Before the first record there is no position of our own: committing would only repeat what stands there.
        if reached <= self.stored.unwrap_or(0) {
            return None;
        }
        self.stored = Some(reached);
        self.stored
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Offsets have gaps (transactions, compaction); records finish in any order, begun and finished interleaved.
        #[test]
        fn a_commit_never_passes_unfinished_work_and_never_goes_back(
            gaps in proptest::collection::vec(1i64..5, 1..200),
            order in proptest::collection::vec(any::<prop::sample::Index>(), 1..400),
        ) {
            let mut tracker = Tracker::default();
            let mut offset = 0;
            let mut waiting: Vec<i64> = gaps.iter().map(|gap| { offset += gap; offset }).collect();
            waiting.reverse();
            let last = offset;
            let mut open: Vec<i64> = Vec::new();
            let mut committed = 0;
            for choice in order {
                let begin = choice.index(3) != 0;
                if begin && let Some(next) = waiting.pop() {
                    prop_assert!(tracker.begin(next));
                    prop_assert!(!tracker.begin(next), "a record read twice is not begun twice");
                    open.push(next);
                } else if !open.is_empty() {
                    tracker.finish(open.remove(choice.index(open.len())));
                }
                if let Some(progress) = tracker.take_progress() {
                    prop_assert!(progress > committed);
                    prop_assert!(open.iter().all(|&unfinished| progress <= unfinished));
                    committed = progress;
                }
            }
            for offset in open.drain(..) { tracker.finish(offset); }
            while let Some(next) = waiting.pop() { tracker.begin(next); tracker.finish(next); }
            committed = tracker.take_progress().unwrap_or(committed);
            prop_assert_eq!(committed, last + 1);
            prop_assert!(tracker.is_idle());
        }
    }
}
