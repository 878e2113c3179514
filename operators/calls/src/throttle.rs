//! How much may be sent to one model at one endpoint: the least of what the provider says, what is configured, and how much
//! it was seen to bear.
//!
//! A call reserves what it may take (its prompt and the most it may get), and settles on what it took. The configured
//! limits hold for any minute, not for the mean of many. The provider's headers are followed as a leaky bucket: what is
//! left refills until the reset. Without headers the number of calls at once is found by additive increase and
//! multiplicative decrease (Chiu and Jain 1989): one more after a whole limit of successes, three tenths fewer on an overload,
//! once for all calls that were under way together, as TCP does.
//!
//! A refusal that names a wait is no overload: one of them holds its own call up, and whatever else goes well goes on. Three
//! in a row mean that nobody is let in, so all wait.
//!
//! Where several processes share an endpoint, a call must be in this one's slice of what all of them may send
//! ([`shared`](crate::shared)); how many calls at once it bears, each finds out for itself.
//!
//! Invariant: what is reserved is settled or given back, exactly once. Sans-IO.

use crate::{
    Limits,
    limits::Quota,
    shared::{Admission, Ask, Share, Slice},
    window::Window,
};
use std::time::Duration;
use tokio::time::Instant;

const MINUTE: Duration = Duration::from_secs(60);
/// How much fewer calls at once after an overload.
const DECREASE: f64 = 0.7;
/// Refusals in a row after which nobody is sent.
const REFUSED_IN_A_ROW: u32 = 3;
/// The longest wait that a refusal puts on others.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// How long headers are followed that are not said again.
const HEADERS_FOR: Duration = Duration::from_secs(60);
/// How many first tokens are looked at together, and how much slower their 90th percentile means overload.
const SAMPLES: usize = 64;
const SLOWER: u32 = 2;

const REQUESTS: usize = 0;
const TOKENS: usize = 1;

/// What is configured.
#[derive(Clone, Copy, Debug)]
pub struct Caps {
    /// Calls at once.
    pub outstanding: usize,
    /// Requests in any minute.
    pub requests_per_minute: Option<u64>,
    /// Tokens in any minute.
    pub tokens_per_minute: Option<u64>,
}

impl Caps {
    /// The limits of requests and of tokens.
    pub(crate) fn per_minute(self) -> [Option<u64>; 2] {
        [self.requests_per_minute, self.tokens_per_minute]
    }
}

/// Follows one limit of the provider's.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    level: f64,
    full: f64,
    per_second: f64,
    at: Instant,
}

impl Bucket {
    /// What is left, less what is under way: whether the provider counted that already is not known.
    fn of(Quota { limit, remaining, reset }: Quota, under_way: u64, now: Instant) -> Self {
        let full = limit.unwrap_or(remaining).max(remaining);
        let per_second = float(full - remaining) / reset.as_secs_f64().max(0.001);
        let level = float(remaining.saturating_sub(under_way));
        Self { level, full: float(full), per_second, at: now }
    }

    fn level(&self, now: Instant) -> f64 {
        (self.level + self.per_second * now.duration_since(self.at).as_secs_f64()).min(self.full)
    }

    /// When so much is there; a call that takes more than all of it waits for all of it.
    fn has_at(&self, amount: f64, now: Instant) -> Instant {
        let missing = amount.min(self.full) - self.level(now);
        match missing > 0.0 {
            true => {
                now + Duration::try_from_secs_f64(missing / self.per_second).unwrap_or(MINUTE).min(MINUTE)
            }
            false => now,
        }
    }

    fn take(&mut self, amount: f64, now: Instant) {
        (self.level, self.at) = (self.level(now) - amount, now);
    }
}

