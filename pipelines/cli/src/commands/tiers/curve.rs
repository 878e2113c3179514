//! What requests would cost, and how good their answers would be, at each choice of thresholds.
//!
//! A choice gives each request that was held out to one tier, as the classifier would. What that tier made of requests like
//! it is known only where it was asked, so of each tier's share those requests stand for all that it answered. Where its
//! answer was not good enough, what the next tier took and made of the share is added, as the cascade does.
//!
//! Invariant: nothing is said of a choice for which a tier with a share has too few answers; and nothing here was learned from.

use super::log::Asked;
use forebay_calls::tiers::classifier::Weights;

/// The fewest answers that stand for a tier's share.
const ANSWERS_MIN: usize = 5;
/// The most choices that are looked at.
const CHOICES_MAX: usize = 4096;
/// The most thresholds of one tier.
const STEPS_MAX: usize = 41;
/// No chance reaches this: the tier is never picked.
pub const NEVER: f64 = 1.01;
/// Standard deviations on either side of 95 in 100.
const Z: f64 = 1.959_964;

/// A choice of thresholds, and what it comes to.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Of all tiers but the last.
    pub thresholds: Vec<f64>,
    /// The part of the requests that each tier gets first.
    pub shares: Vec<f64>,
    /// What a request takes, in nano-dollars.
    pub cost: f64,
    /// How good an answer is, 0 to 1.
    pub quality: f64,
    /// The bounds of the quality, 95 in 100.
    pub low: f64,
    /// See `low`.
    pub high: f64,
    /// The answers that this rests on.
    pub answers: usize,
}

/// A request that was held out, with what the classifier says of each tier but the last.
struct Seen<'a> {
    asked: &'a Asked,
    chances: Vec<f64>,
}

/// The choices that no other beats in both, the cheapest first.
pub fn pareto(asked: &[&Asked], weights: &[Weights]) -> Vec<Point> {
    let chances = |asked: &Asked| weights.iter().map(|weights| weights.chance(&asked.features)).collect();
    let seen: Vec<_> = asked.iter().map(|asked| Seen { asked, chances: chances(asked) }).collect();
    let mut steps = STEPS_MAX;
    while steps > 3 && steps.pow(u32::try_from(weights.len()).unwrap_or(u32::MAX)) > CHOICES_MAX {
        steps -= 1;
    }
    let grids: Vec<_> = (0..weights.len()).map(|tier| grid(&seen, tier, steps)).collect();
    let mut choices: Vec<Vec<f64>> = vec![Vec::new()];
    for grid in grids {
        let longer = |choice: &Vec<f64>| {
            grid.iter().map(|at| [choice.as_slice(), &[*at]].concat()).collect::<Vec<_>>()
        };
        choices = choices.iter().flat_map(longer).take(CHOICES_MAX * STEPS_MAX).collect();
    }
    let mut points: Vec<_> = choices.into_iter().filter_map(|choice| point(&seen, choice)).collect();
    points.sort_by(|one, other| one.cost.total_cmp(&other.cost).then(other.quality.total_cmp(&one.quality)));
    let mut best = -1.0;
    points.retain(|point| {
        let is_better = point.quality > best;
        best = point.quality.max(best);
        is_better
    });
    points
}

