//! Made-up rows of `outcomes` and `attempts`: SQL to try before there is traffic, and the load of benchmarks.
//!
//! They go to the tables by the sink's own protocol, or to the topics, where a sink finds them. [`rows`] says what is in them.
//!
//! Invariant: rows never go where others are, so that no made-up cost is ever among real ones. Tables and topics get the same rows, and
//! the same seed, days and count give the same bytes. Tables that were cut off in the middle go on where they were.

mod rows;

use crate::{
    compact::{self, Compacted},
    decode::Message,
    kafka_table, lake, rollup,
    settings::{Settings, SettingsError},
    sink::{
        delta::{self, DeltaLog, Letters},
        flush::{Fault, Log as _, Part, flush},
    },
    table::Table,
};
use bytes::Bytes;
use chrono::{DateTime, Days, NaiveDate, NaiveTime};
use forebay_runtime::{
    drive::{SendError, Sink},
    host::kafka::{Kafka, KafkaSink, SettingsError as KafkaError},
    message::Outgoing,
};
use forebay_schemas::{EncodeError, Headers, Record as _};
use futures::{StreamExt as _, TryStreamExt as _, future::BoxFuture, stream};
use rows::Rows;
use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    task::{JoinError, spawn_blocking},
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;
use tracing::info;

/// Lots of rows that are made while others are written.
const AHEAD: usize = 2;
/// Requests whose rows are sent to topics at a time.
const SENT_AT_ONCE: u64 = 5_000;
/// With a rate: how often rows are sent.
const TICK: Duration = Duration::from_millis(10);
/// A call is numbered by its request and its try; no request has as many.
const CALLS_MAX: u64 = 16;
/// The most rows that a lot of a table may have: it is in memory, with its file.
const LOT_MAX: u64 = 500_000;

/// What to do where tables cannot be filled.
const NAME_FOLDER: &str = "name an empty folder by FOREBAY_TABLES";

/// `forebay-sql generate`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  FOREBAY_TABLES=try forebay-sql generate --rows 1000000
  FOREBAY_TABLES=try forebay-sql sql -c \"SELECT * FROM cost_daily WHERE date >= current_date - 7\"")]
pub struct Args {
    /// How many requests; their calls come on top.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    rows: u64,
    /// Over how many days they are spread.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=366))]
    days: u32,
    /// The day behind the last of these, in UTC; today when absent.
    #[arg(long, value_name = "DATE")]
    until: Option<NaiveDate>,
    /// What the rows follow from; the same makes the same.
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// Where the rows go.
    #[arg(long, value_enum, default_value = "tables")]
    to: To,
    /// Leaves the calls out, so that there are rows of `outcomes` alone.
    #[arg(long)]
    without_attempts: bool,
    /// Files that each day of a table is written into, one after the other, as the sink does.
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    files: u32,
    /// Joins small files and rolls days up afterwards, as the sink does. Said of rows that are there already, it does so with theirs.
    #[arg(long)]
    compact: bool,
    /// Requests a second, each of which ends when it is written; only to topics.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=100_000), conflicts_with_all = ["until", "days", "files", "compact"])]
    rate: Option<u32>,
}

/// Where rows go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum To {
    /// Into the tables, as the sink would bring them there.
    Tables,
    /// To the topics, which must be there and empty.
    Topics,
}

