//! Rows with the framing of a schema registry: a real one, a client of it that knows nothing of us, and each reader of ours, on a topic
//! that holds rows of both framings.
//!
//! Oracle: what was asked and answered, and Confluent's own deserializer.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says why by panicking")]

use forebay_tests::{
    Client, Running, free_port,
    model::{ModelServer, Says},
    product::{Finished, Up, command, finish},
    services, wait_for,
};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::{path::Path, process::Command, time::Duration};
use tokio::runtime::Runtime;

/// Longer than anything here takes, also on a machine that is busy.
const LIMIT: Duration = Duration::from_secs(120);
const CALL_NANO_USD: i64 = 150_000;

/// A registry of the test's own.
struct Registry {
    process: Running,
    url: String,
    runtime: Runtime,
}

impl Registry {
    fn start() -> Option<Self> {
        let port = free_port();
        let process = Running::start("the schema registry", &mut services::registry_command(port)?);
        let url = format!("http://127.0.0.1:{port}/apis/ccompat/v7");
        let registry = Self { process, url, runtime: Runtime::new().unwrap() };
        wait_for("the schema registry", LIMIT, || registry.get("subjects"));
        Some(registry)
    }

    fn get(&self, path: &str) -> Option<Value> {
        let answer = async { reqwest::get(format!("{}/{path}", self.url)).await?.json().await };
        self.runtime.block_on(answer).ok()
    }

    fn send(&self, method: reqwest::Method, path: &str, body: &Value) -> Value {
        let request = reqwest::Client::new().request(method, format!("{}/{path}", self.url)).json(body);
        self.runtime.block_on(async { request.send().await?.json().await }).unwrap()
    }
}

/// A file of settings whose topics begin with a prefix, with these settings of Avro.
fn settings(data: &Path, model: &ModelServer, prefix: &str, avro: &str) -> String {
    let (prices, config) = (data.join("prices.json"), data.join("forebay.yaml"));
    let each = json!({"input_cost_per_token": 1e-5, "output_cost_per_token": 1e-5});
    std::fs::write(&prices, json!({"m": each}).to_string()).unwrap();
    let text = format!(
        "model: {{url: '{}', name: m}}\nprices: {}\ntopic_prefix: {prefix}\nsink: {{flush_every: 1s}}\navro: {avro}\n",
        model.url(),
        prices.display()
    );
    std::fs::write(&config, text).unwrap();
    config.display().to_string()
}

fn ask(client: &Client, id: &str) {
    client.ask(json!({
        "id": id, "tenant": "acme", "prompt": format!("What is {id}?"), "max_tokens": 10,
        "cache": {"no_cache": true, "no_store": true},
    }));
    client.read("results").of_key(id, LIMIT);
    client.read("outcomes").of_key(id, LIMIT);
}

fn forebay(data: &Path, config: &str, arguments: &[&str]) -> Finished {
    let all = [arguments, &["--config", config]].concat();
    finish(&mut command(data, &all), LIMIT)
}

fn sql(data: &Path, config: &str, up: &Up, query: &str) -> Finished {
    let settings = ["sql", "--config", config, "--bootstrap-servers", up.servers.as_str()];
    finish(command(data, &settings).args(["--format", "csv", "-c", query]), LIMIT)
}