/// The thresholds of a tier that are looked at: always, never, and between them such that each step moves as many requests.
fn grid(seen: &[Seen<'_>], tier: usize, steps: usize) -> Vec<f64> {
    let mut chances: Vec<f64> = seen.iter().filter_map(|seen| seen.chances.get(tier).copied()).collect();
    chances.sort_by(f64::total_cmp);
    let between =
        (1..steps.saturating_sub(1)).filter_map(|step| chances.get(step * chances.len() / (steps - 1)));
    let mut grid = vec![0.0];
    // Cut off where it is printed, so that what is said holds of what is written, and reached by whom it is taken from.
    grid.extend(between.map(|chance| (chance * 1e4).floor() / 1e4));
    grid.push(NEVER);
    grid.dedup();
    grid
}

fn point(seen: &[Seen<'_>], thresholds: Vec<f64>) -> Option<Point> {
    let last = thresholds.len();
    let pick = |seen: &Seen<'_>| {
        let reached =
            seen.chances.iter().zip(&thresholds).position(|(chance, threshold)| chance >= threshold);
        reached.unwrap_or(last)
    };
    let picks: Vec<usize> = seen.iter().map(pick).collect();
    let (mut shares, mut cost, mut quality, mut answers) = (Vec::new(), 0.0, 0.0, 0);
    let (mut centre, mut variance) = (0.0, 0.0);
    for tier in 0..=last {
        let given: Vec<&Asked> =
            seen.iter().zip(&picks).filter(|(_, pick)| **pick == tier).map(|(seen, _)| seen.asked).collect();
        let share = float(given.len()) / float(seen.len());
        shares.push(share);
        if given.is_empty() {
            continue;
        }
        let mean = mean(&given, tier, last)?;
        let count = float(mean.answers);
        cost += share * mean.cost;
        quality += share * mean.quality;
        answers += mean.answers;
        // Half an answer of each kind more, or a share without a bad answer would count as certain.
        let part = (mean.quality * count + 0.5) / (count + 1.0);
        centre += share * part;
        variance += share * share * part * (1.0 - part) / count;
    }
    // As many answers as would tell the same by themselves.
    let alike = centre * (1.0 - centre) / variance;
    let (low, high) = wilson(quality, alike);
    Some(Point { thresholds, shares, cost, quality, low, high, answers })
}

struct Mean {
    cost: f64,
    quality: f64,
    answers: usize,
}

/// What requests take and come to that are given to a tier, as far as it was asked.
fn mean(given: &[&Asked], tier: usize, last: usize) -> Option<Mean> {
    let answers: Vec<_> =
        given.iter().flat_map(|asked| &asked.answers).filter(|answer| answer.tier == tier).collect();
    if answers.len() < ANSWERS_MIN {
        return None;
    }
    let escalated = answers.iter().filter(|answer| answer.escalated).count();
    let next = match escalated {
        0 => Mean { cost: 0.0, quality: 0.0, answers: 0 },
        _ if tier < last => mean(given, tier + 1, last)?,
        _ => return None,
    };
    let (count, escalated) = (float(answers.len()), float(escalated));
    let cost = answers.iter().map(|answer| answer.cost).sum::<f64>() + escalated * next.cost;
    let quality = answers.iter().map(|answer| answer.quality).sum::<f64>() + escalated * next.quality;
    Some(Mean { cost: cost / count, quality: quality / count, answers: answers.len() })
}

/// The interval of a part that so many answers tell (Wilson, 1927).
fn wilson(part: f64, count: f64) -> (f64, f64) {
    let (square, scale) = (Z * Z / count, 1.0 / (1.0 + Z * Z / count));
    let centre = part + square / 2.0;
    let reach = Z * (part * (1.0 - part) / count + square / (4.0 * count)).sqrt();
    ((scale * (centre - reach)).max(0.0), (scale * (centre + reach)).min(1.0))
}

pub fn float(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::tiers::log::Answer;
    use forebay_calls::tiers::classifier::{Features, Sight};

    fn asked(question: &str, answers: &[(usize, f64, f64, bool)]) -> Asked {
        let answer = |&(tier, cost, quality, escalated)| Answer { tier, cost, quality, escalated };
        Asked {
            features: Features::of(Sight { question, ..Sight::default() }),
            answers: answers.iter().map(answer).collect(),
            is_held_out: true,
        }
    }

    #[test]
    fn wilson_says_what_the_tables_say() {
        let (low, high) = wilson(0.9, 100.0);
        assert!((low - 0.8256).abs() < 1e-4 && (high - 0.9448).abs() < 1e-4, "{low} {high}");
        assert!((wilson(1.0, 10.0).1 - 1.0).abs() < 1e-9);
    }

    #[test]
    fn an_escalated_answer_takes_what_both_tiers_take_and_is_as_good_as_the_better_one_s() {
        // The small tier takes 1 and fails at a quarter, the large one 10 and is right at nine of ten.
        let mut all = Vec::new();
        for number in 0..40 {
            let small = match number % 4 {
                0 => (0, 1.0, 0.0, true),
                _ => (0, 1.0, 1.0, false),
            };
            all.push(asked("why", &[small]));
            all.push(asked("why", &[(1, 10.0, if number % 10 == 0 { 0.0 } else { 1.0 }, false)]));
        }
        let all: Vec<_> = all.iter().collect();
        let points = pareto(&all, &[Weights::default()]);
        let [small] = points.as_slice() else { panic!("{points:?}") };
        assert_eq!((small.cost, small.shares.as_slice()), (1.0 + 0.25 * 10.0, [1.0, 0.0].as_slice()));
        assert!((small.quality - (0.75 + 0.25 * 0.9)).abs() < 1e-9, "{small:?}");
        assert!(small.low < small.quality && small.quality < small.high && small.answers == 40);
    }

    #[test]
    fn of_three_tiers_each_choice_shares_all_requests_out() {
        let words = ["easy", "middling", "hard"];
        let row = |number: usize, tier: usize| {
            let kind = number % 3;
            let quality = if tier >= kind { 1.0 } else { 0.0 };
            let cost = [1.0, 10.0, 100.0][tier];
            asked(&format!("a question that is {}", words[kind]), &[(tier, cost, quality, false)])
        };
        let all: Vec<_> = (0..180).map(|number| row(number, number / 3 % 3)).collect();
        let learned = |tier: usize| {
            let rows = all.iter().filter(|asked| asked.answers[0].tier == tier);
            let rows = rows.map(|asked| (asked.features.clone(), asked.answers[0].quality));
            Weights::learn(&rows.collect::<Vec<_>>(), 1)
        };
        let points = pareto(&all.iter().collect::<Vec<_>>(), &[learned(0), learned(1)]);
        for point in &points {
            let sum = point.shares.iter().sum::<f64>();
            assert!((sum - 1.0).abs() < 1e-9 && point.thresholds.len() == 2, "{point:?}");
        }
        let best = points.last().unwrap();
        assert!(
            (best.quality - 1.0).abs() < 1e-9 && (best.cost - 37.0).abs() < 1e-9,
            "a third each: {best:?}"
        );
    }

    #[test]
    fn of_a_tier_with_too_few_answers_nothing_is_said() {
        let all: Vec<_> = (0..20).map(|_| asked("why", &[(1, 10.0, 1.0, false)])).collect();
        let all: Vec<_> = all.iter().collect();
        let points = pareto(&all, &[Weights::default()]);
        assert_eq!(points.len(), 1);
        assert_eq!(points[0].shares, [0.0, 1.0], "the small tier was never asked");
    }
}
