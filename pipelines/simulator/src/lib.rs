//! A model server with a modelled engine and faults on demand: for tests, load tests and planning without a GPU.
//!
//! It serves OpenAI's chat completions, responses and embeddings, Anthropic's messages and rerank, with vLLM's metrics.
//! [`Settings`] say how fast it is and what goes wrong; a call's headers may say so too. Its log of calls is an account of
//! what was asked and answered, as a provider would keep it.
//!
//! Invariant: it knows nothing of Forebay. What an answer says, and what goes wrong with a call, follow from the seed and
//! from what was asked.

mod api;
mod attempts;
mod call;
mod clock;
mod dice;
mod engine;
mod faults;
mod limits;
mod log;
mod metrics;
mod replica;
mod serve;
mod settings;
mod spread;
mod stream;
mod text;

pub use call::text_hash;
pub use settings::{Settings, Wrong, keys};

use attempts::Attempts;
use clock::Clock;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use log::CallLog;
use replica::Replica;
use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    path::PathBuf,
    pin::pin,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
};

/// The most connections of a replica.
const CONNECTIONS_MAX: usize = 10_000;
/// How long calls under way may take when it stops.
const DRAIN: Duration = Duration::from_secs(5);
/// The most replicas.
pub const REPLICAS_MAX: usize = 64;

/// Reads a document of settings as pairs of path and text, or says what is wrong with it.
pub type Reader = fn(&str) -> Result<Vec<(String, String)>, String>;

/// What a simulator begins with.
pub struct Options {
    /// Its settings.
    pub settings: Settings,
    /// Where its first replica listens; the others take the ports behind it, or free ones where the port is 0.
    pub listen: SocketAddr,
    /// How many replicas, up to [`REPLICAS_MAX`].
    pub replicas: usize,
    /// Where calls are logged.
    pub call_log: Option<PathBuf>,
    /// How `PUT /simulate` reads what it is given.
    pub reader: Reader,
}

/// Why a simulator could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An address is taken, or is none of this machine's.
    #[error("could not listen on {address}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The log cannot be written.
    #[error("could not open call log {path}")]
    Log {
        /// Where it was to lie.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There are no replicas, or too many, or not so many ports.
    #[error("{0} replicas from port {1} cannot be: there may be 1 to {REPLICAS_MAX}, up to port 65535")]
    Replicas(usize, u16),
}

/// Ends a connection on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the connection is broken on purpose")]
struct Broken;

/// What replicas share.
struct Shared {
    settings: RwLock<Arc<Settings>>,
    first: Settings,
    reader: Reader,
    log: Option<CallLog>,
    attempts: Attempts,
    is_stopping: AtomicBool,
    clock: Clock,
    replicas: RwLock<Vec<std::sync::Weak<Replica>>>,
}

impl Shared {
    fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Goes on with the settings of the start, and what a document changes of them.
    fn obey(&self, document: &str) -> Result<Arc<Settings>, String> {
        let pairs = (self.reader)(document)?;
        let next = self.first.clone().with(pairs).map_err(|wrong| wrong.to_string())?;
        self.first.may_become(&next).map_err(|wrong| wrong.to_string())?;
        let next = Arc::new(next);
        *self.settings.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&next);
        let replicas = self.replicas.read().unwrap_or_else(PoisonError::into_inner);
        replicas.iter().filter_map(std::sync::Weak::upgrade).for_each(|replica| replica.obey(&next));
        Ok(next)
    }
}

/// Replicas that listen.
pub struct Simulator {
    shared: Arc<Shared>,
    replicas: Vec<(TcpListener, Arc<Replica>)>,
    addresses: Vec<SocketAddr>,
}

