//! The admin port, over real connections.

#![expect(clippy::unwrap_used, reason = "what goes wrong fails the test")]

use forebay_telemetry::{Health, Settings, Telemetry, admin};
use std::{net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinHandle,
};

struct Admin {
    address: SocketAddr,
    health: Health,
    stop: oneshot::Sender<()>,
    served: JoinHandle<std::io::Result<()>>,
}

async fn admin() -> Admin {
    let telemetry = Telemetry::start(Settings::new("forebay", "0.1.0")).unwrap();
    telemetry.step("infer", "infer").received("prompts", 100);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, health) = (listener.local_addr().unwrap(), Health::new());
    let (stop, stopped) = oneshot::channel::<()>();
    // A test that lets go of `stop` ends its server.
    let shutdown = async { stopped.await.unwrap_or_default() };
    let served = tokio::spawn(admin::serve(
        listener,
        telemetry,
        health.clone(),
        std::sync::Arc::new(|| "[]".to_owned()),
        shutdown,
    ));
    Admin { address, health, stop, served }
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn each_path_answers() {
    let Admin { address, stop: _stop, .. } = admin().await;
    let metrics = get(address, "/metrics").await;
    assert!(metrics.starts_with("HTTP/1.1 200 OK\r\n"), "{metrics}");
    assert!(metrics.contains("content-type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{metrics}");
    assert!(metrics.contains("\nforebay_step_received_records_total{operator=\"infer\""), "{metrics}");
    let index = get(address, "/").await;
    let pool = get(address, "/pool").await;
    assert!(pool.contains("content-type: application/json\r\n") && pool.ends_with("\r\n\r\n[]"), "{pool}");
    let budgets = get(address, "/budgets").await;
    assert!(
        budgets.contains("content-type: application/json\r\n") && budgets.ends_with("\r\n\r\n[]"),
        "{budgets}"
    );
    assert!(
        ["/budgets", "/metrics", "/healthz", "/readyz", "/pool"].iter().all(|path| index.contains(path)),
        "{index}"
    );
    assert!(get(address, "/else").await.starts_with("HTTP/1.1 404 "));
}

#[tokio::test]
async fn probes_name_what_is_wrong() {
    let Admin { address, health, stop: _stop, .. } = admin().await;
    assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200 "));
    assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 503 "));
    health.set_ready("table chunks", Err("read up to offset 7 of 90"));
    let answer = get(address, "/readyz").await;
    let body = r#"{"ok":false,"components":[{"name":"table chunks","ok":false,"reason":"read up to offset 7 of 90"}]}"#;
    assert!(answer.contains("content-type: application/json\r\n") && answer.ends_with(body), "{answer}");
    health.set_ready("table chunks", true);
    assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200 "));
    health.broken("consumer infer", "partition prompts/3 stalled");
    let answer = get(address, "/healthz").await;
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("prompts/3 stalled"), "{answer}");
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_for_a_place() {
    let Admin { address, stop: _stop, .. } = admin().await;
    let mut held = Vec::new();
    for _ in 0..64 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // Answered once, so that it surely holds a place; kept alive.
        stream.write_all(b"GET / HTTP/1.1\r\nHost: admin\r\n\r\n").await.unwrap();
        assert!(stream.read(&mut [0; 16]).await.unwrap() > 0);
        held.push(stream);
    }
    let waiting = get(address, "/");
    tokio::pin!(waiting);
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut waiting).await.is_err());
    held.pop();
    assert!(waiting.await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn a_request_that_never_ends_does_not_keep_the_process_from_ending() {
    let Admin { address, stop, served, .. } = admin().await;
    let mut stalled = TcpStream::connect(address).await.unwrap();
    stalled.write_all(b"GET /metrics HTTP/1.1\r\nHost:").await.unwrap();
    // Once this is answered, the connection before it was accepted.
    assert!(get(address, "/").await.starts_with("HTTP/1.1 200 "));
    stop.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(10), served).await.unwrap().unwrap().unwrap();
}
