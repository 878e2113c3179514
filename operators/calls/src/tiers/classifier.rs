//! Says how likely a tier's answer to a request is good, from the request alone: a logistic regression over hashed words,
//! pairs of words and letters in threes, its length and its shape. Small enough to be asked on every call.
//!
//! The cheapest tier is picked whose chance reaches its threshold, else the last. `forebay tiers calibrate` trains the weights
//! on what was answered before, and writes them with the thresholds into the file that is read here.
//!
//! Invariant: the same request and the same file give the same pick, and the same rows and seed the same file.

use super::rules::turns;
use crate::Call;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The features of words and letters, before those of length and shape. A power of two.
const HASHED: u32 = 4096;
/// The features of length and shape.
const SHAPES: usize = 8;
/// No more of a question is read.
const QUESTION_BYTES_MAX: usize = 8 * 1024;
/// Times that each row is learned from.
const EPOCHS: usize = 20;
/// The step of the first update; later ones are smaller, as AdaGrad has it (Duchi et al., 2011).
const STEP: f64 = 0.3;
/// What each update takes off a weight, so that what was seen once does not count as known.
const DECAY: f64 = 1e-4;
/// Weights are kept to so many parts, so that a file says all that is used.
const PARTS: f64 = 1e5;
/// The form of the file.
const VERSION: u32 = 1;

/// What a request looks like before anybody answers it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sight<'a> {
    /// What is asked, without history or sources.
    pub question: &'a str,
    /// What the user and the model said so far, this question included.
    pub turns: usize,
    /// How many passages were found.
    pub passages: usize,
    /// Whether it brings tools.
    pub has_tools: bool,
    /// Whether it says which form the answer must have.
    pub has_response_format: bool,
}

impl<'a> Sight<'a> {
    /// That of a call.
    pub(super) fn of(call: &'a Call<'_>) -> Self {
        Self {
            question: &call.question,
            turns: turns(call),
            passages: call.passages.len(),
            has_tools: call.sampling.tools.is_some(),
            has_response_format: call.sampling.response_format.is_some(),
        }
    }
}

/// A request as numbers: which features it has, and how much of each.
#[derive(Clone, Debug, PartialEq)]
pub struct Features(Vec<(u32, f64)>);

impl Features {
    /// Those of a request.
    pub fn of(sight: Sight<'_>) -> Self {
        let mut end = sight.question.len().min(QUESTION_BYTES_MAX);
        while !sight.question.is_char_boundary(end) {
            end -= 1;
        }
        let text = sight.question[..end].to_lowercase();
        let words: Vec<&str> =
            text.split(|letter: char| !letter.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
        let mut counts: BTreeMap<u32, f64> = BTreeMap::new();
        let mut add = |kind: u8, parts: &[&str]| *counts.entry(hashed(kind, parts)).or_default() += 1.0;
        for pair in words.windows(2) {
            add(2, pair);
        }
        for word in words {
            add(1, &[word]);
            let letters: Vec<(usize, char)> = word.char_indices().collect();
            for three in letters.windows(3) {
                let [(start, _), _, (last, letter)] = three else { continue };
                add(3, &[&word[*start..last + letter.len_utf8()]]);
            }
        }
        // Of unit length, or a long question would outweigh what it says.
        let length = counts.values().map(|count| count * count).sum::<f64>().sqrt().max(1.0);
        let mut features: Vec<_> = counts.into_iter().map(|(at, count)| (at, count / length)).collect();
        features.extend((HASHED..).zip(shapes(sight, &text)).filter(|(_, value)| *value != 0.0));
        Self(features)
    }
}

/// Length and shape, each about 0 to 1. The first is the bias.
fn shapes(sight: Sight<'_>, text: &str) -> [f64; SHAPES] {
    let part = |is: fn(char) -> bool| {
        float(text.chars().filter(|letter| is(*letter)).count()) / float(text.len().max(1))
    };
    let flag = |is: bool| if is { 1.0 } else { 0.0 };
    [
        1.0,
        (1.0 + float(sight.question.len())).ln() / 10.0,
        (1.0 + float(sight.turns)).ln() / 5.0,
        (1.0 + float(sight.passages)).ln() / 5.0,
        flag(sight.has_tools),
        flag(sight.has_response_format),
        part(|letter| letter.is_ascii_digit()),
        part(|letter| letter.is_ascii_punctuation()),
    ]
}

fn float(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

/// FNV-1a: it has to spread words, and nobody gains by making two of them meet.
fn hashed(kind: u8, parts: &[&str]) -> u32 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
    let step = |hash: u32, byte: u8| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    let hash = [kind].into_iter().chain(bytes).fold(0x811c_9dc5, step);
    (hash ^ (hash >> 15)) & (HASHED - 1)
}

/// What was learned about one tier: a weight for each feature that has one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Weights(BTreeMap<u32, f64>);

impl Weights {
    /// Learns from requests and how good the tier's answer was, 0 to 1; in an order that follows from the seed.
    pub fn learn(rows: &[(Features, f64)], seed: u64) -> Self {
        let mut weights = BTreeMap::<u32, f64>::new();
        let mut squares = BTreeMap::<u32, f64>::new();
        let mut order: Vec<usize> = (0..rows.len()).collect();
        for epoch in (0..).take(EPOCHS) {
            order.sort_by_cached_key(|row| mixed(seed ^ mixed(epoch << 32 ^ mixed_of(*row))));
            for (features, good) in order.iter().filter_map(|row| rows.get(*row)) {
                let wrong = chance(&weights, features) - good;
                for (at, value) in &features.0 {
                    let weight = weights.entry(*at).or_default();
                    let slope = wrong * value + DECAY * *weight;
                    let square = squares.entry(*at).or_default();
                    *square += slope * slope;
                    if *square > 0.0 {
                        *weight -= STEP * slope / square.sqrt();
                    }
                }
            }
        }
        let kept = weights.into_iter().map(|(at, weight)| (at, (weight * PARTS).round() / PARTS));
        Self(kept.filter(|(_, weight)| *weight != 0.0).collect())
    }

