//! What a simulator is told: every setting once, with its default and its meaning.
//!
//! Settings come as pairs of a path and a text, so whoever reads files knows which line to blame; see [`Settings::with`].
//!
//! Invariant: a setting that is unknown or cannot be is refused, and then nothing is changed.

use crate::{
    engine::Pace,
    faults::{FAULTS, RetryAfter},
    limits::PerMinute,
    spread::{Spread, share},
};
use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

/// The longest answer, in tokens.
pub const TOKENS_MAX: u32 = 1_000_000;

/// The longest vector.
pub const DIMENSIONS_MAX: usize = 16_384;

/// A setting: its path in a file, where dots lead into maps; its default; what it means.
struct Key {
    path: &'static str,
    default: &'static str,
    about: &'static str,
}

const fn key(path: &'static str, default: &'static str, about: &'static str) -> Key {
    Key { path, default, about }
}

/// All settings but the shares of faults, which are in [`FAULTS`].
const KEYS: &[Key] = &[
    key("seed", "0", "what all chance follows from"),
    key("models", "simulated", "the models that /v1/models lists, joined by commas"),
    key("any_model", "true", "whether calls may name other models too; if not, they get 404"),
    key(
        "latency",
        "modelled",
        "modelled: as the engine says; or a latency until the first token, such as 50ms, 50ms..5s, log-normal 50ms..5s, log-normal 200ms sigma 0.8; with \", 1% 30s\" behind it one in a hundred takes that long",
    ),
    key("token_gap", "0ms", "with a given latency: from one token to the next"),
    key("speeds", "1", "how fast each replica is beside the others, joined by commas"),
    key("engine.slots", "64", "the most sequences that run at once (max_num_seqs)"),
    key("engine.prefill_tokens_per_s", "10000", "how fast prompts are read"),
    key("engine.decode_tokens_per_s", "60", "how fast a sequence that runs alone is written"),
    key("engine.decode_slowdown", "1%", "by how much a step becomes longer with each further sequence"),
    key("engine.step_tokens", "8192", "the most tokens of a step (max_num_batched_tokens)"),
    key("engine.kv_blocks", "16384", "the blocks of the KV cache; fixed while it runs"),
    key("engine.block_tokens", "16", "the tokens of a block; fixed while it runs"),
    key("engine.context_tokens", "32768", "the most tokens of a prompt and its answer (max_model_len)"),
    key("engine.queue", "10000", "the most calls that wait; one more gets 503"),
    key(
        "answer.tokens",
        "log-normal 16..256",
        "how long an answer is, where the call sets no lower limit and a citation needs no more",
    ),
    key("embedding.dimensions", "384", "how long a vector is"),
    key("limits.requests_per_minute", "none", "for each key and replica"),
    key(
        "limits.tokens_per_minute",
        "none",
        "for each key and replica: those of the prompt and those that may be written",
    ),
    key("limits.headers", "true", "whether answers tell what is left"),
    key("keys.dead", "", "API keys that get 401, joined by commas"),
    key("keys.spent", "", "API keys that get 400 with a usage limit, joined by commas"),
    key("cold_start.health", "0s", "how long after the start /health and calls get 503"),
    key("cold_start.first_call", "0s", "how much longer the first call takes, and those that come meanwhile"),
    key("fault.retry_after", "1s", "what a 429 or 503 of `faults` says"),
    key("fault.retry_after_form", "seconds", "seconds, date, ms or none"),
    key("fault.stall", "60s", "how long a stall lasts"),
    key("fault.attempts", "all", "only so many tries of a call may meet a fault"),
];

/// Settings that may not change while a simulator runs.
const FIXED: &[&str] = &["engine.kv_blocks", "engine.block_tokens"];

/// How long a call takes.
#[derive(Clone, Debug, PartialEq)]
pub enum Latency {
    /// As the engine says.
    Modelled,
    /// As drawn from this.
    Given(Spread),
}

