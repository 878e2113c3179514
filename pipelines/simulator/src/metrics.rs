//! What `/metrics` says, in vLLM's names.

use crate::engine::Counts;
use std::fmt::Write as _;

/// vLLM's bounds, in seconds.
const TTFT_S: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const TPOT_S: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST_S: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];

/// How often values fell below bounds.
#[derive(Debug)]
struct Histogram {
    bounds: &'static [f64],
    /// For each bound those that fell between it and the one before.
    counts: Vec<u64>,
    all: u64,
    sum: f64,
}

impl Histogram {
    fn of(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len()], all: 0, sum: 0.0 }
    }

    fn record(&mut self, value: f64) {
        let place = self.bounds.partition_point(|bound| *bound < value);
        if let Some(count) = self.counts.get_mut(place) {
            *count += 1;
        }
        self.all += 1;
        self.sum += value;
    }
}

/// What a replica has done so far.
#[derive(Debug)]
pub struct Metrics {
    prompt_tokens: u64,
    written_tokens: u64,
    stopped: u64,
    cut_by_length: u64,
    given_up: u64,
    first_token: Histogram,
    output_token: Histogram,
    request: Histogram,
    queue: Histogram,
}

/// A call that the engine served, as it ended.
#[derive(Clone, Copy, Debug, Default)]
pub struct Served {
    /// Tokens of the prompt.
    pub prompt: u32,
    /// Tokens that were written.
    pub written: u32,
    /// Whether it was written to its end, rather than given up by the caller.
    pub is_done: bool,
    /// Whether it ended at the limit of its length.
    pub is_cut_by_length: bool,
    /// How long it waited, in seconds.
    pub queue_s: Option<f64>,
    /// Until its first token, in seconds.
    pub first_token_s: Option<f64>,
    /// Until its end, in seconds.
    pub request_s: f64,
}

/// How things stand.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// Sequences that run.
    pub running: usize,
    /// Sequences that wait.
    pub waiting: usize,
    /// The part of the KV cache that is held.
    pub kv_usage: f64,
    /// What the engine counted.
    pub counts: Counts,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            prompt_tokens: 0,
            written_tokens: 0,
            stopped: 0,
            cut_by_length: 0,
            given_up: 0,
            first_token: Histogram::of(TTFT_S),
            output_token: Histogram::of(TPOT_S),
            request: Histogram::of(REQUEST_S),
            queue: Histogram::of(REQUEST_S),
        }
    }
}

impl Metrics {
    /// Notes a call.
    pub fn served(&mut self, served: &Served) {
        self.prompt_tokens += u64::from(served.prompt);
        self.written_tokens += u64::from(served.written);
        if let Some(queue_s) = served.queue_s {
            self.queue.record(queue_s);
        }
        if let Some(first_token_s) = served.first_token_s {
            self.first_token.record(first_token_s);
            if served.written > 1 {
                self.output_token.record((served.request_s - first_token_s) / f64::from(served.written - 1));
            }
        }
        match (served.is_done, served.is_cut_by_length) {
            (false, _) => self.given_up += 1,
            (true, true) => self.cut_by_length += 1,
            (true, false) => self.stopped += 1,
        }
        if served.is_done {
            self.request.record(served.request_s);
        }
    }

