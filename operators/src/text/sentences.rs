//! The sentences of Markdown, as byte ranges of the text as it stands.
//!
//! Invariant: every range lies at character boundaries, is not empty, begins and ends with what is no white space, and
//! ranges rise without touching. Headings, code blocks, raw HTML, front matter, table heads and rules hold no sentence.

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};
use std::ops::Range;

/// What a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A sentence of a paragraph or of a list's item.
    Prose,
    /// A row of a table.
    Row,
}

/// The Markdown that we read.
pub(crate) const MARKDOWN: Options =
    Options::ENABLE_TABLES.union(Options::ENABLE_YAML_STYLE_METADATA_BLOCKS).union(Options::ENABLE_TASKLISTS);

/// The sentences of a text, in order.
pub(crate) fn of(text: &str) -> Vec<(Range<usize>, Kind)> {
    let mut found = Vec::new();
    let mut run: Option<Run> = None;
    // How deep we are in blocks that hold no prose.
    let mut silent = 0_usize;
    for (event, range) in Parser::new_ext(text, MARKDOWN).into_offset_iter() {
        match event {
            Event::Start(Tag::TableRow) => {
                flush(text, &mut run, &mut found);
                if silent == 0 {
                    found.extend(trimmed(text, range).map(|range| (range, Kind::Row)));
                }
                silent += 1;
            }
            Event::Start(tag) if is_silent(&tag) => {
                flush(text, &mut run, &mut found);
                silent += 1;
            }
            Event::End(
                TagEnd::Heading(_)
                | TagEnd::CodeBlock
                | TagEnd::HtmlBlock
                | TagEnd::MetadataBlock(_)
                | TagEnd::TableHead
                | TagEnd::TableRow,
            ) => silent = silent.saturating_sub(1),
            Event::Start(tag) if !is_inline(&tag) => flush(text, &mut run, &mut found),
            Event::End(tag) if !is_inline_end(tag) => flush(text, &mut run, &mut found),
            Event::Rule => flush(text, &mut run, &mut found),
            // The box of a task is no part of what it says.
            Event::End(_) | Event::TaskListMarker(_) => {}
            _ if silent > 0 => {}
            event => {
                let run = run.get_or_insert_with(|| Run { whole: range.clone(), code: Vec::new() });
                run.whole.end = run.whole.end.max(range.end);
                if matches!(event, Event::Code(_)) {
                    run.code.push(range);
                }
            }
        }
    }
    flush(text, &mut run, &mut found);
    found
}

/// Inline text that belongs together, and the code in it, whose stops end no sentence.
struct Run {
    whole: Range<usize>,
    code: Vec<Range<usize>>,
}

fn is_silent(tag: &Tag<'_>) -> bool {
    matches!(
        tag,
        Tag::Heading { .. } | Tag::CodeBlock(_) | Tag::HtmlBlock | Tag::MetadataBlock(_) | Tag::TableHead
    )
}

fn is_inline(tag: &Tag<'_>) -> bool {
    matches!(tag, Tag::Emphasis | Tag::Strong | Tag::Strikethrough | Tag::Link { .. } | Tag::Image { .. })
}

fn is_inline_end(tag: TagEnd) -> bool {
    matches!(tag, TagEnd::Emphasis | TagEnd::Strong | TagEnd::Strikethrough | TagEnd::Link | TagEnd::Image)
}

fn flush(text: &str, run: &mut Option<Run>, found: &mut Vec<(Range<usize>, Kind)>) {
    let Some(Run { whole, code }) = run.take() else { return };
    let mut start = whole.start;
    let ends = ends(&text[whole.clone()]).map(|end| whole.start + end);
    for end in ends.filter(|end| !code.iter().any(|code| code.contains(end))) {
        found.extend(trimmed(text, start..end).map(|range| (range, Kind::Prose)));
        start = end;
    }
    found.extend(trimmed(text, start..whole.end).map(|range| (range, Kind::Prose)));
}

fn trimmed(text: &str, range: Range<usize>) -> Option<Range<usize>> {
    let slice = &text[range.clone()];
    let start = range.start + (slice.len() - slice.trim_start().len());
    let end = range.start + slice.trim_end().len();
    (start < end).then_some(start..end)
}

/// Where sentences of plain prose end: after their stop and what closes with it.
pub(crate) fn ends(prose: &str) -> impl Iterator<Item = usize> + '_ {
    prose.char_indices().filter_map(|(at, stop)| {
        if !matches!(stop, '.' | '!' | '?' | '。' | '！' | '？') {
            return None;
        }
        let after = at + stop.len_utf8();
        let rest = prose[after..].trim_start_matches(['"', '\'', '”', '’', ')', ']', '*', '_']);
        let end = prose.len() - rest.len();
        // Text without blanks between sentences, as in Chinese or Japanese.
        if matches!(stop, '。' | '！' | '？') {
            return Some(end);
        }
        let next = rest.trim_start();
        let is_spaced = next.len() < rest.len();
        let begins = next.chars().next().is_some_and(|c| !c.is_lowercase());
        (is_spaced && begins && !(stop == '.' && is_abbreviation(&prose[..at]))).then_some(end)
    })
}

/// Whether the word before a full stop is one that is written with it.
fn is_abbreviation(before: &str) -> bool {
    const KNOWN: &[&str] =
        &["e.g", "i.e", "etc", "vs", "cf", "approx", "no", "fig", "dr", "mr", "mrs", "ms", "prof", "st"];
    let word = before.rsplit(|c: char| c.is_whitespace() || c == '(').next().unwrap_or_default();
    let initial = word.chars().count() == 1 && word.chars().all(char::is_uppercase);
    initial || KNOWN.iter().any(|known| known.eq_ignore_ascii_case(word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(text: &str, expected: &[&str]) {
        let found: Vec<_> = of(text).into_iter().map(|(range, _)| &text[range]).collect();
        assert_eq!(found, expected, "{text:?}");
    }

    #[test]
    fn prose_is_split_at_its_stops() {
        check("One. Two! Three? Four", &["One.", "Two!", "Three?", "Four"]);
        check(
            "It takes 2.5 s, e.g. With v1.2 of J. Doe. Then (so it ends.) Next.",
            &["It takes 2.5 s, e.g. With v1.2 of J. Doe.", "Then (so it ends.)", "Next."],
        );
        check("Use `a. B` here. *Now.* Go", &["Use `a. B` here.", "*Now.*", "Go"]);
        check("第一。第二。", &["第一。", "第二。"]);
    }

    #[test]
    fn only_prose_and_rows_of_markdown_are_sentences() {
        let text = "---\ntitle: x\n---\n# Head\n\nA *line*\nwrapped. B.\n\n```sh\ncode. Here.\n```\n- item one\n- [ ] item \
                    two\n\n  More. Text.\n\n| K | V |\n|---|---|\n| a | b. C |\n\n---\n<p>no</p>\n";
        check(text, &["A *line*\nwrapped.", "B.", "item one", "item two", "More.", "Text.", "| a | b. C |"]);
    }

    proptest! {
        #[test]
        fn ranges_rise_and_lie_at_characters(text in r"[-a-z.!? \n#`|*\[\]()_>ä語。]{0,200}") {
            let mut last = 0;
            for (range, _) in of(&text) {
                prop_assert!(range.start >= last, "{:?}", range);
                let slice = text.get(range.clone()).unwrap();
                prop_assert!(!slice.is_empty() && slice.trim() == slice);
                last = range.end;
            }
        }
    }
}
