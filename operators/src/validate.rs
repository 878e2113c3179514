//! Judges an answer before anyone sees it.
//!
//! Invariant: what passes is not empty, and each of its citations stands byte for byte in a passage that the model saw.
//! Answers of the cache are judged like any other.

use crate::catalogue::{Resources, Shipped};
use forebay_operator::{Context, Event, Failure, Operator, ports};
use forebay_schemas::{
    Citation, Completion, Ending, Fault, Finding, Hop, Judgement, Passage, Status, Verdict,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `validate` has none yet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {}

ports! {
    /// What `validate` gives.
    pub enum Validated {
        /// The answer goes out.
        Passed(Ending) = "passed",
        /// It does not.
        Blocked(Ending) = "blocked",
    }
}

/// The operator `validate`.
pub struct Validate;

impl Shipped for Validate {
    type Settings = Settings;

    fn new(Settings {}: Settings, _: &Resources) -> Self {
        Self
    }
}

impl Operator for Validate {
    const NAME: &'static str = "validate";
    const HOP: Option<Hop> = Some(Hop::Validate);
    type In = Completion;
    type Out = Validated;

    async fn process(&self, completion: Completion, cx: &Context) -> Result<Vec<Validated>, Failure> {
        let Completion { passages, answer, .. } = &completion;
        let findings = findings(&answer.text, &answer.citations, passages);
        let judgement = if findings.is_empty() { Judgement::Pass } else { Judgement::Block };
        cx.observe(&Event::Judged { judgement: judgement.as_str() });
        let error = findings.first().map(|Finding { code, message }| {
            let message = format!("the answer was held back: {message}");
            Fault { code: code.clone(), message }
        });
        let status = if error.is_none() { Status::Answered } else { Status::Blocked };
        let Completion { request, retrieval, passages, cache, answer } = completion;
        let ending = Ending {
            status,
            stage: cx.stage().to_owned(),
            request: Some(request),
            retrieval,
            chunks: passages.into_iter().map(|passage| passage.chunk).collect(),
            cache,
            answer: Some(answer),
            verdict: Some(Verdict { judgement, findings }),
            error,
        };
        Ok(vec![match judgement {
            Judgement::Block => Validated::Blocked(ending),
            Judgement::Pass | Judgement::Annotate => Validated::Passed(ending),
        }])
    }
}

/// What is wrong with an answer.
pub(crate) fn findings(text: &str, citations: &[Citation], passages: &[Passage]) -> Vec<Finding> {
    let mut findings = Vec::new();
    if text.trim().is_empty() {
        let message = "it is empty".to_owned();
        findings.push(Finding { code: "answer_empty".to_owned(), message });
    }
    for Citation { document, start, end, .. } in
        citations.iter().filter(|citation| !passages.iter().any(|passage| stands_in(citation, passage)))
    {
        let message = format!("no passage has its quotation of {document:?}, bytes {start} to {end}");
        findings.push(Finding { code: "citation_unfounded".to_owned(), message });
    }
    findings
}

/// Whether the quotation stands there, byte for byte, in that version.
fn stands_in(citation: &Citation, passage: &Passage) -> bool {
    let Citation { document, version, start, end, quote } = citation;
    let place = start.checked_sub(passage.start).zip(end.checked_sub(passage.start));
    // `get` refuses what is out of range, reversed or inside a character.
    let quoted = place.and_then(|(start, end)| passage.text.get(start..end));
    passage.document == *document && passage.version == *version && !quote.is_empty() && quoted == Some(quote)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;
    use forebay_operator::{Clock, compliance};
    use forebay_schemas::Record as _;

    async fn check(change: impl FnOnce(&mut Completion), expected: &str) {
        let mut completion = samples::completion();
        change(&mut completion);
        let cx = Context::quiet(compliance::envelope(), Clock::starting_at(compliance::NOW_MS));
        let judged = Validate.process(completion, &cx).await.unwrap();
        let seen = match <[_; 1]>::try_from(judged).unwrap() {
            [Validated::Passed(ending)] => {
                assert_eq!((ending.status, ending.error), (Status::Answered, None));
                "passed".to_owned()
            }
            [Validated::Blocked(ending)] => {
                assert_eq!(ending.status, Status::Blocked);
                format!("blocked: {}", ending.error.unwrap().code)
            }
        };
        assert_eq!(seen, expected);
    }

    fn cited(change: impl FnOnce(&mut Citation)) -> impl FnOnce(&mut Completion) {
        |completion| change(&mut completion.answer.citations[0])
    }

    #[tokio::test]
    async fn only_quotations_that_stand_where_they_say_pass() {
        check(|_| {}, "passed").await;
        check(|completion| completion.answer.citations.clear(), "passed").await;
        check(|completion| completion.answer.text = " \n".to_owned(), "blocked: answer_empty").await;
        check(|completion| completion.passages.clear(), "blocked: citation_unfounded").await;
        let unfounded = "blocked: citation_unfounded";
        check(cited(|citation| citation.start += 1), unfounded).await;
        check(cited(|citation| citation.end += 1000), unfounded).await;
        check(cited(|citation| citation.start = 0), unfounded).await;
        check(cited(|citation| (citation.start, citation.end) = (citation.end, citation.start)), unfounded)
            .await;
        check(cited(|citation| citation.quote.push('!')), unfounded).await;
        check(cited(|citation| citation.document.push('!')), unfounded).await;
        check(cited(|citation| citation.version = forebay_schemas::DocumentVersion::of("other")), unfounded)
            .await;
        check(cited(|citation| (citation.end, citation.quote) = (citation.start, String::new())), unfounded)
            .await;
    }

    #[tokio::test]
    async fn it_complies() {
        let mut empty = samples::completion();
        empty.answer.text.clear();
        let samples = [samples::completion(), empty].map(|sample| sample.encode().unwrap().unwrap());
        compliance::assert_complies(Validate, samples.into()).await;
    }
}
