//! What Forebay adds to a model's time: requests per CPU-second and latency of all its steps with a model that takes none,
//! beside a bare rdkafka chain of as many hops in the same run.
//!
//! Run by hand, by `tests/bench/run`; see README.md beside this file. Chains take turns within each round, so that what else
//! the machine does meets all of them alike.

#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "a measurement that cannot go on says why by panicking"
)]
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program run by hand tells how far it is, and then its figures"
)]

mod bare;
mod client;
mod cluster;
mod model;
mod report;
mod subject;

use clap::Parser as _;
use client::Client;
use report::{Measured, Row};
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};
use subject::{Chain, Layout, On, What, cpu_s};
use tokio::runtime::Runtime;

/// Measures what Forebay's steps cost.
#[derive(Debug, clap::Parser)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// How often each chain is measured.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Requests of a measurement at saturation; a bare chain, being faster, gets three times as many.
    #[arg(long, default_value_t = 10_000)]
    requests: usize,
    /// Requests a second of a measurement of latency.
    #[arg(long, default_value_t = 50)]
    rate: u32,
    /// How long that takes, in seconds.
    #[arg(long, default_value_t = 20)]
    seconds: u32,
    /// Only chains whose name, as in "embedded/bare", contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Where the figures are written as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Given by `cargo bench`, and of no meaning here.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// The bare chain (started by this program).
    #[command(hide = true)]
    Bare(bare::Bare),
}

fn main() {
    let args = Args::parse();
    if let Some(Command::Bare(bare)) = args.command {
        return bare::run(bare);
    }
    let rows = Bench::new(args).run();
    println!("{}", report::table(&rows));
}

/// A chain by its names, and what it is compared with.
struct Entry {
    log: &'static str,
    chain: &'static str,
    beside: Option<&'static str>,
    layout: Layout,
    kind: Kind,
}

impl Entry {
    fn is_named(&self, part: &str) -> bool {
        format!("{}/{}", self.log, self.chain).contains(part)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bare,
    BareAsLong,
    Extractive,
    Served,
}

const fn entry(
    log: &'static str,
    chain: &'static str,
    beside: Option<&'static str>,
    layout: Layout,
    kind: Kind,
) -> Entry {
    Entry { log, chain, beside, layout, kind }
}

const KAFKA: &str = "kafka";
const EMBEDDED: &str = "embedded";

/// In the order of a round. A chain with messages as long as Forebay's comes after Forebay has shown how long they are.
const ENTRIES: &[Entry] = &[
    entry(KAFKA, "bare", None, Layout::One, Kind::Bare),
    entry(KAFKA, "forebay up, extractive", Some("bare"), Layout::One, Kind::Extractive),
    entry(KAFKA, "forebay up, served", Some("bare"), Layout::One, Kind::Served),
    entry(KAFKA, "bare, messages as long as Forebay's", Some("bare"), Layout::One, Kind::BareAsLong),
    entry(KAFKA, "bare, a process each hop", None, Layout::Each, Kind::Bare),
    entry(
        KAFKA,
        "forebay run, a process each stage",
        Some("bare, a process each hop"),
        Layout::Each,
        Kind::Extractive,
    ),
    entry(EMBEDDED, "bare", None, Layout::One, Kind::Bare),
    entry(EMBEDDED, "forebay up, extractive", Some("bare"), Layout::One, Kind::Extractive),
    entry(EMBEDDED, "forebay up, served", Some("bare"), Layout::One, Kind::Served),
    entry(EMBEDDED, "bare, messages as long as Forebay's", Some("bare"), Layout::One, Kind::BareAsLong),
];

struct Bench {
    args: Args,
    runtime: Runtime,
    /// The folder goes last.
    kafka: Option<(forebay_tests::Running, String)>,
    _folder: tempfile::TempDir,
    model_url: String,
    questions: Vec<String>,
    /// How long Forebay's messages are, once that is known.
    bytes: Vec<usize>,
}

impl Bench {
    fn new(args: Args) -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let folder = tempfile::tempdir().expect("a folder");
        let wants_kafka = ENTRIES.iter().any(|entry| entry.log == KAFKA && entry.is_named(&args.only));
        let kafka = wants_kafka.then(|| cluster::kafka(&folder.path().join("kafka"))).flatten();
        let model_url = model::serve(&runtime);
        let questions = questions();
        Self { args, runtime, kafka, _folder: folder, model_url, questions, bytes: Vec::new() }
    }

