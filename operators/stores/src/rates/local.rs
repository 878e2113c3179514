//! The rates of one process, in memory. What Redis does in its script is done here in the same order.

use super::{
    Ask, COUNTS_S, HEARD_MS, Heard, KEEP_MS, Measures, PART, Rates, SHARES_MS, Slice, UNCOUNTED_S,
    WAIT_MS_MIN, check,
};
use crate::clock::unix_ms;
use crate::{Answer, Clock, Error};
use futures::FutureExt;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The most rates, and the most who share them.
const RATES_MAX: usize = 10_000;

/// See the module.
pub struct Local {
    clock: Clock,
    all: Mutex<All>,
}

#[derive(Default)]
struct All {
    rates: HashMap<String, Rate>,
    /// When each asked last, in milliseconds since 1970.
    sharers: HashMap<String, u64>,
}

#[derive(Default)]
struct Rate {
    /// What was taken in each second that still counts.
    taken: BTreeMap<u64, [u64; 2]>,
    buckets: [Option<Bucket>; 2],
    paused_until_ms: u64,
    asked_at_ms: u64,
}

/// What a provider said is left.
struct Bucket {
    level: f64,
    full: f64,
    per_ms: f64,
    at_ms: u64,
    heard_at_ms: u64,
}

impl Bucket {
    fn refill(&mut self, now_ms: u64) {
        let passed = float(now_ms.saturating_sub(self.at_ms));
        (self.level, self.at_ms) = ((self.level + self.per_ms * passed).min(self.full), now_ms);
    }
}

impl Rate {
    fn take(&mut self, ask: &Ask, now_ms: u64) -> Slice {
        let second = now_ms / 1_000;
        self.asked_at_ms = now_ms;
        self.taken = self.taken.split_off(&(second + 1).saturating_sub(COUNTS_S));
        for bucket in &mut self.buckets {
            *bucket = bucket.take().filter(|bucket| now_ms.saturating_sub(bucket.heard_at_ms) <= HEARD_MS);
            bucket.iter_mut().for_each(|bucket| bucket.refill(now_ms));
        }
        self.settle(ask, second);
        self.hear(ask, now_ms);
        if let Some(pause) = ask.pause {
            self.paused_until_ms = self.paused_until_ms.max(now_ms + millis(pause));
        }
        let limits = ask.limits.array();
        let is_limited =
            limits.iter().any(Option::is_some) || self.buckets.iter().any(|bucket| bucket.is_some());
        let paused_ms = self.paused_until_ms.saturating_sub(now_ms);
        let mut slice = Slice {
            second,
            is_limited,
            pause: (paused_ms > 0).then_some(Duration::from_millis(paused_ms)),
            ..Slice::default()
        };
        if ask.need.requests == 0 || paused_ms > 0 {
            return slice;
        }
        let (need, want) = (ask.need.array(), ask.want.array());
        let (mut amount, mut wait_ms) = ([0; 2], 0);
        for measure in 0..2 {
            match self.part(measure, limits[measure], need[measure], want[measure], now_ms) {
                Ok(part) => amount[measure] = part,
                Err(wait) => wait_ms = wait_ms.max(wait).max(WAIT_MS_MIN),
            }
        }
        if wait_ms > 0 {
            return Slice { wait: Some(Duration::from_millis(wait_ms)), ..slice };
        }
        self.add(second, amount);
        slice.amount = amount.into();
        slice
    }

    /// What was given back, and what was sent beyond.
    fn settle(&mut self, ask: &Ask, second: u64) {
        for back in &ask.back {
            let amount = back.amount.array();
            let Some(taken) = self.taken.get_mut(&back.second) else { continue };
            for measure in 0..2 {
                let amount = amount[measure].min(taken[measure]);
                taken[measure] -= amount;
                if let Some(bucket) = &mut self.buckets[measure] {
                    bucket.level = (bucket.level + float(amount)).min(bucket.full);
                }
            }
        }
        if ask.beyond != Measures::each(0) {
            self.add(second, ask.beyond.array());
        }
    }

