//! Orders candidates by two rankings, the vector's and the words', fused by reciprocal rank fusion.
//!
//! Invariant: the order depends on the candidates and the question alone; ties fall to the chunk's id.

use crate::text::words;
use forebay_schemas::Passage;
use std::collections::{HashMap, HashSet};

/// The k of reciprocal rank fusion. The 60 of the paper is for rankings of a thousand; among 50 candidates it would
/// make the first place worth hardly more than the tenth.
const RRF_K: f32 = 10.0;
/// BM25: how soon another mention stops counting.
const BM25_K1: f32 = 1.2;
/// BM25: how much a long passage must pay for its length.
const BM25_B: f32 = 0.75;
/// Passages that share so much of their words say the same.
const REPEAT_MIN: f32 = 0.9;

/// A passage that may answer.
pub(super) struct Candidate {
    pub(super) passage: Passage,
    cosine: f32,
    counts: HashMap<String, f32>,
    length: f32,
}

impl Candidate {
    pub(super) fn new(passage: Passage, cosine: f32) -> Self {
        let mut counts: HashMap<String, f32> = HashMap::new();
        let mut length = 0.0;
        for text in passage.heading.iter().chain([&passage.text]) {
            for stem in words::stems(text) {
                *counts.entry(stem).or_default() += 1.0;
                length += 1.0;
            }
        }
        Self { passage, cosine, counts, length }
    }

    /// Whether the other says the same in nearly the same words (their Jaccard index).
    pub(super) fn repeats(&self, other: &Self) -> bool {
        let shared = self.counts.keys().filter(|stem| other.counts.contains_key(*stem)).count();
        let all = self.counts.len() + other.counts.len() - shared;
        ratio(shared, all) >= REPEAT_MIN
    }
}

/// The candidates best first, each with its fused score; what no word and no direction speaks for is left out.
pub(super) fn rank(question: &[String], candidates: Vec<Candidate>, cosine_min: f32) -> Vec<Candidate> {
    let bm25 = bm25(question, &candidates);
    let mut scored: Vec<(Candidate, f32)> = candidates.into_iter().zip(bm25).collect();
    scored.retain(|(candidate, bm25)| *bm25 > 0.0 || candidate.cosine >= cosine_min);
    let mut scores = vec![0.0; scored.len()];
    let by_id = |a: &(Candidate, f32), b: &(Candidate, f32)| a.0.passage.chunk.cmp(&b.0.passage.chunk);
    for value in [|scored: &(Candidate, f32)| scored.0.cosine, |scored: &(Candidate, f32)| scored.1] {
        let mut order: Vec<usize> = (0..scored.len()).collect();
        order.sort_by(|a, b| {
            let (a, b) = (&scored[*a], &scored[*b]);
            value(b).total_cmp(&value(a)).then_with(|| by_id(a, b))
        });
        let mut rank = 1.0;
        for place in order {
            scores[place] += 1.0 / (RRF_K + rank);
            rank += 1.0;
        }
    }
    for ((candidate, _), score) in scored.iter_mut().zip(scores) {
        candidate.passage.score = score;
    }
    scored.sort_by(|a, b| b.0.passage.score.total_cmp(&a.0.passage.score).then_with(|| by_id(a, b)));
    scored.into_iter().map(|(candidate, _)| candidate).collect()
}

/// BM25 of each candidate, with the candidates as the collection.
fn bm25(question: &[String], candidates: &[Candidate]) -> Vec<f32> {
    let asked: HashSet<&String> = question.iter().collect();
    let mut asked: Vec<_> = asked.into_iter().collect();
    // Sums of floats depend on their order.
    asked.sort();
    let total: f32 = candidates.iter().map(|candidate| candidate.length).sum();
    let mean = (total / ratio(candidates.len().max(1), 1)).max(1.0);
    let mut scores = vec![0.0; candidates.len()];
    for stem in asked {
        let holders = candidates.iter().filter(|candidate| candidate.counts.contains_key(stem)).count();
        let rarity = (1.0 + (ratio(candidates.len() - holders, 1) + 0.5) / (ratio(holders, 1) + 0.5)).ln();
        for (candidate, score) in candidates.iter().zip(&mut scores) {
            let count = candidate.counts.get(stem).copied().unwrap_or(0.0);
            let saturation = count + BM25_K1 * (1.0 - BM25_B + BM25_B * candidate.length / mean);
            *score += rarity * count * (BM25_K1 + 1.0) / saturation;
        }
    }
    scores
}

/// Small counts as floats; a count over 65,535 reads as that.
fn ratio(part: usize, whole: usize) -> f32 {
    let float = |count: usize| f32::from(u16::try_from(count).unwrap_or(u16::MAX));
    float(part) / float(whole.max(1))
}
