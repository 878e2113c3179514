//! Leaves out a grouping whose groups are grouped again at once.
//!
//! Views, dashboards and the report stand on hours added up, and hours that are not rolled up yet are worked out from their rows. There are
//! nearly as many of these hours as rows, by a dozen keys each, and who asks adds them up by a key or two: that is answered from the
//! rows, in one grouping and not in two.
//!
//! Invariant: the answer is the same. The outer grouping is one to which it makes no difference in how many pieces an inner group comes:
//! it goes by what the inner one goes by, and adds up what that added up. Whatever else it asks for, both stay.

use crate::functions;
use arrow::datatypes::DataType;
use datafusion::common::tree_node::{Transformed, TreeNode as _, TreeNodeRecursion};
use datafusion::common::{DFSchema, Result, ScalarValue};
use datafusion::logical_expr::expr::{AggregateFunction, Case, ScalarFunction};
use datafusion::logical_expr::{
    Aggregate, BinaryExpr, Expr, ExprSchemable as _, Filter, LogicalPlan, Operator, Projection,
    SubqueryAlias, Union, lit, when,
};
use datafusion::optimizer::{ApplyOrder, OptimizerConfig, OptimizerRule};
use std::sync::Arc;

/// The rule. It must come before all others: they rewrite expressions that it knows by their form.
#[derive(Debug)]
pub(super) struct Regroup;

impl OptimizerRule for Regroup {
    fn name(&self) -> &str {
        "regroup"
    }

    fn apply_order(&self) -> Option<ApplyOrder> {
        Some(ApplyOrder::TopDown)
    }

    fn rewrite(&self, plan: LogicalPlan, _: &dyn OptimizerConfig) -> Result<Transformed<LogicalPlan>> {
        let LogicalPlan::Aggregate(mut outer) = plan else { return Ok(Transformed::no(plan)) };
        let mut is_changed = false;
        // A grouping of groups of groups loses one at a time.
        while let Some(input) = ungrouped(&outer)? {
            let Aggregate { group_expr, aggr_expr, schema, .. } = outer;
            outer = Aggregate::try_new_with_schema(Arc::new(input), group_expr, aggr_expr, schema)?;
            is_changed = true;
        }
        Ok(Transformed::new_transformed(LogicalPlan::Aggregate(outer), is_changed))
    }
}

/// What the value of a column becomes where its row comes in pieces.
#[derive(Clone, Debug, PartialEq)]
enum Piece {
    /// The row never does.
    Whole,
    /// 0 or null: it adds nothing to a sum, however often.
    Nothing,
    /// Each piece has it as it was.
    Same,
    /// Those of the pieces add up to it; of what they are the sum, where that is known.
    Sum(Option<Expr>),
    /// Those of the pieces come together to it by `pctl_merge`.
    State,
    /// None of these.
    Unknown,
}

impl Piece {
    fn is_same(&self) -> bool {
        matches!(self, Self::Whole | Self::Nothing | Self::Same)
    }

    /// One of a column that has this in some of its rows, and that in others.
    fn or(self, other: Self) -> Self {
        match (self, other) {
            (one, other) if one == other => one,
            (Self::Whole, other) | (other, Self::Whole) => other,
            (Self::Nothing, other) | (other, Self::Nothing) => other,
            (Self::Sum(_), Self::Sum(_)) => Self::Sum(None),
            _ => Self::Unknown,
        }
    }
}

/// A plan, and what its columns become in it.
struct Cut {
    plan: LogicalPlan,
    pieces: Vec<Piece>,
    /// Whether any row comes in pieces now.
    is_cut: bool,
}

/// The input of a grouping without the grouping in it; nothing where there is none, or where its answer would be another.
fn ungrouped(outer: &Aggregate) -> Result<Option<LogicalPlan>> {
    let Cut { plan, pieces, is_cut } = cut(&outer.input)?;
    let schema = outer.input.schema();
    let goes_by =
        |expr: &Expr| !matches!(expr, Expr::GroupingSet(_)) && piece(expr, schema, &pieces).is_same();
    let is_asked = is_cut
        && outer.group_expr.iter().all(goes_by)
        && outer.aggr_expr.iter().all(|expr| adds_up(expr, schema, &pieces));
    Ok(is_asked.then_some(plan))
}

/// Whether an aggregate says the same of rows and of their pieces.
fn adds_up(expr: &Expr, schema: &DFSchema, pieces: &[Piece]) -> bool {
    let Expr::AggregateFunction(AggregateFunction { func, params }) = expr.clone().unalias() else {
        return false;
    };
    let goes_by = |expr: &Expr| piece(expr, schema, pieces).is_same();
    if !params.order_by.is_empty() || params.filter.as_deref().is_some_and(|filter| !goes_by(filter)) {
        return false;
    }
    let of: Vec<Piece> = params.args.iter().map(|arg| piece(arg, schema, pieces)).collect();
    match (func.name(), of.as_slice()) {
        ("min" | "max", [of]) => of.is_same(),
        ("count", [of]) if params.distinct => of.is_same(),
        (_, _) if params.distinct => false,
        ("sum", [of]) => matches!(of, Piece::Sum(_) | Piece::Nothing | Piece::Whole),
        ("pctl_merge", [of, _]) => matches!(of, Piece::State | Piece::Whole),
        ("cost_per_1k", [Piece::Sum(Some(money)), Piece::Sum(Some(tokens))]) => {
            is_known_with(money, tokens) && is_known_with(tokens, money)
        }
        _ => false,
    }
}

