//! The pipelines that ship are without fault, and what is published of them is fresh.

use crate::support::{Operators, golden, read};
use forebay_plan::{Plan, PlannedStep, PlannedTopic, explain, json_schema, plan};

fn answer() -> Plan {
    plan("pipelines/answer.yaml", &read("answer.yaml"), &Operators)
        .unwrap_or_else(|faults| panic!("{faults}"))
}

#[test]
fn the_shipped_pipeline_is_without_fault_or_warning() {
    assert_eq!(answer().warnings.to_string(), "");
}

#[test]
fn a_plan_knows_every_topic_that_it_touches() {
    let names: Vec<String> =
        answer().named_topics().into_iter().map(|PlannedTopic { name, .. }| name).collect();
    let all: Vec<&str> = forebay_schemas::topics::ALL.iter().map(|topic| topic.name).collect();
    assert_eq!(names, all);
}

#[test]
fn a_step_reads_its_lanes_and_what_its_host_set_aside() {
    let plan = answer();
    let inputs =
        |key| plan.step(key).unwrap().inputs().into_iter().map(|input| input.topic).collect::<Vec<_>>();
    let retries = ["retry.infer.10s", "retry.infer.1m", "retry.infer.10m"];
    assert_eq!(
        inputs("infer"),
        [&["prompts", "prompts-backfill"][..], &retries, &["overflow.infer"]].concat()
    );
    assert_eq!(inputs("validate").last().unwrap(), "overflow.validate");
    assert_eq!(inputs("fill"), ["endings", "retry.fill.10s", "retry.fill.1m", "retry.fill.10m"]);
    assert_eq!(inputs("index"), ["documents"], "order would be lost");
    let names: Vec<String> = plan.topics().into_iter().map(|topic| topic.name).collect();
    let read: Vec<String> =
        plan.steps.iter().flat_map(PlannedStep::inputs).map(|input| input.topic).collect();
    assert!(read.iter().all(|topic| names.contains(topic)), "{read:?} in {names:?}");
}

#[test]
fn a_step_has_a_ledger_where_its_settings_let_it_pay() {
    let ledgers = |settings: &str| {
        let text = read("answer.yaml").replace("{limit: 8}", settings);
        let plan = plan("answer.yaml", &text, &Operators).unwrap_or_else(|faults| panic!("{faults}"));
        let names = plan.topics().into_iter().map(|topic| topic.name);
        names.filter(|name| name.starts_with("ledger.")).collect::<Vec<_>>()
    };
    let (usual, reranked) = (ledgers("{limit: 8}"), ledgers("{limit: 8, rerank: 32}"));
    assert!(usual.iter().all(|name| name.starts_with("ledger.infer.")), "{usual:?}");
    let of_retrieve: Vec<_> = reranked.iter().filter(|name| !usual.contains(name)).collect();
    assert_eq!(of_retrieve.len(), usual.len(), "{reranked:?}");
    assert!(of_retrieve.iter().all(|name| name.starts_with("ledger.retrieve.")), "{reranked:?}");
}

#[test]
fn a_plan_finds_a_step_or_the_one_that_was_meant() {
    let plan = answer();
    let infer = plan.step("infer").unwrap();
    assert_eq!((infer.in_flight, infer.is_job), (64, true));
    assert_eq!(plan.consumer_group("test-", infer), "test-answer.infer");
    let error = plan.step("inferr").unwrap_err().to_string();
    assert_eq!(error, r#"pipeline "answer" has no step "inferr"; did you mean "infer"?"#);
}

#[test]
fn the_drawing_for_a_terminal_is_as_it_was() {
    golden("plan/tests/answer.txt", &explain::text(&answer()));
}

#[test]
fn the_drawing_for_a_page_is_as_it_was() {
    golden("plan/tests/answer.mmd", &explain::mermaid(&answer()));
}

#[test]
fn the_published_schema_is_fresh() {
    golden("pipeline.schema.json", &format!("{:#}\n", json_schema()));
}

#[test]
fn the_published_schema_knows_the_keys_that_the_reader_knows() {
    let schema = json_schema();
    let keys_of = |form: &serde_json::Value| {
        let mut keys: Vec<String> = form["properties"].as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys
    };
    // The reader lists what it knows where nothing is near.
    let known = |text: &str| {
        let faults = plan("f.yaml", text, &Operators).unwrap_err();
        let hints: Vec<_> = faults
            .iter()
            .filter(|fault| fault.message.contains("qqqqqqqqqqqqqqq"))
            .map(|f| f.hint.clone().unwrap())
            .collect();
        let mut keys: Vec<String> = hints[0].split('"').skip(1).step_by(2).map(str::to_owned).collect();
        keys.sort();
        keys
    };
    assert_eq!(known("qqqqqqqqqqqqqqq: 1"), keys_of(&schema));
    assert_eq!(known("steps: {a: {qqqqqqqqqqqqqqq: 1}}"), keys_of(&schema["$defs"]["StepForm"]));
    assert_eq!(known("topics: {a: {qqqqqqqqqqqqqqq: 1}}"), keys_of(&schema["$defs"]["TopicForm"]));
}

#[test]
fn what_the_page_shows_is_what_happens() {
    let page = read("README.md");
    let misspelt = read("answer.yaml").replace("{limit: 8}", "{limt: 8}");
    let report = plan("pipelines/answer.yaml", &misspelt, &Operators).unwrap_err().to_string();
    assert!(page.contains(&report), "{report}");
    let case = page.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    forebay_plan::cases::parse("README.md", case).unwrap();
}
