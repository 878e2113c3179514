//! `forebay report`: a page that says what the last days cost, how long they took and how good they were.
//!
//! Each plot is drawn from the answer to one query, and both stand under it: whoever doubts a number asks again.
//!
//! Invariant: the page is whole: showing it fetches nothing. What came from a table, a name or an error is text in it and never markup.

mod plot;

use crate::session::{Error as SessionError, Session};
use crate::settings::Settings;
use crate::shell::{Access, pointed};
use crate::table::TENANT;
use anyhow::Context as _;
use arrow::array::{Array as _, RecordBatch};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use chrono::{DateTime, NaiveDate, TimeDelta, Utc};
use plot::{Form, Plot, Series};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How far back it may go.
const SINCE_MIN: Duration = Duration::from_secs(3_600);
const SINCE_MAX: Duration = Duration::from_secs(366 * 86_400);
/// What changes by the hour is shown by the hour for so long, and by the day beyond.
const HOURLY_MAX: Duration = Duration::from_secs(3 * 86_400);
/// So many names have a color of their own; the others are one.
const SERIES_MAX: usize = 8;
/// The most rows of a table; whoever wants more asks the query.
const ROWS_MAX: usize = 1_000;
const CSS: &str = include_str!("report/page.css");

/// `forebay report`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  forebay report                                    the last seven days, into report.html
  forebay report --since 30d --tenant acme --output acme.html
  forebay report --since 24h --output - | mail -s report …")]
pub struct Args {
    /// How far back it goes, from 1h to 366d. It begins with the first moment of a day in UTC.
    #[arg(long, value_name = "DURATION", default_value = "7d", value_parser = since)]
    since: Duration,
    /// Where the page is written; `-` is standard output.
    #[arg(short, long, value_name = "FILE", default_value = "report.html")]
    output: PathBuf,
    /// Tells of this tenant alone.
    #[arg(long)]
    tenant: Option<String>,
    #[command(flatten)]
    access: Access,
}

fn since(text: &str) -> Result<Duration, String> {
    let since = humantime::parse_duration(text).map_err(|fault| fault.to_string())?;
    if (SINCE_MIN..=SINCE_MAX).contains(&since) {
        Ok(since)
    } else {
        Err("it may be from 1h to 366d".to_owned())
    }
}

/// Writes the page.
pub async fn run(args: Args, settings: Settings) -> anyhow::Result<()> {
    let session = args.access.open(args.access.scope()?, &settings)?;
    let span = Span::new(args.since, args.tenant, Utc::now());
    let page = page(&session, &span).await?;
    if args.output == Path::new("-") {
        io::stdout().write_all(page.as_bytes()).context("could not write the page")?;
    } else {
        let shown = args.output.display();
        std::fs::write(&args.output, page)
            .with_context(|| format!("could not write {shown}; check --output"))?;
        writeln!(io::stderr(), "wrote {shown}")?;
    }
    Ok(())
}

/// What a page tells of.
struct Span {
    from: NaiveDate,
    to: DateTime<Utc>,
    is_hourly: bool,
    tenant: Option<String>,
}

impl Span {
    fn new(since: Duration, tenant: Option<String>, now: DateTime<Utc>) -> Self {
        let from = now - TimeDelta::from_std(since).unwrap_or_default();
        Self { from: from.date_naive(), to: now, is_hourly: since <= HOURLY_MAX, tenant }
    }

    /// A query with its bounds: `{days}` is a predicate, `{time}` the column that goes along.
    fn bound(&self, sql: &str) -> String {
        let mut days = format!("date >= DATE '{}'", self.from);
        if let Some(tenant) = &self.tenant {
            let _ = write!(days, " AND {TENANT} = '{}'", tenant.replace('\'', "''"));
        }
        sql.replace("{days}", &days).replace("{time}", if self.is_hourly { "hour" } else { "date" })
    }

