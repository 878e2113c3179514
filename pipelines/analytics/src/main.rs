//! Tables and SQL: parse, load, run, drain. Started by `forebay sink`, `forebay sql` and `forebay report`.
//!
//! Standard output holds what was asked for and nothing else; all that is said besides goes to standard error.
//!
//! Exit codes: 0 done; 1 could not be done; 2 the command line or the settings are wrong; 130 stopped by a second Ctrl-C.

use clap::{Args as ClapArgs, Parser, Subcommand};
use forebay_analytics::{
    generate, report,
    settings::{Settings, SettingsError},
    shell,
    sink::{self, Leaves},
};
use forebay_telemetry::logging;
use std::{io::Write as _, process::ExitCode};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Rows are many small allocations on many threads, as in `forebay`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Tables and SQL over what Forebay did.
#[derive(Debug, Parser)]
#[command(name = "forebay-sql", version, propagate_version = true, max_term_width = 110)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Moves the output log from Kafka into its tables, each row exactly once.
    Sink(Sink),
    /// Answers SQL over the tables: a shell, a query, a file of queries.
    Sql(Box<shell::Args>),
    /// Makes up rows: SQL to try before there is traffic, and the load of benchmarks.
    Generate(generate::Args),
    /// Writes a page: what the last days cost, how long they took, how good they were.
    Report(Box<report::Args>),
}

/// `forebay sink`.
#[derive(Clone, Debug, ClapArgs)]
#[command(after_help = "\
Examples:
  forebay sink            until SIGTERM, which writes what waits and leaves
  forebay sink --once     up to what the topics hold now, with what files and roll-ups need by then, and leaves: for cron")]
struct Sink {
    /// Leaves as soon as all is written that the topics hold at the start, small files are joined, and days that are over are rolled up.
    #[arg(long)]
    once: bool,
    /// Leaves as soon as all is written, and files as they are.
    #[arg(long, requires = "once")]
    without_compaction: bool,
    /// Leaves when its standard input is closed: whoever keeps it cannot outlive it, nor it whoever keeps it.
    #[arg(long, hide = true)]
    until_stdin_closes: bool,
}

impl Sink {
    const fn leaves(&self) -> Leaves {
        match (self.once, self.without_compaction) {
            (false, _) => Leaves::Never,
            (true, true) => Leaves::Written,
            (true, false) => Leaves::Kept,
        }
    }
}

/// What is logged unless FOREBAY_LOG says otherwise. The table format calls each commit that lost a race an error, and each
/// that won one worth a line; what becomes of them is told here.
const FILTER: &str = "info,librdkafka=warn,rdkafka=warn,opentelemetry=warn,deltalake_core=off,buoyant_kernel=off,delta_kernel=off";

fn main() -> ExitCode {
    let args = Args::parse();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            complain(&fault);
            let is_wrong = fault.is::<SettingsError>()
                || matches!(fault.downcast_ref(), Some(sink::Error::Settings(_)))
                || matches!(fault.downcast_ref(), Some(generate::Error::Settings(_)));
            ExitCode::from(if is_wrong { 2 } else { 1 })
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    // Between a question and its answer nothing is worth a line that is not wrong.
    let filter = match args.command {
        Command::Sql(_) | Command::Report(_) => FILTER.replacen("info", "warn", 1),
        Command::Sink(_) | Command::Generate(_) => FILTER.to_owned(),
    };
    logging::init(logging::Format::Auto, Some(&filter))?;
    let settings = Settings::load(|name| std::env::var(name).ok())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(command(args.command, settings));
    // Threads that are stuck in a client of ours must not keep the process from ending.
    runtime.shutdown_timeout(std::time::Duration::from_millis(500));
    done
}

async fn command(command: Command, settings: Settings) -> anyhow::Result<()> {
    match command {
        Command::Sink(args) => {
            Ok(sink::run(settings, args.leaves(), shutdown(args.until_stdin_closes)?).await?)
        }
        // Ctrl-C stops a query of the shell and not the shell, so it is heard there.
        Command::Sql(args) => shell::run(*args, settings).await,
        Command::Generate(args) => {
            Ok(generate::run(args, &settings, || chrono::Utc::now().timestamp_millis()).await?)
        }
        Command::Report(args) => report::run(*args, settings).await,
    }
}

/// A token that is given at the first Ctrl-C or SIGTERM; a second one ends at once. Of a process that is kept by another, a Ctrl-C
/// is the other's: what that still writes should find its table.
fn shutdown(until_stdin_closes: bool) -> anyhow::Result<CancellationToken> {
    let token = CancellationToken::new();
    if until_stdin_closes {
        let given = token.clone();
        std::thread::Builder::new().name("stdin".to_owned()).spawn(move || {
            // Nothing is ever written there; an error is as good an end as any.
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            given.cancel();
        })?;
    }
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let given = token.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {
                    if until_stdin_closes {
                        continue;
                    }
                }
                _ = terminate.recv() => {}
            }
            if given.is_cancelled() {
                std::process::exit(130);
            }
            given.cancel();
        }
    });
    Ok(token)
}

/// Says why the command could not be done, with all causes; some errors repeat their cause in their own words.
fn complain(fault: &anyhow::Error) {
    let mut text = String::new();
    for cause in fault.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            let separator = if text.is_empty() { "" } else { ": " };
            text = format!("{text}{separator}{cause}");
        }
    }
    let _ = writeln!(std::io::stderr(), "forebay-sql: {text}");
}
