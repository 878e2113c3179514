//! `forebay sql`: queries from the command line, a file, a pipe, or a shell with history and completion.
//!
//! Invariant: standard output holds answers and nothing else. A query that fails ends a script with its place, and in the shell only itself.

use crate::cluster::{self, Cluster};
use crate::format::{self, Format};
use crate::functions::{FUNCTIONS, Prices};
use crate::guards::{Limits, Scope, Users};
use crate::http;
use crate::kafka_table;
use crate::live::{self, Live};
use crate::pg;
use crate::session::{Error, Session};
use crate::settings::Settings;
use crate::table::Table;
use crate::views::{VIEWS, View};
use anyhow::{Context as _, anyhow, bail};
use arrow::datatypes::{DataType, Schema};
use forebay_runtime::host::kafka::Kafka;
use rustyline::completion::{Completer, Pair};
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::Validator;
use rustyline::{CompletionType, Config, Editor, Helper};
use std::fmt::Write as _;
use std::fs;
use std::io::{self, IsTerminal as _, Read as _, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// The largest file of queries, of users or of prices.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Lines that the history keeps.
const HISTORY_MAX: usize = 10_000;

/// `forebay sql`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  forebay sql                                                    a shell; \\? says what it knows
  forebay sql -c \"SELECT * FROM cost_daily WHERE date >= current_date - 7\"
  forebay sql -f report.sql --format csv > report.csv
  forebay sql -c \"SELECT * FROM focus_1_3\" --format parquet --output focus.parquet
  forebay sql --scheduler sql.internal:50050 -f year.sql         on the machines of a cluster"
)]
pub struct Args {
    /// What is started instead of asking.
    #[command(subcommand)]
    part: Option<Part>,
    /// Answers this and leaves; several queries are separated by semicolons.
    #[arg(short, long, value_name = "QUERY", conflicts_with = "file")]
    command: Option<String>,
    /// Answers what stands in a file; `-` is standard input.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// How answers are written.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Where the answer is written, instead of standard output.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Says on standard error how long each query took.
    #[arg(long)]
    timing: bool,
    /// Answers `POST /v1/sql` on this address, such as 127.0.0.1:8432, to the users of --users.
    #[arg(long, value_name = "ADDRESS", requires = "users", conflicts_with_all = ["command", "file", "output", "user"])]
    listen: Option<String>,
    /// Speaks the PostgreSQL wire protocol on this address, such as 127.0.0.1:5432, to the users of --users; a token is the password.
    #[arg(long, value_name = "ADDRESS", requires = "users", conflicts_with_all = ["command", "file", "output", "user"])]
    pg: Option<String>,
    #[command(flatten)]
    access: Access,
}

/// A part of a cluster.
#[derive(Clone, Debug, clap::Subcommand)]
enum Part {
    /// Takes queries, and gives their tasks to executors.
    Scheduler(cluster::scheduler::Args),
    /// Works tasks of queries out, over the tables that its own settings name.
    Executor(Box<cluster::executor::Args>),
}

