//! Consumer groups while their members come and go, while the broker is away, and while a queue is full: on a real Kafka,
//! by the classic protocol and by that of KIP-848.
//!
//! What is asked: every request has exactly one result and one row; whoever is told to leave has left in time; whoever
//! stays works on meanwhile; and behind the last change the group settles.

#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a test that cannot go on says why by panicking"
)]

use forebay_tests::{
    Broker, Client, New, Reader, Record, Running, Signal,
    model::{ModelServer, Says},
    product::{DRAIN, Up, command, finish},
    services, wait_for,
};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    process::Command,
    time::{Duration, Instant},
};

/// How long anything may take that is not promised to be faster.
const LIMIT: Duration = Duration::from_secs(120);

/// What a model takes for a call.
const CALL: Duration = Duration::from_millis(50);

/// How long a partition that moves may take to drain.
const DRAIN_MAX: Duration = Duration::from_secs(10);

/// How long a group may take to settle where a drain takes no time: less than a session, since nobody may have to wait for
/// that of a member that has left.
const SETTLE_MAX: Duration = Duration::from_secs(8);

/// How often a member hears from its group.
const HEARTBEAT: Duration = Duration::from_secs(3);

/// Each step with the topic that it reads, and how many partitions its group has: twelve of each channel.
const STAGES: &[(&str, &str, usize)] = &[
    ("look_up", "requests", 72),
    ("retrieve", "questions", 72),
    ("infer", "prompts", 72),
    ("validate", "completions", 72),
    ("publish", "endings", 48),
];

/// The line of the configuration file that chooses the protocol of KIP-848.
const KIP_848: &str = "kafka: {group.protocol: consumer}\n";

/// Sessions as classic members have them; the broker's own are 45 s and 5 s.
const SHORT_SESSIONS: &[&str] = &[
    "group.consumer.min.session.timeout.ms=10000",
    "group.consumer.session.timeout.ms=10000",
    "group.consumer.min.heartbeat.interval.ms=3000",
    "group.consumer.heartbeat.interval.ms=3000",
];

/// A cluster with a pipeline on it, under a prefix of the test's own.
struct Site {
    servers: String,
    prefix: String,
    data: tempfile::TempDir,
    model: ModelServer,
    client: Client,
}

impl Site {
    fn new(servers: &str, name: &str, configuration: &str) -> Self {
        let prefix = format!("groups-{name}-{}-", std::process::id());
        let answer = || Box::new(Says::Text("A stub answers.".to_owned()));
        let site = Self {
            servers: servers.to_owned(),
            client: Client::new(servers, &prefix),
            prefix,
            data: tempfile::tempdir().unwrap(),
            model: ModelServer::start(move |_| Says::After(CALL, answer())),
        };
        std::fs::write(site.data.path().join("forebay.yaml"), configuration).unwrap();
        let applied = finish(&mut site.command(&["topics", "apply"]), LIMIT);
        assert_eq!(applied.code, 0, "{applied:?}");
        site
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = command(self.data.path(), arguments);
        command.arg("--config").arg(self.data.path().join("forebay.yaml"));
        command.args(["--bootstrap-servers", &self.servers, "--topic-prefix", &self.prefix]);
        command.args(["--model-url", &self.model.url(), "--model", "stub"]);
        command
    }

    fn up(&self) -> Up {
        Up::wait("forebay up", &mut self.command(&["up", "--admin", "127.0.0.1:0"]))
    }

    /// One more member of a step; nobody waits until it is ready.
    fn member(&self, stage: &str) -> Running {
        Running::start(&format!("stage {stage}"), &mut self.command(&["run", "answer", "--stage", stage]))
    }

    /// Writes requests that are no repetitions, with the ids from `r{first}` on.
    fn write(&self, first: usize, count: usize) {
        let request = |number: usize| json!({"id": format!("r{number}"), "prompt": format!("What is {number}?"), "cache": {"no_cache": true}});
        self.client.write("requests", (first..first + count).map(request).map(New::from));
    }

    /// Waits until each request has its result and all groups have read all; then nothing may have come twice.
    fn check_each_once(&self, results: &mut Reader, written: usize) {
        results.until("a result for each request", LIMIT, |records| {
            (by_key(records).len() >= written).then_some(())
        });
        for (stage, topic, _) in STAGES {
            wait_for(&format!("no lag of {stage}"), LIMIT, || {
                (self.client.lag(&format!("answer.{stage}"), topic) == 0).then_some(())
            });
        }
        let outcomes = self.client.read("outcomes").to_the_end(LIMIT).to_vec();
        for (what, records) in [("results", results.to_the_end(LIMIT)), ("outcomes", &outcomes)] {
            let counts = by_key(records);
            let doubled: Vec<_> = counts.iter().filter(|(_, count)| **count != 1).collect();
            assert!(doubled.is_empty(), "{} {what} came again: {doubled:?}", doubled.len());
            assert_eq!(counts.len(), written, "{what}");
        }
        assert!(results.records().iter().all(|record| record.json()["status"] == "answered"));
    }
}

