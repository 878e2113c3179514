//! What must hold of every estimate, whatever was judged and labelled.

#![expect(clippy::expect_used, reason = "clippy exempts test functions, but not what they call")]

use forebay_estimators::{
    Answer, Cell, Confidence, Counts, Error, Estimate, Interval, Method, State, Stratum, clopper_pearson,
    clopper_pearson_upper, combine, shares, stratified_wilson, wilson, wilson_of_rate,
};
use proptest::prelude::*;

/// A record as it is added: flag, inclusion probability, and the label if it has one.
#[derive(Clone, Copy, Debug)]
struct Record {
    flag: f64,
    inclusion: f64,
    label: Option<bool>,
}

fn cell(records: &[Record]) -> Cell {
    let mut cell = Cell::default();
    for record in records {
        match record.label {
            Some(label) => cell.add_labelled(record.flag, label, record.inclusion),
            None => cell.add_unlabelled(record.flag, record.inclusion),
        }
        .expect("records are good");
    }
    cell
}

/// Flags that are verdicts or scores, by weight or not, of a judge that knows something or nothing.
fn records() -> impl Strategy<Value = Vec<Record>> {
    (any::<bool>(), any::<bool>(), 0.0..=1.0, 0.0..=1.0).prop_flat_map(
        |(verdicts, weighted, prevalence, known)| {
            let record = (0.0..1.0, 0.0..1.0, 0.0..=1.0, 0.001..=1.0, any::<bool>()).prop_map(
                move |(truth, knows, score, inclusion, labelled)| {
                    let truth = truth < prevalence;
                    let score = if knows < known { f64::from(u8::from(truth)) } else { score };
                    Record {
                        flag: if verdicts { score.round() } else { score },
                        inclusion: if weighted { inclusion } else { 1.0 },
                        label: labelled.then_some(truth),
                    }
                },
            );
            proptest::collection::vec(record, 0..900)
        },
    )
}

fn confidence() -> impl Strategy<Value = Confidence> {
    (0.01..0.9999).prop_map(|confidence| Confidence::new(confidence).expect("it lies between 0 and 1"))
}

fn counts() -> impl Strategy<Value = (u64, u64)> {
    (1u64..5000).prop_flat_map(|trials| (0..=trials, Just(trials)))
}

/// PPI++ as it stands in its docs, over the records themselves and in two passes.
fn direct(records: &[Record]) -> (f64, f64, f64) {
    let labelled: Vec<_> = records
        .iter()
        .filter_map(|r| Some((1.0 / r.inclusion, r.flag, f64::from(u8::from(r.label?)))))
        .collect();
    let unlabelled: Vec<_> =
        records.iter().filter(|r| r.label.is_none()).map(|r| (1.0 / r.inclusion, r.flag, 0.0)).collect();
    type Weighted = (f64, f64, f64);
    let mean = |records: &[Weighted], value: &dyn Fn(&Weighted) -> f64| {
        let weights: f64 = records.iter().map(|r| r.0).sum();
        records.iter().map(|r| r.0 * value(r)).sum::<f64>() / weights
    };
    let variance_of_mean = |records: &[Weighted], value: &dyn Fn(&Weighted) -> f64| {
        let (centre, weights) = (mean(records, value), records.iter().map(|r| r.0).sum::<f64>());
        records.iter().map(|r| (r.0 * (value(r) - centre) / weights).powi(2)).sum::<f64>()
    };
    let effective = |records: &[Weighted]| {
        let weights: f64 = records.iter().map(|r| r.0).sum();
        weights * weights / records.iter().map(|r| r.0 * r.0).sum::<f64>()
    };
    let flag = |r: &Weighted| r.1;
    let (n, big_n) = (effective(&labelled), effective(&unlabelled));
    let pooled = (n * mean(&labelled, &flag) + big_n * mean(&unlabelled, &flag)) / (n + big_n);
    let deviation = |r: &Weighted| (r.1 - pooled).powi(2);
    let variance = (n * mean(&labelled, &deviation) + big_n * mean(&unlabelled, &deviation)) / (n + big_n);
    let (flag_mean, label_mean) = (mean(&labelled, &flag), mean(&labelled, &|r| r.2));
    let covariance = mean(&labelled, &|r| (r.1 - flag_mean) * (r.2 - label_mean));
    let lambda =
        if variance < 1e-9 { 0.0 } else { (covariance / ((1.0 + n / big_n) * variance)).clamp(0.0, 1.0) };
    let residual = |r: &Weighted| r.2 - lambda * r.1;
    let rate = lambda * mean(&unlabelled, &flag) + mean(&labelled, &residual);
    let variance =
        lambda * lambda * variance_of_mean(&unlabelled, &flag) + variance_of_mean(&labelled, &residual);
    (lambda, rate, variance)
}

