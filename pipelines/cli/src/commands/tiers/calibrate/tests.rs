//! Calibration on a log whose easy and hard requests can be told apart.

use super::*;
use forebay_calls::tiers::classifier::mixed;
use serde_json::json;
use std::{fmt::Write as _, io::Write as _};

/// A log: the small tier is right at easy requests, and the large one at all but a few; each answers half of them.
fn log(requests: u64) -> tempfile::NamedTempFile {
    let easy = ["What is the price of", "When does the shop open in", "Where is", "Who sells"];
    let hard = [
        "Prove by induction that",
        "Derive the bound of",
        "Explain step by step why",
        "Refactor the code of",
    ];
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for number in 0..requests {
        let dice = |salt: u64, of: u64| usize::try_from(mixed(number ^ (salt << 32)) % of).unwrap();
        let (is_hard, tier) = (dice(1, 2) == 0, ["small", "large"][dice(2, 2)]);
        let start = if is_hard { hard } else { easy }[dice(3, 4)];
        let is_good = if tier == "large" {
            dice(4, 20) != 0
        } else {
            dice(5, 20) != 0 && (!is_hard || dice(6, 5) == 0)
        };
        let cost = if tier == "large" { 2_000_000 } else { 100_000 };
        let id = format!("r{number}");
        for line in [
            json!({"id": id, "tenant": "shop", "prompt": format!("{start} item {number}?")}),
            json!({
                "request_id": id, "tenant": "shop", "generation": 0, "tier": tier, "model_served": tier, "status": "answered",
                "cache_status": "miss", "billed_nano_usd": cost, "passages": 2
            }),
            json!({"request_id": id, "tenant": "shop", "quality": if is_good { 1.0 } else { 0.0 }}),
        ] {
            writeln!(file, "{line}").unwrap();
        }
    }
    file
}

fn tiers() -> Vec<String> {
    ["small", "large"].map(str::to_owned).to_vec()
}

fn calibrated(requests: u64) -> Calibrated {
    let file = log(requests);
    let log = log::read(&[file.path().to_owned()], &tiers(), 1).unwrap();
    assert_eq!((log.asked.len(), log.judged), (usize::try_from(requests).unwrap(), log.asked.len()));
    calibrate(&log, &tiers(), 1).unwrap()
}

/// What is printed, as it was when somebody last looked at it; FOREBAY_UPDATE=1 writes it anew.
#[test]
fn the_table_and_the_curve_are_those_of_the_golden() {
    let Calibrated { points, .. } = calibrated(600);
    let recommended = recommended(&points, Some(0.85), None);
    let printed =
        format!("{}\n{}\n", table(&points, &tiers(), recommended), plot::text(&points, recommended));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/commands/tiers/calibrate/golden.txt");
    if std::env::var_os("FOREBAY_UPDATE").is_some_and(|value| value == "1") {
        std::fs::write(&path, &printed).unwrap();
    }
    assert_eq!(printed, std::fs::read_to_string(&path).unwrap());
}

#[test]
fn what_can_be_told_apart_is_nearly_as_good_as_the_large_tier_for_nearly_half_of_it() {
    let Calibrated { points, .. } = calibrated(1_200);
    let large = points.last().unwrap();
    let at = points.iter().position(|point| point.quality > large.quality - 0.03).unwrap();
    let mixed = &points[at];
    assert!(mixed.cost < 0.65 * large.cost, "{mixed:?}\n{large:?}");
    assert!((0.4..0.6).contains(&mixed.shares[0]), "{mixed:?}");
    assert!(mixed.low < 0.95 && 0.95 < mixed.high + 0.02, "it is 0.95 in truth: {mixed:?}");
    assert!(points.windows(2).all(|two| two[0].cost < two[1].cost && two[0].quality < two[1].quality));
}

#[test]
fn a_choice_is_recommended_by_its_lower_bound_or_its_cost() {
    let Calibrated { points, .. } = calibrated(600);
    let at = recommended(&points, Some(0.8), None).unwrap();
    assert!(points[at].low >= 0.8 && points[..at].iter().all(|point| point.low < 0.8));
    assert_eq!(recommended(&points, Some(0.999), None), None);
    let at = recommended(&points, None, Some(1.2)).unwrap();
    assert!(plot::dollars(points[at].cost) <= 1.2 && plot::dollars(points[at + 1].cost) > 1.2);
    assert_eq!(recommended(&points, None, Some(0.0)), None);
}

#[test]
fn what_is_written_is_what_the_configuration_reads_and_the_drawing_is_whole() {
    let (file, folder) = (log(600), tempfile::tempdir().unwrap());
    let at = |name: &str| folder.path().join(name);
    let args = TiersCalibrate {
        log: vec![file.path().to_owned()],
        tiers: tiers(),
        quality: Some(0.8),
        cost: None,
        plot: Some(at("curve.svg")),
        write: Some(at("classifier.json")),
        seed: 1,
    };
    assert_eq!(run(&args, &tiers()).unwrap(), ExitCode::SUCCESS);
    let written = std::fs::read_to_string(at("classifier.json")).unwrap();
    let read = Classifier::read(&written, &tiers()).unwrap();
    assert_eq!(read.write().unwrap(), written);
    let svg = std::fs::read_to_string(at("curve.svg")).unwrap();
    assert!(
        svg.starts_with("<svg")
            && svg.ends_with("</svg>\n")
            && svg.contains("#c53030")
            && !svg.contains("NaN")
    );
    let impossible = TiersCalibrate { quality: Some(0.999), ..args };
    assert_eq!(run(&impossible, &tiers()).unwrap(), ExitCode::FAILURE);
}

