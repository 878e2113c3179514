//! What the crate publishes for others: JSON Schemas, Avro schemas, and the references ROWS.md and HEADERS.md.
//!
//! All of it is generated from the types. A file that is stale, missing or nobody's fails a test;
//! `FOREBAY_UPDATE=1 cargo test -p forebay-schemas` writes them anew.

#![expect(clippy::unwrap_used, reason = "what goes wrong fails the test")]

use forebay_schemas::{
    Alert, Answer, Attempt, Audit, CacheEntry, Cancel, Chunks, Column, Completion, DeadLetter, Delta,
    Document, Ending, Grounded, Label, LedgerEntry, Outcome, Payload, Record, Request, claim, dead_letter,
    header, retry, topics,
};
use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::{Map, Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    path::{Path, PathBuf},
};

/// Whose view of a record its schema takes: a writer may leave out what a reader may rely on.
#[derive(Clone, Copy)]
enum For {
    Writers,
    Readers,
}

struct Published {
    record: &'static str,
    file: String,
    text: String,
}

fn records() -> Vec<Published> {
    vec![
        json_schema::<Request>(For::Writers),
        json_schema::<Grounded>(For::Readers),
        json_schema::<Completion>(For::Readers),
        json_schema::<Ending>(For::Readers),
        json_schema::<Answer>(For::Readers),
        json_schema::<Alert>(For::Readers),
        json_schema::<Delta>(For::Readers),
        json_schema::<Cancel>(For::Writers),
        json_schema::<Audit>(For::Writers),
        json_schema::<Label>(For::Writers),
        json_schema::<Payload>(For::Writers),
        json_schema::<Document>(For::Writers),
        // A message with a value always has the content, which only the writers' view says.
        json_schema::<Chunks>(For::Writers),
        json_schema::<CacheEntry>(For::Writers),
        json_schema::<DeadLetter>(For::Readers),
        json_schema::<LedgerEntry>(For::Readers),
        avro_schema::<Outcome>(Outcome::avro()),
        avro_schema::<Attempt>(Attempt::avro()),
    ]
}

fn json_schema<R: Record + JsonSchema>(view: For) -> Published {
    let settings = match view {
        For::Writers => SchemaSettings::draft2020_12().for_deserialize(),
        For::Readers => SchemaSettings::draft2020_12().for_serialize(),
    };
    let mut schema = settings.into_generator().into_root_schema_for::<R>();
    schema.insert("$id".to_owned(), json!(format!("urn:forebay:schema:{}", kebab(R::NAME))));
    // The value of a dead letter is the original's bytes; what is known of it stands beside.
    let place = if R::NAME == DeadLetter::NAME { "is read from the headers on" } else { "lies on" };
    schema.insert("$comment".to_owned(), json!(format!("{place}: {}", topics_of(R::NAME))));
    schema.insert("title".to_owned(), json!(R::NAME));
    Published {
        record: R::NAME,
        file: format!("{}.schema.json", kebab(R::NAME)),
        text: pretty(schema.to_value()),
    }
}

fn avro_schema<R: Record>(schema: Value) -> Published {
    Published { record: R::NAME, file: format!("{}.avsc", kebab(R::NAME)), text: pretty(schema) }
}

fn topics_of(record: &str) -> String {
    let on = topics::ALL.iter().filter(|topic| topic.record == record).map(|topic| topic.name.to_owned());
    let of_steps = topics::OF_STEPS.iter().filter(|topic| topic.record == record);
    let of_steps = of_steps.map(|topic| format!("{}.{{step}}.{{input topic}}", topic.name));
    on.chain(of_steps).collect::<Vec<_>>().join(", ")
}

fn rows_page() -> String {
    let mut page = String::from(
        "# Rows\n\n\
         The records that SQL reads, column by column, as they are declared in src/. A test fails where this page is\n\
         stale; `FOREBAY_UPDATE=1 cargo test -p forebay-schemas` writes it anew.\n\n\
         Outcomes and attempts lie on their topics in Avro single-object encoding: the bytes `C3 01`, the CRC-64-AVRO\n\
         fingerprint of the schema (eight bytes, the lowest first), then the row. Where `avro.framing` is `confluent`, a zero\n\
         byte and the schema's number in a registry (four bytes, the highest first) stand there instead. `*.avsc` are the\n\
         schemas. Audits, labels and payloads are JSON, which anyone may write; `*.schema.json` say what may be left out.\n",
    );
    let rows = [
        (Outcome::NAME, Outcome::COLUMNS),
        (Attempt::NAME, Attempt::COLUMNS),
        (Audit::NAME, Audit::COLUMNS),
        (Label::NAME, Label::COLUMNS),
        (Payload::NAME, Payload::COLUMNS),
    ];
    for (record, columns) in rows {
        let topics = topics_of(record);
        let _ = write!(
            page,
            "\n## {record}, on `{topics}`\n\n| Column | Type | Null | Unit | Meaning |\n|---|---|---|---|---|\n"
        );
        for Column { name, avro, nullable, unit, meaning } in columns {
            let null = if *nullable { "may be" } else { "never" };
            let _ = writeln!(page, "| `{name}` | {avro} | {null} | {unit} | {meaning} |");
        }
    }
    page
}

