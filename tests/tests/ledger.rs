//! The ledger of paid calls, against a model server that counts: processes are killed, frozen, stopped and restarted while
//! calls are under way.
//!
//! Oracle: each request has one result. A model is called again for a request only if the call before failed or is told
//! of as ambiguous ([`Account`]). Where nobody is killed, nothing is called twice.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says why by panicking")]

use forebay_schemas::{Attempt, Record as _};
use forebay_tests::{
    Account, Client, Dice, New, Reader, Running, Signal, free_port,
    model::{ModelServer, Says},
    product::{DRAIN, Up, command, finish},
    services, wait_for,
};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    path::Path,
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// How long all that is left may take after the last kill: a session, the ledger's lease, the retry topics.
const LIMIT: Duration = Duration::from_secs(180);

/// Kills of one run where nobody says otherwise.
const KILLS: usize = 9;

/// Steps before and after the paid one; nobody touches them here.
const OTHERS: &[&str] = &["look_up", "retrieve", "validate", "publish"];

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

/// A model that takes 50 to 300 ms; of `fails` calls one is refused.
fn model(fails: Option<u64>) -> ModelServer {
    let count = AtomicU64::new(1);
    ModelServer::start(move |_| {
        let number = count.fetch_add(1, Ordering::Relaxed);
        let says = match fails {
            Some(fails) if number.is_multiple_of(fails) => Says::Refusal(503, "busy".to_owned()),
            _ => Says::Text("A stub answers.".to_owned()),
        };
        Says::After(Duration::from_millis(50 + number * 7919 % 250), Box::new(says))
    })
}

fn question(number: usize) -> String {
    format!("What is request r{number}?")
}

fn ask(client: &Client, numbers: std::ops::Range<usize>) {
    let request = |number: usize| json!({"id": format!("r{number}"), "prompt": question(number), "cache": {"no_cache": true}});
    client.write("requests", numbers.map(request).map(New::from));
}

/// Waits for a result of each request; no request may have two. Then takes the account of its calls.
#[expect(clippy::print_stdout, reason = "the figures of a run by hand")]
fn all_ended(client: &Client, model: &ModelServer, results: &mut Reader, requests: usize) -> Account {
    results.until("a result for each request", LIMIT, |records| {
        let ids: BTreeSet<_> = records.iter().map(|record| record.key_text()).collect();
        (ids.len() >= requests).then_some(())
    });
    let results: Vec<_> = results.to_the_end(LIMIT).iter().map(|record| record.json()).collect();
    assert_eq!(results.len(), requests, "one result each");
    let asked = results.iter().map(|result| {
        let id = result["id"].as_str().unwrap();
        (id, result, question(id[1..].parse().unwrap()))
    });
    let account = Account::of(client, model, asked, LIMIT);
    println!("{account:?}");
    assert!(account.unexplained.is_empty(), "{:#?}", account.unexplained);
    account
}

/// Waits until some of what was asked has its result, and more calls are made.
fn under_way(results: &mut Reader, model: &ModelServer) {
    let (seen, called) = (results.records().len(), model.calls().len());
    results.at_least(seen + 5, LIMIT);
    wait_for("calls under way", LIMIT, || (model.calls().len() > called + 20).then_some(()));
}

/// Stages as processes on one Kafka.
struct Stages<'a> {
    data: &'a Path,
    servers: String,
    prefix: String,
    url: String,
    config: std::path::PathBuf,
}

impl Stages<'_> {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = command(self.data, arguments);
        command.args(["--bootstrap-servers", &self.servers, "--topic-prefix", &self.prefix]);
        command.args(["--model-url", &self.url, "--model", "stub", "--config"]).arg(&self.config);
        command
    }

    fn run(&self, stage: &str) -> Running {
        Running::start(&format!("stage {stage}"), &mut self.command(&["run", "answer", "--stage", stage]))
    }
}

