//! Rate limits: for each key a bucket of requests and one of tokens, which fill up again over a minute.
//!
//! A call takes one request, and its prompt's tokens with those that it may write. It is let in where both buckets have that
//! much, and takes nothing otherwise.
//!
//! Sans-IO: the time comes in.

use crate::dice::whole;
use hyper::{
    HeaderMap,
    header::{HeaderName, HeaderValue},
};
use std::{collections::HashMap, time::Duration};

/// The most keys that have buckets of their own; those beyond share some.
const KEYS_MAX: usize = 10_000;

/// What may pass in a minute; none for no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PerMinute {
    /// Requests.
    pub requests: Option<u32>,
    /// Tokens.
    pub tokens: Option<u32>,
}

/// The buckets of an endpoint.
#[derive(Debug, Default)]
pub struct Limits(HashMap<u64, [Bucket; 2]>);

#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    /// What has been taken and is not back yet.
    taken: f64,
    at_us: u64,
}

/// What a bucket says of itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct State {
    /// What it holds when full.
    pub limit: u32,
    /// What it holds.
    pub remaining: u32,
    /// Until it is full.
    pub reset: Duration,
}

/// Whether a call may pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// How long to wait, for one that may not.
    pub wait: Option<Duration>,
    /// The bucket of requests, where they are limited.
    pub requests: Option<State>,
    /// The bucket of tokens, where they are limited.
    pub tokens: Option<State>,
}

impl Bucket {
    fn fill(&mut self, now_us: u64, limit: u32) {
        let elapsed_s = now_us.saturating_sub(self.at_us) as f64 / 1e6;
        self.taken = (self.taken - elapsed_s * f64::from(limit) / 60.0).max(0.0);
        self.at_us = now_us;
    }

    /// How long until so much is there. What is more than the bucket holds waits until it is full.
    fn wait(&self, wanted: u32, limit: u32) -> Duration {
        let missing = self.taken + f64::from(wanted.min(limit)) - f64::from(limit);
        crate::spread::seconds((missing * 60.0 / f64::from(limit.max(1))).max(0.0))
    }

    fn state(&self, limit: u32) -> State {
        let remaining = u32::try_from(whole(f64::from(limit) - self.taken)).unwrap_or(u32::MAX);
        State { limit, remaining, reset: self.wait(limit, limit) }
    }
}

impl Limits {
    /// Lets a call of so many tokens in, or not.
    pub fn admit(&mut self, now_us: u64, key: u64, tokens: u32, per_minute: PerMinute) -> Verdict {
        if per_minute == PerMinute::default() {
            return Verdict { wait: None, requests: None, tokens: None };
        }
        let key = if self.0.len() < KEYS_MAX || self.0.contains_key(&key) { key } else { 0 };
        let buckets = self.0.entry(key).or_default();
        let wanted = [(per_minute.requests, 1), (per_minute.tokens, tokens)];
        let mut wait = Duration::ZERO;
        for (bucket, (limit, wanted)) in buckets.iter_mut().zip(wanted) {
            let Some(limit) = limit else { continue };
            bucket.fill(now_us, limit);
            wait = wait.max(bucket.wait(wanted, limit));
        }
        if wait.is_zero() {
            for (bucket, (_, wanted)) in buckets.iter_mut().zip(wanted) {
                bucket.taken += f64::from(wanted);
            }
        }
        let [requests, tokens] = buckets;
        Verdict {
            wait: (!wait.is_zero()).then_some(wait),
            requests: per_minute.requests.map(|limit| requests.state(limit)),
            tokens: per_minute.tokens.map(|limit| tokens.state(limit)),
        }
    }
}

/// How providers tell their limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `x-ratelimit-remaining-requests`, and times like `6m0s` or `12ms`.
    OpenAi,
    /// `anthropic-ratelimit-requests-remaining`, and times of day.
    Anthropic,
}

impl Verdict {
    /// The headers that tell it.
    pub fn headers(&self, form: Form, now: std::time::SystemTime, headers: &mut HeaderMap) {
        for (kind, state) in [("requests", self.requests), ("tokens", self.tokens)] {
            let Some(State { limit, remaining, reset }) = state else { continue };
            let reset = match form {
                Form::OpenAi => go_duration(reset),
                Form::Anthropic => humantime::format_rfc3339_seconds(now + reset).to_string(),
            };
            for (what, value) in
                [("limit", limit.to_string()), ("remaining", remaining.to_string()), ("reset", reset)]
            {
                let name = match form {
                    Form::OpenAi => format!("x-ratelimit-{what}-{kind}"),
                    Form::Anthropic => format!("anthropic-ratelimit-{kind}-{what}"),
                };
                if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::try_from(value)) {
                    headers.insert(name, value);
                }
            }
        }
    }
}

