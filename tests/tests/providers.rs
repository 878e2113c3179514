//! Each API against the simulator, with what goes wrong there, in one process; the simulator's log is the provider's own
//! account of what was asked and answered.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says why by panicking")]

use forebay_calls::{
    Api, Batch, Call, CallError, Listener, Model, Reply, Secret, Server, Task, Tried, TryId, Upstream,
    batch::Size, server::Timeouts,
};
use forebay_schemas::{Content, Message, Role};
use forebay_simulator::{Options, Settings, Simulator};
use futures::future::join_all;
use serde_json::Value;
use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{sync::oneshot, time::Instant};

/// How long anything may take that is not made to stall, which is given up after [`STALL`].
const LIMIT: Duration = Duration::from_secs(30);
const STALL: Duration = Duration::from_secs(3);

const ANSWERING: [Api; 3] = [Api::Chat, Api::Responses, Api::Messages];

/// Only a modelled engine has a cache.
const MODELLED: [(&str, &str); 3] = [
    ("latency", "modelled"),
    ("engine.prefill_tokens_per_s", "1000000"),
    ("engine.decode_tokens_per_s", "100000"),
];

/// A simulator that runs until it is dropped.
struct Up {
    url: String,
    log: PathBuf,
    _folder: tempfile::TempDir,
    _stop: oneshot::Sender<()>,
}

impl Up {
    /// No latency and answers of 16 tokens, unless told otherwise.
    async fn with(settings: &[(&str, &str)]) -> Self {
        let quick = [("latency", "0ms"), ("answer.tokens", "16")];
        let pairs =
            quick.iter().chain(settings).map(|(path, value)| ((*path).to_owned(), (*value).to_owned()));
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("calls.jsonl");
        let simulator = Simulator::bind(Options {
            settings: Settings::default().with(pairs).unwrap(),
            listen: ([127, 0, 0, 1], 0).into(),
            replicas: 1,
            call_log: Some(log.clone()),
            reader: |_| Err("its settings stay".to_owned()),
        })
        .await
        .unwrap();
        let url = format!("http://{}/v1", simulator.addresses()[0]);
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(simulator.run(async move { _ = stopped.await }));
        Self { url, log, _folder: folder, _stop: stop }
    }

    fn server(&self, api: Api) -> Server {
        self.server_within(api, LIMIT)
    }

    fn server_within(&self, api: Api, limit: Duration) -> Server {
        let timeouts = Timeouts { first_token: limit, silence: limit, total: limit, ..Timeouts::default() };
        Server::new(api, &self.url, "simulated", vec![Secret::new("sk-1")], timeouts).unwrap()
    }

