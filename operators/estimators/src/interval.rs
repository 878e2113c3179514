//! Intervals of one rate from counts: Wilson's, which covers its confidence on average, and Clopper and Pearson's, which covers at
//! least that always and is wider.
//!
//! Invariant: an interval lies within 0 to 1 and holds the rate that it is of.

use crate::Error;
use crate::special::{beta_quantile, normal_quantile};

/// The most trials an interval is made of. Beyond, nothing is tested, and nothing audits a billion answers.
pub const TRIALS_MAX: u64 = 1_000_000_000;

/// How often an interval is to hold the truth, strictly between 0 and 1.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Confidence(f64);

impl Confidence {
    /// What is usual.
    pub const P95: Self = Self(0.95);

    /// A fraction, such as 0.95; not percent.
    pub fn new(confidence: f64) -> Result<Self, Error> {
        if confidence > 0.0 && confidence < 1.0 {
            Ok(Self(confidence))
        } else {
            Err(Error::Confidence(confidence))
        }
    }

    /// The fraction.
    pub fn get(self) -> f64 {
        self.0
    }

    /// How many standard errors to either side.
    pub(crate) fn z(self) -> f64 {
        // From the lower tail: (1 + confidence) / 2 may round to 1, whose quantile is infinite.
        -normal_quantile((1.0 - self.0) / 2.0)
    }
}

/// Two bounds of a rate, both included.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// At least.
    pub low: f64,
    /// At most.
    pub high: f64,
}

impl Interval {
    /// How far the bounds are apart.
    pub fn width(&self) -> f64 {
        self.high - self.low
    }

    /// Whether a rate lies within.
    pub fn contains(&self, rate: f64) -> bool {
        self.low <= rate && rate <= self.high
    }
}

/// Wilson's score interval of `positives` in `trials` that are independent and alike.
///
/// With p = positives / trials and z of the confidence:
/// `(p + z²/2n ± z·sqrt(p(1 − p)/n + z²/4n²)) / (1 + z²/n)`.
///
/// Its coverage is the confidence on average over rates; at a given rate it swings by a percent or two at a few hundred trials.
///
/// Wilson, E. B. (1927), Probable inference, the law of succession, and statistical inference, JASA 22, 209–212.
///
/// ```
/// let hits = forebay_estimators::wilson(9, 300, forebay_estimators::Confidence::P95)?;
/// assert!(hits.contains(0.03) && hits.low > 0.0158 && hits.high < 0.0561);
/// # Ok::<(), forebay_estimators::Error>(())
/// ```
pub fn wilson(positives: u64, trials: u64, confidence: Confidence) -> Result<Interval, Error> {
    check_counts(positives, trials)?;
    Ok(score(positives as f64 / trials as f64, trials as f64, confidence))
}

/// Wilson's interval of a rate whose standard error is that of `n_effective` independent trials: `rate (1 − rate) / se²`.
///
/// For estimates that are no plain counts, as weighted and prediction-powered ones.
pub fn wilson_of_rate(rate: f64, n_effective: f64, confidence: Confidence) -> Result<Interval, Error> {
    if !(0.0..=1.0).contains(&rate) {
        return Err(Error::Rate(rate));
    }
    if !(n_effective > 0.0 && n_effective.is_finite()) {
        return Err(Error::SampleSize(n_effective));
    }
    Ok(score(rate, n_effective, confidence))
}

/// [`wilson_of_rate`] of numbers that are known to be good. It divides by n and never by n_effective / z², so that a sample of
/// nearly nothing gives 0 to 1 and no overflow.
pub(crate) fn score(rate: f64, n: f64, confidence: Confidence) -> Interval {
    let zz = confidence.z().powi(2);
    let centre = (n * rate + zz / 2.0) / (n + zz);
    let half = (zz * (n * rate * (1.0 - rate) + zz / 4.0)).sqrt() / (n + zz);
    // At 0 and 1 one bound is the rate itself, and rounding must not move it past.
    Interval { low: (centre - half).clamp(0.0, rate), high: (centre + half).clamp(rate, 1.0) }
}

/// The exact interval of `positives` in `trials`: it covers at least its confidence at every rate, and is wider than Wilson's.
///
/// From the `(1 − confidence)/2` quantile of beta(k, n − k + 1) to the `(1 + confidence)/2` quantile of beta(k + 1, n − k).
///
/// Bounds are right to ten digits up to a million trials, and to seven at [`TRIALS_MAX`].
///
/// Clopper, C. J. and Pearson, E. S. (1934), The use of confidence or fiducial limits illustrated in the case of the binomial,
/// Biometrika 26, 404–413.
pub fn clopper_pearson(positives: u64, trials: u64, confidence: Confidence) -> Result<Interval, Error> {
    check_counts(positives, trials)?;
    Ok(Interval {
        low: exact_lower(positives, trials, (1.0 - confidence.0) / 2.0),
        high: exact_upper(positives, trials, (1.0 + confidence.0) / 2.0),
    })
}