/// The settings of a simulator.
#[derive(Clone, Debug)]
pub struct Settings {
    texts: BTreeMap<String, String>,
    /// What all chance follows from.
    pub seed: u64,
    /// The models that it lists; never empty.
    pub models: Vec<String>,
    /// Whether others are served too.
    pub any_model: bool,
    /// How long a call takes until its first token.
    pub latency: Latency,
    /// With a given latency, from one token to the next.
    pub token_gap: Duration,
    /// How fast each replica is; never empty.
    pub speeds: Vec<f64>,
    /// The pace of a replica of speed 1.
    pub pace: Pace,
    /// The blocks of the KV cache.
    pub kv_blocks: u32,
    /// The tokens of a block.
    pub block_tokens: u32,
    /// The most tokens of a prompt and its answer.
    pub context_tokens: u32,
    /// The most calls that wait.
    pub queue: usize,
    /// How long an answer is.
    pub answer_tokens: Spread,
    /// How long a vector is.
    pub dimensions: usize,
    /// What a key may.
    pub per_minute: PerMinute,
    /// Whether limits are told.
    pub limit_headers: bool,
    /// Keys that get 401.
    pub dead_keys: Vec<String>,
    /// Keys that get 400.
    pub spent_keys: Vec<String>,
    /// How long after the start nothing is served.
    pub cold: Duration,
    /// How much longer the first call takes.
    pub first_call: Duration,
    /// The share of each of [`FAULTS`].
    pub faults: Vec<f64>,
    /// What a refusal says.
    pub retry_after: RetryAfter,
    /// How long a stall lasts.
    pub stall: Duration,
    /// How many tries of a call may meet a fault; none for all.
    pub faulty_attempts: Option<u32>,
}

/// A setting that cannot be, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path} {message}")]
pub struct Wrong {
    /// Which.
    pub path: String,
    /// What is wrong with it.
    pub message: String,
}

impl Default for Settings {
    fn default() -> Self {
        let mut settings = Self::bare();
        for (path, default, _) in keys() {
            let set = settings.set(&path, default);
            debug_assert_eq!(set, Ok(()), "{path} has a default that cannot be");
        }
        settings
    }
}

/// All settings: path, default, meaning.
pub fn keys() -> impl Iterator<Item = (String, &'static str, &'static str)> {
    let faults = FAULTS.iter().map(|(name, _, about)| (format!("faults.{name}"), "0", *about));
    KEYS.iter().map(|key| (key.path.to_owned(), key.default, key.about)).chain(faults)
}

impl Settings {
    /// Without any value that means something.
    fn bare() -> Self {
        Self {
            texts: BTreeMap::new(),
            seed: 0,
            models: vec!["simulated".to_owned()],
            any_model: true,
            latency: Latency::Modelled,
            token_gap: Duration::ZERO,
            speeds: vec![1.0],
            pace: Pace {
                prefill_per_s: 1.0,
                decode_per_s: 1.0,
                decode_slowdown: 0.0,
                slots: 1,
                step_tokens: 1,
            },
            kv_blocks: 1,
            block_tokens: 1,
            context_tokens: 1,
            queue: 1,
            answer_tokens: Spread::fixed(1.0),
            dimensions: 1,
            per_minute: PerMinute::default(),
            limit_headers: true,
            dead_keys: Vec::new(),
            spent_keys: Vec::new(),
            cold: Duration::ZERO,
            first_call: Duration::ZERO,
            faults: vec![0.0; FAULTS.len()],
            retry_after: RetryAfter::Nothing,
            stall: Duration::ZERO,
            faulty_attempts: None,
        }
    }

    /// These settings with some changed, or what is wrong with the first that cannot be.
    pub fn with(mut self, pairs: impl IntoIterator<Item = (String, String)>) -> Result<Self, Wrong> {
        for (path, value) in pairs {
            self.set(&path, &value).map_err(|message| Wrong { path, message })?;
        }
        self.check()?;
        Ok(self)
    }

    /// What is wrong with a setting by itself.
    pub fn check_one(path: &str, value: &str) -> Result<(), String> {
        Self::bare().set(path, value)
    }

    /// Whether a simulator with these settings may take those.
    pub fn may_become(&self, next: &Self) -> Result<(), Wrong> {
        match FIXED.iter().find(|path| self.texts.get(**path) != next.texts.get(**path)) {
            None => Ok(()),
            Some(path) => {
                let message = "cannot change while the simulator runs".to_owned();
                Err(Wrong { path: (*path).to_owned(), message })
            }
        }
    }

