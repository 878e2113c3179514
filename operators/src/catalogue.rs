//! All operators by name: what each takes and gives, what it can be set to, how it is built.
//!
//! Invariant: this is the one place that lists them. An operator is added by one line of [`operators!`]; its settings,
//! their defaults and limits stand in its own file.

use crate::{
    CacheLookup, CacheTable, ChunksTable, FillCache, Index, Infer, Publish, Retrieve, Shape, Validate, cache,
    embedder::Embedder,
};
use forebay_calls::Model;
use forebay_operator::{Operator, Output, Port, Step, Table, step};
use forebay_schemas::{CacheEntry, Chunks, Hop, Record};
use forebay_stores::{KeyValue, Objects, Vectors};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// What operators work with. Each is a port; the host chooses what is behind it.
#[derive(Clone)]
pub struct Resources {
    /// The copy of `cache`.
    pub cache: Arc<dyn KeyValue>,
    /// The copy of `chunks`.
    pub vectors: Arc<dyn Vectors>,
    /// Whole documents.
    pub objects: Arc<dyn Objects>,
    /// Whatever writes answers.
    pub model: Arc<dyn Model>,
    /// Whatever scores passages; absent where nothing does, and they keep the order in which they were found.
    pub reranker: Option<Arc<dyn Model>>,
    /// Whatever embeds texts; absent where nothing does, and passages are found by their words alone.
    pub embedder: Option<Embedder>,
    /// What shapes all answers of the pipeline alike; see [`shape`].
    pub shape: Shape,
}

/// Which of the [`Resources`] an operator asks at a cost, so that its calls are remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asks {
    /// Whatever writes answers.
    Model,
    /// Whatever scores passages.
    Reranker,
    /// Whatever embeds texts.
    Embedder,
}

/// An operator that the catalogue can build.
pub trait Shipped: Operator + Sized {
    /// What it can be set to; the default stands for what is not set.
    type Settings: Serialize + DeserializeOwned + Default + JsonSchema;

    /// The records of the tables that it looks things up in.
    const TABLES: &'static [&'static str] = &[];

    /// Whom it asks with these settings.
    fn asks(_settings: &Self::Settings) -> Vec<Asks> {
        Vec::new()
    }

    /// What the type of the settings cannot say: the key that is wrong and why.
    fn fault(_settings: &Self::Settings) -> Option<(&'static str, String)> {
        None
    }

    /// Builds it.
    fn new(settings: Self::Settings, resources: &Resources) -> Self;
}

/// What a pipeline's plan must know of an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Description {
    /// The record that it takes.
    pub input: &'static str,
    /// Whether that record is the work of one request, which must end in a result.
    pub is_job: bool,
    /// Its ways out.
    pub ports: &'static [Port],
    /// The part of the way that its time counts as.
    pub hop: Option<Hop>,
    /// The records of the tables that it looks things up in; see [`table`].
    pub tables: &'static [&'static str],
}

/// Settings that an operator cannot have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SettingsError {
    /// The key that is wrong; empty where it is the whole.
    pub path: String,
    /// What is wrong with it.
    pub message: String,
    /// The keys that there are where there is no such key, the operators where there is no such operator; else empty.
    pub known: Vec<String>,
}