/// The exact one-sided upper bound: the rate above which so few `positives` in `trials` would come with a probability below
/// `1 − confidence`. The quantile `confidence` of beta(k + 1, n − k); with no positives `1 − (1 − confidence)^(1/n)`.
pub fn clopper_pearson_upper(positives: u64, trials: u64, confidence: Confidence) -> Result<f64, Error> {
    check_counts(positives, trials)?;
    Ok(exact_upper(positives, trials, confidence.0))
}

/// The most that the rate of false hits of a cache may be, by what its shadow audit compared: [`clopper_pearson_upper`].
///
/// The audited hits must have been drawn with one probability. Where an entry's first hits are all audited and later ones seldom,
/// each of the two kinds has a bound of its own.
///
/// ```
/// let bound = forebay_estimators::false_hit_bound(0, 299, forebay_estimators::Confidence::P95)?;
/// assert!(bound < 0.01);
/// # Ok::<(), forebay_estimators::Error>(())
/// ```
pub fn false_hit_bound(false_hits: u64, audited_hits: u64, confidence: Confidence) -> Result<f64, Error> {
    clopper_pearson_upper(false_hits, audited_hits, confidence)
}

fn exact_lower(positives: u64, trials: u64, p: f64) -> f64 {
    if positives == 0 {
        return 0.0;
    }
    beta_quantile(p, positives as f64, (trials - positives) as f64 + 1.0)
}

fn exact_upper(positives: u64, trials: u64, p: f64) -> f64 {
    if positives == trials {
        return 1.0;
    }
    beta_quantile(p, positives as f64 + 1.0, (trials - positives) as f64)
}

