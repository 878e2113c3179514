//! From rows to the Parquet files of a table: one for each day, sorted by tenant and time, with the bounds of each column.
//!
//! Invariant: a bound is exact or left out. Engines answer `min` and `max` from bounds without reading the file, so a rounded one
//! would be a wrong answer.

use crate::table::{DATE, TENANT, Table};
use arrow::{
    array::{
        Array, AsArray as _, Date32Array, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray,
        TimestampMicrosecondArray,
    },
    compute::{
        SortColumn, lexsort_to_indices, max, max_string, min, min_string, partition, take_record_batch,
    },
    datatypes::{DataType, Date32Type, Float64Type, Int32Type, Int64Type, TimestampMicrosecondType},
    error::ArrowError,
};
use chrono::{DateTime, Datelike as _, Days, NaiveDate};
use parquet::{
    arrow::ArrowWriter,
    basic::{Compression, ZstdLevel},
    file::properties::WriterProperties,
    schema::types::ColumnPath,
};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// A file that unpacks to so much is large, however small it is packed: it is not joined with others.
pub const LARGE_BYTES: usize = 128 << 20;
/// What the name of such a file ends with. The log knows what a file takes packed, and nothing else.
const LARGE: &str = ".large.parquet";

/// A text that is longer has no bound: nobody looks for a prompt by its bounds.
const BOUND_BYTES_MAX: usize = 64;
/// Rows that are read or skipped together: a tenant's hour, rather than all of a day.
const ROW_GROUP_ROWS: usize = 131_072;

/// A file that is not written yet.
#[derive(Debug)]
pub struct Encoded {
    /// The day of all its rows, as 2026-11-24.
    pub date: String,
    /// Its rows.
    pub rows: usize,
    /// The bounds and nulls of its columns, as Delta keeps them.
    pub stats: String,
    /// What its rows take in memory, as bytes.
    pub unpacked: usize,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl Encoded {
    /// Its path in the table, where `name` is nobody else's.
    pub fn path(&self, name: &str, is_large: bool) -> String {
        format!("{DATE}={}/{name}{}", self.date, if is_large { LARGE } else { ".parquet" })
    }
}

/// Whether the file of this path was large when it was written.
pub fn is_large(path: &str) -> bool {
    path.ends_with(LARGE)
}

/// The files of these rows.
pub fn encode(table: Table, batch: &RecordBatch) -> Result<Vec<Encoded>, ArrowError> {
    if batch.num_rows() == 0 {
        return Ok(Vec::new());
    }
    let column = |batch: &RecordBatch, name: &str| {
        let found = batch.column_by_name(name).map(Arc::clone);
        found.ok_or_else(|| ArrowError::SchemaError(format!("table {} has no column {name}", table.name())))
    };
    let mut order = Vec::new();
    for name in [DATE, TENANT, table.time_column()] {
        order.push(SortColumn { values: column(batch, name)?, options: None });
    }
    let sorted = take_record_batch(batch, &lexsort_to_indices(&order, None)?)?;
    let dates = column(&sorted, DATE)?;
    let days = dates.as_primitive::<Date32Type>().clone();
    let mut files = Vec::new();
    for range in partition(std::slice::from_ref(&dates))?.ranges() {
        let rows = sorted.slice(range.start, range.len());
        files.push(file(&rows, day(&days, range.start))?);
    }
    Ok(files)
}

fn day(days: &Date32Array, row: usize) -> String {
    let epoch = NaiveDate::default();
    let days = u64::try_from(days.value(row)).unwrap_or_default();
    let day = epoch.checked_add_days(Days::new(days)).unwrap_or(epoch);
    format!("{:04}-{:02}-{:02}", day.year(), day.month(), day.day())
}

fn file(rows: &RecordBatch, date: String) -> Result<Encoded, ArrowError> {
    // The folder says the day; inside of the file it would be read twice.
    let schema = rows.schema();
    let kept: Vec<usize> =
        (0..schema.fields().len()).filter(|&index| schema.field(index).name() != DATE).collect();
    let rows = rows.project(&kept)?;
    let mut properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(1)?))
        .set_max_row_group_row_count(Some(ROW_GROUP_ROWS));
    // What percentiles are made of is read by all who ask for one, and nothing of it is left out: unpacking by zstd was a fifth of that.
    for field in rows.schema().fields().iter().filter(|field| *field.data_type() == DataType::Binary) {
        properties =
            properties.set_column_compression(ColumnPath::from(field.name().as_str()), Compression::LZ4_RAW);
    }
    let properties = properties.build();
    let mut unpacked = 0;
    for column in rows.columns() {
        unpacked += column.to_data().get_slice_memory_size()?;
    }
    let mut writer = ArrowWriter::try_new(Vec::new(), rows.schema(), Some(properties))?;
    writer.write(&rows)?;
    let (stats, bytes) = (stats(&rows).to_string(), writer.into_inner()?);
    Ok(Encoded { date, rows: rows.num_rows(), stats, unpacked, bytes })
}

