//! Roll-ups over real Delta tables in a folder: an answer is the same with them and without.

use super::*;
use crate::encode::Encoded;
use crate::guards::Refused;
use crate::session::{
    Error as SessionError,
    tests::{Tables, shown},
};
use crate::views::VIEWS;
use proptest::prelude::*;
use serde_json::{Value, json};
use tables_store::{ObjectStoreExt as _, path::Path};

const DAY_MS: i64 = 86_400_000;
/// The first moment of 2026-11-20 in UTC.
const NOW_MS: i64 = 1_795_132_800_000;

async fn roll(tables: &Tables, source: Table, now_ms: i64) -> usize {
    keep(source, (&tables.root(), &lake::Options::default()), false, now_ms).await.unwrap()
}

/// What a query answers, in order.
async fn lines(tables: &Tables, sql: &str) -> Vec<String> {
    let mut lines: Vec<String> = tables.ask(sql).await.lines().map(str::to_owned).collect();
    lines.sort_unstable();
    lines
}

fn outcome(day: u32, hour: u32, tenant: &str, total_us: i64) -> Value {
    json!({
        "tenant": tenant, "date": format!("2026-11-{day:02}"), "ended_at": format!("2026-11-{day:02}T{hour:02}:30:00Z"),
        "status": "answered", "cache_status": "miss", "lane": "interactive", "model_served": "m", "provider": "p",
        "input_tokens": 900, "output_tokens": 100, "billed_nano_usd": 2_000, "list_nano_usd": 3_000, "total_us": total_us,
        "infer_us": total_us / 2,
    })
}

async fn stored(tables: &Tables, rollup: Table) -> DeltaTable {
    lake::find(&tables.root(), &lake::Options::default(), rollup).await.unwrap().unwrap()
}

/// Days with the number of rows that they were rolled up of.
async fn days(tables: &Tables) -> Vec<(String, Option<i64>)> {
    rows_stored(stored(tables, Table::OutcomesHourly).await.snapshot().unwrap()).into_iter().collect()
}

#[tokio::test]
async fn a_day_is_rolled_up_once_it_is_over_and_again_when_rows_come_late() {
    let tables = Tables::new();
    tables
        .add(Table::Outcomes, &[outcome(18, 3, "a", 10), outcome(18, 3, "a", 30), outcome(19, 3, "a", 5)])
        .await;
    let in_day_19 = NOW_MS - DAY_MS / 2;
    assert_eq!(roll(&tables, Table::Outcomes, in_day_19).await, 1);
    assert_eq!(days(&tables).await, [("2026-11-18".to_owned(), Some(2))]);
    assert_eq!(roll(&tables, Table::Outcomes, in_day_19).await, 0, "nothing came since");

    let asked = "SELECT date, requests, total_us, day_rows, pctl_merge(total_us_state, 0.5) FROM outcomes_hourly \
                 GROUP BY date, requests, total_us, day_rows";
    assert_eq!(lines(&tables, asked).await, ["2026-11-18 2 40 2 10.0", "2026-11-19 1 5  5.0"]);
    tables.add(Table::Outcomes, &[outcome(18, 3, "a", 50)]).await;
    assert_eq!(
        lines(&tables, asked).await,
        ["2026-11-18 3 90  30.0", "2026-11-19 1 5  5.0"],
        "late rows are seen at once"
    );
    assert_eq!(roll(&tables, Table::Outcomes, in_day_19).await, 1);
    assert_eq!(lines(&tables, asked).await, ["2026-11-18 3 90 3 30.0", "2026-11-19 1 5  5.0"]);
    assert_eq!(roll(&tables, Table::Outcomes, NOW_MS + compact::CLOSED_AFTER_MS).await, 1);
    assert_eq!(lines(&tables, asked).await, ["2026-11-18 3 90 3 30.0", "2026-11-19 1 5 1 5.0"]);
    assert_eq!(roll(&tables, Table::Labels, NOW_MS).await, 0, "it has none");
}

