//! Sockets: accepts connections, cuts the byte stream into requests, writes the answers.
//!
//! Invariants: on one connection requests are served one after the other, so answers leave in the order
//! of the requests and a client's writes are stored in the order it sent them. What cannot be read or
//! is not served ends that connection with a log line that names the peer, the request and its version;
//! it never touches another.
//!
//! Limits: [`CONNECTIONS_MAX`] connections; [`REQUEST_BYTES_MAX`] for one request and
//! [`IN_FLIGHT_KIB_MAX`] for all that are being served, over all connections; [`IDLE_MAX`] of silence.

use crate::requests::{Outcome, Peer, SERVED, answer, api_versions};
use crate::shared::Shared;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use kafka_protocol::ResponseError;
use kafka_protocol::messages::{ApiKey, RequestHeader, RequestKind, ResponseHeader, ResponseKind};
use kafka_protocol::protocol::{Decodable, Encodable};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

const CONNECTIONS_MAX: usize = 1024;
const REQUEST_BYTES_MAX: usize = 100 << 20;
const IN_FLIGHT_KIB_MAX: usize = 256 << 10;
const IDLE_MAX: Duration = Duration::from_secs(600);
/// A client that takes longer to take its answer is gone.
const WRITE_MAX: Duration = Duration::from_secs(60);

