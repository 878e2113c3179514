//! Splits a document into pieces that are small enough to retrieve and large enough to understand.
//!
//! A piece never crosses a heading. Within one it holds whole sentences, list items, table rows and code blocks, up to
//! about [`PIECE_BYTES_MAX`]; what alone is longer is cut at a line, a blank or at worst a character. Neighbours
//! overlap by whole sentences, up to [`OVERLAP_BYTES_MAX`], so that what stands at a seam is found from both sides.
//!
//! Invariant: every piece is a byte range of the text at character boundaries, and all text that says something,
//! but for headings and front matter, lies in at least one piece.

use super::{BYTES_A_TOKEN, sentences};
use forebay_schemas::Format;
use pulldown_cmark::{Event, HeadingLevel, Parser, Tag, TagEnd};
use std::ops::Range;

/// The longest piece: 400 tokens.
pub(crate) const PIECE_BYTES_MAX: usize = 400 * BYTES_A_TOKEN;
/// The most that two neighbours share: an eighth.
pub(crate) const OVERLAP_BYTES_MAX: usize = PIECE_BYTES_MAX / 8;

/// A piece of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where it stands.
    pub range: Range<usize>,
    /// The headings above it, outermost first.
    pub heading: Vec<String>,
}

/// What stands between two headings.
#[derive(Default)]
struct Section {
    heading: Vec<String>,
    /// What is not cut without need, in order.
    units: Vec<Range<usize>>,
}

/// Splits a text.
pub(crate) fn split(text: &str, format: Format) -> Vec<Piece> {
    let sections = match format {
        Format::Markdown => markdown(text),
        Format::Text => vec![Section { heading: Vec::new(), units: paragraphs(text) }],
    };
    sections.into_iter().flat_map(|section| pack(text, section)).collect()
}

/// Fills pieces with units.
fn pack(text: &str, section: Section) -> Vec<Piece> {
    let units: Vec<_> = section.units.into_iter().flat_map(|unit| shatter(text, unit)).collect();
    let mut pieces = Vec::new();
    let mut first = 0;
    while first < units.len() {
        let start = units[first].start;
        let fits = units[first..].iter().take_while(|unit| unit.end - start <= PIECE_BYTES_MAX).count();
        // A unit alone always fits: it was shattered.
        let next = first + fits.max(1);
        let end = units[next - 1].end;
        pieces.push(Piece { range: start..end, heading: section.heading.clone() });
        let Some(following) = units.get(next) else { break };
        // The overlap must leave room for what follows, or the next piece would bring nothing new.
        let is_shared = |unit: &&Range<usize>| {
            end - unit.start <= OVERLAP_BYTES_MAX && following.end - unit.start <= PIECE_BYTES_MAX
        };
        let shared = units[first + 1..next].iter().rev().take_while(is_shared).count();
        first = next - shared;
    }
    pieces
}

/// Cuts what is longer than a piece, at a line, else at a blank, else at a character.
fn shatter(text: &str, unit: Range<usize>) -> Vec<Range<usize>> {
    let mut parts = Vec::new();
    let mut rest = unit;
    while rest.len() > PIECE_BYTES_MAX {
        let cut = text.floor_char_boundary(rest.start + PIECE_BYTES_MAX);
        let head = &text[rest.start..cut];
        let at = head.rfind('\n').or_else(|| head.rfind(char::is_whitespace)).filter(|at| *at > 0);
        let cut = at.map_or(cut, |at| rest.start + at);
        parts.extend(trimmed(text, rest.start..cut));
        rest.start = cut;
    }
    parts.extend(trimmed(text, rest));
    parts
}

/// The range without white space around it; blanks that indent its first line stay, where they are in the range.
fn trimmed(text: &str, range: Range<usize>) -> Option<Range<usize>> {
    let slice = &text[range.clone()];
    let blank = slice.len() - slice.trim_start().len();
    let start = slice[..blank].rfind('\n').map_or(blank, |at| at + 1);
    let end = range.start + slice.trim_end().len();
    (blank < slice.len()).then_some(range.start + start..end)
}

/// The sentences of a plain text; a blank line ends one too.
fn paragraphs(text: &str) -> Vec<Range<usize>> {
    let mut units = Vec::new();
    let mut start = 0;
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        if line.trim().is_empty() {
            sentence_units(text, start..at, &mut units);
            start = at + line.len();
        }
        at += line.len();
    }
    sentence_units(text, start..at, &mut units);
    units
}

fn sentence_units(text: &str, paragraph: Range<usize>, units: &mut Vec<Range<usize>>) {
    let mut start = paragraph.start;
    for end in sentences::ends(&text[paragraph.clone()]).map(|end| paragraph.start + end) {
        units.extend(trimmed(text, start..end));
        start = end;
    }
    units.extend(trimmed(text, start..paragraph.end));
}

