//! The dashboards of deploy/grafana beside what they ask for: metrics and labels as METRICS.md has them, queries as the session answers
//! them, and the questions that Grafana's PostgreSQL source asks by itself, as psql sends them.
//!
//! Invariant: a panel that names a metric, a label, a table or a column that is not there fails a test.

use crate::guards::{Limits, Scope, Users};
use crate::pg;
use crate::session::tests::Tables;
use crate::table::Table;
use arrow::datatypes::{DataType, SchemaRef};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use tokio::net::TcpListener;

const METRICS: &str = include_str!("../../telemetry/METRICS.md");
const PROMETHEUS: &str = include_str!("../../../deploy/grafana/forebay.json");
const SQL: &str = include_str!("../../../deploy/grafana/forebay-sql.json");
const PROVISIONED: &[&str] = &[
    include_str!("../../../deploy/grafana/provisioning/datasources/forebay.yaml"),
    include_str!("../../../deploy/grafana/provisioning/dashboards/forebay.yaml"),
];
const TOKEN: &str = "a token of thirty-two characters or more";

/// A metric as its page tells of it.
#[derive(Debug, Default)]
struct Metric {
    kind: String,
    labels: BTreeSet<String>,
    /// Its words, where the values of its labels stand.
    told: String,
}

fn metrics() -> BTreeMap<String, Metric> {
    let entry = |entry: &str| {
        let (name, told) = entry.split_once("`\n").unwrap();
        let line = |start: &str| {
            told.lines().find_map(|line| line.strip_prefix(start)).unwrap_or_default().to_owned()
        };
        let kind = line("- ").split(',').next().unwrap().to_owned();
        let labels = line("- labels: ").split(", ").map(|label| label.trim_matches('`').to_owned()).collect();
        (name.to_owned(), Metric { kind, labels, told: told.to_owned() })
    };
    METRICS.split("\n## `").skip(1).map(entry).collect()
}

fn panels(dashboard: &str) -> Vec<Value> {
    let dashboard: Value = serde_json::from_str(dashboard).unwrap();
    dashboard["panels"].as_array().unwrap().clone()
}

/// Words, numbers, texts and signs of an expression.
fn tokens(expr: &str) -> Vec<String> {
    let (mut tokens, mut letters) = (Vec::new(), expr.chars().peekable());
    while let Some(letter) = letters.next() {
        let mut token = letter.to_string();
        let is_word = |letter: &char| letter.is_alphanumeric() || *letter == '_' || *letter == '.';
        if letter == '"' {
            token.extend(letters.by_ref().take_while(|letter| *letter != '"'));
        } else if is_word(&letter) || letter == '$' {
            while let Some(letter) = letters.next_if(is_word) {
                token.push(letter);
            }
        } else if letter.is_whitespace() {
            continue;
        }
        tokens.push(token);
    }
    tokens
}

/// What an expression names: metrics, by what it groups, and what it selects.
#[derive(Debug, Default)]
struct Named {
    metrics: Vec<String>,
    groups: Vec<String>,
    selected: Vec<(String, String)>,
}

fn named(expr: &str) -> Named {
    const FUNCTIONS: &[&str] = &["sum", "max", "rate", "histogram_quantile", "label_values"];
    let tokens = tokens(expr);
    let (mut named, mut at) = (Named::default(), 0);
    while at < tokens.len() {
        let token = tokens[at].as_str();
        match token {
            "by" => {
                at += 2;
                while tokens[at] != ")" {
                    named.groups.extend((tokens[at] != ",").then(|| tokens[at].clone()));
                    at += 1;
                }
            }
            "{" => {
                at += 1;
                while tokens[at] != "}" {
                    let label = tokens[at].clone();
                    let value =
                        tokens[at..].iter().find(|token| token.starts_with('"')).unwrap().trim_matches('"');
                    named.selected.push((label, value.to_owned()));
                    while tokens[at] != "," && tokens[at] != "}" {
                        at += 1;
                    }
                    at += usize::from(tokens[at] == ",");
                }
            }
            _ if token.starts_with("forebay_") || token.starts_with("gen_ai_") => {
                named.metrics.push(token.to_owned())
            }
            _ if token.starts_with(|letter: char| letter.is_ascii_digit()) => {}
            _ if token.starts_with('$') || token.len() == 1 => {}
            _ => assert!(FUNCTIONS.contains(&token), "{token} of {expr} is unknown"),
        }
        at += 1;
    }
    named
}

