//! `forebay sink|sql|report`: hands over to `forebay-sql`, the program that knows tables; `up` and `demo` keep its sink at work, and
//! other commands ask it.
//!
//! Tables and SQL are half an hour of build, which nobody should need who does not want them. So they are a program of their own,
//! beside this one or on the PATH, and where it is missing the one command is named that builds it.
//!
//! Invariant: settings are read here and nowhere else. They go over in the environment, since others see a process's arguments and
//! settings may hold secrets.

use crate::{
    config::Config,
    console::{say, wrong},
    embedded,
};
use anyhow::Context as _;
use forebay_runtime::host::kafka::Kafka;
use forebay_telemetry::logging::FILTER_VARIABLE;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::{
    ffi::OsString,
    io,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};
use tokio::{
    process::{Child, Command},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

/// The program.
const PROGRAM: &str = "forebay-sql";
/// What builds it.
const BUILD: &str = "cargo build --release -p forebay-analytics";
/// Where it reads its settings.
const VARIABLE: &str = "FOREBAY_SQL_SETTINGS";
/// How its allocator gives memory back: 0 leaves it to the kernel to take pages away when it needs them. Taken away at once, they are handed
/// out again for the next query, which took up to a third of its time: tests/bench.
const PURGE: (&str, &str) = ("MIMALLOC_PURGE_DECOMMITS", "0");
/// How fresh the tables of a process are that keeps its own sink, unless somebody says otherwise: who looks at a demo waits.
const FRESH: Duration = Duration::from_secs(2);
/// How long after a sink that was told to leave this process may be told to end: a signal to a whole group reaches both in either order.
const TOGETHER: Duration = Duration::from_secs(1);
/// How long a sink that ended is left alone, doubled each time; one that ran for longer begins anew.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// How long it may take to write what waits, at the end: longer than it gives itself.
const END_MAX: Duration = Duration::from_secs(13);

/// The program beside this one, or on the PATH.
fn program() -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|this| Some(this.parent()?.join(PROGRAM)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places =
        beside.into_iter().chain(std::env::split_paths(&path).map(|folder| folder.join(PROGRAM)));
    places.find(|place| place.is_file())
}

/// The same, or an error that says how to have it.
fn found() -> anyhow::Result<PathBuf> {
    program().ok_or_else(|| {
        wrong(format!("{PROGRAM} is not beside this program, nor on the PATH; build it by `{BUILD}`"))
    })
}

/// The settings, as they are handed over.
fn settings(config: &Config, servers: Option<&str>, admin: Option<&str>, flush: Duration) -> String {
    json!({
        "bootstrap_servers": servers,
        "kafka": config.kafka,
        "schema_registry": config.registry,
        "topic_prefix": config.topic_prefix,
        "data": config.data,
        "tables": config.tables,
        "admin": admin,
        "otlp_endpoint": config.otlp_endpoint,
        "flush_ms": u64::try_from(flush.as_millis()).unwrap_or(u64::MAX),
        "flush_bytes": config.sink_bytes,
    })
    .to_string()
}

/// Becomes the program, with these arguments. Does not come back where that works.
pub async fn run(command: &str, arguments: &[OsString], config: Config) -> anyhow::Result<()> {
    let program = found()?;
    // SQL over tables needs no broker; the sink says itself that it does.
    let servers = match &config.bootstrap_servers {
        Some(servers) => Some(servers.clone()),
        None => embedded::running(&config).await.ok(),
    };
    let settings = settings(&config, servers.as_deref(), config.admin.as_deref(), config.sink_flush);
    let mut becomes = std::process::Command::new(&program);
    becomes.arg(command).args(arguments).env(VARIABLE, settings);
    // Of a sink it is worth more to see what it holds.
    if command != "sink" && std::env::var_os(PURGE.0).is_none() {
        becomes.env(PURGE.0, PURGE.1);
    }
    let fault = becomes.exec();
    Err(anyhow::anyhow!(fault).context(format!("could not start {}", program.display())))
}

/// The rows that a query gives, as the program answers it.
pub async fn ask(query: &str, config: &Config) -> anyhow::Result<Vec<Value>> {
    let settings = settings(config, None, None, config.sink_flush);
    let mut command = Command::new(found()?);
    command.args(["sql", "--format", "json", "--command", query]).env(VARIABLE, settings);
    command.stdin(Stdio::null()).stderr(Stdio::inherit());
    // It says itself what is wrong, and has a deadline.
    let answer = command.output().await.context("could not ask the tables")?;
    anyhow::ensure!(
        answer.status.success(),
        "the tables could not be asked: {PROGRAM} ended with {}",
        answer.status
    );
    let text = String::from_utf8_lossy(&answer.stdout);
    let row = |line: &str| serde_json::from_str(line).context("an answer of the tables");
    text.lines().filter(|line| !line.is_empty()).map(row).collect()
}

/// A sink beside this process, for as long as that runs.
pub struct Sink {
    stop: CancellationToken,
    kept: tokio::task::JoinHandle<()>,
}

impl Sink {
    /// Starts it, with warnings alone where `is_quiet`; says what to do where it is not built. `shutdown` is given when this process is to
    /// end, at once or after its stages.
    pub fn start(
        config: &Config,
        kafka: &Kafka,
        is_quiet: bool,
        shutdown: &CancellationToken,
    ) -> Option<Self> {
        let Some(program) = program() else {
            say(format_args!("  tables   none: {PROGRAM} is not built; `{BUILD}` does it"));
            return None;
        };
        let flush = if config.sink_flush_is_default { FRESH } else { config.sink_flush };
        let settings = settings(config, Some(kafka.bootstrap_servers()), None, flush);
        let tables =
            config.tables.clone().unwrap_or_else(|| config.data.join("tables").display().to_string());
        say(format_args!("  tables   {tables}  (forebay sql)"));
        let stop = CancellationToken::new();
        let kept = tokio::spawn(keep(program, settings, is_quiet, shutdown.clone(), stop.clone()));
        Some(Self { stop, kept })
    }

    /// Lets it write what waits, for a bounded time.
    pub async fn end(self) {
        self.stop.cancel();
        if let Err(fault) = self.kept.await {
            warn!(error = %fault, "could not end the sink");
        }
    }
}

/// Keeps a sink at work until `stop`: one that ends by itself is started again, later each time. Not one that left as it was told to, where
/// this process is to end as well.
async fn keep(
    program: PathBuf,
    settings: String,
    is_quiet: bool,
    shutdown: CancellationToken,
    stop: CancellationToken,
) {
    let mut pause = PAUSE_MIN;
    while !stop.is_cancelled() {
        let started = Instant::now();
        let watched = match spawn(&program, &settings, is_quiet) {
            Ok(child) => watch(child, &stop).await,
            Err(fault) => Err(fault),
        };
        match watched {
            Ok(None) => return,
            Ok(Some(status)) if has_left(status) && timeout(TOGETHER, shutdown.cancelled()).await.is_ok() => {
                info!("the sink of the tables has left first; what stages still write waits on its topics");
                return;
            }
            Ok(Some(status)) => {
                if started.elapsed() > PAUSE_MAX {
                    pause = PAUSE_MIN;
                }
                error!(%status, again_in_s = pause.as_secs(), "the sink of the tables ended by itself; rows wait on their topics");
            }
            Err(fault) => {
                error!(program = %program.display(), error = %fault, again_in_s = pause.as_secs(), "could not run the sink of the tables");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => return,
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Whether a sink ended since somebody told it to, if only before it could listen.
fn has_left(status: ExitStatus) -> bool {
    status.success() || status.signal() == Some(Signal::TERM.as_raw())
}

/// Its standard input is ours to close, which is how it is told to leave: also by the death of this process.
fn spawn(program: &PathBuf, settings: &str, is_quiet: bool) -> io::Result<Child> {
    let mut command = Command::new(program);
    // A demo is not talked over.
    if is_quiet && std::env::var_os(FILTER_VARIABLE).is_none() {
        command.env(FILTER_VARIABLE, "warn");
    }
    command.args(["sink", "--until-stdin-closes"]).env(VARIABLE, settings);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()
}

/// How it ended by itself; nothing where it was told to by `stop`.
async fn watch(mut child: Child, stop: &CancellationToken) -> io::Result<Option<ExitStatus>> {
    // Not left in there: who waits for a child closes it first.
    let stdin = child.stdin.take();
    tokio::select! {
        status = child.wait() => return status.map(Some),
        () = stop.cancelled() => drop(stdin),
    }
    if let Ok(ended) = timeout(END_MAX, child.wait()).await {
        let status = ended?;
        info!(%status, "the sink of the tables has left");
    } else {
        warn!("the sink of the tables did not leave in time; what it had not written is read again");
        child.kill().await?;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::merge;

    /// The other side refuses what it does not know, and has a test with these names too.
    #[test]
    fn what_is_handed_over_is_what_the_other_side_reads() {
        let file = "kafka: {sasl.password: canary}\ntables: s3://bucket/log\nsink: {flush_every: 5s}\n\
            avro: {framing: confluent, schema_registry: 'http://r:8081'}\n";
        let user =
            |name: &str| (name == "FOREBAY_AVRO_SCHEMA_REGISTRY_USER").then(|| "ana:canary".to_owned());
        let config = merge(Some(("f.yaml", file)), user, &[]).unwrap();
        let handed: Value =
            serde_json::from_str(&settings(&config, Some("k:9092"), None, config.sink_flush)).unwrap();
        let expected = json!({
            "bootstrap_servers": "k:9092", "kafka": {"sasl.password": "canary"}, "topic_prefix": "", "data": ".forebay",
            "tables": "s3://bucket/log", "admin": null, "otlp_endpoint": null, "flush_ms": 5000, "flush_bytes": 134_217_728,
            "schema_registry": {"url": "http://r:8081", "user": "ana:canary", "is_written": true},
        });
        assert_eq!(handed, expected);
    }
    /// A program that notes when it starts and when it leaves, which its `body` says.
    struct Noted {
        folder: tempfile::TempDir,
        shutdown: CancellationToken,
        stop: CancellationToken,
    }

    impl Noted {
        fn new(body: &str) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let script = format!("#!/bin/sh\ncd {}\necho >>started\n{body}\n", folder.path().display());
            let [text, sink] = ["text", "sink"].map(|name| folder.path().join(name));
            std::fs::write(&text, script).unwrap();
            // By another process: what this one has open to write, one that another test just starts has too, and then it is too busy to run.
            let made =
                std::process::Command::new("install").args(["-m", "755"]).args([&text, &sink]).status();
            assert!(made.unwrap().success());
            Self { folder, shutdown: CancellationToken::new(), stop: CancellationToken::new() }
        }

        async fn kept(&self) {
            let program = self.folder.path().join("sink");
            keep(program, "{}".to_owned(), false, self.shutdown.clone(), self.stop.clone()).await;
        }

        fn count(&self, note: &str) -> usize {
            std::fs::read_to_string(self.folder.path().join(note)).map_or(0, |notes| notes.lines().count())
        }

        /// Waits until it was noted so often, while time stands still: a runtime that has work does not pass it.
        async fn noted(&self, note: &str, times: usize) {
            while self.count(note) < times {
                tokio::task::yield_now().await;
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_sink_that_leaves_when_all_are_told_to_is_not_started_again() {
        for leaves in ["exit 0", "kill -TERM $$"] {
            let sink = Noted::new(&format!("echo >>left\n{leaves}"));
            // It hears of it first, and this process within the second.
            tokio::join!(sink.kept(), async {
                sink.noted("left", 1).await;
                sink.shutdown.cancel();
            });
            assert_eq!(sink.count("started"), 1);
            // Or this process does.
            sink.kept().await;
            assert_eq!(sink.count("started"), 2);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_sink_that_fails_or_is_ended_alone_is_started_again_until_it_is_stopped() {
        for (ends, is_shutting_down) in [("exit 1", true), ("exit 0", false)] {
            let sink = Noted::new(&format!("[ $(wc -l <started) = 2 ] || {ends}\ncat\necho >>left"));
            if is_shutting_down {
                sink.shutdown.cancel();
            }
            tokio::join!(sink.kept(), async {
                while sink.count("started") < 2 {
                    tokio::time::advance(PAUSE_MIN).await;
                }
                assert_eq!(sink.count("left"), 0, "it stays until it is stopped");
                sink.stop.cancel();
                sink.noted("left", 1).await;
            });
            assert_eq!(sink.count("started"), 2);
        }
    }
}
