//! One bound on memory for a whole process: the bytes of all records that are read and not yet finished.
//!
//! Invariant: bytes are given back when the record is dropped, however that happens.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// Bytes that all stages of a process may hold together.
#[derive(Debug)]
pub struct Budget {
    used: AtomicUsize,
    bytes_max: usize,
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(bytes_max: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), bytes_max })
    }

    /// Takes bytes, also beyond the bound: what has been read is held. Readers ask [`is_spent`](Self::is_spent) first.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Held {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        Held { budget: Arc::clone(self), bytes }
    }

    /// Whether nobody should read on.
    pub fn is_spent(&self) -> bool {
        self.used.load(Ordering::Relaxed) >= self.bytes_max
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
}

impl Held {
    /// How many.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