#[tokio::test]
async fn days_rolled_up_before_a_column_was_there_are_answered_without_it_and_with_it_once_made_anew() {
    let call = |day: u32, operation: &str| {
        json!({
            "tenant": "a", "date": format!("2026-11-{day:02}"), "started_at": format!("2026-11-{day:02}T03:30:00Z"),
            "status": "ok", "operation": operation, "input_tokens": 7, "duration_us": 10,
        })
    };
    let tables = Tables::new();
    tables.add(Table::Attempts, &[call(17, "chat"), call(18, "chat"), call(18, "embeddings")]).await;
    assert_eq!(roll(&tables, Table::Attempts, NOW_MS).await, 2);
    let asked =
        "SELECT date, operation, sum(calls), max(day_rows) FROM attempts_hourly GROUP BY date, operation";
    assert_eq!(
        lines(&tables, asked).await,
        ["2026-11-17 chat 1 1", "2026-11-18 chat 1 2", "2026-11-18 embeddings 1 2"]
    );

    // As an older version has left it.
    let session = tables.session(Limits::default(), Scope::All);
    let old = session.collect("SELECT * EXCLUDE (operation) FROM attempts_hourly").await.unwrap();
    let folder = lake::location(&tables.root(), Table::AttemptsHourly).to_file_path().unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    std::fs::create_dir_all(&folder).unwrap();
    let made = deltalake_core::DeltaTableBuilder::from_url(Url::from_directory_path(&folder).unwrap());
    made.unwrap().build().unwrap().write(old).with_partition_columns([DATE]).await.unwrap();
    assert_eq!(lines(&tables, asked).await, ["2026-11-17  1 1", "2026-11-18  2 2"]);

    tables.add(Table::Attempts, &[call(18, "rerank")]).await;
    assert_eq!(roll(&tables, Table::Attempts, NOW_MS).await, 1);
    assert_eq!(
        lines(&tables, asked).await,
        ["2026-11-17  1 1", "2026-11-18 chat 1 3", "2026-11-18 embeddings 1 3", "2026-11-18 rerank 1 3"]
    );
}

#[tokio::test]
async fn what_is_rolled_up_outlives_its_rows() {
    let tables = Tables::new();
    tables.add(Table::Outcomes, &[outcome(1, 3, "a", 10), outcome(2, 3, "a", 30)]).await;
    roll(&tables, Table::Outcomes, NOW_MS).await;
    let costs = "SELECT date, requests, billed_nano_usd FROM cost_daily";
    let before = lines(&tables, costs).await;
    // In the evening of the last day on which the second is kept.
    let later = NOW_MS + i64::from(Table::Outcomes.days_kept() - 18) * DAY_MS + DAY_MS / 2;
    let mut facts = stored(&tables, Table::Outcomes).await;
    assert_eq!(compact::keep(Table::Outcomes, &mut facts, later).await.unwrap().forgotten, 1);
    assert_eq!(lines(&tables, "SELECT count(*) FROM outcomes").await, ["1"]);
    assert_eq!(lines(&tables, costs).await, before);
    // What comes for a day that is forgotten does not take the place of what was known of it.
    tables.add(Table::Outcomes, &[outcome(1, 4, "a", 10)]).await;
    assert_eq!(roll(&tables, Table::Outcomes, later).await, 0);
    assert_eq!(lines(&tables, costs).await, before);
}

#[tokio::test]
async fn of_two_that_start_from_one_version_the_second_is_refused() {
    let tables = Tables::new();
    let (root, options) = (tables.root(), lake::Options::default());
    tables.add(Table::Outcomes, &[outcome(18, 3, "a", 10), outcome(18, 4, "b", 30)]).await;
    let rollup = Table::OutcomesHourly;
    let mut one = lake::open(&root, &options, rollup).await.unwrap();
    let other = lake::open(&root, &options, rollup).await.unwrap();
    let (on, count) = compact::newest(rollup, &mut one.clone()).await.unwrap();
    assert_eq!(roll(&tables, Table::Outcomes, NOW_MS).await, 1);
    // What the other would commit now is the same day once more.
    let file = stored(&tables, rollup).await.snapshot().unwrap().log_data().iter().next().unwrap();
    let path = file.path().replace("rolled-", "again-");
    let bytes =
        other.object_store().get(&Path::from(file.path().as_ref())).await.unwrap().bytes().await.unwrap();
    let date = compact::date(&file).unwrap();
    let file = Encoded { date, rows: 2, stats: file.stats().unwrap(), unpacked: 0, bytes: bytes.to_vec() };
    let again = lake::write(&other, &path, file, 0).await.unwrap();
    let operation = DeltaOperation::Write { mode: SaveMode::Append, partition_by: None, predicate: None };
    let refused = compact::commit(rollup, &other, (&on, count), vec![Action::Add(again)], operation).await;
    assert!(format!("{:?}", refused.unwrap_err()).contains("ConcurrentTransaction"));
    assert_eq!(lines(&tables, "SELECT sum(requests) FROM outcomes_hourly").await, ["2"]);
    one.update_state().await.unwrap();
    assert_eq!(one.snapshot().unwrap().log_data().num_files(), 1);
}

