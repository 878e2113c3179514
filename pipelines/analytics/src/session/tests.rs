//! Queries over real Delta tables in a folder.

use super::*;
use arrow::datatypes::DataType;
use arrow::json::ReaderBuilder;
use arrow::util::pretty::pretty_format_batches;
use datafusion::logical_expr::{Volatility, create_udf};
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) struct Tables {
    folder: TempDir,
}

impl Tables {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn root(&self) -> Url {
        Url::from_directory_path(self.folder.path()).unwrap()
    }

    /// Appends rows, as a commit of its own. What a row does not say is null, or empty where it must say something.
    pub(crate) async fn add(&self, table: Table, rows: &[Value]) {
        let filled = rows.iter().map(|row| {
            let mut filled = row.clone();
            for column in table.columns().iter().filter(|column| !column.nullable) {
                let empty = match column.kind {
                    crate::table::Kind::Text => json!("-"),
                    crate::table::Kind::Boolean => json!(false),
                    crate::table::Kind::Time => json!("2026-11-02T00:00:00Z"),
                    crate::table::Kind::Date => json!("2026-11-02"),
                    _ => json!(0),
                };
                let fields = filled.as_object_mut().unwrap();
                fields.entry(column.name).or_insert(empty);
            }
            filled.to_string()
        });
        let text = filled.collect::<Vec<_>>().join("\n");
        let reader = ReaderBuilder::new(table.schema()).build(text.as_bytes()).unwrap();
        let batches: Vec<RecordBatch> = reader.map(Result::unwrap).collect();
        let opened = lake::open(&self.root(), &lake::Options::default(), table).await.unwrap();
        opened.write(batches).await.unwrap();
    }

    pub(crate) fn session(&self, limits: Limits, scope: Scope) -> Session {
        Session::open(self.root(), lake::Options::default(), limits, scope, None, None).unwrap()
    }

    /// The answer as a table without its frame.
    pub(crate) async fn ask(&self, sql: &str) -> String {
        shown(&self.session(Limits::default(), Scope::All).collect(sql).await.unwrap())
    }
}