/// Who asks, and what that may take.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Access {
    /// Asks as this user of the file of users, and sees the tenants of that user alone.
    #[arg(long, requires = "users", env = "FOREBAY_SQL_USER")]
    user: Option<String>,
    /// The file of users: {"users": {"ana": {"tenants": ["acme"]}}}; "*" is all tenants.
    #[arg(long, value_name = "FILE", env = "FOREBAY_SQL_USERS")]
    users: Option<PathBuf>,
    /// Tables of prices for cost(), such as `old.json,2026-12-01=new.json`.
    #[arg(long, value_name = "FILES", env = "FOREBAY_PRICES")]
    prices: Option<String>,
    /// The memory that queries may take, in MiB; what is more goes to disk.
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(64..=1_048_576))]
    memory: u32,
    /// How long a query may run, such as 30s or 10m.
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = humantime::parse_duration)]
    deadline: Duration,
    /// Days of a table that a query may read without a bound on its time.
    #[arg(long, value_name = "DAYS", default_value_t = Limits::default().scan_days)]
    scan_days: u32,
    /// Bytes of a table that a query may read without a bound on its time.
    #[arg(long, value_name = "BYTES", default_value_t = Limits::default().scan_bytes)]
    scan_bytes: u64,
    /// Messages of a topic that a query may read by kafka().
    #[arg(long, value_name = "COUNT", default_value_t = Limits::default().messages)]
    messages: u64,
    /// Has queries worked out by the executors of this scheduler, such as 127.0.0.1:50050.
    #[arg(long, value_name = "ADDRESS", env = "FOREBAY_SQL_SCHEDULER")]
    scheduler: Option<String>,
    /// Sets an option of DataFusion, such as datafusion.execution.target_partitions=2: for whoever measures.
    #[arg(long = "set", value_name = "NAME=VALUE", hide = true, value_parser = option)]
    options: Vec<(String, String)>,
}

fn option(text: &str) -> Result<(String, String), String> {
    let parts = text.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    parts.ok_or_else(|| "an option is written as NAME=VALUE".to_owned())
}

/// Runs the command to its end.
pub async fn run(mut args: Args, settings: Settings) -> anyhow::Result<()> {
    match args.part.take() {
        Some(Part::Scheduler(args)) => return cluster::scheduler::run(args).await,
        Some(Part::Executor(args)) => return cluster::executor::run(*args, settings).await,
        None => {}
    }
    if args.format == Format::Parquet && args.output.is_none() {
        bail!("--format parquet writes a file; name it with --output");
    }
    if args.listen.is_some() || args.pg.is_some() {
        return listen(&args, &settings).await;
    }
    let session = args.access.open(args.access.scope()?, &settings)?;
    let text = match (&args.command, &args.file) {
        (Some(command), _) => Some(command.clone()),
        (None, Some(file)) if file.as_os_str() != "-" => Some(read(file)?),
        (None, Some(_)) => Some(read_input()?),
        (None, None) if !io::stdin().is_terminal() => Some(read_input()?),
        (None, None) => None,
    };
    match text {
        Some(text) => {
            let answered = tokio::select! {
                answered = script(&session, &args, &text) => answered,
                // Alone, it would end by the signal; others who work for it must hear of it too.
                _ = tokio::signal::ctrl_c(), if args.access.scheduler.is_some() => Err(anyhow!("stopped")),
            };
            session.leave().await;
            answered
        }
        None => {
            let left = Shell { session: session.clone(), timing: args.timing, args, settings }.run().await;
            session.leave().await;
            left
        }
    }
}

/// Serves HTTP and the PostgreSQL protocol, whichever is asked for, until Ctrl-C or SIGTERM.
async fn listen(args: &Args, settings: &Settings) -> anyhow::Result<()> {
    let Some(path) = &args.access.users else {
        bail!("who serves needs the file of users; name it with --users")
    };
    let users = Users::read(&path.display().to_string(), &read(path)?)?;
    let session = args.access.open(Scope::All, settings)?;
    let ending = CancellationToken::new();
    let mut serving = JoinSet::new();
    if let Some(address) = &args.listen {
        let listener = bind(address, "--listen").await?;
        writeln!(io::stderr(), "SQL over HTTP at http://{}/v1/sql", listener.local_addr()?)?;
        let (session, users) = (session.scoped(Scope::All), users.clone());
        serving.spawn(http::serve(listener, session, users, ending.clone().cancelled_owned()));
    }
    if let Some(address) = &args.pg {
        let listener = bind(address, "--pg").await?;
        writeln!(
            io::stderr(),
            "SQL for PostgreSQL clients at postgresql://USER@{}/forebay",
            listener.local_addr()?
        )?;
        serving.spawn(pg::serve(listener, session, users, ending.clone().cancelled_owned()));
    }
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::spawn(async move {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        ending.cancel();
    });
    while let Some(served) = serving.join_next().await {
        served??;
    }
    Ok(())
}

