//! What is spent, minute by minute, and who should know of it.
//!
//! Whoever watches reads how all budgets stand at the end of each minute and tells it here. What a budget's counter has grown by
//! since is what was spent. Four things are told, each when it begins and when it is over:
//!
//! - `rate`: more was spent in a minute than a given amount;
//! - `ewma`: many times as much was spent as in the minutes before, by their exponentially weighted moving average;
//! - `forecast`: at the average pace a budget is used up before its day or month is over;
//! - `cap`: a given part of a budget is used and held, or calls are refused for want of room.
//!
//! Calls that succeed are all of it: what costs nothing is in no counter.
//!
//! What it knows can be kept and given to the watch of a process that starts later: the minutes in between are then one late reading.
//!
//! Invariant: there is no IO and no clock, and the same readings give the same alerts, so that whoever reads the same counters in
//! another process comes to the same, and so does one that goes on from what was kept. An alert that has begun is told of once more, when it is over, whatever comes in between; and
//! after each reading at most [`ALERTS_MAX`] are told, the others after the next ones.

use super::{Budget, Period, Standing, Subject, Unit};
use forebay_schemas::{Alert, AlertKind, AlertState, NanoUsd, Tenant};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The most that is told after a reading.
pub const ALERTS_MAX: usize = 1_000;
/// The most budgets of subjects that are watched; what comes later is watched when others have been forgotten.
pub const WATCHED_MAX: usize = 100_000;
/// The most budgets of subjects in a part of what is kept.
const PART_MAX: usize = 1_000;
/// The most parts of it.
pub const PARTS_MAX: usize = WATCHED_MAX.div_ceil(PART_MAX);
/// Minutes without a counter after which a budget of a subject is forgotten.
const FORGET_AFTER: u32 = 24 * 60;
/// Minutes until an average says something.
const WARM_UP: u32 = 10;
/// A minute's weight in an average is one in so many: half of it are the last ten minutes.
const WEIGHT: u32 = 15;
/// A reading that comes late stands for so many minutes at most.
const MINUTES_MAX: i64 = 60;
/// After so many minutes in a row that are well below it, an alert is over.
const CALM: u8 = 3;
/// In percent of its threshold, what is well below it: otherwise what swings around it would be told of every few minutes.
const CALM_PERCENT: u64 = 80;
/// The same for a budget, which does not swing.
const CALM_CAP_PERCENT: u64 = 95;
/// As many alerts a budget may have at a time.
const KINDS: usize = 4;
const MINUTE_MS: i64 = 60_000;

/// What is told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Rules {
    /// More nano-dollars a minute than this; never when absent.
    pub rate: Option<u64>,
    /// What is unusual; nothing when absent.
    pub ewma: Option<Unusual>,
    /// Whether budgets are forecast.
    pub forecast: bool,
    /// At which parts of a budget, in percent, the lowest first.
    pub caps: Vec<u64>,
}

/// How much is unusual.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Unusual {
    /// In percent of the average.
    pub percent: u64,
    /// But no less than so many nano-dollars a minute: five times next to nothing is next to nothing.
    pub floor: u64,
}

/// See the module.
pub struct Watch {
    rules: Rules,
    budgets: Vec<Budget>,
    read_ms: Option<i64>,
    /// By subject and the place of its budget.
    watched: BTreeMap<(Subject, usize), Watched>,
    left_out: usize,
}

/// A budget of a subject.
#[derive(Default)]
struct Watched {
    counts: Counts,
    levels: Levels,
}

/// What is known of its counter.
#[derive(Clone, Default, Deserialize, Serialize)]
struct Counts {
    period: i64,
    used: u64,
    held: u64,
    refused: u64,
    /// Minutes since there was a counter.
    absent: u32,
    /// Over minutes in which something was spent, or the first call of a morning would be unusual.
    usual: Average,
    /// Over all minutes.
    pace: Average,
}

/// What is so of it.
#[derive(Clone, Default, Deserialize, Serialize)]
struct Levels {
    rate: Level,
    ewma: Level,
    forecast: Level,
    cap: Level,
    /// How many parts of the budget were told of.
    caps_told: usize,
}

/// A part of what is kept.
#[derive(Deserialize, Serialize)]
struct Part {
    /// When the counters were read; the same of all parts.
    read_ms: i64,
    /// How many parts there are.
    parts: usize,
    /// What was told.
    rules: Rules,
    watched: Vec<Kept>,
}

/// A budget of a subject, by what does not change where others are set beside it.
#[derive(Deserialize, Serialize)]
struct Kept {
    subject: Subject,
    unit: Unit,
    period: Period,
    limit: u64,
    counts: Counts,
    /// Nothing where nothing is so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    levels: Option<Levels>,
}

