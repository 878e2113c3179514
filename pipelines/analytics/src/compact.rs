//! Keeps tables in shape: joins small files, forgets days that are kept no longer, sweeps files that no version names.
//!
//! Not by the table format's own `optimize`: two of those that started from one version were both accepted, and the table had its
//! rows twice. A commit of ours counts up the offset of an application, as the sink's do, so of two that started from one
//! version the second is refused. Who reads partition 0 of a table's topic compacts the table; that only spares double work.
//!
//! Invariant: a commit that joins files neither adds nor takes a row: as many are written as were counted in what is
//! replaced, or nothing is committed.

use crate::{
    decode::padded,
    encode::{Encoded, LARGE_BYTES, encode, is_large},
    lake,
    table::{DATE, Table},
};
use arrow::{
    array::{Date32Array, RecordBatch},
    compute::concat_batches,
    error::ArrowError,
};
use chrono::{DateTime, Days, NaiveDate};
use deltalake_core::{
    DeltaTable, DeltaTableError,
    kernel::{
        Action, Add, LogicalFileView, Transaction,
        transaction::{CommitBuilder, CommitProperties},
    },
    operations::vacuum::VacuumMode,
    protocol::DeltaOperation,
    table::state::DeltaTableState,
};
use forebay_runtime::crash::crash_point;
use parquet::{
    arrow::arrow_reader::ParquetRecordBatchReaderBuilder,
    basic::Type,
    file::metadata::{ColumnChunkMetaData, ParquetMetaData},
};
use std::{collections::BTreeMap, sync::Arc};
use tables_store::{ObjectStoreExt as _, path::Path};
use tracing::info;

/// A file of more bytes is left as it is.
const SMALL_BYTES: i64 = 16 << 20;
/// So many bytes are joined at a time.
const JOINED_BYTES_MAX: i64 = 32 << 20;
/// So much is joined at a time, unpacked: it is in memory three times while it is sorted and written. Texts that are alike take next
/// to nothing packed, so their bytes there bound nothing. Two files that are not large fit always.
const UNPACKED_BYTES_MAX: usize = 2 * LARGE_BYTES;
/// So many files are joined at a time.
const JOINED_FILES_MAX: usize = 512;
/// Of a day that is over, two small files are worth joining; of one that still gets rows, only many.
const FILES_MIN: usize = 2;
const FILES_MIN_OPEN: usize = 32;
/// A day is over so long after its end: rows may still wait for their table.
pub(crate) const CLOSED_AFTER_MS: i64 = 3_600_000;
/// So many commits are made at most before whoever called looks after other things.
const COMMITS_MAX: usize = 16;

/// What was done to a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Files that were joined.
    pub joined: usize,
    /// Files that they became.
    pub into: usize,
    /// Files of days that are kept no longer.
    pub forgotten: usize,
    /// Files that no version named.
    pub swept: usize,
}

/// Why a table could not be kept in shape. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The log could not be read or written, or another writer was first.
    #[error("could not {doing} table {table}; it is tried again later")]
    Log {
        /// What was tried.
        doing: &'static str,
        /// The table.
        table: &'static str,
        /// What happened.
        #[source]
        source: Box<DeltaTableError>,
    },
    /// A file could not be read or written.
    #[error("could not {doing} file {path} of table {table}")]
    File {
        /// What was tried.
        doing: &'static str,
        /// The table.
        table: &'static str,
        /// The file.
        path: String,
        /// What happened.
        #[source]
        source: Box<tables_store::Error>,
    },
    /// The rows of files could not be unpacked or put together.
    #[error("could not join files of table {table}")]
    Rows {
        /// The table.
        table: &'static str,
        /// What happened.
        #[source]
        source: ArrowError,
    },
    /// The work was cut off.
    #[error("joining files of table {table} was cut off")]
    CutOff {
        /// The table.
        table: &'static str,
        /// What happened.
        #[source]
        source: tokio::task::JoinError,
    },
    /// What was read or would be written is not what the log counts.
    #[error(
        "files of table {table} for {date} have {counted} rows by the log, and {found} were read and {written} would be written; nothing is changed, compare the files named in the log with the store"
    )]
    Count {
        /// The table.
        table: &'static str,
        /// The day.
        date: String,
        /// Rows by the log.
        counted: usize,
        /// Rows that were read.
        found: usize,
        /// Rows that would be written.
        written: usize,
    },
}

