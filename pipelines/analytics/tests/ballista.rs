//! SQL past one machine, as processes: a scheduler and executors over generated tables answer as one process does, each user sees the
//! rows of theirs, executors and the scheduler are killed in the middle, and where nobody can answer somebody says so.

#![expect(clippy::unwrap_used, clippy::panic, reason = "what goes wrong fails the test")]

use arrow::{array::RecordBatch, json::ReaderBuilder, util::pretty::pretty_format_batches};
use forebay_analytics::{
    cluster::Cluster,
    functions::Prices,
    guards::{Limits, Scope},
    lake,
    session::Session,
    table::Table,
};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy},
    net::{TcpListener, TcpStream},
    sync::Notify,
    time::{Instant, sleep},
};
use url::Url;

/// Longer than anything here takes, also on a machine that is busy.
const LIMIT: Duration = Duration::from_secs(120);
const PRICES: &str = r#"{
    "big": {"input_cost_per_token": 1e-06, "output_cost_per_token": 4e-06, "cache_read_input_token_cost": 1e-07},
    "small": {"input_cost_per_token": 1.5e-07, "output_cost_per_token": 6e-07}
}"#;
/// Each row of a day with each other of it: seconds of work behind an exchange of rows.
const LONG: &str = "SELECT a.date, count(*) AS pairs, count(DISTINCT a.tenant || b.tenant) AS tenants \
    FROM attempts AS a JOIN attempts AS b ON a.date = b.date GROUP BY a.date ORDER BY a.date";

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_forebay-sql"))
}

/// A folder with generated tables, verdicts and labels.
struct World {
    folder: tempfile::TempDir,
}

/// A process, killed where it is dropped.
struct Process {
    child: Child,
    address: String,
    /// Of how many it told, of what is counted of it: tasks that were done, jobs that were taken back, or jobs that were asked about.
    told: Arc<AtomicUsize>,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    /// Starts it, waits until it says its address, and counts its lines with a text, those that go on alike once.
    fn start(mut command: Command, text: &'static str) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let said =
            lines.find_map(|line| Some(line.split_once(" of SQL at ")?.1.split(' ').next()?.to_owned()));
        let address = said.unwrap_or_else(|| panic!("it ended before it listened"));
        let told = Arc::<AtomicUsize>::default();
        let counted = Arc::clone(&told);
        std::thread::spawn(move || {
            let mut known = BTreeSet::new();
            for line in lines {
                if let Some((_, rest)) = line.split_once(text) {
                    known.insert(rest.to_owned());
                    counted.store(known.len(), Ordering::Relaxed);
                }
            }
        });
        Self { child, address, told }
    }

    fn scheduler() -> Self {
        Self::scheduler_counting("Job cancelled")
    }

    fn scheduler_counting(text: &'static str) -> Self {
        let mut command = program();
        command.args(["sql", "scheduler", "--listen", "127.0.0.1:0"]).env(
            "FOREBAY_LOG",
            "warn,ballista_scheduler=info,ballista_scheduler::scheduler_server::grpc=trace",
        );
        Self::start(command, text)
    }

    /// How many executors a scheduler knows.
    async fn executors(&self) -> usize {
        self.ready().await.0
    }

    /// The same, and how many tasks they take at a time.
    async fn ready(&self) -> (usize, usize) {
        let mut connection = TcpStream::connect(&self.address).await.unwrap();
        connection.write_all(b"GET /readyz HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await.unwrap();
        let (_, told) = answer.trim_end().rsplit_once("ready: ").unwrap();
        let (executors, tasks) = told.split_once(" executors, ").unwrap();
        (executors.parse().unwrap(), tasks.strip_suffix(" tasks").unwrap().parse().unwrap())
    }
}

/// Waits until it is so.
async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !is_so().await {
        assert!(Instant::now() < end, "{what} did not come");
        sleep(Duration::from_millis(20)).await;
    }
}

