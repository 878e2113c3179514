//! The tables as DuckDB and Polars read them: unchanged, straight from the folder, and with the answers of `forebay sql`.
//!
//! Two tables: as a sink wrote it from a topic, and joined, with more versions than a checkpoint takes. The programs are in
//! tests/clients; where `FOREBAY_TEST_PYTHON` does not name their Python this is skipped, and in CI that is a failure.

#![expect(clippy::unwrap_used, reason = "what goes wrong fails the test")]
#![expect(clippy::print_stdout, reason = "what is skipped is said")]

use forebay_broker::{Broker, Config};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
};
use serde_json::{Value, json};
use std::{path::Path, process::Command};

const TOPICS: [&str; 6] = ["outcomes", "attempts", "audits", "labels", "payloads", "dead-letters"];

fn python() -> Option<String> {
    let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let python = set("FOREBAY_TEST_PYTHON");
    if python.is_none() {
        let is_quick = set("FOREBAY_TEST_QUICK").is_some();
        assert!(set("CI").is_none() || is_quick, "FOREBAY_TEST_PYTHON is not set; tests/run has it");
        println!("skipped: there is no Python with DuckDB and Polars; tests/run has it");
    }
    python
}

/// What a program prints, which must end well.
fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let [told, wrong] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(output.status.success(), "{command:?}: {wrong}");
    told
}

fn forebay_sql(settings: &Value, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay-sql"));
    command.args(arguments).env("FOREBAY_SQL_SETTINGS", settings.to_string()).env("FOREBAY_LOG", "warn");
    output(&mut command)
}

/// The answer to a query, row by row, without the names of columns.
fn answer(settings: &Value, query: &str) -> Value {
    let lines = forebay_sql(settings, &["sql", "--format", "json", "-c", query]);
    let row = |line: &str| {
        let row: serde_json::Map<String, Value> = serde_json::from_str(line).unwrap();
        row.into_iter().map(|(_, value)| value).collect::<Value>()
    };
    lines.lines().map(row).collect()
}

/// Compares what the readers find in `outcomes` with what we say is in it.
fn check(python: &str, settings: &Value, rows: u64) {
    let whole = answer(
        settings,
        "SELECT count(*) AS a, count(DISTINCT request_id) AS b, sum(billed_nano_usd) AS c, sum(attempts) AS d, count(ttft_us) AS e,
             CAST(date_part('epoch', min(ended_at)) * 1e6 AS BIGINT) AS f, CAST(date_part('epoch', max(ended_at)) * 1e6 AS BIGINT) AS g,
             min(tenant) AS h, max(request_id) AS i FROM outcomes",
    );
    let days = "SELECT CAST(date AS VARCHAR) AS a, count(*) AS b, sum(input_tokens) AS c FROM outcomes GROUP BY date ORDER BY date";
    let last = "SELECT count(*) AS a, sum(list_nano_usd) AS b FROM outcomes
        WHERE date = (SELECT max(date) FROM outcomes) AND tenant = 'tenant-003'";
    let expected = json!([whole[0], answer(settings, days), answer(settings, last)[0]]);
    assert_eq!((&whole[0][0], &whole[0][1]), (&json!(rows), &json!(rows)));
    let folder = Path::new(settings["tables"].as_str().unwrap()).join("outcomes");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/clients/tables.py");
    let found: Value = serde_json::from_str(&output(Command::new(python).arg(script).arg(folder))).unwrap();
    for reader in ["duckdb", "polars"] {
        assert_eq!(found[reader], expected, "{reader}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn duckdb_and_polars_read_what_the_sink_wrote_and_find_what_we_say() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let broker = Broker::start(Config::new(folder.path().join("broker"), ([127, 0, 0, 1], 0))).await.unwrap();
    let servers = broker.address().to_string();
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", &servers).create().unwrap();
    let topics = TOPICS.map(|topic| NewTopic::new(topic, 2, TopicReplication::Fixed(1)));
    for made in admin.create_topics(&topics, &AdminOptions::new()).await.unwrap() {
        made.unwrap();
    }
    let tables = folder.path().join("tables");
    let settings = json!({"bootstrap_servers": servers, "data": folder.path(), "tables": tables});
    tokio::task::spawn_blocking(move || {
        let rows = ["generate", "--rows", "3000", "--days", "3", "--until", "2026-11-29"];
        forebay_sql(&settings, &[&rows[..], &["--to", "topics"]].concat());
        forebay_sql(&settings, &["sink", "--once"]);
        check(&python, &settings, 3_000);
    })
    .await
    .unwrap();
}

#[test]
fn duckdb_and_polars_read_a_table_whose_files_were_joined() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let settings = json!({"tables": folder.path()});
    let words = "generate --rows 3000 --days 3 --until 2026-11-29 --files 8 --without-attempts --compact";
    forebay_sql(&settings, &words.split(' ').collect::<Vec<_>>());
    let log = folder.path().join("outcomes/_delta_log");
    let has_checkpoint = std::fs::read_dir(log)
        .unwrap()
        .any(|file| file.unwrap().file_name().to_string_lossy().contains("checkpoint"));
    assert!(has_checkpoint);
    check(&python, &settings, 3_000);
}
