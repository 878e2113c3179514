//! A chain under measurement: its processes, and the processor time that they take.

use crate::cluster;
use forebay_tests::{Running, forebay, free_port, wait_for};
use std::{
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};
use tokio::runtime::Runtime;

/// Where a chain's messages lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On<'a> {
    /// A real Apache Kafka, here.
    Kafka(&'a str),
    /// The embedded broker, in the chain's own process.
    Embedded,
}

/// What runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What<'a> {
    /// The hops by plain rdkafka; messages of the given sizes, or copies of the requests.
    Bare { bytes: &'a [usize] },
    /// Forebay with the extractive model, or a served one.
    Forebay { model_url: Option<&'a str> },
}

/// How many processes share the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// All hops in one.
    One,
    /// One a hop (bare), or one a stage (Forebay).
    Each,
}

/// A chain at work.
pub struct Chain {
    pub at: String,
    processes: Vec<Running>,
    embedded: bool,
    _data: tempfile::TempDir,
}

impl Chain {
    pub fn start(runtime: &Runtime, on: On<'_>, what: What<'_>, layout: Layout, prefix: &str) -> Self {
        let data = tempfile::tempdir().expect("a folder");
        let at = match on {
            On::Kafka(at) => at.to_owned(),
            On::Embedded => format!("127.0.0.1:{}", free_port()),
        };
        let start = Start { runtime, on, at: &at, prefix, data: data.path() };
        let processes = match what {
            What::Bare { bytes } => start.bare(bytes, layout),
            What::Forebay { model_url } => start.forebay(model_url, layout),
        };
        Self { at, processes, embedded: on == On::Embedded, _data: data }
    }

    /// Whether its log runs in its own process.
    pub fn is_embedded(&self) -> bool {
        self.embedded
    }

    /// Processor seconds of all its processes so far.
    pub fn cpu_s(&self) -> f64 {
        self.processes.iter().map(cpu_s).sum()
    }
}

/// Processor seconds of a process so far, in user and in kernel mode, all its threads together.
pub fn cpu_s(process: &Running) -> f64 {
    // Linux counts in 1/100 s wherever it tells user space.
    const TICKS_PER_S: f64 = 100.0;
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.id())).expect("a living process");
    // The second field is the program's name in parentheses, and may hold anything.
    let fields: Vec<_> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    let ticks = |field: usize| fields[field - 3].parse::<f64>().expect("ticks");
    (ticks(14) + ticks(15)) / TICKS_PER_S
}

struct Start<'a> {
    runtime: &'a Runtime,
    on: On<'a>,
    at: &'a str,
    prefix: &'a str,
    data: &'a Path,
}

impl Start<'_> {
    fn bare(&self, bytes: &[usize], layout: Layout) -> Vec<Running> {
        let hops: Vec<Option<usize>> = match layout {
            Layout::One => vec![None],
            Layout::Each => (0..cluster::HOPS.len()).map(Some).collect(),
        };
        if let On::Kafka(at) = self.on {
            self.runtime.block_on(cluster::make_topics(at, self.prefix));
        }
        let process = |hop: Option<usize>| {
            let mut command = Command::new(std::env::current_exe().expect("this program"));
            command.args(["bare", "--at", self.at, "--prefix", self.prefix]);
            if self.on == On::Embedded {
                command.arg("--broker").arg(self.data.join("broker"));
            }
            if let Some(hop) = hop {
                command.args(["--hop", &hop.to_string()]);
            }
            if !bytes.is_empty() {
                let bytes: Vec<_> = bytes.iter().map(usize::to_string).collect();
                command.args(["--bytes", &bytes.join(",")]);
            }
            Running::start("a bare chain", &mut command)
        };
        let processes = hops.into_iter().map(process).collect();
        self.wait_for_broker();
        processes
    }

    fn forebay(&self, model_url: Option<&str>, layout: Layout) -> Vec<Running> {
        if let On::Kafka(_) = self.on {
            self.command(&["topics", "apply"]);
        }
        let admin = format!("127.0.0.1:{}", free_port());
        let mut processes = Vec::new();
        let mut start = |arguments: &[&str]| {
            let mut command = self.at_cluster(arguments);
            command.args(["--log-format", "json"]);
            if let Some(url) = model_url {
                command.args(["--model-url", url, "--model", "instant"]);
            }
            processes.push(Running::start("forebay", &mut command));
        };
        match layout {
            Layout::One => start(&["up", "answer", "--admin", &admin]),
            Layout::Each => {
                for stage in ["look_up", "retrieve", "infer", "validate", "publish", "fill", "index"] {
                    start(&["run", "answer", "--stage", stage]);
                }
            }
        }
        self.wait_for_broker();
        let is_up =
            |process: &Running| process.stderr().contains("is up") || process.stdout().contains("is up");
        wait_for("forebay", Duration::from_secs(60), || processes.iter().all(is_up).then_some(()));
        self.ingest();
        processes
    }

    /// The guides are what is asked about.
    fn ingest(&self) {
        let guides = guides();
        let mut command = Command::new(forebay());
        command.args(["ingest", "--bootstrap-servers", self.at, "--topic-prefix", self.prefix]).arg(&guides);
        finish(&mut command);
        let markdown = |entry: &std::io::Result<std::fs::DirEntry>| {
            entry
                .as_ref()
                .is_ok_and(|entry| entry.path().extension().is_some_and(|extension| extension == "md"))
        };
        let count = std::fs::read_dir(guides).expect("the guides").filter(markdown).count();
        let count = i64::try_from(count).expect("a few guides");
        let chunks = format!("{}{}", self.prefix, forebay_schemas::topics::CHUNKS.name);
        let is_split = || (cluster::records(self.at, &chunks) >= count).then_some(());
        wait_for("the guides to be split", Duration::from_secs(60), is_split);
    }

    fn at_cluster(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(forebay());
        command.args(arguments).arg("--data").arg(self.data).args(["--topic-prefix", self.prefix]);
        match self.on {
            On::Kafka(at) => command.args(["--bootstrap-servers", at]),
            On::Embedded => command.args(["--listen", self.at]),
        };
        command
    }

    fn command(&self, arguments: &[&str]) {
        finish(&mut self.at_cluster(arguments));
    }

    fn wait_for_broker(&self) {
        wait_for("the broker", Duration::from_secs(30), || TcpStream::connect(self.at).ok());
    }
}

/// Runs a command to its end.
fn finish(command: &mut Command) {
    let output = command.output().expect("a command");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The documents that are asked about.
pub fn guides() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../pipelines/guides")
}
