//! A pipeline under a prefix of its own, its processes, its clients, a model server that counts, and what is asked of all of
//! them at the end, whatever befell them.

use crate::onlooker::{Onlooker, STAGES};
use forebay_tests::{
    Account, Client, New, Reader, Record, Running, Signal, forebay,
    model::{ModelServer, Says},
    product::{DRAIN, Up, command, command_of, finish},
    wait_for,
};
use serde_json::json;
use std::{
    cell::Cell,
    collections::BTreeMap,
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// How long all that is left may take when nothing is hit any more: a session, the ledger's lease, the retry topics.
pub const LIMIT: Duration = Duration::from_secs(180);

/// Messages that a process may have had on its way when it was frozen, or cut off, for longer than its session.
pub const ON_ITS_WAY_MAX: usize = 64;

/// Of so many calls one is refused.
const REFUSED: u64 = 23;

/// A pipeline on a cluster.
pub struct Site {
    /// A client of it, by a path that nothing befalls.
    pub client: Client,
    pub model: ModelServer,
    data: tempfile::TempDir,
    prefix: String,
    /// What processes are told of where the model is.
    model_url: String,
    onlooker: Option<Onlooker>,
    /// How many processes of one step were started.
    members: Cell<usize>,
}

/// What came out of a run.
#[derive(Debug)]
#[expect(dead_code, reason = "it is printed")]
pub struct Report {
    requests: usize,
    repeated_results: usize,
    repeated_outcomes: usize,
    hits_of_cache: usize,
    account: Account,
    offsets_judged: usize,
}

/// A model that takes 50 to 300 ms, and refuses a call now and then.
fn model() -> ModelServer {
    let count = AtomicU64::new(1);
    ModelServer::start(move |_| {
        let number = count.fetch_add(1, Ordering::Relaxed);
        let says = match number.is_multiple_of(REFUSED) {
            true => Says::Refusal(503, "busy".to_owned()),
            false => Says::Text("A stub answers.".to_owned()),
        };
        Says::After(Duration::from_millis(50 + number * 7919 % 250), Box::new(says))
    })
}

/// What a request asks. Every tenth asks what was asked five requests before it.
fn question(number: usize) -> String {
    format!("What is request r{}?", if number % 10 == 9 { number - 5 } else { number })
}

impl Site {
    /// A pipeline on the cluster at `servers`, configured so.
    pub fn new(name: &str, servers: &str, configuration: &str) -> Self {
        let prefix = format!("chaos-{name}-{}-", std::process::id());
        let (model, data) = (model(), tempfile::tempdir().unwrap());
        std::fs::write(data.path().join("forebay.yaml"), configuration).unwrap();
        let (client, model_url) = (Client::new(servers, &prefix), model.url());
        let mut site = Self { client, model, data, prefix, model_url, onlooker: None, members: Cell::new(0) };
        let applied = finish(&mut site.command(&["topics", "apply"]), LIMIT);
        assert_eq!(applied.code, 0, "{applied:?}");
        site.onlooker = Some(Onlooker::start(&site.client));
        site
    }

    /// The same, with its processes calling the model here.
    #[must_use]
    pub fn calling(self, model_url: &str) -> Self {
        Self { model_url: model_url.to_owned(), ..self }
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        self.command_at(self.client.servers(), arguments)
    }

    /// A command that reaches the cluster by another path.
    pub fn command_at(&self, servers: &str, arguments: &[&str]) -> Command {
        let mut command = command(self.data.path(), arguments);
        self.on_site(&mut command, servers);
        command
    }

    fn on_site<'c>(&self, command: &'c mut Command, servers: &str) -> &'c mut Command {
        command.args(["--bootstrap-servers", servers, "--topic-prefix", &self.prefix]);
        command.args(["--model-url", &self.model_url, "--model", "stub", "--config"]);
        command.arg(self.data.path().join("forebay.yaml"))
    }

    /// A process of one step. Nobody waits until it is ready: the next hit may well come first.
    /// Every second one is of another version where `FOREBAY_CHAOS_OTHER` names its binary.
    pub fn member(&self, stage: &str) -> Running {
        let (started, other) = (self.members.get() + 1, std::env::var_os("FOREBAY_CHAOS_OTHER"));
        self.members.set(started);
        let binary = other.filter(|_| started.is_multiple_of(2)).map_or_else(forebay, PathBuf::from);
        let arguments = ["run", "answer", "--stage", stage];
        let mut command = command_of(&binary, self.data.path(), &arguments);
        Running::start(&format!("stage {stage}"), self.on_site(&mut command, self.client.servers()))
    }

    /// A process of all steps, ready.
    pub fn up(&self) -> Up {
        Up::wait("forebay up", &mut self.command(&["up", "--admin", "127.0.0.1:0"]))
    }

    /// Writes the next requests.
    pub fn ask(&self, written: &mut usize, count: usize) {
        let request = |number: usize| {
            let is_for_cache = matches!(number % 10, 4 | 9);
            let id = format!("r{number}");
            let body = json!({"id": id, "prompt": question(number), "cache": {"no_cache": !is_for_cache}});
            New::from(body).key(id)
        };
        self.client.write("requests", (*written..*written + count).map(request));
        *written += count;
    }

    /// Waits until each request has its result and all groups have read all. Each result and each row stands once, but for
    /// so many that come again byte for byte; every call is explained; no offset was committed that should not have been.
    pub fn check(mut self, results: &mut Reader, written: usize, repeats_max: usize) -> Report {
        results.until("a result for each request", LIMIT, |records| {
            (records.len() >= written && by_key(records).len() >= written).then_some(())
        });
        for (stage, topic, _) in STAGES {
            wait_for(&format!("no lag of {stage}"), LIMIT, || {
                (self.client.lag(&format!("answer.{stage}"), topic) == 0).then_some(())
            });
        }
        let outcomes = self.client.read("outcomes").to_the_end(LIMIT).to_vec();
        let repeated =
            [("results", results.to_the_end(LIMIT)), ("outcomes", &outcomes)].map(|(what, records)| {
                let keys = by_key(records);
                assert_eq!(keys.len(), written, "{what}");
                let repeats = records.len() - keys.len();
                assert!(repeats <= repeats_max, "{repeats} {what} came again, of {repeats_max} that might");
                let changed = changed(records);
                assert!(changed.is_empty(), "{what} came again with other bytes: {changed:#?}");
                repeats
            });
        let answers: BTreeMap<_, _> =
            results.records().iter().map(|record| (record.key_text(), record.json())).collect();
        let asked = answers.iter().map(|(id, result)| {
            let number: usize = id[1..].parse().unwrap();
            (id.as_str(), result, question(number))
        });
        let account = Account::of(&self.client, &self.model, asked, LIMIT);
        assert!(account.unexplained.is_empty(), "{:#?} of {account:?}", account.unexplained);
        let seen = self.onlooker.take().unwrap().stop();
        assert!(seen.faults.is_empty(), "{:#?}", seen.faults);
        // What the cache answers passes three of the five steps.
        assert!(seen.offsets >= 3 * written, "not all was judged: {seen:?}");
        let [repeated_results, repeated_outcomes] = repeated;
        Report {
            requests: written,
            repeated_results,
            repeated_outcomes,
            hits_of_cache: answers.values().filter(|result| result["cache"] == "hit").count(),
            account,
            offsets_judged: seen.offsets,
        }
    }
}

/// How many records each key has.
pub fn by_key(records: &[Record]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for record in records {
        *counts.entry(record.key_text()).or_default() += 1;
    }
    counts
}

/// Records that came again with other bytes than before, with those.
fn changed(records: &[Record]) -> Vec<(&Record, &Record)> {
    let mut first = BTreeMap::new();
    let pairs = records.iter().filter_map(|record| {
        let before = *first.entry(record.key_text()).or_insert(record);
        (before.value != record.value).then_some((before, record))
    });
    pairs.collect()
}

/// Waits until a moment has come.
pub fn until(moment: Instant) {
    wait_for("a moment", LIMIT, || (Instant::now() > moment).then_some(()));
}

/// Asks a process to end by SIGTERM, and says how long that took.
pub fn drain(process: &mut Running) -> Duration {
    process.signal(Signal::TERM);
    let since = Instant::now();
    // One that has only just begun does not listen to signals yet, and dies of it.
    assert!(
        matches!(process.ended(DRAIN).code(), Some(0) | None),
        "the end after SIGTERM: {}",
        process.stderr()
    );
    since.elapsed()
}