    /// All days, or hours, as SQL shows them: one without rows is a gap and does not vanish.
    fn along(&self, is_hourly: bool) -> Vec<String> {
        let start = self.from.and_time(chrono::NaiveTime::MIN).and_utc();
        let (step, form) = if is_hourly {
            (TimeDelta::hours(1), "%Y-%m-%dT%H:00:00Z")
        } else {
            (TimeDelta::days(1), "%Y-%m-%d")
        };
        let all = std::iter::successors(Some(start), |at| at.checked_add_signed(step));
        let all = all.take_while(|at| *at <= self.to).map(|at| at.format(form).to_string());
        all.take(usize::try_from(SINCE_MAX.as_secs() / 86_400).unwrap_or(usize::MAX) + 1).collect()
    }
}

/// One part of the page.
struct Section {
    title: &'static str,
    meaning: &'static str,
    /// Its query, with `{days}` and `{time}`.
    sql: &'static str,
    drawn: Drawn,
}

/// What becomes of an answer.
enum Drawn {
    /// Its one row is shown large.
    Figures,
    /// Its rows are.
    Table,
    /// Each column behind the first is a series.
    Columns(Form, &'static str),
    /// The second column names the series of the third; a fourth and a fifth are bounds of it.
    Named(Form, &'static str),
}

const SECTIONS: &[Section] = &[
    Section {
        title: "All together",
        meaning: "What was asked and answered, and what it cost: requests as they were billed, and beside that all upstream calls, also \
                  those that failed or were made again.",
        sql: "SELECT sum(requests) AS requests, sum(answered) AS answered, usd(sum(billed_nano_usd)) AS billed_usd,\n       \
              usd(sum(calls_nano_usd)) AS calls_usd, usd(sum(saved_by_cache_nano_usd)) AS saved_by_cache_usd,\n       \
              sum(unpriced) AS without_price\nFROM cost_daily WHERE {days}",
        drawn: Drawn::Figures,
    },
    Section {
        title: "Cost by model",
        meaning: "What each day's requests were billed.",
        sql: "SELECT date, coalesce(model, 'no model') AS model, usd(sum(billed_nano_usd)) AS usd\n\
              FROM cost_by_tenant_model WHERE {days} GROUP BY 1, 2 ORDER BY 1, 2",
        drawn: Drawn::Named(Form::Bars, "USD"),
    },
    Section {
        title: "Cost by tenant",
        meaning: "The same, by whose requests they were.",
        sql: "SELECT date, tenant, usd(sum(billed_nano_usd)) AS usd\n\
              FROM cost_by_tenant_model WHERE {days} GROUP BY 1, 2 ORDER BY 1, 2",
        drawn: Drawn::Named(Form::Bars, "USD"),
    },
    Section {
        title: "Latency",
        meaning: "From accepted to answered: half of the requests took no longer than p50, 95% no longer than p95, 99% no longer than p99. \
                  Only what was answered counts.",
        sql: "SELECT {time}, round(pctl_merge(total_us_state, 0.5) / 1e3, 1) AS p50, round(pctl_merge(total_us_state, 0.95) / 1e3, 1) AS p95,\n       \
              round(pctl_merge(total_us_state, 0.99) / 1e3, 1) AS p99\n\
              FROM outcomes_hourly WHERE {days} AND status = 'answered' GROUP BY 1 ORDER BY 1",
        drawn: Drawn::Columns(Form::Lines, "ms"),
    },
    Section {
        title: "Cache",
        meaning: "How many requests the answer cache answered, how many it was asked for in vain, and how many did not ask it.",
        sql: "SELECT date, sum(hits) AS hits, sum(misses) AS misses, sum(requests - hits - misses) AS bypassed\n\
              FROM cache_savings WHERE {days} GROUP BY 1 ORDER BY 1",
        drawn: Drawn::Columns(Form::Bars, "requests"),
    },
    Section {
        title: "Savings",
        meaning: "What the answer cache and the providers' prefix caches saved. Writing to a prefix cache may cost more than it saves.",
        sql: "SELECT date, usd(sum(saved_by_cache_nano_usd)) AS answer_cache, usd(sum(saved_by_prefix_nano_usd)) AS prefix_caches\n\
              FROM cache_savings WHERE {days} GROUP BY 1 ORDER BY 1",
        drawn: Drawn::Columns(Form::Bars, "USD"),
    },
    Section {
        title: "Quality",
        meaning: "The share of answers that were wrong, by judge and version, corrected by labels of people, with its 95% interval. The method \
                  is prediction_powered where there are labels enough, and labels_only below: then the judge takes no part. Without labels \
                  nothing is known, and the rate is empty.",
        sql: "SELECT judge, judge_version, round(r['rate'], 4) AS rate, round(r['low'], 4) AS low, round(r['high'], 4) AS high,\n       \
              r['method'] AS method, r['labelled'] AS labelled, r['judged'] AS judged\n\
              FROM (SELECT judge, judge_version, hallucination_rate(flagged, label, inclusion_probability) AS r\n      \
              FROM judged WHERE {days} GROUP BY 1, 2) ORDER BY 1, 2",
        drawn: Drawn::Table,
    },
    Section {
        title: "Quality by day",
        meaning: "The same of each day, with the band that the rate may lie in. A day has few labels, so its band is wide.",
        sql: "SELECT date, concat(judge, ' ', judge_version) AS judge, round(r['rate'], 4) AS rate, round(r['low'], 4) AS low,\n       \
              round(r['high'], 4) AS high, r['method'] AS method\n\
              FROM (SELECT date, judge, judge_version, hallucination_rate(flagged, label, inclusion_probability) AS r\n      \
              FROM judged WHERE {days} GROUP BY 1, 2, 3) ORDER BY 1, 2",
        drawn: Drawn::Named(Form::Lines, "of answers wrong, from 0 to 1"),
    },
    Section {
        title: "Errors",
        meaning: "Requests that were not answered, by the code of what went wrong, or by how they ended where there is none.",
        sql: "SELECT {time}, coalesce(error_code, status) AS kind, sum(requests) AS requests\n\
              FROM outcomes_hourly WHERE {days} AND status <> 'answered' GROUP BY 1, 2 ORDER BY 1, 2",
        drawn: Drawn::Named(Form::Bars, "requests"),
    },
    Section {
        title: "Errors of calls",
        meaning: "Upstream calls that came to nothing, by the code of what went wrong.",
        sql: "SELECT {time}, coalesce(error_code, status) AS kind, sum(calls) AS calls\n\
              FROM attempts_hourly WHERE {days} AND status <> 'ok' GROUP BY 1, 2 ORDER BY 1, 2",
        drawn: Drawn::Named(Form::Bars, "calls"),
    },
    Section {
        title: "What cost most",
        meaning: "The twenty dearest pairs of tenant and model.",
        sql: "SELECT tenant, coalesce(model_served, model_requested, 'no model') AS model, usd(sum(billed_nano_usd)) AS usd,\n       \
              sum(requests) AS requests, round(cost_per_1k(rated_nano_usd, rated_tokens), 6) AS usd_per_1k_tokens,\n       \
              round(pctl_merge(total_us_state, 0.95) / 1e3, 1) AS p95_ms\n\
              FROM outcomes_hourly WHERE {days} GROUP BY 1, 2 ORDER BY usd DESC NULLS LAST, 1, 2 LIMIT 20",
        drawn: Drawn::Table,
    },
];

/// An answer as text.
#[derive(Debug, Default)]
struct Answered {
    names: Vec<String>,
    are_numbers: Vec<bool>,
    /// Null is nothing.
    rows: Vec<Vec<Option<String>>>,
}

impl Answered {
    fn of(batches: &[RecordBatch]) -> anyhow::Result<Self> {
        let options = FormatOptions::default();
        let mut answered = Self::default();
        for batch in batches {
            let fields = batch.schema();
            answered.names = fields.fields().iter().map(|field| field.name().clone()).collect();
            answered.are_numbers =
                fields.fields().iter().map(|field| field.data_type().is_numeric()).collect();
            let columns = batch.columns().iter().map(|column| ArrayFormatter::try_new(column, &options));
            let columns: Vec<_> = columns.collect::<Result<_, _>>()?;
            for row in 0..batch.num_rows() {
                let cell = |(column, shown): (&arrow::array::ArrayRef, &ArrayFormatter)| {
                    column.is_valid(row).then(|| shown.value(row).to_string())
                };
                answered.rows.push(batch.columns().iter().zip(&columns).map(cell).collect());
            }
        }
        Ok(answered)
    }

    fn number(row: &[Option<String>], column: usize) -> Option<f64> {
        let value: f64 = row.get(column)?.as_deref()?.parse().ok()?;
        value.is_finite().then_some(value)
    }

    /// The columns behind the first, by what the first says.
    fn columns(&self, along: &[String]) -> Vec<Series> {
        let by_place: BTreeMap<&str, &Vec<Option<String>>> =
            self.rows.iter().filter_map(|row| Some((row.first()?.as_deref()?, row))).collect();
        let of = |(column, name): (usize, &String)| {
            let values = along.iter().map(|place| Self::number(by_place.get(place.as_str())?, column));
            Series { name: name.replace('_', " "), values: values.collect(), bounds: Vec::new() }
        };
        self.names.iter().enumerate().skip(1).map(of).collect()
    }

    /// A series for each name in the second column, the largest first; what is beyond the colors is one.
    fn named(&self, along: &[String], form: Form) -> Vec<Series> {
        let places: BTreeMap<&str, usize> =
            along.iter().enumerate().map(|(index, place)| (place.as_str(), index)).collect();
        let mut all: BTreeMap<&str, Series> = BTreeMap::new();
        for row in &self.rows {
            let [Some(place), Some(name), ..] = row.as_slice() else { continue };
            let Some(&index) = places.get(place.as_str()) else { continue };
            let (values, bounds) = (vec![None; along.len()], vec![None; along.len()]);
            let series = all.entry(name).or_insert_with(|| Series { name: name.clone(), values, bounds });
            series.values[index] = Self::number(row, 2);
            series.bounds[index] = Self::number(row, 3).zip(Self::number(row, 4));
        }
        let mut all: Vec<Series> = all.into_values().collect();
        let total = |series: &Series| series.values.iter().flatten().map(|value| value.abs()).sum::<f64>();
        all.sort_by(|one, other| total(other).total_cmp(&total(one)));
        // Bars add up; lines do not, so those of the least are left to the table.
        let beyond =
            all.split_off(all.len().min(if all.len() > SERIES_MAX { SERIES_MAX - 1 } else { SERIES_MAX }));
        if form == Form::Bars && !beyond.is_empty() {
            let sum =
                |index: usize| beyond.iter().filter_map(|series| series.values[index]).reduce(|a, b| a + b);
            let values = (0..along.len()).map(sum).collect();
            all.push(Series { name: format!("{} others", beyond.len()), values, bounds: Vec::new() });
        }
        all
    }
}

/// The page of a span.
async fn page(session: &Session, span: &Span) -> anyhow::Result<String> {
    let mut body = String::new();
    for (id, section) in SECTIONS.iter().enumerate() {
        let sql = span.bound(section.sql);
        let answer = match session.collect(&sql).await {
            Ok(batches) => {
                Ok(Answered::of(&batches).with_context(|| format!("could not show {}", section.title))?)
            }
            // One question that is refused takes no other with it, and says itself what would be answered.
            Err(SessionError::Refused(refused)) => Err(refused.to_string()),
            Err(fault) => {
                return Err(pointed(&sql, &fault).context(format!("could not tell of {}", section.title)));
            }
        };
        body.push_str(&shown(id, section, span, &sql, answer.as_ref()));
    }
    let (from, to) = (span.from, span.to.format("%Y-%m-%d %H:%M"));
    let whose =
        span.tenant.as_ref().map(|tenant| format!(" of tenant {}", escaped(tenant))).unwrap_or_default();
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>\n\
         <title>Forebay report{whose}, {from} to {to} UTC</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n\
         <h1>Forebay report{whose}</h1>\n<p class=\"faint\">From {from} to {to} UTC. Days are those of UTC; the last is not over. \
         Money is in US dollars at the prices of the table, and no bill.</p>\n{body}</body>\n</html>\n"
    ))
}

