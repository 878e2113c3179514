//! What a collector receives, seen by a real one: an HTTP server that decodes OTLP.

#![expect(clippy::unwrap_used, reason = "what goes wrong fails the test")]

use axum::{Router, body::Bytes, extract::State, routing::post};
use forebay_operator::{Called, Event};
use forebay_telemetry::{Outcome, Settings, StartError, Telemetry};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::any_value::Value,
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use prost::Message;
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::net::TcpListener;

/// Everything that arrived.
#[derive(Clone, Default)]
struct Received {
    traces: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
    metrics: Arc<Mutex<Vec<Bytes>>>,
}

impl Received {
    fn spans(&self) -> Vec<Span> {
        let traces = self.traces.lock().unwrap();
        let scopes =
            traces.iter().flat_map(|request| &request.resource_spans).flat_map(|spans| &spans.scope_spans);
        scopes.flat_map(|scope| scope.spans.clone()).collect()
    }
}

async fn collector() -> (Received, String) {
    async fn traces(State(received): State<Received>, body: Bytes) {
        received.traces.lock().unwrap().push(ExportTraceServiceRequest::decode(body).unwrap());
    }
    async fn metrics(State(received): State<Received>, body: Bytes) {
        received.metrics.lock().unwrap().push(body);
    }
    let received = Received::default();
    let routes = Router::new().route("/v1/traces", post(traces)).route("/v1/metrics", post(metrics));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}/", listener.local_addr().unwrap());
    let server = axum::serve(listener, routes.with_state(received.clone()));
    tokio::spawn(server.into_future());
    (received, address)
}

fn traced(endpoint: String, sample_ratio: f64) -> Telemetry {
    let settings = Settings::new("forebay", "0.1.0");
    Telemetry::start(Settings { otlp_endpoint: Some(endpoint), sample_ratio, ..settings }).unwrap()
}

fn attribute(span: &Span, name: &str) -> Option<Value> {
    span.attributes.iter().find(|attribute| attribute.key == name)?.value.clone()?.value
}

