//! Days are rolled up by whoever looks after files: killed at it or raced at it, every row is counted once.

use super::*;
use std::collections::BTreeMap;

impl World {
    /// Rows of each day, as they were written.
    fn days(&self) -> BTreeMap<String, i64> {
        let mut days = BTreeMap::new();
        for row in &self.written {
            let day =
                chrono::DateTime::from_timestamp_micros(row.started_at).unwrap().date_naive().to_string();
            *days.entry(day).or_insert(0) += 1;
        }
        days
    }

    /// What is stored of each day is what it says it was made of, and no more than was written; how many days there are.
    pub(super) async fn check_stored(&self) -> usize {
        let mut stored: BTreeMap<String, (i64, i64)> = BTreeMap::new();
        for line in self.sql(Table::AttemptsHourly, "date, calls, day_rows").await {
            let [day, calls, day_rows] = line.split('|').collect::<Vec<_>>()[..] else {
                unreachable!("{line}")
            };
            let (sum, of) = stored.entry(day.to_owned()).or_insert((0, day_rows.parse().unwrap()));
            assert_eq!(day_rows, of.to_string(), "two roll-ups of {day}");
            *sum += calls.parse::<i64>().unwrap();
        }
        let written = self.days();
        for (day, (sum, of)) in &stored {
            assert!(sum == of && *of <= written[day], "{day}: {sum} calls of {of} rows of {}", written[day]);
        }
        stored.len()
    }

    /// SQL counts every row once, whatever is stored by now.
    pub(super) async fn check_counts(&self) {
        let sql = "SELECT date, sum(calls) FROM attempts_hourly GROUP BY date ORDER BY date";
        let (tables, options) = &self.tables;
        let settings = json!({"tables": tables, "tables_options": options}).to_string();
        let mut command = Command::new(env!("CARGO_BIN_EXE_forebay-sql"));
        command.args(["sql", "--format", "csv", "-c", sql]).env("FOREBAY_SQL_SETTINGS", settings);
        let output = timeout(LIMIT, command.output()).await.expect("it answers").unwrap();
        let told = String::from_utf8(output.stdout).unwrap();
        let expected: Vec<String> =
            self.days().into_iter().map(|(day, rows)| format!("{day},{rows}")).collect();
        assert_eq!(told.lines().skip(1).collect::<Vec<_>>(), expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_while_it_rolls_days_up_or_raced_at_it_each_row_is_counted_once() {
    let mut world = World::new().await;
    for point in ["rollup.written:1", "rollup.committed:1", "rollup.written:3", "rollup.committed:2"] {
        world.write(200).await;
        let sink = world.sink(point, &[], Some(point));
        let ended = timeout(LIMIT, sink.wait_with_output()).await.expect("it rolls days up").unwrap().status;
        assert_eq!(ended.signal(), Some(SIGABRT), "{point}");
        world.check_stored().await;
        // It may have died before all rows were written.
        assert!(world.to_the_end(&format!("behind {point}"), None).await.success());
        world.check().await;
        world.check_counts().await;
    }
    world.write(200).await;
    let mut sinks = ["one", "other"].map(|group| world.sink(group, &[], Some("nowhere:1")));
    for sink in &mut sinks {
        let mut told = Told::by(sink);
        let done = ["looked after", "to look after"];
        told.until(|line| line.contains("attempts") && done.iter().any(|done| line.contains(done))).await;
        told.let_go();
    }
    for sink in &mut sinks {
        terminate(sink);
        assert!(timeout(LIMIT, sink.wait()).await.expect("the sink leaves").unwrap().success());
    }
    assert!(world.to_the_end("last", None).await.success());
    world.check().await;
    assert_eq!(world.check_stored().await, 3);
    world.check_counts().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sink_that_is_run_once_leaves_days_joined_and_rolled_up() {
    let mut world = World::new().await;
    for (group, rows) in [("first", 60), ("second", 90)] {
        world.write(rows).await;
        assert!(world.to_the_end(group, None).await.success());
        assert_eq!((world.files().await, world.check_stored().await), (3, 3), "a file a day");
        world.check().await;
        world.check_counts().await;
    }
    world.write(60).await;
    let mut sink = world.sink("third", &["--once", "--without-compaction"], None);
    assert!(timeout(LIMIT, sink.wait()).await.expect("the sink ends").unwrap().success());
    assert!(world.files().await > 3, "they are left as they are");
    world.check().await;
}
