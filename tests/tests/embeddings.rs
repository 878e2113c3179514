//! Documents of which vectors are made while the processes that ask for these are killed, on Apache Kafka.
//!
//! Oracle: each document stands on `chunks` in one form, every chunk with the vector of its own text, and is found by it. What was
//! paid for is in the embedder's log, which says whose texts each call brought: those of a document were in no more calls than its rows
//! tell of, and answered in no more than are told of as ok or ambiguous. Each of its calls is ok once.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says why by panicking")]
#![expect(clippy::print_stdout, reason = "the figures of a run by hand")]

use forebay_schemas::{
    Attempt, Chunk, Chunks, Embedding, Grounded, Record as _, embedding::of_base64, header,
};
use forebay_simulator::text_hash;
use forebay_tests::{
    Client, Dice, New, Reader, Running, Signal,
    product::{DRAIN, END, Up, command, finish},
    services, wait_for,
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    os::unix::process::ExitStatusExt as _,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

/// How long all that is left may take after the last kill: a session, the ledger's lease.
const LIMIT: Duration = Duration::from_secs(180);

/// The lines at which a process crashes, two at a time: around what a record becomes, and around a call that is paid for
/// (`pipelines/runtime/src/crash.rs`).
const POINTS: &[[&str; 2]] =
    &[["output", "start"], ["written", "call"], ["store", "done"], ["commit", "failed"]];

/// Documents that come every so often until both have crashed, where not too many are under way.
const DOCUMENTS: usize = 30;
const UNDER_WAY_MAX: usize = 150;
const EVERY: Duration = Duration::from_millis(500);

/// Sections of a document, and of each one in so many: more than go in one call.
const SECTIONS: usize = 3;
const SECTIONS_OF_A_LONG_ONE: usize = 70;
const LONG_ONES: usize = 40;

/// Processes that make vectors.
const PROCESSES: usize = 3;

/// A document of which only words stand in a question that mean nothing to a search by words.
const ODD: &str = "odd";
const ODD_TEXT: &str = "Which of those were there with them, and what were these yellow things?";
const QUESTION: &str = "Which zebra of those were there with them, and what were these?";

const DIMENSIONS: usize = 256;

fn sections(number: usize) -> usize {
    if number.is_multiple_of(LONG_ONES) { SECTIONS_OF_A_LONG_ONE } else { SECTIONS }
}

fn text(number: usize) -> String {
    let section = |section| format!("# Part {section} of d{number}\n\nHere d{number} says {section}.\n\n");
    (0..sections(number)).map(section).collect()
}

/// The pipeline that is shipped, with vectors of questions and of documents, on a cluster.
struct Site {
    client: Client,
    prefix: String,
    data: tempfile::TempDir,
    pipeline: String,
    simulator: Running,
    url: String,
    log: PathBuf,
    written: usize,
    on_chunks: Reader,
}

impl Site {
    fn new(servers: &str) -> Self {
        let data = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = data.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let faults = file("faults.yaml", "fault: {retry_after_form: none}\nfaults: {status_503: 10%}\n");
        let (log, dimensions) =
            (data.path().join("calls.jsonl"), format!("embedding.dimensions={DIMENSIONS}"));
        let serves = [
            "simulate-model",
            "--listen",
            "127.0.0.1:0",
            "--latency",
            "50ms..300ms",
            "--config",
            &faults,
            "--set",
            &dimensions,
            "--call-log",
            log.to_str().unwrap(),
        ];
        let simulator = Running::start("forebay simulate-model", &mut command(data.path(), &serves));
        let url = wait_for("the simulator's address", LIMIT, || {
            simulator.stdout().lines().next().map(str::to_owned)
        });
        let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/../pipelines/answer.yaml");
        let embedding = std::fs::read_to_string(shipped)
            .unwrap()
            .replace("{limit: 8}", "{limit: 8, embed: true}")
            .replace("order: key", "order: key\n    settings: {embed: true}");
        let pipeline = file("answer.yaml", &embedding);
        // The shortest session that a broker takes by default: a kill costs one.
        let config = format!(
            "kafka: {{session.timeout.ms: 6000, heartbeat.interval.ms: 1500}}\n\
             embeddings: {{url: '{url}', model: simulated, dimensions: {DIMENSIONS}}}\n"
        );
        file("forebay.yaml", &config);
        let prefix = format!("embeddings-{}-", std::process::id());
        let client = Client::new(servers, &prefix);
        let mut applying = on_cluster(&data, servers, &prefix, &["topics", "apply", &pipeline]);
        let applied = finish(&mut applying, LIMIT);
        assert_eq!(applied.code, 0, "{applied:?}");
        let on_chunks = client.read("chunks");
        Self { client, prefix, data, pipeline, simulator, url, log, written: 0, on_chunks }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        on_cluster(&self.data, self.client.servers(), &self.prefix, arguments)
    }

    /// A process that indexes; it crashes at this line where one is named.
    fn index(&self, crash_at: Option<&str>) -> Running {
        let mut command = self.command(&["run", &self.pipeline, "--stage", "index"]);
        command.envs(crash_at.map(|at| ("FOREBAY_CRASH_AT", at)));
        Running::start("stage index", &mut command)
    }

    fn write(&mut self, count: usize) {
        let document = |number: usize| {
            let id = format!("d{number}");
            New::from(json!({"id": id, "tenant": "*", "format": "markdown", "text": text(number)})).key(id)
        };
        self.client.write("documents", (self.written..self.written + count).map(document));
        self.written += count;
    }

    /// Which documents stand on `chunks`.
    fn indexed(&mut self) -> BTreeSet<String> {
        self.on_chunks.to_the_end(LIMIT).iter().map(|record| record.key_text()).collect()
    }

    /// Waits until all that was written is indexed, and the odd one: a call that was under way at three crashes is given up.
    fn all_indexed(&mut self) {
        wait_for("all documents", LIMIT, || (self.indexed().len() > self.written).then_some(()));
    }

    /// What the simulator answers: to other settings from now on, say.
    fn http(&self, request: &str, body: &str) -> String {
        let address = self.url.trim_start_matches("http://").trim_end_matches("/v1");
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        let head =
            format!("{request} HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: {}", body.len());
        write!(stream, "{head}\r\n\r\n{body}").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    fn calls_under_way(&self) -> bool {
        let metrics = self.http("GET /metrics", "");
        let running = metrics.lines().find(|line| line.starts_with("vllm:num_requests_running")).unwrap();
        !running.ends_with(" 0") && !running.ends_with(" 0.0")
    }

    /// How many calls ended because their caller was gone.
    fn cut_off(&self) -> usize {
        std::fs::read_to_string(&self.log).unwrap().matches(r#""ended_by":"client""#).count()
    }
}

fn on_cluster(data: &tempfile::TempDir, servers: &str, prefix: &str, arguments: &[&str]) -> Command {
    let mut command = command(data.path(), arguments);
    command.args(["--bootstrap-servers", servers, "--topic-prefix", prefix, "--config"]);
    command.arg(data.path().join("forebay.yaml"));
    command
}

fn kill(mut process: Running) {
    process.signal(Signal::KILL);
    process.ended(END);
}

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

#[test]
fn each_document_has_its_vectors_and_none_is_paid_for_unseen_whoever_is_killed() {
    let Some(servers) = services::kafka() else { return };
    let (kills, seed) =
        (setting("FOREBAY_EMBEDDINGS_KILLS", 4), setting("FOREBAY_EMBEDDINGS_SEED", 20_261_130));
    println!("FOREBAY_EMBEDDINGS_SEED={seed} FOREBAY_EMBEDDINGS_KILLS={kills}");
    let mut dice = Dice::new(seed);
    let mut site = Site::new(&servers);
    let odd = json!({"id": ODD, "tenant": "*", "text": ODD_TEXT});
    site.client.write("documents", [New::from(odd).key(ODD)]);
    let survivor = site.index(None);
    for points in POINTS {
        crash_at(points, &mut site, &mut dice);
    }
    let mut index = vec![survivor];
    index.extend((1..PROCESSES).map(|_| site.index(None)));
    for number in 0..kills {
        site.all_indexed();
        match number % 2 {
            // At any moment of a call, or of what is made of its answer.
            0 => {
                let seen = site.indexed().len();
                site.write(UNDER_WAY_MAX);
                wait_for("documents to come", LIMIT, || (site.indexed().len() > seen + 5).then_some(()));
                let some = Instant::now() + Duration::from_millis(u64::try_from(dice.below(400)).unwrap());
                wait_for("a moment", LIMIT, || (Instant::now() > some).then_some(()));
                kill(index.remove(dice.below(PROCESSES)));
                index.push(site.index(None));
            }
            // All at once, while every call under way is in mid-answer.
            _ => {
                let before = site.cut_off();
                site.http("PUT /simulate", "latency: 60s");
                site.write(DOCUMENTS);
                wait_for("calls under way", LIMIT, || site.calls_under_way().then_some(()));
                index.drain(..).for_each(kill);
                wait_for("calls to be cut off", LIMIT, || (site.cut_off() > before).then_some(()));
                site.http("PUT /simulate", "");
                index.extend((0..PROCESSES).map(|_| site.index(None)));
            }
        }
    }
    site.all_indexed();
    wait_for("no lag", LIMIT, || (site.client.lag("answer.index", "documents") == 0).then_some(()));
    let of_records = check_chunks(&mut site);
    check_calls(&site, &of_records);
    check_vectors(&site, of_records.values().flatten());
    for mut process in index {
        process.signal(Signal::TERM);
        assert_eq!(process.ended(DRAIN).code(), Some(0), "{}", process.stderr());
    }
    finds_by_meaning(&site);
    site.simulator.signal(Signal::TERM);
    assert_eq!(site.simulator.ended(END).code(), Some(0));
}

/// Two processes beside one that lives, each until it has crashed.
fn crash_at(points: &[&str], site: &mut Site, dice: &mut Dice) {
    site.all_indexed();
    let crash = |point: &&str| {
        // Few calls fail, and offsets are stored for many records at a time.
        let passing = match *point {
            "failed" | "store" | "commit" => dice.within(1..4),
            _ => dice.within(1..40),
        };
        let at = format!("{point}:{passing}");
        let process = site.index(Some(&at));
        (at, process)
    };
    let mut crashing: Vec<_> = points.iter().map(crash).collect();
    let mut next = Instant::now();
    wait_for("both to crash", LIMIT, || {
        let under_way = site.written.saturating_sub(site.indexed().len());
        if Instant::now() > next && under_way < UNDER_WAY_MAX {
            next = Instant::now() + EVERY;
            site.write(DOCUMENTS);
        }
        crashing.iter_mut().all(|(_, process)| !process.is_alive()).then_some(())
    });
    for (at, mut process) in crashing {
        assert_eq!(process.ended(END).signal(), Some(Signal::ABORT.as_raw()), "{at}: {}", process.stderr());
        println!("index at {at}");
    }
}

/// What was embedded of a chunk.
fn said(chunk: &Chunk) -> String {
    match &chunk.heading[..] {
        [] => chunk.text.clone(),
        heading => format!("{}\n{}", heading.join(" > "), chunk.text),
    }
}

/// Each document stands there in one form, with all its sections. What was embedded for each record of `documents`, by the id that
/// the record was given.
fn check_chunks(site: &mut Site) -> BTreeMap<String, Vec<(String, Chunk)>> {
    let mut forms = BTreeMap::new();
    for record in site.on_chunks.to_the_end(LIMIT) {
        let form = (record.header(header::ID).unwrap(), record.value.clone());
        let before = forms.entry(record.key_text()).or_insert_with(|| form.clone());
        assert_eq!(*before, form, "{} came again otherwise", record.key_text());
    }
    assert_eq!(forms.len(), site.written + 1);
    let mut of_records = BTreeMap::new();
    for (document, (record, value)) in forms {
        let chunks = Chunks::decode(value.as_deref().unwrap()).unwrap().content.unwrap().chunks;
        let chunks: Vec<_> = chunks.into_iter().map(|chunk| (said(&chunk), chunk)).collect();
        let sections = match document.strip_prefix('d') {
            Some(number) => sections(number.parse().unwrap()),
            None => 1,
        };
        let once: BTreeSet<_> = chunks.iter().map(|(text, _)| text).collect();
        assert_eq!((chunks.len(), once.len()), (sections, sections), "{document}: {chunks:?}");
        of_records.insert(record, chunks);
    }
    of_records
}

/// Each vector is what the embedder says of that text, number by number.
fn check_vectors<'a>(site: &Site, chunks: impl Iterator<Item = &'a (String, Chunk)>) {
    site.http("PUT /simulate", "{latency: 0ms, faults: {status_503: 0%}}");
    for some in chunks.collect::<Vec<_>>().chunks(500) {
        let texts: Vec<_> = some.iter().map(|(text, _)| text).collect();
        let asked = json!({"model": "simulated", "input": texts, "encoding_format": "base64"});
        let answer = site.http("POST /v1/embeddings", &asked.to_string());
        let answer: Value = serde_json::from_str(&answer).unwrap();
        for (at, (text, chunk)) in some.iter().enumerate() {
            let vector = of_base64(answer["data"][at]["embedding"].as_str().unwrap()).unwrap();
            assert_eq!(chunk.embedding, Embedding::new("simulated", vector), "{text}");
        }
    }
}

/// The embedder's log beside the rows.
fn check_calls(site: &Site, of_records: &BTreeMap<String, Vec<(String, Chunk)>>) {
    let mut of_text = BTreeMap::new();
    for (record, texts) in of_records {
        of_text.extend(texts.iter().map(|(text, _)| (text_hash(text), record.as_str())));
    }
    // By record: calls that brought any text of it, and those of them that were answered.
    let (mut made, mut answered) = (BTreeMap::<&str, usize>::new(), BTreeMap::<&str, usize>::new());
    let (mut shared, mut calls) = (0, 0);
    for line in std::fs::read_to_string(&site.log).unwrap().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let Some(hashes) = line["text_hashes"].as_array() else {
            // Its caller was killed before the embedder had read what it wanted.
            assert_eq!(line["ended_by"], "client", "{line}");
            continue;
        };
        let whose: BTreeSet<_> = hashes.iter().map(|hash| of_text[hash.as_str().unwrap()]).collect();
        calls += 1;
        shared += usize::from(whose.len() > 1);
        for record in whose {
            *made.entry(record).or_default() += 1;
            *answered.entry(record).or_default() += usize::from(line["status"] == 200);
        }
    }
    // A row that came twice is one row.
    let mut rows = BTreeMap::new();
    for record in site.client.read("attempts").to_the_end(LIMIT) {
        let row = Attempt::decode(record.value.as_deref().unwrap()).unwrap();
        let before = rows.insert(row.attempt_id.clone(), row.clone());
        assert!(before.is_none_or(|before| before.status == row.status), "told otherwise before: {row:?}");
    }
    let mut sums = BTreeMap::<String, usize>::new();
    for (record, texts) in of_records {
        let rows: Vec<_> = rows.values().filter(|row| row.request_id == *record).collect();
        let of = |status: &str| rows.iter().filter(|row| row.status == status).count();
        let call_ids: BTreeSet<_> = rows.iter().map(|row| &row.call_id).collect();
        let ok: BTreeSet<_> = rows.iter().filter(|row| row.status == "ok").map(|row| &row.call_id).collect();
        let whose = || format!("{record}: {rows:#?}");
        assert!(rows.iter().all(|row| row.operation.as_deref() == Some("embeddings")), "{}", whose());
        assert_eq!(call_ids.len(), texts.len().div_ceil(64), "each call keeps its id: {}", whose());
        assert_eq!((of("ok"), ok.len()), (call_ids.len(), call_ids.len()), "{}", whose());
        assert!(made[record.as_str()] <= rows.len(), "{} calls: {}", made[record.as_str()], whose());
        let paid = answered[record.as_str()];
        assert!(paid <= of("ok") + of("ambiguous"), "{paid} answered: {}", whose());
        rows.iter().for_each(|row| *sums.entry(row.status.clone()).or_default() += 1);
    }
    println!("{} documents, {calls} calls, {shared} of them shared; rows: {sums:?}", of_records.len());
    assert!(shared > 0 && sums["ambiguous"] > 0 && sums["failed"] > 0, "{shared} shared, {sums:?}");
    assert_eq!(rows.len(), sums.values().sum::<usize>(), "rows of no document");
}

/// A question finds a document, with which it shares no word that a search by words could use, among a thousand others. One of these may
/// stand above it, where a word of it has the place of one of the question's.
fn finds_by_meaning(site: &Site) {
    let mut command = site.command(&["up", &site.pipeline, "--admin", "127.0.0.1:0"]);
    let up = Up::wait("forebay up", &mut command);
    let mut prompts = site.client.read("prompts");
    let mut asked = 0;
    wait_for("the document to be found", LIMIT, || {
        let id = format!("q{asked}");
        asked += 1;
        site.client.ask(json!({"id": id, "prompt": QUESTION, "cache": {"no_cache": true}}));
        let prompt = prompts.of_key(&id, LIMIT);
        let grounded = Grounded::decode(prompt.value.as_deref().unwrap()).unwrap();
        grounded.passages.iter().any(|passage| passage.document == ODD).then_some(())
    });
    up.drain();
}