fn text(text: &str) -> Option<Value> {
    Some(Value::StringValue(text.to_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_shows_both_hops() {
    let (received, address) = collector().await;
    let telemetry = traced(address, 1.0);

    let retrieve = telemetry.step("retrieve", "retrieve").in_group("forebay-retrieve");
    let infer = telemetry.step("infer", "infer");
    let first = retrieve.span(None, "questions", 3, 90);
    let carried = first.traceparent().unwrap();
    first.end(Outcome::Ok);
    let second = infer.span(Some(&carried), "prompts", 0, 7);
    assert_ne!(second.traceparent().unwrap(), carried);
    second.end(Outcome::Unavailable);
    telemetry.shutdown().await;

    let mut spans = received.spans();
    spans.sort_by_key(|span| span.start_time_unix_nano);
    let [first, second] = &spans[..] else { panic!("{} spans arrived", spans.len()) };
    assert_eq!(second.trace_id, first.trace_id);
    assert_eq!(second.parent_span_id, first.span_id);
    assert!(first.parent_span_id.is_empty());
    assert_eq!((first.name.as_str(), second.name.as_str()), ("process questions", "process prompts"));
    assert_eq!(first.kind, SpanKind::Consumer as i32);
    for (name, expected) in [
        ("stage", text("retrieve")),
        ("operator", text("retrieve")),
        ("outcome", text("ok")),
        ("messaging.system", text("kafka")),
        ("messaging.operation.type", text("process")),
        ("messaging.destination.name", text("questions")),
        ("messaging.destination.partition.id", text("3")),
        ("messaging.kafka.offset", Some(Value::IntValue(90))),
        ("messaging.consumer.group.name", text("forebay-retrieve")),
        ("error.type", None),
    ] {
        assert_eq!(attribute(first, name), expected, "{name}");
    }
    assert_eq!(attribute(second, "error.type"), text("unavailable"));
    assert_eq!(second.status.as_ref().unwrap().code, StatusCode::Error as i32);
    assert!(!received.metrics.lock().unwrap().is_empty(), "metrics are sent at the end too");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_try_of_a_model_call_is_a_span_within_its_hop() {
    let (received, address) = collector().await;
    let telemetry = traced(address, 1.0);
    let hop = telemetry.step("infer", "infer").span(None, "prompts", 0, 7);
    let failed = Called {
        provider: "openai_compatible".to_owned(),
        traceparent: hop.traceparent(),
        endpoint: Some("http://gpu-1:8000".to_owned()),
        model: "small".to_owned(),
        started_at_us: 1_700_000_000_000_000,
        duration_us: 1_500_000,
        error: Some("model_timeout"),
        ..Called::default()
    };
    let answered = Called {
        response_model: Some("small-2".to_owned()),
        started_at_us: failed.started_at_us + 2_000_000,
        ttft_us: Some(250_000),
        input_tokens: Some(300),
        output_tokens: Some(11),
        error: None,
        ..failed.clone()
    };
    // Without a hop it would be a trace of its own, that tells nobody anything.
    let alone = Called { traceparent: None, ..failed.clone() };
    for called in [failed, answered, alone] {
        telemetry.observe("infer", &Event::Called(called));
    }
    hop.end(Outcome::Ok);
    telemetry.shutdown().await;

    let mut spans = received.spans();
    spans.sort_by_key(|span| span.start_time_unix_nano);
    let [failed, answered, hop] = &spans[..] else { panic!("{} spans arrived", spans.len()) };
    for call in [failed, answered] {
        assert_eq!((&call.trace_id, &call.parent_span_id), (&hop.trace_id, &hop.span_id));
        assert_eq!((call.name.as_str(), call.kind), ("chat small", SpanKind::Client as i32));
        assert_eq!(call.end_time_unix_nano - call.start_time_unix_nano, 1_500_000_000);
        for (name, expected) in [
            ("gen_ai.operation.name", text("chat")),
            ("gen_ai.provider.name", text("openai_compatible")),
            ("gen_ai.request.model", text("small")),
            ("server.address", text("gpu-1")),
            ("server.port", Some(Value::IntValue(8_000))),
        ] {
            assert_eq!(attribute(call, name), expected, "{name}");
        }
    }
    let number = |number| Some(Value::IntValue(number));
    for (name, of_failed, of_answered) in [
        ("error.type", text("model_timeout"), None),
        ("gen_ai.response.model", None, text("small-2")),
        ("gen_ai.usage.input_tokens", None, number(300)),
        ("gen_ai.usage.output_tokens", None, number(11)),
        ("gen_ai.response.time_to_first_chunk", None, Some(Value::DoubleValue(0.25))),
    ] {
        assert_eq!((attribute(failed, name), attribute(answered, name)), (of_failed, of_answered), "{name}");
    }
    assert_eq!(failed.status.as_ref().unwrap().code, StatusCode::Error as i32);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_root_decides_what_is_recorded() {
    let (received, address) = collector().await;
    let telemetry = traced(address, 0.0);
    let meter = telemetry.step("infer", "infer");
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";

    let unsampled = meter.span(Some(&format!("00-{trace}-00f067aa0ba902b7-00")), "prompts", 0, 1);
    assert!(unsampled.traceparent().unwrap().starts_with(&format!("00-{trace}-")));
    assert!(unsampled.traceparent().unwrap().ends_with("-00"));
    unsampled.end(Outcome::Ok);
    // A trace that begins here falls under the ratio, which is zero.
    let begun_here = meter.span(None, "prompts", 0, 2);
    assert!(begun_here.traceparent().unwrap().ends_with("-00"));
    begun_here.end(Outcome::Ok);
    let sampled = meter.span(Some(&format!("00-{trace}-00f067aa0ba902b7-01")), "prompts", 0, 3);
    assert!(sampled.traceparent().unwrap().ends_with("-01"));
    sampled.end(Outcome::Ok);
    telemetry.shutdown().await;

    let offsets: Vec<_> =
        received.spans().iter().map(|span| attribute(span, "messaging.kafka.offset")).collect();
    assert_eq!(offsets, [Some(Value::IntValue(3))]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_absent_collector_stops_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let telemetry = traced(address, 1.0);
    let meter = telemetry.step("infer", "infer");
    for offset in 0..20_000 {
        meter.received("prompts", 1);
        meter.span(None, "prompts", 0, offset).end(Outcome::Ok);
    }
    tokio::time::timeout(Duration::from_secs(10), telemetry.shutdown()).await.unwrap();
    assert!(telemetry.prometheus().contains("forebay_step_received_records_total{"));
    // What comes after the end is counted still, and has no span to hand on.
    assert_eq!(meter.span(None, "prompts", 0, 0).traceparent(), None);
}

#[test]
fn without_a_collector_the_parent_goes_on_unchanged() {
    let telemetry = Telemetry::start(Settings::new("forebay", "0.1.0")).unwrap();
    let span = telemetry.step("infer", "infer").span(Some("00-as-it-came"), "prompts", 0, 1);
    assert_eq!(span.traceparent().as_deref(), Some("00-as-it-came"));
}

#[test]
fn settings_that_cannot_be_are_refused_by_name() {
    for endpoint in ["collector:4318", "ftp://collector", "http://", "", "http://collector/?token=x"] {
        let settings = Settings::new("forebay", "0.1.0");
        let settings = Settings { otlp_endpoint: Some(endpoint.to_owned()), ..settings };
        let error = Telemetry::start(settings).unwrap_err();
        assert!(matches!(&error, StartError::Endpoint { endpoint: told } if told == endpoint), "{error}");
    }
    for sample_ratio in [-0.1, 1.1, f64::NAN] {
        let error =
            Telemetry::start(Settings { sample_ratio, ..Settings::new("forebay", "0.1.0") }).unwrap_err();
        assert!(matches!(error, StartError::SampleRatio { .. }), "{error}");
    }
}
