//! Roll-ups: of each hour, tenant and model how many rows a table has, what they come to, and how they are spread.
//!
//! Whoever looks after a table's files rolls its days up, each once it is over, and again where rows came late: a day is counted
//! anew from all of its rows, and what was stored of it is replaced in the same version. A roll-up outlives its source, whose days are
//! forgotten earlier.
//!
//! A row is stored with the number of rows that its day had then. Rows are only ever added to a day, so as long as the log counts no
//! more, what is stored says all; where it does, SQL reads it, and else works the day out from its rows. So an answer is the same
//! whether a day is rolled up or not, and however many roll it up at once.
//!
//! Invariant: what is stored of a day was made from one version of its source, and comes into the table in one version of that. Of two
//! that start from one version the second is refused. A column is never given another meaning: what is to say more is another roll-up.

use crate::{
    compact,
    encode::encode,
    guards::{Limits, Scope},
    lake,
    session::{self, Answer, Session},
    table::{Column, DATE, Kind, TENANT, TIME_UNIT, Table, column},
};
use arrow::{
    array::{ArrayRef, AsArray as _, Int64Array, RecordBatch},
    compute::{cast, concat_batches},
    datatypes::Int64Type,
    error::ArrowError,
};
use datafusion::prelude::SessionContext;
use deltalake_core::{
    DeltaTable,
    kernel::{Action, LogicalFileView},
    protocol::{DeltaOperation, SaveMode},
    table::state::DeltaTableState,
};
use forebay_runtime::crash::crash_point;
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tracing::info;
use url::Url;

/// The column by which a roll-up goes.
pub(crate) const HOUR: &str = "hour";
/// The column that says how many rows of the source the day had.
const DAY_ROWS: &str = "day_rows";
/// So many days are rolled up at most before whoever called looks after other things.
const DAYS_MAX: usize = 8;
/// What rolling one day up may take. It runs beside what writes rows.
const MEMORY_BYTES: usize = 256 << 20;
const DEADLINE: Duration = Duration::from_secs(600);
/// So many bytes of rows, unpacked, go into a file.
const FILE_BYTES: usize = 64 << 20;

/// A column, and what it is made of.
struct Rolled {
    column: Column,
    made: Made,
}

