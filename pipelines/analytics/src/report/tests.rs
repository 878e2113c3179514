//! The page as a browser gets it, beside the answers that it was made from.

use super::*;
use crate::guards::{Limits, Scope};
use crate::session::tests::Tables;
use crate::table::Table;
use quick_xml::Reader;
use quick_xml::events::Event;
use serde_json::{Value, json};

const TENANT_OF_EVIL: &str = "<script>alert('1')</script>";

/// 14:30 UTC on the third of November.
fn now() -> DateTime<Utc> {
    "2026-11-03T14:30:00Z".parse().unwrap()
}

fn span(back: &str, tenant: Option<&str>) -> Span {
    Span::new(since(back).unwrap(), tenant.map(str::to_owned), now())
}

async fn filled() -> Tables {
    let tables = Tables::new();
    let request = |number: i64, tenant: &str, model: &str, status: &str| {
        let (day, hour) = (1 + number % 3, number % 20);
        json!({
            "request_id": format!("r{number}"), "tenant": tenant, "date": format!("2026-11-{day:02}"),
            "ended_at": format!("2026-11-{day:02}T{hour:02}:30:00Z"), "status": status, "lane": "interactive",
            "cache_status": if number % 4 == 0 { "hit" } else { "miss" }, "model_served": model, "provider": "p",
            "input_tokens": 900, "output_tokens": 100 + number, "billed_nano_usd": 1_000_000 * number, "list_nano_usd": 2_000_000 * number,
            "saved_by_cache_nano_usd": 500 * number, "total_us": 1_000 * number, "infer_us": 500 * number,
            "error_code": if status == "failed" { json!("no_answer") } else { Value::Null },
        })
    };
    let mut rows: Vec<_> = (0..60)
        .map(|number| request(number, "acme", &format!("model-{}", number % 11), "answered"))
        .collect();
    rows.push(request(60, TENANT_OF_EVIL, "a\"b&c", "answered"));
    rows.push(request(61, "acme", "model-1", "failed"));
    tables.add(Table::Outcomes, &rows).await;
    let call = |status: &str| {
        json!({
            "tenant": "acme", "date": "2026-11-02", "started_at": "2026-11-02T03:00:00Z", "status": status, "provider": "p", "model": "m",
            "cost_nano_usd": 5_000, "error_code": if status == "ok" { Value::Null } else { json!("timeout") },
        })
    };
    tables.add(Table::Attempts, &[call("ok"), call("failed")]).await;
    let audit = |number: i64| {
        json!({
            "request_id": format!("r{number}"), "tenant": "acme", "judge": "j<b>", "judge_version": "1", "flagged": number % 7 == 0,
            "audited_at": "2026-11-02T01:00:00Z", "date": "2026-11-02",
        })
    };
    tables.add(Table::Audits, &(0..50).map(audit).collect::<Vec<_>>()).await;
    let label = |number: i64| {
        json!({
            "request_id": format!("r{number}"), "tenant": "acme", "wrong": number % 5 == 0, "labelled_at": "2026-11-02T02:00:00Z",
            "date": "2026-11-02",
        })
    };
    tables.add(Table::Labels, &(0..30).map(label).collect::<Vec<_>>()).await;
    tables
}

async fn made(tables: &Tables, span: &Span) -> String {
    page(&tables.session(Limits::default(), Scope::All), span).await.unwrap()
}

