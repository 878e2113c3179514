//! Answers as text or files: a table for eyes, CSV, JSON lines, Parquet.
//!
//! Invariant: rows are written as they come, and none is held but the few that a table shows. Null is written as null: an empty field in
//! CSV, `null` in the others, and never 0.

use crate::session::{Answer, Error as QueryError};
use arrow::array::RecordBatch;
use arrow::csv::WriterBuilder;
use arrow::datatypes::SchemaRef;
use arrow::error::ArrowError;
use arrow::json::LineDelimitedWriter;
use arrow::json::writer::{LineDelimited, WriterBuilder as JsonBuilder};
use arrow::util::display::FormatOptions;
use arrow::util::pretty::pretty_format_batches_with_options;
use parquet::arrow::ArrowWriter;
use parquet::errors::ParquetError;
use std::io::Write;

/// So many rows of a table are shown; whoever wants more wants a file.
pub const ROWS_SHOWN_MAX: usize = 1_000;

/// How an answer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Columns in a frame, for eyes.
    Table,
    /// Comma-separated, with a line of names.
    Csv,
    /// One object a line.
    Json,
    /// A file of Parquet; it needs --output.
    Parquet,
}

/// Why an answer could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The query failed.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// Its rows have no form in this format.
    #[error("could not write the answer as {format:?}")]
    Rows {
        /// The format.
        format: Format,
        /// Why.
        #[source]
        source: ArrowError,
    },
    /// The file could not be made.
    #[error("could not write the answer as Parquet")]
    Parquet(#[from] ParquetError),
    /// Nobody reads, or the disk is full.
    #[error("could not write the answer")]
    Io(#[from] std::io::Error),
}

/// Writes an answer to its end, and says how many rows it had.
pub async fn write(answer: Answer, format: Format, out: impl Write + Send) -> Result<u64, Error> {
    match format {
        Format::Table => table(answer, out).await,
        Format::Csv => csv(answer, out).await,
        Format::Json => json(answer, out).await,
        Format::Parquet => parquet(answer, out).await,
    }
}

async fn table(mut answer: Answer, mut out: impl Write) -> Result<u64, Error> {
    let (mut shown, mut rows) = (Vec::new(), 0);
    while let Some(batch) = answer.next().await? {
        let left = ROWS_SHOWN_MAX.saturating_sub(rows);
        if left > 0 {
            shown.push(batch.slice(0, batch.num_rows().min(left)));
        }
        rows += batch.num_rows();
    }
    writeln!(out, "{}", framed(&answer.schema, &shown)?)?;
    let more = rows.saturating_sub(ROWS_SHOWN_MAX);
    let more = if more > 0 {
        format!("; the first {ROWS_SHOWN_MAX} are shown, --format csv has all")
    } else {
        String::new()
    };
    writeln!(out, "({rows} row{}{more})", if rows == 1 { "" } else { "s" })?;
    Ok(counted(rows))
}

fn framed(schema: &SchemaRef, batches: &[RecordBatch]) -> Result<String, Error> {
    // Without rows the names of the columns are still an answer.
    let empty = [RecordBatch::new_empty(schema.clone())];
    let batches = if batches.is_empty() { &empty } else { batches };
    let options = FormatOptions::default().with_null("null");
    let framed = pretty_format_batches_with_options(batches, &options);
    Ok(framed.map_err(|source| Error::Rows { format: Format::Table, source })?.to_string())
}

async fn csv(mut answer: Answer, out: impl Write) -> Result<u64, Error> {
    let fault = |source| Error::Rows { format: Format::Csv, source };
    let mut writer = WriterBuilder::new().with_header(true).build(out);
    writer.write(&RecordBatch::new_empty(answer.schema.clone())).map_err(fault)?;
    let mut rows = 0;
    while let Some(batch) = answer.next().await? {
        writer.write(&batch).map_err(fault)?;
        rows += counted(batch.num_rows());
    }
    writer.into_inner().flush()?;
    Ok(rows)
}

async fn json(mut answer: Answer, out: impl Write) -> Result<u64, Error> {
    let fault = |source| Error::Rows { format: Format::Json, source };
    let mut writer: LineDelimitedWriter<_> =
        JsonBuilder::new().with_explicit_nulls(true).build::<_, LineDelimited>(out);
    let mut rows = 0;
    while let Some(batch) = answer.next().await? {
        writer.write(&batch).map_err(fault)?;
        rows += counted(batch.num_rows());
    }
    writer.finish().map_err(fault)?;
    writer.into_inner().flush()?;
    Ok(rows)
}

async fn parquet(mut answer: Answer, out: impl Write + Send) -> Result<u64, Error> {
    let mut writer = ArrowWriter::try_new(out, answer.schema.clone(), None)?;
    let mut rows = 0;
    while let Some(batch) = answer.next().await? {
        writer.write(&batch)?;
        rows += counted(batch.num_rows());
    }
    writer.close()?;
    Ok(rows)
}

fn counted(rows: usize) -> u64 {
    u64::try_from(rows).unwrap_or(u64::MAX)
}
