//! The client against a real server on a socket of this machine.

use super::*;
use axum::{
    Router,
    body::{Body, Bytes},
    http::{HeaderMap, StatusCode, header::AUTHORIZATION},
    response::{IntoResponse, Response as Answer},
    routing::post,
};
use forebay_schemas::{Content, Message, Role, Sampling};
use futures::{FutureExt as _, stream};
use serde_json::{Map, Value, json};
use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
};
use tokio::sync::oneshot;

/// What a listener heard, a word each.
#[derive(Default)]
struct Heard(Mutex<Vec<String>>);

impl Heard {
    fn add(&self, word: String) {
        self.0.lock().unwrap().push(word);
    }
}

impl Listener for Heard {
    fn started(&self, to: Upstream<'_>) {
        assert!(to.endpoint.unwrap().starts_with("http://127.0.0.1:"));
        self.add(format!("started {}", to.model));
    }
    fn token(&self, text: &str) {
        self.add(text.to_owned());
    }
    fn ended(&self, tried: &Tried<'_>) {
        self.add(match tried.result {
            Ok(_) => "ok".to_owned(),
            Err(error) => error.code.to_owned(),
        });
    }
}

fn call(stream: bool) -> Call<'static> {
    let content = Some(Content::Text("why".to_owned()));
    Call {
        question: "why".to_owned(),
        messages: vec![Message { role: Role::User, content, rest: Map::new() }],
        sampling: Sampling { temperature: Some(0.5), ..Sampling::default() },
        stream,
        ..Call::default()
    }
}

/// A server on a free port that answers every call by `respond`.
async fn serve<R, F>(respond: R) -> String
where
    R: Fn(HeaderMap, Bytes) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Answer> + Send,
{
    let routes = Router::new().route("/v1/chat/completions", post(respond));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, routes).await });
    url
}

fn client(url: &str, timeouts: Timeouts) -> OpenAi {
    OpenAi::new(url, "small", vec![Secret::new("sk-1234567\n")], timeouts).unwrap()
}

/// Asks a server that gives this response, and says what was heard and what came back.
async fn check(stream: bool, status: u16, body: &'static str, expected: &str) {
    let status = StatusCode::from_u16(status).unwrap();
    let url = serve(move |_, _| async move { (status, body).into_response() }).await;
    let heard = Heard::default();
    let result = client(&url, Timeouts::default()).complete(&call(stream), &heard).await;
    let end = match &result {
        Ok(reply) => format!("{:?} by {} {:?}", reply.text, reply.model, reply.finish_reason),
        Err(error) => format!("{:?}", error.class),
    };
    let heard = heard.0.into_inner().unwrap();
    assert_eq!(format!("{} => {end}", heard.join(", ")), expected, "{body}");
}