/// What a reading says of a budget of a subject.
#[derive(Clone, Copy, Default)]
struct Minute {
    spent: u64,
    /// The most that was used and held of a period that it touches.
    counted: u64,
    is_refused: bool,
}

/// An exponentially weighted moving average of whole numbers; of the first ones the plain one.
#[derive(Clone, Copy, Default, Deserialize, Serialize)]
struct Average {
    value: u64,
    count: u32,
}

impl Average {
    fn add(&mut self, value: u64) {
        self.count = self.count.saturating_add(1);
        let (old, new) = (i128::from(self.value), i128::from(value));
        let moved = old + (new - old) / i128::from(self.count.min(WEIGHT));
        self.value = u64::try_from(moved).unwrap_or(0);
    }

    fn is_warm(&self) -> bool {
        self.count >= WARM_UP
    }
}

/// Whether something is so, for how long it has been, and for how long it has not.
#[derive(Clone, Copy, Default, Deserialize, Serialize)]
struct Level {
    began_ms: Option<i64>,
    calm: u8,
}

impl Level {
    /// Takes a minute in: whether it is so, or clearly not; answers what is to be told, with when it began.
    fn turn(&mut self, now_ms: i64, is_so: bool, is_calm: bool) -> Option<(AlertState, i64)> {
        let Some(began_ms) = self.began_ms else {
            self.began_ms = is_so.then_some(now_ms);
            return self.began_ms.map(|began_ms| (AlertState::Firing, began_ms));
        };
        self.calm = if is_calm { self.calm + 1 } else { 0 };
        if self.calm < CALM {
            return None;
        }
        *self = Self::default();
        Some((AlertState::Resolved, began_ms))
    }
}

impl Watch {
    /// Watches these budgets, which stand in the order of the readings' numbers.
    pub fn new(budgets: Vec<Budget>, rules: Rules) -> Self {
        Self { rules, budgets, read_ms: None, watched: BTreeMap::new(), left_out: 0 }
    }

    /// How many budgets of subjects the last reading left unwatched, as there are too many.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// What a process that starts later needs to go on from here: nothing before the first reading, and at most [`PARTS_MAX`] parts.
    pub fn kept(&self) -> Result<Vec<Vec<u8>>, serde_json::Error> {
        let Some(read_ms) = self.read_ms else { return Ok(Vec::new()) };
        let kept = self.watched.iter().filter_map(|((subject, index), watched)| {
            let Budget { unit, period, limit, .. } = *self.budgets.get(*index)?;
            let (subject, counts) = (subject.clone(), watched.counts.clone());
            let levels = watched.levels.is_firing().then(|| watched.levels.clone());
            Some(Kept { subject, unit, period, limit, counts, levels })
        });
        let mut all: Vec<Vec<Kept>> = vec![Vec::new()];
        for kept in kept {
            match all.last_mut().filter(|part| part.len() < PART_MAX) {
                Some(part) => part.push(kept),
                None => all.push(vec![kept]),
            }
        }
        let (parts, rules) = (all.len(), &self.rules);
        let written = all
            .into_iter()
            .map(|watched| serde_json::to_vec(&Part { read_ms, parts, rules: rules.clone(), watched }));
        written.collect()
    }

    /// Goes on from the latest of what was kept that is whole, and answers when it was read. Then the next reading stands for all minutes
    /// since, as any late one does. `are_counters_kept` says whether the counters outlived what read them.
    ///
    /// Averages are taken over also under other rules; what was so is not, and is told again where it still is.
    pub fn go_on(&mut self, kept: &[Vec<impl AsRef<[u8]>>], are_counters_kept: bool) -> Option<i64> {
        let whole = kept.iter().filter_map(|parts| whole(parts));
        let parts = whole.max_by_key(|parts| parts.first().map(|part| part.read_ms))?;
        for Part { read_ms, rules, watched, .. } in parts {
            self.read_ms = Some(read_ms);
            for Kept { subject, unit, period, limit, mut counts, levels } in watched {
                let Some(index) = self.budget_of(&subject, unit, period) else { continue };
                let is_so =
                    rules == self.rules && self.budgets.get(index).is_some_and(|own| own.limit == limit);
                if !are_counters_kept {
                    (counts.used, counts.held, counts.refused) = (0, 0, 0);
                }
                let levels = levels.filter(|_| is_so).unwrap_or_default();
                self.watched.insert((subject, index), Watched { counts, levels });
            }
        }
        self.read_ms
    }

