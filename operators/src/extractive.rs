//! A model without weights: it answers with the sentences of the passages that share most with the question, and cites
//! each of them. It writes nothing of its own and says so by its name.
//!
//! Invariant: what it says stands in a passage, and each citation is byte for byte what stands there. Where no passage
//! shares enough with the question it says that, and cites nothing.

use crate::text::{
    folded,
    sentences::{self, Kind},
    tokens, words,
};
use forebay_calls::{Call, CallError, Class, Listener, Model, Reply, Task, Tried, Upstream};
use forebay_schemas::{Citation, NanoUsd, Passage, Usage};
use futures::future::BoxFuture;
use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    sync::{Arc, LazyLock, PoisonError, RwLock},
};
use tokio::time::Instant;

/// The name under which it answers, as a model and as a provider.
pub const NAME: &str = "extractive";
/// What it says where it has nothing to say.
pub const NO_ANSWER: &str = "No passage answers this.";

/// The most sentences of an answer.
const SENTENCES_MAX: usize = 3;
/// The part of the question's weight that a sentence, its headings included, must share; below it is chance.
const COVERAGE_MIN: f32 = 0.34;
/// A further sentence must reach this part of the best one's score.
const FURTHER_MIN: f32 = 0.75;
/// What a word counts that stands in the headings above a sentence and not in it.
const HEADING_WEIGHT: f32 = 0.5;
/// What a row of a table is worth beside prose, and what leads up to something else (`… as follows:`).
const ROW_WEIGHT: f32 = 0.8;
const LEAD_WEIGHT: f32 = 0.5;
/// What each place lost in the ranking of passages costs.
const RANK_DISCOUNT: f32 = 0.05;
/// What two words gain that stand together as in the question.
const TOGETHER_BONUS: f32 = 0.1;
/// Fewer words say too little to answer, more are more than an answer.
const WORDS_MIN: usize = 4;
const WORDS_MAX: usize = 45;

/// The extractive model.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extractive;

impl Model for Extractive {
    fn provider(&self) -> &'static str {
        NAME
    }

    fn reads_messages(&self) -> bool {
        false
    }

    fn name(&self) -> &str {
        NAME
    }

    fn is_local(&self) -> bool {
        true
    }

    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        Box::pin(async move {
            if call.task != Task::Answer {
                return Err(CallError::new(
                    Class::Rejected,
                    "model_rejected",
                    "the extractive model only answers",
                ));
            }
            let to = Upstream { provider: NAME, endpoint: None, model: NAME };
            listener.started(to);
            let sent = Instant::now();
            let (text, citations) = answer(&call.question, call.passages);
            let read = call.passages.iter().map(|passage| tokens(&passage.text)).sum::<usize>();
            let count = |tokens| u64::try_from(tokens).unwrap_or(u64::MAX);
            let (prompt_tokens, completion_tokens) =
                (count(read + tokens(&call.question)), count(tokens(&text)));
            if call.stream {
                listener.token(&text);
            }
            let reply = Reply {
                text,
                vectors: Vec::new(),
                citations: Some(citations),
                model: NAME.to_owned(),
                usage: Some(Usage::of(prompt_tokens, completion_tokens)),
                cost_nano_usd: Some(NanoUsd(0)),
                finish_reason: Some("stop".to_owned()),
                ttft: call.stream.then(|| sent.elapsed()),
                fallback: None,
                ..Reply::default()
            };
            let (duration, ttft) = (sent.elapsed(), reply.ttft);
            listener.ended(&Tried { to, duration, ttft, result: Ok(&reply) });
            Ok(reply)
        })
    }
}

/// Passages whose sentences are kept, at about 10 KiB each.
const READ_MAX: usize = 2000;

/// What reading gave, by the chunk's id. Reading is most of the work of an answer, and the same passages come again and
/// again; headings and text are compared, so that what is remembered can only ever save work.
static READ: LazyLock<RwLock<HashMap<String, Arc<Read>>>> = LazyLock::new(RwLock::default);