/// What a call reserved.
#[derive(Clone, Copy, Debug)]
pub struct Reserved {
    tokens: u64,
    at: Instant,
    /// The second of the slice that it came from.
    second: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub struct Throttle {
    caps: Caps,
    /// What was sent within the last minute.
    minute: Window<2>,
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    heard_at: Option<Instant>,
    under_way: (usize, u64),
    /// How many calls at once it was seen to bear.
    limit: f64,
    /// Only an overload of a call that was sent later lowers the limit again.
    lowered_at: Option<Instant>,
    refused: u32,
    paused_until: Option<Instant>,
    first_tokens: Vec<Duration>,
    usual_first_token: Option<Duration>,
    /// Where other processes send to the same endpoint.
    share: Option<Share>,
}

impl Throttle {
    /// A throttle that has seen nothing.
    pub fn new(caps: Caps) -> Self {
        Self {
            caps,
            minute: Window::new(MINUTE),
            requests: None,
            tokens: None,
            heard_at: None,
            under_way: (0, 0),
            limit: float_of(caps.outstanding),
            lowered_at: None,
            refused: 0,
            paused_until: None,
            first_tokens: Vec::new(),
            usual_first_token: None,
            share: None,
        }
    }

    /// The same where other processes send there too.
    pub(crate) fn shared(caps: Caps) -> Self {
        Self { share: Some(Share::new(caps)), ..Self::new(caps) }
    }

    /// What it shares with other processes.
    pub(crate) fn share(&self) -> Option<&Share> {
        self.share.as_ref()
    }

    /// What there is to ask of whoever keeps what is shared.
    pub(crate) fn ask(&mut self, now: Instant) -> Option<Ask> {
        let sent = self.minute.sums(now);
        self.share.as_mut()?.ask(self.caps, sent, now)
    }

    /// What came of it.
    pub(crate) fn answered(&mut self, ask: &Ask, answer: Option<&Slice>, asked_at: Instant, now: Instant) {
        let Some(share) = &mut self.share else { return };
        if let Some(pause) = share.answered(ask, answer, asked_at, now) {
            self.paused_until = self.paused_until.max(Some(now + pause.min(PAUSE_MAX)));
        }
    }

    /// How many requests and tokens may still be sent: the less of what is configured for a minute and what the provider said
    /// is left; absent where there is no limit.
    pub(crate) fn left(&mut self, now: Instant) -> [Option<f64>; 2] {
        let is_heard = self.heard_at.is_some_and(|heard| now.duration_since(heard) <= HEADERS_FOR);
        let (caps, sent) = (self.caps.per_minute(), self.minute.sums(now));
        let told = [self.requests, self.tokens].map(|bucket| bucket.filter(|_| is_heard));
        std::array::from_fn(|what| {
            let own = caps[what].map(|cap| float(cap.saturating_sub(sent[what])));
            let told = told[what].map(|bucket| bucket.level(now).floor().max(0.0));
            own.into_iter().chain(told).reduce(f64::min)
        })
    }

    /// How long nothing may be sent yet, as refusals asked for.
    pub(crate) fn paused(&self, now: Instant) -> Option<Duration> {
        self.paused_until.map(|until| until.saturating_duration_since(now)).filter(|left| !left.is_zero())
    }

    /// Calls at once that it was seen to bear.
    pub fn limit(&self) -> f64 {
        self.limit
    }

    /// Whether a call of so many tokens may be sent; if not, when that may change without any call ending.
    pub fn admits(&mut self, tokens: u64, now: Instant) -> Result<(), Option<Instant>> {
        if let Some(until) = self.paused_until.filter(|&until| now < until) {
            return Err(Some(until));
        }
        if float_of(self.under_way.0) + 1.0 > self.limit.max(1.0) {
            return Err(None);
        }
        // Of how many this one is, where nobody can be asked how much the others send.
        let (among, is_counted) = match self.share.as_mut().map(|share| share.admits(tokens, now)) {
            None => (1, false),
            Some(Admission::Yes) => (1, true),
            Some(Admission::No(until)) => return Err(until),
            Some(Admission::Alone(among)) => (among, false),
        };
        let [requests_sent, tokens_sent] = self.minute.sums(now);
        // A call that is larger than the whole limit goes alone.
        let over = |sent: u64, more: u64, cap: Option<u64>| {
            cap.is_some_and(|cap| sent > 0 && sent.saturating_add(more) > cap / among)
        };
        if is_counted {
            // By whoever keeps it for all.
        } else if over(requests_sent, 1, self.caps.requests_per_minute)
            || over(tokens_sent, tokens, self.caps.tokens_per_minute)
        {
            return Err(self.minute.changes_at());
        }
        if self.heard_at.is_some_and(|heard| now.duration_since(heard) > HEADERS_FOR) {
            (self.requests, self.tokens) = (None, None);
        }
        // Each of the others sends such a call too.
        let requests_at = self.requests.map(|bucket| bucket.has_at(float(among), now));
        let tokens_at = self.tokens.map(|bucket| bucket.has_at(float(tokens.saturating_mul(among)), now));
        match requests_at.max(tokens_at).filter(|&at| at > now) {
            Some(at) => Err(Some(at)),
            None => Ok(()),
        }
    }

