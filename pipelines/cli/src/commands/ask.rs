//! `forebay ask`: one request, by an ordinary Kafka client, and its result; the answer while it is written, where that is wanted.

use super::up::cluster_id;
use crate::{
    args::Ask,
    client::{Client, Heard},
    config::Config,
    console::{out, piece, say, wrong},
    embedded::{Embedded, cluster},
};
use forebay_schemas::{Answer, Delta, Request, RequestId, Status, Tenant};
use std::{process::ExitCode, time::Duration};

/// Asks, waits, prints.
pub async fn run(args: Ask, config: Config) -> anyhow::Result<ExitCode> {
    let kafka = cluster(&config, Embedded::Find).await?.kafka;
    cluster_id(&kafka).await?;
    let mut client = Client::connect(&kafka, &config, args.stream).await?;
    let wait: Duration = args.wait.into();
    let id = RequestId::try_from(uuid::Uuid::now_v7().to_string()).map_err(wrong)?;
    let request = Request {
        id: Some(id.clone()),
        tenant: args.tenant.map(Tenant::try_from).transpose().map_err(wrong)?,
        prompt: Some(args.question),
        deadline_ms: u64::try_from(wait.as_millis()).ok(),
        stream: args.stream,
        ..Request::default()
    };
    client.ask(&request).await?;
    // A little longer than the deadline: an expiry is a result too.
    let until = tokio::time::Instant::now() + wait + Duration::from_secs(5);
    let mut shown = Shown::default();
    loop {
        let Ok(heard) = tokio::time::timeout_at(until, client.hear()).await else {
            say(format_args!("forebay: no result for {id} within {}; do the stages run?", args.wait));
            return Ok(ExitCode::FAILURE);
        };
        match heard? {
            Heard::Delta(delta) if delta.id == id.as_str() => show(shown.piece(&delta)),
            Heard::Result(answer, raw) if answer.id == id => {
                print(&answer, &raw, args.json, &shown);
                let is_answered = answer.status == Status::Answered;
                return Ok(if is_answered { ExitCode::SUCCESS } else { ExitCode::FAILURE });
            }
            Heard::Delta(_) | Heard::Result(..) => {}
        }
    }
}

/// What of an answer is on the screen, where nothing can be taken back.
#[derive(Default)]
struct Shown {
    attempt: u32,
    /// The number of the next piece.
    seq: u32,
    text: String,
}

/// What goes on the screen.
#[derive(Debug, PartialEq)]
enum Show<'t> {
    /// Behind what is there.
    More(&'t str),
    /// Another answer, below what is there.
    Anew(&'t str),
}

impl Shown {
    /// A piece came. Behind one that was lost nothing is shown before the result. The first of an answer comes again where its
    /// writer died and no ledger counted the try: then another answer begins, under the same numbers.
    fn piece<'t>(&mut self, Delta { attempt, seq, text, .. }: &'t Delta) -> Show<'t> {
        // The same first piece twice leaves the screen as it is, whichever it means.
        let is_twice = (*attempt, self.seq, text) == (self.attempt, 1, &self.text);
        let begins_anew = *seq == 0 && !is_twice;
        let goes_on = (*attempt, *seq) == (self.attempt, self.seq);
        if !begins_anew && !goes_on {
            return Show::More("");
        }
        (self.attempt, self.seq) = (*attempt, seq.saturating_add(1));
        let is_below = begins_anew && !self.text.is_empty();
        if is_below {
            self.text.clear();
        }
        self.text.push_str(text);
        if is_below { Show::Anew(text) } else { Show::More(text) }
    }

    /// What of the whole answer is not shown yet.
    fn rest<'t>(&self, whole: &'t str) -> Show<'t> {
        whole.strip_prefix(&self.text).map_or(Show::Anew(whole), Show::More)
    }
}

fn show(what: Show<'_>) {
    match what {
        Show::More(text) => piece(text),
        Show::Anew(text) => {
            piece("\n");
            say("forebay: the answer begins anew");
            piece(text);
        }
    }
}

fn print(answer: &Answer, raw: &str, json: bool, shown: &Shown) {
    if json {
        return out(raw);
    }
    if let Some(text) = &answer.text {
        show(shown.rest(text));
    }
    if answer.text.is_some() || !shown.text.is_empty() {
        out("");
    }
    match &answer.error {
        // Also below what was read of an answer that broke off.
        Some(error) => say(format_args!("{}: {} ({})", answer.status.as_str(), error.message, error.code)),
        None if answer.text.is_none() => say(answer.status.as_str()),
        None => {}
    }
    for citation in &answer.citations {
        out(format_args!("  — {} bytes {}..{}", citation.document, citation.start, citation.end));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(attempt: u32, seq: u32, text: &str) -> Delta {
        Delta { id: "r".to_owned(), tenant: Tenant::default(), attempt, seq, text: text.to_owned() }
    }

    /// Pieces as they came; what was shown, and the rest of the whole answer.
    fn check(pieces: &[(u32, u32, &str)], whole: &str, expected: &str) {
        let (mut shown, mut screen) = (Shown::default(), String::new());
        let mut show = |what: Show<'_>| match what {
            Show::More(text) => screen.push_str(text),
            Show::Anew(text) => screen = format!("{screen} / {text}"),
        };
        for &(attempt, seq, text) in pieces {
            show(shown.piece(&delta(attempt, seq, text)));
        }
        show(shown.rest(whole));
        assert_eq!(screen, expected, "{pieces:?}");
    }

    #[test]
    fn the_screen_ends_with_the_whole_answer_whatever_was_lost() {
        check(&[(0, 0, "Mö"), (0, 1, "wen")], "Möwen fliegen", "Möwen fliegen");
        check(&[], "Möwen", "Möwen");
        check(&[(0, 0, "a"), (0, 2, "c")], "abc", "abc");
        check(&[(0, 1, "b")], "ab", "ab");
        check(&[(2, 0, "a"), (2, 0, "a")], "ab", "ab");
        check(&[(0, 0, "a"), (1, 0, "x"), (0, 1, "b"), (1, 1, "y")], "xyz", "a / xyz");
        check(&[(0, 0, "a")], "xyz", "a / xyz");
    }

    #[test]
    fn an_answer_that_begins_again_after_a_crash_is_not_spliced_onto_the_one_before() {
        check(&[(0, 0, "Mö"), (0, 1, "wen"), (0, 0, "Ge"), (0, 1, "ier")], "Geier", "Möwen / Geier");
        check(&[(0, 0, "Mö"), (0, 1, "wen"), (0, 0, "Mö"), (0, 1, "ve")], "Möve", "Möwen / Möve");
        check(&[(0, 0, "a"), (1, 0, "b"), (0, 0, "x"), (0, 1, "y")], "xy", "a / b / xy");
    }
}
