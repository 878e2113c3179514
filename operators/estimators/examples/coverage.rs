//! Prints how often intervals hold the truth, and how wide they are: `cargo run -p forebay-estimators --example coverage [RUNS]`.
//!
//! By hand, as 100,000 runs take half a minute; `tests/coverage.rs` does the same with fewer.

#![expect(clippy::print_stdout, reason = "it is its table")]

use std::error::Error;

#[path = "../tests/simulation/mod.rs"]
mod simulation;

use simulation::{Report, Scenario};

fn main() -> Result<(), Box<dyn Error>> {
    let runs = std::env::args().nth(1).map_or(Ok(100_000), |runs| runs.parse())?;
    println!("{}", Report::HEADING);
    for scenario in Scenario::all() {
        let report = scenario.simulate(runs)?;
        println!("{report}");
        scenario.check(&report);
    }
    Ok(())
}
