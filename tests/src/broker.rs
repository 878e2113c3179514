//! Apache Kafka of a test's own, one broker or three, which may be killed and started again.
//!
//! Invariant: over all its lives a broker has the same folder and the same ports, so that clients find what is back.

use crate::{Client, Running, free_port, product::END, services, wait_for};
use rustix::process::Signal;
use std::time::Duration;

/// How long a start may take on a machine that does much else, also behind a crash.
const START: Duration = Duration::from_secs(90);

/// What spares Java's startup processor time: three of them start on a small machine, and live for a minute.
const JAVA: &str = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC";

/// How long a broker may take to hand its partitions over and end.
const STOP: Duration = Duration::from_secs(60);

/// One broker.
#[derive(Debug)]
pub struct Broker {
    folder: tempfile::TempDir,
    port: u16,
    controller_port: u16,
    properties: Vec<String>,
    process: Running,
}

impl Broker {
    /// A broker with these properties (`NAME=VALUE`); nothing where Apache Kafka is missing.
    ///
    /// # Panics
    /// When it does not come up.
    #[track_caller]
    pub fn start(properties: &[&str]) -> Option<Self> {
        let properties = properties.iter().map(|&property| property.to_owned()).collect();
        Some(Self::begin(free_port(), free_port(), properties)?.up())
    }

    /// A broker that can also be reached by other paths: each a port that it listens on, and the one that it tells the clients
    /// who come there, as that of a proxy.
    ///
    /// # Panics
    /// When it does not come up.
    #[track_caller]
    pub fn behind(paths: &[(u16, u16)]) -> Option<Self> {
        let (port, controller_port) = (free_port(), free_port());
        let mut listeners = format!("PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}");
        let mut advertised = format!("PLAINTEXT://127.0.0.1:{port}");
        let mut protocols = "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT".to_owned();
        for (number, (listened, told)) in paths.iter().enumerate() {
            listeners += &format!(",PATH{number}://127.0.0.1:{listened}");
            advertised += &format!(",PATH{number}://127.0.0.1:{told}");
            protocols += &format!(",PATH{number}:PLAINTEXT");
        }
        let properties = vec![
            format!("listeners={listeners}"),
            format!("advertised.listeners={advertised}"),
            format!("listener.security.protocol.map={protocols}"),
        ];
        Some(Self::begin(port, controller_port, properties)?.up())
    }

    #[track_caller]
    fn begin(port: u16, controller_port: u16, properties: Vec<String>) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap_or_else(|error| panic!("could not make a folder: {error}"));
        let process = run(&folder, (port, controller_port), &properties)?;
        Some(Self { folder, port, controller_port, properties, process })
    }

    #[track_caller]
    fn up(mut self) -> Self {
        self.wait();
        self
    }

    #[track_caller]
    fn wait(&mut self) {
        wait_for("Apache Kafka to be up", START, || {
            assert!(self.process.is_alive(), "Apache Kafka ended");
            let said = [self.process.stdout(), self.process.stderr()];
            said.iter().any(|said| said.contains("Kafka Server started")).then_some(())
        });
    }

    /// Where it is.
    pub fn servers(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Ends it as a crash does.
    #[track_caller]
    pub fn kill(&mut self) {
        self.process.signal(Signal::KILL);
        self.process.ended(END);
    }

    /// Ends it as an operator does: what it leads goes to others first.
    #[track_caller]
    pub fn stop(&mut self) {
        self.process.signal(Signal::TERM);
        self.process.ended(STOP);
    }

    /// Starts it again, on what it left.
    #[track_caller]
    pub fn restart(&mut self) {
        if let Some(process) = run(&self.folder, (self.port, self.controller_port), &self.properties) {
            self.process = process;
            self.wait();
        }
    }
}

#[track_caller]
fn run(folder: &tempfile::TempDir, ports: (u16, u16), properties: &[String]) -> Option<Running> {
    let properties: Vec<_> = properties.iter().map(String::as_str).collect();
    let mut command = services::kafka_command(folder.path(), ports.0, ports.1, &properties)?;
    command.env("JAVA_TOOL_OPTIONS", JAVA);
    Some(Running::start("Apache Kafka", &mut command))
}

/// Three brokers, each of them a controller too. A topic has three replicas, of which two must have what is acknowledged.
#[derive(Debug)]
pub struct Cluster {
    /// Its brokers.
    pub brokers: Vec<Broker>,
}

impl Cluster {
    /// How many brokers there are, and replicas.
    pub const BROKERS: usize = 3;

    /// Three brokers; nothing where Apache Kafka is missing.
    ///
    /// # Panics
    /// When they do not come up.
    #[track_caller]
    pub fn start() -> Option<Self> {
        let ports: Vec<_> = (1..=Self::BROKERS).map(|node| (node, free_port(), free_port())).collect();
        let voters: Vec<_> =
            ports.iter().map(|(node, _, controller)| format!("{node}@127.0.0.1:{controller}")).collect();
        let mut brokers = Vec::with_capacity(Self::BROKERS);
        for (node, port, controller) in &ports {
            let properties = [
                format!("node.id={node}"),
                format!("controller.quorum.voters={}", voters.join(",")),
                "default.replication.factor=3".to_owned(),
                "min.insync.replicas=2".to_owned(),
                "offsets.topic.replication.factor=3".to_owned(),
                "transaction.state.log.replication.factor=3".to_owned(),
                "transaction.state.log.min.isr=2".to_owned(),
            ];
            brokers.push(Broker::begin(*port, *controller, properties.into())?);
        }
        // None is up before most are.
        brokers.iter_mut().for_each(Broker::wait);
        Some(Self { brokers })
    }

    /// Where all of them are.
    pub fn servers(&self) -> String {
        self.brokers.iter().map(Broker::servers).collect::<Vec<_>>().join(",")
    }

    /// Waits until each broker knows of all of them, and that every partition has all its replicas in sync: one that has just
    /// come back may still know what was so before.
    ///
    /// # Panics
    /// When that takes longer than `limit`.
    #[track_caller]
    pub fn in_sync(&self, limit: Duration) {
        for broker in &self.brokers {
            let client = Client::new(&broker.servers(), "");
            wait_for("all replicas to be in sync", limit, || client.is_in_sync(Self::BROKERS).then_some(()));
        }
    }
}