/// The metric of a series, which of a histogram has a suffix.
fn find<'a>(metrics: &'a BTreeMap<String, Metric>, series: &str) -> Option<(&'a Metric, bool)> {
    if let Some(metric) = metrics.get(series) {
        return (metric.kind != "histogram").then_some((metric, false));
    }
    let suffix = ["_bucket", "_sum", "_count"].into_iter().find(|suffix| series.ends_with(suffix))?;
    let metric = metrics.get(series.strip_suffix(suffix)?)?;
    (metric.kind == "histogram").then_some((metric, suffix == "_bucket"))
}

fn check(metrics: &BTreeMap<String, Metric>, title: &str, expr: &str, legend: &str) {
    let named = named(expr);
    assert!(!named.metrics.is_empty(), "{title}: {expr} names no metric");
    for series in &named.metrics {
        let (metric, is_bucket) =
            find(metrics, series).unwrap_or_else(|| panic!("{title}: there is no series {series}"));
        for label in &named.groups {
            let is_known = metric.labels.contains(label) || (is_bucket && label == "le");
            assert!(is_known, "{title}: {series} has no label {label}");
        }
        for (label, value) in &named.selected {
            assert!(metric.labels.contains(label), "{title}: {series} has no label {label}");
            for word in value.split('|').filter(|word| !word.is_empty() && !word.starts_with('$')) {
                assert!(
                    metric.told.contains(word),
                    "{title}: {label} of {series} is never told to be {word}"
                );
            }
        }
        let is_gauge = metric.kind == "gauge";
        let rates = expr.contains(&format!("rate({series}"));
        assert!(!(is_gauge && rates), "{title}: {series} is a gauge and has no rate");
        assert_eq!(expr.contains("histogram_quantile"), is_bucket, "{title}: {series}");
    }
    for label in legend.split("{{").skip(1).filter_map(|rest| rest.split("}}").next()) {
        assert!(named.groups.iter().any(|group| group == label), "{title}: {expr} is not by {label}");
    }
}

#[test]
fn every_metric_and_label_that_is_drawn_is_one_that_is_told() {
    let metrics = metrics();
    assert!(metrics.len() > 40, "{} metrics were read", metrics.len());
    let mut drawn = 0;
    for panel in panels(PROMETHEUS) {
        let title = panel["title"].as_str().unwrap();
        for target in panel["targets"].as_array().into_iter().flatten() {
            let text = |name: &str| target[name].as_str().unwrap();
            check(&metrics, title, text("expr"), text("legendFormat"));
            drawn += 1;
        }
    }
    assert!(drawn > 20, "{drawn} targets");
    let dashboard: Value = serde_json::from_str(PROMETHEUS).unwrap();
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        if let Some(query) = variable["query"]["query"].as_str() {
            let [metric, label] = query
                .trim_start_matches("label_values(")
                .trim_end_matches(')')
                .split(", ")
                .collect::<Vec<_>>()[..]
            else {
                panic!("{query}")
            };
            assert!(metrics[metric].labels.contains(label), "{query}");
        }
    }
}