/// What becomes of the rows of an hour that are alike.
enum Made {
    /// What they are alike in.
    Key(&'static str),
    /// How many they are.
    Count,
    /// The sum of the column of that name.
    Sum,
    /// Another sum.
    SumOf(&'static str),
    /// How values are spread.
    State(&'static str),
}

const fn rolled(
    name: &'static str,
    kind: Kind,
    unit: &'static str,
    meaning: &'static str,
    made: Made,
) -> Rolled {
    let nullable = !matches!(made, Made::Count);
    Rolled { column: column(name, kind, nullable, unit, meaning), made }
}

/// A key under the name that it has in the source.
const fn same(name: &'static str, meaning: &'static str) -> Rolled {
    rolled(name, Kind::Text, "", meaning, Made::Key(name))
}

const fn sum(name: &'static str, unit: &'static str, meaning: &'static str) -> Rolled {
    rolled(name, Kind::Long, unit, meaning, Made::Sum)
}

const fn state(name: &'static str, meaning: &'static str, sql: &'static str) -> Rolled {
    rolled(name, Kind::Bytes, "", meaning, Made::State(sql))
}

const OUTCOMES: &[Rolled] = &[
    same("lane", "`interactive` or `backfill`."),
    same("model_requested", "The model that was wanted; null where that was left open."),
    same(
        "model_served",
        "The model that answered, or that the answer cache had the answer from; null where none did.",
    ),
    same("tier", "The tier that answered; null where there are no tiers."),
    same("provider", "Who served the model."),
    same("status", "answered, failed, expired, cancelled or blocked."),
    same("error_code", "The code of the error; null where there is none."),
    same("cache_status", "hit, miss or bypass."),
    same("verdict", "pass, annotate or block; null where nothing was checked."),
    rolled(
        "is_priced",
        Kind::Boolean,
        "",
        "Whether their cost is known.",
        Made::Key("billed_nano_usd IS NOT NULL"),
    ),
    rolled("requests", Kind::Long, "requests", "How many ended.", Made::Count),
    sum("attempts", "calls", "Upstream calls made for them."),
    sum("input_tokens", "tokens", "Read by the model, from its prefix cache included."),
    sum("cached_read_tokens", "tokens", "Of these, from the provider's prefix cache."),
    sum("cached_write_tokens", "tokens", "Of these, written to the provider's prefix cache."),
    sum("output_tokens", "tokens", "Written by the model."),
    sum("reasoning_tokens", "tokens", "Of these, tokens of reasoning."),
    sum("billed_nano_usd", "nano-USD", "What they cost."),
    sum("list_nano_usd", "nano-USD", "What the answers would have cost without any cache."),
    sum("saved_by_cache_nano_usd", "nano-USD", "What the answer cache saved."),
    rolled(
        "saved_by_prefix_nano_usd",
        Kind::Long,
        "nano-USD",
        "What is left of list over billed: prefix caches.",
        Made::SumOf("list_nano_usd - billed_nano_usd - coalesce(saved_by_cache_nano_usd, 0)"),
    ),
    rolled(
        "rated_nano_usd",
        Kind::Long,
        "nano-USD",
        "What those cost of which cost and tokens are known.",
        Made::SumOf("CASE WHEN input_tokens + output_tokens IS NOT NULL THEN billed_nano_usd END"),
    ),
    rolled(
        "rated_tokens",
        Kind::Long,
        "tokens",
        "Read and written by the same.",
        Made::SumOf("CASE WHEN billed_nano_usd IS NOT NULL THEN input_tokens + output_tokens END"),
    ),
    sum("gpu_us", "µs", "Time of a GPU."),
    sum("queue_us", "µs", "Waiting on topics, all together."),
    sum("infer_us", "µs", "Inference, its retries included, all together."),
    sum("total_us", "µs", "From accepted to ended, all together."),
    state("total_us_state", "How `total_us` is spread, in µs, for `pctl_merge`.", "total_us"),
    state("ttft_us_state", "The same of `ttft_us`.", "ttft_us"),
    state("queue_us_state", "The same of `queue_us`.", "queue_us"),
    state("infer_us_state", "The same of `infer_us`.", "infer_us"),
    state(
        "tokens_per_second_state",
        "The same of `tps(output_tokens, infer_us)`, in tokens/s.",
        "tps(output_tokens, infer_us)",
    ),
];

const ATTEMPTS: &[Rolled] = &[
    same("stage", "The step that called."),
    same("provider", "The kind of provider."),
    same("endpoint", "Scheme, host and port that were called; null for a model in process."),
    same("model", "The model that was asked for."),
    same("tier", "The tier that was asked; null where there are no tiers."),
    same("status", "ok, failed, rejected, cancelled, hedge_lost or ambiguous."),
    same("error_code", "The code of the error; null where there is none."),
    rolled("calls", Kind::Long, "calls", "How many were sent.", Made::Count),
    sum("input_tokens", "tokens", "Read by the model, from its prefix cache included."),
    sum("cached_read_tokens", "tokens", "Of these, from the provider's prefix cache."),
    sum("cached_write_tokens", "tokens", "Of these, written to the provider's prefix cache."),
    sum("output_tokens", "tokens", "Written by the model."),
    sum("reasoning_tokens", "tokens", "Of these, tokens of reasoning."),
    sum("cost_nano_usd", "nano-USD", "What the calls cost, as far as that is known."),
    sum("duration_us", "µs", "Until they were answered or given up, all together."),
    state("duration_us_state", "How `duration_us` is spread, in µs, for `pctl_merge`.", "duration_us"),
    state("ttft_us_state", "The same of `ttft_us`.", "ttft_us"),
    same(
        "operation",
        "chat, embeddings or rerank; null in days that were rolled up before there was this column.",
    ),
];

/// What a roll-up has beside hour, tenant and day.
const fn declared(rollup: Table) -> &'static [Rolled] {
    match rollup {
        Table::AttemptsHourly => ATTEMPTS,
        _ => OUTCOMES,
    }
}

/// The columns of a roll-up, but its day.
pub(crate) fn columns(rollup: Table) -> Vec<Column> {
    let time = rollup.source().map_or(HOUR, Table::time_column);
    let meaning = if time == "started_at" { "The hour of `started_at`." } else { "The hour of `ended_at`." };
    let first = [
        column(HOUR, Kind::Time, false, TIME_UNIT, meaning),
        column(TENANT, Kind::Text, false, "", "Whose requests they were."),
    ];
    let rows = "Rows of the day when it was stored; null where it was worked out just now.";
    let last = column(DAY_ROWS, Kind::Long, true, "rows", rows);
    first.into_iter().chain(declared(rollup).iter().map(|rolled| rolled.column)).chain([last]).collect()
}

/// The query that makes a roll-up, of one day of its source or of all.
pub(crate) fn sql(rollup: Table, source: Table, day: Option<&str>) -> String {
    let mut keys = vec![format!("date_trunc('hour', {})", source.time_column()), TENANT.to_owned()];
    let mut shown = vec![format!("{} AS {HOUR}", keys[0]), TENANT.to_owned()];
    for Rolled { column: Column { name, .. }, made } in declared(rollup) {
        let made = match made {
            Made::Key(sql) => {
                keys.push((*sql).to_owned());
                (*sql).to_owned()
            }
            Made::Count => "count(*)".to_owned(),
            Made::Sum => format!("sum({name})"),
            Made::SumOf(sql) => format!("sum({sql})"),
            Made::State(sql) => format!("pctl_state({sql})"),
        };
        shown.push(format!("{made} AS {name}"));
    }
    let bound = day.map(|day| format!(" WHERE {DATE} = DATE '{day}'")).unwrap_or_default();
    let (shown, keys, name) = (shown.join(", "), keys.join(", "), source.name());
    format!(
        "SELECT {shown}, CAST(NULL AS BIGINT) AS {DAY_ROWS}, {DATE} FROM {name}{bound} GROUP BY {keys}, {DATE}"
    )
}

/// Why days were not rolled up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A table could not be opened.
    #[error(transparent)]
    Lake(#[from] lake::Error),
    /// A log could not be read or written, or another was first.
    #[error(transparent)]
    Log(#[from] compact::Error),
    /// The rows of a day could not be read.
    #[error(
        "could not roll up {date} for table {table}; it is tried again later, and answers are worked out from its rows"
    )]
    Day {
        /// The roll-up.
        table: &'static str,
        /// The day.
        date: String,
        /// What happened.
        #[source]
        source: Box<session::Error>,
    },
    /// What was added up are not the rows that there are.
    #[error(
        "{date} has {rows} rows of table {source_table}, and {counted} were added up; nothing is changed"
    )]
    Count {
        /// What was rolled up.
        source_table: &'static str,
        /// The day.
        date: String,
        /// Rows that there are.
        rows: i64,
        /// Rows that were added up.
        counted: i64,
    },
    /// What was worked out does not fit the table.
    #[error("could not put rows of {date} into table {table}")]
    Rows {
        /// The roll-up.
        table: &'static str,
        /// The day.
        date: String,
        /// What happened.
        #[source]
        source: ArrowError,
    },
}

