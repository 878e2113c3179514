//! Percentiles of the same values are told by one aggregate: `pctl(x, 0.5)` and `pctl(x, 0.99)` would each keep all of x.
//!
//! Invariant: the answer is the same, under the same names and in the same order.

use super::{Argument, Function, aggregate};
use datafusion::common::tree_node::Transformed;
use datafusion::common::{Column, Result};
use datafusion::functions_nested::extract::array_element;
use datafusion::logical_expr::expr::AggregateFunction;
use datafusion::logical_expr::{Aggregate, AggregateUDF, Expr, LogicalPlan, Projection, lit};
use datafusion::optimizer::{ApplyOrder, OptimizerConfig, OptimizerRule};
use std::sync::Arc;

/// Of more fractions than these each is worked out by itself.
const FRACTIONS_MAX: usize = 15;

/// What answers several calls at once.
static TOGETHER: [(&str, Function); 2] = [
    (
        "pctl",
        Function {
            name: "pctls",
            call: "pctl(x, p)",
            is_aggregate: true,
            meaning: "What `pctl` answers at each of these fractions.",
            arguments: &[Argument::Number; FRACTIONS_MAX + 1],
            required: 2,
        },
    ),
    (
        "pctl_merge",
        Function {
            name: "pctls_merge",
            call: "pctl_merge(state, p)",
            is_aggregate: true,
            meaning: "What `pctl_merge` answers at each of these fractions.",
            arguments: &{
                let mut arguments = [Argument::Number; FRACTIONS_MAX + 1];
                arguments[0] = Argument::State;
                arguments
            },
            required: 2,
        },
    ),
];

/// What the rule puts in the place of what was called.
pub(super) fn functions() -> impl Iterator<Item = &'static Function> {
    TOGETHER.iter().map(|(_, function)| function)
}

/// The rule.
#[derive(Debug)]
pub(crate) struct Share;

impl OptimizerRule for Share {
    fn name(&self) -> &str {
        "share_percentiles"
    }

    fn apply_order(&self) -> Option<ApplyOrder> {
        Some(ApplyOrder::TopDown)
    }

    fn rewrite(&self, plan: LogicalPlan, _: &dyn OptimizerConfig) -> Result<Transformed<LogicalPlan>> {
        let LogicalPlan::Aggregate(all) = &plan else { return Ok(Transformed::no(plan)) };
        if all.group_expr.iter().any(|key| matches!(key, Expr::GroupingSet(_))) {
            return Ok(Transformed::no(plan));
        }
        let mut shared: Vec<Shared> = Vec::new();
        for (index, expr) in all.aggr_expr.iter().enumerate() {
            let Some(call) = Shared::of(index, expr) else { continue };
            let room = |other: &&mut Shared| other.is_of_same(&call) && other.asks.len() < FRACTIONS_MAX;
            match shared.iter_mut().find(room) {
                Some(other) => other.asks.extend(call.asks),
                None => shared.push(call),
            }
        }
        shared.retain(|call| call.asks.len() > 1);
        if shared.is_empty() {
            return Ok(Transformed::no(plan));
        }
        let keys = all.group_expr.len();
        let mut shown: Vec<Expr> = all.schema.iter().map(|field| Expr::Column(Column::from(field))).collect();
        let is_left = |index: usize| !shared.iter().any(|call| call.asks.iter().any(|(at, _)| *at == index));
        let left = all.aggr_expr.iter().enumerate().filter(|(index, _)| is_left(*index));
        let mut asked: Vec<Expr> = left.map(|(_, expr)| expr.clone()).collect();
        for call in shared {
            let together = Expr::AggregateFunction(call.together()?);
            let name = together.schema_name().to_string();
            for (place, (index, _)) in (1_i64..).zip(&call.asks) {
                let answer = array_element(Expr::Column(Column::from_name(&name)), lit(place));
                shown[keys + index] = answer.alias(all.schema.field(keys + index).name());
            }
            asked.push(together);
        }
        let all = Aggregate::try_new(Arc::clone(&all.input), all.group_expr.clone(), asked)?;
        let plan = Projection::try_new(shown, Arc::new(LogicalPlan::Aggregate(all)))?;
        Ok(Transformed::yes(LogicalPlan::Projection(plan)))
    }
}

/// A call, or several of the same values.
struct Shared {
    call: AggregateFunction,
    function: &'static Function,
    /// Which of the aggregates they are, and at which fraction.
    asks: Vec<(usize, Expr)>,
}

/// Also a whole number, which is not cast yet.
fn is_constant(p: &Expr) -> bool {
    match p {
        Expr::Literal(..) => true,
        Expr::Cast(cast) => is_constant(&cast.expr),
        _ => false,
    }
}

impl Shared {
    fn of(index: usize, expr: &Expr) -> Option<Self> {
        let Expr::AggregateFunction(call) = expr.clone().unalias() else { return None };
        let (_, function) = TOGETHER.iter().find(|(name, _)| *name == call.func.name())?;
        let params = &call.params;
        let is_plain = !params.distinct && params.order_by.is_empty() && params.null_treatment.is_none();
        match params.args.as_slice() {
            [_, p] if is_plain && is_constant(p) => {
                let asks = vec![(index, p.clone())];
                Some(Self { call, function, asks })
            }
            _ => None,
        }
    }

    fn is_of_same(&self, other: &Self) -> bool {
        let of =
            |shared: &Self| (shared.call.params.args.first().cloned(), shared.call.params.filter.clone());
        self.function.name == other.function.name && of(self) == of(other)
    }

    /// The call that answers all.
    fn together(&self) -> Result<AggregateFunction> {
        let mut params = self.call.params.clone();
        params.args.truncate(1);
        params.args.extend(self.asks.iter().map(|(_, p)| p.clone()));
        let func = Arc::new(AggregateUDF::from(aggregate(self.function)?));
        Ok(AggregateFunction { func, params })
    }
}
