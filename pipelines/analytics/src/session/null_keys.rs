//! A key that must be known is asked for in groups rather than in rows.
//!
//! `WHERE model IS NOT NULL GROUP BY model` copies every column of nearly all rows, to leave out what would be one group. Where it leaves
//! few rows out these are grouped too, and their groups are left out before groups are brought together.
//!
//! Invariant: the answer is the same, and so are errors: nothing that can fail is worked out on a row that was left out.

use arrow::datatypes::{DataType, Schema};
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TransformedResult as _, TreeNode as _};
use datafusion::common::{Result, stats::Precision};
use datafusion::logical_expr::Operator;
use datafusion::physical_expr::expressions::{BinaryExpr, CastExpr, Column, IsNotNullExpr, Literal};
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::aggregates::{AggregateExec, AggregateMode};
use datafusion::physical_plan::filter::FilterExec;
use datafusion::physical_plan::statistics::{StatisticsArgs, StatisticsContext};
use datafusion::physical_plan::{
    ChildrenPropertiesMode, ExecutionPlan, PhysicalExpr, ReplaceChildrenOptions,
};
use std::sync::Arc;

/// One row in so many may be without its key: as much as it costs to copy the others.
const ROWS_TO_A_NULL: usize = 8;
/// Aggregates that take any value of their arguments.
const TAKE_ALL: [&str; 7] = ["count", "sum", "min", "max", "pctl", "pctls", "cost_per_1k"];

/// The rule.
#[derive(Debug)]
pub(super) struct NullKeys;

impl PhysicalOptimizerRule for NullKeys {
    fn name(&self) -> &str {
        "null_keys"
    }

    fn optimize(&self, plan: Arc<dyn ExecutionPlan>, _: &ConfigOptions) -> Result<Arc<dyn ExecutionPlan>> {
        plan.transform_up(|plan| {
            Ok(match lifted(&plan)? {
                Some(lifted) => Transformed::yes(lifted),
                None => Transformed::no(plan),
            })
        })
        .data()
    }

    fn schema_check(&self) -> bool {
        true
    }
}

/// Groups of all rows, of which those without a key are left out; nothing where a plan is no grouping of rows with a key.
fn lifted(plan: &Arc<dyn ExecutionPlan>) -> Result<Option<Arc<dyn ExecutionPlan>>> {
    let Some(groups) = plan.downcast_ref::<AggregateExec>() else { return Ok(None) };
    let Some(filter) = groups.input().downcast_ref::<FilterExec>() else { return Ok(None) };
    let known = filter.predicate().downcast_ref::<IsNotNullExpr>();
    let Some(known) = known.and_then(|known| known.arg().downcast_ref::<Column>()) else { return Ok(None) };
    let keys = groups.group_expr();
    let is_known = |(key, _): &(Arc<dyn PhysicalExpr>, String)| key.downcast_ref() == Some(known);
    let Some(place) = keys.expr().iter().position(is_known) else { return Ok(None) };
    let rows = filter.input();
    let schema = rows.schema();
    let of_keys = keys.expr().iter().map(|(key, _)| Arc::clone(key));
    let of_aggregates = groups.aggr_expr().iter().flat_map(|aggregate| aggregate.expressions());
    let of_filters = groups.filter_expr().iter().flatten().map(Arc::clone);
    let is_plain = *groups.mode() == AggregateMode::Partial
        && keys.is_single()
        && groups.limit_options().is_none()
        && plan.dynamic_expressions_produced().is_empty()
        && filter.projection().is_none()
        && filter.fetch().is_none()
        && groups.aggr_expr().iter().all(|aggregate| TAKE_ALL.contains(&aggregate.fun().name()))
        && of_keys.chain(of_aggregates).chain(of_filters).all(|expr| cannot_fail(&expr, &schema));
    if !is_plain || !are_few(rows, known)? {
        return Ok(None);
    }
    let options = ReplaceChildrenOptions::new(ChildrenPropertiesMode::Recompute);
    let groups = Arc::clone(plan).replace_children(vec![Arc::clone(rows)], options)?;
    let key = Column::new(groups.schema().field(place).name(), place);
    let known = Arc::new(IsNotNullExpr::new(Arc::new(key)));
    Ok(Some(Arc::new(FilterExec::try_new(known, groups)?)))
}

/// Whether few rows are without a value, by what files say of themselves.
fn are_few(rows: &Arc<dyn ExecutionPlan>, column: &Column) -> Result<bool> {
    let told = StatisticsContext::new().compute(rows.as_ref(), &StatisticsArgs::new())?;
    let nulls = told.column_statistics.get(column.index()).map(|column| &column.null_count);
    Ok(match (nulls.and_then(Precision::get_value), told.num_rows.get_value()) {
        (Some(nulls), Some(rows)) => nulls.saturating_mul(ROWS_TO_A_NULL) <= *rows,
        _ => false,
    })
}

/// Whether an expression can be worked out on any row: sums of whole numbers wrap, and those of floats are floats.
fn cannot_fail(expr: &Arc<dyn PhysicalExpr>, schema: &Schema) -> bool {
    let is_number = |expr: &Arc<dyn PhysicalExpr>| {
        matches!(expr.data_type(schema), Ok(DataType::Int64 | DataType::Float64))
    };
    let is_plain = if let Some(pair) = expr.downcast_ref::<BinaryExpr>() {
        match pair.op() {
            Operator::Plus | Operator::Minus | Operator::Multiply => is_number(expr),
            Operator::And | Operator::Or | Operator::Eq | Operator::NotEq => true,
            _ => false,
        }
    } else if let Some(cast) = expr.downcast_ref::<CastExpr>() {
        // To a double: the other way some do not fit.
        is_number(cast.expr()) && matches!(expr.data_type(schema), Ok(DataType::Float64))
    } else {
        expr.is::<Column>() || expr.is::<Literal>() || expr.is::<IsNotNullExpr>()
    };
    is_plain && expr.children().into_iter().all(|child| cannot_fail(child, schema))
}
