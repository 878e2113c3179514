//! How often a call was tried, where its caller does not say.
//!
//! Invariant: it remembers a bounded number of calls, the latest.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

/// How many calls of each of two generations are remembered.
const CALLS_MAX: usize = 200_000;

/// Counts tries.
#[derive(Debug, Default)]
pub struct Attempts(Mutex<Generations>);

#[derive(Debug, Default)]
struct Generations {
    young: HashMap<u64, u32>,
    old: HashMap<u64, u32>,
}

impl Attempts {
    /// The number of this try, from 0.
    pub fn next(&self, call: u64) -> u32 {
        let mut generations = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Generations { young, old } = &mut *generations;
        if young.len() >= CALLS_MAX && !young.contains_key(&call) {
            *old = std::mem::take(young);
        }
        let tries = young.entry(call).or_insert_with(|| old.get(&call).copied().unwrap_or(0));
        *tries = tries.saturating_add(1);
        *tries - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_are_counted_for_each_call_and_the_oldest_forgotten() {
        let attempts = Attempts::default();
        assert_eq!([attempts.next(1), attempts.next(1), attempts.next(2)], [0, 1, 0]);
        let many = u64::try_from(CALLS_MAX).unwrap();
        (10..10 + many).for_each(|call| _ = attempts.next(call));
        assert_eq!(attempts.next(1), 2, "one generation later it is still known");
        (10 + many..10 + 3 * many).for_each(|call| _ = attempts.next(call));
        assert_eq!(attempts.next(1), 0);
    }
}
