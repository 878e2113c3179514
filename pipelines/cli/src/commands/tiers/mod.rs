//! `forebay tiers`: an output log, and from it the classifier and thresholds that pick a tier.

mod calibrate;
mod curve;
mod export;
mod log;
mod plot;

use crate::{args::Tiers, config, config::Config};
use std::process::ExitCode;

/// Does what was asked. The configuration is read only by what needs it, since it may name a classifier that is still to be
/// written.
pub async fn run(tiers: Tiers, config: impl FnOnce() -> anyhow::Result<Config>) -> anyhow::Result<ExitCode> {
    match tiers {
        Tiers::Log(args) => export::run(args, config()?).await,
        Tiers::Calibrate(args) => {
            let tiers = match args.tiers.is_empty() {
                false => args.tiers.clone(),
                true => config::tiers::models(config()?.tiers)?,
            };
            calibrate::run(&args, &tiers)
        }
    }
}
