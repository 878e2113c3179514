//! Groupings of groups: the same answer in one grouping where that can be, and in two where it cannot.

use super::*;
use crate::functions;
use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray};
use arrow::util::pretty::pretty_format_batches;
use datafusion::execution::session_state::SessionStateBuilder;
use datafusion::optimizer::Optimizer;
use datafusion::prelude::{SessionConfig, SessionContext};

/// Hours of rows, as a roll-up has them.
const HOURS: &str = "(SELECT hour, tenant, status, count(*) AS requests, sum(billed) AS billed, \
    sum(CASE WHEN tokens IS NOT NULL THEN billed END) AS rated, \
    sum(CASE WHEN billed IS NOT NULL THEN tokens END) AS rated_tokens, \
    count(*) FILTER (WHERE tokens > 5) AS long, sum(billed) FILTER (WHERE tokens > 5) AS billed_long, \
    pctl_state(took) AS took, max(took) AS longest, sum(took) AS took_together FROM t GROUP BY hour, tenant, status)";

fn context(rules: Vec<Arc<dyn OptimizerRule + Send + Sync>>) -> SessionContext {
    let state = SessionContext::new_with_config(SessionConfig::new().with_target_partitions(3)).state();
    let mut state = SessionStateBuilder::new_from_existing(state).with_optimizer_rules(rules).build();
    functions::register(&mut state, None, || 0).unwrap();
    let context = SessionContext::new_with_state(state);
    let rows = 0..4_000_i64;
    let some = |row: i64, every: i64, value: i64| (row % every != 0).then_some(value);
    let text = |value: fn(i64) -> &'static str| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.clone().map(value)))
    };
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("hour", Arc::new(Int64Array::from_iter_values(rows.clone().map(|row| row / 100)))),
        ("tenant", text(|row| ["a", "b", "c"][usize::try_from(row % 3).unwrap()])),
        ("status", text(|row| if row % 7 == 0 { "failed" } else { "answered" })),
        ("billed", Arc::new(rows.clone().map(|row| some(row, 5, row * 31 % 977)).collect::<Int64Array>())),
        ("tokens", Arc::new(rows.clone().map(|row| some(row, 4, row % 11)).collect::<Int64Array>())),
        ("took", Arc::new(Float64Array::from_iter_values(rows.clone().map(|row| (row * 7 % 1_013) as f64)))),
    ];
    context.register_batch("t", RecordBatch::try_from_iter(columns).unwrap()).unwrap();
    context
}

/// What a query answers, in order, and in how many groupings.
async fn asked(context: &SessionContext, sql: &str) -> (String, usize) {
    let plan = context.sql(sql).await.unwrap().into_optimized_plan().unwrap();
    let mut groupings = 0;
    plan.apply(|node| {
        groupings += usize::from(matches!(node, LogicalPlan::Aggregate(_)));
        Ok(TreeNodeRecursion::Continue)
    })
    .unwrap();
    let rows = context.sql(sql).await.unwrap().collect().await.unwrap();
    let shown = pretty_format_batches(&rows).unwrap().to_string();
    let mut lines: Vec<&str> = shown.lines().collect();
    lines.sort_unstable();
    (lines.join("\n"), groupings)
}

/// Asks with the rule and without; `FROM h` stands for hours.
async fn check(groupings: usize, queries: &[&str]) {
    let rule: Arc<dyn OptimizerRule + Send + Sync> = Arc::new(Regroup);
    let with = context(std::iter::once(rule).chain(Optimizer::new().rules).collect());
    let without = context(Optimizer::new().rules);
    for query in queries {
        let sql = query.replace("FROM h", &format!("FROM {HOURS} AS h"));
        let (told, found) = asked(&with, &sql).await;
        let (wanted, before) = asked(&without, &sql).await;
        assert_eq!(told, wanted, "{query}");
        assert_eq!(found, groupings, "{query}");
        assert!(before > found || groupings > 1, "{query} was in {before} groupings");
    }
}