/// Brings the roll-up of a table up to date, where it has one; how many days were rolled up.
pub async fn keep(
    source: Table,
    (root, options): (&Url, &lake::Options),
    sweeps: bool,
    now_ms: i64,
) -> Result<usize, Error> {
    let Some(rollup) = Table::ROLLUPS.iter().copied().find(|rollup| rollup.source() == Some(source)) else {
        return Ok(0);
    };
    let Some(facts) = lake::find(root, options, source).await? else { return Ok(0) };
    let mut table = lake::open(root, options, rollup).await?;
    compact::keep(rollup, &mut table, now_ms).await?;
    if sweeps {
        compact::sweep(rollup, &table).await?;
    }
    let (version, _) = compact::newest(rollup, &mut table).await?;
    let facts = facts.snapshot().map_err(compact::fault(source, "read"))?;
    let days = stale(source, &rows_stored(&version), &rows_now(facts), now_ms);
    if days.is_empty() {
        return Ok(0);
    }
    // Nobody's tenants are left out, and nobody else's memory is taken.
    let limits = Limits { memory_bytes: MEMORY_BYTES, deadline: DEADLINE, ..Limits::default() };
    let prepared = Session::open(root.clone(), options.clone(), limits, Scope::All, None, None);
    let session = prepared.map_err(|fault| day_fault(rollup, &days[0], fault))?;
    let mut done = Ok(0);
    for day in days.iter().take(DAYS_MAX) {
        // One day that cannot be rolled up keeps no other from it.
        match roll_up(rollup, source, &mut table, &session, day, now_ms).await {
            Ok(rolled) => done = done.map(|done| done + usize::from(rolled)),
            Err(fault) => done = Err(fault),
        }
    }
    done
}