pub(crate) fn shown(batches: &[RecordBatch]) -> String {
    let framed = pretty_format_batches(batches).unwrap().to_string();
    let lines = framed.lines().filter(|line| line.starts_with('|')).skip(1);
    let lines = lines.map(|line| {
        let cells = line.trim_matches('|').split('|').map(str::trim);
        cells.collect::<Vec<_>>().join(" ")
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn outcome(tenant: &str, day: &str, billed: Value) -> Value {
    json!({
        "request_id": format!("{tenant}-{day}"), "tenant": tenant, "date": day, "ended_at": format!("{day}T12:00:00Z"),
        "status": "answered", "cache_status": "miss", "lane": "interactive", "model_served": "m", "provider": "p",
        "input_tokens": 900, "output_tokens": 100, "billed_nano_usd": billed, "list_nano_usd": 3_000_000,
        "saved_by_cache_nano_usd": 0, "total_us": 5_000, "infer_us": 2_000, "metadata": format!("of {tenant}"),
    })
}

async fn some() -> Tables {
    let tables = Tables::new();
    let rows = [
        outcome("acme", "2026-11-01", json!(2_000_000)),
        outcome("acme", "2026-11-02", json!(1_000_000)),
        outcome("acme", "2026-11-02", Value::Null),
        outcome("globex", "2026-11-02", json!(7_000_000)),
    ];
    tables.add(Table::Outcomes, &rows).await;
    let hit = json!({
        "tenant": "acme", "date": "2026-11-02", "ended_at": "2026-11-02T13:00:00Z", "status": "answered", "cache_status": "hit",
        "lane": "interactive", "billed_nano_usd": 0, "list_nano_usd": 3_000_000, "saved_by_cache_nano_usd": 3_000_000, "total_us": 10,
    });
    tables.add(Table::Outcomes, &[hit]).await;
    let call = |status: &str, minute: u32, cost: i64| {
        json!({
            "tenant": "acme", "date": "2026-11-02", "started_at": format!("2026-11-02T12:{minute:02}:30Z"), "status": status,
            "provider": "p", "model": "m", "input_tokens": 900, "output_tokens": 100, "cost_nano_usd": cost,
        })
    };
    tables
        .add(Table::Attempts, &[call("failed", 1, 400_000), call("ok", 1, 1_000_000), call("ok", 2, 5)])
        .await;
    tables
}

#[tokio::test]
async fn a_root_without_tables_answers_with_nothing() {
    let tables = Tables::new();
    let session = tables.session(Limits::default(), Scope::All);
    for name in Table::ALL
        .iter()
        .chain(Table::ROLLUPS)
        .map(|table| table.name())
        .chain(VIEWS.iter().map(|view| view.name))
    {
        let counted = session.collect(&format!("SELECT count(*) FROM {name}")).await.unwrap();
        assert_eq!(shown(&counted), "0", "{name}");
    }
    assert!(std::fs::read_dir(tables.folder.path()).unwrap().next().is_none(), "reading made something");
}

#[tokio::test]
async fn views_have_the_columns_that_they_tell_of() {
    let session = Tables::new().session(Limits::default(), Scope::All);
    for view in VIEWS {
        let schema = session.columns(view.name).await.unwrap().unwrap();
        let have: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
        let told: Vec<&str> = view.columns().iter().map(|column| column.name).collect();
        assert_eq!(have, told, "{}", view.name);
        assert!(view.columns().iter().all(|column| column.meaning.ends_with('.')), "{}", view.name);
        assert!(view.meaning().ends_with('.'), "{}", view.name);
    }
    assert!(session.columns("nothing").await.unwrap().is_none());
}

#[tokio::test]
async fn what_a_day_cost_is_that_of_its_requests_beside_that_of_its_calls() {
    let told = some().await.ask("SELECT * FROM cost_daily ORDER BY date, tenant").await;
    assert_eq!(
        told,
        "2026-11-01 acme 1 1 0 900 100 2000000 3000000 0 0 \n\
         2026-11-02 acme 3 3 1 1800 200 1000000 9000000 3000000 3 1400005\n\
         2026-11-02 globex 1 1 0 900 100 7000000 3000000 0 0 "
    );
}

#[tokio::test]
async fn the_other_views_say_what_their_rows_say() {
    let tables = some().await;
    let ask = |sql: &'static str| tables.ask(sql);
    assert_eq!(
        ask("SELECT date, model, requests, billed_nano_usd, usd_per_1k_tokens FROM cost_by_tenant_model WHERE tenant = 'globex'").await,
        "2026-11-02 m 1 7000000 0.007"
    );
    assert_eq!(
        ask("SELECT minute, calls, not_ok, cost_nano_usd FROM spend_minute ORDER BY minute").await,
        "2026-11-02T12:01:00Z 2 1 1400000\n2026-11-02T12:02:00Z 1 0 5"
    );
    assert_eq!(
        ask("SELECT answered, total_p50_us, tokens_per_second_p50 FROM latency WHERE date = '2026-11-02' AND tenant = 'acme' ORDER BY 1").await,
        "1 10.0 \n2 5000.0 50000.0"
    );
    assert_eq!(
        ask("SELECT requests, hits, misses, round(hit_share, 3), saved_by_cache_nano_usd, saved_by_prefix_nano_usd FROM cache_savings \
             WHERE date = '2026-11-02' AND tenant = 'acme'").await,
        "3 1 2 0.333 3000000 2000000"
    );
    assert_eq!(
        ask("SELECT \"BilledCost\", \"BillingPeriodStart\", \"BillingPeriodEnd\", \"ChargePeriodEnd\", \"ConsumedQuantity\", \"ServiceProviderName\" \
             FROM focus_1_3 WHERE \"x_Date\" = '2026-11-01'").await,
        "0.002000000 2026-11-01T00:00:00 2026-12-01T00:00:00 2026-11-02T00:00:00 1000 p"
    );
}

#[tokio::test]
async fn a_job_has_come_as_far_as_its_requests_have_ended() {
    let tables = some().await;
    let ended = |minute: u32, more: Value| {
        let mut row = outcome("initech", "2026-11-05", json!(2_000_000));
        let times = json!({
            "accepted_at": format!("2026-11-05T10:{minute:02}:00Z"), "ended_at": format!("2026-11-05T11:{minute:02}:00Z"),
            "job": "nightly", "attempts": 1,
        });
        for part in [times, more] {
            row.as_object_mut().unwrap().extend(part.as_object().unwrap().clone());
        }
        row
    };
    let rows = [
        ended(1, json!({})),
        ended(2, json!({"cache_status": "hit", "billed_nano_usd": 0, "attempts": 0})),
        ended(3, json!({"status": "failed", "model_served": null, "billed_nano_usd": 5, "attempts": 3})),
        ended(4, json!({"status": "expired", "model_served": null, "billed_nano_usd": null, "attempts": 0})),
        ended(5, json!({"billed_nano_usd": null})),
        ended(6, json!({"job": null})),
        ended(7, json!({"job": "other"})),
    ];
    tables.add(Table::Outcomes, &rows).await;
    assert_eq!(
        tables
            .ask("SELECT job, first_accepted_at, last_ended_at, requests, answered, failed, expired, hits, calls, billed_nano_usd, unpriced \
                  FROM backfill_jobs ORDER BY job")
            .await,
        "nightly 2026-11-05T10:01:00Z 2026-11-05T11:05:00Z 5 3 1 1 1 5 2000005 1\n\
         other 2026-11-05T10:07:00Z 2026-11-05T11:07:00Z 1 1 0 0 0 1 2000000 0"
    );
}

#[tokio::test]
async fn a_verdict_counts_once_and_the_last_label_holds() {
    let tables = Tables::new();
    let audit = |request: u32, flagged: bool, minute: u32| {
        json!({
            "request_id": format!("r{request}"), "tenant": "acme", "judge": "j", "judge_version": "1", "flagged": flagged,
            "audited_at": format!("2026-11-02T00:{minute:02}:00Z"),
        })
    };
    let label = |request: u32, wrong: bool, minute: u32| {
        json!({
            "request_id": format!("r{request}"), "tenant": "acme", "wrong": wrong, "labelled_at": format!("2026-11-03T00:{minute:02}:00Z"),
            "date": "2026-11-03",
        })
    };
    let mut audits: Vec<_> = (0..20).map(|request| audit(request, request < 5, 1)).collect();
    audits.push(audit(0, true, 2));
    tables.add(Table::Audits, &audits).await;
    let mut labels: Vec<_> = (0..10).map(|request| label(request, request < 2, 1)).collect();
    labels.push(label(9, true, 2));
    tables.add(Table::Labels, &labels).await;
    let told = "SELECT judge, round(rate, 3), method, labelled, judged, naive, low < rate AND rate < high FROM quality";
    assert_eq!(tables.ask(told).await, "j 0.3 labels_only 10 20 0.25 true");
}

#[tokio::test]
async fn a_predicate_is_tried_before_many_columns_are_read_and_beside_few() {
    let tables = some().await;
    let all = tables.session(Limits::default(), Scope::All);
    let one = tables.session(Limits::default(), Scope::Tenants(vec!["acme".to_owned()]));
    let few = "SELECT tenant, total_us FROM outcomes WHERE status = 'answered'";
    let many = "SELECT * FROM outcomes WHERE status = 'answered'";
    for (session, sql, is_beside, rows) in
        [(&all, few, true, 5), (&all, many, false, 5), (&one, few, true, 4), (&one, many, true, 4)]
    {
        let plan = shown(&session.collect(&format!("EXPLAIN FORMAT INDENT {sql}")).await.unwrap());
        assert_eq!(plan.contains("FilterExec"), is_beside, "{plan}");
        // Either way parts of files are left out by it.
        let pruned = plan.split_once("pruning_predicate=").unwrap().1;
        assert!(pruned.contains("status_min"), "{plan}");
        assert_eq!(
            session.collect(sql).await.unwrap().iter().map(RecordBatch::num_rows).sum::<usize>(),
            rows
        );
    }
}

#[tokio::test]
async fn pages_are_told_apart_by_what_files_are_sorted_by_and_by_ids() {
    let tables = Tables::new();
    let row = |n: i64| {
        let mut row = outcome("acme", "2026-11-02", json!(n));
        row["total_us"] = json!(n);
        row
    };
    tables.add(Table::Outcomes, &[row(1), row(2)]).await;
    let session = tables.session(Limits::default(), Scope::All);
    // Of a file of which all rows are wanted no page is looked at anyway.
    for (predicate, tells_apart) in [
        ("total_us > 1", false),
        ("total_us > 1 AND model_served IS NOT NULL", false),
        ("total_us > 1 AND tenant = 'acme'", true),
        ("total_us > 1 AND ended_at >= TIMESTAMP '2026-01-01'", true),
        ("total_us > 1 AND request_id > 'a'", true),
    ] {
        let sql = format!("EXPLAIN ANALYZE SELECT sum(total_us), max(lane) FROM outcomes WHERE {predicate}");
        let plan = shown(&session.collect(&sql).await.unwrap());
        assert_eq!(plan.contains("page_index_rows_pruned=2 total"), tells_apart, "{predicate}: {plan}");
        assert!(plan.contains("InlineStringsExec"), "{predicate}: {plan}");
    }
}

#[tokio::test]
async fn a_key_that_must_be_known_is_asked_for_in_groups_where_few_are_without() {
    let tables = Tables::new();
    let row = |n: i64| {
        let mut row = outcome("acme", "2026-11-02", json!(n));
        // One of ten has no model, and four have no provider.
        row["model_served"] = if n == 7 { Value::Null } else { json!(format!("model {}", n % 2)) };
        row["provider"] = if n % 3 == 0 { Value::Null } else { json!("p") };
        row["attempts"] = json!(n - 7);
        row
    };
    tables.add(Table::Outcomes, &(0..10).map(row).collect::<Vec<_>>()).await;
    let session = tables.session(Limits::default(), Scope::All);
    let sums = "20 18";
    for (sql, wanted, is_lifted) in [
        (
            "SELECT sum(billed_nano_usd) FROM outcomes WHERE model_served IS NOT NULL GROUP BY model_served",
            sums,
            true,
        ),
        (
            "SELECT sum(billed_nano_usd + 0) AS b FROM outcomes WHERE model_served IS NOT NULL GROUP BY status, model_served",
            sums,
            true,
        ),
        (
            "SELECT sum(billed_nano_usd) FROM outcomes WHERE model_served IS NOT NULL AND attempts <> 0 GROUP BY model_served",
            sums,
            false,
        ),
        (
            "SELECT sum(billed_nano_usd) FROM outcomes WHERE provider IS NOT NULL GROUP BY provider",
            "27",
            false,
        ),
        (
            "SELECT sum(billed_nano_usd) FROM outcomes WHERE model_served IS NOT NULL GROUP BY tenant",
            "38",
            false,
        ),
        // The row that is left out would be divided by nothing.
        (
            "SELECT sum(7 / attempts) FROM outcomes WHERE model_served IS NOT NULL GROUP BY model_served",
            "-2 -4",
            false,
        ),
    ] {
        let plan = shown(&session.collect(&format!("EXPLAIN FORMAT INDENT {sql}")).await.unwrap());
        let (filter, groups) = (plan.find("FilterExec").unwrap(), plan.find("mode=Partial").unwrap());
        assert_eq!(filter < groups, is_lifted, "{sql}: {plan}");
        let mut told: Vec<_> =
            shown(&session.collect(sql).await.unwrap()).lines().map(str::to_owned).collect();
        let mut wanted: Vec<_> = wanted.split(' ').collect();
        told.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(told, wanted, "{sql}");
    }
}

/// Views say of days that are not rolled up what their rows say, in as many groupings as the view has.
#[tokio::test]
async fn views_make_no_hours_that_they_add_up_again() {
    let tables = some().await;
    let session = tables.session(Limits::default(), Scope::All);
    for view in ["cost_daily", "cost_by_tenant_model", "latency", "cache_savings", "focus_1_3"] {
        let plan = session.collect(&format!("EXPLAIN FORMAT INDENT SELECT * FROM {view}")).await.unwrap();
        let plan = shown(&plan);
        assert!(!plan.contains("date_trunc(Utf8(\"hour\")"), "{view}: {plan}");
        assert_eq!(plan.matches("Aggregate: groupBy").count(), 1, "{view}: {plan}");
    }
}

#[tokio::test]
async fn a_session_sees_what_was_committed_before_its_query() {
    let tables = some().await;
    let session = tables.session(Limits::default(), Scope::All);
    let count = "SELECT count(*) AS a, (SELECT count(*) AS b FROM outcomes) AS b FROM outcomes";
    assert_eq!(shown(&session.collect(count).await.unwrap()), "5 5");
    tables.add(Table::Outcomes, &[outcome("acme", "2026-11-03", json!(1))]).await;
    assert_eq!(shown(&session.collect(count).await.unwrap()), "6 6");
}

#[tokio::test]
async fn nothing_but_questions_is_answered() {
    let tables = some().await;
    let session = tables.session(Limits::default(), Scope::All);
    let file = tables.folder.path().join("out.csv");
    let file = file.display();
    for sql in [
        "CREATE TABLE x (a INT)".to_owned(),
        "CREATE TABLE x AS SELECT 1".to_owned(),
        "CREATE VIEW x AS SELECT 1".to_owned(),
        format!("CREATE EXTERNAL TABLE x STORED AS CSV LOCATION '{file}'"),
        "DROP TABLE outcomes".to_owned(),
        "INSERT INTO outcomes SELECT * FROM outcomes".to_owned(),
        "DELETE FROM outcomes".to_owned(),
        "UPDATE outcomes SET tenant = 'x'".to_owned(),
        "TRUNCATE TABLE outcomes".to_owned(),
        format!("COPY outcomes TO '{file}'"),
        format!("EXPLAIN COPY outcomes TO '{file}'"),
        format!("EXPLAIN ANALYZE COPY outcomes TO '{file}'"),
        "SET datafusion.execution.target_partitions = 1".to_owned(),
        "RESET datafusion.execution.target_partitions".to_owned(),
        "PREPARE x AS SELECT 1".to_owned(),
        "BEGIN".to_owned(),
        "CREATE FUNCTION f(DOUBLE) RETURNS DOUBLE RETURN $1".to_owned(),
    ] {
        let refused = session.collect(&sql).await.unwrap_err();
        let told = refused.to_string();
        assert!(
            matches!(refused, Error::Refused(Refused::Writes { .. }) | Error::Query { .. }),
            "{sql}: {told}"
        );
    }
    for sql in [
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM '/etc/passwd.csv'",
        "SELECT * FROM read_csv('/etc/passwd')",
    ] {
        assert!(matches!(session.collect(sql).await.unwrap_err(), Error::Query { .. }), "{sql}");
    }
    let told = session.collect("DELETE FROM outcomes").await.unwrap_err().to_string();
    assert!(told.ends_with("tables are only read here, and are written by the sink"), "{told}");
    assert_eq!(shown(&session.collect("SELECT count(*) FROM outcomes").await.unwrap()), "5");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_takes_no_more_memory_and_time_than_it_may() {
    let tables = Tables::new();
    let limits = Limits { memory_bytes: 16 << 20, deadline: Duration::from_millis(300), ..Limits::default() };
    let session = tables.session(limits, Scope::All);
    let hoard = "SELECT array_length(array_agg(value)) FROM generate_series(1, 5000000)";
    let told = session.collect(hoard).await.unwrap_err();
    assert!(matches!(told, Error::Memory { .. } | Error::Deadline(_)), "{told}");
    let patient = Limits { memory_bytes: limits.memory_bytes, ..Limits::default() };
    let told = tables.session(patient, Scope::All).collect(hoard).await.unwrap_err().to_string();
    assert!(
        told.starts_with("the query needs more memory than its 16 MiB") && told.contains("--memory"),
        "{told}"
    );
    let endless = "SELECT count(*) FROM generate_series(1, 10000000) AS a, generate_series(1, 10000000) AS b";
    let told = session.collect(endless).await.unwrap_err().to_string();
    assert!(told.starts_with("the query ran for 300ms") && told.contains("--deadline"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_needs_more_memory_than_there_is_goes_to_disk() {
    let limits = Limits { memory_bytes: 32 << 20, ..Limits::default() };
    let session = Tables::new().session(limits, Scope::All);
    // 64 MB are sorted in 32.
    let sorted = "SELECT max(r) FROM (SELECT row_number() OVER (ORDER BY value % 1000, value) AS r FROM generate_series(1, 4000000))";
    assert_eq!(shown(&session.collect(sorted).await.unwrap()), "4000000");
}

#[tokio::test]
async fn an_error_names_its_place_and_what_there_is() {
    let tables = some().await;
    let session = tables.session(Limits::default(), Scope::All);
    let at = |error: &Error| match error {
        Error::Query { at, .. } => *at,
        _ => None,
    };
    for (sql, place, wanted) in [
        ("SELECT tennant FROM outcomes", Some((1, 8)), "tennant"),
        ("SELECT 1,\n  nothing\nFROM outcomes", Some((2, 3)), "nothing"),
        ("SELECT * FROM outcome", Some((1, 15)), "outcome"),
        ("SELECT (1", None, "Expected: ), found: EOF"),
        ("SELEC 1", Some((1, 1)), "Expected"),
        ("SELECT tps(1) FROM outcomes", None, "takes 2 arguments"),
    ] {
        let error = session.collect(sql).await.unwrap_err();
        assert_eq!(at(&error), place, "{sql}: {error}");
        assert!(error.to_string().contains(wanted), "{sql}: {error}");
    }
}

/// What the guide shows is what one may type.
#[tokio::test]
async fn every_query_of_the_guide_is_answered() {
    let guide = include_str!("../../../guides/sql.md");
    let prices = Prices::default().with_table("none", "{}", 0).unwrap();
    let limits = Limits::default();
    let root = Tables::new();
    let session = Session::open(
        root.root(),
        lake::Options::default(),
        limits,
        Scope::All,
        Some(Arc::new(prices)),
        None,
    )
    .unwrap();
    let queries: Vec<&str> =
        guide.split("```sql\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert_eq!(queries.len(), 7);
    for query in queries {
        session.collect(query).await.unwrap();
    }
    for name in Table::ALL
        .iter()
        .chain(Table::ROLLUPS)
        .map(|table| table.name())
        .chain(VIEWS.iter().map(|view| view.name))
    {
        assert!(guide.contains(&format!("| `{name}` |")), "the guide does not tell of {name}");
    }
    for (flag, default) in [
        ("--scan-days", limits.scan_days.to_string()),
        ("--scan-bytes", format!("{} GiB", limits.scan_bytes >> 30)),
        ("--messages", limits.messages.to_string()),
    ] {
        assert!(
            guide.contains(&format!("| `{flag}` | {default} |")),
            "the guide does not tell the default of {flag}"
        );
    }
}

#[tokio::test]
async fn rows_that_end_because_the_query_died_are_no_answer() {
    let mut session = Tables::new().session(Limits::default(), Scope::All);
    let die = create_udf(
        "die",
        vec![],
        DataType::Int64,
        Volatility::Volatile,
        Arc::new(|_| panic!("as the test wants it")),
    );
    session.base.register_udf(Arc::new(die)).unwrap();
    let told = session.collect("SELECT die() FROM generate_series(1, 3)").await;
    assert!(told.is_err(), "{told:?}");
}
