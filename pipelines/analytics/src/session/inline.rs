//! Strings that are no longer than their views hold are given on without buffers.
//!
//! A string of up to 12 bytes lies in its view, and a reader of Parquet hands the page of its dictionary on beside it all the same.
//! Comparing, hashing and grouping look whether there are buffers: without any a string is a number of 128 bits to them, and with some
//! each string is asked for its length, its prefix and then the rest. Views of status, cache and lane are all of the short kind.
//!
//! Invariant: rows are the same, in the same order; whoever pushes a predicate down reaches the scan.

use arrow::array::{ArrayRef, AsArray as _, RecordBatch, RecordBatchOptions};
use arrow::datatypes::DataType;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TransformedResult as _, TreeNode as _, TreeNodeRecursion};
use datafusion::common::{Result, internal_err};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::filter_pushdown::{FilterDescription, FilterPushdownPhase};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    ChildrenPropertiesMode, DisplayAs, DisplayFormatType, ExecutionPlan, PhysicalExpr, PlanProperties,
    ReplaceChildrenOptions,
};
use deltalake_core::delta_datafusion::DeltaScanExec;
use futures::StreamExt as _;
use std::fmt;
use std::sync::Arc;

/// Puts [`Inline`] above each scan that reads strings.
#[derive(Debug)]
pub(super) struct InlineStrings;

impl PhysicalOptimizerRule for InlineStrings {
    fn name(&self) -> &str {
        "inline_strings"
    }

    fn optimize(&self, plan: Arc<dyn ExecutionPlan>, _: &ConfigOptions) -> Result<Arc<dyn ExecutionPlan>> {
        let wrapped = plan.transform_up(|plan| {
            let reads_strings =
                || plan.schema().fields().iter().any(|field| *field.data_type() == DataType::Utf8View);
            Ok(match plan.is::<DeltaScanExec>() && reads_strings() {
                true => Transformed::yes(Arc::new(Inline { input: plan }) as Arc<dyn ExecutionPlan>),
                false => Transformed::no(plan),
            })
        });
        wrapped.data()
    }

    fn schema_check(&self) -> bool {
        true
    }
}

#[derive(Debug)]
struct Inline {
    input: Arc<dyn ExecutionPlan>,
}

impl DisplayAs for Inline {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("InlineStringsExec")
    }
}

impl ExecutionPlan for Inline {
    fn name(&self) -> &str {
        "InlineStringsExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        self.input.properties()
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn maintains_input_order(&self) -> Vec<bool> {
        vec![true]
    }

    fn apply_expressions(
        &self,
        _: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn replace_children(
        self: Arc<Self>,
        mut children: Vec<Arc<dyn ExecutionPlan>>,
        _: ReplaceChildrenOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        match (children.pop(), children.len()) {
            (Some(input), 0) => Ok(Arc::new(Self { input })),
            (_, more) => internal_err!("InlineStringsExec has one child, and was given {more} more or none"),
        }
    }

    fn with_new_children(
        self: Arc<Self>,
        children: Vec<Arc<dyn ExecutionPlan>>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        self.replace_children(children, ReplaceChildrenOptions::new(ChildrenPropertiesMode::Recompute))
    }

    fn gather_filters_for_pushdown(
        &self,
        _: FilterPushdownPhase,
        parent_filters: Vec<Arc<dyn PhysicalExpr>>,
        _: &ConfigOptions,
    ) -> Result<FilterDescription> {
        FilterDescription::from_children(parent_filters, &self.children())
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let rows = self.input.execute(partition, context)?;
        let schema = rows.schema();
        // Where one string was long there will be more: those columns are not looked at again.
        let mut are_short = vec![true; schema.fields().len()];
        let rows = rows.map(move |batch| batch.and_then(|batch| inlined(batch, &mut are_short)));
        Ok(Box::pin(RecordBatchStreamAdapter::new(schema, rows)))
    }
}

fn inlined(batch: RecordBatch, are_short: &mut [bool]) -> Result<RecordBatch> {
    let (schema, mut columns, count) = batch.into_parts();
    for (column, are_short) in columns.iter_mut().zip(are_short) {
        *are_short = *are_short && inline(column);
    }
    let count = RecordBatchOptions::new().with_row_count(Some(count));
    Ok(RecordBatch::try_new_with_options(schema, columns, &count)?)
}

/// Takes the buffers from a column of short strings; says whether it is one.
fn inline(column: &mut ArrayRef) -> bool {
    let Some(strings) = column.as_string_view_opt() else { return false };
    if strings.total_buffer_bytes_used() > 0 {
        return false;
    }
    if !strings.data_buffers().is_empty() {
        *column = Arc::new(strings.gc());
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Array as _, Int64Array, StringViewArray, StringViewBuilder};
    use arrow::datatypes::{Field, Schema};

    /// As a reader of Parquet makes it: views beside the page of a dictionary.
    fn read(strings: &[Option<&str>]) -> ArrayRef {
        let mut built = StringViewBuilder::new();
        built.append_block(b"a page".to_vec().into());
        strings.iter().for_each(|string| built.append_option(*string));
        Arc::new(built.finish())
    }

    #[test]
    fn short_strings_lose_their_buffers_and_long_ones_keep_them() {
        let (short, long) =
            ([Some("hit"), None, Some("twelve bytes")], [Some("more than twelve"), None, None]);
        let number: ArrayRef = Arc::new(Int64Array::from(vec![1, 2, 3]));
        let columns = vec![read(&short), number, read(&long), read(&long[1..].repeat(2)[..3])];
        let fields = ["a", "b", "c", "d"].iter().zip(&columns);
        let fields: Vec<_> =
            fields.map(|(name, column)| Field::new(*name, column.data_type().clone(), true)).collect();
        let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap();
        let mut are_short = vec![true; 4];
        let given = inlined(batch.clone(), &mut are_short).unwrap();
        assert_eq!((&given, are_short.as_slice()), (&batch, [true, false, false, true].as_slice()));
        let buffers = |index: usize| {
            given.column(index).as_string_view_opt().map(StringViewArray::data_buffers).map(<[_]>::len)
        };
        assert_eq!([buffers(0), buffers(2), buffers(3)], [Some(0), Some(2), Some(0)]);
    }

    #[test]
    fn rows_without_columns_are_counted_still() {
        let none = RecordBatchOptions::new().with_row_count(Some(7));
        let batch = RecordBatch::try_new_with_options(Arc::new(Schema::empty()), vec![], &none).unwrap();
        assert_eq!(inlined(batch, &mut []).unwrap().num_rows(), 7);
    }
}