#[test]
fn a_panel_that_names_what_is_not_there_is_found() {
    let metrics = metrics();
    let refused = |expr: &'static str, legend: &'static str| {
        std::panic::catch_unwind(|| check(&metrics, "t", expr, legend)).is_err()
    };
    assert!(!refused(
        "sum by (stage) (rate(forebay_step_retries_total{stage=~\"$stage\"}[$__rate_interval]))",
        "{{stage}}"
    ));
    for (expr, legend) in [
        ("sum(rate(forebay_step_retrys_total[5m]))", ""), // misspelt on purpose
        ("sum by (tenant) (rate(forebay_step_retries_total[5m]))", ""),
        ("sum(rate(forebay_step_retries_total{tenant=\"x\"}[5m]))", ""),
        ("sum(rate(forebay_cache_lookups_total{status=\"found\"}[5m]))", ""),
        ("sum(rate(forebay_step_lag[5m]))", ""),
        ("sum(rate(forebay_step_duration_seconds[5m]))", ""),
        ("histogram_quantile(0.9, sum by (le) (rate(forebay_step_duration_seconds_sum[5m])))", ""),
        ("sum by (stage) (rate(forebay_step_retries_total[5m]))", "{{operator}}"),
        ("topk(3, forebay_step_lag)", ""),
    ] {
        assert!(refused(expr, legend), "{expr}");
    }
}

/// The time that a dashboard shows, and how wide a point of it is.
const FROM: &str = "2026-11-01T00:00:00Z";
const TO: &str = "2026-11-03T23:59:59.5Z";

/// A query as Grafana's PostgreSQL source sends it: first its interval and variables, then its macros.
fn expanded(sql: &str, interval: &str) -> String {
    let mut rest = sql.replace("$__interval", interval).replace("$tenant", "'acme','o''hara'");
    let mut out = String::new();
    while let Some(at) = rest.find("$__") {
        out.push_str(&rest[..at]);
        let (name, called) = rest[at + 3..].split_once('(').unwrap();
        let (arguments, behind) = called.split_once(')').unwrap();
        let arguments: Vec<&str> = arguments.split(',').map(str::trim).collect();
        let alias = if name == "timeGroup" && behind.starts_with(',') { " AS \"time\"" } else { "" };
        let group = |arguments: &[&str]| {
            let (count, unit) = arguments[1].split_at(arguments[1].len() - 1);
            let seconds = count.parse::<u32>().unwrap()
                * match unit {
                    "s" => 1,
                    "m" => 60,
                    "h" => 3_600,
                    _ => 86_400,
                };
            format!("floor(extract(epoch from {})/{seconds})*{seconds}", arguments[0])
        };
        out.push_str(&match name {
            "timeFilter" => format!("{} BETWEEN '{FROM}' AND '{TO}'", arguments[0]),
            "timeFrom" => format!("'{FROM}'"),
            "timeTo" => format!("'{TO}'"),
            "timeGroup" => group(&arguments) + alias,
            "timeGroupAlias" => group(&arguments) + " AS \"time\"",
            _ => panic!("macro $__{name} is unknown"),
        });
        rest = behind.to_owned();
    }
    out + &rest
}

/// Every query of the dashboard, by its title, with the form that it is to have.
fn queries() -> Vec<(String, String, String)> {
    let of = |panel: Value| {
        let title = panel["title"].as_str().unwrap().to_owned();
        let width = panel["interval"].as_str().unwrap_or("1h").to_owned();
        let targets = panel["targets"].as_array().unwrap().clone().into_iter();
        targets.map(move |target| {
            let text = |name: &str| target[name].as_str().unwrap().to_owned();
            (title.clone(), expanded(&text("rawSql"), &width), text("format"))
        })
    };
    let dashboard: Value = serde_json::from_str(SQL).unwrap();
    let variables = dashboard["templating"]["list"].as_array().unwrap().clone().into_iter();
    let variables = variables.filter(|variable| variable["type"] == "query").map(|variable| {
        ("variable".to_owned(), expanded(variable["query"].as_str().unwrap(), "1h"), "table".to_owned())
    });
    panels(SQL).into_iter().flat_map(of).chain(variables).collect()
}