    /// The chance that the tier's answer is good.
    pub fn chance(&self, features: &Features) -> f64 {
        chance(&self.0, features)
    }
}

fn chance(weights: &BTreeMap<u32, f64>, Features(features): &Features) -> f64 {
    let sum: f64 = features.iter().filter_map(|(at, value)| Some(weights.get(at)? * value)).sum();
    1.0 / (1.0 + (-sum).exp())
}

fn mixed_of(row: usize) -> u64 {
    u64::try_from(row).unwrap_or(u64::MAX)
}

/// A number without a pattern from any number (Steele et al., SplitMix64); the same for the same one.
pub fn mixed(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not of the form that `forebay tiers calibrate` writes.
    #[error("it is no classifier of tiers")]
    Form(#[from] serde_json::Error),
    /// It was written by another version.
    #[error("it is of version {version}; this program reads version {VERSION}")]
    Version {
        /// The version.
        version: u32,
    },
    /// It was made for other tiers.
    #[error("it knows the tiers {known}, and the configuration has {wanted}; calibrate it anew")]
    Tiers {
        /// Those in the file.
        known: String,
        /// Those in the configuration.
        wanted: String,
    },
    /// A number in it is none of the kind that is wanted.
    #[error("the threshold of tier {tier:?} is {threshold}; it may be 0 to 1, or more for never")]
    Threshold {
        /// Whose.
        tier: String,
        /// What it is.
        threshold: f64,
    },
}

/// What picks a tier where no rule does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Classifier {
    version: u32,
    /// All tiers but the last, the cheapest first.
    tiers: Vec<Judged>,
    /// The last, which answers what no other is trusted with.
    last: String,
}

/// A tier that is picked where its answer is likely good enough.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Judged {
    /// The name of its model.
    pub model: String,
    /// The least chance at which it is picked; over 1 for never.
    pub threshold: f64,
    /// What tells the chance.
    pub weights: Weights,
}

impl Classifier {
    /// One of these parts.
    pub fn new(tiers: Vec<Judged>, last: String) -> Self {
        Self { version: VERSION, tiers, last }
    }

    /// Reads one that was made for these tiers.
    pub fn read(json: &str, tiers: &[String]) -> Result<Self, Error> {
        let read: Self = serde_json::from_str(json)?;
        if read.version != VERSION {
            return Err(Error::Version { version: read.version });
        }
        let known: Vec<_> = read.tiers.iter().map(|tier| &tier.model).chain([&read.last]).collect();
        if !known.iter().copied().eq(tiers) {
            let known: Vec<_> = known.iter().map(|name| name.as_str()).collect();
            return Err(Error::Tiers { known: known.join(", "), wanted: tiers.join(", ") });
        }
        match read.tiers.iter().find(|tier| !tier.threshold.is_finite() || tier.threshold < 0.0) {
            Some(Judged { model, threshold, .. }) => {
                Err(Error::Threshold { tier: model.clone(), threshold: *threshold })
            }
            None => Ok(read),
        }
    }

