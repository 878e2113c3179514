//! The simulator as clients see it, over HTTP.
//!
//! Nothing here waits for a time to pass: what takes long is set to take long, and what must not be waited for is cut short.

#![expect(clippy::unwrap_used, reason = "clippy exempts test functions, but not what they call")]

use eventsource_stream::Eventsource as _;
use forebay_simulator::{Options, Settings, Simulator, text_hash};
use futures::{StreamExt as _, future::join_all};
use reqwest::{Client, Response, StatusCode};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

type Pairs = [(&'static str, &'static str)];

/// A simulator that runs until it is dropped.
struct Up {
    addresses: Vec<SocketAddr>,
    log: PathBuf,
    client: Client,
    _folder: tempfile::TempDir,
    _stop: oneshot::Sender<()>,
}

/// No latency, and answers of 16 tokens, unless told otherwise.
async fn up(settings: &Pairs) -> Up {
    up_with(settings, 1).await
}

async fn up_with(settings: &Pairs, replicas: usize) -> Up {
    up_logged(settings, replicas, None).await
}

async fn up_logged(settings: &Pairs, replicas: usize, log: Option<&str>) -> Up {
    let quick = [("latency", "0ms"), ("answer.tokens", "16")];
    let pairs = quick.iter().chain(settings).map(|(path, value)| ((*path).to_owned(), (*value).to_owned()));
    let folder = tempfile::tempdir().unwrap();
    let log = log.map_or_else(|| folder.path().join("calls.jsonl"), PathBuf::from);
    let simulator = Simulator::bind(Options {
        settings: Settings::default().with(pairs).unwrap(),
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        replicas,
        call_log: Some(log.clone()),
        // One JSON object of paths and texts will do here.
        reader: |text| match serde_json::from_str::<BTreeMap<String, String>>(text) {
            Ok(pairs) => Ok(pairs.into_iter().collect()),
            Err(fault) => Err(fault.to_string()),
        },
    })
    .await
    .unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let addresses = simulator.addresses().to_vec();
    tokio::spawn(simulator.run(async move { _ = stopped.await }));
    let client = Client::builder().timeout(Duration::from_secs(30)).build().unwrap();
    Up { addresses, log, client, _folder: folder, _stop: stop }
}

impl Up {
    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addresses[0])
    }

    async fn send(&self, path: &str, body: &Value, headers: &[(&str, &str)]) -> reqwest::Result<Response> {
        let request = self.client.post(self.url(path)).json(body);
        headers.iter().fold(request, |request, (name, value)| request.header(*name, *value)).send().await
    }

    async fn post(&self, path: &str, body: &Value, headers: &[(&str, &str)]) -> (u16, Value) {
        let response = self.send(path, body, headers).await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let response = self.client.get(self.url(path)).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    /// The events of a streamed answer: names and data.
    async fn events(&self, path: &str, body: &Value) -> Vec<(String, String)> {
        let response = self.send(path, body, &[]).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let events = response.bytes_stream().eventsource();
        events.map(|event| event.map(|event| (event.event, event.data)).unwrap()).collect().await
    }

    fn lines(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.log).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn last_line(&self) -> Value {
        self.lines().pop().unwrap()
    }
}

fn chat(text: &str, stream: bool) -> Value {
    let messages = json!([{"role": "user", "content": text}]);
    json!({"model": "small", "messages": messages, "stream": stream, "stream_options": {"include_usage": true}})
}

const CHAT: &str = "/v1/chat/completions";

/// The data of events as JSON; what ends a chat stream is none.
fn values(events: &[(String, String)]) -> Vec<Value> {
    events.iter().filter_map(|(_, data)| serde_json::from_str(data).ok()).collect()
}

