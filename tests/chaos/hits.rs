//! Stages on a real Kafka while their processes are killed, frozen and stopped at random; and all in one process, with the
//! embedded broker, killed again and again.
//!
//! Each job step has two processes. A seed chooses who is hit, when and how: `kill -9`, SIGSTOP for longer or shorter than
//! the session, SIGTERM. What is asked: every request has exactly one result and one row, whatever was hit. The residual
//! that is promised no better: what a process had already on its way to Kafka when it was frozen for longer than its
//! session may come a second time, byte for byte; it is counted.
//!
//! By hand, for longer: `FOREBAY_CHAOS_HITS=200 FOREBAY_CHAOS_SEED=7 FOREBAY_CHAOS_BETWEEN=500 tests/run -- --test chaos --nocapture`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says why by panicking")]

use forebay_tests::{
    Client, New, Record, Running, Signal, free_port,
    product::{DRAIN, Up, command, finish},
    services, wait_for,
};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

/// How long all that is left may take when the last hit is over: a session, the rebalance, the backlog.
const LIMIT: Duration = Duration::from_secs(120);

/// Hits of one run where nobody says otherwise.
const HITS: usize = 30;

/// Kills of one run of everything in one process.
const KILLS: usize = 15;

/// Messages that a frozen process may have had on its way.
const ON_ITS_WAY_MAX: usize = 64;

/// Requests that are written between two hits where nobody says otherwise.
const BETWEEN: usize = 100;

const STAGES: &[(&str, &str)] = &[
    ("look_up", "requests"),
    ("retrieve", "questions"),
    ("infer", "prompts"),
    ("validate", "completions"),
    ("publish", "endings"),
];

/// A small generator of the test's own (xorshift64*), so that a seed means the same on every machine.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33;
        usize::try_from(high).unwrap() % bound
    }
}

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

#[test]
fn every_request_has_one_result_whoever_is_killed() {
    let Some(servers) = services::kafka() else { return };
    let (hits, seed) = (setting("FOREBAY_CHAOS_HITS", HITS), setting("FOREBAY_CHAOS_SEED", 20_261_124));
    println!("FOREBAY_CHAOS_SEED={seed} FOREBAY_CHAOS_HITS={hits}");
    let mut dice = Dice(u64::try_from(seed).unwrap() | 1);
    let data = tempfile::tempdir().unwrap();
    let prefix = format!("chaos-{}-", std::process::id());
    let client = Client::new(&servers, &prefix);
    let on_kafka = |arguments: &[&str]| {
        let mut command = command(data.path(), arguments);
        command.args(["--bootstrap-servers", &servers, "--topic-prefix", &prefix]);
        command
    };
    let applied = finish(&mut on_kafka(&["topics", "apply"]), LIMIT);
    assert_eq!(applied.code, 0, "{applied:?}");
    // Nobody waits until it is ready: the next hit may well come first.
    let start = |stage: &str| {
        Running::start(&format!("stage {stage}"), &mut on_kafka(&["run", "answer", "--stage", stage]))
    };
    let mut processes: Vec<(&str, Running)> =
        STAGES.iter().chain(STAGES).map(|(stage, _)| (*stage, start(stage))).collect();
    let mut results = client.read("results");
    let between = setting("FOREBAY_CHAOS_BETWEEN", BETWEEN);
    let (mut written, mut frozen) = (0, 0);
    let write = |written: &mut usize| {
        let request = |number: usize| json!({"id": format!("r{number}"), "prompt": format!("What is {}?", number % 500)});
        client.write("requests", (*written..*written + between).map(request).map(New::from));
        *written += between;
    };
    for _ in 0..hits {
        write(&mut written);
        // Somewhere on its way: a part of these has its result, and the rest does not.
        let part = results.records().len() + dice.below(between / 2) + 1;
        // A hit process may hold all of these until its session is over: then the next is hit meanwhile.
        let until = Instant::now() + Duration::from_secs(2);
        wait_for("a part of the results, or its time", LIMIT, || {
            (results.to_the_end(LIMIT).len() >= part || Instant::now() > until).then_some(())
        });
        let (stage, mut process) = processes.remove(dice.below(processes.len()));
        match dice.below(10) {
            0..6 => {
                process.signal(Signal::KILL);
                process.ended(DRAIN);
            }
            6..8 => {
                // Frozen for 1 to 14 s, around the session timeout of 10 s; it goes on as if nothing had been.
                process.signal(Signal::STOP);
                let freeze = Duration::from_millis(u64::try_from(1_000 + dice.below(13_000)).unwrap());
                let until = Instant::now() + freeze;
                // The last heartbeat may be an interval old.
                frozen += usize::from(freeze > Duration::from_secs(7));
                // Others go on meanwhile.
                write(&mut written);
                wait_for("the end of the freeze", LIMIT, || (Instant::now() > until).then_some(()));
                process.signal(Signal::CONT);
                processes.push((stage, process));
                continue;
            }
            _ => drain(&mut process),
        }
        processes.push((stage, start(stage)));
    }
    results.until("a result for each request", LIMIT, |records| {
        (by_key(records).len() >= written).then_some(())
    });
    for (stage, topic) in STAGES {
        wait_for(&format!("no lag of {stage}"), LIMIT, || {
            (client.lag(&format!("answer.{stage}"), topic) == 0).then_some(())
        });
    }
    for (what, records) in
        [("results", results.to_the_end(LIMIT)), ("outcomes", client.read("outcomes").to_the_end(LIMIT))]
    {
        let repeats = records.len() - by_key(records).len();
        println!("{what}: {} for {written} requests, {repeats} of them repeats", records.len());
        assert_eq!(by_key(records).len(), written, "{what}");
        assert!(repeats <= frozen * ON_ITS_WAY_MAX, "{repeats} repeated {what} after {frozen} long freezes");
        let different: BTreeSet<_> =
            records.iter().map(|record| (record.key_text(), &record.value)).collect();
        assert_eq!(different.len(), written, "{what} that came again with other bytes");
    }
    assert!(results.records().iter().all(|record| record.json()["status"] == "answered"));
    for (_, process) in &mut processes {
        drain(process);
    }
}

