//! `forebay ledger show`: all that the ledgers of paid calls know of a call.

use crate::{
    args::{Ledger, PipelineArg, ShowCall},
    build,
    config::Config,
    console::{out, say, wrong},
    embedded::{Embedded, cluster},
    offsets,
};
use anyhow::Context as _;
use comfy_table::{CellAlignment, Table, presets::UTF8_HORIZONTAL_ONLY};
use forebay_runtime::host::kafka::{Kafka, LogContext};
use forebay_schemas::{CallId, EntryKind, LedgerEntry, NanoUsd, Record as _};
use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
};
use serde_json::{Value, json};
use std::{
    process::ExitCode,
    time::{Duration, Instant, UNIX_EPOCH},
};

/// How long the ledgers may say nothing before that is an error.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// An entry, and where it lies.
struct Found {
    topic: String,
    partition: i32,
    offset: i64,
    entry: LedgerEntry,
}

/// Prints a call.
pub async fn run(ledger: Ledger, config: Config) -> anyhow::Result<ExitCode> {
    let Ledger::Show(args) = ledger;
    let Some(call) = CallId::read(&args.call_id) else {
        return Err(wrong(format!(
            "{:?} is no call id: it has 32 hexadecimal digits, as in the column call_id of `attempts`",
            args.call_id
        )));
    };
    let plan = build::plan(&PipelineArg { pipeline: args.pipeline.clone() })?;
    let ledgers = plan.steps.iter().flat_map(|step| step.ledgers()).map(|(_, ledger)| config.topic(&ledger));
    let ledgers: Vec<_> = ledgers.collect();
    if ledgers.is_empty() {
        return Err(wrong(format!("no step of pipeline {} keeps a ledger of paid calls", plan.name)));
    }
    let kafka = cluster(&config, Embedded::Find).await?.kafka;
    let found = {
        let (call, ledgers) = (call.clone(), ledgers.clone());
        // Reading blocks.
        tokio::task::spawn_blocking(move || read(&kafka, &ledgers, &call))
            .await
            .context("reading ledgers")??
    };
    if found.is_empty() {
        say(format_args!("forebay: no ledger of pipeline {} knows call {}", plan.name, call.as_str()));
        return Ok(ExitCode::FAILURE);
    }
    print(found, &args);
    Ok(ExitCode::SUCCESS)
}

/// All entries of a call, in the order of each partition. A call lies where its record does, which nobody tells us: so
/// all is read, and only keys are looked at.
fn read(kafka: &Kafka, ledgers: &[String], call: &CallId) -> anyhow::Result<Vec<Found>> {
    let reader: BaseConsumer<LogContext> = kafka.reader_config().create_with_context(LogContext)?;
    let mut assignment = TopicPartitionList::new();
    let mut behind = std::collections::BTreeMap::new();
    for topic in ledgers {
        for (partition, (low, end)) in offsets::ends(&reader, topic)? {
            if low < end {
                assignment.add_partition_offset(topic, partition, Offset::Beginning)?;
                behind.insert((topic.clone(), partition), end);
            }
        }
    }
    reader.assign(&assignment)?;
    let (mut found, mut heard) = (Vec::new(), Instant::now());
    let prefix = format!("{}/", call.as_str());
    while !behind.is_empty() {
        anyhow::ensure!(
            heard.elapsed() < SILENCE_MAX,
            "the ledgers could not be read whole: nothing came for {} s",
            SILENCE_MAX.as_secs()
        );
        match reader.poll(Duration::from_millis(100)) {
            Some(Ok(message)) => {
                heard = Instant::now();
                let (topic, partition, offset) =
                    (message.topic().to_owned(), message.partition(), message.offset());
                if message.key().is_some_and(|key| key.starts_with(prefix.as_bytes())) {
                    let entry = LedgerEntry::decode(message.payload().unwrap_or_default())
                        .with_context(|| format!("entry {topic}/{partition}/{offset}"))?;
                    found.push(Found { topic: topic.clone(), partition, offset, entry });
                }
                let place = (topic, partition);
                if behind.get(&place).is_some_and(|end| offset + 1 >= *end) {
                    behind.remove(&place);
                }
            }
            Some(Err(KafkaError::PartitionEOF(_))) | None => {}
            Some(Err(fault)) => return Err(fault).context("could not read the ledgers"),
        }
    }
    found.sort_by_key(|found| (found.entry.at_ms, found.offset));
    Ok(found)
}

fn print(found: Vec<Found>, args: &ShowCall) {
    let mut table = Table::new();
    table
        .load_style(UTF8_HORIZONTAL_ONLY)
        .set_header(["time", "try", "entry", "owner", "offset", "tokens", "cost", "error"]);
    let mut answers = Vec::new();
    for Found { topic, partition, offset, mut entry } in found {
        let answer = entry.answer.take();
        if args.json {
            let mut line = json!(entry);
            if let Value::Object(fields) = &mut line {
                fields
                    .extend([("topic".to_owned(), json!(topic)), ("partition".to_owned(), json!(partition))]);
                fields.insert("offset".to_owned(), json!(offset));
                if let Some(answer) = answer.filter(|_| args.answer) {
                    fields.insert("answer".to_owned(), answer);
                }
            }
            out(line);
            continue;
        }
        answers.extend(answer.filter(|_| entry.kind == EntryKind::Done));
        let row = entry.row.as_ref().filter(|_| entry.kind != EntryKind::Started);
        let tokens = row.and_then(|row| Some(format!("{} + {}", row.input_tokens?, row.output_tokens?)));
        let cost = row.and_then(|row| row.cost_nano_usd).map(|cost| NanoUsd(cost).to_string());
        table.add_row([
            time(entry.at_ms),
            entry.attempt.map(|attempt| attempt.to_string()).unwrap_or_default(),
            entry.kind.as_str().to_owned(),
            entry.owner,
            format!("{topic}/{partition}/{offset}"),
            tokens.unwrap_or_default(),
            cost.unwrap_or_default(),
            entry.code.unwrap_or_default(),
        ]);
    }
    if args.json {
        return;
    }
    for column in [1, 5, 6] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    out(table);
    if args.answer {
        // The first in the order of the log is the one that counts.
        match answers.first() {
            Some(answer) => out(answer["text"].as_str().map_or_else(|| answer.to_string(), str::to_owned)),
            None => say("forebay: no answer is recorded"),
        }
    }
}

fn time(at_ms: i64) -> String {
    let since = Duration::from_millis(at_ms.max(0).unsigned_abs());
    humantime::format_rfc3339_millis(UNIX_EPOCH + since).to_string()
}