    fn run(mut self) -> Vec<Row> {
        let is_wanted = |entry: &&Entry| {
            let is_there = entry.log == EMBEDDED || self.kafka.is_some();
            is_there && entry.is_named(&self.args.only)
        };
        let entries: Vec<_> = ENTRIES.iter().filter(is_wanted).collect();
        let row =
            |&&Entry { log, chain, beside, .. }: &&Entry| Row { log, chain, beside, rounds: Vec::new() };
        let mut rows: Vec<_> = entries.iter().map(row).collect();
        for round in 0..self.args.rounds {
            for (entry, row) in entries.iter().zip(&mut rows) {
                let measured = self.measure(entry, round);
                let ms = |quantile| report::milliseconds(measured.latency_us.value_at_quantile(quantile));
                eprintln!(
                    "round {}: {}/{}: {:.0} requests per CPU-s, {:.0} requests/s, p50 {:.1} ms, p99 {:.1} ms",
                    round + 1,
                    entry.log,
                    entry.chain,
                    measured.requests_per_cpu_s,
                    measured.requests_per_s,
                    ms(0.5),
                    ms(0.99),
                );
                row.rounds.push(measured);
            }
            if let Some(path) = &self.args.json {
                let text = serde_json::to_string_pretty(&report::json(&rows)).expect("JSON");
                std::fs::write(path, text).expect("a file for the figures");
            }
        }
        rows
    }

    fn measure(&mut self, entry: &Entry, round: usize) -> Measured {
        let place = ENTRIES.iter().position(|other| std::ptr::eq(other, entry)).unwrap_or(0);
        let prefix = format!("bench-{round}-{place}-");
        let on = match &self.kafka {
            Some((_, at)) if entry.log == KAFKA => On::Kafka(at),
            _ => On::Embedded,
        };
        let what = match entry.kind {
            Kind::Bare => What::Bare { bytes: &[] },
            Kind::BareAsLong => {
                assert!(
                    !self.bytes.is_empty(),
                    "\"--only\" must also name a chain of Forebay, whose messages this one is to equal"
                );
                What::Bare { bytes: &self.bytes }
            }
            Kind::Extractive => What::Forebay { model_url: None },
            Kind::Served => What::Forebay { model_url: Some(&self.model_url) },
        };
        let chain = Chain::start(&self.runtime, on, what, entry.layout, &prefix);
        let answers = matches!(what, What::Forebay { .. });
        let mut client = Client::connect(&chain.at, &prefix, self.questions.clone(), answers);
        // Groups are joined, connections stand, code and data are in memory.
        client.ask(500, Some(Duration::from_millis(2)));
        let measured = self.figures(&chain, &mut client, answers);
        drop(client);
        let model_took_part = answers && self.bytes.is_empty();
        let bytes = model_took_part.then(|| cluster::bytes(&chain.at, &prefix));
        let at = chain.at.clone();
        let is_kafka = matches!(on, On::Kafka(_));
        drop(chain);
        if is_kafka {
            self.runtime.block_on(cluster::delete_topics(&at, &prefix));
        }
        if let Some(bytes) = bytes {
            eprintln!("bytes of Forebay's messages, hop by hop: {bytes:?}");
            self.bytes = bytes;
        }
        measured
    }

    fn figures(&self, chain: &Chain, client: &mut Client, answers: bool) -> Measured {
        let float = |count: usize| f64::from(u32::try_from(count).expect("a number of requests"));
        let low = usize::try_from(self.args.rate * self.args.seconds).expect("a number of requests");
        let (cpu, start) = (chain.cpu_s(), Instant::now());
        let slow = client.ask(low, Some(Duration::from_secs(1) / self.args.rate));
        let cpu_at_rest = (chain.cpu_s() - cpu) / start.elapsed().as_secs_f64();

        let count = if answers { self.args.requests } else { 3 * self.args.requests };
        let (cpu, broker) = (chain.cpu_s(), self.broker_cpu_s());
        let fast = client.ask(count, None);
        // What is behind the results, such as filling the cache and committing, is work of these requests too.
        self.runtime.block_on(async { tokio::time::sleep(Duration::from_secs(1)).await });
        let (cpu, after) = (chain.cpu_s() - cpu, self.broker_cpu_s());
        let broker = (!chain.is_embedded()).then(|| after.zip(broker).map(|(after, before)| after - before));
        Measured {
            requests_per_s: float(count) / fast.wall.as_secs_f64(),
            requests_per_cpu_s: float(count) / cpu,
            broker_cpu_ms_per_request: broker.flatten().map(|cpu| 1000.0 * cpu / float(count)),
            cpu_at_rest,
            latency_us: slow.latency_us,
        }
    }

    fn broker_cpu_s(&self) -> Option<f64> {
        self.kafka.as_ref().map(|(kafka, _)| cpu_s(kafka))
    }
}

/// The questions of the demo: those that the guides answer.
fn questions() -> Vec<String> {
    let text =
        std::fs::read_to_string(subject::guides().join("questions.jsonl")).expect("the demo's questions");
    let prompt = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).expect("a question");
        line["prompt"].as_str().map(str::to_owned)
    };
    text.lines().filter(|line| !line.is_empty()).filter_map(prompt).collect()
}
