//! Limits that several processes keep together: each takes slices of what all of them may send.
//!
//! Who keeps them is somebody else's business ([`Shared`]): Redis, where there is one. Here stands what one process does at one
//! endpoint with one model. It takes a slice, uses it up within [`SLICE`], asks for the next before it is empty, and gives back
//! what it did not use, so that a call waits for nobody while there is enough. A slice grows while it is used up early, and
//! shrinks to what a second needed. Nothing is taken where nobody limits anything; then the process only tells and listens.
//!
//! Invariant: where it can ask, what a process sends is in a slice; where it cannot, it sends its part of each limit, as if all
//! that shared it last still did. Sans-IO.

use crate::{
    limits::{Limits, Quota},
    throttle::Caps,
};
use futures::future::BoxFuture;
use std::{collections::BTreeMap, time::Duration};
use tokio::time::Instant;

/// How long a slice may be used, from when it was asked for. Whoever keeps the limit counts it for so much longer.
pub const SLICE: Duration = Duration::from_secs(1);
/// How often a process with something to tell tells it, where it wants nothing.
pub(crate) const TELL_EVERY: Duration = Duration::from_secs(1);
/// How often one tells of itself that has nothing to tell, so that it counts among those who share.
const GREET_EVERY: Duration = Duration::from_secs(60);
/// How long nobody is asked after there was no answer.
const AWAY_FOR: Duration = Duration::from_secs(2);
/// The longest that a refusal is believed: what others give back may be there sooner.
const REFUSED_MAX: Duration = Duration::from_millis(500);
/// The most calls that a slice is asked for.
const CALLS_MAX: u64 = 1_024;
/// A slice is nearly empty below this part of it.
const NEARLY_EMPTY: u64 = 4;
/// The most seconds of which anything is given back.
const BACK_MAX: usize = 62;

/// Keeps the limits of one endpoint for all who share them.
pub trait Shared: Send + Sync + 'static {
    /// Tells what there is to tell of a model there, and takes a slice.
    fn take<'a>(&'a self, model: &'a str, ask: &'a Ask) -> BoxFuture<'a, Result<Slice, Unreachable>>;
}

/// Whoever keeps the limits does not answer.
#[derive(Debug, thiserror::Error)]
#[error("could not reach what keeps the limits that processes share")]
pub struct Unreachable(#[source] pub Box<dyn std::error::Error + Send + Sync>);

/// What a process tells and asks; pairs are of requests and of tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ask {
    /// What may be sent in a minute, where anything is configured.
    pub limits: [Option<u64>; 2],
    /// The least that is of use; no request where nothing is asked for.
    pub need: [u64; 2],
    /// The most that is of use.
    pub want: [u64; 2],
    /// What was not used of earlier slices, by the second of each.
    pub back: Vec<(u64, [u64; 2])>,
    /// What was sent beyond any slice.
    pub beyond: [u64; 2],
    /// What the provider said is left.
    pub heard: [Option<Left>; 2],
    /// For how long nobody shall send.
    pub pause: Option<Duration>,
}

/// What a provider said is left of one limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Left {
    /// How much is left.
    pub level: u64,
    /// How much there is when all of it is there.
    pub full: u64,
    /// How much comes back until the reset.
    pub refills: u64,
    /// When that is.
    pub reset: Duration,
}

/// What a process gets.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Slice {
    /// How much; nothing where there was less than it needs.
    pub amount: [u64; 2],
    /// The second that it counts in, by the keeper's clock.
    pub second: u64,
    /// Whether anything is limited at all.
    pub is_limited: bool,
    /// After which there may be enough.
    pub wait: Option<Duration>,
    /// For how long nobody shall send.
    pub pause: Option<Duration>,
    /// How many share.
    pub sharers: u64,
}

impl Left {
    fn of(Quota { limit, remaining, reset }: Quota) -> Self {
        let full = limit.unwrap_or(remaining).max(remaining);
        Self { level: remaining, full, refills: full - remaining, reset }
    }
}

/// Whether a call may be sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Admission {
    /// It may.
    Yes,
    /// Not now; perhaps from this moment on.
    No(Option<Instant>),
    /// Nobody can be asked: as much as one of so many may send.
    Alone(u64),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Share {
    slice: Option<Held>,
    back: BTreeMap<u64, [u64; 2]>,
    beyond: [u64; 2],
    heard: [Option<Left>; 2],
    pause: Option<Duration>,
    is_limited: bool,
    /// For how many calls the next slice is asked for, of so many tokens each.
    calls: u64,
    tokens: u64,
    wants: bool,
    asked_at: Option<Instant>,
    refused_until: Option<Instant>,
    /// Until when nobody is asked, because nobody answered.
    away_until: Option<Instant>,
    sharers: u64,
    failures: u64,
}