    /// A call of so many tokens is sent.
    pub fn reserve(&mut self, tokens: u64, now: Instant) -> Reserved {
        self.minute.add(REQUESTS, 1, now);
        self.minute.add(TOKENS, tokens, now);
        for (bucket, amount) in [(&mut self.requests, 1), (&mut self.tokens, tokens)] {
            if let Some(bucket) = bucket {
                bucket.take(float(amount), now);
            }
        }
        self.under_way = (self.under_way.0 + 1, self.under_way.1.saturating_add(tokens));
        let second = self.share.as_mut().and_then(|share| share.reserve(tokens));
        Reserved { tokens, at: now, second }
    }

    /// It ended and took so many; all that it reserved where nobody says.
    pub fn settle(&mut self, reserved: Reserved, used: Option<u64>, now: Instant) {
        self.release(reserved);
        let used = used.unwrap_or(reserved.tokens);
        let (less, more) = (reserved.tokens.saturating_sub(used), used.saturating_sub(reserved.tokens));
        self.minute.take_back(TOKENS, less, reserved.at);
        self.minute.add(TOKENS, more, now);
        if let Some(share) = &mut self.share {
            share.sent_beyond([0, more]);
            reserved.second.into_iter().for_each(|second| share.give_back(second, [0, less]));
        }
        if let Some(bucket) = &mut self.tokens {
            bucket.take(float(more) - float(less), now);
        }
    }

    /// It was not sent after all.
    pub fn give_back(&mut self, reserved: Reserved, now: Instant) {
        self.minute.take_back(REQUESTS, 1, reserved.at);
        if let Some(bucket) = &mut self.requests {
            bucket.take(-1.0, now);
        }
        if let (Some(share), Some(second)) = (&mut self.share, reserved.second) {
            share.give_back(second, [1, 0]);
        }
        self.settle(reserved, Some(0), now);
    }

    fn release(&mut self, reserved: Reserved) {
        let (calls, tokens) = self.under_way;
        self.under_way = (calls.saturating_sub(1), tokens.saturating_sub(reserved.tokens));
    }

    /// The provider said what is left.
    pub fn heard(&mut self, limits: &Limits, now: Instant) {
        // The call that tells of it is under way and counted by the provider.
        let (calls, tokens) = self.under_way;
        let calls = u64::try_from(calls.saturating_sub(1)).unwrap_or(u64::MAX);
        self.requests = limits.requests.map(|quota| Bucket::of(quota, calls, now)).or(self.requests);
        self.tokens = limits.tokens.map(|quota| Bucket::of(quota, tokens, now)).or(self.tokens);
        self.heard_at = Some(now);
        if let Some(share) = &mut self.share {
            share.heard(limits);
        }
    }

