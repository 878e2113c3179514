//! The sink as a process: killed at each of its crash points and at any other moment, raced by another, given and taken partitions
//! while it writes, and all that while its files are joined. Afterwards the table is the topic, row by row.
//!
//! `FOREBAY_KILLS` says how often it is killed at any moment; 20 times when absent. Where `FOREBAY_TEST_KAFKA` names an Apache
//! Kafka, what depends on the broker runs there too; where `FOREBAY_TEST_S3` names a bucket, what depends on the store.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "what goes wrong fails the test")]
#![expect(clippy::print_stdout, reason = "what is skipped is said")]

#[path = "sink/rollups.rs"]
mod rollups;
#[path = "sink/s3.rs"]
mod s3;

use arrow::util::display::{ArrayFormatter, FormatOptions};
use datafusion::prelude::SessionContext;
use forebay_analytics::{
    decode::{Decoder, Message},
    guards::{Limits, Scope},
    lake,
    session::Session,
    table::Table,
};
use forebay_broker::{Broker, Config};
use forebay_schemas::{Attempt, Headers, Record as _};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    producer::{FutureProducer, FutureRecord},
    types::RDKafkaErrorCode,
};
use serde_json::json;
use std::{
    collections::BTreeSet,
    os::unix::process::ExitStatusExt as _,
    process::{ExitStatus, Stdio},
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStderr, Command},
    time::timeout,
};
use url::Url;

/// Longer than anything here takes, also on a machine that is busy.
const LIMIT: Duration = Duration::from_secs(180);
const PARTITIONS: i32 = 4;
const SIGABRT: i32 = 6;
const SIGKILL: i32 = 9;
const ATTEMPT: &[u8] = include_bytes!("../../../schemas/golden/v0.1/attempt.avro");

/// A cluster, a folder of tables, and what was written to `attempts` so far.
struct World {
    folder: tempfile::TempDir,
    /// Where the tables lie, and what their store is told.
    tables: (Url, lake::Options),
    /// How often a sink writes, and how often it looks after files.
    flush_ms: u64,
    compact_ms: u64,
    /// How long the group waits for a sink that was killed: less than the usual ten seconds.
    session_ms: u64,
    broker: Option<Broker>,
    servers: String,
    prefix: String,
    producer: FutureProducer,
    /// Of three days in turn: over, so that their files are joined, and not so long ago that they are forgotten.
    first_day_us: i64,
    written: Vec<Attempt>,
}

