//! The pipeline under way: each stage a process of its own on a real Kafka, all in one on the embedded broker, while processes
//! are stopped, restarted and killed in mid-run.
//!
//! What is asked of them: every request has exactly one result, and what is no request has a result and a dead letter that say
//! so.

#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a test that cannot go on says why by panicking"
)]

use forebay_tests::{
    Client, New, Reader, Record, Running, Signal, free_port,
    model::{ModelServer, Says},
    product::{DRAIN, END, Up, command, finish},
    services, wait_for,
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Command,
    time::Duration,
};

const LIMIT: Duration = Duration::from_secs(120);
/// How long ten thousand requests may take on a machine that does much else.
const RUN: Duration = Duration::from_secs(300);

/// Each stage with the topic that it reads.
const STAGES: &[(&str, &str)] = &[
    ("look_up", "requests"),
    ("retrieve", "questions"),
    ("infer", "prompts"),
    ("validate", "completions"),
    ("publish", "endings"),
    ("fill", "endings"),
    ("index", "documents"),
];

/// What clients wrote.
#[derive(Debug, Default)]
struct Written {
    ids: BTreeSet<String>,
    without_id: usize,
    garbage: usize,
}

impl Written {
    fn all(&self) -> usize {
        self.ids.len() + self.without_id + self.garbage
    }