fn stats(rows: &RecordBatch) -> Value {
    let (mut least, mut most, mut nulls) = (Map::new(), Map::new(), Map::new());
    for (field, column) in rows.schema().fields().iter().zip(rows.columns()) {
        nulls.insert(field.name().clone(), json!(column.null_count()));
        if let Some((low, high)) = bounds(column.as_ref()) {
            least.insert(field.name().clone(), low);
            most.insert(field.name().clone(), high);
        }
    }
    json!({"numRecords": rows.num_rows(), "minValues": least, "maxValues": most, "nullCount": nulls})
}

fn bounds(column: &dyn Array) -> Option<(Value, Value)> {
    let pair = |low: Value, high: Value| Some((low, high));
    match column.data_type() {
        DataType::Int32 => {
            let column: &Int32Array = column.as_primitive::<Int32Type>();
            pair(min(column)?.into(), max(column)?.into())
        }
        DataType::Int64 => {
            let column: &Int64Array = column.as_primitive::<Int64Type>();
            pair(min(column)?.into(), max(column)?.into())
        }
        DataType::Float64 => {
            let column: &Float64Array = column.as_primitive::<Float64Type>();
            let (low, high) = (min(column)?, max(column)?);
            (low.is_finite() && high.is_finite()).then(|| (low.into(), high.into()))
        }
        DataType::Timestamp(..) => {
            let column: &TimestampMicrosecondArray = column.as_primitive::<TimestampMicrosecondType>();
            pair(moment(min(column)?)?, moment(max(column)?)?)
        }
        DataType::Utf8 => {
            let column: &StringArray = column.as_string();
            let (low, high) = (min_string(column)?, max_string(column)?);
            (low.len() <= BOUND_BYTES_MAX && high.len() <= BOUND_BYTES_MAX).then(|| (low.into(), high.into()))
        }
        _ => None,
    }
}

/// To the microsecond, as the column is; nothing where the year has more than four digits.
fn moment(us: i64) -> Option<Value> {
    let moment = DateTime::from_timestamp_micros(us)?;
    (0..=9999).contains(&moment.year()).then(|| moment.format("%Y-%m-%dT%H:%M:%S%.6fZ").to_string().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::{Decoder, Message};
    use forebay_schemas::{Headers, Label, Record as _, RequestId, Tenant};
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

    #[test]
    fn a_day_is_a_file_sorted_by_tenant_and_time_and_bounded_exactly() {
        let label = |tenant: &str, labelled_at: i64| Label {
            request_id: RequestId::try_from("order-17".to_owned()).unwrap(),
            tenant: Tenant::try_from(tenant.to_owned()).unwrap(),
            generation: 0,
            wrong: true,
            quality: None,
            labeller: None,
            inclusion_probability: None,
            note: Some("x".repeat(BOUND_BYTES_MAX + 1)),
            labelled_at: Some(labelled_at),
        };
        let day = 86_400_000_000;
        let labels = [label("b", 7), label("a", 9), label("a", 20_000 * day + 1), label("a", 3)];
        let message = |(offset, label): (i64, Label)| Message {
            offset,
            timestamp_ms: 0,
            key: None,
            value: label.encode().unwrap().map(Into::into),
            headers: Headers::new(),
        };
        let messages: Vec<Message> = (0..).zip(labels).map(message).collect();
        let rows = Decoder::new(Table::Labels).unwrap().read(&messages).unwrap();
        let files = encode(Table::Labels, &rows.batch).unwrap();
        assert_eq!(
            files.iter().map(|file| file.date.as_str()).collect::<Vec<_>>(),
            ["1970-01-01", "2024-10-04"]
        );

        let stats: Value = serde_json::from_str(&files[0].stats).unwrap();
        assert_eq!(stats["numRecords"], 3);
        assert_eq!(
            (&stats["minValues"]["tenant"], &stats["maxValues"]["tenant"]),
            (&json!("a"), &json!("b"))
        );
        assert_eq!(stats["minValues"]["labelled_at"], "1970-01-01T00:00:00.000003Z");
        assert_eq!(stats["maxValues"]["labelled_at"], "1970-01-01T00:00:00.000009Z");
        assert_eq!((&stats["nullCount"]["quality"], &stats["minValues"]["note"]), (&json!(3), &Value::Null));

        let bytes = bytes::Bytes::from(files[0].bytes.clone());
        let read = ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap().build().unwrap();
        let batches: Vec<RecordBatch> = read.map(Result::unwrap).collect();
        let times =
            batches[0].column_by_name("labelled_at").unwrap().as_primitive::<TimestampMicrosecondType>();
        assert_eq!(times.values(), &[3, 9, 7]);
        assert!(batches[0].column_by_name(DATE).is_none());
    }
}
