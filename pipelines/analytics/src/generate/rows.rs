//! What made-up rows say.
//!
//! They are skewed as traffic is: few tenants ask most, questions come again, tokens and times are log-normal, days have a night. What
//! the columns of a row say fits together, as `publish` would have written it.
//!
//! Invariant: a row follows from the seed, its number and the moment at which it ends, whoever makes it and in which order. No clock is
//! read. Moments never go back from one number to the next.

use chrono::DateTime;
use forebay_schemas::{Attempt, Outcome};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use std::f64::consts::TAU;

const DAY_MS: u64 = 86_400_000;
const TENANTS: u64 = 200;
const CONVERSATIONS: u64 = 5_000;
/// As many as a topic has by default.
const PARTITIONS: u64 = 12;
/// The part of requests that ask what nobody else asks; the others share one question for so many requests.
const UNIQUE_PART: f64 = 0.4;
const REQUESTS_A_QUESTION: u64 = 3;
/// How much of a day's traffic moves from night to day.
const NIGHT: f64 = 0.6;

struct Model {
    name: &'static str,
    served: &'static str,
    provider: &'static str,
    endpoint: &'static str,
    /// Its part of the requests.
    share: f64,
    input_nano_usd: i64,
    cached_nano_usd: i64,
    output_nano_usd: i64,
    us_per_token: f64,
}

#[rustfmt::skip]
const MODELS: [Model; 5] = [
    Model { name: "gpt-5-mini", served: "gpt-5-mini-2025-08-07", provider: "openai", endpoint: "https://api.openai.com:443",
        share: 0.45, input_nano_usd: 250, cached_nano_usd: 25, output_nano_usd: 2_000, us_per_token: 9_000.0 },
    Model { name: "llama-3.3-70b", served: "llama-3.3-70b", provider: "openai_compatible", endpoint: "http://10.0.0.7:8000",
        share: 0.25, input_nano_usd: 100, cached_nano_usd: 100, output_nano_usd: 300, us_per_token: 14_000.0 },
    Model { name: "claude-sonnet-4-5", served: "claude-sonnet-4-5-20250929", provider: "anthropic",
        endpoint: "https://api.anthropic.com:443",
        share: 0.18, input_nano_usd: 3_000, cached_nano_usd: 300, output_nano_usd: 15_000, us_per_token: 16_000.0 },
    Model { name: "gpt-5", served: "gpt-5-2025-08-07", provider: "openai", endpoint: "https://api.openai.com:443",
        share: 0.10, input_nano_usd: 1_250, cached_nano_usd: 125, output_nano_usd: 10_000, us_per_token: 18_000.0 },
    Model { name: "claude-opus-4-5", served: "claude-opus-4-5-20251101", provider: "anthropic",
        endpoint: "https://api.anthropic.com:443",
        share: 0.02, input_nano_usd: 5_000, cached_nano_usd: 500, output_nano_usd: 25_000, us_per_token: 25_000.0 },
];

/// How a request came to its end: status, step, code of the error, and its part of the requests.
const ENDS: [(&str, &str, Option<&str>, f64); 5] = [
    ("answered", "validate", None, 0.955),
    ("failed", "infer", Some("model_unavailable"), 0.025),
    ("expired", "infer", Some("deadline"), 0.010),
    ("cancelled", "infer", Some("cancelled"), 0.005),
    ("blocked", "validate", None, 0.005),
];

/// Rows by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// What they follow from.
    pub seed: u64,
    /// How many requests there are.
    pub count: u64,
    /// Over how many days they are spread.
    pub days: u32,
    /// The first moment of the first of these days, in milliseconds since 1970.
    pub first_ms: u64,
}

impl Rows {
    /// The first number of a slice; a day is cut into so many of equal size.
    pub fn start(&self, slice: u64, slices_a_day: u32) -> u64 {
        let slices = u128::from(self.days) * u128::from(slices_a_day);
        let first = (u128::from(slice) * u128::from(self.count)).div_ceil(slices.max(1));
        u64::try_from(first).unwrap_or(self.count)
    }

    /// When a request ended, in milliseconds since 1970.
    pub fn ended_at_ms(&self, number: u64) -> u64 {
        let passed = u128::from(number) * u128::from(self.days);
        let (day, rest) = (passed / u128::from(self.count), passed % u128::from(self.count));
        let part = rest as f64 / self.count as f64;
        // Its slope is never below 0, so time does not go back.
        let part = part + NIGHT * (TAU * part).sin() / TAU;
        let ms = whole(part * DAY_MS as f64).clamp(0, DAY_MS.cast_signed() - 1);
        self.first_ms + u64::try_from(day).unwrap_or_default() * DAY_MS + ms.cast_unsigned()
    }