/// The days that are worth rolling up: over, not to be forgotten, and of which what is stored does not say all; the newest first.
fn stale(
    source: Table,
    stored: &BTreeMap<String, Option<i64>>,
    now: &BTreeMap<String, Option<i64>>,
    now_ms: i64,
) -> Vec<String> {
    let open = compact::day_of(now_ms - compact::CLOSED_AFTER_MS).to_string();
    let kept = compact::first_kept(source, now_ms);
    let is_stale = |(day, rows): &(&String, &Option<i64>)| {
        **day < open && **day >= kept && rows.is_some() && !says_all(stored.get(*day), Some(*rows))
    };
    now.iter().rev().filter(is_stale).map(|(day, _)| day.clone()).collect()
}

/// Whether what is stored of a day says all there is: no rows came since, or its source has forgotten them. A number that is not known
/// says nothing.
fn says_all(stored: Option<&Option<i64>>, now: Option<&Option<i64>>) -> bool {
    match (stored, now) {
        (Some(Some(_)), None) => true,
        (Some(Some(stored)), Some(Some(now))) => stored >= now,
        _ => false,
    }
}

/// The days that are read from what is stored, at these two versions; all others are worked out.
pub(crate) fn days_stored(rollup: &DeltaTableState, source: Option<&DeltaTableState>) -> BTreeSet<String> {
    let now = source.map(rows_now).unwrap_or_default();
    let stored = rows_stored(rollup).into_iter();
    stored.filter(|(day, rows)| says_all(Some(rows), now.get(day))).map(|(day, _)| day).collect()
}

/// How many rows each day has, by the log of a table; nothing where that is not known of one of its files.
fn rows_now(version: &DeltaTableState) -> BTreeMap<String, Option<i64>> {
    let mut days = BTreeMap::new();
    for file in version.log_data().iter() {
        let Some(day) = compact::date(&file) else { continue };
        let is_whole = file.deletion_vector_descriptor().is_none();
        let rows = file.num_records().filter(|_| is_whole).and_then(|rows| i64::try_from(rows).ok());
        let sum: &mut Option<i64> = days.entry(day).or_insert(Some(0));
        *sum = sum.zip(rows).and_then(|(sum, rows)| sum.checked_add(rows));
    }
    days
}

/// Of how many rows each day was rolled up, by the bounds in the log of a roll-up.
fn rows_stored(version: &DeltaTableState) -> BTreeMap<String, Option<i64>> {
    /// Of the bounds of a file, those of [`DAY_ROWS`].
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Stats {
        min_values: Bound,
        max_values: Bound,
    }
    #[derive(Deserialize, PartialEq)]
    struct Bound {
        day_rows: i64,
    }
    let rows_of = |file: &LogicalFileView| {
        let Stats { min_values, max_values } = serde_json::from_str(&file.stats()?).ok()?;
        (min_values == max_values).then_some(min_values.day_rows)
    };
    let mut days = BTreeMap::new();
    for file in version.log_data().iter() {
        let Some(day) = compact::date(&file) else { continue };
        let rows = rows_of(&file);
        let known: &mut Option<i64> = days.entry(day).or_insert(rows);
        *known = known.filter(|known| rows == Some(*known));
    }
    days
}

fn day_fault(rollup: Table, day: &str, fault: session::Error) -> Error {
    Error::Day { table: rollup.name(), date: day.to_owned(), source: Box::new(fault) }
}