fn on_kafka(
    name: &str,
    fails: Option<u64>,
    befall: impl FnOnce(&Stages<'_>, &Client, &mut Reader, &ModelServer) -> usize,
) {
    let Some(servers) = services::kafka() else { return };
    let data = tempfile::tempdir().unwrap();
    let config = data.path().join("forebay.yaml");
    // The shortest that a broker takes by default: a kill costs a session.
    std::fs::write(&config, "kafka: {session.timeout.ms: 6000, heartbeat.interval.ms: 1500}\n").unwrap();
    let model = model(fails);
    let prefix = format!("ledger-{name}-{}-", std::process::id());
    let client = Client::new(&servers, &prefix);
    let stages = Stages { data: data.path(), servers, prefix, url: model.url(), config };
    let applied = finish(&mut stages.command(&["topics", "apply"]), LIMIT);
    assert_eq!(applied.code, 0, "{applied:?}");
    let mut others: Vec<_> = OTHERS.iter().map(|stage| stages.run(stage)).collect();
    let mut results = client.read("results");
    let requests = befall(&stages, &client, &mut results, &model);
    let account = all_ended(&client, &model, &mut results, requests);
    if name == "restarts" {
        assert_eq!((account.calls, account.ambiguous), (requests, 0), "nobody was killed");
    }
    others.iter_mut().for_each(drain);
}

fn drain(process: &mut Running) {
    process.signal(Signal::TERM);
    assert!(matches!(process.ended(DRAIN).code(), Some(0) | None), "the end: {}", process.stderr());
}

/// What was told of as ambiguous is shown from its beginning to its answer, and the answer only to who asks for it.
fn shows(data: &Path, client: &Client) {
    let mut rows = client.read("attempts");
    let rows = rows
        .to_the_end(LIMIT)
        .iter()
        .map(|record| Attempt::decode(record.value.as_deref().unwrap()).unwrap());
    let call = rows.into_iter().find(|row| row.status == "ambiguous").unwrap().call_id;
    let show = |more: &[&str]| finish(command(data, &["ledger", "show", &call]).args(more), LIMIT);
    let (plain, answer, json) = (show(&[]), show(&["--answer"]), show(&["--json"]));
    assert_eq!((plain.code, answer.code, json.code), (0, 0, 0), "{plain:?} {answer:?} {json:?}");
    assert!(
        plain.stdout.contains("started") && !plain.stdout.contains("A stub answers."),
        "{}",
        plain.stdout
    );
    let lines: Vec<Value> = json.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let owners: BTreeSet<_> = lines.iter().map(|line| line["owner"].as_str().unwrap()).collect();
    assert!(owners.len() > 1 && lines.iter().all(|line| line["call_id"] == call.as_str()), "{lines:?}");
    if lines.iter().any(|line| line["kind"] == "done") {
        assert!(answer.stdout.contains("A stub answers."), "{}", answer.stdout);
    }
    let unknown = finish(&mut command(data, &["ledger", "show", &"0".repeat(32)]), LIMIT);
    assert_eq!((unknown.code, unknown.stdout.as_str()), (1, ""), "{unknown:?}");
    assert_eq!(finish(&mut command(data, &["ledger", "show", "r1"]), LIMIT).code, 2);
}

#[test]
fn no_call_is_repeated_without_an_explanation_whoever_is_killed() {
    on_kafka("kills", Some(23), |stages, client, results, model| {
        let (kills, seed) =
            (setting("FOREBAY_LEDGER_KILLS", KILLS), setting("FOREBAY_LEDGER_SEED", 20_261_124));
        println!("FOREBAY_LEDGER_SEED={seed} FOREBAY_LEDGER_KILLS={kills}");
        let mut dice = Dice::new(seed);
        let mut infer = vec![stages.run("infer"), stages.run("infer"), stages.run("infer")];
        // What it had not committed comes to the paid step a second time, from whoever takes its place.
        let mut before = stages.run("retrieve");
        let mut written = 0;
        for kill in 0..kills {
            ask(client, written..written + 150);
            written += 150;
            under_way(results, model);
            let some = Instant::now() + Duration::from_millis(u64::try_from(dice.below(400)).unwrap());
            wait_for("a moment", LIMIT, || (Instant::now() > some).then_some(()));
            let at = dice.below(3);
            if kill % 4 == 1 {
                // Frozen for longer than its session and its lease: it wakes as if it still had both.
                infer[at].signal(Signal::STOP);
                let freeze = Instant::now() + Duration::from_secs(9);
                wait_for("the end of the freeze", LIMIT, || (Instant::now() > freeze).then_some(()));
                infer[at].signal(Signal::CONT);
                continue;
            }
            let (stage, mut victim) = match kill % 4 {
                3 => ("retrieve", std::mem::replace(&mut before, stages.run("retrieve"))),
                _ => ("infer", infer.remove(at)),
            };
            victim.signal(Signal::KILL);
            victim.ended(DRAIN);
            if stage == "infer" {
                infer.push(stages.run(stage));
            }
        }
        results.until("a result for each request", LIMIT, |records| (records.len() >= written).then_some(()));
        infer.iter_mut().chain([&mut before]).for_each(drain);
        written
    });
}

#[test]
fn nothing_is_called_twice_while_every_process_is_restarted_in_turn() {
    on_kafka("restarts", None, |stages, client, results, model| {
        let mut infer = vec![stages.run("infer"), stages.run("infer")];
        let mut written = 0;
        for _ in 0..4 {
            ask(client, written..written + 300);
            written += 300;
            under_way(results, model);
            let mut old = infer.remove(0);
            drain(&mut old);
            infer.push(stages.run("infer"));
        }
        results.until("a result for each request", LIMIT, |records| (records.len() >= written).then_some(()));
        infer.iter_mut().for_each(drain);
        written
    });
}

#[test]
fn on_the_embedded_broker_no_call_is_repeated_without_an_explanation_when_all_is_killed() {
    let model = model(Some(23));
    let data = tempfile::tempdir().unwrap();
    let listen = format!("127.0.0.1:{}", free_port());
    let url = model.url();
    let arguments =
        ["up", "--listen", &listen, "--admin", "127.0.0.1:0", "--model-url", &url, "--model", "stub"];
    let start = || Up::wait("forebay up", &mut command(data.path(), &arguments));
    let mut up = start();
    let client = up.client();
    let mut results = client.read("results");
    let mut written = 0;
    for _ in 0..3 {
        ask(&client, written..written + 200);
        written += 200;
        under_way(&mut results, &model);
        up.kill();
        up = start();
    }
    all_ended(&client, &model, &mut results, written);
    let metrics = up.get("/metrics").1;
    assert!(metrics.contains("forebay_ledger_entries"), "{metrics}");
    shows(data.path(), &client);
    up.drain();
}
