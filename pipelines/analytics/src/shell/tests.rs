//! What the command line does with queries.

use super::*;
use crate::session::tests::Tables;

fn settings(tables: &Tables) -> Settings {
    let json =
        serde_json::json!({"tables": tables.root().as_str(), "data": tables.root().path()}).to_string();
    Settings::load(|name| (name == crate::settings::VARIABLE).then(|| json.clone())).unwrap()
}

#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    args: Args,
}

async fn done(tables: &Tables, line: &[&str]) -> anyhow::Result<String> {
    use clap::Parser as _;
    let output = tables.root().to_file_path().unwrap().join("answer");
    let line = ["sql", "--output", output.to_str().unwrap()].into_iter().chain(line.iter().copied());
    run(Line::try_parse_from(line)?.args, settings(tables)).await?;
    Ok(String::from_utf8_lossy(&fs::read(output)?).into_owned())
}

#[tokio::test]
async fn an_answer_is_written_in_the_format_that_is_asked_for() {
    let tables = Tables::new();
    const SQL: &str = "SELECT 1 AS a, 'x,y' AS b, CAST(NULL AS BIGINT) AS c";
    let check = async |format: &str| done(&tables, &["-c", SQL, "--format", format]).await.unwrap();
    assert_eq!(check("csv").await, "a,b,c\n1,\"x,y\",\n");
    assert_eq!(check("json").await, "{\"a\":1,\"b\":\"x,y\",\"c\":null}\n");
    let table = check("table").await;
    assert!(table.contains("| 1 | x,y | null |") && table.ends_with("(1 row)\n"), "{table}");
    assert!(check("parquet").await.starts_with("PAR1"));
    let empty = done(&tables, &["-c", "SELECT tenant FROM outcomes", "--format", "csv"]).await.unwrap();
    assert_eq!(empty, "tenant\n");
    let empty = done(&tables, &["-c", "SELECT tenant FROM outcomes"]).await.unwrap();
    assert!(empty.contains("| tenant |") && empty.ends_with("(0 rows)\n"), "{empty}");
    let many = done(&tables, &["-c", "SELECT * FROM generate_series(1, 5000)"]).await.unwrap();
    assert!(
        many.contains("| 1000  |")
            && !many.contains("| 1001  |")
            && many.contains("(5000 rows; the first 1000"),
        "{many}"
    );
}

#[tokio::test]
async fn several_queries_are_answered_up_to_the_one_that_fails() {
    let tables = Tables::new();
    let both = done(&tables, &["-c", "SELECT 1 AS a; SELECT 2 AS b;", "--format", "csv"]).await.unwrap();
    assert_eq!(both, "a\n1\nb\n2\n");
    let told =
        done(&tables, &["-c", "SELECT 1 AS a;\nSELECT tennant FROM outcomes"]).await.unwrap_err().to_string();
    assert!(
        told.starts_with("line 2, column 8: ")
            && told.ends_with("\n  SELECT tennant FROM outcomes\n         ^"),
        "{told}"
    );
    let told = done(&tables, &["-c", "  "]).await.unwrap_err().to_string();
    assert!(told.starts_with("there is no query"), "{told}");
    let told =
        done(&tables, &["-c", "SELECT 1; SELECT 2", "--format", "parquet"]).await.unwrap_err().to_string();
    assert!(told.contains("holds one answer, and there are 2"), "{told}");
}

#[tokio::test]
async fn a_file_may_hold_queries_users_and_prices() {
    let tables = Tables::new();
    let folder = tables.root().to_file_path().unwrap();
    let path = |name: &str, text: &str| {
        fs::write(folder.join(name), text).unwrap();
        folder.join(name).display().to_string()
    };
    let queries = path(
        "q.sql",
        "-- dear\nSELECT cost('m', 2, 0, 0, 0) AS now, cost('m', 2, 0, 0, 0, '2026-01-01') AS then",
    );
    let old = path("old.json", r#"{"m": {"input_cost_per_token": 1e-9}}"#);
    let new = path("new.json", r#"{"m": {"input_cost_per_token": 5e-9}}"#);
    let prices = format!("{old}, 2026-02-01={new}");
    let told = done(&tables, &["-f", &queries, "--prices", &prices, "--format", "csv"]).await.unwrap();
    assert_eq!(told, "now,then\n10,2\n");
    let told = done(&tables, &["-c", "SELECT 1", "--prices", &format!("1.2.2026={new}")])
        .await
        .unwrap_err()
        .to_string();
    assert!(told.contains("write a day such as 2026-12-01"), "{told}");
    let users = path("users.json", r#"{"users": {"ana": {"tenants": ["acme"]}}}"#);
    assert!(done(&tables, &["-c", "SELECT 1", "--users", &users, "--user", "ana"]).await.is_ok());
    let told = done(&tables, &["-c", "SELECT 1", "--users", &users]).await.unwrap_err().to_string();
    assert!(told.contains("say who asks with --user"), "{told}");
    let told =
        done(&tables, &["-c", "SELECT 1", "--users", &users, "--user", "bob"]).await.unwrap_err().to_string();
    assert!(told.contains("there is no user \"bob\""), "{told}");
    assert!(done(&tables, &["-f", "/nowhere.sql"]).await.unwrap_err().to_string().contains("/nowhere.sql"));
}

#[tokio::test]
async fn the_shell_lists_and_describes_what_there_is() {
    let listed = listed();
    for name in ["outcomes", "dead_letters", "cost_daily", "pctl(x, p)"] {
        assert!(listed.contains(name), "{listed}");
    }
    let session = parsed(&[]).access.open(Scope::All, &settings(&Tables::new())).unwrap();
    let schema = session.columns("outcomes").await.unwrap().unwrap();
    let described = described("outcomes", &schema);
    let line = described.lines().find(|line| line.starts_with("billed_nano_usd")).unwrap();
    assert!(
        line.contains("bigint") && line.contains("nano-USD") && line.contains("What this request cost"),
        "{line}"
    );
}

fn parsed(line: &[&str]) -> Args {
    use clap::Parser as _;
    Line::try_parse_from(["sql"].iter().chain(line)).unwrap().args
}

#[test]
fn tab_completes_words_of_any_case_from_the_cursor_back() {
    let words =
        Words(vec!["outcomes".to_owned(), "output_tokens".to_owned(), "SELECT".to_owned(), "\\d".to_owned()]);
    let history = DefaultHistory::new();
    let complete = |line: &str| {
        let (from, pairs) = words.complete(line, line.len(), &rustyline::Context::new(&history)).unwrap();
        (from, pairs.into_iter().map(|pair| pair.replacement).collect::<Vec<_>>())
    };
    assert_eq!(complete("SELECT sum(outp"), (11, vec!["output_tokens".to_owned()]));
    assert_eq!(complete("sel"), (0, vec!["SELECT".to_owned()]));
    assert_eq!(complete("SELECT 1 FROM OUT").1.len(), 2);
    assert_eq!(complete("\\"), (0, vec!["\\d".to_owned()]));
    assert_eq!(complete("SELECT ").1.len(), 0);
}
