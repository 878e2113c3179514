//! Budgets and alerts in the product: calls that cost something, who hears of it, and whether counters and tables agree.
//!
//! Oracle: what each call costs, which is the same for all; and the rows on `attempts`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says why by panicking")]

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode},
    routing::post,
};
use forebay_schemas::{Alert, AlertKind, AlertState, Outcome, Record as _};
use forebay_stores::{
    KeyValue as _,
    key_value::{Redis, RedisOptions},
};
use forebay_tests::{
    Client, Running, free_port,
    model::{ModelServer, Says},
    product::{Finished, Up, command, finish},
    services, wait_for,
};
use serde_json::{Value, json};
use std::{
    net::Ipv4Addr,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{net::TcpListener, runtime::Runtime};

/// An alert comes with the end of a minute.
const LIMIT: Duration = Duration::from_secs(150);
/// 10 and 5 tokens at 10,000 nano-dollars each.
const CALL_NANO_USD: i64 = 150_000;

// Budgets here are of a month: one of a day may begin anew while a test runs.

/// What came to a webhook: headers and body of each post.
#[derive(Clone, Default)]
struct Posts(Arc<Mutex<Vec<(HeaderMap, Value)>>>);

/// Takes posts, but not the first one.
struct Hook {
    url: String,
    posts: Posts,
    _runtime: Runtime,
}

impl Hook {
    fn start() -> Self {
        let (port, posts) = (free_port(), Posts::default());
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, port))).unwrap();
        let router = Router::new().route("/hook", post(taken)).with_state(posts.clone());
        runtime.spawn(async move { axum::serve(listener, router).await });
        Self { url: format!("http://127.0.0.1:{port}/hook"), posts, _runtime: runtime }
    }
}

async fn taken(State(posts): State<Posts>, headers: HeaderMap, Json(body): Json<Value>) -> StatusCode {
    let mut posts = posts.0.lock().unwrap();
    posts.push((headers, body));
    if posts.len() == 1 { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::NO_CONTENT }
}

/// Asks for an answer of so many tokens, as nobody has before.
fn ask(client: &Client, id: &str, max_tokens: u32) -> Value {
    client.ask(json!({
        "id": id, "tenant": "acme", "job": "nightly", "prompt": format!("What is {id}?"), "max_tokens": max_tokens,
        "cache": {"no_cache": true, "no_store": true},
    }));
    client.read("results").of_key(id, LIMIT).json()
}

fn ask_ten(client: &Client, name: &str) {
    for id in (0..10).map(|number| format!("{name}{number}")) {
        let result = ask(client, &id, 10);
        assert_eq!(result["cost_nano_usd"], json!(CALL_NANO_USD), "{result}");
    }
}

/// A file of settings, with a model that has a price, and these settings more.
fn settings(data: &Path, model: &ModelServer, more: &str) -> String {
    let (prices, config) = (data.join("prices.json"), data.join("forebay.yaml"));
    let each = json!({"input_cost_per_token": 1e-5, "output_cost_per_token": 1e-5});
    std::fs::write(&prices, json!({"m": each}).to_string()).unwrap();
    let text = format!("model: {{url: '{}', name: m}}\nprices: {}\n{more}", model.url(), prices.display());
    std::fs::write(&config, text).unwrap();
    config.display().to_string()
}

/// All alerts that were told, once they are as wanted.
fn told(client: &Client, what: &str, wanted: impl Fn(&[Alert]) -> bool) -> Vec<Alert> {
    client.read("alerts").until(what, LIMIT, |records| {
        let decoded = records.iter().map(|record| Alert::decode(record.value.as_deref().unwrap()).unwrap());
        Some(decoded.collect::<Vec<_>>()).filter(|alerts| wanted(alerts))
    })
}

/// The same; none was told twice.
fn told_once(client: &Client, what: &str, wanted: impl Fn(&[Alert]) -> bool) -> Vec<Alert> {
    let alerts = told(client, what, wanted);
    for (index, alert) in alerts.iter().enumerate() {
        let is_new = |other: &Alert| (&other.id, other.seen_at) != (&alert.id, alert.seen_at);
        assert!(alerts[..index].iter().all(is_new), "told twice: {alert:?}");
    }
    alerts
}

fn has(alerts: &[Alert], kind: AlertKind, holder: &str) -> bool {
    alerts.iter().any(|alert| alert.kind == kind && alert.holder == holder)
}

fn budgets(data: &Path, up: &Up, arguments: &[&str]) -> (Finished, Vec<Value>) {
    let mut all = vec!["budgets"];
    all.extend(arguments);
    all.extend(["--json", "--admin", &up.admin]);
    let finished = finish(&mut command(data, &all), LIMIT);
    let rows = finished.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (finished, rows)
}

