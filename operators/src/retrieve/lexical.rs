//! A lexical embedder: texts that share words, or parts of words, point the same way.
//!
//! It knows nothing of meaning: "car" and "automobile" are strangers to it, and "not covered" is near "covered". So it
//! is called lexical or near-duplicate, never semantic. It needs no model, no network and no training.
//!
//! Invariant: the same stems give the same vector on every machine and in every version; a change here needs another
//! length of vectors, or stored ones would be compared with others.

use std::collections::BTreeMap;

/// The length of a vector: with a few hundred features a text, collisions stay below the signal.
const DIMENSIONS: usize = 1024;
/// What a part of a word counts beside a word: enough to tell a misspelt one from a stranger, not to find it alone.
const PART_WEIGHT: f32 = 0.15;
/// Letters of a part.
const PART_CHARS: usize = 3;
/// Shorter words have no parts that tell them from others.
const PARTED_CHARS_MIN: usize = 5;

/// The direction of a text that is given as the stems of its parts.
pub(super) fn embed<'s>(parts: impl IntoIterator<Item = &'s [String]>) -> Vec<f32> {
    let mut counts: BTreeMap<&str, u16> = BTreeMap::new();
    for stem in parts.into_iter().flatten() {
        let count = counts.entry(stem).or_default();
        *count = count.saturating_add(1);
    }
    let mut vector = vec![0.0; DIMENSIONS];
    for (stem, count) in counts {
        // The tenth mention says little that the first did not.
        let weight = 1.0 + f32::from(count).ln();
        add(&mut vector, stem.as_bytes(), weight);
        let chars: Vec<char> = stem.chars().collect();
        if chars.len() >= PARTED_CHARS_MIN {
            for part in chars.windows(PART_CHARS) {
                let part: String = std::iter::once('~').chain(part.iter().copied()).collect();
                add(&mut vector, part.as_bytes(), weight * PART_WEIGHT);
            }
        }
    }
    let length = vector.iter().map(|component| component * component).sum::<f32>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|component| *component /= length);
    }
    vector
}

/// Signed hashing: features that collide cancel as often as they add.
fn add(vector: &mut [f32], feature: &[u8], weight: f32) {
    let hash = fnv1a(feature);
    let sign = if hash >> 63 == 0 { 1.0 } else { -1.0 };
    if let Ok(place) = usize::try_from(hash % DIMENSIONS as u64) {
        vector[place] += sign * weight;
    }
}

/// FNV-1a with 64 bits and a final mix, since its high bits are weak for short inputs.
fn fnv1a(bytes: &[u8]) -> u64 {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::words::stems;

    fn cosine(one: &str, other: &str) -> f32 {
        let (one, other) = (embed([stems(one).as_slice()]), embed([stems(other).as_slice()]));
        one.iter().zip(&other).map(|(a, b)| a * b).sum()
    }

    #[test]
    fn texts_are_near_by_their_words_and_not_by_their_meaning() {
        assert!(cosine("how are topics compacted", "compacting a topic") > 0.9);
        assert!(cosine("compaction of topics", "compaktion of topics") > 0.5, "misspelt");
        assert!(cosine("the car is red", "an automobile has a colour") < 0.2);
        assert!(cosine("covered", "not covered") > 0.6, "which is why it is not called semantic");
        assert!(embed([stems("").as_slice()]).iter().all(|component| *component == 0.0));
    }
}
