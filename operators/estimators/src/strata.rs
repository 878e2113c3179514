//! One rate of traffic that was looked at in parts.
//!
//! Invariant: shares are those of the traffic and sum to 1; a part of the traffic that nobody labelled leaves no rate of the
//! whole, since nothing says that it is like the others.

use crate::Error;
use crate::cell::{Answer, Cell, Estimate};
use crate::interval::{Confidence, Interval, check_counts, score};

/// The most strata at once.
pub const STRATA_MAX: usize = 100_000;

/// How far shares may be from summing to 1: what rounding does to [`STRATA_MAX`] of them.
const SHARES_TOLERANCE: f64 = 1e-9;

/// A part of the traffic, and what was judged and labelled of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stratum {
    /// Its part of all traffic, from 0 to 1; not of the sample.
    pub share: f64,
    /// What was found in it.
    pub cell: Cell,
}

/// A part of the traffic, and how often something was so in a sample of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Counts {
    /// Its part of all traffic, from 0 to 1.
    pub share: f64,
    /// How often it was so.
    pub positives: u64,
    /// Of how many.
    pub trials: u64,
}

/// The shares of strata with so much traffic each.
pub fn shares(traffic: &[u64]) -> Result<Vec<f64>, Error> {
    let total: u128 = traffic.iter().map(|&records| u128::from(records)).sum();
    if total == 0 {
        return Err(if traffic.is_empty() { Error::NoStrata } else { Error::NoTraffic });
    }
    Ok(traffic.iter().map(|&records| records as f64 / total as f64).collect())
}

/// The rate of all traffic: `Σ share · rate`, each stratum by the best its own labels allow ([`Cell::rate`]).
///
/// `se² = Σ share² · se²`. The bounds are `rate − sqrt(Σ share² (rate_h − low_h)²)` and the like above, from the interval of
/// each stratum (MOVER: Zou and Donner 2008, Construction of confidence limits about effect measures, Statistics in Medicine
/// 27, 1693–1702). They always lie within 0 to 1. One n_eff from the summed se² would do with many labels everywhere; but a
/// stratum with few labels and no positive among them has an se of 0, and would count as known.
///
/// No estimate if a stratum with traffic has no label.
pub fn combine(strata: &[Stratum], confidence: Confidence) -> Result<Answer, Error> {
    check_shares(strata.iter().map(|stratum| stratum.share))?;
    let mut all =
        Answer { estimate: None, uncorrected_flag_rate: Some(0.0), labelled: 0, positives: 0, unlabelled: 0 };
    // None as soon as a stratum with traffic has none.
    let mut parts: Option<Vec<(f64, Estimate)>> = Some(Vec::with_capacity(strata.len()));
    for stratum in strata {
        let answer = stratum.cell.rate(confidence);
        all.labelled = all.labelled.saturating_add(answer.labelled);
        all.positives = all.positives.saturating_add(answer.positives);
        all.unlabelled = all.unlabelled.saturating_add(answer.unlabelled);
        if stratum.share > 0.0 {
            let (sum, rate) = (all.uncorrected_flag_rate, answer.uncorrected_flag_rate);
            all.uncorrected_flag_rate =
                sum.zip(rate).map(|(sum, rate)| (sum + stratum.share * rate).min(1.0));
            parts = parts.zip(answer.estimate).map(|(mut parts, estimate)| {
                parts.push((stratum.share, estimate));
                parts
            });
        }
    }
    all.estimate = parts.and_then(|parts| combine_estimates(&parts));
    Ok(all)
}

/// The interval of a stratified proportion from counts alone: Wilson's of each stratum, combined as [`combine`] does.
///
/// Like the stratified Wilson interval of Yan and Su (2010, Stratified Wilson and Newcombe confidence intervals for multiple
/// binomial proportions, Statistics in Biopharmaceutical Research 2, 329–335), but in closed form; the two agree where a
/// stratum has more than a handful of trials.
pub fn stratified_wilson(strata: &[Counts], confidence: Confidence) -> Result<Interval, Error> {
    check_shares(strata.iter().map(|stratum| stratum.share))?;
    let mut parts = Vec::with_capacity(strata.len());
    for stratum in strata.iter().filter(|stratum| stratum.share > 0.0) {
        check_counts(stratum.positives, stratum.trials)?;
        let rate = stratum.positives as f64 / stratum.trials as f64;
        parts.push((stratum.share, rate, score(rate, stratum.trials as f64, confidence)));
    }
    Ok(mover(parts.into_iter()).1)
}

fn combine_estimates(parts: &[(f64, Estimate)]) -> Option<Estimate> {
    let method = parts.iter().map(|(_, estimate)| estimate.method).max()?;
    let (rate, interval) =
        mover(parts.iter().map(|(share, estimate)| (*share, estimate.rate, estimate.interval)));
    let variance: f64 = parts.iter().map(|(share, estimate)| (share * estimate.standard_error).powi(2)).sum();
    let lambda: f64 = parts.iter().map(|(share, estimate)| share * estimate.lambda).sum();
    Some(Estimate { method, rate, standard_error: variance.sqrt(), interval, lambda: lambda.min(1.0) })
}

