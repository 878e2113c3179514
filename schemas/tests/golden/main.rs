//! The wire forms of every released version: each file under `golden/` decodes, for ever, to the value it was
//! written from, and the current version still writes those very bytes.
//!
//! Invariant: a golden is never written over. `FOREBAY_UPDATE=1` makes those of the current version that are missing;
//! one that is there and differs is a broken promise, or, before its version is released, a file to remove first.

#![expect(clippy::unwrap_used, reason = "what goes wrong fails the test")]

mod v0_1;

use forebay_schemas::{Envelope, Headers, Record, topics};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    fmt::Debug,
    fs,
    path::{Path, PathBuf},
};

type Read = Box<dyn Fn(&[u8])>;

/// One file of a version, and the value that it stands for.
pub struct Sample {
    file: &'static str,
    record: &'static str,
    /// What the file holds.
    form: Vec<u8>,
    /// Whether the record is written so; people also write it in other ways.
    ours: bool,
    /// Checks that these bytes are read as the value.
    read: Read,
}

/// A record as it is written.
pub fn written<R: Record + PartialEq + Debug>(file: &'static str, value: R) -> Sample {
    let form = value.encode().unwrap().unwrap();
    let read = Box::new(move |bytes: &[u8]| assert_eq!(R::decode(bytes).unwrap(), value));
    Sample { file, record: R::NAME, form, ours: true, read }
}

/// A record as it was written before a column or a field was added.
pub fn older<R: Record + PartialEq + Debug>(file: &'static str, value: R) -> Sample {
    Sample { ours: false, ..written(file, value) }
}

/// A record as a person types it.
pub fn typed<R: Record + PartialEq + Debug>(file: &'static str, text: &str, value: R) -> Sample {
    let read = Box::new(move |bytes: &[u8]| assert_eq!(R::decode(bytes).unwrap(), value));
    Sample { file, record: R::NAME, form: text.into(), ours: false, read }
}

/// A message without a value.
pub fn tombstone<R: Record + PartialEq + Debug>(file: &'static str, key: &str, value: R) -> Sample {
    let form = serde_json::to_vec(&json!({"key": key, "value": null})).unwrap();
    let read = Box::new(move |bytes: &[u8]| {
        let message: Value = serde_json::from_slice(bytes).unwrap();
        assert_eq!(R::decode_tombstone(message["key"].as_str().unwrap()).as_ref(), Some(&value));
        assert_eq!(value.key(), message["key"].as_str());
        assert_eq!(value.encode().unwrap(), None);
    });
    Sample { file, record: R::NAME, form, ours: true, read }
}

/// The headers beside a record, as pairs of a name and a text or null.
pub fn headers(file: &'static str, envelope: Envelope) -> Sample {
    let text = |value: &bytes::Bytes| String::from_utf8(value.to_vec()).unwrap();
    let pairs: Vec<_> =
        envelope.write().iter().map(|(name, value)| json!([name, value.as_ref().map(text)])).collect();
    let read = Box::new(move |bytes: &[u8]| {
        let pairs: Vec<(String, Option<String>)> = serde_json::from_slice(bytes).unwrap();
        let headers: Headers = pairs.into_iter().map(|(name, value)| (name, value.map(Into::into))).collect();
        assert_eq!(Envelope::read(&headers).unwrap().as_ref(), Some(&envelope));
    });
    Sample { file, record: "Envelope", form: serde_json::to_vec(&pairs).unwrap(), ours: true, read }
}

/// All versions, the current one last. The samples of a version stay when the next one comes.
fn versions() -> Vec<(&'static str, Vec<Sample>)> {
    vec![("v0.1", v0_1::samples())]
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn every_golden_decodes_to_the_value_it_was_written_from() {
    let current = versions().last().unwrap().0;
    if std::env::var_os("FOREBAY_UPDATE").is_some_and(|value| value == "1") {
        make_missing(current);
    }
    let known: BTreeSet<_> = versions().iter().map(|(version, _)| (*version).to_owned()).collect();
    assert_eq!(names(&folder()), known, "the folders of golden/ are the versions");
    for (version, samples) in versions() {
        let files = samples.iter().map(|sample| sample.file.to_owned()).collect();
        assert_eq!(names(&folder().join(version)), files, "the files of golden/{version} are its samples");
        for Sample { file, form, ours, read, .. } in samples {
            println!("golden/{version}/{file}");
            let golden = fs::read(folder().join(version).join(file)).unwrap();
            read(&golden);
            if ours && version == current {
                assert!(
                    golden == form,
                    "golden/{version}/{file} is no longer what is written; it is now:\n{}",
                    String::from_utf8_lossy(&form)
                );
            }
        }
    }
}

fn make_missing(version: &str) {
    let folder = folder().join(version);
    fs::create_dir_all(&folder).unwrap();
    for (_, samples) in versions().into_iter().filter(|(known, _)| *known == version) {
        for Sample { file, form, .. } in samples {
            // create_new: one that is there stays as it is.
            if let Ok(mut golden) = fs::File::create_new(folder.join(file)) {
                std::io::Write::write_all(&mut golden, &form).unwrap();
            }
        }
    }
}

#[test]
fn the_current_version_has_a_golden_of_every_record() {
    let (version, samples) = versions().pop().unwrap();
    let package = concat!("v", env!("CARGO_PKG_VERSION_MAJOR"), ".", env!("CARGO_PKG_VERSION_MINOR"));
    assert_eq!(version, package, "a new version has samples of its own");
    let sampled: BTreeSet<_> = samples.iter().map(|sample| sample.record).collect();
    let mut wanted: BTreeSet<_> =
        topics::ALL.iter().chain(topics::OF_STEPS).map(|topic| topic.record).collect();
    wanted.insert("Envelope");
    assert_eq!(sampled, wanted);
}

/// Adds a field that no version knows to every object of a record, but to `cache`, which refuses it by intent.
fn from_tomorrow(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(from_tomorrow),
        Value::Object(fields) => {
            fields
                .iter_mut()
                .filter(|(name, _)| *name != "cache")
                .for_each(|(_, value)| from_tomorrow(value));
            fields.insert("x_of_tomorrow".to_owned(), json!({"deep": [1, null]}));
        }
        _ => {}
    }
}

/// What a younger version writes during a rolling upgrade is read by the older one.
#[test]
fn a_field_that_a_younger_version_added_is_no_fault() {
    use forebay_schemas::*;
    fn check<R: Record>(file: &str) {
        let golden = fs::read(folder().join(versions().last().unwrap().0).join(file)).unwrap();
        let mut value = serde_json::from_slice(&golden).unwrap();
        from_tomorrow(&mut value);
        R::decode(value.to_string().as_bytes()).unwrap_or_else(|error| panic!("{file}: {error:?}"));
    }
    check::<Request>("request.json");
    check::<Grounded>("grounded.json");
    check::<Completion>("completion.json");
    check::<Ending>("ending.json");
    check::<Answer>("answer.json");
    check::<CacheEntry>("cache-entry.json");
    check::<Chunks>("chunks.json");
    check::<Delta>("delta.json");
    check::<Cancel>("cancel.json");
    check::<Alert>("alert.json");
    check::<Audit>("audit.json");
    check::<Label>("label.json");
    check::<Payload>("payload.json");
    check::<DeadLetter>("dead-letter.json");
    check::<LedgerEntry>("ledger-entry.json");
}
