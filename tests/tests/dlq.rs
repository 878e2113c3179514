//! Dead letters are seen and redriven: `forebay dlq list`, `show` and `redrive`, on the embedded broker and on Kafka.
//!
//! What is asked of them: a redriven request has a second result under its id, and one only, however often it is redriven;
//! what cannot be redriven says why.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says why by panicking")]

use forebay_tests::{
    Client, New, Reader, Record,
    model::{ModelServer, Says},
    product::{Finished, Up, command, finish},
    services, wait_for,
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

const LIMIT: Duration = Duration::from_secs(120);

/// Stages at work whose model server refuses all until it is mended.
struct Site {
    up: Up,
    client: Client,
    data: tempfile::TempDir,
    /// What every command needs to find the cluster.
    cluster: Vec<String>,
    mended: Arc<AtomicBool>,
    _model: ModelServer,
}

impl Site {
    fn start(cluster: Vec<String>, start: impl FnOnce(&Path, &[&str]) -> (Up, Client)) -> Self {
        let mended = Arc::new(AtomicBool::new(false));
        let is_mended = Arc::clone(&mended);
        let model = ModelServer::start(move |_| match is_mended.load(Ordering::SeqCst) {
            true => Says::Text("Mended.".to_owned()),
            false => Says::Refusal(400, "no such model".to_owned()),
        });
        let data = tempfile::tempdir().unwrap();
        let url = model.url();
        let (up, client) = start(data.path(), &["--model-url", &url, "--model", "stub"]);
        Self { up, client, data, cluster, mended, _model: model }
    }

    fn embedded() -> Self {
        Self::start(Vec::new(), |data, model| {
            let up = Up::start(data, model);
            let client = up.client();
            (up, client)
        })
    }

    /// On Kafka under a prefix of its own; nothing where there is none.
    fn on_kafka() -> Option<Self> {
        let servers = services::kafka()?;
        let prefix = format!("dlq-{}-", std::process::id());
        let cluster = ["--bootstrap-servers", &servers, "--topic-prefix", &prefix].map(str::to_owned);
        Some(Self::start(cluster.to_vec(), |data, model| {
            let applied = finish(command(data, &["topics", "apply"]).args(&cluster), LIMIT);
            assert_eq!(applied.code, 0, "{applied:?}");
            let mut up: Command = command(data, &["up", "--admin", "127.0.0.1:0"]);
            (Up::wait("forebay up", up.args(model).args(&cluster)), Client::new(&servers, &prefix))
        }))
    }

    fn dlq(&self, arguments: &[&str]) -> Finished {
        let all: Vec<_> = ["dlq"].iter().chain(arguments).copied().collect();
        finish(command(self.data.path(), &all).args(&self.cluster), LIMIT)
    }

    /// What `dlq list --json` says, by key.
    fn listed(&self, arguments: &[&str]) -> BTreeMap<String, Value> {
        let all: Vec<_> = ["list", "--json"].iter().chain(arguments).copied().collect();
        let listed = self.dlq(&all);
        assert_eq!(listed.code, 0, "{listed:?}");
        let letters = listed.stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        letters.map(|letter| (letter["key"].as_str().unwrap().to_owned(), letter)).collect()
    }

    /// Waits for so many dead letters of a step, each redriven so often.
    fn letters(&self, stage: &str, count: usize, redrives: u64) -> BTreeMap<String, Value> {
        wait_for(&format!("{count} dead letters of {stage} redriven {redrives} times"), LIMIT, || {
            let mut letters = self.listed(&["--stage", stage]);
            letters.retain(|_, letter| letter["redrives"] == redrives);
            (letters.len() == count).then_some(letters)
        })
    }
}

/// It ended with this code, and said all of this.
#[track_caller]
fn check(finished: &Finished, code: i32, said: &[&str]) {
    assert_eq!(finished.code, code, "{finished:?}");
    for said in said {
        assert!(
            finished.stdout.contains(said) || finished.stderr.contains(said),
            "no {said:?} in {finished:?}"
        );
    }
}

/// Waits for results of these ids in a generation; their statuses, once each.
fn results(results: &mut Reader, ids: &[&str], generation: u64, status: &str) {
    let of = |records: &[Record], id: &str| -> Vec<Value> {
        let all = records.iter().filter(|record| record.key_text() == id).map(Record::json);
        all.filter(|result| result["generation"] == generation).collect()
    };
    results.until(&format!("results of generation {generation}"), LIMIT, |records| {
        ids.iter().all(|id| !of(records, id).is_empty()).then_some(())
    });
    for id in ids {
        let of_id = of(results.to_the_end(LIMIT), id);
        assert!(of_id.len() == 1 && of_id[0]["status"] == status, "{id}: {of_id:?}");
    }
}

fn a_refused_request_is_redriven_once(site: &Site) {
    let Site { client, .. } = site;
    let ids = ["r0", "r1", "r2", "r3"];
    let request = |id: &str| json!({"id": id, "tenant": "shop", "prompt": format!("What is {id}?")});
    client.write("requests", ids.map(|id| New::from(request(id)).header("x-mine", "kept")));
    client.ask(json!({"id": "late", "prompt": "Is there time?", "deadline_ms": 30_000}));
    let mut told = client.read("results");
    results(&mut told, &ids, 0, "failed");

    // Seen.
    let letters = site.letters("infer", 5, 0);
    let r0 = letters.values().find(|letter| letter["id"] == "r0").unwrap();
    for (field, value) in [
        ("tenant", json!("shop")),
        ("pipeline", json!("answer")),
        ("schema", json!("Grounded")),
        ("topic", json!(client.topic("prompts"))),
        ("class", json!("rejected")),
        ("code", json!("model_rejected")),
        ("attempts", json!(1)),
        ("generation", json!(0)),
        ("redriven", Value::Null),
    ] {
        assert_eq!(r0[field], value, "{field} of {r0}");
    }
    assert!(letters.values().any(|letter| letter["deadline_at_ms"].is_i64()), "{letters:?}");
    check(&site.dlq(&["list"]), 0, &["r0", "5 dead letters", "infer  rejected/model_rejected  (0 redriven)"]);
    assert_eq!(site.listed(&["--tenant", "shop", "--error", "rejected", "--since", "1h"]).len(), 4);
    assert_eq!(site.listed(&["--limit", "2"]).len(), 2);
    check(&site.dlq(&["list", "--error", "panicked"]), 0, &["no dead letter"]);
    check(&site.dlq(&["list", "--since", "2999-01-01T00:00:00Z"]), 0, &["no dead letter"]);
    check(&site.dlq(&["show", "r0"]), 0, &["forebay-dead-code", "x-mine", "What is r0?", " bytes\n{\n"]);
    check(&site.dlq(&["show", r0["key"].as_str().unwrap(), "--json"]), 0, &["no such model"]);

    // What cannot be is said.
    check(&site.dlq(&["list", "--stage", "infre"]), 2, &["did you mean \"infer\"?"]);
    check(&site.dlq(&["list", "--since", "yesterday"]), 2, &["2h"]);
    check(&site.dlq(&["redrive"]), 2, &["--stage", "--all"]);
    check(&site.dlq(&["redrive", "--stage", "infre"]), 2, &["did you mean \"infer\"?"]);
    check(&site.dlq(&["redrive", "r9"]), 1, &["\"r9\"", "0 redriven"]);
    check(&site.dlq(&["show", "r9"]), 1, &["\"r9\"", "dlq list"]);

    // Redriven, each once.
    site.mended.store(true, Ordering::SeqCst);
    let mut copies = client.read("retry.infer.10s");
    check(&site.dlq(&["redrive", "--tenant", "shop", "--dry-run"]), 0, &["4 would be redriven"]);
    assert_eq!(copies.to_the_end(LIMIT).len(), 0, "a dry run writes nothing");
    check(&site.dlq(&["redrive", "--tenant", "shop", "--limit", "3"]), 0, &["3 redriven"]);
    check(
        &site.dlq(&["redrive", "--stage", "infer", "--tenant", "shop"]),
        0,
        &["1 redriven; 3 redriven before"],
    );
    results(&mut told, &ids, 1, "answered");
    check(&site.dlq(&["redrive", "--tenant", "shop"]), 0, &["0 redriven; 4 redriven before"]);
    check(&site.dlq(&["list"]), 0, &["(4 redriven)"]);
    check(&site.dlq(&["show", "r0"]), 0, &["redriven at", "generation 1"]);
    let result = told.records().iter().find(|record| record.json()["generation"] == 1).unwrap();
    assert_eq!(result.header("x-mine").as_deref(), Some("kept"), "a redrive is a copy");

    // A deadline that has passed is no time to answer in.
    let past =
        |letter: &Value| letter["id"] == "late" && site.dlq(&["redrive", "late", "--dry-run"]).code == 1;
    wait_for("the deadline", LIMIT, || letters.values().any(past).then_some(()));
    check(
        &site.dlq(&["redrive", "late"]),
        1,
        &["its deadline passed", "--reset-deadline", "its 30s from now on"],
    );
    check(&site.dlq(&["redrive", "late", "--reset-deadline"]), 0, &["1 redriven"]);
    results(&mut told, &["late"], 1, "answered");

    // As if a crash had come between the copy and its note: the copy goes out again, and no third result.
    let copy = copies.at_least(5, LIMIT).iter().find(|copy| copy.key_text() == "r0").unwrap().clone();
    let headers = copy.headers.into_iter().map(|(name, value)| (name, value.unwrap_or_default())).collect();
    client.write("retry.infer.10s", [New { key: copy.key, value: copy.value, headers }]);
    client.ask(json!({"id": "after", "tenant": "shop", "prompt": "Does it go on?"}));
    results(&mut told, &["after"], 0, "answered");
    wait_for("no lag of infer", LIMIT, || {
        (client.lag("answer.infer.retry", "retry.infer.10s") == 0).then_some(())
    });
    wait_for("no lag of publish", LIMIT, || (client.lag("answer.publish", "endings") == 0).then_some(()));
    results(&mut told, &ids, 1, "answered");
    assert_eq!(told.to_the_end(LIMIT).len(), 11);
}

#[test]
fn a_refused_request_is_redriven_once_on_the_embedded_broker() {
    let site = Site::embedded();
    a_refused_request_is_redriven_once(&site);
    site.up.drain();
}

#[test]
fn a_refused_request_is_redriven_once_on_kafka() {
    let Some(site) = Site::on_kafka() else { return };
    a_refused_request_is_redriven_once(&site);
    site.up.drain();
}

#[test]
fn a_record_that_dies_again_is_one_dead_letter_that_tells_of_it() {
    let site = Site::embedded();
    let mut told = site.client.read("results");
    site.client.write("requests", [New::value(vec![0xff, 0x00]).key("k")]);
    let letters = site.letters("look_up", 1, 0);
    let (key, letter) = letters.first_key_value().unwrap();
    let id = letter["id"].as_str().unwrap();
    for (redrives, more) in [(1, "--all"), (2, "--again")] {
        check(&site.dlq(&["redrive", "--error", "undecodable", more]), 0, &["1 redriven"]);
        let again = site.letters("look_up", 1, redrives);
        assert_eq!(again.first_key_value().unwrap().0, key, "the same letter");
        assert_eq!((&again[key]["id"], &again[key]["generation"]), (&json!(id), &json!(redrives)));
        assert_eq!(again[key]["redriven"], Value::Null, "it may be redriven once more");
        results(&mut told, &[id], redrives, "failed");
    }
    check(&site.dlq(&["show", id]), 0, &["2 bytes\nff00"]);
    let mut copies = site.client.read("retry.look_up.10s");
    for (copy, (redrives, again)) in copies.at_least(2, LIMIT).iter().zip([("1", None), ("2", Some("1"))]) {
        assert_eq!((copy.key_text(), copy.value.as_deref()), (id.to_owned(), Some(&[0xff, 0x00][..])));
        assert_eq!(copy.header("forebay-retry-redrives").as_deref(), Some(redrives));
        assert_eq!(copy.header("forebay-generation").as_deref(), Some(redrives));
        assert_eq!(copy.header("forebay-again").as_deref(), again, "asked for a new answer");
        assert_eq!(copy.header("forebay-retry-key").as_deref(), Some("k"));
    }
    site.up.drain();
}

#[test]
fn a_record_that_was_too_large_to_copy_is_redriven_from_where_it_lies() {
    let site = Site::embedded();
    site.mended.store(true, Ordering::SeqCst);
    let mut told = site.client.read("results");
    site.client.set_topic("questions", &[("max.message.bytes", "100000")]);
    let request = New::from(json!({"id": "large", "prompt": "x ".repeat(100_000)})).header("x-mine", "kept");
    site.client.write("requests", [request]);
    results(&mut told, &["large"], 0, "failed");
    let letters = site.letters("look_up", 1, 0);
    let body = &letters.first_key_value().unwrap().1["body"];
    assert!(body.as_str().unwrap().starts_with("omitted, "), "{body}");
    check(&site.dlq(&["show", "large"]), 0, &["output_too_large", "omitted, ", "no value"]);
    site.client.set_topic("questions", &[("max.message.bytes", "4194352")]);
    check(&site.dlq(&["redrive", "large"]), 0, &["1 redriven"]);
    results(&mut told, &["large"], 1, "answered");
    let result = told.records().iter().find(|record| record.json()["generation"] == 1).unwrap();
    assert_eq!(result.header("x-mine").as_deref(), Some("kept"));
    site.up.drain();
}

#[test]
fn a_document_is_redriven_behind_what_came_after_it_and_never_over_it() {
    let site = Site::embedded();
    let bad = |id: &str| New::from(json!({"id": id, "txet": "misspelt"})).key(id);
    let good = |id: &str| New::from(json!({"id": id, "text": "Good."})).key(id);
    site.client.write("documents", [bad("a"), bad("b"), good("b")]);
    let letters = site.letters("index", 2, 0);
    check(
        &site.dlq(&["redrive", "--all"]),
        0,
        &["1 redriven", "1 superseded", "is superseded by documents/"],
    );
    // It is no better: a letter of its own, where its copy lies.
    let letters: Vec<_> = letters.into_keys().chain(site.letters("index", 3, 0).into_keys()).collect();
    check(&site.dlq(&["redrive", "--all"]), 0, &["1 redriven; 1 redriven before; 1 superseded"]);
    assert_eq!(letters.len(), 5);
    assert_eq!(site.client.read("documents").to_the_end(LIMIT).len(), 5);
    site.up.drain();
}