async fn filled() -> Tables {
    let tables = Tables::new();
    let outcome = |hour: u32, status: &str| {
        json!({
            "tenant": if hour.is_multiple_of(2) { "acme" } else { "o'hara" }, "date": "2026-11-02",
            "ended_at": format!("2026-11-02T{hour:02}:30:00Z"), "status": status, "cache_status": "miss", "lane": "interactive",
            "model_served": "m", "provider": "p", "input_tokens": 900, "output_tokens": 100, "billed_nano_usd": 2_000,
            "list_nano_usd": 3_000, "saved_by_cache_nano_usd": 5, "total_us": 1_000 * hour, "infer_us": 500,
            "error_code": if status == "failed" { json!("no_answer") } else { Value::Null },
        })
    };
    let mut rows: Vec<_> = (0..20).map(|hour| outcome(hour, "answered")).collect();
    rows.push(outcome(20, "failed"));
    tables.add(Table::Outcomes, &rows).await;
    let attempt = json!({
        "tenant": "acme", "date": "2026-11-02", "started_at": "2026-11-02T12:01:30Z", "status": "ok", "provider": "p", "model": "m",
        "cost_nano_usd": 5,
    });
    tables.add(Table::Attempts, &[attempt]).await;
    let audit = json!({
        "request_id": "r", "tenant": "acme", "judge": "j", "judge_version": "1", "audited_at": "2026-11-02T01:00:00Z", "date": "2026-11-02",
    });
    tables.add(Table::Audits, &[audit]).await;
    tables
}

/// Whether an answer has the form that a panel draws.
fn has_form(schema: &SchemaRef, form: &str) -> bool {
    let kind = |name: &str| schema.field_with_name(name).ok().map(|field| field.data_type().clone());
    if form == "table" {
        return kind("time").is_none();
    }
    let values = schema.fields().iter().filter(|field| !["time", "metric"].contains(&field.name().as_str()));
    let are_numbers =
        values.clone().count() > 0 && values.clone().all(|field| field.data_type().is_numeric());
    let is_text = |kind: DataType| matches!(kind, DataType::Utf8 | DataType::Utf8View | DataType::LargeUtf8);
    are_numbers && kind("time") == Some(DataType::Float64) && kind("metric").is_none_or(is_text)
}

#[tokio::test]
async fn every_query_of_the_dashboard_is_answered_in_the_form_that_its_panel_draws() {
    for (tables, is_filled) in [(Tables::new(), false), (filled().await, true)] {
        let session = tables.session(Limits::default(), Scope::All);
        for (title, sql, form) in queries() {
            let mut answer = session.query(session.parse(&sql).unwrap().remove(0).unwrap()).await.unwrap();
            assert!(has_form(&answer.schema, &form), "{title}: {:?}", answer.schema);
            let mut rows = 0;
            while let Some(batch) = answer.next().await.unwrap() {
                rows += batch.num_rows();
            }
            assert!(rows > 0 || !is_filled, "{title} shows nothing: {sql}");
        }
    }
}

#[test]
fn panels_lie_beside_each_other_and_say_what_they_show() {
    for dashboard in [PROMETHEUS, SQL] {
        let panels = panels(dashboard);
        let mut taken = BTreeSet::new();
        let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_i64().unwrap()).collect();
        assert_eq!(ids.len(), panels.len());
        for panel in &panels {
            let at = |name: &str| panel["gridPos"][name].as_i64().unwrap();
            for x in at("x")..at("x") + at("w") {
                for y in at("y")..at("y") + at("h") {
                    assert!(x < 24 && taken.insert((x, y)), "{} lies over another", panel["title"]);
                }
            }
            let is_told = panel["type"] == "row"
                || panel["description"].as_str().is_some_and(|told| told.ends_with('.'));
            assert!(is_told, "{} does not say what it shows", panel["title"]);
        }
    }
    for text in PROVISIONED {
        assert!(text.starts_with("# ") && text.contains("apiVersion: 1") && !text.contains('\t'));
    }
    assert!(PROVISIONED[0].contains("password: $FOREBAY_SQL_TOKEN"), "no secret is in the repository");
}

/// The tables of the search path, as the source asks for them: where PostgreSQL knows a path, this names what is on it.
const ON_PATH: &str = r#"quote_ident(table_schema) IN (
          SELECT
            CASE WHEN trim(s[i]) = '"$user"' THEN user ELSE trim(s[i]) END
          FROM
            generate_series(
              array_lower(string_to_array(current_setting('search_path'),','),1),
              array_upper(string_to_array(current_setting('search_path'),','),1)
            ) as i,
            string_to_array(current_setting('search_path'),',') s
          )"#;

