//! What a client may ask for and rely on: documents that come, change and go; tenants that never meet; how an answer is kept;
//! pieces of it while it is written; and what comes back untouched.

#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a test that cannot go on says why by panicking"
)]

use forebay_tests::{
    Client, New, Reader,
    model::{ModelServer, Says, last_said},
    product::{Up, command, finish},
    services, wait_for,
};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::TcpStream,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

const LIMIT: Duration = Duration::from_secs(120);

/// Forebay at work on a folder of its own, and a client of it.
struct Site {
    data: tempfile::TempDir,
    up: Up,
    client: Client,
    results: Reader,
    asked: AtomicUsize,
}

impl Site {
    fn start(arguments: &[&str]) -> Self {
        Self::under("", arguments)
    }

    /// The same, where the arguments say that topics have this prefix.
    fn under(prefix: &str, arguments: &[&str]) -> Self {
        let data = tempfile::tempdir().unwrap();
        let up = Up::start(data.path(), arguments);
        let client = Client::new(&up.servers, prefix);
        let results = client.read("results");
        Self { data, up, client, results, asked: AtomicUsize::new(0) }
    }

    /// Asks under an id of its own and gives the result.
    fn ask(&mut self, mut request: Value) -> Value {
        let id = format!("q{}", self.asked.fetch_add(1, Ordering::Relaxed));
        request["id"] = json!(id);
        self.client.ask(request);
        self.results.of_key(&id, LIMIT).json()
    }

    /// Asks past the cache until the answer holds what it should: documents are indexed while questions are answered.
    fn until(&mut self, request: &Value, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let start = std::time::Instant::now();
        loop {
            let mut request = request.clone();
            request["cache"] = json!({"no_cache": true, "no_store": true});
            let result = self.ask(request);
            if holds(&result) {
                return result;
            }
            assert!(start.elapsed() < LIMIT, "waited in vain for {what}: {result}");
        }
    }

    /// `forebay ingest`.
    fn ingest(&self, arguments: &[&str]) {
        let mut all = vec!["ingest"];
        all.extend(arguments);
        let finished = finish(&mut command(self.data.path(), &all), LIMIT);
        assert_eq!(finished.code, 0, "{finished:?}");
    }
}

fn cites(result: &Value, document: &str) -> bool {
    result["citations"].as_array().unwrap().iter().any(|citation| citation["document"] == document)
}

fn says(result: &Value, what: &str) -> bool {
    result["text"].as_str().is_some_and(|text| text.contains(what))
}

fn document(id: &str, tenant: &str, text: &str) -> New {
    New::from(json!({"id": id, "tenant": tenant, "format": "text", "text": text})).key(id)
}

