//! `POST /v1/sql`: a query in the body, its rows as Arrow IPC, JSON or CSV, by what the client accepts.
//!
//! A bearer token says who asks, and the file of users whose rows they see. Rows are sent as they come; a query whose client is gone, or
//! reads no more, is stopped.
//!
//! Invariant: nothing is answered without a user, and no token is kept: the file has its BLAKE3 hash, which is compared in constant time.
//! Queries at once, the bytes of a query and the batches that wait are bounded.

use crate::guards::{Scope, Users};
use crate::session::{Answer, Error as QueryError, Session};
use crate::stall::{STALL_MAX, Stalling};
use arrow::array::RecordBatch;
use arrow::csv::{Writer as CsvWriter, WriterBuilder as CsvBuilder};
use arrow::error::ArrowError;
use arrow::ipc::writer::StreamWriter;
use arrow::json::writer::{ArrayWriter, JsonArray, WriterBuilder as JsonBuilder};
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::serve::Listener;
use axum::{Json, Router, routing::post};
use futures::stream;
use serde_json::json;
use std::future::{Future, IntoFuture as _};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::info;

/// Queries at once; who comes when all places are taken is told to come again.
const QUERIES_MAX: usize = 16;
/// The longest query.
const BODY_MAX: usize = 1 << 20;
/// How long answers may still take once the process ends.
const GRACE: Duration = Duration::from_secs(5);
/// When to come again where all places are taken.
const COME_AGAIN_S: &str = "1";

const ARROW: &str = "application/vnd.apache.arrow.stream";
const JSON: &str = "application/json";
const CSV: &str = "text/csv; charset=utf-8";
const PROBLEM: &str = "application/problem+json";

struct Server {
    session: Session,
    users: Users,
    places: Arc<Semaphore>,
}

/// Serves until `shutdown`. `session` lends its tables, memory and limits; whose rows are seen is by user.
pub async fn serve(
    listener: TcpListener,
    session: Session,
    users: Users,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let listener = Bounded(listener);
    let server = Arc::new(Server { session, users, places: Arc::new(Semaphore::new(QUERIES_MAX)) });
    let routes = Router::new()
        .route("/v1/sql", post(answer))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(server);
    let (ending, ended) = tokio::sync::oneshot::channel();
    let shutdown = async move {
        shutdown.await;
        // Nobody listens where the server ended by itself.
        let _ = ending.send(());
    };
    let serving = axum::serve(listener, routes).with_graceful_shutdown(shutdown).into_future();
    // A client that reads slowly must not keep the process from ending.
    let patience = async {
        if ended.await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        served = serving => served,
        () = patience => Ok(()),
    }
}

/// Takes connections whose clients must read.
struct Bounded(TcpListener);

impl Listener for Bounded {
    type Io = Stalling<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Stalling<TcpStream>, SocketAddr) {
        let (stream, peer) = Listener::accept(&mut self.0).await;
        // Or the end of an answer waits until its beginning is acknowledged, which clients put off for 40 ms. A connection that is gone
        // already is told of when it is read.
        let _ = stream.set_nodelay(true);
        (Stalling::new(stream, STALL_MAX), peer)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

async fn answer(State(server): State<Arc<Server>>, headers: HeaderMap, body: String) -> Response {
    let Some((user, scope)) = user(&server.users, &headers) else {
        let told = problem(
            StatusCode::UNAUTHORIZED,
            "send the token of a user of the file of users, as Authorization: Bearer …",
            None,
        );
        return ([(header::WWW_AUTHENTICATE, "Bearer")], told).into_response();
    };
    let Some(form) = Form::accepted(&headers) else {
        return problem(
            StatusCode::NOT_ACCEPTABLE,
            &format!("answers are {ARROW}, {JSON} or text/csv"),
            None,
        );
    };
    let Ok(place) = Arc::clone(&server.places).try_acquire_owned() else {
        let told = problem(
            StatusCode::SERVICE_UNAVAILABLE,
            &format!("{QUERIES_MAX} queries are running; ask again later"),
            None,
        );
        return ([(header::RETRY_AFTER, COME_AGAIN_S)], told).into_response();
    };
    info!(user, bytes = body.len(), "a query");
    match start(&server.session.scoped(scope), &body, form).await {
        Ok(sending) => sending.respond(place),
        Err(error) => refused(&error),
    }
}

/// Who asks: the user whose token it is.
fn user(users: &Users, headers: &HeaderMap) -> Option<(String, Scope)> {
    let given = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = given.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    users.by_token(token.trim())
}

/// How rows are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Arrow,
    Json,
    Csv,
}

impl Form {
    /// The first of what is accepted that we have; JSON where anything is.
    fn accepted(headers: &HeaderMap) -> Option<Self> {
        let Some(accepted) = headers.get(header::ACCEPT) else { return Some(Self::Json) };
        let kinds =
            accepted.to_str().ok()?.split(',').map(|kind| kind.split(';').next().unwrap_or(kind).trim());
        let form = |kind: &str| match kind {
            ARROW => Some(Self::Arrow),
            "text/csv" => Some(Self::Csv),
            JSON | "application/*" | "*/*" => Some(Self::Json),
            _ => None,
        };
        kinds.filter_map(form).next()
    }