/// How many records each key has.
fn by_key(records: &[Record]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for record in records {
        *counts.entry(record.key_text()).or_default() += 1;
    }
    counts
}

/// Whether a process has said that it is up; one that has only just begun does not listen to signals yet.
fn is_up(process: &Running) -> bool {
    process.stderr().contains("\n  stop ")
}

/// How many partitions of a step these processes hold.
fn assigned(processes: &[Up], stage: &str) -> usize {
    let label = format!("stage=\"{stage}\"");
    let of_process = |up: &Up| {
        let (status, body) = up.get("/metrics");
        assert_eq!(status, 200, "{body}");
        let of_stage = body
            .lines()
            .filter(|line| line.starts_with("forebay_step_assigned_partitions{") && line.contains(&label));
        of_stage.map(|line| line.rsplit(' ').next().unwrap().parse::<usize>().expect(line)).sum::<usize>()
    };
    processes.iter().map(of_process).sum()
}

fn is_all_assigned(processes: &[Up]) -> bool {
    STAGES.iter().all(|(stage, _, partitions)| assigned(processes, stage) == *partitions)
}

/// The longest time in which no result came.
fn longest_gap(results: &[Record]) -> Duration {
    let times: BTreeSet<i64> = results.iter().map(|record| record.timestamp_ms).collect();
    let times: Vec<_> = times.into_iter().collect();
    let gaps = times.windows(2).map(|pair| pair[1].abs_diff(pair[0]));
    Duration::from_millis(gaps.max().unwrap_or(0))
}

/// How long members come and go, and how often.
const STORM: Duration = Duration::from_secs(40);
const EVERY: Duration = Duration::from_secs(2);

/// How many members there are at a time, beside the process with all stages.
const MEMBERS: usize = 4;

/// A member that was told to leave.
struct Leaving {
    process: Running,
    since: Instant,
}

impl Leaving {
    fn tell(process: Running) -> Self {
        process.signal(Signal::TERM);
        Self { process, since: Instant::now() }
    }

    /// Whether it has left; it must have done so well, and in time.
    fn has_left(&mut self) -> bool {
        if self.process.is_alive() {
            assert!(
                self.since.elapsed() < DRAIN,
                "no end {DRAIN:?} after SIGTERM: {}",
                self.process.stderr()
            );
            return false;
        }
        assert_eq!(self.process.ended(DRAIN).code(), Some(0), "the end after SIGTERM");
        true
    }
}

/// What is left of a storm; for whoever reads the output.
#[derive(Debug)]
#[expect(dead_code, reason = "it is printed")]
struct Calm {
    written: usize,
    settled: Duration,
    gap: Duration,
}

/// Members of each step come and go beside a process with all stages, while a client asks without end.
fn storm(site: &Site) -> Calm {
    let up = site.up();
    let mut results = site.client.read("results");
    let mut members: VecDeque<(&str, Running)> = VecDeque::new();
    let mut leaving: Vec<Leaving> = Vec::new();
    let mut stages = STAGES.iter().map(|(stage, ..)| *stage).cycle();
    let begin = Instant::now();
    let (mut written, mut next_write, mut next_change) = (0, begin, begin + EVERY);
    wait_for("the end of the storm", LIMIT, || {
        let now = Instant::now();
        // As fast as a slow machine can follow: what waits at the end is waited for.
        if now >= next_write && written - results.to_the_end(LIMIT).len() < 1_000 {
            site.write(written, 20);
            (written, next_write) = (written + 20, now + Duration::from_millis(200));
        }
        if now >= next_change {
            next_change = now + EVERY;
            let stage = stages.next().unwrap();
            members.push_back((stage, site.member(stage)));
            if members.len() > MEMBERS && is_up(&members[0].1) {
                leaving.extend(members.pop_front().map(|(_, process)| Leaving::tell(process)));
            }
        }
        leaving.retain_mut(|member| !member.has_left());
        (begin.elapsed() > STORM).then_some(())
    });
    // The last change: two members stay, all others leave at once.
    let mut all: Vec<Up> = members.into_iter().map(|(stage, process)| Up::of(stage, process)).collect();
    leaving.extend(all.drain(2..).map(|member| Leaving::tell(member.process)));
    all.push(up);
    let last_change = Instant::now();
    wait_for("all members to leave", LIMIT, || {
        leaving.retain_mut(|member| !member.has_left());
        leaving.is_empty().then_some(())
    });
    wait_for("all partitions to be assigned", SETTLE_MAX, || is_all_assigned(&all).then_some(()));
    let (settled, stable) = (last_change.elapsed(), Instant::now() + HEARTBEAT);
    wait_for("a heartbeat", LIMIT, || {
        assert!(is_all_assigned(&all), "settled after {settled:?}, and not for long");
        (Instant::now() > stable).then_some(())
    });
    site.check_each_once(&mut results, written);
    let gap = longest_gap(results.records());
    // A partition that moves is drained and then waits for the next heartbeat; all others go on meanwhile.
    assert!(gap < DRAIN_MAX + HEARTBEAT, "{gap:?} without a result");
    let mut leaving: Vec<_> = all.into_iter().map(|up| Leaving::tell(up.process)).collect();
    wait_for("all to end", LIMIT, || leaving.iter_mut().all(Leaving::has_left).then_some(()));
    Calm { written, settled, gap }
}

