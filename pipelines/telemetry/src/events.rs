//! What operators report, as metrics.

use crate::{instruments as declared, words::PerWord};
use forebay_operator::Event;
use opentelemetry::{
    KeyValue,
    metrics::{Counter, Histogram, Meter},
};
use std::{sync::Arc, time::Duration};

/// Names of stages are written in a pipeline.
const STAGES_MAX: usize = 100;
/// Kinds of providers are few.
const PROVIDERS_MAX: usize = 16;
/// Models may be named by clients.
const MODELS_MAX: usize = 32;

/// The instruments of all events.
pub(crate) struct Events {
    cache_lookups: Counter<u64>,
    retrieved: Histogram<u64>,
    judgements: Counter<u64>,
    deltas_records: Counter<u64>,
    deltas_bytes: Counter<u64>,
    call_duration: Histogram<f64>,
    token_usage: Histogram<u64>,
    ttft: Histogram<f64>,
    tpot: Histogram<f64>,
    stages: PerWord<Arc<str>>,
    providers: PerWord<Arc<str>>,
    models: PerWord<Arc<str>>,
}

impl Events {
    pub(crate) fn new(meter: &Meter) -> Self {
        Self {
            cache_lookups: declared::CACHE_LOOKUPS.counter(meter),
            retrieved: declared::RETRIEVED.histogram_u64(meter),
            judgements: declared::JUDGEMENTS.counter(meter),
            deltas_records: declared::DELTAS_RECORDS.counter(meter),
            deltas_bytes: declared::DELTAS_BYTES.counter(meter),
            call_duration: declared::CALL_DURATION.histogram_f64(meter),
            token_usage: declared::TOKEN_USAGE.histogram_u64(meter),
            ttft: declared::TTFT.histogram_f64(meter),
            tpot: declared::TPOT.histogram_f64(meter),
            stages: PerWord::new(STAGES_MAX),
            providers: PerWord::new(PROVIDERS_MAX),
            models: PerWord::new(MODELS_MAX),
        }
    }

    pub(crate) fn observe(&self, stage: &str, event: &Event) {
        let stage = KeyValue::new("stage", self.stages.word(stage));
        match event {
            Event::CacheLookedUp { status } => {
                self.cache_lookups.add(1, &[stage, KeyValue::new("status", *status)]);
            }
            Event::Retrieved { passages } => {
                self.retrieved.record(u64::try_from(*passages).unwrap_or(u64::MAX), &[stage]);
            }
            Event::Judged { judgement } => {
                self.judgements.add(1, &[stage, KeyValue::new("judgement", *judgement)]);
            }
            Event::Called { provider, model, duration_us, ttft_us, input_tokens, output_tokens, error } => {
                let labels = [
                    stage,
                    // All that reports its calls is chat; another operation would have to say so in the event.
                    KeyValue::new("gen_ai.operation.name", "chat"),
                    KeyValue::new("gen_ai.provider.name", self.providers.word(provider)),
                    KeyValue::new("gen_ai.request.model", self.models.word(model)),
                ];
                let duration = micros(*duration_us);
                self.called(&labels, duration, *error);
                self.tokens(&labels, "input", *input_tokens);
                self.tokens(&labels, "output", *output_tokens);
                if let Some(ttft) = ttft_us.map(micros) {
                    self.streamed(&labels, duration, ttft, *output_tokens);
                }
            }
        }
    }

    /// A piece of an answer was sent, or lost.
    pub(crate) fn delta(&self, stage: &str, bytes: usize, is_sent: bool) {
        let outcome = KeyValue::new("outcome", if is_sent { "sent" } else { "lost" });
        let labels = [KeyValue::new("stage", self.stages.word(stage)), outcome];
        self.deltas_records.add(1, &labels);
        self.deltas_bytes.add(u64::try_from(bytes).unwrap_or(u64::MAX), &labels);
    }

    fn called(&self, labels: &[KeyValue; 4], duration: Duration, error: Option<&'static str>) {
        match error {
            None => self.call_duration.record(duration.as_secs_f64(), labels),
            Some(error) => {
                self.call_duration
                    .record(duration.as_secs_f64(), &with(labels, KeyValue::new("error.type", error)));
            }
        }
    }

    fn tokens(&self, labels: &[KeyValue; 4], kind: &'static str, tokens: Option<i64>) {
        if let Some(tokens) = tokens.and_then(|tokens| u64::try_from(tokens).ok()) {
            self.token_usage.record(tokens, &with(labels, KeyValue::new("gen_ai.token.type", kind)));
        }
    }

    fn streamed(
        &self,
        labels: &[KeyValue; 4],
        duration: Duration,
        ttft: Duration,
        output_tokens: Option<i64>,
    ) {
        self.ttft.record(ttft.as_secs_f64(), labels);
        // The first token came with the TTFT; one token alone has no time per token.
        let after_the_first = output_tokens.and_then(|tokens| u32::try_from(tokens.saturating_sub(1)).ok());
        if let Some(tpot) =
            after_the_first.and_then(|tokens| duration.saturating_sub(ttft).checked_div(tokens))
        {
            self.tpot.record(tpot.as_secs_f64(), labels);
        }
    }
}

fn with(labels: &[KeyValue; 4], last: KeyValue) -> [KeyValue; 5] {
    let [stage, operation, provider, model] = labels.clone();
    [stage, operation, provider, model, last]
}

fn micros(us: i64) -> Duration {
    Duration::from_micros(u64::try_from(us).unwrap_or(0))
}
