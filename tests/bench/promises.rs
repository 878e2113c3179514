//! What the promises cost: poison, slow calls, a tenant's flood, a backlog of large records, a long queue, more processes.
//!
//! Run by hand, by `tests/bench/run promises`; see README.md beside this file. All but the last runs on `forebay up` with the embedded
//! broker, and a model server inside this program, which does as the question says: `wait 50` answers after 50 ms, `refuse`
//! gets a 400.

#![expect(clippy::expect_used, reason = "a measurement that cannot go on says why by panicking")]
#![expect(clippy::print_stdout, reason = "a program run by hand tells its figures")]

mod scaling;

use axum::{
    Router,
    extract::Json,
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::post,
};
use clap::Parser as _;
use forebay_tests::{Client, New, Reader, Record, product::Up};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio::{net::TcpListener, runtime::Runtime};

/// Measures what Forebay's promises cost.
#[derive(Debug, clap::Parser)]
struct Args {
    /// Only the scenario of this name: poison, slow, flood, backlog, drain or scaling.
    #[arg(long, default_value = "")]
    only: String,
    /// Everything in this proportion of its usual size.
    #[arg(long, default_value_t = 1.0)]
    size: f64,
    /// Given by `cargo bench`, and of no meaning here.
    #[arg(long, hide = true)]
    bench: bool,
}

type Scenario = fn(&Site);

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(3_600);

fn main() {
    let args = Args::parse();
    let runtime = Runtime::new().expect("a runtime");
    let model = serve(&runtime);
    let scenarios: [(&str, Scenario); 6] = [
        ("poison", poison),
        ("slow", slow),
        ("flood", flood),
        ("backlog", backlog),
        ("drain", drain),
        ("scaling", scaling::scaling),
    ];
    for (name, scenario) in
        scenarios.into_iter().filter(|(name, _)| args.only.is_empty() || args.only == *name)
    {
        println!("{name}");
        scenario(&Site { model: model.clone(), size: args.size });
    }
}

/// A model server that does as the question says.
fn serve(runtime: &Runtime) -> String {
    async fn answer(Json(call): Json<Value>) -> Response {
        let turns = call["messages"].as_array().map(Vec::as_slice).unwrap_or_default();
        let said = turns.last().and_then(|turn| turn["content"].as_str()).unwrap_or_default();
        if said.contains("refuse") {
            return (StatusCode::BAD_REQUEST, Json(json!({"error": {"message": "refused"}}))).into_response();
        }
        let after = said.rsplit_once("wait ").map(|(_, rest)| rest.chars().take_while(char::is_ascii_digit));
        let ms = after.and_then(|digits| digits.collect::<String>().parse().ok()).unwrap_or(0);
        tokio::time::sleep(Duration::from_millis(ms)).await;
        let message = json!({"role": "assistant", "content": "It is so."});
        let choice = json!({"index": 0, "message": message, "finish_reason": "stop"});
        let usage = json!({"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14});
        Json(json!({"model": "stub", "choices": [choice], "usage": usage})).into_response()
    }
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
    let address = listener.local_addr().expect("its address");
    let router = Router::new().route("/v1/chat/completions", post(answer));
    runtime.spawn(async move { axum::serve(listener, router).await });
    format!("http://{address}/v1")
}

struct Site {
    model: String,
    size: f64,
}

/// A product at work, and who asks it.
struct Work {
    up: Up,
    client: Client,
    results: Reader,
    _data: tempfile::TempDir,
}

impl Site {
    fn start(&self, arguments: &[&str]) -> Work {
        let data = tempfile::tempdir().expect("a folder");
        let up = Up::start(data.path(), arguments);
        let client = up.client();
        let results = client.read("results");
        let mut work = Work { up, client, results, _data: data };
        // Groups are joined, connections stand.
        work.ask((0..200).map(|number| request(&format!("warm-{number}"), "default", "wait 0")));
        work
    }

    fn served(&self) -> Work {
        self.start(&["--model-url", &self.model, "--model", "stub"])
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a proportion of a count, given by hand"
    )]
    fn of(&self, usual: u32) -> u32 {
        (f64::from(usual) * self.size) as u32
    }
}

impl Work {
    /// Writes requests and waits for all results; how long that took.
    fn ask(&mut self, requests: impl Iterator<Item = New>) -> Duration {
        let before = self.results.records().len();
        let requests: Vec<_> = requests.collect();
        let (count, start) = (requests.len(), Instant::now());
        self.client.write("requests", requests);
        self.results.at_least(before + count, LIMIT);
        start.elapsed()
    }

    /// Milliseconds from acceptance to publication of the results whose id begins so.
    fn latencies(&self, of: &str) -> Vec<u64> {
        let records = self.results.records().iter().map(Record::json);
        let of = records.filter(|result| result["id"].as_str().is_some_and(|id| id.starts_with(of)));
        let mut all: Vec<_> =
            of.filter_map(|result| Some(result["timings_us"]["total"].as_u64()? / 1_000)).collect();
        all.sort_unstable();
        all
    }

    fn metric(&self, name: &str, label: &str) -> f64 {
        let (_, page) = self.up.get("/metrics");
        let of = page.lines().filter(|line| line.starts_with(name) && line.contains(label));
        of.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    }

    /// The most memory that the process has held, in MiB.
    fn peak_mib(&self) -> u64 {
        let path = format!("/proc/{}/status", self.up.process.id());
        let status = std::fs::read_to_string(path).expect("a living process");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
        line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).expect("a number") / 1_024
    }
}