/// A duration as Go prints it, which OpenAI's headers do: `1h0m0s`, `6m0s`, `1.5s`, `12ms`.
fn go_duration(duration: Duration) -> String {
    let (seconds, ms) = (duration.as_secs(), duration.subsec_millis());
    let fraction = match ms {
        0 => String::new(),
        ms => format!(".{ms:03}").trim_end_matches('0').to_owned(),
    };
    let (hours, minutes, rest) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes, rest) {
        (0, 0, 0) if ms == 0 => "0s".to_owned(),
        (0, 0, 0) => format!("{ms}ms"),
        (0, 0, _) => format!("{rest}{fraction}s"),
        (0, ..) => format!("{minutes}m{rest}{fraction}s"),
        _ => format!("{hours}h{minutes}m{rest}{fraction}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000;

    #[test]
    fn a_bucket_lets_through_what_it_holds_and_fills_up_over_a_minute() {
        let mut limits = Limits::default();
        let two = PerMinute { requests: Some(2), tokens: None };
        let mut admit =
            |at_s: u64, key| limits.admit(at_s * S, key, 100, two).wait.map(|wait| wait.as_secs());
        assert_eq!([admit(0, 1), admit(0, 1), admit(0, 1)], [None, None, Some(30)]);
        assert_eq!(admit(0, 2), None, "another key has its own");
        assert_eq!(admit(29, 1), Some(1));
        assert_eq!([admit(30, 1), admit(30, 1)], [None, Some(30)]);
        assert_eq!(
            [admit(600, 1), admit(600, 1), admit(600, 1)],
            [None, None, Some(30)],
            "never more than full"
        );
    }

    #[test]
    fn tokens_are_limited_too_and_a_refused_call_takes_nothing() {
        let mut limits = Limits::default();
        let both = PerMinute { requests: Some(100), tokens: Some(600) };
        let verdict = limits.admit(0, 1, 500, both);
        assert_eq!(verdict.wait, None);
        assert_eq!(
            verdict.tokens,
            Some(State { limit: 600, remaining: 100, reset: Duration::from_secs(50) })
        );
        let refused = limits.admit(0, 1, 200, both);
        assert_eq!(refused.wait, Some(Duration::from_secs(10)));
        assert_eq!(refused.requests.unwrap().remaining, 99);
        assert_eq!(limits.admit(0, 1, 100, both).wait, None);
        assert_eq!(
            limits.admit(60 * S, 1, 10_000, both).wait,
            None,
            "a call beyond the limit passes by a full bucket"
        );
        assert_eq!(limits.admit(60 * S, 1, 1, PerMinute::default()).requests, None);
    }

    #[test]
    fn limits_are_told_in_the_form_of_the_provider() {
        let mut limits = Limits::default();
        let verdict = limits.admit(0, 1, 60, PerMinute { requests: Some(60), tokens: Some(60) });
        let told = |form| {
            let mut headers = HeaderMap::new();
            verdict.headers(form, std::time::UNIX_EPOCH, &mut headers);
            let mut told: Vec<_> =
                headers.iter().map(|(name, value)| format!("{name}={}", value.to_str().unwrap())).collect();
            told.sort();
            told
        };
        let openai = told(Form::OpenAi);
        assert!(openai.contains(&"x-ratelimit-remaining-requests=59".to_owned()), "{openai:?}");
        assert!(openai.contains(&"x-ratelimit-reset-requests=1s".to_owned()), "{openai:?}");
        assert!(openai.contains(&"x-ratelimit-reset-tokens=1m0s".to_owned()), "{openai:?}");
        let anthropic = told(Form::Anthropic);
        assert!(
            anthropic.contains(&"anthropic-ratelimit-tokens-reset=1970-01-01T00:01:00Z".to_owned()),
            "{anthropic:?}"
        );
        assert!(anthropic.contains(&"anthropic-ratelimit-requests-limit=60".to_owned()), "{anthropic:?}");
        let shown: Vec<_> =
            [0, 12, 1_500, 360_000, 3_600_000].map(|ms| go_duration(Duration::from_millis(ms))).into();
        assert_eq!(shown, ["0s", "12ms", "1.5s", "6m0s", "1h0m0s"]);
    }
}