#[tokio::test]
async fn an_answer_in_one_piece_is_read_with_its_tokens() {
    let seen = Arc::new(Mutex::new(None));
    let note = seen.clone();
    let url = serve(move |headers: HeaderMap, body: Bytes| {
        let body: Value = serde_json::from_slice(&body).unwrap();
        *note.lock().unwrap() = Some((headers[AUTHORIZATION].to_str().unwrap().to_owned(), body));
        let answer = json!({
            "model": "small-2", "choices": [{"message": {"content": "because"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
        });
        async move { answer.to_string().into_response() }
    })
    .await;
    let reply = client(&url, Timeouts::default()).complete(&call(false), &Heard::default()).await.unwrap();
    assert_eq!((reply.text.as_str(), reply.model.as_str()), ("because", "small-2"));
    assert_eq!(reply.usage.unwrap().total_tokens, 4);
    assert_eq!(reply.cost_nano_usd, None, "no price is known");
    let (key, body) = seen.lock().unwrap().take().unwrap();
    assert_eq!(key, "Bearer sk-1234567");
    let messages = json!([{"role": "user", "content": "why"}]);
    assert_eq!(body, json!({"model": "small", "messages": messages, "temperature": 0.5, "stream": false}));
}

#[tokio::test]
async fn a_stream_is_handed_on_piece_by_piece() {
    let body = concat!(
        "data: {\"model\":\"small-2\",\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
        ": a comment\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"be\"}}]}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"cause\"},\"finish_reason\":\"stop\"}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2}}\n\n",
        "data: [DONE]\n\n",
    );
    check(true, 200, body, r#"started small, be, cause, ok => "because" by small-2 Some("stop")"#).await;
}

#[tokio::test]
async fn what_is_no_whole_answer_is_an_error_of_its_class() {
    let piece = "data: {\"choices\":[{\"delta\":{\"content\":\"be\"}}]}\n\n";
    check(true, 200, piece, "started small, be, model_cut => Cut").await;
    check(true, 200, "", "started small, model_unavailable => Transient").await;
    check(true, 200, "data: {nonsense\n\n", "started small, model_malformed => Transient").await;
    check(true, 200, "data: {\"error\": {}}\n\n", "started small, model_unavailable => Transient").await;
    check(true, 200, "data: [DONE]\n\n", "started small, model_empty => Transient").await;
    check(false, 200, "{nonsense", "started small, model_malformed => Transient").await;
    check(false, 200, "{}", "started small, model_empty => Transient").await;
    let tools = r#"{"choices": [{"message": {"content": null}, "finish_reason": "tool_calls"}]}"#;
    check(false, 200, tools, "started small, model_tool_calls => Rejected").await;
    check(false, 404, "", "started small, model_rejected => Rejected").await;
    check(true, 503, "", "started small, model_unavailable => Outage").await;
}

#[tokio::test]
async fn a_server_that_is_not_there_is_an_outage() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    drop(listener);
    let error =
        client(&url, Timeouts::default()).complete(&call(false), &Heard::default()).await.unwrap_err();
    assert_eq!((error.class, error.code), (Class::Unreachable, "model_unavailable"));
}

/// A body that gives one piece and then nothing, and tells when the connection is gone.
fn stalled(piece: &'static str, gone: oneshot::Sender<()>) -> Body {
    let rest = async move {
        let _told_when_dropped = gone;
        std::future::pending::<Result<Bytes, Infallible>>().await
    };
    Body::from_stream(stream::iter([Ok(Bytes::from_static(piece.as_bytes()))]).chain(rest.into_stream()))
}

#[tokio::test]
async fn a_slow_first_token_and_a_slow_answer_run_out_of_time() {
    let begun = "data: {\"choices\":[{\"delta\":{\"content\":\"be\"}}]}\n\n";
    for (piece, first_ms, silence_ms, total_ms, expected) in [
        (": waiting\n\n", 50, 60_000, 60_000, "Transient model_timeout"),
        (begun, 60_000, 60_000, 50, "Cut model_cut"),
        (begun, 60_000, 50, 60_000, "Cut model_cut"),
    ] {
        let url =
            serve(move |_, _| async move { stalled(piece, oneshot::channel().0).into_response() }).await;
        let timeouts = Timeouts {
            first_token: Duration::from_millis(first_ms),
            silence: Duration::from_millis(silence_ms),
            total: Duration::from_millis(total_ms),
            ..Timeouts::default()
        };
        let error = client(&url, timeouts).complete(&call(true), &Heard::default()).await.unwrap_err();
        assert_eq!(format!("{:?} {}", error.class, error.code), expected);
    }
}

#[tokio::test]
async fn a_server_that_asks_to_wait_is_asked_again() {
    let calls = Arc::new(Mutex::new(0));
    let count = calls.clone();
    let url = serve(move |_, _| {
        let number = {
            let mut count = count.lock().unwrap();
            *count += 1;
            *count
        };
        async move {
            match number {
                1 => (StatusCode::TOO_MANY_REQUESTS, [("retry-after-ms", "1")], "").into_response(),
                _ => r#"{"choices": [{"message": {"content": "yes"}}]}"#.into_response(),
            }
        }
    })
    .await;
    let heard = Heard::default();
    let retry = crate::Retry::new(Arc::new(client(&url, Timeouts::default())), Arc::default());
    assert_eq!(retry.complete(&call(false), &heard).await.unwrap().text, "yes");
    let heard = heard.0.into_inner().unwrap();
    assert_eq!(heard, ["started small", "model_rate_limited", "started small", "ok"]);
}

#[tokio::test]
async fn giving_a_call_up_closes_its_connection() {
    let (gone, noticed) = oneshot::channel();
    let gone = Arc::new(Mutex::new(Some(gone)));
    let url =
        serve(move |_, _| {
            let gone = gone.lock().unwrap().take().unwrap();
            async move {
                stalled("data: {\"choices\":[{\"delta\":{\"content\":\"be\"}}]}\n\n", gone).into_response()
            }
        })
        .await;
    struct First(Mutex<Option<oneshot::Sender<()>>>);
    impl Listener for First {
        fn started(&self, _: Upstream<'_>) {}
        fn token(&self, _: &str) {
            self.0.lock().unwrap().take().unwrap().send(()).unwrap();
        }
        fn ended(&self, _: &Tried<'_>) {
            panic!("it was given up")
        }
    }
    let (sender, first_token) = oneshot::channel();
    let (listener, client, call) =
        (First(Mutex::new(Some(sender))), client(&url, Timeouts::default()), call(true));
    tokio::select! {
        _ = client.complete(&call, &listener) => panic!("it cannot end"),
        first = first_token => first.unwrap(),
    }
    assert!(noticed.await.is_err(), "the server dropped the body");
}

#[test]
fn an_address_that_cannot_be_right_is_refused_and_no_secret_is_shown() {
    let refusal = |url: &str| match OpenAi::new(url, "m", Vec::new(), Timeouts::default()) {
        Ok(_) => "accepted".to_owned(),
        Err(error) => error.to_string(),
    };
    assert_eq!(refusal("http://127.0.0.1:8000/v1/"), "accepted");
    assert!(refusal("localhost").contains("no URL"));
    assert!(refusal("http://h:1/").ends_with("does not end in /v1"));
    assert!(refusal("ftp://h/v1").contains("neither http:// nor https://"));
    let secret = refusal("http://me:hunter2@h/v1");
    assert!(secret.contains("password") && !secret.contains("hunter2"));
    assert_eq!(format!("{:?}", Secret::new("hunter2")), "Secret(redacted)");
}

#[tokio::test]
async fn a_key_that_is_dead_is_followed_by_the_next_at_once() {
    let url = serve(|headers: HeaderMap, _| async move {
        match headers[AUTHORIZATION].to_str().unwrap() {
            "Bearer good" => r#"{"choices": [{"message": {"content": "yes"}}]}"#.into_response(),
            _ => (StatusCode::UNAUTHORIZED, "").into_response(),
        }
    })
    .await;
    let keys = ["dead", "good"].map(Secret::new).into();
    let openai = OpenAi::new(&url, "small", keys, Timeouts::default()).unwrap();
    let retry = crate::Retry::new(Arc::new(openai), Arc::default());
    for expected in
        [&["started small", "model_unauthorized", "started small", "ok"][..], &["started small", "ok"]]
    {
        let heard = Heard::default();
        retry.complete(&call(false), &heard).await.unwrap();
        assert_eq!(heard.0.into_inner().unwrap(), expected);
    }
}
