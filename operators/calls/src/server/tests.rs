//! The client against a real server on a socket of this machine.

use super::*;
use axum::{
    Router,
    body::{Body, Bytes},
    http::{HeaderMap, StatusCode, header::AUTHORIZATION},
    response::{IntoResponse, Response as Answer},
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
    let routes = Router::new().fallback(respond);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, routes).await });
    url
}

fn client(url: &str, timeouts: Timeouts) -> Server {
    Server::new(Api::Chat, url, "small", vec![Secret::new("sk-1234567\n")], timeouts).unwrap()
}

/// Asks a server that gives this response, and says what was heard and what came back.
async fn check(stream: bool, status: u16, body: &'static str, expected: &str) {
    check_api(Api::Chat, stream, status, body, expected).await;
}

async fn check_api(api: Api, stream: bool, status: u16, body: &'static str, expected: &str) {
    let status = StatusCode::from_u16(status).unwrap();
    let url = serve(move |_, _| async move { (status, body).into_response() }).await;
    let heard = Heard::default();
    let server = Server::new(api, &url, "small", vec![Secret::new("sk-1")], Timeouts::default()).unwrap();
    let result = server.complete(&call(stream), &heard).await;
    let end = match &result {
        Ok(reply) => format!("{:?} by {} {:?}", reply.text, reply.model, reply.finish_reason),
        Err(error) => {
            let read = error.partial.as_ref().map(|read| format!(" of {:?}", read.text));
            format!("{:?}{}", error.class, read.unwrap_or_default())
        }
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
    check(true, 200, piece, r#"started small, be, model_cut => Cut of "be""#).await;
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
        (begun, 60_000, 60_000, 50, "Cut model_cut of be"),
        (begun, 60_000, 50, 60_000, "Cut model_cut of be"),
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
        let read = error.partial.map(|read| format!(" of {}", read.text)).unwrap_or_default();
        assert_eq!(format!("{:?} {}{read}", error.class, error.code), expected);
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
    let refusal = |url: &str| match Server::new(Api::Chat, url, "m", Vec::new(), Timeouts::default()) {
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
    let server = Server::new(Api::Chat, &url, "small", keys, Timeouts::default()).unwrap();
    let retry = crate::Retry::new(Arc::new(server), Arc::default());
    for expected in
        [&["started small", "model_unauthorized", "started small", "ok"][..], &["started small", "ok"]]
    {
        let heard = Heard::default();
        retry.complete(&call(false), &heard).await.unwrap();
        assert_eq!(heard.0.into_inner().unwrap(), expected);
    }
}

/// One answer in the stream of each API, with what streams may have: comments, line ends of both kinds, events to come.
const STREAMS: [(Api, &str); 3] = [
    (
        Api::Chat,
        "\u{feff}: hello\n\ndata: {\"model\":\"m-1\",\"choices\":[{\"delta\":{\"content\":\"süß \"}}]}\r\n\r\n\
         data:{\"choices\":[{\"delta\":{\"content\":\"✓😀\"},\"finish_reason\":\"length\"}]}\n\n\
         data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":4,\
         \"prompt_tokens_details\":{\"cached_tokens\":6},\"completion_tokens_details\":{\"reasoning_tokens\":1}}}\n\n\
         data: [DONE]\n\n",
    ),
    (
        Api::Responses,
        "event: response.created\ndata: {\"type\":\"response.created\",\"response\":{\"status\":\"in_progress\"}}\r\n\r\n\
         : \n\ndata: {\"type\":\"response.output_text.delta\",\"delta\":\"süß \"}\n\n\
         data: {\"type\":\"response.output_text.delta\",\"delta\":\"✓😀\"}\r\n\r\n\
         data: {\"type\":\"response.sang\",\"song\":1}\n\n\
         data: {\"type\":\"response.incomplete\",\"response\":{\"model\":\"m-1\",\"status\":\"incomplete\",\
         \"incomplete_details\":{\"reason\":\"max_output_tokens\"},\"output\":[],\"usage\":{\"input_tokens\":9,\
         \"input_tokens_details\":{\"cached_tokens\":6},\"output_tokens\":4,\"output_tokens_details\":{\"reasoning_tokens\":1}}}}\n\n",
    ),
    (
        Api::Messages,
        "event: message_start\r\ndata: {\"type\":\"message_start\",\"message\":{\"model\":\"m-1\",\"content\":[],\
         \"usage\":{\"input_tokens\":1,\"cache_creation_input_tokens\":2,\"cache_read_input_tokens\":6,\"output_tokens\":1}}}\r\n\r\n\
         event: ping\ndata: {\"type\": \"ping\"}\n\n\
         data: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"thinking\",\"thinking\":\"\"}}\n\n\
         data: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"thinking_delta\",\"thinking\":\"hm\"}}\n\n\
         data: {\"type\":\"content_block_start\",\"index\":1,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n\
         : \n\ndata: {\"type\":\"content_block_delta\",\"index\":1,\"delta\":{\"type\":\"text_delta\",\"text\":\"süß \"}}\n\n\
         data: {\"type\":\"content_block_delta\",\"index\":1,\"delta\":{\"type\":\"text_delta\",\"text\":\"✓😀\"}}\r\n\r\n\
         data: {\"type\":\"content_block_stop\",\"index\":1}\n\ndata: {\"type\":\"sang\"}\n\n\
         data: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"max_tokens\"},\"usage\":{\"output_tokens\":4}}\n\n\
         data: {\"type\":\"message_stop\"}\n\n",
    ),
];

#[tokio::test]
async fn a_stream_says_the_same_wherever_its_bytes_are_cut() {
    for (api, stream) in STREAMS {
        let server = Server::new(api, "http://127.0.0.1:1/v1", "m", Vec::new(), Timeouts::default()).unwrap();
        for size in [1, 2, 3, 5, 7, 64, stream.len()] {
            let parts = stream.as_bytes().chunks(size).map(|part| Ok::<_, Infallible>(part.to_vec()));
            let body = reqwest::Body::wrap_stream(stream::iter(parts.collect::<Vec<_>>()));
            let heard = Heard::default();
            let mut pieces =
                Pieces { sent: Instant::now(), ttft: None, written: Written::default(), listener: &heard };
            let response = Response::from(axum::http::Response::new(body));
            let first = Instant::now() + Duration::from_secs(60);
            let reply = server.read_stream(response, "m", first, &mut pieces).await.unwrap();
            assert_eq!(heard.0.into_inner().unwrap(), ["süß ", "✓😀"], "{api:?} by {size}");
            assert_eq!((reply.text.as_str(), reply.model.as_str()), ("süß ✓😀", "m-1"));
            assert_eq!(reply.finish_reason.as_deref(), Some("length"), "{api:?}: in one vocabulary");
            let usage = reply.usage.unwrap();
            assert_eq!(
                (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
                (9, 4, Some(6)),
                "{api:?}: cached tokens are among those of the prompt"
            );
            let written = usage.cached_write_tokens;
            assert_eq!(
                written,
                (api == Api::Messages).then_some(2),
                "{api:?}: and so are those written there"
            );
            assert_eq!(usage.reasoning_tokens, (api != Api::Messages).then_some(1));
        }
    }
}

#[tokio::test]
async fn a_stream_that_stops_short_is_no_answer_in_any_api() {
    for (api, stream) in STREAMS {
        let server = Server::new(api, "http://127.0.0.1:1/v1", "m", Vec::new(), Timeouts::default()).unwrap();
        let ends_with_its_text = stream.find("✓😀").unwrap();
        let cut = &stream[..stream[..ends_with_its_text].rfind("\n\n").unwrap() + 2];
        let heard = Heard::default();
        let mut pieces =
            Pieces { sent: Instant::now(), ttft: None, written: Written::default(), listener: &heard };
        let response = Response::from(axum::http::Response::new(reqwest::Body::from(cut)));
        let first = Instant::now() + Duration::from_secs(60);
        let error = server.read_stream(response, "m", first, &mut pieces).await.unwrap_err();
        assert_eq!((error.class, error.code), (Class::Transient, "model_unavailable"), "{api:?}");
    }
}

#[tokio::test]
async fn each_end_of_a_message_has_its_class() {
    use Api::Messages;
    let ok = r#"{"model":"c-1","content":[{"type":"thinking","thinking":"hm"},{"type":"text","text":"yes"}],"stop_reason":"end_turn"}"#;
    check_api(Messages, false, 200, ok, r#"started small, ok => "yes" by c-1 Some("stop")"#).await;
    for (answer, expected) in [
        (
            r#"{"content":[{"type":"tool_use","id":"t"}],"stop_reason":"tool_use"}"#,
            "model_tool_calls => Rejected",
        ),
        (r#"{"content":[],"stop_reason":"refusal"}"#, "model_refused => Rejected"),
        (r#"{"content":[],"stop_reason":"end_turn"}"#, "model_empty => Transient"),
        ("[]", "model_malformed => Transient"),
    ] {
        check_api(Messages, false, 200, answer, &format!("started small, {expected}")).await;
    }
    for (kind, expected) in [
        ("overloaded_error", "model_unavailable => Outage"),
        ("rate_limit_error", "model_rate_limited => Limited"),
        ("authentication_error", "model_unauthorized => Account"),
        ("invalid_request_error", "model_rejected => Rejected"),
        ("api_error", "model_unavailable => Transient"),
    ] {
        let event = format!(
            "event: error\ndata: {{\"type\":\"error\",\"error\":{{\"type\":\"{kind}\",\"message\":\"m\"}}}}\n\n"
        );
        let expected = format!("started small, {expected}");
        check_api(Messages, true, 200, event.leak(), &expected).await;
    }
    let begun = "data: {\"type\":\"content_block_delta\",\"delta\":{\"type\":\"text_delta\",\"text\":\"be\"}}\n\n\
                 data: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\"}}\n\n";
    check_api(Messages, true, 200, begun, r#"started small, be, model_cut => Cut of "be""#).await;
    let overloaded = r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#;
    check_api(Messages, false, 529, overloaded, "started small, model_unavailable => Outage").await;
}

#[tokio::test]
async fn each_end_of_a_response_has_its_class() {
    use Api::Responses;
    let ok = r#"{"model":"r-1","status":"completed","output":[{"type":"reasoning","summary":[]},
        {"type":"message","content":[{"type":"output_text","text":"yes"}]}]}"#;
    check_api(Responses, false, 200, ok, r#"started small, ok => "yes" by r-1 Some("stop")"#).await;
    for (answer, expected) in [
        (
            r#"{"status":"completed","output":[{"type":"function_call","name":"f"}]}"#,
            "model_tool_calls => Rejected",
        ),
        (
            r#"{"status":"completed","output":[{"type":"message","content":[{"type":"refusal","refusal":"no"}]}]}"#,
            "model_refused => Rejected",
        ),
        (
            r#"{"status":"incomplete","incomplete_details":{"reason":"content_filter"},"output":[]}"#,
            "model_refused => Rejected",
        ),
        (r#"{"status":"completed","output":[]}"#, "model_empty => Transient"),
        (r#"{"status":"failed","error":{"code":"server_error"}}"#, "model_unavailable => Transient"),
        (r#"{"status":"failed","error":{"code":"rate_limit_exceeded"}}"#, "model_rate_limited => Limited"),
        ("{nonsense", "model_malformed => Transient"),
    ] {
        check_api(Responses, false, 200, answer, &format!("started small, {expected}")).await;
    }
    let error = "event: error\ndata: {\"type\":\"error\",\"code\":\"server_error\",\"message\":\"m\"}\n\n";
    check_api(Responses, true, 200, error, "started small, model_unavailable => Transient").await;
}

/// The body, the path and the headers of a call, as a server gets them.
async fn sent(api: Api, call: &Call<'_>, vllm: Vllm, answer: &'static str) -> (Value, String, HeaderMap) {
    let seen = Arc::new(Mutex::new(None));
    let note = seen.clone();
    let routes = Router::new().fallback(move |uri: axum::http::Uri, headers: HeaderMap, body: Bytes| {
        let body = serde_json::from_slice(&body).unwrap();
        *note.lock().unwrap() = Some((body, uri.path().to_owned(), headers));
        async move { answer }
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, routes).await });
    let server = Server::new(api, &url, "small", vec![Secret::new("sk-1")], Timeouts::default()).unwrap();
    _ = server.with_vllm(vllm).complete(call, &Numbered).await;
    let seen = seen.lock().unwrap().take();
    seen.expect("the call was sent")
}

struct Numbered;
impl Listener for Numbered {
    fn started(&self, _: Upstream<'_>) {}
    fn token(&self, _: &str) {}
    fn ended(&self, _: &Tried<'_>) {}
    fn try_id(&self) -> Option<crate::TryId> {
        Some(crate::TryId { call: "c-7".to_owned(), number: 2 })
    }
}

fn said(role: Role, text: &str) -> Message {
    Message { role, content: Some(Content::Text(text.to_owned())), rest: Map::new() }
}

#[tokio::test]
async fn anthropic_gets_its_own_form_with_the_ends_of_stable_prefixes_marked() {
    let image = json!({"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}});
    let parts = Content::Parts(vec![json!({"type": "text", "text": "why"}), image]);
    let call = Call {
        messages: vec![
            said(Role::System, "Be brief."),
            said(Role::User, "a"),
            said(Role::Assistant, "b"),
            Message { role: Role::User, content: Some(parts), rest: Map::new() },
        ],
        sampling: Sampling {
            max_tokens: Some(7),
            stop: Some(json!("x")),
            seed: Some(1),
            ..Sampling::default()
        },
        ..Call::default()
    };
    let (body, path, headers) = sent(Api::Messages, &call, Vllm::default(), "{}").await;
    let marked = |text| json!({"type": "text", "text": text, "cache_control": {"type": "ephemeral"}});
    let image =
        json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}});
    assert_eq!(
        body,
        json!({
            "model": "small", "max_tokens": 7, "stream": false, "stop_sequences": ["x"],
            "system": [marked("Be brief.")],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": [marked("b")]},
                {"role": "user", "content": [{"type": "text", "text": "why"}, image]},
            ],
        })
    );
    assert_eq!(
        (path.as_str(), &headers["x-api-key"], &headers["anthropic-version"]),
        ("/v1/messages", &"sk-1".parse().unwrap(), &"2023-06-01".parse().unwrap())
    );
    assert!(!headers.contains_key(AUTHORIZATION));
    assert_eq!(
        (&headers["x-forebay-call-id"], &headers["x-forebay-attempt"]),
        (&"c-7".parse().unwrap(), &"2".parse().unwrap())
    );
}

#[tokio::test]
async fn responses_get_their_own_form_and_are_not_kept() {
    let form = json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": {}}});
    let call = Call {
        messages: vec![said(Role::Developer, "Be brief."), said(Role::User, "why")],
        sampling: Sampling { max_tokens: Some(7), response_format: Some(form), ..Sampling::default() },
        stream: true,
        ..Call::default()
    };
    let (body, path, headers) = sent(Api::Responses, &call, Vllm::default(), "").await;
    assert_eq!(
        body,
        json!({
            "model": "small", "max_output_tokens": 7, "stream": true, "store": false,
            "input": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "why"}],
            "text": {"format": {"type": "json_schema", "name": "n", "strict": true, "schema": {}}},
        })
    );
    assert_eq!((path.as_str(), &headers[AUTHORIZATION]), ("/v1/responses", &"Bearer sk-1".parse().unwrap()));
    assert_eq!(&headers["x-forebay-call-id"], "c-7");
}

#[tokio::test]
async fn vllm_is_told_who_waits_and_whose_cache_it_is_and_others_are_not() {
    let call =
        |tenant: &str, lane| Call { tenant: tenant.to_owned().try_into().unwrap(), lane, ..call(false) };
    let both = Vllm { cache_salt: true, priority: true };
    let (waits, backfill) = (forebay_schemas::Lane::Interactive, forebay_schemas::Lane::Backfill);
    let mut salts = Vec::new();
    for (tenant, lane, priority) in [("shop", waits, 0), ("shop", backfill, 1), ("club", waits, 0)] {
        let (body, ..) = sent(Api::Chat, &call(tenant, lane), both, "").await;
        assert_eq!(body["priority"], priority);
        salts.push(body["cache_salt"].as_str().unwrap().to_owned());
        assert!(!body.to_string().contains(tenant), "{body}");
    }
    assert!(salts[0] == salts[1] && salts[0] != salts[2], "{salts:?}");
    let (body, ..) = sent(Api::Chat, &call("shop", backfill), Vllm::default(), "").await;
    assert!(body.get("cache_salt").is_none() && body.get("priority").is_none(), "{body}");
}

#[tokio::test]
async fn a_chat_tells_how_likely_its_tokens_were_where_it_is_asked_and_a_refusal_is_one() {
    let whole = r#"{"choices":[{"message":{"content":"a b"},"finish_reason":"stop",
        "logprobs":{"content":[{"token":"a","logprob":-0.5},{"token":" b","logprob":-1.5}]}}]}"#;
    let (body, ..) = sent(Api::Chat, &Call { logprobs: true, ..call(false) }, Vllm::default(), whole).await;
    assert_eq!(body["logprobs"], true);
    let (body, ..) = sent(Api::Chat, &call(false), Vllm::default(), whole).await;
    assert!(body.get("logprobs").is_none(), "a server that knows no such field may refuse it");
    let stream = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"},\"logprobs\":{\"content\":[{\"logprob\":-0.5}]}}]}\n\n\
                  data: {\"choices\":[{\"delta\":{\"content\":\"b\"},\"logprobs\":{\"content\":[{\"logprob\":-1.5}]}}]}\n\n\
                  data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\",\"logprobs\":null}]}\n\ndata: [DONE]\n\n";
    for (stream, body) in [(false, whole), (true, stream)] {
        let url = serve(move |_, _| async move { body.into_response() }).await;
        let reply =
            client(&url, Timeouts::default()).complete(&call(stream), &Heard::default()).await.unwrap();
        assert_eq!(reply.logprob, Some(-1.0), "stream {stream}");
    }
    let refusal =
        r#"{"choices":[{"message":{"content":null,"refusal":"I will not."},"finish_reason":"stop"}]}"#;
    check(false, 200, refusal, "started small, model_refused => Rejected").await;
    let refusal = "data: {\"choices\":[{\"delta\":{\"refusal\":\"I will\"}}]}\n\n\
                   data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
    check(true, 200, refusal, "started small, model_refused => Rejected").await;
}

#[tokio::test]
async fn what_an_api_cannot_do_is_refused_before_anything_is_sent() {
    let tools = Sampling { tools: Some(json!([])), ..Sampling::default() };
    let form = Sampling { response_format: Some(json!({"type": "json_object"})), ..Sampling::default() };
    let stop = Sampling { stop: Some(json!("x")), ..Sampling::default() };
    for (api, sampling, word) in [
        (Api::Messages, tools.clone(), "tools"),
        (Api::Messages, form, "form"),
        (Api::Responses, tools, "tools"),
        (Api::Responses, stop, "stop"),
        (Api::Embeddings, Sampling::default(), "writes no answers"),
    ] {
        // Nobody listens there.
        let server = Server::new(api, "http://127.0.0.1:1/v1", "m", Vec::new(), Timeouts::default()).unwrap();
        let heard = Heard::default();
        let error = server.complete(&Call { sampling, ..call(false) }, &heard).await.unwrap_err();
        assert_eq!((error.class, error.code), (Class::Rejected, "model_rejected"), "{error}");
        assert!(error.message.contains(word), "{error}");
    }
}

#[tokio::test]
async fn vectors_and_scores_come_in_the_order_of_the_texts_or_not_at_all() {
    let embed = Call { task: Task::Embed(&["a", "b"]), ..Call::default() };
    let rank = Call { task: Task::Rank { query: "q", documents: &["a", "b"] }, ..Call::default() };
    let numbers = |api, call: &Call<'static>, answer: &'static str| {
        let call = call.clone();
        async move {
            let url = serve(move |_, _| async move { answer.into_response() }).await;
            let server = Server::new(api, &url, "m", Vec::new(), Timeouts::default()).unwrap();
            server
                .complete(&call, &Heard::default())
                .await
                .map(|reply| reply.vectors)
                .map_err(|error| error.code)
        }
    };
    let swapped = r#"{"data":[{"index":1,"embedding":[0.5,1]},{"index":0,"embedding":[0,1]}],"usage":{"prompt_tokens":2}}"#;
    assert_eq!(numbers(Api::Embeddings, &embed, swapped).await, Ok(vec![vec![0.0, 1.0], vec![0.5, 1.0]]));
    for wrong in [
        r#"{"data":[{"index":0,"embedding":[0]}]}"#,
        r#"{"data":[{"index":0,"embedding":[0]},{"index":0,"embedding":[1]}]}"#,
        r#"{"data":[{"index":0,"embedding":[0]},{"index":2,"embedding":[1]}]}"#,
        r#"{"data":[{"index":0,"embedding":[0]},{"index":1,"embedding":[1,2]}]}"#,
        "",
    ] {
        assert_eq!(numbers(Api::Embeddings, &embed, wrong).await, Err("model_malformed"), "{wrong}");
    }
    let cohere = r#"{"results":[{"index":1,"relevance_score":0.75},{"index":0,"relevance_score":0.25}]}"#;
    assert_eq!(numbers(Api::Rerank, &rank, cohere).await, Ok(vec![vec![0.25], vec![0.75]]));
    let tei = r#"[{"index":1,"score":0.75},{"index":0,"score":0.25}]"#;
    assert_eq!(numbers(Api::RerankTei, &rank, tei).await, Ok(vec![vec![0.25], vec![0.75]]));
    let (body, path, _) = sent(Api::RerankTei, &rank, Vllm::default(), "[]").await;
    let wanted = json!({"query": "q", "texts": ["a", "b"], "truncate": true});
    assert_eq!((body, path.as_str()), (wanted, "/rerank"));
    let (body, path, _) = sent(Api::Rerank, &rank, Vllm::default(), "[]").await;
    let wanted = json!({"model": "small", "query": "q", "documents": ["a", "b"], "top_n": 2});
    assert_eq!((body, path.as_str()), (wanted, "/v1/rerank"));
}
