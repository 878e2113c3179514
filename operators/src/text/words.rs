//! Words and their stems.
//!
//! Invariant: the same text gives the same stems for ever, or what is in a vector store no longer matches what is
//! asked; so a change here changes [`crate::retrieve`]'s lexical vectors.

use rust_stemmers::{Algorithm, Stemmer};
use std::{collections::HashSet, sync::LazyLock};
use unicode_normalization::UnicodeNormalization as _;

/// Longer runs of letters are cut: they are no words (base64, hashes), and every word is hashed more than once.
const WORD_CHARS_MAX: usize = 40;

/// English words that say nothing about what is asked.
const STOP_WORDS: &[&str] = &[
    "a", "about", "after", "all", "also", "am", "an", "and", "any", "are", "as", "at", "be", "because",
    "been", "before", "being", "but", "by", "can", "could", "did", "do", "does", "doing", "for", "from",
    "get", "gets", "had", "has", "have", "having", "he", "her", "him", "his", "how", "i", "if", "in", "into",
    "is", "it", "its", "just", "may", "me", "might", "more", "most", "must", "my", "of", "on", "one", "or",
    "our", "out", "over", "shall", "she", "should", "so", "some", "such", "tell", "than", "that", "the",
    "their", "them", "then", "there", "these", "they", "this", "those", "to", "too", "under", "up", "us",
    "was", "we", "were", "what", "when", "where", "which", "while", "who", "whom", "why", "will", "with",
    "would", "you", "your",
];

static STOP: LazyLock<HashSet<&str>> = LazyLock::new(|| STOP_WORDS.iter().copied().collect());
static STEMMER: LazyLock<Stemmer> = LazyLock::new(|| Stemmer::create(Algorithm::English));

/// The stems of the words that say something, in order. `kill -9` gives `kill`, `9`; `dead_letters` gives its
/// parts; a text of stop words alone gives these.
pub(crate) fn stems(text: &str) -> Vec<String> {
    let words = words(text);
    let telling: Vec<_> = words.iter().filter(|word| !STOP.contains(word.as_str())).collect();
    let chosen = if telling.is_empty() { words.iter().collect() } else { telling };
    chosen.into_iter().map(|word| STEMMER.stem(word).into_owned()).collect()
}

/// The words, lower case, in order.
fn words(text: &str) -> Vec<String> {
    let lower: String = text.nfkc().flat_map(char::to_lowercase).collect();
    // Possessives first: "pipeline's" is about a pipeline.
    let lower = lower.replace("'s", " ").replace("’s", " ");
    let parts = lower.split(|c: char| !c.is_alphanumeric()).filter(|part| !part.is_empty());
    parts.map(|word| word.chars().take(WORD_CHARS_MAX).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::stems;

    fn check(text: &str, expected: &str) {
        assert_eq!(stems(text).join(" "), expected, "{text:?}");
    }

    #[test]
    fn words_lose_what_grammar_adds_and_stop_words_go() {
        check("What does the broker's compaction keep?", "broker compact keep");
        check("`dead-letters` and kill -9", "dead letter kill 9");
        check("Ｆｕｌｌ ｗｉｄｔｈ", "full width");
        check("what is this", "what is this");
        check("größe ≥ 3", "größe 3");
        check("", "");
    }
}
