//! `forebay tiers calibrate`: learns from an output log how likely each tier is good enough, and says what each choice of
//! thresholds would cost and come to.
//!
//! Invariant: what is printed was measured on requests that nothing was learned from, and the same log and seed print the same.

use super::{
    curve::{self, NEVER, Point},
    log::{self, Asked, Log},
    plot,
};
use crate::{
    args::TiersCalibrate,
    console::{out, say, wrong},
};
use comfy_table::{CellAlignment, Table, presets::UTF8_HORIZONTAL_ONLY};
use forebay_calls::tiers::{
    TIERS_MAX,
    classifier::{Classifier, Features, Judged, Weights},
};
use std::{path::Path, process::ExitCode};

/// The fewest answers of a tier that something is learned from.
const LEARNED_MIN: usize = 30;
/// The fewest requests that are measured.
const MEASURED_MIN: usize = 30;
/// The most lines of the table.
const LINES_MAX: usize = 25;

/// What was learned and measured.
struct Calibrated {
    weights: Vec<Weights>,
    points: Vec<Point>,
    learned: usize,
    measured: usize,
}

/// Prints the curve, and writes what was asked for.
pub fn run(args: &TiersCalibrate, tiers: &[String]) -> anyhow::Result<ExitCode> {
    if !(2..=TIERS_MAX).contains(&tiers.len()) {
        return Err(wrong(format!("there are {} tiers; there may be 2 to {TIERS_MAX}", tiers.len())));
    }
    let log = log::read(&args.log, tiers, args.seed)?;
    let calibrated = calibrate(&log, tiers, args.seed)?;
    let Calibrated { weights, points, learned, measured } = &calibrated;
    let recommended = recommended(points, args.quality, args.cost);
    say(format_args!(
        "forebay: learned from {learned} requests and measured on {measured} others; of all {}, {} have a quality that \
         somebody gave, and the verdict tells that of the rest",
        log.asked.len(),
        log.judged
    ));
    for (reason, count) in &log.left_out {
        say(format_args!("forebay: {count} requests are left out: {reason}"));
    }
    out(table(points, tiers, recommended));
    out(plot::text(points, recommended));
    if let Some(file) = &args.plot {
        write(file, &plot::svg(points, recommended))?;
    }
    let wanted = match (args.quality, args.cost) {
        (Some(quality), _) => format!("a quality of at least {quality} (by the lower bound)"),
        (None, Some(cost)) => format!("a cost of at most {cost} USD for 1,000 requests"),
        (None, None) => return Ok(ExitCode::SUCCESS),
    };
    let Some(point) = recommended.and_then(|at| points.get(at)) else {
        say(format_args!("forebay: no choice of thresholds has {wanted}; nothing is recommended"));
        return Ok(ExitCode::FAILURE);
    };
    say(format_args!("forebay: recommended for {wanted}: thresholds {}", thresholds(&point.thresholds)));
    if let Some(file) = &args.write {
        let judged = tiers.iter().zip(weights).zip(&point.thresholds).map(|((model, weights), threshold)| {
            Judged { model: model.clone(), threshold: *threshold, weights: weights.clone() }
        });
        let last = tiers.last().cloned().unwrap_or_default();
        write(file, &Classifier::new(judged.collect(), last).write()?)?;
        say(format_args!("forebay: wrote {}; tiers.classifier names it", file.display()));
    }
    Ok(ExitCode::SUCCESS)
}

fn write(file: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(file, text).map_err(|fault| wrong(format!("could not write {}: {fault}", file.display())))
}

fn calibrate(log: &Log, tiers: &[String], seed: u64) -> anyhow::Result<Calibrated> {
    let (measured, learned): (Vec<&Asked>, Vec<&Asked>) =
        log.asked.iter().partition(|asked| asked.is_held_out);
    let mut weights = Vec::new();
    for (tier, name) in tiers.iter().enumerate().take(tiers.len() - 1) {
        let rows: Vec<(Features, f64)> = learned
            .iter()
            .flat_map(|asked| asked.answers.iter().map(move |answer| (asked, answer)))
            .filter(|(_, answer)| answer.tier == tier)
            .map(|(asked, answer)| (asked.features.clone(), answer.quality))
            .collect();
        if rows.len() < LEARNED_MIN {
            return Err(too_few(
                log,
                &format!("{} answers of tier {name:?} to learn from", rows.len()),
                LEARNED_MIN,
            ));
        }
        weights.push(Weights::learn(&rows, seed));
    }
    if measured.len() < MEASURED_MIN {
        return Err(too_few(log, &format!("{} requests to measure on", measured.len()), MEASURED_MIN));
    }
    let points = curve::pareto(&measured, &weights);
    if points.is_empty() {
        return Err(too_few(log, "too few answers of each tier to measure any choice", MEASURED_MIN));
    }
    Ok(Calibrated { weights, points, learned: learned.len(), measured: measured.len() })
}

fn too_few(log: &Log, what: &str, least: usize) -> anyhow::Error {
    let left_out: Vec<_> = log.left_out.iter().map(|(reason, count)| format!("{count}: {reason}")).collect();
    let left_out = if left_out.is_empty() { "none".to_owned() } else { left_out.join("; ") };
    wrong(format!(
        "the log has too few rows: {what}, and {least} are wanted; {} requests can be used; left out: {left_out}",
        log.asked.len()
    ))
}

/// The place of the cheapest choice that is surely good enough, or of the best that is cheap enough.
fn recommended(points: &[Point], quality: Option<f64>, cost: Option<f64>) -> Option<usize> {
    match (quality, cost) {
        (Some(quality), _) => points.iter().position(|point| point.low >= quality),
        (None, Some(cost)) => points.iter().rposition(|point| plot::dollars(point.cost) <= cost),
        (None, None) => None,
    }
}

fn thresholds(thresholds: &[f64]) -> String {
    let shown = |threshold: &f64| match *threshold {
        0.0 => "always".to_owned(),
        threshold if threshold >= NEVER => "never".to_owned(),
        threshold => format!("{threshold:.4}"),
    };
    thresholds.iter().map(shown).collect::<Vec<_>>().join(" ")
}

fn table(points: &[Point], tiers: &[String], recommended: Option<usize>) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY);
    table.set_header(["", "thresholds", &tiers.join(" / "), "USD/1,000", "quality", "95 in 100", "answers"]);
    let every = points.len().div_ceil(LINES_MAX);
    for (at, point) in points.iter().enumerate() {
        let is_recommended = recommended == Some(at);
        if !at.is_multiple_of(every) && at + 1 != points.len() && !is_recommended {
            continue;
        }
        let shares: Vec<_> = point.shares.iter().map(|share| format!("{:.0}%", share * 100.0)).collect();
        table.add_row([
            if is_recommended { "◆" } else { "" }.to_owned(),
            thresholds(&point.thresholds),
            shares.join(" / "),
            format!("{:.4}", plot::dollars(point.cost)),
            format!("{:.3}", point.quality),
            format!("{:.3}–{:.3}", point.low, point.high),
            point.answers.to_string(),
        ]);
    }
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests;
