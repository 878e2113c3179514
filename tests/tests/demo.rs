//! What a newcomer sees first: `forebay demo`, and what surrounds it: help, completions, exit codes.

#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a test that cannot go on says why by panicking"
)]

use forebay_tests::{
    Running, Signal,
    product::{END, Finished, command, finish},
    wait_for,
};
use serde_json::Value;
use std::{collections::BTreeMap, fs, path::Path, time::Duration};

const LIMIT: Duration = Duration::from_secs(120);

/// Every field of the record of `results`.
const FIELDS: &[&str] = &[
    "id",
    "tenant",
    "status",
    "text",
    "citations",
    "cache",
    "model",
    "usage",
    "cost_nano_usd",
    "error",
    "origin",
    "metadata",
    "timings_us",
    "generation",
];
const TIMINGS: &[&str] = &["queue", "cache", "retrieve", "infer", "ttft", "validate", "total"];

/// The results that a demo printed. `demo` is told to exit and to print JSON.
fn results(data: &Path, more: &[&str]) -> Vec<Value> {
    let mut arguments = vec!["demo", "--exit", "--json", "--admin", "127.0.0.1:0"];
    arguments.extend(more);
    let finished = finish(&mut command(data, &arguments), LIMIT);
    assert_eq!(finished.code, 0, "{finished:?}");
    // The log ends last, and whoever spoke to it does not miss it.
    let complaints = ["brokers are down", "Connection refused"];
    assert!(!complaints.iter().any(|told| finished.stderr.contains(told)), "{finished:?}");
    let parsed = finished.stdout.lines().map(|line| serde_json::from_str(line).expect(line));
    parsed.collect()
}

/// How often each word stands in a field.
fn counts<'r>(results: &'r [Value], field: &str) -> BTreeMap<&'r str, usize> {
    let mut counts = BTreeMap::new();
    for result in results {
        *counts.entry(result[field].as_str().expect(field)).or_default() += 1;
    }
    counts
}

/// Every citation stands in its document, byte for byte.
fn check_citations(results: &[Value], folder: &Path) {
    for result in results {
        for citation in result["citations"].as_array().expect("citations") {
            let document = citation["document"].as_str().unwrap();
            let bytes = fs::read(folder.join(document)).expect(document);
            let at = |field: &str| usize::try_from(citation[field].as_u64().unwrap()).unwrap();
            let quote = citation["quote"].as_str().unwrap();
            assert!(!quote.is_empty(), "{citation}");
            assert_eq!(&bytes[at("start")..at("end")], quote.as_bytes(), "{citation}");
        }
    }
}

fn guides() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../pipelines/guides"))
}