    /// A call succeeded. `ttft` where its first token was timed.
    pub fn succeeded(&mut self, reserved: Reserved, ttft: Option<Duration>, now: Instant) {
        self.refused = 0;
        self.limit = (self.limit + 1.0 / self.limit.max(1.0)).min(float_of(self.caps.outstanding));
        self.first_tokens.extend(ttft);
        if self.first_tokens.len() >= SAMPLES {
            self.first_tokens.sort_unstable();
            let slow = self.first_tokens[SAMPLES * 9 / 10];
            self.first_tokens.clear();
            match self.usual_first_token {
                Some(usual) if slow > usual * SLOWER => self.lower(reserved.at, now),
                usual => self.usual_first_token = Some(usual.map_or(slow, |usual| (usual * 9 + slow) / 10)),
            }
        }
    }

    /// A call was refused for overload, with the wait that was asked for.
    pub fn refused(&mut self, reserved: Reserved, wait: Option<Duration>, now: Instant) {
        self.refused = self.refused.saturating_add(1);
        match wait {
            Some(wait) if self.refused >= REFUSED_IN_A_ROW => {
                let wait = wait.min(PAUSE_MAX);
                self.paused_until = self.paused_until.max(Some(now + wait));
                self.share.iter_mut().for_each(|share| share.paused(wait));
            }
            Some(_) => {}
            None if self.requests.or(self.tokens).is_some() => {}
            None => self.lower(reserved.at, now),
        }
    }