/// What is said of a log of these lines, behind a good one of 20 requests.
fn refused(lines: &str) -> String {
    let mut file = log(20);
    file.write_all(lines.as_bytes()).unwrap();
    let name = file.path().display().to_string();
    let read = log::read(&[file.path().to_owned()], &tiers(), 1);
    let fault = read.and_then(|log| calibrate(&log, &tiers(), 1).map(drop)).unwrap_err();
    fault.to_string().replace(&name, "log.jsonl")
}

#[test]
fn a_bad_line_is_named_with_its_file_and_its_place() {
    assert_eq!(
        refused("{\"a\""),
        "log.jsonl:61: it is no JSON: EOF while parsing an object at line 1 column 4"
    );
    assert_eq!(refused("\n[]"), "log.jsonl:62: it is no JSON object");
    assert!(refused("{\"a\": 1}").starts_with("log.jsonl:61: it is no request, result, row of outcomes"));
    assert_eq!(refused("{\"prompt\": \"a\"}"), "log.jsonl:61: it has no id");
    assert!(refused("{\"prompt\": 5, \"id\": \"a\"}").starts_with("log.jsonl:61: it is no request: "));
    assert_eq!(
        refused("{\"request_id\": \"a\", \"quality\": 2}"),
        "log.jsonl:61: its quality is 2; it may be 0 to 1"
    );
    assert!(
        refused("{\"attempt_id\": \"a/0\"}")
            .starts_with("log.jsonl:61: it is no row of attempts: missing field")
    );
    assert!(refused("{\"topic\": \"t\", \"payload\": \"x\"}").contains("its payload is no JSON"));
}

#[test]
fn too_few_rows_are_said_and_why_the_others_are_left_out() {
    let hit = json!({"request_id": "r0", "tenant": "shop", "status": "answered", "cache_status": "hit", "generation": 1});
    let alone = json!({"request_id": "x", "quality": 1});
    let said = refused(&format!("{hit}\n{alone}\n"));
    assert!(said.starts_with("the log has too few rows: "), "{said}");
    assert!(
        said.contains("answers of tier \"small\" to learn from, and 30 are wanted; 19 requests can be used"),
        "{said}"
    );
    let reasons = "left out: 1: it was answered from the cache; 1: the log does not say what was asked";
    assert!(said.ends_with(reasons), "{said}");
}

fn attempt(tier: &str, number: u64, cost: u64) -> serde_json::Value {
    json!({
        "attempt_id": format!("c/{number}"), "call_id": "c", "request_id": "r", "tenant": "shop", "generation": 0, "stage": "infer",
        "attempt": number, "started_at": 0, "duration_us": 0, "provider": "p", "status": "ok", "cost_nano_usd": cost, "tier": tier
    })
}

#[test]
fn the_answer_of_a_stand_in_is_no_tier_s() {
    // The built-in model, and another server's that is called as the first tier's is.
    for model in ["extractive", "small"] {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for line in [
            json!({"id": "r", "tenant": "shop", "prompt": "why?"}),
            attempt("small", 0, 10),
            json!({
                "request_id": "r", "tenant": "shop", "generation": 0, "tier": null, "model_served": model, "status": "answered",
                "cache_status": "miss", "billed_nano_usd": 0, "passages": 2
            }),
        ] {
            writeln!(file, "{line}").unwrap();
        }
        let log = log::read(&[file.path().to_owned()], &tiers(), 1).unwrap();
        let left_out: Vec<_> = log.left_out.into_iter().collect();
        assert!(log.asked.is_empty());
        assert_eq!(left_out, [("none of the tiers answered it: something stood in", 1)], "{model}");
    }
}

#[test]
fn rows_of_attempts_tell_what_each_tier_took_and_that_the_first_was_not_good_enough() {
    let mut lines = String::new();
    let payload =
        json!({"id": "r", "tenant": "shop", "messages": [{"role": "user", "content": "why?"}]}).to_string();
    for line in [
        json!({"topic": "requests", "partition": 0, "offset": 1, "payload": payload}),
        attempt("small", 0, 10),
        attempt("large", 1, 0),
        attempt("large", 2, 70),
        // Written twice, as after a crash.
        attempt("large", 2, 70),
        json!({"id": "r", "tenant": "shop", "status": "answered", "model": "large-2026", "cost_nano_usd": 80, "cache": "miss"}),
    ] {
        writeln!(lines, "{line}").unwrap();
    }
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(lines.as_bytes()).unwrap();
    let log = log::read(&[file.path().to_owned()], &tiers(), 1).unwrap();
    let small = log::Answer { tier: 0, cost: 10.0, quality: 0.0, escalated: true };
    let large = log::Answer { tier: 1, cost: 70.0, quality: 1.0, escalated: false };
    assert_eq!((log.asked[0].answers.as_slice(), log.judged), ([small, large].as_slice(), 0));
}
