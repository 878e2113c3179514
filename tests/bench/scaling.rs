//! Does twice the processes mean twice the calls?
//!
//! One, two, four and eight processes of the step `infer` on as many partitions of a real Apache Kafka, each with 64 calls of half a
//! second under way: the ideal is 128 a second for each. What they work off was retrieved before they start.

use super::{LIMIT, Site, request};
use forebay_tests::{
    Broker, Client,
    product::{Up, command, finish},
    wait_for,
};
use std::time::{Duration, Instant};

const CALLS: u32 = 64;
const CALL: Duration = Duration::from_millis(500);
/// From the first answer until all members have joined and hold all their calls.
const WARM_UP: Duration = Duration::from_secs(16);
const MEASURED: Duration = Duration::from_secs(12);

pub fn scaling(site: &Site) {
    let Some(kafka) = Broker::start(&[]) else {
        println!("  needs Apache Kafka: tests/bench/run has the jars where Java 17 and Maven are");
        return;
    };
    let ideal = f64::from(CALLS) / CALL.as_secs_f64();
    let mut alone = None;
    for processes in [1_u32, 2, 4, 8] {
        let (rate, cpus) = run(site, &kafka.servers(), processes);
        let alone = *alone.get_or_insert(rate);
        println!(
            "  {processes} processes: {rate:.0} calls a second, {:.3} of the ideal, {:.3} of so many times one; {cpus:.2} CPUs",
            rate / (ideal * f64::from(processes)),
            rate / (alone * f64::from(processes)),
        );
    }
}

/// Answers a second, and the CPUs that the processes took.
fn run(site: &Site, servers: &str, processes: u32) -> (f64, f64) {
    let data = tempfile::tempdir().expect("a folder");
    let prefix = format!("scaling-{processes}-");
    let on_kafka = |arguments: &[&str]| {
        let mut command = command(data.path(), arguments);
        command.args(["--bootstrap-servers", servers, "--topic-prefix", &prefix]);
        command.env("FOREBAY_PARTITIONS", processes.to_string());
        command
    };
    let applied = finish(&mut on_kafka(&["topics", "apply"]), LIMIT);
    assert_eq!(applied.code, 0, "{applied:?}");
    let stage = |name: &str| {
        let arguments = ["run", "answer", "--stage", name, "--model-url", &site.model, "--model", "stub"];
        Up::wait(name, on_kafka(&arguments).args(["--admin", "127.0.0.1:0"]))
    };
    let client = Client::new(servers, &prefix);
    let seconds = (WARM_UP + MEASURED).as_secs() + 20;
    let count = u32::try_from(seconds).expect("seconds") * processes * CALLS * 2;
    let retrieved = {
        let _before = [stage("look_up"), stage("retrieve")];
        for first in (0..count).step_by(10_000) {
            let ids = first..count.min(first + 10_000);
            client.write("requests", ids.map(|id| request(&format!("s{id}"), "default", "wait 500")));
        }
        let mut prompts = client.read("prompts");
        prompts.at_least(usize::try_from(count).expect("a count"), LIMIT).len()
    };
    let members: Vec<_> = (0..processes).map(|_| stage("infer")).collect();
    let mut completions = client.read("completions");
    completions.at_least(1, LIMIT);
    let warm = Instant::now() + WARM_UP;
    wait_for("the members to be at work", LIMIT, || {
        completions.to_the_end(LIMIT);
        (Instant::now() >= warm).then_some(())
    });
    let before = (Instant::now(), completions.to_the_end(LIMIT).len(), ticks(&members));
    std::thread::park_timeout(MEASURED);
    let after = (Instant::now(), completions.to_the_end(LIMIT).len(), ticks(&members));
    assert!(after.1 < retrieved, "the backlog ended before the measuring did");
    let took = (after.0 - before.0).as_secs_f64();
    let answered = u32::try_from(after.1 - before.1).map_or(0.0, f64::from);
    (answered / took, (after.2 - before.2) / took)
}

/// CPU-seconds of these processes.
fn ticks(members: &[Up]) -> f64 {
    let of = |member: &Up| {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", member.process.id())).expect("a process");
        let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
        (ticks(11) + ticks(12)) / 100.0
    };
    members.iter().map(of).sum()
}
