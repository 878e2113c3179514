//! The counters of one process, in memory: they begin at 0 with it.

use super::{AMOUNT_MAX, Counted, Counters, GROUP_MAX, Hold, LIST_MAX, Line, OVERTAKEN, PAGE_MAX, check};
use crate::clock::{ttl_ms, unix_ms};
use crate::{Answer, Clock, Error};
use futures::FutureExt;
use std::collections::{BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The most counters of no group, and as many of all groups. More than these are made up to fill the memory.
const COUNTERS_MAX: usize = 200_000;
/// Below so many nobody looks for what may be forgotten.
const SWEEP_MIN: usize = 1_024;
/// Who is refused a counter looks at most so often whether others may be forgotten, as all are looked at.
const SWEEP_EVERY_MS: u64 = 1_000;

/// See the module.
pub struct Local {
    clock: Clock,
    counters: Mutex<Map>,
}

#[derive(Default)]
struct Map {
    counters: HashMap<String, Counter>,
    /// How many counters each group has; those of none are under "".
    groups: HashMap<Arc<str>, usize>,
    /// The counters of each list.
    lists: HashMap<Arc<str>, BTreeSet<String>>,
    /// When there are so many, those that are no longer kept are thrown away.
    sweep_at: usize,
    swept_at_ms: u64,
}

#[derive(Default)]
struct Counter {
    used: u64,
    refused: u64,
    /// Amount and end of each, in milliseconds since 1970.
    holds: HashMap<String, (u64, u64)>,
    kept_until_ms: u64,
    group: Arc<str>,
    list: Option<Arc<str>>,
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
        if map.counters.len() >= map.sweep_at.max(SWEEP_MIN) {
            map.sweep(now_ms);
        }
        if lines.iter().any(|line| map.holds(&line.name, id, now_ms)) {
            return Ok(Hold::Taken);
        }
        for (index, line) in lines.iter().enumerate() {
            if !map.has_room(line, now_ms) {
                return Ok(Hold::Full { line: index });
            }
            let counted = map.counted(&line.name, now_ms);
            if counted.saturating_add(line.amount) > line.limit.min(AMOUNT_MAX) {
                if let Some(counter) = map.counters.get_mut(&line.name) {
                    counter.refused = counter.refused.saturating_add(1);
                }
                return Ok(Hold::Over { line: index, counted });
            }
        }
        for line in lines {
            let counter = map.current(line, now_ms);
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
            let counter = map.current(line, now_ms);
            if counter.holds.remove(id).is_none() {
                let until_ms = now_ms.saturating_add(ttl_ms(OVERTAKEN));
                counter.holds.insert(id.to_owned(), (0, until_ms));
            }
            counter.used = counter.used.saturating_add(*used).min(AMOUNT_MAX);
            counter.kept_until_ms = now_ms.saturating_add(ttl_ms(line.keep));
        }
        Ok(())
    }
}

impl Map {
    /// What is used and held of a counter; one that is not there is not made for the asking.
    fn counted(&mut self, name: &str, now_ms: u64) -> u64 {
        let kept = self.counters.get_mut(name).filter(|counter| counter.kept_until_ms > now_ms);
        kept.map_or(0, |counter| counter.counted(now_ms))
    }

    /// Whether this hold was there before: settled, or it would not be asked for.
    fn holds(&self, name: &str, id: &str, now_ms: u64) -> bool {
        let kept = self.counters.get(name).filter(|counter| counter.kept_until_ms > now_ms);
        kept.and_then(|counter| counter.holds.get(id)).is_some_and(|(_, until_ms)| *until_ms > now_ms)
    }

    /// The counter as it is now: one that is no longer kept begins at 0.
    fn current(&mut self, line: &Line, now_ms: u64) -> &mut Counter {
        let Self { counters, groups, lists, .. } = self;
        let counter = counters.entry(line.name.clone()).or_insert_with(|| {
            let group: Arc<str> = line.group.as_deref().unwrap_or_default().into();
            *groups.entry(Arc::clone(&group)).or_default() += 1;
            let list: Option<Arc<str>> = line.list.as_deref().map(Arc::from);
            if let Some(list) = &list {
                let listed = lists.entry(Arc::clone(list)).or_default();
                if listed.len() < LIST_MAX {
                    listed.insert(line.name.clone());
                }
            }
            Counter { group, list, ..Counter::default() }
        });
        if counter.kept_until_ms <= now_ms {
            let (group, list) = (Arc::clone(&counter.group), counter.list.clone());
            *counter = Counter { group, list, ..Counter::default() };
        }
        counter
    }

    /// Whether the counter is there, or one more of its group may be.
    fn has_room(&mut self, line: &Line, now_ms: u64) -> bool {
        if self.counters.contains_key(&line.name) || !self.is_full(line) {
            return true;
        }
        if now_ms >= self.swept_at_ms.saturating_add(SWEEP_EVERY_MS) {
            self.sweep(now_ms);
        }
        !self.is_full(line)
    }

    fn is_full(&self, line: &Line) -> bool {
        let of = |group: &str| self.groups.get(group).copied().unwrap_or(0);
        match &line.group {
            None => of("") >= COUNTERS_MAX,
            Some(group) => of(group) >= GROUP_MAX || self.counters.len() - of("") >= COUNTERS_MAX,
        }
    }

    fn page(&mut self, list: &str, after: &str, now_ms: u64) -> Vec<Counted> {
        let Self { counters, lists, .. } = self;
        let behind = (Bound::Excluded(after), Bound::Unbounded);
        let names = lists.get(list).into_iter().flat_map(|names| names.range::<str, _>(behind));
        let counted = names.filter_map(|name| {
            let counter = counters.get_mut(name).filter(|counter| counter.kept_until_ms > now_ms)?;
            let held = counter.counted(now_ms) - counter.used;
            Some(Counted { name: name.clone(), used: counter.used, held, refused: counter.refused })
        });
        counted.take(PAGE_MAX).collect()
    }

    fn sweep(&mut self, now_ms: u64) {
        let Self { counters, lists, .. } = self;
        counters.retain(|name, counter| {
            let is_kept = counter.kept_until_ms > now_ms;
            if let (false, Some(list)) = (is_kept, &counter.list)
                && let Some(names) = lists.get_mut(list)
            {
                names.remove(name);
            }
            is_kept
        });
        lists.retain(|_, names| !names.is_empty());
        self.groups.clear();
        for counter in self.counters.values() {
            *self.groups.entry(Arc::clone(&counter.group)).or_default() += 1;
        }
        // Twice as many as are needed, so that sweeping costs each hold no more than itself.
        self.sweep_at = self.counters.len() * 2;
        self.swept_at_ms = now_ms;
    }
}

impl Counters for Local {
    fn hold<'a>(&'a self, id: &'a str, lines: &'a [Line], time: Duration) -> Answer<'a, Hold> {
        async move { self.take(id, lines, time) }.boxed()
    }

    fn settle<'a>(&'a self, id: &'a str, lines: &'a [Line], used: &'a [u64]) -> Answer<'a, ()> {
        async move { self.give_back(id, lines, used) }.boxed()
    }

    fn listed<'a>(&'a self, list: &'a str, after: &'a str) -> Answer<'a, Vec<Counted>> {
        async move { Ok(self.lock().page(list, after, self.now_ms())) }.boxed()
    }
}
