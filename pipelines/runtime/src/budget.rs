//! One bound on memory for a whole process: the bytes of all records that are read and not yet finished.
//!
//! Invariant: bytes are given back when the record is dropped, however that happens.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What is brought is counted in units of so many bytes.
const UNIT: usize = 1024;

/// Bytes that all stages of a process may hold together.
#[derive(Debug)]
pub struct Budget {
    used: AtomicUsize,
    bytes_max: usize,
    /// Units that may be brought at a time, and those that may be brought now.
    units_max: u32,
    units: Arc<Semaphore>,
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(bytes_max: usize) -> Arc<Self> {
        let units = (bytes_max / 2 / UNIT).clamp(1, Semaphore::MAX_PERMITS);
        let units_max = u32::try_from(units).unwrap_or(u32::MAX);
        Arc::new(Self {
            used: AtomicUsize::new(0),
            bytes_max,
            units_max,
            units: Arc::new(Semaphore::new(units)),
        })
    }

    /// Takes bytes, also beyond the bound: what has been read is held. Readers ask [`is_spent`](Self::is_spent) first.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Held {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        Held { budget: Arc::clone(self), bytes, units_held: None }
    }

    /// Whether nobody should read on.
    pub fn is_spent(&self) -> bool {
        self.used.load(Ordering::Relaxed) >= self.bytes_max
    }

    /// Whether it is so far spent that not even the few may be read which come to whoever only listens.
    pub fn is_overdrawn(&self) -> bool {
        self.used.load(Ordering::Relaxed) >= self.bytes_max.saturating_add(self.bytes_max / 8)
    }

    /// Whether there is room enough to read on after a pause. Half, so that readers do not start and stop at each record.
    pub fn is_roomy(&self) -> bool {
        self.used.load(Ordering::Relaxed) <= self.bytes_max / 2
    }

    /// Bytes that are held now.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

/// Bytes of a budget; dropping gives them back.
#[derive(Debug)]
pub struct Held {
    budget: Arc<Budget>,
    bytes: usize,
    units_held: Option<OwnedSemaphorePermit>,
}

impl Held {
    /// How many.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes bytes of the same budget for what a record that was read has elsewhere. Waits while half of the budget is
    /// taken so, and for nothing else: whoever holds such bytes never waits for more, so all get their turn.
    pub async fn more(&self, bytes: usize) -> Self {
        let units = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).min(self.budget.units_max);
        // Nobody closes it.
        let units = Arc::clone(&self.budget.units).acquire_many_owned(units).await.ok();
        let mut held = self.budget.take(bytes);
        held.units_held = units;
        held
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    #[test]
    fn what_is_brought_waits_for_what_was_brought_before_and_for_nothing_else() {
        let budget = Budget::new(8 * UNIT);
        let read = budget.take(100 * UNIT);
        let first = read.more(3 * UNIT).now_or_never().expect("there is room");
        assert!(read.more(2 * UNIT).now_or_never().is_none(), "5 of 4");
        assert_eq!((first.bytes(), budget.used()), (3 * UNIT, 103 * UNIT));
        drop(first);
        let whole = read.more(100 * UNIT).now_or_never().expect("what is larger than all comes alone");
        assert!(read.more(1).now_or_never().is_none());
        drop((whole, read));
        assert_eq!(budget.used(), 0);
    }
}