    /// The budget of this kind that a subject has: its own, or else the one for each.
    fn budget_of(&self, subject: &Subject, unit: Unit, period: Period) -> Option<usize> {
        let holder = subject.name.as_deref().or(subject.tenant.as_deref());
        let place = |of: Option<&str>| {
            self.budgets.iter().position(|budget| {
                (budget.holder, budget.unit, budget.period) == (subject.holder, unit, period)
                    && budget.of.as_deref() == of
            })
        };
        place(holder).or_else(|| place(None))
    }

    /// Takes in how all stands at the end of a minute: in the periods of now, and at last in those that ended since the reading before.
    /// The first reading says where counting begins, and so does one that is earlier than the one before, as a clock was set back.
    pub fn read(&mut self, now_ms: i64, standings: &[Standing]) -> Vec<Alert> {
        let since_ms = self.read_ms.replace(now_ms).filter(|since_ms| *since_ms < now_ms);
        let minutes = since_ms.map_or(0, |since_ms| {
            let minutes = (now_ms - since_ms).saturating_add(MINUTE_MS / 2) / MINUTE_MS;
            u32::try_from(minutes.clamp(1, MINUTES_MAX)).unwrap_or(1)
        });
        let read = self.take_in(now_ms, standings, since_ms);
        if minutes == 0 {
            return Vec::new();
        }
        let (mut alerts, mut before): (Vec<Alert>, Option<&Subject>) = (Vec::new(), None);
        let Self { rules, budgets, watched, .. } = self;
        for ((subject, index), Watched { counts, levels }) in watched.iter_mut() {
            let Some(budget) = budgets.get(*index) else { continue };
            let minute = read.get(&(subject, *index)).copied().unwrap_or_default();
            let spent = minute.spent / u64::from(minutes);
            counts.pass(minutes, spent);
            // A subject's money is in each of its budgets of money, so one of them tells.
            let is_first = budget.unit == Unit::Money && before != Some(subject);
            if is_first {
                before = Some(subject);
            }
            // Who is not heard now is heard after the next reading: levels are turned then.
            if alerts.len() + KINDS <= ALERTS_MAX {
                let telling = Telling { now_ms, subject, budget, minute, spent, counts: &*counts };
                if is_first {
                    alerts.extend(telling.rate(rules, &mut levels.rate));
                    alerts.extend(telling.ewma(rules, &mut levels.ewma));
                }
                alerts.extend(telling.forecast(rules, &mut levels.forecast));
                alerts.extend(telling.cap(rules, levels));
            }
            if spent > 0 {
                counts.usual.add(spent);
            }
        }
        self.watched.retain(|_, watched| watched.counts.absent < FORGET_AFTER || watched.levels.is_firing());
        alerts
    }

    /// Takes over what the counters say, and answers what they have grown by.
    fn take_in<'s>(
        &mut self,
        now_ms: i64,
        standings: &'s [Standing],
        since_ms: Option<i64>,
    ) -> BTreeMap<(&'s Subject, usize), Minute> {
        let mut read: BTreeMap<(&Subject, usize), Minute> = BTreeMap::new();
        for Watched { counts, .. } in self.watched.values_mut() {
            counts.absent = counts.absent.saturating_add(1);
            counts.held = 0;
        }
        self.left_out = 0;
        for standing in standings {
            let Some(budget) = self.budgets.get(standing.budget) else { continue };
            let key = (standing.subject.clone(), standing.budget);
            if !self.watched.contains_key(&key) {
                if self.watched.len() >= WATCHED_MAX {
                    self.left_out += 1;
                    continue;
                }
                // It was not there at the reading before, so all of it was spent since; nobody knows of what had begun before that.
                let (begins_ms, ends_ms) = budget.period.span(standing.period);
                let is_new = since_ms.is_some_and(|since_ms| begins_ms >= since_ms || ends_ms > now_ms);
                let counts = Counts {
                    period: standing.period,
                    used: if is_new { 0 } else { standing.used },
                    refused: if is_new { 0 } else { standing.refused },
                    ..Counts::default()
                };
                self.watched.insert(key.clone(), Watched { counts, levels: Levels::default() });
            }
            let Some(watched) = self.watched.get_mut(&key) else { continue };
            let minute = read.entry((&standing.subject, standing.budget)).or_default();
            watched.counts.take_in(standing, budget.period.at(now_ms), minute);
        }
        read
    }
}

