//! What is refused, and what nobody may see.

use super::*;
use crate::session::tests::{Tables, shown};
use crate::session::{Error, Session};
use crate::views::VIEWS;
use serde_json::json;

/// Rows of two tenants in every table; what is globex's says so, and is no number.
async fn of_two_tenants() -> Tables {
    let tables = Tables::new();
    for table in Table::ALL {
        for day in ["2026-11-01", "2026-11-02", "2026-11-03"] {
            let row = |tenant: &str, secret: &str| {
                json!({
                    "tenant": tenant, "request_id": format!("{secret}-{day}"), "date": day, (table.time_column()): format!("{day}T12:00:00Z"),
                    "metadata": secret, "prompt": secret, "message": secret, "note": secret, "judge": secret, "model": secret,
                    "billed_nano_usd": 1, "status": "answered", "cache_status": "hit", "job": secret,
                })
            };
            let kept = table.columns();
            let mut rows = vec![row("acme", "42"), row("globex", "SECRET")];
            for row in &mut rows {
                row.as_object_mut().unwrap().retain(|name, _| kept.iter().any(|column| column.name == name));
            }
            tables.add(*table, &rows).await;
        }
    }
    tables
}

fn of_acme(tables: &Tables) -> Session {
    tables.session(Limits::default(), Scope::Tenants(vec!["acme".to_owned()]))
}

#[tokio::test]
async fn rows_of_other_tenants_are_not_there() {
    let tables = of_two_tenants().await;
    let (all, acme) = (tables.session(Limits::default(), Scope::All), of_acme(&tables));
    let names: Vec<&str> = Table::ALL
        .iter()
        .chain(Table::ROLLUPS)
        .map(|table| table.name())
        .chain(VIEWS.iter().map(|view| view.name))
        .collect();
    for name in &names {
        let everything = format!("SELECT * FROM {name}");
        let told = shown(&all.collect(&everything).await.unwrap());
        assert!(told.contains("globex"), "{name} lacks what is to be hidden: {told}");
        let told = shown(&acme.collect(&everything).await.unwrap());
        assert!(
            told.contains("acme") && !told.contains("globex") && !told.contains("SECRET"),
            "{name}: {told}"
        );
    }
    for (sql, expected) in [
        ("SELECT count(*) FROM outcomes", "3"),
        ("SELECT count(1) FROM outcomes WHERE tenant = 'globex'", "0"),
        ("SELECT count(*) FROM outcomes WHERE tenant = 'globex' OR true", "3"),
        ("SELECT min(tenant) || max(tenant) FROM outcomes", "acmeacme"),
        ("SELECT (SELECT max(metadata) FROM outcomes)", "42"),
        ("SELECT count(*) FROM (SELECT tenant FROM attempts UNION ALL SELECT tenant FROM audits)", "6"),
        ("SELECT count(*) FROM outcomes AS o JOIN attempts AS a ON o.date = a.date", "3"),
        ("WITH o AS (SELECT * FROM outcomes) SELECT count(DISTINCT tenant) FROM o", "1"),
        ("SELECT count(*) FROM outcomes WHERE EXISTS (SELECT 1 FROM labels WHERE tenant = 'globex')", "0"),
        ("SELECT pctl(1, 0.5) FROM outcomes WHERE tenant <> 'acme'", ""),
        ("SELECT count(*) FROM forebay.public.outcomes", "3"),
        ("SELECT metadata FROM outcomes ORDER BY metadata DESC LIMIT 1", "42"),
    ] {
        assert_eq!(shown(&acme.collect(sql).await.unwrap()), expected, "{sql}");
    }
}

#[tokio::test]
async fn not_even_an_error_or_a_plan_tells_of_others() {
    let tables = of_two_tenants().await;
    let (all, acme) = (tables.session(Limits::default(), Scope::All), of_acme(&tables));
    // On globex's rows each of these fails, with their text in the error; in whatever order predicates are tried, it must not be seen.
    for sql in [
        "SELECT sum(CAST(metadata AS BIGINT)) FROM outcomes",
        "SELECT count(*) FROM outcomes WHERE CAST(metadata AS BIGINT) > 0",
        "SELECT count(*) FROM outcomes WHERE tenant <> 'acme' AND CAST(metadata AS BIGINT) > 0",
        "SELECT count(*) FROM outcomes WHERE 1 / (CASE WHEN tenant = 'globex' THEN 0 ELSE 1 END) = 1",
        "SELECT count(*) FROM outcomes AS o JOIN payloads AS p ON CAST(o.metadata AS BIGINT) = CAST(p.prompt AS BIGINT)",
    ] {
        assert!(all.collect(sql).await.is_err(), "{sql} fails on no row");
        acme.collect(sql).await.unwrap();
    }
    let plan = shown(&acme.collect("EXPLAIN SELECT * FROM outcomes WHERE metadata LIKE 'S%'").await.unwrap());
    assert!(plan.contains("ScopeExec"), "{plan}");
    for sql in [
        "EXPLAIN ANALYZE SELECT * FROM outcomes",
        "EXPLAIN VERBOSE SELECT * FROM outcomes",
        "EXPLAIN (COSTS ON) SELECT * FROM outcomes",
    ] {
        assert!(matches!(acme.collect(sql).await.unwrap_err(), Error::Refused(Refused::Metrics)), "{sql}");
        all.collect(sql).await.unwrap();
    }
}