#[test]
fn rows_are_read_by_whoever_knows_the_registry_and_a_topic_may_hold_both_framings() {
    let (Some(registry), Some(python)) = (Registry::start(), services::python()) else { return };
    let data = tempfile::tempdir().unwrap();
    let data = data.path();
    let model = ModelServer::start(|_| Says::Text("It is so.".to_owned()));
    let prefix = "framed-";
    let url = &registry.url;
    let up = |config: &str| Up::start(data, &["--config", config]);

    // One that reads the registry's framing and writes its own: whoever wants to switch begins so.
    let config = settings(data, &model, prefix, &format!("{{schema_registry: '{url}'}}"));
    let before = up(&config);
    ask(&Client::new(&before.servers, prefix), "first");
    assert_eq!(registry.get("subjects"), Some(json!([])), "who does not write with it registers nothing");
    before.drain();

    let avro = format!("{{framing: confluent, schema_registry: '{url}'}}");
    let config = settings(data, &model, prefix, &avro);
    let framed = up(&config);
    let client = Client::new(&framed.servers, prefix);
    ask(&client, "second");

    // Confluent's deserializer, which has the schema from the registry alone.
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/registry.py");
    let mut reader = Command::new(python);
    reader.args([script, &framed.servers, url, &format!("{prefix}outcomes")]);
    let read = finish(&mut reader, LIMIT);
    assert_eq!(read.code, 0, "{read:?}");
    let read: Value = serde_json::from_str(&read.stdout).unwrap();
    assert_eq!(read["others"], json!(1), "{read}");
    assert_eq!(
        read["subjects"],
        json!([format!("{prefix}attempts-value"), format!("{prefix}outcomes-value")])
    );
    let [row] = read["rows"].as_array().unwrap().as_slice() else { panic!("one row: {read}") };
    let seen = ["request_id", "tenant", "status", "model_served", "billed_nano_usd", "generation"];
    let seen = seen.map(|column| row[column].clone());
    assert_eq!(json!(seen), json!(["second", "acme", "answered", "stub", CALL_NANO_USD, 0]));

    // Ours: the tail of the topic, the tables, and who reads rows one by one.
    let live = "SELECT request_id, billed_nano_usd FROM requests_live ORDER BY request_id";
    let both = format!("request_id,billed_nano_usd\nfirst,{CALL_NANO_USD}\nsecond,{CALL_NANO_USD}\n");
    let told = sql(data, &config, &framed, live);
    assert_eq!((told.stdout.as_str(), told.code), (both.as_str(), 0), "{told:?}");
    wait_for("rows of both framings in the tables", LIMIT, || {
        let query = "SELECT count(*) FROM outcomes UNION ALL SELECT count(*) FROM attempts UNION ALL SELECT count(*) FROM dead_letters";
        let told = sql(data, &config, &framed, query);
        (told.stdout.lines().skip(1).eq(["2", "2", "0"])).then_some(())
    });
    let log = forebay(data, &config, &["tiers", "log", "--bootstrap-servers", &framed.servers]);
    let outcomes = log.stdout.lines().filter(|line| line.contains("\"total_us\"")).count();
    assert_eq!((log.code, outcomes), (0, 2), "{log:?}");

    // What is not compatible is refused before anything is read.
    let global = json!({"compatibility": "BACKWARD"});
    registry.send(reqwest::Method::PUT, "config", &global);
    let other = json!({"type": "record", "name": "Outcome", "namespace": "forebay", "fields": [{"name": "request_id", "type": "int"}]});
    let body = json!({"schema": other.to_string()});
    registry.send(reqwest::Method::POST, "subjects/taken-outcomes-value/versions", &body);
    let elsewhere = tempfile::tempdir().unwrap();
    let taken = settings(elsewhere.path(), &model, "taken-", &avro);
    let start = ["up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
    let refused = forebay(elsewhere.path(), &taken, &start);
    assert_ne!(refused.code, 0);
    let what = format!(
        "the schema registry at {url} did not register the schema of topic taken-outcomes under subject taken-outcomes-value: it answered 409"
    );
    assert!(refused.stderr.contains(&what) && refused.stderr.contains("set compatibility"), "{refused:?}");

    // Without the registry whoever knows the numbers goes on, and whoever starts is refused.
    let Registry { mut process, url, .. } = registry;
    process.signal(Signal::KILL);
    process.ended(LIMIT);
    ask(&client, "third");
    let away = format!("could not reach the schema registry at {url}; check that it runs");
    let log = forebay(data, &config, &["tiers", "log", "--bootstrap-servers", &framed.servers]);
    assert!(log.code != 0 && log.stderr.contains(&away), "{log:?}");
    framed.drain();
    let refused = forebay(data, &config, &start);
    assert!(refused.code != 0 && refused.stderr.contains(&away), "{refused:?}");
}
