//! `forebay simulate-model` as a person runs it, and the shipped pipeline on it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says why by panicking")]

use forebay_schemas::{Attempt, Chunk, Chunks, Grounded, Record as _};
use forebay_tests::{
    Client, New, Reader, Running, Signal, free_port,
    product::{END, Up, command, finish},
    wait_for,
};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    path::Path,
    time::{Duration, Instant},
};

const LIMIT: Duration = Duration::from_secs(120);

/// A simulator on a free port, and what `--model-url` takes.
fn simulator(data: &Path, arguments: &[&str]) -> (Running, String) {
    simulator_at(data, "127.0.0.1:0", arguments)
}

fn simulator_at(data: &Path, listen: &str, arguments: &[&str]) -> (Running, String) {
    let mut all = vec!["simulate-model", "--listen", listen];
    all.extend(arguments);
    let running = Running::start("forebay simulate-model", &mut command(data, &all));
    let url =
        wait_for("the simulator's address", LIMIT, || running.stdout().lines().next().map(str::to_owned));
    (running, url)
}

fn lines(log: &Path) -> Vec<Value> {
    std::fs::read_to_string(log).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_pipeline_on_it_gives_cited_answers_though_each_first_try_fails() {
    each_first_try_fails("openai");
}

#[test]
fn a_pipeline_on_it_speaks_anthropic_s_api_too() {
    each_first_try_fails("anthropic");
}

fn each_first_try_fails(api: &str) {
    const REQUESTS: usize = 20;
    let data = tempfile::tempdir().unwrap();
    let log = data.path().join("calls.jsonl");
    let faults = data.path().join("faults.yaml");
    std::fs::write(&faults, "fault: {attempts: 1}\nfaults: {status_500: 30%, malformed: 30%, reset: 40%}\n")
        .unwrap();
    let (mut simulator, url) = simulator(
        data.path(),
        &["--latency", "5ms", "--config", faults.to_str().unwrap(), "--call-log", log.to_str().unwrap()],
    );
    let config = data.path().join("forebay.yaml");
    std::fs::write(&config, format!("model: {{api: {api}}}\n")).unwrap();
    let config = config.to_str().unwrap();
    let start = || Up::start(data.path(), &["--config", config, "--model-url", &url, "--model", "simulated"]);
    let up = start();
    let guide = concat!(env!("CARGO_MANIFEST_DIR"), "/../pipelines/guides/delivery.md");
    let ingested = finish(&mut command(data.path(), &["ingest", guide]), LIMIT);
    assert_eq!(ingested.code, 0, "{ingested:?}");
    // Whoever starts has read all chunks before a question comes.
    up.client().read("chunks").at_least(1, LIMIT);
    up.drain();

    let up = start();
    let client = up.client();
    let (mut results, mut attempts) = (client.read("results"), client.read("attempts"));
    for number in 0..REQUESTS {
        let prompt = format!("What of committed offsets and unfinished work, number {number}?");
        client.ask(json!({"id": format!("r{number}"), "prompt": prompt, "cache": {"no_cache": true}}));
    }
    for number in 0..REQUESTS {
        let result = results.of_key(&format!("r{number}"), LIMIT).json();
        assert_eq!(
            (&result["status"], &result["model"]),
            (&json!("answered"), &json!("simulated")),
            "{result}"
        );
        assert!(!result["citations"].as_array().unwrap().is_empty(), "{result}");
    }
    // The account of the simulator and Forebay's own agree: two tries each, of which the second was good.
    let rows = attempts.at_least(2 * REQUESTS, LIMIT);
    assert_eq!(rows.len(), 2 * REQUESTS);
    let lines = lines(&log);
    assert_eq!(lines.len(), 2 * REQUESTS);
    let noted: BTreeSet<(String, u64)> = rows
        .iter()
        .map(|row| Attempt::decode(row.value.as_deref().unwrap()).unwrap())
        .map(|row| (row.call_id, row.attempt.try_into().unwrap()))
        .collect();
    let logged =
        |line: &Value| (line["call_id"].as_str().unwrap().to_owned(), line["attempt"].as_u64().unwrap());
    assert_eq!(noted, lines.iter().map(logged).collect(), "call by call, and try by try");
    let faults: BTreeSet<&str> = lines.iter().filter_map(|line| line["fault"].as_str()).collect();
    assert_eq!(faults, BTreeSet::from(["malformed", "reset", "status_500"]));
    for line in &lines {
        assert_eq!(line["fault"].is_null(), line["attempt"] == 1, "{line}");
    }
    up.drain();
    simulator.signal(Signal::TERM);
    assert_eq!(simulator.ended(END).code(), Some(0));
}

#[test]
fn no_request_is_lost_while_a_server_of_a_pool_dies_and_comes_back_cold_and_another_babbles() {
    const EVERY: Duration = Duration::from_millis(500);
    const UNDER_WAY_MAX: usize = 200;
    let data = tempfile::tempdir().unwrap();
    let [log_of_babbler, log_of_mortal] =
        ["babbler.jsonl", "mortal.jsonl"].map(|name| data.path().join(name));
    let faults = file(data.path(), "faults.yaml", "faults: {malformed: 10%, cut: 10%}\n");
    let latency = ["--latency", "20ms..200ms", "--call-log"];
    let (_babbler, babbler_url) = simulator(
        data.path(),
        &[&latency[..], &[log_of_babbler.to_str().unwrap(), "--config", &faults]].concat(),
    );
    let listen = format!("127.0.0.1:{}", free_port());
    let mortal = |more: &[&str]| {
        let arguments = [&latency[..], &[log_of_mortal.to_str().unwrap()], more].concat();
        simulator_at(data.path(), &listen, &arguments)
    };
    let (mut first, mortal_url) = mortal(&[]);
    let table = r#"{"simulated": {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6}}"#;
    let prices = file(data.path(), "prices.json", table);
    let config = file(data.path(), "forebay.yaml", &format!("prices: {prices}\n"));
    let pool = ["--model-url", &babbler_url, "--model-url", &mortal_url, "--model", "simulated"];
    let up = Up::start(data.path(), &[&pool[..], &["--config", &config]].concat());
    let client = up.client();
    let (mut results, mut asked) = (client.read("results"), 0);
    let mut ask = |count: usize| {
        let request = |number| json!({"id": format!("r{number}"), "prompt": format!("What is {number}?"), "cache": {"no_cache": true}});
        client.write("requests", (asked..asked + count).map(request).map(New::from));
        asked += count;
        asked
    };
    ask(200);
    let served = || std::fs::read_to_string(&log_of_mortal).unwrap().matches(r#""status":200"#).count();
    wait_for("calls of the mortal one", LIMIT, || (served() > 20).then_some(()));
    first.signal(Signal::KILL);
    first.ended(END);
    let before = served();
    results.at_least(ask(100), LIMIT);
    let (_second, _) = mortal(&["--set", "cold_start.health=2s"]);
    let (mut next, mut written) = (Instant::now(), 300);
    wait_for("calls of the one that came back", LIMIT, || {
        if Instant::now() > next && written - results.to_the_end(LIMIT).len() < UNDER_WAY_MAX {
            next = Instant::now() + EVERY;
            written = ask(20);
        }
        (served() > before + 20).then_some(())
    });
    let results = results.at_least(written, LIMIT);
    let answered: BTreeSet<_> = results
        .iter()
        .filter(|result| result.json()["status"] == "answered")
        .map(|one| one.key_text())
        .collect();
    assert_eq!((answered.len(), results.len()), (written, written));

    let mut attempts = client.read("attempts");
    let read = attempts.to_the_end(LIMIT).iter();
    let rows: Vec<_> =
        read.map(|record| Attempt::decode(record.value.as_deref().unwrap()).unwrap()).collect();
    let ok: BTreeSet<_> = rows.iter().filter(|row| row.status == "ok").map(|row| &row.request_id).collect();
    assert_eq!(ok.len(), written);
    assert!(rows.iter().all(|row| row.cost_nano_usd.is_some()), "the cost of every attempt");
    for code in ["model_malformed", "model_unavailable"] {
        assert!(rows.iter().any(|row| row.error_code.as_deref() == Some(code)), "no {code}");
    }
    let known: BTreeSet<_> = rows.iter().map(|row| row.attempt_id.as_str()).collect();
    assert_eq!(known.len(), rows.len(), "nobody was killed who wrote them");
    for line in lines(&log_of_babbler).into_iter().chain(lines(&log_of_mortal)) {
        let id = format!("{}/{}", line["call_id"].as_str().unwrap(), line["attempt"]);
        assert!(known.contains(id.as_str()), "no row of {line}");
    }
    up.drain();
}

/// Other settings for a simulator from now on.
fn set(url: &str, settings: &str) {
    use std::io::{Read as _, Write as _};
    let address = url.trim_start_matches("http://").trim_end_matches("/v1");
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    let (length, mut answer) = (settings.len(), String::new());
    let head = format!("PUT /simulate HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: {length}");
    write!(stream, "{head}\r\n\r\n{settings}").unwrap();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// Asks one question over and over, and reads what becomes of it.
struct Asking {
    prompt: &'static str,
    client: Client,
    prompts: Reader,
    results: Reader,
    attempts: Reader,
    asked: usize,
}

impl Asking {
    fn new(prompt: &'static str, client: &Client) -> Self {
        let [prompts, results, attempts] = ["prompts", "results", "attempts"].map(|topic| client.read(topic));
        Self { prompt, client: client.clone(), prompts, results, attempts, asked: 0 }
    }

    fn write(&self, id: &str, cache: &Value) {
        self.client.ask(json!({"id": id, "prompt": self.prompt, "cache": cache}));
    }

    /// Asks, and gives id and result.
    fn ask(&mut self, cache: &Value) -> (String, Value) {
        let id = format!("r{}", self.asked);
        self.asked += 1;
        self.write(&id, cache);
        let result = self.results.of_key(&id, LIMIT).json();
        assert_eq!(result["status"], "answered", "{result}");
        (id, result)
    }

    /// The passages that were found for a request, and the files that they are of.
    fn found(&mut self, id: &str) -> (Grounded, String) {
        let prompt = self.prompts.of_key(id, LIMIT);
        let grounded = Grounded::decode(prompt.value.as_deref().unwrap()).unwrap();
        let files = grounded.passages.iter().map(|passage| passage.document.rsplit('/').next().unwrap());
        let files = files.collect::<Vec<_>>().join(" ");
        (grounded, files)
    }

    /// The rows about calls of a step.
    fn rows_of(&mut self, stage: &str) -> Vec<Attempt> {
        let read = self.attempts.to_the_end(LIMIT).iter();
        let rows = read.map(|record| Attempt::decode(record.value.as_deref().unwrap()).unwrap());
        rows.filter(|row| row.stage == stage).collect()
    }

    /// The rows about calls that retrieval made for a request.
    fn rows(&mut self, id: &str) -> Vec<Attempt> {
        self.rows_of("retrieve").into_iter().filter(|row| row.request_id == id).collect()
    }
}

/// Writes a file into a folder; its path.
fn file(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The pipeline that is shipped.
fn shipped() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../pipelines/answer.yaml")).unwrap()
}

#[test]
fn a_reranker_orders_the_passages_and_is_done_without_when_it_fails() {
    let data = tempfile::tempdir().unwrap();
    let file = |name, text: &str| file(data.path(), name, text);
    let log = data.path().join("calls.jsonl");
    let (mut simulator, url) =
        simulator(data.path(), &["--latency", "5ms", "--call-log", log.to_str().unwrap()]);
    let pipeline = file("answer.yaml", &shipped().replace("{limit: 8}", "{limit: 8, rerank: 32}"));
    let refused = finish(&mut command(data.path(), &["up", &pipeline, "--admin", "127.0.0.1:0"]), LIMIT);
    assert!(refused.code == 2 && refused.stderr.contains("FOREBAY_RERANK_URL"), "{refused:?}");

    let prices = file("prices.json", r#"{"simulated": {"input_cost_per_token": 1e-6}}"#);
    let config = format!("prices: {prices}\nrerank: {{url: '{url}', model: simulated}}\n");
    let up = Up::start(data.path(), &[&pipeline, "--config", &file("forebay.yaml", &config)]);
    // The search likes the short one, which is all about it; the simulator's reranker counts the very words of the question.
    let filler =
        "Some people write at length about brokers and segments and what else there may be. ".repeat(4);
    let long = format!("{filler}What the lag of consumers in groups is, they say too. {filler}");
    let documents = [file("short.txt", "Lag: consumer group lag."), file("long.txt", &long)];
    let ingested = finish(&mut command(data.path(), &["ingest", &documents[0], &documents[1]]), LIMIT);
    assert_eq!(ingested.code, 0, "{ingested:?}");
    let client = up.client();
    let mut asking = Asking::new("What is the lag of consumers in groups?", &client);

    // Documents are indexed while questions are answered.
    let unseen = json!({"no_cache": true, "no_store": true});
    let (id, result) = wait_for("both documents", LIMIT, || {
        let (id, result) = asking.ask(&unseen);
        (asking.found(&id).0.passages.len() == 2).then_some((id, result))
    });
    let (grounded, files) = asking.found(&id);
    assert_eq!(files, "long.txt short.txt");
    assert!(grounded.retrieval.rerank.is_some() && !grounded.retrieval.is_degraded());
    let rows = asking.rows(&id);
    let [row] = &rows[..] else { panic!("{rows:?}") };
    assert_eq!(
        (row.stage.as_str(), row.status.as_str(), row.model.as_deref()),
        ("retrieve", "ok", Some("simulated"))
    );
    // 1,000 nano-dollars a token; the extractive model costs nothing.
    assert_eq!(row.cost_nano_usd, Some(1_000 * row.input_tokens.unwrap()));
    assert_eq!(result["cost_nano_usd"].as_i64(), row.cost_nano_usd, "{result}");
    let line = lines(&log).into_iter().find(|line| line["call_id"] == row.call_id.as_str()).unwrap();
    assert_eq!((line["path"].as_str(), line["status"].as_i64()), (Some("/v1/rerank"), Some(200)), "{line}");
    let mut ledger = client.read("ledger.retrieve.questions");
    let entries = ledger.to_the_end(LIMIT).iter();
    let of_call = entries.filter(|entry| entry.key_text().starts_with(&row.call_id)).count();
    assert!(of_call >= 2, "it is noted that the call was sent, and how it ended: {of_call}");

    // An answer from reranked passages is kept, and given again without the reranker; one from others is not.
    let (_, kept) = asking.ask(&json!({"no_cache": true}));
    set(&url, "faults: {status_503: 100%}");
    let (id, _) = asking.ask(&unseen);
    let (grounded, files) = asking.found(&id);
    assert_eq!(files, "short.txt long.txt");
    assert!(grounded.retrieval.is_degraded());
    let rows = asking.rows(&id);
    let is_failed = |row: &Attempt| row.status == "failed" && row.http_status == Some(503);
    assert!(!rows.is_empty() && rows.iter().all(is_failed), "{rows:?}");
    let hit = wait_for("a hit", LIMIT, || Some(asking.ask(&json!({})).1).filter(|one| one["cache"] == "hit"));
    assert_eq!((&hit["text"], hit["cost_nano_usd"].as_i64()), (&kept["text"], Some(0)));

    let metrics = up.get("/metrics").1;
    let has = |name: &str, label: &str| {
        metrics.lines().any(|line| line.starts_with(name) && line.contains(label) && !line.ends_with(" 0"))
    };
    assert!(has("forebay_reranked_questions_total", "outcome=\"ok\""), "{metrics}");
    assert!(has("forebay_reranked_questions_total", "outcome=\"model_unavailable\""), "{metrics}");
    assert!(has("forebay_call_batch_items_count", "gen_ai_operation_name=\"rerank\""), "{metrics}");
    up.drain();
    simulator.signal(Signal::TERM);
    assert_eq!(simulator.ended(END).code(), Some(0));
}

/// What is on `chunks` now, by document.
fn chunks(reader: &mut Reader) -> std::collections::BTreeMap<String, Vec<Chunk>> {
    let read = reader.to_the_end(LIMIT).iter();
    let all = read.map(|record| Chunks::decode(record.value.as_deref().unwrap()).unwrap());
    let name = |document: &str| document.rsplit('/').next().unwrap().to_owned();
    all.map(|chunks| (name(&chunks.document), chunks.content.unwrap().chunks)).collect()
}

fn failed_calls(log: &Path) -> usize {
    lines(log).iter().filter(|line| line["status"] == 503).count()
}

/// The sum of a metric over all that have these labels.
fn counted(metrics: &str, name: &str, labels: [&str; 2]) -> f64 {
    let is_of = |line: &&str| line.starts_with(name) && labels.iter().all(|label| line.contains(label));
    metrics.lines().filter(is_of).map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

#[test]
fn questions_and_documents_are_embedded_and_found_by_their_words_alone_when_that_fails() {
    let data = tempfile::tempdir().unwrap();
    let file = |name, text: &str| file(data.path(), name, text);
    let log = data.path().join("calls.jsonl");
    let arguments =
        ["--latency", "5ms", "--set", "embedding.dimensions=256", "--call-log", log.to_str().unwrap()];
    let (mut simulator, url) = simulator(data.path(), &arguments);
    let embedding = shipped()
        .replace("{limit: 8}", "{limit: 8, embed: true}")
        .replace("order: key", "order: key\n    settings: {embed: true}");
    let pipeline = file("answer.yaml", &embedding);
    let refused = finish(&mut command(data.path(), &["up", &pipeline, "--admin", "127.0.0.1:0"]), LIMIT);
    assert!(refused.code == 2 && refused.stderr.contains("FOREBAY_EMBEDDINGS_URL"), "{refused:?}");

    let prices = file("prices.json", r#"{"simulated": {"input_cost_per_token": 1e-6}}"#);
    let config = format!(
        "prices: {prices}\nembeddings: {{url: '{url}', model: simulated, dimensions: 256}}\n\
         budgets: '* 1000000 tokens/day'\n"
    );
    let up = Up::start(data.path(), &[&pipeline, "--config", &file("forebay.yaml", &config)]);
    // All words that it shares with the question are too common for the lexical search; the simulator's embedder counts them.
    let odd = file("odd.txt", "Which of those were there with them, and what were these yellow things?");
    let sections: String =
        (0..30).map(|number| format!("# Part {number}\n\nLag of group {number}.\n\n")).collect();
    let documents = [odd, file("parts.md", &sections)];
    let ingested = finish(&mut command(data.path(), &["ingest", &documents[0], &documents[1]]), LIMIT);
    assert_eq!(ingested.code, 0, "{ingested:?}");
    let client = up.client();
    let mut asking = Asking::new("Which zebra of those were there with them, and what were these?", &client);
    let unseen = json!({"no_cache": true, "no_store": true});
    let (id, result) = wait_for("the document", LIMIT, || {
        let (id, result) = asking.ask(&unseen);
        asking.found(&id).1.starts_with("odd.txt").then_some((id, result))
    });
    let (grounded, _) = asking.found(&id);
    let question = grounded.retrieval.embed.as_ref().unwrap().question.as_ref().unwrap();
    assert!(question.is_of("simulated", 256) && !grounded.retrieval.is_degraded());
    let rows = asking.rows(&id);
    let [row] = &rows[..] else { panic!("{rows:?}") };
    assert_eq!((row.status.as_str(), row.model.as_deref()), ("ok", Some("simulated")));
    assert_eq!(row.cost_nano_usd, Some(1_000 * row.input_tokens.unwrap()));
    assert_eq!(result["cost_nano_usd"].as_i64(), row.cost_nano_usd, "{result}");
    let line = lines(&log).into_iter().find(|line| line["call_id"] == row.call_id.as_str()).unwrap();
    assert_eq!(
        (line["path"].as_str(), line["status"].as_i64()),
        (Some("/v1/embeddings"), Some(200)),
        "{line}"
    );

    // Each passage has its vector, and the calls for them were few.
    let mut on_chunks = client.read("chunks");
    let split =
        wait_for("both documents", LIMIT, || Some(chunks(&mut on_chunks)).filter(|split| split.len() == 2));
    assert!(split["parts.md"].len() == 30, "{split:?}");
    for chunk in split.values().flatten() {
        assert!(chunk.embedding.as_ref().unwrap().is_of("simulated", 256), "{chunk:?}");
    }
    let of_index =
        wait_for("the rows", LIMIT, || Some(asking.rows_of("index")).filter(|rows| rows.len() == 2));
    assert!(
        of_index.iter().all(|row| row.status == "ok" && row.tenant == "*" && row.cost_nano_usd > Some(0))
    );
    for (topic, call) in [("questions", &row.call_id), ("documents", &of_index[0].call_id)] {
        let stage = if topic == "questions" { "retrieve" } else { "index" };
        let mut ledger = client.read(&format!("ledger.{stage}.{topic}"));
        let entries =
            ledger.to_the_end(LIMIT).iter().filter(|entry| entry.key_text().starts_with(call)).count();
        assert!(entries >= 2, "it is noted that the call was sent, and how it ended: {entries}");
    }

    let metrics = up.get("/metrics").1;
    let labels = ["stage=\"index\"", "gen_ai_operation_name=\"embeddings\""];
    let texts = counted(&metrics, "forebay_call_batch_items_sum{", labels);
    let calls = counted(&metrics, "forebay_call_batch_items_count{", labels);
    assert!(texts == 31.0 && (1.0..=2.0).contains(&calls), "{texts} texts in {calls} calls: {metrics}");

    // The same request again is processed again, and nobody is asked.
    let calls = lines(&log).len();
    asking.write(&id, &unseen);
    let copies = asking.prompts.until("the copy", LIMIT, |records| {
        let copies = records.iter().filter(|record| record.key_text() == id);
        let copies: Vec<_> =
            copies.map(|copy| Grounded::decode(copy.value.as_deref().unwrap()).unwrap()).collect();
        (copies.len() == 2).then_some(copies)
    });
    assert_eq!(copies[0].retrieval, copies[1].retrieval);
    let tries: BTreeSet<_> = asking.rows(&id).into_iter().map(|row| row.attempt_id).collect();
    assert_eq!((tries.len(), lines(&log).len()), (1, calls));

    // Without the embedder the words stand, and here there are none; the answer of before is given again without it.
    let (_, kept) = asking.ask(&json!({"no_cache": true}));
    set(&url, "faults: {status_503: 100%}");
    let (id, _) = asking.ask(&unseen);
    let (grounded, files) = asking.found(&id);
    assert!(files.is_empty() && grounded.retrieval.is_degraded(), "{files}");
    let rows = asking.rows(&id);
    let is_failed = |row: &Attempt| row.status == "failed" && row.http_status == Some(503);
    assert!(!rows.is_empty() && rows.iter().all(is_failed), "{rows:?}");
    let hit = wait_for("a hit", LIMIT, || Some(asking.ask(&json!({})).1).filter(|one| one["cache"] == "hit"));
    assert_eq!((&hit["text"], hit["cost_nano_usd"].as_i64()), (&kept["text"], Some(0)));

    // A document waits for the embedder, and leaves with its vectors.
    let failed_before = failed_calls(&log);
    let late = file("late.txt", "Late it came, and lately it went.");
    assert_eq!(finish(&mut command(data.path(), &["ingest", &late]), LIMIT).code, 0);
    wait_for("a failed try", LIMIT, || (failed_calls(&log) > failed_before).then_some(()));
    assert_eq!(chunks(&mut on_chunks).len(), 2, "it is not there without");
    set(&url, "faults: {status_503: 0%}");
    let split =
        wait_for("the document", LIMIT, || Some(chunks(&mut on_chunks)).filter(|split| split.len() == 3));
    assert!(split["late.txt"][0].embedding.as_ref().unwrap().is_of("simulated", 256));

    let of = |outcome: &str| {
        let outcome = format!("outcome=\"{outcome}\"");
        counted(&up.get("/metrics").1, "forebay_embedded_questions_total{", ["stage=\"retrieve\"", &outcome])
    };
    assert!(of("ok") > 0.0 && of("model_unavailable") > 0.0);
    up.drain();
    simulator.signal(Signal::TERM);
    assert_eq!(simulator.ended(END).code(), Some(0));
}

#[test]
fn a_kill_loses_no_call_that_was_answered() {
    let data = tempfile::tempdir().unwrap();
    let log = data.path().join("calls.jsonl");
    let (mut simulator, url) =
        simulator(data.path(), &["--latency", "0ms", "--call-log", log.to_str().unwrap()]);
    let address = url.trim_start_matches("http://").trim_end_matches("/v1").to_owned();
    // Asks until the connection is gone, and says how often it was answered whole.
    let asks = move || {
        use std::io::{Read as _, Write as _};
        let body = r#"{"messages": [{"role": "user", "content": "why?"}], "max_tokens": 1}"#;
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut stream = std::net::TcpStream::connect(&address).unwrap();
        let mut answered = 0;
        loop {
            if stream.write_all(request.as_bytes()).is_err() {
                return answered;
            }
            let (mut answer, mut part) = (Vec::new(), [0; 4_096]);
            // The answer's last byte closes the object of its usage.
            while !answer.ends_with(b"}}}") {
                match stream.read(&mut part) {
                    Ok(read @ 1..) => answer.extend_from_slice(&part[..read]),
                    _ => return answered,
                }
            }
            answered += 1;
        }
    };
    let clients: Vec<_> = (0..4).map(|_| std::thread::spawn(asks.clone())).collect();
    wait_for("a few hundred calls", LIMIT, || (log.exists() && lines_written(&log) > 300).then_some(()));
    simulator.signal(Signal::KILL);
    simulator.ended(END);
    let answered: usize = clients.into_iter().map(|client| client.join().unwrap()).sum();
    let logged = lines(&log).len();
    // Each client may have had one more under way, which is in the log and was not heard of.
    assert!((answered..=answered + 4).contains(&logged), "{answered} were answered, {logged} logged");
}

/// A line that is being written has no end yet.
fn lines_written(log: &Path) -> usize {
    std::fs::read(log).unwrap().iter().filter(|byte| **byte == b'\n').count()
}

#[test]
fn a_wrong_setting_has_its_place_and_is_refused_at_start_and_later() {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("pool.yaml");
    std::fs::write(&file, "seed: 1\nengine:\n  slotz: 4\n").unwrap();
    let refused =
        finish(&mut command(data.path(), &["simulate-model", "--config", file.to_str().unwrap()]), LIMIT);
    assert_eq!(refused.code, 2, "{refused:?}");
    assert!(
        refused
            .stderr
            .contains("pool.yaml:3:3: unknown key \"engine.slotz\"; did you mean \"engine.slots\"?"),
        "{refused:?}"
    );
    let refused = finish(&mut command(data.path(), &["simulate-model", "--set", "latency=soon"]), LIMIT);
    assert_eq!(refused.code, 2, "{refused:?}");

    let printed =
        finish(&mut command(data.path(), &["simulate-model", "--seed", "7", "--print-config"]), LIMIT);
    std::fs::write(&file, &printed.stdout).unwrap();
    let again = finish(
        &mut command(data.path(), &["simulate-model", "--config", file.to_str().unwrap(), "--print-config"]),
        LIMIT,
    );
    assert!(
        again.code == 0 && again.stdout == printed.stdout && again.stdout.contains("seed: \"7\""),
        "{again:?}"
    );
}
