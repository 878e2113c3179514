//! Operators as the tests know them: the real ones' names, records and ports, without the operators.

use forebay_plan::{Catalogue, Description, SettingsFault};
use serde_json::Value;

/// A catalogue of what `answer` needs, and of a validator that asks again.
pub struct Operators;

/// One operator: what it takes, whether that is a request's work, its ports, its tables, its settings and the largest value of each.
type Row = (
    &'static str,
    &'static str,
    bool,
    &'static [(&'static str, &'static str)],
    &'static [&'static str],
    &'static [(&'static str, u64)],
);

const ROWS: &[Row] = &[
    (
        "cache_lookup",
        "Request",
        true,
        &[("hit", "Completion"), ("miss", "Request")],
        &["CacheEntry", "Chunks"],
        &[],
    ),
    (
        "retrieve",
        "Request",
        true,
        &[("grounded", "Grounded")],
        &["Chunks"],
        &[("limit", 100), ("rerank", 50)],
    ),
    (
        "infer",
        "Grounded",
        true,
        &[("completion", "Completion")],
        &[],
        &[("max_tokens", 100_000), ("temperature", 2)],
    ),
    ("validate", "Completion", true, &[("passed", "Ending"), ("blocked", "Ending")], &[], &[]),
    (
        "validate_or_reask",
        "Completion",
        true,
        &[("passed", "Ending"), ("reask", "Grounded"), ("blocked", "Ending")],
        &[],
        &[],
    ),
    ("publish", "Ending", false, &[("result", "Answer"), ("outcome", "Outcome")], &[], &[]),
    ("fill_cache", "Ending", false, &[("entry", "CacheEntry")], &[], &[]),
    ("index", "Document", false, &[("chunks", "Chunks")], &[], &[("chunk_tokens", 2_000)]),
];

impl Catalogue for Operators {
    fn names(&self) -> Vec<&'static str> {
        ROWS.iter().map(|row| row.0).collect()
    }

    fn describe(&self, operator: &str) -> Option<Description> {
        let (_, input, is_job, ports, tables, _) = ROWS.iter().find(|row| row.0 == operator)?;
        Some(Description { input, is_job: *is_job, ports: ports.to_vec(), tables: tables.to_vec() })
    }

    fn is_paid(&self, operator: &str, settings: &Value) -> bool {
        operator == "infer" || settings.get("rerank").is_some()
    }

    fn check_settings(&self, operator: &str, settings: &Value) -> Vec<SettingsFault> {
        let (Some(row), Some(settings)) = (ROWS.iter().find(|row| row.0 == operator), settings.as_object())
        else {
            return Vec::new();
        };
        let mut faults = Vec::new();
        for (key, value) in settings {
            let fault = match row.5.iter().find(|(known, _)| known == key) {
                None => SettingsFault {
                    path: vec![key.clone()],
                    message: format!("operator {operator:?} has no setting {key:?}"),
                    known: row.5.iter().map(|(known, _)| (*known).to_owned()).collect(),
                },
                Some((_, max)) if value.as_u64().is_some_and(|value| value <= *max) => continue,
                Some((_, max)) => SettingsFault {
                    path: vec![key.clone()],
                    message: format!("{key:?} wants a number up to {max}, not {value}"),
                    known: Vec::new(),
                },
            };
            faults.push(fault);
        }
        faults
    }
}

/// The text of a file of the repository's folder `pipelines`.
pub fn read(path: &str) -> String {
    let path = folder().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The repository's folder `pipelines`.
pub fn folder() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Whether golden files are to be written anew.
pub fn update() -> bool {
    std::env::var_os("FOREBAY_UPDATE").is_some_and(|value| value == "1")
}

/// Compares a golden file with what it should be, or writes it anew.
pub fn golden(path: &str, now: &str) {
    if update() {
        std::fs::write(folder().join(path), now).unwrap();
    }
    let was = std::fs::read_to_string(folder().join(path)).unwrap_or_default();
    assert!(was == now, "{path} is stale; FOREBAY_UPDATE=1 writes it anew\n--- now\n{now}\n--- was\n{was}");
}
