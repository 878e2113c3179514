//! How often something is true, and between which bounds, from a judge that errs and a few labels that do not.
//!
//! A critic flags answers. The share that it flags is not the share that is wrong: it is that and the critic's own bias, and
//! more verdicts only make one surer of the wrong number. Labels by people are right, but few. So:
//!
//! - [`Cell`] gathers verdicts and labels of one group in one pass, in sums that merge, and [`Cell::rate`] answers with the
//!   best estimate that the labels allow, and says which that was.
//! - [`combine`] puts strata together by their share of the traffic.
//! - [`wilson`], [`stratified_wilson`] and [`clopper_pearson`] are for counts alone; [`false_hit_bound`] is the one-sided form of the last.
//!
//! All rates, shares, probabilities and bounds are fractions from 0 to 1, never percent. There is no IO, clock or randomness.
//!
//! Invariant: input that makes no sense is an [`Error`]; nothing gives NaN, an interval outside of 0 to 1, or an interval without
//! its own estimate.

mod cell;
mod error;
mod interval;
mod special;
mod strata;

pub use cell::{Answer, Cell, Estimate, INCLUSION_MIN, LABELS_MIN, Method, RARER_MIN, State};
pub use error::Error;
pub use interval::{
    Confidence, Interval, TRIALS_MAX, clopper_pearson, clopper_pearson_upper, false_hit_bound, wilson,
    wilson_of_rate,
};
pub use strata::{Counts, STRATA_MAX, Stratum, combine, shares, stratified_wilson};