/// The sentences of a passage, each with its stems.
struct Read {
    heading: Vec<String>,
    text: String,
    heading_stems: HashSet<String>,
    sentences: Vec<(Range<usize>, Kind, Vec<String>)>,
    /// From a stem to the sentences that have it, each once.
    holders: HashMap<String, Vec<usize>>,
}

impl Read {
    fn of(passage: &Passage) -> Arc<Self> {
        let known = READ.read().unwrap_or_else(PoisonError::into_inner).get(&passage.chunk).cloned();
        if let Some(read) = known.filter(|read| read.text == passage.text && read.heading == passage.heading)
        {
            return read;
        }
        let read = Arc::new(Self::new(passage.heading.clone(), passage.text.clone()));
        let mut all = READ.write().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= READ_MAX {
            all.clear();
        }
        all.insert(passage.chunk.clone(), read.clone());
        read
    }

    fn new(heading: Vec<String>, text: String) -> Self {
        let with_stems = |(range, kind): (Range<usize>, Kind)| {
            let stems = words::stems(&text[range.clone()]);
            (range, kind, stems)
        };
        let sentences: Vec<_> = sentences::of(&text).into_iter().map(with_stems).collect();
        let mut holders: HashMap<String, Vec<usize>> = HashMap::new();
        for (place, (_, _, stems)) in sentences.iter().enumerate() {
            for stem in stems {
                let places = holders.entry(stem.clone()).or_default();
                if places.last() != Some(&place) {
                    places.push(place);
                }
            }
        }
        let heading_stems = heading.iter().flat_map(|heading| words::stems(heading)).collect();
        Self { heading, text, heading_stems, sentences, holders }
    }
}

/// A sentence of a passage.
struct Sentence<'p> {
    passage: &'p Passage,
    /// The place of its passage among the passages, best first.
    rank: usize,
    range: Range<usize>,
    kind: Kind,
    stems: &'p [String],
    score: f32,
    /// Part of the question's weight that it shares, its headings included.
    coverage: f32,
}

impl Sentence<'_> {
    fn text(&self) -> &str {
        &self.passage.text[self.range.clone()]
    }

    /// Bytes of the document.
    fn place(&self) -> Range<usize> {
        self.passage.start + self.range.start..self.passage.start + self.range.end
    }

    /// Neighbouring passages overlap: the same bytes may be met twice, and the same words in another document too.
    fn repeats(&self, other: &Self) -> bool {
        let (one, two) = (self.place(), other.place());
        let same_document = self.passage.document == other.passage.document;
        (same_document && one.start < two.end && two.start < one.end) || self.stems == other.stems
    }

    /// Whether it points back at what was said before it.
    fn points_back(&self) -> bool {
        let first = self.text().split(|c: char| !c.is_alphabetic()).next().unwrap_or_default();
        ["it", "its", "this", "these", "they", "that", "such", "then"]
            .iter()
            .any(|word| word.eq_ignore_ascii_case(first))
    }

    fn citation(&self) -> Citation {
        let Range { start, end } = self.place();
        let (document, version) = (self.passage.document.clone(), self.passage.version.clone());
        Citation { document, version, start, end, quote: self.text().to_owned() }
    }

    /// As it is said: on one line, a row without its bars, with a stop at its end.
    fn said(&self) -> String {
        let mut said = match self.kind {
            Kind::Prose => folded(self.text()),
            Kind::Row => {
                let cells = self.text().split('|').map(str::trim).filter(|cell| !cell.is_empty());
                cells.collect::<Vec<_>>().join(": ")
            }
        };
        if !said.ends_with(['.', '!', '?', ':', ';', '。', '！', '？', '"', '”']) {
            said.push('.');
        }
        said
    }
}