#[tokio::test]
async fn a_query_over_too_much_needs_a_bound_on_its_time() {
    let tables = of_two_tenants().await;
    let limits = Limits { scan_days: 2, whole_bytes: 0, ..Limits::default() };
    for (limits, scope) in [
        (limits, Scope::All),
        (limits, Scope::Tenants(vec!["acme".to_owned()])),
        (Limits { scan_bytes: 10, ..Limits::default() }, Scope::All),
    ] {
        let session = tables.session(limits, scope);
        for sql in [
            "SELECT count(*) FROM outcomes",
            "SELECT count(*) FROM outcomes WHERE ended_at < '2026-11-02'",
            "SELECT count(*) FROM outcomes WHERE date >= '2026-11-02' OR tenant = 'acme'",
            "SELECT count(*) FROM outcomes WHERE date <> '2026-11-02'",
            "SELECT count(*) FROM outcomes WHERE date NOT IN ('2026-11-02')",
            "SELECT * FROM cost_daily",
            "SELECT 1 WHERE EXISTS (SELECT 1 FROM attempts)",
        ] {
            let refused = session.collect(sql).await.unwrap_err();
            assert!(matches!(refused, Error::Refused(Refused::Unbounded { .. })), "{sql}: {refused}");
        }
        for sql in [
            "SELECT count(*) FROM outcomes WHERE date = '2026-11-02'",
            "SELECT count(*) FROM outcomes WHERE date IN ('2026-11-02', '2026-11-03') AND tenant = 'acme'",
            "SELECT count(*) FROM outcomes WHERE ended_at >= '2026-11-02'",
            "SELECT count(*) FROM outcomes WHERE ended_at >= timestamp '2026-11-02T00:00:00Z' AND ended_at < now()",
            "SELECT count(*) FROM outcomes WHERE ended_at > now() - INTERVAL '7 days'",
            "SELECT count(*) FROM outcomes WHERE '2026-11-02' <= date",
            "SELECT count(*) FROM outcomes WHERE date BETWEEN '2026-11-02' AND '2026-11-03'",
            "SELECT count(*) FROM outcomes WHERE date = '2026-11-01' OR date = '2026-11-03'",
            "SELECT * FROM cost_daily WHERE date >= '2026-11-02'",
            "SELECT * FROM latency WHERE date >= current_date - 7",
        ] {
            let told = session.collect(sql).await.map(drop);
            assert!(told.is_ok(), "{sql}: {told:?}");
        }
    }
    let told =
        tables.session(limits, Scope::All).collect("SELECT 1 FROM outcomes").await.unwrap_err().to_string();
    assert!(
        told.starts_with("table outcomes holds 3 days and 1 MB") && told.contains("--scan-days (2)"),
        "{told}"
    );
    tables.session(Limits::default(), Scope::All).collect("SELECT 1 FROM outcomes").await.unwrap();
}

#[tokio::test]
async fn views_over_few_labels_of_many_days_are_answered() {
    let tables = Tables::new();
    let day = |day: i64| {
        (chrono::DateTime::<chrono::Utc>::default() + chrono::TimeDelta::days(20_000 + day))
            .date_naive()
            .to_string()
    };
    let of = |table: Table, number: i64| {
        json!({
            "tenant": "acme", "request_id": format!("r-{number}"), "date": day(number), (table.time_column()): format!("{}T12:00:00Z", day(number)),
        })
    };
    let with = |mut row: serde_json::Value, more: serde_json::Value| {
        row.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        row
    };
    let audit = |number| {
        with(of(Table::Audits, number), json!({"judge": "j", "judge_version": "1", "flagged": true}))
    };
    let label = |number| with(of(Table::Labels, number), json!({"wrong": true}));
    tables.add(Table::Audits, &(0..120).map(audit).collect::<Vec<_>>()).await;
    tables.add(Table::Labels, &(0..120).map(label).collect::<Vec<_>>()).await;
    let session = tables.session(Limits::default(), Scope::All);
    let counted = session.collect("SELECT count(*), sum(labelled) FROM quality").await.unwrap();
    assert_eq!(shown(&counted), "120 120");
    let bound = format!("SELECT count(label) FROM judged WHERE date >= '{}'", day(100));
    assert_eq!(shown(&session.collect(&bound).await.unwrap()), "20");
    // The labels are read whole by the views, so it is they that would be refused.
    let session = tables.session(Limits { whole_bytes: 0, ..Limits::default() }, Scope::All);
    let refused = session.collect(&bound).await.unwrap_err().to_string();
    assert!(refused.starts_with("table labels holds 120 days"), "{refused}");
}

#[test]
fn a_file_of_users_says_who_sees_whom_or_is_refused() {
    let users = r#"{"users": {"ana": {"tenants": ["acme"]}, "ops": {"tenants": ["*"]}}}"#;
    let users = Users::read("u.json", users).unwrap();
    assert_eq!(users.scope("u.json", "ana").unwrap(), Scope::Tenants(vec!["acme".to_owned()]));
    assert_eq!(users.scope("u.json", "ops").unwrap(), Scope::All);
    assert_eq!(
        users.scope("u.json", "bob").unwrap_err().to_string(),
        "there is no user \"bob\" in u.json; it names ana, ops"
    );
    for (text, wanted) in [
        (r#"{"users": {"ana": {"tenants": []}}}"#, "has no tenants"),
        (r#"{"users": {"ana": {"tenants": ["*", "acme"]}}}"#, "among other tenants"),
        (r#"{"users": {"ana": {"tenants": [""]}}}"#, "without a name"),
        (r#"{"users": {"ana": {"tenant": ["acme"]}}}"#, "no file of users"),
        (r#"{"user": {}}"#, "no file of users"),
        (r#"{"users": {"ana": {"tenants": ["acme"], "token_blake3": "secret"}}}"#, "is no BLAKE3 hash"),
    ] {
        let told = Users::read("u.json", text).unwrap_err().to_string();
        assert!(told.contains(wanted), "{text}: {told}");
    }
}
