//! What an operator sees of a process from outside: metrics, whether it is alive and ready, and traces that go on.

#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a test that cannot go on says why by panicking"
)]

use forebay_tests::{
    New, Signal,
    model::{ModelServer, Says},
    product::{END, Up, command},
    wait_for,
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, time::Duration};

const LIMIT: Duration = Duration::from_secs(120);

/// The series of `/metrics`, each with its value.
fn metrics(up: &Up) -> BTreeMap<String, f64> {
    let (status, body) = up.get("/metrics");
    assert_eq!(status, 200, "{body}");
    let series = |line: &str| {
        let (name, value) = line.rsplit_once(' ').expect(line);
        (name.to_owned(), value.parse().expect(line))
    };
    body.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(series).collect()
}

/// The sum of a metric over all series that have these labels.
fn sum(metrics: &BTreeMap<String, f64>, name: &str, labels: &[&str]) -> f64 {
    let is_of = |series: &&String| {
        series.split('{').next() == Some(name) && labels.iter().all(|label| series.contains(label))
    };
    metrics.keys().filter(is_of).map(|series| metrics[series]).sum()
}

/// A health page: whether all is well, and the names of its parts.
fn health(up: &Up, path: &str) -> (u16, Vec<String>) {
    let (status, body) = up.get(path);
    let page: Value = serde_json::from_str(&body).expect(&body);
    assert_eq!(page["ok"], status == 200, "{body}");
    let parts = page["components"].as_array().expect(&body).iter();
    (status, parts.map(|part| part["name"].as_str().unwrap().to_owned()).collect())
}

#[test]
fn every_step_of_a_request_is_counted() {
    let data = tempfile::tempdir().unwrap();
    let up = Up::start(data.path(), &[]);
    let client = up.client();
    let mut results = client.read("results");
    for number in 0..3 {
        client.ask(json!({"id": format!("r{number}"), "prompt": format!("Is {number} counted?")}));
    }
    client.write("requests", [New::value("garbage")]);
    results.at_least(4, LIMIT);
    // Of twelve partitions each: what it reads, its backfill lane, three retry topics, and what overflows.
    for (stage, ok, undecodable, partitions) in [
        ("look_up", 3.0, 1.0, 72.0),
        ("retrieve", 3.0, 0.0, 72.0),
        ("infer", 3.0, 0.0, 72.0),
        ("validate", 3.0, 0.0, 72.0),
        ("publish", 4.0, 0.0, 48.0),
    ] {
        // A record is counted a moment after what became of it is seen, and a process is ready before it has all its partitions.
        let label = format!("stage=\"{stage}\"");
        wait_for(&format!("the records of {stage}"), LIMIT, || {
            let metrics = metrics(&up);
            let of = |outcome: &str| {
                sum(
                    &metrics,
                    "forebay_step_finished_records_total",
                    &[&label, &format!("outcome=\"{outcome}\"")],
                )
            };
            let assigned = sum(&metrics, "forebay_step_assigned_partitions", &[&label]);
            ((of("ok"), of("undecodable"), assigned) == (ok, undecodable, partitions)).then_some(())
        });
        let metrics = metrics(&up);
        assert!(sum(&metrics, "forebay_step_duration_seconds_count", &[&label]) >= ok);
    }
    let metrics = metrics(&up);
    assert_eq!(sum(&metrics, "forebay_step_received_records_total", &["topic=\"requests\""]), 4.0);
    let secret = metrics.keys().find(|series| series.contains("r0") || series.contains("counted?"));
    assert_eq!(secret, None, "labels never hold ids or texts");
    assert_eq!(up.get("/nothing").0, 404);
    up.drain();
}

#[test]
fn a_process_says_whether_it_is_alive_and_ready_and_is_not_ready_while_it_drains() {
    let model = ModelServer::start(|_| Says::Text("Held.".to_owned()));
    model.let_through(0);
    let (data, url) = (tempfile::tempdir().unwrap(), model.url());
    let mut up = Up::start(data.path(), &["--model-url", &url, "--model", "stub"]);
    let (alive, parts) = health(&up, "/healthz");
    assert_eq!(alive, 200);
    for stage in ["look_up", "retrieve", "infer", "validate", "publish", "fill", "index"] {
        assert!(parts.contains(&format!("consumer answer.{stage}")), "{parts:?}");
    }
    let (ready, parts) = health(&up, "/readyz");
    assert!(ready == 200 && parts.contains(&"table chunks".to_owned()), "{parts:?}");

    // A call that the model holds keeps the drain going.
    let client = up.client();
    client.ask(json!({"id": "held", "prompt": "Who holds it?"}));
    wait_for("the call", LIMIT, || (model.calls().len() == 1).then_some(()));
    up.process.signal(Signal::TERM);
    wait_for("a word of the drain", LIMIT, || (health(&up, "/readyz").0 == 503).then_some(()));
    assert_eq!(health(&up, "/healthz").0, 200, "it is well, and leaving");
    model.let_through(1);
    assert_eq!(up.process.ended(END).code(), Some(0));

    // What was in flight has been finished before the end.
    let up = Up::start(data.path(), &["--model-url", &url, "--model", "stub"]);
    let result = up.client().read("results").of_key("held", LIMIT).json();
    assert_eq!((&result["status"], model.calls().len()), (&json!("answered"), 1), "{result}");
    up.drain();
}