fn answer(question: &str, passages: &[Passage]) -> (String, Vec<Citation>) {
    let asked = words::stems(question);
    let read: Vec<_> = passages.iter().map(Read::of).collect();
    let mut sentences = sentences(passages, &read);
    score(&asked, &read, &mut sentences);
    let chosen = choose(&sentences);
    if chosen.is_empty() {
        return (NO_ANSWER.to_owned(), Vec::new());
    }
    let said: Vec<_> = chosen.iter().map(|sentence| sentence.said()).collect();
    (said.join(" "), chosen.iter().map(|sentence| sentence.citation()).collect())
}

/// All sentences, passage by passage.
fn sentences<'p>(passages: &'p [Passage], read: &'p [Arc<Read>]) -> Vec<Sentence<'p>> {
    let mut all = Vec::new();
    for (rank, (passage, read)) in passages.iter().zip(read).enumerate() {
        for (range, kind, stems) in &read.sentences {
            let (range, kind) = (range.clone(), *kind);
            all.push(Sentence { passage, rank, range, kind, stems, score: 0.0, coverage: 0.0 });
        }
    }
    all
}

/// Scores each sentence by the part of the question that it shares, rare words counting more.
fn score(asked: &[String], read: &[Arc<Read>], sentences: &mut [Sentence<'_>]) {
    let distinct: HashSet<&String> = asked.iter().collect();
    let mut distinct: Vec<_> = distinct.into_iter().collect();
    // Sums of floats depend on their order.
    distinct.sort();
    let all = float(sentences.len());
    // What the words weigh that stand in each sentence, and those that stand in the headings above it only.
    let (mut inside, mut above) = (vec![0.0; sentences.len()], vec![0.0; sentences.len()]);
    let mut whole = 0.0;
    for stem in distinct {
        let holders = || read.iter().map(|read| read.holders.get(stem).map_or(&[][..], Vec::as_slice));
        let count: usize = holders().map(<[_]>::len).sum();
        // A word that no sentence has weighs most: a question about something else must not be answered.
        let rarity = if count == 0 { 0.5 } else { float(count) };
        let weight = (1.0 + all / rarity).ln();
        whole += weight;
        // The sentences of a passage follow each other and have their headings in common.
        let mut first = 0;
        for (read, holders) in read.iter().zip(holders()) {
            let end = first + read.sentences.len();
            for place in holders {
                inside[first + place] += weight;
            }
            if read.heading_stems.contains(stem) {
                let has = |place: usize| holders.binary_search(&(place - first)).is_ok();
                (first..end).filter(|place| !has(*place)).for_each(|place| above[place] += weight);
            }
            first = end;
        }
    }
    for (sentence, (inside, above)) in sentences.iter_mut().zip(inside.into_iter().zip(above)) {
        // Headings alone would let every sentence below a good heading answer.
        if inside == 0.0 {
            continue;
        }
        sentence.coverage = (inside + HEADING_WEIGHT * above) / whole;
        let together = asked.windows(2).filter(|pair| sentence.stems.windows(2).any(|other| &other == pair));
        let score = sentence.coverage + TOGETHER_BONUS * float(together.count()).min(2.0);
        sentence.score = score * form(sentence) * (1.0 - RANK_DISCOUNT * float(sentence.rank)).max(0.5);
    }
}

/// What the form of a sentence makes of its worth as an answer.
fn form(sentence: &Sentence<'_>) -> f32 {
    let length = sentence.stems.len();
    let of_length = match length {
        0..WORDS_MIN => 0.6,
        WORDS_MIN..=WORDS_MAX => 1.0,
        _ => 0.8,
    };
    let of_kind = if sentence.kind == Kind::Row { ROW_WEIGHT } else { 1.0 };
    let of_end = match sentence.text().chars().last() {
        Some(':') => LEAD_WEIGHT,
        Some('?') => 0.6,
        _ => 1.0,
    };
    of_length * of_kind * of_end
}

/// The best sentence, what it points back at, and what comes close to it; in the order of their documents.
fn choose<'s, 'p>(sentences: &'s [Sentence<'p>]) -> Vec<&'s Sentence<'p>> {
    let mut order: Vec<usize> = (0..sentences.len()).collect();
    // The sort is stable: of equals the one of the better passage comes first.
    order.sort_by(|a, b| sentences[*b].score.total_cmp(&sentences[*a].score));
    let best = order.first().map_or(0.0, |best| sentences[*best].score);
    let mut chosen: Vec<usize> = Vec::new();
    for place in order {
        let sentence = &sentences[place];
        let is_close = sentence.score >= best * FURTHER_MIN && sentence.coverage >= COVERAGE_MIN;
        if chosen.len() == SENTENCES_MAX || !is_close {
            break;
        }
        if chosen.iter().any(|other| sentences[*other].repeats(sentence)) {
            continue;
        }
        let before = place.checked_sub(1).filter(|before| sentences[*before].rank == sentence.rank);
        chosen.push(place);
        let Some(before) = before.filter(|_| sentence.points_back()) else { continue };
        let is_new = !chosen.iter().any(|other| sentences[*other].repeats(&sentences[before]));
        if is_new && chosen.len() < SENTENCES_MAX {
            chosen.push(before);
        }
    }
    // The best passage speaks first; within one the order is the document's.
    chosen.sort_unstable();
    chosen.into_iter().map(|place| &sentences[place]).collect()
}