/// The sections of a Markdown text.
fn markdown(text: &str) -> Vec<Section> {
    let mut sections = vec![Section::default()];
    let mut path: Vec<(HeadingLevel, String)> = Vec::new();
    let mut events = Parser::new_ext(text, sentences::MARKDOWN).into_offset_iter();
    while let Some((event, range)) = events.next() {
        match event {
            Event::Start(Tag::Heading { level, .. }) => {
                let title = title(&mut events);
                path.retain(|(above, _)| *above < level);
                path.push((level, title));
                let heading = path.iter().map(|(_, title)| title.clone()).collect();
                sections.push(Section { heading, units: Vec::new() });
            }
            Event::Start(tag) => {
                let children = children(&mut events);
                let Some(section) = sections.last_mut() else { continue };
                match tag {
                    Tag::MetadataBlock(_) => {}
                    Tag::Paragraph => sentence_units(text, range, &mut section.units),
                    Tag::List(_) | Tag::BlockQuote(_) | Tag::Table(_) => {
                        section.units.extend(children.into_iter().filter_map(|child| trimmed(text, child)));
                    }
                    _ => section.units.extend(trimmed(text, range)),
                }
            }
            _ => {}
        }
    }
    sections
}

/// Reads on to the end of a heading and gives its text.
fn title<'t>(events: &mut impl Iterator<Item = (Event<'t>, Range<usize>)>) -> String {
    let mut title = String::new();
    for (event, _) in events {
        match event {
            Event::End(TagEnd::Heading(_)) => break,
            Event::Text(text) | Event::Code(text) => title.push_str(&text),
            Event::SoftBreak | Event::HardBreak => title.push(' '),
            _ => {}
        }
    }
    title.trim().to_owned()
}

/// Reads on to the end of a block and gives the blocks right below it.
fn children<'t>(events: &mut impl Iterator<Item = (Event<'t>, Range<usize>)>) -> Vec<Range<usize>> {
    let mut children = Vec::new();
    let mut depth = 0_usize;
    for (event, range) in events {
        match event {
            Event::Start(_) => {
                if depth == 0 {
                    children.push(range);
                }
                depth += 1;
            }
            Event::End(_) if depth == 0 => break,
            Event::End(_) => depth -= 1,
            _ => {}
        }
    }
    children
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Shows each piece as `heading>heading: text`.
    fn check(text: &str, format: Format, expected: &[&str]) {
        let shown = |piece: Piece| format!("{}: {}", piece.heading.join(">"), &text[piece.range]);
        let found: Vec<_> = split(text, format).into_iter().map(shown).collect();
        assert_eq!(found, expected, "{text:?}");
    }

    #[test]
    fn a_piece_stays_under_its_heading() {
        let text = "Intro.\n\n# A `b`\nOne.\n\nTwo.\n## C\n- x\n- y\n# D\n";
        check(text, Format::Markdown, &[": Intro.", "A b: One.\n\nTwo.", "A b>C: - x\n- y"]);
    }

    #[test]
    fn code_is_kept_whole_and_front_matter_is_left_out() {
        let text = "---\na: b\n---\n\n    indented\n\n```sh\n# no heading\n```\n";
        check(text, Format::Markdown, &[": indented\n\n```sh\n# no heading\n```"]);
    }

    #[test]
    fn a_plain_text_has_no_headings() {
        check("# One.\n\nTwo. Three\n", Format::Text, &[": # One.\n\nTwo. Three"]);
        check(" \n\n", Format::Text, &[]);
    }

    #[test]
    fn neighbours_share_whole_sentences() {
        let text: String = (0..150).map(|n| format!("This is sentence number {n:04}. ")).collect();
        let pieces = split(&text, Format::Text);
        assert_eq!(pieces.len(), 4);
        for pair in pieces.windows(2) {
            let shared = &text[pair[1].range.start..pair[0].range.end];
            assert!(shared.starts_with("This is") && shared.ends_with('.'), "{shared}");
            let tenth = PIECE_BYTES_MAX / 10;
            assert!((tenth..=OVERLAP_BYTES_MAX).contains(&shared.len()), "{} bytes", shared.len());
        }
    }

    fn check_pieces(text: &str, format: Format) -> Result<(), TestCaseError> {
        let mut covered = vec![false; text.len()];
        for Piece { range, .. } in split(text, format) {
            prop_assert!(range.len() <= PIECE_BYTES_MAX);
            prop_assert!(text.get(range.clone()).is_some_and(|text| !text.trim().is_empty()));
            covered[range].fill(true);
        }
        if format == Format::Text {
            for (at, char) in text.char_indices() {
                prop_assert!(covered[at] || char.is_whitespace(), "byte {} is in no piece", at);
            }
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn pieces_are_slices_and_lose_nothing(
            text in r"(?s)([-#>|`*. \n]{0,6}(word|ä語。|Über\. |\w{0,2000}|[^\x00]{0,40})){0,24}"
        ) {
            check_pieces(&text, Format::Text)?;
            check_pieces(&text, Format::Markdown)?;
        }
    }
}
