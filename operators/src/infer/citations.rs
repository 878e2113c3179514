//! Finds in the passages what a served model's answer rests on.
//!
//! The model is asked to write `[n]` after each statement. For each it gets a citation of passage n: what the statement
//! quotes, where that stands there; else the sentence there that shares most words with it.
//!
//! Invariant: a citation is byte for byte what stands in a passage. A mark for which nothing there can be found gives
//! none: a missing citation is honest, an invented one is not.

use crate::text::{sentences, words};
use forebay_schemas::{Citation, Passage};
use std::{collections::HashSet, ops::Range};

/// The most citations of an answer.
const CITATIONS_MAX: usize = 64;
/// Shorter quotations stand everywhere.
const QUOTE_CHARS_MIN: usize = 8;
/// The part of a statement's words that a sentence must share to be what it rests on.
const SHARED_MIN: f32 = 0.25;
/// And at least so many of them.
const SHARED_WORDS_MIN: usize = 2;

/// The citations of an answer, in its order, each once.
pub(super) fn find(answer: &str, passages: &[Passage]) -> Vec<Citation> {
    let mut found: Vec<Citation> = Vec::new();
    for (statement, numbers) in statements(answer) {
        for number in numbers {
            let Some(passage) = number.checked_sub(1).and_then(|place| passages.get(place)) else { continue };
            for range in evidence(&statement, &passage.text) {
                let citation = citation(passage, range);
                if found.len() < CITATIONS_MAX && !found.contains(&citation) {
                    found.push(citation);
                }
            }
        }
    }
    found
}

/// Whether it has a mark that leads to no passage: its model made a source up.
pub(super) fn makes_up(answer: &str, passages: &[Passage]) -> bool {
    let exists = |number: &usize| (1..=passages.len()).contains(number);
    statements(answer).iter().flat_map(|(_, numbers)| numbers).any(|number| !exists(number))
}

fn citation(passage: &Passage, range: Range<usize>) -> Citation {
    Citation {
        document: passage.document.clone(),
        version: passage.version.clone(),
        start: passage.start + range.start,
        end: passage.start + range.end,
        quote: passage.text[range].to_owned(),
    }
}

/// The statements that bear marks, with the numbers in these. A statement is what stands since the mark or the end of
/// a sentence before it.
fn statements(answer: &str) -> Vec<(String, Vec<usize>)> {
    let mut statements: Vec<(String, Vec<usize>)> = Vec::new();
    let mut rest = answer;
    while let Some((before, numbers, after)) = next_mark(rest) {
        let before = before.trim_start_matches(['.', '!', '?', ',', ';', ':', ' ']).trim_end();
        // "… so. [1]" marks the sentence that just ended; "… so [1]." the one that is ending.
        let start = sentences::ends(before).filter(|end| *end < before.len()).last().unwrap_or(0);
        match statements.last_mut() {
            Some((_, marked)) if before.is_empty() => marked.extend(numbers),
            _ => statements.push((before[start..].trim().to_owned(), numbers)),
        }
        rest = after;
    }
    statements
}

/// The next `[1]` or `[1, 2]`: what stands before it, its numbers, what stands after it.
fn next_mark(text: &str) -> Option<(&str, Vec<usize>, &str)> {
    let mut from = 0;
    while let Some(open) = text[from..].find('[').map(|at| from + at) {
        let close = open + text[open..].find(']')?;
        let numbers: Option<Vec<usize>> =
            text[open + 1..close].split(',').map(|number| number.trim().parse().ok()).collect();
        if let Some(numbers) = numbers {
            return Some((&text[..open], numbers, &text[close + 1..]));
        }
        from = open + 1;
    }
    None
}

/// Where in a passage stands what a statement rests on.
fn evidence(statement: &str, passage: &str) -> Vec<Range<usize>> {
    let quoted = quotations(statement).filter_map(|quote| passage.find(quote).map(|at| at..at + quote.len()));
    let quoted: Vec<_> = quoted.collect();
    if !quoted.is_empty() {
        return quoted;
    }
    nearest(statement, passage).into_iter().collect()
}