/// Small counts as floats.
fn float(count: usize) -> f32 {
    f32::from(u16::try_from(count).unwrap_or(u16::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_schemas::DocumentVersion;
    use proptest::prelude::*;

    const GUIDE: &str = "The broker keeps records in segments. It rolls a segment at 64 MiB.\n\n```sh\nforebay up \
        --data here\n```\n\n- Compaction keeps the youngest record of each key.\n- Retention deletes old segments \
        after 7 days.\n\n| Topic | Kept |\n|---|---|\n| `results` | seven days |\n";

    fn passage(document: &str, start: usize, text: &str) -> Passage {
        Passage {
            document: document.to_owned(),
            version: DocumentVersion::of(text),
            chunk: format!("{document}:{start}"),
            start,
            end: start + text.len(),
            heading: vec!["The broker".to_owned()],
            text: text.to_owned(),
            score: 1.0,
        }
    }

    fn check(question: &str, expected: &str) {
        let other = passage("other", 7, "A gateway speaks HTTP. Clients read results from it.");
        let (text, citations) = answer(question, &[passage("broker", 100, GUIDE), other]);
        assert_eq!(text, expected, "{question}");
        assert_eq!(citations.is_empty(), expected == NO_ANSWER);
    }

    #[test]
    fn it_answers_with_the_sentences_that_share_most_with_the_question() {
        check("What does compaction keep?", "Compaction keeps the youngest record of each key.");
        check(
            "After how many days are old segments deleted?",
            "Retention deletes old segments after 7 days.",
        );
        check("Who speaks HTTP?", "A gateway speaks HTTP.");
        let both = "The broker keeps records in segments. It rolls a segment at 64 MiB.";
        check("At what size in MiB does it roll a segment?", both);
    }

    #[test]
    fn it_says_when_no_passage_answers() {
        check("Who won the chess championship in Reykjavik?", NO_ANSWER);
        check("", NO_ANSWER);
        assert_eq!(answer("what is lag", &[]).0, NO_ANSWER);
    }

    proptest! {
        #[test]
        fn a_citation_is_byte_for_byte_what_stands_in_the_passage(
            text in r"([-#>|`*. \n]{0,4}(lag|ä語。|Über lag\. |\w{1,9}|Lag is (good|bad)[.!?] )){0,30}", start in 0..9999_usize
        ) {
            let passage = passage("d", start, &text);
            let (said, citations) = answer("what is lag, über", std::slice::from_ref(&passage));
            prop_assert_eq!(citations.is_empty(), said == NO_ANSWER);
            for Citation { start: from, end: to, quote, .. } in citations {
                prop_assert_eq!(text.get(from - start..to - start), Some(quote.as_str()));
            }
        }
    }
}
