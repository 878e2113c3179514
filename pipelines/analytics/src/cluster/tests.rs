//! What is sent to a cluster, without one; tests/ballista.rs has the processes.

use super::{Cluster, executor::host_and_port};
use crate::guards::{Limits, Scope};
use crate::session::tests::{Tables, shown};
use crate::table::Table;
use serde_json::{Value, json};

fn outcome(tenant: &str, day: &str) -> Value {
    json!({"tenant": tenant, "date": day, "ended_at": format!("{day}T12:00:00Z"), "status": "answered", "total_us": 5_000})
}

/// The plan that would be sent for a query.
async fn plan(tables: &Tables, scope: Scope, sql: &str) -> String {
    let session = tables.session(Limits::default(), scope).on(Cluster::new("127.0.0.1:1".to_owned()));
    shown(&session.collect(&format!("EXPLAIN {sql}")).await.unwrap())
}

async fn two_days() -> Tables {
    let tables = Tables::new();
    for day in ["2026-11-01", "2026-11-02"] {
        tables.add(Table::Outcomes, &[outcome("acme", day), outcome("globex", day)]).await;
    }
    tables
}

#[tokio::test]
async fn a_plan_names_the_files_that_the_log_leaves_below_the_root() {
    let tables = two_days().await;
    let all = plan(&tables, Scope::All, "SELECT count(*) FROM outcomes").await;
    assert!(
        all.contains("[outcomes/date=2026-11-01/") && all.contains("[outcomes/date=2026-11-02/"),
        "{all}"
    );
    for bound in ["date = '2026-11-02'", "ended_at >= '2026-11-02T00:00:00Z'"] {
        let one = plan(&tables, Scope::All, &format!("SELECT count(*) FROM outcomes WHERE {bound}")).await;
        assert!(!one.contains("date=2026-11-01/") && one.contains("date=2026-11-02/"), "{bound}: {one}");
    }
}

#[tokio::test]
async fn a_scope_is_part_of_the_plan_and_nothing_of_a_query_goes_below_it() {
    let tables = two_days().await;
    let query = "SELECT count(*) FROM outcomes WHERE length(status) > 3";
    let scoped = plan(&tables, Scope::Tenants(vec!["acme".to_owned()]), query).await;
    let (above, below) = scoped.rsplit_once("ScopeExec").unwrap();
    assert!(above.contains("character_length") && below.contains("acme"), "{scoped}");
    assert!(!below.contains("character_length"), "{scoped}");
    assert!(!plan(&tables, Scope::All, query).await.contains("ScopeExec"));
}

#[tokio::test]
async fn what_reads_no_file_needs_no_cluster() {
    let tables = Tables::new();
    let session = tables.session(Limits::default(), Scope::All).on(Cluster::new("127.0.0.1:1".to_owned()));
    for (sql, answer) in [
        ("SELECT 1 + 1", "2"),
        ("SELECT count(*) FROM outcomes", "0"),
        ("SELECT count(*) FROM information_schema.tables WHERE table_name = 'labels'", "1"),
    ] {
        assert_eq!(shown(&session.collect(sql).await.unwrap()), answer, "{sql}");
    }
}

#[test]
fn an_address_has_a_host_and_a_port() {
    assert_eq!(
        host_and_port("sql.internal:50050", "--scheduler").unwrap(),
        ("sql.internal".to_owned(), 50050)
    );
    for wrong in ["sql.internal", ":50050", "sql.internal:many"] {
        let said = host_and_port(wrong, "--scheduler").unwrap_err().to_string();
        assert_eq!(said, format!("--scheduler is {wrong:?}; write host and port, such as 127.0.0.1:50050"));
    }
}
