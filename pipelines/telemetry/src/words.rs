//! Bounds the words that a label may take.
//!
//! Invariant: however many words come, at most `limit` things are made besides that of [`OTHER`]. A client that
//! invents names of models fills one series, not the memory.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

/// What every word beyond the limit is counted as.
pub(crate) const OTHER: &str = "other";

/// Longer words count as [`OTHER`]: they are texts.
const WORD_BYTES_MAX: usize = 256;

/// The word as it may be shown.
pub(crate) fn short(word: &str) -> &str {
    if word.len() > WORD_BYTES_MAX { OTHER } else { word }
}

/// One thing for each word.
pub(crate) struct PerWord<T> {
    known: RwLock<HashMap<Box<str>, T>>,
    limit: usize,
}

impl<T: Clone> PerWord<T> {
    pub(crate) fn new(limit: usize) -> Self {
        Self { known: RwLock::default(), limit }
    }

    /// The thing of this word, made where the word is new.
    pub(crate) fn get(&self, word: &str, make: impl FnOnce(&str) -> T) -> T {
        let word = short(word);
        if let Some(thing) = self.known.read().unwrap_or_else(PoisonError::into_inner).get(word) {
            return thing.clone();
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        // `other` has a place beside the limit, or it would take that of a word.
        let full = known.len().saturating_sub(usize::from(known.contains_key(OTHER))) >= self.limit;
        let word = if full && !known.contains_key(word) { OTHER } else { word };
        known.entry(word.into()).or_insert_with(|| make(word)).clone()
    }
}

impl PerWord<Arc<str>> {
    /// The word as a label may take it.
    pub(crate) fn word(&self, word: &str) -> Arc<str> {
        self.get(word, |word| word.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_beyond_the_limit_share_one_thing() {
        let words = PerWord::new(2);
        let seen: Vec<String> = ["a", "b", "c", "d", "a", "other", "b"]
            .iter()
            .map(|word| words.get(word, str::to_owned))
            .collect();
        assert_eq!(seen, ["a", "b", "other", "other", "a", "other", "b"]);
        assert_eq!(words.known.read().unwrap().len(), 3);
    }

    #[test]
    fn a_text_is_no_word() {
        let words = PerWord::new(2);
        assert_eq!(words.get(&"x".repeat(257), str::to_owned), OTHER);
    }
}