impl World {
    /// On a broker of its own.
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = Config::new(folder.path().join("broker"), ([127, 0, 0, 1], 0));
        let broker = Broker::start(config).await.unwrap();
        let servers = broker.address().to_string();
        Self::on(folder, servers, Some(broker)).await
    }

    /// On a broker of its own, and on Apache Kafka where there is one.
    async fn everywhere() -> Vec<Self> {
        let mut all = vec![Self::new().await];
        match std::env::var("FOREBAY_TEST_KAFKA") {
            Ok(servers) => all.push(Self::on(tempfile::tempdir().unwrap(), servers, None).await),
            Err(_) => println!("not on Apache Kafka: FOREBAY_TEST_KAFKA is not set"),
        }
        all
    }

    async fn on(folder: tempfile::TempDir, servers: String, broker: Option<Broker>) -> Self {
        let prefix = format!("{}-", uuid::Uuid::now_v7());
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", &servers);
        let admin: AdminClient<DefaultClientContext> = client.create().unwrap();
        let names: Vec<_> = Table::ALL.iter().map(|table| format!("{prefix}{}", table.topic())).collect();
        let topics: Vec<_> =
            Table::ALL.iter().zip(&names).map(|(table, name)| new_topic(*table, name)).collect();
        for made in admin.create_topics(&topics, &AdminOptions::new()).await.unwrap() {
            made.unwrap();
        }
        let producer = client.create().unwrap();
        let first_day_us = (chrono::Utc::now() - chrono::TimeDelta::days(5)).timestamp_micros();
        let tables = (Url::from_directory_path(folder.path().join("tables")).unwrap(), lake::Options::new());
        Self {
            folder,
            tables,
            flush_ms: 100,
            compact_ms: 1_000,
            session_ms: 6_000,
            broker,
            servers,
            prefix,
            producer,
            first_day_us,
            written: Vec::new(),
        }
    }

    /// Writes so many more rows, over three days, and waits until they are there.
    async fn write(&mut self, rows: usize) {
        let sample = Attempt::decode(ATTEMPT).unwrap();
        let first = self.written.len();
        for number in first..first + rows {
            let since = i64::try_from(number).unwrap();
            let started_at = self.first_day_us + since % 3 * 86_400_000_000 + since;
            let attempt_id = format!("{number:08}/0");
            let tenant = format!("tenant-{}", number % 7);
            self.written.push(Attempt { attempt_id, tenant, started_at, ..sample.clone() });
        }
        let sending = self.written[first..].iter().map(|row| async {
            let value = row.encode().unwrap().unwrap();
            let topic = format!("{}{}", self.prefix, Table::Attempts.topic());
            let record = FutureRecord::to(&topic).key(&row.attempt_id).payload(&value);
            self.producer.send(record, LIMIT).await.map(drop).map_err(|(fault, _)| fault)
        });
        futures::future::try_join_all(sending).await.unwrap();
    }

    /// Deletes the topic and makes it again, empty.
    async fn make_anew(&self) {
        let admin: AdminClient<DefaultClientContext> =
            ClientConfig::new().set("bootstrap.servers", &self.servers).create().unwrap();
        let (topic, options) = (format!("{}{}", self.prefix, Table::Attempts.topic()), AdminOptions::new());
        for deleted in admin.delete_topics(&[&topic], &options).await.unwrap() {
            deleted.unwrap();
        }
        let made = async {
            // Apache Kafka says that it is deleted before it is.
            while let Err((_, fault)) =
                admin.create_topics(&[new_topic(Table::Attempts, &topic)], &options).await.unwrap().remove(0)
            {
                assert_eq!(fault, RDKafkaErrorCode::TopicAlreadyExists);
            }
        };
        timeout(LIMIT, made).await.expect("the topic is made");
    }

    /// Waits until a sink has written all that was written to the topic so far, by what it says.
    async fn written_by(&self, told: &mut Told) {
        while self.table().await.len() < self.written.len() {
            told.until(|line| line.contains(WRITTEN)).await;
        }
    }

    /// Starts a sink as a member of this group.
    fn sink(&self, group: &str, arguments: &[&str], crash_at: Option<&str>) -> Child {
        let settings = json!({
            "bootstrap_servers": self.servers,
            "topic_prefix": self.prefix,
            "data": self.folder.path(),
            "tables": self.tables.0,
            "tables_options": self.tables.1,
            "group": format!("{}{group}", self.prefix),
            "flush_ms": self.flush_ms,
            "compact_ms": self.compact_ms,
            "kafka": {"session.timeout.ms": self.session_ms.to_string()},
        });
        let mut command = Command::new(env!("CARGO_BIN_EXE_forebay-sql"));
        command.arg("sink").args(arguments).env("FOREBAY_SQL_SETTINGS", settings.to_string());
        command.env("FOREBAY_LOG", "warn").kill_on_drop(true);
        if let Some(point) = crash_at {
            // What it says is for who reads along, and its last words are those of a crash that is meant.
            command
                .env("FOREBAY_CRASH_AT", point)
                .env("FOREBAY_LOG", "forebay_analytics=debug")
                .stderr(Stdio::piped());
        }
        command.spawn().expect("the sink starts")
    }

    /// Runs a sink to the end of the topics, under a group of its own, so that it waits for nobody.
    async fn to_the_end(&self, group: &str, crash_at: Option<&str>) -> ExitStatus {
        let sink = self.sink(group, &["--once"], crash_at);
        timeout(LIMIT, sink.wait_with_output()).await.expect("the sink ends").unwrap().status
    }

    async fn open(&self, table: Table) -> deltalake_core::DeltaTable {
        lake::open(&self.tables.0, &self.tables.1, table).await.unwrap()
    }

    /// What SQL answers, as lines in order.
    async fn sql(&self, table: Table, columns: &str) -> Vec<String> {
        let session = SessionContext::new();
        let provider = self.open(table).await.table_provider().await.unwrap();
        session.register_table(table.name(), provider).unwrap();
        let sql = format!("select {columns} from {}", table.name());
        lines(&session.sql(&sql).await.unwrap().collect().await.unwrap())
    }

    /// The rows of the table, as lines in order.
    async fn table(&self) -> Vec<String> {
        let columns: Vec<_> = Table::Attempts.columns().iter().map(|column| column.name).collect();
        self.sql(Table::Attempts, &columns.join(", ")).await
    }

    /// How many files the table has now.
    async fn files(&self) -> usize {
        self.open(Table::Attempts).await.snapshot().unwrap().log_data().num_files()
    }

    /// The rows of the topic, in the same form.
    fn topic(&self) -> Vec<String> {
        let message = |(offset, row): (i64, &Attempt)| Message {
            offset,
            timestamp_ms: 0,
            key: None,
            value: row.encode().unwrap().map(Into::into),
            headers: Headers::new(),
        };
        let messages: Vec<Message> = (0..).zip(&self.written).map(message).collect();
        lines(&[Decoder::new(Table::Attempts).unwrap().read(&messages).unwrap().batch])
    }

    /// The table is the topic: as many rows, and the same ones.
    async fn check(&self) {
        let (table, topic) = (self.table().await, self.topic());
        let different: BTreeSet<&String> = table.iter().collect();
        assert_eq!(table.len(), different.len(), "rows are in the table twice");
        assert_eq!(table.len(), topic.len(), "rows are missing");
        let hash = |lines: &[String]| blake3::hash(lines.join("\n").as_bytes());
        assert_eq!(hash(&table), hash(&topic), "rows differ");
    }
}

