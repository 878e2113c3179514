//! What the client of a pool makes of it: how much of its places it uses, what hedges save, what its engines' prefix caches see,
//! beside the two ways to balance that everybody has.
//!
//! Run by hand, by `tests/bench/run pool`; see README.md beside this file. The servers are the simulator, in a process of its own
//! for each run; all contenders meet the same fates, as these follow from a call's id and the number of its try.
//!
//! Invariant: what happened is told by the simulator's log of calls and not by the client, but for how long a caller waited.

#![expect(clippy::expect_used, reason = "a measurement that cannot go on says why by panicking")]
#![expect(clippy::print_stdout, reason = "a program run by hand tells its figures")]

#[path = "pool/load.rs"]
mod load;
#[path = "pool/servers.rs"]
mod servers;

use clap::Parser as _;
use forebay_calls::client::Hedging;
use load::{Load, Seen};
use serde_json::{Value, json};
use servers::{Balance, Servers};
use std::{path::PathBuf, time::Duration};
use tokio::runtime::Runtime;

/// Measures what the client of a pool makes of it.
#[derive(Debug, clap::Parser)]
struct Args {
    /// Only this part: use, hedges or prefixes.
    #[arg(long, default_value = "")]
    only: String,
    /// So many calls, as a proportion of the usual number.
    #[arg(long, default_value_t = 1.0)]
    size: f64,
    /// Where the figures are written as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Runs the servers with these settings, KEY=VALUE (started by this program).
    #[arg(long, hide = true, num_args = 1..)]
    serve: Vec<String>,
    /// Their log of calls.
    #[arg(long, hide = true)]
    log: Option<PathBuf>,
    /// Given by `cargo bench`, and of no meaning here.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Sequences that a replica runs at once, and the most that a client has under way there.
pub const SLOTS: usize = 16;
/// Replicas of a run.
pub const REPLICAS: usize = 4;

fn main() {
    let args = Args::parse();
    let runtime = Runtime::new().expect("a runtime");
    if let Some(log) = args.log {
        return runtime.block_on(servers::serve(args.serve, log));
    }
    let parts: [(&str, Measure); 3] = [("use", places), ("hedges", hedges), ("prefixes", prefixes)];
    let mut figures = serde_json::Map::new();
    for (name, part) in parts.into_iter().filter(|(name, _)| args.only.is_empty() || args.only == *name) {
        let part = part(&runtime, args.size);
        println!("{}", part.table());
        figures.insert(name.to_owned(), part.json());
        if let Some(path) = &args.json {
            let text = serde_json::to_string_pretty(&figures).expect("JSON");
            std::fs::write(path, text).expect("a file for the figures");
        }
    }
}

type Measure = fn(&Runtime, f64) -> Part;

/// What came out of a part.
struct Part {
    about: String,
    columns: &'static [&'static str],
    rows: Vec<(&'static str, Vec<f64>)>,
    /// What was aimed at, what came out, and whether that is enough.
    aims: Vec<(&'static str, f64, bool)>,
}

impl Part {
    fn table(&self) -> String {
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let header = [""].iter().chain(self.columns).map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let rule = vec!["---".to_owned(); header.len()];
        let row = |(name, figures): &(&str, Vec<f64>)| {
            line(
                [(*name).to_owned()].into_iter().chain(figures.iter().map(|figure| shown(*figure))).collect(),
            )
        };
        let aim = |(aim, figure, is_met): &(&str, f64, bool)| {
            format!("- {aim}: {} — {}\n", shown(*figure), if *is_met { "met" } else { "**missed**" })
        };
        let rows: String = self.rows.iter().map(row).collect();
        let aims: String = self.aims.iter().map(aim).collect();
        format!("{}\n\n{}{}{rows}\n{aims}", self.about, line(header), line(rule))
    }

    fn json(&self) -> Value {
        let row = |(name, figures): &(&str, Vec<f64>)| {
            let figures = self
                .columns
                .iter()
                .zip(figures)
                .map(|(column, figure)| ((*column).to_owned(), json!(figure)));
            ((*name).to_owned(), Value::Object(figures.collect()))
        };
        let aim = |(aim, figure, is_met): &(&str, f64, bool)| json!({"aim": aim, "figure": figure, "is_met": is_met});
        json!({
            "about": self.about,
            "rows": Value::Object(self.rows.iter().map(row).collect()),
            "aims": self.aims.iter().map(aim).collect::<Vec<_>>(),
        })
    }
}

fn shown(figure: f64) -> String {
    format!("{figure:.3}")
}

fn sized(calls: f64, size: f64) -> usize {
    // A count of calls is small and no fraction matters.
    format!("{:.0}", calls * size).parse().expect("a number of calls")
}

/// Half of real time: log-normal calls of 25 ms to 2.5 s, one in a hundred 15 s, each in the middle of its replica's speed.
const USE_SCALE: f64 = 0.5;

/// The places of a pool that are used, and how fast calls fare beside slow ones.
fn places(runtime: &Runtime, size: f64) -> Part {
    let settings = |slow: &str| {
        vec![
            ("latency", format!("log-normal 25ms..2500ms{slow}")),
            ("speeds", "0.5,1,1,2".to_owned()),
            ("engine.slots", SLOTS.to_string()),
            ("answer.tokens", "8".to_owned()),
            ("faults.status_429", "5%".to_owned()),
            ("fault.retry_after", "500ms".to_owned()),
            ("fault.retry_after_form", "ms".to_owned()),
        ]
    };
    let load = Load {
        calls: sized(2_400.0, size),
        at_once: SLOTS * REPLICAS * 3 / 2,
        // No fast call takes longer at the slowest replica, and no slow one less at the fastest.
        slow_from: Duration::from_secs(12).mul_f64(USE_SCALE),
        wait: Duration::from_secs(1).mul_f64(USE_SCALE),
        prompt: |number| format!("Why, for the {number}th time?"),
    };
    let run = |slow: &str, balance| {
        let servers = Servers::start(&settings(slow));
        load.run(runtime, &servers, balance)
    };
    let slow = ", 1% 15s";
    let pool = Balance::Pool(Hedging::Off);
    let contenders = [
        ("pool", run(slow, pool)),
        ("pool, no slow calls", run("", pool)),
        ("round-robin", run(slow, Balance::RoundRobin)),
        ("least requests", run(slow, Balance::LeastRequests)),
    ];
    let used = |seen: &Seen| seen.used(REPLICAS, SLOTS);
    let p99 = |seen: &Seen| seen.fast_quantile(0.99);
    let [(_, slowed), (_, plain), ..] = &contenders;
    let ratio = p99(slowed) / p99(plain);
    let row = |(name, seen): &(&'static str, Seen)| {
        (
            *name,
            vec![
                used(seen),
                used(seen) / used(slowed),
                seen.fast_quantile(0.5),
                p99(seen),
                p99(seen) / p99(plain),
            ],
        )
    };
    Part {
        about: format!(
            "Pool use: {} calls, {} at once; times are {USE_SCALE} of those aimed at (50 ms to 5 s, 1% of 30 s, retry-after 1 s)",
            load.calls, load.at_once
        ),
        columns: &[
            "part of places in use",
            "of the pool's",
            "p50 s, fast",
            "p99 s, fast",
            "p99 of that without slow calls",
        ],
        rows: contenders.iter().map(row).collect(),
        aims: vec![
            ("use of the pool's places ≥0.97", used(slowed), used(slowed) >= 0.97),
            ("p99 of fast calls ≤2 of that without slow ones", ratio, ratio <= 2.0),
        ],
    }
}

/// A fifth of real time: log-normal calls of 20 to 300 ms, one in twenty 4 s.
const HEDGE_SCALE: f64 = 0.2;
/// How long these take, what their share is drawn by, and a time that no other takes.
const STUCK: Duration = Duration::from_secs(4);
const SEED: &str = "1";
const FIXED: Duration = Duration::from_millis(320);

/// What hedges save where some calls stick, and what they cost.
fn hedges(runtime: &Runtime, size: f64) -> Part {
    let settings = [
        ("latency", "log-normal 20ms..300ms, 5% 4s".to_owned()),
        ("engine.slots", SLOTS.to_string()),
        ("answer.tokens", "8".to_owned()),
        ("seed", SEED.to_owned()),
    ];
    let load = Load {
        calls: sized(3_500.0, size),
        at_once: SLOTS * REPLICAS * 3 / 8,
        slow_from: Duration::MAX,
        wait: Duration::from_secs(1).mul_f64(HEDGE_SCALE),
        prompt: |number| format!("Why, for the {number}th time?"),
    };
    let fixed = Hedging::After(FIXED);
    let run = |load: &Load, hedging| load.run(runtime, &Servers::start(&settings), Balance::Pool(hedging));
    let full = Load { calls: load.calls / 2, at_once: SLOTS * REPLICAS * 3 / 2, ..load };
    let contenders = [
        ("off", run(&load, Hedging::Off)),
        ("after what is usual", run(&load, Hedging::Usual)),
        ("after 0.32 s", run(&load, fixed)),
        ("after 0.32 s, pool full", run(&full, fixed)),
    ];
    let [(_, off), (_, usual), (_, after), (_, saturated)] = &contenders;
    let p99 = |seen: &Seen| seen.fast_quantile(0.99);
    let cut = |seen: &Seen| p99(off) / p99(seen);
    let row = |(name, seen): &(&'static str, Seen)| {
        (*name, vec![seen.fast_quantile(0.5), p99(seen), cut(seen), seen.more(), seen.hedges()])
    };
    Part {
        about: format!(
            "Hedges: {} calls, {} at once; times are {HEDGE_SCALE} of those aimed at (0.1 to 1.5 s, 5% of 20 s, by the \
             dice {:.1}%); the pool is full with {} at once",
            load.calls,
            load.at_once,
            off.stuck(STUCK) * 100.0,
            full.at_once
        ),
        columns: &["p50 s", "p99 s", "p99 cut by", "more tries, part of calls", "hedges while calls came"],
        rows: contenders.iter().map(row).collect(),
        aims: vec![
            ("p99 cut ≥3 times, after what is usual", cut(usual), cut(usual) >= 3.0),
            ("p99 cut ≥3 times, after a fixed time", cut(after), cut(after) >= 3.0),
            ("more tries ≤0.05, after what is usual", usual.more(), usual.more() <= 0.05),
            ("more tries ≤0.05, after a fixed time", after.more(), after.more() <= 0.05),
            ("hedges while the pool is full: 0", saturated.hedges(), saturated.hedges() < 1.0),
        ],
    }
}

/// Different prefixes, each about 2,000 tokens long.
const PREFIXES: usize = 64;
const PREFIX_BYTES: usize = 8_192;

/// What the engines' caches know of shared prefixes, and how calls are shared out.
fn prefixes(runtime: &Runtime, size: f64) -> Part {
    let settings = [
        ("engine.slots", SLOTS.to_string()),
        ("engine.prefill_tokens_per_s", "40000".to_owned()),
        ("engine.kv_blocks", "4096".to_owned()),
        ("answer.tokens", "16".to_owned()),
    ];
    let load = Load {
        calls: sized(2_000.0, size),
        at_once: SLOTS * REPLICAS / 2,
        slow_from: Duration::MAX,
        wait: Duration::from_secs(1),
        prompt: |number| {
            // Some are asked for far more often than others.
            let mut dice = forebay_tests::Dice::new(number.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            let prefix = dice.below(PREFIXES).min(dice.below(PREFIXES));
            let shared = format!("{prefix:03} ").repeat(PREFIX_BYTES / 4);
            format!("{shared} Why, for the {number}th time?")
        },
    };
    let run = |balance| load.run(runtime, &Servers::start(&settings), balance);
    let contenders = [
        ("pool", run(Balance::Pool(Hedging::Off))),
        ("round-robin", run(Balance::RoundRobin)),
        ("least requests", run(Balance::LeastRequests)),
    ];
    let row = |(name, seen): &(&'static str, Seen)| {
        let prompts = |number| (load.prompt)(number)[..PREFIX_BYTES].to_owned();
        (
            *name,
            vec![
                seen.hits(prompts),
                seen.most_loaded(REPLICAS),
                seen.fast_quantile(0.5),
                seen.fast_quantile(0.99),
            ],
        )
    };
    let rows: Vec<_> = contenders.iter().map(row).collect();
    let (hits, most) = (rows[0].1[0], rows[0].1[1]);
    Part {
        about: format!(
            "Prefixes: {} calls, {} at once, of {PREFIXES} prefixes of 2,048 tokens; the cache of a replica holds half of them, less what runs",
            load.calls, load.at_once
        ),
        columns: &[
            "tokens found in a cache, of the best",
            "most loaded replica, of the mean",
            "p50 s",
            "p99 s",
        ],
        rows,
        aims: vec![
            ("found in a cache ≥0.9 of the best", hits, hits >= 0.9),
            ("most loaded replica ≤1.5 of the mean", most, most <= 1.5),
        ],
    }
}