impl Simulator {
    /// Listens.
    pub async fn bind(options: Options) -> Result<Self, Error> {
        let Options { settings, listen, replicas: wanted, call_log, reader } = options;
        let port = listen.port();
        let last = u16::try_from(wanted).ok().and_then(|wanted| port.checked_add(wanted.checked_sub(1)?));
        if last.is_none() || wanted > REPLICAS_MAX {
            return Err(Error::Replicas(wanted, port));
        }
        let log = match call_log {
            Some(path) => Some(CallLog::open(&path).map_err(|source| Error::Log { path, source })?),
            None => None,
        };
        let shared = Arc::new(Shared {
            settings: RwLock::new(Arc::new(settings.clone())),
            first: settings,
            reader,
            log,
            attempts: Attempts::default(),
            is_stopping: AtomicBool::new(false),
            clock: Clock::start(),
            replicas: RwLock::default(),
        });
        let (mut replicas, mut addresses) = (Vec::new(), Vec::new());
        for (number, offset) in (0..wanted).zip(0_u16..) {
            let port = if port == 0 { 0 } else { port.saturating_add(offset) };
            let address = SocketAddr::new(listen.ip(), port);
            let fault = |source| Error::Listen { address, source };
            let listener = TcpListener::bind(address).await.map_err(fault)?;
            addresses.push(listener.local_addr().map_err(fault)?);
            replicas.push((listener, Arc::new(Replica::new(number, Arc::clone(&shared)))));
        }
        *shared.replicas.write().unwrap_or_else(PoisonError::into_inner) =
            replicas.iter().map(|(_, replica)| Arc::downgrade(replica)).collect();
        Ok(Self { shared, replicas, addresses })
    }

    /// Where its replicas listen.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Serves until `stop`; then lets calls under way end for up to five seconds.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let (stopping, stopped) = watch::channel(false);
        let mut drivers = JoinSet::new();
        let mut listeners = JoinSet::new();
        for (listener, replica) in self.replicas {
            drivers.spawn(Arc::clone(&replica).drive());
            listeners.spawn(listen(listener, replica, stopped.clone()));
        }
        stop.await;
        stopping.send_replace(true);
        let drained =
            tokio::time::timeout(DRAIN, async { while listeners.join_next().await.is_some() {} }).await;
        if drained.is_err() {
            self.shared.is_stopping.store(true, Ordering::Relaxed);
            // Dropped with their connections, calls write their lines.
            listeners.shutdown().await;
        }
    }
}

async fn listen(listener: TcpListener, replica: Arc<Replica>, mut stopped: watch::Receiver<bool>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &room) => accepted,
            // Without a sender nobody can want it to go on.
            _ = stopped.wait_for(|stopped| *stopped) => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
        };
        match accepted {
            Ok((stream, place)) => {
                let connection = connection(stream, Arc::clone(&replica), stopped.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            // Mostly too many open files: those that are open must end first.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(room).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}

async fn connection(stream: TcpStream, replica: Arc<Replica>, mut stopped: watch::Receiver<bool>) {
    // Tokens are small, and each matters.
    _ = stream.set_nodelay(true);
    let is_reset = Arc::new(AtomicBool::new(false));
    let resets = Arc::clone(&is_reset);
    let service = service_fn(move |request| {
        let (replica, resets) = (Arc::clone(&replica), Arc::clone(&resets));
        // In a box, since the connection is polled without being given away.
        Box::pin(async move {
            let served = serve::serve(replica, request).await;
            resets.store(served.is_err(), Ordering::Relaxed);
            served
        })
    });
    let mut connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    {
        let mut stopping = pin!(stopped.wait_for(|stopped| *stopped));
        let mut is_told = false;
        loop {
            tokio::select! {
                _ = poll_fn(|cx| connection.poll_without_shutdown(cx)) => break,
                _ = &mut stopping, if !is_told => {
                    is_told = true;
                    std::pin::Pin::new(&mut connection).graceful_shutdown();
                }
            }
        }
    }
    let stream = connection.into_parts().io.into_inner();
    if is_reset.load(Ordering::Relaxed) {
        // Instead of an answer there was an error, which means a reset; closed like this, the peer gets one.
        _ = stream.set_zero_linger();
    }
}
