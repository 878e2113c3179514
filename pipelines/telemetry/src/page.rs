//! Writes the reference of all metrics, METRICS.md, from the table of instruments.

use crate::{
    GenAi,
    instruments::{DECLARED, Declared, Kind},
};
use std::fmt::Write;

/// METRICS.md: every metric with its name in Prometheus and in OpenTelemetry, unit, labels and meaning.
pub fn metrics_reference() -> String {
    let mut page = String::from(
        "# Metrics\n\n\
         Written from the table of instruments in src/instruments.rs; a test fails where this page is stale, and\n\
         `FOREBAY_UPDATE=1 cargo test -p forebay-telemetry` writes it anew.\n\n\
         `GET /metrics` on the admin port gives them in the Prometheus text format, under the first name of each\n\
         entry; where a collector is set, they also go to its `/v1/metrics` over OTLP, under the second. Labels hold\n\
         words of bounded sets, never ids, tenants or texts. What does not fit is counted as `other`, and series\n\
         beyond an instrument's limit under the label `otel_metric_overflow`.\n\n\
         Names of `gen_ai_*` are those of version 1.41 of OpenTelemetry's semantic conventions. Where the setting\n\
         `otel.semconv_stability_opt_in`, or the variable `OTEL_SEMCONV_STABILITY_OPT_IN` that all of OpenTelemetry\n\
         knows, names `gen_ai_latest_experimental`, they are the latest.\n\n\
         `target_info` names the service and its version.\n",
    );
    for declared in DECLARED {
        entry(&mut page, declared);
    }
    page
}

fn entry(page: &mut String, declared: &Declared) {
    let kind = match declared.kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram(_) => "histogram",
    };
    let labels = declared.labels.iter().chain(declared.sometimes);
    let labels: Vec<String> = labels.map(|label| format!("`{}`", sanitized(label))).collect();
    // Writing to a string cannot go wrong.
    let _ = write!(
        page,
        "\n## `{}`\n\n{}\n\n- {kind}, unit `{}`, OpenTelemetry name `{}`\n- labels: {}\n- at most {} series\n",
        declared.prometheus_name(),
        declared.meaning,
        declared.unit,
        declared.name,
        labels.join(", "),
        declared.series_max,
    );
    if let Some(only) = declared.only {
        let names = match only {
            GenAi::V1_41 => "v1.41",
            GenAi::Latest => "the latest conventions",
        };
        let _ = writeln!(page, "- under the names of {names} only");
    }
    if let Kind::Histogram(bounds) = declared.kind {
        let bounds: Vec<String> = bounds.iter().map(f64::to_string).collect();
        let _ = writeln!(page, "- buckets: {}", bounds.join(", "));
    }
}

impl Declared {
    /// The name under which Prometheus users see it.
    pub(crate) fn prometheus_name(&self) -> String {
        let unit = match self.unit {
            "s" => "_seconds",
            "By" => "_bytes",
            "1" => "_ratio",
            _ => "",
        };
        let total = if self.kind == Kind::Counter { "_total" } else { "" };
        format!("{}{unit}{total}", sanitized(self.name))
    }
}

