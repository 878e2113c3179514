//! What may be said on the command line, and its help.

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use forebay_telemetry::logging;
use std::{
    ffi::OsString,
    path::PathBuf,
    time::{Duration, SystemTime},
};

/// A dataflow stream processor on Kafka for generative AI.
///
/// Requests arrive on the topic `requests`, pass through the steps of a pipeline, and leave as `results`.
/// Start with `forebay demo`.
#[derive(Debug, Parser)]
#[command(name = "forebay", version, propagate_version = true, max_term_width = 110)]
pub struct Args {
    #[command(flatten)]
    pub settings: Settings,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Settings override each other in this order: defaults, the file, the environment (FOREBAY_…), flags.
#[derive(Clone, Debug, Default, ClapArgs)]
#[command(next_help_heading = "Settings (also by file and environment; see `forebay config print`)")]
pub struct Settings {
    /// Reads settings from this YAML file.
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The Kafka brokers, joined by commas. Without them: the embedded broker.
    #[arg(long, global = true, value_name = "HOST:PORT,…")]
    pub bootstrap_servers: Option<String>,
    /// Goes before the name of every topic and consumer group.
    #[arg(long, global = true, value_name = "PREFIX")]
    pub topic_prefix: Option<String>,
    /// The base URL of an OpenAI-compatible server; ends in /v1. Given again, or joined by commas: a pool of servers of one
    /// model. Without it: the extractive model.
    #[arg(long, global = true, value_name = "URL")]
    pub model_url: Vec<String>,
    /// The model to ask for there.
    #[arg(long, global = true, value_name = "NAME")]
    pub model: Option<String>,
    /// Where local data lies: the embedded broker's log, copies of tables, documents.
    #[arg(long, global = true, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Where the embedded broker listens.
    #[arg(long, global = true, value_name = "HOST:PORT")]
    pub listen: Option<String>,
    /// Where metrics and health are served.
    #[arg(long, global = true, value_name = "HOST:PORT")]
    pub admin: Option<String>,
    /// Where the tables of the output log lie: a folder or a URL such as s3://bucket/folder.
    #[arg(long, global = true, value_name = "DIR|URL")]
    pub tables: Option<String>,
    /// How many partitions the topics of the pipeline have.
    #[arg(long, global = true, value_name = "N")]
    pub partitions: Option<String>,
    /// Where traces and metrics are sent by OTLP over HTTP.
    #[arg(long, global = true, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// How logs look; they go to standard error.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Auto, value_name = "FORMAT")]
    pub log_format: LogFormat,
}

/// How logs look.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    #[default]
    Auto,
    /// One JSON object a line.
    Json,
    /// For a person.
    Text,
}