/// No request is like another, and none comes from the cache.
fn request(id: &str, tenant: &str, says: &str) -> New {
    New::from(
        json!({"id": id, "tenant": tenant, "prompt": format!("{id}: {says}"), "cache": {"no_cache": true}}),
    )
}

fn quantile(sorted: &[u64], of_thousand: usize) -> u64 {
    sorted.get((sorted.len() * of_thousand / 1_000).min(sorted.len().saturating_sub(1))).copied().unwrap_or(0)
}

/// Of every hundred records one is refused for good: how much slower are the others?
fn poison(site: &Site) {
    let count = site.of(5_000);
    let mut work = site.served();
    let (mut clean, mut poisoned) = (Duration::ZERO, Duration::ZERO);
    for round in 0..3 {
        let ask = |kind: &str, bad: bool| -> Vec<New> {
            let says = |number: u32| if bad && number.is_multiple_of(100) { "refuse" } else { "wait 0" };
            let id = |number: u32| format!("{kind}-{round}-{number}");
            (0..count).map(|number| request(&id(number), "default", says(number))).collect()
        };
        clean += work.ask(ask("clean", false).into_iter());
        poisoned += work.ask(ask("poisoned", true).into_iter());
    }
    let letters = work.metric("forebay_step_dead_letters_total", "infer");
    let ratio = clean.as_secs_f64() / poisoned.as_secs_f64();
    println!("  throughput with 1% poison, of that without: {ratio:.3}; dead letters {letters}");
}

/// One call in a hundred takes thirty seconds: how long do those of 50 ms take beside it?
fn slow(site: &Site) {
    const EVERY: Duration = Duration::from_millis(20);
    let count = site.of(3_000);
    let mut p99 = Vec::new();
    for (kind, with) in [("alone", false), ("beside", true)] {
        let mut work = site.served();
        let start = Instant::now();
        for number in 0..count {
            let is_slow = with && number.is_multiple_of(100);
            let id = format!("{}-{number}", if is_slow { "slow" } else { kind });
            work.client
                .write("requests", [request(&id, "default", if is_slow { "wait 30000" } else { "wait 50" })]);
            std::thread::park_timeout((start + EVERY * number).saturating_duration_since(Instant::now()));
        }
        work.results.at_least(usize::try_from(count).expect("a count") + 200, LIMIT);
        let latencies = work.latencies(kind);
        println!("  {kind}: p50 {} ms, p99 {} ms", quantile(&latencies, 500), quantile(&latencies, 990));
        p99.push(quantile(&latencies, 990));
    }
    if let [alone, beside] = p99[..] {
        println!("  p99 beside 1% of 30 s calls: {beside} ms, alone {alone} ms");
    }
}

