//! Sums of the verdicts and labels of one group, and the best estimate of its rate that they allow.
//!
//! Invariant: a cell is sums alone, so it is filled in one pass, in any order and in parts; two cells merged say what one cell
//! of all their records says. Where all inclusion probabilities are 1 and flags are 0 or 1, the sums are whole numbers and
//! that is so to the last bit.

use crate::Error;
use crate::interval::{Confidence, Interval, score};

/// Below this many labels a correction of the judge costs more than it gives, and its interval is not to be trusted.
pub const LABELS_MIN: u64 = 300;

/// The fewest labels of the rarer kind. A variance that was learnt from fewer is mostly chance.
pub const RARER_MIN: u64 = 10;

/// The smallest inclusion probability: a record that stands for a billion others is no sample.
pub const INCLUSION_MIN: f64 = 1e-9;

/// The most records of a kind in a cell: up to here a float counts each.
const RECORDS_MAX: u64 = 1 << 53;

/// What one judge in one version said about one group of records, and what people said about some of them.
///
/// What a caller must know:
///
/// - One judge version to a cell. A new version is a new calibration.
/// - Labels must be a *random* subset of what was judged. If people labelled what looked bad, no formula here mends that.
/// - A record is added once: labelled or unlabelled. A label without a verdict takes no part.
/// - An *inclusion probability* is the one with which the record came to be where it now is: for an unlabelled one that of being
///   audited times that of not being labelled, for a labelled one that of being audited and labelled. A factor that is the
///   same for all records of a kind may be left out. Records count by its inverse (Horvitz and Thompson 1952), and sums are
///   divided by the sum of these weights and not by a size (Hájek 1971), so the rate is of the traffic and not of the sample.
/// - Records are taken for independent. Many answers to one question that was asked again and again are not.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cell {
    labelled: Flags,
    unlabelled: Flags,
    labels: Labels,
}

/// Sums over records with weight w = 1 / inclusion probability and flag f.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Flags {
    records: u64,
    w: f64,
    wf: f64,
    wff: f64,
    ww: f64,
    wwf: f64,
    wwff: f64,
}

/// Sums over labelled records with label y, which is its own square.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Labels {
    positives: u64,
    wy: f64,
    wyf: f64,
    wwy: f64,
    wwyf: f64,
}

/// A cell as plain numbers, for who keeps or sends it. Two states are merged by adding them up, number by number.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct State {
    /// Named by [`State::COUNTS`].
    pub counts: [u64; 3],
    /// Named by [`State::SUMS`].
    pub sums: [f64; 16],
}

impl State {
    /// Names of the counts, in order.
    pub const COUNTS: [&str; 3] = ["labelled", "unlabelled", "positives"];
    /// Names of the sums, in order: w is a weight, f a flag, y a label.
    pub const SUMS: [&str; 16] = [
        "labelled_w",
        "labelled_wf",
        "labelled_wff",
        "labelled_ww",
        "labelled_wwf",
        "labelled_wwff",
        "labelled_wy",
        "labelled_wyf",
        "labelled_wwy",
        "labelled_wwyf",
        "unlabelled_w",
        "unlabelled_wf",
        "unlabelled_wff",
        "unlabelled_ww",
        "unlabelled_wwf",
        "unlabelled_wwff",
    ];
}

/// How a rate was come by, from the most to the least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    /// PPI++: the judge's flags on all records, corrected by what labels say of its errors.
    PredictionPowered,
    /// Labels alone; the judge's flags take no part.
    LabelsOnly,
}

impl Method {
    /// Its name in tables and SQL.
    pub fn name(self) -> &'static str {
        match self {
            Self::PredictionPowered => "prediction_powered",
            Self::LabelsOnly => "labels_only",
        }
    }
}

/// A rate that may be told.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// How it was come by. Of strata: the least of theirs.
    pub method: Method,
    /// The share of the traffic of which it is true.
    pub rate: f64,
    /// Of `rate`, in the same unit. 0 where all labels are alike: then only the interval tells how sure this is.
    pub standard_error: f64,
    /// Where the rate lies with the confidence asked for.
    pub interval: Interval,
    /// How far the judge was trusted, from 0 (not at all) to 1. Of strata: the mean by share.
    pub lambda: f64,
}

