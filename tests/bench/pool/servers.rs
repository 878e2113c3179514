//! The servers of a run, and the ways to choose among them.

use crate::{REPLICAS, SLOTS};
use forebay_calls::{
    Api, Call, CallError, Listener, Model, Pool, Reply, Retry, Secret, Server,
    client::{Hedging, Parts, client},
    pool::{Endpoint, Http},
    server::Timeouts,
    throttle::Caps,
};
use forebay_simulator::{Options, Settings, Simulator};
use forebay_tests::{Running, wait_for};
use futures::future::BoxFuture;
use serde::Deserialize;
use std::{
    net::SocketAddr,
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// Serves, as told on the command line, until it is killed.
pub async fn serve(settings: Vec<String>, log: PathBuf) {
    let pair = |setting: String| {
        let (path, value) = setting.split_once('=').expect("KEY=VALUE");
        (path.to_owned(), value.to_owned())
    };
    let options = Options {
        settings: Settings::default().with(settings.into_iter().map(pair)).expect("these can be"),
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        replicas: REPLICAS,
        call_log: Some(log),
        reader: |_| Ok(Vec::new()),
    };
    let simulator = Simulator::bind(options).await.expect("free ports");
    simulator.addresses().iter().for_each(|address| println!("http://{address}/v1"));
    simulator.run(std::future::pending()).await;
}

/// Replicas at work.
pub struct Servers {
    urls: Vec<String>,
    log: PathBuf,
    _process: Running,
    _folder: tempfile::TempDir,
}

/// A line of the simulator's log.
#[derive(Debug, Deserialize)]
pub struct Line {
    pub replica: usize,
    pub call_id: Option<String>,
    pub cached_tokens: u64,
    pub status: Option<u16>,
    pub admitted_us: Option<i64>,
    pub ended_us: i64,
}

impl Servers {
    /// Starts them with these settings.
    pub fn start(settings: &[(&str, String)]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path().join("calls.jsonl");
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command
            .arg("--log")
            .arg(&log)
            .arg("--serve")
            .args(settings.iter().map(|(path, value)| format!("{path}={value}")));
        let process = Running::start("the servers", &mut command);
        let urls = wait_for("the servers' addresses", Duration::from_secs(30), || {
            let urls: Vec<_> = process.stdout().lines().map(str::to_owned).collect();
            (urls.len() == REPLICAS).then_some(urls)
        });
        Self { urls, log, _process: process, _folder: folder }
    }

    /// What they say was asked of them, by so many tries. Those that were given up are told of when their connection is seen to
    /// be gone; one that was given up before it was sent is never told of, so the wait is bounded.
    pub async fn lines(&self, tries: usize) -> Vec<Line> {
        for _ in 0..100 {
            let text = std::fs::read_to_string(&self.log).expect("a log");
            if text.lines().count() >= tries {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let text = std::fs::read_to_string(&self.log).expect("a log");
        text.lines().map(|line| serde_json::from_str(line).expect("a line of the log")).collect()
    }

    fn models(&self) -> impl Iterator<Item = Arc<dyn Model>> {
        self.urls.iter().map(|url| {
            let server =
                Server::new(Api::Chat, url, "simulated", vec![Secret::new("sk-bench")], Timeouts::default());
            Arc::new(server.expect("a URL")) as Arc<dyn Model>
        })
    }

    /// A client of them, and the pool in it that is to be kept, where there is one.
    pub fn client(&self, balance: Balance) -> (Arc<dyn Model>, Option<Arc<Pool>>) {
        let hedging = match balance {
            Balance::Pool(hedging) => hedging,
            simple => {
                let running = (0..REPLICAS).map(|_| AtomicUsize::default()).collect();
                let simple = Simple {
                    servers: self.models().collect(),
                    balance: simple,
                    next: AtomicUsize::default(),
                    running,
                };
                // As with the pool, what is refused is tried again.
                return (Arc::new(Retry::new(Arc::new(simple), Arc::default())), None);
            }
        };
        let endpoint = |(url, model): (&String, Arc<dyn Model>)| Endpoint {
            name: url.clone(),
            model,
            caps: Caps { outstanding: SLOTS, requests_per_minute: None, tokens_per_minute: None },
            origin: url.clone(),
            watch: Some(Arc::new(Http::new(url).expect("a URL"))),
            starts_cold: false,
            shared: None,
        };
        let jitter = Arc::new(|| 0.5);
        let endpoints = self.urls.iter().zip(self.models()).map(endpoint).collect();
        let pool = Arc::new(Pool::new("simulated", endpoints, jitter.clone()));
        let parts = Parts { pool: pool.clone(), hedging, fallbacks: Vec::new(), allowances: None, jitter };
        (client(parts), Some(pool))
    }
}

/// How calls are shared out.
#[derive(Clone, Copy, Debug)]
pub enum Balance {
    /// As Forebay does.
    Pool(Hedging),
    /// To each in turn.
    RoundRobin,
    /// To the one with the fewest under way.
    LeastRequests,
}

/// The two ways to balance that everybody has: a call goes to a server when it comes, and queues there.
struct Simple {
    servers: Vec<Arc<dyn Model>>,
    balance: Balance,
    next: AtomicUsize,
    running: Vec<AtomicUsize>,
}

/// Counts a call for as long as it is under way.
struct Counted<'a>(&'a AtomicUsize);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Model for Simple {
    fn provider(&self) -> &'static str {
        "simple"
    }

    fn name(&self) -> &str {
        "simulated"
    }

    fn complete<'a>(
        &'a self,
        call: &'a Call<'_>,
        listener: &'a dyn Listener,
    ) -> BoxFuture<'a, Result<Reply, CallError>> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.servers.len();
        let index = match self.balance {
            Balance::LeastRequests => {
                // Equals take turns.
                let turned = (0..self.servers.len()).map(|index| (index + turn) % self.servers.len());
                turned.min_by_key(|&index| self.running[index].load(Ordering::Relaxed)).unwrap_or(turn)
            }
            _ => turn,
        };
        self.running[index].fetch_add(1, Ordering::Relaxed);
        let counted = Counted(&self.running[index]);
        Box::pin(async move {
            let _counted = counted;
            self.servers[index].complete(call, listener).await
        })
    }
}
