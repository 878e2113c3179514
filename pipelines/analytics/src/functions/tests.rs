//! Functions as SQL calls them, over one partition and over many.

use super::*;
use arrow::array::{Array, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray, StructArray};
use arrow::datatypes::Schema;
use arrow::util::pretty::pretty_format_batches;
use datafusion::common::cast::{as_binary_view_array, as_float64_array};
use datafusion::datasource::MemTable;
use datafusion::prelude::{SessionConfig, SessionContext};
use forebay_estimators::{Cell, Confidence, Stratum};
use std::collections::BTreeSet;

const PRICES: &str = r#"{"m": {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6, "cache_read_input_token_cost": 1e-7}}"#;
const NEW_PRICES: &str = r#"{"m": {"input_cost_per_token": 3e-6, "output_cost_per_token": 2e-6}}"#;
const DAY_US: i64 = 86_400_000_000;

fn context() -> SessionContext {
    let mut state = SessionContext::new_with_config(SessionConfig::new().with_target_partitions(4)).state();
    let prices = Prices::default()
        .with_table("old", PRICES, 0)
        .and_then(|prices| prices.with_table("new", NEW_PRICES, 20_000 * DAY_US))
        .unwrap();
    register(&mut state, Some(Arc::new(prices)), || 20_001 * DAY_US).unwrap();
    SessionContext::new_with_state(state)
}

/// A table t of these columns, cut into so many partitions.
fn with_table(columns: &[(&str, ArrayRef)], partitions: usize) -> SessionContext {
    let rows = columns[0].1.len();
    let fields: Vec<Field> =
        columns.iter().map(|(name, column)| Field::new(*name, column.data_type().clone(), true)).collect();
    let schema = Arc::new(Schema::new(fields));
    let all =
        RecordBatch::try_new(schema.clone(), columns.iter().map(|(_, column)| column.clone()).collect())
            .unwrap();
    let step = rows.div_ceil(partitions).max(1);
    let cut = |from: usize| {
        let part = all.slice(from, step.min(rows - from));
        // As rows come from files: some thousands at a time.
        (0..part.num_rows())
            .step_by(8_192)
            .map(|at| part.slice(at, 8_192.min(part.num_rows() - at)))
            .collect()
    };
    let parts: Vec<Vec<RecordBatch>> = (0..rows).step_by(step).map(cut).collect();
    let context = context();
    context.register_table("t", Arc::new(MemTable::try_new(schema, parts).unwrap())).unwrap();
    context
}

async fn ask(context: &SessionContext, sql: &str) -> Vec<RecordBatch> {
    context.sql(sql).await.unwrap().collect().await.unwrap()
}

/// The first value of the first column, as text.
async fn check(sql: &str, expected: &str) {
    let shown = pretty_format_batches(&ask(&context(), sql).await).unwrap().to_string();
    let value = shown.lines().nth(3).unwrap().trim_matches(['|', ' ']).to_owned();
    assert_eq!(value, expected, "{sql}");
}

async fn refused(context: &SessionContext, sql: &str) -> String {
    let planned = async { context.sql(sql).await?.collect().await };
    planned.await.unwrap_err().strip_backtrace()
}

#[test]
fn what_is_listed_is_registered_and_nothing_else() {
    let before = SessionContext::new().state();
    let after = context().state();
    let names = |state: &datafusion::execution::SessionState| -> BTreeSet<String> {
        let scalar = state.scalar_functions().keys();
        scalar.chain(state.aggregate_functions().keys()).cloned().collect()
    };
    let ours: BTreeSet<String> = names(&after).difference(&names(&before)).cloned().collect();
    let planner = ["pctl_state_of_one", "pctls", "pctls_merge"];
    let listed = FUNCTIONS.iter().map(|function| function.name).chain(planner);
    assert_eq!(ours, listed.map(str::to_owned).collect());
    for function in FUNCTIONS {
        assert!(function.call.starts_with(&format!("{}(", function.name)), "{}", function.call);
        assert!(function.required <= function.arguments.len());
    }
}