#[test]
fn who_spends_is_told_of_and_counters_agree_with_tables_until_some_are_lost() {
    let data = tempfile::tempdir().unwrap();
    let (model, hook) = (ModelServer::start(|_| Says::Text("It is so.".to_owned())), Hook::start());
    let more = format!(
        "budgets: ['* 0.1 USD/month', 'job nightly 1 USD/month', 'all 100 USD/month']\n\
         alerts: {{rate: 0.0002 USD/minute, cap: '1%,100%', webhook: '{}'}}\n",
        hook.url
    );
    let config = settings(data.path(), &model, &more);
    let start = || {
        let all = ["up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--config", config.as_str()];
        Up::wait("forebay up", command(data.path(), &all).env("FOREBAY_ALERTS_WEBHOOK_KEY", "canary"))
    };
    let up = start();
    ask_ten(&up.client(), "q");
    // For its answer there is no room.
    let refused = ask(&up.client(), "long", 20_000);
    assert_eq!(refused["error"]["code"], json!("budget_exceeded"), "{refused}");

    let is_full = |alert: &Alert| alert.kind == AlertKind::Cap && alert.threshold == alert.limit;
    let told = told_once(&up.client(), "alerts of both kinds, of the tenant and of all", |alerts| {
        let has_rates = has(alerts, AlertKind::Rate, "tenant") && has(alerts, AlertKind::Rate, "all");
        has_rates && alerts.iter().any(is_full)
    });
    let cap = told.iter().find(|alert| is_full(alert)).unwrap();
    assert_eq!((cap.state, cap.tenant.as_ref().unwrap().as_str()), (AlertState::Firing, "acme"));
    assert_eq!((cap.budget.as_str(), cap.limit, cap.threshold), ("0.1 USD/month", 100_000_000, 100_000_000));
    assert!(cap.message.ends_with(", and calls are refused"), "{}", cap.message);
    wait_for("all alerts at the webhook", LIMIT, || {
        let posts = hook.posts.0.lock().unwrap();
        told.iter()
            .all(|alert| posts.iter().skip(1).any(|(_, body)| body["id"] == alert.id.as_str()))
            .then_some(())
    });
    let posts = hook.posts.0.lock().unwrap().clone();
    assert_eq!(posts[0].1, posts[1].1, "what was not taken came again");
    assert!(posts.iter().all(|(headers, _)| headers["authorization"] == "Bearer canary"), "{posts:?}");
    assert_eq!(posts[0].0["idempotency-key"], posts[1].0["idempotency-key"]);
    assert!(!up.process.stderr().contains("canary") && !up.process.stderr().contains("/hook"));
    let metrics = up.get("/metrics").1;
    assert!(metrics.contains("forebay_alerts_total{kind=\"cap\",state=\"firing\"}"), "{metrics}");

    let (finished, rows) = budgets(data.path(), &up, &["status"]);
    assert_eq!(finished.code, 0, "{finished:?}");
    let stood: Vec<_> =
        rows.iter().map(|row| (&row["holder"], &row["used"], &row["held"], &row["refused"])).collect();
    let used = json!(10 * CALL_NANO_USD);
    let (none, one) = (json!(0), json!(1));
    let [tenant, job, all] = ["tenant", "job", "all"].map(|holder| json!(holder));
    assert_eq!(
        stood,
        [(&tenant, &used, &none, &one), (&job, &used, &none, &none), (&all, &used, &none, &none)]
    );

    let outcome = up.client().read("outcomes").of_key("q0", LIMIT);
    let date = Outcome::decode(outcome.value.as_deref().unwrap()).unwrap().date;
    let drift = |up: &Up| budgets(data.path(), up, &["drift", "--date", &date]);
    let agreed =
        wait_for("the rows in their table", LIMIT, || Some(drift(&up)).filter(|(ended, _)| ended.code == 0));
    let drifts: Vec<_> = agreed.1.iter().map(|row| (&row["log_answered"], &row["drift"])).collect();
    assert_eq!(drifts, [(&used, &none); 3]);
    up.drain();

    // A process that counts for itself begins at 0.
    let up = start();
    ask(&up.client(), "after", 10);
    let (ended, rows) = drift(&up);
    assert_eq!(ended.code, 1, "{ended:?}");
    for row in rows {
        assert_eq!((&row["used"], &row["is_over"]), (&json!(CALL_NANO_USD), &json!(true)), "{row}");
        assert!(row["drift"].as_i64().unwrap() <= -9 * CALL_NANO_USD, "{row}");
    }
    up.drain();
}