pub(crate) fn check_counts(positives: u64, trials: u64) -> Result<(), Error> {
    if trials == 0 {
        return Err(Error::NoTrials);
    }
    if trials > TRIALS_MAX {
        return Err(Error::Trials(trials));
    }
    if positives > trials {
        return Err(Error::Positives { positives, trials });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(got: f64, wanted: f64, relative: f64) {
        assert!((got - wanted).abs() <= relative * wanted.abs(), "{got:e} and not {wanted:e}");
    }

    /// SciPy 1.17.1: `scipy.stats.binomtest(k, n).proportion_ci(confidence, "wilson")`.
    #[test]
    fn wilson_is_that_of_scipy() -> Result<(), Error> {
        for (positives, trials, confidence, low, high) in [
            (0, 10, 0.95, 0.0, 0.277_532_799_862_889_26),
            (1, 10, 0.95, 0.017_876_213_095_072_896, 0.404_150_026_795_238_5),
            (5, 10, 0.95, 0.236_593_090_512_564, 0.763_406_909_487_436_1),
            (9, 300, 0.95, 0.015_861_853_809_432_31, 0.056_022_539_141_640_96),
            (10, 10, 0.95, 0.722_467_200_137_110_7, 1.0),
            (124, 300, 0.95, 0.359_048_730_169_091_8, 0.469_809_384_843_162_9),
            (992, 2000, 0.99, 0.467_263_146_301_153_3, 0.524_763_305_532_659_7),
        ] {
            let interval = wilson(positives, trials, Confidence::new(confidence)?)?;
            check(interval.low, low, 1e-12);
            check(interval.high, high, 1e-12);
        }
        Ok(())
    }

    /// Newcombe (1998), Two-sided confidence intervals for the single proportion, table I, method 3, to its four digits.
    #[test]
    fn wilson_is_that_of_newcombe() -> Result<(), Error> {
        for (positives, trials, low, high) in [
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ] {
            let interval = wilson(positives, trials, Confidence::P95)?;
            assert!(
                (interval.low - low).abs() < 5.1e-5 && (interval.high - high).abs() < 5.1e-5,
                "{interval:?}"
            );
        }
        Ok(())
    }

    /// SciPy 1.17.1: `scipy.special.betaincinv(k, n - k + 1, (1 - c) / 2)`, `betaincinv(k + 1, n - k, 1 - (1 - c) / 2)` and
    /// `betaincinv(k + 1, n - k, c)`.
    #[test]
    fn clopper_pearson_is_that_of_scipy() -> Result<(), Error> {
        for (positives, trials, confidence, low, high, upper) in [
            (0, 299, 0.95, 0.0, 0.012_261_595_907_535_044, 0.009_969_146_792_899_269),
            (1, 299, 0.95, 8.467_135_826_945_905e-5, 0.018_492_424_310_645_22, 0.015_766_783_127_611_372),
            (0, 1, 0.95, 0.0, 0.975, 0.95),
            (1, 1, 0.95, 0.025, 1.0, 1.0),
            (5, 10, 0.95, 0.187_086_028_447_398_55, 0.812_913_971_552_601_5, 0.777_558_898_991_870_6),
            (3, 10, 0.95, 0.066_739_511_177_734_5, 0.652_452_850_059_997_3, 0.606_624_216_105_412_3),
            (9, 300, 0.95, 0.013_807_819_555_525_978, 0.056_183_548_241_615_776, 0.051_766_061_899_499_98),
            (300, 300, 0.95, 0.987_779_025_305_706_5, 1.0, 1.0),
            (123, 2000, 0.99, 0.048_471_430_384_031_9, 0.076_662_955_424_136_63, 0.075_140_339_439_544_4),
            (
                10,
                1_000_000,
                0.95,
                4.795_398_777_545_601e-6,
                1.839_027_889_123_853_2e-5,
                1.696_216_018_828_160_3e-5,
            ),
            (
                1_000_000,
                TRIALS_MAX,
                0.95,
                9.980_419_606_762_322e-4,
                1.001_960_928_819_794e-3,
                1.001_645_597_995_170_5e-3,
            ),
            (0, TRIALS_MAX, 0.95, 0.0, 3.688_879_447_310_019_4e-9, 2.995_732_269_066_784_3e-9),
            (
                1,
                TRIALS_MAX,
                0.95,
                2.531_780_798_396_94e-11,
                5.571_643_429_123_389e-9,
                4.743_864_490_591_013e-9,
            ),
            (
                500_000_000,
                TRIALS_MAX,
                0.9,
                0.499_973_992_080_630_37,
                0.500_026_007_919_369_7,
                0.500_020_263_609_417,
            ),
        ] {
            let confidence = Confidence::new(confidence)?;
            let relative = if trials > 1_000_000 { 1e-7 } else { 1e-10 };
            let interval = clopper_pearson(positives, trials, confidence)?;
            check(interval.low, low, relative);
            check(interval.high, high, relative);
            check(clopper_pearson_upper(positives, trials, confidence)?, upper, relative);
        }
        Ok(())
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for confidence in [0.0, 1.0, -0.1, 95.0, f64::NAN, f64::INFINITY] {
            assert!(matches!(Confidence::new(confidence), Err(Error::Confidence(_))), "{confidence}");
        }
        assert_eq!(wilson(0, 0, Confidence::P95), Err(Error::NoTrials));
        assert_eq!(wilson(3, 2, Confidence::P95), Err(Error::Positives { positives: 3, trials: 2 }));
        assert_eq!(clopper_pearson(3, 2, Confidence::P95), Err(Error::Positives { positives: 3, trials: 2 }));
        assert_eq!(false_hit_bound(0, 0, Confidence::P95), Err(Error::NoTrials));
        assert_eq!(wilson(0, TRIALS_MAX + 1, Confidence::P95), Err(Error::Trials(TRIALS_MAX + 1)));
        assert_eq!(wilson_of_rate(1.1, 10.0, Confidence::P95), Err(Error::Rate(1.1)));
        assert_eq!(wilson_of_rate(0.1, 0.0, Confidence::P95), Err(Error::SampleSize(0.0)));
        assert!(matches!(wilson_of_rate(f64::NAN, 10.0, Confidence::P95), Err(Error::Rate(_))));
        assert!(matches!(wilson_of_rate(0.1, f64::NAN, Confidence::P95), Err(Error::SampleSize(_))));
    }

    #[test]
    fn the_most_extreme_confidence_still_gives_numbers() -> Result<(), Error> {
        for confidence in [f64::MIN_POSITIVE, 1.0 - f64::EPSILON / 2.0] {
            for (positives, trials) in [(0, 1), (1, 1), (1, 2), (3, TRIALS_MAX)] {
                let confidence = Confidence::new(confidence)?;
                for interval in
                    [wilson(positives, trials, confidence)?, clopper_pearson(positives, trials, confidence)?]
                {
                    assert!(
                        0.0 <= interval.low && interval.low <= interval.high && interval.high <= 1.0,
                        "{interval:?}"
                    );
                }
            }
        }
        Ok(())
    }
}
