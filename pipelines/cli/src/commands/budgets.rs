//! `forebay budgets status|drift`: how budgets stand, and whether what they counted is what the log says.

use crate::{
    args::{BudgetsCommand, BudgetsDrift, BudgetsStatus},
    commands::tables,
    config::Config,
    console::{out, say, wrong},
    standings,
};
use comfy_table::{CellAlignment, Table, presets::UTF8_HORIZONTAL_ONLY};
use forebay_operator::Clock;
use forebay_schemas::NanoUsd;
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
    time::{Duration, UNIX_EPOCH},
};

const DAY_MS: i64 = 24 * 60 * 60 * 1_000;
const MINUTE_US: i64 = 60_000_000;

/// Looks, or compares.
pub async fn run(command: BudgetsCommand, config: Config) -> anyhow::Result<ExitCode> {
    let now_ms = Clock::System.now_ms();
    match command {
        BudgetsCommand::Status(args) => status(&args, &config, now_ms).await,
        BudgetsCommand::Drift(args) => drift(&args, &config, now_ms).await,
    }
}

async fn status(args: &BudgetsStatus, config: &Config, now_ms: i64) -> anyhow::Result<ExitCode> {
    let now_us = now_ms.saturating_mul(1_000);
    let mut rows = standings::read(config, now_ms, now_ms).await?;
    rows.retain(|row| number(row, "begins_at") <= now_us && now_us < number(row, "ends_at"));
    for row in &mut rows {
        forecast(row, now_us);
    }
    if args.json {
        rows.iter().for_each(out);
        return Ok(ExitCode::SUCCESS);
    }
    if rows.is_empty() {
        say("forebay: no call has been counted in a budget of this minute, day or month");
        return Ok(ExitCode::SUCCESS);
    }
    out(status_table(&rows));
    Ok(ExitCode::SUCCESS)
}

/// Adds the pace, which is the mean of the period so far, what it comes to at the end, and when the budget is used up by it.
fn forecast(row: &mut Value, now_us: i64) {
    let (begins, ends) = (i128::from(number(row, "begins_at")), i128::from(number(row, "ends_at")));
    let (used, limit) = (i128::from(number(row, "used")), i128::from(number(row, "limit")));
    let elapsed = (i128::from(now_us) - begins).max(1);
    let whole = |amount: i128| i64::try_from(amount).unwrap_or(i64::MAX);
    row["pace"] = json!(whole(used * i128::from(MINUTE_US) / elapsed));
    row["forecast"] = json!(whole(used * (ends - begins) / elapsed));
    let reached =
        (used > 0).then(|| begins + limit * elapsed / used.max(1)).filter(|reached| *reached < ends);
    row["reached_at"] = json!(reached.map(|reached| whole(reached.max(i128::from(now_us)))));
}

fn status_table(rows: &[Value]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY);
    table.set_header([
        "holder", "tenant", "name", "budget", "used", "held", "of", "refused", "a minute", "forecast",
        "used up",
    ]);
    for row in rows {
        let (used, held, limit) = (number(row, "used"), number(row, "held"), number(row, "limit"));
        let percent = i128::from(used.saturating_add(held)) * 100 / i128::from(limit.max(1));
        table.add_row([
            text(row, "holder"),
            text(row, "tenant"),
            text(row, "name"),
            text(row, "budget"),
            amount(row, used),
            amount(row, held),
            format!("{percent}%"),
            number(row, "refused").to_string(),
            amount(row, number(row, "pace")),
            amount(row, number(row, "forecast")),
            row["reached_at"].as_i64().map_or_else(|| "-".to_owned(), time),
        ]);
    }
    for column in table.column_iter_mut().skip(4) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