fn shown(id: usize, section: &Section, span: &Span, sql: &str, answer: Result<&Answered, &String>) -> String {
    let mut out =
        format!("<section>\n<h2>{}</h2>\n<p>{}</p>\n", escaped(section.title), escaped(section.meaning));
    let mut numbers = String::new();
    match answer {
        Err(refused) => {
            let _ = writeln!(out, "<p class=\"faint\">Not answered: {}</p>", escaped(refused));
        }
        // Sums over nothing are a row of nulls.
        Ok(answer) if !answer.rows.iter().flatten().any(Option::is_some) => {
            out.push_str("<p class=\"faint\">There is nothing to show.</p>\n");
        }
        Ok(answer) => match section.drawn {
            Drawn::Figures => out.push_str(&figures(answer)),
            Drawn::Table => out.push_str(&table(answer)),
            Drawn::Columns(form, unit) | Drawn::Named(form, unit) => {
                let along = span.along(span.is_hourly && section.sql.contains("{time}"));
                let series = match section.drawn {
                    Drawn::Named(..) => answer.named(&along, form),
                    _ => answer.columns(&along),
                };
                let svg =
                    plot::svg(&Plot { id, title: section.title, unit, along: &along, series: &series, form });
                let _ = writeln!(out, "<figure>\n{svg}\n{}</figure>", legend(&series));
                numbers = table(answer);
            }
        },
    }
    let summary = if numbers.is_empty() { "Query" } else { "Numbers and query" };
    let _ = writeln!(
        out,
        "<details><summary>{summary}</summary>\n{numbers}<pre><code>{}</code></pre>\n</details>\n</section>",
        escaped(sql)
    );
    out
}