impl World {
    async fn new(rows: u32) -> Self {
        let world = Self { folder: tempfile::tempdir().unwrap() };
        let rows = rows.to_string();
        let made = program()
            .args(["generate", "--rows", &rows, "--days", "5", "--until", "2026-11-10", "--files", "3"])
            .env("FOREBAY_TABLES", world.root().as_str())
            .env("FOREBAY_LOG", "warn")
            .status();
        assert!(made.unwrap().success());
        std::fs::write(world.folder.path().join("prices.json"), PRICES).unwrap();
        world.judge().await;
        world
    }

    fn root(&self) -> Url {
        Url::from_directory_path(self.folder.path().join("tables")).unwrap()
    }

    /// What a judge said of 600 answers, and people of every second of them.
    async fn judge(&self) {
        let of = |number: u32| {
            let id = format!("r{number}");
            let tenant = if number.is_multiple_of(3) { "tenant-000" } else { "tenant-001" };
            json!({"tenant": tenant, "request_id": id, "generation": 0, "date": format!("2026-11-0{}", 1 + number % 4)})
        };
        let with = |mut row: Value, more: Value| {
            row.as_object_mut().unwrap().append(&mut more.as_object().unwrap().clone());
            row
        };
        let audits = (0..600).map(|number| {
            let judge =
                json!({"judge": "critic", "judge_version": "1", "audited_at": "2026-11-05T10:00:00Z"});
            with(with(of(number), judge), json!({"flagged": number % 5 < 2}))
        });
        let labels = (0..600).step_by(2).map(|number| {
            with(of(number), json!({"wrong": number % 5 == 0, "labelled_at": "2026-11-06T10:00:00Z"}))
        });
        self.add(Table::Audits, audits.collect()).await;
        self.add(Table::Labels, labels.collect()).await;
    }

    async fn add(&self, table: Table, mut rows: Vec<Value>) {
        use forebay_analytics::table::Kind;
        for column in table.columns().iter().filter(|column| !column.nullable) {
            let empty = match column.kind {
                Kind::Text => json!("-"),
                Kind::Boolean => json!(false),
                Kind::Time => json!("2026-11-02T00:00:00Z"),
                Kind::Date => json!("2026-11-02"),
                _ => json!(0),
            };
            for row in &mut rows {
                row.as_object_mut().unwrap().entry(column.name).or_insert(empty.clone());
            }
        }
        let text = rows.iter().map(Value::to_string).collect::<Vec<_>>().join("\n");
        let reader = ReaderBuilder::new(table.schema()).build(text.as_bytes()).unwrap();
        let batches: Vec<RecordBatch> = reader.map(Result::unwrap).collect();
        let opened = lake::open(&self.root(), &lake::Options::default(), table).await.unwrap();
        opened.write(batches).await.unwrap();
    }

    fn executor(&self, scheduler: &Process, name: &str) -> Process {
        let folder = self.folder.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        let mut command = program();
        command
            .args(["sql", "executor", "--listen", "127.0.0.1:0", "--tasks", "2", "--scheduler"])
            .arg(&scheduler.address)
            .arg("--folder")
            .arg(folder)
            .arg("--prices")
            .arg(self.folder.path().join("prices.json"))
            .env("FOREBAY_TABLES", self.root().as_str())
            // Its tasks are counted by what it tells of them.
            .env("FOREBAY_LOG", "warn,ballista_executor::executor_server=info");
        Process::start(command, "Finished task")
    }

    /// The jobs that have rows at an executor: a folder each.
    fn jobs(&self, name: &str) -> BTreeSet<PathBuf> {
        let entries = |folder: &Path| {
            let entries = std::fs::read_dir(folder).into_iter().flatten().map_while(Result::ok);
            entries.map(|entry| entry.path()).collect::<Vec<_>>()
        };
        let own = entries(&self.folder.path().join(name));
        own.iter().flat_map(|own| entries(&own.join("rows"))).collect()
    }

    fn session(&self, limits: Limits, scope: Scope) -> Session {
        let prices = Prices::default().with_table("prices.json", PRICES, 0).unwrap();
        let options = lake::Options::default();
        Session::open(self.root(), options, limits, scope, Some(Arc::new(prices)), None).unwrap()
    }