/// What a sink says when rows are in their table, and when the group has answered it.
const WRITTEN: &str = "rows are in their table";
const JOINED: &str = "partitions came";

/// What a sink says, line by line; for one that was told where to crash, since others say nothing here.
struct Told(Lines<BufReader<ChildStderr>>);

impl Told {
    fn by(sink: &mut Child) -> Self {
        Self(BufReader::new(sink.stderr.take().expect("its words are heard here")).lines())
    }

    /// Waits until it says this.
    async fn until(&mut self, is_meant: impl Fn(&str) -> bool) {
        loop {
            let line = timeout(LIMIT, self.0.next_line()).await.expect("it says so in time").unwrap();
            if is_meant(&line.expect("it runs until it has said so")) {
                return;
            }
        }
    }

    /// It says on into a pipe that is read to its end.
    fn let_go(mut self) {
        tokio::spawn(async move { while let Ok(Some(_)) = self.0.next_line().await {} });
    }
}

/// Dead letters are small, so that what is too large for them need not be large.
fn new_topic(table: Table, name: &str) -> NewTopic<'_> {
    let partitions = if table == Table::Attempts { PARTITIONS } else { 1 };
    let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
    if table == Table::DeadLetters { topic.set("max.message.bytes", "4096") } else { topic }
}