/// Why rows could not be made or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What it was told makes no sense.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// A flag that only one of the two ways has.
    #[error("{flag} is for --to {way}; leave it out, or say --to {way}")]
    Way {
        /// The flag.
        flag: &'static str,
        /// Where it makes sense.
        way: &'static str,
    },
    /// Days that no table can have.
    #[error("{days} days before {until} began before 1970; name a later day by --until")]
    Days {
        /// How many.
        days: u32,
        /// The day behind the last.
        until: NaiveDate,
    },
    /// Too much at once.
    #[error(
        "{rows} rows in {files} files are more than {LOT_MAX} a file, which would not fit into memory; raise --files or --days"
    )]
    Lot {
        /// How many.
        rows: u64,
        /// In how many files.
        files: u64,
    },
    /// There are rows already, and not these.
    #[error("{place} has rows already, and made-up ones never go among others; {way}")]
    Taken {
        /// The table or topic.
        place: String,
        /// What to do.
        way: &'static str,
    },
    /// There is no Kafka or no topic, or no folder is named.
    #[error("{what}; {way}")]
    Missing {
        /// What.
        what: String,
        /// What to do.
        way: &'static str,
    },
    /// How Kafka is to be spoken to makes no sense.
    #[error(transparent)]
    Kafka(#[from] KafkaError),
    /// A topic could not be read.
    #[error("could not look what is on topic {topic}")]
    Look {
        /// Which.
        topic: String,
        /// What happened.
        #[source]
        source: rdkafka::error::KafkaError,
    },
    /// A topic could not be written to.
    #[error(transparent)]
    Send(#[from] SendError),
    /// A table could not be opened or made.
    #[error(transparent)]
    Lake(#[from] lake::Error),
    /// A table could not be written.
    #[error(transparent)]
    Table(#[from] delta::Error),
    /// The files of a table could not be joined.
    #[error(transparent)]
    Compact(#[from] compact::Error),
    /// The days of a table could not be rolled up.
    #[error(transparent)]
    Rollup(#[from] rollup::Error),
    /// The declaration of a row.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// Work was cut off.
    #[error("making rows was cut off")]
    CutOff(#[from] JoinError),
}

/// Makes rows and writes them. The clock says what today is, and with a rate when a request ends: in milliseconds since 1970.
pub async fn run(args: Args, settings: &Settings, now_ms: fn() -> i64) -> Result<(), Error> {
    let today = || DateTime::from_timestamp_millis(now_ms()).unwrap_or_default().date_naive();
    let until = args.until.unwrap_or_else(today);
    let first = until.checked_sub_days(Days::new(args.days.into()));
    let first_ms = first.map(|first| first.and_time(NaiveTime::MIN).and_utc().timestamp_millis());
    let Some(first_ms) = first_ms.and_then(|first_ms| u64::try_from(first_ms).ok()) else {
        return Err(Error::Days { days: args.days, until });
    };
    let rows = Rows { seed: args.seed, count: args.rows, days: args.days, first_ms };
    match (args.to, args.rate) {
        (To::Tables, Some(_)) => Err(Error::Way { flag: "--rate", way: "topics" }),
        (To::Topics, _) if args.compact || args.files > 1 => {
            Err(Error::Way { flag: if args.compact { "--compact" } else { "--files" }, way: "tables" })
        }
        (To::Tables, None) => {
            let lots = u64::from(args.days) * u64::from(args.files);
            if args.rows.div_ceil(lots) > LOT_MAX {
                return Err(Error::Lot { rows: args.rows, files: lots });
            }
            for kind in kinds(&args) {
                fill(kind, &args, settings, rows, now_ms).await?;
            }
            Ok(())
        }
        (To::Topics, rate) => send(&args, settings, rows, rate, now_ms).await,
    }
}

fn kinds(args: &Args) -> impl Iterator<Item = Table> + use<> {
    let without = args.without_attempts;
    [Table::Outcomes, Table::Attempts].into_iter().filter(move |kind| *kind == Table::Outcomes || !without)
}

/// The messages of some requests, for one table.
fn messages(
    kind: Table,
    rows: Rows,
    numbers: Range<u64>,
    ended_at_ms: impl Fn(u64) -> u64,
) -> Result<Vec<Message>, EncodeError> {
    let mut messages = Vec::new();
    for number in numbers {
        let ended = ended_at_ms(number);
        let outcome = rows.outcome(number, ended);
        let mut push = |offset: u64, key: &str, value: Option<Vec<u8>>| {
            messages.push(Message {
                offset: offset.cast_signed(),
                timestamp_ms: ended.cast_signed(),
                key: Some(Bytes::copy_from_slice(key.as_bytes())),
                value: value.map(Bytes::from),
                headers: Headers::new(),
            });
        };
        match kind {
            Table::Attempts => {
                for (call, attempt) in (0..).zip(rows.attempts(&outcome)) {
                    push(number * CALLS_MAX + call, &attempt.attempt_id, attempt.encode()?);
                }
            }
            _ => push(number, &outcome.request_id, outcome.encode()?),
        }
    }
    Ok(messages)
}

/// Brings all rows of a table in, each lot as a version of its own.
async fn fill(
    kind: Table,
    args: &Args,
    settings: &Settings,
    rows: Rows,
    now_ms: fn() -> i64,
) -> Result<(), Error> {
    // Where the tables usually lie a sink may bring real rows, later too.
    if settings.tables.is_none() {
        let what = "it is not said where the tables are to lie".to_owned();
        return Err(Error::Missing { what, way: NAME_FOLDER });
    }
    let root = settings.tables_url()?;
    let options: lake::Options = settings.tables_options.clone().into_iter().collect();
    let table = lake::open(&root, &options, kind).await?;
    let mut joined = table.clone();
    let nobody = Letters { sink: Arc::new(NoLetters), topic: "".into(), cluster: "".into() };
    let mut log = DeltaLog::new(kind, table, kind.topic().into(), nobody, None, now_ms)?;
    let Rows { seed, count, days, first_ms } = rows;
    // Under this name the table keeps how far it is.
    let application = format!("generated/{seed}-{count}-{days}-{first_ms}/0");
    let version = log.newest().await?;
    let done = log.offset(&version, &application).await?;
    if done.is_none() && version.log_data().num_files() > 0 {
        let place = format!("table {} at {root}", kind.name());
        return Err(Error::Taken { place, way: NAME_FOLDER });
    }
    let first_of = move |number: u64| if kind == Table::Attempts { number * CALLS_MAX } else { number };
    let lots = (0..u64::from(days) * u64::from(args.files))
        .map(|slice| rows.start(slice, args.files)..rows.start(slice + 1, args.files));
    let missing = lots.filter(move |lot| {
        done.is_none_or(|done| first_of(lot.end).saturating_sub(1) > done.cast_unsigned())
    });
    let make = |lot| spawn_blocking(move || messages(kind, rows, lot, |number| rows.ended_at_ms(number)));
    let mut made = stream::iter(missing).map(make).buffered(AHEAD);
    let mut written = 0;
    while let Some(lot) = made.next().await {
        let mut part = Part::new(application.clone(), 0);
        lot??.into_iter().for_each(|message| part.push(message));
        match flush(&mut log, &mut [part]).await {
            Ok(flushed) => written += flushed.committed,
            Err(Fault::Store(fault) | Fault::Tries(fault)) => return Err(fault.into()),
        }
    }
    info!(table = kind.name(), rows = written, "made-up rows are in their table");
    if args.compact {
        // All of these days are over, whatever the clock says.
        let over = now_ms().max(first_ms.cast_signed() + (i64::from(days) + 1) * 86_400_000);
        while compact::keep(kind, &mut joined, over).await? != Compacted::default() {}
        while rollup::keep(kind, (&root, &options), false, over).await? > 0 {}
    }
    Ok(())
}

/// Sends all rows to their topics, as fast as those take them or at a rate.
async fn send(
    args: &Args,
    settings: &Settings,
    rows: Rows,
    rate: Option<u32>,
    now_ms: fn() -> i64,
) -> Result<(), Error> {
    let Some(kafka) = settings.kafka() else {
        let what = "there is no Kafka".to_owned();
        return Err(Error::Missing {
            what,
            way: "name yours by FOREBAY_BOOTSTRAP_SERVERS, or fill --to tables",
        });
    };
    let kafka = Kafka::new(&kafka)?;
    let mut topics = Vec::new();
    for kind in kinds(args) {
        let topic = settings.topic(kind.topic());
        must_be_empty(&kafka, &topic).await?;
        topics.push((kind, Arc::from(topic)));
    }
    let sink = KafkaSink::new(&kafka, CancellationToken::new())?;
    let made = move |numbers: Range<u64>, ended_at_ms: Option<u64>| {
        let topics = topics.clone();
        spawn_blocking(move || {
            let mut outgoing = Vec::new();
            for (kind, topic) in topics {
                let ended = |number| ended_at_ms.unwrap_or_else(|| rows.ended_at_ms(number));
                let messages = messages(kind, rows, numbers.clone(), ended)?;
                outgoing.extend(messages.into_iter().map(|message| leaving(message, &topic)));
            }
            Ok::<_, Error>(outgoing)
        })
    };
    match rate {
        None => {
            let lots = (0..rows.count.div_ceil(SENT_AT_ONCE))
                .map(|lot| lot * SENT_AT_ONCE..((lot + 1) * SENT_AT_ONCE).min(rows.count));
            let sending = stream::iter(lots).map(|lot| made(lot, None)).buffered(AHEAD);
            sending
                .map(async |lot| Ok::<_, Error>(sink.send(lot??).await?))
                .buffered(AHEAD)
                .try_collect::<()>()
                .await?;
        }
        Some(rate) => {
            let mut ticks = tokio::time::interval(TICK);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let (began, mut sent) = (Instant::now(), 0);
            while sent < rows.count {
                ticks.tick().await;
                let due = began.elapsed().as_millis() * u128::from(rate) / 1_000;
                let due = u64::try_from(due).unwrap_or(u64::MAX).min(rows.count);
                sink.send(made(sent..due, Some(now_ms().max(0).cast_unsigned())).await??).await?;
                sent = due;
            }
        }
    }
    info!(rows = rows.count, "made-up rows are on their topics");
    Ok(())
}

/// Refuses a topic that is not there, or has had messages.
async fn must_be_empty(kafka: &Kafka, topic: &str) -> Result<(), Error> {
    let (asked, name) = (kafka.clone(), topic.to_owned());
    let found = spawn_blocking(move || kafka_table::ranges(&asked, &name)).await?;
    let found = found.map_err(|source| Error::Look { topic: topic.to_owned(), source })?;
    if found.is_empty() {
        return Err(Error::Missing {
            what: format!("there is no topic {topic}"),
            way: "make it by `forebay topics apply`",
        });
    }
    if found.iter().any(|range| range.to > 0) {
        let way = "make others by `forebay topics apply` under another FOREBAY_TOPIC_PREFIX";
        return Err(Error::Taken { place: format!("topic {topic}"), way });
    }
    Ok(())
}

fn leaving(message: Message, topic: &Arc<str>) -> Outgoing {
    let Message { key, value, headers, .. } = message;
    let bytes = |bytes: Bytes| bytes.to_vec();
    Outgoing { topic: Arc::clone(topic), key: key.map(bytes), value: value.map(bytes), headers }
}

/// Where letters would go of messages that are no rows.
struct NoLetters;

impl Sink for NoLetters {
    fn send(&self, _: Vec<Outgoing>) -> BoxFuture<'_, Result<(), SendError>> {
        Box::pin(async { Err(SendError::Closed) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    async fn generate(folder: &std::path::Path, line: &str) -> Result<(), Error> {
        let tables = url::Url::from_directory_path(folder).unwrap();
        let settings = Settings::load(|_| Some(serde_json::json!({"tables": tables}).to_string())).unwrap();
        let words = std::iter::once("generate").chain(line.split_whitespace());
        run(Line::try_parse_from(words).unwrap().args, &settings, || 1_764_000_000_000).await
    }

    /// Rows by the log, and files.
    async fn extent(folder: &std::path::Path, kind: Table) -> (usize, usize) {
        let root = url::Url::from_directory_path(folder).unwrap();
        let table = lake::find(&root, &lake::Options::new(), kind).await.unwrap().unwrap();
        let files = table.snapshot().unwrap().log_data();
        (files.iter().map(|file| file.num_records().unwrap()).sum(), files.num_files())
    }

    #[tokio::test]
    async fn a_table_is_filled_once_its_small_files_are_joined_and_its_days_rolled_up() {
        let folder = tempfile::tempdir().unwrap();
        let line = "--rows 1000 --days 2 --files 4";
        generate(folder.path(), line).await.unwrap();
        assert_eq!(extent(folder.path(), Table::Outcomes).await, (1_000, 8));
        let (calls, files) = extent(folder.path(), Table::Attempts).await;
        // A call began on the day before its request ended, here and there.
        assert!((600..1_300).contains(&calls) && files >= 8, "{calls} calls in {files} files");
        generate(folder.path(), &format!("{line} --compact")).await.unwrap();
        assert_eq!(extent(folder.path(), Table::Outcomes).await, (1_000, 2));
        assert_eq!(extent(folder.path(), Table::Attempts).await.0, calls);
        for rollup in Table::ROLLUPS {
            let root = url::Url::from_directory_path(folder.path()).unwrap();
            let options = lake::Options::new();
            let stored = lake::find(&root, &options, *rollup).await.unwrap().unwrap();
            let facts = lake::find(&root, &options, rollup.source().unwrap()).await.unwrap().unwrap();
            let (stored, facts) = (stored.snapshot().unwrap(), facts.snapshot().unwrap());
            let days: std::collections::BTreeSet<_> =
                facts.log_data().iter().filter_map(|file| compact::date(&file)).collect();
            assert_eq!(rollup::days_stored(stored, Some(facts)), days, "{}", rollup.name());
        }
    }

    #[tokio::test]
    async fn made_up_rows_never_go_among_others() {
        let folder = tempfile::tempdir().unwrap();
        generate(folder.path(), "--rows 10 --days 1 --seed 1").await.unwrap();
        let refused = generate(folder.path(), "--rows 10 --days 1 --seed 2").await.unwrap_err().to_string();
        assert!(refused.contains("table outcomes") && refused.contains("FOREBAY_TABLES"), "{refused}");
        assert_eq!(extent(folder.path(), Table::Outcomes).await.0, 10);
    }

    #[tokio::test]
    async fn nothing_is_made_up_where_a_sink_may_write() {
        let line = Line::try_parse_from(["generate"]).unwrap();
        let settings = Settings::load(|_| Some("{}".to_owned())).unwrap();
        let refused = run(line.args, &settings, || 1_764_000_000_000).await.unwrap_err().to_string();
        assert!(refused.contains("FOREBAY_TABLES"), "{refused}");
    }

    #[tokio::test]
    async fn what_does_not_go_together_is_refused_with_the_way_out() {
        let folder = tempfile::tempdir().unwrap();
        for (line, told) in [
            ("--rate 10", "--to topics"),
            ("--to topics --compact", "--to tables"),
            ("--to topics", "FOREBAY_BOOTSTRAP_SERVERS"),
            ("--until 1970-01-02", "--until"),
            ("--rows 1000000000 --days 10", "raise --files"),
        ] {
            let refused = generate(folder.path(), line).await.unwrap_err().to_string();
            assert!(refused.contains(told), "{line}: {refused}");
        }
    }
}