fn sanitized(name: &str) -> String {
    name.replace('.', "_")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TableFlush;
    use crate::{
        Lost, Outcome, Settings, StepMeter, Telemetry,
        pool::{Endpoint, EndpointModel},
        words,
    };
    use forebay_operator::{Called, Event, Operation};
    use std::{
        collections::{BTreeMap, BTreeSet},
        time::Duration,
    };

    #[test]
    fn the_page_is_not_stale() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/METRICS.md");
        let page = metrics_reference();
        if std::env::var_os("FOREBAY_UPDATE").is_some() {
            std::fs::write(path, &page).unwrap();
        }
        let stands = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            stands == page,
            "METRICS.md is stale; FOREBAY_UPDATE=1 cargo test -p forebay-telemetry writes it"
        );
    }

    /// A metric as Prometheus reads it: its type, and its samples by labels.
    #[derive(Debug, Default)]
    struct Family {
        kind: String,
        help: bool,
        samples: Vec<(String, BTreeMap<String, String>, f64)>,
    }

    /// Reads the text format strictly: whatever is not a line of it fails the test.
    fn parse(text: &str) -> BTreeMap<String, Family> {
        let mut families = BTreeMap::<String, Family>::new();
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                families.entry(help.split_once(' ').unwrap().0.to_owned()).or_default().help = true;
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                families.get_mut(name).unwrap().kind = kind.to_owned();
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let (name, labels) =
                    series.strip_suffix('}').and_then(|series| series.split_once('{')).unwrap();
                let label = |pair: &str| {
                    let (name, value) = pair.split_once('=').unwrap();
                    (name.to_owned(), value.strip_prefix('"').unwrap().strip_suffix('"').unwrap().to_owned())
                };
                let labels = labels.split(',').map(label).collect();
                let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| {
                    let base = name.strip_suffix(suffix)?;
                    families.get(base).is_some_and(|family| family.kind == "histogram").then_some(base)
                });
                let family = families.get_mut(family.unwrap_or(name)).expect("a sample comes after its type");
                family.samples.push((name.to_owned(), labels, value.parse().unwrap()));
            }
        }
        families
    }

    fn quiet() -> Telemetry {
        named_by(GenAi::V1_41)
    }

    fn named_by(gen_ai: GenAi) -> Telemetry {
        Telemetry::start(Settings { gen_ai, ..Settings::new("forebay", "0.1.0") }).unwrap()
    }

    fn called(model: &str, error: Option<&'static str>) -> Event {
        Event::Called(Called {
            provider: "openai".to_owned(),
            model: model.to_owned(),
            response_model: error.is_none().then(|| format!("{model}-0613")),
            duration_us: 1_100_000,
            ttft_us: Some(100_000),
            input_tokens: Some(300),
            output_tokens: Some(11),
            gaps_us: vec![50_000, 50_000],
            error,
            ..Called::default()
        })
    }

    fn ranked() -> Event {
        Event::Called(Called {
            operation: Operation::Rerank,
            texts: Some(32),
            provider: "openai_compatible".to_owned(),
            model: "ranker".to_owned(),
            duration_us: 30_000,
            ..Called::default()
        })
    }

    fn standing(endpoint: &str, name: &str, breaker: &'static str) -> Endpoint {
        let is_up = breaker == "closed";
        Endpoint {
            name: name.to_owned(),
            endpoint: endpoint.to_owned(),
            is_ready: true,
            in_flight: 3,
            places: 64,
            tokens: 4_096,
            ended: vec![("ok", 7), ("failed", 5)],
            waiting: is_up.then_some(2.0),
            kv_used: is_up.then_some(0.25),
            models: vec![EndpointModel { model: "m".to_owned(), breaker, share: 1.0, limit: 45.5 }],
        }
    }

    /// Moves every instrument. The meter is handed back because a step that is gone tells no lag.
    fn exercise(telemetry: &Telemetry) -> StepMeter {
        let meter = telemetry.step("infer", "infer");
        meter.received("prompts", 100);
        meter.emitted("completions", 2, 300);
        meter.finished(Outcome::Ok, Duration::from_millis(20), Duration::from_millis(3));
        meter.finished(Outcome::Rejected, Duration::from_millis(1), Duration::ZERO);
        meter.retried();
        meter.deduplicated();
        meter.repeated(1);
        meter.ledger_written("started");
        meter.ledger_replayed();
        meter.ledger_ambiguous(1);
        meter.ledger_waited(Duration::from_secs(3));
        meter.dead_lettered("rejected");
        meter.set_aside("retry");
        meter.claim_put(300_000);
        meter.claim_fetched(300_000);
        meter.in_flight(5);
        meter.buffered(7, 700);
        meter.assigned(12);
        meter.paused(1);
        meter.lag("prompts", 3, 42);
        meter.committed("prompts", 3, 90);
        meter.rebalanced();
        meter.seconds_of_work_queued(1.5);
        telemetry.observe("cache", &Event::CacheLookedUp { status: "hit" });
        telemetry.observe("retrieve", &Event::Retrieved { passages: 4 });
        telemetry.observe("retrieve", &Event::Embedded { outcome: "ok" });
        telemetry.observe("retrieve", &Event::Reranked { outcome: "ok" });
        telemetry.observe("retrieve", &ranked());
        telemetry.observe("validate", &Event::Judged { judgement: "pass" });
        telemetry.delta("infer", 90, true);
        telemetry.delta("infer", 90, false);
        telemetry.observe("infer", &called("small", None));
        telemetry.observe("infer", &called("small", Some("model_unavailable")));
        telemetry.observe("infer", &Event::CallWaited { what: "room", duration_us: 300_000 });
        telemetry.observe("infer", &Event::CallExtended { how: "retry" });
        telemetry.observe("infer", &Event::CallOverhead { duration_us: 120 });
        let table = telemetry.table("outcomes");
        table.flushed(TableFlush { rows: 12, rejected: 1, ..TableFlush::default() });
        table.fresh(Duration::from_secs(3));
        table.lost(0);
        telemetry.alerts().told("cap", "firing");
        telemetry.alerts().lost(1, Lost::Webhook);
        telemetry.watch_pool(|| {
            let at = [
                ("http://a:1", "m", "closed"),
                ("http://b:1", "mini", "open"),
                ("http://b:1", "large", "ramp"),
            ];
            at.map(|(endpoint, name, breaker)| standing(endpoint, name, breaker)).into()
        });
        meter
    }

    #[test]
    fn prometheus_shows_all_that_is_declared_and_nothing_else() {
        [GenAi::V1_41, GenAi::Latest].into_iter().for_each(all_that_is_declared_and_nothing_else);
    }

    fn all_that_is_declared_and_nothing_else(names: GenAi) {
        let telemetry = named_by(names);
        let _meter = exercise(&telemetry);
        let mut shown = parse(&telemetry.prometheus());
        let target = shown.remove("target_info").unwrap();
        assert_eq!(target.samples[0].1["service_name"], "forebay");
        assert_eq!(target.samples[0].1["service_version"], "0.1.0");
        for declared in DECLARED.iter().filter(|declared| declared.only.is_none_or(|only| only == names)) {
            let name = declared.prometheus_name();
            let family = shown.remove(&name).unwrap_or_else(|| panic!("{name} is declared and not shown"));
            let kind = match declared.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram(_) => "histogram",
            };
            assert_eq!((family.kind.as_str(), family.help), (kind, true), "{name}");
            let mut bounds = BTreeSet::new();
            for (_, mut labels, _) in family.samples {
                bounds.extend(labels.remove("le"));
                declared.sometimes.iter().for_each(|label| drop(labels.remove(&sanitized(label))));
                let expected: BTreeSet<String> =
                    declared.labels.iter().map(|label| sanitized(label)).collect();
                assert_eq!(labels.into_keys().collect::<BTreeSet<_>>(), expected, "{name}");
            }
            if let Kind::Histogram(declared) = declared.kind {
                let declared = declared.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
                assert_eq!(bounds, declared.collect(), "{name}");
            }
        }
        assert!(shown.is_empty(), "shown and not declared: {:?}", shown.keys());
    }

    /// The value of the one series whose labels contain these.
    fn value(telemetry: &Telemetry, sample: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let families = parse(&telemetry.prometheus());
        let matches = |of: &BTreeMap<String, String>| {
            labels.iter().all(|(name, value)| of.get(*name).is_some_and(|label| label == value))
        };
        let samples = families.values().flat_map(|family| &family.samples);
        let mut found =
            samples.filter(|(name, of, _)| name == sample && matches(of)).map(|(_, _, value)| *value);
        let value = found.next();
        assert_eq!(found.next(), None, "{sample} {labels:?} is more than one series");
        value
    }

    #[test]
    fn what_is_counted_is_what_is_shown() {
        let telemetry = quiet();
        let _meter = exercise(&telemetry);
        for (sample, labels, expected) in [
            ("forebay_step_received_bytes_total", &[("topic", "prompts")][..], 100.0),
            ("forebay_step_emitted_records_total", &[("topic", "completions")], 2.0),
            ("forebay_step_finished_records_total", &[("outcome", "rejected")], 1.0),
            ("forebay_step_finished_records_total", &[("outcome", "panicked")], 0.0),
            ("forebay_step_duration_seconds_sum", &[("outcome", "ok")], 0.02),
            ("forebay_step_queue_wait_seconds_count", &[], 2.0),
            ("forebay_step_lag", &[("topic", "prompts"), ("partition", "3")], 42.0),
            ("forebay_step_committed_offset", &[("stage", "infer"), ("partition", "3")], 90.0),
            ("forebay_step_work_queued_seconds", &[], 1.5),
            ("forebay_table_rows_total", &[("table", "outcomes")], 12.0),
            ("forebay_table_rejected_rows_total", &[("table", "outcomes")], 1.0),
            ("forebay_table_freshness_seconds_sum", &[("table", "outcomes")], 3.0),
            ("forebay_cache_lookups_total", &[("stage", "cache"), ("status", "hit")], 1.0),
            ("forebay_embedded_questions_total", &[("stage", "retrieve"), ("outcome", "ok")], 1.0),
            ("forebay_reranked_questions_total", &[("stage", "retrieve"), ("outcome", "ok")], 1.0),
            ("forebay_call_batch_items_sum", &[("gen_ai_operation_name", "rerank")], 32.0),
            ("forebay_deltas_bytes_total", &[("stage", "infer"), ("outcome", "sent")], 90.0),
            ("forebay_deltas_records_total", &[("stage", "infer"), ("outcome", "lost")], 1.0),
            ("gen_ai_client_operation_duration_seconds_sum", &[("error_type", "model_unavailable")], 1.1),
            (
                "gen_ai_client_token_usage_sum",
                &[("gen_ai_token_type", "input"), ("gen_ai_response_model", "small-0613")],
                300.0,
            ),
            ("gen_ai_client_operation_duration_seconds_sum", &[("gen_ai_response_model", "small-0613")], 1.1),
            // Of the one that was answered only.
            ("gen_ai_server_time_to_first_token_seconds_sum", &[], 0.1),
            // One second for the ten tokens after the first.
            ("gen_ai_server_time_per_output_token_seconds_sum", &[], 0.1),
            ("forebay_call_wait_seconds_sum", &[("for", "room")], 0.3),
            ("forebay_call_extended_total", &[("how", "retry")], 1.0),
            ("forebay_call_overhead_seconds_bucket", &[("le", "0.00015")], 1.0),
            // Two at one origin are told apart, each with its own.
            ("forebay_pool_calls_total", &[("name", "mini"), ("outcome", "failed")], 5.0),
            ("forebay_pool_calls_total", &[("name", "large"), ("outcome", "failed")], 5.0),
            ("forebay_pool_breaker", &[("name", "mini"), ("state", "open")], 1.0),
            ("forebay_pool_breaker", &[("name", "mini"), ("state", "closed")], 0.0),
            ("forebay_pool_breaker", &[("name", "large"), ("state", "ramp")], 1.0),
            ("forebay_pool_limit", &[("endpoint", "http://a:1"), ("model", "m")], 45.5),
            // What an endpoint did not say of late is not told: there is one series.
            ("forebay_pool_engine_kv_used_ratio", &[], 0.25),
        ] {
            assert_eq!(value(&telemetry, sample, labels), Some(expected), "{sample} {labels:?}");
        }
    }

    #[test]
    fn the_names_of_the_conventions_are_chosen_as_opentelemetry_has_it() {
        for (list, expected) in [
            ("", GenAi::V1_41),
            ("http", GenAi::V1_41),
            ("gen_ai_latest_experimental", GenAi::Latest),
            ("http/dup, gen_ai_latest_experimental", GenAi::Latest),
        ] {
            assert_eq!(GenAi::opted_in(list), expected, "{list:?}");
        }
        let telemetry = named_by(GenAi::Latest);
        let _meter = exercise(&telemetry);
        let of = |sample, error| value(&telemetry, sample, &[("error_type", error)]);
        let failed = |sample| of(sample, "model_unavailable");
        assert_eq!(failed("gen_ai_client_operation_time_to_first_chunk_seconds_sum"), Some(0.1));
        assert_eq!(failed("gen_ai_client_operation_time_per_output_chunk_seconds_count"), Some(2.0));
        assert_eq!(failed("gen_ai_client_operation_time_per_output_chunk_seconds_sum"), Some(0.1));
    }

    #[test]
    fn the_lag_of_a_revoked_partition_is_no_longer_told() {
        let telemetry = quiet();
        let meter = telemetry.step("infer", "infer");
        meter.lag("prompts", 3, 42);
        meter.committed("prompts", 3, 90);
        meter.lag("prompts", 4, 1);
        meter.revoked("prompts", 3);
        assert_eq!(value(&telemetry, "forebay_step_lag", &[("partition", "3")]), None);
        assert_eq!(value(&telemetry, "forebay_step_committed_offset", &[("partition", "3")]), None);
        assert_eq!(value(&telemetry, "forebay_step_lag", &[("partition", "4")]), Some(1.0));
    }

    #[test]
    fn models_that_clients_invent_share_one_series() {
        let telemetry = quiet();
        for n in 0..1_000 {
            telemetry.observe("infer", &called(&format!("model-{n}"), None));
        }
        let families = parse(&telemetry.prometheus());
        let durations = &families["gen_ai_client_operation_duration_seconds"].samples;
        let models: BTreeSet<&str> =
            durations.iter().map(|(_, labels, _)| &*labels["gen_ai_request_model"]).collect();
        assert_eq!(models.len(), 33);
        let other = [("gen_ai_request_model", words::OTHER)];
        assert_eq!(value(&telemetry, "gen_ai_client_operation_duration_seconds_count", &other), Some(968.0));
    }

    #[test]
    fn two_meters_of_one_step_count_together() {
        let telemetry = quiet();
        telemetry.step("infer", "infer").received("prompts", 1);
        telemetry.step("infer", "infer").clone().received("prompts", 1);
        assert_eq!(value(&telemetry, "forebay_step_received_records_total", &[]), Some(2.0));
    }
}
