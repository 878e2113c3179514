//! What the model reads and writes: tokens, answers, vectors, relevance.
//!
//! A token is four bytes: of a prompt by length, of an answer each four bytes, widened to whole characters.
//!
//! Invariant: all of it follows from the seed and from what was asked.

use crate::dice::{Dice, first_8};
use std::collections::HashSet;

/// Bytes that count as one token.
const BYTES_A_TOKEN: usize = 4;

/// The words that fill an answer up.
const WORDS: &[&str] = &[
    "a", "after", "all", "and", "answer", "as", "at", "before", "between", "by", "call", "case", "each",
    "end", "far", "few", "first", "for", "from", "given", "half", "has", "here", "in", "is", "it", "kind",
    "last", "less", "like", "long", "made", "many", "more", "most", "much", "next", "no", "of", "on", "one",
    "or", "other", "over", "part", "place", "same", "second", "short", "so", "some", "such", "that", "the",
    "then", "there", "time", "to", "two", "under", "until", "when", "where", "with",
];

/// How many tokens a text has.
pub fn tokens(text: &str) -> u32 {
    u32::try_from(text.len().div_ceil(BYTES_A_TOKEN)).unwrap_or(u32::MAX)
}

/// The tokens of an answer, in order.
pub fn pieces(mut text: &str) -> Vec<&str> {
    let mut pieces = Vec::with_capacity(text.len().div_ceil(BYTES_A_TOKEN));
    while !text.is_empty() {
        let (piece, rest) = text.split_at(text.ceil_char_boundary(BYTES_A_TOKEN));
        pieces.push(piece);
        text = rest;
    }
    pieces
}

/// The hashes of the full blocks of a prompt. Each holds those before it, and the salt, which keeps tenants apart.
pub fn blocks(salt: &str, prompt: &str, block_tokens: u32) -> Vec<u64> {
    let bytes = usize::try_from(block_tokens.max(1)).unwrap_or(usize::MAX).saturating_mul(BYTES_A_TOKEN);
    let mut before = first_8(&blake3::hash(salt.as_bytes()));
    let chain = prompt.as_bytes().chunks_exact(bytes).map(|block| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&before.to_le_bytes());
        hasher.update(block);
        before = first_8(&hasher.finalize());
        before
    });
    chain.collect()
}

/// An answer of about so many tokens. Where the question comes with numbered sources, as Forebay's `infer` writes them, it
/// begins with a quotation from the one that fits best, marked `[n]`.
pub fn answer(question: &str, tokens: u32, dice: &mut Dice) -> String {
    let mut answer = cited(question).unwrap_or_default();
    let bytes = usize::try_from(tokens).unwrap_or(usize::MAX).saturating_mul(BYTES_A_TOKEN).max(answer.len());
    while answer.len() < bytes {
        if !answer.is_empty() {
            answer.push(' ');
        }
        answer.push_str(WORDS[dice.below(WORDS.len())]);
    }
    // What is filled up has its length to the byte; the words are ASCII.
    answer.truncate(bytes);
    answer
}

/// A passage that a prompt brings.
struct Source<'a> {
    number: &'a str,
    text: &'a str,
}

/// The sentence of a source that shares most words with what is asked behind the sources.
fn cited(question: &str) -> Option<String> {
    let (sources, asked) = sources(question);
    let asked = words(asked);
    let mut best: Option<(usize, &str, &str)> = None;
    for Source { number, text } in &sources {
        for sentence in sentences(text) {
            let shared = words(sentence).intersection(&asked).count();
            if best.is_none_or(|(most, ..)| shared > most) {
                best = Some((shared, number, sentence));
            }
        }
    }
    let (_, number, sentence) = best?;
    let quotes = [('"', '"'), ('“', '”'), ('«', '»')];
    let (open, close) = quotes.into_iter().find(|(_, close)| !sentence.contains(*close))?;
    Some(format!("Source {number} says {open}{sentence}{close} [{number}]."))
}

/// The sources of a question, and what stands behind them.
///
/// They look like `<source-1f n="2" from="a > b">`, text, `</source-1f>`, each on lines of their own.
fn sources(question: &str) -> (Vec<Source<'_>>, &str) {
    let (mut sources, mut rest) = (Vec::new(), question);
    while let Some((source, behind)) = next_source(rest) {
        sources.push(source);
        rest = behind;
    }
    (sources, rest)
}

fn next_source(text: &str) -> Option<(Source<'_>, &str)> {
    let (_, from_tag) = text.split_once("<source")?;
    // Not the first ">": names of places have some.
    let (head, body) = from_tag.split_once(">\n")?;
    let (tag, attributes) = head.split_once(' ')?;
    let number = attributes.split_once("n=\"")?.1.split_once('"')?.0;
    let (text, behind) = body.split_once(&format!("\n</source{tag}>"))?;
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then_some((Source { number, text }, behind))
}

/// What may be quoted: parts of a line that end where a sentence does, and are neither headings nor fragments.
fn sentences(text: &str) -> impl Iterator<Item = &str> {
    const BYTES: std::ops::RangeInclusive<usize> = 12..=600;
    text.lines()
        .filter(|line| !line.starts_with(['#', '|', '`', '<']))
        .flat_map(|line| line.split_inclusive(['.', '!', '?', '。', '！', '？']))
        .map(|sentence| sentence.trim().trim_start_matches(['-', '*', ' ']))
        .filter(|sentence| BYTES.contains(&sentence.len()))
}

