//! One file a command, or a few where they belong together.

mod ask;
mod budgets;
mod completions;
mod config;
mod demo;
mod dlq;
mod graph;
mod ingest;
mod ledger;
mod pool;
mod simulate_model;
mod tables;
mod tiers;
mod topics;
mod up;

use crate::args::{Command, Settings};
use std::process::ExitCode;

/// Does what was asked.
pub async fn run(command: Command, settings: &Settings) -> anyhow::Result<ExitCode> {
    let config = || crate::config::load(settings);
    match command {
        Command::Demo(demo) => demo::run(demo, config()?).await?,
        Command::Up(pipeline) => up::up(&pipeline, config()?).await?,
        Command::Run(run) => up::run(&run, config()?).await?,
        Command::Ask(ask) => return ask::run(ask, config()?).await,
        Command::Ingest(ingest) => ingest::run(ingest, config()?).await?,
        Command::Check(pipeline) => graph::check(&pipeline)?,
        Command::Test(pipeline) => return graph::test(&pipeline).await,
        Command::Explain(explain) => graph::explain(&explain)?,
        Command::Dlq(dlq) => return dlq::run(dlq, config()?).await,
        Command::Topics(topics) => topics::run(topics, config()?).await?,
        Command::Sink(passed) => tables::run("sink", &passed.arguments, config()?).await?,
        Command::Sql(passed) => tables::run("sql", &passed.arguments, config()?).await?,
        Command::Report(passed) => tables::run("report", &passed.arguments, config()?).await?,
        Command::Config(crate::args::ConfigCommand::Print) => config::print(&config()?),
        Command::Ledger(ledger) => return ledger::run(ledger, config()?).await,
        Command::Budgets(command) => return budgets::run(command, config()?).await,
        Command::Pool(pool) => return pool::run(pool, config()?).await,
        Command::Tiers(tiers) => return tiers::run(tiers, config).await,
        // It has settings of its own, which stand where Forebay's would.
        Command::SimulateModel(simulate) => simulate_model::run(simulate).await?,
        Command::Completions { shell } => completions::print(shell),
    }
    Ok(ExitCode::SUCCESS)
}