async fn drift(args: &BudgetsDrift, config: &Config, now_ms: i64) -> anyhow::Result<ExitCode> {
    let day_ms = args.date.map_or(now_ms - now_ms.rem_euclid(DAY_MS) - DAY_MS, |date| date.0);
    if day_ms > now_ms {
        return Err(wrong("the day has not begun"));
    }
    let mut counted = standings::read(config, day_ms, now_ms.min(day_ms + DAY_MS - 1)).await?;
    counted.retain(|row| is_compared(row, day_ms));
    if counted.is_empty() {
        return Err(wrong(
            "no budget of that day or its month is counted; counters are kept for a day and a half after it, and those of keys and \
             jobs for a day or a month after their last call",
        ));
    }
    let spans: BTreeSet<_> =
        counted.iter().map(|row| (number(row, "begins_at"), number(row, "ends_at"))).collect();
    // A log has more of them than rows are worth reading where nobody asks for them.
    let has_names = counted.iter().any(|row| !row["name"].is_null());
    let log = read_log(tables::ask(&query(&spans, has_names), config).await?);
    let compared: Vec<Value> = compare(counted, &log, args.over);
    let is_over = compared.iter().any(|row| row["is_over"] == true);
    if args.json {
        compared.iter().for_each(out);
    } else {
        out(drift_table(&compared));
    }
    Ok(if is_over { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Whether a row is of that day, or of its month. Minutes are too many, and over too soon.
fn is_compared(row: &Value, day_ms: i64) -> bool {
    let (begins, ends) = (number(row, "begins_at"), number(row, "ends_at"));
    let day_us = day_ms.saturating_mul(1_000);
    begins <= day_us && day_us < ends && ends - begins > MINUTE_US
}

/// What the log has of each span and tenant, and of its keys and jobs where these have budgets. A call stands there once for each time that
/// its record was read, so a try is counted once. An answered try is what budgets count; one that was cut may be counted too, as somebody
/// read what came of it.
fn query(spans: &BTreeSet<(i64, i64)>, has_names: bool) -> String {
    let [of_try, named] = match has_names {
        true => ["max(key_id) AS key_id, max(job) AS job, ", ", key_id, job"],
        false => ["", ""],
    };
    let of = |(begins, ends): &(i64, i64)| {
        let day = |us: i64| time(us).chars().take(10).collect::<String>();
        format!(
            "SELECT {begins} AS begins_at, tenant{named}, \
             CAST(coalesce(sum(cost) FILTER (WHERE is_ok), 0) AS BIGINT) AS money, \
             CAST(coalesce(sum(cost), 0) AS BIGINT) AS money_all, \
             CAST(coalesce(sum(tokens) FILTER (WHERE is_ok), 0) AS BIGINT) AS tokens, \
             CAST(coalesce(sum(tokens), 0) AS BIGINT) AS tokens_all \
             FROM (SELECT tenant, attempt_id, {of_try}bool_or(status = 'ok') AS is_ok, max(cost_nano_usd) AS cost, \
             max(coalesce(input_tokens, 0) + coalesce(output_tokens, 0)) AS tokens FROM attempts \
             WHERE date >= DATE '{}' AND date <= DATE '{}' \
             AND started_at >= TIMESTAMP '{}' AND started_at < TIMESTAMP '{}' GROUP BY tenant, attempt_id) GROUP BY tenant{named}",
            day(*begins),
            day(*ends),
            time(*begins),
            time(*ends)
        )
    };
    spans.iter().map(of).collect::<Vec<_>>().join(" UNION ALL ")
}

/// What tries cost that were answered, and what all did.
#[derive(Clone, Copy, Default)]
struct Logged {
    answered: i64,
    all: i64,
}

impl Logged {
    fn plus(self, other: Self) -> Self {
        Self {
            answered: self.answered.saturating_add(other.answered),
            all: self.all.saturating_add(other.all),
        }
    }
}

/// By the begin of a span, whose budget it is, and the unit.
type Log = BTreeMap<(i64, Whose, &'static str), Logged>;

/// A holder's word, the tenant where it is not all of them, and the name of a key or a job.
type Whose = (&'static str, Option<String>, Option<String>);

fn read_log(rows: Vec<Value>) -> Log {
    let mut log = Log::new();
    for row in rows {
        let begins = number(&row, "begins_at");
        for (unit, answered, all) in [("nano-USD", "money", "money_all"), ("tokens", "tokens", "tokens_all")]
        {
            let logged = Logged { answered: number(&row, answered), all: number(&row, all) };
            let tenant = said(&row, "tenant");
            let of = |holder, name: Option<String>| name.map(|name| (holder, tenant.clone(), Some(name)));
            let whose = [
                Some(("all", None, None)),
                Some(("tenant", tenant.clone(), None)),
                of("key", said(&row, "key_id")),
                of("job", said(&row, "job")),
            ];
            for whose in whose.into_iter().flatten() {
                let sum = log.entry((begins, whose, unit)).or_default();
                *sum = sum.plus(logged);
            }
        }
    }
    log
}

/// Puts what is counted beside the log. It agrees where it lies between what was answered and what was sent; beyond is drift.
fn compare(counted: Vec<Value>, log: &Log, over_percent: f64) -> Vec<Value> {
    let compare = |mut row: Value| {
        let unit = if row["unit"] == "tokens" { "tokens" } else { "nano-USD" };
        let holder = ["all", "tenant", "key", "job"].into_iter().find(|holder| row["holder"] == *holder);
        let whose = (holder.unwrap_or_default(), said(&row, "tenant"), said(&row, "name"));
        let Logged { answered, all } =
            log.get(&(number(&row, "begins_at"), whose, unit)).copied().unwrap_or_default();
        let used = number(&row, "used");
        let drift = used - used.clamp(answered, all.max(answered));
        let most = used.max(answered).max(1);
        let percent = drift as f64 * 100.0 / most as f64;
        row["log_answered"] = json!(answered);
        row["log_all"] = json!(all);
        row["drift"] = json!(drift);
        row["drift_percent"] = json!((percent * 1_000.0).round() / 1_000.0);
        row["is_over"] = json!(percent.abs() > over_percent);
        row
    };
    counted.into_iter().map(compare).collect()
}

fn drift_table(rows: &[Value]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY);
    table.set_header([
        "holder",
        "tenant",
        "name",
        "budget",
        "since",
        "counted",
        "log, answered",
        "log, all",
        "drift",
        "",
    ]);
    for row in rows {
        let percent = row["drift_percent"].as_f64().unwrap_or_default();
        let over = if row["is_over"] == true { " over" } else { "" };
        table.add_row([
            text(row, "holder"),
            text(row, "tenant"),
            text(row, "name"),
            text(row, "budget"),
            time(number(row, "begins_at")),
            amount(row, number(row, "used")),
            amount(row, number(row, "log_answered")),
            amount(row, number(row, "log_all")),
            amount(row, number(row, "drift")),
            format!("{percent}%{over}"),
        ]);
    }
    for column in table.column_iter_mut().skip(4) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn said(row: &Value, field: &str) -> Option<String> {
    row[field].as_str().map(str::to_owned)
}

fn text(row: &Value, field: &str) -> String {
    said(row, field).unwrap_or_else(|| "-".to_owned())
}

fn number(row: &Value, field: &str) -> i64 {
    row[field].as_i64().unwrap_or_default()
}

fn amount(row: &Value, amount: i64) -> String {
    match row["unit"].as_str() {
        Some("tokens") => amount.to_string(),
        _ => NanoUsd(amount).to_string(),
    }
}

/// A moment in UTC, to the second.
fn time(us: i64) -> String {
    let time = UNIX_EPOCH + Duration::from_micros(us.unsigned_abs());
    humantime::format_rfc3339_seconds(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY_US: i64 = DAY_MS * 1_000;

    fn row(tenant: Option<&str>, used: i64) -> Value {
        let holder = if tenant.is_some() { "tenant" } else { "all" };
        json!({
            "holder": holder, "tenant": tenant, "name": null, "budget": "2 USD/day", "unit": "nano-USD", "begins_at": DAY_US,
            "ends_at": 2 * DAY_US, "used": used, "held": 0, "limit": 2_000_000_000, "refused": 0,
        })
    }

    fn logged(tenant: &str, answered: i64, all: i64) -> Value {
        json!({"begins_at": DAY_US, "tenant": tenant, "money": answered, "money_all": all, "tokens": 1, "tokens_all": 1})
    }

    #[test]
    fn what_is_counted_agrees_with_the_log_between_what_was_answered_and_what_was_sent() {
        let log = read_log(vec![logged("a", 1_000, 1_100), logged("b", 500, 500)]);
        let drift = |tenant: Option<&str>, used| {
            let row = compare(vec![row(tenant, used)], &log, 1.0).remove(0);
            (number(&row, "drift"), row["drift_percent"].as_f64().unwrap(), row["is_over"] == true)
        };
        assert_eq!(drift(Some("a"), 1_000), (0, 0.0, false));
        assert_eq!(drift(Some("a"), 1_050), (0, 0.0, false), "an answer that was cut");
        assert_eq!(drift(Some("a"), 1_105), (5, 0.452, false), "within what is allowed");
        assert_eq!(drift(Some("a"), 900), (-100, -10.0, true));
        assert_eq!(drift(None, 1_500), (0, 0.0, false));
        assert_eq!(drift(Some("c"), 7), (7, 100.0, true), "the log knows nothing of it");
        assert_eq!(drift(Some("c"), 0), (0, 0.0, false));
    }

    #[test]
    fn keys_and_jobs_are_compared_with_the_calls_of_their_tenant_that_name_them() {
        let of = |tenant: &str, key: Option<&str>, job: Option<&str>| {
            let mut row = logged(tenant, 100, 100);
            (row["key_id"], row["job"]) = (json!(key), json!(job));
            row
        };
        let rows = vec![of("a", Some("k"), Some("j")), of("a", Some("k"), None), of("b", Some("k"), None)];
        let log = read_log(rows);
        let drift = |holder: &str, tenant: Option<&str>, name: Option<&str>| {
            let mut row = row(tenant, 200);
            (row["holder"], row["name"]) = (json!(holder), json!(name));
            number(&compare(vec![row], &log, 1.0).remove(0), "drift")
        };
        assert_eq!(drift("key", Some("a"), Some("k")), 0);
        assert_eq!(drift("job", Some("a"), Some("j")), 100);
        assert_eq!(drift("key", Some("b"), Some("k")), 100);
        assert_eq!(drift("job", Some("a"), Some("k")), 200, "a key is no job");
        assert_eq!((drift("tenant", Some("a"), None), drift("all", None, None)), (0, -100));
    }

    #[test]
    fn a_day_is_compared_with_its_day_and_its_month_and_with_nothing_else() {
        let of = |begins: i64, ends: i64| json!({"begins_at": begins * DAY_US, "ends_at": ends * DAY_US});
        let are: Vec<_> = [(1, 2), (0, 31), (2, 3), (0, 1)]
            .map(|(begins, ends)| is_compared(&of(begins, ends), DAY_MS))
            .into();
        assert_eq!(are, [true, true, false, false]);
        assert!(!is_compared(&json!({"begins_at": DAY_US, "ends_at": DAY_US + MINUTE_US}), DAY_MS));
        let spans = BTreeSet::from([(DAY_US, 2 * DAY_US), (0, 31 * DAY_US)]);
        assert!(query(&spans, true).contains("GROUP BY tenant, key_id, job"));
        let query = query(&spans, false);
        assert!(query.contains("date >= DATE '1970-01-02' AND date <= DATE '1970-01-03'"), "{query}");
        assert!(
            query.contains("started_at < TIMESTAMP '1970-02-01T00:00:00Z'") && query.contains(" UNION ALL "),
            "{query}"
        );
    }

    #[test]
    fn by_the_pace_of_the_day_it_is_known_when_nothing_is_left() {
        let mut half = row(Some("a"), 1_500_000_000);
        // Noon.
        forecast(&mut half, DAY_US + DAY_US / 2);
        assert_eq!((number(&half, "forecast"), number(&half, "pace")), (3_000_000_000, 2_083_333));
        assert_eq!(number(&half, "reached_at"), DAY_US + DAY_US * 2 / 3);
        let shown = status_table(&[half]).to_string();
        for word in ["tenant", "2 USD/day", "$1.50", "75%", "$3.00", "1970-01-02T16:00:00Z"] {
            assert!(shown.contains(word), "{word}\n{shown}");
        }
        let mut enough = row(Some("a"), 900_000_000);
        forecast(&mut enough, DAY_US + DAY_US / 2);
        assert!(enough["reached_at"].is_null());
    }
}
