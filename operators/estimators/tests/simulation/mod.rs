//! Traffic of which the truth is known, judged and labelled at random, again and again: how often do the intervals hold it?
//!
//! Invariant: a scenario and a number of runs give the same table on every machine; the only randomness is a generator with a
//! fixed seed.

use std::fmt;

use forebay_estimators::{
    Cell, Confidence, Counts, Error, Estimate, Interval, Method, Stratum, combine, stratified_wilson, wilson,
    wilson_of_rate,
};

/// Part of the traffic. The judge flags what is true with `sensitivity`, and all else with `false_alarms`.
#[derive(Clone, Copy)]
pub struct Part {
    pub share: f64,
    pub prevalence: f64,
    pub sensitivity: f64,
    pub false_alarms: f64,
    pub judged: u64,
    pub labelled: u64,
    /// The probability with which a record of it is judged, in scenarios that are not stratified.
    pub inclusion: f64,
}

/// What is simulated.
pub struct Scenario {
    name: &'static str,
    parts: Vec<Part>,
    /// Each part is a stratum with sizes of its own. Else parts are mixed in one cell, of `judged` and `labelled` records in all, by
    /// share and inclusion, and the estimator has to mend that by weights.
    stratified: bool,
    /// What the published intervals must cover at least, but for chance.
    coverage_min: f64,
}

impl Scenario {
    fn simple(
        name: &'static str,
        judged: u64,
        labelled: u64,
        prevalence: f64,
        sensitivity: f64,
        flagged: f64,
    ) -> Self {
        let false_alarms = (flagged - prevalence * sensitivity) / (1.0 - prevalence);
        assert!((0.0..=1.0).contains(&false_alarms), "{name}: no judge flags {flagged} so");
        let part =
            Part { share: 1.0, prevalence, sensitivity, false_alarms, judged, labelled, inclusion: 1.0 };
        Self { name, parts: vec![part], stratified: false, coverage_min: 0.94 }
    }

    pub fn all() -> Vec<Self> {
        let part = |share, prevalence, judged, labelled, inclusion| Part {
            share,
            prevalence,
            sensitivity: 0.8,
            false_alarms: 0.1,
            judged,
            labelled,
            inclusion,
        };
        vec![
            Self::simple("200 labels of 2,000, truth 41.2%, judge 49.6%", 2000, 200, 0.412, 0.85, 0.496),
            Self::simple("300 labels of 2,000, truth 41.2%, judge 49.2%", 2000, 300, 0.412, 0.85, 0.492),
            Self::simple("300 labels of 2,000, truth 3%, judge 11%", 2000, 300, 0.03, 0.8, 0.11),
            Self::simple("300 labels of 10,000, truth 3%, judge 11%", 10_000, 300, 0.03, 0.8, 0.11),
            Self::simple("300 labels of 2,000, truth 3%, judge 3%", 2000, 300, 0.03, 0.8, 0.03),
            Self::simple("200 labels of 2,000, truth 3%, judge 11%", 2000, 200, 0.03, 0.8, 0.11),
            Self::simple("300 labels of 2,000, truth 97%, judge 89%", 2000, 300, 0.97, 0.915, 0.89),
            Self {
                name: "400 labels of 2,000, a tenth judged ten times as often",
                parts: vec![part(0.1, 0.3, 2000, 400, 0.5), part(0.9, 0.02, 2000, 400, 0.05)],
                stratified: false,
                coverage_min: 0.94,
            },
            Self {
                name: "600 labels of 3,000, a tenth judged ten times as often",
                parts: vec![part(0.1, 0.3, 3000, 600, 0.5), part(0.9, 0.02, 3000, 600, 0.05)],
                stratified: false,
                coverage_min: 0.94,
            },
            Self {
                name: "4 strata, 300 labels of 1,500 each",
                parts: vec![
                    part(0.1, 0.4, 1500, 300, 1.0),
                    part(0.2, 0.2, 1500, 300, 1.0),
                    part(0.3, 0.1, 1500, 300, 1.0),
                    part(0.4, 0.05, 1500, 300, 1.0),
                ],
                stratified: true,
                coverage_min: 0.94,
            },
            Self {
                name: "6 strata, 400 labels in all, 20 in the large rare one",
                parts: vec![
                    part(0.05, 0.4, 500, 100, 1.0),
                    part(0.05, 0.3, 500, 100, 1.0),
                    part(0.1, 0.1, 400, 80, 1.0),
                    part(0.1, 0.05, 300, 60, 1.0),
                    part(0.2, 0.05, 200, 40, 1.0),
                    part(0.5, 0.03, 100, 20, 1.0),
                ],
                stratified: true,
                // Of 20 labels at 3%, each tenth sample has two positives: too many to be believed, too few to be sure.
                coverage_min: 0.93,
            },
        ]
    }