/// Rolls one day up, in the place of what was stored of it; false where another did meanwhile.
async fn roll_up(
    rollup: Table,
    source: Table,
    table: &mut DeltaTable,
    session: &Session,
    day: &str,
    now_ms: i64,
) -> Result<bool, Error> {
    // Looked at first: who commits behind it is noticed, and then this one is refused.
    let (on, count) = compact::newest(rollup, table).await?;
    let not_day = |fault| day_fault(rollup, day, fault);
    let not_rows = |source| Error::Rows { table: rollup.name(), date: day.to_owned(), source };
    // One for both queries, so that they see one version.
    let context = session.context();
    let sql_of_rows = format!("SELECT count(*) FROM {} WHERE {DATE} = DATE '{day}'", source.name());
    let mut answer = ask(session, &context, &sql_of_rows).await.map_err(not_day)?;
    let mut rows = 0;
    while let Some(batch) = answer.next().await.map_err(not_day)? {
        rows += batch.column(0).as_primitive::<Int64Type>().iter().flatten().sum::<i64>();
    }
    let was = rows_stored(&on).get(day).copied().flatten();
    if rows == 0 || was.is_some_and(|was| was >= rows) {
        return Ok(false);
    }
    let files = on.log_data();
    let old = files.iter().filter(|file| compact::date(file).as_deref() == Some(day));
    let mut actions: Vec<Action> = old.map(|file| Action::Remove(file.remove_action(true))).collect();
    let mut answer = ask(session, &context, &sql(rollup, source, Some(day))).await.map_err(not_day)?;
    let (mut held, mut bytes, mut counted, mut hours) = (Vec::new(), 0, 0, 0);
    loop {
        let next = answer.next().await.map_err(not_day)?;
        let is_last = next.is_none();
        if let Some(batch) = next {
            bytes += batch.get_array_memory_size();
            held.push(batch);
        }
        if is_last || bytes > FILE_BYTES {
            let (batch, added_up) = stored_form(rollup, &held, rows).map_err(not_rows)?;
            (counted, hours, bytes) = (counted + added_up, hours + batch.num_rows(), 0);
            held.clear();
            for file in encode(rollup, &batch).map_err(not_rows)? {
                let path = file.path(&format!("rolled-{}", uuid::Uuid::now_v7()), false);
                let add = lake::write(table, &path, file, now_ms).await;
                let add = add.map_err(|source| compact::not_file(rollup, "write", &path, source))?;
                actions.push(Action::Add(add));
            }
        }
        if is_last {
            break;
        }
    }
    if counted != rows {
        return Err(Error::Count { source_table: source.name(), date: day.to_owned(), rows, counted });
    }
    crash_point("rollup.written");
    let operation = DeltaOperation::Write {
        mode: SaveMode::Overwrite,
        partition_by: Some(vec![DATE.to_owned()]),
        predicate: Some(format!("{DATE} = '{day}'")),
    };
    compact::commit(rollup, table, (&on, count), actions, operation).await?;
    crash_point("rollup.committed");
    info!(table = rollup.name(), date = day, rows, into = hours, again = was.is_some(), "rolled up a day");
    Ok(true)
}

async fn ask(session: &Session, context: &SessionContext, sql: &str) -> Result<Answer, session::Error> {
    let unwritten = || session::Error::Query { message: "there is no query".to_owned(), at: None };
    let statement = session.parse(sql)?.pop_front().ok_or_else(unwritten)?;
    session.answer(context.clone(), statement, None).await
}

/// Rows in the types of the table, each with the number of rows that their day has; and how many rows were added up to these.
fn stored_form(
    rollup: Table,
    batches: &[RecordBatch],
    day_rows: i64,
) -> Result<(RecordBatch, i64), ArrowError> {
    let schema = rollup.schema();
    let Some(first) = batches.first() else { return Ok((RecordBatch::new_empty(schema), 0)) };
    let batch = concat_batches(&first.schema(), batches)?;
    let of = |name: &str| {
        let found = batch.column_by_name(name);
        found.ok_or_else(|| ArrowError::SchemaError(format!("the roll-up lacks column {name}")))
    };
    let mut added_up = 0;
    for counted in declared(rollup).iter().filter(|rolled| matches!(rolled.made, Made::Count)) {
        added_up += of(counted.column.name)?.as_primitive::<Int64Type>().iter().flatten().sum::<i64>();
    }
    let column = |name: &String, kind| -> Result<ArrayRef, ArrowError> {
        match name.as_str() {
            DAY_ROWS => Ok(Arc::new(Int64Array::from(vec![day_rows; batch.num_rows()]))),
            _ => cast(of(name)?, kind),
        }
    };
    let columns = schema.fields().iter().map(|field| column(field.name(), field.data_type()));
    let columns = columns.collect::<Result<_, _>>()?;
    Ok((RecordBatch::try_new(schema, columns)?, added_up))
}

#[cfg(test)]
mod tests;
