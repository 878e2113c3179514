//! What goes wrong with a call, and for which.
//!
//! Invariant: a call's fate follows from the seed, from the call's id (or its body, where it has none) and from the number of
//! its try, so a run can be repeated, and a second try may fare better than the first.

use crate::{dice::Dice, settings::Settings, spread::seconds};
use hyper::HeaderMap;
use std::time::Duration;

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A refusal with this status.
    Status(u16),
    /// 400, since the account has used up what it may.
    UsageLimit,
    /// 400, since the prompt is too long.
    ContextLength,
    /// The connection is reset before an answer.
    Reset,
    /// Nothing comes for a while, then the answer.
    Stall,
    /// The answer stops in the middle for a while, then goes on.
    StallMid,
    /// The connection ends in the middle of the answer.
    Cut,
    /// The answer is broken JSON.
    Malformed,
    /// The answer is well formed and without text.
    Empty,
    /// 200 with no body.
    Blank,
}

/// All faults by their names, with what they do.
pub const FAULTS: &[(&str, Fault, &str)] = &[
    ("status_400", Fault::Status(400), "400, the caller's fault"),
    ("status_401", Fault::Status(401), "401"),
    ("status_403", Fault::Status(403), "403"),
    ("status_404", Fault::Status(404), "404"),
    ("status_408", Fault::Status(408), "408"),
    ("status_413", Fault::Status(413), "413"),
    ("status_422", Fault::Status(422), "422"),
    ("status_429", Fault::Status(429), "429 with fault.retry_after"),
    ("status_500", Fault::Status(500), "500"),
    ("status_502", Fault::Status(502), "502"),
    ("status_503", Fault::Status(503), "503"),
    ("status_504", Fault::Status(504), "504"),
    ("status_529", Fault::Status(529), "529, overloaded, as Anthropic says it"),
    ("usage_limit", Fault::UsageLimit, "400 that says that a usage limit is reached"),
    ("context_length", Fault::ContextLength, "400 that says that the prompt is too long"),
    ("reset", Fault::Reset, "the connection is reset before an answer"),
    ("stall", Fault::Stall, "silence for fault.stall before the answer"),
    ("stall_mid", Fault::StallMid, "silence for fault.stall in the middle of the answer"),
    ("cut", Fault::Cut, "the connection ends in the middle of the answer"),
    ("malformed", Fault::Malformed, "200 with broken JSON"),
    ("empty", Fault::Empty, "200, well formed, without text"),
    ("blank", Fault::Blank, "200 with no body"),
];

impl Fault {
    /// Its name; a status that no setting can name has its number.
    pub fn name(self) -> String {
        let known = FAULTS.iter().find(|(_, fault, _)| *fault == self).map(|(name, ..)| (*name).to_owned());
        match (known, self) {
            (Some(name), _) => name,
            (None, Self::Status(status)) => format!("status_{status}"),
            (None, other) => format!("{other:?}"),
        }
    }
}

/// How a refusal says when to come back.
#[derive(Clone, Debug, PartialEq)]
pub enum RetryAfter {
    /// Not at all.
    Nothing,
    /// `retry-after` in seconds, rounded up.
    Seconds(Duration),
    /// `retry-after` as a date.
    Date(Duration),
    /// `retry-after-ms`.
    Millis(Duration),
    /// `retry-after`, word for word.
    Given(String),
}

/// What becomes of a call.
#[derive(Clone, Debug)]
pub struct Fate {
    /// What goes wrong.
    pub fault: Option<Fault>,
    /// What a refusal says.
    pub retry_after: RetryAfter,
    /// The latency that the caller asked for.
    pub latency: Option<Duration>,
    /// The length of the answer that the caller asked for.
    pub tokens: Option<u32>,
    /// Where in the answer it goes wrong, as a part of it.
    pub place: f64,
    /// For all else of this call that varies.
    pub dice: Dice,
}

impl Fate {
    /// The fate of a try (the first is 0) of the call that `identity` names. What its headers ask for goes first; a header
    /// that asks for what nobody knows is an error.
    pub fn of(
        settings: &Settings,
        identity: &[u8],
        attempt: u32,
        headers: &HeaderMap,
    ) -> Result<Self, String> {
        let mut dice = Dice::of(settings.seed, &[b"fate", identity, &attempt.to_le_bytes()]);
        let (chance, place) = (dice.unit(), dice.unit());
        let mut fate = Self {
            fault: None,
            retry_after: settings.retry_after.clone(),
            latency: None,
            tokens: None,
            place,
            dice,
        };
        if settings.faulty_attempts.is_none_or(|attempts| attempt < attempts) {
            let mut sum = 0.0;
            fate.fault = FAULTS.iter().zip(&settings.faults).find_map(|((_, fault, _), share)| {
                sum += share;
                (chance < sum).then_some(*fault)
            });
        }
        for (name, value) in headers {
            if let Some(what) = name.as_str().strip_prefix("x-simulate-") {
                let value = value.to_str().map_err(|_| format!("header {name} is no text"))?.trim();
                fate.obey(what, value).map_err(|wanted| format!("header {name} is {value:?}; {wanted}"))?;
            }
        }
        Ok(fate)
    }

