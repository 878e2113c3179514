//! What the sink of a table counts.
//!
//! Invariant: there is a series for each table, and tables are few.

use crate::instruments as declared;
use opentelemetry::{
    KeyValue,
    metrics::{Counter, Histogram, Meter},
};
use std::{sync::Arc, time::Duration};

/// The instruments of all tables.
pub(crate) struct Instruments {
    rows: Counter<u64>,
    bytes: Counter<u64>,
    files: Counter<u64>,
    versions: Counter<u64>,
    conflicts: Counter<u64>,
    repeated: Counter<u64>,
    rejected: Counter<u64>,
    lost: Counter<u64>,
    freshness: Histogram<f64>,
}

impl Instruments {
    pub(crate) fn new(meter: &Meter) -> Self {
        Self {
            rows: declared::TABLE_ROWS.counter(meter),
            bytes: declared::TABLE_BYTES.counter(meter),
            files: declared::TABLE_FILES.counter(meter),
            versions: declared::TABLE_VERSIONS.counter(meter),
            conflicts: declared::TABLE_CONFLICTS.counter(meter),
            repeated: declared::TABLE_REPEATED.counter(meter),
            rejected: declared::TABLE_REJECTED.counter(meter),
            lost: declared::TABLE_LOST.counter(meter),
            freshness: declared::TABLE_FRESHNESS.histogram_f64(meter),
        }
    }
}

/// Counts for one table. A clone counts the same.
#[derive(Clone)]
pub struct TableMeter {
    instruments: Arc<Instruments>,
    labels: [KeyValue; 1],
}

/// What one flush came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableFlush {
    /// Rows that are in the table by it.
    pub rows: u64,
    /// Files that it wrote.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Versions that it made.
    pub versions: u64,
    /// Commits that another writer was before.
    pub conflicts: u64,
    /// Rows that were in the table already.
    pub repeated: u64,
    /// Messages that are no row.
    pub rejected: u64,
}

impl TableMeter {
    pub(crate) fn new(instruments: Arc<Instruments>, table: &'static str) -> Self {
        Self { instruments, labels: [KeyValue::new("table", table)] }
    }

    /// A flush ended.
    pub fn flushed(&self, flush: TableFlush) {
        let Self { instruments, labels } = self;
        instruments.rows.add(flush.rows, labels);
        instruments.files.add(flush.files, labels);
        instruments.bytes.add(flush.bytes, labels);
        instruments.versions.add(flush.versions, labels);
        instruments.conflicts.add(flush.conflicts, labels);
        instruments.repeated.add(flush.repeated, labels);
        instruments.rejected.add(flush.rejected, labels);
    }

    /// The oldest of the rows that were committed together is now in its table.
    pub fn fresh(&self, age: Duration) {
        self.instruments.freshness.record(age.as_secs_f64(), &self.labels);
    }

    /// Records were forgotten by their topic before they were read.
    pub fn lost(&self, records: u64) {
        self.instruments.lost.add(records, &self.labels);
    }
}
