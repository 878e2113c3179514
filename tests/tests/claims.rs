//! Large records on their way through all steps: their bodies lie at the object store, and none is lost or doubled there.
//!
//! What is asked of them: 600 KiB of metadata come back with each result byte for byte, once, over a `kill -9`; no topic
//! between steps carries a body; a dead letter is shown and redriven with its body, and says where that is gone.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says why by panicking")]

use forebay_tests::{
    Client, Record, Signal,
    model::{ModelServer, Says},
    product::{Finished, Up, command, finish},
    services, wait_for,
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

const LIMIT: Duration = Duration::from_secs(180);

const REQUESTS: usize = 40;

/// All topics between the steps that a question passes.
const BETWEEN: [&str; 4] = ["questions", "prompts", "completions", "endings"];

/// `forebay up` on a cluster of its own, or on Kafka under a prefix of its own.
struct Site {
    up: Up,
    client: Client,
    data: tempfile::TempDir,
    /// What every command needs to find the cluster.
    cluster: Vec<String>,
}

impl Site {
    fn start(cluster: Vec<String>, settings: &[(&str, &str)], arguments: &[&str]) -> Self {
        let data = tempfile::tempdir().unwrap();
        let up = Self::up(data.path(), &cluster, settings, arguments);
        let client = Self::client(&up, &cluster);
        Self { up, client, data, cluster }
    }

    fn up(data: &Path, cluster: &[String], settings: &[(&str, &str)], arguments: &[&str]) -> Up {
        let mut command = command(data, &["up", "--admin", "127.0.0.1:0"]);
        let listen = if cluster.is_empty() { &["--listen", "127.0.0.1:0"][..] } else { &[] };
        Up::wait(
            "forebay up",
            command.args(listen).args(arguments).args(cluster).envs(settings.iter().copied()),
        )
    }

    fn client(up: &Up, cluster: &[String]) -> Client {
        Client::new(&up.servers, cluster.last().map_or("", String::as_str))
    }

    /// The arguments that lead to Kafka, with its topics made; nothing where there is none.
    fn kafka() -> Option<Vec<String>> {
        let servers = services::kafka()?;
        let prefix = format!("claims-{}-", std::process::id());
        let cluster = ["--bootstrap-servers", &servers, "--topic-prefix", &prefix].map(str::to_owned);
        let nowhere = tempfile::tempdir().unwrap();
        let applied = finish(command(nowhere.path(), &["topics", "apply"]).args(&cluster), LIMIT);
        assert_eq!(applied.code, 0, "{applied:?}");
        Some(cluster.into())
    }

    /// As a crash and a new start do; the embedded broker comes back on another port.
    fn crash(&mut self) {
        self.up.process.signal(Signal::KILL);
        self.up.process.ended(LIMIT);
        self.up = Self::up(self.data.path(), &self.cluster, &[], &[]);
        self.client = Self::client(&self.up, &self.cluster);
    }

    fn dlq(&self, arguments: &[&str]) -> Finished {
        let all: Vec<_> = ["dlq"].iter().chain(arguments).copied().collect();
        finish(command(self.data.path(), &all).args(&self.cluster), LIMIT)
    }

    /// The files of all claimed bodies.
    fn objects(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        let mut folders = vec![self.data.path().join("objects/claims")];
        while let Some(folder) = folders.pop() {
            let Ok(inside) = std::fs::read_dir(&folder) else { continue };
            for path in inside.map(|entry| entry.unwrap().path()) {
                if path.is_dir() { folders.push(path) } else { files.push(path) }
            }
        }
        files
    }
}

/// Some 600 KiB that nobody can compress or mistake for another's.
fn metadata(number: usize) -> Value {
    json!({"number": number, "bulk": format!("{number:06} ").repeat(600 * 1024 / 7)})
}

fn ask(site: &Site, number: usize) {
    let tenant = if number.is_multiple_of(2) { "even" } else { "odd" };
    site.client.ask(json!({
        "id": format!("r{number}"), "tenant": tenant, "prompt": format!("What is {number}?"),
        "metadata": metadata(number),
    }));
}

fn has_body(record: &Record) -> bool {
    record.value.as_ref().is_some_and(|value| !value.is_empty())
}

fn large_requests_survive_a_crash(mut site: Site) {
    (0..REQUESTS / 2).for_each(|number| ask(&site, number));
    site.client.read("results").at_least(REQUESTS / 8, LIMIT);
    site.crash();
    (REQUESTS / 2..REQUESTS).for_each(|number| ask(&site, number));
    let mut results = site.client.read("results");
    results.at_least(REQUESTS, LIMIT);
    wait_for("no lag of publish", LIMIT, || {
        (site.client.lag("answer.publish", "endings") == 0).then_some(())
    });
    let mut by_id = BTreeMap::<_, Vec<Value>>::new();
    for result in results.to_the_end(LIMIT) {
        by_id.entry(result.key_text()).or_default().push(result.json());
    }
    assert_eq!(by_id.len(), REQUESTS);
    for number in 0..REQUESTS {
        let of_id = &by_id[&format!("r{number}")];
        assert_eq!(of_id.len(), 1, "r{number} came twice");
        let result = &of_id[0];
        assert_eq!(result["status"], "answered");
        assert!(result["metadata"] == metadata(number), "the metadata of r{number} came back as others");
    }
    for topic in BETWEEN {
        let mut reader = site.client.read(topic);
        let records = reader.to_the_end(LIMIT);
        assert!(records.len() >= REQUESTS, "{topic}: {}", records.len());
        for record in records {
            assert_eq!(record.value.as_deref(), Some(&[][..]), "no body and no tombstone on {topic}");
            assert!(record.header("forebay-claim").unwrap().starts_with("claims/"));
        }
    }
    // What was processed twice is the same object, but for an answer, which tells how long it took.
    let objects = site.objects().len();
    assert!(objects >= BETWEEN.len() * REQUESTS, "{objects} objects");
    let metrics = site.up.get("/metrics").1;
    assert!(metrics.contains("forebay_step_claims_records_total"), "{metrics}");
    site.up.drain();
}

#[test]
fn large_requests_survive_a_crash_on_the_embedded_broker() {
    large_requests_survive_a_crash(Site::start(Vec::new(), &[], &[]));
}

#[test]
fn large_requests_survive_a_crash_on_kafka() {
    let Some(cluster) = Site::kafka() else { return };
    large_requests_survive_a_crash(Site::start(cluster, &[], &[]));
}

#[test]
fn bodies_stay_in_their_messages_where_that_is_chosen() {
    let site = Site::start(Vec::new(), &[("FOREBAY_CLAIMS_OVER", "off")], &[]);
    ask(&site, 1);
    let result = site.client.read("results").at_least(1, LIMIT)[0].json();
    assert!(result["metadata"] == metadata(1));
    for topic in BETWEEN {
        let mut reader = site.client.read(topic);
        assert!(reader.to_the_end(LIMIT).iter().all(has_body), "{topic}");
    }
    assert_eq!(site.objects().len(), 0);
    site.up.drain();
}

#[test]
fn a_large_dead_letter_is_shown_and_redriven_with_its_body() {
    let mended = Arc::new(AtomicBool::new(false));
    let is_mended = Arc::clone(&mended);
    let model = ModelServer::start(move |_| match is_mended.load(Ordering::SeqCst) {
        true => Says::Text("Mended.".to_owned()),
        false => Says::Refusal(400, "no such model".to_owned()),
    });
    let site = Site::start(Vec::new(), &[], &["--model-url", &model.url(), "--model", "stub"]);
    (0..2).for_each(|number| ask(&site, number));
    let mut results = site.client.read("results");
    results.at_least(2, LIMIT);
    let mut letters = site.client.read("dead-letters");
    let letters = letters.at_least(2, LIMIT);
    assert!(letters.iter().all(|letter| !has_body(letter) && letter.header("forebay-claim").is_some()));
    let shown = site.dlq(&["show", "r1"]);
    assert!(shown.code == 0 && shown.stdout.contains("000001 000001 "), "its body is shown");

    // A dry run puts nothing; a redrive puts the body anew, which today is the same object.
    let before = site.objects().len();
    let dry = site.dlq(&["redrive", "r1", "--dry-run"]);
    assert!(dry.stdout.contains("1 would be redriven"), "{dry:?}");
    assert_eq!(site.objects().len(), before);
    mended.store(true, Ordering::SeqCst);
    let redriven = site.dlq(&["redrive", "r1"]);
    assert!(redriven.stdout.contains("1 redriven"), "{redriven:?}");
    results.at_least(3, LIMIT);
    let result = results.records().iter().map(Record::json).find(|result| result["generation"] == 1).unwrap();
    assert!(result["status"] == "answered" && result["metadata"] == metadata(1));
    let mut copies = site.client.read("retry.infer.10s");
    assert!(copies.at_least(1, LIMIT).iter().all(|copy| !has_body(copy)));

    // What is gone is not redriven, and says so.
    site.objects().iter().for_each(|file| std::fs::remove_file(file).unwrap());
    let gone = site.dlq(&["redrive", "r0"]);
    assert!(gone.code == 1 && gone.stderr.contains("is not in the object store"), "{gone:?}");
    let shown = site.dlq(&["show", "r0"]);
    assert!(shown.code == 0 && shown.stderr.contains("is not in the object store"), "{:?}", shown.stderr);
    site.up.drain();
}

#[test]
fn a_body_that_is_gone_is_told_to_its_client() {
    let model = ModelServer::start(|_| Says::Refusal(500, "not yet".to_owned()));
    let site = Site::start(Vec::new(), &[], &["--model-url", &model.url(), "--model", "stub"]);
    ask(&site, 0);
    site.client.read("retry.infer.10s").at_least(1, LIMIT);
    site.objects().iter().for_each(|file| std::fs::remove_file(file).unwrap());
    let result = site.client.read("results").at_least(1, LIMIT)[0].json();
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("failed"), &json!("claim_missing")));
    site.up.drain();
}