#[tokio::test]
async fn money_is_exact_and_what_is_not_known_is_null() {
    check("SELECT cost('m', 1000, 400, NULL, 10)", "3020000").await;
    check("SELECT cost('m', 1000, 400, NULL, 10, '2024-10-03')", "660000").await;
    check("SELECT cost('m', 1000, 400, NULL, 10, timestamp '2024-10-04')", "3020000").await;
    check("SELECT cost('other', 1, 0, 0, 1) IS NULL", "true").await;
    check("SELECT cost('m', NULL, 0, 0, 1) IS NULL", "true").await;
    check("SELECT usd(1)", "0.000000001").await;
    check("SELECT usd(-12345678900)", "-12.345678900").await;
    check("SELECT usd(9223372036854775807)", "9223372036.854775807").await;
    check("SELECT usd(NULL) IS NULL", "true").await;
    check("SELECT tps(50, 2000000)", "25.0").await;
    check("SELECT tps(50, 0) IS NULL", "true").await;
    check("SELECT false_hit_bound(0, 299, 0.95) < 0.01", "true").await;
    check("SELECT false_hit_bound(0, 0, 0.95) IS NULL", "true").await;
}

#[tokio::test]
async fn cost_per_1k_is_a_ratio_of_sums_over_rows_where_both_are_known() {
    let nano = Int64Array::from(vec![Some(1_000_000_000), Some(5), None, Some(1_000_000_000)]);
    let tokens = Int64Array::from(vec![Some(100), None, Some(7), Some(900)]);
    let key = StringArray::from(vec!["a", "a", "b", "a"]);
    for partitions in [1, 3] {
        let columns: [(&str, ArrayRef); 3] = [
            ("nano", Arc::new(nano.clone())),
            ("tokens", Arc::new(tokens.clone())),
            ("k", Arc::new(key.clone())),
        ];
        let context = with_table(&columns, partitions);
        let got =
            ask(&context, "SELECT k, cost_per_1k(nano, tokens) AS c FROM t GROUP BY k ORDER BY k").await;
        let shown = pretty_format_batches(&got).unwrap().to_string();
        assert!(shown.contains("| a | 2.0 |") && shown.contains("| b |     |"), "{shown}");
        // A frame that slides takes rows out again.
        let sliding = "SELECT max(c) FROM (SELECT cost_per_1k(nano, tokens) OVER (ORDER BY tokens ROWS 1 PRECEDING) AS c FROM t)";
        assert!(!ask(&context, sliding).await.is_empty());
    }
}

#[tokio::test]
async fn wrong_arguments_are_told_with_what_is_right() {
    let context = context();
    for (sql, wanted) in [
        ("SELECT cost('m', 1)", "takes 5 or 6 arguments; 2 were given"),
        ("SELECT cost('m', 1.5, 0, 0, 1)", "argument 2 is of type Float64; it must be a whole number"),
        ("SELECT usd('x')", "argument 1 is of type Utf8"),
        ("SELECT tps(1)", "tps(output_tokens, us) takes 2 arguments; 1 were given"),
        ("SELECT pctl(1.0, 50)", "p is 50; it must lie from 0 to 1"),
        ("SELECT pctl(x, x) FROM (VALUES (0.5)) AS v(x)", "p must be a constant"),
        ("SELECT pctl(x, NULL) FROM (VALUES (0.5)) AS v(x)", "it must lie from 0 to 1"),
        ("SELECT pctl(DISTINCT x, 0.5) FROM (VALUES (0.5)) AS v(x)", "has no DISTINCT"),
        ("SELECT hallucination_rate(true, 1)", "argument 2 is of type Int64; it must be true or false"),
        ("SELECT hallucination_rate(1.5, true)", "1.5"),
        ("SELECT hallucination_rate(true, true, 0.0)", "hallucination_rate: "),
        ("SELECT hallucination_rate(true, true, CAST(NULL AS DOUBLE))", "null inclusion_probability"),
        ("SELECT stratified_rate(1, 2)", "it must be what rate_cell answers"),
        ("SELECT false_hit_bound(3, 2, 0.95)", "false_hit_bound: "),
        ("SELECT false_hit_bound(-1, 2, 0.95)", "wrong is -1; it must be 0 or more"),
        ("SELECT false_hit_bound(1, 2, 95)", "false_hit_bound: "),
    ] {
        let told = refused(&context, sql).await;
        assert!(told.contains(wanted), "{sql}: {told}");
    }
    let mut state = SessionContext::new().state();
    register(&mut state, None, || 0).unwrap();
    let told = refused(&SessionContext::new_with_state(state), "SELECT cost('m', 1, 0, 0, 1)").await;
    assert!(told.contains("name one as"), "{told}");
}

