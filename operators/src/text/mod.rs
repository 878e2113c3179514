//! Words, sentences and lengths of text: what retrieval, extraction and caching share.

pub(crate) mod sentences;
pub(crate) mod split;
pub(crate) mod words;

use unicode_normalization::UnicodeNormalization as _;

/// Estimates tokens: a token of English is about four bytes. Only budgets hang on it, never a bill.
pub(crate) fn tokens(text: &str) -> usize {
    text.len().div_ceil(BYTES_A_TOKEN)
}

/// Bytes that count as one token.
pub(crate) const BYTES_A_TOKEN: usize = 4;

/// A passage as it is read alone: its headings say what a short one is about.
pub(crate) fn under(heading: &[String], text: &str) -> String {
    match heading.is_empty() {
        true => text.to_owned(),
        false => format!("{}\n{text}", heading.join(" > ")),
    }
}

/// The text with white space folded: one blank between words, none around.
pub(crate) fn folded(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The form in which two questions are compared: Unicode's compatibility composition, white space folded. Case
/// stays: "US" is not "us".
pub(crate) fn canonical(question: &str) -> String {
    folded(&question.nfkc().collect::<String>())
}