fn legend(series: &[Series]) -> String {
    let mut out = String::from("<ul class=\"legend\">");
    for (number, series) in series.iter().enumerate() {
        let _ = write!(
            out,
            "<li><svg viewBox=\"0 0 10 10\" aria-hidden=\"true\"><rect class=\"s{number}\" width=\"10\" height=\"10\"/></svg>{}</li>",
            escaped(&series.name)
        );
    }
    out.push_str("</ul>\n");
    out
}

fn figures(answer: &Answered) -> String {
    let mut out = String::from("<dl class=\"figures\">");
    for (index, name) in answer.names.iter().enumerate() {
        let value = answer.rows.first().and_then(|row| row.get(index)).and_then(Option::as_deref);
        let name = escaped(&name.replace('_', " "));
        let _ = write!(out, "<div><dt>{name}</dt><dd>{}</dd></div>", escaped(value.unwrap_or("–")));
    }
    out.push_str("</dl>\n");
    out
}

fn table(answer: &Answered) -> String {
    let mut out = String::from("<div class=\"wide\"><table>\n<thead><tr>");
    let class = |index: usize| match answer.are_numbers.get(index) {
        Some(true) => " class=\"number\"",
        _ => "",
    };
    for (index, name) in answer.names.iter().enumerate() {
        let _ = write!(out, "<th scope=\"col\"{}>{}</th>", class(index), escaped(name));
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    for row in answer.rows.iter().take(ROWS_MAX) {
        out.push_str("<tr>");
        for (index, cell) in row.iter().enumerate() {
            let _ = write!(out, "<td{}>{}</td>", class(index), escaped(cell.as_deref().unwrap_or("")));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody>\n</table></div>\n");
    let more = answer.rows.len().saturating_sub(ROWS_MAX);
    if more > 0 {
        let _ = writeln!(out, "<p class=\"faint\">{more} more rows are not shown; the query has them.</p>");
    }
    out
}

/// Text as text of a page, also inside of quotes. What no page may hold is shown as missing.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(letter),
            letter if letter.is_control() || matches!(letter, '\u{fffe}' | '\u{ffff}') => {
                out.push('\u{fffd}')
            }
            letter => out.push(letter),
        }
    }
    out
}

#[cfg(test)]
mod tests;
