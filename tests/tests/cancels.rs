//! Requests that are taken back, on a broker: one whose model call is under way, and one that waits to be tried again.
//!
//! What is asked: each ends as `cancelled` long before it would otherwise, and once; its call is closed in the ledger.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says why by panicking")]

use forebay_schemas::{Attempt, Record as _};
use forebay_tests::{
    Client, New,
    model::{ModelServer, Says, last_said},
    product::{Up, command, finish},
    services, wait_for,
};
use serde_json::{Value, json};
use std::{path::Path, time::Duration};

/// How long anything may take that is not promised to be faster: the longest wait here is a minute.
const LIMIT: Duration = Duration::from_secs(180);

/// Where records wait for a minute.
const RETRY: &str = "retry.infer.1m";

/// A model that fails whoever says so, and lets the others wait for an hour.
fn model() -> ModelServer {
    ModelServer::start(|call| match last_said(call).contains("fails") {
        true => Says::Refusal(500, "it broke".to_owned()),
        false => Says::After(Duration::from_secs(3_600), Box::new(Says::Text("too late".to_owned()))),
    })
}

fn ask(client: &Client, id: &str, prompt: &str) {
    client.ask(json!({"id": id, "prompt": prompt, "cache": {"no_cache": true}}));
}

fn take_back(client: &Client, id: &str) {
    client.write("cancels", [New::from(json!({"id": id}))]);
}

/// Takes back a call under way and two of three records that wait; `show` is `forebay ledger show`.
fn check(client: &Client, model: &ModelServer, show: impl Fn(&str) -> Vec<Value>) {
    let (mut results, mut waiting) = (client.read("results"), client.read(RETRY));
    ask(client, "running", "How long is an hour?");
    wait_for("the call", LIMIT, || (!model.calls().is_empty()).then_some(()));
    take_back(client, "running");
    let ended = results.of_key("running", LIMIT).json();
    assert_eq!((&ended["status"], &ended["error"]["code"]), (&json!("cancelled"), &json!("cancelled")));
    let attempt = client.read("attempts").at_least(1, LIMIT).first().unwrap().value.clone().unwrap();
    let attempt = Attempt::decode(&attempt).unwrap();
    assert_eq!((&*attempt.status, attempt.error_code.as_deref()), ("cancelled", Some("cancelled")));
    assert_eq!(attempt.cost_nano_usd, None, "nobody says what it had cost");
    let entries = show(&attempt.call_id);
    let kinds: Vec<_> = entries.iter().map(|entry| (&entry["kind"], &entry["code"])).collect();
    assert_eq!(kinds, [(&json!("started"), &json!(null)), (&json!("failed"), &json!("cancelled"))]);

    for id in ["one", "two", "three"] {
        ask(client, id, &format!("What fails at {id}?"));
    }
    waiting.at_least(3, LIMIT);
    take_back(client, "two");
    take_back(client, "one");
    for id in ["one", "two"] {
        let result = results.of_key(id, LIMIT);
        let record = waiting.records().iter().find(|record| record.key_text() == id).unwrap();
        let due: i64 = record.header("forebay-retry-due").unwrap().parse().unwrap();
        assert_eq!(result.json()["status"], "cancelled");
        let early = due - result.timestamp_ms;
        assert!(early > 20_000, "{id} ended only {early} ms before it was due");
    }
    // All are read when they are due, and only one of them is tried again.
    wait_for("what waits a minute", LIMIT, || {
        (client.read("retry.infer.10m").to_the_end(LIMIT).len() == 1).then_some(())
    });
    wait_for("the end of the wait", LIMIT, || (client.lag("answer.infer.retry", RETRY) == 0).then_some(()));
    take_back(client, "three");
    assert_eq!(results.of_key("three", LIMIT).json()["status"], "cancelled");
    for topic in ["results", "outcomes"] {
        let mut ids: Vec<_> = client.read(topic).to_the_end(LIMIT).iter().map(|one| one.key_text()).collect();
        ids.sort();
        assert_eq!(ids, ["one", "running", "three", "two"], "{topic}");
    }
}

fn lines(data: &Path, arguments: &[&str]) -> Vec<Value> {
    let shown = finish(&mut command(data, arguments), LIMIT);
    assert_eq!(shown.code, 0, "{shown:?}");
    shown.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn what_is_taken_back_ends_at_once_on_the_embedded_broker() {
    let (data, model) = (tempfile::tempdir().unwrap(), model());
    let up = Up::start(data.path(), &["--model-url", &model.url(), "--model", "stub"]);
    check(&up.client(), &model, |call| lines(data.path(), &["ledger", "show", call, "--json"]));
    up.drain();
}

#[test]
fn what_is_taken_back_ends_at_once_on_kafka() {
    let Some(servers) = services::kafka() else { return };
    let (data, model) = (tempfile::tempdir().unwrap(), model());
    let prefix = format!("cancels-{}-", std::process::id());
    let cluster = ["--bootstrap-servers", &servers, "--topic-prefix", &prefix];
    let applied = finish(command(data.path(), &["topics", "apply"]).args(cluster), LIMIT);
    assert_eq!(applied.code, 0, "{applied:?}");
    let mut up = command(data.path(), &["up", "--admin", "127.0.0.1:0"]);
    up.args(cluster).args(["--model-url", &model.url(), "--model", "stub"]);
    let up = Up::wait("forebay up", &mut up);
    let client = Client::new(&servers, &prefix);
    check(&client, &model, |call| {
        let mut arguments = vec!["ledger", "show", call, "--json"];
        arguments.extend(cluster);
        lines(data.path(), &arguments)
    });
    up.drain();
}
