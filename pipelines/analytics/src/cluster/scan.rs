//! A version of a table as plain files, which an executor reads without its log.
//!
//! The log is read by who asks: it says which files the version has, which of them the predicate leaves, and what day each is of. They
//! are named by their place below the root of the tables, and each executor knows that root by its own settings.
//!
//! Invariant: what an executor reads of the files is what the table format would. Where that takes more than reading files, as rows that
//! are deleted in place do, the table is refused.

use crate::guards::{self, Refused};
use crate::table::{DATE, Table};
use arrow::datatypes::{DataType, Schema, SchemaRef};
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::stats::Precision;
use datafusion::common::{DataFusionError, Result, ScalarValue, Statistics, ToDFSchema as _};
use datafusion::datasource::listing::PartitionedFile;
use datafusion::datasource::physical_plan::{
    FileGroup, FileScanConfig, FileScanConfigBuilder, ParquetSource,
};
use datafusion::datasource::source::DataSourceExec;
use datafusion::datasource::table_schema::TableSchema;
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::logical_expr::utils::conjunction;
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown, TableType};
use datafusion::physical_optimizer::pruning::PruningPredicateBuilder;
use datafusion::physical_plan::{ExecutionPlan, empty::EmptyExec};
use deltalake_core::DeltaTable;
use deltalake_core::kernel::{EagerSnapshot, LogicalFileView};
use std::sync::Arc;
use tables_store::{ObjectMeta, path::Path};

/// The root of the tables, as plans call it.
pub(super) const ROOT: &str = "tables://root/";

/// Some days of a version of a table.
#[derive(Debug)]
pub(crate) struct Shared {
    table: Table,
    snapshot: EagerSnapshot,
    /// The columns in the order of the table.
    schema: SchemaRef,
    /// The same in the order in which files give them: the day last.
    files: TableSchema,
    /// Of each file of the log, whether its day is wanted.
    wanted: Vec<bool>,
}

impl Shared {
    /// The rows of the days that are wanted.
    pub(crate) fn new(table: Table, version: &DeltaTable, wanted: impl Fn(&str) -> bool) -> Result<Self> {
        let state = version.snapshot()?;
        if state.protocol().min_reader_version() > 1 {
            let what = "a table with features of newer readers, such as deletion vectors,";
            return Err(Refused::Local { what, instead: "" }.into());
        }
        let schema = state.snapshot().arrow_schema();
        let (day, others): (Vec<_>, Vec<_>) =
            schema.fields().iter().cloned().partition(|field| field.name() == DATE);
        let files =
            TableSchema::builder(Arc::new(Schema::new(others))).with_table_partition_cols(day).build();
        let is_wanted = |file: LogicalFileView| {
            let day = file.partition_values_map().remove(DATE).flatten();
            day.as_deref().is_none_or(&wanted)
        };
        let wanted = state.log_data().into_iter().map(is_wanted).collect();
        Ok(Self { table, snapshot: state.snapshot().clone(), schema, files, wanted })
    }

    /// The files that may hold rows which the predicates leave, and how many rows they have.
    fn chosen(
        &self,
        session: &dyn Session,
        filters: &[Expr],
    ) -> Result<(Vec<PartitionedFile>, Option<usize>)> {
        let log = self.snapshot.log_data();
        let kept = match conjunction(filters.iter().cloned()) {
            None => vec![true; self.wanted.len()],
            Some(filter) => {
                let columns = Arc::clone(self.files.table_schema());
                let filter = session.create_physical_expr(filter, &Arc::clone(&columns).to_dfschema()?)?;
                PruningPredicateBuilder::new().with_file_schema(columns).try_build(filter)?.prune(&log)?
            }
        };
        let (mut chosen, mut rows) = (Vec::new(), Some(0_usize));
        for ((file, is_wanted), is_kept) in log.iter().zip(&self.wanted).zip(kept) {
            if !is_wanted || !is_kept {
                continue;
            }
            let day = match file.partition_values_map().remove(DATE).flatten() {
                Some(day) => ScalarValue::try_from_string(day, &DataType::Date32)?,
                None => ScalarValue::Date32(None),
            };
            let location = format!("{}/{}", self.table.name(), file.object_store_path());
            let mut part = PartitionedFile::new_from_meta(ObjectMeta {
                location: Path::parse(location)
                    .map_err(|fault| DataFusionError::External(Box::new(fault)))?,
                last_modified: file.modification_datetime()?,
                size: u64::try_from(file.size()).unwrap_or(0),
                e_tag: None,
                version: None,
            });
            part.partition_values = vec![day];
            chosen.push(part);
            rows = rows.zip(file.num_records()).map(|(sum, more)| sum.saturating_add(more));
        }
        Ok((chosen, rows))
    }
}