/// What stands in quotation marks.
fn quotations(statement: &str) -> impl Iterator<Item = &str> {
    let pairs = [('"', '"'), ('“', '”'), ('«', '»'), ('`', '`')];
    pairs.into_iter().flat_map(move |(open, close)| {
        let mut rest = statement;
        std::iter::from_fn(move || {
            let start = rest.find(open)? + open.len_utf8();
            let end = start + rest[start..].find(close)?;
            let quote = &rest[start..end];
            rest = &rest[end + close.len_utf8()..];
            Some(quote.trim())
        })
        .filter(|quote| quote.chars().count() >= QUOTE_CHARS_MIN)
    })
}

/// The sentence that shares most words with the statement, if it shares enough.
fn nearest(statement: &str, passage: &str) -> Option<Range<usize>> {
    let said: HashSet<String> = words::stems(statement).into_iter().collect();
    let mut best: Option<(usize, Range<usize>)> = None;
    for (range, _) in sentences::of(passage) {
        let stems: HashSet<String> = words::stems(&passage[range.clone()]).into_iter().collect();
        let shared = stems.intersection(&said).count();
        if best.as_ref().is_none_or(|(most, _)| shared > *most) {
            best = Some((shared, range));
        }
    }
    let (shared, range) = best?;
    let float = |count: usize| f32::from(u16::try_from(count).unwrap_or(u16::MAX));
    let is_enough = shared >= SHARED_WORDS_MIN && float(shared) >= SHARED_MIN * float(said.len());
    is_enough.then_some(range)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;
    use proptest::prelude::*;

    const ONE: &str = "The broker keeps records in segments. A segment is rolled at 64 MiB.";
    const TWO: &str = "Compaction keeps the youngest record of each key.";

    fn check(answer: &str, expected: &[&str]) {
        let found = find(answer, &[samples::passage(ONE), samples::passage(TWO)]);
        let quotes: Vec<_> = found.iter().map(|citation| citation.quote.as_str()).collect();
        assert_eq!(quotes, expected, "{answer}");
    }

    #[test]
    fn a_mark_leads_to_what_the_statement_quotes_or_shares_most_with() {
        let (first, second) = ("The broker keeps records in segments.", "A segment is rolled at 64 MiB.");
        check("Records are kept in segments by the broker [1].", &[first]);
        check(
            "Segments roll at 64 MiB. [1] Keys stay: the \"youngest record of each\" one [2].",
            &[second, "youngest record of each"],
        );
        check(
            "The broker keeps segments of records, and compaction the youngest record [1][2].",
            &[first, TWO],
        );
        check(
            "The broker keeps segments of records, and compaction the youngest record [1, 2].",
            &[first, TWO],
        );
        check("The broker keeps records [1]. The broker keeps records [1].", &[first]);
    }

    #[test]
    fn a_mark_for_which_nothing_is_found_gives_no_citation() {
        check("The broker keeps records in segments.", &[]);
        check("The broker keeps records in segments [3] [0] [x] [1", &[]);
        check("Bananas are yellow and bent [1].", &[]);
        check("[1]", &[]);
        check("It says \"the broker loses records\" [2].", &[]);
    }

    #[test]
    fn a_mark_of_no_passage_is_made_up() {
        let passages = [samples::passage(ONE), samples::passage(TWO)];
        for (answer, expected) in [
            ("So it is [1][2].", false),
            ("So it is [3].", true),
            ("So [1, 9].", true),
            ("So [0].", true),
            ("So.", false),
        ] {
            assert_eq!(makes_up(answer, &passages), expected, "{answer}");
        }
    }

    proptest! {
        #[test]
        fn no_citation_is_invented(
            answer in r#"(broker |keeps |segment |"records in segments" |ä|\. |\[[0-3x, ]{1,4}\]|\[|\]|"|語){0,30}"#
        ) {
            let passages = [samples::passage(ONE), samples::passage(TWO)];
            for Citation { version, start, end, quote, .. } in find(&answer, &passages) {
                let passage = passages.iter().find(|passage| passage.version == version).unwrap();
                prop_assert_eq!(&passage.text[start - passage.start..end - passage.start], quote);
            }
        }
    }
}