#[tokio::test]
async fn two_at_once_come_to_one_roll_up() {
    let tables = Tables::new();
    for day in 10..16 {
        tables.add(Table::Outcomes, &[outcome(day, 3, "a", 10), outcome(day, 4, "b", 30)]).await;
    }
    let (root, options) = (tables.root(), lake::Options::default());
    let work = || keep(Table::Outcomes, (&root, &options), false, NOW_MS);
    // Whichever is refused does not mind: the other did it, or the next time will.
    let (_, _) = tokio::join!(work(), work());
    work().await.unwrap();
    assert_eq!(days(&tables).await.len(), 6);
    assert_eq!(
        lines(&tables, "SELECT sum(requests), count(*), min(day_rows) FROM outcomes_hourly").await,
        ["12 12 2"]
    );
    let files = stored(&tables, Table::OutcomesHourly).await.snapshot().unwrap().log_data().num_files();
    assert_eq!(files, 6, "a file a day");
}

#[tokio::test]
async fn a_user_sees_their_own_hours_and_years_may_be_read_where_they_are_rolled_up() {
    let tables = Tables::new();
    tables
        .add(Table::Outcomes, &[outcome(17, 3, "a", 10), outcome(18, 3, "b", 30), outcome(18, 5, "a", 30)])
        .await;
    let narrow = Limits { scan_days: 1, whole_bytes: 0, ..Limits::default() };
    let refused = tables.session(narrow, Scope::All).collect("SELECT * FROM cost_daily").await.unwrap_err();
    assert!(
        matches!(refused, SessionError::Refused(Refused::Unbounded { table: "outcomes", .. })),
        "{refused}"
    );
    assert_eq!(roll(&tables, Table::Outcomes, NOW_MS).await, 2);
    tables.add(Table::Outcomes, &[outcome(19, 3, "b", 10)]).await;
    let session = tables.session(narrow, Scope::Tenants(vec!["b".to_owned()]));
    let told = session.collect("SELECT date, requests FROM cost_daily ORDER BY date").await.unwrap();
    assert_eq!(shown(&told), "2026-11-18 1\n2026-11-19 1");
    let told = session.collect("SELECT count(*) FROM outcomes_hourly WHERE tenant = 'a'").await.unwrap();
    assert_eq!(shown(&told), "0");
}

/// One thing that happens to the tables.
#[derive(Clone, Debug)]
enum Step {
    /// Rows of a day come, of so many requests and calls.
    Come { day: u32, seed: u64, rows: u64 },
    /// Days are rolled up, as of the morning of that day.
    RollUp { day: u32 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1..5u32, any::<u64>(), prop_oneof![1..6u64, Just(180)])
            .prop_map(|(day, seed, rows)| Step::Come { day, seed, rows }),
        2 => (2..7u32).prop_map(|day| Step::RollUp { day }),
    ]
}

/// A number below `below` that follows from the seed.
fn pick(seed: &mut u64, below: u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 33) % below
}

