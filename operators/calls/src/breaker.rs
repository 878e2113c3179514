//! A circuit breaker: stops calling what does not work, looks now and then, and comes back gently.
//!
//! *Closed*, calls go; at half of at least ten failing within 30 s, or five connections in a row that do not stand, it
//! *opens*. After 5 s, doubled each time it opens again, it is *half-open*: one probe at a time, and three that succeed
//! close it. Then a tenth of the usual calls go and more each second, until after 30 s all do, as caches are cold and
//! connections must be made. (Nygard, "Release It!"; the rule by share of failures is resilience4j's, the growing time
//! and the ramp are Envoy's outlier ejection and slow start.)
//!
//! Invariant: only what says something of the endpoint counts. A caller's 400s, a rate limit and a lost hedge open
//! nothing and close nothing. Sans-IO: moments come by argument.

use crate::{Health, retry::Jitter, window::Window};
use std::time::Duration;
use tokio::time::Instant;

/// The time over which failures are counted, and the least and the share of them that open it.
const OVER: Duration = Duration::from_secs(30);
const CALLS_MIN: u64 = 10;
const FAILED_PERCENT: u64 = 50;
/// Connections in a row that could not be made.
const UNREACHABLE_MAX: u32 = 5;
/// How long it is open for the first time, and at most; a fifth more or less, so that many do not come back at once.
const OPEN_MIN: Duration = Duration::from_secs(5);
const OPEN_MAX: Duration = Duration::from_secs(60);
const SPREAD: f64 = 0.2;
/// Probes that must succeed one after the other.
const PROBES: u32 = 3;
/// The part of its calls that an endpoint gets when it comes back, and how long until it gets all.
const RAMP_FROM: f64 = 0.1;
const RAMP_OVER: Duration = Duration::from_secs(30);

const CALLS: usize = 0;
const FAILED: usize = 1;

/// What it lets pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Passage {
    /// This part of what is usual, from 0.1 to 1.
    Part(f64),
    /// One call, as a probe.
    Probe,
    /// Nothing, before this moment, or before the probe that is under way ends.
    Nothing(Option<Instant>),
}

#[derive(Debug)]
enum State {
    Closed,
    Open { until: Instant },
    HalfOpen { is_probing: bool, succeeded: u32 },
}

/// A breaker before one model at one endpoint.
pub struct Breaker {
    state: State,
    window: Window<2>,
    unreachable: u32,
    /// How often it opened without having been closed for a whole ramp between.
    opened: u32,
    /// Since when calls ramp up.
    ramp_since: Option<Instant>,
    jitter: Jitter,
}

impl Breaker {
    /// A closed one.
    pub fn new(jitter: Jitter) -> Self {
        let window = Window::new(OVER);
        Self { state: State::Closed, window, unreachable: 0, opened: 0, ramp_since: None, jitter }
    }

    /// What may pass now. Asking changes nothing.
    pub fn passage(&self, now: Instant) -> Passage {
        match self.state {
            State::Open { until } if now < until => Passage::Nothing(Some(until)),
            State::HalfOpen { is_probing: true, .. } => Passage::Nothing(None),
            State::Open { .. } | State::HalfOpen { .. } => Passage::Probe,
            State::Closed => Passage::Part(match self.ramp_since {
                Some(since) => {
                    let risen = now.duration_since(since).div_duration_f64(RAMP_OVER);
                    (RAMP_FROM + (1.0 - RAMP_FROM) * risen).min(1.0)
                }
                None => 1.0,
            }),
        }
    }

    /// A call is sent. Whether it is a probe, which must be told in the end.
    pub fn sent(&mut self, now: Instant) -> bool {
        match &mut self.state {
            State::Open { until } if now >= *until => {
                self.state = State::HalfOpen { is_probing: true, succeeded: 0 };
                true
            }
            State::HalfOpen { is_probing, .. } => !std::mem::replace(is_probing, true),
            State::Closed | State::Open { .. } => false,
        }
    }

    /// A call ended, or was given up: then nothing is known.
    pub fn ended(&mut self, health: Health, is_probe: bool, now: Instant) {
        self.unreachable = match health {
            Health::Unreachable => self.unreachable.saturating_add(1),
            Health::Unknown => self.unreachable,
            Health::Good | Health::Failed => 0,
        };
        let has_failed = matches!(health, Health::Failed | Health::Unreachable);
        match &mut self.state {
            State::Closed if health != Health::Unknown => {
                self.window.add(CALLS, 1, now);
                self.window.add(FAILED, u64::from(has_failed), now);
                let [calls, failed] = self.window.sums(now);
                let too_many = calls >= CALLS_MIN && failed * 100 >= calls * FAILED_PERCENT;
                if has_failed && (too_many || self.unreachable >= UNREACHABLE_MAX) {
                    self.open(now);
                }
            }
            State::HalfOpen { is_probing, succeeded } if is_probe => {
                *is_probing = false;
                *succeeded += u32::from(health == Health::Good);
                if has_failed {
                    self.open(now);
                } else if *succeeded >= PROBES {
                    self.state = State::Closed;
                    self.ramp(now);
                }
            }
            // What was sent before it opened says nothing new.
            State::Closed | State::Open { .. } | State::HalfOpen { .. } => {}
        }
    }