    fn truth(&self) -> f64 {
        self.parts.iter().map(|part| part.share * part.prevalence).sum()
    }

    /// What the judge flags of all traffic.
    fn flag_rate(&self) -> f64 {
        let flagged =
            |part: &Part| part.prevalence * part.sensitivity + (1.0 - part.prevalence) * part.false_alarms;
        self.parts.iter().map(|part| part.share * flagged(part)).sum()
    }

    /// Fails where what is published holds the truth too seldom, or where what is said of the others is not so.
    #[track_caller]
    pub fn check(&self, report: &Report) {
        let least = self.coverage_min;
        let chance = 3.0 * (least * (1.0 - least) / f64::from(report.runs)).sqrt();
        assert!(report.published.rate() >= least - chance, "{report}");
        if (self.flag_rate() - self.truth()).abs() > 0.05 {
            assert!(report.naive.rate() < 0.01, "{report}");
        }
        if !self.stratified {
            assert!(report.corrected.width() < report.labels.width(), "{report}");
        }
    }

    pub fn simulate(&self, runs: u32) -> Result<Report, Error> {
        let mut random = Random(0x00f0_2eba_4000);
        let mut report = Report { name: self.name, runs, ..Report::default() };
        let truth = self.truth();
        for _ in 0..runs {
            if self.stratified {
                self.stratified_run(&mut random, truth, &mut report)?;
            } else {
                self.mixed_run(&mut random, truth, &mut report)?;
            }
        }
        Ok(report)
    }

    fn mixed_run(&self, random: &mut Random, truth: f64, report: &mut Report) -> Result<(), Error> {
        let mass: f64 = self.parts.iter().map(|part| part.share * part.inclusion).sum();
        let first = &self.parts[0];
        let (mut cell, mut flagged, mut positives) = (Cell::default(), 0, 0);
        for record in 0..first.judged {
            let mut place = random.fraction() * mass;
            let part = self
                .parts
                .iter()
                .find(|part| {
                    place -= part.share * part.inclusion;
                    place < 0.0
                })
                .unwrap_or(first);
            let labelled = record < first.labelled;
            let (label, flag) = part.record(&mut cell, random, labelled)?;
            flagged += u64::from(flag);
            positives += u64::from(label && labelled);
        }
        report.naive.add(wilson(flagged, first.judged, Confidence::P95)?, truth);
        report.unweighted.add(wilson(positives, first.labelled, Confidence::P95)?, truth);
        report.labels.add_estimate(cell.labels_only(Confidence::P95), truth);
        report.corrected.add_estimate(cell.prediction_powered(Confidence::P95), truth);
        report.wald.add_estimate(cell.prediction_powered(Confidence::P95).map(wald), truth);
        report.published(cell.rate(Confidence::P95).estimate, truth);
        Ok(())
    }

    fn stratified_run(&self, random: &mut Random, truth: f64, report: &mut Report) -> Result<(), Error> {
        let (mut strata, mut counts) = (Vec::new(), Vec::new());
        let (mut labels, mut positives) = (0, 0);
        for part in &self.parts {
            let mut cell = Cell::default();
            for record in 0..part.judged {
                part.record(&mut cell, random, record < part.labelled)?;
            }
            let [n, _, y] = cell.state().counts;
            (labels, positives) = (labels + n, positives + y);
            strata.push(Stratum { share: part.share, cell });
            counts.push(Counts { share: part.share, positives: y, trials: n });
        }
        let answer = combine(&strata, Confidence::P95)?;
        let judged = labels + answer.unlabelled;
        let naive = answer.uncorrected_flag_rate.unwrap_or_default();
        report.naive.add(wilson_of_rate(naive, judged as f64, Confidence::P95)?, truth);
        report.unweighted.add(wilson(positives, labels, Confidence::P95)?, truth);
        report.labels.add(stratified_wilson(&counts, Confidence::P95)?, truth);
        if let Some(estimate) = answer.estimate {
            report.summed.add(summed(&estimate)?, truth);
        }
        report.published(answer.estimate, truth);
        Ok(())
    }
}