#[test]
fn of_two_processes_that_share_counters_one_tells_and_the_other_takes_over() {
    let Some(redis) = services::redis() else { return };
    let (data, model) =
        (tempfile::tempdir().unwrap(), ModelServer::start(|_| Says::Text("It is so.".to_owned())));
    let prefix = format!("alerts-{}-", std::process::id());
    let more = format!(
        "topic_prefix: {prefix}\nstores: {{key_value: '{redis}'}}\nbudgets: ['* 0.1 USD/month']\nalerts: {{cap: '1%,4%'}}\n"
    );
    let config = settings(data.path(), &model, &more);
    let up = Up::start(data.path(), &["--config", &config]);
    let arguments =
        ["run", "answer", "--stage", "infer", "--admin", "127.0.0.1:0", "--config", config.as_str()];
    let other =
        Up::wait("forebay run", command(data.path(), &arguments).args(["--bootstrap-servers", &up.servers]));
    let client = Client::new(&up.servers, &prefix);
    ask_ten(&client, "first");
    told(&client, "the first part of the budget", |alerts| has(alerts, AlertKind::Cap, "tenant"));
    other.kill();
    // All of it beyond the second part, which what is used and held by the first ten does not reach.
    ask_ten(&client, "second");
    ask_ten(&client, "third");
    // Killed before it had noted that it told an alert, the other one leaves it to be told again.
    let once = |alerts: &[Alert]| {
        let mut alerts = alerts.to_vec();
        alerts.dedup_by_key(|alert| (alert.id.clone(), alert.seen_at));
        alerts
    };
    let alerts = once(&told(&client, "the second part of the budget", |alerts| once(alerts).len() > 1));
    assert_eq!(alerts.iter().map(|alert| alert.threshold).collect::<Vec<_>>(), [1_000_000, 4_000_000]);
    assert_eq!(alerts[0].id, alerts[1].id, "one alert, of two parts");
    up.drain();
}

#[test]
fn a_process_that_is_started_again_knows_what_is_usual() {
    let Some(redis) = services::redis() else { return };
    let (data, model) =
        (tempfile::tempdir().unwrap(), ModelServer::start(|_| Says::Text("It is so.".to_owned())));
    let prefix = format!("usual-{}-", std::process::id());
    let more = format!(
        "topic_prefix: {prefix}\nstores: {{key_value: '{redis}'}}\nbudgets: ['* 1000 USD/month']\n\
         alerts: {{ewma: 5, floor: 0.0001 USD/minute, forecast: off, cap: off}}\n"
    );
    let config = settings(data.path(), &model, &more);
    let up = Up::start(data.path(), &["--config", &config]);
    ask_ten(&Client::new(&up.servers, &prefix), "first");
    let runtime = Runtime::new().unwrap();
    let options = RedisOptions { prefix: format!("forebay:alerts:{prefix}"), ..RedisOptions::default() };
    let store = runtime.block_on(Redis::connect(&redis, options)).unwrap();
    let (key, mut kept) = wait_for("what is known to be kept", LIMIT, || {
        ["known/0/0", "known/1/0"].into_iter().find_map(|key| {
            let bytes = runtime.block_on(store.get(key)).unwrap()?;
            let kept: Value = serde_json::from_slice(&bytes).unwrap();
            (kept["watched"] != json!([])).then_some((key, kept))
        })
    });
    up.kill();
    // As it is after ten minutes of a call in each.
    let usual = &mut kept["watched"][0]["counts"]["usual"];
    assert!(usual["value"].as_i64() >= Some(CALL_NANO_USD), "{usual}");
    *usual = json!({"value": CALL_NANO_USD, "count": 10});
    runtime.block_on(store.set(key, kept.to_string().into(), None)).unwrap();

    let up = Up::start(data.path(), &["--config", &config]);
    let client = Client::new(&up.servers, &prefix);
    ask_ten(&client, "second");
    let alert = told(&client, "an unusual minute", |alerts| has(alerts, AlertKind::Ewma, "tenant")).remove(0);
    assert!(alert.message.ends_with("in a minute, where $0.00015 is usual"), "{}", alert.message);
    up.drain();
}

#[test]
fn an_alert_that_was_told_is_posted_wherever_a_process_is_killed() {
    let data = tempfile::tempdir().unwrap();
    let (model, hook) = (ModelServer::start(|_| Says::Text("It is so.".to_owned())), Hook::start());
    let more = format!(
        "budgets: ['* 0.01 USD/month']\nalerts: {{cap: 1%, forecast: off, webhook: '{}'}}\n",
        hook.url
    );
    let config = settings(data.path(), &model, &more);
    let process = |crash_at: &str| {
        let all = ["up", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--config", config.as_str()];
        Running::start("forebay up", command(data.path(), &all).env("FOREBAY_CRASH_AT", crash_at))
    };
    let mut up = Up::of("forebay up", process("alerts.told:1"));
    up.client().ask(json!({"id": "q", "tenant": "acme", "prompt": "What is q?", "max_tokens": 10}));
    // At the end of the minute.
    up.process.ended(LIMIT);
    // At the second try, whoever makes the first, it is taken, and its process killed before it has stored that.
    process("alerts.posted:1").ended(LIMIT);
    let up = Up::of("forebay up", process("nowhere:1"));
    let posts = wait_for("the post by the next process", LIMIT, || {
        Some(hook.posts.0.lock().unwrap().clone()).filter(|posts| posts.len() > 2)
    });
    let alert = told_once(&up.client(), "the alert", |alerts| !alerts.is_empty()).remove(0);
    for (headers, body) in &posts[..3] {
        assert_eq!(body["id"], json!(alert.id));
        assert_eq!(headers["idempotency-key"], posts[0].0["idempotency-key"]);
    }
    up.drain();
}