async fn bind(address: &str, flag: &str) -> anyhow::Result<TcpListener> {
    let bound = TcpListener::bind(address).await;
    bound.with_context(|| format!("could not listen on {address}; choose another address by {flag}"))
}

impl Access {
    /// Whose rows who asks may see.
    pub(crate) fn scope(&self) -> anyhow::Result<Scope> {
        Ok(match (&self.users, &self.user) {
            (Some(path), Some(user)) => {
                let file = path.display().to_string();
                Users::read(&file, &read(path)?)?.scope(&file, user)?
            }
            (Some(_), None) => {
                bail!("--users is given and --user is not; say who asks with --user, or leave --users out")
            }
            (None, _) => Scope::All,
        })
    }

    /// A session within these limits.
    pub(crate) fn open(&self, scope: Scope, settings: &Settings) -> anyhow::Result<Session> {
        let limits = Limits {
            memory_bytes: usize::try_from(self.memory)? << 20,
            deadline: self.deadline,
            scan_bytes: self.scan_bytes,
            scan_days: self.scan_days,
            messages: self.messages,
            ..Limits::default()
        };
        let prices = self.prices.as_deref().map(prices).transpose()?.flatten();
        let options = settings.tables_options.clone().into_iter().collect();
        let live = match settings.kafka() {
            Some(kafka) => Some(Live::new(Kafka::new(&kafka)?, settings.topic(live::TABLE.topic()))),
            None => None,
        };
        let mut session = Session::open(settings.tables_url()?, options, limits, scope, prices, live)?;
        if let Some(scheduler) = &self.scheduler {
            cluster::executor::host_and_port(scheduler, "--scheduler")?;
            session = session.on(Cluster::new(scheduler.clone()));
        }
        for (name, value) in &self.options {
            session = session
                .with_option(name, value)
                .with_context(|| format!("could not set {name}; check --set"))?;
        }
        Ok(session)
    }
}

/// `old.json,2026-12-01=new.json`: tables of prices, each from midnight UTC of its day on.
pub(crate) fn prices(text: &str) -> anyhow::Result<Option<Arc<Prices>>> {
    let files: Vec<&str> = text.split(',').map(str::trim).filter(|file| !file.is_empty()).collect();
    if files.is_empty() {
        return Ok(None);
    }
    let mut prices = Prices::default();
    for file in files {
        let (day, file) =
            file.split_once('=').map_or((None, file), |(day, file)| (Some(day.trim()), file.trim()));
        let from_us = match day {
            None => 0,
            Some(day) => {
                let day: chrono::NaiveDate = day.parse().with_context(|| {
                    format!("{file} holds from {day:?} on; write a day such as 2026-12-01")
                })?;
                day.and_time(chrono::NaiveTime::MIN).and_utc().timestamp_micros()
            }
        };
        prices = prices.with_table(file, &read(Path::new(file))?, from_us)?;
    }
    Ok(Some(Arc::new(prices)))
}

fn read(path: &Path) -> anyhow::Result<String> {
    let read = || {
        let mut text = String::new();
        fs::File::open(path)?.take(FILE_BYTES_MAX).read_to_string(&mut text)?;
        io::Result::Ok(text)
    };
    read().with_context(|| format!("could not read {}", path.display()))
}

fn read_input() -> anyhow::Result<String> {
    let mut text = String::new();
    io::stdin()
        .lock()
        .take(FILE_BYTES_MAX)
        .read_to_string(&mut text)
        .context("could not read standard input")?;
    Ok(text)
}