    fn lower(&mut self, sent: Instant, now: Instant) {
        if self.lowered_at.is_none_or(|lowered| sent > lowered) {
            self.limit = (self.limit * DECREASE).max(1.0);
            self.lowered_at = Some(now);
        }
    }
}

/// Counts stay far below 2⁵³, beyond which a double would round them.
fn float(count: u64) -> f64 {
    count as f64
}

fn float_of(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPS: Caps = Caps { outstanding: 1_000, requests_per_minute: None, tokens_per_minute: None };

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Sends calls of so many tokens until it refuses; gives how many went, and when to ask again.
    fn burst(throttle: &mut Throttle, tokens: u64, now: Instant) -> (Vec<Reserved>, Option<Duration>) {
        let mut sent = Vec::new();
        loop {
            match throttle.admits(tokens, now) {
                Ok(()) => sent.push(throttle.reserve(tokens, now)),
                Err(until) => return (sent, until.map(|until| until - now)),
            }
        }
    }

    #[test]
    fn configured_limits_hold_for_any_minute() {
        let now = Instant::now();
        let mut throttle = Throttle::new(Caps { requests_per_minute: Some(60), ..CAPS });
        let (sent, again) = burst(&mut throttle, 10, now);
        assert_eq!((sent.len(), again), (60, Some(s(62))));
        assert_eq!(burst(&mut throttle, 10, now + s(61)).0.len(), 0);
        assert_eq!(burst(&mut throttle, 10, now + s(62)).0.len(), 60);
    }

    #[test]
    fn tokens_are_reserved_and_settled() {
        let now = Instant::now();
        let mut throttle = Throttle::new(Caps { tokens_per_minute: Some(1_000), ..CAPS });
        let (sent, _) = burst(&mut throttle, 300, now);
        assert_eq!(sent.len(), 3);
        sent.into_iter().for_each(|reserved| throttle.settle(reserved, Some(100), now));
        let (mut sent, _) = burst(&mut throttle, 300, now);
        assert_eq!(sent.len(), 2, "300 are used");
        throttle.give_back(sent.remove(0), now);
        assert_eq!(burst(&mut throttle, 300, now).0.len(), 1);
        let mut small = Throttle::new(Caps { tokens_per_minute: Some(1_000), ..CAPS });
        assert_eq!(burst(&mut small, 5_000, now).0.len(), 1, "what is larger than all goes alone");
    }

    #[test]
    fn the_providers_bucket_is_followed() {
        let (now, mut throttle) = (Instant::now(), Throttle::new(CAPS));
        let first = throttle.reserve(10, now);
        let quota = |remaining, reset| Some(Quota { limit: Some(60), remaining, reset });
        throttle.heard(&Limits { requests: quota(5, s(55)), tokens: None }, now);
        throttle.settle(first, None, now);
        let (sent, again) = burst(&mut throttle, 10, now);
        assert_eq!((sent.len(), again), (5, Some(s(1))));
        assert_eq!(burst(&mut throttle, 10, now + s(3)).0.len(), 3, "one a second comes back");
        throttle.heard(&Limits { requests: quota(20, s(40)), tokens: None }, now + s(3));
        assert_eq!(burst(&mut throttle, 10, now + s(3)).0.len(), 13, "seven may not be counted yet");
        assert_eq!(burst(&mut throttle, 10, now + s(64)).0.len(), 979, "old headers are forgotten");
    }

    #[test]
    fn without_headers_the_limit_is_found() {
        let (now, mut throttle) = (Instant::now(), Throttle::new(Caps { outstanding: 100, ..CAPS }));
        let (sent, again) = burst(&mut throttle, 1, now);
        assert_eq!((sent.len(), again), (100, None));
        for reserved in sent {
            throttle.refused(reserved, None, now);
            throttle.settle(reserved, None, now);
        }
        assert_eq!(burst(&mut throttle, 1, now).0.len(), 70, "lowered once for all that were under way");
        let mut throttle = Throttle { limit: 10.0, ..Throttle::new(CAPS) };
        let one = throttle.reserve(1, now);
        (0..10).for_each(|_| throttle.succeeded(one, None, now));
        assert!((10.9..11.0).contains(&throttle.limit()), "{}", throttle.limit());
    }

    #[test]
    fn slow_first_tokens_are_an_overload() {
        let (now, mut throttle) = (Instant::now(), Throttle::new(CAPS));
        let one = throttle.reserve(1, now);
        (0..128).for_each(|_| throttle.succeeded(one, Some(s(1)), now));
        assert_eq!(throttle.limit(), 1_000.0);
        (0..64).for_each(|_| throttle.succeeded(one, Some(s(3)), now));
        assert_eq!(throttle.limit(), 700.0);
    }

    #[test]
    fn one_refusal_that_names_a_wait_holds_nobody_else_up_and_three_hold_all() {
        let (now, mut throttle) = (Instant::now(), Throttle::new(CAPS));
        let one = throttle.reserve(1, now);
        throttle.refused(one, Some(s(3)), now);
        throttle.refused(one, Some(s(3)), now);
        assert_eq!(throttle.admits(1, now), Ok(()));
        throttle.succeeded(one, None, now);
        (0..3).for_each(|_| throttle.refused(one, Some(s(3)), now));
        assert_eq!(throttle.admits(1, now), Err(Some(now + s(3))));
        assert_eq!(throttle.admits(1, now + s(3)), Ok(()));
        assert_eq!(throttle.limit(), 1_000.0);
    }

    #[test]
    fn it_says_what_is_left_of_a_minute_and_how_long_nothing_is_sent() {
        let caps = Caps { requests_per_minute: Some(10), tokens_per_minute: Some(1_000), ..CAPS };
        let (now, mut throttle) = (Instant::now(), Throttle::new(caps));
        let sent: Vec<_> = (0..3).map(|_| throttle.reserve(100, now)).collect();
        assert_eq!(throttle.left(now), [Some(7.0), Some(700.0)]);
        let quota = Quota { limit: Some(60), remaining: 4, reset: s(56) };
        throttle.heard(&Limits { requests: Some(quota), tokens: None }, now);
        assert_eq!(
            throttle.left(now),
            [Some(2.0), Some(700.0)],
            "two may not be counted by the provider yet"
        );
        assert_eq!(throttle.left(now + s(3)), [Some(5.0), Some(700.0)]);
        assert_eq!(throttle.left(now + s(63)), [Some(10.0), Some(1_000.0)], "old headers are not told");
        assert_eq!(Throttle::new(CAPS).left(now), [None, None]);
        assert_eq!(throttle.paused(now), None);
        sent.into_iter().for_each(|one| throttle.refused(one, Some(s(3)), now));
        assert_eq!((throttle.paused(now + s(1)), throttle.paused(now + s(3))), (Some(s(2)), None));
    }
}