#[tokio::test]
async fn a_chat_is_answered_alike_whole_and_streamed_and_as_often_as_it_is_asked() {
    let up = up(&[]).await;
    let (status, whole) = up.post(CHAT, &chat("why?", false), &[]).await;
    assert_eq!(
        (status, &whole["object"], &whole["model"]),
        (200, &json!("chat.completion"), &json!("small"))
    );
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
    // "user\nwhy?\n" has ten bytes, so three tokens.
    let usage = json!({"prompt_tokens": 3, "completion_tokens": 16, "total_tokens": 19,
        "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!((text.len(), &whole["usage"]), (64, &usage));

    let events = up.events(CHAT, &chat("why?", true)).await;
    assert_eq!(events.last().unwrap().1, "[DONE]");
    let chunks = values(&events);
    let streamed: String =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(streamed, text);
    let [.., last, total] = &chunks[..] else { panic!("{chunks:?}") };
    assert_eq!((&last["choices"][0]["finish_reason"], &total["usage"]), (&json!("stop"), &usage));
    assert_eq!(chunks.len(), 1 + 16 + 2);

    let other = up_with(&[("seed", "1")], 1).await;
    assert_ne!(other.post(CHAT, &chat("why?", false), &[]).await.1["choices"], whole["choices"]);
}

#[tokio::test]
async fn an_answer_ends_where_the_call_wants_it_to() {
    let up = up(&[("engine.context_tokens", "100")]).await;
    let mut short = chat("why?", false);
    short["max_tokens"] = json!(5);
    let (_, answer) = up.post(CHAT, &short, &[]).await;
    assert_eq!(
        (&answer["usage"]["completion_tokens"], &answer["choices"][0]["finish_reason"]),
        (&json!(5), &json!("stop"))
    );
    // A citation is as long as it is, so the limit cuts it.
    short["messages"][0]["content"] = json!(
        "<source-1 n=\"1\" from=\"a\">\nThe broker keeps records in segments.\n</source-1>\n\n\nWhat of records?"
    );
    let (_, answer) = up.post(CHAT, &short, &[]).await;
    assert_eq!(
        (&answer["usage"]["completion_tokens"], &answer["choices"][0]["finish_reason"]),
        (&json!(5), &json!("length"))
    );
    let (status, refusal) = up.post(CHAT, &chat(&"long ".repeat(100), false), &[]).await;
    assert_eq!((status, &refusal["error"]["code"]), (400, &json!("context_length_exceeded")));
    let (status, refusal) = up.post(CHAT, &json!({"model": "small"}), &[]).await;
    assert_eq!(status, 400);
    assert!(refusal["error"]["message"].as_str().unwrap().contains("messages"), "{refusal}");
    assert_eq!(up.get("/v1/nothing").await.0, 404);
}

#[tokio::test]
async fn responses_are_served() {
    let up = up(&[]).await;
    let body = json!({"model": "small", "input": [{"role": "user", "content": [{"type": "input_text", "text": "why?"}]}]});
    let (_, whole) = up.post("/v1/responses", &body, &[]).await;
    let text = &whole["output"][0]["content"][0]["text"];
    assert_eq!((&whole["status"], text.as_str().unwrap().len()), (&json!("completed"), 64));
    assert_eq!(whole["usage"]["output_tokens"], 16);
    let streamed = json!({"model": "small", "input": "why?", "stream": true});
    let events = up.events("/v1/responses", &streamed).await;
    let data = values(&events);
    assert!(
        data.iter().enumerate().all(|(number, data)| data["sequence_number"] == number),
        "numbered without gaps"
    );
    let deltas = data.iter().filter(|data| data["type"] == "response.output_text.delta");
    let joined: String = deltas.filter_map(|data| data["delta"].as_str()).collect();
    let end = data.last().unwrap();
    assert_eq!((end["type"].as_str(), joined.as_str()), (Some("response.completed"), text.as_str().unwrap()));
    assert_eq!(end["response"]["output"][0]["content"][0]["text"], *text);
}

#[tokio::test]
async fn messages_are_served() {
    let up = up(&[]).await;
    let mut body = json!({"model": "small", "max_tokens": 100, "system": [{"type": "text", "text": "Be brief."}],
        "messages": [{"role": "user", "content": "why?"}]});
    let (_, whole) = up.post("/v1/messages", &body, &[]).await;
    let text = whole["content"][0]["text"].as_str().unwrap();
    assert_eq!((&whole["stop_reason"], &whole["usage"]["output_tokens"]), (&json!("end_turn"), &json!(16)));
    body["stream"] = json!(true);
    let events = up.events("/v1/messages", &body).await;
    let names: Vec<&str> =
        events.iter().map(|(name, _)| name.as_str()).filter(|name| *name != "content_block_delta").collect();
    assert_eq!(
        names,
        [
            "message_start",
            "content_block_start",
            "ping",
            "content_block_stop",
            "message_delta",
            "message_stop"
        ]
    );
    let joined: String = values(&events).iter().filter_map(|data| data["delta"]["text"].as_str()).collect();
    assert_eq!(joined, text);
    let (status, refusal) = up.post("/v1/messages", &body, &[("x-simulate-status", "529")]).await;
    assert_eq!(
        (status, &refusal["type"], &refusal["error"]["type"]),
        (529, &json!("error"), &json!("overloaded_error"))
    );
    body.as_object_mut().unwrap().remove("max_tokens");
    assert_eq!(up.post("/v1/messages", &body, &[]).await.0, 400, "Anthropic wants it");
}

#[tokio::test]
async fn vectors_and_ranks_are_served() {
    let up = up(&[]).await;
    let body = json!({"model": "small", "input": ["segments of a broker", "bananas"], "dimensions": 8});
    let (_, floats) = up.post("/v1/embeddings", &body, &[]).await;
    let vector = floats["data"][1]["embedding"].as_array().unwrap();
    assert_eq!((floats["data"].as_array().unwrap().len(), vector.len()), (2, 8));
    let (_, one) =
        up.post("/v1/embeddings", &json!({"input": "bananas", "encoding_format": "base64"}), &[]).await;
    // 384 floats of four bytes.
    assert_eq!(
        (one["data"][0]["embedding"].as_str().unwrap().len(), &one["model"]),
        (2_048, &json!("simulated"))
    );
    assert_eq!(up.post("/v1/embeddings", &json!({"input": []}), &[]).await.0, 400);
    // Which texts a call brought, the same text under the same hash.
    let hashes: Vec<_> = up.lines().iter().map(|line| line["text_hashes"].clone()).collect();
    let [broker, bananas] = ["segments of a broker", "bananas"].map(text_hash);
    assert_eq!(hashes, [json!([broker, bananas]), json!([bananas]), Value::Null]);

    let documents = ["bananas", "a broker keeps segments"];
    let (_, ranked) = up
        .post("/v1/rerank", &json!({"query": "broker segments", "documents": documents, "top_n": 1}), &[])
        .await;
    assert_eq!(ranked["results"], json!([{"index": 1, "relevance_score": 1.0}]));
    let (_, ranked) = up.post("/rerank", &json!({"query": "broker segments", "texts": documents}), &[]).await;
    assert_eq!(ranked, json!([{"index": 1, "score": 1.0}, {"index": 0, "score": 0.0}]));
    assert_eq!(up.post("/rerank", &json!({"query": "broker"}), &[]).await.0, 400);
}

#[tokio::test]
async fn models_health_and_metrics_are_vllms() {
    let up = up(&[
        ("models", "one, two"),
        ("any_model", "false"),
        ("latency", "modelled"),
        ("engine.prefill_tokens_per_s", "1000000"),
        ("engine.decode_tokens_per_s", "100000"),
    ])
    .await;
    assert_eq!(up.get("/health").await.0, 200);
    let models: Value = serde_json::from_str(&up.get("/v1/models").await.1).unwrap();
    assert_eq!((&models["data"][0]["id"], &models["data"][1]["id"]), (&json!("one"), &json!("two")));
    assert_eq!(up.post(CHAT, &chat("why?", false), &[]).await.0, 404);
    let mut body = chat(&"the same beginning ".repeat(20), false);
    body["model"] = json!("two");
    let cached = async |body: &Value| {
        let (status, answer) = up.post(CHAT, body, &[]).await;
        assert_eq!(status, 200);
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    // 386 bytes are 97 tokens, and so 6 full blocks of 16.
    assert_eq!([cached(&body).await, cached(&body).await], [0, 96]);
    body["cache_salt"] = json!("another tenant");
    assert_eq!(cached(&body).await, 0);
    let metrics = up.get("/metrics").await.1;
    for (name, value) in [
        ("num_requests_running", 0.0),
        ("num_requests_waiting", 0.0),
        ("kv_cache_usage_perc", 0.0),
        ("prefix_cache_queries_total", 291.0),
        ("prefix_cache_hits_total", 96.0),
        ("prompt_tokens_total", 291.0),
        ("generation_tokens_total", 48.0),
        ("time_to_first_token_seconds_count", 3.0),
        ("time_per_output_token_seconds_count", 3.0),
        ("e2e_request_latency_seconds_count", 3.0),
        ("request_queue_time_seconds_count", 3.0),
    ] {
        let line = format!("vllm:{name}{{engine=\"0\",model_name=\"one\"}} ");
        let found = metrics
            .lines()
            .find_map(|found| found.strip_prefix(&line))
            .unwrap_or_else(|| panic!("{name}: {metrics}"));
        assert!((found.parse::<f64>().unwrap() - value).abs() < 1e-9, "{name} is {found}, not {value}");
    }
}

/// What a client makes of a call, in a word.
async fn seen(sent: reqwest::Result<Response>) -> String {
    let response = match sent {
        Ok(response) => response,
        Err(fault) if fault.is_timeout() => return "nothing".to_owned(),
        Err(_) => return "no answer".to_owned(),
    };
    let status = response.status().as_u16();
    let length = response.content_length();
    match response.bytes().await {
        Err(fault) if fault.is_timeout() => format!("{status} and then nothing"),
        Err(_) => format!("{status} broken off"),
        Ok(body) if body.is_empty() => format!("{status} without a body"),
        Ok(body) if length.is_none() => {
            let events: Vec<&str> = std::str::from_utf8(&body)
                .unwrap()
                .lines()
                .filter_map(|l| l.strip_prefix("data: "))
                .collect();
            let is_read = |data: &&str| *data == "[DONE]" || serde_json::from_str::<Value>(data).is_ok();
            match (events.iter().all(is_read), events.last()) {
                (false, _) => format!("{status} malformed"),
                (true, Some(&"[DONE]")) if events.len() == 4 => format!("{status} empty"),
                (true, _) => format!("{status} whole"),
            }
        }
        Ok(body) => match serde_json::from_slice::<Value>(&body) {
            Err(_) => format!("{status} malformed"),
            Ok(body) if body["choices"][0]["message"]["content"] == "" => format!("{status} empty"),
            Ok(_) => format!("{status} whole"),
        },
    }
}

#[tokio::test]
async fn each_fault_is_what_its_name_says() {
    let up = up(&[]).await;
    let impatient = Client::builder().timeout(Duration::from_secs(1)).build().unwrap();
    for (fault, whole, streamed) in [
        ("none", "200 whole", "200 whole"),
        ("status_400", "400 whole", "400 whole"),
        ("status_503", "503 whole", "503 whole"),
        ("usage_limit", "400 whole", "400 whole"),
        ("context-length", "400 whole", "400 whole"),
        ("reset", "no answer", "no answer"),
        ("stall", "nothing", "nothing"),
        ("stall-mid", "200 and then nothing", "200 and then nothing"),
        ("cut", "200 broken off", "200 broken off"),
        ("malformed", "200 malformed", "200 malformed"),
        ("empty", "200 empty", "200 empty"),
        ("blank", "200 without a body", "200 without a body"),
    ] {
        for (stream, expected) in [(false, whole), (true, streamed)] {
            let client = if fault.starts_with("stall") { &impatient } else { &up.client };
            let request =
                client.post(up.url(CHAT)).json(&chat("why?", stream)).header("x-simulate-fault", fault);
            assert_eq!(seen(request.send().await).await, expected, "{fault}, stream: {stream}");
        }
    }
    let (status, refusal) = up.post(CHAT, &chat("why?", false), &[("x-simulate-fault", "stal")]).await;
    assert_eq!(status, 400);
    assert!(
        refusal["error"]["message"].as_str().unwrap().contains("it may be none, status_400"),
        "{refusal}"
    );
}

#[tokio::test]
async fn a_stall_ends_and_the_answer_goes_on() {
    let up = up(&[("fault.stall", "50ms")]).await;
    for fault in ["stall", "stall_mid"] {
        for stream in [false, true] {
            let began = Instant::now();
            let sent = up.send(CHAT, &chat("why?", stream), &[("x-simulate-fault", fault)]).await;
            assert_eq!(seen(sent).await, "200 whole", "{fault}");
            assert!(began.elapsed() >= Duration::from_millis(50), "{fault}");
            assert_eq!(
                (&up.last_line()["fault"], &up.last_line()["ended_by"]),
                (&json!(fault), &json!("server"))
            );
        }
    }
}

#[tokio::test]
async fn a_reset_is_a_reset_and_no_mere_end() {
    use std::io::ErrorKind;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let up = up(&[]).await;
    let mut stream = tokio::net::TcpStream::connect(up.addresses[0]).await.unwrap();
    let body = chat("why?", false).to_string();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: h\r\nx-simulate-fault: reset\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    let fault = stream.read(&mut [0; 10]).await.unwrap_err();
    assert_eq!(fault.kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn refusals_say_when_to_come_back() {
    let up = up(&[("faults.status_429", "1"), ("fault.retry_after", "1500ms")]).await;
    let header = async |name: &str, headers: &[(&str, &str)]| {
        let response = up.send(CHAT, &chat("why?", false), headers).await.unwrap();
        response.headers().get(name).map(|value| value.to_str().unwrap().to_owned())
    };
    assert_eq!(header("retry-after", &[]).await.as_deref(), Some("2"));
    assert_eq!(header("retry-after", &[("x-simulate-retry-after", "7")]).await.as_deref(), Some("7"));
    assert_eq!(header("retry-after-ms", &[("x-simulate-retry-after-ms", "7")]).await.as_deref(), Some("7"));
    let set = async |form: &str| {
        let pairs =
            json!({"faults.status_429": "1", "fault.retry_after": "1500ms", "fault.retry_after_form": form});
        let response = up.client.put(up.url("/simulate")).json(&pairs).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
    };
    set("ms").await;
    assert_eq!(header("retry-after-ms", &[]).await.as_deref(), Some("1500"));
    set("date").await;
    assert!(header("retry-after", &[]).await.unwrap().ends_with(" GMT"));
    set("none").await;
    assert_eq!(header("retry-after", &[]).await, None);
}

#[tokio::test]
async fn keys_die_and_limits_are_kept_for_each_key() {
    let up = up(&[("keys.dead", "sk-dead"), ("keys.spent", "sk-spent"), ("limits.requests_per_minute", "2")])
        .await;
    let with = async |key: &str| {
        let response = up
            .send(CHAT, &chat("why?", false), &[("authorization", &format!("Bearer {key}"))])
            .await
            .unwrap();
        let header =
            |name: &str| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        (response.status().as_u16(), header("x-ratelimit-remaining-requests"), header("retry-after"))
    };
    let faulty = [("authorization", "Bearer sk-dead"), ("x-simulate-fault", "cut")];
    assert_eq!(up.post(CHAT, &chat("why?", false), &faulty).await.0, 401);
    assert_eq!(up.last_line()["fault"], Value::Null, "it was not met");
    assert_eq!(with("sk-dead").await, (401, None, None));
    assert_eq!(with("sk-spent").await, (400, None, None));
    let left = |left: &str| Some(left.to_owned());
    assert_eq!([with("sk-1").await, with("sk-1").await], [(200, left("1"), None), (200, left("0"), None)]);
    let (status, remaining, retry_after) = with("sk-1").await;
    assert_eq!((status, remaining), (429, left("0")));
    assert!((20..=30).contains(&retry_after.unwrap().parse::<u32>().unwrap()));
    assert_eq!(with("sk-2").await.0, 200);
    let lines = up.lines();
    assert!(
        lines.iter().all(|line| line["key"].as_str().unwrap().len() == 8)
            && lines[3]["key"] == lines[4]["key"]
    );
    let body = json!({"max_tokens": 5, "messages": [{"role": "user", "content": "why?"}]});
    let response = up.send("/v1/messages", &body, &[("x-api-key", "sk-3")]).await.unwrap();
    assert_eq!(response.headers()["anthropic-ratelimit-requests-remaining"], "1");
    assert!(response.headers()["anthropic-ratelimit-requests-reset"].to_str().unwrap().ends_with('Z'));
}

#[tokio::test]
async fn settings_change_while_it_runs_and_go_back_to_those_of_the_start() {
    let up = up(&[("cold_start.health", "1h")]).await;
    let put = async |body: &str| {
        let response = up.client.put(up.url("/simulate")).body(body.to_owned()).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    assert_eq!((up.get("/health").await.0, up.post(CHAT, &chat("why?", false), &[]).await.0), (503, 503));
    assert_eq!(put(r#"{"cold_start.health": "0s"}"#).await.0, 200);
    assert_eq!((up.get("/health").await.0, up.post(CHAT, &chat("why?", false), &[]).await.0), (200, 200));
    let (status, fault) = put(r#"{"faults.cutt": "1"}"#).await;
    assert_eq!((status, fault.as_str()), (400, "faults.cutt is no setting\n"));
    assert_eq!(put(r#"{"engine.kv_blocks": "5000"}"#).await.0, 400);
    assert_eq!(up.get("/health").await.0, 200, "what was refused changed nothing");
    assert!(up.get("/simulate").await.1.contains("  health: \"0s\"\n"));
    assert_eq!(put("{}").await.0, 200);
    assert_eq!(up.get("/health").await.0, 503);
}

#[tokio::test]
async fn the_first_call_after_a_start_is_slow() {
    let up = up(&[("cold_start.first_call", "300ms")]).await;
    let took = async || {
        let began = Instant::now();
        assert_eq!(up.post(CHAT, &chat("why?", false), &[]).await.0, 200);
        began.elapsed()
    };
    assert!(took().await >= Duration::from_millis(300));
    // Thirty of them would take nine seconds.
    let began = Instant::now();
    for _ in 0..30 {
        took().await;
    }
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    let restarted = up.client.post(up.url("/simulate/restart")).send().await.unwrap();
    assert_eq!(restarted.status(), StatusCode::NO_CONTENT);
    assert!(took().await >= Duration::from_millis(300));
}

#[tokio::test]
async fn a_full_queue_refuses_and_who_waits_is_counted() {
    let up = up(&[("latency", "1h"), ("engine.slots", "1"), ("engine.queue", "1")]).await;
    let body = chat("why?", false);
    let both = join_all((0..2).map(|_| up.send(CHAT, &body, &[])));
    tokio::pin!(both);
    let counted = async {
        loop {
            let metrics = up.get("/metrics").await.1;
            let has = |line: &str| metrics.contains(&format!("vllm:{line}"));
            if has("num_requests_running{engine=\"0\",model_name=\"simulated\"} 1\n")
                && has("num_requests_waiting{engine=\"0\",model_name=\"simulated\"} 1\n")
            {
                return;
            }
        }
    };
    tokio::select! {
        _ = &mut both => panic!("they cannot be answered"),
        () = counted => {}
    }
    tokio::select! {
        _ = &mut both => panic!("they cannot be answered"),
        (status, refusal) = async { up.post(CHAT, &chat("who?", false), &[]).await } => {
            assert_eq!(status, 503);
            assert!(refusal["error"]["message"].as_str().unwrap().contains("queue is full"), "{refusal}");
        }
    }
}

#[tokio::test]
async fn replicas_are_as_fast_as_was_asked_and_count_tries_together() {
    let up = up_with(
        &[("latency", "20ms"), ("speeds", "1, 0.1"), ("faults.reset", "1"), ("fault.attempts", "1")],
        2,
    )
    .await;
    let body = chat("why?", false);
    let ask = async |replica: usize| {
        let url = format!("http://{}{CHAT}", up.addresses[replica]);
        up.client.post(url).header("x-forebay-call-id", "c1").json(&body).send().await
    };
    assert!(ask(0).await.is_err());
    let began = Instant::now();
    assert_eq!(ask(1).await.unwrap().status(), StatusCode::OK);
    assert!(began.elapsed() >= Duration::from_millis(200));
    let told: Vec<_> =
        up.lines().iter().map(|line| (line["replica"].clone(), line["attempt"].clone())).collect();
    assert_eq!(told, [(json!(0), json!(0)), (json!(1), json!(1))]);
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_slot_and_is_logged() {
    let up = up(&[("latency", "0ms"), ("token_gap", "1h"), ("engine.slots", "1")]).await;
    let response = up.send(CHAT, &chat("why?", true), &[("x-forebay-call-id", "left")]).await.unwrap();
    let first = response.bytes_stream().next().await.unwrap().unwrap();
    assert!(!first.is_empty(), "the stream has begun, and is dropped here");
    // It has the only slot, so that this is answered says that it is free. One token needs no gap.
    let mut one = chat("and now?", false);
    one["max_tokens"] = json!(1);
    assert_eq!(up.post(CHAT, &one, &[]).await.0, 200);
    let left = up.lines().into_iter().find(|line| line["call_id"] == "left").unwrap();
    assert_eq!(
        (&left["ended_by"], &left["completion_tokens"], &left["status"]),
        (&json!("client"), &json!(1), &json!(200))
    );
}

#[tokio::test]
async fn an_answer_whose_line_cannot_be_written_does_not_go_out() {
    let up = up_logged(&[], 1, Some("/dev/full")).await;
    for stream in [false, true] {
        assert_eq!(seen(up.send(CHAT, &chat("why?", stream), &[]).await).await, "no answer");
    }
}

#[tokio::test]
async fn who_is_urgent_passes_who_waits() {
    let up = up(&[("engine.slots", "1")]).await;
    let ask = async |id: &str, priority: i64, latency_ms: &str| {
        let mut body = chat("why?", false);
        body["priority"] = json!(priority);
        let headers = [("x-request-id", id), ("x-simulate-latency-ms", latency_ms)];
        assert_eq!(up.post(CHAT, &body, &headers).await.0, 200);
    };
    let until_one = async |what: &str| {
        let one = format!("vllm:num_requests_{what}{{engine=\"0\",model_name=\"simulated\"}} 1\n");
        while !up.get("/metrics").await.1.contains(&one) {}
    };
    // One runs for long, and one waits, before the urgent one comes.
    let second = async {
        until_one("running").await;
        ask("second", 0, "1000").await;
    };
    let urgent = async {
        until_one("waiting").await;
        ask("urgent", -1, "1000").await;
    };
    let all = async { tokio::join!(ask("first", 0, "5000"), second, urgent) };
    tokio::time::timeout(Duration::from_secs(30), all).await.unwrap();
    let ids: Vec<String> =
        up.lines().iter().map(|line| line["call_id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(ids, ["first", "urgent", "second"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_call_log_is_what_clients_saw() {
    const CALLS: usize = 400;
    let up = up(&[
        ("latency", "log-normal 1ms..20ms"),
        ("faults.cut", "15%"),
        ("faults.reset", "10%"),
        ("faults.malformed", "10%"),
        ("faults.empty", "5%"),
        ("faults.status_429", "10%"),
        ("faults.status_500", "10%"),
    ])
    .await;
    // Every seventh client goes away at once, and some of them are answered all the same.
    let ask = async |number: usize| {
        let (id, stream) = (format!("call-{number}"), number.is_multiple_of(2));
        let call =
            async { seen(up.send(CHAT, &chat("why?", stream), &[("x-forebay-call-id", &id)]).await).await };
        let seen = match number % 7 {
            0 => tokio::time::timeout(Duration::from_millis(5), call).await.unwrap_or("gone".to_owned()),
            _ => call.await,
        };
        (id, seen)
    };
    let asked: Vec<(String, String)> =
        futures::stream::iter(0..CALLS).map(ask).buffer_unordered(32).collect().await;
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    // Whoever left may have been noticed a moment later.
    let is_done = || up.lines().len() + asked.iter().filter(|(_, seen)| seen == "gone").count() >= CALLS;
    assert!(is_done(), "those that were answered are in the log");
    let lines = up.lines();
    for (id, seen) in asked {
        let mine: Vec<_> = lines.iter().filter(|line| line["call_id"] == *id).collect();
        *counts.entry(seen.clone()).or_default() += 1;
        if seen == "gone" {
            assert!(mine.len() <= 1);
            continue;
        }
        let [line] = mine[..] else { panic!("{id}, seen as {seen}, has {} lines", mine.len()) };
        let fault = line["fault"].as_str().unwrap_or("none");
        let logged = match (line["status"].as_u64(), fault.split(' ').next().unwrap()) {
            (None, "reset") => "no answer".to_owned(),
            (Some(status), "cut") => format!("{status} broken off"),
            (Some(status), "malformed" | "empty") => format!("{status} {fault}"),
            (Some(status), _) => format!("{status} whole"),
            (None, _) => format!("{line}"),
        };
        assert_eq!(seen, logged, "{line}");
        assert_eq!((&line["ended_by"], &line["attempt"]), (&json!("server"), &json!(0)));
        let answered = !matches!(fault, "reset" | "status_429" | "status_500");
        assert!((line["completion_tokens"] != 0) == answered, "{line}");
        assert!(line["started_us"].as_u64() <= line["ended_us"].as_u64());
    }
    assert!(counts.len() >= 7, "each fault was met: {counts:?}");
}
