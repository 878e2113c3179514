//! Answers that are read while they are written, on the simulator.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says why by panicking")]

use forebay_tests::{
    Client, Reader, Record, Running,
    product::{Up, command, finish},
    wait_for,
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path, time::Duration};

const LIMIT: Duration = Duration::from_secs(120);

/// What may be quoted has characters of two, three and four bytes.
const DOCUMENT: &str = "# Möwen\n\nÜber dem Grünhafen kreisen die Möwen und schreien „früh“ – so heißt es im Märchen 🐦 überall.\n";
const QUESTION: &str = "Wo kreisen die Möwen und schreien, wie es im Märchen heißt?";

/// A simulator that writes 100 tokens a second, and what `--model-url` takes.
fn simulator(data: &Path, more: &[&str]) -> (Running, String) {
    let mut all = vec!["simulate-model", "--listen", "127.0.0.1:0", "--latency", "20ms"];
    all.extend(["--set", "token_gap=10ms", "--set", "answer.tokens=100"]);
    all.extend(more);
    let running = Running::start("forebay simulate-model", &mut command(data, &all));
    let url =
        wait_for("the simulator's address", LIMIT, || running.stdout().lines().next().map(str::to_owned));
    (running, url)
}

fn up(data: &Path, url: &str) -> Up {
    up_with(data, &["--model-url", url, "--model", "simulated"])
}

/// At work, with all that can be found read: a document is indexed after it is taken, and whoever starts reads the index first.
fn up_with(data: &Path, args: &[&str]) -> Up {
    let up = Up::start(data, args);
    let document = data.join("möwen.md");
    std::fs::write(&document, DOCUMENT).unwrap();
    let ingested = finish(&mut command(data, &["ingest", document.to_str().unwrap()]), LIMIT);
    assert_eq!(ingested.code, 0, "{ingested:?}");
    up.client().read("chunks").at_least(1, LIMIT);
    up.drain();
    Up::start(data, args)
}

fn ask(client: &Client, id: &str) {
    client.ask(json!({"id": id, "prompt": QUESTION, "stream": true, "cache": {"no_cache": true}}));
}

/// The pieces of each request's last attempt in their order, of which none is missing; and the number of that attempt.
fn pieces(deltas: &mut Reader) -> BTreeMap<String, (u64, Vec<Record>)> {
    let mut last: BTreeMap<String, (u64, Vec<Record>)> = BTreeMap::new();
    for record in deltas.to_the_end(LIMIT) {
        let piece = record.json();
        let (id, number) = (piece["id"].as_str().unwrap(), piece["attempt"].as_u64().unwrap());
        let (attempt, pieces) = last.entry(id.to_owned()).or_insert((number, Vec::new()));
        assert!(number >= *attempt, "a lower attempt behind a higher one: {piece}");
        if number > *attempt {
            (*attempt, *pieces) = (number, Vec::new());
        }
        assert_eq!((&piece["seq"], record.key_text().as_str()), (&json!(pieces.len()), id), "{piece}");
        pieces.push(record.clone());
    }
    last
}

fn text(pieces: &[Record]) -> String {
    pieces.iter().map(|piece| piece.json()["text"].as_str().unwrap().to_owned()).collect()
}

fn tokens(result: &Value) -> usize {
    result["usage"]["completion_tokens"].as_u64().unwrap().try_into().unwrap()
}

#[test]
fn pieces_make_up_the_answer_byte_for_byte_and_are_fewer_than_its_tokens() {
    const REQUESTS: usize = 64;
    let data = tempfile::tempdir().unwrap();
    // Ten tokens in what is sent together; where the machine is five times too slow, still two.
    let (_simulator, url) = simulator(data.path(), &["--set", "token_gap=2ms"]);
    let up = up(data.path(), &url);
    let client = up.client();
    let (mut results, mut deltas) = (client.read("results"), client.read("deltas"));
    let ids: Vec<_> = (0..REQUESTS).map(|number| format!("r{number}")).collect();
    ids.iter().for_each(|id| ask(&client, id));
    let (mut written, mut records) = (0, 0);
    let answers: Vec<_> = ids.iter().map(|id| (id, results.of_key(id, LIMIT))).collect();
    let all = pieces(&mut deltas);
    for (id, result) in answers {
        let (_, pieces) = &all[id];
        assert!(pieces.iter().all(|piece| piece.timestamp_ms <= result.timestamp_ms), "before the result");
        let result = result.json();
        assert_eq!(text(pieces), result["text"].as_str().unwrap(), "{result}");
        assert!(text(pieces).contains("Märchen 🐦 überall"), "{result}");
        written += tokens(&result);
        records += pieces.len();
    }
    assert!(records * 2 < written, "{records} records for {written} tokens");

    let asked = finish(&mut command(data.path(), &["ask", "--stream", QUESTION]), LIMIT);
    assert!(asked.code == 0 && asked.stdout.contains("Märchen 🐦 überall"), "{asked:?}");
    assert_eq!(asked.stdout.matches("Märchen").count(), 1, "once: {asked:?}");
    up.drain();
}