    /// Whether it is closed and lets all pass.
    pub fn is_closed(&self, now: Instant) -> bool {
        self.passage(now) == Passage::Part(1.0)
    }

    /// Its name for people: `closed`, `ramp`, `open`, `half_open`.
    pub fn state(&self, now: Instant) -> &'static str {
        match self.state {
            State::Closed if self.is_closed(now) => "closed",
            State::Closed => "ramp",
            State::Open { .. } => "open",
            State::HalfOpen { .. } => "half_open",
        }
    }

    /// Calls ramp up from now on.
    pub fn ramp(&mut self, now: Instant) {
        self.ramp_since = Some(now);
        self.window.clear();
        self.unreachable = 0;
    }

    fn open(&mut self, now: Instant) {
        let was_whole = self.ramp_since.is_none_or(|since| now.duration_since(since) >= RAMP_OVER);
        if was_whole && matches!(self.state, State::Closed) {
            self.opened = 0;
        }
        let open = OPEN_MIN.saturating_mul(2u32.saturating_pow(self.opened)).min(OPEN_MAX);
        let spread = 1.0 + SPREAD * (2.0 * (self.jitter)().clamp(0.0, 1.0) - 1.0);
        self.state = State::Open { until: now + open.mul_f64(spread) };
        self.opened = self.opened.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// Runs a script on a breaker without jitter: `ok`, `bad`, `gone`, `400` are ends of calls that it let pass, `+7` lets
    /// seven seconds go by; each may be repeated, as in `bad*9`. Gives what the breaker says in the end.
    fn check(script: &str, expected: &str) {
        let mut now = Instant::now();
        let mut breaker = Breaker::new(Arc::new(|| 0.5));
        for word in script.split_whitespace() {
            let (word, times) = word.split_once('*').map_or((word, 1), |(w, n)| (w, n.parse().unwrap()));
            for _ in 0..times {
                if let Some(seconds) = word.strip_prefix('+') {
                    now += Duration::from_secs(seconds.parse().unwrap());
                    continue;
                }
                if matches!(breaker.passage(now), Passage::Nothing(_)) {
                    continue;
                }
                let is_probe = breaker.sent(now);
                let health = match word {
                    "ok" => Health::Good,
                    "bad" => Health::Failed,
                    "gone" => Health::Unreachable,
                    "400" => Health::Unknown,
                    word => panic!("{word}"),
                };
                breaker.ended(health, is_probe, now);
            }
        }
        let seen = match breaker.passage(now) {
            Passage::Part(part) => format!("{:.0}%", part * 100.0),
            Passage::Probe => "probe".to_owned(),
            Passage::Nothing(Some(until)) => format!("open for {} s", (until - now).as_secs()),
            Passage::Nothing(None) => "waits for its probe".to_owned(),
        };
        assert_eq!(seen, expected, "{script}");
    }

    #[test]
    fn half_of_ten_failing_opens_it() {
        check("bad*9", "100%");
        check("bad*10", "open for 5 s");
        check("ok*6 bad*5", "100%");
        check("ok*5 bad*5", "open for 5 s");
        check("ok*5 bad*4 +32 bad", "100%");
    }

    #[test]
    fn five_connections_in_a_row_that_do_not_stand_open_it() {
        check("gone*4", "100%");
        check("gone*5", "open for 5 s");
        check("gone*4 ok gone*4", "100%");
        check("gone*4 400 gone", "open for 5 s");
    }

    #[test]
    fn callers_errors_open_nothing() {
        check("400*12", "100%");
        check("400*1000 ok", "100%");
        check("bad*10 +5 400*9", "probe");
    }

    #[test]
    fn three_probes_close_it_and_one_opens_it_for_longer() {
        check("bad*10 +4", "open for 1 s");
        check("bad*10 +5", "probe");
        check("bad*10 +5 ok*2", "probe");
        check("bad*10 +5 ok*3", "10%");
        check("bad*10 +5 ok*2 bad", "open for 10 s");
        check("gone*5 +5 gone +10 gone", "open for 20 s");
        check("gone*5 +5 gone +10 gone +20 gone +40 gone +60 gone", "open for 60 s");
    }

    #[test]
    fn it_comes_back_gently() {
        check("bad*10 +5 ok*3 +10", "40%");
        check("bad*10 +5 ok*3 +30", "100%");
        check("bad*10 +5 ok*3 +10 gone*5", "open for 10 s");
        check("bad*10 +5 ok*3 +31 gone*5", "open for 5 s");
    }

    #[test]
    fn only_one_probe_is_under_way_and_one_given_up_makes_room() {
        let (now, mut breaker) = (Instant::now(), Breaker::new(Arc::new(|| 1.0)));
        (0..5).for_each(|_| breaker.ended(Health::Unreachable, false, now));
        assert_eq!(breaker.passage(now), Passage::Nothing(Some(now + Duration::from_secs(6))), "with jitter");
        let now = now + Duration::from_secs(6);
        assert!(breaker.sent(now));
        assert_eq!(breaker.passage(now), Passage::Nothing(None));
        breaker.ended(Health::Failed, false, now);
        assert_eq!(breaker.passage(now), Passage::Nothing(None), "an older call says nothing");
        breaker.ended(Health::Unknown, true, now);
        assert_eq!(breaker.passage(now), Passage::Probe);
    }
}
