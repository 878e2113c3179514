//! `forebay check`, `explain`, `test`: pipelines without a broker.

use crate::{
    args::{Explain, PipelineArg},
    build,
    console::{out, wrong},
    shipped,
};
use anyhow::Context as _;
use forebay_operators::Extractive;
use forebay_plan::{Plan, cases::Case, explain};
use forebay_runtime::cases::{self, Operators};
use forebay_stores::{Database, database, key_value, objects, vectors};
use forebay_telemetry::{Settings, Telemetry};
use std::{path::Path, process::ExitCode, sync::Arc};

/// Finds all faults.
pub fn check(pipeline: &PipelineArg) -> anyhow::Result<()> {
    let plan = build::plan(pipeline)?;
    out(format_args!("{}: {} steps, {} topics, no faults", plan.name, plan.steps.len(), plan.topics().len()));
    Ok(())
}

/// Draws the graph.
pub fn explain(args: &Explain) -> anyhow::Result<()> {
    let plan = build::plan(&args.pipeline)?;
    let drawn = if args.mermaid { explain::mermaid(&plan) } else { explain::text(&plan) };
    out(drawn.trim_end());
    Ok(())
}

/// Runs the cases beside a pipeline, each over stores of its own; the exit code tells whether all passed.
pub async fn test(pipeline: &PipelineArg) -> anyhow::Result<ExitCode> {
    let plan = build::plan(pipeline)?;
    let cases = cases_of(&pipeline.pipeline)?;
    let telemetry = Telemetry::start(Settings::new("forebay.test", env!("CARGO_PKG_VERSION")))?;
    let mut failed = 0;
    for case in &cases {
        let folder = tempfile::tempdir().context("could not make a folder for a case")?;
        let operators = operators(&plan, folder.path()).await?;
        let report = cases::run(&plan, case, operators, &telemetry).await;
        out(format_args!("{}  {}", if report.passed() { "ok    " } else { "FAILED" }, report.name));
        for fault in &report.faults {
            out(format_args!("        {fault}"));
        }
        failed += usize::from(!report.passed());
    }
    out(format_args!("{} passed, {failed} failed", cases.len() - failed));
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The cases of a pipeline: those in `NAME/cases` beside `NAME.yaml`, or those that Forebay ships.
fn cases_of(pipeline: &str) -> anyhow::Result<Vec<Case>> {
    let mut files: Vec<(String, String)> = Vec::new();
    if let Some(shipped) = shipped::cases(pipeline) {
        files.extend(shipped.iter().map(|(file, text)| ((*file).to_owned(), (*text).to_owned())));
    } else {
        let folder = Path::new(pipeline).with_extension("").join("cases");
        let entries = std::fs::read_dir(&folder).map_err(|fault| {
            wrong(format!("could not read the cases of {pipeline} in {}: {fault}", folder.display()))
        })?;
        let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
        paths.sort();
        for path in paths {
            let name = path.display().to_string();
            let bytes = std::fs::read(&path).with_context(|| format!("could not read case {name}"))?;
            files.push((name.clone(), forebay_plan::utf8(&name, &bytes).map_err(wrong)?.to_owned()));
        }
    }
    // All faults of all files at once.
    let (mut cases, mut faults) = (Vec::new(), Vec::new());
    for (file, text) in &files {
        match forebay_plan::cases::parse(file, text) {
            Ok(case) => cases.push(case),
            Err(fault) => faults.push(fault.to_string()),
        }
    }
    match faults.is_empty() {
        true => Ok(cases),
        false => Err(wrong(faults.join("\n"))),
    }
}

/// The operators of a pipeline over empty stores, with the extractive model, no embedder and no reranker.
async fn operators(plan: &Plan, folder: &Path) -> anyhow::Result<Operators> {
    let database = Database::open(folder.join("tables.redb"), database::Options::default()).await?;
    let options = key_value::EmbeddedOptions::default();
    let resources = build::resources_of(
        plan,
        Arc::new(key_value::Embedded::open(&database, "cache", options).await?),
        Arc::new(vectors::Embedded::open(&database, "chunks").await?),
        Arc::new(objects::Folder::open(folder.join("objects")).await?),
        build::Asked { model: Arc::new(Extractive), embedder: None, reranker: None },
    )?;
    let steps = build::steps(&plan.steps, &resources)?;
    Ok(Operators {
        steps: steps.into_iter().map(|(planned, step)| (planned.key.clone(), step)).collect(),
        tables: build::tables(plan, &plan.steps, &resources),
    })
}