#[test]
fn a_stage_of_its_own_has_an_admin_port_of_its_own() {
    let data = tempfile::tempdir().unwrap();
    let up = Up::start(data.path(), &[]);
    let run =
        Up::wait("a second publish", &mut command(data.path(), &["run", "answer", "--stage", "publish"]));
    assert_ne!(run.admin, up.admin);
    let (ready, parts) = health(&run, "/readyz");
    assert!(ready == 200 && parts.contains(&"consumer answer.publish".to_owned()), "{parts:?}");
    assert!(!parts.iter().any(|part| part.contains("infer")), "{parts:?}");
    let of = |up: &Up| sum(&metrics(up), "forebay_step_assigned_partitions", &["stage=\"publish\""]);
    // They share the partitions of the one group.
    wait_for("half of the partitions", LIMIT, || (of(&run) == 24.0 && of(&up) == 24.0).then_some(()));
    run.drain();
    wait_for("all partitions", LIMIT, || (of(&up) == 48.0).then_some(()));
    up.drain();
}

#[test]
fn the_trace_of_a_client_goes_on_in_the_headers_of_its_result() {
    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    let data = tempfile::tempdir().unwrap();
    let up = Up::start(data.path(), &[]);
    let client = up.client();
    let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    let ask = |id: &str| New::from(json!({"id": id, "prompt": "Where does the trace go?"}));
    client.write("requests", [ask("traced").header("traceparent", parent.clone()), ask("untraced")]);
    let mut results = client.read("results");
    let traced = results.of_key("traced", LIMIT).header("traceparent").expect("a trace that goes on");
    let mut parts = traced.split('-');
    assert_eq!((parts.next(), parts.next()), (Some("00"), Some(TRACE)), "{traced}");
    assert!(parts.next().is_some_and(|span| span.len() == 16), "{traced}");
    assert_eq!(parts.next(), Some("01"), "{traced}");
    let other = results.of_key("untraced", LIMIT).header("traceparent");
    assert!(other.is_none_or(|other| !other.contains(TRACE)));
    up.drain();
}

#[test]
fn calls_of_a_pool_and_its_endpoints_are_told_under_the_names_that_were_chosen() {
    const CALLS: f64 = 6.0;
    let models = [0, 1].map(|_| ModelServer::start(|_| Says::Text("Told in a few words.".to_owned())));
    let [one, two] = [models[0].url(), models[1].url()];
    for (opted_in, first, not) in [
        ("", "gen_ai_server_time_to_first_token_seconds_count", "chunk"),
        (
            "http,gen_ai_latest_experimental",
            "gen_ai_client_operation_time_to_first_chunk_seconds_count",
            "gen_ai_server",
        ),
    ] {
        let data = tempfile::tempdir().unwrap();
        let model = ["--model-url", &one, "--model-url", &two, "--model", "stub"];
        let all = [&["up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"], &model[..]].concat();
        let up =
            Up::wait("forebay up", command(data.path(), &all).env("OTEL_SEMCONV_STABILITY_OPT_IN", opted_in));
        let client = up.client();
        let mut results = client.read("results");
        for number in 0..6 {
            client.ask(
                json!({"id": format!("r{number}"), "prompt": format!("Is {number} told?"), "stream": true}),
            );
        }
        results.at_least(6, LIMIT);
        let seen = metrics(&up);
        let of = |name: &str, labels: &[&str]| sum(&seen, name, labels);
        let chat = ["gen_ai_operation_name=\"chat\"", "gen_ai_provider_name=\"openai_compatible\""];
        let answered =
            [&chat[..], &["gen_ai_request_model=\"stub\"", "gen_ai_response_model=\"stub\""]].concat();
        assert_eq!(of("gen_ai_client_operation_duration_seconds_count", &answered), CALLS, "{seen:?}");
        assert_eq!(of(first, &answered), CALLS, "{seen:?}");
        let output = ["gen_ai_token_type=\"output\""];
        assert_eq!(of("gen_ai_client_token_usage_sum", &output), 5.0 * CALLS);
        assert_eq!(seen.keys().find(|series| series.contains(not)), None);
        assert_eq!(of("forebay_call_overhead_seconds_count", &["stage=\"infer\""]), CALLS);
        for what in ["room", "ledger"] {
            assert_eq!(of("forebay_call_wait_seconds_count", &[&format!("for=\"{what}\"")]), CALLS, "{what}");
        }
        assert_eq!(of("forebay_pool_calls_total", &["outcome=\"ok\""]), CALLS);
        assert_eq!(of("forebay_pool_breaker", &["state=\"closed\""]), 2.0);
        for url in [&one, &two] {
            let endpoint = format!("endpoint=\"{}\"", url.trim_end_matches("/v1"));
            assert_eq!(of("forebay_pool_places", &[&endpoint]), 64.0);
            assert_eq!(of("forebay_pool_in_flight_calls", &[&endpoint]), 0.0);
        }
        let pieces = of("forebay_deltas_records_total", &["outcome=\"sent\"", "stage=\"infer\""]);
        assert!(
            pieces >= CALLS && of("forebay_deltas_records_total", &["outcome=\"lost\""]) == 0.0,
            "{pieces}"
        );
        up.drain();
    }
}