/// Numbers that look random and are the same each time (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to 1.
    fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn values(kind: &str, rows: usize) -> Vec<f64> {
    let mut numbers = Numbers(7);
    let mut one = || match kind {
        "uniform" => 1e3 + numbers.share() * 1e6,
        // Without a mean: what latencies look like on a bad day.
        "heavy" => (1.0 - numbers.share()).powf(-1.0 / 0.8) * 50.0,
        "signed" => match numbers.next() % 10 {
            0 => 0.0,
            1..=4 => -(1.0 - numbers.share()).powf(-0.7),
            _ => numbers.share() * 100.0,
        },
        _ => 42.0,
    };
    (0..rows).map(|_| one()).collect()
}

/// The same percentile from all values, sorted.
fn exact(values: &[f64], p: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (p * sorted.len() as f64 - 1e-9).ceil().max(1.0);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "from 1 to the number of values"
    )]
    let rank = rank as usize;
    sorted[rank - 1]
}

#[tokio::test]
async fn a_percentile_is_within_one_percent_and_exact_to_ten_thousand() {
    for kind in ["uniform", "heavy", "signed", "constant"] {
        for rows in [1, 100, 1_000, 10_000, 10_001, 100_000] {
            percentiles(kind, rows, 1).await;
            percentiles(kind, rows, 7).await;
        }
    }
    percentiles("heavy", 1_000_000, 5).await;
    percentiles("signed", 1_000_000, 5).await;
}

async fn percentiles(kind: &str, rows: usize, partitions: usize) {
    let values = values(kind, rows);
    let context = with_table(&[("x", Arc::new(Float64Array::from(values.clone())))], partitions);
    let ps = [0.0, 0.001, 0.5, 0.9, 0.99, 0.999, 1.0];
    let calls: Vec<_> = ps.iter().map(|p| format!("pctl(x, {p:?})")).collect();
    let got = ask(&context, &format!("SELECT {} FROM t", calls.join(", "))).await;
    for (column, p) in got[0].columns().iter().zip(ps) {
        let (got, wanted) =
            (column.as_any().downcast_ref::<Float64Array>().unwrap().value(0), exact(&values, p));
        let allowed = if rows <= 10_000 { 0.0 } else { 0.010_000_001 * wanted.abs() };
        assert!(
            (got - wanted).abs() <= allowed,
            "{kind} {rows} in {partitions} at {p}: {got} and not {wanted}"
        );
    }
}

#[tokio::test]
async fn a_percentile_passes_over_nulls_and_what_is_no_number() {
    let x =
        Float64Array::from(vec![None, Some(f64::NAN), Some(f64::INFINITY), Some(3.0), Some(1.0), Some(2.0)]);
    let context = with_table(&[("x", Arc::new(x))], 2);
    let shown = |sql| {
        let context = context.clone();
        async move { pretty_format_batches(&ask(&context, sql).await).unwrap().to_string() }
    };
    assert!(shown("SELECT pctl(x, 0.5) AS p FROM t").await.contains("| 2.0 |"));
    assert!(shown("SELECT pctl(x, 0.5) IS NULL AS p FROM t WHERE x IS NULL").await.contains("| true |"));
    // 0.07 · 100 is more than 7 in floats.
    let hundred = with_table(&[("x", Arc::new(Int64Array::from_iter_values(1..=100)))], 1);
    let seventh =
        pretty_format_batches(&ask(&hundred, "SELECT pctl(x, 0.07) AS p FROM t").await).unwrap().to_string();
    assert!(seventh.contains("| 7.0 |"), "{seventh}");
    // Over windows an answer must not use up what it was made of.
    let running = "SELECT max(p) - min(p) AS d FROM (SELECT pctl(x, 1.0) OVER (ORDER BY x) AS p FROM t)";
    let running = pretty_format_batches(&ask(&hundred, running).await).unwrap().to_string();
    assert!(running.contains("| 99.0 |"), "{running}");
}