    /// The same as a file, one weight a line.
    pub fn write(&self) -> Result<String, Error> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// The place of the tier that is to answer.
    pub(super) fn pick(&self, call: &Call<'_>) -> usize {
        let features = Features::of(Sight::of(call));
        let trusted = |tier: &Judged| tier.weights.chance(&features) >= tier.threshold;
        self.tiers.iter().position(trusted).unwrap_or(self.tiers.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EASY: [&str; 4] = ["What is the price of", "When does the shop open in", "Where is", "Who sells"];
    const HARD: [&str; 4] = [
        "Prove by induction that",
        "Derive the bound of",
        "Explain step by step why",
        "Refactor the code of",
    ];

    fn rows(from: usize, count: usize) -> Vec<(Features, f64)> {
        let row = |number: usize| {
            let (starts, good) = if mixed_of(number).is_multiple_of(2) { (EASY, 1.0) } else { (HARD, 0.0) };
            let question = format!("{} item {}?", starts[number / 2 % 4], number * 7919 % 97);
            (Features::of(Sight { question: &question, turns: 1, ..Sight::default() }), good)
        };
        (from..from + count).map(row).collect()
    }

    #[test]
    fn what_can_be_told_apart_is_told_apart_on_rows_that_were_never_seen() {
        let weights = Weights::learn(&rows(0, 200), 1);
        let unseen = rows(1_000, 200);
        let right =
            unseen.iter().filter(|(features, good)| (weights.chance(features) >= 0.5) == (*good == 1.0));
        assert!(right.count() >= 198);
        let noise: Vec<_> =
            rows(0, 200).into_iter().enumerate().map(|(at, (f, _))| (f, float(at / 2 % 2))).collect();
        let weights = Weights::learn(&noise, 1);
        let mean = unseen.iter().map(|(features, _)| weights.chance(features)).sum::<f64>() / 200.0;
        assert!((0.3..0.7).contains(&mean), "of nothing it learns nothing: {mean}");
    }

    #[test]
    fn the_same_rows_and_seed_give_the_same_file_and_another_seed_another() {
        let learned = |seed| Weights::learn(&rows(0, 50), seed);
        assert_eq!(learned(7), learned(7));
        assert_ne!(learned(7), learned(8));
        let judged = Judged { model: "small".to_owned(), threshold: 0.6, weights: learned(7) };
        let classifier = Classifier::new(vec![judged], "large".to_owned());
        let tiers = ["small", "large"].map(str::to_owned);
        let file = classifier.write().unwrap();
        assert_eq!(Classifier::read(&file, &tiers).unwrap(), classifier);
    }

    #[test]
    fn the_cheapest_is_picked_that_is_likely_good_enough() {
        let weights = Weights::learn(&rows(0, 200), 1);
        let judged =
            |model: &str, threshold| Judged { model: model.to_owned(), threshold, weights: weights.clone() };
        let pick = |question: &str, thresholds: [f64; 2]| {
            let [one, two] = thresholds;
            let tiers = vec![judged("small", one), judged("middle", two)];
            let call = Call { question: question.to_owned(), ..crate::testing::call(question) };
            Classifier::new(tiers, "large".to_owned()).pick(&call)
        };
        assert_eq!(pick("Where is item 3?", [0.5, 0.5]), 0);
        assert_eq!(pick("Where is item 3?", [1.1, 0.5]), 1);
        assert_eq!(pick("Prove by induction that item 3?", [0.5, 0.5]), 2);
        assert_eq!(pick("Prove by induction that item 3?", [0.5, 0.0]), 1);
    }

    #[test]
    fn a_file_that_is_none_or_another_s_is_refused() {
        let tiers = ["small", "large"].map(str::to_owned);
        let refused = |json: &str| Classifier::read(json, &tiers).unwrap_err().to_string();
        assert_eq!(refused("[]"), "it is no classifier of tiers");
        assert_eq!(
            refused(r#"{"version": 2, "tiers": [], "last": "large"}"#),
            "it is of version 2; this program reads version 1"
        );
        assert_eq!(
            refused(r#"{"version": 1, "tiers": [], "last": "large"}"#),
            "it knows the tiers large, and the configuration has small, large; calibrate it anew"
        );
        let judged = r#"{"model": "small", "threshold": -1, "weights": {}}"#;
        let file = format!(r#"{{"version": 1, "tiers": [{judged}], "last": "large"}}"#);
        assert!(refused(&file).starts_with("the threshold of tier \"small\" is -1"));
    }

    #[test]
    fn any_text_has_features() {
        for question in ["", "¿?", "日本語のテキスト", &"ß".repeat(9_000)] {
            let Features(features) = Features::of(Sight { question, ..Sight::default() });
            assert!(features.iter().all(|(at, value)| *at < HASHED + 8 && value.is_finite()), "{question}");
        }
    }
}