    /// A request that ended at this moment.
    pub fn outcome(&self, number: u64, ended_at_ms: u64) -> Outcome {
        let mut dice = Dice::of(self.seed, number);
        let tenant = format!("tenant-{:03}", dice.rank(TENANTS));
        let is_backfill = dice.happens(0.15);
        let conversation = dice.happens(0.3).then(|| format!("c-{:05}", dice.rank(CONVERSATIONS)));
        let trace_id = dice.happens(0.25).then(|| format!("{:016x}{:016x}", dice.bits(), dice.bits()));
        let model = &MODELS[dice.one_of(&MODELS.map(|model| model.share))];
        let is_wanted = dice.happens(0.6);
        let (mut status, mut stage, mut error_code, _) = ENDS[dice.one_of(&ENDS.map(|end| end.3))];
        let cache_status = match dice.part() {
            part if part < 0.2 => "bypass",
            part if part < 0.42 => "hit",
            _ => "miss",
        };
        let is_hit = cache_status == "hit";
        if is_hit {
            (status, stage, error_code) = (ENDS[0].0, ENDS[0].1, None);
        }
        let is_answer = matches!(status, "answered" | "blocked");
        let question = match dice.happens(UNIQUE_PART) {
            true => self.count + number,
            false => dice.rank(self.count / REQUESTS_A_QUESTION + 1),
        };

        let input = dice.log_normal(1_200.0, 0.9).min(120_000);
        let cached = if dice.happens(0.3) { input * dice.below(90) / 100 } else { 0 };
        let output = dice.log_normal(220.0, 0.8).min(16_000);
        let reasoning = if model.name.starts_with("gpt-5") { output * dice.below(60) / 100 } else { 0 };
        let list = input * model.input_nano_usd + output * model.output_nano_usd;
        let paid = list - cached * (model.input_nano_usd - model.cached_nano_usd);
        let attempts = match (is_hit, dice.part()) {
            (true, _) => 0,
            (false, part) if is_answer && part < 0.94 => 1,
            (false, part) if part < 0.985 => 2,
            _ => 3,
        };

        let queue_us = dice.log_normal(4_000.0, 1.2) * if is_backfill { 50 } else { 1 };
        let cache_us = (cache_status != "bypass").then(|| dice.log_normal(300.0, 0.5));
        let retrieve_us = (!is_hit).then(|| dice.log_normal(2_500.0, 0.7));
        let ttft = dice.log_normal(350_000.0, 0.6);
        let infer = ttft + whole(output as f64 * model.us_per_token * (0.8 + 0.4 * dice.part()));
        let infer_us = (!is_hit).then_some(infer * i64::from(attempts.max(1)));
        let validate_us = is_answer.then(|| dice.log_normal(900.0, 0.6));
        let timed = [cache_us, retrieve_us, infer_us, validate_us].into_iter().flatten().sum::<i64>();
        // To the millisecond, as records are stamped.
        let total_us = (queue_us + timed) / 1_000 * 1_000;
        let ended_at = ended_at_ms.cast_signed() * 1_000;
        let is_streamed = is_answer && !is_hit && dice.happens(0.5);
        let passages = if dice.happens(0.7) { 8 } else { 0 };
        Outcome {
            request_id: format!("{:016x}", mixed(self.seed, number)),
            tenant,
            generation: i32::from(dice.happens(0.0005)),
            trace_id,
            conversation,
            lane: if is_backfill { "backfill" } else { "interactive" }.to_owned(),
            date: DateTime::from_timestamp_millis(ended_at_ms.cast_signed())
                .unwrap_or_default()
                .date_naive()
                .to_string(),
            accepted_at: ended_at - total_us,
            ended_at,
            origin_topic: if is_backfill { "requests-backfill" } else { "requests" }.to_owned(),
            origin_partition: small(number % PARTITIONS),
            origin_offset: number.cast_signed(),
            model_requested: is_wanted.then(|| model.name.to_owned()),
            model_served: is_answer.then(|| model.served.to_owned()),
            provider: is_answer.then(|| model.provider.to_owned()),
            input_tokens: is_answer.then_some(input),
            cached_read_tokens: is_answer.then_some(cached),
            cached_write_tokens: None,
            output_tokens: is_answer.then_some(output),
            reasoning_tokens: is_answer.then_some(reasoning),
            billed_nano_usd: Some(if is_answer && !is_hit { paid } else { 0 }),
            list_nano_usd: is_answer.then_some(list),
            saved_by_cache_nano_usd: Some(if is_hit { list } else { 0 }),
            gpu_us: None,
            queue_us,
            cache_us,
            retrieve_us,
            infer_us,
            validate_us,
            ttft_us: is_streamed.then_some(ttft),
            total_us,
            status: status.to_owned(),
            stage: stage.to_owned(),
            finish_reason: is_answer.then(|| if dice.happens(0.03) { "length" } else { "stop" }.to_owned()),
            cache_status: cache_status.to_owned(),
            verdict: is_answer.then(|| match (status, dice.part()) {
                ("blocked", _) => "block".to_owned(),
                (_, part) if part < 0.06 => "annotate".to_owned(),
                _ => "pass".to_owned(),
            }),
            findings: is_answer.then(String::new),
            error_code: error_code.map(str::to_owned),
            attempts,
            passages,
            citations: if is_answer { passages.min(small(dice.rank(6))) } else { 0 },
            prompt_hash: Some(format!(
                "{:016x}{:016x}",
                mixed(self.seed, question),
                mixed(!self.seed, question)
            )),
            metadata: None,
            tier: (!is_wanted && is_answer).then(|| model.name.to_owned()),
            key_id: None,
            job: is_backfill.then(|| "nightly".to_owned()),
        }
    }