impl Args {
    /// How logs look.
    pub fn log_format(&self) -> logging::Format {
        match self.settings.log_format {
            LogFormat::Auto => logging::Format::Auto,
            LogFormat::Json => logging::Format::Json,
            LogFormat::Text => logging::Format::Text,
        }
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Shows the whole at work: ingests documents, asks questions, prints the answers, stays up.
    Demo(Demo),
    /// Runs all stages of a pipeline in this process.
    Up(PipelineArg),
    /// Runs one stage of a pipeline in this process.
    Run(Run),
    /// Asks one question and waits for its result.
    Ask(Ask),
    /// Writes documents to the topic `documents`.
    Ingest(Ingest),
    /// Finds all faults of a pipeline.
    Check(PipelineArg),
    /// Runs the cases of a pipeline, in memory.
    Test(PipelineArg),
    /// Draws a pipeline.
    Explain(Explain),
    /// Looks at records that no step could process, or gives them to their steps once more.
    #[command(subcommand)]
    Dlq(Dlq),
    /// Looks at the topics of a pipeline, or makes them.
    #[command(subcommand)]
    Topics(Topics),
    /// Looks paid calls up in their ledgers.
    #[command(subcommand)]
    Ledger(Ledger),
    /// Looks at the pool of model servers of a running process.
    #[command(subcommand)]
    Pool(Pool),
    /// Looks at what budgets have left, or whether what they counted is what the log says.
    #[command(subcommand)]
    Budgets(BudgetsCommand),
    /// Calibrates which model of the pool answers what, on what was answered before.
    #[command(subcommand)]
    Tiers(Tiers),
    /// Asks the output log in SQL: a shell, or one question by `-c`.
    #[command(disable_help_flag = true)]
    Sql(Passed),
    /// Writes a page of the output log: what the last days cost, how long they took, how good they were.
    #[command(disable_help_flag = true)]
    Report(Passed),
    /// Moves the output log from Kafka into its tables, each row exactly once.
    #[command(disable_help_flag = true)]
    Sink(Passed),
    /// Serves a model that needs no GPU: a modelled engine, with faults on demand.
    SimulateModel(SimulateModel),
    /// Shows the settings.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Prints completions for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// What is handed on to `forebay-sql` as it is, `--help` included. Settings of ours come before it.
#[derive(Clone, Debug, ClapArgs)]
pub struct Passed {
    /// Its arguments; --help prints them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    pub arguments: Vec<OsString>,
}

/// Which pipeline.
#[derive(Clone, Debug, ClapArgs)]
pub struct PipelineArg {
    /// A file, or the name of a pipeline that Forebay ships.
    #[arg(default_value = "answer", value_name = "PIPELINE")]
    pub pipeline: String,
}

/// `forebay demo`.
#[derive(Debug, ClapArgs)]
pub struct Demo {
    /// Documents to ingest instead of Forebay's own guides: Markdown or text files, or folders of them.
    #[arg(long, num_args = 1.., value_name = "PATH")]
    pub documents: Vec<PathBuf>,
    /// Questions to ask instead of Forebay's own: one a line, as text or as a request in JSON.
    #[arg(long, value_name = "FILE")]
    pub questions: Option<PathBuf>,
    /// Leaves after the table of totals.
    #[arg(long)]
    pub exit: bool,
    /// Prints the records of `results`, one a line, and nothing else.
    #[arg(long)]
    pub json: bool,
}

/// `forebay run`.
#[derive(Debug, ClapArgs)]
pub struct Run {
    /// A file, or the name of a pipeline that Forebay ships.
    #[arg(value_name = "PIPELINE")]
    pub pipeline: String,
    /// The key of the step to run.
    #[arg(long, value_name = "NAME")]
    pub stage: String,
}

/// `forebay ask`.
#[derive(Debug, ClapArgs)]
pub struct Ask {
    /// The question.
    pub question: String,
    /// Whose request it is.
    #[arg(long, value_name = "NAME")]
    pub tenant: Option<String>,
    /// How long to wait for the result, and the request's deadline.
    #[arg(long, default_value = "60s", value_name = "DURATION")]
    pub wait: humantime::Duration,
    /// Prints the answer while it is written.
    #[arg(long, conflicts_with = "json")]
    pub stream: bool,
    /// Prints the record of `results` as it is.
    #[arg(long)]
    pub json: bool,
}

/// `forebay ingest`.
#[derive(Debug, ClapArgs)]
pub struct Ingest {
    /// Markdown or text files, or folders of them.
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Whose documents they are; `*` is everybody's.
    #[arg(long, default_value = "*", value_name = "NAME")]
    pub tenant: String,
    /// Deletes documents of these ids instead.
    #[arg(long)]
    pub delete: bool,
}

/// `forebay explain`.
#[derive(Debug, ClapArgs)]
pub struct Explain {
    #[command(flatten)]
    pub pipeline: PipelineArg,
    /// Draws it for Mermaid.
    #[arg(long)]
    pub mermaid: bool,
}

/// `forebay dlq`.
#[derive(Debug, Subcommand)]
pub enum Dlq {
    /// Prints dead letters, the newest last, and how many there are of each kind.
    List(DlqList),
    /// Prints all that is known of a dead letter, and the record itself.
    Show(DlqShow),
    /// Gives dead letters to their steps once more, each once.
    Redrive(DlqRedrive),
}

/// Which dead letters.
#[derive(Clone, Debug, ClapArgs)]
pub struct DlqFilter {
    /// Those of this step.
    #[arg(long, value_name = "STEP")]
    pub stage: Option<String>,
    /// Those of this class (undecodable, rejected, unavailable, panicked) or code (such as model_rejected).
    #[arg(long, value_name = "CLASS|CODE")]
    pub error: Option<String>,
    /// Those of this tenant.
    #[arg(long, value_name = "NAME")]
    pub tenant: Option<String>,
    /// Those written since then: a duration back from now (2h), or a time (2026-11-24T09:00:00Z).
    #[arg(long, value_name = "2h|TIME")]
    pub since: Option<Since>,
    /// The pipeline of the steps: a file, or the name of one that Forebay ships.
    #[arg(long, default_value = "answer", value_name = "PIPELINE")]
    pub pipeline: String,
}

/// A time, or how long ago it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// So long before now.
    Ago(Duration),
    /// Then, in milliseconds since 1970.
    At(i64),
}

impl std::str::FromStr for Since {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(ago) = humantime::parse_duration(text) {
            return Ok(Self::Ago(ago));
        }
        let wrong = || {
            format!("{text:?} is neither a duration like 2h or 3days nor a time like 2026-11-24T09:00:00Z")
        };
        let at = humantime::parse_rfc3339_weak(text).map_err(|_| wrong())?;
        let at = at.duration_since(SystemTime::UNIX_EPOCH).map_err(|_| wrong())?;
        i64::try_from(at.as_millis()).map(Self::At).map_err(|_| wrong())
    }
}