#[tokio::test]
async fn what_is_added_up_once_more_is_added_up_from_rows() {
    let queries = [
        "SELECT sum(requests), sum(billed) FROM h",
        "SELECT tenant, sum(requests), sum(billed), sum(long), sum(billed_long) FROM h GROUP BY tenant",
        "SELECT hour / 24 AS day, tenant, sum(CAST(requests AS BIGINT)) FROM h GROUP BY hour / 24, tenant",
        "SELECT tenant, sum(CASE WHEN status = 'answered' THEN requests ELSE 0 END), sum(CASE status WHEN 'failed' THEN billed END) \
         FROM h GROUP BY tenant",
        "SELECT tenant, sum(requests * CASE WHEN status = 'answered' THEN 1 ELSE 0 END), sum(2 * billed) FROM h GROUP BY tenant",
        "SELECT tenant, sum(requests) FILTER (WHERE status = 'answered') FROM h WHERE hour > 3 GROUP BY tenant",
        "SELECT tenant, cost_per_1k(rated, rated_tokens) FROM h GROUP BY tenant",
        "SELECT tenant, pctl_merge(took, 0.5), pctl_merge(took, 0.99) FROM h WHERE status = 'answered' GROUP BY tenant",
        "SELECT tenant, min(hour), max(hour) FROM h GROUP BY tenant HAVING sum(requests) > 3",
        "SELECT DISTINCT tenant FROM h WHERE hour >= 2",
        "SELECT sum(r) FROM (SELECT tenant, r FROM (SELECT hour, tenant, sum(requests) AS r FROM h GROUP BY hour, tenant)) WHERE tenant < 'c'",
        "SELECT tenant, sum(r), sum(z) FROM (SELECT tenant, requests AS r, 0 AS z FROM h UNION ALL SELECT tenant, 0, billed FROM h) \
         GROUP BY tenant",
        "SELECT tenant, sum(r), sum(b) FROM (SELECT tenant, requests AS r, billed AS b FROM h UNION ALL SELECT 'd', 5, CAST(NULL AS BIGINT)) \
         GROUP BY tenant",
        "SELECT sum(requests) FROM h WHERE tenant = 'nobody'",
    ];
    check(1, &queries).await;
}

#[tokio::test]
async fn what_asks_for_groups_keeps_them() {
    let queries = [
        "SELECT tenant, count(*) FROM h GROUP BY tenant",
        "SELECT tenant, count(billed), sum(requests) FROM h GROUP BY tenant",
        "SELECT tenant, avg(billed), max(requests) FROM h GROUP BY tenant",
        "SELECT tenant, max(longest) FROM h GROUP BY tenant",
        "SELECT tenant, sum(requests * 0.5), sum(requests * requests) FROM h GROUP BY tenant",
        "SELECT tenant, sum(1) FROM h GROUP BY tenant",
        "SELECT tenant, sum(CASE WHEN status = 'answered' THEN requests ELSE 1 END) FROM h GROUP BY tenant",
        "SELECT tenant, sum(CASE WHEN requests > 3 THEN requests ELSE 0 END) FROM h GROUP BY tenant",
        "SELECT tenant, sum(requests) FROM h WHERE requests > 3 GROUP BY tenant",
        "SELECT tenant, sum(requests) FILTER (WHERE billed > 100) FROM h GROUP BY tenant",
        "SELECT requests, sum(billed) FROM h GROUP BY requests",
        "SELECT tenant, sum(took_together) FROM h GROUP BY tenant",
        // Which rows take part depends on both.
        "SELECT tenant, cost_per_1k(billed, rated_tokens) FROM h GROUP BY tenant",
        "SELECT tenant, sum(requests) FROM h GROUP BY ROLLUP (tenant)",
        "SELECT tenant, sum(requests) FROM (SELECT * FROM h ORDER BY hour, tenant, status LIMIT 5) GROUP BY tenant",
        // No rows are one group.
        "SELECT sum(c) FROM (SELECT count(*) AS c FROM t WHERE tenant = 'nobody')",
    ];
    check(2, &queries).await;
    // What is distinct is a grouping of its own.
    check(2, &["SELECT tenant, count(DISTINCT status) FROM h GROUP BY tenant"]).await;
    check(3, &["SELECT tenant, sum(DISTINCT requests) FROM h GROUP BY tenant"]).await;
}