    /// The upstream calls of a request, in the order in which they were sent. All but the last of an answer failed, and cost nothing.
    pub fn attempts(&self, outcome: &Outcome) -> Vec<Attempt> {
        let mut dice = Dice::of(!self.seed, outcome.origin_offset.cast_unsigned());
        let model = MODELS.iter().find(|model| {
            outcome.model_served.as_deref() == Some(model.served)
                || outcome.model_requested.as_deref() == Some(model.name)
        });
        // Who names no model, and gets no answer, was with the first.
        let model = model.unwrap_or(&MODELS[0]);
        let call_id = format!("{:016x}", dice.bits());
        let last = outcome.attempts - 1;
        let duration_us = outcome.infer_us.unwrap_or_default() / i64::from(outcome.attempts.max(1));
        let infer_began =
            outcome.ended_at - outcome.validate_us.unwrap_or_default() - outcome.infer_us.unwrap_or_default();
        let attempt = |attempt: i32| {
            let is_ok = attempt == last && outcome.model_served.is_some();
            let given = |tokens: Option<i64>| tokens.filter(|_| is_ok);
            let (status, error_code, http_status) = match (is_ok, dice.part()) {
                (true, _) => ("ok", None, Some(200)),
                (false, part) if part < 0.5 => ("failed", Some("model_unavailable"), Some(503)),
                (false, part) if part < 0.8 => ("failed", Some("model_rate_limited"), Some(429)),
                (false, _) => ("failed", Some("model_timeout"), None),
            };
            Attempt {
                attempt_id: format!("{call_id}/{attempt}"),
                call_id: call_id.clone(),
                request_id: outcome.request_id.clone(),
                tenant: outcome.tenant.clone(),
                generation: outcome.generation,
                stage: "infer".to_owned(),
                attempt,
                started_at: infer_began + i64::from(attempt) * duration_us,
                duration_us,
                ttft_us: given(outcome.ttft_us),
                provider: model.provider.to_owned(),
                endpoint: Some(model.endpoint.to_owned()),
                model: Some(model.name.to_owned()),
                status: status.to_owned(),
                error_code: error_code.map(str::to_owned),
                http_status,
                input_tokens: given(outcome.input_tokens),
                output_tokens: given(outcome.output_tokens),
                cost_nano_usd: if is_ok { outcome.billed_nano_usd } else { Some(0) },
                tier: outcome.tier.clone(),
                cached_read_tokens: given(outcome.cached_read_tokens),
                cached_write_tokens: None,
                reasoning_tokens: given(outcome.reasoning_tokens),
                key_id: None,
                job: outcome.job.clone(),
                operation: Some("chat".to_owned()),
            }
        };
        (0..outcome.attempts).map(attempt).collect()
    }
}

/// The chances of one row.
struct Dice(SmallRng);

impl Dice {
    fn of(seed: u64, number: u64) -> Self {
        Self(SmallRng::seed_from_u64(mixed(seed, number)))
    }

    fn bits(&mut self) -> u64 {
        self.0.random()
    }

    /// From 0 up to 1.
    fn part(&mut self) -> f64 {
        self.0.random()
    }

    fn happens(&mut self, chance: f64) -> bool {
        self.part() < chance
    }