#[tokio::test]
async fn stored_states_answer_as_their_values_do_however_they_were_cut() {
    let ps = [0.0, 0.5, 0.99, 0.999, 1.0];
    let calls: Vec<_> = ps.iter().map(|p| format!("pctl_merge(s, {p:?})")).collect();
    for kind in ["uniform", "heavy", "signed", "constant"] {
        for rows in [1, 100, 101, 1_000, 50_000] {
            let values = values(kind, rows);
            let mut answers = Vec::new();
            for (groups, partitions) in [(1, 1), (7, 3), (rows / 2 + 1, 5)] {
                let keys = Int64Array::from_iter_values((0..rows).map(|row| bigint((row % groups) as u64)));
                let x: ArrayRef = Arc::new(Float64Array::from(values.clone()));
                let context = with_table(&[("x", x), ("k", Arc::new(keys))], partitions);
                let sql = format!(
                    "SELECT {} FROM (SELECT k, pctl_state(x) AS s FROM t GROUP BY k)",
                    calls.join(", ")
                );
                let got = ask(&context, &sql).await;
                let got = got[0].columns().iter().map(|column| as_float64_array(column).unwrap().value(0));
                answers.push(got.collect::<Vec<_>>());
            }
            assert!(answers.iter().all(|answer| *answer == answers[0]), "{kind} {rows}: {answers:?}");
            for (got, p) in answers[0].iter().zip(ps) {
                let wanted = exact(&values, p);
                let allowed = if rows <= 100 { 0.0 } else { 0.010_000_001 * wanted.abs() };
                assert!((got - wanted).abs() <= allowed, "{kind} {rows} at {p}: {got} and not {wanted}");
            }
        }
    }
}

