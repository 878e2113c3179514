//! The embedded broker: one node that speaks the Kafka protocol, in process, on a data folder.
//!
//! Plaintext, and on the loopback address unless told otherwise: whoever can connect can do anything.
//! In production its place is taken by Apache Kafka or another cluster, in configuration only.
//!
//! What is promised, and what is not, stands in the crate's `README.md`. In one sentence: an acknowledged
//! record survives a kill of the process under every [`Fsync`] policy, and a power cut as far as the
//! policy says.
//!
//! ```no_run
//! # async fn example() -> Result<(), forebay_broker::StartError> {
//! use forebay_broker::{Broker, Config};
//! let broker = Broker::start(Config::new("data/broker", ([127, 0, 0, 1], 9092))).await?;
//! println!("bootstrap.servers={}", broker.address());
//! broker.shutdown().await;
//! # Ok(())
//! # }
//! ```

mod clock;
mod coordinator;
mod groups;
mod journal;
mod log;
mod offsets;
mod partition;
mod requests;
mod server;
mod settings;
mod shared;
mod topics;

use shared::Shared;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// When acknowledged records are made to reach the disk.
///
/// Every policy acknowledges after `write(2)`, so none loses an acknowledged record when the *process*
/// dies. They differ in what a power cut or a crash of the *machine* may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fsync {
    /// Sync in the background at this interval: a power cut takes at most what was acknowledged since.
    Interval(Duration),
    /// Sync before each acknowledgement: a power cut takes nothing. Tens to hundreds of batches a second.
    EveryBatch,
    /// Leave it to the operating system: a power cut may take the last half minute or so.
    Never,
}

/// How to start a broker. [`Config::new`] gives the defaults.
#[derive(Debug, Clone)]
pub struct Config {
    /// The folder that holds everything; made if it is missing, locked while the broker runs.
    pub data: PathBuf,
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Default: every second.
    pub fsync: Fsync,
    /// `segment.bytes` of topics that do not set it. Default: 64 MiB.
    pub segment_bytes: u64,
    /// How often retention and compaction look at each partition. Default: 10 s.
    pub upkeep_every: Duration,
    /// How long the first generation of a new group waits for more members. Default: 100 ms.
    pub group_wait: Duration,
    /// How long a taken address is tried again, as after a `kill -9`. Default: 5 s.
    pub bind_patience: Duration,
}

impl Config {
    /// A configuration with the documented defaults.
    pub fn new(data: impl Into<PathBuf>, listen: impl Into<SocketAddr>) -> Config {
        Config {
            data: data.into(),
            listen: listen.into(),
            fsync: Fsync::Interval(Duration::from_secs(1)),
            segment_bytes: 64 << 20,
            upkeep_every: Duration::from_secs(10),
            group_wait: Duration::from_millis(100),
            bind_patience: Duration::from_secs(5),
        }
    }
}

/// Why a broker could not start, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another broker runs on the folder.
    #[error("data folder {} is in use by another process; stop that one or choose another folder", data.display())]
    DataLocked {
        /// The folder.
        data: PathBuf,
    },
    /// The address is taken.
    #[error("address {address} is in use by another process; stop that one or choose another address")]
    AddressInUse {
        /// The address.
        address: SocketAddr,
    },
    /// The address cannot be listened on for another reason.
    #[error("could not listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// Bytes in the middle of a log are not what was written; good records follow.
    #[error(
        "segment {} is damaged at byte {position} ({reason}); restore the file from a copy, or give up its \
         records from there on with: truncate -s {position} '{}'",
        path.display(), path.display()
    )]
    DamagedSegment {
        /// The segment's file.
        path: PathBuf,
        /// Where the first damaged batch begins.
        position: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// The data folder cannot be used.
    #[error("could not read or write {}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
}

/// A running broker. Dropping it stops it without a last sync, as a kill would.
///
/// It runs on two threads of its own: its file IO stays off the caller's async workers, and a caller
/// that blocks in a Kafka client, even on a single-threaded runtime, does not keep it from answering.
#[derive(Debug)]
pub struct Broker {
    shared: Arc<Shared>,
    address: SocketAddr,
    stop: watch::Sender<bool>,
    server: JoinHandle<()>,
    runtime: Owned,
    lock: Arc<File>,
}

/// A runtime that may be dropped on an async thread.
#[derive(Debug)]
struct Owned(Option<Runtime>);