    /// What no setting shows alone.
    fn check(&self) -> Result<(), Wrong> {
        let wrong = |path: &str, message: String| Err(Wrong { path: path.to_owned(), message });
        let sum: f64 = self.faults.iter().sum();
        if sum > 1.0 + 1e-9 {
            return wrong(
                "faults",
                format!("make {sum} together; a call meets one at most, so 1 is the most"),
            );
        }
        let held = u64::from(self.kv_blocks) * u64::from(self.block_tokens);
        if u64::from(self.context_tokens) > held {
            let message = format!(
                "is {}, and the KV cache holds {held} tokens: such a call could never run",
                self.context_tokens
            );
            return wrong("engine.context_tokens", message);
        }
        Ok(())
    }

    fn set(&mut self, path: &str, text: &str) -> Result<(), String> {
        let text = text.trim();
        match path {
            "seed" => self.seed = number(text, 0..=u64::MAX)?,
            "models" => self.models = some(list(text))?,
            "any_model" => self.any_model = truth(text)?,
            "latency" if text == "modelled" => self.latency = Latency::Modelled,
            "latency" => {
                let spread = Spread::of_latencies(text).map_err(|wanted| {
                    format!("is {text:?}; write modelled, or {}", wanted.trim_start_matches("write "))
                })?;
                self.latency = Latency::Given(spread);
            }
            "token_gap" => self.token_gap = duration(text)?,
            "speeds" => {
                let speeds: Result<_, _> = some(list(text))?.iter().map(|speed| positive(speed)).collect();
                self.speeds = speeds?;
            }
            "engine.slots" => self.pace.slots = number(text, 1..=100_000)?,
            "engine.prefill_tokens_per_s" => self.pace.prefill_per_s = positive(text)?,
            "engine.decode_tokens_per_s" => self.pace.decode_per_s = positive(text)?,
            "engine.decode_slowdown" => self.pace.decode_slowdown = part(text)?,
            "engine.step_tokens" => self.pace.step_tokens = number(text, 1..=10_000_000)?,
            "engine.kv_blocks" => self.kv_blocks = number(text, 1..=10_000_000)?,
            "engine.block_tokens" => self.block_tokens = number(text, 1..=4_096)?,
            "engine.context_tokens" => self.context_tokens = number(text, 1..=10_000_000)?,
            "engine.queue" => self.queue = number(text, 0..=1_000_000)?,
            "answer.tokens" => {
                self.answer_tokens =
                    Spread::of_counts(text).map_err(|wanted| format!("is {text:?}; {wanted}"))?;
            }
            "embedding.dimensions" => self.dimensions = number(text, 1..=DIMENSIONS_MAX)?,
            "limits.requests_per_minute" => self.per_minute.requests = limit(text)?,
            "limits.tokens_per_minute" => self.per_minute.tokens = limit(text)?,
            "limits.headers" => self.limit_headers = truth(text)?,
            "keys.dead" => self.dead_keys = list(text),
            "keys.spent" => self.spent_keys = list(text),
            "cold_start.health" => self.cold = duration(text)?,
            "cold_start.first_call" => self.first_call = duration(text)?,
            "fault.retry_after" | "fault.retry_after_form" => {}
            "fault.stall" => self.stall = duration(text)?,
            "fault.attempts" if text == "all" => self.faulty_attempts = None,
            "fault.attempts" => self.faulty_attempts = Some(number(text, 0..=u32::MAX)?),
            path => {
                let name = path.strip_prefix("faults.").unwrap_or_default();
                let place = FAULTS.iter().position(|(known, ..)| *known == name);
                match place.and_then(|place| self.faults.get_mut(place)) {
                    Some(old) => *old = part(text)?,
                    None => return Err("is no setting".to_owned()),
                }
            }
        }
        self.texts.insert(path.to_owned(), text.to_owned());
        if path.starts_with("fault.retry_after") {
            self.retry_after = self.retry_after()?;
        }
        Ok(())
    }

    /// Both of its settings together; the second may not be known yet.
    fn retry_after(&self) -> Result<RetryAfter, String> {
        let text = |path: &str| self.texts.get(path).map(String::as_str);
        let after = duration(text("fault.retry_after").unwrap_or("1s"))?;
        Ok(match text("fault.retry_after_form").unwrap_or("seconds") {
            "seconds" => RetryAfter::Seconds(after),
            "date" => RetryAfter::Date(after),
            "ms" => RetryAfter::Millis(after),
            "none" => RetryAfter::Nothing,
            other => return Err(format!("is {other:?}; it may be seconds, date, ms or none")),
        })
    }