/// What a cell, or strata of them, can say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer {
    /// None where nothing honest can be told: without labels.
    pub estimate: Option<Estimate>,
    /// What the judge flags, by weight, and *not* the rate: it has the judge's bias, and no interval of it holds the truth.
    pub uncorrected_flag_rate: Option<f64>,
    /// n: records with verdict and label.
    pub labelled: u64,
    /// Labelled records that it is true of.
    pub positives: u64,
    /// N: records with a verdict alone.
    pub unlabelled: u64,
}

impl Cell {
    /// Adds a record that has a verdict and no label. `flag` is 0, 1 or a score between.
    pub fn add_unlabelled(&mut self, flag: f64, inclusion: f64) -> Result<(), Error> {
        let weight = weight(flag, inclusion)?;
        self.unlabelled.add(flag, weight);
        Ok(())
    }

    /// Adds a record that has a verdict and a label.
    pub fn add_labelled(&mut self, flag: f64, label: bool, inclusion: f64) -> Result<(), Error> {
        let weight = weight(flag, inclusion)?;
        self.labelled.add(flag, weight);
        if label {
            self.labels.add(flag, weight);
        }
        Ok(())
    }

    /// Adds all that another cell holds.
    pub fn merge(&mut self, other: &Self) {
        self.labelled.merge(&other.labelled);
        self.unlabelled.merge(&other.unlabelled);
        self.labels.merge(&other.labels);
    }

    /// The cell as plain numbers.
    pub fn state(&self) -> State {
        let (l, u, y) = (&self.labelled, &self.unlabelled, &self.labels);
        State {
            counts: [l.records, u.records, y.positives],
            sums: [
                l.w, l.wf, l.wff, l.ww, l.wwf, l.wwff, y.wy, y.wyf, y.wwy, y.wwyf, //
                u.w, u.wf, u.wff, u.ww, u.wwf, u.wwff,
            ],
        }
    }

    /// The cell of a state, which may come from anywhere and is checked.
    pub fn from_state(state: &State) -> Result<Self, Error> {
        check_state(state)?;
        let [labelled, unlabelled, positives] = state.counts;
        let [w, wf, wff, ww, wwf, wwff, wy, wyf, wwy, wwyf, u_w, u_wf, u_wff, u_ww, u_wwf, u_wwff] =
            state.sums;
        Ok(Self {
            labelled: Flags { records: labelled, w, wf, wff, ww, wwf, wwff },
            unlabelled: Flags {
                records: unlabelled,
                w: u_w,
                wf: u_wf,
                wff: u_wff,
                ww: u_ww,
                wwf: u_wwf,
                wwff: u_wwff,
            },
            labels: Labels { positives, wy, wyf, wwy, wwyf },
        })
    }

    /// The best that can be told: prediction-powered from [`LABELS_MIN`] labels with [`RARER_MIN`] of the rarer kind on, by
    /// labels alone from the first label on, else nothing but the flag rate.
    ///
    /// Both minima are of effective numbers, `(Σw)² / Σw²`: three hundred labels of which ten carry all the weight are ten.
    pub fn rate(&self, confidence: Confidence) -> Answer {
        let corrected = if self.is_calibrated() { self.prediction_powered(confidence) } else { None };
        Answer {
            estimate: corrected.or_else(|| self.labels_only(confidence)),
            uncorrected_flag_rate: self.uncorrected_flag_rate(),
            labelled: self.labelled.records,
            positives: self.labels.positives,
            unlabelled: self.unlabelled.records,
        }
    }