#[async_trait]
impl TableProvider for Shared {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    /// Predicates spare files and parts of them; rows are filtered behind the scan.
    fn supports_filters_pushdown(&self, filters: &[&Expr]) -> Result<Vec<TableProviderFilterPushDown>> {
        let spares = |filter: &&Expr| match guards::is_harmless(filter) {
            true => TableProviderFilterPushDown::Inexact,
            false => TableProviderFilterPushDown::Unsupported,
        };
        Ok(filters.iter().map(spares).collect())
    }

    async fn scan(
        &self,
        session: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let columns = self.files.table_schema();
        let wanted: Vec<usize> =
            projection.cloned().unwrap_or_else(|| (0..self.schema.fields().len()).collect());
        let read = wanted.iter().map(|index| Ok(columns.index_of(self.schema.field(*index).name())?));
        let read = read.collect::<Result<Vec<_>>>()?;
        let (files, rows) = self.chosen(session, filters)?;
        if files.is_empty() {
            return Ok(Arc::new(EmptyExec::new(Arc::new(self.schema.project(&wanted)?))));
        }
        let mut source = ParquetSource::new(self.files.clone());
        if let Some(filter) = conjunction(filters.iter().cloned()) {
            let filter = session.create_physical_expr(filter, &Arc::clone(columns).to_dfschema()?)?;
            source = source.with_predicate(filter);
        }
        let bytes: u64 = files.iter().map(|file| file.object_meta.size).sum();
        let statistics = Statistics {
            // The log counts all rows of a file, and a predicate may leave fewer.
            num_rows: rows.map_or(Precision::Absent, Precision::Inexact),
            total_byte_size: Precision::Inexact(usize::try_from(bytes).unwrap_or(usize::MAX)),
            column_statistics: Statistics::unknown_column(columns),
        };
        let scan = FileScanConfigBuilder::new(ObjectStoreUrl::parse(ROOT)?, Arc::new(source))
            .with_file_groups(spread(files, session.config().target_partitions()))
            .with_statistics(statistics)
            .with_projection_indices(Some(read))?
            .with_limit(limit)
            .build();
        Ok(DataSourceExec::from_data_source(scan))
    }
}

/// Files in at most so many groups of about as many bytes, a task each.
fn spread(mut files: Vec<PartitionedFile>, groups: usize) -> Vec<FileGroup> {
    let mut spread = vec![(0_u64, Vec::new()); groups.clamp(1, files.len().max(1))];
    files.sort_by_key(|file| std::cmp::Reverse(file.object_meta.size));
    for file in files {
        // The largest first, each to whom has least.
        if let Some((bytes, group)) = spread.iter_mut().min_by_key(|(bytes, _)| *bytes) {
            *bytes = bytes.saturating_add(file.object_meta.size.max(1));
            group.push(file);
        }
    }
    spread.into_iter().map(|(_, group)| FileGroup::new(group)).collect()
}

/// Whether this node of a plan reads files that executors know.
pub(super) fn is_shared(node: &dyn ExecutionPlan) -> bool {
    let source = node.downcast_ref::<DataSourceExec>().map(DataSourceExec::data_source);
    let scan = source.and_then(|source| source.downcast_ref::<FileScanConfig>());
    scan.is_some_and(|scan| scan.object_store_url.as_str() == ROOT)
}