/// The parts of what was kept at a reading; nothing where some are missing, are of another reading, or were written by a version that
/// kept something else.
fn whole(parts: &[impl AsRef<[u8]>]) -> Option<Vec<Part>> {
    let first: Part = serde_json::from_slice(parts.first()?.as_ref()).ok()?;
    let rest = parts.get(1..first.parts)?.iter().map(|part| {
        let part: Part = serde_json::from_slice(part.as_ref()).ok()?;
        (part.read_ms == first.read_ms).then_some(part)
    });
    let rest: Vec<Part> = rest.collect::<Option<_>>()?;
    Some(std::iter::once(first).chain(rest).collect())
}

impl Counts {
    /// Takes over a counter, of the period of now or of one before it. That of now comes last, and then stays.
    fn take_in(&mut self, standing: &Standing, period_now: i64, minute: &mut Minute) {
        let Standing { period, used, held, refused, .. } = *standing;
        if period != period_now && self.period == period_now {
            return;
        }
        let is_same = period == self.period;
        // A counter that is smaller than it was had been lost, and has begun again.
        let grown = |now: u64, was: u64| if is_same && now >= was { now - was } else { now };
        minute.spent = minute.spent.saturating_add(grown(used, self.used));
        minute.is_refused |= grown(refused, self.refused) > 0;
        minute.counted = minute.counted.max(used.saturating_add(held));
        (self.period, self.used, self.held, self.refused, self.absent) = (period, used, held, refused, 0);
    }

    /// So many minutes have passed in which so much was spent in each.
    fn pass(&mut self, minutes: u32, spent: u64) {
        for _ in 0..minutes {
            self.pace.add(spent);
        }
    }
}

impl Levels {
    fn is_firing(&self) -> bool {
        [self.rate, self.ewma, self.forecast, self.cap].iter().any(|level| level.began_ms.is_some())
    }
}

/// What may be told of whom.
struct Telling<'w> {
    now_ms: i64,
    subject: &'w Subject,
    budget: &'w Budget,
    minute: Minute,
    /// A minute, where the reading stands for several.
    spent: u64,
    counts: &'w Counts,
}

/// What was compared.
struct Compared {
    kind: AlertKind,
    pace: u64,
    value: u64,
    threshold: u64,
    reached_ms: Option<i64>,
    words: String,
}