    /// PPI++ whatever the number of labels; [`Cell::rate`] is what should be published.
    ///
    /// With labels y and flags f, n labelled records L and N unlabelled ones U:
    ///
    /// - λ = clip(cov_L(y, f) / ((1 + n/N) · var_{L∪U} f), 0, 1)
    /// - rate = λ · avg_U f + avg_L(y − λf)
    /// - se² = λ² · var_U f / N + var_L(y − λf) / n
    /// - interval = Wilson's with n_eff = rate (1 − rate) / se², at most n + N, which is what a judge without fault would give
    ///
    /// Variances are divided by the number of records and not by one less. So with λ = 0 this is, to the last bit or two, the
    /// interval of labels alone. With weights, averages are Hájek's, their variances `Σw²(r − r̄)² / (Σw)²`, n and N in λ and in the
    /// bound are effective numbers, and n_eff is lowered as far as that of [`Cell::labels_only`] is. It is better to combine strata
    /// than to weight: simulated, unequal weights of one to ten took nearly all that the correction gained.
    ///
    /// None without both kinds of records, and where the estimate does not lie strictly between 0 and 1: then flags on the two
    /// kinds differ by more than one judge of one traffic could make them.
    ///
    /// Angelopoulos, Bates, Fannjiang, Jordan, Zrnic (2023), Prediction-powered inference, Science 382, 669–674. Angelopoulos, Duchi,
    /// Zrnic (2023), PPI++: Efficient prediction-powered inference, arXiv:2311.01453. The interval is ours: with rare events
    /// theirs (rate ± z·se) covers too seldom.
    pub fn prediction_powered(&self, confidence: Confidence) -> Option<Estimate> {
        if self.labelled.records == 0 || self.unlabelled.records == 0 {
            return None;
        }
        let lambda = self.lambda();
        let rate = lambda * self.unlabelled.mean() + self.residual_mean(lambda);
        if rate <= 0.0 || rate >= 1.0 {
            return None;
        }
        let variance = lambda * lambda * self.unlabelled.variance_of_mean() + self.residual_variance(lambda);
        let n_max = self.labelled.effective() + self.unlabelled.effective();
        let n = (rate * (1.0 - rate) / variance * self.discount()).min(n_max);
        Some(Estimate {
            method: Method::PredictionPowered,
            rate,
            standard_error: variance.sqrt(),
            interval: score(rate, n, confidence),
            lambda,
        })
    }

    /// The rate among labels, with Wilson's interval. With weights, n is the effective one, `rate (1 − rate) / se²`, lowered to
    /// the number of labels where it is more, as a lucky sample makes it (Korn and Graubard 1998, Confidence intervals for
    /// proportions with small expected number of positive counts estimated from survey data, Survey Methodology 24, 193–201).
    /// None without labels.
    pub fn labels_only(&self, confidence: Confidence) -> Option<Estimate> {
        if self.labelled.records == 0 {
            return None;
        }
        let rate = self.label_rate();
        let variance = self.residual_variance(0.0);
        let spread = rate * (1.0 - rate);
        // All labels alike have no variance to learn from.
        let n = if spread > 0.0 && variance > 0.0 {
            spread / variance * self.discount()
        } else {
            self.labelled.effective()
        };
        Some(Estimate {
            method: Method::LabelsOnly,
            rate,
            standard_error: variance.sqrt(),
            interval: score(rate, n.min(self.labelled.records as f64), confidence),
            lambda: 0.0,
        })
    }

    /// By how much n_eff is to be lowered: to where labels alone are worth no more than as many labels without weights. Where few
    /// records carry much weight, a sample that happens to have no positive among them has a small variance, and would be
    /// believed most when it is most wrong. Without weights this is 1.
    fn discount(&self) -> f64 {
        let rate = self.label_rate();
        let spread = rate * (1.0 - rate);
        let worth = self.labelled.records as f64 * self.residual_variance(0.0) / spread;
        // Labels that are all alike give no number here.
        if worth > 0.0 && worth < 1.0 { worth } else { 1.0 }
    }

    /// The mean of y among labels.
    fn label_rate(&self) -> f64 {
        self.residual_mean(0.0).clamp(0.0, 1.0)
    }

    /// What the judge flags among all that it judged, by weight.
    fn uncorrected_flag_rate(&self) -> Option<f64> {
        let judged = self.labelled.records > 0 || self.unlabelled.records > 0;
        judged.then(|| self.pooled(Flags::mean).clamp(0.0, 1.0))
    }