/// `forebay dlq list`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
Examples:
  forebay dlq list                                       the newest hundred, and the sum of all
  forebay dlq list --since 2h --error unavailable        what the model server's outage cost
  forebay dlq list --stage infer --json | jq .message    the reasons alone")]
pub struct DlqList {
    #[command(flatten)]
    pub filter: DlqFilter,
    /// How many to print: the newest ones.
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub limit: u32,
    /// Prints one JSON object for each, and nothing else.
    #[arg(long)]
    pub json: bool,
}

/// `forebay dlq show`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
Examples:
  forebay dlq show order-17                 by the id of the request
  forebay dlq show infer/prompts/3/17       by the key that `list` prints: step, topic, partition, offset")]
pub struct DlqShow {
    /// The key of the dead letter, or the id of the request.
    #[arg(value_name = "KEY|ID")]
    pub letter: String,
    /// Only those written since then.
    #[arg(long, value_name = "2h|TIME")]
    pub since: Option<Since>,
    /// Prints JSON, one object for each dead letter.
    #[arg(long)]
    pub json: bool,
}

/// `forebay dlq redrive`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
A redriven request ends in a second result, of the next generation, under its old id. A call that was paid for is not
made again where its answer is recorded; --again makes it, and an answer that was cut (model_cut) is always asked for
again. Each dead letter is redriven once, also by two runs at once or after one that was killed: what was sent twice has
one result.

Examples:
  forebay dlq redrive --stage infer --error unavailable --dry-run      what would be sent, and where
  forebay dlq redrive --stage infer --error unavailable --limit 5      a few first
  forebay dlq redrive --since 2h --reset-deadline                      though nobody waits any more
  forebay dlq redrive infer/prompts/3/17                               this one")]
pub struct DlqRedrive {
    /// Keys of dead letters, or ids of requests.
    #[arg(value_name = "KEY|ID")]
    pub letters: Vec<String>,
    #[command(flatten)]
    pub filter: DlqFilter,
    /// At most so many.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: Option<u64>,
    /// All dead letters of the pipeline.
    #[arg(long)]
    pub all: bool,
    /// Only prints what would be sent.
    #[arg(long)]
    pub dry_run: bool,
    /// Asks for new answers, though some are recorded: they are paid for again.
    #[arg(long)]
    pub again: bool,
    /// Gives requests that have a deadline as long from now on as they had at first.
    #[arg(long)]
    pub reset_deadline: bool,
}

/// `forebay pool`.
#[derive(Debug, Subcommand)]
pub enum Pool {
    /// Prints how each server stands: its breaker, how much of its calls it gets, its queue and its KV cache.
    Status(PoolStatus),
}

/// `forebay pool status`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
Asks the admin port of the process, which --admin names.

Examples:
  forebay pool status                             of `forebay up` on this machine
  forebay pool status --admin 127.0.0.1:40123     of a `forebay run`, whose port is printed at its start")]
pub struct PoolStatus {
    /// Prints one JSON object for each server, and nothing else.
    #[arg(long)]
    pub json: bool,
}

/// `forebay budgets`.
#[derive(Debug, Subcommand)]
pub enum BudgetsCommand {
    /// Prints how the budgets stand of this minute, day and month: used, held, and what the pace so far comes to.
    Status(BudgetsStatus),
    /// Compares what the budgets of a day and its month counted with the rows of `attempts`; exits with 1 where they differ.
    Drift(BudgetsDrift),
}

/// `forebay budgets status`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
Reads the store in which processes count together (stores.key_value), and else asks the admin port of the process that
counts, which --admin names.

Examples:
  forebay budgets status                              of `forebay up` on this machine
  forebay budgets status --config forebay.yaml        of all processes that share a store
  forebay budgets status --json | jq 'select(.refused > 0)'")]
pub struct BudgetsStatus {
    /// Prints one JSON object for each, and nothing else.
    #[arg(long)]
    pub json: bool,
}