/// Whether the first is null wherever the second is: a ratio of sums takes only rows where both are known, and where each of two
/// sums has rows of its own, that is another one of the pieces than of the whole.
fn is_known_with(one: &Expr, other: &Expr) -> bool {
    let value = |expr: &Expr| match expr {
        Expr::Case(Case { expr: None, when_then_expr, else_expr }) => match when_then_expr.as_slice() {
            [(when, then)] if else_expr.as_deref().is_none_or(is_null) => match when.as_ref() {
                Expr::IsNotNull(known) => Some((known.as_ref().clone(), then.as_ref().clone())),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    };
    matches!((value(one), value(other)), (Some((known, _)), Some((_, then))) if known == then)
}

fn is_null(expr: &Expr) -> bool {
    matches!(expr, Expr::Literal(value, _) if value.is_null())
}

/// What an expression becomes, by what the columns do that it is made of.
fn piece(expr: &Expr, schema: &DFSchema, pieces: &[Piece]) -> Piece {
    let of = |expr: &Expr| piece(expr, schema, pieces);
    match expr {
        Expr::Column(column) => {
            let found = schema.maybe_index_of_column(column).and_then(|index| pieces.get(index));
            found.cloned().unwrap_or(Piece::Unknown)
        }
        Expr::Alias(alias) => of(&alias.expr),
        Expr::Literal(value, _) if value.is_null() || *value == ScalarValue::Int64(Some(0)) => Piece::Nothing,
        Expr::Literal(..) => Piece::Same,
        // Types that hold the same values.
        Expr::Cast(cast) => match (of(&cast.expr), cast.field.data_type()) {
            (sum @ Piece::Sum(_), DataType::Int64) => sum,
            (state @ Piece::State, DataType::Binary | DataType::BinaryView) => state,
            (same, _) if same.is_same() => same,
            _ => Piece::Unknown,
        },
        Expr::Case(Case { expr: base, when_then_expr, else_expr }) => {
            let whens = when_then_expr.iter().map(|(when, _)| when).chain(base);
            if !whens.into_iter().all(|when| of(when).is_same()) {
                return Piece::Unknown;
            }
            let thens = when_then_expr.iter().map(|(_, then)| then).chain(else_expr);
            let all = thens.map(|then| of(then)).reduce(Piece::or).unwrap_or(Piece::Unknown);
            match all {
                // Where another is chosen in some rows, it is no longer the sum of the same.
                Piece::Sum(_) => Piece::Sum(None),
                all => all,
            }
        }
        // As many times the sum: as many times each piece. Of floats that would be so but for rounding.
        Expr::BinaryExpr(BinaryExpr { left, op: Operator::Multiply, right }) => {
            let is_whole_number =
                |expr: &Expr| expr.get_type(schema).is_ok_and(|kind| kind == DataType::Int64);
            match (of(left), of(right)) {
                (Piece::Sum(_), Piece::Same) | (Piece::Same, Piece::Sum(_))
                    if is_whole_number(left) && is_whole_number(right) =>
                {
                    Piece::Sum(None)
                }
                _ => whole_of(expr, of),
            }
        }
        expr => whole_of(expr, of),
    }
}

/// Of any other expression: as its parts, if it asks for nothing else.
fn whole_of(expr: &Expr, of: impl Fn(&Expr) -> Piece) -> Piece {
    let is_plain = !matches!(
        expr,
        Expr::AggregateFunction(_)
            | Expr::WindowFunction(_)
            | Expr::Exists(_)
            | Expr::InSubquery(_)
            | Expr::SetComparison(_)
            | Expr::ScalarSubquery(_)
            | Expr::OuterReferenceColumn(..)
            | Expr::GroupingSet(_)
    );
    if !is_plain || expr.is_volatile() {
        return Piece::Unknown;
    }
    let mut all = Piece::Same;
    let seen = expr.apply_children(|child| {
        all = match of(child) {
            Piece::Whole => Piece::Whole,
            same if same.is_same() => return Ok(TreeNodeRecursion::Continue),
            _ => Piece::Unknown,
        };
        Ok(if all == Piece::Unknown { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue })
    });
    if seen.is_ok() { all } else { Piece::Unknown }
}

/// A plan in which the groups of the uppermost groupings come as their rows.
fn cut(plan: &LogicalPlan) -> Result<Cut> {
    let whole = || Cut {
        plan: plan.clone(),
        pieces: vec![Piece::Whole; plan.schema().fields().len()],
        is_cut: false,
    };
    match plan {
        LogicalPlan::SubqueryAlias(SubqueryAlias { input, alias, .. }) => {
            let inner = cut(input)?;
            let plan = SubqueryAlias::try_new(Arc::new(inner.plan), alias.clone())?;
            Ok(Cut { plan: LogicalPlan::SubqueryAlias(plan), ..inner })
        }
        LogicalPlan::Projection(Projection { expr, input, .. }) => {
            let Cut { plan, pieces, is_cut } = cut(input)?;
            if !is_cut {
                return Ok(whole());
            }
            let shown = expr.iter().map(|expr| piece(expr, input.schema(), &pieces)).collect();
            let plan = Projection::try_new(expr.clone(), Arc::new(plan))?;
            Ok(Cut { plan: LogicalPlan::Projection(plan), pieces: shown, is_cut })
        }
        LogicalPlan::Filter(Filter { predicate, input, .. }) => {
            let inner = cut(input)?;
            if inner.is_cut && !piece(predicate, input.schema(), &inner.pieces).is_same() {
                return Ok(whole());
            }
            let plan = Filter::try_new(predicate.clone(), Arc::new(inner.plan))?;
            Ok(Cut { plan: LogicalPlan::Filter(plan), ..inner })
        }
        LogicalPlan::Union(Union { inputs, schema }) => {
            let mut all = whole();
            let mut cuts = Vec::with_capacity(inputs.len());
            for input in inputs {
                let Cut { plan, pieces, is_cut } = cut(input)?;
                all.pieces = all.pieces.into_iter().zip(pieces).map(|(one, other)| one.or(other)).collect();
                all.is_cut |= is_cut;
                cuts.push(Arc::new(plan));
            }
            all.plan = LogicalPlan::Union(Union { inputs: cuts, schema: Arc::clone(schema) });
            Ok(all)
        }
        LogicalPlan::Aggregate(inner) => Ok(rows(inner)?.unwrap_or_else(whole)),
        _ => Ok(whole()),
    }
}

/// The rows of a grouping, each as if it were a group.
fn rows(inner: &Aggregate) -> Result<Option<Cut>> {
    // Without keys there is one group also of no rows.
    let cannot = |key: &Expr| matches!(key, Expr::GroupingSet(_)) || key.is_volatile();
    if inner.group_expr.is_empty() || inner.group_expr.iter().any(cannot) {
        return Ok(None);
    }
    let mut shown = inner.group_expr.clone();
    let mut pieces = vec![Piece::Same; shown.len()];
    let fields = inner.schema.fields().iter().skip(shown.len());
    for (expr, field) in inner.aggr_expr.iter().zip(fields) {
        let (row, piece) = match row(expr, &inner.input)? {
            Some(made) => made,
            // Nobody asks for it, or all of this is given up.
            None => (Expr::Literal(ScalarValue::try_from(field.data_type())?, None), Piece::Unknown),
        };
        shown.push(row.alias(field.name()));
        pieces.push(piece);
    }
    let plan = LogicalPlan::Projection(Projection::try_new(shown, Arc::clone(&inner.input))?);
    Ok(Some(Cut { plan, pieces, is_cut: true }))
}

/// What an aggregate says of one row.
fn row(expr: &Expr, input: &LogicalPlan) -> Result<Option<(Expr, Piece)>> {
    let Expr::AggregateFunction(AggregateFunction { func, params }) = expr.clone().unalias() else {
        return Ok(None);
    };
    let [of] = params.args.as_slice() else { return Ok(None) };
    if params.distinct || !params.order_by.is_empty() || of.is_volatile() {
        return Ok(None);
    }
    let kind = of.get_type(input.schema())?;
    let (made, otherwise, piece) = match func.name() {
        "count" if matches!(of, Expr::Literal(value, _) if !value.is_null()) => {
            (lit(1_i64), lit(0_i64), Piece::Sum(None))
        }
        // Of other numbers a sum depends on its order, or has another type.
        "sum" if kind == DataType::Int64 => {
            (of.clone(), lit(ScalarValue::Int64(None)), Piece::Sum(Some(of.clone())))
        }
        "pctl_state" => {
            let state = ScalarFunction::new_udf(functions::state_of_one(), vec![of.clone()]);
            (Expr::ScalarFunction(state), lit(ScalarValue::BinaryView(None)), Piece::State)
        }
        _ => return Ok(None),
    };
    Ok(Some(match params.filter {
        None => (made, piece),
        Some(filter) if filter.is_volatile() => return Ok(None),
        Some(filter) => {
            let piece = if piece == Piece::State { piece } else { Piece::Sum(None) };
            (when(*filter, made).otherwise(otherwise)?, piece)
        }
    }))
}

#[cfg(test)]
mod tests;