impl Part {
    /// Judges one record into the cell, and labels it or not. What was true, and what the judge said.
    fn record(&self, cell: &mut Cell, random: &mut Random, labelled: bool) -> Result<(bool, bool), Error> {
        let label = random.fraction() < self.prevalence;
        let flag = random.fraction() < if label { self.sensitivity } else { self.false_alarms };
        let value = if flag { 1.0 } else { 0.0 };
        if labelled {
            cell.add_labelled(value, label, self.inclusion)?;
        } else {
            cell.add_unlabelled(value, self.inclusion)?;
        }
        Ok((label, flag))
    }
}

/// What the papers use: rate ± z·se.
fn wald(mut estimate: Estimate) -> Estimate {
    let half = 1.959_963_984_540_054 * estimate.standard_error;
    estimate.interval = Interval { low: estimate.rate - half, high: estimate.rate + half };
    estimate
}

/// The other way to combine strata: Wilson's interval with one n_eff from the summed variances.
fn summed(estimate: &Estimate) -> Result<Interval, Error> {
    let n = estimate.rate * (1.0 - estimate.rate) / estimate.standard_error.powi(2);
    if n.is_finite() {
        wilson_of_rate(estimate.rate, n, Confidence::P95)
    } else {
        Ok(Interval { low: 0.0, high: 1.0 })
    }
}

/// How the intervals of one kind did.
#[derive(Default)]
pub struct Coverage {
    runs: u32,
    covered: u32,
    width: f64,
}

impl Coverage {
    fn add(&mut self, interval: Interval, truth: f64) {
        self.runs += 1;
        self.covered += u32::from(interval.contains(truth));
        self.width += interval.width();
    }

    fn add_estimate(&mut self, estimate: Option<Estimate>, truth: f64) {
        if let Some(estimate) = estimate {
            self.add(estimate.interval, truth);
        }
    }

    /// The share of intervals that held the truth.
    pub fn rate(&self) -> f64 {
        f64::from(self.covered) / f64::from(self.runs)
    }

    /// Their mean width.
    pub fn width(&self) -> f64 {
        self.width / f64::from(self.runs)
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.runs == 0 {
            write!(f, "{:>15}", "")
        } else {
            write!(f, "{:.4} / {:.4}", self.rate(), self.width())
        }
    }
}

/// One line of the table.
#[derive(Default)]
pub struct Report {
    pub name: &'static str,
    pub runs: u32,
    /// Of the flag rate.
    pub naive: Coverage,
    /// Of labels, with weights and strata ignored.
    pub unweighted: Coverage,
    /// Of labels alone.
    pub labels: Coverage,
    /// PPI++ in every run, however few the labels.
    pub corrected: Coverage,
    /// The same with rate ± z·se.
    pub wald: Coverage,
    /// Strata by one n_eff.
    pub summed: Coverage,
    /// What `rate` and `combine` say.
    pub published: Coverage,
    /// How often that was prediction-powered.
    pub powered: u32,
}

impl Report {
    fn published(&mut self, estimate: Option<Estimate>, truth: f64) {
        self.published.add_estimate(estimate, truth);
        let powered = estimate.is_some_and(|estimate| estimate.method == Method::PredictionPowered);
        self.powered += u32::from(powered);
    }

    pub const HEADING: &str = "coverage / mean width of the 95% intervals               \
        flag rate         labels, plain     labels only       PPI++, Wald       PPI++ always      one n_eff         published         PPI++ in";
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:55}", self.name)?;
        for coverage in [
            &self.naive,
            &self.unweighted,
            &self.labels,
            &self.wald,
            &self.corrected,
            &self.summed,
            &self.published,
        ] {
            write!(f, "  {coverage}")?;
        }
        write!(f, "  {:5.1}%", 100.0 * f64::from(self.powered) / f64::from(self.runs))
    }
}

/// Steele, Lea, Flood (2014), Fast splittable pseudorandom number generators.
struct Random(u64);

impl Random {
    /// Uniform from 0 to below 1.
    fn fraction(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (z >> 11) as f64 / (1u64 << 53) as f64
    }
}