/// Groups are worked out all at once, and where there are nearly as many of them as rows, rows become states without being grouped.
#[tokio::test]
async fn groups_are_told_what_each_would_be_alone() {
    let rows = 250_000;
    let x = values("heavy", rows);
    let key_of = |row: usize| if row < 30_000 { row % 2 } else { row };
    let some = |row: usize| (!row.is_multiple_of(9)).then_some(x[row]);
    let x_of_two: [Vec<f64>; 2] =
        [0, 1].map(|key| (0..30_000).filter(|row| row % 2 == key).filter_map(some).collect());
    for partitions in [1, 5] {
        let keys = Int64Array::from_iter_values((0..rows).map(|row| bigint(key_of(row) as u64)));
        let columns: [(&str, ArrayRef); 4] = [
            ("k", Arc::new(keys)),
            ("x", Arc::new((0..rows).map(some).collect::<Float64Array>())),
            (
                "nano",
                Arc::new(
                    (0..rows)
                        .map(|row| (!row.is_multiple_of(3)).then_some(bigint(row as u64)))
                        .collect::<Int64Array>(),
                ),
            ),
            (
                "is_let",
                Arc::new(
                    (0..rows)
                        .map(|row| (!row.is_multiple_of(5)).then_some(row.is_multiple_of(4)))
                        .collect::<BooleanArray>(),
                ),
            ),
        ];
        let context = with_table(&columns, partitions);
        let sql = "SELECT k, pctl(x, 0.9) AS p, pctl(x, 0.9) FILTER (WHERE is_let) AS f, cost_per_1k(nano, 10) AS c, \
                   cost_per_1k(nano, k) FILTER (WHERE is_let) AS d FROM t GROUP BY k ORDER BY k";
        let got =
            arrow::compute::concat_batches(&ask(&context, sql).await[0].schema(), &ask(&context, sql).await)
                .unwrap();
        assert_eq!(got.num_rows(), rows - 30_000 + 2);
        let column = |index: usize| as_float64_array(got.column(index)).unwrap().clone();
        let (all, filtered, ratios) = (column(1), column(2), column(3));
        for (key, x) in x_of_two.iter().enumerate() {
            let wanted = exact(x, 0.9);
            assert!(
                (all.value(key) - wanted).abs() <= 0.010_000_001 * wanted,
                "{} and not {wanted}",
                all.value(key)
            );
        }
        for (index, row) in (30_000..rows).enumerate() {
            let index = index + 2;
            assert_eq!(all.is_valid(index).then(|| all.value(index)), some(row));
            let is_let = !row.is_multiple_of(5) && row.is_multiple_of(4);
            assert_eq!(filtered.is_valid(index).then(|| filtered.value(index)), some(row).filter(|_| is_let));
            assert_eq!(ratios.is_valid(index), !row.is_multiple_of(3));
        }
        // And the same of one group, which is worked out by itself.
        for key in [0, 1, 100_000] {
            let alone = format!(
                "SELECT {key}, pctl(x, 0.9), pctl(x, 0.9) FILTER (WHERE is_let), cost_per_1k(nano, 10), \
                                 cost_per_1k(nano, k) FILTER (WHERE is_let) FROM t WHERE k = {key}"
            );
            let shown = |batches: &[RecordBatch]| {
                let shown = pretty_format_batches(batches).unwrap().to_string();
                let cells = shown
                    .lines()
                    .nth(3)
                    .unwrap()
                    .trim_matches('|')
                    .split('|')
                    .map(|cell| cell.trim().to_owned());
                cells.collect::<Vec<_>>()
            };
            let grouped = format!("SELECT * FROM ({sql}) WHERE k = {key}");
            assert_eq!(shown(&ask(&context, &grouped).await), shown(&ask(&context, &alone).await), "{key}");
        }
    }
}

#[tokio::test]
async fn percentiles_of_the_same_values_are_told_by_one_aggregate() {
    let rows = 20_000;
    let columns: [(&str, ArrayRef); 3] = [
        ("k", Arc::new(Int64Array::from_iter_values((0..rows).map(|row| row % 4)))),
        ("x", Arc::new(Float64Array::from_iter((0..rows).map(|row| (row % 4 != 3).then_some(row as f64))))),
        ("y", Arc::new(Float64Array::from(values("heavy", 20_000)))),
    ];
    let plain = with_table(&columns, 3);
    let rules: Vec<Arc<dyn datafusion::optimizer::OptimizerRule + Send + Sync>> = vec![Arc::new(Share)];
    let rules = rules.into_iter().chain(datafusion::optimizer::Optimizer::new().rules).collect();
    let shared = datafusion::execution::session_state::SessionStateBuilder::new_from_existing(plain.state());
    let shared = SessionContext::new_with_state(shared.with_optimizer_rules(rules).build());
    for (of, merged) in [("GROUP BY k", "GROUP BY k % 2"), ("", "")] {
        let calls = "count(*) AS n, pctl(x, 0.5) AS a, pctl(y, 0.5) AS b, pctl(x, 1) AS c, pctl(x, 0.5) FILTER (WHERE k = 1) AS d, \
                     pctl(x, 0.1) FILTER (WHERE k = 1) AS e, sum(k) AS s, pctl(x, 0.99) AS g";
        let first =
            |key: &'static str, of: &str| if of.is_empty() { String::new() } else { format!("{key}, ") };
        let states = "(SELECT k, pctl_state(x) AS x, pctl_state(y) AS y FROM t GROUP BY k)";
        for (sql, together, alone) in [
            (format!("SELECT {}{calls} FROM t {of}", first("k", of)), 2, 1),
            (
                format!(
                    "SELECT {}pctl_merge(x, 0.5), pctl_merge(y, 0.5), pctl_merge(x, 0.9) FROM {states} {merged}",
                    first("k % 2", of)
                ),
                1,
                1,
            ),
        ] {
            let plan = shared.sql(&sql).await.unwrap().into_optimized_plan().unwrap().to_string();
            let aggregates = plan.lines().find(|line| line.contains("Aggregate: ")).unwrap();
            // Where a whole number was cast, the name that it had before stands beside it.
            let aggregates = aggregates.replace(" AS pctls", "");
            assert_eq!(aggregates.matches("pctls").count(), together, "{plan}");
            assert_eq!(
                aggregates.matches("pctl(").count() + aggregates.matches("pctl_merge(").count(),
                alone,
                "{plan}"
            );
            let answered = async |context: &SessionContext| {
                let shown = pretty_format_batches(&ask(context, &sql).await).unwrap().to_string();
                let mut lines: Vec<_> = shown.lines().map(str::to_owned).collect();
                lines.sort_unstable();
                lines
            };
            assert_eq!(answered(&shared).await, answered(&plain).await, "{sql}");
        }
    }
    let told = refused(&shared, "SELECT pctl(x, 0.5), pctl(x, 50) FROM t").await;
    assert!(told.contains("pctl(x, p): p is 50; it must lie from 0 to 1"), "{told}");
}

