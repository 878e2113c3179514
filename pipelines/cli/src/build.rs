//! From settings to what runs: a checked plan, stores, operators, tables.

use crate::{
    args::PipelineArg,
    config::Config,
    console::{say, wrong},
    models::Client,
    shipped,
};
use anyhow::Context as _;
use bytes::Bytes;
use forebay_calls::Model;
use forebay_operator::{Step, Table};
use forebay_operators::{
    catalogue::{self, Asks, Resources},
    embedder::Embedder,
};
use forebay_plan::{Catalogue, Description, Plan, PlannedStep, SettingsFault};
use forebay_runtime::claims::{self, Claims, ObjectsError};
use forebay_stores::{Database, Error as StoreError, KeyValue, database, key_value, objects, vectors};
use futures::{FutureExt, future::BoxFuture};
use serde_json::Value;
use std::{collections::BTreeSet, path::Path, sync::Arc};

/// All operators that Forebay ships, as a plan sees them.
pub struct Shipped;

impl Catalogue for Shipped {
    fn names(&self) -> Vec<&'static str> {
        catalogue::names().to_vec()
    }

    fn describe(&self, operator: &str) -> Option<Description> {
        let described = catalogue::describe(operator)?;
        Some(Description {
            input: described.input,
            is_job: described.is_job,
            ports: described.ports.iter().map(|port| (port.name, port.record)).collect(),
            tables: described.tables.to_vec(),
        })
    }

    fn is_paid(&self, operator: &str, settings: &Value) -> bool {
        !catalogue::asks(operator, settings).is_empty()
    }

    fn check_settings(&self, operator: &str, settings: &Value) -> Vec<SettingsFault> {
        let Err(fault) = catalogue::settings(operator, settings) else { return Vec::new() };
        let path: Vec<String> = Some(fault.path).filter(|path| !path.is_empty()).into_iter().collect();
        // A key that is known has a wrong value.
        let is_known = path.last().is_some_and(|key| fault.known.contains(key));
        let known = if is_known || path.is_empty() { Vec::new() } else { fault.known };
        vec![SettingsFault { path, message: fault.message, known }]
    }
}

/// The text of a pipeline: that of a file, or one that Forebay ships.
pub fn pipeline_text(pipeline: &str) -> anyhow::Result<(String, String)> {
    if let Some((file, text)) = shipped::pipeline(pipeline) {
        return Ok((file.to_owned(), text.to_owned()));
    }
    let bytes = std::fs::read(pipeline).map_err(|fault| {
        let names: Vec<_> = shipped::names().collect();
        wrong(format!("could not read pipeline {pipeline}: {fault}; Forebay ships: {}", names.join(", ")))
    })?;
    let text = forebay_plan::utf8(pipeline, &bytes).map_err(wrong)?.to_owned();
    Ok((pipeline.to_owned(), text))
}

/// The plan of a pipeline, or all its faults. What looks like a mistake and is allowed is said aloud.
pub fn plan(arg: &PipelineArg) -> anyhow::Result<Plan> {
    let (file, text) = pipeline_text(&arg.pipeline)?;
    let plan = forebay_plan::plan(&file, &text, &Shipped).map_err(wrong)?;
    if !plan.warnings.is_empty() {
        say(&plan.warnings);
    }
    Ok(plan)
}

/// How many processes may share a data folder. Each has a subfolder of its own.
const PROCESSES_MAX: usize = 64;

/// What operators work with in this process.
pub async fn resources(
    config: &Config,
    plan: &Plan,
    cluster: &str,
    client: &Client,
    database: &Database,
) -> anyhow::Result<Resources> {
    let cache: Arc<dyn KeyValue> = match &config.key_value {
        Some(url) => {
            // The copy is of one cluster's topics: another cluster beside it must not continue it.
            let prefix = format!("forebay:{cluster}:{}", config.topic_prefix);
            let options = key_value::RedisOptions { prefix, ..key_value::RedisOptions::default() };
            Arc::new(key_value::Redis::connect(url, options).await.context("stores.key_value")?)
        }
        None => {
            let options = key_value::EmbeddedOptions::default();
            Arc::new(key_value::Embedded::open(database, "cache", options).await?)
        }
    };
    let vectors = Arc::new(vectors::Embedded::open(database, "chunks").await?);
    let objects = objects(config).await?;
    let embeds =
        |step: &PlannedStep| catalogue::asks(&step.operator, &step.settings).contains(&Asks::Embedder);
    let embedder = match client.embedder.clone().filter(|_| plan.steps.iter().any(embeds)) {
        Some((model, dimensions)) => {
            let vectors = vectors::Embedded::open(database, "embeddings").await?;
            Some(Embedder::new(model, dimensions, Arc::new(vectors)))
        }
        None => None,
    };
    let asked = Asked { model: client.model.clone(), embedder, reranker: client.reranker.clone() };
    resources_of(plan, cache, vectors, objects, asked)
}