macro_rules! operators {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// The settings of any operator, under its name: `{"operator": "retrieve", "settings": {…}}`.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(tag = "operator", content = "settings", rename_all = "snake_case")]
        pub enum Settings { $($(#[$doc])* $name(<$name as Shipped>::Settings)),+ }

        /// The names of all operators.
        pub fn names() -> &'static [&'static str] {
            &[$($name::NAME),+]
        }

        /// What a plan must know of an operator; `None` where there is no such one.
        pub fn describe(operator: &str) -> Option<Description> {
            match operator {
                $($name::NAME => Some(describe_one::<$name>()),)+
                _ => None,
            }
        }

        /// Whom an operator asks with these settings; with its defaults, where they cannot be read.
        pub fn asks(operator: &str, settings: &Value) -> Vec<Asks> {
            match operator {
                $($name::NAME => $name::asks(&read::<$name>(settings).unwrap_or_default()),)+
                _ => Vec::new(),
            }
        }

        /// All that is wrong with the settings of an operator; empty where nothing is.
        pub fn check(operator: &str, settings: &Value) -> Vec<SettingsError> {
            match operator {
                $($name::NAME => read::<$name>(settings).err().unwrap_or_default(),)+
                _ => vec![unknown_operator(operator)],
            }
        }

        /// The settings of an operator, defaults filled in; or the first thing that is wrong with them.
        pub fn settings(operator: &str, settings: &Value) -> Result<Settings, SettingsError> {
            match operator {
                $($name::NAME => read::<$name>(settings).map(Settings::$name).map_err(first),)+
                _ => Err(unknown_operator(operator)),
            }
        }

        /// Builds an operator.
        pub fn build(
            operator: &str,
            settings: &Value,
            resources: &Resources,
        ) -> Result<Arc<dyn Step>, SettingsError> {
            match operator {
                $($name::NAME => {
                    let settings = read::<$name>(settings).map_err(first)?;
                    Ok(step($name::new(settings, resources)))
                })+
                _ => Err(unknown_operator(operator)),
            }
        }
    };
}

operators! {
    /// Answers from the cache.
    CacheLookup,
    /// Finds passages.
    Retrieve,
    /// Asks the model.
    Infer,
    /// Judges the answer.
    Validate,
    /// Tells the client.
    Publish,
    /// Keeps the answer.
    FillCache,
    /// Splits documents.
    Index,
}

/// The table of this record; `None` where no operator looks things up in such a one.
pub fn table(record: &str, resources: &Resources) -> Option<Arc<dyn Table>> {
    match record {
        CacheEntry::NAME => Some(Arc::new(CacheTable::new(resources.cache.clone()))),
        Chunks::NAME => {
            Some(Arc::new(ChunksTable::new(resources.vectors.clone(), resources.embedder.clone())))
        }
        _ => None,
    }
}

/// What shapes all answers of a pipeline alike: its model, its reranker and its embedder where they are asked, and the settings of
/// the steps that find and write them. It is part of every cache key, so that an answer made otherwise is not found again.
///
/// `steps` are the operators of the whole pipeline with their settings, also where this process runs only some.
pub fn shape<'s>(
    steps: impl IntoIterator<Item = (&'s str, &'s Value)>,
    model: &dyn Model,
    reranker: Option<&dyn Model>,
    embedder: Option<&Embedder>,
) -> Result<Shape, SettingsError> {
    let mut shape = Shape::default();
    let (mut shaping, mut asked) = (Vec::new(), Vec::new());
    for (operator, settings) in steps {
        asked.extend(asks(operator, settings));
        match self::settings(operator, settings)? {
            Settings::CacheLookup(settings) => shape.temperature_max = settings.temperature_max,
            settings @ (Settings::Retrieve(_) | Settings::Infer(_)) => shaping.push(settings),
            Settings::Validate(_) | Settings::Publish(_) | Settings::FillCache(_) | Settings::Index(_) => {}
        }
    }
    let reranker = reranker.filter(|_| asked.contains(&Asks::Reranker)).map(|reranker| reranker.name());
    let embedder = embedder.filter(|_| asked.contains(&Asks::Embedder));
    let embedder = embedder.map(|embedder| json!([embedder.name(), embedder.dimensions()]));
    let shaping = json!({
        "provider": model.provider(),
        "model": model.name(),
        "reranker": reranker,
        "embedder": embedder,
        "steps": shaping,
    });
    shape.fingerprint = cache::fingerprint(&shaping);
    Ok(shape)
}

fn describe_one<O: Shipped>() -> Description {
    let (input, is_job, ports) = (O::In::NAME, O::In::JOB, O::Out::PORTS);
    Description { input, is_job, ports, hop: O::HOP, tables: O::TABLES }
}

fn unknown_operator(operator: &str) -> SettingsError {
    let known = names().iter().map(|name| (*name).to_owned()).collect();
    SettingsError { path: String::new(), message: format!("there is no operator {operator:?}"), known }
}

fn first(mut faults: Vec<SettingsError>) -> SettingsError {
    // `read` gives at least one.
    if faults.is_empty() { wrong("", "settings cannot be read".to_owned()) } else { faults.swap_remove(0) }
}

fn wrong(path: &str, message: String) -> SettingsError {
    SettingsError { path: path.to_owned(), message, known: Vec::new() }
}