    fn calls(&self) -> Vec<Value> {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// Names its tries, and notes what it hears.
#[derive(Default)]
struct Heard {
    tokens: Mutex<String>,
    ended: Mutex<u32>,
}

impl Listener for Heard {
    fn started(&self, _: Upstream<'_>) {}
    fn try_id(&self) -> Option<TryId> {
        Some(TryId { call: "call-of-a-test".to_owned(), number: 3 })
    }
    fn token(&self, text: &str) {
        self.tokens.lock().unwrap().push_str(text);
    }
    fn ended(&self, _: &Tried<'_>) {
        *self.ended.lock().unwrap() += 1;
    }
}

fn call(stream: bool) -> Call<'static> {
    let said = |role, text: &str| Message {
        role,
        content: Some(Content::Text(text.to_owned())),
        rest: Default::default(),
    };
    Call {
        // Long enough that the cache knows some of it the second time.
        messages: vec![said(Role::System, &"Be brief. ".repeat(40)), said(Role::User, "Why is lag large?")],
        stream,
        ..Call::default()
    }
}

async fn ask(server: &Server, stream: bool) -> (Result<Reply, CallError>, Heard) {
    let heard = Heard::default();
    let result = server.complete(&call(stream), &heard).await;
    assert_eq!(*heard.ended.lock().unwrap(), 1, "each try has one end");
    (result, heard)
}

#[tokio::test]
async fn every_api_gives_the_same_answer_and_the_provider_s_own_count() {
    for stream in [false, true] {
        let mut texts = Vec::new();
        for api in ANSWERING {
            let up = Up::with(&MODELLED).await;
            let server = up.server(api);
            for is_known in [false, true] {
                let (reply, heard) = ask(&server, stream).await;
                let reply = reply.unwrap();
                assert_eq!(*heard.tokens.lock().unwrap(), if stream { reply.text.as_str() } else { "" });
                assert_eq!(
                    (reply.model.as_str(), reply.finish_reason.as_deref()),
                    ("simulated", Some("stop"))
                );
                assert_eq!(reply.ttft.is_some(), stream);
                let (usage, calls) = (reply.usage.unwrap(), up.calls());
                let line = calls.last().unwrap();
                assert_eq!(line["prompt_tokens"], usage.prompt_tokens, "{api:?}");
                assert_eq!(line["completion_tokens"], usage.completion_tokens, "{api:?}");
                assert_eq!(line["cached_tokens"], usage.cached_tokens.unwrap(), "{api:?}");
                assert_eq!(usage.cached_tokens > Some(0), is_known, "{api:?}: {usage:?}");
                assert_eq!((line["call_id"].as_str(), &line["attempt"]), (Some("call-of-a-test"), &3.into()));
                assert!(line["key"].is_string(), "{api:?} sent its key where the API reads it");
                texts.push(reply.text);
            }
        }
        texts.dedup();
        assert_eq!(texts.len(), 1, "{texts:?}");
    }
}

#[tokio::test]
async fn every_fault_has_the_same_class_whatever_api_it_comes_by() {
    // In one piece, and streamed.
    let faults = [
        ("status_400", "Rejected model_rejected", "Rejected model_rejected"),
        ("status_401", "Account model_unauthorized", "Account model_unauthorized"),
        ("status_403", "Account model_unauthorized", "Account model_unauthorized"),
        ("status_404", "Rejected model_rejected", "Rejected model_rejected"),
        ("status_408", "Transient model_timeout", "Transient model_timeout"),
        ("status_413", "Rejected model_rejected", "Rejected model_rejected"),
        ("status_422", "Rejected model_rejected", "Rejected model_rejected"),
        ("status_429", "Limited model_rate_limited", "Limited model_rate_limited"),
        ("status_500", "Transient model_unavailable", "Transient model_unavailable"),
        ("status_502", "Outage model_unavailable", "Outage model_unavailable"),
        ("status_503", "Outage model_unavailable", "Outage model_unavailable"),
        ("status_504", "Outage model_unavailable", "Outage model_unavailable"),
        ("status_529", "Outage model_unavailable", "Outage model_unavailable"),
        ("usage_limit", "Account model_unauthorized", "Account model_unauthorized"),
        ("context_length", "Rejected model_rejected", "Rejected model_rejected"),
        ("reset", "Transient model_unavailable", "Transient model_unavailable"),
        ("stall", "Transient model_timeout", "Transient model_timeout"),
        ("stall_mid", "Transient model_timeout", "Cut model_cut"),
        ("cut", "Transient model_unavailable", "Cut model_cut"),
        ("malformed", "Transient model_malformed", "Cut model_cut"),
        ("empty", "Transient model_empty", "Transient model_empty"),
        ("blank", "Transient model_malformed", "Transient model_unavailable"),
    ];
    let mut wrong = Vec::new();
    for (fault, whole, streamed) in faults {
        let up = Up::with(&[
            (&format!("faults.{fault}"), "1"),
            ("fault.retry_after", "3s"),
            ("fault.stall", "60s"),
        ])
        .await;
        let cases = ANSWERING.into_iter().flat_map(|api| [(api, false, whole), (api, true, streamed)]);
        let asked = cases.map(|(api, stream, expected)| {
            let server = up.server_within(api, if fault.starts_with("stall") { STALL } else { LIMIT });
            async move { (api, stream, expected, ask(&server, stream).await.0) }
        });
        for (api, stream, expected, result) in join_all(asked).await {
            let error = match result {
                Ok(reply) => panic!("{api:?} {fault} stream {stream}: {reply:?}"),
                Err(error) => error,
            };
            let seen = format!("{:?} {}", error.class, error.code);
            if seen != expected {
                wrong.push(format!("{api:?} {fault} stream {stream}: {seen}, not {expected}"));
            }
            if fault == "status_429" {
                assert_eq!(error.retry_after, Some(Duration::from_secs(3)), "{api:?}");
            }
        }
    }
    assert!(wrong.is_empty(), "\n  {}\n", wrong.join("\n  "));
}

#[tokio::test]
async fn a_call_that_is_dropped_ends_at_the_provider_too() {
    let up =
        Up::with(&[("latency", "modelled"), ("engine.decode_tokens_per_s", "20"), ("answer.tokens", "4000")])
            .await;
    for (number, api) in ANSWERING.into_iter().enumerate() {
        let heard = Heard::default();
        let (server, call) = (up.server(api), call(true));
        tokio::select! {
            result = server.complete(&call, &heard) => panic!("it takes minutes: {result:?}"),
            () = until(|| !heard.tokens.lock().unwrap().is_empty()) => {}
        }
        drop(server);
        until(|| up.calls().len() > number).await;
        let calls = up.calls();
        assert_eq!(calls[number]["ended_by"], "client", "{api:?}: {}", calls[number]);
        assert!(calls[number]["completion_tokens"].as_u64().unwrap() < 4_000);
    }
}

/// Asks each millisecond.
async fn until(is_so: impl Fn() -> bool) {
    let last = Instant::now() + LIMIT;
    let mut ticks = tokio::time::interval(Duration::from_millis(1));
    while !is_so() {
        ticks.tick().await;
        assert!(Instant::now() < last, "it never was so");
    }
}

#[tokio::test]
async fn vectors_come_in_lots_and_scores_in_one_call() {
    let up = Up::with(&[("embedding.dimensions", "256")]).await;
    let size = Size { texts: 40, ..Size::default() };
    let batch = Batch::new(Arc::new(up.server(Api::Embeddings)), size);
    let texts: Vec<String> = (0..100)
        .map(|number| format!("{} {}", "lag ".repeat(1 + number % 50), ["kafka", "offset"][number % 2]))
        .collect();
    let heard = Heard::default();
    let vectors = join_all(texts.iter().map(async |text| {
        let texts = [text.as_str()];
        let call = Call { task: Task::Embed(&texts), ..Call::default() };
        batch.complete(&call, &heard).await.unwrap().vectors.concat()
    }));
    let vectors = vectors.await;
    assert!(vectors.len() == 100 && vectors.iter().all(|vector| vector.len() == 256));
    assert_eq!(vectors[7], vectors[57], "the same text has the same vector");
    assert_ne!(vectors[7], vectors[8]);
    assert_eq!(up.calls().len(), 3, "100 callers in lots of 40");

    let documents = &["Kafka keeps offsets", "cats sleep", "committed offsets of Kafka groups"];
    let mut both = Vec::new();
    for api in [Api::Rerank, Api::RerankTei] {
        let task = Task::Rank { query: "offsets of Kafka", documents };
        let call = Call { task, ..Call::default() };
        let reply = up.server(api).complete(&call, &Heard::default()).await.unwrap();
        let scores: Vec<f32> = reply.vectors.concat();
        assert!(scores[1] < scores[0] && scores[1] < scores[2], "{scores:?}");
        both.push(scores);
    }
    assert_eq!(both[0], both[1]);
    let paths: Vec<_> =
        up.calls().iter().skip(3).map(|call| call["path"].as_str().unwrap().to_owned()).collect();
    assert_eq!(paths, ["/v1/rerank", "/rerank"]);
}
