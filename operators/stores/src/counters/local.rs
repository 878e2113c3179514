//! The counters of one process, in memory: they begin at 0 with it.

use super::{AMOUNT_MAX, Counters, Hold, Line, check};
use crate::clock::{ttl_ms, unix_ms};
use crate::{Answer, Clock, Error};
use futures::FutureExt;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The most counters. More than these are tenants made up to fill the memory.
const COUNTERS_MAX: usize = 200_000;
/// Below so many nobody looks for what may be forgotten.
const SWEEP_MIN: usize = 1_024;

/// See the module.
pub struct Local {
    clock: Clock,
    counters: Mutex<Map>,
}

#[derive(Default)]
struct Map {
    counters: HashMap<String, Counter>,
    /// When there are so many, those that are no longer kept are thrown away.
    sweep_at: usize,
}

#[derive(Default)]
struct Counter {
    used: u64,
    /// Amount and end of each, in milliseconds since 1970.
    holds: HashMap<String, (u64, u64)>,
    kept_until_ms: u64,
}

impl Counter {
    fn counted(&mut self, now_ms: u64) -> u64 {
        self.holds.retain(|_, (_, until_ms)| *until_ms > now_ms);
        self.holds.values().fold(self.used, |sum, (amount, _)| sum.saturating_add(*amount))
    }
}

impl Local {
    /// Counters that run by this clock.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        Self { clock, counters: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Map> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        unix_ms((self.clock)())
    }

    fn take(&self, id: &str, lines: &[Line], time: Duration) -> Result<Hold, Error> {
        check(id, lines)?;
        let now_ms = self.now_ms();
        let mut map = self.lock();
        map.sweep(now_ms, lines.len())?;
        for (index, line) in lines.iter().enumerate() {
            let counted = map.current(&line.name, now_ms).counted(now_ms);
            if counted.saturating_add(line.amount) > line.limit.min(AMOUNT_MAX) {
                return Ok(Hold::Over { line: index, counted });
            }
        }
        for line in lines {
            let counter = map.current(&line.name, now_ms);
            counter.kept_until_ms = now_ms.saturating_add(ttl_ms(line.keep));
            counter.holds.insert(id.to_owned(), (line.amount, now_ms.saturating_add(ttl_ms(time))));
        }
        Ok(Hold::Taken)
    }

    fn give_back(&self, id: &str, lines: &[Line], used: &[u64]) -> Result<(), Error> {
        check(id, lines)?;
        let now_ms = self.now_ms();
        let mut map = self.lock();
        for (line, used) in lines.iter().zip(used) {
            let counter = map.current(&line.name, now_ms);
            counter.holds.remove(id);
            counter.used = counter.used.saturating_add(*used).min(AMOUNT_MAX);
            counter.kept_until_ms = now_ms.saturating_add(ttl_ms(line.keep));
        }
        Ok(())
    }
}

impl Map {
    /// The counter as it is now: one that is no longer kept begins at 0.
    fn current(&mut self, name: &str, now_ms: u64) -> &mut Counter {
        let counter = self.counters.entry(name.to_owned()).or_default();
        if counter.kept_until_ms <= now_ms {
            *counter = Counter::default();
        }
        counter
    }

    fn sweep(&mut self, now_ms: u64, more: usize) -> Result<(), Error> {
        if self.counters.len() < self.sweep_at.max(SWEEP_MIN) {
            return Ok(());
        }
        self.counters.retain(|_, counter| counter.kept_until_ms > now_ms);
        // Twice as many as are needed, so that sweeping costs each hold no more than itself.
        self.sweep_at = (self.counters.len() * 2).min(COUNTERS_MAX);
        crate::error::check_size("the number of counters", self.counters.len() + more, COUNTERS_MAX)
    }
}

impl Counters for Local {
    fn hold<'a>(&'a self, id: &'a str, lines: &'a [Line], time: Duration) -> Answer<'a, Hold> {
        async move { self.take(id, lines, time) }.boxed()
    }

    fn settle<'a>(&'a self, id: &'a str, lines: &'a [Line], used: &'a [u64]) -> Answer<'a, ()> {
        async move { self.give_back(id, lines, used) }.boxed()
    }
}