/// The rate of shares, rates and intervals, and its interval. Each distance to a bound is a root of summed squares, which is at
/// most the sum; so no bound leaves 0 to 1 but by rounding.
fn mover(parts: impl Iterator<Item = (f64, f64, Interval)>) -> (f64, Interval) {
    let (mut sum, mut below, mut above) = (0.0, 0.0, 0.0);
    for (share, rate, interval) in parts {
        sum += share * rate;
        below += (share * (rate - interval.low)).powi(2);
        above += (share * (interval.high - rate)).powi(2);
    }
    let rate = sum.clamp(0.0, 1.0);
    (rate, Interval { low: (rate - below.sqrt()).max(0.0), high: (rate + above.sqrt()).min(1.0) })
}

fn check_shares(shares: impl ExactSizeIterator<Item = f64>) -> Result<(), Error> {
    if shares.len() == 0 {
        return Err(Error::NoStrata);
    }
    if shares.len() > STRATA_MAX {
        return Err(Error::Strata(shares.len()));
    }
    let mut sum = 0.0;
    for (stratum, share) in shares.enumerate() {
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::Share { stratum, share });
        }
        sum += share;
    }
    if (sum - 1.0).abs() > SHARES_TOLERANCE { Err(Error::Shares(sum)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Method, wilson};

    fn cell(positives: u64, negatives: u64, unlabelled: u64) -> Result<Cell, Error> {
        let mut cell = Cell::default();
        for _ in 0..positives {
            cell.add_labelled(1.0, true, 1.0)?;
        }
        for _ in 0..negatives {
            cell.add_labelled(0.0, false, 1.0)?;
        }
        for record in 0..unlabelled {
            cell.add_unlabelled(if record % 4 == 0 { 1.0 } else { 0.0 }, 1.0)?;
        }
        Ok(cell)
    }

    #[test]
    fn one_stratum_is_its_cell() -> Result<(), Error> {
        let cell = cell(100, 300, 1600)?;
        assert_eq!(combine(&[Stratum { share: 1.0, cell }], Confidence::P95)?, cell.rate(Confidence::P95));
        let counts = [Counts { share: 1.0, positives: 9, trials: 300 }];
        let (got, wanted) = (stratified_wilson(&counts, Confidence::P95)?, wilson(9, 300, Confidence::P95)?);
        assert!((got.low - wanted.low).abs() < 1e-15 && (got.high - wanted.high).abs() < 1e-15, "{got:?}");
        Ok(())
    }

    #[test]
    fn the_whole_is_only_as_well_known_as_its_least_known_part() -> Result<(), Error> {
        let (known, labelled, unlabelled) = (cell(100, 300, 1600)?, cell(1, 9, 100)?, cell(0, 0, 100)?);
        let method = |first: Cell, second: Cell| -> Result<Option<Method>, Error> {
            let strata = [Stratum { share: 0.9, cell: first }, Stratum { share: 0.1, cell: second }];
            Ok(combine(&strata, Confidence::P95)?.estimate.map(|estimate| estimate.method))
        };
        assert_eq!(method(known, known)?, Some(Method::PredictionPowered));
        assert_eq!(method(known, labelled)?, Some(Method::LabelsOnly));
        assert_eq!(method(known, unlabelled)?, None);
        Ok(())
    }

    #[test]
    fn a_stratum_without_traffic_may_be_empty() -> Result<(), Error> {
        let strata =
            [Stratum { share: 1.0, cell: cell(3, 7, 0)? }, Stratum { share: 0.0, cell: Cell::default() }];
        let answer = combine(&strata, Confidence::P95)?;
        assert_eq!(answer.estimate.map(|estimate| estimate.rate), Some(0.3));
        assert_eq!(answer.uncorrected_flag_rate, Some(0.3));
        Ok(())
    }

    #[test]
    fn shares_that_are_none_are_refused() {
        let strata = |shares: &[f64]| {
            let strata: Vec<_> =
                shares.iter().map(|&share| Stratum { share, cell: Cell::default() }).collect();
            combine(&strata, Confidence::P95).map(|_| ())
        };
        assert_eq!(strata(&[]), Err(Error::NoStrata));
        assert_eq!(strata(&[0.5, 0.4]), Err(Error::Shares(0.9)));
        assert_eq!(strata(&[0.5, -0.1, 0.6]), Err(Error::Share { stratum: 1, share: -0.1 }));
        assert!(matches!(strata(&[0.5, f64::NAN]), Err(Error::Share { stratum: 1, .. })));
        assert_eq!(strata(&vec![0.0; STRATA_MAX + 1]), Err(Error::Strata(STRATA_MAX + 1)));
        assert_eq!(strata(&[0.1; 10]), Ok(()));
        assert_eq!(stratified_wilson(&[], Confidence::P95), Err(Error::NoStrata));
        assert_eq!(
            stratified_wilson(&[Counts { share: 1.0, positives: 0, trials: 0 }], Confidence::P95),
            Err(Error::NoTrials)
        );
    }

    #[test]
    fn traffic_becomes_shares() {
        assert_eq!(shares(&[1, 3]), Ok(vec![0.25, 0.75]));
        assert_eq!(shares(&[0, 0]), Err(Error::NoTraffic));
        assert_eq!(shares(&[]), Err(Error::NoStrata));
        assert_eq!(shares(&[u64::MAX, u64::MAX]), Ok(vec![0.5, 0.5]));
    }
}
