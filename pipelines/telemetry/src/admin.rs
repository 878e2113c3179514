//! The admin port: `/metrics`, `/healthz`, `/readyz`, `/pool`, `/budgets`, and `/`, which names them.
//!
//! Invariant: it answers from memory, in a bounded time, to a bounded number of connections, whatever the process does.

use crate::{Health, Report, Telemetry};
use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
    serve::Listener,
};
use std::{
    future::{Future, IntoFuture},
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{Instant, Sleep},
};

/// A few scrapers and probes; more wait in the backlog of the listener.
const CONNECTIONS_MAX: usize = 64;
/// Longer than between two scrapes, so that a scraper keeps its connection; short enough to drop one that stalls.
const IDLE_MAX: Duration = Duration::from_secs(75);
/// How long an answer may still take once the process ends.
const GRACE: Duration = Duration::from_secs(1);

const INDEX: &str = "/metrics  metrics in the Prometheus text format\n\
                     /healthz  whether the process lives; 503 names what does not\n\
                     /readyz   whether it can work; 503 names what is missing\n\
                     /pool     how the model servers of its pool stand, as JSON\n\
                     /budgets  how the budgets stand that it counts, as JSON\n";

const JSON: &str = "application/json";

/// Gives a page of JSON from memory.
pub type Page = Arc<dyn Fn() -> String + Send + Sync>;

/// The pages that say how something stands.
#[derive(Clone)]
pub struct Pages {
    /// The model servers of a pool.
    pub pool: Page,
    /// Budgets.
    pub budgets: Page,
}

/// The pages of who counts no budgets.
impl<P: Fn() -> String + Send + Sync + 'static> From<Arc<P>> for Pages {
    fn from(pool: Arc<P>) -> Self {
        Self { pool, budgets: Arc::new(|| "[]".to_owned()) }
    }
}

/// Serves the admin port until `shutdown`.
pub async fn serve(
    listener: TcpListener,
    telemetry: Telemetry,
    health: Health,
    pages: impl Into<Pages>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let (ending, ended) = oneshot::channel();
    let shutdown = async move {
        shutdown.await;
        // Nobody listens where the server ended by itself.
        let _ = ending.send(());
    };
    let bounded = Bounded { listener, free: Arc::new(Semaphore::new(CONNECTIONS_MAX)) };
    let server =
        axum::serve(bounded, routes(telemetry, health, pages.into())).with_graceful_shutdown(shutdown);
    // A client that never finishes its request must not keep the process from ending.
    let patience = async {
        if ended.await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        served = server.into_future() => served,
        () = patience => Ok(()),
    }
}

fn routes(telemetry: Telemetry, health: Health, pages: Pages) -> Router {
    Router::new()
        .route("/", get(async || INDEX))
        .route("/metrics", get(metrics))
        .with_state(telemetry)
        .route("/healthz", get(async |State(health): State<Health>| report(health.liveness())))
        .route("/readyz", get(async |State(health): State<Health>| report(health.readiness())))
        .with_state(health)
        .route("/pool", get(async |State(pages): State<Pages>| json((pages.pool)())))
        .route("/budgets", get(async |State(pages): State<Pages>| json((pages.budgets)())))
        .with_state(pages)
}

async fn metrics(State(telemetry): State<Telemetry>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], telemetry.prometheus())
}

fn json(page: String) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, JSON)], page)
}

fn report(report: Report) -> impl IntoResponse {
    let status = if report.ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(report))
}

/// A listener that holds at most [`CONNECTIONS_MAX`] connections at once.
struct Bounded {
    listener: TcpListener,
    free: Arc<Semaphore>,
}

impl Listener for Bounded {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        // The semaphore is never closed: without a permit there is no other way on than to wait.
        let place = match self.free.clone().acquire_owned().await {
            Ok(place) => place,
            Err(_) => std::future::pending().await,
        };
        let (stream, peer) = Listener::accept(&mut self.listener).await;
        // The end of a long page need not wait until its beginning is acknowledged.
        let _ = stream.set_nodelay(true);
        let idle = Box::pin(tokio::time::sleep(IDLE_MAX));
        (Connection { stream, idle, _place: place }, peer)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that ends when its client is silent for [`IDLE_MAX`].
struct Connection {
    stream: TcpStream,
    idle: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Poll::Ready(read) = Pin::new(&mut self.stream).poll_read(cx, buf) {
            self.idle.as_mut().reset(Instant::now() + IDLE_MAX);
            return Poll::Ready(read);
        }
        ready!(self.idle.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
