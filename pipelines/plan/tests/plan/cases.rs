//! Cases can be read, and say what differs.

use crate::support::{folder, golden};
use forebay_plan::cases::{self, Act, Case, Expect};
use forebay_schemas::{Answer, CacheStatus, Status};

fn shipped() -> Vec<Case> {
    let folder = folder().join("answer/cases");
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let read = |path: &std::path::PathBuf| {
        let text = std::fs::read_to_string(path).unwrap();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        cases::parse(&name, &text).unwrap_or_else(|faults| panic!("{faults}"))
    };
    paths.iter().map(read).collect()
}

#[test]
fn the_shipped_cases_can_be_read_and_each_expects_something() {
    let cases = shipped();
    assert!(cases.len() >= 8, "{} cases", cases.len());
    for case in cases {
        let sends = case.steps.iter().filter(|step| matches!(step.act, Act::Send { .. })).count();
        assert!(sends > 0, "{}: nothing is sent", case.file);
    }
}

#[test]
fn the_published_schema_is_fresh() {
    golden("case.schema.json", &format!("{:#}\n", cases::json_schema()));
}

#[test]
fn the_published_schema_knows_the_keys_that_the_reader_knows() {
    let schema = cases::json_schema();
    let keys_of = |form: &serde_json::Value| {
        let mut keys: Vec<String> = form["properties"].as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys
    };
    let known = |text: &str| {
        let faults = cases::parse("f.yaml", text).unwrap_err();
        let fault = faults.iter().find(|fault| fault.message.contains("qqqqqqqqqqqqqqq")).unwrap();
        let hint = fault.hint.clone().unwrap();
        let mut keys: Vec<String> = hint.split('"').skip(1).step_by(2).map(str::to_owned).collect();
        keys.sort();
        keys
    };
    assert_eq!(known("qqqqqqqqqqqqqqq: 1"), keys_of(&schema));
    assert_eq!(known("steps: [{qqqqqqqqqqqqqqq: 1}]"), keys_of(&schema["$defs"]["Step"]));
    assert_eq!(
        known("steps: [{send: {prompt: a}, expect: {qqqqqqqqqqqqqqq: 1}}]"),
        keys_of(&schema["$defs"]["Expect"])
    );
    assert_eq!(known("documents: [{qqqqqqqqqqqqqqq: 1}]"), keys_of(&schema["$defs"]["Document"]));
}

fn answer() -> Answer {
    serde_json::from_value(serde_json::json!({
        "id": "1", "tenant": "default", "status": "answered", "text": "A group.",
        "citations": [{"document": "kafka", "version": forebay_schemas::DocumentVersion::of("A group."), "start": 0, "end": 8, "quote": "A group."}],
        "cache": "miss", "model": null, "usage": null, "cost_nano_usd": 0, "error": null, "origin": null,
        "metadata": null, "generation": 0,
        "timings_us": {"queue": null, "cache": null, "retrieve": null, "infer": null, "ttft": null, "validate": null, "total": null}
    }))
    .unwrap()
}

fn check(expect: Expect, differences: &[&str]) {
    assert_eq!(expect.differences(&answer(), 0), differences);
}

#[test]
fn a_result_that_is_as_expected_differs_in_nothing() {
    check(
        Expect {
            status: Some(Status::Answered),
            cache: Some(CacheStatus::Miss),
            text_contains: vec!["group".to_owned()],
            text_lacks: vec!["secret".to_owned()],
            citations_min: Some(1),
            citations_max: Some(1),
            cites: vec!["kafka".to_owned()],
            dead_letters: Some(0),
            ..Expect::default()
        },
        &[],
    );
}

#[test]
fn each_difference_is_told() {
    check(
        Expect {
            status: Some(Status::Failed),
            cache: Some(CacheStatus::Hit),
            text_contains: vec!["offset".to_owned()],
            text_lacks: vec!["group".to_owned()],
            citations_min: Some(2),
            citations_max: Some(0),
            cites: vec!["redis".to_owned()],
            error_code: Some("undecodable".to_owned()),
            dead_letters: Some(1),
            ..Expect::default()
        },
        &[
            r#"status should be "failed" and is "answered""#,
            r#"cache should be "hit" and is "miss""#,
            r#"error.code should be "undecodable" and is None"#,
            "the number of dead letters should be 1 and is 0",
            r#"text should contain "offset" and is "A group.""#,
            r#""group" should appear nowhere and does in "A group.""#,
            r#"document "redis" should be cited; cited are ["kafka"]"#,
            "there should be at least 2 citations and there are 1",
            "there should be at most 0 citations and there are 1",
        ],
    );
}
