//! Why there is no estimate: always the caller's numbers, each named.

/// What was given that no rate can be made of.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// A confidence is a fraction, such as 0.95.
    #[error("confidence {0} does not lie between 0 and 1")]
    Confidence(f64),
    /// A rate of nothing.
    #[error("there is no rate over 0 trials")]
    NoTrials,
    /// More events than chances.
    #[error("{positives} positives cannot come of {trials} trials")]
    Positives {
        /// How often it was so.
        positives: u64,
        /// Of how many.
        trials: u64,
    },
    /// Beyond what was tested.
    #[error("{0} trials are over the limit of {max}", max = crate::TRIALS_MAX)]
    Trials(u64),
    /// Not a fraction.
    #[error("rate {0} does not lie from 0 to 1")]
    Rate(f64),
    /// Not a size.
    #[error("effective sample size {0} is no positive number")]
    SampleSize(f64),
    /// A judge's verdict is 0, 1, or a score between them.
    #[error("flag {0} does not lie from 0 to 1")]
    Flag(f64),
    /// What cannot be drawn cannot be weighted.
    #[error("inclusion probability {0} does not lie from {min} to 1", min = crate::INCLUSION_MIN)]
    Inclusion(f64),
    /// A state that no cell ever had.
    #[error("{field} is {value}, which no cell can hold")]
    State {
        /// Its name in [`State`](crate::State).
        field: &'static str,
        /// What it was.
        value: f64,
    },
    /// Nothing to combine.
    #[error("there are no strata")]
    NoStrata,
    /// More strata than anything here was tested with.
    #[error("{0} strata are over the limit of {max}", max = crate::STRATA_MAX)]
    Strata(usize),
    /// A share is a fraction of the traffic.
    #[error("share {share} of stratum {stratum} does not lie from 0 to 1")]
    Share {
        /// Its place in the list.
        stratum: usize,
        /// What it was.
        share: f64,
    },
    /// Some traffic is missing or counted twice.
    #[error("the shares of the strata sum to {0} and not to 1")]
    Shares(f64),
    /// Traffic of zero has no shares.
    #[error("the traffic of all strata is 0")]
    NoTraffic,
}