    /// All settings as YAML, each with its meaning: a file that says what is.
    pub fn document(&self) -> String {
        let (mut document, mut section) = (String::new(), "");
        let keys: Vec<_> = keys().collect();
        for (path, _, about) in &keys {
            let value = self.texts.get(path).map(String::as_str).unwrap_or_default();
            let (map, name) = path.split_once('.').unwrap_or(("", path));
            if map != section {
                // Writing to a String cannot fail.
                _ = writeln!(document, "{map}:");
            }
            section = map;
            let indent = if map.is_empty() { "" } else { "  " };
            _ = writeln!(document, "{indent}# {about}\n{indent}{name}: {}", serde_json::json!(value));
        }
        document
    }
}

fn list(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
}

fn some(list: Vec<String>) -> Result<Vec<String>, String> {
    if list.is_empty() { Err("is empty; it needs one at least".to_owned()) } else { Ok(list) }
}

fn number<T>(text: &str, range: std::ops::RangeInclusive<T>) -> Result<T, String>
where
    T: std::str::FromStr + PartialOrd + std::fmt::Display,
{
    let found = text.parse().ok().filter(|number| range.contains(number));
    found.ok_or_else(|| format!("is {text:?}; it may be {} to {}", range.start(), range.end()))
}

fn positive(text: &str) -> Result<f64, String> {
    let found = text.parse().ok().filter(|number| (0.001..=1e12).contains(number));
    found.ok_or_else(|| format!("is {text:?}; it may be 0.001 to 1000000000000"))
}

fn part(text: &str) -> Result<f64, String> {
    share(text).map_err(|wanted| format!("is {text:?}; {wanted}"))
}

fn duration(text: &str) -> Result<Duration, String> {
    let found =
        humantime::parse_duration(text).ok().filter(|found| *found <= Duration::from_secs(7 * 86_400));
    found.ok_or_else(|| {
        format!("is {text:?}; write a duration of up to 7 days with its unit, such as 50ms or 30s")
    })
}

fn limit(text: &str) -> Result<Option<u32>, String> {
    if text == "none" {
        Ok(None)
    } else {
        number(text, 1..=u32::MAX).map(Some).map_err(|wrong| format!("{wrong}, or none"))
    }
}

fn truth(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| format!("is {text:?}; it may be true or false"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pairs: &[(&str, &str)]) -> Result<Settings, Wrong> {
        Settings::default().with(pairs.iter().map(|(path, value)| ((*path).to_owned(), (*value).to_owned())))
    }

    #[test]
    fn every_setting_has_a_default_that_can_be() {
        for (path, default, about) in keys() {
            assert_eq!(Settings::bare().set(&path, default), Ok(()), "{path}");
            assert!(!about.is_empty());
        }
        assert_eq!(Settings::default().check(), Ok(()));
        assert_eq!(Settings::default().retry_after, RetryAfter::Seconds(Duration::from_secs(1)));
    }

    #[test]
    fn what_cannot_be_is_refused_with_what_may_be() {
        let refused = |path: &str, value: &str| with(&[(path, value)]).map(drop).unwrap_err().to_string();
        assert_eq!(refused("latnecy", "1s"), "latnecy is no setting");
        assert_eq!(refused("faults.status_599", "1"), "faults.status_599 is no setting");
        assert!(refused("latency", "fast").starts_with("latency is \"fast\"; write modelled, or 50ms"));
        assert!(refused("engine.slots", "0").contains("1 to 100000"));
        assert!(refused("fault.retry_after_form", "hours").contains("seconds, date"));
        assert!(refused("faults.cut", "2").contains("0 to 1"));
        assert!(refused("engine.kv_blocks", "10").contains("could never run"));
        assert!(
            with(&[("faults.cut", "0.6"), ("faults.reset", "0.6")]).unwrap_err().to_string().contains("1.2")
        );
        let (now, next) = (Settings::default(), with(&[("engine.block_tokens", "32")]).unwrap());
        assert!(
            now.may_become(&next).unwrap_err().to_string().starts_with("engine.block_tokens cannot change")
        );
    }

    #[test]
    fn the_document_names_every_setting_with_its_value() {
        let document = with(&[("faults.cut", "5%")]).unwrap().document();
        assert!(document.contains("\nfaults:\n") && document.contains("  cut: \"5%\"\n"), "{document}");
        assert_eq!(
            document.lines().filter(|line| line.ends_with(':')).count(),
            8,
            "each map stands once: {document}"
        );
    }
}