/// The object store.
async fn objects(config: &Config) -> anyhow::Result<Arc<dyn forebay_stores::Objects>> {
    Ok(Arc::new(objects::Folder::open(config.data.join("objects")).await?))
}

/// Where bodies lie that are too large to travel.
pub async fn claims(config: &Config) -> anyhow::Result<Arc<Claims>> {
    Ok(Arc::new(Claims::new(Arc::new(Bodies(objects(config).await?)), config.claims_over)))
}

/// An object store as a host sees it.
struct Bodies(Arc<dyn forebay_stores::Objects>);

impl claims::Objects for Bodies {
    fn put<'a>(&'a self, key: &'a str, body: Bytes) -> BoxFuture<'a, Result<(), ObjectsError>> {
        self.0.put_if_absent(key, body).map(|put| put.map(drop).map_err(judged)).boxed()
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Bytes>, ObjectsError>> {
        self.0.get(key).map(|got| got.map_err(judged)).boxed()
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), ObjectsError>> {
        self.0.delete(key).map(|deleted| deleted.map_err(judged)).boxed()
    }

    fn list<'a>(&'a self, prefix: &'a str, limit: usize) -> BoxFuture<'a, Result<Vec<String>, ObjectsError>> {
        self.0.list(prefix, limit).map(|listed| listed.map_err(judged)).boxed()
    }
}

/// Whether waiting may help. A full disk or a lost mount is mended by a person, and no record is worse for it.
fn judged(fault: StoreError) -> ObjectsError {
    match fault {
        StoreError::TooLarge { .. } | StoreError::Key { .. } | StoreError::Refused { .. } => {
            ObjectsError::Refused(Box::new(fault))
        }
        fault => ObjectsError::Unavailable(Box::new(fault)),
    }
}

/// Whom operators ask.
pub struct Asked {
    pub model: Arc<dyn Model>,
    pub embedder: Option<Embedder>,
    pub reranker: Option<Arc<dyn Model>>,
}

/// The same over stores and models that are given.
pub fn resources_of(
    plan: &Plan,
    cache: Arc<dyn KeyValue>,
    vectors: Arc<dyn forebay_stores::Vectors>,
    objects: Arc<dyn forebay_stores::Objects>,
    Asked { model, embedder, reranker }: Asked,
) -> anyhow::Result<Resources> {
    let steps = plan.steps.iter().map(|step| (step.operator.as_str(), &step.settings));
    let shape = catalogue::shape(steps, &*model, reranker.as_deref(), embedder.as_ref())?;
    Ok(Resources { cache, vectors, objects, model, reranker, embedder, shape })
}

/// The database for this process's copies of tables: the first that no other process holds.
pub async fn copies(data: &Path) -> anyhow::Result<Database> {
    for number in 0..PROCESSES_MAX {
        let folder = data.join("copies").join(number.to_string());
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("could not make data folder {}", folder.display()))?;
        match Database::open(folder.join("tables.redb"), database::Options::default()).await {
            Err(StoreError::Locked { .. }) => {}
            opened => return Ok(opened?),
        }
    }
    Err(wrong(format!(
        "{PROCESSES_MAX} processes use data folder {} already; give this one another by --data",
        data.display()
    )))
}

/// The operators of these steps.
pub fn steps<'p>(
    steps: impl IntoIterator<Item = &'p PlannedStep>,
    resources: &Resources,
) -> anyhow::Result<Vec<(&'p PlannedStep, Arc<dyn Step>)>> {
    let build = |step: &'p PlannedStep| {
        let built = catalogue::build(&step.operator, &step.settings, resources);
        Ok((step, built.with_context(|| format!("step {}", step.key))?))
    };
    steps.into_iter().map(build).collect()
}

/// The tables that these steps look things up in: each topic once.
pub fn tables<'p>(
    plan: &Plan,
    steps: impl IntoIterator<Item = &'p PlannedStep>,
    resources: &Resources,
) -> Vec<(String, Arc<dyn Table>)> {
    let wanted: BTreeSet<&str> =
        steps.into_iter().flat_map(|step| step.tables.iter().map(String::as_str)).collect();
    let topics = plan.topics();
    let of = |name: &&str| topics.iter().find(|topic| topic.name == **name);
    wanted
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), catalogue::table(&of(name)?.record, resources)?)))
        .collect()
}