    fn content_type(self) -> &'static str {
        match self {
            Self::Arrow => ARROW,
            Self::Json => JSON,
            Self::Csv => CSV,
        }
    }
}

/// An answer of which the first rows are there, so that what fails at once has a status of its own.
struct Sending {
    answer: Answer,
    encoder: Encoder,
    form: Form,
    first: Option<RecordBatch>,
}

async fn start(session: &Session, sql: &str, form: Form) -> Result<Sending, QueryError> {
    let mut statements = session.parse(sql)?;
    let count = statements.len();
    let (Some(statement), 1) = (statements.pop_front(), count) else {
        let message = format!("there must be one query, and there are {count}");
        return Err(QueryError::Query { message, at: None });
    };
    let mut answer = session.query(statement).await?;
    let first = answer.next().await?;
    let encoder = Encoder::new(form, &answer);
    Ok(Sending { answer, encoder: encoder.map_err(|error| unsendable(&error))?, form, first })
}

fn unsendable(error: &ArrowError) -> QueryError {
    QueryError::Query { message: format!("the answer has no such form: {error}"), at: None }
}

impl Sending {
    fn respond(self, place: OwnedSemaphorePermit) -> Response {
        let form = self.form;
        // The place is given back with the stream, whether it came to its end or its client went away.
        let rows = stream::try_unfold((Some(self), place), async |(sending, place)| {
            let Some(mut sending) = sending else { return Ok::<_, io::Error>(None) };
            let batch = match sending.first.take() {
                Some(batch) => Some(batch),
                None => sending.answer.next().await.map_err(io::Error::other)?,
            };
            // An error here breaks the body off, so that no client takes what it has for all.
            match batch {
                Some(batch) => {
                    let bytes = sending.encoder.write(&batch).map_err(io::Error::other)?;
                    Ok(Some((bytes, (Some(sending), place))))
                }
                None => {
                    let bytes = sending.encoder.finish().map_err(io::Error::other)?;
                    Ok(Some((bytes, (None, place))))
                }
            }
        });
        ([(header::CONTENT_TYPE, form.content_type())], Body::from_stream(Box::pin(rows))).into_response()
    }
}

/// Bytes that a writer has written and that are not sent yet.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Written {
    fn take(&self) -> Bytes {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).into()
    }
}

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Encoder {
    writer: Writer,
    written: Written,
}

#[expect(clippy::large_enum_variant, reason = "there is one to an answer")]
enum Writer {
    Arrow(StreamWriter<Written>),
    Json(ArrayWriter<Written>),
    Csv(CsvWriter<Written>),
}

impl Encoder {
    fn new(form: Form, answer: &Answer) -> Result<Self, ArrowError> {
        let written = Written::default();
        let out = written.clone();
        let writer = match form {
            Form::Arrow => Writer::Arrow(StreamWriter::try_new(out, &answer.schema)?),
            Form::Json => {
                Writer::Json(JsonBuilder::new().with_explicit_nulls(true).build::<_, JsonArray>(out))
            }
            Form::Csv => {
                let mut writer = CsvBuilder::new().with_header(true).build(out);
                // The names of the columns are sent also where there is no row.
                writer.write(&RecordBatch::new_empty(Arc::clone(&answer.schema)))?;
                Writer::Csv(writer)
            }
        };
        Ok(Self { writer, written })
    }

    fn write(&mut self, batch: &RecordBatch) -> Result<Bytes, ArrowError> {
        match &mut self.writer {
            Writer::Arrow(writer) => writer.write(batch)?,
            Writer::Json(writer) => writer.write(batch)?,
            Writer::Csv(writer) => writer.write(batch)?,
        }
        Ok(self.written.take())
    }

    fn finish(mut self) -> Result<Bytes, ArrowError> {
        match &mut self.writer {
            Writer::Arrow(writer) => writer.finish()?,
            Writer::Json(writer) => writer.finish()?,
            Writer::Csv(_) => {}
        }
        drop(self.writer);
        Ok(self.written.take())
    }
}

fn refused(error: &QueryError) -> Response {
    let (status, at) = match error {
        QueryError::Query { at, .. } => (StatusCode::BAD_REQUEST, *at),
        QueryError::Refused(_) => (StatusCode::FORBIDDEN, None),
        QueryError::Memory { .. } => (StatusCode::UNPROCESSABLE_ENTITY, None),
        QueryError::Deadline(_) => (StatusCode::GATEWAY_TIMEOUT, None),
        QueryError::Lake(_) | QueryError::Cluster(_) | QueryError::Prepare(_) => {
            (StatusCode::SERVICE_UNAVAILABLE, None)
        }
    };
    problem(status, &error.to_string(), at)
}

/// An error as RFC 9457 has it.
fn problem(status: StatusCode, detail: &str, at: Option<(u64, u64)>) -> Response {
    let (line, column) = at.unzip();
    let title = status.canonical_reason().unwrap_or_default();
    let told = json!({"type": "about:blank", "title": title, "status": status.as_u16(), "detail": detail, "line": line, "column": column});
    let mut response = (status, Json(told)).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM));
    response
}

#[cfg(test)]
mod tests;