/// Joins what is small and forgets what is old, each as far as it is worth it now.
pub async fn keep(kind: Table, table: &mut DeltaTable, now_ms: i64) -> Result<Compacted, Error> {
    keep_within(UNPACKED_BYTES_MAX, kind, table, now_ms).await
}

/// The same, with so much unpacked at a time.
async fn keep_within(
    unpacked_max: usize,
    kind: Table,
    table: &mut DeltaTable,
    now_ms: i64,
) -> Result<Compacted, Error> {
    let mut done = Compacted { forgotten: forget(kind, table, now_ms).await?, ..Compacted::default() };
    for _ in 0..COMMITS_MAX {
        let Some((joined, into)) = join(unpacked_max, kind, table, now_ms).await? else { break };
        done.joined += joined;
        done.into += into;
    }
    Ok(done)
}

/// Sweeps files that no version names and that nobody can be about to commit: a week old.
pub async fn sweep(kind: Table, table: &DeltaTable) -> Result<usize, Error> {
    let (_, swept) =
        table.clone().vacuum().with_mode(VacuumMode::Full).await.map_err(fault(kind, "sweep"))?;
    Ok(swept.files_deleted.len())
}

pub(crate) fn fault(kind: Table, doing: &'static str) -> impl Fn(DeltaTableError) -> Error {
    move |source| Error::Log { doing, table: kind.name(), source: Box::new(source) }
}

pub(crate) fn not_file(kind: Table, doing: &'static str, path: &str, source: tables_store::Error) -> Error {
    Error::File { doing, table: kind.name(), path: path.to_owned(), source: Box::new(source) }
}

/// The newest version, and how many commits of ours it has.
pub(crate) async fn newest(kind: Table, table: &mut DeltaTable) -> Result<(DeltaTableState, i64), Error> {
    table.update_state().await.map_err(fault(kind, "read"))?;
    let version = table.snapshot().cloned().map_err(fault(kind, "read"))?;
    let log = table.log_store();
    let count =
        version.transaction_version(log.as_ref(), application(kind)).await.map_err(fault(kind, "read"))?;
    Ok((version, count.unwrap_or_default()))
}

fn application(kind: Table) -> String {
    format!("compactor/{}", kind.name())
}

pub(crate) async fn commit(
    kind: Table,
    table: &DeltaTable,
    (on, count): (&DeltaTableState, i64),
    actions: Vec<Action>,
    operation: DeltaOperation,
) -> Result<(), Error> {
    let ours = Transaction::new(application(kind), count + 1);
    let properties =
        CommitProperties::default().with_application_transaction(ours).with_cleanup_expired_logs(Some(false));
    let commit =
        CommitBuilder::from(properties).with_actions(actions).build(Some(on), table.log_store(), operation);
    commit.await.map(drop).map_err(fault(kind, "write the log of"))
}

pub(crate) fn date(file: &LogicalFileView) -> Option<String> {
    file.partition_values_map().get(DATE).cloned().flatten()
}

pub(crate) fn day_of(ms: i64) -> NaiveDate {
    DateTime::from_timestamp_millis(ms).unwrap_or_default().date_naive()
}

/// The first day that is not to be forgotten.
pub(crate) fn first_kept(kind: Table, now_ms: i64) -> String {
    let kept = day_of(now_ms).checked_sub_days(Days::new(kind.days_kept().into()));
    kept.unwrap_or_default().to_string()
}

/// Takes whole days out of the table; their files stay until they are swept.
async fn forget(kind: Table, table: &mut DeltaTable, now_ms: i64) -> Result<usize, Error> {
    let (version, count) = newest(kind, table).await?;
    let first_kept = first_kept(kind, now_ms);
    let known = version.log_data();
    let old = known.iter().filter(|file| date(file).is_some_and(|date| date < first_kept));
    let actions: Vec<Action> = old.map(|file| Action::Remove(file.remove_action(true))).collect();
    let files = actions.len();
    if files > 0 {
        commit(kind, table, (&version, count), actions, DeltaOperation::Delete { predicate: None }).await?;
        info!(table = kind.name(), files, before = first_kept, "forgot days that are kept no longer");
    }
    Ok(files)
}