#[test]
fn an_answer_that_is_begun_anew_has_a_higher_attempt() {
    let data = tempfile::tempdir().unwrap();
    let (_simulator, url) = simulator(data.path(), &["--set", "token_gap=100ms"]);
    let crashed = up(data.path(), &url);
    let mut deltas = crashed.client().read("deltas");
    ask(&crashed.client(), "r");
    let half =
        deltas.until("a part of the answer", LIMIT, |records| (records.len() > 3).then(|| text(records)));
    crashed.kill();
    let up = Up::start(data.path(), &["--model-url", &url, "--model", "simulated"]);
    let result = up.client().read("results").of_key("r", LIMIT).json();
    let (attempt, pieces) = pieces(&mut up.client().read("deltas")).remove("r").unwrap();
    assert!(attempt > 0, "what was read before is replaced");
    assert_eq!(text(&pieces), result["text"].as_str().unwrap(), "{result}");
    assert!(half.len() < text(&pieces).len());
    up.drain();
}

#[test]
fn what_was_read_of_a_stream_that_was_cut_is_in_its_result_and_a_redrive_asks_again() {
    let data = tempfile::tempdir().unwrap();
    let prices = data.path().join("prices.json");
    let price = json!({"input_cost_per_token": 1e-9, "output_cost_per_token": 1e-8});
    std::fs::write(&prices, json!({"simulated": price}).to_string()).unwrap();
    let config = data.path().join("forebay.yaml");
    std::fs::write(&config, format!("prices: {}\n", prices.display())).unwrap();
    let log = data.path().join("calls.jsonl");
    let cuts = ["--call-log", log.to_str().unwrap(), "--set", "faults.cut=100%"];
    let (_cuts, url) = simulator(data.path(), &cuts);
    let at = |url: &str| {
        let config = config.to_str().unwrap();
        up_with(data.path(), &["--config", config, "--model-url", url, "--model", "simulated"])
    };
    let up = at(&url);
    let mut deltas = up.client().read("deltas");
    ask(&up.client(), "r");
    let record = up.client().read("results").of_key("r", LIMIT);
    let (result, (attempt, read)) = (record.json(), pieces(&mut deltas).remove("r").unwrap());
    assert_eq!(
        (&result["status"], &result["error"]["code"]),
        (&json!("failed"), &json!("model_cut")),
        "{result}"
    );
    assert_eq!((attempt, result["text"].as_str().unwrap()), (0, text(&read).as_str()), "{result}");
    assert!(!text(&read).is_empty() && result["cost_nano_usd"].as_i64() > Some(0), "{result}");
    assert!(read.iter().all(|piece| piece.timestamp_ms <= record.timestamp_ms), "before the result");
    let calls = std::fs::read_to_string(&log).unwrap();
    assert_eq!(calls.lines().count(), 1, "nobody else was asked: {calls}");
    // Killed, so that what was cut may be delivered again; what the ledger keeps of it is its end.
    up.kill();
    let (_whole, url) = simulator(data.path(), &[]);
    let up = at(&url);
    let redriven = finish(
        command(data.path(), &["dlq", "redrive", "--all"]).args(["--bootstrap-servers", &up.servers]),
        LIMIT,
    );
    assert_eq!(redriven.code, 0, "{redriven:?}");
    let answered = wait_for("the answer of the redrive", LIMIT, || {
        let mut results = up.client().read("results");
        let results = results.to_the_end(LIMIT);
        results.iter().map(Record::json).find(|result| result["generation"] == 1)
    });
    assert_eq!(answered["status"], "answered", "{answered}");
    up.drain();
}

#[test]
fn a_process_that_crashes_after_a_stream_was_cut_asks_nobody_again() {
    let data = tempfile::tempdir().unwrap();
    let (_cuts, cutting) = simulator(data.path(), &["--set", "faults.cut=100%"]);
    let log = data.path().join("calls.jsonl");
    let (_whole, whole) = simulator(data.path(), &["--call-log", log.to_str().unwrap()]);
    up(data.path(), &cutting).drain();
    // The third message is the ending of `infer`: before it is sent, and before its offset is stored.
    for (id, point) in [("r0", "output:3"), ("r1", "written:3")] {
        let mut begun = command(data.path(), &["up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
        begun.args(["--model-url", &cutting, "--model", "simulated"]).env("FOREBAY_CRASH_AT", point);
        let mut crashes = Up::wait("forebay up", &mut begun);
        ask(&crashes.client(), id);
        crashes.process.ended(LIMIT);
        let up = Up::start(data.path(), &["--model-url", &whole, "--model", "simulated"]);
        let result = up.client().read("results").of_key(id, LIMIT).json();
        assert_eq!(result["error"]["code"], "model_cut", "{point}: {result}");
        let (_, read) = pieces(&mut up.client().read("deltas")).remove(id).unwrap();
        assert_eq!(result["text"].as_str().unwrap(), text(&read), "{point}: {result}");
        up.drain();
    }
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "", "the other server was asked");
}