/// What Grafana's source asks by itself, of a server and of a table (its postgresMetaQuery.ts, as of Grafana 12).
fn asked_by_grafana(table: &str) -> Vec<String> {
    let hidden = "'information_schema', 'pg_catalog', '_timescaledb_cache', '_timescaledb_catalog', '_timescaledb_internal', \
                  '_timescaledb_config', 'timescaledb_information', 'timescaledb_experimental'";
    vec![
        "SELECT current_setting('server_version_num')::int/100 as version".to_owned(),
        "SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'".to_owned(),
        format!(
            "SELECT schema_name AS \"name\" FROM information_schema.schemata WHERE schema_name NOT IN ({hidden}, 'pg_toast') ORDER BY schema_name"
        ),
        "SELECT quote_ident(table_name) AS \"table\" FROM information_schema.tables WHERE quote_ident(table_schema) = 'public' ORDER BY 1"
            .to_owned(),
        format!(
            "SELECT CASE WHEN {ON_PATH} THEN quote_ident(table_name) ELSE quote_ident(table_schema) || '.' || quote_ident(table_name) END \
             AS \"table\" FROM information_schema.tables WHERE quote_ident(table_schema) NOT IN ({hidden}) \
             ORDER BY CASE WHEN {ON_PATH} THEN 0 ELSE 1 END, 1"
        ),
        format!(
            "SELECT quote_ident(column_name) AS \"column\", data_type AS \"type\" FROM information_schema.columns WHERE \
             CASE WHEN array_length(parse_ident('{table}'),1) = 2 \
             THEN quote_ident(table_schema) = (parse_ident('{table}'))[1] AND quote_ident(table_name) = (parse_ident('{table}'))[2] \
             ELSE quote_ident(table_name) = '{table}' AND {ON_PATH} END"
        ),
    ]
}

/// The source sends each query as one simple query, as psql does.
#[tokio::test(flavor = "multi_thread")]
async fn what_grafana_asks_by_itself_is_answered_over_the_wire() {
    if std::process::Command::new("psql").arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "there is no psql; apt-get install postgresql-client");
        println!("skipped: there is no psql; apt-get install postgresql-client");
        return;
    }
    let tables = filled().await;
    let hash = blake3::hash(TOKEN.as_bytes()).to_hex();
    let users = format!(r#"{{"users": {{"grafana": {{"tenants": ["*"], "token_blake3": "{hash}"}}}}}}"#);
    let users = Users::read("users.json", &users).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let session = tables.session(Limits::default(), Scope::All);
    let serving = tokio::spawn(pg::serve(listener, session, users, std::future::pending()));
    let ask = async |sql: String| {
        let mut psql = tokio::process::Command::new("psql");
        psql.args(["-X", "-At", "-h", "127.0.0.1", "-p", &port, "-U", "grafana", "forebay", "-c", &sql]);
        let output = psql.env("PGPASSWORD", TOKEN).output().await.unwrap();
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let [version, timescale, schemas, of_public, names, columns] =
        asked_by_grafana("public.outcomes_hourly").try_into().unwrap();
    assert!(ask(version).await.trim().parse::<u32>().unwrap() >= 1_000);
    assert_eq!(ask(timescale).await, "");
    assert_eq!(ask(schemas).await, "public\n");
    assert!(ask(of_public).await.lines().any(|name| name == "outcomes_hourly"));
    let names = ask(names).await;
    let known = names.lines().find(|name| name.trim_start_matches("public.") == "outcomes_hourly").unwrap();
    assert!(ask(columns).await.lines().any(|line| line.starts_with("billed_nano_usd|")));
    // Under the name that the editor was told of, too.
    let of_known = asked_by_grafana(known).pop().unwrap();
    assert!(ask(of_known).await.lines().any(|line| line.starts_with("hour|")), "{known}");
    for (title, sql, _) in queries() {
        assert_ne!(ask(sql.clone()).await, "", "{title} shows nothing: {sql}");
    }
    serving.abort();
}