/// Joins one group of small files; how many, and into how many. Nothing where no group is worth it.
async fn join(
    unpacked_max: usize,
    kind: Table,
    table: &mut DeltaTable,
    now_ms: i64,
) -> Result<Option<(usize, usize)>, Error> {
    let (version, count) = newest(kind, table).await?;
    let Some((date, mut files)) = group(&version, now_ms) else { return Ok(None) };
    let (mut batches, mut unpacked) = (Vec::new(), 0_usize);
    let mut fit = 0;
    for (remove, _) in &files {
        let packed = Packed::read(kind, table, &remove.path).await?;
        unpacked = unpacked.saturating_add(packed.unpacked);
        // One is unpacked whatever it takes: it was in memory when it was written.
        if fit > 0 && unpacked > unpacked_max {
            break;
        }
        batches.extend(packed.unpack(kind)?);
        fit += 1;
    }
    // What comes of it is large then, whatever it measures: or the same files were looked at with every round.
    let is_over = fit < files.len();
    files.truncate(fit);
    let counted = files.iter().map(|(_, rows)| rows).sum();
    let day = date.clone();
    let encoded = tokio::task::spawn_blocking(move || rewrite(kind, &day, &batches, counted)).await;
    let encoded = encoded.map_err(|source| Error::CutOff { table: kind.name(), source })??;
    let mut actions: Vec<Action> = files.iter().map(|(remove, _)| Action::Remove(remove.clone())).collect();
    let joined = actions.len();
    for file in encoded {
        let is_large = is_over || file.unpacked >= unpacked_max / 2;
        let path = file.path(&format!("joined-{}", uuid::Uuid::now_v7()), is_large);
        let add = lake::write(table, &path, file, now_ms).await;
        let add = add.map_err(|source| not_file(kind, "write", &path, source))?;
        // The same rows as before.
        actions.push(Action::Add(Add { data_change: false, ..add }));
    }
    let into = actions.len() - joined;
    crash_point("compact.written");
    let operation = DeltaOperation::Optimize { predicate: None, target_size: JOINED_BYTES_MAX };
    commit(kind, table, (&version, count), actions, operation).await?;
    crash_point("compact.committed");
    info!(table = kind.name(), date, joined, into, rows = counted, "joined small files");
    Ok(Some((joined, into)))
}

/// The small files of one day that are worth joining, each with its rows; the oldest day first.
fn group(
    version: &DeltaTableState,
    now_ms: i64,
) -> Option<(String, Vec<(deltalake_core::kernel::Remove, usize)>)> {
    let open = day_of(now_ms - CLOSED_AFTER_MS).to_string();
    let mut days: BTreeMap<String, Vec<LogicalFileView>> = BTreeMap::new();
    let is_small = |file: &LogicalFileView| file.size() < SMALL_BYTES && !is_large(&file.path());
    for file in version.log_data().iter().filter(is_small) {
        if let Some(date) = date(&file) {
            days.entry(date).or_default().push(file);
        }
    }
    for (date, mut files) in days {
        // Those that were written together are joined together.
        files.sort_by_key(LogicalFileView::modification_time);
        let mut bytes = 0;
        let fits = files.iter().take(JOINED_FILES_MAX).take_while(|file| {
            bytes += file.size();
            bytes <= JOINED_BYTES_MAX
        });
        let chosen: Option<Vec<_>> =
            fits.map(|file| Some((file.remove_action(false), file.num_records()?))).collect();
        let chosen = chosen?;
        if chosen.len() >= if date < open { FILES_MIN } else { FILES_MIN_OPEN } {
            return Some((date, chosen));
        }
    }
    None
}

/// A file that is read and not unpacked yet.
struct Packed {
    file: ParquetRecordBatchReaderBuilder<bytes::Bytes>,
    /// What it takes in memory once it is.
    unpacked: usize,
}

impl Packed {
    async fn read(kind: Table, table: &DeltaTable, path: &str) -> Result<Self, Error> {
        let failed = |source| not_file(kind, "read", path, source);
        let bytes = table.object_store().get(&Path::from(path)).await.map_err(failed)?;
        let bytes = bytes.bytes().await.map_err(failed)?;
        let file = ParquetRecordBatchReaderBuilder::try_new(bytes)
            .map_err(|source| Error::Rows { table: kind.name(), source: source.into() })?;
        let unpacked = unpacked(file.metadata());
        Ok(Self { file, unpacked })
    }

    fn unpack(self, kind: Table) -> Result<Vec<RecordBatch>, Error> {
        let unpack = || self.file.build()?.collect::<Result<Vec<_>, ArrowError>>();
        unpack().map_err(|source| Error::Rows { table: kind.name(), source })
    }
}