/// Answers all queries of a text, and stops at the first that fails.
async fn script(session: &Session, args: &Args, text: &str) -> anyhow::Result<()> {
    let statements = session.parse(text).map_err(|error| pointed(text, &error))?;
    if statements.is_empty() {
        bail!("there is no query; write one, such as SELECT 1");
    }
    if statements.len() > 1 && args.format == Format::Parquet {
        bail!("a file of Parquet holds one answer, and there are {} queries; ask one", statements.len());
    }
    let mut file = args
        .output
        .as_ref()
        .map(|path| {
            fs::File::create(path)
                .with_context(|| format!("could not make {}; check --output", path.display()))
        })
        .transpose()?;
    for statement in statements {
        let started = Instant::now();
        let answered = async {
            let answer = session.query(statement).await?;
            match &mut file {
                Some(file) => format::write(answer, args.format, io::BufWriter::new(file)).await,
                None => format::write(answer, args.format, io::BufWriter::new(io::stdout())).await,
            }
        };
        match answered.await {
            Ok(rows) => told(args.timing, rows, started.elapsed())?,
            // `forebay sql … | head` has seen enough.
            Err(error) if is_unread(&error) => return Ok(()),
            Err(format::Error::Query(error)) => return Err(pointed(text, &error)),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Whether nobody reads what is written. Arrow's writers keep only the text of the cause.
fn is_unread(error: &format::Error) -> bool {
    match error {
        format::Error::Io(fault) => fault.kind() == io::ErrorKind::BrokenPipe,
        format::Error::Rows { source, .. } => source.to_string().contains("Broken pipe"),
        _ => false,
    }
}

fn told(timing: bool, rows: u64, took: Duration) -> io::Result<()> {
    if timing {
        let row_word = if rows == 1 { "row" } else { "rows" };
        writeln!(io::stderr(), "{rows} {row_word} in {:.1} ms", took.as_secs_f64() * 1_000.0)?;
    }
    Ok(())
}

/// The error, with the line of the query under it and a mark at the place.
pub(crate) fn pointed(text: &str, error: &Error) -> anyhow::Error {
    let mut message = String::new();
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        let text = error.to_string();
        if !message.contains(&text) {
            let separator = if message.is_empty() { "" } else { ": " };
            let _ = write!(message, "{separator}{text}");
        }
        cause = error.source();
    }
    if let Error::Query { at: Some((line, column)), .. } = error
        && let (Ok(line), Ok(column)) = (usize::try_from(*line), usize::try_from(*column))
        && let Some(shown) = text.lines().nth(line.saturating_sub(1))
    {
        let _ = write!(message, "\n  {shown}\n  {:width$}^", "", width = column.saturating_sub(1));
    }
    anyhow::Error::msg(message)
}

struct Shell {
    session: Session,
    timing: bool,
    args: Args,
    settings: Settings,
}

/// What the shell knows beside SQL.
const COMMANDS: &[(&str, &str)] = &[
    ("\\d", "tables, views and functions"),
    ("\\d NAME", "the columns of a table or view, with units and meanings"),
    ("\\timing", "says how long each query takes, or no longer"),
    ("\\?", "this"),
    ("\\q", "leaves, as Ctrl-D does"),
];

impl Shell {
    async fn run(mut self) -> anyhow::Result<()> {
        let config = Config::builder()
            .max_history_size(HISTORY_MAX)?
            .history_ignore_space(true)
            .completion_type(CompletionType::List)
            .build();
        let mut editor: Editor<Words, DefaultHistory> = Editor::with_config(config)?;
        editor.set_helper(Some(Words(words(&self.session))));
        let history = self.settings.data.join("sql-history");
        // Not there before the first query.
        let _ = editor.load_history(&history);
        writeln!(
            io::stderr(),
            "SQL over {}. A query ends with a semicolon; \\? helps, \\q leaves.",
            self.settings.tables_url()?
        )?;
        let mut query = String::new();
        loop {
            let prompt = if query.is_empty() { "forebay> " } else { "      -> " };
            match tokio::task::block_in_place(|| editor.readline(prompt)) {
                Ok(line) if query.is_empty() && line.trim_start().starts_with('\\') => {
                    editor.add_history_entry(line.trim())?;
                    if self.command(line.trim()).await? {
                        break;
                    }
                }
                Ok(line) => {
                    query.push_str(&line);
                    query.push('\n');
                    if query.trim().is_empty() {
                        query.clear();
                    } else if query.trim_end().ends_with(';') {
                        editor.add_history_entry(query.trim())?;
                        self.answer(&std::mem::take(&mut query)).await?;
                    }
                }
                // What was begun is dropped, as psql does.
                Err(ReadlineError::Interrupted) => query.clear(),
                Err(ReadlineError::Eof) => break,
                Err(fault) => return Err(fault.into()),
            }
        }
        // Whoever cannot keep a history can still ask.
        let _ = editor.append_history(&history);
        Ok(())
    }

    /// Answers queries; Ctrl-C stops them and not the shell.
    async fn answer(&self, text: &str) -> io::Result<()> {
        let args = Args { timing: self.timing, ..self.args.clone() };
        tokio::select! {
            answered = script(&self.session, &args, text) => match answered {
                Ok(()) => Ok(()),
                Err(error) => writeln!(io::stderr(), "{error:#}"),
            },
            _ = tokio::signal::ctrl_c() => writeln!(io::stderr(), "stopped"),
        }
    }

    /// Whether the shell is to be left.
    async fn command(&mut self, line: &str) -> io::Result<bool> {
        let (word, rest) =
            line.split_once(char::is_whitespace).map_or((line, ""), |(word, rest)| (word, rest.trim()));
        let mut out = io::stdout();
        match (word, rest.trim_end_matches(';')) {
            ("\\q", _) => return Ok(true),
            ("\\timing", _) => {
                self.timing = !self.timing;
                writeln!(out, "timing is {}", if self.timing { "on" } else { "off" })?;
            }
            ("\\?", _) => {
                for (command, meaning) in COMMANDS {
                    writeln!(out, "  {command:<10} {meaning}")?;
                }
            }
            ("\\d", "") => out.write_all(listed().as_bytes())?,
            ("\\d", name) => match self.session.columns(name).await {
                Ok(Some(schema)) => out.write_all(described(name, &schema).as_bytes())?,
                Ok(None) => writeln!(io::stderr(), "there is no table or view {name:?}; \\d lists them")?,
                Err(error) => writeln!(io::stderr(), "{:#}", pointed("", &error))?,
            },
            _ => writeln!(io::stderr(), "there is no command {word}; \\? lists them")?,
        }
        Ok(false)
    }
}

/// What there is, in columns.
fn listed() -> String {
    let mut text = String::new();
    for table in Table::ALL {
        let _ = writeln!(
            text,
            "table     {:<22} one row of {}; by {}",
            table.name(),
            table.topic(),
            table.time_column()
        );
    }
    for table in Table::ROLLUPS {
        let _ = writeln!(text, "table     {:<22} {} by the hour, added up", table.name(), table.topic());
    }
    for view in VIEWS {
        let meaning = view.meaning();
        let first = meaning.split_once(": ").map_or(meaning.as_str(), |(first, _)| first);
        let _ = writeln!(text, "view      {:<22} {}", view.name, first.trim_end_matches('.'));
    }
    let _ = writeln!(text, "view      {:<22} outcomes, and what is not in that table yet", live::NAME);
    let _ = writeln!(text, "topic     {}", kafka_table::CALL);
    for function in FUNCTIONS {
        let kind = if function.is_aggregate { "aggregate" } else { "function" };
        let _ = writeln!(text, "{kind:<9} {}", function.call);
    }
    text
}

/// The columns of one table or view.
fn described(name: &str, schema: &Schema) -> String {
    let table = if name == live::NAME { Some(live::TABLE) } else { Table::find(name) };
    let told: Vec<(&str, &str, &str)> = match (table, View::find(name)) {
        (Some(table), _) => {
            table.columns().iter().map(|column| (column.name, column.unit, column.meaning)).collect()
        }
        (None, Some(view)) => {
            view.columns().iter().map(|column| (column.name, column.unit, column.meaning)).collect()
        }
        (None, None) => Vec::new(),
    };
    let mut text = String::new();
    for field in schema.fields() {
        let (_, unit, meaning) =
            told.iter().find(|(name, ..)| *name == field.name()).copied().unwrap_or_default();
        let kind = sql_type(field.data_type());
        let null = if field.is_nullable() { "" } else { "not null" };
        let line = format!("{:<26} {kind:<10} {null:<9} {unit:<14} {meaning}", field.name());
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// A type as SQL calls it.
pub(crate) fn sql_type(kind: &DataType) -> String {
    match kind {
        DataType::Utf8 | DataType::Utf8View | DataType::LargeUtf8 => "text".to_owned(),
        DataType::Int32 => "integer".to_owned(),
        DataType::Int64 => "bigint".to_owned(),
        DataType::Float64 => "double".to_owned(),
        DataType::Boolean => "boolean".to_owned(),
        DataType::Timestamp(..) => "timestamp".to_owned(),
        DataType::Date32 => "date".to_owned(),
        DataType::Decimal128(precision, scale) => format!("decimal({precision}, {scale})"),
        other => other.to_string().to_lowercase(),
    }
}

/// Words that Tab completes: what there is, and what SQL is mostly made of.
fn words(session: &Session) -> Vec<String> {
    const KEYWORDS: &[&str] = &[
        "SELECT",
        "FROM",
        "WHERE",
        "GROUP BY",
        "ORDER BY",
        "HAVING",
        "LIMIT",
        "JOIN",
        "LEFT JOIN",
        "USING",
        "UNION ALL",
        "WITH",
        "DISTINCT",
        "BETWEEN",
        "INTERVAL",
        "FILTER",
        "EXPLAIN",
        "current_date",
        "now()",
    ];
    let mut words: Vec<String> = KEYWORDS.iter().map(|word| (*word).to_owned()).collect();
    words.extend(session.functions());
    words.extend(Table::ALL.iter().chain(Table::ROLLUPS).flat_map(|table| {
        let columns = table.columns().into_iter().map(|column| column.name.to_owned());
        columns.chain([table.name().to_owned()])
    }));
    words.extend(VIEWS.iter().flat_map(|view| {
        let columns = view.columns().into_iter().map(|column| column.name.to_owned());
        columns.chain([view.name.to_owned()])
    }));
    words.extend([live::NAME.to_owned(), "kafka".to_owned()]);
    words.extend(COMMANDS.iter().filter_map(|(command, _)| command.split(' ').next().map(str::to_owned)));
    words.sort();
    words.dedup();
    words
}

struct Words(Vec<String>);

impl Helper for Words {}
impl Highlighter for Words {}
impl Validator for Words {}

impl Hinter for Words {
    type Hint = String;
}

impl Completer for Words {
    type Candidate = Pair;

    fn complete(
        &self,
        line: &str,
        at: usize,
        _: &rustyline::Context<'_>,
    ) -> rustyline::Result<(usize, Vec<Pair>)> {
        let before = line.get(..at).unwrap_or(line);
        let word = before
            .rsplit(|letter: char| !letter.is_alphanumeric() && letter != '_' && letter != '\\')
            .next()
            .unwrap_or("");
        if word.is_empty() {
            return Ok((at, Vec::new()));
        }
        let fits =
            |known: &&String| known.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word));
        let pairs = self
            .0
            .iter()
            .filter(fits)
            .map(|known| Pair { display: known.clone(), replacement: known.clone() });
        Ok((at - word.len(), pairs.collect()))
    }
}

#[cfg(test)]
mod tests;