fn assert_sound(estimate: &Estimate) -> Result<(), TestCaseError> {
    let Interval { low, high } = estimate.interval;
    prop_assert!(0.0 <= low && low <= estimate.rate && estimate.rate <= high && high <= 1.0, "{estimate:?}");
    prop_assert!((0.0..=1.0).contains(&estimate.lambda), "{estimate:?}");
    prop_assert!(estimate.standard_error >= 0.0 && estimate.standard_error.is_finite(), "{estimate:?}");
    Ok(())
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-12
}

#[track_caller]
fn same(a: &Answer, b: &Answer) -> Result<(), TestCaseError> {
    prop_assert_eq!((a.labelled, a.positives, a.unlabelled), (b.labelled, b.positives, b.unlabelled));
    match (a.uncorrected_flag_rate, b.uncorrected_flag_rate) {
        (None, None) => {}
        (Some(a), Some(b)) => prop_assert!(close(a, b), "{} and {}", a, b),
        rates => prop_assert!(false, "{rates:?}"),
    }
    match (a.estimate, b.estimate) {
        (None, None) => {}
        (Some(a), Some(b)) => {
            let near = close(a.rate, b.rate)
                && close(a.interval.low, b.interval.low)
                && close(a.interval.high, b.interval.high)
                && close(a.standard_error.powi(2), b.standard_error.powi(2));
            prop_assert!(near && a.method == b.method, "{a:?} and {b:?}");
        }
        estimates => prop_assert!(false, "{estimates:?}"),
    }
    Ok(())
}