/// `forebay budgets drift`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
The log has what answered calls cost, and what all did, also those that failed or lost a race. Budgets count answers, and
of one that was cut what was read. So what is counted should lie between the two; what lies beyond is drift, in percent of
the larger. A process that counts for itself and was started again has counted less than the log, and one that died has not
counted what it was about to. Of the day that is not over, calls of the last minute are not in their table yet.

Budgets of minutes are left out.

Examples:
  forebay budgets drift                                yesterday: for cron, a while after midnight UTC
  forebay budgets drift --date 2026-11-29 --over 0.1
  forebay budgets drift --json | jq 'select(.is_over)'")]
pub struct BudgetsDrift {
    /// The day in UTC, as 2026-11-29; yesterday when absent. Counters are kept for a day and a half after it, those of keys and jobs for a day
    /// after their last call.
    #[arg(long, value_name = "DATE")]
    pub date: Option<Date>,
    /// How much drift is too much.
    #[arg(long, value_name = "PERCENT", default_value_t = 1.0, value_parser = amount)]
    pub over: f64,
    /// Prints one JSON object for each, and nothing else.
    #[arg(long)]
    pub json: bool,
}

/// A day in UTC, by its begin in milliseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date(pub i64);

impl std::str::FromStr for Date {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match format!("{text}T00:00:00Z").parse() {
            Ok(Since::At(ms)) => Ok(Self(ms)),
            _ => Err(format!("{text:?} is no day like 2026-11-29")),
        }
    }
}

/// `forebay tiers`.
#[derive(Debug, Subcommand)]
pub enum Tiers {
    /// Prints what was asked, answered and called, one JSON object a line: what `calibrate` reads.
    Log(TiersLog),
    /// Learns from a log which tier is good enough for what, and prints what each choice of thresholds costs and comes to.
    Calibrate(TiersCalibrate),
}

/// `forebay tiers log`.
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
The lines hold prompts of clients. Mind who reads along.

Examples:
  forebay tiers log > log.jsonl
  forebay tiers log --since 3days > log.jsonl")]
pub struct TiersLog {
    /// Only what was written since then.
    #[arg(long, value_name = "2h|TIME")]
    pub since: Option<Since>,
}

/// `forebay tiers calibrate`.
#[derive(Debug, ClapArgs)]
#[command(group = clap::ArgGroup::new("wanted").args(["quality", "cost"]), after_help = "\
A log has a JSON object a line, also as `kcat -C -J` prints it: requests (prompt or messages, with id and tenant), rows of
`outcomes` or records of `results`, rows of `attempts`, and audits or labels: request_id, tenant and a quality of 0 to 1.
Where a request has none of these, an answer that passed counts as 1 and one that was blocked as 0.

Examples:
  forebay tiers calibrate --log log.jsonl --log labels.jsonl                     the curve
  forebay tiers calibrate --log log.jsonl --quality 0.9 --write classifier.json  the cheapest that is good enough
  forebay tiers calibrate --log log.jsonl --cost 0.5 --plot curve.svg            the best for half a dollar")]
pub struct TiersCalibrate {
    /// A log; may be given often.
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    pub log: Vec<PathBuf>,
    /// The models of the tiers, the cheapest first; those of tiers.models when absent.
    #[arg(long, value_delimiter = ',', value_name = "MODEL,…")]
    pub tiers: Vec<String>,
    /// Recommends the cheapest choice whose quality is at least this, by the lower bound of its interval.
    #[arg(long, value_name = "AT_LEAST", value_parser = part)]
    pub quality: Option<f64>,
    /// Recommends the best choice that costs at most so many dollars for 1,000 requests.
    #[arg(long, value_name = "AT_MOST", value_parser = amount)]
    pub cost: Option<f64>,
    /// Draws the curve into this file.
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    /// Writes what was learned, with the recommended thresholds, into this file, for tiers.classifier.
    #[arg(long, value_name = "FILE", requires = "wanted")]
    pub write: Option<PathBuf>,
    /// What the order of learning and the choice of what is held out follow from.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seed: u64,
}

fn part(text: &str) -> Result<f64, String> {
    let read = text.parse().ok().filter(|part| (0.0..=1.0).contains(part));
    read.ok_or_else(|| format!("{text:?} is not 0 to 1"))
}

fn amount(text: &str) -> Result<f64, String> {
    let read = text.parse().ok().filter(|amount: &f64| amount.is_finite() && *amount >= 0.0);
    read.ok_or_else(|| format!("{text:?} is no number of 0 or more"))
}

