//! A version of a table, read in one of two ways: a predicate is tried on its own columns before the others are unpacked, or on rows.
//!
//! Unpacked apart, what a predicate goes by is read, tried, and what is left of it put together row by row. That is cheap beside sixty
//! columns that need not be unpacked for it, and dear beside the two or three that a report adds up, where most rows stay. There the
//! bounds of each page are looked at only where they can tell pages apart: a file is sorted by tenant and time, and what is chosen page
//! by page is read more slowly.
//!
//! Invariant: both ways leave out the same files and the same parts of files, and read the same rows.

use crate::table::{TENANT, Table};
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::Result;
use datafusion::execution::session_state::SessionState;
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown, TableType};
use datafusion::physical_plan::ExecutionPlan;
use deltalake_core::delta_datafusion::{DeltaScanConfig, DeltaScanNext};
use deltalake_core::table::state::DeltaTableState;
use std::collections::HashSet;
use std::sync::Arc;

/// With so many columns beside those of the predicate these wait for it.
const WAITING_MIN: usize = 8;

/// The table.
#[derive(Debug)]
pub(super) struct Rows {
    table: Table,
    at_once: DeltaScanNext,
    waiting: DeltaScanNext,
}

impl Rows {
    /// A version of a table; of its files only these, where they are named.
    pub(super) fn new(table: Table, version: &DeltaTableState, files: Option<Vec<String>>) -> Result<Self> {
        let scan = |waits| -> Result<DeltaScanNext> {
            // The day as a date, and not as a dictionary of dates.
            let config =
                DeltaScanConfig::new().with_wrap_partition_values(false).with_parquet_pushdown(waits);
            let scan = DeltaScanNext::new(version.snapshot().clone(), config)?;
            Ok(match &files {
                Some(files) => scan.with_file_paths(files),
                None => scan,
            })
        };
        Ok(Self { table, at_once: scan(false)?, waiting: scan(true)? })
    }

    /// Whether there are many columns that a predicate spares if it leaves few rows.
    fn has_many(&self, projection: Option<&Vec<usize>>, filters: &[Expr]) -> bool {
        let schema = self.schema();
        let tried: HashSet<&str> =
            filters.iter().flat_map(Expr::column_refs).map(|column| column.name.as_str()).collect();
        let is_other = |index: &usize| !tried.contains(schema.field(*index).name().as_str());
        let others = match projection {
            Some(projection) => projection.iter().filter(|index| is_other(index)).count(),
            None => (0..schema.fields().len()).filter(is_other).count(),
        };
        others >= WAITING_MIN
    }

    /// Whether pages of a file may differ in what a predicate asks for: they are in the order of tenant and time, and ids grow with time.
    fn tells_pages_apart(&self, filters: &[Expr]) -> bool {
        filters.iter().flat_map(Expr::column_refs).any(|column| {
            column.name == TENANT || column.name == self.table.time_column() || column.name.ends_with("_id")
        })
    }
}

#[async_trait]
impl TableProvider for Rows {
    fn schema(&self) -> SchemaRef {
        self.at_once.schema()
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn supports_filters_pushdown(&self, filters: &[&Expr]) -> Result<Vec<TableProviderFilterPushDown>> {
        self.at_once.supports_filters_pushdown(filters)
    }

    async fn scan(
        &self,
        session: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        if self.has_many(projection, filters) {
            return self.waiting.scan(session, projection, filters, limit).await;
        }
        let tells_none_apart = !filters.is_empty() && !self.tells_pages_apart(filters);
        let state = session.as_any().downcast_ref::<SessionState>().filter(|_| tells_none_apart);
        let Some(state) = state else {
            return self.at_once.scan(session, projection, filters, limit).await;
        };
        let mut whole = state.clone();
        whole.config_mut().options_mut().execution.parquet.enable_page_index = false;
        self.at_once.scan(&whole, projection, filters, limit).await
    }
}