#[tokio::test]
async fn a_state_is_small_and_what_is_none_is_told() {
    let size = async |rows: usize| {
        let x: ArrayRef = Arc::new(Float64Array::from(values("uniform", rows)));
        let got = ask(&with_table(&[("x", x)], 1), "SELECT pctl_state(x) FROM t").await;
        as_binary_view_array(got[0].column(0)).unwrap().value(0).len()
    };
    assert_eq!((size(1).await, size(100).await), (9, 801));
    // Of values over three powers of ten: 350 that are more than 2% apart.
    let large = size(100_000).await;
    assert!((500..1_500).contains(&large), "{large} bytes");
    check("SELECT pctl_state(x) IS NULL FROM (VALUES (CAST(NULL AS DOUBLE))) AS v(x)", "true").await;
    check("SELECT pctl_merge(s, 0.5) IS NULL FROM (VALUES (CAST(NULL AS BYTEA))) AS v(s)", "true").await;
    for (sql, wanted) in [
        ("SELECT pctl_merge('00', 0.5)", "it must be what pctl_state answers"),
        ("SELECT pctl_merge(X'', 0.5)", "0 bytes are no state"),
        ("SELECT pctl_merge(X'02', 0.5)", "1 bytes are no state"),
        ("SELECT pctl_merge(X'0000', 0.5)", "2 bytes are no state"),
        ("SELECT pctl_merge(X'01', 0.5)", ""),
        ("SELECT pctl_merge(pctl_state(1), 50)", ""),
    ] {
        let told = refused(&context(), sql).await;
        assert!(told.contains(wanted), "{sql}: {told}");
    }
}

/// What a judge flags and people label, of three strata.
struct Judged {
    flags: Vec<f64>,
    labels: Vec<Option<bool>>,
    inclusions: Vec<f64>,
    strata: Vec<&'static str>,
}

fn judged(rows: usize) -> Judged {
    let mut numbers = Numbers(11);
    let mut judged = Judged { flags: vec![], labels: vec![], inclusions: vec![], strata: vec![] };
    for row in 0..rows {
        let is_wrong = numbers.share() < 0.2;
        let is_flagged = numbers.share() < if is_wrong { 0.7 } else { 0.15 };
        judged.flags.push(f64::from(u8::from(is_flagged)));
        judged.labels.push((numbers.share() < 0.3).then_some(is_wrong));
        judged.inclusions.push(0.1 + 0.8 * numbers.share());
        judged.strata.push(["a", "b", "c"][row % 3]);
    }
    judged
}

fn cell_of(judged: &Judged, is_weighted: bool, stratum: Option<&str>) -> Cell {
    let mut cell = Cell::default();
    for row in 0..judged.flags.len() {
        if stratum.is_some_and(|stratum| judged.strata[row] != stratum) {
            continue;
        }
        let inclusion = if is_weighted { judged.inclusions[row] } else { 1.0 };
        match judged.labels[row] {
            Some(label) => cell.add_labelled(judged.flags[row], label, inclusion).unwrap(),
            None => cell.add_unlabelled(judged.flags[row], inclusion).unwrap(),
        }
    }
    cell
}

