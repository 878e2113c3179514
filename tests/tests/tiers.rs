//! Tiers in the product: a cheap model and a dear one, each a server that counts, and a process that is killed between them.
//!
//! Oracle: what each server was asked, beside the rows on `attempts`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says why by panicking")]

use forebay_schemas::{Attempt, Outcome, Record as _};
use forebay_tests::{
    model::{ModelServer, Says, last_said},
    product::{Up, command, finish},
    wait_for,
};
use serde_json::{Value, json};
use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

const LIMIT: Duration = Duration::from_secs(90);

/// A cheap model that knows only easy things and a dear one, and the configuration of both.
struct Pair {
    data: tempfile::TempDir,
    small: ModelServer,
    large: ModelServer,
    config: String,
}

impl Pair {
    fn new() -> Self {
        Self::with("", |_| Duration::ZERO, Duration::ZERO)
    }

    /// With more of a configuration; the small one is slow as told when it is asked, and the large one so.
    fn with(
        more: &str,
        small_after: impl Fn(&str) -> Duration + Send + Sync + 'static,
        large_after: Duration,
    ) -> Self {
        let after = |wait: Duration, text: &str| Says::After(wait, Box::new(Says::Text(text.to_owned())));
        let data = tempfile::tempdir().unwrap();
        let small = ModelServer::start(move |call| {
            let answer = match last_said(call) {
                said if said.contains("easy") => "It is so.",
                said if said.contains("sources") => "It is so [9].",
                _ => "I cannot help with that.",
            };
            after(small_after(last_said(call)), answer)
        });
        let large = ModelServer::start(move |call| {
            let answer = if call["response_format"].is_null() { "It is 42." } else { r#"{"it": 42}"# };
            after(large_after, answer)
        });
        let prices = data.path().join("prices.json");
        // Each call has 10 tokens and 5.
        let price = |each: f64| json!({"input_cost_per_token": each, "output_cost_per_token": each});
        std::fs::write(&prices, json!({"small": price(1e-9), "large": price(1e-7)}).to_string()).unwrap();
        let config = data.path().join("forebay.yaml");
        let text = format!(
            "pool:\n  endpoints:\n    s: {{url: '{}', model: small}}\n    l: {{url: '{}', model: large}}\nprices: {}\n{more}\
             tiers:\n  models: [small, large]\n  rules: |\n    prompt contains \"at once\" -> large\n",
            small.url(),
            large.url(),
            prices.display()
        );
        std::fs::write(&config, text).unwrap();
        let config = config.display().to_string();
        Self { data, small, large, config }
    }

    fn up(&self) -> Up {
        Up::start(self.data.path(), &["--config", &self.config])
    }

    fn calls(&self) -> (usize, usize) {
        (self.small.calls().len(), self.large.calls().len())
    }
}

fn ask(up: &Up, id: &str, prompt: &str) -> Value {
    ask_for(up, id, prompt, Value::Null)
}

fn ask_for(up: &Up, id: &str, prompt: &str, response_format: Value) -> Value {
    let mut asked = json!({"id": id, "prompt": prompt, "cache": {"no_cache": true, "no_store": true}});
    if !response_format.is_null() {
        asked["response_format"] = response_format;
    }
    up.client().ask(asked);
    up.client().read("results").of_key(id, LIMIT).json()
}

/// The rows of a request: tier, status and cost of each call.
fn rows(up: &Up, id: &str) -> Vec<(String, String, Option<i64>)> {
    let rows = up
        .client()
        .read("attempts")
        .to_the_end(LIMIT)
        .iter()
        .map(|record| record.value.clone().unwrap())
        .collect::<Vec<_>>();
    let rows = rows.iter().map(|row| Attempt::decode(row).unwrap()).filter(|row| row.request_id == id);
    let mut rows: Vec<_> =
        rows.map(|row| (row.attempt, row.tier.unwrap(), row.status, row.cost_nano_usd)).collect();
    rows.sort();
    rows.dedup();
    rows.into_iter().map(|(_, tier, status, cost)| (tier, status, cost)).collect()
}

fn row(tier: &str, status: &str, cost: Option<i64>) -> (String, String, Option<i64>) {
    (tier.to_owned(), status.to_owned(), cost)
}

/// The tier that `outcomes` says of a request.
fn tier_of(up: &Up, id: &str) -> Option<String> {
    let record = up.client().read("outcomes").of_key(id, LIMIT);
    Outcome::decode(record.value.as_deref().unwrap()).unwrap().tier
}

/// The log that the product prints is what it calibrates on; here it says too little.
fn log_is_read(up: &Up, data: &Path) {
    let log = finish(command(data, &["tiers", "log"]).args(["--bootstrap-servers", &up.servers]), LIMIT);
    assert_eq!(log.code, 0, "{log:?}");
    let lines: Vec<Value> = log.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let has = |name: &str| lines.iter().filter(|line| !line[name].is_null()).count();
    assert_eq!((has("prompt"), has("cache_status"), has("attempt_id")), (5, 5, 8), "{}", log.stdout);
    let file = data.join("log.jsonl");
    std::fs::write(&file, &log.stdout).unwrap();
    let args = ["tiers", "calibrate", "--tiers", "small,large", "--log", file.to_str().unwrap()];
    let calibrated = finish(&mut command(data, &args), LIMIT);
    assert_eq!(calibrated.code, 2, "{calibrated:?}");
    assert!(calibrated.stderr.contains("5 requests can be used; left out: none"), "{calibrated:?}");
}

#[test]
fn an_easy_question_costs_little_and_a_hard_one_what_both_tiers_take() {
    let pair = Pair::new();
    let up = pair.up();
    let easy = ask(&up, "easy", "What is easy?");
    assert_eq!((&easy["text"], &easy["cost_nano_usd"]), (&json!("It is so."), &json!(15)), "{easy}");
    assert_eq!((pair.calls(), rows(&up, "easy")), ((1, 0), vec![row("small", "ok", Some(15))]));
    let hard = ask(&up, "hard", "What is hard?");
    assert_eq!((&hard["text"], &hard["cost_nano_usd"]), (&json!("It is 42."), &json!(1_515)), "{hard}");
    let both = vec![row("small", "ok", Some(15)), row("large", "ok", Some(1_500))];
    assert_eq!((pair.calls(), rows(&up, "hard")), ((2, 1), both));
    let ruled = ask(&up, "ruled", "Say at once what is easy.");
    assert_eq!((&ruled["cost_nano_usd"], pair.calls()), (&json!(1_500), (2, 2)), "{ruled}");
    let schema = json!({"type": "object", "required": ["it"], "properties": {"it": {"type": "integer"}}});
    let form = json!({"type": "json_schema", "json_schema": {"name": "it", "schema": schema}});
    let formed = ask_for(&up, "formed", "What is easy, in JSON?", form);
    assert_eq!((&formed["text"], pair.calls()), (&json!(r#"{"it": 42}"#), (3, 3)), "{formed}");
    let marked = ask(&up, "marked", "What do the sources say?");
    assert_eq!((&marked["text"], pair.calls()), (&json!("It is 42."), (4, 4)), "{marked}");
    let tiers = ["easy", "hard", "ruled", "formed", "marked"].map(|id| tier_of(&up, id).unwrap());
    assert_eq!(tiers, ["small", "large", "large", "large", "large"]);
    log_is_read(&up, pair.data.path());
    up.drain();
}

#[test]
fn a_process_that_is_killed_between_two_tiers_does_not_pay_for_the_first_again() {
    let pair = Pair::new();
    let up = pair.up();
    pair.large.let_through(0);
    let asked =
        json!({"id": "hard", "prompt": "What is hard?", "cache": {"no_cache": true, "no_store": true}});
    up.client().ask(asked);
    wait_for("the call of the large tier", LIMIT, || (pair.calls() == (1, 1)).then_some(()));
    up.kill();
    pair.large.let_through(usize::MAX);
    let up = pair.up();
    let result = up.client().read("results").of_key("hard", LIMIT).json();
    assert_eq!((&result["text"], &result["cost_nano_usd"]), (&json!("It is 42."), &json!(1_515)), "{result}");
    assert_eq!(pair.calls(), (1, 2), "the small tier was paid for once");
    let expected =
        vec![row("small", "ok", Some(15)), row("large", "ambiguous", None), row("large", "ok", Some(1_500))];
    assert_eq!(rows(&up, "hard"), expected);
    up.drain();
}

const HARD: &str = "I cannot help with that.";

/// What is asked with a deadline.
fn within(deadline: Duration, id: &str, prompt: &str) -> Value {
    let deadline_ms = u64::try_from(deadline.as_millis()).unwrap();
    let cache = json!({"no_cache": true, "no_store": true});
    json!({"id": id, "prompt": prompt, "cache": cache, "deadline_ms": deadline_ms})
}

#[test]
fn a_better_tier_that_is_too_slow_leaves_the_answer_that_stands_and_its_cost() {
    let pair = Pair::with("", |_| Duration::ZERO, Duration::from_secs(60));
    let up = pair.up();
    up.client().ask(within(Duration::from_secs(20), "hard", "What is hard?"));
    let result = up.client().read("results").of_key("hard", LIMIT).json();
    assert_eq!((&result["status"], &result["text"]), (&json!("answered"), &json!(HARD)), "{result}");
    let rows = rows(&up, "hard");
    let ended: Vec<_> = rows.iter().map(|(tier, status, _)| (tier.as_str(), status.as_str())).collect();
    assert_eq!(ended, [("small", "ok"), ("large", "failed")]);
    // A server that was given up has read the prompt.
    let cost: i64 = rows.iter().map(|(.., cost)| cost.unwrap()).sum();
    assert!(cost > 15 && result["cost_nano_usd"] == cost, "{rows:?} {result}");
    assert_eq!((pair.calls(), tier_of(&up, "hard").as_deref()), ((1, 1), Some("small")));
    up.drain();
}

#[test]
fn with_too_little_time_left_no_better_tier_is_asked_and_paid_for_nothing() {
    const DEADLINE: Duration = Duration::from_secs(5);
    // The first tier answers when 150 ms are left, whatever the way to it took.
    let asked: Arc<Mutex<Option<Instant>>> = Arc::default();
    let noted = Arc::clone(&asked);
    let until_late = move |_: &str| {
        let asked = noted.lock().unwrap().take();
        let late = asked.map(|asked| asked + DEADLINE - Duration::from_millis(150));
        late.map_or(Duration::ZERO, |late| late.saturating_duration_since(Instant::now()))
    };
    let pair = Pair::with("", until_late, Duration::ZERO);
    let up = pair.up();
    let (client, mut results) = (up.client(), up.client().read("results"));
    // Connections stand from here on.
    client.ask(within(DEADLINE, "easy", "What is easy?"));
    results.of_key("easy", LIMIT);
    {
        // Noted once the request is stamped, since its time runs from then, and before the first tier looks.
        let mut noting = asked.lock().unwrap();
        client.ask(within(DEADLINE, "late", "What is hard?"));
        *noting = Some(Instant::now());
    }
    let result = results.of_key("late", LIMIT).json();
    assert_eq!(pair.calls(), (2, 0), "{result}");
    // On a busy machine the rest of the way may take longer than what is left.
    let is_as_told = result["text"] == HARD || result["status"] == "expired";
    assert!(is_as_told, "{result}");
    up.drain();
}

#[test]
fn a_better_tier_that_is_beyond_the_budget_leaves_the_answer_that_stands() {
    // Some hundred tokens and the 1,024 of an answer are held: about 1 µUSD at the small one and 100 at the large.
    let pair = Pair::with("budgets: ['* 0.00001 USD/day']\n", |_| Duration::ZERO, Duration::ZERO);
    let up = pair.up();
    let hard = ask(&up, "hard", "What is hard?");
    assert_eq!((&hard["text"], &hard["cost_nano_usd"]), (&json!(HARD), &json!(15)), "{hard}");
    assert_eq!((pair.calls(), rows(&up, "hard")), ((1, 0), vec![row("small", "ok", Some(15))]));
    let ruled = ask(&up, "ruled", "Say at once what is easy.");
    assert_eq!(
        ruled["error"]["code"], "budget_exceeded",
        "no cheaper tier answers what a rule sends on: {ruled}"
    );
    assert_eq!(pair.calls(), (1, 0));
    let easy = ask(&up, "easy", "What is easy?");
    assert_eq!((&easy["text"], pair.calls()), (&json!("It is so."), (2, 0)), "{easy}");
    up.drain();
}