#[test]
fn every_request_has_one_result_however_often_the_whole_process_is_killed() {
    let (kills, seed) = (setting("FOREBAY_CHAOS_KILLS", KILLS), setting("FOREBAY_CHAOS_SEED", 20_261_124));
    println!("FOREBAY_CHAOS_SEED={seed} FOREBAY_CHAOS_KILLS={kills}");
    let mut dice = Dice(u64::try_from(seed).unwrap() | 1);
    let data = tempfile::tempdir().unwrap();
    // The same port again, so that clients find the broker that is back.
    let listen = format!("127.0.0.1:{}", free_port());
    let start = || {
        let arguments = ["up", "--listen", &listen, "--admin", "127.0.0.1:0"];
        Up::wait("forebay up", &mut command(data.path(), &arguments))
    };
    let mut up = start();
    let client = up.client();
    let mut results = client.read("results");
    let mut written = 0;
    for _ in 0..kills {
        let request = |number: usize| json!({"id": format!("r{number}"), "prompt": format!("What is {}?", number % 500)});
        client.write("requests", (written..written + BETWEEN).map(request).map(New::from));
        written += BETWEEN;
        // Between any two lines: at once, or anywhere until all are through.
        let until = Instant::now() + Duration::from_millis(u64::try_from(dice.below(1_500)).unwrap());
        wait_for("the moment of the kill", LIMIT, || (Instant::now() > until).then_some(()));
        up.kill();
        up = start();
    }
    results.until("a result for each request", LIMIT, |records| {
        (by_key(records).len() >= written).then_some(())
    });
    wait_for("no lag of publish", LIMIT, || (client.lag("answer.publish", "endings") == 0).then_some(()));
    let doubled = |records: &[Record]| by_key(records).into_iter().filter(|(_, count)| *count > 1).count();
    assert_eq!((doubled(results.to_the_end(LIMIT)), results.records().len()), (0, written));
    let outcomes = client.read("outcomes").to_the_end(LIMIT).to_vec();
    assert_eq!((doubled(&outcomes), outcomes.len()), (0, written));
    assert!(results.records().iter().all(|record| record.json()["status"] == "answered"));
    up.drain();
}

fn drain(process: &mut Running) {
    process.signal(Signal::TERM);
    // One that has only just begun does not listen to signals yet, and dies of it.
    assert!(
        matches!(process.ended(DRAIN).code(), Some(0) | None),
        "the end after SIGTERM: {}",
        process.stderr()
    );
}

/// How many records each key has.
fn by_key(records: &[Record]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for record in records {
        *counts.entry(record.key_text()).or_default() += 1;
    }
    counts
}