fn assert_told(batches: &[RecordBatch], answer: &forebay_estimators::Answer) {
    let told = batches[0].column(0).as_any().downcast_ref::<StructArray>().unwrap().clone();
    let float = |name: &str| {
        let column = told.column_by_name(name).unwrap().clone();
        column.as_any().downcast_ref::<Float64Array>().unwrap().value(0)
    };
    let whole = |name: &str| {
        let column = told.column_by_name(name).unwrap().clone();
        column.as_any().downcast_ref::<Int64Array>().unwrap().value(0)
    };
    let estimate = answer.estimate.unwrap();
    let wanted =
        [estimate.rate, estimate.interval.low, estimate.interval.high, answer.uncorrected_flag_rate.unwrap()];
    for (name, wanted) in ["rate", "low", "high", "naive"].into_iter().zip(wanted) {
        assert!((float(name) - wanted).abs() < 1e-9, "{name}: {} and not {wanted}", float(name));
    }
    let method = told.column_by_name("method").unwrap().clone();
    assert_eq!(method.as_any().downcast_ref::<StringArray>().unwrap().value(0), estimate.method.name());
    assert_eq!(whole("labelled"), bigint(answer.labelled));
    assert_eq!(whole("judged"), bigint(answer.labelled + answer.unlabelled));
}

#[tokio::test]
async fn a_rate_is_that_of_the_estimators_however_rows_are_spread() {
    for rows in [40, 5_000] {
        let judged = judged(rows);
        for partitions in [1, 16] {
            let flags: ArrayRef = Arc::new(Float64Array::from(judged.flags.clone()));
            let columns: [(&str, ArrayRef); 4] = [
                ("flagged", flags),
                ("label", Arc::new(BooleanArray::from(judged.labels.clone()))),
                ("inclusion", Arc::new(Float64Array::from(judged.inclusions.clone()))),
                ("stratum", Arc::new(StringArray::from(judged.strata.clone()))),
            ];
            let context = with_table(&columns, partitions);
            let plain = ask(&context, "SELECT hallucination_rate(flagged = 1.0, label) FROM t").await;
            assert_told(&plain, &cell_of(&judged, false, None).rate(Confidence::P95));
            let weighted = ask(&context, "SELECT hallucination_rate(flagged, label, inclusion) FROM t").await;
            assert_told(&weighted, &cell_of(&judged, true, None).rate(Confidence::P95));
            let traffic = [("a", 700u64), ("b", 200), ("c", 100)];
            let shares = forebay_estimators::shares(&traffic.map(|(_, traffic)| traffic)).unwrap();
            let strata: Vec<_> = traffic
                .iter()
                .zip(shares)
                .map(|((name, _), share)| Stratum { share, cell: cell_of(&judged, false, Some(name)) })
                .collect();
            let stratified =
                "SELECT stratified_rate(cell, CASE stratum WHEN 'a' THEN 700 WHEN 'b' THEN 200 ELSE 100 END)
                FROM (SELECT stratum, rate_cell(flagged, label) AS cell FROM t GROUP BY stratum)";
            let combined = forebay_estimators::combine(&strata, Confidence::P95).unwrap();
            assert_told(&ask(&context, stratified).await, &combined);
        }
    }
}

#[tokio::test]
async fn without_labels_there_is_no_rate_and_without_verdicts_nothing() {
    check("SELECT hallucination_rate(true, CAST(NULL AS BOOLEAN))['rate'] IS NULL", "true").await;
    check("SELECT hallucination_rate(true, NULL)['naive']", "1.0").await;
    check("SELECT hallucination_rate(NULL, true)['labelled']", "0").await;
    check("SELECT stratified_rate(c, 0)['rate'] IS NULL FROM (SELECT rate_cell(true, true) AS c)", "true")
        .await;
}
