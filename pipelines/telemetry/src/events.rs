//! What operators report, as metrics.

use crate::{GenAi, instruments as declared, words::PerWord};
use forebay_operator::{Called, Event};
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
    embedded: Counter<u64>,
    reranked: Counter<u64>,
    judgements: Counter<u64>,
    deltas_records: Counter<u64>,
    deltas_bytes: Counter<u64>,
    call_duration: Histogram<f64>,
    token_usage: Histogram<u64>,
    call_batch: Histogram<u64>,
    streamed: Streamed,
    call_wait: Histogram<f64>,
    call_extended: Counter<u64>,
    call_overhead: Histogram<f64>,
    stages: PerWord<Arc<str>>,
    providers: PerWord<Arc<str>>,
    models: PerWord<Arc<str>>,
    response_models: PerWord<Arc<str>>,
}

/// How fast a streamed answer came, under the names that were chosen.
enum Streamed {
    Tokens { first: Histogram<f64>, each: Histogram<f64> },
    Chunks { first: Histogram<f64>, each: Histogram<f64> },
}

impl Streamed {
    fn new(meter: &Meter, names: GenAi) -> Self {
        match names {
            GenAi::V1_41 => Self::Tokens {
                first: declared::TTFT.histogram_f64(meter),
                each: declared::TPOT.histogram_f64(meter),
            },
            GenAi::Latest => Self::Chunks {
                first: declared::TIME_TO_FIRST_CHUNK.histogram_f64(meter),
                each: declared::TIME_PER_OUTPUT_CHUNK.histogram_f64(meter),
            },
        }
    }
}

impl Events {
    pub(crate) fn new(meter: &Meter, names: GenAi) -> Self {
        Self {
            cache_lookups: declared::CACHE_LOOKUPS.counter(meter),
            retrieved: declared::RETRIEVED.histogram_u64(meter),
            embedded: declared::EMBEDDED.counter(meter),
            reranked: declared::RERANKED.counter(meter),
            judgements: declared::JUDGEMENTS.counter(meter),
            deltas_records: declared::DELTAS_RECORDS.counter(meter),
            deltas_bytes: declared::DELTAS_BYTES.counter(meter),
            call_duration: declared::CALL_DURATION.histogram_f64(meter),
            token_usage: declared::TOKEN_USAGE.histogram_u64(meter),
            call_batch: declared::CALL_BATCH.histogram_u64(meter),
            streamed: Streamed::new(meter, names),
            call_wait: declared::CALL_WAIT.histogram_f64(meter),
            call_extended: declared::CALL_EXTENDED.counter(meter),
            call_overhead: declared::CALL_OVERHEAD.histogram_f64(meter),
            stages: PerWord::new(STAGES_MAX),
            providers: PerWord::new(PROVIDERS_MAX),
            models: PerWord::new(MODELS_MAX),
            response_models: PerWord::new(MODELS_MAX),
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
            Event::Embedded { outcome } => {
                self.embedded.add(1, &[stage, KeyValue::new("outcome", *outcome)]);
            }
            Event::Reranked { outcome } => {
                self.reranked.add(1, &[stage, KeyValue::new("outcome", *outcome)]);
            }
            Event::Judged { judgement } => {
                self.judgements.add(1, &[stage, KeyValue::new("judgement", *judgement)]);
            }
            Event::Called(called) => self.called(stage, called),
            Event::CallWaited { what, duration_us } => {
                self.call_wait
                    .record(micros(*duration_us).as_secs_f64(), &[stage, KeyValue::new("for", *what)]);
            }
            Event::CallExtended { how } => self.call_extended.add(1, &[stage, KeyValue::new("how", *how)]),
            Event::CallOverhead { duration_us } => {
                self.call_overhead.record(micros(*duration_us).as_secs_f64(), &[stage]);
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

    fn called(&self, stage: KeyValue, called: &Called) {
        let mut labels = vec![
            stage,
            KeyValue::new("gen_ai.operation.name", called.operation.as_str()),
            KeyValue::new("gen_ai.provider.name", self.providers.word(&called.provider)),
            KeyValue::new("gen_ai.request.model", self.models.word(&called.model)),
        ];
        if let Some(texts) = called.texts {
            self.call_batch.record(u64::try_from(texts).unwrap_or(u64::MAX), &labels);
        }
        labels.extend(
            called
                .response_model
                .as_ref()
                .map(|model| KeyValue::new("gen_ai.response.model", self.response_models.word(model))),
        );
        for (kind, tokens) in [("input", called.input_tokens), ("output", called.output_tokens)] {
            if let Some(tokens) = tokens.and_then(|tokens| u64::try_from(tokens).ok()) {
                self.token_usage.record(tokens, &with(&labels, KeyValue::new("gen_ai.token.type", kind)));
            }
        }
        labels.extend(called.error.map(|error| KeyValue::new("error.type", error)));
        self.call_duration.record(micros(called.duration_us).as_secs_f64(), &labels);
        if let Some(ttft) = called.ttft_us.map(micros) {
            self.streamed(&labels, called, ttft);
        }
    }

    fn streamed(&self, labels: &[KeyValue], called: &Called, ttft: Duration) {
        match &self.streamed {
            // Of successful responses only, as the conventions have it.
            Streamed::Tokens { .. } if called.error.is_some() => {}
            Streamed::Tokens { first, each } => {
                first.record(ttft.as_secs_f64(), labels);
                // The first token came with the TTFT; one token alone has no time per token.
                let others =
                    called.output_tokens.and_then(|tokens| u32::try_from(tokens.saturating_sub(1)).ok());
                let rest = micros(called.duration_us).saturating_sub(ttft);
                if let Some(tpot) = others.and_then(|tokens| rest.checked_div(tokens)) {
                    each.record(tpot.as_secs_f64(), labels);
                }
            }
            Streamed::Chunks { first, each } => {
                first.record(ttft.as_secs_f64(), labels);
                for gap in &called.gaps_us {
                    each.record(micros(i64::from(*gap)).as_secs_f64(), labels);
                }
            }
        }
    }
}

fn with(labels: &[KeyValue], last: KeyValue) -> Vec<KeyValue> {
    labels.iter().cloned().chain([last]).collect()
}

fn micros(us: i64) -> Duration {
    Duration::from_micros(u64::try_from(us).unwrap_or(0))
}