/// What the rows of a file take in memory, by its footer.
fn unpacked(metadata: &ParquetMetaData) -> usize {
    let of_column = |column: &ColumnChunkMetaData| {
        let texts = || column.unencoded_byte_array_data_bytes().unwrap_or_else(|| column.uncompressed_size());
        let (each, more) = match column.column_type() {
            Type::BOOLEAN => (1, 0),
            Type::INT32 | Type::FLOAT => (4, 0),
            // And where each of them ends.
            Type::BYTE_ARRAY => (4, texts()),
            _ => (8, 0),
        };
        column.num_values().saturating_mul(each).saturating_add(more)
    };
    let columns = metadata.row_groups().iter().flat_map(|group| group.columns());
    let bytes = columns.map(of_column).fold(0, i64::saturating_add);
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// The same rows in as few files as may be.
fn rewrite(kind: Table, date: &str, batches: &[RecordBatch], counted: usize) -> Result<Vec<Encoded>, Error> {
    let rows = || {
        let schema = kind.schema_of_files();
        let batches: Vec<RecordBatch> =
            batches.iter().map(|batch| padded(batch, &schema)).collect::<Result<_, _>>()?;
        let batch = concat_batches(&schema, &batches)?;
        let day: NaiveDate =
            date.parse().map_err(|_| ArrowError::ParseError(format!("{date:?} is no day")))?;
        let days = day.signed_duration_since(NaiveDate::default()).num_days();
        let days = i32::try_from(days).map_err(|_| ArrowError::ParseError(format!("{date:?} is too far")))?;
        let mut columns = batch.columns().to_vec();
        columns.push(Arc::new(Date32Array::from(vec![days; batch.num_rows()])));
        let batch = RecordBatch::try_new(kind.schema(), columns)?;
        Ok((batch.num_rows(), encode(kind, &batch)?))
    };
    let (found, encoded) = rows().map_err(|source| Error::Rows { table: kind.name(), source })?;
    let written = encoded.iter().map(|file| file.rows).sum();
    if found != counted || written != counted {
        return Err(Error::Count { table: kind.name(), date: date.to_owned(), counted, found, written });
    }
    Ok(encoded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::Message;
    use crate::sink::{
        delta::tests::{Place, part},
        flush::flush,
    };
    use forebay_schemas::Headers;
    use serde_json::json;

    const DAY_MS: i64 = 86_400_000;

    fn files(table: &DeltaTable) -> usize {
        table.snapshot().unwrap().log_data().num_files()
    }

    /// A table of thirty rows in thirty files, ten of each day.
    async fn in_small_files(place: &Place) -> DeltaTable {
        let mut log = place.log().await;
        for round in 0..10 {
            flush(&mut log, &mut [part(0, round * 3..round * 3 + 3)]).await.unwrap();
        }
        let mut table = log.table();
        table.update_state().await.unwrap();
        table
    }

    #[tokio::test]
    async fn small_files_of_a_day_become_one_and_the_rows_stay() {
        let place = Place::new();
        let mut table = in_small_files(&place).await;
        assert_eq!((place.rows().await, files(&table)), ((30, 30), 30));
        let done = keep(Table::Labels, &mut table, 10 * DAY_MS).await.unwrap();
        assert_eq!((done.joined, done.into), (30, 3));
        table.update_state().await.unwrap();
        assert_eq!((place.rows().await, files(&table)), ((30, 30), 3));
        assert_eq!(keep(Table::Labels, &mut table, 10 * DAY_MS).await.unwrap(), Compacted::default());
    }

    #[tokio::test]
    async fn no_more_is_joined_at_a_time_than_fits_unpacked_however_small_it_is_packed() {
        let place = Place::new();
        let mut log = place.log().await;
        // 24 files of one day, each with 20 rows of a text of 1 KiB that is always the same.
        for file in 0..24_i64 {
            let mut rows = part(0, 0..0);
            for row in 0..20 {
                let offset = file * 20 + row;
                let value = json!({"request_id": format!("order-{offset}"), "wrong": true, "note": "x".repeat(1024), "labelled_at": 0});
                let value = Some(value.to_string().into());
                rows.push(Message { offset, timestamp_ms: 0, key: None, value, headers: Headers::new() });
            }
            flush(&mut log, &mut [rows]).await.unwrap();
        }
        let mut table = log.table();
        table.update_state().await.unwrap();
        let sizes = |table: &DeltaTable| {
            let known = table.snapshot().unwrap().log_data();
            known.iter().map(|file| (file.path().into_owned(), file.size())).collect::<Vec<_>>()
        };
        let packed: i64 = sizes(&table).iter().map(|(_, size)| size).sum();
        assert!(packed < 24 * 20 * 1024 / 2, "{packed} bytes");
        // Six files are some 130 KB, seven are more than it.
        let unpacked_max = 145_000;
        let done = keep_within(unpacked_max, Table::Labels, &mut table, 10 * DAY_MS).await.unwrap();
        assert_eq!((done.joined, done.into), (24, 4));
        table.update_state().await.unwrap();
        assert_eq!(place.rows().await, (480, 480));
        for (path, _) in sizes(&table) {
            let packed = Packed::read(Table::Labels, &table, &path).await.unwrap();
            assert!(packed.unpacked <= unpacked_max && packed.unpacked > 100_000, "{}", packed.unpacked);
            // What the footer tells is what it comes to.
            let rows = packed.unpacked;
            let held: usize =
                packed.unpack(Table::Labels).unwrap().iter().map(RecordBatch::get_array_memory_size).sum();
            assert!(held > rows / 2 && held < rows * 3, "{held} for {rows}");
        }
        // They are not looked at again.
        let again = keep_within(unpacked_max, Table::Labels, &mut table, 10 * DAY_MS).await.unwrap();
        assert_eq!(again, Compacted::default());
    }

    #[tokio::test]
    async fn a_day_that_still_gets_rows_is_left_alone_unless_its_files_are_many() {
        let place = Place::new();
        let mut table = in_small_files(&place).await;
        // In the third day, an hour after the second ended.
        let done = keep(Table::Labels, &mut table, 2 * DAY_MS + CLOSED_AFTER_MS).await.unwrap();
        assert_eq!((done.joined, done.into), (20, 2));
        assert_eq!(place.rows().await, (30, 30));
    }

    #[tokio::test]
    async fn of_two_that_start_from_one_version_the_second_is_refused() {
        let place = Place::new();
        let mut one = in_small_files(&place).await;
        let mut other = place.log().await.table();
        let (version, count) = newest(Table::Labels, &mut other).await.unwrap();
        keep(Table::Labels, &mut one, 10 * DAY_MS).await.unwrap();
        // What the other would commit now is what doubled tables: files joined that are joined already.
        let (_, chosen) = group(&version, 10 * DAY_MS).unwrap();
        let actions = chosen.into_iter().map(|(remove, _)| Action::Remove(remove)).collect();
        let operation = DeltaOperation::Optimize { predicate: None, target_size: 1 };
        let refused = commit(Table::Labels, &other, (&version, count), actions, operation).await.unwrap_err();
        assert!(format!("{refused:?}").contains("ConcurrentTransaction"), "{refused:?}");
        assert_eq!(place.rows().await, (30, 30));
    }

    #[tokio::test]
    async fn rows_that_come_while_files_are_joined_get_in_nobodys_way() {
        let place = Place::new();
        let mut table = in_small_files(&place).await;
        let (version, count) = newest(Table::Labels, &mut table).await.unwrap();
        let mut sink = place.log().await;
        flush(&mut sink, &mut [part(1, 100..130)]).await.unwrap();
        let (date, chosen) = group(&version, 10 * DAY_MS).unwrap();
        let mut batches = Vec::new();
        for (remove, _) in &chosen {
            let packed = Packed::read(Table::Labels, &table, &remove.path).await.unwrap();
            batches.extend(packed.unpack(Table::Labels).unwrap());
        }
        assert!(rewrite(Table::Labels, &date, &batches, 10).is_ok());
        let short = rewrite(Table::Labels, &date, &batches[1..], 10).unwrap_err();
        assert!(short.to_string().contains("10 rows by the log, and 9 were read"), "{short}");
        drop((version, count));
        keep(Table::Labels, &mut table, 10 * DAY_MS).await.unwrap();
        flush(&mut sink, &mut [part(1, 130..140)]).await.unwrap();
        assert_eq!(place.rows().await, (70, 70));
    }

    #[tokio::test]
    async fn days_are_forgotten_whole_when_they_are_kept_no_longer() {
        let place = Place::new();
        let mut table = in_small_files(&place).await;
        let kept = i64::from(Table::Labels.days_kept());
        assert_eq!(forget(Table::Labels, &mut table, kept * DAY_MS).await.unwrap(), 0);
        assert_eq!(forget(Table::Labels, &mut table, (kept + 1) * DAY_MS).await.unwrap(), 10);
        assert_eq!(place.rows().await, (20, 20));
        // Still there for who reads an older version.
        assert_eq!(sweep(Table::Labels, &table).await.unwrap(), 0);
    }
}
