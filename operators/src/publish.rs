//! Tells the client how its request ended, and SQL what it came to.
//!
//! Invariant: the result and the row are pure functions of the ending, its envelope and its record's timestamp; so a
//! second delivery writes the same bytes. A blocked answer's text stays here.

use crate::{
    catalogue::{Resources, Shipped},
    text::canonical,
};
use forebay_operator::{Context, Failure, Operator, ports};
use forebay_schemas::{
    Answer, CacheStatus, Ending, Envelope, Generated, NanoUsd, Outcome, Request, Status, TimingsUs,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `publish` has none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {}

ports! {
    /// What `publish` gives.
    pub enum Published {
        /// What the client reads.
        Result(Answer) = "result",
        /// The row of the request.
        Outcome(Outcome) = "outcome",
    }
}

/// The operator `publish`.
pub struct Publish;

impl Shipped for Publish {
    type Settings = Settings;

    fn new(Settings {}: Settings, _: &Resources) -> Self {
        Self
    }
}

impl Operator for Publish {
    const NAME: &'static str = "publish";
    type In = Ending;
    type Out = Published;

    async fn process(&self, ending: Ending, cx: &Context) -> Result<Vec<Published>, Failure> {
        let (envelope, ended_at_ms) = (cx.envelope(), cx.recorded_at_ms());
        let cost = cost(&ending, envelope);
        let outcome = outcome(&ending, envelope, ended_at_ms, cost);
        // The result goes first: a row about an answer that nobody got would be a lie.
        Ok(vec![Published::Result(result(ending, envelope, ended_at_ms, cost)), Published::Outcome(outcome)])
    }
}

/// What the request cost: nothing from the cache; without an answer, what its calls cost as far as that is known; with
/// one, all that was spent for it, and null where the model has no price.
fn cost(ending: &Ending, Envelope { spend, attempts, .. }: &Envelope) -> Option<NanoUsd> {
    match &ending.answer {
        Some(_) if ending.cache == CacheStatus::Hit => Some(*spend),
        // Failed tries may have cost something too, and a host that does not count leaves the spend at 0.
        Some(answer) => answer.cost_nano_usd.map(|cost| cost.max(*spend)),
        None if *attempts > 0 && *spend == NanoUsd::default() => None,
        None => Some(*spend),
    }
}

fn result(ending: Ending, envelope: &Envelope, ended_at_ms: i64, cost: Option<NanoUsd>) -> Answer {
    let Ending { status, request, cache, answer, error, .. } = ending;
    let timings_us = TimingsUs {
        queue: Some(envelope.timings.queue),
        cache: envelope.timings.cache,
        retrieve: envelope.timings.retrieve,
        infer: envelope.timings.infer,
        ttft: answer.as_ref().and_then(|answer| answer.ttft_us),
        validate: envelope.timings.validate,
        total: Some(total_us(envelope, ended_at_ms)),
    };
    let (model, usage) = answer.as_ref().map(|answer| (answer.model.clone(), answer.usage)).unzip();
    let (text, citations) = match answer {
        Some(Generated { text, citations, .. }) if status != Status::Blocked => (Some(text), citations),
        _ => (None, Vec::new()),
    };
    Answer {
        id: envelope.id.clone(),
        tenant: envelope.tenant.clone(),
        status,
        text,
        citations,
        cache,
        model,
        usage: usage.flatten(),
        cost_nano_usd: cost,
        error,
        origin: Some(envelope.origin.clone()),
        metadata: request.and_then(|request| request.metadata),
        timings_us,
        generation: envelope.generation,
    }
}

fn outcome(ending: &Ending, envelope: &Envelope, ended_at_ms: i64, cost: Option<NanoUsd>) -> Outcome {
    let Envelope { timings, origin, .. } = envelope;
    let request = ending.request.as_ref();
    let answer = ending.answer.as_ref();
    let usage = answer.and_then(|answer| answer.usage);
    let list = answer.and_then(|answer| answer.cost_nano_usd).map(|cost| cost.0);
    let verdict = ending.verdict.as_ref();
    Outcome {
        request_id: envelope.id.as_str().to_owned(),
        tenant: envelope.tenant.as_str().to_owned(),
        generation: small(envelope.generation),
        trace_id: envelope.traceparent.as_deref().and_then(trace_id),
        conversation: request.and_then(|request| request.conversation.clone()),
        lane: envelope.lane.as_str().to_owned(),
        date: date(ended_at_ms),
        accepted_at: envelope.accepted_at_ms.saturating_mul(1000),
        ended_at: ended_at_ms.saturating_mul(1000),
        origin_topic: origin.topic.clone(),
        origin_partition: origin.partition,
        origin_offset: origin.offset,
        model_requested: request.and_then(|request| request.model.clone()),
        model_served: answer.map(|answer| answer.model.clone()),
        provider: answer.map(|answer| answer.provider.clone()),
        input_tokens: usage.map(|usage| large(usage.prompt_tokens)),
        cached_read_tokens: usage.and_then(|usage| usage.cached_tokens).map(large),
        cached_write_tokens: usage.and_then(|usage| usage.cached_write_tokens).map(large),
        output_tokens: usage.map(|usage| large(usage.completion_tokens)),
        reasoning_tokens: usage.and_then(|usage| usage.reasoning_tokens).map(large),
        billed_nano_usd: cost.map(|cost| cost.0),
        list_nano_usd: list,
        saved_by_cache_nano_usd: if ending.cache == CacheStatus::Hit { list } else { Some(0) },
        gpu_us: None,
        queue_us: timings.queue,
        cache_us: timings.cache,
        retrieve_us: timings.retrieve,
        infer_us: timings.infer,
        validate_us: timings.validate,
        ttft_us: answer.and_then(|answer| answer.ttft_us),
        total_us: total_us(envelope, ended_at_ms),
        status: ending.status.as_str().to_owned(),
        stage: ending.stage.clone(),
        finish_reason: answer.and_then(|answer| answer.finish_reason.clone()),
        cache_status: ending.cache.as_str().to_owned(),
        verdict: verdict.map(|verdict| verdict.judgement.as_str().to_owned()),
        findings: verdict.map(|verdict| {
            verdict.findings.iter().map(|finding| finding.code.as_str()).collect::<Vec<_>>().join(",")
        }),
        error_code: ending.error.as_ref().map(|error| error.code.clone()),
        attempts: small(envelope.attempts),
        passages: i32::try_from(ending.chunks.len()).unwrap_or(i32::MAX),
        citations: answer.map_or(0, |answer| i32::try_from(answer.citations.len()).unwrap_or(i32::MAX)),
        prompt_hash: request.map(prompt_hash),
        metadata: request.and_then(|request| request.metadata.as_ref()).map(ToString::to_string),
        tier: answer.and_then(|answer| answer.tier.clone()),
        key_id: request.and_then(|request| request.key_id.as_ref()).map(|key_id| key_id.as_str().to_owned()),
        job: request.and_then(|request| request.job.as_ref()).map(|job| job.as_str().to_owned()),
    }
}

fn prompt_hash(request: &Request) -> String {
    blake3::hash(canonical(&request.question()).as_bytes()).to_hex()[..32].to_owned()
}

/// Clocks of two machines may disagree; time does not run backwards for that.
fn total_us(envelope: &Envelope, ended_at_ms: i64) -> i64 {
    ended_at_ms.saturating_sub(envelope.accepted_at_ms).max(0).saturating_mul(1000)
}

fn small(count: u32) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

fn large(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// The second part of a W3C `traceparent`.
fn trace_id(traceparent: &str) -> Option<String> {
    traceparent.split('-').nth(1).filter(|id| id.len() == 32).map(str::to_owned)
}

/// The day in UTC, as 2026-11-24.
fn date(at_ms: i64) -> String {
    // Howard Hinnant's civil_from_days: years begin in March, so that a leap day is the last of its year.
    let days = at_ms.div_euclid(24 * 3600 * 1000) + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;
    use forebay_operator::{Clock, compliance};
    use forebay_schemas::{Fault, Record as _, Usage};

    async fn published(ending: Ending, change: impl FnOnce(&mut Envelope)) -> (Answer, Outcome) {
        let mut envelope = compliance::envelope();
        change(&mut envelope);
        let cx = Context::quiet(envelope, Clock::starting_at(compliance::NOW_MS));
        match <[_; 2]>::try_from(Publish.process(ending, &cx).await.unwrap()).unwrap() {
            [Published::Result(result), Published::Outcome(outcome)] => (result, outcome),
            other => panic!("{other:?}"),
        }
    }

    fn failed() -> Ending {
        let error = Fault { code: "deadline".to_owned(), message: "too late".to_owned() };
        Ending::without_answer(Status::Expired, "infer", None, error)
    }

    #[tokio::test]
    async fn a_row_says_by_which_key_and_for_which_job_was_asked() {
        let request = samples::request(r#"{"prompt": "What?", "key_id": "key-7", "job": "nightly"}"#);
        let (_, row) = published(Ending { request: Some(request), ..failed() }, |_| {}).await;
        assert_eq!((row.key_id.as_deref(), row.job.as_deref()), (Some("key-7"), Some("nightly")));
        let (_, row) = published(failed(), |_| {}).await;
        assert_eq!((row.key_id, row.job), (None, None));
    }

    #[tokio::test]
    async fn every_field_of_a_result_is_present() {
        let (result, _) = published(failed(), |_| {}).await;
        let json: serde_json::Value = serde_json::from_slice(&result.encode().unwrap().unwrap()).unwrap();
        let mut names: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            [
                "cache",
                "citations",
                "cost_nano_usd",
                "error",
                "generation",
                "id",
                "metadata",
                "model",
                "origin",
                "status",
                "tenant",
                "text",
                "timings_us",
                "usage"
            ]
        );
        assert!(json["text"].is_null() && json["timings_us"]["ttft"].is_null());
        assert_eq!(json["error"]["code"], "deadline");
    }

    #[tokio::test]
    async fn a_blocked_answer_stays_here_and_an_answer_goes_out() {
        let (result, outcome) = published(samples::ending(), |_| {}).await;
        assert_eq!(result.text, samples::ending().answer.map(|answer| answer.text));
        assert_eq!((outcome.citations, outcome.passages, outcome.status.as_str()), (1, 1, "answered"));
        assert_eq!(outcome.findings.as_deref(), Some(""));
        let (result, _) = published(Ending { status: Status::Blocked, ..samples::ending() }, |_| {}).await;
        assert_eq!((result.text, result.citations), (None, Vec::new()));
    }

    /// Says what a request cost and what the cache saved.
    async fn check(
        change: impl FnOnce(&mut Ending),
        attempts: u32,
        spend: i64,
        expected: (Option<i64>, Option<i64>),
    ) {
        let mut ending = samples::ending();
        change(&mut ending);
        let spent =
            |envelope: &mut Envelope| (envelope.attempts, envelope.spend) = (attempts, NanoUsd(spend));
        let (result, outcome) = published(ending, spent).await;
        assert_eq!(result.cost_nano_usd.map(|cost| cost.0), outcome.billed_nano_usd);
        assert_eq!((outcome.billed_nano_usd, outcome.saved_by_cache_nano_usd), expected);
    }

    fn priced(ending: &mut Ending, cost: Option<i64>) {
        ending.answer.as_mut().unwrap().cost_nano_usd = cost.map(NanoUsd);
    }

    fn hit(ending: &mut Ending) {
        ending.cache = CacheStatus::Hit;
        priced(ending, Some(7));
    }

    #[tokio::test]
    async fn a_cost_is_what_this_request_spent_and_null_where_nobody_knows() {
        check(|ending| priced(ending, Some(7)), 1, 7, (Some(7), Some(0))).await;
        check(|ending| priced(ending, Some(7)), 2, 9, (Some(9), Some(0))).await;
        check(|ending| priced(ending, None), 1, 0, (None, Some(0))).await;
        check(hit, 0, 0, (Some(0), Some(7))).await;
        check(|ending| ending.answer = None, 0, 0, (Some(0), Some(0))).await;
        check(|ending| ending.answer = None, 2, 5, (Some(5), Some(0))).await;
        check(|ending| ending.answer = None, 2, 0, (None, Some(0))).await;
    }

    #[tokio::test]
    async fn an_outcome_says_what_its_tokens_were() {
        let mut ending = samples::ending();
        let usage = Usage { cached_tokens: Some(3), cached_write_tokens: Some(2), ..Usage::of(10, 4) };
        ending.answer.as_mut().unwrap().usage = Some(Usage { reasoning_tokens: Some(1), ..usage });
        let (_, outcome) = published(ending, |_| {}).await;
        let read = (outcome.input_tokens, outcome.cached_read_tokens, outcome.cached_write_tokens);
        assert_eq!(read, (Some(10), Some(3), Some(2)));
        assert_eq!((outcome.output_tokens, outcome.reasoning_tokens), (Some(4), Some(1)));
    }

    #[tokio::test]
    async fn times_come_from_records() {
        let late = |envelope: &mut Envelope| {
            envelope.timings.queue = 5;
            envelope.traceparent = Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_owned());
        };
        let (result, outcome) = published(samples::ending(), late).await;
        assert_eq!((result.timings_us.queue, result.timings_us.total), (Some(5), Some(0)));
        assert_eq!(outcome.trace_id.as_deref(), Some("4bf92f3577b34da6a3ce929d0e0e4736"));
        assert_eq!((outcome.date.as_str(), outcome.ended_at), ("2023-11-14", compliance::NOW_MS * 1000));
    }

    #[test]
    fn a_day_is_the_day_in_utc() {
        let day_ms = 24 * 3600 * 1000;
        for (at_ms, expected) in [
            (0, "1970-01-01"),
            (-1, "1969-12-31"),
            (11_016 * day_ms, "2000-02-29"),
            (11_017 * day_ms - 1, "2000-02-29"),
            (20_781 * day_ms, "2026-11-24"),
        ] {
            assert_eq!(date(at_ms), expected);
        }
    }

    #[tokio::test]
    async fn it_complies() {
        let samples = [samples::ending(), failed()].map(|sample| sample.encode().unwrap().unwrap());
        compliance::assert_complies(Publish, samples.into()).await;
    }
}