    fn add(&mut self, second: u64, amount: [u64; 2]) {
        let taken = self.taken.entry(second).or_default();
        for measure in 0..2 {
            taken[measure] = taken[measure].saturating_add(amount[measure]);
            if let Some(bucket) = &mut self.buckets[measure] {
                bucket.level -= float(amount[measure]);
            }
        }
    }

    /// A provider that answers one has perhaps not counted what others have just taken.
    fn hear(&mut self, ask: &Ask, now_ms: u64) {
        let lately = (now_ms / 1_000).saturating_sub(UNCOUNTED_S);
        for (measure, heard) in ask.heard.array().into_iter().enumerate() {
            let Some(Heard { level, full, refills, reset }) = heard else { continue };
            let per_ms = float(refills) / float(millis(reset).max(1));
            let uncounted: u64 = self.taken.range(lately..).map(|(_, taken)| taken[measure]).sum();
            let level = float(level) - float(uncounted);
            let full = float(full);
            self.buckets[measure] = Some(Bucket { level, full, per_ms, at_ms: now_ms, heard_at_ms: now_ms });
        }
    }

    /// What there is of one measure, or in how many milliseconds there may be enough.
    fn part(
        &self,
        measure: usize,
        limit: Option<u64>,
        need: u64,
        want: u64,
        now_ms: u64,
    ) -> Result<u64, u64> {
        let (mut left, mut wait_ms) = (want.saturating_mul(PART), 0);
        if let Some(limit) = limit {
            let sum: u64 = self.taken.values().map(|taken| taken[measure]).sum();
            left = left.min(limit.saturating_sub(sum));
            // What is larger than the whole limit goes alone.
            if limit.saturating_sub(sum) < need && sum > 0 {
                let oldest = self.taken.iter().find(|(_, taken)| taken[measure] > 0);
                wait_ms = oldest.map_or(0, |(second, _)| (second + COUNTS_S) * 1_000).saturating_sub(now_ms);
                wait_ms = wait_ms.max(WAIT_MS_MIN);
            }
        }
        if let Some(bucket) = &self.buckets[measure] {
            left = left.min(whole(bucket.level));
            let missing = float(need).min(bucket.full) - bucket.level;
            if missing > 0.0 {
                let wait = if bucket.per_ms > 0.0 { missing / bucket.per_ms } else { float(HEARD_MS) };
                wait_ms = wait_ms.max(whole(wait.ceil())).clamp(WAIT_MS_MIN, HEARD_MS);
            }
        }
        match wait_ms {
            0 => Ok(want.min(left / PART).max(need)),
            wait_ms => Err(wait_ms),
        }
    }
}

impl Local {
    /// Rates that run by this clock.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        Self { clock, all: Mutex::default() }
    }

    fn take_now(&self, name: &str, sharer: &str, ask: &Ask) -> Result<Slice, Error> {
        check(name, sharer, ask)?;
        let now_ms = unix_ms((self.clock)());
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let All { rates, sharers } = &mut *all;
        sharers.insert(sharer.to_owned(), now_ms);
        sharers.retain(|_, asked_at_ms| *asked_at_ms + SHARES_MS > now_ms);
        if !rates.contains_key(name) {
            rates.retain(|_, rate| rate.asked_at_ms + KEEP_MS > now_ms);
        }
        crate::error::check_size("the number of rates", rates.len().max(sharers.len()), RATES_MAX)?;
        let slice = rates.entry(name.to_owned()).or_default().take(ask, now_ms);
        Ok(Slice { sharers: u64::try_from(sharers.len()).unwrap_or(u64::MAX), ..slice })
    }
}

impl Rates for Local {
    fn take<'a>(&'a self, name: &'a str, sharer: &'a str, ask: &'a Ask) -> Answer<'a, Slice> {
        async move { self.take_now(name, sharer, ask) }.boxed()
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Amounts stay far below 2⁵³, beyond which a double would round them.
fn float(amount: u64) -> f64 {
    amount as f64
}

/// The whole part of what is not negative.
fn whole(amount: f64) -> u64 {
    Duration::try_from_secs_f64(amount.max(0.0)).map_or(0, |time| time.as_secs())
}