fn write(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_document_that_changes_changes_the_answer_and_one_that_goes_is_cited_no_more() {
    let mut site = Site::start(&[]);
    let folder = tempfile::tempdir().unwrap();
    let question = json!({"prompt": "When does the ferry Aurora leave the harbour?"});
    let nothing = site.ask(question.clone());
    assert!(nothing["status"] == "answered" && nothing["citations"] == json!([]), "{nothing}");

    let file = write(folder.path(), "ferry.md", "# Ferry\n\nThe ferry Aurora leaves the harbour at seven.\n");
    site.ingest(&[&file]);
    site.until(&question, "the document", |result| cites(result, &file));
    // An answer without citations rests on no document that could have changed; it must not hide one that came.
    let first = site.ask(question.clone());
    assert!(says(&first, "at seven") && cites(&first, &file), "{first}");
    let hit = until_hit(&mut site, &question);
    assert_eq!((&hit["text"], &hit["citations"]), (&first["text"], &first["citations"]));

    write(folder.path(), "ferry.md", "# Ferry\n\nThe ferry Aurora leaves the harbour at noon.\n");
    site.ingest(&[&file]);
    site.until(&question, "the new version", |result| says(result, "at noon"));
    // What the cache holds is older than the document, so it is asked anew, every time.
    for _ in 0..3 {
        let result = site.ask(question.clone());
        assert!(says(&result, "at noon") && !says(&result, "at seven"), "{result}");
        let citation = &result["citations"][0];
        let bytes = fs::read(&file).unwrap();
        let at = |field: &str| usize::try_from(citation[field].as_u64().unwrap()).unwrap();
        assert_eq!(&bytes[at("start")..at("end")], citation["quote"].as_str().unwrap().as_bytes());
        assert_ne!(citation["version"], first["citations"][0]["version"]);
    }

    site.ingest(&["--delete", &file]);
    site.until(&question, "the document to be gone", |result| !cites(result, &file));
    for _ in 0..3 {
        let result = site.ask(question.clone());
        assert!(!cites(&result, &file) && !says(&result, "noon"), "{result}");
    }
    site.up.drain();
}

/// Asks until the answer comes from the cache, which is filled beside the results.
fn until_hit(site: &mut Site, request: &Value) -> Value {
    let start = std::time::Instant::now();
    loop {
        let result = site.ask(request.clone());
        if result["cache"] == "hit" {
            return result;
        }
        assert!(start.elapsed() < LIMIT, "waited in vain for a hit: {result}");
    }
}

#[test]
fn tenants_share_neither_documents_nor_cached_answers() {
    let mut site = Site::start(&[]);
    let text = |name: &str| format!("The vault code of the harbour office is known to {name} alone.");
    site.client.write(
        "documents",
        [
            document("vault-a", "a", &text("Anna")),
            document("vault-b", "b", &text("Bertil")),
            document("shared", "*", "The harbour office opens at eight on weekdays."),
        ],
    );
    let of = |tenant: &str, prompt: &str| json!({"tenant": tenant, "prompt": prompt});
    let (vault, office) =
        ("Who knows the vault code of the harbour office?", "When does the harbour office open?");
    for (tenant, own, other) in [("a", "vault-a", "vault-b"), ("b", "vault-b", "vault-a")] {
        let found = site.until(&of(tenant, vault), "its own document", |result| cites(result, own));
        assert!(!cites(&found, other), "{found}");
        let shared = site.until(&of(tenant, office), "the shared document", |result| cites(result, "shared"));
        assert!(!cites(&shared, other), "{shared}");
    }
    let a = site.ask(of("a", vault));
    assert!(says(&a, "Anna") && a["tenant"] == "a", "{a}");
    until_hit(&mut site, &of("a", vault));
    // The same words from somebody else: nothing of it is known.
    let b = site.ask(of("b", vault));
    assert!(b["cache"] == "miss" && says(&b, "Bertil") && !says(&b, "Anna"), "{b}");
    let nobody = site.ask(json!({"prompt": vault}));
    assert!(nobody["cache"] == "miss" && nobody["tenant"] == "default", "{nobody}");
    assert!(!cites(&nobody, "vault-a") && !cites(&nobody, "vault-b"), "{nobody}");
    assert!(!says(&nobody, "Anna") && !says(&nobody, "Bertil"), "{nobody}");
    site.up.drain();
}

#[test]
fn a_client_says_how_its_answer_is_kept() {
    let mut site = Site::start(&[]);
    site.client.write("documents", [document("tide", "*", "High tide at the pier comes twice a day.")]);
    let question = json!({"prompt": "How often does high tide come at the pier?"});
    site.until(&question, "the document", |result| cites(result, "tide"));

    // Asked past the cache and not kept, over and over, by `until`: so the first plain one still misses.
    let first = site.ask(question.clone());
    assert_eq!(first["cache"], "miss", "{first}");
    until_hit(&mut site, &question);
    let with = |control: Value| {
        let mut request = question.clone();
        request["cache"] = control;
        request
    };
    let past = site.ask(with(json!({"no_cache": true})));
    assert_eq!((past["cache"].as_str(), &past["text"]), (Some("bypass"), &first["text"]), "{past}");
    assert_eq!(site.ask(with(json!({"no_store": true})))["cache"], "hit", "not to keep is not: not to look");
    let unknown = json!({"prompt": "Does high tide ever skip the pier?", "cache": {"no_store": true}});
    for _ in 0..2 {
        let result = site.ask(unknown.clone());
        assert!(result["status"] == "answered" && result["cache"] != "hit", "{result}");
    }
    site.up.drain();
}

#[test]
fn a_conversation_asks_by_its_last_user_turn() {
    let model = ModelServer::start(|call| Says::Text(format!("You said: {}", last_said(call).len())));
    let url = model.url();
    let mut site = Site::start(&["--model-url", &url, "--model", "stub"]);
    let messages = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a gull?"},
        {"role": "assistant", "content": "A bird."},
        {"role": "user", "content": [{"type": "text", "text": "And what is a tern?"}]},
    ]);
    let result = site.ask(json!({"messages": messages, "temperature": 0.5, "model": "other"}));
    assert!(result["status"] == "answered" && says(&result, "You said"), "{result}");
    assert_eq!(result["usage"], json!({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}));
    assert!(result["cost_nano_usd"].is_null(), "a model without a price: {result}");
    let calls = model.calls();
    assert_eq!(calls.len(), 1, "{calls:?}");
    let told = calls[0].to_string();
    for part in ["Be brief.", "What is a gull?", "A bird.", "And what is a tern?"] {
        assert!(told.contains(part), "no {part:?} in {told}");
    }
    assert_eq!((&calls[0]["temperature"], &calls[0]["model"]), (&json!(0.5), &json!("other")));
    site.up.drain();
}