fn lines(batches: &[arrow::array::RecordBatch]) -> Vec<String> {
    let options = FormatOptions::new().with_null("NULL");
    let mut lines = Vec::new();
    for batch in batches {
        let columns = batch.columns().iter().map(|column| ArrayFormatter::try_new(column, &options).unwrap());
        let columns: Vec<_> = columns.collect();
        lines.extend((0..batch.num_rows()).map(|row| {
            columns.iter().map(|column| column.value(row).to_string()).collect::<Vec<_>>().join("|")
        }));
    }
    lines.sort_unstable();
    lines
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_between_any_two_steps_it_goes_on_without_a_row_too_many_or_too_few() {
    let mut world = World::new().await;
    for (number, point) in
        ["sink.written", "sink.checked", "sink.committed", "sink.stored"].into_iter().enumerate()
    {
        for pass in [1, 2, 5] {
            world.write(60).await;
            let ended =
                world.to_the_end(&format!("g{number}-{pass}"), Some(&format!("{point}:{pass}"))).await;
            // A later pass may never come where all is written together; the first always does.
            assert!(ended.signal() == Some(SIGABRT) || pass > 1, "{point}:{pass} {ended}");
        }
    }
    assert!(world.to_the_end("last", None).await.success());
    world.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_moment_while_rows_come_it_loses_and_doubles_none() {
    let kills =
        std::env::var("FOREBAY_KILLS").map_or(20, |kills| kills.parse().expect("FOREBAY_KILLS is a number"));
    let mut world = World::new().await;
    let mut random = SmallRng::seed_from_u64(7);
    for kill in 0..kills {
        // A group of its own each time, so that it need not wait until the one before is missed.
        let mut sink = world.sink(&format!("g{kill}"), &[], Some("nowhere:1"));
        let mut told = Told::by(&mut sink);
        let is_late = random.random_bool(0.7);
        let moment = Duration::from_millis(random.random_range(0..if is_late { 250 } else { 1_500 }));
        let killed = async {
            // Rows may come in one lot or in several; the first is waited for.
            if is_late {
                told.until(|line| line.contains(WRITTEN)).await;
            }
            // It does not end by itself: waited for is the moment of its death.
            assert!(timeout(moment, sink.wait()).await.is_err(), "the sink ended by itself");
            sink.start_kill().unwrap();
            sink.wait().await.unwrap()
        };
        let (ended, ()) = tokio::join!(killed, world.write(random.random_range(100..600)));
        assert_eq!(ended.signal(), Some(SIGKILL));
    }
    let before = world.table().await.len();
    assert!(
        before > world.written.len() / 3,
        "killed too soon to have written: {before} of {}",
        world.written.len()
    );
    assert!(world.to_the_end("last", None).await.success());
    world.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_while_it_joins_files_or_raced_at_it_no_row_is_added_or_taken() {
    let mut world = World::new().await;
    for point in ["compact.written:1", "compact.committed:1", "compact.written:2", "compact.committed:2"] {
        world.write(200).await;
        let sink = world.sink(point, &[], Some(point));
        let ended = timeout(LIMIT, sink.wait_with_output()).await.expect("it joins files").unwrap().status;
        assert_eq!(ended.signal(), Some(SIGABRT), "{point}");
        // It may have died before all rows were written.
        assert!(world.to_the_end(&format!("behind {point}"), None).await.success());
        world.check().await;
    }
    world.write(200).await;
    let mut sinks = ["one", "other"].map(|group| world.sink(group, &[], Some("nowhere:1")));
    for sink in &mut sinks {
        let mut told = Told::by(sink);
        // What the one has joined, the other need not look after any more.
        let done = ["looked after the files", "could not look after the files", "nothing to look after"];
        told.until(|line| line.contains("attempts") && done.iter().any(|done| line.contains(done))).await;
        told.let_go();
    }
    for sink in &mut sinks {
        terminate(sink);
        assert!(timeout(LIMIT, sink.wait()).await.expect("the sink leaves").unwrap().success());
    }
    assert!(world.to_the_end("last", None).await.success());
    world.check().await;
    assert!(world.files().await < 3 * 4, "nothing was joined");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_no_row_becomes_a_dead_letter_and_the_others_their_rows() {
    let mut world = World::new().await;
    world.write(10).await;
    let topic = format!("{}{}", world.prefix, Table::Attempts.topic());
    world.producer.send(FutureRecord::to(&topic).key("k").payload("{"), LIMIT).await.unwrap();
    let large = "x".repeat(100_000);
    world.producer.send(FutureRecord::to(&topic).key("k").payload(&large), LIMIT).await.unwrap();
    world.write(10).await;
    // It dies with the letters written and their offsets not committed, so that they are written again. All is written together, or it
    // might die with rows of another partition.
    world.flush_ms = 3_600_000;
    let ended = world.to_the_end("dies", Some("sink.checked:1")).await;
    assert_eq!(ended.signal(), Some(SIGABRT));
    // What the first run sets aside, the second brings into the table of letters.
    for group in ["first", "second"] {
        assert!(world.to_the_end(group, None).await.success());
    }
    world.check().await;
    let letters = world
        .sql(
            Table::DeadLetters,
            "stage, record, origin_topic, class, attempts, split_part(body_at, ' at ', 1)",
        )
        .await;
    let letter = format!("sink|attempts|{topic}|undecodable|1");
    let (small, large) = (format!("{letter}|NULL"), format!("{letter}|omitted, 100001 bytes"));
    assert_eq!(letters.iter().collect::<BTreeSet<_>>(), BTreeSet::from([&small, &large]));
    assert!(letters.len() > 2, "none is on the topic twice");
    let (tables, options) = world.tables.clone();
    let session = Session::open(tables, options, Limits::default(), Scope::All, None, None).unwrap();
    let once = session
        .collect("SELECT letter, redrives FROM given_up WHERE date >= current_date - 1")
        .await
        .unwrap();
    let once = lines(&once);
    let partition = once[0].split('/').nth(2).unwrap();
    assert!(once.iter().all(|line| line.starts_with(&format!("sink/{topic}/{partition}/"))), "{once:?}");
    assert_eq!(once.len(), 2, "{once:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_made_anew_while_it_is_read_is_another_topic() {
    for (before, after) in [(400, 120), (120, 400)] {
        for mut world in World::everywhere().await {
            world.write(before).await;
            let mut sink = world.sink("one", &[], Some("nowhere:1"));
            let mut told = Told::by(&mut sink);
            world.written_by(&mut told).await;
            // It stands still meanwhile, so that it finds the new topic where the old one was: behind its end, or in its middle.
            signal(&sink, "-STOP");
            world.make_anew().await;
            world.write(after).await;
            signal(&sink, "-CONT");
            world.written_by(&mut told).await;
            world.check().await;
            told.let_go();
            signal(&sink, "-TERM");
            assert!(timeout(LIMIT, sink.wait()).await.expect("the sink leaves").unwrap().success());
            // Whoever comes next begins where the table ends.
            world.write(50).await;
            assert!(world.to_the_end("last", None).await.success());
            world.check().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_read_the_same_partitions_write_each_row_once() {
    for world in World::everywhere().await {
        race(world).await;
    }
}

async fn race(mut world: World) {
    world.write(500).await;
    let mut sinks = [world.sink("one", &["--once"], None), world.sink("other", &["--once"], None)];
    world.write(2_000).await;
    for sink in &mut sinks {
        assert!(timeout(LIMIT, sink.wait()).await.expect("the sink ends").unwrap().success());
    }
    assert!(world.to_the_end("last", None).await.success());
    world.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn run_once_behind_one_that_was_killed_it_waits_for_the_partitions_and_writes_all() {
    for mut world in World::everywhere().await {
        // Longer than a topic may be silent before its end.
        world.session_ms = 20_000;
        let mut killed = world.sink("group", &[], Some("nowhere:1"));
        Told::by(&mut killed).until(|line| line.contains(JOINED)).await;
        killed.kill().await.unwrap();
        world.write(100).await;
        assert!(world.to_the_end("group", None).await.success());
        world.check().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn run_once_it_waits_for_a_broker_that_is_away_and_writes_all() {
    let mut world = World::new().await;
    // More than is fetched at once.
    for _ in 0..50 {
        world.write(1_000).await;
    }
    let mut sink = world.sink("group", &["--once"], Some("nowhere:1"));
    let mut told = Told::by(&mut sink);
    told.until(|line| line.contains(JOINED)).await;
    let broker = world.broker.take().unwrap();
    let address = broker.address();
    broker.shutdown().await;
    told.until(|line| line.contains("try again") || line.contains("tried again")).await;
    told.let_go();
    let config = Config::new(world.folder.path().join("broker"), address);
    world.broker = Some(Broker::start(config).await.unwrap());
    assert!(timeout(LIMIT, sink.wait()).await.expect("the sink leaves").unwrap().success());
    world.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_that_move_while_rows_are_written_are_read_on_where_the_table_ends() {
    for world in World::everywhere().await {
        move_partitions(world).await;
    }
}

async fn move_partitions(mut world: World) {
    let mut first = world.sink("group", &[], None);
    world.write(400).await;
    for _ in 0..4 {
        // It joins while the first writes, takes partitions from it, and gives them back.
        let mut second = world.sink("group", &[], Some("nowhere:1"));
        let mut told = Told::by(&mut second);
        let joined = tokio::spawn(async move {
            told.until(|line| line.contains(JOINED)).await;
            told.let_go();
        });
        for _ in 0..15 {
            world.write(40).await;
            assert!(
                timeout(Duration::from_millis(100), second.wait()).await.is_err(),
                "the sink ended by itself"
            );
        }
        // Told before it listens, it would be killed.
        joined.await.unwrap();
        terminate(&second);
        world.write(100).await;
        assert!(timeout(LIMIT, second.wait()).await.expect("the sink leaves").unwrap().success());
    }
    terminate(&first);
    assert!(timeout(LIMIT, first.wait()).await.expect("the sink leaves").unwrap().success());
    assert!(world.to_the_end("last", None).await.success());
    world.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn told_to_leave_before_kafka_has_answered_it_leaves_well() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let servers = silent.local_addr().unwrap().to_string();
    let settings = json!({"bootstrap_servers": servers, "data": folder.path()});
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay-sql"));
    command.args(["sink", "--until-stdin-closes"]).stdin(Stdio::null()).kill_on_drop(true);
    command.env("FOREBAY_SQL_SETTINGS", settings.to_string()).env("FOREBAY_LOG", "warn");
    let ended = timeout(LIMIT, command.status()).await.expect("the sink leaves").unwrap();
    assert!(ended.success(), "{ended}");
}

fn terminate(sink: &Child) {
    signal(sink, "-TERM");
}

fn signal(sink: &Child, signal: &str) {
    let id = sink.id().expect("it runs").to_string();
    assert!(std::process::Command::new("kill").args([signal, &id]).status().unwrap().success());
}
