//! Orders candidates by their rankings, the lexical vector's, the words' and, where there is one, the embedder's, fused by reciprocal
//! rank fusion. What is not in a ranking gets nothing from it, so a passage without an embedder's vector is ranked by its words alone.
//!
//! Invariant: the order depends on the candidates and the question alone; ties fall to the chunk's id.

use crate::text::words;
use forebay_schemas::Passage;
use std::{cmp::Ordering, collections::HashMap, sync::Arc};

/// The k of reciprocal rank fusion. The 60 of the paper is for rankings of a thousand; among 50 candidates it would
/// make the first place worth hardly more than the tenth.
const RRF_K: f32 = 10.0;
/// BM25: how soon another mention stops counting.
const BM25_K1: f32 = 1.2;
/// BM25: how much a long passage must pay for its length.
const BM25_B: f32 = 0.75;
/// Passages that share so much of their words say the same.
const REPEAT_MIN: f32 = 0.9;

/// A passage with its words counted, which is most of the work of ranking it.
pub(super) struct Counted {
    pub(super) passage: Passage,
    counts: HashMap<String, f32>,
    length: f32,
}

impl Counted {
    pub(super) fn new(passage: Passage) -> Self {
        let mut counts: HashMap<String, f32> = HashMap::new();
        let mut length = 0.0;
        for text in passage.heading.iter().chain([&passage.text]) {
            for stem in words::stems(text) {
                *counts.entry(stem).or_default() += 1.0;
                length += 1.0;
            }
        }
        Self { passage, counts, length }
    }

    /// Whether the other says the same in nearly the same words (their Jaccard index).
    pub(super) fn repeats(&self, other: &Self) -> bool {
        let (few, many) =
            (self.counts.len().min(other.counts.len()), self.counts.len().max(other.counts.len()));
        // Sets of such different sizes cannot share enough, and most pairs are told apart by that.
        if ratio(few, many) < REPEAT_MIN {
            return false;
        }
        let shared = self.counts.keys().filter(|stem| other.counts.contains_key(*stem)).count();
        let all = self.counts.len() + other.counts.len() - shared;
        ratio(shared, all) >= REPEAT_MIN
    }
}

/// A passage that may answer.
pub(super) struct Candidate {
    pub(super) counted: Arc<Counted>,
    /// How near its lexical vector is; absent where that search did not find it.
    pub(super) cosine: Option<f32>,
    /// How near the vector is that an embedder made of it; absent where that search did not find it.
    pub(super) dense: Option<f32>,
    /// How well the words match; set by [`rank`].
    bm25: f32,
    /// All rankings fused, set by [`rank`]; or what a reranker said.
    pub(super) score: f32,
}

impl Candidate {
    pub(super) fn new(counted: Arc<Counted>, cosine: Option<f32>, dense: Option<f32>) -> Self {
        Self { counted, cosine, dense, bm25: 0.0, score: 0.0 }
    }

    /// The passage with its score.
    pub(super) fn passage(&self) -> Passage {
        Passage { score: self.score, ..self.counted.passage.clone() }
    }

    /// Whether its words, or parts of them, speak for it.
    fn is_told_by_words(&self, cosine_min: f32) -> bool {
        self.bm25 > 0.0 || self.cosine.is_some_and(|cosine| cosine >= cosine_min)
    }

    /// What its words count for; nothing where only an embedder speaks for it.
    fn words(&self) -> Option<f32> {
        (self.bm25 > 0.0 || self.cosine.is_some()).then_some(self.bm25)
    }

    fn before(&self, other: &Self, value: impl Fn(&Self) -> f32) -> Ordering {
        let by_id = || self.counted.passage.chunk.cmp(&other.counted.passage.chunk);
        value(other).total_cmp(&value(self)).then_with(by_id)
    }
}

/// The candidates best first, each with its fused score; what no word and no direction speaks for is left out.
pub(super) fn rank(question: &[String], mut candidates: Vec<Candidate>, cosine_min: f32) -> Vec<Candidate> {
    bm25(question, &mut candidates);
    candidates.retain_mut(|candidate| {
        let is_told = candidate.is_told_by_words(cosine_min);
        if !is_told {
            // Chance must not order what an embedder found.
            candidate.cosine = None;
        }
        // At a right angle or beyond, an embedder found it by chance too.
        is_told || candidate.dense.is_some_and(|dense| dense > 0.0)
    });
    let rankings: [fn(&Candidate) -> Option<f32>; 3] =
        [|candidate| candidate.cosine, Candidate::words, |candidate| candidate.dense];
    for value in rankings {
        // Those without a value come last.
        candidates.sort_by(|a, b| a.before(b, |one| value(one).unwrap_or(f32::NEG_INFINITY)));
        let mut rank = 1.0;
        for candidate in candidates.iter_mut().take_while(|candidate| value(candidate).is_some()) {
            candidate.score += 1.0 / (RRF_K + rank);
            rank += 1.0;
        }
    }
    candidates.sort_by(|a, b| a.before(b, |candidate| candidate.score));
    candidates
}

/// Sets BM25 of each candidate, with the candidates as the collection.
fn bm25(question: &[String], candidates: &mut [Candidate]) {
    let mut asked: Vec<_> = question.iter().collect();
    // In one order always, since sums of floats depend on it.
    asked.sort();
    asked.dedup();
    let total: f32 = candidates.iter().map(|candidate| candidate.counted.length).sum();
    let mean = (total / ratio(candidates.len().max(1), 1)).max(1.0);
    for stem in asked {
        let count = |candidate: &Candidate| candidate.counted.counts.get(stem).copied().unwrap_or(0.0);
        let counts: Vec<f32> = candidates.iter().map(count).collect();
        let holders = counts.iter().filter(|count| **count > 0.0).count();
        if holders == 0 {
            continue;
        }
        let rarity = (1.0 + (ratio(candidates.len() - holders, 1) + 0.5) / (ratio(holders, 1) + 0.5)).ln();
        for (candidate, count) in candidates.iter_mut().zip(counts) {
            let length = candidate.counted.length / mean;
            let saturation = count + BM25_K1 * (1.0 - BM25_B + BM25_B * length);
            candidate.bm25 += rarity * count * (BM25_K1 + 1.0) / saturation;
        }
    }
}

/// Small counts as floats; a count over 65,535 reads as that.
fn ratio(part: usize, whole: usize) -> f32 {
    let float = |count: usize| f32::from(u16::try_from(count).unwrap_or(u16::MAX));
    float(part) / float(whole.max(1))
}