proptest! {
    // Each case is some hundred records, which proptest makes slowly without optimisation.
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn estimates_are_rates_within_their_intervals(records in records(), confidence in confidence()) {
        let cell = cell(&records);
        let answer = cell.rate(confidence);
        for estimate in [answer.estimate, cell.prediction_powered(confidence), cell.labels_only(confidence)].into_iter().flatten() {
            assert_sound(&estimate)?;
        }
        prop_assert_eq!(answer.estimate.is_none(), answer.labelled == 0);
        prop_assert_eq!(answer.uncorrected_flag_rate.is_none(), records.is_empty());
    }

    #[test]
    fn one_pass_over_sums_is_two_passes_over_records(records in records()) {
        if let Some(estimate) = cell(&records).prediction_powered(Confidence::P95) {
            let (lambda, rate, variance) = direct(&records);
            prop_assert!(close(estimate.lambda, lambda), "λ {} and {}", estimate.lambda, lambda);
            prop_assert!(close(estimate.rate, rate), "rate {} and {}", estimate.rate, rate);
            let got = estimate.standard_error.powi(2);
            prop_assert!(close(got, variance), "se² {got} and {variance}");
        }
    }

    #[test]
    fn merged_parts_are_the_whole(records in records(), at in 0usize..900, confidence in confidence()) {
        let (first, second) = records.split_at(at.min(records.len()));
        let mut merged = cell(second);
        merged.merge(&cell(first));
        same(&merged.rate(confidence), &cell(&records).rate(confidence))?;
    }

    #[test]
    fn without_weights_verdicts_merge_to_the_last_bit(records in records(), at in 0usize..900) {
        let records: Vec<_> =
            records.into_iter().map(|r| Record { flag: r.flag.round(), inclusion: 1.0, ..r }).collect();
        let (first, second) = records.split_at(at.min(records.len()));
        let mut merged = cell(second);
        merged.merge(&cell(first));
        prop_assert_eq!(merged, cell(&records));
    }

    #[test]
    fn states_come_back_and_add_up(records in records(), at in 0usize..900) {
        let (first, second) = records.split_at(at.min(records.len()));
        let (first, second) = (cell(first), cell(second));
        prop_assert_eq!(Cell::from_state(&first.state()), Ok(first));
        let mut sum = State::default();
        for state in [first.state(), second.state()] {
            sum.counts.iter_mut().zip(state.counts).for_each(|(sum, count)| *sum += count);
            sum.sums.iter_mut().zip(state.sums).for_each(|(sum, part)| *sum += part);
        }
        let mut merged = first;
        merged.merge(&second);
        prop_assert_eq!(Cell::from_state(&sum), Ok(merged));
    }

    /// Sums may come from a file that somebody wrote: they are refused, or give what an estimate gives.
    #[test]
    fn no_state_gives_what_is_no_number(
        labelled in 0u64..2000,
        unlabelled in 0u64..2000,
        positive in 0.0..=1.0,
        parts in proptest::collection::vec(prop_oneof![Just(0.0), Just(1.0), Just(1e-300), 0.0..=1.0], 16),
        weight in 1.0..100.0,
    ) {
        let mut state = State { counts: [labelled, unlabelled, 0], ..State::default() };
        state.counts[2] = (0..labelled).filter(|&index| (index as f64) < positive * labelled as f64).count() as u64;
        // Which sums bound which is the layout of `State::SUMS`.
        for (index, part) in parts.iter().enumerate() {
            let (records, squares) = (if index < 10 { labelled } else { unlabelled }, State::SUMS[index].contains("_ww"));
            let mass = records as f64 * if squares { weight * weight } else { weight };
            state.sums[index] = if State::SUMS[index].ends_with("_w") || State::SUMS[index].ends_with("_ww") { mass } else { mass * part };
        }
        let cell = Cell::from_state(&state).expect("every sum is within its mass");
        for estimate in [cell.rate(Confidence::P95).estimate, cell.prediction_powered(Confidence::P95)].into_iter().flatten() {
            assert_sound(&estimate)?;
        }
    }

    #[test]
    fn a_scale_that_all_weights_share_says_nothing(records in records(), scale in 0.01..1.0) {
        let scaled: Vec<_> = records.iter().map(|r| Record { inclusion: r.inclusion * scale, ..*r }).collect();
        same(&cell(&records).rate(Confidence::P95), &cell(&scaled).rate(Confidence::P95))?;
    }

    /// What is true of 3% by flags is false of 97% by the same flags turned round.
    #[test]
    fn a_question_put_the_other_way_has_the_other_answer(records in records()) {
        let turned: Vec<_> =
            records.iter().map(|r| Record { flag: 1.0 - r.flag, label: r.label.map(|label| !label), ..*r }).collect();
        let (one, other) = (cell(&records).rate(Confidence::P95).estimate, cell(&turned).rate(Confidence::P95).estimate);
        if let (Some(one), Some(other)) = (one, other) {
            prop_assert_eq!(one.method, other.method);
            prop_assert!((one.rate - 1.0 + other.rate).abs() < 1e-9, "{one:?} and {other:?}");
            prop_assert!((one.interval.low - 1.0 + other.interval.high).abs() < 1e-6, "{one:?} and {other:?}");
        }
    }

    /// Everything labelled was judged by chance: λ is what chance makes of it, and the interval is nearly that of labels.
    #[test]
    fn a_useless_judge_costs_nothing(positives in 15u64..150, flagged in 1u64..10) {
        let mut records = Vec::new();
        for index in 0..3000u64 {
            let flag = f64::from(u8::from(index % 10 < flagged));
            // Each tenth of the records has the same share of positives, so labels and flags have a covariance of 0.
            let label = (index < 300 * 10 && index / 10 % 10 == 0).then_some(index / 100 < positives / 5);
            records.push(Record { flag, inclusion: 1.0, label });
        }
        let cell = cell(&records);
        let (powered, labels) = (
            cell.prediction_powered(Confidence::P95).expect("both kinds are there"),
            cell.labels_only(Confidence::P95).expect("there are labels"),
        );
        prop_assert!(powered.lambda < 1e-12, "{powered:?}");
        prop_assert!(close(powered.interval.low, labels.interval.low), "{powered:?} and {labels:?}");
        prop_assert!(close(powered.interval.high, labels.interval.high), "{powered:?} and {labels:?}");
    }

    /// With a judge that never errs, all records are as good as labelled.
    #[test]
    fn a_perfect_judge_makes_labels_of_verdicts(positives in 20u64..280, unlabelled in 300u64..3000) {
        let mut cell = Cell::default();
        for index in 0..300 {
            let truth = index < positives;
            cell.add_labelled(f64::from(u8::from(truth)), truth, 1.0).expect("good");
        }
        for index in 0..unlabelled {
            cell.add_unlabelled(f64::from(u8::from(index * 300 < positives * unlabelled)), 1.0).expect("good");
        }
        let estimate = cell.rate(Confidence::P95).estimate.expect("there are labels");
        prop_assert_eq!(estimate.method, Method::PredictionPowered);
        let all = wilson_of_rate(estimate.rate, (300 + unlabelled) as f64, Confidence::P95).expect("good");
        let labels = cell.labels_only(Confidence::P95).expect("there are labels").interval;
        prop_assert!(estimate.interval.width() < 1.01 * all.width(), "{estimate:?} and {all:?}");
        prop_assert!(estimate.interval.width() < 0.75 * labels.width(), "{estimate:?} and {labels:?}");
    }

    #[test]
    fn the_order_of_strata_says_nothing(
        parts in proptest::collection::vec((records(), 1u64..1000), 1..6),
        turn in 0usize..6,
    ) {
        let traffic: Vec<_> = parts.iter().map(|(_, traffic)| *traffic).collect();
        let shares = shares(&traffic).expect("there is traffic");
        let mut strata: Vec<_> =
            parts.iter().zip(&shares).map(|((records, _), &share)| Stratum { share, cell: cell(records) }).collect();
        let answer = combine(&strata, Confidence::P95).expect("shares are good");
        if let Some(estimate) = &answer.estimate {
            assert_sound(estimate)?;
        }
        strata.rotate_left(turn % parts.len());
        same(&combine(&strata, Confidence::P95).expect("shares are good"), &answer)?;
    }
}