/// Reads settings, or tells all that is wrong with them. Settings are flat, so each key can be read alone.
fn read<O: Shipped>(settings: &Value) -> Result<O::Settings, Vec<SettingsError>> {
    let known: Vec<String> = match serde_json::to_value(O::Settings::default()) {
        Ok(Value::Object(defaults)) => defaults.keys().cloned().collect(),
        _ => Vec::new(),
    };
    let members = match settings {
        // What YAML makes of `settings:` with nothing behind it.
        Value::Null => &Map::new(),
        Value::Object(members) => members,
        _ => return Err(vec![wrong("", "settings are a map of keys to values".to_owned())]),
    };
    let mut faults = Vec::new();
    for (key, value) in members {
        if !known.contains(key) {
            let message = format!("operator {:?} has no setting {key:?}", O::NAME);
            faults.push(SettingsError { path: key.clone(), message, known: known.clone() });
            continue;
        }
        let alone = Value::Object([(key.clone(), value.clone())].into_iter().collect());
        if let Err(error) = serde_json::from_value::<O::Settings>(alone) {
            faults.push(wrong(key, error.to_string()));
        }
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    let settings: O::Settings = serde_json::from_value(Value::Object(members.clone()))
        .map_err(|error| vec![wrong("", error.to_string())])?;
    match O::fault(&settings) {
        Some((key, message)) => Err(vec![wrong(key, message)]),
        None => Ok(settings),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Extractive, samples};

    fn check(operator: &str, value: Value, expected: &str) {
        let seen = match settings(operator, &value) {
            Ok(read) => serde_json::to_value(read).unwrap()["settings"].to_string(),
            Err(SettingsError { path, message, .. }) => format!("{path}: {message}"),
        };
        assert_eq!(seen, expected, "{operator} {value}");
    }

    #[test]
    fn what_is_not_set_has_its_default_and_what_is_wrong_is_named() {
        let usual = |limit: u8| {
            format!(
                r#"{{"embed":false,"embed_timeout_ms":2000,"limit":{limit},"rerank":0,"rerank_timeout_ms":2000,"tokens_max":2400}}"#
            )
        };
        check("retrieve", Value::Null, &usual(8));
        check("retrieve", json!({"limit": 3}), &usual(3));
        check("index", json!({"embed": true}), r#"{"embed":true}"#);
        check("retrieve", json!({"limt": 3}), r#"limt: operator "retrieve" has no setting "limt""#);
        check("retrieve", json!({"limit": 51}), "limit: 51 is over 50");
        check("retrieve", json!({"rerank": 51}), "rerank: 51 is over 50");
        check("retrieve", json!({"rerank": 7}), "rerank: 7 is under limit, which is 8");
        check("retrieve", json!({"embed_timeout_ms": 60_001}), "embed_timeout_ms: 60001 is over 60000");
        check("retrieve", json!({"rerank_timeout_ms": 60_001}), "rerank_timeout_ms: 60001 is over 60000");
        let zero = "limit: invalid value: integer `0`, expected a nonzero usize";
        check("retrieve", json!({"tokens_max": 5, "limit": 0}), zero);
        check("retrieve", json!([]), ": settings are a map of keys to values");
        check("cache_lookup", json!({"temperature_max": -1.0}), "temperature_max: -1 is not 0 to 2");
        check("retrive", json!({}), r#": there is no operator "retrive""#);
        let faults = super::check("infer", &json!({"x": 1, "max_tokens": 0, "instructions": null}));
        let faults: Vec<_> = faults.iter().map(|fault| (fault.path.as_str(), fault.known.len())).collect();
        assert_eq!(faults, [("max_tokens", 0), ("x", 2)]);
    }

    #[tokio::test]
    async fn every_operator_is_built_under_its_name_as_described() {
        let world = samples::World::new().await;
        for name in names() {
            let step = build(name, &json!({}), &world.resources).unwrap();
            let described = describe(name).unwrap();
            assert_eq!((step.operator(), step.input()), (*name, described.input));
            assert_eq!(
                (step.is_job(), step.ports(), step.hop()),
                (described.is_job, described.ports, described.hop)
            );
            for record in described.tables {
                assert_eq!(table(record, &world.resources).unwrap().record(), *record);
            }
        }
        assert!(describe("nothing").is_none() && table("Request", &world.resources).is_none());
    }

    #[tokio::test]
    async fn settings_that_shape_answers_shape_the_key() {
        let by_both = |(reranker, embedder): (Option<&dyn Model>, Option<&Embedder>),
                       retrieve: Value,
                       lookup: Value| {
            let steps = [("retrieve", &retrieve), ("cache_lookup", &lookup)];
            shape(steps, &Extractive, reranker, embedder).unwrap()
        };
        let by = |reranker, retrieve: Value, lookup: Value| by_both((reranker, None), retrieve, lookup);
        let fingerprint = |retrieve, lookup| by(None, retrieve, lookup);
        let usual = fingerprint(json!({}), json!({}));
        assert_eq!(usual, fingerprint(json!({"limit": 8}), json!({"ttl_s": 5})));
        assert_ne!(usual, fingerprint(json!({"limit": 7}), json!({})));
        assert_eq!(fingerprint(json!({}), json!({"temperature_max": 1.0})).temperature_max, 1.0);
        assert_eq!(usual, by(Some(&Extractive), json!({}), json!({})), "nobody asks it");
        let reranked = json!({"rerank": 32});
        assert_ne!(by(None, reranked.clone(), json!({})), by(Some(&Extractive), reranked, json!({})));
        let world = samples::World::new().await;
        let of =
            |dimensions| Embedder::new(Arc::new(Extractive), dimensions, world.resources.vectors.clone());
        let embedded =
            |of: Option<&Embedder>, embed: bool| by_both((None, of), json!({"embed": embed}), json!({}));
        assert_eq!(usual, embedded(Some(&of(3)), false), "nobody asks it");
        assert_ne!(embedded(None, true), embedded(Some(&of(3)), true));
        assert_ne!(embedded(Some(&of(2)), true), embedded(Some(&of(3)), true));
    }
}