    fn below(&mut self, end: i64) -> i64 {
        self.0.random_range(0..end)
    }

    /// A place from 0 on among so many, by Zipf's law: the second is met half as often as the first.
    fn rank(&mut self, places: u64) -> u64 {
        whole((places as f64).powf(self.part())).cast_unsigned().clamp(1, places) - 1
    }

    /// One of some, by their parts of the whole.
    fn one_of(&mut self, parts: &[f64]) -> usize {
        let mut left = self.part();
        let found = parts.iter().position(|part| {
            left -= part;
            left < 0.0
        });
        found.unwrap_or(parts.len() - 1)
    }

    /// By Box and Muller.
    fn log_normal(&mut self, median: f64, sigma: f64) -> i64 {
        let normal = (-2.0 * (1.0 - self.part()).ln()).sqrt() * (TAU * self.part()).cos();
        whole(median * (sigma * normal).exp())
    }
}

/// Numbers that look random, each once for a seed (splitmix64).
fn mixed(seed: u64, number: u64) -> u64 {
    let mut bits = number.wrapping_add(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

#[expect(clippy::cast_possible_truncation, reason = "far below 2^63, by the medians above")]
fn whole(number: f64) -> i64 {
    number as i64
}

fn small(number: u64) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::Record as _;
    use std::collections::{BTreeMap, BTreeSet};

    const ROWS: Rows = Rows { seed: 7, count: 20_000, days: 3, first_ms: 20_000 * DAY_MS };

    fn outcomes() -> Vec<Outcome> {
        (0..ROWS.count).map(|number| ROWS.outcome(number, ROWS.ended_at_ms(number))).collect()
    }

    #[test]
    fn a_row_follows_from_seed_and_number() {
        let bytes = |rows: Rows, number| {
            let outcome = rows.outcome(number, 1_000);
            let attempts = rows.attempts(&outcome);
            (outcome.encode().unwrap(), attempts.iter().map(|row| row.encode().unwrap()).collect::<Vec<_>>())
        };
        let forth: Vec<_> = (0..500).map(|number| bytes(ROWS, number)).collect();
        let mut back: Vec<_> = (0..500).rev().map(|number| bytes(ROWS, number)).collect();
        back.reverse();
        assert!(forth == back);
        assert_ne!(bytes(ROWS, 1), bytes(Rows { seed: 8, ..ROWS }, 1));
        let ids: BTreeSet<_> = outcomes().into_iter().map(|row| row.request_id).collect();
        assert_eq!(ids.len(), 20_000);
    }

    #[test]
    fn days_are_cut_into_slices_and_time_does_not_go_back() {
        let mut last = 0;
        for slice in 0..12 {
            for number in ROWS.start(slice, 4)..ROWS.start(slice + 1, 4) {
                let ended = ROWS.ended_at_ms(number);
                assert!(ended >= last);
                last = ended;
                assert_eq!(ended / DAY_MS, 20_000 + slice / 4, "request {number} of slice {slice}");
            }
        }
        assert_eq!((ROWS.start(0, 4), ROWS.start(12, 4)), (0, ROWS.count));
    }

    #[test]
    fn few_tenants_ask_most_questions_come_again_and_columns_fit_together() {
        let rows = outcomes();
        let mut tenants = BTreeMap::<&str, u32>::new();
        for row in &rows {
            *tenants.entry(&row.tenant).or_default() += 1;
        }
        let most = tenants.values().max().unwrap();
        assert!(tenants.len() > 150 && *most > 2_000, "{} tenants, {most} of one", tenants.len());
        let questions: BTreeSet<_> = rows.iter().map(|row| &row.prompt_hash).collect();
        assert!((9_000..15_000).contains(&questions.len()), "{} questions", questions.len());
        for row in &rows {
            let is_hit = row.cache_status == "hit";
            assert!(
                !is_hit || (row.status.as_str(), row.billed_nano_usd) == ("answered", Some(0)),
                "{row:?}"
            );
            assert_eq!(is_hit, row.attempts == 0, "{row:?}");
            assert_eq!(row.error_code.is_some(), row.model_served.is_none(), "{row:?}");
            assert!(
                row.accepted_at <= row.ended_at && row.total_us >= row.queue_us / 1_000 * 1_000,
                "{row:?}"
            );
            let attempts = ROWS.attempts(row);
            assert_eq!(attempts.len(), usize::try_from(row.attempts).unwrap());
            let spent: i64 = attempts.iter().filter_map(|call| call.cost_nano_usd).sum();
            assert_eq!(Some(spent), row.billed_nano_usd, "{row:?}");
        }
    }
}