impl Telling<'_> {
    fn rate(&self, rules: &Rules, level: &mut Level) -> Option<Alert> {
        let threshold = rules.rate?;
        let turned = self.swings(level, threshold)?;
        let spent = self.amount(self.spent);
        let words = format!("spent {spent} in a minute; beyond {} it is told", self.amount(threshold));
        Some(self.swung(AlertKind::Rate, turned, threshold, words))
    }

    fn ewma(&self, rules: &Rules, level: &mut Level) -> Option<Alert> {
        let Unusual { percent, floor } = rules.ewma.filter(|_| self.counts.usual.is_warm())?;
        let usual = self.counts.usual.value;
        let threshold = part(usual, percent).max(floor);
        let turned = self.swings(level, threshold)?;
        let words =
            format!("spent {} in a minute, where {} is usual", self.amount(self.spent), self.amount(usual));
        Some(self.swung(AlertKind::Ewma, turned, threshold, words))
    }

    /// What is spent goes up and down.
    fn swings(&self, level: &mut Level, threshold: u64) -> Option<(AlertState, i64)> {
        level.turn(self.now_ms, self.spent > threshold, self.spent <= part(threshold, CALM_PERCENT))
    }

    fn swung(&self, kind: AlertKind, turned: (AlertState, i64), threshold: u64, words: String) -> Alert {
        let (state, began_ms) = turned;
        let pace = self.counts.usual.value;
        let compared = Compared { kind, pace, value: self.spent, threshold, reached_ms: None, words };
        self.alert(state, began_ms, began_ms.div_euclid(MINUTE_MS), compared)
    }

    fn forecast(&self, rules: &Rules, level: &mut Level) -> Option<Alert> {
        let is_long = matches!(self.budget.period, Period::Day | Period::Month);
        if !rules.forecast || !is_long || !self.counts.pace.is_warm() {
            return None;
        }
        let period = self.budget.period.at(self.now_ms);
        let used = if self.counts.period == period { self.counts.used } else { 0 };
        let (pace, limit) = (self.counts.pace.value, self.budget.limit);
        let left_ms = u64::try_from(self.budget.period.span(period).1 - self.now_ms).unwrap_or(0);
        let to_come = u128::from(pace) * u128::from(left_ms) / u128::from(MINUTE_MS.unsigned_abs());
        let value = used.saturating_add(u64::try_from(to_come).unwrap_or(u64::MAX));
        let (state, began_ms) =
            level.turn(self.now_ms, value > limit, value <= part(limit, CALM_CAP_PERCENT))?;
        let minutes = limit.saturating_sub(used).checked_div(pace);
        let reached_ms = minutes.and_then(|minutes| {
            self.now_ms.checked_add(i64::try_from(minutes).ok()?.checked_mul(MINUTE_MS)?)
        });
        let words = format!(
            "will have used up its budget of {} in {} minutes, at {} a minute",
            self.budget,
            minutes.unwrap_or_default(),
            self.amount(pace)
        );
        let reached_ms = reached_ms.filter(|_| state == AlertState::Firing);
        let compared =
            Compared { kind: AlertKind::Forecast, pace, value, threshold: limit, reached_ms, words };
        Some(self.alert(state, began_ms, began_ms.div_euclid(MINUTE_MS), compared))
    }

    /// One alert for all parts of a budget, told anew at each that is reached.
    fn cap(&self, rules: &Rules, levels: &mut Levels) -> Option<Alert> {
        let Minute { counted, is_refused, .. } = self.minute;
        let limit = self.budget.limit;
        let is_reached = |percent: &u64| {
            // Where no call finds room, nothing is left, though what is left may be more than nothing.
            counted >= part(limit, *percent) || is_refused && *percent <= 100
        };
        let reached = rules.caps.iter().take_while(|percent| is_reached(percent)).count();
        let lowest = part(limit, rules.caps.first().copied()?);
        let is_calm = reached == 0 && counted < part(lowest, CALM_CAP_PERCENT);
        let turned = levels.cap.turn(self.now_ms, reached > 0, is_calm);
        let (state, began_ms) = match (turned, levels.cap.began_ms) {
            (Some(turned), _) => turned,
            (None, Some(began_ms)) if reached > levels.caps_told => (AlertState::Firing, began_ms),
            _ => return None,
        };
        let told = if state == AlertState::Firing { reached } else { levels.caps_told };
        let percent = told.checked_sub(1).and_then(|last| rules.caps.get(last)).copied().unwrap_or_default();
        levels.caps_told = if state == AlertState::Firing { reached } else { 0 };
        let refused = if is_refused { ", and calls are refused" } else { "" };
        let words =
            format!("has {} of its budget of {} used and held{refused}", self.amount(counted), self.budget);
        let (pace, threshold) = (self.counts.pace.value, part(limit, percent));
        let compared =
            Compared { kind: AlertKind::Cap, pace, value: counted, threshold, reached_ms: None, words };
        // The same after a restart. It was seen when its minute was over, which may be when its period was.
        let within_ms = began_ms - began_ms.rem_euclid(MINUTE_MS) - 1;
        Some(self.alert(state, began_ms, self.budget.period.at(within_ms), compared))
    }

    fn alert(&self, state: AlertState, began_ms: i64, which: i64, compared: Compared) -> Alert {
        let Compared { kind, pace, value, threshold, reached_ms, words } = compared;
        let Subject { holder, tenant, name } = self.subject;
        let message = match state {
            AlertState::Firing => format!("{} {words}", self.subject),
            AlertState::Resolved => format!("{}: {} is over", self.subject, kind.as_str()),
        };
        let (kind_word, budget) = (kind.as_str(), self.budget.to_string());
        let named = format!("{kind_word}\n{holder}\n{tenant:?}\n{name:?}\n{budget}\n{which}");
        let minute_us = |ms: i64| (ms - ms.rem_euclid(MINUTE_MS)).saturating_mul(1_000);
        Alert {
            id: blake3::hash(named.as_bytes()).to_hex().chars().take(32).collect(),
            state,
            kind,
            holder: holder.to_string(),
            tenant: tenant.clone().and_then(|tenant| Tenant::try_from(tenant).ok()),
            name: name.clone(),
            budget,
            unit: self.budget.unit.to_string(),
            seen_at: minute_us(self.now_ms),
            began_at: minute_us(began_ms),
            spent: self.spent,
            pace,
            used: self.counts.used,
            held: self.counts.held,
            limit: self.budget.limit,
            value,
            threshold,
            reached_at: reached_ms.map(minute_us),
            message,
        }
    }

    fn amount(&self, amount: u64) -> String {
        match self.budget.unit {
            Unit::Money => NanoUsd(i64::try_from(amount).unwrap_or(i64::MAX)).to_string(),
            Unit::Tokens => format!("{amount} tokens"),
        }
    }
}

/// So many percent of an amount, rounded up: no part of something is nothing.
fn part(amount: u64, percent: u64) -> u64 {
    u64::try_from((u128::from(amount) * u128::from(percent)).div_ceil(100)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
