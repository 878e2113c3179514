//! What is bad, missing, taken, full or broken: each gives the error that tells what, where and what next, and nothing that was
//! accepted is lost.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says why by panicking")]

use forebay_tests::{
    Client, New, Reader, Record, Running, free_port,
    model::{ModelServer, Says},
    product::{Finished, Up, command, finish},
    services, wait_for,
};
use rdkafka::{error::KafkaError, types::RDKafkaErrorCode};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

const LIMIT: Duration = Duration::from_secs(120);

/// Runs a command on a folder of its own to its end.
fn run(arguments: &[&str]) -> Finished {
    let data = tempfile::tempdir().unwrap();
    finish(&mut command(data.path(), arguments), LIMIT)
}

/// It ended with this code, and what it said last holds all that helps.
fn check(finished: &Finished, code: i32, helps: &[&str]) {
    assert_eq!(finished.code, code, "{finished:?}");
    let said = finished.stderr.lines().filter(|line| !line.starts_with('{')).collect::<Vec<_>>().join("\n");
    for help in helps {
        assert!(said.contains(help), "no {help:?} in {said}");
    }
}

fn result_of(results: &mut Reader, origin: (i32, i64)) -> Value {
    let (partition, offset) = origin;
    results.until(&format!("the result of {partition}/{offset}"), LIMIT, |records| {
        let of = |record: &Record| {
            let result = record.json();
            let is_it = result["origin"]["partition"] == partition && result["origin"]["offset"] == offset;
            is_it.then_some(result)
        };
        records.iter().find_map(of)
    })
}

// --- Records --------------------------------------------------------------------------------------------------------