    fn obey(&mut self, what: &str, value: &str) -> Result<(), String> {
        match what {
            "status" => {
                let status = value.parse().ok().filter(|status| (400..600).contains(status));
                self.fault = Some(Fault::Status(status.ok_or("it may be 400 to 599")?));
            }
            "fault" => {
                let name = value.replace('-', "_");
                self.fault = match name.as_str() {
                    "none" => None,
                    name => {
                        let found = FAULTS.iter().find(|(known, ..)| *known == name);
                        let names = || FAULTS.iter().map(|(name, ..)| *name).collect::<Vec<_>>().join(", ");
                        Some(found.ok_or_else(|| format!("it may be none, {}", names()))?.1)
                    }
                };
            }
            "latency-ms" => {
                let ms = value.parse::<f64>().ok().filter(|ms| (0.0..=86_400_000.0).contains(ms));
                self.latency = Some(seconds(ms.ok_or("it may be 0 to 86400000")? / 1_000.0));
            }
            "tokens" => {
                let tokens = value.parse().ok().filter(|tokens| *tokens <= crate::settings::TOKENS_MAX);
                self.tokens =
                    Some(tokens.ok_or_else(|| format!("it may be 0 to {}", crate::settings::TOKENS_MAX))?);
            }
            "retry-after" => self.retry_after = RetryAfter::Given(value.to_owned()),
            "retry-after-ms" => {
                let ms = value.parse().map_err(|_| "it is a number of milliseconds")?;
                self.retry_after = RetryAfter::Millis(Duration::from_millis(ms));
            }
            _ => {
                return Err("known are x-simulate-latency-ms, -status, -fault, -retry-after, -retry-after-ms and -tokens".to_owned());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Settings {
        let pairs = pairs.iter().map(|(path, value)| ((*path).to_owned(), (*value).to_owned()));
        Settings::default().with(pairs).unwrap()
    }

    fn fates(settings: &Settings, calls: u32, attempt: u32) -> Vec<Option<Fault>> {
        let fate =
            |call: u32| Fate::of(settings, &call.to_le_bytes(), attempt, &HeaderMap::new()).unwrap().fault;
        (0..calls).map(fate).collect()
    }

    #[test]
    fn faults_come_as_often_as_was_asked_and_the_same_call_fares_the_same() {
        let settings = settings(&[("faults.status_503", "10%"), ("faults.cut", "0.05")]);
        let first = fates(&settings, 10_000, 0);
        assert_eq!(first, fates(&settings, 10_000, 0));
        let count = |wanted: Option<Fault>| first.iter().filter(|fault| **fault == wanted).count();
        let (refused, cut) = (count(Some(Fault::Status(503))), count(Some(Fault::Cut)));
        assert!((900..1_100).contains(&refused) && (430..570).contains(&cut), "{refused} {cut}");
        assert_eq!(count(None), 10_000 - refused - cut);
        assert_ne!(first, fates(&settings, 10_000, 1), "a second try has its own fate");
    }

    #[test]
    fn faults_may_be_kept_to_the_first_tries() {
        let settings = settings(&[("faults.reset", "1"), ("fault.attempts", "1")]);
        assert_eq!(fates(&settings, 2, 0), [Some(Fault::Reset); 2]);
        assert_eq!(fates(&settings, 2, 1), [None; 2]);
    }

    #[test]
    fn headers_go_first_and_a_misspelt_one_is_refused() {
        let fate = |pairs: &[(&'static str, &str)]| {
            let headers = pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
            Fate::of(&settings(&[("faults.reset", "1")]), b"call", 0, &headers.collect())
        };
        assert_eq!(fate(&[("x-simulate-fault", "none")]).unwrap().fault, None);
        assert_eq!(fate(&[("x-simulate-fault", "stall-mid")]).unwrap().fault, Some(Fault::StallMid));
        let refused = fate(&[("x-simulate-status", "429"), ("x-simulate-retry-after", "3")]).unwrap();
        assert_eq!(
            (refused.fault, refused.retry_after),
            (Some(Fault::Status(429)), RetryAfter::Given("3".to_owned()))
        );
        let asked = fate(&[("x-simulate-latency-ms", "1.5"), ("x-simulate-tokens", "7")]).unwrap();
        assert_eq!((asked.latency, asked.tokens), (Some(Duration::from_micros(1_500)), Some(7)));
        for (name, value) in [
            ("x-simulate-fault", "stal"),
            ("x-simulate-status", "200"),
            ("x-simulate-latency-ms", "soon"),
            ("x-simulate-latnecy-ms", "5"),
        ] {
            assert!(fate(&[(name, value)]).unwrap_err().contains(name), "{name}");
        }
    }
}