#[derive(Debug)]
struct Held {
    second: u64,
    given: [u64; 2],
    left: [u64; 2],
    until: Instant,
}

impl Share {
    pub(crate) fn new(caps: Caps) -> Self {
        Self {
            slice: None,
            back: BTreeMap::new(),
            beyond: [0; 2],
            heard: [None; 2],
            pause: None,
            is_limited: caps.per_minute().iter().any(Option::is_some),
            calls: 1,
            tokens: 0,
            wants: false,
            asked_at: None,
            refused_until: None,
            away_until: None,
            sharers: 1,
            failures: 0,
        }
    }

    /// `shared`, or `away` while nobody answers.
    pub(crate) fn state(&self) -> &'static str {
        if self.away_until.is_some() { "away" } else { "shared" }
    }

    /// How often nobody answered.
    pub(crate) fn failures(&self) -> u64 {
        self.failures
    }

    /// Whether it wants to ask now.
    pub(crate) fn wants(&self, now: Instant) -> bool {
        let may = |until: Option<Instant>| until.is_none_or(|until| until <= now);
        // A pause, and that there is a limit at all, is told at once.
        let is_news = self.pause.is_some() || !self.is_limited && self.heard != [None; 2];
        may(self.away_until) && (is_news || self.wants && may(self.refused_until))
    }

    pub(crate) fn admits(&mut self, tokens: u64, now: Instant) -> Admission {
        if self.away_until.is_some() {
            (self.wants, self.tokens) = (true, tokens);
            return Admission::Alone(self.sharers);
        }
        if !self.is_limited {
            // Others may have heard of a limit meanwhile.
            self.wants |= self.asked_at.is_none_or(|asked| now.duration_since(asked) >= TELL_EVERY);
            return Admission::Yes;
        }
        self.lapse(now);
        if self.slice.as_ref().is_some_and(|held| held.left[0] >= 1 && held.left[1] >= tokens) {
            return Admission::Yes;
        }
        (self.wants, self.tokens) = (true, tokens);
        Admission::No(self.refused_until.filter(|&until| until > now))
    }

    /// A call is sent; gives the second of the slice that it is sent from.
    pub(crate) fn reserve(&mut self, tokens: u64) -> Option<u64> {
        if self.is_limited
            && let Some(held) = &mut self.slice
            && held.left[0] >= 1
            && held.left[1] >= tokens
        {
            held.left = [held.left[0] - 1, held.left[1] - tokens];
            let is_low = |(left, given): (&u64, &u64)| left.saturating_mul(NEARLY_EMPTY) < *given;
            if held.left.iter().zip(&held.given).any(is_low) {
                (self.wants, self.tokens) = (true, tokens);
            }
            return Some(held.second);
        }
        self.sent_beyond([1, tokens]);
        None
    }

    /// More was sent than is in any slice.
    pub(crate) fn sent_beyond(&mut self, amount: [u64; 2]) {
        for (beyond, amount) in self.beyond.iter_mut().zip(amount) {
            *beyond = beyond.saturating_add(amount);
        }
    }

    /// Not so much of a slice was used after all.
    pub(crate) fn give_back(&mut self, second: u64, amount: [u64; 2]) {
        if amount == [0; 2] {
            return;
        }
        // What is still to be used is used first.
        if let Some(held) = self.slice.as_mut().filter(|held| held.second == second) {
            held.left = [held.left[0] + amount[0], held.left[1].saturating_add(amount[1])];
            return;
        }
        let back = self.back.entry(second).or_default();
        *back = [back[0] + amount[0], back[1].saturating_add(amount[1])];
        // The oldest no longer counts with anybody.
        if self.back.len() > BACK_MAX {
            self.back.pop_first();
        }
    }

    pub(crate) fn heard(&mut self, limits: &Limits) {
        for (heard, quota) in self.heard.iter_mut().zip([limits.requests, limits.tokens]) {
            *heard = quota.map(Left::of).or(*heard);
        }
    }

    /// Nobody shall send for so long.
    pub(crate) fn paused(&mut self, wait: Duration) {
        self.pause = self.pause.max(Some(wait));
    }

    /// What there is to ask, if there is; `sent` is what this process sent in the last minute.
    pub(crate) fn ask(&mut self, caps: Caps, sent: [u64; 2], now: Instant) -> Option<Ask> {
        self.lapse(now);
        if self.away_until.is_some_and(|until| now < until) {
            return None;
        }
        let silent_for = self.asked_at.map_or(Duration::MAX, |asked| now.duration_since(asked));
        let has_news = !self.back.is_empty() || self.beyond != [0; 2] || self.heard != [None; 2];
        let is_due = self.wants(now) || has_news && silent_for >= TELL_EVERY || silent_for >= GREET_EVERY;
        if !is_due {
            return None;
        }
        let wants = std::mem::take(&mut self.wants);
        if wants && self.slice.is_some() {
            // It did not last.
            self.calls = (self.calls * 2).min(CALLS_MAX);
        }
        let calls = if wants && self.is_limited { self.calls } else { 0 };
        self.asked_at = Some(now);
        // What was sent longer ago counts no more with anybody.
        let beyond = std::mem::take(&mut self.beyond);
        Some(Ask {
            limits: caps.per_minute(),
            need: [calls.min(1), self.tokens * calls.min(1)],
            want: [calls, self.tokens.saturating_mul(calls)],
            back: std::mem::take(&mut self.back).into_iter().collect(),
            beyond: [beyond[0].min(sent[0]), beyond[1].min(sent[1])],
            heard: std::mem::take(&mut self.heard),
            pause: self.pause.take(),
        })
    }

    /// What came of it. Gives for how long nobody shall send.
    pub(crate) fn answered(
        &mut self,
        ask: &Ask,
        answer: Option<&Slice>,
        asked_at: Instant,
        now: Instant,
    ) -> Option<Duration> {
        let Some(slice) = answer else {
            self.failures = self.failures.saturating_add(1);
            self.away_until = Some(now + AWAY_FOR);
            self.slice = None;
            // To be told later. What was given back is not: it is the safe side of a message that may have arrived.
            self.sent_beyond(ask.beyond);
            ask.pause.into_iter().for_each(|pause| self.paused(pause));
            return None;
        };
        (self.away_until, self.sharers) = (None, slice.sharers.max(1));
        if slice.is_limited && !self.is_limited {
            // The call that found it out wanted nothing of it.
            self.calls = 1;
        }
        self.is_limited = slice.is_limited;
        if ask.need[0] > 0 {
            self.refused_until = slice.wait.map(|wait| now + wait.min(REFUSED_MAX));
        }
        if slice.amount[0] > 0 {
            let until = asked_at + SLICE;
            let rest = self.slice.take();
            let mut held = Held { second: slice.second, given: slice.amount, left: slice.amount, until };
            match rest {
                Some(rest) if rest.second == held.second => {
                    held.left = [held.left[0] + rest.left[0], held.left[1].saturating_add(rest.left[1])];
                }
                Some(rest) => self.give_back(rest.second, rest.left),
                None => {}
            }
            self.slice = Some(held);
        }
        slice.pause
    }

    /// Puts a slice aside whose time is over.
    fn lapse(&mut self, now: Instant) {
        if let Some(held) = self.slice.take_if(|held| held.until <= now) {
            self.calls = held.given[0].saturating_sub(held.left[0]).clamp(1, CALLS_MAX);
            self.give_back(held.second, held.left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPS: Caps = Caps { outstanding: 100, requests_per_minute: Some(600), tokens_per_minute: None };

    fn slice(requests: u64, second: u64) -> Slice {
        Slice { amount: [requests, 1_000], second, is_limited: true, sharers: 3, ..Slice::default() }
    }

    /// Calls of ten tokens, as many as there is room for.
    fn burst(share: &mut Share, now: Instant) -> usize {
        let admitted = std::iter::repeat_with(|| {
            let admission = share.admits(10, now);
            (admission == Admission::Yes).then(|| share.reserve(10))
        });
        admitted.take(10_000).take_while(Option::is_some).count()
    }

    /// Asks, and gets a slice of all that it wants.
    fn filled(share: &mut Share, second: u64, now: Instant) -> Ask {
        let ask = share.ask(CAPS, [0; 2], now).unwrap();
        share.answered(&ask, Some(&slice(ask.want[0], second)), now, now);
        ask
    }

    #[test]
    fn a_slice_grows_while_it_is_used_up_and_shrinks_to_what_a_second_needed() {
        let (mut share, now) = (Share::new(CAPS), Instant::now());
        for (second, expected) in [1, 2, 4, 8].into_iter().enumerate() {
            assert_eq!(share.admits(10, now), Admission::No(None));
            assert!(share.wants(now));
            let ask = filled(&mut share, u64::try_from(second).unwrap(), now);
            assert_eq!((ask.need, ask.want), ([1, 10], [expected, 10 * expected]));
            assert_eq!(burst(&mut share, now), usize::try_from(expected).unwrap());
        }
        filled(&mut share, 5, now);
        for _ in 0..5 {
            share.reserve(10);
        }
        let later = now + SLICE;
        assert_eq!(share.admits(10, later), Admission::No(None), "its time is over");
        let ask = filled(&mut share, 6, later);
        assert_eq!((ask.want[0], ask.back.last()), (5, Some(&(5, [11, 950]))), "11 of 16 were not used");
    }

    #[test]
    fn the_next_slice_is_asked_for_before_this_one_is_empty() {
        let (mut share, now) = (Share::new(CAPS), Instant::now());
        share.calls = 8;
        let _ = share.admits(10, now);
        filled(&mut share, 0, now);
        (0..6).for_each(|_| _ = share.reserve(10));
        assert!(!share.wants(now), "a quarter is left");
        share.reserve(10);
        assert!(share.wants(now) && share.admits(10, now) == Admission::Yes);
    }

    #[test]
    fn a_refusal_is_believed_for_a_while() {
        let (mut share, now) = (Share::new(CAPS), Instant::now());
        let _ = share.admits(10, now);
        let ask = share.ask(CAPS, [0; 2], now).unwrap();
        let refused = Slice { wait: Some(Duration::from_secs(40)), ..slice(0, 0) };
        share.answered(&ask, Some(&refused), now, now);
        let until = now + REFUSED_MAX;
        assert_eq!(share.admits(10, now), Admission::No(Some(until)));
        assert!(!share.wants(now) && share.wants(until));
    }

    #[test]
    fn where_nobody_answers_it_is_one_of_those_who_shared_and_tells_later_what_it_sent() {
        let (mut share, now) = (Share::new(CAPS), Instant::now());
        let _ = share.admits(10, now);
        filled(&mut share, 0, now);
        share.paused(Duration::from_secs(3));
        let ask = share.ask(CAPS, [0; 2], now).unwrap();
        share.answered(&ask, None, now, now);
        assert_eq!((share.state(), share.failures()), ("away", 1));
        assert_eq!(share.admits(10, now), Admission::Alone(3));
        (0..4).for_each(|_| assert_eq!(share.reserve(10), None));
        assert_eq!(share.ask(CAPS, [4, 40], now), None, "nobody is asked for a while");
        let later = now + AWAY_FOR;
        assert_eq!(share.admits(10, later), Admission::Alone(3), "until somebody answers");
        let ask = share.ask(CAPS, [3, 30], later).unwrap();
        assert_eq!(ask.beyond, [3, 30], "what was sent more than a minute ago counts with nobody");
        assert_eq!(ask.pause, Some(Duration::from_secs(3)), "not told yet");
        share.answered(&ask, Some(&slice(1, 9)), later, later);
        assert_eq!((share.state(), share.admits(10, later)), ("shared", Admission::Yes));
    }

    #[test]
    fn where_nothing_is_limited_nobody_waits_and_all_are_heard_once_a_second() {
        let free = Caps { requests_per_minute: None, ..CAPS };
        let (mut share, now) = (Share::new(free), Instant::now());
        assert_eq!(burst(&mut share, now), 10_000);
        let ask = share.ask(free, [10_000, 100_000], now).unwrap();
        assert_eq!((ask.need, ask.beyond), ([0; 2], [10_000, 100_000]));
        share.answered(&ask, Some(&Slice::default()), now, now);
        assert_eq!(burst(&mut share, now), 10_000);
        assert_eq!(share.ask(free, [0; 2], now), None);
        share.heard(&Limits { requests: None, tokens: None });
        let ask = share.ask(free, [10_000, 100_000], now + TELL_EVERY).unwrap();
        let found = Slice { is_limited: true, ..Slice::default() };
        share.answered(&ask, Some(&found), now, now);
        assert_eq!(share.admits(10, now), Admission::No(None), "another one heard of a limit");
    }
}