fn headers_page() -> String {
    let mut page = String::from(
        "# Headers\n\n\
         What Forebay writes beside a record, as src/envelope.rs, src/claim.rs, src/retry.rs and src/dead_letter.rs declare it. A test fails where\n\
         this page is stale; `FOREBAY_UPDATE=1 cargo test -p forebay-schemas` writes it anew.\n\n\
         Values are UTF-8 text. On topics that clients write to, headers that start with `forebay-` are dropped, and\n\
         all others are echoed on the result.\n",
    );
    let tables = [
        ("The envelope, on internal topics and results", header::ALL),
        ("Beside a record whose body lies in the object store", claim::header::ALL),
        ("Beside a record that is tried later", retry::header::ALL),
        ("Beside a dead letter, whose value is the original's bytes", dead_letter::header::ALL),
    ];
    for (title, headers) in tables {
        let _ = write!(page, "\n## {title}\n\n| Header | Meaning |\n|---|---|\n");
        for (name, meaning) in headers {
            let _ = writeln!(page, "| `{name}` | {meaning} |");
        }
    }
    page
}

/// `CacheEntry` as `cache-entry`.
fn kebab(name: &str) -> String {
    let mut kebab = String::new();
    for letter in name.chars() {
        if letter.is_uppercase() && !kebab.is_empty() {
            kebab.push('-');
        }
        kebab.extend(letter.to_lowercase());
    }
    kebab
}

/// The same text whether or not a crate of the build makes serde_json keep the order of names.
fn pretty(value: Value) -> String {
    fn sorted(value: Value) -> Value {
        match value {
            Value::Array(items) => items.into_iter().map(sorted).collect(),
            Value::Object(fields) => {
                let fields: BTreeMap<_, _> =
                    fields.into_iter().map(|(name, value)| (name, sorted(value))).collect();
                Value::Object(Map::from_iter(fields))
            }
            other => other,
        }
    }
    serde_json::to_string_pretty(&sorted(value)).unwrap() + "\n"
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn check(file: &str, now: &str) {
    let path = folder().join(file);
    if std::env::var_os("FOREBAY_UPDATE").is_some_and(|value| value == "1") {
        std::fs::write(&path, now).unwrap();
    }
    let was = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        was == now,
        "schemas/{file} is stale; FOREBAY_UPDATE=1 cargo test -p forebay-schemas writes it anew"
    );
}

#[test]
fn no_published_schema_is_stale() {
    for Published { file, text, .. } in records() {
        check(&file, &text);
    }
}

#[test]
fn every_record_of_a_topic_is_published_and_no_other() {
    let published: BTreeSet<_> = records().iter().map(|published| published.record).collect();
    let travelling: BTreeSet<_> =
        topics::ALL.iter().chain(topics::OF_STEPS).map(|topic| topic.record).collect();
    assert_eq!(published, travelling);

    let files: BTreeSet<_> = records().into_iter().map(|published| published.file).collect();
    for entry in std::fs::read_dir(folder()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let schema = name.ends_with(".schema.json") || name.ends_with(".avsc");
        assert!(!schema || files.contains(&name), "schemas/{name} is the schema of no record; remove it");
    }
}

#[test]
fn the_reference_of_the_rows_is_not_stale() {
    check("ROWS.md", &rows_page());
}

#[test]
fn the_reference_of_the_headers_is_not_stale() {
    check("HEADERS.md", &headers_page());
}

#[test]
fn every_header_bears_our_prefix_but_the_one_that_is_a_standard() {
    let ours = [header::ALL, claim::header::ALL, retry::header::ALL, dead_letter::header::ALL];
    for (name, meaning) in ours.into_iter().flatten() {
        assert!(name.starts_with(header::OURS) || *name == header::TRACEPARENT, "{name}");
        assert!(meaning.ends_with('.'), "{name} says nothing");
    }
    assert!(dead_letter::header::ALL.iter().all(|(name, _)| name.starts_with(dead_letter::header::OURS)));
}