#[test]
fn an_answer_is_read_while_it_is_written() {
    const TEXT: &str = "Pieces come one by one, and make up the whole.";
    let model = ModelServer::start(|_| Says::Text(TEXT.to_owned()));
    let url = model.url();
    let mut site = Site::start(&["--model-url", &url, "--model", "stub"]);
    let mut deltas = site.client.read("deltas");
    let result = site.ask(json!({"prompt": "How do pieces come?", "stream": true}));
    assert_eq!(result["text"], TEXT, "{result}");
    assert!(result["timings_us"]["ttft"].is_i64(), "{result}");
    let pieces = deltas.until("all pieces", LIMIT, |records| {
        let mut pieces: Vec<_> = records.iter().map(forebay_tests::Record::json).collect();
        pieces.sort_by_key(|piece| piece["seq"].as_u64());
        let text: String = pieces.iter().filter_map(|piece| piece["text"].as_str()).collect();
        (text == TEXT).then_some(pieces)
    });
    assert!(pieces.len() > 1, "{pieces:?}");
    for (seq, piece) in pieces.iter().enumerate() {
        assert_eq!((&piece["id"], &piece["seq"]), (&result["id"], &json!(seq)), "{piece}");
    }
    assert!(deltas.records().iter().all(|record| record.key_text() == result["id"].as_str().unwrap()));
    let whole = site.ask(json!({"prompt": "How do pieces come, if nobody reads along?"}));
    assert!(whole["text"] == TEXT && whole["timings_us"]["ttft"].is_null(), "{whole}");
    let of_whole = deltas.to_the_end(LIMIT).iter().filter(|record| record.key_text() == whole["id"]).count();
    assert_eq!(of_whole, 0, "nobody reads along");
    site.up.drain();
}

#[test]
fn metadata_headers_and_the_place_of_a_request_come_back() {
    let mut site = Site::start(&[]);
    let metadata =
        json!({"order": 17, "nested": {"list": [1.5, null, "ü"]}, "big": 9_007_199_254_740_993_i64});
    let request =
        json!({"id": "echo", "prompt": "Is anybody there?", "metadata": metadata, "tenant": "shop"});
    let record = New::from(request)
        .key("my key")
        .header("x-shop", "Grünhafen")
        .header("x-bytes", vec![0, 255])
        .header("forebay-tenant", "somebody else");
    let placed = site.client.write("requests", [record])[0];
    let result = site.results.of_key("echo", LIMIT);
    assert_eq!(result.header("x-shop").as_deref(), Some("Grünhafen"));
    let bytes =
        result.headers.iter().find(|(name, _)| name == "x-bytes").and_then(|(_, value)| value.clone());
    assert_eq!(bytes, Some(vec![0, 255]));
    assert_ne!(
        result.header("forebay-tenant").as_deref(),
        Some("somebody else"),
        "no client poses as another"
    );
    let result = result.json();
    assert_eq!((&result["metadata"], &result["tenant"]), (&metadata, &json!("shop")));
    let (partition, offset) = placed;
    let origin = json!({"topic": "requests", "partition": partition, "offset": offset, "key": "my key"});
    assert_eq!(result["origin"], origin);
    site.up.drain();
}

