//! A model server that says what a test wants: OpenAI's chat API, as far as Forebay speaks it, streaming and not.
//!
//! Invariant: its port is its own from the start to the drop, and after the drop nobody answers there, not even on
//! connections that were open.

use crate::{client::must, free_port};
use axum::{
    Router,
    extract::{Json, State},
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse as _, Response},
    routing::post,
};
use serde_json::{Value, json};
use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{net::TcpListener, runtime::Runtime, sync::watch};

/// What the model says to a call.
#[derive(Clone, Debug)]
pub enum Says {
    /// An answer; one that is streamed comes word by word.
    Text(String),
    /// A refusal: the status and the message.
    Refusal(u16, String),
    /// The same, after a while.
    After(Duration, Box<Says>),
}

type Model = dyn Fn(&Value) -> Says + Send + Sync;

struct Shared {
    model: Box<Model>,
    calls: Mutex<Vec<Value>>,
    /// How many calls may be answered; the others wait.
    let_through: watch::Sender<usize>,
}

/// A model server at work.
pub struct ModelServer {
    port: u16,
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
}

impl ModelServer {
    /// A server on a free port.
    #[track_caller]
    pub fn start(model: impl Fn(&Value) -> Says + Send + Sync + 'static) -> Self {
        Self::start_on(free_port(), model)
    }

    /// A server on this port.
    ///
    /// # Panics
    /// When it is taken.
    #[track_caller]
    pub fn start_on(port: u16, model: impl Fn(&Value) -> Says + Send + Sync + 'static) -> Self {
        let shared = Arc::new(Shared {
            model: Box::new(model),
            calls: Mutex::default(),
            let_through: watch::Sender::new(usize::MAX),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = must("make a runtime", runtime);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let listener = must("listen", runtime.block_on(TcpListener::bind(address)));
        let router =
            Router::new().route("/v1/chat/completions", post(complete)).with_state(Arc::clone(&shared));
        runtime.spawn(async move { axum::serve(listener, router).await });
        Self { port, shared, runtime: Some(runtime) }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What `--model-url` takes.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/v1", self.port)
    }

    /// The bodies of all calls so far, also of those that wait.
    pub fn calls(&self) -> Vec<Value> {
        self.shared.calls.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Answers so many calls in all; those beyond wait until more are let through.
    pub fn let_through(&self, calls: usize) {
        self.shared.let_through.send_replace(calls);
    }
}

impl Drop for ModelServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Not in the background: the port must be free when this returns.
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }
}

/// The text of the last turn that the user said: the question, with the passages around it.
pub fn last_said(call: &Value) -> &str {
    let turns = call["messages"].as_array().map(Vec::as_slice).unwrap_or_default();
    turns.last().and_then(|turn| turn["content"].as_str()).unwrap_or_default()
}

async fn complete(State(shared): State<Arc<Shared>>, Json(call): Json<Value>) -> Response {
    let number = {
        let mut calls = shared.calls.lock().unwrap_or_else(PoisonError::into_inner);
        calls.push(call.clone());
        calls.len()
    };
    // The sender lives as long as the state that this call holds.
    let _ = shared.let_through.subscribe().wait_for(|&let_through| number <= let_through).await;
    let mut says = (shared.model)(&call);
    while let Says::After(wait, then) = says {
        tokio::time::sleep(wait).await;
        says = *then;
    }
    match says {
        Says::Refusal(status, message) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            (status, Json(json!({"error": {"message": message}}))).into_response()
        }
        Says::Text(text) if call["stream"] == true => {
            ([(CONTENT_TYPE, "text/event-stream")], streamed(&text)).into_response()
        }
        Says::Text(text) => {
            let message = json!({"role": "assistant", "content": text});
            let choice = json!({"index": 0, "message": message, "finish_reason": "stop"});
            Json(json!({"model": "stub", "choices": [choice], "usage": usage()})).into_response()
        }
        Says::After(..) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

fn usage() -> Value {
    json!({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15})
}

/// The events of an answer, one a word.
fn streamed(text: &str) -> String {
    let event = |delta: Value, finish: Value| json!({"model": "stub", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]});
    let mut events: Vec<_> =
        text.split_inclusive(' ').map(|word| event(json!({"content": word}), Value::Null)).collect();
    events.push(event(json!({}), json!("stop")));
    events.push(json!({"model": "stub", "choices": [], "usage": usage()}));
    let events: String = events.iter().map(|event| format!("data: {event}\n\n")).collect();
    format!("{events}data: [DONE]\n\n")
}