    fn is_calibrated(&self) -> bool {
        // Equal weights other than 1 give an effective 299.9999999.
        let reaches = |effective: f64, least: u64| effective >= least as f64 * (1.0 - 1e-9);
        let negative = (self.labelled.w - self.labels.wy, self.labelled.ww - self.labels.wwy);
        reaches(self.labelled.effective(), LABELS_MIN)
            && reaches(effective(self.labels.wy, self.labels.wwy), RARER_MIN)
            // The same of what is not so: a rate of 97% is as hard as one of 3%. Counted too, since a difference of sums may be
            // mostly rounding.
            && self.labelled.records - self.labels.positives >= RARER_MIN
            && reaches(effective(negative.0, negative.1), RARER_MIN)
    }

    fn lambda(&self) -> f64 {
        // Of a judge that always says the same, rounding would be all that is left.
        const NOISE: f64 = 1e-12;
        let mean = self.pooled(Flags::mean);
        let mean_square = self.pooled(|flags| flags.wff / flags.w);
        let variance = mean_square - mean * mean;
        if variance <= NOISE * mean_square {
            return 0.0;
        }
        let labelled = &self.labelled;
        let covariance = self.labels.wyf / labelled.w - self.labels.wy / labelled.w * labelled.mean();
        let ratio = labelled.effective() / self.unlabelled.effective();
        (covariance / ((1.0 + ratio) * variance)).clamp(0.0, 1.0)
    }

    /// A mean over labelled and unlabelled records together. The two kinds have weights on scales of their own, so each counts by its
    /// effective number.
    fn pooled(&self, mean: impl Fn(&Flags) -> f64) -> f64 {
        let (mut sum, mut n) = (0.0, 0.0);
        for flags in [&self.labelled, &self.unlabelled] {
            if flags.records > 0 {
                sum += flags.effective() * mean(flags);
                n += flags.effective();
            }
        }
        sum / n
    }

    /// The mean of y − λf among labels.
    fn residual_mean(&self, lambda: f64) -> f64 {
        (self.labels.wy - lambda * self.labelled.wf) / self.labelled.w
    }

    /// The variance of that mean.
    fn residual_variance(&self, lambda: f64) -> f64 {
        let (l, y) = (&self.labelled, &self.labels);
        let sum = y.wwy - lambda * l.wwf;
        let square = y.wwy - 2.0 * lambda * y.wwyf + lambda * lambda * l.wwff;
        variance_of_mean(self.residual_mean(lambda), sum, square, l.w, l.ww)
    }
}

impl Flags {
    fn add(&mut self, f: f64, w: f64) {
        self.records = self.records.saturating_add(1);
        self.w += w;
        self.wf += w * f;
        self.wff += w * f * f;
        self.ww += w * w;
        self.wwf += w * w * f;
        self.wwff += w * w * f * f;
    }

    fn merge(&mut self, other: &Self) {
        self.records = self.records.saturating_add(other.records);
        self.w += other.w;
        self.wf += other.wf;
        self.wff += other.wff;
        self.ww += other.ww;
        self.wwf += other.wwf;
        self.wwff += other.wwff;
    }

    fn mean(&self) -> f64 {
        self.wf / self.w
    }

    fn effective(&self) -> f64 {
        effective(self.w, self.ww)
    }

    fn variance_of_mean(&self) -> f64 {
        variance_of_mean(self.mean(), self.wwf, self.wwff, self.w, self.ww)
    }
}

impl Labels {
    /// Adds a positive; a negative adds nothing.
    fn add(&mut self, f: f64, w: f64) {
        self.positives = self.positives.saturating_add(1);
        self.wy += w;
        self.wyf += w * f;
        self.wwy += w * w;
        self.wwyf += w * w * f;
    }

    fn merge(&mut self, other: &Self) {
        self.positives = self.positives.saturating_add(other.positives);
        self.wy += other.wy;
        self.wyf += other.wyf;
        self.wwy += other.wwy;
        self.wwyf += other.wwyf;
    }
}

/// How many records of equal weight say as much (Kish 1965, Survey Sampling).
fn effective(w: f64, ww: f64) -> f64 {
    if ww > 0.0 { w * w / ww } else { 0.0 }
}