#[test]
fn a_request_without_an_id_gets_one_from_where_it_lies() {
    let mut site = Site::start(&[]);
    let (partition, offset) = site.client.write("requests", [New::from(json!({"prompt": "Who am I?"}))])[0];
    let result = site.results.at_least(1, LIMIT)[0].clone();
    let (key, result) = (result.key_text(), result.json());
    assert_eq!(result["id"], key.as_str());
    assert_eq!(
        (&result["origin"]["partition"], &result["origin"]["offset"]),
        (&json!(partition), &json!(offset))
    );
    // A UUIDv7.
    assert!(key.len() == 36 && key.as_bytes()[14] == b'7', "{key}");
    site.up.drain();
}

#[test]
fn a_deadline_that_is_kept_is_no_expiry_and_one_that_has_passed_is() {
    let mut site = Site::start(&[]);
    let kept = site.ask(json!({"prompt": "Is there time?", "deadline_ms": 60_000}));
    assert_eq!(kept["status"], "answered", "{kept}");
    let late = site.ask(json!({"prompt": "Is there no time?", "deadline_ms": 0}));
    assert_eq!((&late["status"], &late["error"]["code"]), (&json!("expired"), &json!("deadline")), "{late}");
    assert!(late["text"].is_null(), "{late}");
    site.up.drain();
}

/// What a Redis says to one command: the strings of its answer.
fn say_to_redis(url: &str, words: &[&str]) -> Vec<String> {
    let mut stream = TcpStream::connect(url.trim_start_matches("redis://")).expect("Redis is there");
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut command = format!("*{}\r\n", words.len());
    for word in words {
        command += &format!("${}\r\n{word}\r\n", word.len());
    }
    stream.write_all(command.as_bytes()).unwrap();
    let mut lines = BufReader::new(stream).lines().map(|line| line.expect("an answer"));
    let mut next = || lines.next().expect("an answer");
    let first = next();
    let count = first.strip_prefix('*').map_or(0, |count| count.parse().unwrap());
    (0..count).map(|_| (next(), next()).1).collect()
}

#[test]
fn redis_keeps_the_answers() {
    let Some(redis) = services::redis() else { return };
    // A prefix of its own: the run shares one Redis.
    let prefix = format!("documents-{}-", std::process::id());
    let folder = tempfile::tempdir().unwrap();
    let settings = format!("stores: {{key_value: '{redis}'}}\ntopic_prefix: {prefix}\n");
    let file = write(folder.path(), "forebay.yaml", &settings);
    let mut site = Site::under(&prefix, &["--config", &file]);
    let question = json!({"prompt": "Where is the answer kept?"});
    assert_eq!(site.ask(question.clone())["cache"], "miss");
    // Asked once, so that nothing fills it again behind the deletion below.
    let keys = wait_for("its entry", LIMIT, || {
        let keys = say_to_redis(&redis, &["KEYS", &format!("*{prefix}*entry*")]);
        (keys.len() == 1).then_some(keys)
    });
    assert_eq!(site.ask(question.clone())["cache"], "hit");

    // What Redis has lost is not found, so it is there that answers are looked up.
    say_to_redis(&redis, &["DEL", &keys[0]]);
    assert_eq!(site.ask(question.clone())["cache"], "miss");
    until_hit(&mut site, &question);
    site.up.drain();
}