#[test]
fn what_is_no_request_fails_with_the_reason_and_lies_in_dead_letters_as_it_came() {
    let data = tempfile::tempdir().unwrap();
    let up = Up::start(data.path(), &[]);
    let client = up.client();
    let deep = format!(r#"{{"prompt":"a","metadata":{}{}}}"#, "[".repeat(100), "]".repeat(100));
    let deeper = format!(r#"{{"prompt":"a","metadata":{}{}}}"#, "[".repeat(10_000), "]".repeat(10_000));
    let bad: Vec<(New, &str)> = vec![
        (New::value(vec![0xff, 0xfe, 0x00, 0x80]).key("k"), "line 1 column 1"),
        (New::value("{\"prompt\": "), "line 1 column"),
        (New::value("{\"prompt\": 5}"), "expected a string"),
        (New::value("[]"), "Request"),
        (New::value("{}"), "neither"),
        (New::value("{\"prompt\": \"a\", \"messages\": []}"), "both"),
        (New::value(" "), "line 1"),
        (New::value(""), "line 1"),
        (New::default().key("tombstone"), ""),
        (New::value("{\"prompt\": \"a\", \"id\": \"\"}"), "0 bytes"),
        (New::value(format!("{{\"prompt\": \"a\", \"id\": \"{}\"}}", "x".repeat(257))), "257 bytes"),
        (New::value(deep), "64 levels"),
        (New::value(deeper), "recursion"),
        (New::value("{\"prompt\": \"a\"}\n{\"prompt\": \"b\"}").header("x", "kept"), "trailing"),
    ];
    let placed = client.write("requests", bad.iter().map(|(record, _)| record.clone()));
    let mut results = client.read("results");
    let mut letters = client.read("dead-letters");
    for ((record, reason), place) in bad.iter().zip(placed) {
        let result = result_of(&mut results, place);
        assert_eq!(
            (&result["status"], &result["error"]["code"]),
            (&json!("failed"), &json!("undecodable")),
            "{result}"
        );
        let message = result["error"]["message"].as_str().unwrap();
        assert!(message.contains(reason), "no {reason:?} in {message:?}");
        assert!(!message.contains(char::REPLACEMENT_CHARACTER), "{message}");
        let letter = letters.of_key(&format!("look_up/requests/{}/{}", place.0, place.1), LIMIT);
        assert_eq!(letter.value, record.value, "the original, byte for byte");
        assert_eq!(letter.header("forebay-dead-id").as_deref(), result["id"].as_str());
        assert_eq!(letter.header("forebay-dead-message").as_deref(), Some(message));
        assert_eq!(letter.header("forebay-dead-stage").as_deref(), Some("look_up"));
        for (name, value) in &record.headers {
            assert_eq!(letter.header(name).map(String::into_bytes).as_ref(), Some(value));
        }
    }
    // Beside all that, good ones are answered.
    client.ask(json!({"id": "good", "prompt": "Is anybody there?"}));
    assert_eq!(results.of_key("good", LIMIT).json()["status"], "answered");
    assert_eq!((results.records().len(), letters.to_the_end(LIMIT).len()), (bad.len() + 1, bad.len()));
    up.drain();
}

#[test]
fn unknown_fields_survive_the_hops_and_are_warned_of_once() {
    let model = ModelServer::start(|_| Says::Text("Yes.".to_owned()));
    let (data, url) = (tempfile::tempdir().unwrap(), model.url());
    let up = Up::start(data.path(), &["--model-url", &url, "--model", "stub"]);
    let client = up.client();
    let mut results = client.read("results");
    for number in 0..3 {
        client.ask(json!({"id": format!("r{number}"), "prompt": format!("Who is {number}?"), "promt_style": {"x": [1]}}));
        assert_eq!(results.of_key(&format!("r{number}"), LIMIT).json()["status"], "answered");
    }
    // The last hop before the result still has them.
    let mut prompts = client.read("prompts");
    for record in prompts.at_least(3, LIMIT) {
        assert_eq!(record.json()["request"]["promt_style"], json!({"x": [1]}));
    }
    let said = up.process.stderr();
    let warnings: Vec<_> = said.lines().filter(|line| line.contains("promt_style")).collect();
    assert!(warnings.len() == 1 && warnings[0].contains("\"WARN\""), "{warnings:?}");
    up.drain();
}

#[test]
fn a_document_that_is_none_is_put_aside_and_deletes_nothing() {
    let data = tempfile::tempdir().unwrap();
    let up = Up::start(data.path(), &[]);
    let client = up.client();
    let bad = [
        New::value("{\"id\": \"a\", \"txet\": \"misspelt\"}").key("a"),
        New::value(vec![0xff, 0x00]).key("b"),
        New::value("{\"id\": \"\", \"text\": \"x\"}").key("c"),
    ];
    let placed = client.write("documents", bad.clone());
    let mut letters = client.read("dead-letters");
    for ((partition, offset), record) in placed.into_iter().zip(bad) {
        let letter = letters.of_key(&format!("index/documents/{partition}/{offset}"), LIMIT);
        assert_eq!(letter.value, record.value);
    }
    assert!(letters.records()[0].header("forebay-dead-message").is_some());
    assert_eq!(client.read("results").to_the_end(LIMIT).len(), 0, "nobody asked");
    up.drain();
}

#[test]
fn a_record_of_twenty_megabytes_is_refused_by_its_topic_and_fails_where_the_topic_takes_it() {
    let data = tempfile::tempdir().unwrap();
    // With a store for large bodies it would be answered: here all travels in messages.
    let mut command = command(data.path(), &["up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
    let up = Up::wait("forebay up", command.env("FOREBAY_CLAIMS_OVER", "off"));
    let client = up.client();
    let huge = || New::from(json!({"id": "huge", "prompt": "x".repeat(20 << 20)}));
    let refused = client.try_write("requests", [huge()], LIMIT).remove(0);
    let code = refused.as_ref().err().and_then(KafkaError::rdkafka_error_code);
    assert_eq!(code, Some(RDKafkaErrorCode::MessageSizeTooLarge), "{refused:?}");

    client.set_topic(
        "requests",
        &[("max.message.bytes", "33554432"), ("message.timestamp.type", "LogAppendTime")],
    );
    let (partition, offset) = client.write("requests", [huge()])[0];
    let result = client.read("results").of_key("huge", LIMIT).json();
    assert_eq!(
        (&result["status"], &result["error"]["code"]),
        (&json!("failed"), &json!("output_too_large")),
        "{result:.300}"
    );
    let message = result["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("max.message.bytes") && message.contains(&format!("requests/{partition}/{offset}")),
        "{message}"
    );
    let letter = client.read("dead-letters").of_key(&format!("look_up/requests/{partition}/{offset}"), LIMIT);
    assert!(
        letter.value.is_none()
            && letter.header("forebay-dead-body").is_some_and(|body| body.contains("omitted"))
    );
    client.ask(json!({"id": "after", "prompt": "Does it go on?"}));
    assert_eq!(client.read("results").of_key("after", LIMIT).json()["status"], "answered");
    up.drain();
}

#[test]
fn huge_headers_travel_and_come_back() {
    let data = tempfile::tempdir().unwrap();
    let up = Up::start(data.path(), &[]);
    let client = up.client();
    let value: Vec<u8> = (0..600_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let mut record =
        New::from(json!({"id": "heads", "prompt": "How heavy is a head?"})).header("heavy", value.clone());
    for number in 0..500 {
        record = record.header(&format!("x-{number}"), number.to_string());
    }
    client.write("requests", [record]);
    let result = client.read("results").of_key("heads", LIMIT);
    assert_eq!(result.json()["status"], "answered");
    let heavy = result.headers.iter().find(|(name, _)| name == "heavy").and_then(|(_, value)| value.as_ref());
    assert!(heavy == Some(&value), "the header of 600,000 bytes");
    assert_eq!(result.header("x-499").as_deref(), Some("499"));
    up.drain();
}

// --- What a person typed --------------------------------------------------------------------------------------------

fn file(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_misspelt_key_is_refused_with_its_place_and_the_nearest_name() {
    let folder = tempfile::tempdir().unwrap();
    let shipped =
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../pipelines/answer.yaml")).unwrap();
    let misspelt = shipped.replace("in_flight: 64", "in_fligth: 64").replace("limit: 8", "limt: 8");
    let line = |what: &str| misspelt.lines().position(|line| line.contains(what)).expect(what) + 1;
    let pipeline = file(folder.path(), "mine.yaml", &misspelt);
    let fault = |what: &str, hint: &str| format!("mine.yaml:{}:", line(what)) + "|" + hint;
    let (first, second) = (fault("in_fligth", "\"in_flight\"?"), fault("limt", "\"limit\"?"));
    let helps: Vec<&str> = first.split('|').chain(second.split('|')).collect();
    for arguments in [&["check", &pipeline][..], &["up", &pipeline], &["run", &pipeline, "--stage", "infer"]]
    {
        check(&run(arguments), 2, &helps);
    }
    let config = file(folder.path(), "config.yaml", "data: x\nmodle:\n  url: http://h/v1\n");
    check(
        &run(&["up", "--config", &config]),
        2,
        &["config.yaml:3:", "modle.url", "did you mean \"model.url\"?"],
    );
    let broken = file(folder.path(), "broken.yaml", "steps: [\n");
    check(&run(&["check", &broken]), 2, &["broken.yaml:"]);
    let bytes = folder.path().join("bytes.yaml");
    fs::write(&bytes, b"name: a\n\xff").unwrap();
    check(&run(&["check", bytes.to_str().unwrap()]), 2, &["bytes.yaml"]);
}

#[test]
fn a_property_that_the_promises_own_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let owned = file(folder.path(), "owned.yaml", "kafka: {acks: '1'}\nbootstrap_servers: 127.0.0.1:1\n");
    check(&run(&["up", "--config", &owned, "--admin", "127.0.0.1:0"]), 2, &["acks", "replicas"]);
    let unknown = file(
        folder.path(),
        "unknown.yaml",
        "kafka: {sasl.mechanisn: PLAIN}\nbootstrap_servers: 127.0.0.1:1\n",
    );
    check(&run(&["up", "--config", &unknown, "--admin", "127.0.0.1:0"]), 2, &["sasl.mechanisn"]);
}

#[test]
fn a_model_url_that_cannot_be_one_is_refused_at_the_start() {
    let up = |more: &[&str]| {
        let mut arguments = vec!["up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
        arguments.extend(more);
        run(&arguments)
    };
    check(
        &up(&["--model-url", "http://127.0.0.1:1", "--model", "m"]),
        2,
        &["http://127.0.0.1:1", "/v1", "--model-url"],
    );
    check(&up(&["--model-url", "http://127.0.0.1:1/v1"]), 2, &["--model NAME"]);
    check(&up(&["--model-url", "ftp://127.0.0.1:1/v1", "--model", "m"]), 2, &["http://"]);
    check(&up(&["--model-url", "not a url/v1", "--model", "m"]), 2, &["not a url/v1"]);
}

// --- Brokers, ports, disks ------------------------------------------------------------------------------------------

#[test]
fn a_missing_topic_is_named_with_the_command_that_makes_it() {
    let Some(servers) = services::kafka() else { return };
    let prefix = format!("missing-{}-", std::process::id());
    let on_kafka = ["--bootstrap-servers", &servers, "--topic-prefix", &prefix, "--admin", "127.0.0.1:0"];
    for command in [&["up"][..], &["run", "answer", "--stage", "infer"]] {
        let finished = run(&[command, &on_kafka].concat());
        let cure = format!("forebay topics apply --bootstrap-servers {servers} --topic-prefix {prefix}");
        check(&finished, 2, &[&format!("{prefix}requests"), &format!("{prefix}dead-letters"), &cure]);
    }
}

#[test]
fn a_broker_that_cannot_be_reached_is_named_in_time() {
    let nobody = format!("127.0.0.1:{}", free_port());
    let folder = tempfile::tempdir().unwrap();
    let document = file(folder.path(), "a.md", "# A\n");
    let commands = [
        &["up", "--admin", "127.0.0.1:0"][..],
        &["run", "answer", "--stage", "infer"],
        &["topics", "apply"],
        &["ask", "Is anybody there?"],
        &["ingest", &document],
    ];
    // Side by side, since each waits for nobody.
    let start = Instant::now();
    let mut running: Vec<_> = commands
        .iter()
        .map(|arguments| {
            let arguments = [arguments, &["--bootstrap-servers", &nobody][..]].concat();
            Running::start(&arguments.join(" "), &mut command(folder.path(), &arguments))
        })
        .collect();
    for process in &mut running {
        let code = process.ended(LIMIT).code().unwrap_or(-1);
        let finished = Finished { code, stdout: process.stdout(), stderr: process.stderr() };
        check(&finished, 1, &[&nobody, "check that the broker runs"]);
        assert!(finished.stderr.lines().count() < 20, "it does not flood the log: {}", finished.stderr);
    }
    assert!(start.elapsed() < Duration::from_secs(20), "it took {:?}", start.elapsed());
}

#[test]
fn a_taken_port_is_named_with_what_to_do() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    check(
        &run(&["up", "--listen", &address, "--admin", "127.0.0.1:0"]),
        1,
        &[&address, "in use", "another address"],
    );
    let admin = run(&["up", "--listen", "127.0.0.1:0", "--admin", &address]);
    check(&admin, 1, &[&address, "metrics and health", "--admin"]);
}

#[test]
fn a_folder_that_another_process_uses_is_named() {
    let data = tempfile::tempdir().unwrap();
    let up = Up::start(data.path(), &[]);
    let second = finish(
        &mut command(data.path(), &["up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]),
        LIMIT,
    );
    check(&second, 1, &[data.path().to_str().unwrap(), "another process", "another folder"]);
    // The first has not been hurt.
    let asked = finish(&mut command(data.path(), &["ask", "Is anybody there?"]), LIMIT);
    assert_eq!(asked.code, 0, "{asked:?}");
    up.drain();
}

#[test]
fn a_damaged_segment_stops_the_start_with_file_and_position() {
    let data = tempfile::tempdir().unwrap();
    let up = Up::start(data.path(), &["--partitions", "1"]);
    let client = up.client();
    let mut results = client.read("results");
    // Batches of their own, so that good ones lie behind the bad one.
    let mut ends = Vec::new();
    for number in 0..3 {
        client.ask(json!({"id": format!("r{number}"), "prompt": format!("What is {number}?")}));
        results.of_key(&format!("r{number}"), LIMIT);
        ends.push(fs::metadata(segment(data.path())).unwrap().len());
    }
    up.drain();
    let path = segment(data.path());
    let mut bytes = fs::read(&path).unwrap();
    let inside = usize::try_from(ends[1]).unwrap() - 10;
    bytes[inside] ^= 0x55;
    fs::write(&path, &bytes).unwrap();
    let start = || {
        finish(&mut command(data.path(), &["up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]), LIMIT)
    };
    check(
        &start(),
        1,
        &[path.to_str().unwrap(), &format!("damaged at byte {}", ends[0]), "restore the file"],
    );
    assert!(fs::read(&path).unwrap() == bytes, "nothing was cut");
    // Restored, it starts and has lost nothing.
    bytes[inside] ^= 0x55;
    fs::write(&path, &bytes).unwrap();
    let up = Up::start(data.path(), &["--partitions", "1"]);
    assert_eq!(up.client().read("requests").to_the_end(LIMIT).len(), 3);
    up.drain();
}

/// The one segment of the one partition of `requests`.
fn segment(data: &Path) -> PathBuf {
    fn find(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                find(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "log")
                && path.parent().unwrap().to_string_lossy().contains("requests")
            {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    find(&data.join("broker"), &mut found);
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

/// A small disk of its own; taken away when the test ends.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Only root may mount one.
    fn mount(at: &Path, bytes: u32) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let options = format!("size={bytes}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).output();
        let mounted = mounted.is_ok_and(|output| output.status.success());
        mounted.then(|| Self(at.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: the broker of a test that failed may still be at work on it.
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[test]
fn a_full_disk_refuses_what_is_new_keeps_what_was_acknowledged_and_goes_on_when_there_is_room() {
    let data = tempfile::tempdir().unwrap();
    let broker = data.path().join("broker");
    let Some(_disk) = SmallDisk::mount(&broker, 24 << 20) else {
        println!("skipped: only root may mount a small disk");
        return;
    };
    let ballast = broker.join("ballast");
    fs::write(&ballast, vec![1; 16 << 20]).unwrap();
    let up = Up::start(data.path(), &["--partitions", "1"]);
    let client = up.client();
    let mut accepted = Vec::new();
    let filled = (0..64).any(|number| {
        let id = format!("r{number}");
        let request = json!({"id": id, "prompt": "What fills a disk?", "metadata": "x".repeat(200_000)});
        let written = client.try_write("requests", [New::from(request)], Duration::from_secs(3)).remove(0);
        match &written {
            Ok(_) => accepted.push(id),
            Err(fault) => println!("refused after {} requests: {fault}", accepted.len()),
        }
        written.is_err()
    });
    assert!(filled && !accepted.is_empty(), "{} were accepted", accepted.len());
    let said = wait_for("a word on the full disk", LIMIT, || {
        let said = up.process.stderr();
        said.lines().find(|line| line.contains("No space left on device")).map(str::to_owned)
    });
    let place = broker.join("topics");
    for help in ["ERROR", "is the disk full?", place.to_str().unwrap()] {
        assert!(said.contains(help), "no {help:?} in {said}");
    }

    fs::remove_file(&ballast).unwrap();
    let mut results = client.read("results");
    for id in &accepted {
        let result = results.of_key(id, LIMIT).json();
        assert_eq!(result["status"], "answered", "{result:.300}");
    }
    client.ask(json!({"id": "after", "prompt": "Is there room again?"}));
    assert_eq!(results.of_key("after", LIMIT).json()["status"], "answered");
    up.drain();
}

/// Leaves no room on a disk.
fn fill(disk: &Path) -> PathBuf {
    let ballast = disk.join("ballast");
    let mut file = fs::File::create(&ballast).unwrap();
    // By the smallest page, so that no hole is left for another's.
    while file.write_all(&[1; 4096]).is_ok() {}
    ballast
}

/// The line that a process has said with these words, as soon as it has.
fn said(up: &Up, words: &[&str]) -> String {
    wait_for(&format!("a word on {words:?}"), LIMIT, || {
        let said = up.process.stderr();
        said.lines().find(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned)
    })
}

#[test]
fn bodies_wait_for_room_at_the_object_store_and_none_is_lost() {
    let data = tempfile::tempdir().unwrap();
    let objects = data.path().join("objects");
    let Some(_disk) = SmallDisk::mount(&objects, 32 << 20) else {
        println!("skipped: only root may mount a small disk");
        return;
    };
    let up = Up::start(data.path(), &[]);
    let client = up.client();
    let ballast = fill(&objects);
    let request = |number: usize| json!({"id": format!("r{number}"), "prompt": "What is large?", "metadata": "x".repeat(600_000)});
    client.write("requests", (0..10).map(request).map(New::from));
    let place = objects.to_str().unwrap();
    said(&up, &["could not leave a body", "no space left", place, "free some"]);
    assert_eq!(client.read("results").to_the_end(LIMIT).len(), 0);
    assert_eq!(up.get("/healthz").0, 200, "a restart would not help");
    fs::remove_file(ballast).unwrap();
    let mut results = client.read("results");
    for number in 0..10 {
        let result = results.of_key(&format!("r{number}"), LIMIT).json();
        assert_eq!(result["status"], "answered", "{result:.300}");
        assert_eq!(result["metadata"].as_str().map(str::len), Some(600_000));
    }
    assert_eq!(results.to_the_end(LIMIT).len(), 10);
    up.drain();
}

#[test]
fn a_full_disk_under_the_copies_of_tables_is_named_and_a_restart_with_room_loses_nothing() {
    let data = tempfile::tempdir().unwrap();
    let copies = data.path().join("copies");
    let Some(_disk) = SmallDisk::mount(&copies, 16 << 20) else {
        println!("skipped: only root may mount a small disk");
        return;
    };
    let up = Up::start(data.path(), &[]);
    let client = up.client();
    let ballast = fill(&copies);
    let request = |number: usize| json!({"id": format!("r{number}"), "prompt": format!("What is {number}?")});
    client.write("requests", (0..500).map(request).map(New::from));
    let place = copies.to_str().unwrap();
    // Said by whoever meets it first: a change of a table, or what makes the changes durable after a while.
    said(&up, &["no space left", place, "free some, then restart"]);
    fs::remove_file(ballast).unwrap();
    up.kill();
    let up = Up::start(data.path(), &[]);
    let client = up.client();
    let mut results = client.read("results");
    results.at_least(500, LIMIT);
    let ids: BTreeSet<_> = results.to_the_end(LIMIT).iter().map(Record::key_text).collect();
    assert_eq!((ids.len(), results.records().len()), (500, 500), "each has one result");
    // What was answered while there was no room is known by now.
    client.ask(json!({"id": "again", "prompt": "What is 7?"}));
    assert_eq!(results.of_key("again", LIMIT).json()["cache"], "hit");
    up.drain();
}

// --- The model ------------------------------------------------------------------------------------------------------

/// `up` with a model server that may not be there, and a client.
fn with_model(data: &Path, port: u16) -> (Up, Client) {
    let url = format!("http://127.0.0.1:{port}/v1");
    let up = Up::start(data, &["--model-url", &url, "--model", "stub"]);
    let client = up.client();
    (up, client)
}

#[test]
fn requests_wait_for_a_model_server_that_is_down_and_are_answered_when_it_is_up() {
    let data = tempfile::tempdir().unwrap();
    let port = free_port();
    let (up, client) = with_model(data.path(), port);
    let ids: Vec<_> = (0..20).map(|number| format!("r{number}")).collect();
    client.write(
        "requests",
        ids.iter().map(|id| New::from(json!({"id": id, "prompt": format!("Who is {id}?")}))),
    );
    wait_for("a word on the model server", LIMIT, || {
        up.process.stderr().contains("model_unavailable").then_some(())
    });
    assert_eq!(up.get("/healthz").0, 200, "a restart would not help");
    assert_eq!(client.read("results").to_the_end(LIMIT).len(), 0);
    let model = ModelServer::start_on(port, |_| Says::Text("Somebody.".to_owned()));
    let mut results = client.read("results");
    for id in &ids {
        let result = results.of_key(id, LIMIT).json();
        assert_eq!(
            (&result["status"], &result["text"]),
            (&json!("answered"), &json!("Somebody.")),
            "{result}"
        );
    }
    assert_eq!(model.calls().len(), ids.len(), "each is paid for once");
    assert_eq!(client.read("dead-letters").to_the_end(LIMIT).len(), 0);
    up.drain();
}

#[test]
fn what_the_model_server_rejects_fails_at_once_and_what_it_cannot_do_now_waits() {
    let model = ModelServer::start(|call| {
        let asked = call.to_string();
        match () {
            () if asked.contains("too long") => Says::Refusal(400, "this model takes 10 tokens".to_owned()),
            () if asked.contains("no such") => Says::Refusal(404, "no such model".to_owned()),
            () => Says::Text("Fine.".to_owned()),
        }
    });
    let (data, url) = (tempfile::tempdir().unwrap(), model.url());
    let up = Up::start(data.path(), &["--model-url", &url, "--model", "stub"]);
    let client = up.client();
    let mut results = client.read("results");
    for (id, prompt, said) in [("long", "Is it too long?", "400"), ("none", "Is there no such model?", "404")]
    {
        client.ask(json!({"id": id, "prompt": prompt}));
        let result = results.of_key(id, LIMIT).json();
        assert_eq!(
            (&result["status"], &result["error"]["code"]),
            (&json!("failed"), &json!("model_rejected")),
            "{result}"
        );
        assert!(result["error"]["message"].as_str().unwrap().contains(said), "{result}");
        assert!(result["text"].is_null() && result["citations"] == json!([]), "{result}");
    }
    assert_eq!(model.calls().len(), 2, "no retry can help");
    let mut letters = client.read("dead-letters");
    for letter in letters.at_least(2, LIMIT) {
        assert_eq!(letter.header("forebay-dead-code").as_deref(), Some("model_rejected"));
        assert_eq!(letter.header("forebay-dead-stage").as_deref(), Some("infer"));
    }
    client.ask(json!({"id": "good", "prompt": "Is it short?"}));
    assert_eq!(results.of_key("good", LIMIT).json()["status"], "answered");
    up.drain();
}

#[test]
fn a_deadline_that_passes_while_the_model_server_is_down_is_an_expiry() {
    let data = tempfile::tempdir().unwrap();
    let (up, client) = with_model(data.path(), free_port());
    let start = Instant::now();
    client.ask(json!({"id": "late", "prompt": "Is there time?", "deadline_ms": 1_000}));
    let result = client.read("results").of_key("late", LIMIT).json();
    assert_eq!(
        (&result["status"], &result["error"]["code"]),
        (&json!("expired"), &json!("deadline")),
        "{result}"
    );
    assert!(result["error"]["message"].as_str().unwrap().contains("1000 ms"), "{result}");
    assert!(start.elapsed() >= Duration::from_millis(900), "not before its time");
    assert_eq!(client.read("dead-letters").to_the_end(LIMIT).len(), 0, "an expiry is nobody's fault");
    up.drain();
}
