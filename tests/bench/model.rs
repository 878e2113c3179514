//! A served model that takes no time: it answers every chat at once with the same words, citing the first source.

use axum::{Router, http::header::CONTENT_TYPE, routing::post};
use tokio::{net::TcpListener, runtime::Runtime};

const ANSWER: &str = r#"{"id":"c","object":"chat.completion","created":0,"model":"instant","choices":[{"index":0,"message":{"role":"assistant","content":"It stands in the first source of this answer [1]."},"finish_reason":"stop"}],"usage":{"prompt_tokens":1500,"completion_tokens":12,"total_tokens":1512}}"#;

/// Starts it; gives its base URL.
pub fn serve(runtime: &Runtime) -> String {
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
    let address = listener.local_addr().expect("its address");
    // The body is read whole, as a real server must.
    let answer = post(async |_: axum::body::Bytes| ([(CONTENT_TYPE, "application/json")], ANSWER));
    let server = Router::new().route("/v1/chat/completions", answer);
    runtime.spawn(async move { axum::serve(listener, server).await });
    format!("http://{address}/v1")
}