#[test]
fn each_request_has_one_result_while_members_come_and_go() {
    let Some(servers) = services::kafka() else { return };
    println!("{:?}", storm(&Site::new(&servers, "classic", "")));
}

#[test]
fn each_request_has_one_result_while_members_come_and_go_by_kip_848() {
    let Some(broker) = Broker::start(SHORT_SESSIONS) else { return };
    println!("{:?}", storm(&Site::new(&broker.servers(), "kip848", KIP_848)));
}

/// Writes more requests and waits until a part of them has its result, so that work is under way at every step.
fn ask_more(site: &Site, results: &mut Reader, written: &mut usize) {
    site.write(*written, 200);
    let seen = results.records().len();
    results.at_least(seen + 50, LIMIT);
    *written += 200;
}

#[test]
fn each_request_has_one_result_whoever_is_killed_or_stopped_by_kip_848() {
    let Some(broker) = Broker::start(SHORT_SESSIONS) else { return };
    let site = Site::new(&broker.servers(), "killed", KIP_848);
    let start = |stage: &str| Up::of(stage, site.member(stage));
    let mut processes = vec![site.up(), start("infer"), start("publish")];
    wait_for("all partitions", LIMIT, || is_all_assigned(&processes).then_some(()));
    let (mut results, mut written) = (site.client.read("results"), 0);
    for stage in ["infer", "publish"] {
        ask_more(&site, &mut results, &mut written);
        processes.remove(1).kill();
        processes.push(start(stage));
    }
    // Shorter than a session, and longer than the fence lets pass unasked.
    ask_more(&site, &mut results, &mut written);
    let publish = processes.last().expect("a second publish");
    publish.process.signal(Signal::STOP);
    let until = Instant::now() + Duration::from_secs(7);
    wait_for("the end of the freeze", LIMIT, || (Instant::now() > until).then_some(()));
    publish.process.signal(Signal::CONT);
    ask_more(&site, &mut results, &mut written);
    site.check_each_once(&mut results, written);
    processes.into_iter().for_each(Up::drain);
}

#[test]
fn what_was_paused_goes_on_when_its_partitions_come_back() {
    /// More than may wait for the model in one process.
    const REQUESTS: usize = 3_000;
    let Some(servers) = services::kafka() else { return };
    let site = Site::new(&servers, "paused", "");
    site.model.let_through(0);
    let up = site.up();
    site.write(0, REQUESTS);
    wait_for("all to wait for the model", LIMIT, || {
        (site.client.lag("answer.retrieve", "questions") == 0
            && site.client.lag("answer.infer", "prompts") >= 3_000)
            .then_some(())
    });
    let member = Up::of("a second infer", site.member("infer"));
    let up = [up];
    wait_for("half of the partitions", LIMIT, || (assigned(&up, "infer") == 36).then_some(()));
    wait_for("the other half", LIMIT, || {
        (assigned(std::slice::from_ref(&member), "infer") == 36).then_some(())
    });
    member.drain();
    wait_for("all partitions", LIMIT, || (assigned(&up, "infer") == 72).then_some(()));
    site.model.let_through(usize::MAX);
    site.check_each_once(&mut site.client.read("results"), REQUESTS);
    up.into_iter().for_each(Up::drain);
}

/// How long the broker is away: far longer than a session, and longer than anything may stand still.
const OUTAGE: Duration = Duration::from_secs(45);

#[test]
fn an_outage_of_the_broker_is_waited_for() {
    let Some(mut broker) = Broker::start(&[]) else { return };
    let site = Site::new(&broker.servers(), "outage", "");
    let mut processes = vec![site.up(), Up::of("a second publish", site.member("publish"))];
    let mut results = site.client.read("results");
    // Work is under way at every step, and results are on their way.
    site.write(0, 1_000);
    results.at_least(300, LIMIT);
    broker.kill();
    let mut is_well = || {
        for up in &mut processes {
            up.process.must_run();
            let (status, body) = up.get("/healthz");
            assert_eq!(status, 200, "{body}");
        }
    };
    let until = Instant::now() + OUTAGE;
    wait_for("the end of the outage", LIMIT, || {
        is_well();
        (Instant::now() > until).then_some(())
    });
    broker.restart();
    let back = Instant::now();
    wait_for("a result for each request", LIMIT, || {
        is_well();
        (by_key(results.to_the_end(LIMIT)).len() >= 1_000).then_some(())
    });
    println!("all results {:?} after the broker was back", back.elapsed());
    site.check_each_once(&mut results, 1_000);
    site.write(1_000, 100);
    site.check_each_once(&mut results, 1_100);
    processes.into_iter().for_each(Up::drain);
}