/// What a page holds: of each section its words, the rows of its table and its query; and all elements with their attributes.
#[derive(Debug, Default)]
struct Read {
    sections: BTreeMap<String, Held>,
    elements: Vec<(String, Vec<(String, String)>)>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Held {
    text: String,
    rows: Vec<Vec<String>>,
    query: String,
}

/// Reads a page strictly: every element is closed, in order, and every reference is known.
fn read(page: &str) -> Read {
    let mut reader = Reader::from_str(page);
    let (mut read, mut open, mut section) = (Read::default(), Vec::<String>::new(), String::new());
    loop {
        let event = reader.read_event().unwrap();
        let text = match &event {
            Event::Start(start) | Event::Empty(start) => {
                let name = String::from_utf8(start.name().as_ref().to_vec()).unwrap();
                let attributes = start.attributes().map(|attribute| {
                    let attribute = attribute.unwrap();
                    let key = String::from_utf8(attribute.key.as_ref().to_vec()).unwrap();
                    (key, attribute.unescape_value().unwrap().into_owned())
                });
                read.elements.push((name.clone(), attributes.collect()));
                match name.as_str() {
                    "section" => section.clear(),
                    "tr" => read.sections.entry(section.clone()).or_default().rows.push(Vec::new()),
                    "td" => {
                        let rows = &mut read.sections.get_mut(&section).unwrap().rows;
                        rows.last_mut().unwrap().push(String::new());
                    }
                    _ => {}
                }
                if matches!(event, Event::Start(_)) {
                    open.push(name);
                }
                continue;
            }
            Event::End(_) => {
                open.pop().unwrap();
                continue;
            }
            Event::Text(text) => text.decode().unwrap().into_owned(),
            Event::GeneralRef(reference) => match reference.resolve_char_ref().unwrap() {
                Some(letter) => letter.to_string(),
                None => quick_xml::escape::resolve_predefined_entity(&reference.decode().unwrap())
                    .unwrap()
                    .to_owned(),
            },
            Event::DocType(_) => continue,
            Event::Eof => break,
            other => panic!("{other:?}"),
        };
        if open.last().is_some_and(|name| name == "h2") {
            section.push_str(&text);
        }
        let held = read.sections.entry(section.clone()).or_default();
        held.text.push_str(&text);
        match open.last().map(String::as_str) {
            Some("td") => held.rows.last_mut().unwrap().last_mut().unwrap().push_str(&text),
            Some("code") => held.query.push_str(&text),
            _ => {}
        }
    }
    assert!(open.is_empty(), "{open:?}");
    read
}

impl Read {
    fn section(&self, title: &str) -> &Held {
        self.sections.get(title).unwrap_or_else(|| panic!("there is no section {title}"))
    }
}

/// What SQL answers to the query of a section, as rows of cells.
async fn asked(tables: &Tables, query: &str) -> Vec<Vec<String>> {
    let batches = tables.session(Limits::default(), Scope::All).collect(query).await.unwrap();
    let rows = Answered::of(&batches).unwrap().rows.into_iter();
    rows.map(|row| row.into_iter().map(Option::unwrap_or_default).collect()).collect()
}

#[tokio::test]
async fn every_number_of_the_page_is_the_answer_to_the_query_beside_it() {
    let tables = filled().await;
    for back in ["7d", "48h"] {
        let read = read(&made(&tables, &span(back, None)).await);
        for section in SECTIONS {
            let held = read.section(section.title);
            let answer = asked(&tables, &held.query).await;
            assert!(!answer.is_empty(), "{} has nothing to compare", section.title);
            if matches!(section.drawn, Drawn::Figures) {
                for value in &answer[0] {
                    assert!(held.text.contains(value), "{}: {value} is not in {}", section.title, held.text);
                }
                continue;
            }
            // The first row has the names.
            assert_eq!(held.rows[1..], answer, "{}", section.title);
            let drawn = read.elements.iter().filter(|(name, _)| name == "rect" || name == "circle").count();
            assert!(drawn > 20, "{drawn} marks");
        }
        let quality = &read.section("Quality").rows[1];
        assert_eq!(quality[0], "j<b>");
        assert!(
            quality[3] < quality[2] && quality[2] < quality[4] && quality[5] == "labels_only",
            "{quality:?}"
        );
        // The judge's own share is not on the page: 8 of 50.
        assert!(!read.section("Quality").text.contains("0.16"), "{quality:?}");
    }
}

#[tokio::test]
async fn what_came_from_a_table_is_text_and_nothing_is_fetched() {
    let tables = filled().await;
    let page = made(&tables, &span("7d", None)).await;
    let read = read(&page);
    assert!(read.section("What cost most").rows.iter().flatten().any(|cell| cell == TENANT_OF_EVIL));
    let known = [
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "section", "figure", "svg",
        "desc", "line", "text", "rect", "circle", "polyline", "polygon", "ul", "li", "details", "summary",
        "div", "table", "thead", "tbody", "tr", "th", "td", "pre", "code", "dl", "dt", "dd",
    ];
    for (name, attributes) in &read.elements {
        assert!(known.contains(&name.as_str()), "<{name}> is not ours");
        for (key, value) in attributes {
            let fetches =
                ["src", "href", "xlink:href", "srcset", "action", "style", "data"].contains(&key.as_str());
            assert!(!fetches && !key.starts_with("on") && !value.contains("://"), "<{name} {key}={value:?}>");
        }
    }
    assert!(!CSS.contains("url(") && !CSS.contains("@import"));
    assert!(page.contains("default-src 'none'"));
    // The same name as a predicate, and in the title.
    let narrow = made(&tables, &span("7d", Some(TENANT_OF_EVIL))).await;
    let read = self::read(&narrow);
    assert_eq!(read.section("What cost most").rows.len(), 2);
    assert_eq!(read.section("Cost by tenant").rows.len(), 2);
    assert!(!narrow.contains("<script"));
}

#[tokio::test]
async fn a_plot_says_what_it_shows_and_a_day_without_rows_is_a_gap() {
    let tables = filled().await;
    let page = made(&tables, &span("7d", None)).await;
    let read = read(&page);
    let count = |wanted: &str| read.elements.iter().filter(|(name, _)| name == wanted).count();
    let plots = read.elements.iter().filter(|(name, attributes)| {
        name == "svg" && attributes.contains(&("role".to_owned(), "img".to_owned()))
    });
    for (_, attributes) in plots.clone() {
        let (_, named) = attributes.iter().find(|(key, _)| key == "aria-labelledby").unwrap();
        for id in named.split(' ') {
            let is_it = |(_, attributes): &&(String, Vec<(String, String)>)| {
                attributes.contains(&("id".to_owned(), id.to_owned()))
            };
            assert_eq!(read.elements.iter().filter(is_it).count(), 1, "{id}");
        }
    }
    assert_eq!(plots.count(), count("figure"));
    // Eleven models in eight colors: the others are one.
    assert!(
        read.section("Cost by model").text.contains("5 others"),
        "{}",
        read.section("Cost by model").text
    );
    // Three days of eight have rows, so three dots a line, and a line that goes through them.
    let latency = page.split("<h2>Latency</h2>").nth(1).unwrap().split("</svg>").next().unwrap();
    assert_eq!((latency.matches("<circle").count(), latency.matches("<polyline").count()), (9, 3));
    let quality = page.split("<h2>Quality by day</h2>").nth(1).unwrap().split("</svg>").next().unwrap();
    assert_eq!((quality.matches("<polygon").count(), quality.matches("whisker").count()), (1, 1));
}

#[tokio::test]
async fn a_page_without_rows_says_so() {
    let page = made(&Tables::new(), &span("7d", None)).await;
    assert_eq!(page.matches("There is nothing to show.").count(), SECTIONS.len());
    assert!(!page.contains("<figure>"));
    let read = read(&page);
    assert_eq!(read.sections.len(), SECTIONS.len() + 1);
}

#[tokio::test]
async fn what_is_refused_is_told_in_its_place() {
    let tables = filled().await;
    let labels = ["2026-10-30", "2026-10-31"].map(|day| {
        json!({"request_id": "r1", "tenant": "acme", "wrong": true, "labelled_at": format!("{day}T02:00:00Z"), "date": day})
    });
    tables.add(Table::Labels, &labels).await;
    let narrow = Limits { scan_days: 0, scan_bytes: 0, whole_bytes: 0, ..Limits::default() };
    let page = page(&tables.session(narrow, Scope::All), &span("7d", None)).await.unwrap();
    let read = read(&page);
    assert!(!read.section("Cost by model").text.contains("Not answered"));
    let told = &read.section("Quality").text;
    assert!(
        told.contains("Not answered: table labels holds 3 days") || !told.contains("Not answered"),
        "{told}"
    );
}

#[test]
fn a_span_is_bounded_and_counted_in_days_or_hours() {
    for wrong in ["59m", "367d", "soon"] {
        assert!(since(wrong).is_err(), "{wrong}");
    }
    let week = span("7d", Some("o'hara"));
    assert_eq!(week.bound("{days} {time}"), "date >= DATE '2026-10-27' AND tenant = 'o''hara' date");
    assert_eq!(week.along(false).len(), 8);
    assert_eq!(span("366d", None).along(false).len(), 367);
    let hours = span("24h", None);
    assert!(hours.is_hourly);
    assert_eq!(hours.bound("{days} {time}"), "date >= DATE '2026-11-02' hour");
    let along = hours.along(true);
    assert_eq!(
        (along[0].as_str(), along.last().unwrap().as_str()),
        ("2026-11-02T00:00:00Z", "2026-11-03T14:00:00Z")
    );
}

#[test]
fn what_a_page_may_not_hold_is_escaped_or_shown_as_missing() {
    assert_eq!(escaped("a<b>&\"'\u{0}\n"), "a&lt;b&gt;&amp;&quot;&#39;\u{fffd}\n");
}
