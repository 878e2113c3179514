//! `forebay dlq list`: the newest dead letters, and how many there are of each kind.

use super::{blocking, length, line, open, say_unreadable, to_json};
use crate::{
    args::{DlqList, PipelineArg},
    build,
    config::Config,
    console::{out, say, wrong},
    letters::{self, Filter, Letter},
};
use comfy_table::{Table, presets::NOTHING};
use forebay_operator::Clock;
use std::{collections::BTreeMap, ops::ControlFlow, process::ExitCode};

/// How many kinds of dead letters are told apart; their number is not ours to bound.
const KINDS_MAX: usize = 1_000;

/// Prints them.
pub async fn run(args: DlqList, config: Config) -> anyhow::Result<ExitCode> {
    let filter = Filter::new(&args.filter, Vec::new());
    if let Some(stage) = &filter.stage {
        let plan = build::plan(&PipelineArg { pipeline: args.filter.pipeline.clone() })?;
        plan.step(stage).map_err(wrong)?;
    }
    let (kafka, topic) = open(&config).await?;
    let since_ms = letters::since_ms(args.filter.since, Clock::System);
    let limit = usize::try_from(args.limit)?;
    // One moment for all: ages would not fall in order if each were taken when its letter is read.
    let now_ms = Clock::System.now_ms();
    let mut listed = Listed { limit, json: args.json, now_ms, ..Listed::default() };
    let name = topic.clone();
    let (listed, unreadable) = blocking(&kafka, move |reader| {
        let unreadable = letters::each(&reader, &name, since_ms, |letter| {
            if filter.wants(&letter) {
                listed.add(&letter)?;
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok((listed, unreadable))
    })
    .await?;
    say_unreadable(&topic, unreadable);
    listed.print();
    Ok(ExitCode::SUCCESS)
}

/// The newest letters, and the sums of all.
#[derive(Default)]
struct Listed {
    limit: usize,
    json: bool,
    now_ms: i64,
    /// By time, then by place: equal times must not hide a letter.
    newest: BTreeMap<(i64, i32, i64), Row>,
    kinds: BTreeMap<(String, String), Kind>,
}

enum Row {
    Json(String),
    Cells([String; 8]),
}

#[derive(Default)]
struct Kind {
    letters: u64,
    redriven: u64,
}

impl Listed {
    fn add(&mut self, letter: &Letter) -> anyhow::Result<()> {
        let known = (line(&letter.letter.stage), error(letter));
        let is_room = self.kinds.len() < KINDS_MAX || self.kinds.contains_key(&known);
        let kind = if is_room { known } else { ("…".to_owned(), "others".to_owned()) };
        let kind = self.kinds.entry(kind).or_default();
        kind.letters += 1;
        kind.redriven += u64::from(letter.redriven.is_some());
        let row = if self.json {
            Row::Json(to_json(letter)?.to_string())
        } else {
            Row::Cells(cells(letter, self.now_ms))
        };
        self.newest.insert((letter.at_ms, letter.partition, letter.offset), row);
        if self.newest.len() > self.limit {
            self.newest.pop_first();
        }
        Ok(())
    }

    fn print(self) {
        let mut table = Table::new();
        table.load_style(NOTHING);
        table.set_header(["AGE", "KEY", "ERROR", "ID", "TENANT", "TRIES", "REDRIVES", "REDRIVEN"]);
        let (shown, all) = (self.newest.len(), self.kinds.values().map(|kind| kind.letters).sum::<u64>());
        for row in self.newest.into_values() {
            match row {
                Row::Json(json) => out(json),
                Row::Cells(cells) => drop(table.add_row(cells)),
            }
        }
        if self.json {
            return;
        }
        if all == 0 {
            return say("forebay: no dead letter is there that was asked for");
        }
        out(table.trim_fmt());
        out(format_args!("\n{all} dead letters, the newest {shown} shown"));
        for ((stage, error), Kind { letters, redriven }) in self.kinds {
            out(format_args!("  {letters:>7}  {stage}  {error}  ({redriven} redriven)"));
        }
    }
}

fn error(Letter { letter, .. }: &Letter) -> String {
    line(&format!("{}/{}", letter.class, letter.code))
}

fn cells(letter: &Letter, now_ms: i64) -> [String; 8] {
    [
        length(now_ms - letter.at_ms),
        line(&letter.key),
        error(letter),
        line(letter.letter.id.as_str()),
        line(letter.letter.tenant.as_str()),
        letter.letter.attempts.to_string(),
        letter.letter.redrives.to_string(),
        letter
            .redriven
            .as_ref()
            .map_or_else(String::new, |(_, at_ms)| format!("{} ago", length(now_ms - at_ms))),
    ]
}