    /// Prometheus' text form.
    pub fn text(&self, model: &str, standing: Standing) -> String {
        let mut out = Text {
            labels: format!("engine=\"0\",model_name={}", serde_json::json!(model)),
            out: String::new(),
        };
        let Standing { running, waiting, kv_usage, counts } = standing;
        out.one("gauge", "num_requests_running", "Sequences that run.", running);
        out.one("gauge", "num_requests_waiting", "Sequences that wait.", waiting);
        out.one("gauge", "kv_cache_usage_perc", "The part of the KV cache that is held, 0 to 1.", kv_usage);
        out.one(
            "counter",
            "prefix_cache_queries_total",
            "Tokens looked up in the KV cache.",
            counts.prefix_queries,
        );
        out.one("counter", "prefix_cache_hits_total", "Tokens found in the KV cache.", counts.prefix_hits);
        out.one(
            "counter",
            "num_preemptions_total",
            "Sequences put out for want of blocks.",
            counts.preemptions,
        );
        out.one("counter", "prompt_tokens_total", "Tokens of prompts.", self.prompt_tokens);
        out.one("counter", "generation_tokens_total", "Tokens written.", self.written_tokens);
        out.head("counter", "request_success_total", "Calls by how they ended.");
        for (reason, count) in
            [("stop", self.stopped), ("length", self.cut_by_length), ("abort", self.given_up)]
        {
            out.line("request_success_total", &format!(",finished_reason=\"{reason}\""), count);
        }
        out.histogram("time_to_first_token_seconds", "Until the first token.", &self.first_token);
        // One value for each call, as vLLM's request_time_per_output_token_seconds; the older name is what scrapers know.
        out.histogram(
            "time_per_output_token_seconds",
            "Mean time of a token after the first.",
            &self.output_token,
        );
        out.histogram(
            "request_time_per_output_token_seconds",
            "The same, by its newer name.",
            &self.output_token,
        );
        out.histogram("e2e_request_latency_seconds", "Until the end.", &self.request);
        out.histogram("request_queue_time_seconds", "Until admitted.", &self.queue);
        out.out
    }
}

struct Text {
    labels: String,
    out: String,
}

impl Text {
    fn head(&mut self, kind: &str, name: &str, help: &str) {
        // Writing to a String cannot fail, here and below.
        _ = writeln!(self.out, "# HELP vllm:{name} {help}\n# TYPE vllm:{name} {kind}");
    }

    fn line(&mut self, name: &str, more: &str, value: impl std::fmt::Display) {
        _ = writeln!(self.out, "vllm:{name}{{{}{more}}} {value}", self.labels);
    }

    fn one(&mut self, kind: &str, name: &str, help: &str, value: impl std::fmt::Display) {
        self.head(kind, name, help);
        self.line(name, "", value);
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head("histogram", name, help);
        let mut sum = 0;
        for (bound, count) in histogram.bounds.iter().zip(&histogram.counts) {
            sum += count;
            self.line(&format!("{name}_bucket"), &format!(",le=\"{bound:?}\""), sum);
        }
        self.line(&format!("{name}_bucket"), ",le=\"+Inf\"", histogram.all);
        self.line(&format!("{name}_sum"), "", histogram.sum);
        self.line(&format!("{name}_count"), "", histogram.all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_fall_into_vllms_buckets() {
        let mut metrics = Metrics::default();
        let served = Served {
            prompt: 100,
            written: 11,
            is_done: true,
            queue_s: Some(0.0),
            first_token_s: Some(0.05),
            request_s: 0.55,
            ..Served::default()
        };
        metrics.served(&served);
        metrics.served(&Served { is_done: false, written: 2, ..served });
        let counts = Counts { prefix_queries: 9, prefix_hits: 3, preemptions: 0 };
        let text = metrics.text("small", Standing { running: 2, waiting: 1, kv_usage: 0.5, counts });
        for line in [
            "vllm:num_requests_running{engine=\"0\",model_name=\"small\"} 2",
            "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"small\"} 0.5",
            "vllm:prefix_cache_hits_total{engine=\"0\",model_name=\"small\"} 3",
            "vllm:generation_tokens_total{engine=\"0\",model_name=\"small\"} 13",
            "vllm:request_success_total{engine=\"0\",model_name=\"small\",finished_reason=\"abort\"} 1",
            "vllm:time_to_first_token_seconds_bucket{engine=\"0\",model_name=\"small\",le=\"0.04\"} 0",
            "vllm:time_to_first_token_seconds_bucket{engine=\"0\",model_name=\"small\",le=\"0.06\"} 2",
            "vllm:time_per_output_token_seconds_bucket{engine=\"0\",model_name=\"small\",le=\"+Inf\"} 2",
            "vllm:e2e_request_latency_seconds_count{engine=\"0\",model_name=\"small\"} 1",
            "# TYPE vllm:time_to_first_token_seconds histogram",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
        }
    }
}