    /// Takes in what a Python client says that it has written, once it has ended.
    fn add(&mut self, client: &mut Running) {
        assert!(client.ended(LIMIT).success(), "the client: {}", client.stderr());
        let told: Value = serde_json::from_str(&client.stdout()).expect("a line of JSON");
        let count = |field: &str| usize::try_from(told[field].as_u64().unwrap()).unwrap();
        self.without_id += count("without_id");
        self.garbage += count("garbage");
        self.ids.extend(told["ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()));
    }
}

/// A Python client that asks as fast as it can.
fn produce(python: &Path, client: &Client, first: usize, count: usize) -> Running {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/produce.py");
    let mut command = Command::new(python);
    command.arg(script).arg(client.servers()).arg(client.topic("requests"));
    Running::start("produce.py", command.arg(first.to_string()).arg(count.to_string()))
}

/// How many results each key has.
fn by_key(results: &[Record]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for result in results {
        *counts.entry(result.key_text()).or_default() += 1;
    }
    counts
}

/// Waits until every request has a result, and every group has read all.
fn wait_for_all(client: &Client, results: &mut Reader, written: &Written) {
    results.until("a result for each request", RUN, |results| {
        (by_key(results).len() >= written.all()).then_some(())
    });
    for (stage, topic) in STAGES {
        wait_for(&format!("no lag of {stage}"), LIMIT, || {
            (client.lag(&format!("answer.{stage}"), topic) == 0).then_some(())
        });
    }
    results.to_the_end(LIMIT);
}

/// Each request has a result, and its own kind of result.
fn check(client: &Client, results: &Reader, written: &Written) {
    let of_key = by_key(results.records());
    let missing: Vec<_> = written.ids.iter().filter(|id| !of_key.contains_key(*id)).collect();
    assert!(missing.is_empty(), "without a result: {missing:?}");
    assert_eq!(of_key.len(), written.all());
    let parsed: BTreeMap<_, _> =
        results.records().iter().map(|record| (record.key_text(), record.json())).collect();
    for (key, result) in &parsed {
        assert_eq!(result["id"], key.as_str());
        let undecodable = result["status"] == "failed" && result["error"]["code"] == "undecodable";
        assert!(result["status"] == "answered" || (undecodable && !written.ids.contains(key)), "{result}");
    }
    let failed = parsed.values().filter(|result| result["status"] == "failed").count();
    assert_eq!(failed, written.garbage);
    let mut letters = client.read("dead-letters");
    let letters: BTreeSet<_> = letters.to_the_end(LIMIT).iter().map(Record::key_text).collect();
    assert_eq!(letters.len(), written.garbage, "{letters:?}");
}

fn check_each_once(client: &Client, results: &Reader, written: &Written) {
    let doubled: Vec<_> = by_key(results.records()).into_iter().filter(|(_, count)| *count != 1).collect();
    assert!(doubled.is_empty(), "{} with more than one result: {doubled:?}", doubled.len());
    check(client, results, written);
    // Dead letters are written at least once: after a kill the same one may come again, under the same key.
    let outcomes = client.read("outcomes").to_the_end(LIMIT).len();
    assert_eq!(outcomes, written.all(), "one row each");
}

#[test]
fn ten_thousand_requests_have_one_result_each_while_every_stage_is_restarted() {
    const REQUESTS: usize = 10_000;
    let (Some(servers), Some(python)) = (services::kafka(), services::python()) else { return };
    let data = tempfile::tempdir().unwrap();
    let prefix = format!("stages-{}-", std::process::id());
    let client = Client::new(&servers, &prefix);
    let on_kafka = |arguments: &[&str]| {
        let mut command = command(data.path(), arguments);
        command.args(["--bootstrap-servers", &servers, "--topic-prefix", &prefix]);
        command
    };
    let applied = finish(&mut on_kafka(&["topics", "apply"]), LIMIT);
    assert_eq!(applied.code, 0, "{applied:?}");
    assert!(applied.stdout.contains(&format!("+ {prefix}requests  12 partitions")), "{applied:?}");
    assert_eq!(client.partitions("requests"), 12);
    let again = finish(&mut on_kafka(&["topics", "apply"]), LIMIT);
    assert!(again.code == 0 && !again.stdout.contains("  + "), "nothing is left to make: {again:?}");

    let start = |stage: &str| {
        Up::wait(&format!("stage {stage}"), &mut on_kafka(&["run", "answer", "--stage", stage]))
    };
    // Two of infer, which share its partitions.
    let names: Vec<&str> = STAGES.iter().map(|(stage, _)| *stage).chain(["infer"]).collect();
    let mut stages: Vec<Up> = names.iter().map(|stage| start(stage)).collect();
    let guide = concat!(env!("CARGO_MANIFEST_DIR"), "/../pipelines/guides/delivery.md");
    let ingested = finish(&mut on_kafka(&["ingest", guide]), LIMIT);
    assert_eq!(ingested.code, 0, "{ingested:?}");

    let mut results = client.read("results");
    let mut clients = Vec::new();
    let share = REQUESTS / stages.len();
    for (number, stage) in names.iter().enumerate() {
        clients.push(produce(&python, &client, number * share, share));
        let seen = results.records().len();
        // It is under way: this share has just begun.
        results.at_least(seen + 50, LIMIT);
        stages.remove(0).drain();
        stages.push(start(stage));
    }
    let mut written = Written::default();
    for client in &mut clients {
        written.add(client);
    }
    assert_eq!(written.all(), REQUESTS);
    wait_for_all(&client, &mut results, &written);
    check_each_once(&client, &results, &written);
    // All at once, as when a machine goes down.
    for stage in &stages {
        stage.process.signal(Signal::TERM);
    }
    for stage in &mut stages {
        assert_eq!(stage.process.ended(DRAIN).code(), Some(0), "the end after SIGTERM");
    }
}

/// How many requests the embedded broker gets, and how many of them the model answers before the interruption.
const EMBEDDED_REQUESTS: usize = 1_000;
const FIRST: usize = 200;

/// Runs `up` until a part of the requests is answered and many are in flight, ends it by `end`, starts it again, and waits for
/// the rest.
fn interrupted(end: impl FnOnce(Up, &ModelServer, &mut Reader)) -> (Up, Reader, Written, tempfile::TempDir) {
    let model = ModelServer::start(|_| Says::Text("A stub answers.".to_owned()));
    model.let_through(FIRST);
    let data = tempfile::tempdir().unwrap();
    // The same port again, so that clients find the broker that is back.
    let listen = format!("127.0.0.1:{}", free_port());
    let url = model.url();
    let arguments =
        ["up", "--listen", &listen, "--admin", "127.0.0.1:0", "--model-url", &url, "--model", "stub"];
    let start = || Up::wait("forebay up", &mut command(data.path(), &arguments));
    let up = start();
    let client = up.client();
    let mut results = client.read("results");
    let mut written = Written::default();
    match services::python() {
        Some(python) => written.add(&mut produce(&python, &client, 0, EMBEDDED_REQUESTS)),
        None => {
            let ids: Vec<_> = (0..EMBEDDED_REQUESTS).map(|number| format!("r{number}")).collect();
            let request = |id: &String| json!({"id": id, "prompt": format!("What is {id}?"), "cache": {"no_cache": true}});
            client.write("requests", ids.iter().map(request).map(New::from));
            written.ids.extend(ids);
        }
    }
    // All that the model was let answer is out, and the model holds as many more as are in flight.
    wait_for("calls in flight", LIMIT, || (model.calls().len() >= FIRST + 64).then_some(()));
    results.at_least(FIRST, LIMIT);
    end(up, &model, &mut results);
    model.let_through(usize::MAX);
    let up = start();
    wait_for_all(&client, &mut results, &written);
    (up, results, written, data)
}

#[test]
fn requests_on_the_embedded_broker_have_one_result_each_when_all_is_restarted() {
    let (up, results, written, _data) = interrupted(|mut up, model, _| {
        up.process.signal(Signal::TERM);
        wait_for("the drain", LIMIT, || up.process.stderr().contains("draining").then_some(()));
        model.let_through(usize::MAX);
        assert_eq!(up.process.ended(END).code(), Some(0));
    });
    check_each_once(&up.client(), &results, &written);
    up.drain();
}

#[test]
fn requests_on_the_embedded_broker_have_one_result_each_when_all_is_killed() {
    let (up, results, written, _data) = interrupted(|up, model, results| {
        // Work is under way at every step.
        model.let_through(usize::MAX);
        results.at_least(FIRST + 50, LIMIT);
        up.kill();
    });
    check_each_once(&up.client(), &results, &written);
    up.drain();
}