/// `forebay topics`.
#[derive(Debug, Subcommand)]
pub enum Topics {
    /// Prints what would change, then makes the topics that are missing.
    Apply {
        #[command(flatten)]
        pipeline: PipelineArg,
        /// Only prints what would change.
        #[arg(long)]
        dry_run: bool,
        /// How many brokers keep each record; the broker's own default when absent.
        #[arg(long, value_name = "N")]
        replication_factor: Option<i32>,
    },
    /// Prints the topics of a pipeline and what the cluster has of them.
    Describe {
        #[command(flatten)]
        pipeline: PipelineArg,
    },
}

/// `forebay ledger`.
#[derive(Debug, Subcommand)]
pub enum Ledger {
    /// Prints all that the ledgers know of a call: when each try was sent, by whom, how it ended, what it cost.
    ///
    /// A step that pays for its calls writes `started` before it sends one, and `done` or `failed` when it has ended.
    /// `started` with nothing after it, by an owner that is gone, is an ambiguous call: it may have been paid for, and
    /// nobody knows its answer. Of several answers the first counts.
    ///
    /// The id of a call stands in the column call_id of `attempts`, and in the message of a request that ended with
    /// call_ambiguous or ledger_input_differs. Exits with 1 where no ledger knows the call: entries are kept for seven
    /// days at least.
    Show(ShowCall),
}

/// `forebay ledger show`.
#[derive(Debug, ClapArgs)]
pub struct ShowCall {
    /// The call's id: 32 hexadecimal digits.
    #[arg(value_name = "CALL_ID")]
    pub call_id: String,
    /// The pipeline whose ledgers are read: a file, or the name of one that Forebay ships.
    #[arg(long, default_value = "answer", value_name = "PIPELINE")]
    pub pipeline: String,
    /// Prints the recorded answer too. It is the client's text: mind who reads along.
    #[arg(long)]
    pub answer: bool,
    /// Prints the entries as they are, one a line.
    #[arg(long)]
    pub json: bool,
}

/// `forebay simulate-model`.
///
/// Its settings are its own, so --config and --listen mean other things here than elsewhere, and Forebay's file and
/// environment are not read.
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
Examples:
  forebay simulate-model                                            one replica with a modelled engine
  forebay simulate-model --latency 'log-normal 50ms..5s, 1% 30s'    given times; one call in a hundred takes 30 s
  forebay simulate-model --replicas 4 --set speeds=1,1,0.5,0.25     four replicas of unequal speed
  forebay simulate-model --set faults.status_429=5% --set faults.cut=1% --call-log calls.jsonl
  forebay simulate-model --print-config > pool.yaml                 every setting, its meaning and its value

It serves /v1/chat/completions, /v1/responses, /v1/messages, /v1/embeddings, /v1/rerank, /rerank, /v1/models, /health
and /metrics. PUT /simulate takes a document of settings while it runs.")]
pub struct SimulateModel {
    /// Reads its settings from this YAML file.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where the first replica listens [default: 127.0.0.1:8000].
    #[arg(long, value_name = "HOST:PORT")]
    pub listen: Option<String>,
    /// How many replicas, each on a port of its own, the one behind the other.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub replicas: usize,
    /// What all chance follows from.
    #[arg(long, value_name = "N")]
    pub seed: Option<String>,
    /// How long until the first token, or `modelled`.
    #[arg(long, value_name = "50ms|…")]
    pub latency: Option<String>,
    /// Any setting by its path; see --print-config. May be given often.
    #[arg(long, value_name = "PATH=VALUE")]
    pub set: Vec<String>,
    /// Appends a line for each call to this file.
    #[arg(long, value_name = "FILE")]
    pub call_log: Option<PathBuf>,
    /// Prints every setting, its meaning and its value, as a file that --config takes.
    #[arg(long)]
    pub print_config: bool,
}

/// `forebay config`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Prints each setting, its value and where it came from; secrets are not shown.
    Print,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_is_a_duration_or_a_time() {
        let since = |text: &str| text.parse::<Since>();
        assert_eq!(since("2h"), Ok(Since::Ago(Duration::from_secs(7_200))));
        assert_eq!(since("1970-01-01T00:00:01Z"), Ok(Since::At(1_000)));
        assert_eq!(since("1970-01-01 00:00:01"), Ok(Since::At(1_000)));
        assert!(since("yesterday").unwrap_err().contains("2h"));
    }

    #[test]
    fn a_date_is_a_day() {
        assert_eq!("1970-01-02".parse(), Ok(Date(86_400_000)));
        assert!("2h".parse::<Date>().unwrap_err().contains("2026-11-29"));
    }
}
