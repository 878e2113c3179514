//! Do 95% intervals hold the truth 95 times in a hundred? The table is printed by `examples/coverage.rs`, with more runs.

mod simulation;

use forebay_estimators::Error;
use simulation::{Report, Scenario};

const RUNS: u32 = 10_000;

#[test]
fn what_is_published_holds_the_truth_and_the_flag_rate_does_not() -> Result<(), Error> {
    println!("{}", Report::HEADING);
    for scenario in Scenario::all() {
        let report = scenario.simulate(RUNS)?;
        println!("{report}");
        scenario.check(&report);
    }
    Ok(())
}