impl Drop for Owned {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Broker {
    /// Locks the data folder, opens and checks what is in it, and listens.
    ///
    /// # Errors
    /// See [`StartError`]; each names the folder, file or address and what to do next.
    pub async fn start(config: Config) -> Result<Broker, StartError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| StartError::Io { path, source }
        };
        fs::create_dir_all(&config.data).map_err(at(&config.data))?;
        let lock = Arc::new(lock(&config.data)?);
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("forebay-broker")
            .enable_all()
            .build()
            .map_err(at(&config.data))?;
        let runtime = Owned(Some(runtime));
        let Some(handle) = runtime.0.as_ref().map(|r| r.handle().clone()) else {
            return Err(at(&config.data)(io::Error::other("no runtime")));
        };
        let data = config.data.clone();
        let (listen, patience) = (config.listen, config.bind_patience);
        // The lock goes along: a caller that gives up waiting must not free a folder that is being opened.
        let held = Arc::clone(&lock);
        let opened = handle.spawn_blocking(move || {
            let _held = held;
            Shared::open(config)
        });
        let opened = opened.await;
        let shared = Arc::new(opened.map_err(|stopped| at(&data)(io::Error::other(stopped)))??);
        let bound = handle.spawn(bind(listen, patience)).await;
        let listener = bound.map_err(|stopped| at(&data)(io::Error::other(stopped)))??;
        let address =
            listener.local_addr().map_err(|source| StartError::Listen { address: listen, source })?;
        announce(&data, address).map_err(at(&data.join("address")))?;
        let (stop, stopped) = watch::channel(false);
        let held = Arc::clone(&lock);
        let background = Arc::clone(&shared);
        handle.spawn(async move {
            let _held = held;
            tokio::join!(
                background.coordinator.run(),
                background.flush_at_intervals(),
                Arc::clone(&background).keep_up()
            );
        });
        let server = handle.spawn(server::serve(Arc::clone(&shared), listener, stopped));
        let (single_node, plaintext) = (true, true);
        tracing::info!(%address, data = %data.display(), single_node, plaintext, "embedded broker listens");
        if !address.ip().is_loopback() {
            tracing::warn!(%address, "the broker has no access control and is reachable from other machines");
        }
        Ok(Broker { shared, address, stop, server, runtime, lock })
    }

    /// Where it listens: what clients take as `bootstrap.servers`.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Lets requests in flight end, syncs everything to disk and frees folder and address.
    pub async fn shutdown(self) {
        let Broker { shared, stop, server, mut runtime, lock, .. } = self;
        stop.send_replace(true);
        let _ = server.await;
        if let Err(error) = shared.flush().await {
            tracing::error!(%error, "could not sync written records to disk before the end");
        }
        let _ = fs::remove_file(shared.config.data.join("address"));
        if let Some(runtime) = runtime.0.take() {
            // Waits for a compaction to end, so that nobody writes once the lock is gone.
            let ended = std::thread::spawn(move || runtime.shutdown_timeout(Duration::from_secs(30)));
            let _ = tokio::task::spawn_blocking(move || ended.join()).await;
        }
        drop(lock);
    }
}

/// Takes the folder for this process; the operating system gives it back when the process ends, however.
fn lock(data: &Path) -> Result<File, StartError> {
    let path = data.join("lock");
    let io = |source| StartError::Io { path: path.clone(), source };
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(io)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StartError::DataLocked { data: data.to_owned() }),
        Err(TryLockError::Error(source)) => Err(StartError::Io { path, source }),
    }
}

/// Listens, trying for a while: after a `kill -9` the old sockets can hold the address for a moment.
/// (`TcpListener::bind` sets `SO_REUSEADDR`, so connections in `TIME_WAIT` do not.)
async fn bind(address: SocketAddr, patience: Duration) -> Result<TcpListener, StartError> {
    let until = tokio::time::Instant::now() + patience;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(e) if e.kind() != io::ErrorKind::AddrInUse => {
                return Err(StartError::Listen { address, source: e });
            }
            Err(_) if tokio::time::Instant::now() >= until => {
                return Err(StartError::AddressInUse { address });
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Writes `{data}/address`, where other processes on this machine find the broker; whole or not at all.
fn announce(data: &Path, address: SocketAddr) -> io::Result<()> {
    let new = data.join("address.new");
    fs::write(&new, format!("{address}\n"))?;
    fs::rename(new, data.join("address"))
}