    /// Asks this process and the cluster, which must answer alike; the answer.
    async fn compare(&self, scheduler: &Process, scope: &Scope, sql: &str) -> String {
        let local = self.session(Limits::default(), scope.clone());
        let far = self.session(Limits::default(), scope.clone()).on(Cluster::new(scheduler.address.clone()));
        let expected = shown(&local.collect(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}")));
        let answer = far.collect(sql).await.unwrap_or_else(|error| panic!("on a cluster, {sql}: {error:?}"));
        assert_eq!(shown(&answer), expected, "{sql}");
        expected
    }
}

/// The answer as text: a column of views of text shows as a column of text does.
fn shown(batches: &[RecordBatch]) -> String {
    let batches: Vec<_> = batches.iter().filter(|batch| batch.num_rows() > 0).cloned().collect();
    pretty_format_batches(&batches).unwrap().to_string()
}

async fn refused(world: &World, scheduler: &Process, scope: Scope, sql: &str) -> String {
    let far = world.session(Limits::default(), scope).on(Cluster::new(scheduler.address.clone()));
    match far.collect(sql).await {
        Ok(answer) => panic!("{sql} was answered: {}", shown(&answer)),
        Err(error) => error.to_string(),
    }
}

/// A cluster of so many executors that all have come.
async fn cluster(world: &World, names: &[&str]) -> (Process, Vec<Process>) {
    let scheduler = Process::scheduler();
    let executors: Vec<_> = names.iter().map(|name| world.executor(&scheduler, name)).collect();
    until("an executor", async || scheduler.executors().await == names.len()).await;
    (scheduler, executors)
}

const QUERIES: &[&str] = &[
    // Plain.
    "SELECT count(*), sum(billed_nano_usd), min(ended_at), max(ended_at) FROM outcomes",
    "SELECT tenant, status, count(*), sum(total_us) FROM outcomes GROUP BY 1, 2 ORDER BY 1, 2",
    "SELECT request_id, tenant, total_us FROM outcomes WHERE date = '2026-11-07' ORDER BY total_us DESC, request_id LIMIT 20",
    "SELECT date, count(DISTINCT tenant) FROM outcomes WHERE ended_at >= '2026-11-06T12:00:00Z' GROUP BY date ORDER BY date",
    "SELECT o.status, a.status, count(*) FROM outcomes o LEFT JOIN attempts a \
        ON o.tenant = a.tenant AND o.request_id = a.request_id GROUP BY 1, 2 ORDER BY 1, 2",
    "SELECT tenant, total_us, row_number() OVER (PARTITION BY tenant ORDER BY total_us, request_id) AS nth \
        FROM outcomes WHERE date = '2026-11-08' ORDER BY tenant, nth LIMIT 30",
    "SELECT tenant FROM outcomes WHERE billed_nano_usd > (SELECT avg(billed_nano_usd) * 5 FROM outcomes) ORDER BY tenant, request_id",
    "SELECT 'o' AS what, count(*) FROM outcomes UNION ALL SELECT 'a', count(*) FROM attempts UNION ALL SELECT 'p', count(*) FROM payloads ORDER BY 1",
    "SELECT * FROM labels ORDER BY tenant, request_id LIMIT 5",
    // Our functions.
    "SELECT tenant, sum(cost('big', input_tokens, cached_read_tokens, cached_write_tokens, output_tokens)) AS nano_usd FROM outcomes \
        GROUP BY tenant ORDER BY tenant",
    "SELECT model_served, pctl(total_us, 0.5), pctl(total_us, 0.99) FROM outcomes GROUP BY 1 ORDER BY 1",
    "SELECT round(max(tps(output_tokens, infer_us)), 6), usd(sum(billed_nano_usd)) FROM outcomes",
    "SELECT tenant, round(cost_per_1k(billed_nano_usd, output_tokens), 9) FROM outcomes GROUP BY 1 ORDER BY 1",
    "SELECT round(r['rate'], 9), round(r['low'], 9), r['method'], r['labelled'], r['judged'] FROM \
        (SELECT hallucination_rate(flagged, label, inclusion_probability) AS r FROM judged)",
    "SELECT round(false_hit_bound(count(*) FILTER (WHERE wrong), count(*), 0.95), 9) FROM labels",
    // Our views and roll-ups.
    "SELECT * FROM cost_daily ORDER BY date, tenant",
    "SELECT date, tenant, judge, round(rate, 9), labelled, judged FROM quality ORDER BY date, tenant",
    "SELECT tenant, sum(requests), pctl_merge(total_us_state, 0.9) FROM outcomes_hourly GROUP BY 1 ORDER BY 1",
];

#[tokio::test(flavor = "multi_thread")]
async fn two_executors_answer_as_one_process_does() {
    let world = World::new(4_000).await;
    let (scheduler, executors) = cluster(&world, &["one", "two"]).await;
    for sql in QUERIES {
        world.compare(&scheduler, &Scope::All, sql).await;
    }
    // In as many parts as the executors take tasks at a time, however few rows there are.
    assert_eq!(scheduler.ready().await, (2, 4));
    let parts = async |sql: &str, far: Session| {
        let plan = shown(&far.collect(&format!("EXPLAIN {sql}")).await.unwrap());
        let counts = plan.split("], ").filter_map(|text| text.split(')').next()?.parse::<usize>().ok());
        (counts.collect::<BTreeSet<_>>(), plan)
    };
    let far = || world.session(Limits::default(), Scope::All).on(Cluster::new(scheduler.address.clone()));
    for sql in ["SELECT tenant, count(*) FROM outcomes GROUP BY 1", "SELECT * FROM cost_daily", LONG] {
        let (counts, plan) = parts(sql, far()).await;
        assert_eq!(counts, BTreeSet::from([4]), "{sql}: {plan}");
        let set = far().with_option("datafusion.execution.target_partitions", "3").unwrap();
        let (counts, plan) = parts(sql, set).await;
        assert_eq!(counts, BTreeSet::from([3]), "{sql}: {plan}");
    }
    for executor in &executors {
        until("a task of each executor", async || executor.told.load(Ordering::Relaxed) > 0).await;
    }
    // From the command line too, where what is no question of tables is answered without the cluster.
    let answered = program()
        .args([
            "sql",
            "--format",
            "csv",
            "-c",
            "SELECT count(*) AS n FROM labels; SELECT 1 AS one",
            "--scheduler",
        ])
        .arg(&scheduler.address)
        .env("FOREBAY_TABLES", world.root().as_str())
        .output()
        .unwrap();
    let [told, wrong] = [answered.stdout, answered.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert_eq!((told.as_str(), wrong.as_str()), ("n\n300\none\n1\n", ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn guards_hold_on_a_cluster_and_what_it_cannot_do_is_said() {
    let world = World::new(1_000).await;
    let (scheduler, _executors) = cluster(&world, &["one"]).await;
    let one = Scope::Tenants(vec!["tenant-000".to_owned()]);
    let seen = world.compare(&scheduler, &one, "SELECT DISTINCT tenant FROM outcomes").await;
    assert!(seen.contains("tenant-000") && !seen.contains("tenant-001"), "{seen}");
    // On rows of others nothing of a query is worked out: it would fail there.
    let prying =
        "SELECT count(*) FROM outcomes WHERE 1 / (CASE WHEN tenant = 'tenant-000' THEN 1 ELSE 0 END) = 1";
    world.compare(&scheduler, &one, prying).await;
    for sql in ["SELECT count(*), sum(billed_nano_usd) FROM cost_daily", "SELECT count(*) FROM judged"] {
        world.compare(&scheduler, &one, sql).await;
    }
    let all = world
        .compare(&scheduler, &Scope::All, "SELECT count(DISTINCT tenant) > 1 AS several FROM outcomes")
        .await;
    assert!(all.contains("true"), "{all}");

    let check = async |scope: &Scope, sql: &str, expected: &str| {
        let said = refused(&world, &scheduler, scope.clone(), sql).await;
        assert!(said.contains(expected), "{sql}: {said}");
    };
    check(&Scope::All, "SELECT count(*) FROM requests_live", "ask without --scheduler, or ask outcomes")
        .await;
    check(&Scope::All, "SELECT * FROM kafka('outcomes')", "ask without --scheduler").await;
    check(&Scope::All, "EXPLAIN ANALYZE SELECT count(*) FROM outcomes", "or write EXPLAIN").await;
    check(&one, "EXPLAIN ANALYZE SELECT count(*) FROM outcomes", "users of all tenants").await;
    check(&Scope::All, "SELECT nothing FROM outcomes", "nothing").await;
    check(&Scope::All, "DELETE FROM outcomes", "written by the sink").await;
    check(&Scope::All, "SELECT 1 / (total_us - total_us) FROM outcomes", "DivideByZero").await;
    let mixed = "SELECT count(*) FROM outcomes, information_schema.tables";
    check(&Scope::All, mixed, "or each on its own").await;

    // A bound on time is asked for by who asks.
    let narrow = Limits { scan_days: 1, whole_bytes: 0, ..Limits::default() };
    let far = world.session(narrow, Scope::All).on(Cluster::new(scheduler.address.clone()));
    let said = far.collect("SELECT count(*) FROM outcomes").await.unwrap_err().to_string();
    assert!(said.contains("no bound on its time"), "{said}");

    // Prices are those of who asks.
    let other = Prices::default().with_table("other.json", &PRICES.replace("4e-06", "5e-06"), 0).unwrap();
    let options = lake::Options::default();
    let far =
        Session::open(world.root(), options, Limits::default(), Scope::All, Some(Arc::new(other)), None);
    let far = far.unwrap().on(Cluster::new(scheduler.address.clone()));
    let said = far.collect("SELECT sum(cost('big', input_tokens, 0, 0, output_tokens)) FROM outcomes").await;
    let said = said.unwrap_err().to_string();
    assert!(said.contains("other tables of prices than who asks"), "{said}");

    // Who waits no longer has the work stopped.
    let far = world.session(Limits::default(), Scope::All).on(Cluster::new(scheduler.address.clone()));
    let before = world.jobs("one");
    let asked = tokio::spawn(async move { far.collect(LONG).await.map(|_| ()) });
    until("a stage of it", async || !world.jobs("one").is_subset(&before)).await;
    asked.abort();
    until("a job that is taken back", async || scheduler.told.load(Ordering::Relaxed) > 0).await;
    world.compare(&scheduler, &Scope::All, "SELECT count(*) FROM outcomes").await;
}

/// A way to the scheduler on which no answer to a query comes before it is let through; its address.
async fn held_back(scheduler: &Process, let_through: Arc<Notify>) -> String {
    let (listener, to) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), scheduler.address.clone());
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        // First it is asked how many tasks are worked on at a time, and then whether there still are executors.
        for is_held in std::iter::repeat_n(false, 2).chain(std::iter::repeat(true)) {
            let (mut asks, mut is_answered) = listener.accept().await.unwrap().0.into_split();
            let (mut answers, mut is_asked) = TcpStream::connect(&to).await.unwrap().into_split();
            let let_through = Arc::clone(&let_through);
            tokio::spawn(async move { copy(&mut asks, &mut is_asked).await });
            tokio::spawn(async move {
                if is_held {
                    let_through.notified().await;
                    let_through.notify_one();
                }
                copy(&mut answers, &mut is_answered).await
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_that_is_dropped_before_the_scheduler_has_answered_is_told_to_end_too() {
    let world = World::new(3_000).await;
    let (scheduler, _executors) = cluster(&world, &["one"]).await;
    let let_through = Arc::<Notify>::default();
    let address = held_back(&scheduler, Arc::clone(&let_through)).await;
    let far = world.session(Limits::default(), Scope::All).on(Cluster::new(address));
    let asked = tokio::spawn(async move { far.collect(LONG).await.map(|_| ()) });
    until("a stage of it", async || !world.jobs("one").is_empty()).await;
    asked.abort();
    assert!(asked.await.unwrap_err().is_cancelled());
    let_through.notify_one();
    until("a job that is taken back", async || scheduler.told.load(Ordering::Relaxed) > 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_executor_that_is_killed_in_the_middle_costs_time_and_no_row() {
    let world = World::new(3_000).await;
    let (scheduler, mut executors) = cluster(&world, &["one", "two"]).await;
    let local = world.session(Limits::default(), Scope::All);
    let far = world.session(Limits::default(), Scope::All).on(Cluster::new(scheduler.address.clone()));
    let asked = tokio::spawn(async move { far.collect(LONG).await.map(|rows| shown(&rows)) });
    // It holds rows of the first stage, which the second needs.
    until("a stage at the first executor", async || !world.jobs("one").is_empty()).await;
    drop(executors.remove(0));
    assert!(!asked.is_finished(), "it was answered before the executor was killed; ask for more");
    let answer = asked.await.unwrap().unwrap();
    assert_eq!(answer, shown(&local.collect(LONG).await.unwrap()));
}

const TOKEN: &str = "ana-token-of-at-least-32-characters";

/// Where a program that serves SQL listens for HTTP and for clients of PostgreSQL.
fn serving(world: &World, scheduler: &Process) -> (Process, String) {
    let users = world.folder.path().join("users.json");
    let hash = blake3::hash(TOKEN.as_bytes()).to_hex();
    let ana = json!({"users": {"ana": {"tenants": ["*"], "token_blake3": hash.as_str()}}});
    std::fs::write(&users, ana.to_string()).unwrap();
    let mut command = program();
    command
        .args(["sql", "--listen", "127.0.0.1:0", "--pg", "127.0.0.1:0", "--scheduler", &scheduler.address])
        .arg("--users")
        .arg(users)
        .env("FOREBAY_TABLES", world.root().as_str());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let mut address = |text: &str| {
        let line = lines.next().unwrap();
        let port = line.rsplit_once("127.0.0.1:").and_then(|(_, rest)| rest.split_once('/'));
        assert!(line.contains(text), "{line}");
        format!("127.0.0.1:{}", port.unwrap().0)
    };
    let (http, pg) = (address("over HTTP"), address("PostgreSQL"));
    std::thread::spawn(move || lines.for_each(drop));
    (Process { child, address: http, told: Arc::default() }, pg)
}

async fn posted(address: String, sql: &str) -> String {
    let mut connection = TcpStream::connect(address).await.unwrap();
    let length = sql.len();
    let head =
        format!("POST /v1/sql HTTP/1.0\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {length}\r\n\r\n");
    connection.write_all(format!("{head}{sql}").as_bytes()).await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    answer
}

/// What a command said on both streams, and how it ended.
async fn ran(mut command: Command) -> (Option<i32>, String) {
    let ran = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let said = [ran.stdout, ran.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (ran.status.code(), said)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scheduler_that_is_killed_in_the_middle_is_named_with_what_to_do_next() {
    let world = World::new(6_000).await;
    // Asked about by whoever has heard that it was taken.
    let scheduler = Process::scheduler_counting("get_job_status request for job");
    let _executor = world.executor(&scheduler, "one");
    until("an executor", async || scheduler.executors().await == 1).await;
    let (server, pg) = serving(&world, &scheduler);

    let mut shell = program();
    shell
        .args(["sql", "-c", LONG, "--scheduler", &scheduler.address])
        .env("FOREBAY_TABLES", world.root().as_str());
    let has_psql = Command::new("psql").arg("--version").output().is_ok();
    assert!(
        has_psql || std::env::var_os("CI").is_none(),
        "there is no psql; apt-get install postgresql-client"
    );
    let mut psql = Command::new("psql");
    let (host, port) = pg.split_once(':').unwrap();
    psql.args(["-X", "-h", host, "-p", port, "-U", "ana", "forebay", "-c", LONG]).env("PGPASSWORD", TOKEN);
    let http = server.address.clone();
    let http = async move { (Some(1), posted(http, LONG).await) };
    let mut asked = vec![("forebay-sql: ", tokio::spawn(ran(shell))), ("HTTP/1.0 503 ", tokio::spawn(http))];
    if has_psql {
        asked.push(("ERROR:  ", tokio::spawn(ran(psql))));
    }
    until("all jobs", async || scheduler.told.load(Ordering::Relaxed) == asked.len()).await;
    let address = scheduler.address.clone();
    assert!(asked.iter().all(|(_, asked)| !asked.is_finished()), "it was answered before; ask for more");
    // As kill -9 does.
    drop(scheduler);
    for (begins, asked) in asked {
        let (code, said) = asked.await.unwrap();
        assert_eq!(code, Some(1), "{said}");
        let what = format!("the scheduler at {address} was lost while the query ran (");
        let next = "the query was not answered, and nothing was changed; see whether `forebay sql scheduler` runs there and ask \
            again, or leave --scheduler out, and it is answered here";
        assert!(said.starts_with(begins) && said.contains(&what) && said.contains(next), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn executors_that_all_are_killed_in_the_middle_are_missed_and_the_query_ends() {
    let world = World::new(3_000).await;
    let (scheduler, executors) = cluster(&world, &["one"]).await;
    let far = world.session(Limits::default(), Scope::All).on(Cluster::new(scheduler.address.clone()));
    let asked = tokio::spawn(async move { far.collect(LONG).await.map(|rows| shown(&rows)) });
    until("a stage of it", async || !world.jobs("one").is_empty()).await;
    drop(executors);
    let address = &scheduler.address;
    let start = format!("start some by `forebay sql executor --scheduler {address}` and ask again");
    let lost = format!(
        "the scheduler at {address} lost all its executors while they worked on the query, and none came again; it was not answered, and \
        nothing was changed; {start}, or leave --scheduler out, and it is answered here"
    );
    // The scheduler may have met nobody there when the first query went on, or meet it when it gives the work of this one away.
    let missing = format!(
        "the scheduler at {address} has no executor, and none came within 10s; {start}, or leave --scheduler out, and it is answered here"
    );
    let said = refused(&world, &scheduler, Scope::All, "SELECT count(*) FROM outcomes").await;
    assert!(said == lost || said == missing, "{said}");
    assert_eq!(asked.await.unwrap().unwrap_err().to_string(), lost);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_that_nobody_can_answer_says_what_is_missing() {
    let world = World::new(100).await;
    let ask = "SELECT count(*) FROM outcomes";
    let scheduler = Process::scheduler();
    let said = refused(&world, &scheduler, Scope::All, ask).await;
    let expected = format!(
        "the scheduler at {0} has no executor, and none came within 10s; start some by `forebay sql executor --scheduler {0}` \
        and ask again, or leave --scheduler out, and it is answered here",
        scheduler.address
    );
    assert_eq!(said, expected);
    let address = scheduler.address.clone();
    drop(scheduler);
    let far = world.session(Limits::default(), Scope::All).on(Cluster::new(address.clone()));
    let said = far.collect(ask).await.unwrap_err().to_string();
    let expected = format!(
        "there is no scheduler at {address}, so the query was not asked; see whether `forebay sql scheduler` runs there and ask again, \
        or leave --scheduler out, and it is answered here"
    );
    assert_eq!(said, expected);
    // Somebody else listens there, and resets the connection as it leaves what was asked unread.
    let stranger = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = stranger.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        loop {
            let (mut asked, _) = stranger.accept().await.unwrap();
            asked.write_all(b"SSH-2.0-x\r\n").await.unwrap();
            asked.peek(&mut [0]).await.unwrap();
        }
    });
    let far = world.session(Limits::default(), Scope::All).on(Cluster::new(address.clone()));
    let said = far.collect(ask).await.unwrap_err().to_string();
    assert_eq!(
        said,
        format!("{address} is no scheduler of SQL: it answered \"SSH-2.0-x\"; check --scheduler")
    );
}
