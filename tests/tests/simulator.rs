//! `forebay simulate-model` as a person runs it, and the shipped pipeline on it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says why by panicking")]

use forebay_schemas::{Attempt, Record as _};
use forebay_tests::{
    Running, Signal,
    product::{DRAIN, Up, command, finish},
    wait_for,
};
use serde_json::{Value, json};
use std::{collections::BTreeSet, path::Path, time::Duration};

const LIMIT: Duration = Duration::from_secs(120);

/// A simulator on a free port, and what `--model-url` takes.
fn simulator(data: &Path, arguments: &[&str]) -> (Running, String) {
    let mut all = vec!["simulate-model", "--listen", "127.0.0.1:0"];
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
    let up = Up::start(data.path(), &["--config", config, "--model-url", &url, "--model", "simulated"]);
    let guide = concat!(env!("CARGO_MANIFEST_DIR"), "/../pipelines/guides/delivery.md");
    let ingested = finish(&mut command(data.path(), &["ingest", guide]), LIMIT);
    assert_eq!(ingested.code, 0, "{ingested:?}");

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
    assert_eq!(simulator.ended(DRAIN).code(), Some(0));
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
    simulator.ended(DRAIN);
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