/// The words of a text that say something.
fn words(text: &str) -> HashSet<String> {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| word.chars().count() > 2);
    words.map(str::to_lowercase).collect()
}

/// A vector of length 1. Texts that share words have vectors that are near.
pub fn embedding(seed: u64, text: &str, dimensions: usize) -> Vec<f32> {
    let mut sum = vec![0.0_f32; dimensions];
    let words = words(text);
    words.iter().for_each(|word| add(seed, word, &mut sum));
    // No words; or two, that cancel each other out.
    if sum.iter().all(|value| *value == 0.0) {
        add(seed, text, &mut sum);
    }
    let length = sum.iter().map(|value| value * value).sum::<f32>().sqrt();
    if length > 0.0 {
        sum.iter_mut().for_each(|value| *value /= length);
    }
    sum
}

/// Adds the signs of a word. Sums of signs are whole numbers, so their order does not matter.
fn add(seed: u64, word: &str, sum: &mut [f32]) {
    let mut dice = Dice::of(seed, &[b"word", word.as_bytes()]);
    for part in sum.chunks_mut(64) {
        let signs = dice.number();
        for (bit, value) in part.iter_mut().enumerate() {
            *value += if signs >> bit & 1 == 0 { 1.0 } else { -1.0 };
        }
    }
}

/// How well a document fits a query, from 0 to 1: the part of the query's words that it has.
pub fn relevance(query: &str, document: &str) -> f64 {
    let (query, document) = (words(query), words(document));
    let shared = query.intersection(&document).count();
    f64::from(u32::try_from(shared).unwrap_or(u32::MAX))
        / f64::from(u32::try_from(query.len().max(1)).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: &str = "<source-ab n=\"1\" from=\"a.md > Lag\">\n# Lag\nLag is small. Segments are rolled at 64 MiB.\n\
        </source-ab>\n<source-ab n=\"2\" from=\"b.md\">\nCompaction keeps the \"youngest\" record of each key.\n\
        </source-ab>\n\n\n";

    fn check(asked: &str, expected: &str) {
        assert_eq!(answer(&format!("{ASKED}{asked}"), 1, &mut Dice::of(1, &[])), expected);
    }

    #[test]
    fn an_answer_quotes_the_sentence_that_fits_best() {
        check("When are segments rolled?", "Source 1 says \"Segments are rolled at 64 MiB.\" [1].");
        check(
            "Which record does compaction keep of a key?",
            "Source 2 says “Compaction keeps the \"youngest\" record of each key.” [2].",
        );
    }

    #[test]
    fn an_answer_has_its_length_and_follows_from_the_seed() {
        let of = |seed, tokens| answer("why?", tokens, &mut Dice::of(seed, &[]));
        assert_eq!(of(1, 50), of(1, 50));
        assert_ne!(of(1, 50), of(2, 50));
        for tokens in [0, 1, 50] {
            assert_eq!(pieces(&of(1, tokens)).len(), usize::try_from(tokens).unwrap());
        }
        assert_eq!(of(1, 0), "");
    }

    #[test]
    fn pieces_are_the_text_and_never_cut_a_character() {
        for text in ["", "abc", "abcdefghi", "äöüß", "日本語のテキスト", "👍👍a👍"] {
            assert_eq!(pieces(text).concat(), text);
        }
        assert_eq!(pieces("abcdefghi"), ["abcd", "efgh", "i"]);
        assert_eq!((tokens(""), tokens("abcde")), (0, 2));
    }

    #[test]
    fn blocks_are_equal_as_far_as_prompts_are_and_salts_part_them() {
        let common = "x".repeat(64 * 3);
        let (one, two) = (blocks("", &format!("{common}{}", "a".repeat(64)), 16), blocks("", &common, 16));
        assert_eq!((one.len(), two.len()), (4, 3));
        assert_eq!(one[..3], two[..]);
        assert!(blocks("tenant", &common, 16).iter().zip(&two).all(|(salted, plain)| salted != plain));
        let later = format!("y{}", &common[1..]);
        assert!(
            blocks("", &later, 16).iter().zip(&two).all(|(other, plain)| other != plain),
            "all behind differ"
        );
    }

    #[test]
    fn texts_that_share_words_are_near() {
        let of = |text: &str| embedding(1, text, 384);
        let near = |one: &[f32], two: &[f32]| one.iter().zip(two).map(|(a, b)| a * b).sum::<f32>();
        let (a, b, c) =
            (of("the broker keeps segments"), of("segments that the broker keeps"), of("bananas are bent"));
        assert!((near(&a, &a) - 1.0).abs() < 1e-4);
        assert!(near(&a, &b) > 0.5 && near(&a, &c).abs() < 0.3, "{} {}", near(&a, &b), near(&a, &c));
        assert_eq!(of("").len(), 384);
        assert!(
            relevance("broker segments", "segments of a broker") > relevance("broker segments", "a broker")
        );
    }
}