/// A row whose every column may be what it may be.
fn any_outcome(day: u32, seed: &mut u64) -> Value {
    let mut one_of = |words: &[Value]| {
        let count = u64::try_from(words.len()).unwrap();
        words[usize::try_from(pick(seed, count)).unwrap()].clone()
    };
    let (tenant, model) = (one_of(&[json!("a"), json!("b")]), one_of(&[json!("m"), json!("n"), Value::Null]));
    let status = one_of(&[json!("answered"), json!("answered"), json!("answered"), json!("failed")]);
    let cache = one_of(&[json!("hit"), json!("miss"), json!("bypass")]);
    let billed = one_of(&[Value::Null, json!(0), json!(2_000)]);
    let saved = one_of(&[Value::Null, json!(0), json!(700)]);
    let (input, output) = (one_of(&[Value::Null, json!(900)]), one_of(&[Value::Null, json!(100), json!(7)]));
    let (hour, us) = (pick(seed, 24), i64::try_from(pick(seed, 1_000_000)).unwrap());
    let ttft = if us % 3 == 0 { Value::Null } else { json!(us / 5) };
    json!({
        "tenant": tenant, "date": format!("2026-11-{day:02}"), "ended_at": format!("2026-11-{day:02}T{hour:02}:30:00Z"),
        "status": status, "cache_status": cache, "lane": "interactive", "model_served": model, "model_requested": "m",
        "provider": "p", "input_tokens": input, "output_tokens": output, "billed_nano_usd": billed,
        "list_nano_usd": 3_000, "saved_by_cache_nano_usd": saved, "total_us": us, "infer_us": us / 2, "queue_us": us / 7,
        "ttft_us": ttft, "attempts": 1,
    })
}

fn any_attempt(day: u32, seed: &mut u64) -> Value {
    let (hour, us) = (pick(seed, 24), pick(seed, 1_000_000));
    let cost = if us % 2 == 0 { Value::Null } else { json!(us) };
    json!({
        "tenant": if us % 3 == 0 { "a" } else { "b" }, "date": format!("2026-11-{day:02}"),
        "started_at": format!("2026-11-{day:02}T{hour:02}:10:00Z"), "status": if us % 5 == 0 { "failed" } else { "ok" },
        "provider": "p", "model": "m", "duration_us": us, "cost_nano_usd": cost, "stage": "infer",
    })
}

/// Everything that can be asked of roll-ups, as it is answered.
async fn all_answers(tables: &Tables) -> Vec<Vec<String>> {
    let mut answers = Vec::new();
    for view in VIEWS {
        answers.push(lines(tables, &format!("SELECT * FROM {}", view.name)).await);
    }
    for rollup in Table::ROLLUPS {
        answers.push(lines(tables, &format!("SELECT * EXCEPT (day_rows) FROM {}", rollup.name())).await);
    }
    let bounded = "SELECT tenant, sum(requests), pctl_merge(total_us_state, 0.99) FROM outcomes_hourly \
                   WHERE date >= '2026-11-02' AND hour < '2026-11-04T12:00:00Z' GROUP BY tenant";
    answers.push(lines(tables, bounded).await);
    answers
}

#[test]
fn an_answer_is_the_same_whatever_was_rolled_up_when() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let cases = ProptestConfig {
        cases: 6,
        max_shrink_iters: 10,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(cases, |(steps in proptest::collection::vec(step(), 3..9))| {
        runtime.block_on(async {
            let (rolled, plain) = (Tables::new(), Tables::new());
            let mut days_rolled = 0;
            for step in steps {
                match step {
                    Step::Come { day, mut seed, rows } => {
                        let outcomes: Vec<_> = (0..rows).map(|_| any_outcome(day, &mut seed)).collect();
                        let attempts: Vec<_> = (0..rows).map(|_| any_attempt(day, &mut seed)).collect();
                        for tables in [&rolled, &plain] {
                            tables.add(Table::Outcomes, &outcomes).await;
                            tables.add(Table::Attempts, &attempts).await;
                        }
                    }
                    Step::RollUp { day } => {
                        let now_ms = NOW_MS - i64::from(20 - day) * DAY_MS + 2 * compact::CLOSED_AFTER_MS;
                        days_rolled += roll(&rolled, Table::Outcomes, now_ms).await;
                        days_rolled += roll(&rolled, Table::Attempts, now_ms).await;
                    }
                }
            }
            let (with, without) = (all_answers(&rolled).await, all_answers(&plain).await);
            assert_eq!(with, without, "{days_rolled} days were rolled up");
            let end_ms = NOW_MS - 10 * DAY_MS;
            roll(&rolled, Table::Outcomes, end_ms).await;
            roll(&rolled, Table::Attempts, end_ms).await;
            assert_eq!(all_answers(&rolled).await, without, "all days are rolled up");
            let unstored = "SELECT count(*) FROM outcomes_hourly WHERE day_rows IS NULL";
            assert_eq!(lines(&rolled, unstored).await, ["0"]);
        });
    });
}