/// Serves until `stop` says true, then lets requests in flight end.
pub(crate) async fn serve(shared: Arc<Shared>, listener: TcpListener, mut stop: watch::Receiver<bool>) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let memory = Arc::new(Semaphore::new(IN_FLIGHT_KIB_MAX));
    let mut running = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(ended) = running.join_next() => {
                if let Err(panic) = ended {
                    tracing::error!(%panic, "a connection's task ended by a bug; other connections go on");
                }
                continue;
            }
            _ = stop.wait_for(|stopped| *stopped) => break,
        };
        match accepted {
            Ok((socket, remote)) => {
                let Ok(place) = Arc::clone(&connections).try_acquire_owned() else {
                    tracing::warn!(peer = %remote, max = CONNECTIONS_MAX, "too many connections; closed the new one");
                    continue;
                };
                let connection = Connection {
                    shared: Arc::clone(&shared),
                    memory: Arc::clone(&memory),
                    stop: stop.clone(),
                };
                running.spawn(async move {
                    let _place = place;
                    if let Err(error) = connection.run(socket, remote).await {
                        tracing::debug!(peer = %remote, %error, "connection ended");
                    }
                });
            }
            Err(error) => {
                // Out of file descriptors, mostly: pausing lets connections end and give theirs back.
                tracing::warn!(%error, "could not accept a connection; will try again");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    while running.join_next().await.is_some() {}
}

struct Connection {
    shared: Arc<Shared>,
    memory: Arc<Semaphore>,
    stop: watch::Receiver<bool>,
}

impl Connection {
    async fn run(mut self, mut socket: TcpStream, remote: SocketAddr) -> io::Result<()> {
        socket.set_nodelay(true)?;
        let mut peer = Peer { remote, local: socket.local_addr()?, client_id: String::new() };
        let mut buffer = BytesMut::new();
        loop {
            let frame = tokio::select! {
                frame = timeout(IDLE_MAX, next_frame(&mut socket, &mut buffer, &self.memory, &peer)) => frame,
                _ = self.stop.wait_for(|stopped| *stopped) => return Ok(()),
            };
            let Ok(Some((frame, _held))) = frame? else { return Ok(()) };
            let Some(request) = Request::read(frame, &mut peer) else { return Ok(()) };
            let reply = match request {
                Request::UnknownApiVersions { correlation } => {
                    // In the form of version 0, which every client can read.
                    let refusal = api_versions(Some(ResponseError::UnsupportedVersion));
                    encode(ApiKey::ApiVersions, 0, correlation, &refusal.into(), &peer)
                }
                Request::Known { api, version, correlation, body } => {
                    let stopped = async { drop(self.stop.wait_for(|stopped| *stopped).await) };
                    let outcome = tokio::select! {
                        biased;
                        outcome = answer(&self.shared, &peer, version, *body) => outcome,
                        // Only what waits (a fetch, a join) is still here a moment after the stop.
                        () = async { stopped.await; tokio::time::sleep(Duration::from_millis(200)).await } => return Ok(()),
                    };
                    match outcome {
                        Outcome::Reply(response) => encode(api, version, correlation, &response, &peer),
                        Outcome::Silence => continue,
                        Outcome::Close(reason) => {
                            tracing::warn!(peer = %peer.remote, client = peer.client_id, ?api, version, reason, "closed the connection");
                            return Ok(());
                        }
                    }
                }
            };
            let Some(reply) = reply else { return Ok(()) };
            timeout(WRITE_MAX, socket.write_all(&reply)).await??;
        }
    }
}

/// The next request's bytes, and its share of the memory for requests in flight. `None`: the peer is done.
async fn next_frame(
    socket: &mut TcpStream,
    buffer: &mut BytesMut,
    memory: &Arc<Semaphore>,
    peer: &Peer,
) -> io::Result<Option<(Bytes, OwnedSemaphorePermit)>> {
    if !fill(socket, buffer, 4).await? {
        return Ok(None);
    }
    let length = buffer.get_i32();
    let length = match usize::try_from(length) {
        // Eight: the fixed part of every request header.
        Ok(n) if (8..=REQUEST_BYTES_MAX).contains(&n) => n,
        _ => {
            tracing::warn!(peer = %peer.remote, client = peer.client_id, length, max = REQUEST_BYTES_MAX,
                "closed the connection: not a Kafka request, or one that is too large");
            return Ok(None);
        }
    };
    let kib = u32::try_from(length / 1024 + 1).unwrap_or(u32::MAX);
    let held = Arc::clone(memory).acquire_many_owned(kib).await.map_err(io::Error::other)?;
    if !fill(socket, buffer, length).await? {
        return Ok(None);
    }
    Ok(Some((buffer.split_to(length).freeze(), held)))
}

/// Reads until `buffer` holds `want` bytes; false if the peer closed before.
async fn fill(socket: &mut TcpStream, buffer: &mut BytesMut, want: usize) -> io::Result<bool> {
    while buffer.len() < want {
        buffer.reserve((want - buffer.len()).max(16 << 10));
        if socket.read_buf(buffer).await? == 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

enum Request {
    Known { api: ApiKey, version: i16, correlation: i32, body: Box<RequestKind> },
    UnknownApiVersions { correlation: i32 },
}

impl Request {
    /// Decodes a frame. `None`, with a log line, when it cannot be served.
    fn read(mut frame: Bytes, peer: &mut Peer) -> Option<Request> {
        let mut fixed = &frame[..8];
        let (key, version, correlation) = (fixed.get_i16(), fixed.get_i16(), fixed.get_i32());
        let refuse = |peer: &Peer, reason: &str| {
            tracing::warn!(peer = %peer.remote, client = peer.client_id, api_key = key, version, reason, "closed the connection");
            None
        };
        let served = SERVED.iter().find(|(api, ..)| *api as i16 == key);
        let Some((api, min, max)) = served else {
            return refuse(peer, "this request is not served (see the broker's README)");
        };
        if !(*min..=*max).contains(&version) {
            if *api == ApiKey::ApiVersions {
                return Some(Request::UnknownApiVersions { correlation });
            }
            return refuse(peer, "this version of the request is not served; ApiVersions says which are");
        }
        let header = match RequestHeader::decode(&mut frame, api.request_header_version(version)) {
            Ok(header) => header,
            Err(error) => return refuse(peer, &format!("undecodable request header: {error}")),
        };
        if let Some(client_id) = header.client_id {
            peer.client_id = client_id.to_string();
        }
        match RequestKind::decode(*api, &mut frame, version) {
            Ok(body) => Some(Request::Known { api: *api, version, correlation, body: Box::new(body) }),
            Err(error) => refuse(peer, &format!("undecodable request: {error}")),
        }
    }
}

/// The answer as it goes over the wire. `None`, with a log line, if it has no form in that version.
fn encode(
    api: ApiKey,
    version: i16,
    correlation: i32,
    response: &ResponseKind,
    peer: &Peer,
) -> Option<BytesMut> {
    let mut out = BytesMut::with_capacity(512);
    out.put_i32(0);
    let header = ResponseHeader::default().with_correlation_id(correlation);
    let encoded = header
        .encode(&mut out, api.response_header_version(version))
        .and_then(|()| response.encode(&mut out, version));
    let length = i32::try_from(out.len() - 4);
    match (encoded, length) {
        (Ok(()), Ok(length)) => {
            out[..4].copy_from_slice(&length.to_be_bytes());
            Some(out)
        }
        (Err(error), _) => {
            tracing::error!(peer = %peer.remote, ?api, version, %error, "could not encode an answer; closed the connection");
            None
        }
        (_, Err(_)) => {
            tracing::error!(peer = %peer.remote, ?api, version, "answer is larger than 2 GiB; closed the connection");
            None
        }
    }
}