/// A tenant's flood, and ten requests of another behind it.
fn flood(site: &Site) {
    let count = site.of(100_000);
    let mut work = site.served();
    let ten = |kind: &str| {
        (0..10).map(|number| request(&format!("{kind}-{number}"), "small", "wait 50")).collect::<Vec<_>>()
    };
    let alone = work.ask(ten("alone").into_iter());
    let flood = (0..count).map(|number| request(&format!("flood-{number}"), "flood", "wait 50"));
    let start = Instant::now();
    work.client.write("requests", flood);
    let written = start.elapsed();
    work.client.write("requests", ten("behind"));
    let begun = Instant::now();
    let is_over = |records: &[Record]| {
        let behind = records.iter().filter(|record| record.key_text().starts_with("behind-")).count();
        (behind == 10).then_some(())
    };
    work.results.until("the ten behind the flood", LIMIT, is_over);
    let behind = begun.elapsed();
    let aside = work.metric("forebay_step_set_aside_total", "overflow");
    let answered = work.results.records().len();
    println!(
        "  alone {:.2} s; behind a flood of {count} (written in {:.1} s): {:.2} s; set aside {aside}, answered {answered} meanwhile",
        alone.as_secs_f64(),
        written.as_secs_f64(),
        behind.as_secs_f64(),
    );
    for topic in ["requests", "questions", "prompts", "completions", "endings", "results"] {
        let mut reader = work.client.read(topic);
        let records = reader.to_the_end(LIMIT);
        let (small, flood): (Vec<_>, Vec<_>) = records
            .iter()
            .filter(|record| !is_of(record, "warm-"))
            .partition(|record| is_of(record, "behind-"));
        let last = |records: &[&Record]| records.iter().map(|record| record.timestamp_ms).max().unwrap_or(0);
        let first = flood.first().map_or(0, |record| record.timestamp_ms);
        println!(
            "    {topic}: the flood's first at {first}; the last of the ten {} ms later; {} of the flood",
            last(&small) - first,
            flood.len()
        );
    }
}

fn is_of(record: &Record, kind: &str) -> bool {
    record.key_text().starts_with(kind)
}

/// Two thousand records of half a mebibyte wait.
fn backlog(site: &Site) {
    let count = site.of(2_000);
    let mut work = site.start(&[]);
    let filler = "x".repeat(512 << 10);
    let large = |number: u32| {
        New::from(
            json!({"id": format!("large-{number}"), "prompt": format!("What is {number}?"), "metadata": filler}),
        )
    };
    let before = work.peak_mib();
    let took = work.ask((0..count).map(large));
    let peak = work.peak_mib();
    println!("  {count} of 512 KiB in {:.0} s: peak {peak} MiB, {before} MiB before", took.as_secs_f64());
}

/// A queue of small requests: does its length make it slower?
fn drain(site: &Site) {
    let count = site.of(1_000_000);
    let mut work = site.start(&[]);
    for first in (0..count).step_by(10_000) {
        let ids = (first..count.min(first + 10_000)).map(|number| format!("d-{number}"));
        work.client.write("requests", ids.map(|id| request(&id, "default", "wait 0")));
    }
    let whole = usize::try_from(count).expect("a count");
    let mut last = (Instant::now(), work.results.records().len());
    for tenth in 1..=10 {
        work.results.at_least(200 + whole * tenth / 10, LIMIT);
        let now = (Instant::now(), work.results.records().len());
        let records = u32::try_from(now.1 - last.1).map_or(0.0, f64::from);
        println!(
            "  tenth {tenth}: {:.0} a second, peak {} MiB",
            records / (now.0 - last.0).as_secs_f64(),
            work.peak_mib()
        );
        last = now;
    }
}