/// `Σw²(r − mean)² / (Σw)²`, from `sum` = Σw²r and `square` = Σw²r²; never below 0 by rounding.
fn variance_of_mean(mean: f64, sum: f64, square: f64, w: f64, ww: f64) -> f64 {
    ((square - 2.0 * mean * sum + mean * mean * ww) / (w * w)).max(0.0)
}

fn weight(flag: f64, inclusion: f64) -> Result<f64, Error> {
    if !(0.0..=1.0).contains(&flag) {
        return Err(Error::Flag(flag));
    }
    if !(INCLUSION_MIN..=1.0).contains(&inclusion) {
        return Err(Error::Inclusion(inclusion));
    }
    Ok(1.0 / inclusion)
}

/// Refuses what would give NaN or a rate outside of 0 to 1: every sum has a mass that it cannot exceed.
fn check_state(state: &State) -> Result<(), Error> {
    /// For sums in another order.
    const ROUNDING: f64 = 1.0 + 1e-6;
    const LABELLED_W: usize = 0;
    const LABELLED_WW: usize = 3;
    const UNLABELLED_W: usize = 10;
    const UNLABELLED_WW: usize = 13;
    /// For each sum, the one that bounds it.
    const MASS: [usize; 16] = [
        LABELLED_W,
        LABELLED_W,
        LABELLED_W,
        LABELLED_WW,
        LABELLED_WW,
        LABELLED_WW,
        LABELLED_W,
        LABELLED_W,
        LABELLED_WW,
        LABELLED_WW,
        UNLABELLED_W,
        UNLABELLED_W,
        UNLABELLED_W,
        UNLABELLED_WW,
        UNLABELLED_WW,
        UNLABELLED_WW,
    ];

    let [labelled, unlabelled, positives] = state.counts;
    for (field, count, most) in [
        ("labelled", labelled, RECORDS_MAX),
        ("unlabelled", unlabelled, RECORDS_MAX),
        ("positives", positives, labelled),
    ] {
        if count > most {
            return Err(Error::State { field, value: count as f64 });
        }
    }
    for (index, (&field, &value)) in State::SUMS.iter().zip(&state.sums).enumerate() {
        let mass = MASS[index];
        let records = if mass < UNLABELLED_W { labelled as f64 } else { unlabelled as f64 };
        let (least, most) = match index {
            LABELLED_W | UNLABELLED_W => (records, records / INCLUSION_MIN),
            LABELLED_WW | UNLABELLED_WW => (records, records / INCLUSION_MIN / INCLUSION_MIN),
            _ => (0.0, state.sums[mass]),
        };
        if !(least / ROUNDING..=most * ROUNDING).contains(&value) {
            return Err(Error::State { field, value });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cell of counts: (flag, label, how many) and (flag, how many).
    fn cell(labelled: &[(f64, bool, u64)], unlabelled: &[(f64, u64)]) -> Result<Cell, Error> {
        let mut cell = Cell::default();
        for &(flag, label, count) in labelled {
            for _ in 0..count {
                cell.add_labelled(flag, label, 1.0)?;
            }
        }
        for &(flag, count) in unlabelled {
            for _ in 0..count {
                cell.add_unlabelled(flag, 1.0)?;
            }
        }
        Ok(cell)
    }

    #[track_caller]
    fn close(got: f64, wanted: f64) {
        assert!((got - wanted).abs() <= 1e-12, "{got} and not {wanted}");
    }

    #[test]
    fn three_hundred_labels_with_ten_of_the_rarer_kind_correct_the_judge() -> Result<(), Error> {
        let method = |positives: u64, negatives: u64| -> Result<Option<Method>, Error> {
            let cell = cell(&[(1.0, true, positives), (0.0, false, negatives)], &[(0.0, 900), (1.0, 100)])?;
            Ok(cell.rate(Confidence::P95).estimate.map(|estimate| estimate.method))
        };
        assert_eq!(method(10, 290)?, Some(Method::PredictionPowered));
        assert_eq!(method(290, 10)?, Some(Method::PredictionPowered));
        assert_eq!(method(10, 289)?, Some(Method::LabelsOnly));
        assert_eq!(method(9, 291)?, Some(Method::LabelsOnly));
        assert_eq!(method(291, 9)?, Some(Method::LabelsOnly));
        assert_eq!(method(0, 1)?, Some(Method::LabelsOnly));
        assert_eq!(method(0, 0)?, None);
        Ok(())
    }

    #[test]
    fn without_labels_there_is_a_flag_rate_and_no_estimate() -> Result<(), Error> {
        let answer = cell(&[], &[(0.0, 504), (1.0, 496)])?.rate(Confidence::P95);
        assert_eq!((answer.estimate, answer.uncorrected_flag_rate), (None, Some(0.496)));
        let answer = Cell::default().rate(Confidence::P95);
        assert_eq!((answer.estimate, answer.uncorrected_flag_rate), (None, None));
        Ok(())
    }

    #[test]
    fn three_hundred_labels_of_which_few_carry_the_weight_are_few() -> Result<(), Error> {
        let mut cell = cell(&[(1.0, true, 100), (0.0, false, 195)], &[(0.0, 900), (1.0, 100)])?;
        for _ in 0..5 {
            cell.add_labelled(1.0, true, 0.001)?;
        }
        let estimate = cell.rate(Confidence::P95).estimate.expect("there are labels");
        assert_eq!(estimate.method, Method::LabelsOnly);
        assert!(estimate.interval.width() > 0.05, "{estimate:?}");
        Ok(())
    }

    #[test]
    fn a_judge_that_always_says_the_same_is_not_trusted() -> Result<(), Error> {
        for flag in [0.0, 0.3, 1.0] {
            let cell = cell(&[(flag, true, 124), (flag, false, 176)], &[(flag, 1700)])?;
            let estimate = cell.rate(Confidence::P95).estimate.expect("there are labels");
            assert_eq!((estimate.method, estimate.lambda), (Method::PredictionPowered, 0.0));
            let labels = crate::wilson(124, 300, Confidence::P95)?;
            close(estimate.interval.low, labels.low);
            close(estimate.interval.high, labels.high);
        }
        Ok(())
    }

    #[test]
    fn a_constant_score_is_not_trusted_for_its_rounding() -> Result<(), Error> {
        for flag in (1..100_u32).map(|percent| f64::from(percent) / 100.0) {
            let mut cell = Cell::default();
            for record in 0..2000_u32 {
                let inclusion = 1.0 / (1.1 + f64::from(record % 7));
                if record < 300 {
                    cell.add_labelled(flag, record % 3 == 0, inclusion)?;
                } else {
                    cell.add_unlabelled(flag, inclusion)?;
                }
            }
            let estimate = cell.prediction_powered(Confidence::P95).expect("both kinds are there");
            assert_eq!(estimate.lambda, 0.0, "{flag}");
        }
        Ok(())
    }

    #[test]
    fn weights_make_no_more_of_labels_than_they_are() -> Result<(), Error> {
        let mut cell = cell(&[(1.0, true, 150)], &[(1.0, 1700)])?;
        for _ in 0..150 {
            cell.add_labelled(1.0, false, 0.5)?;
        }
        // rate (1 − rate) / se² is 337.5 here.
        let wanted = crate::wilson_of_rate(1.0 / 3.0, 300.0, Confidence::P95)?;
        for estimate in [cell.labels_only(Confidence::P95), cell.prediction_powered(Confidence::P95)] {
            let interval = estimate.expect("both kinds are there").interval;
            close(interval.low, wanted.low);
            close(interval.high, wanted.high);
        }
        Ok(())
    }

    #[test]
    fn no_correction_is_worth_more_than_labels_on_all_records() -> Result<(), Error> {
        // The judge never erred where it was seen, and never committed itself elsewhere: the formula's se is 0.
        let cell = cell(&[(1.0, true, 150), (0.0, false, 150)], &[(0.5, 300)])?;
        let estimate = cell.rate(Confidence::P95).estimate.expect("there are labels");
        assert_eq!((estimate.method, estimate.standard_error), (Method::PredictionPowered, 0.0));
        close(estimate.interval.width(), crate::wilson(300, 600, Confidence::P95)?.width());
        Ok(())
    }

    #[test]
    fn twelve_of_the_rarer_kind_of_which_one_has_the_weight_are_too_few() -> Result<(), Error> {
        let mut cell = cell(&[(1.0, true, 11), (0.0, false, 1000)], &[(0.0, 900), (1.0, 100)])?;
        let method = |cell: &Cell| cell.rate(Confidence::P95).estimate.map(|estimate| estimate.method);
        assert_eq!(method(&cell), Some(Method::PredictionPowered));
        cell.add_labelled(1.0, true, 0.2)?;
        assert_eq!(method(&cell), Some(Method::LabelsOnly));

        let mut turned = self::cell(&[(0.0, false, 11), (1.0, true, 1000)], &[(0.0, 100), (1.0, 900)])?;
        turned.add_labelled(0.0, false, 0.2)?;
        assert_eq!(method(&turned), Some(Method::LabelsOnly));
        Ok(())
    }

    #[test]
    fn labels_that_are_all_alike_have_an_interval() -> Result<(), Error> {
        for (label, rate) in [(false, 0.0), (true, 1.0)] {
            let estimate = cell(&[(1.0, label, 300)], &[(1.0, 1700)])?.rate(Confidence::P95).estimate;
            let estimate = estimate.expect("there are labels");
            assert_eq!(
                (estimate.method, estimate.rate, estimate.standard_error),
                (Method::LabelsOnly, rate, 0.0)
            );
            close(estimate.interval.width(), crate::wilson(0, 300, Confidence::P95)?.width());
        }
        Ok(())
    }

    #[test]
    fn where_all_that_was_judged_is_labelled_the_labels_speak() -> Result<(), Error> {
        let cell = cell(&[(1.0, true, 100), (0.0, false, 300)], &[])?;
        let estimate = cell.rate(Confidence::P95).estimate.expect("there are labels");
        assert_eq!((estimate.method, estimate.rate), (Method::LabelsOnly, 0.25));
        Ok(())
    }

    #[test]
    fn flags_that_no_one_judge_could_give_leave_the_labels() -> Result<(), Error> {
        // Everything labelled was flagged, nothing else was: the correction would give a rate below 0.
        let cell = cell(&[(1.0, true, 30), (0.9, false, 270)], &[(0.0, 30)])?;
        let answer = cell.rate(Confidence::P95);
        let estimate = answer.estimate.expect("there are labels");
        assert!(0.0 <= estimate.interval.low && estimate.interval.high <= 1.0, "{estimate:?}");
        Ok(())
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let mut cell = Cell::default();
        for flag in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
            assert!(matches!(cell.add_unlabelled(flag, 1.0), Err(Error::Flag(_))), "{flag}");
            assert!(matches!(cell.add_labelled(flag, true, 1.0), Err(Error::Flag(_))), "{flag}");
        }
        for inclusion in [0.0, -1.0, 1.1, 1e-10, f64::NAN, f64::INFINITY] {
            assert!(matches!(cell.add_unlabelled(1.0, inclusion), Err(Error::Inclusion(_))), "{inclusion}");
            assert!(
                matches!(cell.add_labelled(1.0, true, inclusion), Err(Error::Inclusion(_))),
                "{inclusion}"
            );
        }
        assert_eq!(cell, Cell::default(), "what is refused leaves nothing behind");
    }

    #[test]
    fn a_state_that_no_cell_had_is_refused() -> Result<(), Error> {
        let good = cell(&[(1.0, true, 3), (0.5, false, 4)], &[(0.0, 5), (1.0, 1)])?.state();
        Cell::from_state(&good)?;
        for index in 0..State::SUMS.len() {
            for value in [f64::NAN, f64::INFINITY, -1.0, 1e20] {
                let mut bad = good;
                bad.sums[index] = value;
                assert!(Cell::from_state(&bad).is_err(), "{} = {value}", State::SUMS[index]);
            }
        }
        for (index, value) in [(0, 0), (1, 1 << 60), (2, 8)] {
            let mut bad = good;
            bad.counts[index] = value;
            assert!(Cell::from_state(&bad).is_err(), "{} = {value}", State::COUNTS[index]);
        }
        Ok(())
    }
}