#[test]
fn questions_on_the_guides_are_answered_with_citations_and_repeats_from_the_cache() {
    let data = tempfile::tempdir().unwrap();
    let first = results(data.path(), &[]);
    let questions = fs::read_to_string(guides().join("questions.jsonl")).unwrap().lines().count();
    let repeats = first.len() - questions;
    assert!(questions >= 10 && repeats >= 3, "{questions} questions, {repeats} repeats");
    assert_eq!(counts(&first, "status"), BTreeMap::from([("answered", first.len())]));
    assert_eq!(counts(&first, "cache"), BTreeMap::from([("miss", questions), ("hit", repeats)]));
    assert!(first[questions..].iter().all(|result| result["cache"] == "hit"), "the repeats come last");
    check_citations(&first, guides());
    for result in &first {
        let fields: Vec<_> = result.as_object().unwrap().keys().map(String::as_str).collect();
        assert!(
            FIELDS.iter().all(|field| fields.contains(field)) && fields.len() == FIELDS.len(),
            "{result}"
        );
        let timings: Vec<_> = result["timings_us"].as_object().unwrap().keys().map(String::as_str).collect();
        assert!(TIMINGS.iter().all(|field| timings.contains(field)) && timings.len() == TIMINGS.len());
        assert!(!result["citations"].as_array().unwrap().is_empty(), "{result}");
        assert_eq!(result["cost_nano_usd"], 0, "the extractive model costs nothing");
    }
    let ids: std::collections::BTreeSet<_> = first.iter().map(|result| result["id"].as_str()).collect();
    assert_eq!(ids.len(), first.len(), "each request has an id of its own");

    let second = results(data.path(), &[]);
    assert_eq!(counts(&second, "cache"), BTreeMap::from([("hit", first.len())]));
    check_citations(&second, guides());
    assert!(second.iter().all(|result| !ids.contains(&result["id"].as_str())), "each run has ids of its own");
    let told = |results: &[Value]| {
        let told = results[..questions].iter().map(|result| result["text"].as_str().unwrap().to_owned());
        told.collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(told(&first), told(&second), "a repeated question has the same answer");
}

#[test]
fn it_does_the_same_for_documents_and_questions_of_ones_own() {
    let data = tempfile::tempdir().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::create_dir(path("docs")).unwrap();
    fs::write(path("docs/boats.md"), "# Boats\n\nThe ferry Aurora leaves Grünhafen at seven.\n").unwrap();
    fs::write(path("docs/notes.txt"), "The lighthouse keeper is called Mathilde.\n").unwrap();
    fs::write(path("docs/picture.png"), b"\xff\xfe").unwrap();
    fs::write(
        path("questions.txt"),
        "When does the ferry Aurora leave?\n\n{\"prompt\": \"What is the lighthouse keeper called?\", \"metadata\": 7}\n",
    )
    .unwrap();
    let (docs, questions) = (path("docs"), path("questions.txt"));
    let own = ["--documents", docs.to_str().unwrap(), "--questions", questions.to_str().unwrap()];
    let results = results(data.path(), &own);
    // Both, and both again.
    assert_eq!(counts(&results, "status"), BTreeMap::from([("answered", 4)]));
    assert_eq!(counts(&results, "cache"), BTreeMap::from([("miss", 2), ("hit", 2)]));
    check_citations(&results, Path::new(""));
    let said =
        |what: &str| results.iter().filter(|result| result["text"].as_str().unwrap().contains(what)).count();
    assert_eq!((said("Grünhafen at seven"), said("Mathilde")), (2, 2));
    assert_eq!(results.iter().filter(|result| result["metadata"] == 7).count(), 2);
}

#[test]
fn it_stays_up_says_how_to_go_on_and_drains_when_it_is_told_to_stop() {
    let data = tempfile::tempdir().unwrap();
    let mut demo = Running::start("demo", &mut command(data.path(), &["demo", "--admin", "127.0.0.1:0"]));
    let said = wait_for("the demo to stay up", LIMIT, || {
        let said = demo.stdout();
        said.contains("Ctrl-C here").then_some(said)
    });
    for (what, why) in [
        ("\nQ  ", "questions"),
        ("\nA  ", "answers"),
        ("   — delivery.md, bytes ", "citations"),
        ("   cache miss · ", "cache status, latency and cost"),
        ("   cache hit · ", "repeats from the cache"),
        ("from the cache", "the table"),
        ("latency p99", "the table"),
        ("cost", "the table"),
        ("| kcat -P -b 127.0.0.1:", "a way to ask"),
        ("kcat -C -b 127.0.0.1:", "a way to read"),
        ("curl http://127.0.0.1:", "where metrics are"),
    ] {
        assert!(said.contains(what), "{why}: no {what:?} in {said}");
    }

    // What it says works: the command `ask` finds the broker by the folder.
    let line = said.lines().find(|line| line.trim_start().starts_with("ask ")).expect("a command to ask");
    assert!(line.contains(&format!("--data {}", data.path().display())), "{line}");
    let asked = finish(&mut command(data.path(), &["ask", "What is a dead letter?"]), LIMIT);
    assert_eq!(asked.code, 0, "{asked:?}");
    assert!(asked.stdout.contains("dead letter") && asked.stdout.contains("  — "), "{asked:?}");

    demo.signal(Signal::TERM);
    assert_eq!(demo.ended(END).code(), Some(0));
    assert!(demo.stderr().contains("draining"), "{}", demo.stderr());
}

#[test]
fn a_demo_that_is_stopped_on_its_way_drains_too() {
    let data = tempfile::tempdir().unwrap();
    let mut demo = Running::start("demo", &mut command(data.path(), &["demo", "--admin", "127.0.0.1:0"]));
    wait_for("the first question", LIMIT, || demo.stdout().contains("Asking").then_some(()));
    demo.signal(Signal::INT);
    assert_eq!(demo.ended(END).code(), Some(0));
}

fn run(arguments: &[&str]) -> Finished {
    let data = tempfile::tempdir().unwrap();
    finish(&mut command(data.path(), arguments), LIMIT)
}

#[test]
fn exit_codes_tell_a_wrong_command_from_work_that_could_not_be_done() {
    for (code, arguments, said) in [
        (0, &["--version"][..], "forebay "),
        (0, &["check"], "no faults"),
        (0, &["explain"], "look_up"),
        (0, &["explain", "--mermaid"], "flowchart"),
        (0, &["config", "print"], "partitions: 12"),
        (2, &[], "Usage"),
        (2, &["demmo"], "demo"),
        (2, &["check", "no-such-pipeline"], "Forebay ships: answer"),
        (2, &["run", "answer", "--stage", "retreive"], "retrieve"),
        (2, &["up", "--partitions", "none"], "1 to 10000"),
        (2, &["demo", "--questions", "/no/such/file"], "/no/such/file"),
        (2, &["demo", "--documents", "/no/such/folder"], "/no/such/folder"),
        (2, &["ask", "Is anybody there?"], "forebay up --data"),
        (2, &["topics", "apply"], "--bootstrap-servers"),
        (2, &["ingest", "/no/such/file.md"], "/no/such/file.md"),
    ] {
        let finished = run(arguments);
        assert_eq!(finished.code, code, "{arguments:?}: {finished:?}");
        let (asked_for, besides) = (&finished.stdout, &finished.stderr);
        let stream = if code == 0 { asked_for } else { besides };
        assert!(stream.contains(said), "{arguments:?}: no {said:?} in {finished:?}");
        assert!(code == 0 || asked_for.is_empty(), "{arguments:?}: {finished:?}");
    }
}

#[test]
fn help_is_worth_reading() {
    let help = run(&["--help"]).stdout;
    for command in
        ["demo", "up", "run", "ask", "ingest", "check", "test", "explain", "topics", "config", "completions"]
    {
        let line = help.lines().find(|line| line.trim_start().starts_with(&format!("{command} ")));
        let line = line.unwrap_or_else(|| panic!("no {command} in {help}"));
        assert!(line.trim().len() > command.len() + 12, "it says what it does: {line}");
    }
    assert!(help.contains("Start with `forebay demo`"), "{help}");
    for (command, flags) in [
        ("demo", &["--documents", "--questions", "--exit", "--json"][..]),
        ("up", &["--bootstrap-servers", "--model-url", "--model", "--data", "--config", "--topic-prefix"]),
        ("run", &["--stage"]),
    ] {
        let help = run(&[command, "--help"]).stdout;
        assert!(flags.iter().all(|flag| help.contains(flag)), "{help}");
    }
}

#[test]
fn completions_name_all_commands_in_each_shell() {
    for (shell, mark) in
        [("bash", "complete -F"), ("zsh", "#compdef forebay"), ("fish", "complete -c forebay")]
    {
        let finished = run(&["completions", shell]);
        assert_eq!(finished.code, 0, "{finished:?}");
        for word in [mark, "demo", "bootstrap-servers", "ingest"] {
            assert!(finished.stdout.contains(word), "{shell}: no {word:?}");
        }
    }
}