proptest! {
    #[test]
    fn like_strata_are_known_better_together((positives, trials) in counts(), strata in 1usize..8) {
        let share = 1.0 / strata as f64;
        let parts = vec![Counts { share, positives, trials }; strata];
        let together = stratified_wilson(&parts, Confidence::P95).expect("good");
        let one = wilson(positives, trials, Confidence::P95).expect("good");
        prop_assert!((together.width() * (strata as f64).sqrt() - one.width()).abs() < 1e-9, "{together:?} and {one:?}");
    }

    #[test]
    fn intervals_of_counts_hold_their_rate((positives, trials) in counts(), confidence in confidence()) {
        let rate = positives as f64 / trials as f64;
        let exact = clopper_pearson(positives, trials, confidence).expect("good");
        for interval in [wilson(positives, trials, confidence).expect("good"), exact] {
            prop_assert!(0.0 <= interval.low && interval.high <= 1.0 && interval.contains(rate), "{interval:?} of {rate}");
        }
        // One side alone may be told more sharply than both.
        let upper = clopper_pearson_upper(positives, trials, confidence).expect("good");
        prop_assert!(upper <= exact.high, "{upper} and {exact:?}");
    }

    #[test]
    fn more_positives_move_both_bounds_up((positives, trials) in counts(), confidence in confidence()) {
        prop_assume!(positives < trials);
        for interval in [wilson, clopper_pearson] {
            let (less, more) =
                (interval(positives, trials, confidence).expect("good"), interval(positives + 1, trials, confidence).expect("good"));
            prop_assert!(less.low < more.low && less.high < more.high, "{less:?} and {more:?}");
        }
    }

    #[test]
    fn more_trials_of_the_same_rate_narrow_it((positives, trials) in counts(), times in 2u64..20, confidence in confidence()) {
        for interval in [wilson, clopper_pearson] {
            let few = interval(positives, trials, confidence).expect("good");
            let many = interval(positives * times, trials * times, confidence).expect("good");
            prop_assert!(many.width() < few.width(), "{few:?} and {many:?}");
        }
    }

    #[test]
    fn more_confidence_widens_it((positives, trials) in counts(), confidence in 0.01..0.99) {
        let wider = Confidence::new(confidence + 0.005).expect("good");
        let confidence = Confidence::new(confidence).expect("good");
        for interval in [wilson, clopper_pearson] {
            let (narrow, wide) =
                (interval(positives, trials, confidence).expect("good"), interval(positives, trials, wider).expect("good"));
            prop_assert!(narrow.width() < wide.width(), "{narrow:?} and {wide:?}");
        }
    }
}

/// Of the authors' ppi-python 0.2.3: `ppi_mean_ci(y, f, u, lam=λ)` is 0.341848531910813 to 0.439020814420380, which is rate ± 1.96 se,
/// over 90 flagged and true, 30 true and missed, 40 flagged and false and 140 neither; 700 of 1,700 others flagged. λ is the
/// formula of the docs in numpy with `ddof=0`; theirs, with `ddof=1`, moves the rate by 0.000005.
#[test]
fn one_cell_by_hand() -> Result<(), Error> {
    let mut cell = Cell::default();
    for (flag, label, count) in [(1.0, true, 90), (0.0, true, 30), (1.0, false, 40), (0.0, false, 140)] {
        for _ in 0..count {
            cell.add_labelled(flag, label, 1.0)?;
        }
    }
    for record in 0..1700 {
        cell.add_unlabelled(f64::from(u8::from(record < 700)), 1.0)?;
    }
    let estimate = cell.rate(Confidence::P95).estimate.expect("there are labels");
    assert!(close(estimate.lambda, 0.443_483_335_049_6), "{estimate:?}");
    assert!(close(estimate.rate, 0.390_434_673_165_596_8), "{estimate:?}");
    assert!(close(estimate.standard_error, 0.024_789_303_088_232_63), "{estimate:?}");
    Ok(())
}
